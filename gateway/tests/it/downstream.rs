//! How clients connect: TLS, HTTP/2, PROXY headers.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use gateway::config::Config;
use gateway::server::RingFrom;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::ClientConfig;

use crate::support::{Front, Scripted, config, read_head, ring, runtime};
use crate::upstream_tls::Authority;

/// A gateway with these settings, before one server that is a worker and the upstream `app`.
fn front(settings: &str) -> (Front, Scripted) {
    let runtime = runtime();
    let server = Scripted::start(&runtime);
    let toml = format!(
        "{settings}\n[upstreams.app]\nservers = ['{}']",
        server.address
    );
    let given: Config = toml::from_str(&toml).unwrap();
    let ours = config();
    let config = Config {
        listen: ours.listen,
        colo: ours.colo,
        threads: ours.threads,
        nodes: ours.nodes,
        retry: ours.retry,
        requests: ours.requests,
        ..given
    };
    let ring = RingFrom::Document(ring(1, server.address));
    (Front::start(runtime, &config, ring), server)
}

const APP: &str = "routes = [{ name = 'app', path = '/*', upstream = 'app' }]";

fn with_certificates(authority: &Authority, names: &[&str]) -> String {
    let certificate = |name: &&str| {
        let (cert, key) = authority.files(name);
        format!("{{ cert_file = {cert:?}, key_file = {key:?} }}")
    };
    let certificates: Vec<String> = names.iter().map(certificate).collect();
    format!(
        "tls_listen = '127.0.0.1:0'\ncertificates = [{}]\n{APP}",
        certificates.join(", ")
    )
}

fn client_config(authority: &Authority, alpn: &[&str]) -> ClientConfig {
    let mut config = ClientConfig::builder()
        .with_root_certificates(authority.roots())
        .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    config
}

pub(crate) type Secured = tokio_rustls::client::TlsStream<tokio::net::TcpStream>;

pub(crate) async fn connect(
    front: &Front,
    authority: &Authority,
    name: &str,
    alpn: &[&str],
) -> std::io::Result<Secured> {
    let connector = TlsConnector::from(Arc::new(client_config(authority, alpn)));
    let stream = tokio::net::TcpStream::connect(front.gateway.tls_address().unwrap()).await?;
    let name = ServerName::try_from(name.to_owned()).unwrap();
    connector.connect(name, stream).await
}

/// One request over HTTP/2: status and body.
pub(crate) async fn ask_h2<S>(stream: S, uri: &str, body: &str) -> (u16, String)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let io = TokioIo::new(stream);
    let (mut sender, connection) = http2::handshake(TokioExecutor::new(), io).await.unwrap();
    tokio::spawn(connection);
    let request = http::Request::post(uri).header("x-mine", "1");
    // As browsers cut them (RFC 9113, 8.2.3).
    let request = request.header("cookie", "a=1").header("cookie", "b=2");
    let request = request
        .body(Full::new(Bytes::from(body.to_owned())))
        .unwrap();
    let response = sender.send_request(request).await.unwrap();
    let status = response.status().as_u16();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    (status, String::from_utf8(body.to_vec()).unwrap())
}

#[test]
fn tls_is_spoken_with_the_certificate_of_the_name() {
    let authority = Authority::new();
    let (front, app) = front(&with_certificates(
        &authority,
        &["a.example.org", "*.b.example.org"],
    ));
    let shown = |name: &str| {
        front.runtime.block_on(async {
            let stream = connect(&front, &authority, name, &[]).await?;
            Ok::<_, std::io::Error>(stream.get_ref().1.peer_certificates().unwrap()[0].to_vec())
        })
    };
    let a = shown("a.example.org").unwrap();
    let b = shown("x.b.example.org").unwrap();
    assert_ne!(a, b);
    let refused = shown("x.y.b.example.org").unwrap_err().to_string();
    assert!(
        refused.contains("only valid for DnsName(\"a.example.org\")"),
        "the first one is shown: {refused}"
    );
    let answer = front.runtime.block_on(async {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let mut stream = connect(&front, &authority, "a.example.org", &[])
            .await
            .unwrap();
        let request = b"GET /x HTTP/1.1\r\nhost: a.example.org\r\nconnection: close\r\n\r\n";
        stream.write_all(request).await.unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
        String::from_utf8(answer).unwrap()
    });
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    let seen = app.seen().remove(0);
    assert_eq!(seen.headers["x-forwarded-proto"], "https");
    assert_eq!(seen.headers["x-forwarded-for"], "127.0.0.1");
    let metrics = front.gateway.render_metrics();
    assert!(
        metrics.contains("gateway_certificate_expiry_timestamp_seconds{name=\"a.example.org\"}")
    );
}

