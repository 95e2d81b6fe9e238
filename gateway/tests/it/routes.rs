//! Routes of the config: what they match, and where they lead.

use gateway::config::Config;
use gateway::server::RingFrom;
use protocol::ring::{RingDocument, RingNode};
use protocol::{ClassName, Home, ObjectId};

use crate::support::{Front, Scripted, config, ring, runtime};

/// A gateway with these routes before one worker, which is also the app upstream `app`.
fn front(routes: &str) -> (Front, Scripted) {
    let runtime = runtime();
    let server = Scripted::start(&runtime);
    let toml = format!("upstreams.app.servers = ['{}']\n{routes}", server.address);
    let given: Config = toml::from_str(&toml).unwrap();
    let config = Config {
        routes: given.routes,
        upstreams: given.upstreams,
        objects: given.objects,
        client: given.client,
        ..config()
    };
    let mut document = ring(1, server.address);
    document.nodes[0].colo = Some("SFO".to_owned());
    let front = Front::start(runtime, &config, RingFrom::Document(document));
    (front, server)
}

fn id(class: &str, home: Home, name: &str) -> String {
    let class: ClassName = class.parse().unwrap();
    ObjectId::named(&class, home, &name.parse().unwrap()).to_string()
}

fn sfo() -> Home {
    Home::Colo("SFO".parse().unwrap())
}

#[test]
fn the_classic_key_names_an_object() {
    let (front, worker) = front(
        "[[routes]]
         name = 'limited'
         path = '/*'
         object = { class = 'Kv', name = '{colo}:{query.userId|unknown}' }",
    );
    let name_of = |target: &str| {
        assert_eq!(front.get(target).status, 200);
        let seen = worker.seen().remove(0);
        assert_eq!(seen.uri, target, "the object sees what was asked for");
        let name = seen.headers["dormouse-name"].to_str().unwrap().to_owned();
        assert_eq!(
            seen.headers["dormouse-object"],
            id("Kv", Home::Global, &name)
        );
        name
    };
    assert_eq!(
        name_of("/x?userId=alice@example.com"),
        "SFO:alice@example.com"
    );
    assert_eq!(name_of("/x?userId="), "SFO:unknown");
    assert_eq!(name_of("/x"), "SFO:unknown");
    assert_eq!(name_of("/?userId=a:b"), "SFO:a:b");
    front.eventually(
        "gateway_requests_total{route=\"limited\",code=\"200\"}",
        4.0,
    );
}

#[test]
fn a_missing_value_without_a_fallback_is_a_bad_request() {
    let (front, worker) = front(
        "[[routes]]
         name = 'r'
         path = '/*'
         object = { class = 'Kv', name = 'user:{query.userId}' }",
    );
    for target in ["/", "/?userId=", "/?userId=%FF", "/?userId=%00"] {
        let answer = front.get(target);
        assert_eq!(
            (answer.status, answer.code()),
            (400, "bad_request"),
            "{target}"
        );
    }
    let detail = front.get("/").json()["detail"].to_string();
    assert!(
        detail.contains("query.userId is missing or empty"),
        "{detail}"
    );
    assert_eq!(worker.seen().len(), 0);
}

#[test]
fn shards_are_named_by_the_hash_of_the_key() {
    let (front, worker) = front(
        "[[routes]]
         name = 'sharded'
         path = '/count'
         rpc = { class = 'Counter', name = 'shard:{shard}', method = 'increment' }
         shard = { by = '{query.userId|unknown}', hash = 'java31', count = 100 }",
    );
    assert_eq!(
        front.post("/count?userId=alice@example.com", "[1]").status,
        200
    );
    let seen = worker.seen().remove(0);
    assert_eq!(seen.headers["dormouse-name"], "shard:35");
    assert_eq!(seen.headers["dormouse-method"], "increment");
    assert_eq!(&seen.body[..], b"[1]");
    front.post("/count", "");
    assert_eq!(worker.seen()[0].headers["dormouse-name"], "shard:86");
    let refused = front.get("/count");
    assert_eq!(
        (refused.status, refused.code()),
        (405, "method_not_allowed")
    );
    assert_eq!(refused.headers["allow"], "POST");
    // Two of a hundred shards were used, evenly.
    let metrics = front.gateway.render_metrics();
    assert!(
        metrics.contains("gateway_shard_skew{route=\"sharded\"} 50"),
        "{metrics}"
    );
}

