//! Who asks, and where: the peer, or what a trusted proxy says of the client before it.

use std::net::IpAddr;

use http::{HeaderMap, HeaderName};
use ipnet::IpNet;
use ops::config::{Broken, non_empty};
use protocol::Colo;

use crate::config::ClientConfig;

/// `[client]`, ready to ask.
#[derive(Debug, Clone, Default)]
pub struct ClientRules {
    trusted: Box<[IpNet]>,
    address: Option<HeaderName>,
    colo: Option<HeaderName>,
}

impl ClientRules {
    /// # Errors
    /// The key, below `client`, that breaks a rule.
    pub fn new(config: &ClientConfig) -> Result<Self, Broken> {
        let header = |key: &str, name: &str| {
            let parse = |name: &str| {
                name.parse::<HeaderName>()
                    .map_err(|_| Broken::value(key, name, "cannot be the name of a header"))
            };
            non_empty(name).map(parse).transpose()
        };
        let network = |(number, text): (usize, &String)| {
            let network = text.parse::<IpNet>();
            let network = network.or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
            network.map_err(|_| {
                let rule = format!("= {text:?} must be an address or a network, as in 10.0.0.0/8");
                Broken::new(&number.to_string(), rule).under("trusted_proxies")
            })
        };
        let trusted = config.trusted_proxies.iter().enumerate().map(network);
        let rules = Self {
            trusted: trusted.collect::<Result<_, _>>()?,
            address: header("address_header", &config.address_header)?,
            colo: header("colo_header", &config.colo_header)?,
        };
        let believes = rules.address.is_some() || rules.colo.is_some() || config.proxy_protocol;
        if rules.trusted.is_empty() && believes {
            return Err(Broken::new(
                "trusted_proxies",
                "must name those who are believed: anybody can send address_header, colo_header and PROXY headers",
            ));
        }
        Ok(rules)
    }

    /// Whether this is the address of a trusted proxy.
    pub fn trusts(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.trusted
            .iter()
            .any(|network| network.contains(&address))
    }

    /// The client's address. In a chain like `X-Forwarded-For`, the last one that is not itself a trusted
    /// proxy: whatever stands before it may be invented.
    pub fn address(&self, peer: Option<IpAddr>, headers: &HeaderMap) -> Option<IpAddr> {
        let peer = peer?.to_canonical();
        let Some(header) = &self.address else {
            return Some(peer);
        };
        if !self.trusts(peer) {
            return Some(peer);
        }
        let lines = headers.get_all(header).iter().rev();
        let lines = lines.map(|line| line.to_str().unwrap_or_default());
        let mut client = peer;
        for step in lines.flat_map(|line| line.rsplit(',')) {
            match step.trim().parse::<IpAddr>() {
                Ok(address) => client = address.to_canonical(),
                // Not an address: nothing before it can be believed either.
                Err(_) => break,
            }
            if !self.trusts(client) {
                break;
            }
        }
        Some(client)
    }

    /// The site where the request came in: what a trusted proxy says, or `own`. The header is a colo, or
    /// ends in one after a `-`, as in `CF-Ray: 9a1b2c3d4e5f6789-SFO`.
    pub fn colo(&self, peer: Option<IpAddr>, headers: &HeaderMap, own: Colo) -> Colo {
        let Some(header) = &self.colo else {
            return own;
        };
        if !peer.is_some_and(|peer| self.trusts(peer)) {
            return own;
        }
        let said = headers.get(header).and_then(|value| value.to_str().ok());
        let said = said.map(|said| said.rsplit('-').next().unwrap_or(said).trim());
        said.and_then(|said| said.to_ascii_uppercase().parse().ok())
            .unwrap_or(own)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules() -> ClientRules {
        ClientRules::new(&ClientConfig {
            trusted_proxies: vec!["10.0.0.0/8".to_owned(), "2001:db8::1".to_owned()],
            address_header: "x-forwarded-for".to_owned(),
            colo_header: "cf-ray".to_owned(),
            proxy_protocol: false,
        })
        .unwrap()
    }

    #[track_caller]
    fn client(peer: &str, lines: &[&str], want: &str) {
        let mut headers = HeaderMap::new();
        for line in lines {
            headers.append("x-forwarded-for", line.parse().unwrap());
        }
        let found = rules().address(Some(peer.parse().unwrap()), &headers);
        assert_eq!(found.unwrap().to_string(), want, "{peer} {lines:?}");
    }

    #[test]
    fn the_last_stranger_of_the_chain_is_the_client() {
        client("192.0.2.1", &["198.51.100.9"], "192.0.2.1");
        client("10.0.0.1", &["198.51.100.9"], "198.51.100.9");
        client(
            "10.0.0.1",
            &["6.6.6.6, 198.51.100.9, 10.1.1.1"],
            "198.51.100.9",
        );
        client(
            "10.0.0.1",
            &["6.6.6.6", "198.51.100.9", "10.1.1.1"],
            "198.51.100.9",
        );
        client("::ffff:10.0.0.1", &["198.51.100.9"], "198.51.100.9");
        client("2001:db8::1", &["2001:db8::7"], "2001:db8::7");
        client("10.0.0.1", &[], "10.0.0.1");
        client("10.0.0.1", &["10.2.2.2"], "10.2.2.2");
        client("10.0.0.1", &["198.51.100.9, unknown"], "10.0.0.1");
    }

    #[test]
    fn a_colo_is_believed_from_trusted_proxies_only() {
        let colo = |peer: &str, value: &str| {
            let mut headers = HeaderMap::new();
            headers.append("cf-ray", value.parse().unwrap());
            let peer = Some(peer.parse().unwrap());
            rules()
                .colo(peer, &headers, "LHR".parse().unwrap())
                .to_string()
        };
        assert_eq!(colo("10.0.0.1", "9a1b2c3d4e5f6789-SFO"), "SFO");
        assert_eq!(colo("10.0.0.1", "sfo"), "SFO");
        assert_eq!(colo("10.0.0.1", "nowhere at all"), "LHR");
        assert_eq!(colo("192.0.2.1", "SFO"), "LHR");
    }

    #[test]
    fn headers_without_trust_are_refused() {
        let refused = |config: &ClientConfig, want: &str| {
            let error = ClientRules::new(config).unwrap_err().to_string();
            assert!(error.contains(want), "{error:?} should say {want:?}");
        };
        let colo_header = "cf-ray".to_owned();
        let config = ClientConfig {
            colo_header,
            ..ClientConfig::default()
        };
        refused(&config, "must name those who are believed");
        let config = ClientConfig {
            trusted_proxies: vec!["10.0.0.0/33".to_owned()],
            ..config
        };
        refused(
            &config,
            "trusted_proxies[0] = \"10.0.0.0/33\" must be an address",
        );
        let config = ClientConfig {
            trusted_proxies: vec!["10.0.0.0/8".to_owned()],
            address_header: "x y".to_owned(),
            ..config
        };
        refused(&config, "address_header = \"x y\" cannot be");
    }
}
