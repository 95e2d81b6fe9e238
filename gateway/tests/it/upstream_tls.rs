//! Pools of servers that speak TLS or HTTP/2.

use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use gateway::config::Config;
use gateway::server::RingFrom;
use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::runtime::Runtime;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{RootCertStore, ServerConfig};

use crate::support::{Front, config, runtime};

/// An authority, and files with what it signed.
pub(crate) struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    dir: tempfile::TempDir,
}

impl Authority {
    pub(crate) fn new() -> Self {
        provider();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        // OpenSSL takes a certificate with its issuer's name for its own issuer.
        let name = &mut params.distinguished_name;
        name.push(DnType::CommonName, "the authority");
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("ca.pem"), issuer.pem()).unwrap();
        Self { issuer, dir }
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Files of a certificate and its key.
    pub(crate) fn files(&self, name: &str) -> (PathBuf, PathBuf) {
        self.sign(name);
        let keep = |kind: &str| {
            let mine = self.file(&format!("{}.{kind}", name.replace('*', "any")));
            std::fs::rename(self.file(kind), &mine).unwrap();
            mine
        };
        (keep("cert.pem"), keep("key.pem"))
    }

    fn sign(&self, name: &str) -> (CertificateDer<'static>, PrivateKeyDer<'static>) {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        std::fs::write(self.file("cert.pem"), certificate.pem()).unwrap();
        std::fs::write(self.file("key.pem"), key.serialize_pem()).unwrap();
        let private = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        (certificate.der().clone(), private)
    }

    pub(crate) fn roots(&self) -> Arc<RootCertStore> {
        let mut roots = RootCertStore::empty();
        roots.add(self.issuer.der().clone()).unwrap();
        Arc::new(roots)
    }
}

#[derive(Clone, Copy)]
enum Spoken {
    One,
    Two,
}

/// A server that answers with the version it was spoken to in; TLS if it has an acceptor.
fn serve(runtime: &Runtime, tls: Option<ServerConfig>, plain: Spoken) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap();
    let acceptor = tls.map(|tls| TlsAcceptor::from(Arc::new(tls)));
    runtime.spawn(async move {
        let listener = tokio::net::TcpListener::from_std(listener).unwrap();
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                // Whatever goes wrong here, the client of the test sees it.
                match acceptor {
                    None => drop(answer(stream, plain).await),
                    Some(acceptor) => {
                        let Ok(stream) = acceptor.accept(stream).await else {
                            return;
                        };
                        let spoken = match stream.get_ref().1.alpn_protocol() {
                            Some(b"h2") => Spoken::Two,
                            _ => Spoken::One,
                        };
                        drop(answer(stream, spoken).await);
                    }
                }
            });
        }
    });
    address
}

/// A server of either version, with a certificate for this name.
pub(crate) fn serve_tls(runtime: &Runtime, authority: &Authority, name: &str) -> SocketAddr {
    let tls = server_config(authority, name, &["h2", "http/1.1"]);
    serve(runtime, Some(tls), Spoken::One)
}

async fn answer<S>(stream: S, spoken: Spoken) -> hyper::Result<()>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(|request: Request<Incoming>| async move {
        let text = format!("{:?} {}", request.version(), request.uri().path());
        Ok::<_, hyper::Error>(Response::new(Full::new(Bytes::from(text))))
    });
    let io = TokioIo::new(stream);
    match spoken {
        Spoken::One => http1::Builder::new().serve_connection(io, service).await,
        Spoken::Two => {
            http2::Builder::new(TokioExecutor::new())
                .serve_connection(io, service)
                .await
        }
    }
}

fn server_config(authority: &Authority, name: &str, alpn: &[&str]) -> ServerConfig {
    let (certificate, key) = authority.sign(name);
    let mut config = ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)
        .unwrap();
    config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    config
}

fn provider() {
    // Another test may have been first.
    drop(rustls::crypto::ring::default_provider().install_default());
}

fn front(runtime: Runtime, address: SocketAddr, settings: &str) -> Front {
    let given: Config = toml::from_str(&format!(
        "routes = [{{ name = 'app', path = '/*', upstream = 'app' }}]
         [upstreams.app]
         servers = ['{address}']
         {settings}"
    ))
    .unwrap();
    let config = Config {
        routes: given.routes,
        upstreams: given.upstreams,
        ..config()
    };
    Front::start(runtime, &config, RingFrom::Nodes)
}

#[track_caller]
fn check(front: &Front, want: Result<&str, &str>) {
    for _ in 0..3 {
        let answer = front.get("/x");
        let got = match answer.status {
            200 => Ok(String::from_utf8(answer.body.clone()).unwrap()),
            _ => Err(answer.code().to_owned()),
        };
        assert_eq!(got.as_deref().map_err(String::as_str), want, "{answer:?}");
    }
}