#[test]
fn http_2_is_spoken_with_tls_and_without() {
    let authority = Authority::new();
    let (front, app) = front(&with_certificates(&authority, &["a.example.org"]));
    let secured = front.runtime.block_on(async {
        let stream = connect(&front, &authority, "a.example.org", &["h2", "http/1.1"])
            .await
            .unwrap();
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
        ask_h2(stream, "https://a.example.org/x?y=1", "body").await
    });
    assert_eq!(secured, (200, "ok".to_owned()));
    let seen = app.seen().remove(0);
    assert_eq!(
        (seen.uri.as_str(), &seen.body[..]),
        ("/x?y=1", &b"body"[..])
    );
    assert_eq!(seen.headers["host"], "a.example.org");
    assert_eq!(seen.headers["x-forwarded-host"], "a.example.org");
    assert_eq!(seen.headers["x-mine"], "1");
    let cookies: Vec<_> = seen.headers.get_all("cookie").iter().collect();
    assert_eq!(cookies, ["a=1; b=2"]);
    let plain = |uri: &'static str| {
        front.runtime.block_on(async {
            let stream = tokio::net::TcpStream::connect(front.gateway.address())
                .await
                .unwrap();
            ask_h2(stream, uri, "[1]").await
        })
    };
    assert_eq!(plain("http://b.example.org/y"), (200, "ok".to_owned()));
    assert_eq!(app.seen()[0].headers["host"], "b.example.org");
    // Objects are reached as well.
    assert_eq!(
        plain("http://b.example.org/rpc/Counter/a/increment"),
        (200, "ok".to_owned())
    );
    let seen = app.seen().remove(0);
    assert_eq!(
        (&seen.headers["dormouse-method"], &seen.body[..]),
        (&"increment".parse().unwrap(), &b"[1]"[..])
    );
}