#[test]
fn objects_of_a_colo_live_on_its_ring() {
    let (front, worker) = front(
        "objects.colo_scoped = ['Session']
         [[routes]]
         name = 'here'
         path = '/here/{name}/{rest...}'
         object = { class = 'Kv', name = '{path.name}', scope = 'colo' }
         rewrite = '/{path.rest}'",
    );
    let object = |target: &str| {
        assert_eq!(front.get(target).status, 200, "{target}");
        let seen = worker.seen().remove(0);
        (
            seen.headers["dormouse-object"].to_str().unwrap().to_owned(),
            seen.uri,
        )
    };
    assert_eq!(
        object("/here/a%20b/c/d?e"),
        (id("Kv", sfo(), "a b"), "/c/d?e".to_owned())
    );
    assert_eq!(object("/objects/Session/a").0, id("Session", sfo(), "a"));
    assert_eq!(object("/objects/Kv/a").0, id("Kv", Home::Global, "a"));
}

#[test]
fn a_user_has_an_object_in_every_colo() {
    let runtime = runtime();
    let (west, east) = (Scripted::start(&runtime), Scripted::start(&runtime));
    let node = |name: &str, colo: &str, worker: &Scripted| RingNode {
        name: name.to_owned(),
        weight: 1,
        colo: Some(colo.to_owned()),
        workers: vec![worker.address.to_string()],
    };
    let document = RingDocument {
        nodes: vec![node("w", "SFO", &west), node("e", "LHR", &east)],
        ..ring(1, west.address)
    };
    let given: Config = toml::from_str(
        "client = { trusted_proxies = ['127.0.0.1'], colo_header = 'cf-ray' }
         [[routes]]
         name = 'r'
         path = '/*'
         object = { class = 'Kv', name = '{colo}:{query.userId|unknown}', scope = 'colo' }",
    )
    .unwrap();
    let config = Config {
        routes: given.routes,
        client: given.client,
        ..config()
    };
    let front = Front::start(runtime, &config, RingFrom::Document(document));
    let ask = |ray: &str| {
        let request = front.request("GET", "/?userId=7").header("cf-ray", ray);
        front.send(request, "").status
    };
    assert_eq!(
        (ask("1-SFO"), ask("2-LHR"), ask("none of them")),
        (200, 200, 200)
    );
    let names = |server: &Scripted| -> Vec<String> {
        let seen = server.seen();
        seen.iter()
            .map(|seen| {
                let header = |name: &str| seen.headers[name].to_str().unwrap().to_owned();
                format!("{} {}", header("dormouse-name"), header("dormouse-colo"))
            })
            .collect()
    };
    assert_eq!(
        names(&west),
        ["SFO:7 SFO", "SFO:7 SFO"],
        "and the gateway's own colo"
    );
    assert_eq!(names(&east), ["LHR:7 LHR"]);
    // A colo without nodes has no place for objects.
    let lost = front.send(front.request("GET", "/").header("cf-ray", "3-NRT"), "");
    assert_eq!((lost.status, lost.code()), (503, "unavailable"));
}

#[test]
fn methods_headers_hosts_and_priorities_choose_the_route() {
    let (front, _) = front(
        "routes = [
             { name = 'all', path = '/*', respond = { body = 'all' } },
             { name = 'get', path = '/a', methods = ['GET', 'HEAD'], respond = { body = 'get' } },
             { name = 'put', path = '/a', methods = ['PUT'], respond = { body = 'put' } },
             { name = 'beta', path = '/a', headers = { x-beta = '1' }, respond = { body = 'beta' } },
             { name = 'any', path = '/a', headers = { x-any = '*' }, respond = { body = 'any' } },
             { name = 'below', host = '*.example.org', path = '/*', respond = { body = 'below' } },
             { name = 'exact', host = 'a.example.org', path = '/*', respond = { body = 'exact' } },
             { name = 'first', priority = 1, path = '/first/*', respond = { body = 'first' } },
             { name = 'post', path = '/only', methods = ['POST'], respond = { body = 'post' } },
         ]",
    );
    let ask = |method: &str, path: &str, headers: &[(&str, &str)]| {
        let mut request = front.request(method, path);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        String::from_utf8(front.send(request, "").body).unwrap()
    };
    assert_eq!(ask("GET", "/a", &[]), "get");
    assert_eq!(ask("PUT", "/a", &[]), "put");
    assert_eq!(
        ask("POST", "/a", &[]),
        "all",
        "a less specific route that offers it"
    );
    assert_eq!(ask("GET", "/a", &[("x-beta", "1")]), "beta");
    assert_eq!(ask("GET", "/a", &[("x-beta", "2")]), "get");
    assert_eq!(ask("GET", "/a", &[("x-any", "")]), "any");
    assert_eq!(ask("GET", "/a", &[("host", "x.example.org")]), "below");
    assert_eq!(ask("GET", "/a", &[("host", "A.example.org:81")]), "exact");
    assert_eq!(
        ask("GET", "/first/x", &[("host", "a.example.org")]),
        "first"
    );
    assert_eq!(ask("GET", "/only", &[]), "all");
}

