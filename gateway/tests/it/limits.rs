//! Rate limits of one gateway. Those that several share need a node: see the tests of `dormouse`.

use gateway::config::Config;
use gateway::server::RingFrom;

use crate::support::{Answer, Front, Scripted, config, ok, ring, runtime};

/// A gateway in a colo, with this much of a config, before one worker that is also the app `app`.
fn front_in(colo: &str, toml: &str) -> (Front, Scripted) {
    let runtime = runtime();
    let server = Scripted::start(&runtime);
    let front = Front::start(
        runtime,
        &given(colo, toml, &server),
        RingFrom::Document(ring(1, server.address)),
    );
    (front, server)
}

fn front(toml: &str) -> (Front, Scripted) {
    front_in("SFO", toml)
}

fn given(colo: &str, toml: &str, server: &Scripted) -> Config {
    let toml = format!("upstreams.app.servers = ['{}']\n{toml}", server.address);
    let given: Config = toml::from_str(&toml).unwrap();
    Config {
        colo: colo.to_owned(),
        routes: given.routes,
        upstreams: given.upstreams,
        objects: given.objects,
        limits: given.limits,
        ..config()
    }
}

/// The classic snippet: a limit per colo and user, before an object per colo and user.
const CLASSIC: &str = "
    [limits.per-user]
    key = '{colo}:{query.userId|unknown}'
    limit = 5
    period = '60s'
    [[routes]]
    name = 'limited'
    path = '/*'
    object = { class = 'Kv', name = '{colo}:{query.userId|unknown}' }
    limits = ['per-user']";

/// How many of so many requests passed.
fn passed(front: &Front, target: &str, requests: usize) -> usize {
    let statuses = (0..requests).map(|_| front.get(target).status);
    statuses.filter(|status| *status == 200).count()
}

#[track_caller]
fn header<'a>(answer: &'a Answer, name: &str) -> &'a str {
    answer
        .headers
        .get(name)
        .map_or("-", |v| v.to_str().unwrap())
}

#[test]
fn the_classic_snippet_limits_each_user_before_the_object_is_touched() {
    let (front, worker) = front(CLASSIC);
    assert_eq!(passed(&front, "/?userId=ada", 20), 5);
    assert_eq!(passed(&front, "/?userId=bob", 20), 5);
    assert_eq!(passed(&front, "/", 20), 5);
    // Missing and empty are one.
    assert_eq!(passed(&front, "/?userId=", 5), 0);
    let seen = worker.seen();
    assert_eq!(seen.len(), 15, "what was refused never reached the worker");
    let names: Vec<&str> = seen
        .iter()
        .map(|request| request.headers["dormouse-name"].to_str().unwrap())
        .collect();
    assert_eq!(names[0], "SFO:ada");
    assert_eq!(names[14], "SFO:unknown");
    let line = |outcome| {
        format!("gateway_limit_decisions_total{{limit=\"per-user\",outcome=\"{outcome}\"}}")
    };
    front.eventually(&line("passed"), 15.0);
    front.eventually(&line("refused"), 50.0);
    front.eventually("gateway_limit_keys{limit=\"per-user\"}", 3.0);
    front.eventually(
        "gateway_requests_total{route=\"limited\",code=\"rate_limited\"}",
        50.0,
    );
}

#[test]
fn gateways_of_two_colos_limit_the_same_user_apart() {
    let (sfo, _) = front_in("SFO", CLASSIC);
    let (lhr, lhr_worker) = front_in("LHR", CLASSIC);
    assert_eq!(passed(&sfo, "/?userId=ada", 12), 5);
    assert_eq!(passed(&lhr, "/?userId=ada", 12), 5, "n + n in total");
    assert_eq!(lhr_worker.seen()[0].headers["dormouse-name"], "LHR:ada");
}

