use http::{HeaderMap, HeaderValue, Method};
use proptest::prelude::*;

use super::*;
use crate::asked::Params;

const TARGET: &str =
    "/users/a%2Fb/x/y%20z?userId=alice@example.com&empty=&text=a%3Ab+c&bad=%FF&pc=100%25";

/// What one request gives, or what it lacks. Its path matched `/users/{id}/{rest…}`.
fn render(template: &Template) -> Result<String, String> {
    let mut headers = HeaderMap::new();
    headers.insert("x-user", HeaderValue::from_str("häns").unwrap());
    headers.insert("x-bad", HeaderValue::from_bytes(b"\xff").unwrap());
    headers.insert("cookie", HeaderValue::from_static("session=s1; b=2"));
    let claims =
        serde_json::json!({ "sub": "ada", "n": 7, "ok": true, "org": { "id": "o:1" }, "list": [] });
    let mut params = Params::default();
    params.push(7, 12);
    params.push(13, 20);
    let (path, query) = TARGET.split_once('?').unwrap();
    let asked = Asked {
        method: &Method::GET,
        host: Some("Example.org:8080"),
        secure: true,
        path,
        query: Some(query),
        headers: &headers,
        colo: "SFO".parse().unwrap(),
        client: Some("2001:db8::1".parse().unwrap()),
        params,
        shard: Some(35),
        claims: Some(&claims),
    };
    let mut out = "> ".to_owned();
    template
        .render(&asked, &mut out)
        .map(|()| out[2..].to_owned())
        .map_err(|incomplete| incomplete.to_string())
}

fn params() -> [Box<str>; 2] {
    ["id".into(), "rest".into()]
}

#[track_caller]
fn key(template: &str, want: Result<&str, &str>) {
    let parsed = Template::key(template, &params()).unwrap();
    let got = render(&parsed);
    assert_eq!(got.as_deref().map_err(String::as_str), want, "{template}");
    assert_eq!(parsed.as_str(), template);
}

#[track_caller]
fn location(template: &str, want: &str) {
    let parsed = Template::location(template, &params()).unwrap();
    assert_eq!(render(&parsed).as_deref(), Ok(want), "{template}");
}

#[test]
fn the_classic_key_is_an_exact_concatenation() {
    key("{colo}:{query.userId|unknown}", Ok("SFO:alice@example.com"));
    key("{colo}:{query.nobody|unknown}", Ok("SFO:unknown"));
    key("{colo}:{query.empty|unknown}", Ok("SFO:unknown"));
    key("shard:{shard}", Ok("shard:35"));
}

#[test]
fn without_a_colo_keys_begin_with_unknown() {
    let template = Template::key("{colo}:{query.userId|unknown}", &[]).unwrap();
    let headers = HeaderMap::new();
    let mut out = String::new();
    let asked = crate::asked::tests::asked("/?userId=7", &headers);
    template.render(&asked, &mut out).unwrap();
    assert_eq!(out, "unknown:7");
}

#[test]
fn every_source_gives_its_value() {
    key("{client.ip}", Ok("2001:db8::1"));
    key("{host}", Ok("example.org"));
    key("{method}", Ok("GET"));
    key("{scheme}", Ok("https"));
    key("{path}", Ok("/users/a%2Fb/x/y%20z"));
    key("{path.id}", Ok("a/b"));
    key("{path.rest}", Ok("x/y z"));
    key("{query.text}", Ok("a:b c"));
    key("{header.X-User}", Ok("häns"));
    key("{cookie.session}", Ok("s1"));
    key("{jwt.sub}", Ok("ada"));
    key("{jwt.n}", Ok("7"));
    key("{jwt.ok}", Ok("true"));
    key("{jwt.org.id}", Ok("o:1"));
    key("a{{b}}c", Ok("a{b}c"));
    key("", Ok(""));
}

