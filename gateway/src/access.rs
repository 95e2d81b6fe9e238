//! Which addresses a route is for.

use std::net::IpAddr;

use ipnet::IpNet;
use ops::config::Broken;
use protocol::{ErrorCode, Problem};
use serde::{Deserialize, Serialize};

/// `access`: by the address of the client, as `[client]` finds it out.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AccessConfig {
    /// Addresses and networks. Empty: all.
    pub allow: Vec<String>,
    /// Addresses and networks that are refused, also if they are allowed.
    pub deny: Vec<String>,
}

/// The networks, ready to ask.
#[derive(Debug, Clone, Default)]
pub struct Access {
    allow: Box<[IpNet]>,
    deny: Box<[IpNet]>,
}

impl Access {
    /// # Errors
    /// The entry that is no address and no network.
    pub fn new(config: &AccessConfig) -> Result<Self, Broken> {
        Ok(Self {
            allow: networks("allow", &config.allow)?,
            deny: networks("deny", &config.deny)?,
        })
    }

    /// # Errors
    /// `forbidden`; also if the address is not known and there are rules.
    pub fn check(&self, client: Option<IpAddr>) -> Result<(), Problem> {
        if self.allow.is_empty() && self.deny.is_empty() {
            return Ok(());
        }
        let has = |networks: &[IpNet], client: IpAddr| {
            networks.iter().any(|network| network.contains(&client))
        };
        // An IPv4 address may come in the clothes of IPv6.
        let client = client.map(|client| client.to_canonical());
        let welcome = client.is_some_and(|client| {
            !has(&self.deny, client) && (self.allow.is_empty() || has(&self.allow, client))
        });
        if welcome {
            return Ok(());
        }
        let who = client.map_or_else(|| "an unknown address".to_owned(), |ip| ip.to_string());
        Err(Problem::new(
            ErrorCode::Forbidden,
            format!("requests from {who} are not allowed here"),
        ))
    }
}

fn networks(key: &str, list: &[String]) -> Result<Box<[IpNet]>, Broken> {
    let network = |(place, text): (usize, &String)| {
        let network = text.parse::<IpNet>();
        let network = network.or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
        network.map_err(|_| {
            let rule = "must be an address or a network, as in 10.0.0.0/8";
            Broken::value(&place.to_string(), text, rule).under(key)
        })
    };
    list.iter().enumerate().map(network).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(allow: &[&str], deny: &[&str], client: &str, want: bool) {
        let list = |list: &[&str]| list.iter().map(|&text| text.to_owned()).collect();
        let config = AccessConfig {
            allow: list(allow),
            deny: list(deny),
        };
        let access = Access::new(&config).unwrap();
        assert_eq!(access.check(client.parse().ok()).is_ok(), want, "{client}");
    }

    #[test]
    fn denied_networks_win_over_allowed_ones() {
        check(&[], &[], "203.0.113.9", true);
        check(&[], &[], "nobody", true);
        check(&["10.0.0.0/8"], &[], "10.1.2.3", true);
        check(&["10.0.0.0/8"], &[], "::ffff:10.1.2.3", true);
        check(&["10.0.0.0/8"], &[], "11.1.2.3", false);
        check(&["10.0.0.0/8"], &[], "nobody", false);
        check(&["10.0.0.0/8"], &["10.0.0.7"], "10.0.0.7", false);
        check(&[], &["2001:db8::/32"], "2001:db8::1", false);
        check(&[], &["2001:db8::/32"], "2001:db9::1", true);
    }
}