#[test]
fn a_refusal_says_when_to_come_again() {
    let (front, _) = front(CLASSIC);
    assert_eq!(passed(&front, "/", 5), 5);
    let refused = front.get("/");
    assert_eq!((refused.status, refused.code()), (429, "rate_limited"));
    assert_eq!(refused.body, b"Rate limited");
    assert_eq!(
        header(&refused, "content-type"),
        "text/plain; charset=utf-8"
    );
    // One per 12 seconds, rounded up.
    assert_eq!(header(&refused, "retry-after"), "12");
    assert_eq!(
        header(&refused, "ratelimit-policy"),
        "\"per-user\";q=5;w=60"
    );
    assert_eq!(header(&refused, "ratelimit"), "\"per-user\";r=0;t=12");
    for accept in ["*/*", "text/html, application/json;q=0.9"] {
        let request = front.request("GET", "/").header("accept", accept);
        assert_eq!(front.send(request, "").body, b"Rate limited");
    }
    let request = front
        .request("GET", "/")
        .header("accept", "text/html, application/problem+json;q=0.5");
    let refused = front.send(request, "").json();
    assert_eq!(
        (&refused["code"], &refused["status"]),
        (&"rate_limited".into(), &429.into())
    );
    assert_eq!(refused["retryable"], true);
    let head = front.send(front.request("HEAD", "/"), "");
    assert_eq!((head.status, head.body.len()), (429, 0));
    // A body that nobody wants is no broken connection.
    let refused = front.post("/", &"x".repeat(1 << 20));
    assert_eq!(refused.status, 429);
}

#[test]
fn several_limits_are_asked_and_none_is_charged_if_one_refuses() {
    let (front, app) = front(
        "[limits.all]
         key = 'all'
         limit = 10
         period = '60s'
         everywhere = true
         [limits.strict]
         key = '{query.k|none}'
         limit = 2
         period = '3600s'
         algorithm = 'sliding_window'
         [limits.watched]
         key = 'one'
         limit = 1
         period = '3600s'
         mode = 'shadow'
         [[routes]]
         name = 'both'
         path = '/both'
         upstream = 'app'
         limits = ['strict', 'watched']
         [[routes]]
         name = 'open'
         path = '/open'
         upstream = 'app'",
    );
    assert_eq!(passed(&front, "/both?k=a", 9), 2);
    let refused = front.get("/both?k=a");
    // Ten ninths of its period: a window counts by parts.
    assert_eq!(header(&refused, "ratelimit"), "\"strict\";r=0;t=4000");
    assert_eq!(passed(&front, "/both?k=b", 9), 2);
    // Of ten for all, four are taken and none by those that were refused.
    assert_eq!(passed(&front, "/open", 20), 6);
    assert_eq!(app.seen().len(), 10);
    let watched = |outcome| {
        format!("gateway_limit_decisions_total{{limit=\"watched\",outcome=\"{outcome}\"}}")
    };
    front.eventually(&watched("passed"), 1.0);
    front.eventually(&watched("shadow_refused"), 18.0);
}

#[test]
fn limits_apply_to_the_contract_for_objects() {
    let (front, worker) = front(
        "objects.limits = ['calls']
         [limits.calls]
         key = '{client.ip}'
         limit = 3
         period = '60s'",
    );
    worker.script((0..3).map(|_| ok("1")));
    let statuses: Vec<u16> = (0..5)
        .map(|n| {
            front
                .post(&format!("/rpc/Counter/c{n}/increment"), "")
                .status
        })
        .collect();
    assert_eq!(statuses, [200, 200, 200, 429, 429]);
    assert_eq!(front.get("/objects/Kv/a/x").status, 429);
    assert_eq!(worker.seen().len(), 3);
}

