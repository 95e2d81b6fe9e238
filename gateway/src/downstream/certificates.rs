//! Which certificate a client is shown.

use std::path::Path;
use std::sync::Arc;

use arc_swap::ArcSwap;
use ops::config::Broken;
use pingora_rustls::sign::CertifiedKey;
use pingora_rustls::{ClientHello, CryptoProvider, ResolvesServerCert};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use x509_parser::extensions::GeneralName;

use crate::config::CertificateConfig;
use crate::route::pattern::HostPattern;

/// The certificates of a config, read from their files.
#[derive(Debug, Default)]
pub struct Certificates(Vec<Certificate>);

#[derive(Debug)]
pub struct Certificate {
    /// As the certificate has them.
    pub names: Vec<String>,
    patterns: Vec<HostPattern>,
    key: Arc<CertifiedKey>,
    /// Seconds since 1970.
    pub expires: i64,
}

impl Certificates {
    /// Reads the files.
    ///
    /// # Errors
    /// The key, below `certificates`, that breaks a rule.
    pub fn new(config: &[CertificateConfig]) -> Result<Self, Broken> {
        pingora_rustls::install_default_crypto_provider();
        let read = config
            .iter()
            .enumerate()
            .map(|(place, config)| Certificate::new(config).map_err(|broken| broken.under(place)));
        read.collect::<Result<_, _>>().map(Self)
    }

    pub fn iter(&self) -> impl Iterator<Item = &Certificate> {
        self.0.iter()
    }

    /// The one for this name, or else the first.
    fn find(&self, name: Option<&str>) -> Option<&Certificate> {
        let named = name.and_then(|name| self.0.iter().find(|one| one.is_for(name)));
        named.or_else(|| self.0.first())
    }
}

impl Certificate {
    fn new(config: &CertificateConfig) -> Result<Self, Broken> {
        let (file, key_file) = (&config.cert_file, &config.key_file);
        let chain = CertificateDer::pem_file_iter(Path::new(file))
            .and_then(|chain| chain.collect::<Result<Vec<_>, _>>())
            .map_err(|error| Broken::value("cert_file", file, error))?;
        let leaf = chain
            .first()
            .ok_or_else(|| Broken::value("cert_file", file, "has no certificate"))?;
        let (_, parsed) = x509_parser::parse_x509_certificate(leaf)
            .map_err(|error| Broken::value("cert_file", file, error))?;
        let alternatives = parsed.subject_alternative_name().ok().flatten();
        let alternatives = alternatives
            .iter()
            .flat_map(|names| &names.value.general_names);
        let names: Vec<String> = alternatives
            .filter_map(|name| match name {
                GeneralName::DNSName(name) => Some((*name).to_owned()),
                _ => None,
            })
            .collect();
        let expires = parsed.validity().not_after.timestamp();
        let private = PrivateKeyDer::from_pem_file(Path::new(key_file))
            .map_err(|error| Broken::value("key_file", key_file, error))?;
        let provider = CryptoProvider::get_default().expect("installed before");
        let key = CertifiedKey::from_der(chain.clone(), private, provider)
            .map_err(|error| Broken::value("key_file", key_file, error))?;
        Ok(Self {
            patterns: names
                .iter()
                .filter_map(|name| HostPattern::new(name).ok())
                .collect(),
            names,
            key: Arc::new(key),
            expires,
        })
    }

    /// A `*` stands for one label (RFC 9525, 6.3).
    fn is_for(&self, name: &str) -> bool {
        self.patterns.iter().any(|pattern| match pattern {
            HostPattern::Exact(_) => pattern.matches(name),
            HostPattern::Below(suffix) => {
                pattern.matches(name) && !name[..name.len() - suffix.len()].contains('.')
            }
        })
    }
}

/// Answers rustls from the certificates that are current.
#[derive(Debug)]
pub struct Resolver(pub Arc<ArcSwap<Certificates>>);

impl ResolvesServerCert for Resolver {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let certificates = self.0.load();
        let found = certificates.find(hello.server_name())?;
        Some(Arc::clone(&found.key))
    }
}
