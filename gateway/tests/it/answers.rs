//! What is done to answers, and what is written down of them.

use gateway::config::{AccessLogConfig, Config};
use gateway::server::RingFrom;
use serde_json::Value;

use crate::support::{Act, Front, Scripted, config, refusal, ring, runtime};

fn front(routes: &str, log: AccessLogConfig) -> (Front, Scripted) {
    let runtime = runtime();
    let server = Scripted::start(&runtime);
    let toml = format!("{routes}\nupstreams.app.servers = ['{}']", server.address);
    let given: Config = toml::from_str(&toml).unwrap();
    let config = Config {
        routes: given.routes,
        upstreams: given.upstreams,
        access_log: log,
        ..config()
    };
    let ring = RingFrom::Document(ring(1, server.address));
    (Front::start(runtime, &config, ring), server)
}

#[test]
fn each_request_is_a_line_of_the_access_log() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("access.log");
    let log = AccessLogConfig {
        file: file.to_str().unwrap().to_owned(),
        ..AccessLogConfig::default()
    };
    let (front, server) = front(
        "routes = [{ name = 'app', path = '/app/*', upstream = 'app' }]",
        log,
    );
    let request = front.request("GET", "/app/x?token=secret");
    let request = request
        .header("user-agent", "test/1")
        .header("authorization", "secret");
    assert_eq!(front.send(request, "").status, 200);
    front.post("/rpc/Counter/a/increment", "");
    assert_eq!(front.get("/nowhere").status, 404);
    let (address, server) = (front.gateway.address(), server.address);
    let Front {
        gateway, runtime, ..
    } = front;
    std::sync::Arc::into_inner(gateway).unwrap().shut_down();
    drop(runtime);
    let text = std::fs::read_to_string(&file).unwrap();
    assert!(!text.contains("secret"), "{text}");
    let lines: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(lines.len(), 3, "{text}");
    let get = |line: usize, keys: [&str; 6]| {
        keys.map(|key| lines[line][key].to_string().replace('"', ""))
    };
    let keys = ["method", "path", "route", "status", "refused", "sent_bytes"];
    assert_eq!(get(0, keys), ["GET", "/app/x", "app", "200", "null", "2"]);
    assert_eq!(
        get(1, keys)[..5],
        ["POST", "/rpc/Counter/a/increment", "rpc", "200", "null"]
    );
    assert_eq!(get(2, keys)[2..5], ["none", "404", "not_found"]);
    assert_eq!(lines[0]["server"], server.to_string());
    assert_eq!(lines[0]["client"], "127.0.0.1");
    assert_eq!(lines[0]["host"], address.to_string());
    assert_eq!(lines[0]["agent"], "test/1");
    assert_eq!(lines[0]["tries"], 1);
    assert_eq!(lines[0]["request"].as_str().unwrap().len(), 16);
    assert_eq!(lines[0]["trace"].as_str().unwrap().len(), 32);
    assert!(lines[0]["took_us"].as_u64().unwrap() > 0);
    assert!(lines[0]["time"].as_str().unwrap().ends_with('Z'));
}

#[test]
fn a_rotated_log_is_let_go_at_a_reload() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("access.log");
    let log = AccessLogConfig {
        file: file.to_str().unwrap().to_owned(),
        ..AccessLogConfig::default()
    };
    let (front, _) = front(
        "routes = [{ name = 'up', path = '/*', respond = {} }]",
        log.clone(),
    );
    front.get("/one");
    front.eventually("gateway_requests_total{route=\"up\",code=\"200\"}", 1.0);
    std::fs::rename(&file, dir.path().join("access.log.1")).unwrap();
    let mut config: Config =
        toml::from_str("routes = [{ name = 'up', path = '/*', respond = {} }]").unwrap();
    config.access_log = log;
    front
        .runtime
        .block_on(front.gateway.reload(&config))
        .unwrap();
    front.get("/two");
    front.eventually("gateway_requests_total{route=\"up\",code=\"200\"}", 2.0);
    let Front {
        gateway, runtime, ..
    } = front;
    std::sync::Arc::into_inner(gateway).unwrap().shut_down();
    drop(runtime);
    let text = std::fs::read_to_string(&file).unwrap();
    assert!(
        text.contains("\"/two\"") && !text.contains("\"/one\""),
        "{text}"
    );
}

fn text(bytes: usize) -> Act {
    let body = bytes::Bytes::from("dormouse ".repeat(bytes / 9));
    let mut answer = http::Response::new(http_body_util::Full::new(body));
    answer
        .headers_mut()
        .insert("content-type", "text/plain".parse().unwrap());
    Act::Answer(answer)
}

#[test]
fn answers_are_compressed_where_that_is_wanted() {
    let (front, app) = front(
        "routes = [
             { name = 'small', path = '/small', upstream = 'app', compress = true },
             { name = 'plain', path = '/plain', upstream = 'app' },
         ]",
        AccessLogConfig::default(),
    );
    let ask = |path: &str, accept: &str| {
        app.script([text(9000)]);
        let request = format!(
            "GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\naccept-encoding: {accept}\r\n\r\n"
        );
        let answer = front.raw(&request);
        let encoding = answer
            .lines()
            .find(|line| line.to_lowercase().starts_with("content-encoding"));
        (encoding.map(str::to_lowercase), answer.len())
    };
    for accept in ["gzip", "br", "zstd"] {
        let (encoding, length) = ask("/small", accept);
        assert_eq!(encoding, Some(format!("content-encoding: {accept}")));
        assert!(length < 1000, "{length} bytes");
    }
    assert_eq!(ask("/small", "identity").0, None);
    let (encoding, length) = ask("/plain", "gzip");
    assert_eq!(encoding, None);
    assert!(length > 9000);
}

#[test]
fn security_headers_are_added_where_that_is_wanted() {
    let (front, app) = front(
        "routes = [
             { name = 'app', path = '/app', upstream = 'app', security_headers = true },
             { name = 'up', path = '/up', respond = {}, security_headers = true },
             { name = 'plain', path = '/plain', upstream = 'app' },
         ]",
        AccessLogConfig::default(),
    );
    let mut own = http::Response::new(http_body_util::Full::new("".into()));
    own.headers_mut()
        .insert("x-frame-options", "DENY".parse().unwrap());
    app.script([Act::Answer(own), refusal(200, "forged")]);
    let answer = front.get("/app");
    assert_eq!(
        answer.headers["x-frame-options"], "DENY",
        "the app knows better"
    );
    assert_eq!(answer.headers["x-content-type-options"], "nosniff");
    assert_eq!(
        answer.headers["referrer-policy"],
        "strict-origin-when-cross-origin"
    );
    assert!(
        !answer.headers.contains_key("strict-transport-security"),
        "not without TLS"
    );
    assert_eq!(front.get("/up").headers["x-frame-options"], "SAMEORIGIN");
    assert!(!front.get("/plain").headers.contains_key("x-frame-options"));
}