#[test]
fn a_method_that_no_route_offers_is_answered_with_those_that_are() {
    let (front, _) = front(
        "routes = [
             { name = 'a', path = '/x', methods = ['PUT', 'GET'], respond = {} },
             { name = 'b', path = '/{any}', methods = ['DELETE'], respond = {} },
         ]",
    );
    let answer = front.post("/x", "");
    assert_eq!((answer.status, answer.code()), (405, "method_not_allowed"));
    assert_eq!(answer.headers["allow"], "DELETE, GET, PUT");
    assert_eq!(front.get("/a/../x").code(), "bad_request");
    assert_eq!(front.get("/a/%2e%2e/x").code(), "bad_request");
}

#[test]
fn rewrites_and_redirects_move_the_path() {
    let (front, app) = front(
        "routes = [
             { name = 'api', path = '/api/{v}/{rest...}', upstream = 'app', rewrite = '/{path.rest}?version={path.v}' },
             { name = 'strip', path = '/strip/{rest...}', upstream = 'app', rewrite = '/{path.rest}' },
             { name = 'old', path = '/old/{rest...}', redirect = { to = 'https://{host}/new/{path.rest}', status = 301 } },
             { name = 'user', path = '/me', redirect = { to = '/users/{cookie.user|nobody}?x' } },
         ]",
    );
    let seen = |target: &str| {
        assert_eq!(front.get(target).status, 200);
        app.seen().remove(0).uri
    };
    assert_eq!(seen("/api/7/a%2Fb/c?q=1"), "/a%2Fb/c?version=7");
    assert_eq!(seen("/strip/a/b?q=1"), "/a/b?q=1");
    assert_eq!(seen("/strip"), "/");
    // The client of the tests would follow a redirect.
    let head = front
        .raw("GET /old/a%20b?q=1 HTTP/1.1\r\nhost: Example.org:80\r\nconnection: close\r\n\r\n");
    assert!(head.starts_with("HTTP/1.1 301 "), "{head}");
    assert!(
        head.to_lowercase()
            .contains("location: https://example.org/new/a%20b?q=1\r\n"),
        "{head}"
    );
    let head = front
        .raw("GET /me?q=1 HTTP/1.1\r\nhost: a\r\ncookie: user=a/b c\r\nconnection: close\r\n\r\n");
    assert!(head.starts_with("HTTP/1.1 308 "), "{head}");
    assert!(
        head.to_lowercase()
            .contains("location: /users/a%2fb%20c?x\r\n"),
        "{head}"
    );
}

#[test]
fn a_fixed_answer_needs_no_server() {
    let (front, app) = front(
        "routes = [
             { name = 'up', path = '/up', respond = { body = 'fine', headers = { content-type = 'text/plain', x-a = '1' } } },
             { name = 'gone', path = '/gone', respond = { status = 410 } },
             { name = 'empty', path = '/empty', respond = { status = 204 } },
         ]",
    );
    let answer = front.get("/up");
    assert_eq!((answer.status, &answer.body[..]), (200, &b"fine"[..]));
    assert_eq!(answer.headers["content-type"], "text/plain");
    assert_eq!(answer.headers["x-a"], "1");
    let head = front.send(front.request("HEAD", "/up"), "");
    assert_eq!(
        (
            head.status,
            &head.headers["content-length"],
            head.body.len()
        ),
        (200, &"4".parse().unwrap(), 0)
    );
    assert_eq!(front.post("/gone", "a body that nobody wants").status, 410);
    assert_eq!(front.get("/empty").status, 204);
    assert_eq!(app.seen().len(), 0);
}

#[test]
fn a_trusted_proxy_says_who_the_client_is() {
    let (front, app) = front(
        "client = { trusted_proxies = ['127.0.0.0/8'], address_header = 'x-forwarded-for' }
         routes = [{ name = 'a', path = '/*', upstream = 'app', rewrite = '/{client.ip}' }]",
    );
    let request = front
        .request("GET", "/")
        .header("x-forwarded-for", "6.6.6.6, 203.0.113.9");
    assert_eq!(front.send(request, "").status, 200);
    assert_eq!(app.seen()[0].uri, "/203.0.113.9");
}