#[test]
fn http_2_can_be_off() {
    let authority = Authority::new();
    let settings = format!(
        "http2 = false\n{}",
        with_certificates(&authority, &["a.example.org"])
    );
    let (front, _) = front(&settings);
    front.runtime.block_on(async {
        let stream = connect(&front, &authority, "a.example.org", &["http/1.1"])
            .await
            .unwrap();
        assert_eq!(stream.get_ref().1.alpn_protocol(), None);
    });
    let answer = front.raw("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
    assert!(!answer.contains("HTTP/2"), "{answer}");
}

#[test]
fn a_new_certificate_is_shown_after_a_reload() {
    let authority = Authority::new();
    let (front, _) = front(&with_certificates(&authority, &["a.example.org"]));
    let expires = || {
        let metrics = front.gateway.render_metrics();
        let names = metrics
            .lines()
            .filter(|line| line.starts_with("gateway_certificate_expiry"));
        names.map(str::to_owned).collect::<Vec<_>>().join("\n")
    };
    assert!(!expires().contains("c.example.org"));
    let settings = with_certificates(&authority, &["c.example.org"]);
    let changed: Config = toml::from_str(&format!(
        "{settings}\nupstreams.app.servers = ['127.0.0.1:1']"
    ))
    .unwrap();
    front
        .runtime
        .block_on(front.gateway.reload(&changed))
        .unwrap();
    assert!(expires().contains("c.example.org"));
    let seen = front
        .runtime
        .block_on(connect(&front, &authority, "c.example.org", &[]));
    seen.unwrap();
    let mut broken = changed;
    broken.certificates[0].cert_file = "/nowhere.pem".to_owned();
    let error = front
        .runtime
        .block_on(front.gateway.reload(&broken))
        .unwrap_err();
    assert!(
        error
            .to_string()
            .contains("certificates[0].cert_file = \"/nowhere.pem\""),
        "{error}"
    );
}

#[test]
fn requests_without_tls_can_be_sent_to_it() {
    let authority = Authority::new();
    let settings = with_certificates(&authority, &["a.example.org"]).replace(
        "routes = [",
        "routes = [{ name = 'secure', path = '/*', scheme = 'http', redirect = { to = 'https://{host}{path}' } }, ",
    );
    let (front, app) = front(&settings);
    let answer =
        front.raw("GET /x?y HTTP/1.1\r\nhost: a.example.org:80\r\nconnection: close\r\n\r\n");
    assert!(answer.starts_with("HTTP/1.1 308 "), "{answer}");
    assert!(
        answer.contains("ocation: https://a.example.org/x?y\r\n"),
        "{answer}"
    );
    let answer = front.runtime.block_on(async {
        let stream = connect(&front, &authority, "a.example.org", &["h2"])
            .await
            .unwrap();
        ask_h2(stream, "https://a.example.org/x", "").await
    });
    assert_eq!((answer.0, app.seen().len()), (200, 1));
}

fn exchange(address: SocketAddr, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    // In pieces: whoever waits for more must not take what is there for all.
    // A refused connection may be reset, before all of it was written as well.
    drop(
        bytes
            .chunks(7)
            .try_for_each(|piece| stream.write_all(piece)),
    );
    let mut answer = Vec::new();
    drop(stream.read_to_end(&mut answer));
    String::from_utf8_lossy(&answer).into_owned()
}

#[test]
fn a_proxy_header_names_the_client() {
    let settings = format!(
        "client = {{ proxy_protocol = true, trusted_proxies = ['127.0.0.1'] }}\n{}",
        APP.replace(
            "upstream = 'app'",
            "upstream = 'app', rewrite = '/{client.ip}'"
        )
    );
    let (front, app) = front(&settings);
    let address = front.gateway.address();
    let request = b"GET /x HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
    let one = [
        b"PROXY TCP4 203.0.113.7 10.0.0.1 4711 443\r\n",
        &request[..],
    ]
    .concat();
    assert!(exchange(address, &one).starts_with("HTTP/1.1 200 "));
    let seen = app.seen().remove(0);
    assert_eq!(
        (seen.uri.as_str(), &seen.headers["x-forwarded-for"]),
        ("/203.0.113.7", &"203.0.113.7".parse().unwrap())
    );
    let mut two =
        b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\xcb\0\x71\x08\x0a\0\0\x01\x12\x67\x01\xbb".to_vec();
    two.extend(request);
    assert!(exchange(address, &two).starts_with("HTTP/1.1 200 "));
    assert_eq!(app.seen()[0].uri, "/203.0.113.8");
    assert_eq!(
        exchange(address, request),
        "",
        "without a header nothing is said"
    );
    front.eventually("gateway_connections_refused_total", 1.0);
}

#[test]
fn a_proxy_header_of_a_stranger_is_not_believed() {
    let settings =
        format!("client = {{ proxy_protocol = true, trusted_proxies = ['192.0.2.0/24'] }}\n{APP}");
    let (front, app) = front(&settings);
    let one = b"PROXY TCP4 203.0.113.7 10.0.0.1 4711 443\r\nGET /x HTTP/1.1\r\nhost: a\r\n\r\n";
    assert_eq!(exchange(front.gateway.address(), one), "");
    assert_eq!(app.seen().len(), 0);
}

#[test]
fn short_requests_do_not_wait_for_the_preface_of_http_2() {
    let (front, _) = front(APP);
    let mut stream = TcpStream::connect(front.gateway.address()).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
    assert!(read_head(&mut stream).contains(" 200 "));
}

#[test]
fn tls_without_certificates_is_refused() {
    let config: Config = toml::from_str("tls_listen = '127.0.0.1:0'").unwrap();
    let error = config.validate().unwrap_err().to_string();
    assert_eq!(error, "tls_listen = \"127.0.0.1:0\" needs certificates");
}
