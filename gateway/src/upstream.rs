//! App upstreams: plain HTTP servers that know nothing of Dormouse.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::config::Config;

/// One pool of servers, used in turn.
#[derive(Debug)]
pub struct Upstream {
    name: String,
    servers: Vec<SocketAddr>,
    next: AtomicUsize,
}

/// Why an upstream cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ResolveError {
    #[error("upstream {upstream}: resolve {server}")]
    Resolve {
        upstream: String,
        server: String,
        source: std::io::Error,
    },
    #[error("upstream {upstream}: {server} resolves to nothing")]
    NoAddress { upstream: String, server: String },
}

impl Upstream {
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The next server in turn.
    pub fn pick(&self) -> SocketAddr {
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        self.servers[turn % self.servers.len()]
    }
}

/// Resolves the servers of every upstream. Names are resolved once, here.
pub async fn resolve(config: &Config) -> Result<HashMap<String, Arc<Upstream>>, ResolveError> {
    let mut upstreams = HashMap::new();
    for (name, upstream) in &config.upstreams {
        let mut servers = Vec::with_capacity(upstream.servers.len());
        for server in &upstream.servers {
            let found = tokio::net::lookup_host(server)
                .await
                .map_err(|source| ResolveError::Resolve {
                    upstream: name.clone(),
                    server: server.clone(),
                    source,
                })?
                .next();
            servers.push(found.ok_or_else(|| ResolveError::NoAddress {
                upstream: name.clone(),
                server: server.clone(),
            })?);
        }
        let upstream = Upstream {
            name: name.clone(),
            servers,
            next: AtomicUsize::new(0),
        };
        upstreams.insert(name.clone(), Arc::new(upstream));
    }
    Ok(upstreams)
}
