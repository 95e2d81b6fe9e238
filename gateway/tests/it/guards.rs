//! Who may ask, and for what: auth, validation, access, CORS, and the quota of new objects. The app and the
//! worker remember what reached them; what was refused must not be there.

use std::path::Path;

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use gateway::config::Config;
use gateway::server::RingFrom;
use http::Response;
use http_body_util::Full;
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode, get_current_timestamp};
use rcgen::KeyPair;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::support::{Act, Answer, Front, Scripted, config, ok, ring, runtime};

/// A gateway with this much of a config before one worker that is also the app `app`.
fn front(toml: &str) -> (Front, Scripted) {
    let runtime = runtime();
    let server = Scripted::start(&runtime);
    let toml = format!("upstreams.app.servers = ['{}']\n{toml}", server.address);
    let given: Config = toml::from_str(&toml).unwrap();
    let config = Config {
        routes: given.routes,
        upstreams: given.upstreams,
        objects: given.objects,
        limits: given.limits,
        auth: given.auth,
        client: given.client,
        ..config()
    };
    let ring = RingFrom::Document(ring(1, server.address));
    (Front::start(runtime, &config, ring), server)
}

/// A route for everything, to the app, with these rules.
fn app(rules: &str) -> (Front, Scripted) {
    front(&format!(
        "[[routes]]
         name = 'app'
         path = '/*'
         upstream = 'app'
         {rules}"
    ))
}

#[track_caller]
fn refused(answer: &Answer, status: u16, code: &str, detail: &str) {
    assert_eq!((answer.status, answer.code()), (status, code), "{answer:?}");
    let said = answer.json()["detail"].as_str().unwrap().to_owned();
    assert!(said.contains(detail), "{said:?} should say {detail:?}");
}

fn header<'a>(answer: &'a Answer, name: &str) -> &'a str {
    answer
        .headers
        .get(name)
        .map_or("-", |v| v.to_str().unwrap())
}

impl Front {
    fn with(&self, path: &str, name: &str, value: &str) -> Answer {
        self.send(self.request("GET", path).header(name, value), "")
    }
}

#[test]
fn api_keys_open_a_route_and_name_their_owner() {
    let hash = |key: &str| format!("{:x}", Sha256::digest(key));
    let (front, app) = app(&format!(
        "auth = ['partners']
         limits = ['per-caller']
         [limits.per-caller]
         key = '{{jwt.sub}}'
         limit = 2
         period = '3600s'
         [auth.partners.api_keys]
         keys = {{ ada = '{}', bob = '{}' }}",
        hash("key of ada"),
        hash("key of bob"),
    ));
    let none = front.get("/x");
    refused(&none, 401, "unauthorized", "there are none");
    assert_eq!(header(&none, "www-authenticate"), "ApiKey");
    let wrong = front.with("/x", "x-api-key", "key of eve");
    refused(&wrong, 401, "unauthorized", "not a known one");
    let status = |key: &str| front.with("/x", "x-api-key", key).status;
    assert_eq!([(); 3].map(|()| status("key of ada")), [200, 200, 429]);
    assert_eq!(status("key of bob"), 200, "limited by itself");
    assert_eq!(app.seen().len(), 3);
}

/// A key that signs, and how others know it.
struct Signer {
    pem: String,
    jwk: Value,
}

impl Signer {
    fn new(id: &str) -> Self {
        let pair = KeyPair::generate().unwrap();
        let point = pair.public_key_raw();
        let encoded = |bytes: &[u8]| BASE64_URL_SAFE_NO_PAD.encode(bytes);
        let jwk = json!({
            "kty": "EC", "crv": "P-256", "kid": id, "use": "sig", "alg": "ES256",
            "x": encoded(&point[1..33]), "y": encoded(&point[33..65]),
        });
        let pem = pair.serialize_pem();
        Self { pem, jwk }
    }

    fn sign(&self, claims: &Value) -> String {
        let mut header = Header::new(Algorithm::ES256);
        header.kid = self.jwk["kid"].as_str().map(str::to_owned);
        let key = EncodingKey::from_ec_pem(self.pem.as_bytes()).unwrap();
        encode(&header, claims, &key).unwrap()
    }
}

fn jwks(signers: &[&Signer]) -> String {
    let mut keys: Vec<Value> = signers.iter().map(|signer| signer.jwk.clone()).collect();
    // Keys of unknown kinds are no reason to refuse a set.
    keys.push(json!({ "kty": "XX", "kid": "new" }));
    json!({ "keys": keys }).to_string()
}

