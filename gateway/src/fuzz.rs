//! Doors for the fuzz targets in `gateway/fuzz`, and for the test that replays what they found: any bytes go in,
//! and what must hold of them is asserted. Nothing else uses them.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::LazyLock;

use http::{HeaderMap, HeaderName, HeaderValue, Method};
use protocol::link::{self, HEADER_BYTES, HELLO_BYTES, Header, Kind, WELCOME_BYTES};
use protocol::trace::TraceParent;
use protocol::{Colo, ObjectId, ObjectName, headers};

use crate::asked::{Asked, Params};
use crate::client::ClientRules;
use crate::config::{ClientConfig, Config};
use crate::route::{Ask as ObjectAsk, Found, Routes, Target};
use crate::template::Template;
use crate::{cors, deadline, downstream};

/// What is done with bytes of one kind.
pub type Door = fn(&[u8]);

/// By the names of the fuzz targets.
pub const DOORS: [(&str, Door); 6] = [
    ("config", config),
    ("template", template),
    ("url", url),
    ("headers", request_headers),
    ("proxy_header", proxy_header),
    ("link", link_frames),
];

/// A config file: read, validated, and put to use.
pub fn config(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    // What it names is not opened: it could be any file.
    if text.contains("_file") {
        return;
    }
    let Ok(config) = ops::config::parse::<Config>(text, Path::new("gateway.toml")) else {
        return;
    };
    if config.validate().is_err() {
        return;
    }
    let routes = Routes::new(&config).expect("it was validated");
    let (method, headers) = (Method::GET, HeaderMap::new());
    let asked = asked(&method, "/a/b", Some("user=ada"), &headers);
    follow(&routes, asked);
    assert!(config.differences_that_wait(&config).is_empty());
}

/// A template, and on further lines a path, a query and a header for it.
pub fn template(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let mut lines = text.splitn(4, '\n');
    let mut line = || lines.next().unwrap_or_default();
    let (template, path, query, value) = (line(), line(), line(), line());
    let mut headers = HeaderMap::new();
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert("x-a", value.clone());
        headers.insert("cookie", value);
    }
    let method = Method::POST;
    let asked = asked(&method, path, Some(query), &headers);
    for made in [
        Template::key(template, &[]),
        Template::location(template, &[]),
    ] {
        let Ok(made) = made else { continue };
        assert_eq!(made.as_str(), template);
        let (mut once, mut again) = (String::new(), String::new());
        let rendered = made.render(&asked, &mut once).is_ok();
        assert_eq!(made.render(&asked, &mut again).is_ok(), rendered);
        assert_eq!(once, again, "a key depends on the request alone");
    }
}

/// A path and query, through the contract and some routes.
pub fn url(bytes: &[u8]) {
    static ROUTES: LazyLock<Routes> = LazyLock::new(|| {
        let text = include_str!("fuzz/routes.toml");
        let config: Config =
            ops::config::parse(text, Path::new("routes.toml")).expect("it is a config");
        Routes::new(&config).expect("its routes are legal")
    });
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let (path, query) = match text.split_once('?') {
        Some((path, query)) => (path, Some(query)),
        None => (text, None),
    };
    let headers = HeaderMap::new();
    for method in [Method::GET, Method::POST] {
        follow(&ROUTES, asked(&method, path, query, &headers));
    }
}

/// From a request to its target, and what must hold of that.
fn follow(routes: &Routes, mut asked: Asked<'_>) {
    let Ok(found) = routes.find(&asked) else {
        return;
    };
    if let Found::Route { params, .. } = found {
        asked.params = params;
    }
    let Ok(target) = routes.target(found, &asked, || [7; 20]) else {
        return;
    };
    match target {
        Target::Object(target) => {
            if let Some(name) = &target.name {
                let id = ObjectId::named(&target.class, target.id.home(), name);
                assert_eq!(id, target.id, "the name leads to the id");
                let again: ObjectName = name.as_str().parse().expect("names are legal");
                assert_eq!(again, *name);
                let sent = headers::encode_name(name);
                let received = headers::decode_name(&sent).expect("it was encoded");
                assert_eq!(received, *name);
            }
            assert!(target.id.check_class(&target.class).is_ok());
            if let ObjectAsk::Fetch { path_and_query } = &target.ask {
                assert!(path_and_query.starts_with('/'), "{path_and_query:?}");
            }
        }
        Target::App { path_and_query, .. } => {
            assert!(path_and_query.is_none_or(|path| path.starts_with('/')));
        }
        Target::Counter(_) | Target::Redirect { .. } | Target::Respond(_) => {}
    }
}

