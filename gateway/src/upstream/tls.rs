//! Certificates for connections to servers, read from PEM files when the config is loaded.

use std::path::Path;
use std::sync::Arc;

use ops::config::{Broken, non_empty};
use pingora_core::protocols::tls::CaType;
use pingora_core::upstreams::peer::HttpPeer;
use pingora_core::utils::tls::{CertKey, WrappedX509, parse_x509};
use pingora_rustls::{ClientConfig, RootCertStore, version};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tracing::warn;
use xxhash_rust::xxh3::Xxh3;

use crate::config::UpstreamTlsConfig;

/// How TLS connections to the servers of a pool are made.
#[derive(Clone)]
pub(super) struct Tls {
    sni: Option<String>,
    verify: bool,
    /// Instead of the system's authorities.
    authorities: Option<Arc<CaType>>,
    identity: Option<Arc<CertKey>>,
    /// Keeps connections apart that were verified differently.
    group: u64,
}

impl Tls {
    /// Reads the files.
    ///
    /// # Errors
    /// The key, below `tls`, that breaks a rule.
    pub(super) fn new(config: &UpstreamTlsConfig) -> Result<Self, Broken> {
        pingora_rustls::install_default_crypto_provider();
        let mut group = Xxh3::new();
        let mut authorities = None;
        let mut roots = RootCertStore::empty();
        if let Some(file) = non_empty(&config.ca_file) {
            let certificates = certificates("ca_file", file)?;
            for certificate in &certificates {
                group.update(certificate);
                let added = roots.add(certificate.clone());
                added.map_err(|error| Broken::value("ca_file", file, error))?;
            }
            authorities = Some(wrap("ca_file", file, &certificates)?.into());
        }
        let identity = match (non_empty(&config.cert_file), non_empty(&config.key_file)) {
            (None, None) => None,
            (Some(cert), Some(key)) => {
                let chain = certificates("cert_file", cert)?;
                chain
                    .iter()
                    .for_each(|certificate| group.update(certificate));
                wrap("cert_file", cert, &chain)?;
                let private = PrivateKeyDer::from_pem_file(Path::new(key));
                let private = private.map_err(|error| Broken::value("key_file", key, error))?;
                let raw = chain
                    .iter()
                    .map(|certificate| certificate.to_vec())
                    .collect();
                let der = private.secret_der().to_vec();
                // pingora would notice at the first connection, with a panic or an error there.
                ClientConfig::builder_with_protocol_versions(&[&version::TLS13, &version::TLS12])
                    .with_root_certificates(RootCertStore::empty())
                    .with_client_auth_cert(chain, private)
                    .map_err(|error| Broken::value("key_file", key, error))?;
                Some(Arc::new(CertKey::new(raw, der)))
            }
            _ => return Err(Broken::new("key_file", "and cert_file need each other")),
        };
        Ok(Self {
            sni: non_empty(&config.sni).map(str::to_owned),
            verify: config.verify,
            authorities,
            identity,
            group: group.digest(),
        })
    }

    /// The name that certificates of a server at `host` must have.
    pub(super) fn name<'a>(&'a self, host: &'a str) -> &'a str {
        self.sni.as_deref().unwrap_or(host)
    }

    pub(super) fn apply(&self, peer: &mut HttpPeer) {
        peer.client_cert_key.clone_from(&self.identity);
        peer.group_key = self.group;
        peer.options.ca.clone_from(&self.authorities);
        peer.options.verify_cert = self.verify;
        peer.options.verify_hostname = self.verify;
    }
}

fn certificates(key: &str, file: &str) -> Result<Vec<CertificateDer<'static>>, Broken> {
    let read = CertificateDer::pem_file_iter(Path::new(file))
        .and_then(|certificates| certificates.collect::<Result<Vec<_>, _>>());
    let read = read.map_err(|error| Broken::value(key, file, error))?;
    match read.is_empty() {
        false => Ok(read),
        true => Err(Broken::value(key, file, "has no certificate")),
    }
}

/// The file of authorities for pingora's connectors: `None` is the system's own. Where those cannot be
/// loaded, pingora would panic; then it is an empty file, and TLS without `ca_file` fails.
pub(crate) fn authorities_file() -> Option<String> {
    let mut roots = RootCertStore::empty();
    let loaded = pingora_rustls::load_platform_certs_incl_env_into_store(&mut roots);
    let error = loaded.err()?;
    warn!(%error, "the system's certificate authorities cannot be used; upstreams need a ca_file");
    Some("/dev/null".to_owned())
}

/// Certificates as pingora wants them.
fn wrap(
    key: &str,
    file: &str,
    certificates: &[CertificateDer<'_>],
) -> Result<Vec<WrappedX509>, Broken> {
    let wrap = |certificate: &CertificateDer<'_>| {
        // pingora's own parser panics.
        let parsed = x509_parser::parse_x509_certificate(certificate);
        parsed.map_err(|error| Broken::value(key, file, error))?;
        Ok(WrappedX509::new(certificate.to_vec(), parse_x509))
    };
    certificates.iter().map(wrap).collect()
}
