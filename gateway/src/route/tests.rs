use proptest::prelude::*;
use protocol::ErrorCode;

use super::*;

fn routes() -> Routes {
    let config: Config = toml::from_str(
        "upstreams.app.servers = ['127.0.0.1:1']
         routes = [
             { name = 'all', path = '/*', upstream = 'app' },
             { name = 'shop', path = '/shop/*', upstream = 'app' },
             { name = 'cart', path = '/shop/cart', upstream = 'app' },
             { name = 'admin', host = 'admin.example', path = '/*', upstream = 'app' },
         ]",
    )
    .unwrap();
    config.validate().unwrap();
    Routes::new(&config).unwrap()
}

fn decide_url(routes: &Routes, method: &str, url: &str) -> Result<Target, Problem> {
    let headers = http::HeaderMap::new();
    let asked = Asked {
        method: &method.parse().unwrap(),
        host: None,
        ..crate::asked::tests::asked(url, &headers)
    };
    decide(routes, asked)
}

fn decide(routes: &Routes, mut asked: Asked<'_>) -> Result<Target, Problem> {
    let found = routes.find(&asked)?;
    if let Found::Route { params, .. } = found {
        asked.params = params;
    }
    routes.target(found, &asked, || [9; 20])
}

/// `want` is class, name or `-`, and what is asked; or the code of the refusal.
#[track_caller]
fn check(request: &str, want: Result<&str, ErrorCode>) {
    let (method, url) = request.split_once(' ').unwrap();
    let got = match decide_url(&Routes::default(), method, url) {
        Ok(Target::Object(target)) => {
            let name = target.name.as_ref().map_or("-", ObjectName::as_str);
            let ask = match &target.ask {
                Ask::Fetch { path_and_query } => format!("fetch {path_and_query}"),
                Ask::Call { method } => format!("call {method}"),
                Ask::Own { method } => format!("own {method}"),
                Ask::Create => "create".to_owned(),
            };
            Ok(format!("{} {name} {ask}", target.class))
        }
        Ok(other) => Ok(format!("{other:?}")),
        Err(problem) => Err(problem.code),
    };
    assert_eq!(got.as_deref().map_err(|code| *code), want, "{request}");
}

#[test]
fn objects_see_their_own_path_and_query_untouched() {
    check("GET /objects/Kv/a", Ok("Kv a fetch /"));
    check("GET /objects/Kv/a/", Ok("Kv a fetch /"));
    check(
        "PUT /objects/Kv/a/b/c%2Fd?x=%20&y",
        Ok("Kv a fetch /b/c%2Fd?x=%20&y"),
    );
    check("GET /objects/Kv/a//b/../c", Ok("Kv a fetch //b/../c"));
    check("GET /objects/Kv/a?q", Ok("Kv a fetch /?q"));
}

#[test]
fn names_of_every_addressing_scheme_work() {
    for name in [
        "user:42",
        "brand:acme",
        "controller",
        "ratelimit:42:2026-11-21T05",
        "counter:acme:logins",
        "SFO:42",
        "shard:17",
        "room",
    ] {
        check(
            &format!("GET /objects/Kv/{name}"),
            Ok(&format!("Kv {name} fetch /")),
        );
    }
    check("GET /objects/Kv/a%2Fb/c", Ok("Kv a/b fetch /c"));
    check("GET /objects/Kv/%E6%97%A5", Ok("Kv 日 fetch /"));
    check("GET /objects/Kv/id%3Ax", Ok("Kv id:x fetch /"));
}

#[test]
fn calls_name_a_method() {
    check(
        "POST /rpc/Counter/a/increment",
        Ok("Counter a call increment"),
    );
    check(
        "POST /rpc/Counter/a%2Fb/value?ignored",
        Ok("Counter a/b call value"),
    );
    check("GET /rpc/Counter/a/value", Err(ErrorCode::MethodNotAllowed));
    check("POST /rpc/Counter/a", Err(ErrorCode::NotFound));
    check("POST /rpc/Counter/a/b/c", Err(ErrorCode::NotFound));
    check("POST /rpc/Counter/a/1x", Err(ErrorCode::BadRequest));
    check("POST /rpc/Counter/a/", Err(ErrorCode::BadRequest));
}

#[test]
fn a_class_alone_makes_ids() {
    check("POST /objects/Kv", Ok("Kv - create"));
    check("POST /objects/Kv/", Ok("Kv - create"));
    check("GET /objects/Kv", Err(ErrorCode::MethodNotAllowed));
    check("POST /objects/", Err(ErrorCode::BadRequest));
}

#[test]
fn ids_address_the_object_of_their_name() {
    let kv: ClassName = "Kv".parse().unwrap();
    let id = ObjectId::named(&kv, Home::Global, &"a".parse().unwrap());
    let Ok(Target::Object(target)) =
        decide_url(&Routes::default(), "GET", &format!("/objects/Kv/id:{id}/x"))
    else {
        panic!("no target");
    };
    assert_eq!((target.id, &target.name), (id, &None));
    check(
        &format!("GET /objects/Counter/id:{id}"),
        Err(ErrorCode::BadRequest),
    );
    check("GET /objects/Kv/id:12", Err(ErrorCode::BadRequest));
    check(
        &format!("GET /objects/Kv/id:{}", "0".repeat(64)),
        Err(ErrorCode::BadRequest),
    );
}

#[test]
fn bad_names_and_classes_are_refused() {
    check("GET /objects/K$v/a", Err(ErrorCode::BadRequest));
    check("GET /objects/Kv/%00", Err(ErrorCode::BadRequest));
    check("GET /objects/Kv/%ff", Err(ErrorCode::BadRequest));
    check(
        &format!("GET /objects/Kv/{}", "x".repeat(1025)),
        Err(ErrorCode::BadRequest),
    );
    check(
        &format!("GET /objects/Kv/{}", "x".repeat(1024)),
        Ok(&format!("Kv {} fetch /", "x".repeat(1024))),
    );
    check("GET /elsewhere", Err(ErrorCode::NotFound));
}

#[test]
fn the_most_specific_route_wins() {
    let routes = routes();
    let route = |host: Option<&str>, path: &str| {
        let headers = http::HeaderMap::new();
        let asked = Asked {
            host,
            ..crate::asked::tests::asked(path, &headers)
        };
        let Ok(Found::Route { index, .. }) = routes.find(&asked) else {
            panic!("no route");
        };
        routes.get(index).label.to_string()
    };
    assert_eq!(route(None, "/"), "all");
    assert_eq!(route(None, "/shop"), "shop");
    assert_eq!(route(None, "/shop/x"), "shop");
    assert_eq!(route(None, "/shopping"), "all");
    assert_eq!(route(None, "/shop/cart"), "cart");
    assert_eq!(route(Some("Admin.example:8080"), "/shop/cart"), "admin");
    assert_eq!(route(Some("other.example"), "/shop/cart"), "cart");
}

proptest! {
    #[test]
    fn no_url_makes_routing_panic(path in "(/objects/|/rpc/|/counters/|/)?\\PC{0,60}", query in proptest::option::of("\\PC{0,20}")) {
        let headers = http::HeaderMap::new();
        let asked = Asked {
            method: &Method::POST, host: Some(&path), path: &path, query: query.as_deref(),
            ..crate::asked::tests::asked("/", &headers)
        };
        if let Ok(Target::Object(target)) = decide(&routes(), asked) {
            prop_assert_eq!(target.id.check_class(&target.class), Ok(target.id));
        }
    }
}
