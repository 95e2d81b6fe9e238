//! The files of `config/examples`, each with a request or more.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use gateway::config::{Config, ServerConfig};
use gateway::server::RingFrom;
use protocol::ring::{RingDocument, RingNode};

use crate::downstream::{ask_h2, connect};
use crate::support::{Front, Scripted, ring, runtime};
use crate::upstream_tls::{Authority, serve_tls};

fn dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../config/examples")
}

/// The example on free ports, before `servers` in place of those that it names.
fn example(name: &str, servers: &[Scripted]) -> Config {
    let mut config = gateway::config::read(&dir().join(name)).unwrap();
    if config.certificates.is_empty() {
        config.validate().unwrap();
    }
    assert_eq!(config.warnings(), [""; 0]);
    config.listen = "127.0.0.1:0".to_owned();
    config.nodes = Vec::new();
    let mut servers = servers.iter();
    for upstream in config.upstreams.values_mut() {
        for server in &mut upstream.servers {
            let here = servers.next().unwrap().address.to_string();
            match server {
                ServerConfig::Address(address) => *address = here,
                ServerConfig::Weighted(server) => server.address = here,
            }
        }
    }
    config
}

/// Name and path of the one request for an object, besides those for limits.
fn name_seen(server: &Scripted) -> (String, String) {
    let mut seen = server.seen();
    seen.retain(|seen| seen.headers["dormouse-class"] != "Limiter");
    let seen = seen.remove(0);
    let name = seen.headers["dormouse-name"].to_str().unwrap().to_owned();
    (name, seen.uri)
}

#[test]
fn every_example_is_tried_here() {
    let source = include_str!("examples.rs");
    for entry in std::fs::read_dir(dir()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(
            source.contains(&format!("example(\"{name}\"")),
            "{name} is not tried"
        );
    }
}

#[test]
fn app() {
    let runtime = runtime();
    let servers = [Scripted::start(&runtime)];
    let front = Front::start(runtime, &example("app.toml", &servers), RingFrom::Nodes);
    assert_eq!(front.post("/any/path?x=1", "body").status, 200);
    assert_eq!(servers[0].seen()[0].uri, "/any/path?x=1");
}

#[test]
fn sharded_app() {
    let runtime = runtime();
    let servers: [Scripted; 3] = std::array::from_fn(|_| Scripted::start(&runtime));
    let config = example("sharded-app.toml", &servers);
    let front = Front::start(runtime, &config, RingFrom::Nodes);
    let at = |user: u32| {
        let request = front
            .request("GET", "/")
            .header("cookie", format!("user={user}"));
        assert_eq!(front.send(request, "").status, 200);
        let mut at = None;
        for (number, server) in servers.iter().enumerate() {
            // Health checks are seen too.
            if server.seen().iter().any(|seen| seen.uri == "/") {
                at = Some(number);
            }
        }
        at.unwrap()
    };
    let first: Vec<usize> = (0..20).map(at).collect();
    let again: Vec<usize> = (0..20).map(at).collect();
    assert_eq!(first, again, "a user stays");
    assert!(first.iter().collect::<HashSet<_>>().len() > 1);
    assert_eq!(front.get("/up").body, b"fine\n");
}

#[test]
fn objects() {
    let runtime = runtime();
    let worker = Scripted::start(&runtime);
    let mut document = ring(1, worker.address);
    document.nodes[0].colo = Some("unknown".to_owned());
    let config = example("objects.toml", &[]);
    let front = Front::start(runtime, &config, RingFrom::Document(document));
    assert_eq!(front.get("/greeting?userId=ada").status, 200);
    assert_eq!(
        name_seen(&worker),
        ("unknown:ada".to_owned(), "/greeting?userId=ada".to_owned())
    );
    assert_eq!(
        front.post("/count?userId=alice@example.com", "").status,
        200
    );
    assert_eq!(name_seen(&worker), ("shard:35".to_owned(), "/".to_owned()));
    assert_eq!(front.get("/rooms/b%C3%A4r/topic").status, 200);
    assert_eq!(
        name_seen(&worker),
        ("room:b%C3%A4r".to_owned(), "/topic".to_owned())
    );
}

#[test]
fn two_colos() {
    let runtime = runtime();
    let (west, east) = (Scripted::start(&runtime), Scripted::start(&runtime));
    let node = |colo: &str, worker: &Scripted| RingNode {
        name: colo.to_owned(),
        weight: 1,
        colo: Some(colo.to_owned()),
        workers: vec![worker.address.to_string()],
    };
    let document = RingDocument {
        nodes: vec![node("SFO", &west), node("LHR", &east)],
        ..ring(1, west.address)
    };
    for (colo, worker) in [("SFO", &west), ("LHR", &east)] {
        let mut config = example("two-colos.toml", &[]);
        config.colo = colo.to_owned();
        let front = Front::start(
            crate::support::runtime(),
            &config,
            RingFrom::Document(document.clone()),
        );
        assert_eq!(front.get("/users/ada/x").status, 200);
        assert_eq!(name_seen(worker), (format!("{colo}:ada"), "/x".to_owned()));
        let request = front
            .request("GET", "/users/ada/x")
            .header("cf-ray", "1-LHR");
        assert_eq!(front.send(request, "").status, 200);
        assert_eq!(name_seen(&east).0, "LHR:ada");
    }
}

#[test]
fn bench_proxy() {
    let runtime = runtime();
    let servers: [Scripted; 2] = std::array::from_fn(|_| Scripted::start(&runtime));
    let config = example("bench-proxy.toml", &servers);
    assert_eq!(config.threads, 1);
    let front = Front::start(runtime, &config, RingFrom::Nodes);
    for key in 0..100 {
        assert_eq!(front.get(&format!("/app?k={key}")).status, 200);
    }
    let counts = [servers[0].count(), servers[1].count()];
    assert!(counts.iter().all(|count| *count > 20), "{counts:?}");
}

#[test]
fn tls() {
    let authority = Authority::new();
    let runtime = runtime();
    let server = Scripted::start(&runtime);
    let mut config = example("tls.toml", &[server]);
    config.tls_listen = "127.0.0.1:0".to_owned();
    let (cert, key) = authority.files("www.example.org");
    config.certificates[0].cert_file = cert.to_str().unwrap().to_owned();
    config.certificates[0].key_file = key.to_str().unwrap().to_owned();
    let pool = config.upstreams.get_mut("app").unwrap();
    let address = serve_tls(&runtime, &authority, "app.internal");
    pool.servers = vec![ServerConfig::Address(address.to_string())];
    let ca = authority.file("ca.pem");
    pool.tls.as_mut().unwrap().ca_file = ca.to_str().unwrap().to_owned();
    let front = Front::start(runtime, &config, RingFrom::Nodes);
    let answer = front.raw("GET /x HTTP/1.1\r\nhost: www.example.org\r\nconnection: close\r\n\r\n");
    assert!(
        answer.contains("ocation: https://www.example.org/x\r\n"),
        "{answer}"
    );
    let answer = front.runtime.block_on(async {
        let stream = connect(&front, &authority, "www.example.org", &["h2"]).await;
        ask_h2(stream.unwrap(), "https://www.example.org/x", "").await
    });
    assert_eq!(answer, (200, "HTTP/2.0 /x".to_owned()));
}
