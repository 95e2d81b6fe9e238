//! Names of servers and their addresses.

use std::net::{IpAddr, SocketAddr};

use ops::config::Broken;

use crate::config::ServerConfig;

/// One server of the config: an address, or a name that stands for several.
#[derive(Debug, Clone)]
pub(super) struct Spec {
    /// Without brackets.
    pub(super) host: String,
    port: u16,
    pub(super) weight: u8,
}

/// Why a name cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ResolveError {
    #[error("upstream {upstream}: resolve {host}")]
    Resolve {
        upstream: String,
        host: String,
        source: std::io::Error,
    },
    #[error("upstream {upstream}: {host} resolves to nothing")]
    NoAddress { upstream: String, host: String },
}

/// Heaviest server.
const WEIGHT_MAX: u8 = 100;

impl Spec {
    pub(super) fn new(config: &ServerConfig) -> Result<Self, Broken> {
        let address = config.address();
        let parts = address.rsplit_once(':').and_then(|(host, port)| {
            let bare = host
                .strip_prefix('[')
                .and_then(|host| host.strip_suffix(']'));
            // Colons only in brackets, or nobody knows where the port begins.
            let legal = !host.is_empty() && (bare.is_some() || !host.contains(':'));
            let port = port.parse().ok().filter(|_| legal)?;
            Some((bare.unwrap_or(host), port))
        });
        let (host, port) =
            parts.ok_or_else(|| Broken::value("address", address, "must be host:port"))?;
        if !(1..=WEIGHT_MAX).contains(&config.weight()) {
            let rule = format!("must be from 1 to {WEIGHT_MAX}");
            return Err(Broken::value("weight", config.weight(), rule));
        }
        Ok(Self {
            host: host.to_owned(),
            port,
            weight: config.weight(),
        })
    }

    pub(super) fn is_name(&self) -> bool {
        self.host.parse::<IpAddr>().is_err()
    }
}

/// All addresses, each once, in the order of the config; those of one name sorted.
pub(super) async fn resolve(
    upstream: &str,
    specs: &[Spec],
) -> Result<Vec<(SocketAddr, Spec)>, ResolveError> {
    let mut all: Vec<(SocketAddr, Spec)> = Vec::with_capacity(specs.len());
    for spec in specs {
        let found = tokio::net::lookup_host((spec.host.as_str(), spec.port)).await;
        let found: Vec<SocketAddr> = found
            .map_err(|source| ResolveError::Resolve {
                upstream: upstream.to_owned(),
                host: spec.host.clone(),
                source,
            })?
            .collect();
        let Some(first) = found.first() else {
            return Err(ResolveError::NoAddress {
                upstream: upstream.to_owned(),
                host: spec.host.clone(),
            });
        };
        // A host with both kinds of addresses often listens on one only; the first is preferred.
        let v4 = first.is_ipv4();
        let mut found: Vec<SocketAddr> = found
            .iter()
            .filter(|a| a.is_ipv4() == v4)
            .copied()
            .collect();
        found.sort_unstable();
        for address in found {
            if all.iter().all(|(known, _)| *known != address) {
                all.push((address, spec.clone()));
            }
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_have_a_port() {
        let spec = |address: &str| Spec::new(&ServerConfig::Address(address.to_owned()));
        let named = spec("app.internal:80").unwrap();
        assert_eq!(
            (named.host.as_str(), named.port, named.is_name()),
            ("app.internal", 80, true)
        );
        let six = spec("[::1]:80").unwrap();
        assert_eq!((six.host.as_str(), six.is_name()), ("::1", false));
        for bad in ["app", "::1:80", ":80", "a:b", "a:70000", "http://a:80"] {
            let error = spec(bad).unwrap_err().to_string();
            assert!(error.contains("must be host:port"), "{error}");
        }
    }

    #[tokio::test]
    async fn an_address_counts_once() {
        let spec = |address: &str| Spec::new(&ServerConfig::Address(address.to_owned())).unwrap();
        let specs = [
            spec("127.0.0.1:2"),
            spec("127.0.0.1:1"),
            spec("127.0.0.1:2"),
        ];
        let found = resolve("app", &specs).await.unwrap();
        let ports: Vec<u16> = found.iter().map(|(address, _)| address.port()).collect();
        assert_eq!(ports, [2, 1]);
    }
}