fn claims(change: impl FnOnce(&mut Value)) -> Value {
    let mut claims = json!({
        "sub": "ada", "iss": "https://issuer", "aud": ["shop", "blog"], "scope": "orders read",
        "exp": get_current_timestamp() + 600, "tier": "gold",
    });
    change(&mut claims);
    claims
}

fn users(keys: &str) -> String {
    format!(
        "[auth.users.jwt]
         algorithms = ['ES256']
         {keys}
         issuers = ['https://issuer']
         audiences = ['shop']
         claims = {{ scope = 'orders' }}
         [[routes]]
         name = 'cart'
         path = '/cart'
         object = {{ class = 'Kv', name = '{{jwt.tier}}:{{jwt.sub}}' }}
         auth = ['users']"
    )
}

fn bearer(front: &Front, token: &str) -> Answer {
    front.with("/cart", "authorization", &format!("Bearer {token}"))
}

#[test]
fn a_good_token_opens_a_route_and_its_claims_name_the_object() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("keys.json");
    let (signer, other) = (Signer::new("a"), Signer::new("a"));
    std::fs::write(&file, jwks(&[&signer])).unwrap();
    let (front, worker) = front(&users(&format!("jwks_file = '{}'", file.display())));
    let good = signer.sign(&claims(|_| ()));
    for _ in 0..3 {
        assert_eq!(bearer(&front, &good).status, 200);
    }
    let seen = worker.seen();
    assert_eq!(seen.len(), 3);
    assert_eq!(seen[0].headers["dormouse-name"], "gold:ada");

    let none = front.get("/cart");
    refused(&none, 401, "unauthorized", "there are none");
    assert_eq!(header(&none, "www-authenticate"), "Bearer");
    let basic = front.with("/cart", "authorization", "Basic YTpi");
    refused(&basic, 401, "unauthorized", "there are none");
    let wrong = |token: &str, detail: &str| {
        let answer = bearer(&front, token);
        refused(&answer, 401, "unauthorized", detail);
        assert_eq!(
            header(&answer, "www-authenticate"),
            "Bearer error=\"invalid_token\""
        );
        assert!(!String::from_utf8_lossy(&answer.body).contains(token));
    };
    let signed = |change: fn(&mut Value)| signer.sign(&claims(change));
    wrong("nonsense", "no JWT");
    wrong(
        &signed(|c| c["exp"] = (get_current_timestamp() - 31).into()),
        "has expired",
    );
    wrong(
        &signed(|c| c["nbf"] = (get_current_timestamp() + 90).into()),
        "not valid yet",
    );
    wrong(
        &signed(|c| c["iss"] = "https://evil".into()),
        "another issuer",
    );
    wrong(&signed(|c| c["aud"] = "blog".into()), "another audience");
    wrong(&signed(|c| c["exp"] = Value::Null), "no claim \"exp\"");
    wrong(
        &signed(|c| drop(c.as_object_mut().unwrap().remove("aud"))),
        "no claim \"aud\"",
    );
    wrong(&other.sign(&claims(|_| ())), "signature");
    // A public key must not be taken for a secret, and nothing for a signature.
    let secret = EncodingKey::from_secret(jwks(&[&signer]).as_bytes());
    let confused = encode(&Header::new(Algorithm::HS256), &claims(|_| ()), &secret).unwrap();
    wrong(&confused, "HS256 are not accepted");
    let encoded = |value: Value| BASE64_URL_SAFE_NO_PAD.encode(value.to_string());
    let unsigned = format!(
        "{}.{}.",
        encoded(json!({ "alg": "none" })),
        encoded(claims(|_| ()))
    );
    wrong(&unsigned, "no JWT");
    // Clocks may differ by half a minute.
    let late = signed(|c| c["exp"] = (get_current_timestamp() - 10).into());
    assert_eq!(bearer(&front, &late).status, 200);
    worker.seen();
    let forbidden = bearer(&front, &signed(|c| c["scope"] = "read".into()));
    refused(&forbidden, 403, "forbidden", "claim \"scope\"");
    assert_eq!(worker.seen().len(), 0, "nothing of that reached the object");
}

