//! Routes of the config: app upstreams.

use gateway::config::{Config, ServerConfig};
use gateway::server::RingFrom;

use crate::support::{Front, Scripted, config, ok, runtime};

fn with_app(servers: &[&Scripted]) -> Config {
    let servers: Vec<String> = servers
        .iter()
        .map(|server| server.address.to_string())
        .collect();
    let routes: Config = toml::from_str(&format!(
        "upstreams.app.servers = {servers:?}
         routes = [{{ name = 'app', path = '/*', upstream = 'app' }}]"
    ))
    .unwrap();
    Config {
        routes: routes.routes,
        upstreams: routes.upstreams,
        ..config()
    }
}

#[test]
fn an_app_sees_the_request_and_who_asked() {
    let runtime = runtime();
    let app = Scripted::start(&runtime);
    let front = Front::start(runtime, &with_app(&[&app]), RingFrom::Nodes);
    let request = front
        .request("POST", "/shop/cart?x=1")
        .header("x-forwarded-for", "198.51.100.7")
        .header("x-forwarded-for", "203.0.113.9")
        .header("dormouse-object", "forged");
    let answer = front.send(request, "body");
    assert_eq!(answer.status, 200);
    let seen = app.seen().remove(0);
    assert_eq!(
        (seen.method.as_str(), seen.uri.as_str(), &seen.body[..]),
        ("POST", "/shop/cart?x=1", &b"body"[..])
    );
    assert_eq!(
        seen.headers["x-forwarded-for"],
        "198.51.100.7, 203.0.113.9, 127.0.0.1"
    );
    assert_eq!(seen.headers["x-forwarded-proto"], "http");
    assert_eq!(
        seen.headers["x-forwarded-host"],
        front.gateway.address().to_string()
    );
    assert_eq!(seen.headers["host"], front.gateway.address().to_string());
    assert_eq!(seen.headers["traceparent"].len(), 55);
    assert!(!seen.headers.contains_key("dormouse-object"));
    front.eventually("gateway_requests_total{route=\"app\",code=\"200\"}", 1.0);
}

#[test]
fn objects_are_not_hidden_by_a_route_for_everything() {
    let runtime = runtime();
    let app = Scripted::start(&runtime);
    let front = Front::start(runtime, &with_app(&[&app]), RingFrom::Nodes);
    assert_eq!(front.get("/objects/Kv/a").code(), "unavailable");
    assert_eq!(front.post("/rpc/Counter/a/value", "").code(), "unavailable");
    assert_eq!(app.seen().len(), 0);
}

#[test]
fn servers_take_turns_and_a_dead_one_is_passed_over() {
    let runtime = runtime();
    let (one, two) = (Scripted::start(&runtime), Scripted::start(&runtime));
    let mut config = with_app(&[&one, &two]);
    let front = Front::start(runtime, &config, RingFrom::Nodes);
    for _ in 0..6 {
        assert_eq!(front.get("/").status, 200);
    }
    assert_eq!((one.seen().len(), two.seen().len()), (3, 3));
    let dead = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    config.upstreams.get_mut("app").unwrap().servers[1] = ServerConfig::Address(dead.to_string());
    front
        .runtime
        .block_on(front.gateway.reload(&config))
        .unwrap();
    for _ in 0..6 {
        assert_eq!(front.get("/").status, 200);
    }
    assert_eq!(one.seen().len(), 6);
}

#[test]
fn headers_of_the_system_cannot_come_from_an_app() {
    let runtime = runtime();
    let app = Scripted::start(&runtime);
    let front = Front::start(runtime, &with_app(&[&app]), RingFrom::Nodes);
    app.script([crate::support::refusal(421, "not_owner"), ok("fine")]);
    let answer = front.get("/");
    assert_eq!((answer.status, answer.code()), (421, "-"));
}

#[test]
fn a_reload_changes_the_routes_and_a_bad_one_changes_nothing() {
    let runtime = runtime();
    let app = Scripted::start(&runtime);
    let front = Front::start(runtime, &config(), RingFrom::Nodes);
    assert_eq!(front.get("/shop").code(), "not_found");
    let mut config = with_app(&[&app]);
    front
        .runtime
        .block_on(front.gateway.reload(&config))
        .unwrap();
    assert_eq!(front.get("/shop").status, 200);
    config.routes[0].upstream = Some("nowhere".to_owned());
    let error = front
        .runtime
        .block_on(front.gateway.reload(&config))
        .unwrap_err();
    assert!(error.to_string().contains("nowhere"), "{error}");
    assert_eq!(front.get("/shop").status, 200);
}