#[test]
fn certificates_of_servers_are_verified() {
    let (authority, stranger) = (Authority::new(), Authority::new());
    let runtime = runtime();
    let tls = server_config(&authority, "app.example.org", &[]);
    let address = serve(&runtime, Some(tls), Spoken::One);
    let ca = authority.file("ca.pem");
    let right = format!("tls = {{ sni = 'app.example.org', ca_file = {ca:?} }}");
    let front = front(runtime, address, &right);
    check(&front, Ok("HTTP/1.1 /x"));
    let reload = |tls: &str| {
        let given: Config = toml::from_str(&format!(
            "routes = [{{ name = 'app', path = '/*', upstream = 'app' }}]
             upstreams.app = {{ servers = ['{address}'], tls = {tls} }}"
        ))
        .unwrap();
        front
            .runtime
            .block_on(front.gateway.reload(&given))
            .unwrap();
    };
    // Connections that were verified otherwise are not used again.
    reload(&format!(
        "{{ sni = 'other.example.org', ca_file = {ca:?} }}"
    ));
    check(&front, Err("unavailable"));
    reload(&format!(
        "{{ sni = 'app.example.org', ca_file = {:?} }}",
        stranger.file("ca.pem")
    ));
    check(&front, Err("unavailable"));
    reload("{ sni = 'app.example.org' }");
    check(&front, Err("unavailable"));
    reload(&format!("{{ ca_file = {ca:?} }}"));
    check(&front, Err("unavailable"));
    reload("{ sni = 'app.example.org', verify = false }");
    check(&front, Ok("HTTP/1.1 /x"));
}

#[test]
fn the_address_of_a_server_may_be_its_name() {
    let authority = Authority::new();
    let runtime = runtime();
    let tls = server_config(&authority, "127.0.0.1", &[]);
    let address = serve(&runtime, Some(tls), Spoken::One);
    let settings = format!("tls.ca_file = {:?}", authority.file("ca.pem"));
    check(&front(runtime, address, &settings), Ok("HTTP/1.1 /x"));
}

#[test]
fn a_certificate_is_shown_to_servers_that_want_one() {
    let authority = Authority::new();
    let runtime = runtime();
    let (certificate, key) = authority.sign("app.example.org");
    let verifier = WebPkiClientVerifier::builder(authority.roots())
        .build()
        .unwrap();
    let tls = ServerConfig::builder()
        .with_client_cert_verifier(verifier)
        .with_single_cert(vec![certificate], key)
        .unwrap();
    let address = serve(&runtime, Some(tls), Spoken::One);
    let ca = authority.file("ca.pem");
    let without = format!("tls = {{ sni = 'app.example.org', ca_file = {ca:?} }}");
    let refused = front(crate::support::runtime(), address, &without);
    check(&refused, Err("unavailable"));
    authority.sign("gateway");
    let with = format!(
        "tls = {{ sni = 'app.example.org', ca_file = {ca:?}, cert_file = {:?}, key_file = {:?} }}",
        authority.file("cert.pem"),
        authority.file("key.pem")
    );
    check(&front(runtime, address, &with), Ok("HTTP/1.1 /x"));
}

#[test]
fn http_2_is_spoken_where_it_is_wanted() {
    let authority = Authority::new();
    let runtime = runtime();
    let ca = authority.file("ca.pem");
    let tls = format!("tls = {{ sni = 'app.example.org', ca_file = {ca:?} }}");
    let both = server_config(&authority, "app.example.org", &["h2", "http/1.1"]);
    let both = serve(&runtime, Some(both), Spoken::One);
    let only_one = server_config(&authority, "app.example.org", &["http/1.1"]);
    let only_one = serve(&runtime, Some(only_one), Spoken::One);
    let plain = serve(&runtime, None, Spoken::Two);
    let another = || crate::support::runtime();
    check(
        &front(another(), both, &format!("http = 'auto'\n{tls}")),
        Ok("HTTP/2.0 /x"),
    );
    check(
        &front(another(), both, &format!("http = '2'\n{tls}")),
        Ok("HTTP/2.0 /x"),
    );
    check(&front(another(), both, &tls), Ok("HTTP/1.1 /x"));
    check(
        &front(another(), only_one, &format!("http = 'auto'\n{tls}")),
        Ok("HTTP/1.1 /x"),
    );
    check(&front(another(), plain, "http = '2'"), Ok("HTTP/2.0 /x"));
}
