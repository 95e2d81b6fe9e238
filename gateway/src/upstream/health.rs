//! Asking servers whether they are well.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use ops::Causes;
use pingora_core::connectors::ConnectorOptions;
use pingora_core::connectors::http::Connector;
use pingora_core::upstreams::peer::HttpPeer;
use pingora_http::RequestHeader;
use tracing::{info, warn};

use super::Upstream;
use super::server::Server;
use super::tls::authorities_file;
use crate::config::HealthConfig;

/// Asks the servers of one pool.
pub(super) struct Prober {
    connector: Connector,
    request: RequestHeader,
    config: HealthConfig,
}

/// Why a server counts as not well.
#[derive(Debug, thiserror::Error)]
enum Unwell {
    #[error("no answer within {0:?}")]
    Silent(Duration),
    #[error("it answered {0}")]
    Status(u16),
    #[error("ask it")]
    Broken(#[source] Box<pingora_core::Error>),
}

impl Prober {
    /// `None` if nothing is to be asked. `host` is what the servers see as such.
    ///
    /// # Errors
    /// When the path cannot be asked for.
    pub(super) fn new(config: &HealthConfig, host: &str) -> pingora_core::Result<Option<Self>> {
        if config.path.is_empty() {
            return Ok(None);
        }
        let mut request = RequestHeader::build("GET", config.path.as_bytes(), Some(3))?;
        request.insert_header(http::header::HOST, host)?;
        request.insert_header(http::header::USER_AGENT, "dormouse-health")?;
        let mut options = ConnectorOptions::new(1);
        options.ca_file = authorities_file();
        Ok(Some(Self {
            connector: Connector::new(Some(options)),
            request,
            config: config.clone(),
        }))
    }

    /// Asks all servers at once, and notes what they say.
    pub(super) async fn round(&self, upstream: &Upstream) {
        let servers = upstream.servers();
        let asked = servers.list.iter().map(|server| async move {
            let answer = tokio::time::timeout(self.config.timeout, self.ask(server)).await;
            let answer = answer.unwrap_or(Err(Unwell::Silent(self.config.timeout)));
            if !server.observe(answer.is_ok(), &self.config) {
                return;
            }
            let (upstream, server) = (upstream.name(), server.address);
            match answer {
                Ok(()) => info!(upstream, %server, "server is well again"),
                Err(error) => {
                    warn!(upstream, %server, error = %Causes(&error), "server is not well; it gets no requests");
                }
            }
        });
        join_all(asked).await;
    }

    async fn ask(&self, server: &Arc<Server>) -> Result<(), Unwell> {
        let status = self.exchange(&server.peer).await.map_err(Unwell::Broken)?;
        let well = match self.config.status.is_empty() {
            true => (200..400).contains(&status),
            false => self.config.status.contains(&status),
        };
        match well {
            true => Ok(()),
            false => Err(Unwell::Status(status)),
        }
    }

    /// A connection of its own each time: an old one could hide that no new ones are taken.
    async fn exchange(&self, peer: &HttpPeer) -> pingora_core::Result<u16> {
        let (mut session, _) = self.connector.get_http_session(peer).await?;
        let request = Box::new(self.request.clone());
        session.write_request_header(request).await?;
        session.finish_request_body().await?;
        session.read_response_header().await?;
        let head = session.response_header();
        Ok(head.map_or(0, |head| head.status.as_u16()))
    }
}