#[test]
fn a_key_without_a_value_is_the_clients_fault_and_charged_to_nobody() {
    let (front, app) = front(
        "[limits.tenant]
         key = '{header.x-tenant}'
         limit = 1
         period = '60s'
         [[routes]]
         name = 'app'
         path = '/*'
         upstream = 'app'
         limits = ['tenant']",
    );
    let refused = front.get("/");
    assert_eq!((refused.status, refused.code()), (400, "bad_request"));
    let detail = refused.json()["detail"].to_string();
    assert!(
        detail.contains("header.x-tenant is missing or empty"),
        "{detail}"
    );
    let with = |tenant: &str| {
        let request = front.request("GET", "/").header("x-tenant", tenant);
        front.send(request, "").status
    };
    assert_eq!((with("a"), with("a"), with("b")), (200, 429, 200));
    assert_eq!(app.seen().len(), 2);
}

#[test]
fn a_reload_keeps_what_limits_know_unless_they_change() {
    let runtime = runtime();
    let server = Scripted::start(&runtime);
    let before = given("SFO", CLASSIC, &server);
    let front = Front::start(
        runtime,
        &before,
        RingFrom::Document(ring(1, server.address)),
    );
    assert_eq!(passed(&front, "/", 3), 3);
    let reload = |toml: &str| {
        let config = given("SFO", toml, &server);
        front
            .runtime
            .block_on(front.gateway.reload(&config))
            .unwrap();
    };
    reload(&CLASSIC.replace("name = 'limited'", "name = 'renamed'"));
    assert_eq!(passed(&front, "/", 9), 2, "three of five were taken before");
    reload(&CLASSIC.replace("limit = 5", "limit = 6"));
    assert_eq!(passed(&front, "/", 9), 6, "another limit begins anew");
}

#[test]
fn a_limiter_that_cannot_be_asked_is_the_configs_choice() {
    let limit = |name: &str, choice: &str| {
        format!(
            "[limits.{name}]
             key = 'k'
             limit = 1
             period = '60s'
             scope = 'colo'
             when_unreachable = '{choice}'
             [[routes]]
             name = '{name}'
             path = '/{name}'
             upstream = 'app'
             limits = ['{name}']\n"
        )
    };
    // The worker answers, but it is no limiter.
    let (front, _) = front(&(limit("a", "open") + &limit("b", "closed")));
    assert_eq!(passed(&front, "/a", 3), 3);
    let refused = front.get("/b");
    assert_eq!((refused.status, refused.code()), (503, "unavailable"));
    assert_eq!(header(&refused, "retry-after"), "1");
    assert_eq!(passed(&front, "/b", 3), 0);
    front.eventually(
        "gateway_limit_decisions_total{limit=\"b\",outcome=\"unreachable\"}",
        4.0,
    );
}

#[test]
fn operators_see_who_comes_and_who_is_refused_most() {
    let (front, _) = front(CLASSIC);
    for n in 0..400 {
        let user = if n % 4 == 0 {
            "bob".to_owned()
        } else if n % 4 == 1 {
            format!("u{n}")
        } else {
            "ada".to_owned()
        };
        front.get(&format!("/?userId={user}"));
    }
    let handle = front.gateway.registry().handle();
    let admin = gateway::server::GatewayAdmin {
        gateway: std::sync::Arc::clone(&front.gateway),
        metrics: handle,
    };
    let page = ops::admin::Admin::page(&admin, &http::Method::GET, "/hot", None).unwrap();
    let body = front
        .runtime
        .block_on(http_body_util::BodyExt::collect(page.into_body()))
        .unwrap()
        .to_bytes();
    let hot: serde_json::Value = serde_json::from_slice(&body).unwrap();
    let first = |list: &serde_json::Value| list[0]["key"].as_str().unwrap().to_owned();
    let limit = &hot["limits"]["per-user"];
    assert_eq!(first(&limit["rate"]), "SFO:ada", "{hot}");
    assert_eq!(first(&limit["refusals"]), "SFO:ada", "{hot}");
    let refusals: Vec<&str> = limit["refusals"]
        .as_array()
        .unwrap()
        .iter()
        .map(|key| key["key"].as_str().unwrap())
        .collect();
    assert_eq!(refusals, ["SFO:ada", "SFO:bob"], "nobody else was refused");
    assert!(hot["objects"].is_array());
}