#[test]
fn keys_behind_a_url_rotate() {
    let (old, new) = (Signer::new("old"), Signer::new("new"));
    let runtime = runtime();
    let issuer = Scripted::start(&runtime);
    let set = |text: String| {
        let response = Response::new(Full::new(text.into()));
        Act::Answer(response)
    };
    // The third answer is no set: the keys before it stay.
    issuer.script([set(jwks(&[&old])), ok("moved"), set(jwks(&[&new]))]);
    issuer.script((0..100).map(|_| set(jwks(&[&new]))));
    let (front, worker) = front(&users(&format!(
        "jwks_url = 'http://{}/keys'\nrefresh = '1s'",
        issuer.address
    )));
    let tokens = [&old, &new].map(|signer| signer.sign(&claims(|_| ())));
    let becomes = |token: &str, status: u16| {
        let answers = (0..1000).map(|_| bearer(&front, token).status);
        answers.take_while(|now| *now != status).count()
    };
    assert!(becomes(&tokens[0], 200) < 1000);
    assert_eq!(bearer(&front, &tokens[1]).status, 401);
    // What is remembered of a token goes with its key.
    assert!(eventually(&front, &tokens[1], 200));
    assert!(eventually(&front, &tokens[0], 401));
    assert!(!worker.seen().is_empty());
}