/// The headers of a request, one a line.
pub fn request_headers(bytes: &[u8]) {
    static RULES: LazyLock<ClientRules> = LazyLock::new(|| {
        let config = ClientConfig {
            trusted_proxies: vec!["10.0.0.0/8".to_owned(), "::1".to_owned()],
            address_header: "x-forwarded-for".to_owned(),
            colo_header: "cf-ray".to_owned(),
            proxy_protocol: false,
        };
        ClientRules::new(&config).expect("the rules are legal")
    });
    let mut map = HeaderMap::new();
    for line in bytes.split(|byte| *byte == b'\n').take(100) {
        let Some(colon) = line.iter().position(|byte| *byte == b':') else {
            continue;
        };
        let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
        if let (Ok(name), Ok(value)) =
            (HeaderName::from_bytes(name), HeaderValue::from_bytes(value))
        {
            map.append(name, value);
        }
    }
    let stranger: IpAddr = Ipv4Addr::new(192, 0, 2, 1).into();
    assert_eq!(RULES.address(Some(stranger), &map), Some(stranger));
    let own = Colo::UNKNOWN;
    assert_eq!(RULES.colo(Some(stranger), &map, own), own);
    let proxy: IpAddr = Ipv4Addr::new(10, 0, 0, 1).into();
    assert!(RULES.address(Some(proxy), &map).is_some());
    RULES.colo(Some(proxy), &map, own);
    if let Ok(Some(timeout)) = deadline::of_client(&map) {
        deadline::of_request(tokio::time::Instant::now(), Some(timeout), None);
        deadline::write(timeout);
    }
    let trace = map.get(headers::TRACEPARENT);
    if let Some(trace) = trace.and_then(|value| TraceParent::parse(value.to_str().ok()?)) {
        assert_eq!(TraceParent::parse(&trace.to_string()), Some(trace));
    }
    cors::preflight(&Method::OPTIONS, &map);
    let method = Method::GET;
    let asked = asked(&method, "/", None, &map);
    asked.cookie_value("a");
    crate::link::forward::body_bytes(&map, true);
}

/// The beginning of a connection that may be a PROXY header.
pub fn proxy_header(bytes: &[u8]) {
    let whole = downstream::parse_proxy_header(bytes);
    let found = match &whole {
        Ok(Some((length, client))) => Some((*length, *client)),
        _ => None,
    };
    if let Some((length, _)) = found {
        assert!(length <= bytes.len());
    }
    // However it comes in pieces, it is the same header.
    for end in 0..bytes.len().min(300) {
        if let Ok(Some(early)) = downstream::parse_proxy_header(&bytes[..end]) {
            let early: (usize, Option<SocketAddr>) = early;
            assert_eq!(Some(early), found, "at {end}");
        }
    }
}

/// Frames of a link, from either side.
pub fn link_frames(bytes: &[u8]) {
    if let Some(hello) = bytes.first_chunk::<HELLO_BYTES>()
        && let Ok(hello) = link::Hello::read(hello)
    {
        assert!(hello.oldest <= hello.newest);
        hello.version();
    }
    if let Some(welcome) = bytes.first_chunk::<WELCOME_BYTES>()
        && let Ok(read) = link::Welcome::read(welcome)
    {
        assert_eq!(read.write(), *welcome);
    }
    let piece = usize::from(bytes.first().copied().unwrap_or(1));
    crate::link::take_any(bytes, piece);
    let mut rest = bytes;
    while let Ok(Some(header)) = Header::read(rest) {
        let Some(payload) = rest[HEADER_BYTES..].get(..header.payload_bytes) else {
            break;
        };
        frame(&header, payload);
        rest = &rest[HEADER_BYTES + header.payload_bytes..];
    }
}

fn frame(header: &Header, payload: &[u8]) {
    match header.kind {
        Kind::Request => {
            let Ok(read) = link::Request::read(payload) else {
                return;
            };
            let mut again = Vec::new();
            let fits = link::request(
                &mut again,
                header.stream,
                &read.routed,
                &read.ask,
                read.headers,
                read.body,
            );
            if fits {
                let payload = &again[HEADER_BYTES..];
                assert_eq!(link::Request::read(payload), Ok(read));
            }
        }
        Kind::Response => {
            let Ok(read) = link::Response::read(payload) else {
                return;
            };
            let mut again = Vec::new();
            if link::response(
                &mut again,
                header.stream,
                header.end,
                read.status,
                read.headers,
                read.body,
            ) {
                assert_eq!(link::Response::read(&again[HEADER_BYTES..]), Ok(read));
            }
        }
        Kind::Credit => {
            assert_eq!(link::read_credit(payload).is_ok(), payload.len() >= 4);
        }
        Kind::Retire => {
            assert_eq!(link::read_retire(payload).is_ok(), payload.len() >= 8);
        }
        Kind::Cancel | Kind::Data | Kind::Broken => {}
    }
}

fn asked<'a>(
    method: &'a Method,
    path: &'a str,
    query: Option<&'a str>,
    headers: &'a HeaderMap,
) -> Asked<'a> {
    Asked {
        method,
        host: Some("example.org"),
        secure: false,
        path,
        query,
        headers,
        colo: Colo::UNKNOWN,
        client: Some(Ipv4Addr::LOCALHOST.into()),
        params: Params::default(),
        shard: Some(3),
        claims: None,
    }
}