#[test]
fn what_is_missing_empty_or_not_text_takes_the_fallback_or_is_incomplete() {
    key("{query.none}", Err("query.none is missing or empty"));
    key("{query.empty}", Err("query.empty is missing or empty"));
    key("{query.bad}", Err("query.bad is missing or empty"));
    key("{header.x-bad}", Err("header.x-bad is missing or empty"));
    key("{cookie.none}", Err("cookie.none is missing or empty"));
    key("{jwt.list}", Err("jwt.list is missing or empty"));
    key("{jwt.org}", Err("jwt.org is missing or empty"));
    key("{query.bad|x}", Ok("x"));
    key("{jwt.list|}", Ok(""));
    key("{query.none|a b:c}", Ok("a b:c"));
}

#[test]
fn values_cannot_imitate_the_text_that_follows_them() {
    key(
        "{query.text}:{query.userId}",
        Ok("a%3Ab c:alice@example.com"),
    );
    key("{query.text}:end", Ok("a:b c:end"));
    key("{query.pc}/{query.pc}", Ok("100%25/100%"));
    key(
        "{client.ip}:{query.userId}",
        Ok("2001%3Adb8%3A%3A1:alice@example.com"),
    );
    key("{query.none|a:b}:{colo}", Ok("a%3Ab:SFO"));
    key("{header.x-user}ä{colo}", Ok("h%C3%A4nsäSFO"));
}

#[test]
fn a_location_keeps_what_came_encoded_and_encodes_the_rest() {
    location("/v2{path}?{query}", &format!("/v2{TARGET}"));
    location("/{path.id}/{path.rest}", "/a%2Fb/x/y%20z");
    location("/{query.text}", "/a%3Ab%20c");
    location(
        "https://{host}{path}",
        "https://example.org/users/a%2Fb/x/y%20z",
    );
}

#[test]
fn what_is_not_a_template_is_refused_by_place_and_rule() {
    let refused = |template: &str, at: usize, rule: &str| {
        let error = Template::key(template, &params()).unwrap_err();
        assert_eq!(error.at, at, "{error}");
        assert!(
            error.to_string().contains(rule),
            "{error} should say {rule:?}"
        );
        assert!(
            error.to_string().contains(&format!("{template:?}")),
            "{error}"
        );
    };
    refused("ä{colo", 2, "{ without a }");
    refused("a}b", 2, "} without a {");
    refused("{color}", 1, "is not one of colo, client.ip");
    refused("{query.}", 1, "is not one of");
    refused("x:{path.user}", 3, "those are id, rest");
    refused("{header.a b}", 1, "cannot be the name of a header");
    refused("{colo}{client.ip}", 7, "there must be some text");
    let error = Template::key("{path.id}", &[]).unwrap_err();
    assert!(error.rule.contains("there is none here"), "{error}");
}

proptest! {
    #[test]
    fn two_keys_are_equal_only_if_their_values_are(
        one in prop::array::uniform3("[a:%|/-]{1,4}"),
        two in prop::array::uniform3("[a:%|/-]{1,4}"),
        template in prop::sample::select(vec![
            "{header.a}:{header.b}:{header.c}",
            "{header.a}::{header.b}/{header.c}|",
            ":{header.a}%{header.b}a-{header.c}",
        ]),
    ) {
        let template = Template::key(template, &[]).unwrap();
        let render = |values: &[String; 3]| {
            let mut headers = HeaderMap::new();
            for (name, value) in ["a", "b", "c"].into_iter().zip(values) {
                headers.insert(name, value.parse().unwrap());
            }
            let mut out = String::new();
            template.render(&crate::asked::tests::asked("/", &headers), &mut out).unwrap();
            out
        };
        prop_assert_eq!(render(&one) == render(&two), one == two);
    }

    #[test]
    fn any_text_is_parsed_or_refused(text in "[{}|a.:colqueryäp]{0,24}") {
        if let Ok(template) = Template::key(&text, &params()) {
            let headers = HeaderMap::new();
            let asked = crate::asked::tests::asked("/", &headers);
            let mut out = String::new();
            let complete = template.render(&asked, &mut out).is_ok();
            prop_assert!(complete || template.sources().next().is_some());
        }
    }
}