/// Asks for ten seconds.
fn eventually(front: &Front, token: &str, status: u16) -> bool {
    front.runtime.block_on(async {
        for _ in 0..200 {
            if bearer(front, token).status == status {
                return true;
            }
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
        false
    })
}

#[test]
fn before_keys_are_known_nobody_is_let_in_or_blamed() {
    let (front, worker) = front(&users("jwks_url = 'http://127.0.0.1:1/keys'"));
    let answer = bearer(&front, &Signer::new("a").sign(&claims(|_| ())));
    refused(&answer, 503, "unavailable", "could not be read yet");
    assert_eq!(worker.seen().len(), 0);
}

#[test]
fn signed_urls_open_what_was_signed() {
    let (front, app) = app("auth = ['links']
         [auth.links.signed_url]
         secrets = ['a secret of this test']");
    // See the test of the canonical form; this one expires in 2100.
    let path = "/files/a?expires=4102444800";
    let sig = "5fd7492f3c81401829ff2d689d0d09fd5dcf50ff2dc3cfdddc4b18a5a14f9af8";
    assert_eq!(front.get(&format!("{path}&sig={sig}")).status, 200);
    let head = front.request("HEAD", &format!("{path}&sig={sig}"));
    assert_eq!(front.send(head, "").status, 200);
    let tampered = front.get(&format!("/files/b?expires=4102444800&sig={sig}"));
    refused(&tampered, 401, "unauthorized", "signature of the URL");
    refused(
        &front.post(&format!("{path}&sig={sig}"), ""),
        401,
        "unauthorized",
        "signature",
    );
    refused(&front.get(path), 401, "unauthorized", "there are none");
    assert_eq!(app.seen().len(), 2);
}

#[test]
fn addresses_are_allowed_and_denied_also_behind_a_proxy() {
    let (front, app) = app("access = { allow = ['10.0.0.0/8'], deny = ['10.0.0.66'] }
         [client]
         trusted_proxies = ['127.0.0.1']
         address_header = 'x-forwarded-for'");
    let status = |address: &str| front.with("/", "x-forwarded-for", address).status;
    assert_eq!(
        ["10.1.2.3", "10.0.0.66", "203.0.113.9"].map(status),
        [200, 403, 403]
    );
    refused(
        &front.get("/"),
        403,
        "forbidden",
        "requests from 127.0.0.1 are not allowed",
    );
    assert_eq!(app.seen().len(), 1);
}

#[test]
fn requests_must_look_as_the_route_says() {
    let (front, app) = front(
        "[[routes]]
         name = 'app'
         path = '/shops/{shop}'
         upstream = 'app'
         [routes.validate]
         uri_bytes_max = 200
         header_bytes_max = 2000
         body_bytes_max = 1000
         content_types = ['application/json']
         values = { 'query.user' = '[a-z]{1,8}', 'query.page?' = '[0-9]+', 'path.shop' = '[a-z-]+' }",
    );
    assert_eq!(front.get("/shops/cafe?user=ada").status, 200);
    assert_eq!(front.get("/shops/cafe?user=ada&page=12").status, 200);
    let bad = |target: &str, detail: &str| refused(&front.get(target), 400, "bad_request", detail);
    bad("/shops/cafe", "query.user is missing or empty");
    bad("/shops/cafe?user=", "query.user is missing or empty");
    bad(
        "/shops/cafe?user=Ada",
        "query.user = \"Ada\" does not match",
    );
    bad("/shops/cafe?user=ada%0A", "does not match");
    bad("/shops/cafe?user=ada&page=x", "query.page = \"x\"");
    bad("/shops/C4?user=ada", "path.shop = \"C4\"");
    let long = front.get(&format!("/shops/cafe?user=ada&x={}", "y".repeat(200)));
    refused(&long, 414, "uri_too_long", "more than 200");
    let long = front.with("/shops/cafe?user=ada", "x-long", &"z".repeat(2000));
    refused(&long, 431, "headers_too_large", "the headers have");
    let post = |kind: &str, body: &str| {
        let request = front.request("POST", "/shops/cafe?user=ada");
        front.send(request.header("content-type", kind), body)
    };
    assert_eq!(post("application/json; charset=utf-8", "{}").status, 200);
    refused(
        &post("text/plain", "{}"),
        400,
        "bad_request",
        "must be one of application/json",
    );
    let large = post("application/json", &"x".repeat(1001));
    refused(&large, 413, "payload_too_large", "larger than 1000 bytes");
    assert_eq!(app.seen().len(), 3);
}

const ORDERS: &str = "
    [routes.validate.schema]
    type = 'object'
    required = ['item', 'count']
    additionalProperties = false
    [routes.validate.schema.properties]
    item = { type = 'string', maxLength = 20 }
    count = { type = 'integer', minimum = 1 }";

#[test]
fn bodies_that_do_not_fit_their_schema_never_leave() {
    let (front, app) = app(ORDERS);
    let good = r#"{"item": "nut", "count": 3}"#;
    assert_eq!(front.post("/", good).status, 200);
    let seen = app.seen().remove(0);
    assert_eq!(&seen.body[..], good.as_bytes(), "it arrives as it was sent");
    let bad = |body: &str, detail: &str| {
        refused(&front.post("/", body), 400, "bad_request", detail);
    };
    bad(r#"{"item": "nut", "count": 0}"#, "at \"/count\"");
    bad(r#"{"item": "nut"}"#, "required");
    bad(
        r#"{"item": "nut", "count": 1, "x": 1}"#,
        "does not fit its schema",
    );
    bad("{", "the body is no JSON");
    bad("", "the body is no JSON");
    let large = front.post("/", &format!("\"{}\"", "x".repeat(70_000)));
    refused(&large, 413, "payload_too_large", "larger than 65536 bytes");
    let packed = front
        .request("POST", "/")
        .header("content-encoding", "gzip");
    refused(
        &front.send(packed, good),
        400,
        "bad_request",
        "content-encoding",
    );
    assert_eq!(app.seen().len(), 0);
    // Chunked, and after asking first.
    for (header, body) in [
        (
            "transfer-encoding: chunked",
            "d\r\n{\"item\":\"nut\"\r\nb\r\n,\"count\":1}\r\n0\r\n\r\n",
        ),
        (
            "expect: 100-continue\r\ncontent-length: 24",
            "{\"item\":\"nut\",\"count\":1} ",
        ),
    ] {
        let request =
            format!("POST / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n{header}\r\n\r\n{body}");
        let answer = front.raw(&request);
        assert!(answer.contains("HTTP/1.1 200 OK"), "{header}: {answer}");
        let seen = app.seen().remove(0);
        assert_eq!(seen.body.trim_ascii(), br#"{"item":"nut","count":1}"#);
    }
    // The same before an object.
    let object = format!(
        "[[routes]]\nname = 'o'\npath = '/*'\nobject = {{ class = 'Kv', name = 'a' }}\n{ORDERS}"
    );
    let (front, worker) = self::front(&object);
    assert_eq!(front.post("/", good).status, 200);
    assert_eq!(&worker.seen().remove(0).body[..], good.as_bytes());
    assert_eq!(front.post("/", "{}").status, 400);
    assert_eq!(worker.seen().len(), 0);
}

#[test]
fn browsers_are_told_what_pages_may_do() {
    let (front, app) = app("methods = ['GET', 'PUT']
         auth = ['partners']
         [routes.cors]
         origins = ['https://shop.example']
         methods = ['GET', 'PUT']
         headers = ['x-api-key']
         credentials = true
         max_age = '1h'
         [auth.partners.api_keys]
         keys = { ada = '2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b' }");
    let preflight = |origin: &str, method: &str| {
        let request = front.request("OPTIONS", "/x").header("origin", origin);
        front.send(request.header("access-control-request-method", method), "")
    };
    let answer = preflight("https://shop.example", "PUT");
    assert_eq!((answer.status, answer.body.len()), (204, 0));
    assert_eq!(
        header(&answer, "access-control-allow-origin"),
        "https://shop.example"
    );
    assert_eq!(header(&answer, "access-control-allow-methods"), "GET, PUT");
    assert_eq!(header(&answer, "access-control-allow-headers"), "x-api-key");
    assert_eq!(header(&answer, "access-control-allow-credentials"), "true");
    assert_eq!(header(&answer, "access-control-max-age"), "3600");
    let strange = preflight("https://evil.example", "PUT");
    assert_eq!(header(&strange, "access-control-allow-origin"), "-");
    assert_eq!(header(&strange, "vary"), "Origin");
    // No preflight, no such method.
    refused(
        &front.send(front.request("OPTIONS", "/x"), ""),
        405,
        "method_not_allowed",
        "OPTIONS",
    );
    // A page may read why it was refused.
    let refusal = front.with("/x", "origin", "https://shop.example");
    assert_eq!(
        (
            refusal.status,
            header(&refusal, "access-control-allow-origin")
        ),
        (401, "https://shop.example")
    );
    assert_eq!(app.seen().len(), 0);
    // What the app says of that is replaced.
    let mut answer = Response::new(Full::new("hello".into()));
    answer
        .headers_mut()
        .insert("access-control-allow-origin", "*".parse().unwrap());
    app.script([Act::Answer(answer)]);
    let request = front
        .request("GET", "/x")
        .header("origin", "https://shop.example");
    let read = front.send(request.header("x-api-key", "secret"), "");
    assert_eq!(
        (read.status, header(&read, "access-control-allow-origin")),
        (200, "https://shop.example")
    );
    assert_eq!(
        read.headers
            .get_all("access-control-allow-origin")
            .iter()
            .count(),
        1
    );
}

fn new_object(body: &'static str) -> Act {
    let mut answer = Response::new(Full::new(body.into()));
    answer
        .headers_mut()
        .insert("dormouse-new-object", "1".parse().unwrap());
    Act::Answer(answer)
}

#[test]
fn only_new_objects_are_charged_for_and_when_they_are_used_up_workers_are_told() {
    let (front, worker) = front(
        "objects.creations = 'new'
         [limits.new]
         key = '{client.ip}'
         limit = 2
         period = '3600s'",
    );
    let wish = |act: Act| {
        worker.script([act]);
        let answer = front.post("/rpc/Counter/a/increment", "");
        assert_eq!(answer.status, 200);
        assert!(!answer.headers.contains_key("dormouse-new-object"));
        let seen = worker.seen().remove(0);
        seen.headers["dormouse-new-object"]
            .to_str()
            .unwrap()
            .to_owned()
    };
    // Old ones cost nothing, however many.
    for _ in 0..5 {
        assert_eq!(wish(ok("1")), "tell");
    }
    assert_eq!(wish(new_object("1")), "tell");
    assert_eq!(wish(new_object("1")), "tell");
    assert_eq!(wish(ok("1")), "refuse");
    // A client cannot wish for itself.
    let forged = front
        .request("POST", "/rpc/Counter/a/increment")
        .header("dormouse-new-object", "tell");
    assert_eq!(front.send(forged, "").status, 200);
    assert_eq!(
        worker.seen().remove(0).headers["dormouse-new-object"],
        "refuse"
    );
}

#[test]
fn what_cannot_work_stops_the_start_with_its_key() {
    let missing = Path::new("/nowhere/keys.json");
    let config: Config =
        toml::from_str(&users(&format!("jwks_file = '{}'", missing.display()))).unwrap();
    let error = config.validate().unwrap_err().to_string();
    assert!(
        error.contains("auth.users.jwt") && error.contains("/nowhere/keys.json"),
        "{error}"
    );
    let config: Config = toml::from_str(
        "objects.creations = 'n'
         [limits.n]
         key = 'k'
         limit = 1
         period = '1s'
         scope = 'exact'",
    )
    .unwrap();
    let error = config.validate().unwrap_err().to_string();
    assert!(
        error.contains("objects.creations = \"n\" must have scope"),
        "{error}"
    );
    let config: Config =
        toml::from_str("[[routes]]\nname = 'a'\npath = '/a'\nauth = ['x']\nrespond = {}").unwrap();
    let error = config.validate().unwrap_err().to_string();
    assert!(
        error.contains("routes[0].auth = \"x\" is not among the ways"),
        "{error}"
    );
}
