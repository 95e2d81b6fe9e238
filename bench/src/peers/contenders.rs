//! Who answers which question, and how each is set up: one core for all of it, durable where it says so,
//! everything else as its makers ship it.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::rc::Rc;

use anyhow::{Context, ensure};
use loadtest::process::{Cluster, ClusterShape, Process, Ready};
use protocol::ids::Home;
use protocol::link::{self, Ask, Routed};
use protocol::trace::TraceParent;
use protocol::{ClassName, ObjectId, ObjectName, headers};

use super::client::{Protocol, ask};
use super::server::{Daemon, Needs, Places, Running, free_address};

/// One thing that several programs can do.
pub(super) struct Question {
    pub(super) name: &'static str,
    /// What exactly is compared.
    pub(super) what: &'static str,
    pub(super) objects: u32,
    /// The first is Dormouse; the others are compared with it.
    pub(super) contenders: Vec<Contender>,
}

pub(super) struct Contender {
    pub(super) name: &'static str,
    pub(super) needs: Needs,
    pub(super) start: fn(&Places, u32) -> anyhow::Result<Running>,
}

const DORMOUSE: Contender = contender("dormouse, gateway and node", Needs::Nothing, increments);
const SHARDED: Contender = contender("dormouse, sharded counter", Needs::Nothing, counted);
const WORKERD: Contender = contender("workerd", Needs::Workerd, workerd_increments);

const fn contender(
    name: &'static str,
    needs: Needs,
    start: fn(&Places, u32) -> anyhow::Result<Running>,
) -> Contender {
    Contender { name, needs, start }
}

pub(super) fn questions() -> Vec<Question> {
    let objects = |name, what, objects| Question {
        name,
        what,
        objects,
        contenders: vec![DORMOUSE, WORKERD],
    };
    vec![
        objects(
            "increment-one",
            "durable SQLite increments of one object, over HTTP",
            1,
        ),
        Question {
            name: "increment-sharded",
            what: "one logical counter in 100 shard objects, over HTTP",
            objects: 100,
            contenders: vec![SHARDED, WORKERD],
        },
        objects(
            "increment-many",
            "durable SQLite increments of 1,000 objects, over HTTP",
            1000,
        ),
        Question {
            name: "read-one",
            what: "SQLite reads of one object, over HTTP",
            objects: 1,
            contenders: vec![
                contender("dormouse, gateway and node", Needs::Nothing, reads),
                contender("workerd", Needs::Workerd, workerd_reads),
            ],
        },
        Question {
            name: "incr-one",
            what: "increments of one counter, straight to the process that has it; no pipelining",
            objects: 1,
            contenders: direct(),
        },
        Question {
            name: "incr-many",
            what: "the same over 1,000 counters",
            objects: 1000,
            contenders: direct(),
        },
        Question {
            name: "proxy",
            what: "a small answer of an app behind a proxy",
            objects: 1,
            contenders: vec![
                contender("dormouse, gateway", Needs::NginxAsApp, proxy_plain),
                contender("nginx", Needs::Nginx, nginx_plain),
                contender("haproxy", Needs::HaProxy, haproxy_plain),
            ],
        },
        Question {
            name: "proxy-rules",
            what: "the same with two apps, chosen by consistent hash of one of 100,000 keys, each with a rate limit; \
                   Dormouse looks at a parameter and a header, too",
            objects: 100_000,
            contenders: vec![
                contender("dormouse, gateway", Needs::NginxAsApp, proxy_rules),
                contender(
                    "dormouse, gateway without all that",
                    Needs::NginxAsApp,
                    proxy_two,
                ),
                contender("nginx", Needs::Nginx, nginx_rules),
                contender("haproxy", Needs::HaProxy, haproxy_rules),
            ],
        },
    ]
}

fn direct() -> Vec<Contender> {
    vec![
        contender("dormouse, worker, over a link", Needs::Nothing, by_link),
        contender("dormouse, worker, over HTTP", Needs::Nothing, to_worker),
        contender("redis, appendfsync always", Needs::Redis, redis_always),
        contender(
            "redis, appendfsync everysec (may lose a second)",
            Needs::Redis,
            redis_everysec,
        ),
    ]
}

fn http(method: &str, path: &str, more: &str) -> Vec<u8> {
    let length = match method {
        "POST" => "content-length: 0\r\n",
        _ => "",
    };
    format!("{method} {path} HTTP/1.1\r\nhost: bench\r\n{more}{length}\r\n").into_bytes()
}

fn cluster(places: &Places) -> anyhow::Result<Cluster> {
    Cluster::start(&ClusterShape {
        program: places.dormouse.clone(),
        before: Places::on(places.server_core),
        workers: 1,
        threads: 1,
        config: None,
    })
}

fn through_gateway(places: &Places, objects: u32, method: &str) -> anyhow::Result<Running> {
    let cluster = cluster(places)?;
    let call = |number, method| http("POST", &format!("/rpc/Counter/bench-{number}/{method}"), "");
    Ok(Running {
        address: cluster.gateway_ready.address().parse()?,
        protocol: Protocol::Http,
        requests: (0..objects).map(|number| call(number, method)).collect(),
        reads: match method {
            "increment" => (0..objects).map(|number| call(number, "value")).collect(),
            _ => Vec::new(),
        },
        commands: vec![
            "dormouse node --workers 1".to_owned(),
            "dormouse gateway --threads 1".to_owned(),
        ],
        measured: Vec::new(),
        cluster: Some(cluster),
        gateway: None,
        _others: Vec::new(),
        _data: tempfile::tempdir()?,
    })
}

fn increments(places: &Places, objects: u32) -> anyhow::Result<Running> {
    through_gateway(places, objects, "increment")
}

fn reads(places: &Places, objects: u32) -> anyhow::Result<Running> {
    through_gateway(places, objects, "value")
}

/// One counter with so many shards, by its own URL.
fn counted(places: &Places, shards: u32) -> anyhow::Result<Running> {
    let running = through_gateway(places, 1, "increment")?;
    let cluster = running.cluster.as_ref();
    let cluster = cluster.context("it was just started")?;
    let admin = cluster.gateway_ready.admin_address();
    let body = format!("{{\"count\":{shards}}}");
    let length = body.len();
    let change = format!(
        "PUT /counters/bench/shards HTTP/1.1\r\nhost: {admin}\r\ncontent-length: {length}\r\n\r\n{body}"
    );
    ask(admin.parse()?, Protocol::Http, change.as_bytes())?;
    Ok(Running {
        requests: [http("POST", "/counters/bench/increment", "")].into(),
        reads: vec![http("GET", "/counters/bench?exact=true", "")],
        ..running
    })
}

/// As a gateway speaks to a worker, but with a connection for each request under way.
fn by_link(places: &Places, objects: u32) -> anyhow::Result<Running> {
    let class: ClassName = "Counter".parse()?;
    let call = |number: u32, method: &str| -> anyhow::Result<Vec<u8>> {
        let name: ObjectName = format!("bench-{number}").parse()?;
        let routed = Routed {
            id: ObjectId::named(&class, Home::Global, &name),
            epoch: 1,
            trace: TraceParent {
                trace: 1,
                span: 1,
                flags: 0,
            },
            timeout_ms: None,
            colo: "SFO",
            request: "bench",
            class: class.as_str(),
            name: Some(name.as_str()),
        };
        let mut frame = Vec::new();
        let none = std::iter::empty();
        let fits = link::request(&mut frame, 0, &routed, &Ask::Call { method }, none, b"");
        ensure!(fits, "a call of {method} does not fit in a frame");
        Ok(frame)
    };
    let all = |method: &str| -> anyhow::Result<Vec<Vec<u8>>> {
        (0..objects).map(|number| call(number, method)).collect()
    };
    let running = to_worker(places, objects)?;
    Ok(Running {
        protocol: Protocol::Link,
        requests: all("increment")?.into(),
        reads: all("value")?,
        ..running
    })
}

/// As a gateway speaks to a worker, but over HTTP/1.1.
fn to_worker(places: &Places, objects: u32) -> anyhow::Result<Running> {
    let cluster = cluster(places)?;
    let class: ClassName = "Counter".parse()?;
    let call = |number: u32, method: &str| -> anyhow::Result<Vec<u8>> {
        let name: ObjectName = format!("bench-{number}").parse()?;
        let id = ObjectId::named(&class, Home::Global, &name);
        let more = format!(
            "{}: {class}\r\n{}: {id}\r\n{}: {name}\r\n{}: 1\r\n{}: {method}\r\n",
            headers::CLASS,
            headers::OBJECT,
            headers::NAME,
            headers::EPOCH,
            headers::METHOD
        );
        Ok(http("POST", "/", &more))
    };
    let all = |method: &str| -> anyhow::Result<Vec<Vec<u8>>> {
        (0..objects).map(|number| call(number, method)).collect()
    };
    Ok(Running {
        address: cluster.node_ready.address().parse()?,
        protocol: Protocol::Http,
        requests: all("increment")?.into(),
        reads: all("value")?,
        commands: vec!["dormouse node --workers 1".to_owned()],
        measured: Vec::new(),
        cluster: Some(cluster),
        gateway: None,
        _others: Vec::new(),
        _data: tempfile::tempdir()?,
    })
}

const WORKER: &str = r#"import { DurableObject } from "cloudflare:workers";
export class Counter extends DurableObject {
  constructor(ctx, env) {
    super(ctx, env);
    ctx.storage.sql.exec("CREATE TABLE IF NOT EXISTS counter (id INTEGER PRIMARY KEY, n INTEGER NOT NULL)");
  }
  fetch(request) {
    const sql = this.ctx.storage.sql;
    if (request.url.endsWith("/increment")) {
      const upsert = "INSERT INTO counter VALUES (1, 1) ON CONFLICT (id) DO UPDATE SET n = n + 1 RETURNING n";
      return new Response(String(sql.exec(upsert).one().n));
    }
    const rows = sql.exec("SELECT n FROM counter WHERE id = 1").toArray();
    return new Response(String(rows.length ? rows[0].n : 0));
  }
}
export default {
  fetch(request, env) {
    const name = new URL(request.url).pathname.split("/")[1];
    return env.COUNTER.get(env.COUNTER.idFromName(name)).fetch(request);
  },
};
"#;

fn workerd(places: &Places, objects: u32, method: &str) -> anyhow::Result<Running> {
    let data = tempfile::tempdir()?;
    let address = free_address()?;
    let disk = data.path().join("disk");
    fs::create_dir(&disk)?;
    fs::write(data.path().join("worker.js"), WORKER)?;
    let config = format!(
        r#"using Workerd = import "/workerd/workerd.capnp";
const config :Workerd.Config = (
  services = [
    (name = "main", worker = .counter),
    (name = "disk", disk = (path = "{}", writable = true)),
  ],
  sockets = [(name = "http", address = "{address}", http = (), service = "main")],
);
const counter :Workerd.Worker = (
  modules = [(name = "worker.js", esModule = embed "worker.js")],
  compatibilityDate = "2025-06-01",
  durableObjectNamespaces = [(className = "Counter", uniqueKey = "bench", enableSql = true)],
  durableObjectStorage = (localDisk = "disk"),
  bindings = [(name = "COUNTER", durableObjectNamespace = "Counter")],
);
"#,
        disk.display()
    );
    let file = data.path().join("config.capnp");
    fs::write(&file, config)?;
    let program = places.workerd.as_deref().context("workerd is there")?;
    let file = file.to_str().context("the path is text")?;
    let daemon = Daemon::start(places.server_core, program, &["serve", file], address)?;
    let call = |number, method| http("GET", &format!("/bench-{number}/{method}"), "");
    Ok(Running {
        address,
        protocol: Protocol::Http,
        requests: (0..objects).map(|number| call(number, method)).collect(),
        reads: match method {
            "increment" => (0..objects).map(|number| call(number, "value")).collect(),
            _ => Vec::new(),
        },
        commands: vec!["workerd serve config.capnp".to_owned()],
        measured: vec![daemon],
        cluster: None,
        gateway: None,
        _others: Vec::new(),
        _data: data,
    })
}

fn workerd_increments(places: &Places, objects: u32) -> anyhow::Result<Running> {
    workerd(places, objects, "increment")
}

fn workerd_reads(places: &Places, objects: u32) -> anyhow::Result<Running> {
    workerd(places, objects, "value")
}

fn redis(places: &Places, objects: u32, fsync: &str) -> anyhow::Result<Running> {
    let data = tempfile::tempdir()?;
    let address = free_address()?;
    let program = places.redis.as_deref().context("redis is there")?;
    let port = address.port().to_string();
    let directory = data.path().to_str().context("the path is text")?;
    let arguments = [
        "--port",
        &port,
        "--bind",
        "127.0.0.1",
        "--dir",
        directory,
        "--save",
        "",
        "--appendonly",
        "yes",
        "--appendfsync",
        fsync,
    ];
    let daemon = Daemon::start(places.server_core, program, &arguments, address)?;
    let call = |command: &str, number: u32| {
        let key = format!("bench-{number}");
        let (words, bytes) = (command.len(), key.len());
        format!("*2\r\n${words}\r\n{command}\r\n${bytes}\r\n{key}\r\n").into_bytes()
    };
    // A key that was never written has no value: write all once, by 0.
    let touch = |number: u32| {
        let key = format!("bench-{number}");
        format!(
            "*3\r\n$6\r\nINCRBY\r\n${}\r\n{key}\r\n$1\r\n0\r\n",
            key.len()
        )
        .into_bytes()
    };
    for number in 0..objects {
        ask(address, Protocol::Resp, &touch(number))?;
    }
    Ok(Running {
        address,
        protocol: Protocol::Resp,
        requests: (0..objects).map(|number| call("INCR", number)).collect(),
        reads: (0..objects).map(|number| call("GET", number)).collect(),
        commands: vec![format!(
            "redis-server --save '' --appendonly yes --appendfsync {fsync}"
        )],
        measured: vec![daemon],
        cluster: None,
        gateway: None,
        _others: Vec::new(),
        _data: data,
    })
}

fn redis_always(places: &Places, objects: u32) -> anyhow::Result<Running> {
    redis(places, objects, "always")
}

fn redis_everysec(places: &Places, objects: u32) -> anyhow::Result<Running> {
    redis(places, objects, "everysec")
}

/// nginx in one process, without a log.
fn nginx_with(
    places: &Places,
    core: u32,
    data: &tempfile::TempDir,
    name: &str,
    http: &str,
    address: SocketAddr,
) -> anyhow::Result<Daemon> {
    let prefix = data.path().display();
    let config = format!(
        "daemon off;\nmaster_process off;\npid {prefix}/{name}.pid;\nerror_log /dev/null;\n\
         events {{ worker_connections 4096; }}\n\
         http {{\n  access_log off;\n  keepalive_requests 1000000000;\n  \
         client_body_temp_path {prefix}/{name}-body;\n  proxy_temp_path {prefix}/{name}-proxy;\n  \
         fastcgi_temp_path {prefix}/{name}-1;\n  uwsgi_temp_path {prefix}/{name}-2;\n  \
         scgi_temp_path {prefix}/{name}-3;\n{http}}}\n"
    );
    let file = data.path().join(format!("{name}.conf"));
    fs::write(&file, config)?;
    let program = places.nginx.as_deref().context("nginx is there")?;
    let file = file.to_str().context("the path is text")?;
    Daemon::start(core, program, &["-c", file], address)
}

/// Apps behind a proxy: on the client's core, so that the proxy has its own.
fn apps(
    places: &Places,
    data: &tempfile::TempDir,
    count: usize,
) -> anyhow::Result<(Vec<Daemon>, Vec<SocketAddr>)> {
    let mut daemons = Vec::new();
    let mut addresses = Vec::new();
    for number in 0..count {
        let address = free_address()?;
        let http = format!(
            "  server {{ listen {address}; location / {{ default_type text/plain; return 200 \"hello from an app\"; }} }}\n"
        );
        let name = format!("app-{number}");
        let core = places.client_core;
        daemons.push(nginx_with(places, core, data, &name, &http, address)?);
        addresses.push(address);
    }
    Ok((daemons, addresses))
}

/// A proxy and the apps behind it.
fn proxied(
    objects: u32,
    address: SocketAddr,
    commands: &str,
    measured: Daemon,
    others: Vec<Daemon>,
    data: tempfile::TempDir,
) -> Running {
    Running {
        address,
        protocol: Protocol::Http,
        requests: pages(objects),
        reads: Vec::new(),
        commands: vec![commands.to_owned()],
        measured: vec![measured],
        cluster: None,
        gateway: None,
        _others: others,
        _data: data,
    }
}

fn pages(objects: u32) -> Rc<[Vec<u8>]> {
    (0..objects)
        .map(|number| http("GET", &format!("/?k={number}"), ""))
        .collect()
}

/// What stands in a proxy's config besides the apps.
#[derive(Default)]
struct Rules {
    /// Where all requests pass.
    front: &'static str,
    /// Where a server is chosen.
    pool: &'static str,
    /// Beside both.
    beside: &'static str,
    /// For who reads the results.
    said: &'static str,
}

fn nginx(places: &Places, objects: u32, count: usize, rules: &Rules) -> anyhow::Result<Running> {
    let data = tempfile::tempdir()?;
    let (others, apps) = apps(places, &data, count)?;
    let address = free_address()?;
    let servers: Vec<String> = apps.iter().map(|app| format!("server {app};")).collect();
    let http = format!(
        "  {}\n  upstream app {{ {} {} keepalive 128; keepalive_requests 1000000000; }}\n  \
         server {{ listen {address}; location / {{ {} proxy_pass http://app; proxy_http_version 1.1; \
         proxy_set_header Connection \"\"; }} }}\n",
        rules.beside,
        rules.pool,
        servers.join(" "),
        rules.front
    );
    let daemon = nginx_with(places, places.server_core, &data, "proxy", &http, address)?;
    let command = format!(
        "nginx (one process, keepalive 128 to the apps{})",
        rules.said
    );
    Ok(proxied(objects, address, &command, daemon, others, data))
}

fn nginx_plain(places: &Places, objects: u32) -> anyhow::Result<Running> {
    nginx(places, objects, 1, &Rules::default())
}

fn nginx_rules(places: &Places, objects: u32) -> anyhow::Result<Running> {
    let rules = Rules {
        front: "limit_req zone=keys burst=100000 nodelay;",
        pool: "hash $arg_k consistent;",
        beside: "limit_req_zone $arg_k zone=keys:64m rate=100000r/s;",
        said: ", hash $arg_k consistent, limit_req of $arg_k",
    };
    nginx(places, objects, 2, &rules)
}

fn haproxy(places: &Places, objects: u32, count: usize, rules: &Rules) -> anyhow::Result<Running> {
    let data = tempfile::tempdir()?;
    let (others, apps) = apps(places, &data, count)?;
    let address = free_address()?;
    let servers = apps.iter().enumerate();
    let servers: String = servers
        .map(|(number, app)| format!("  server app{number} {app} maxconn 4096\n"))
        .collect();
    let config = format!(
        "global\n  nbthread 1\n  maxconn 8192\ndefaults\n  mode http\n  timeout connect 5s\n  \
         timeout client 60s\n  timeout server 60s\n  http-reuse always\n\
         frontend front\n  bind {address}\n{}  default_backend apps\nbackend apps\n{}{servers}",
        rules.front, rules.pool
    );
    let file: PathBuf = data.path().join("haproxy.cfg");
    fs::write(&file, config)?;
    let program = places.haproxy.as_deref().context("haproxy is there")?;
    let file = file.to_str().context("the path is text")?;
    let daemon = Daemon::start(places.server_core, program, &["-db", "-f", file], address)?;
    let command = format!("haproxy -db (nbthread 1, http-reuse always{})", rules.said);
    Ok(proxied(objects, address, &command, daemon, others, data))
}

fn haproxy_plain(places: &Places, objects: u32) -> anyhow::Result<Running> {
    haproxy(places, objects, 1, &Rules::default())
}

fn haproxy_rules(places: &Places, objects: u32) -> anyhow::Result<Running> {
    let rules = Rules {
        front: "  stick-table type string len 32 size 200k expire 60s store http_req_rate(1s)\n  \
                http-request track-sc0 url_param(k)\n  \
                http-request deny deny_status 429 if { sc_http_req_rate(0) gt 100000 }\n",
        pool: "  balance url_param k\n  hash-type consistent\n",
        beside: "",
        said: ", balance url_param k, deny by http_req_rate of it",
    };
    haproxy(places, objects, 2, &rules)
}

fn proxy(places: &Places, objects: u32, count: usize, rules: &Rules) -> anyhow::Result<Running> {
    let data = tempfile::tempdir()?;
    let (others, apps) = apps(places, &data, count)?;
    let servers: Vec<String> = apps.iter().map(|app| format!("\"{app}\"")).collect();
    let config = format!(
        "nodes = []\nthreads = 1\n\
         [[routes]]\nname = \"app\"\npath = \"/*\"\nupstream = \"app\"\n{}\
         [upstreams.app]\nservers = [{}]\n{}{}",
        rules.front,
        servers.join(", "),
        rules.pool,
        rules.beside
    );
    let file = data.path().join("gateway.toml");
    fs::write(&file, config)?;
    let file = file.to_str().context("the path is text")?;
    let program = places.dormouse.to_str().context("the path is text")?;
    let words = [
        program,
        "gateway",
        "--config",
        file,
        "--listen",
        "127.0.0.1:0",
        "--admin-listen",
        "127.0.0.1:0",
    ];
    let command = Places::on(places.server_core).into_iter();
    let command = command
        .chain(words.into_iter().map(str::to_owned))
        .collect();
    let mut gateway = Process::own("gateway", command);
    let ready = Ready::parse(&gateway.start()?)?;
    Ok(Running {
        address: ready.address().parse()?,
        protocol: Protocol::Http,
        requests: pages(objects),
        reads: Vec::new(),
        commands: vec![format!(
            "dormouse gateway --config (threads = 1{})",
            rules.said
        )],
        measured: Vec::new(),
        cluster: None,
        gateway: Some(gateway),
        _others: others,
        _data: data,
    })
}

fn proxy_plain(places: &Places, objects: u32) -> anyhow::Result<Running> {
    proxy(places, objects, 1, &Rules::default())
}

fn proxy_two(places: &Places, objects: u32) -> anyhow::Result<Running> {
    proxy(places, objects, 2, &Rules::default())
}

fn proxy_rules(places: &Places, objects: u32) -> anyhow::Result<Running> {
    let rules = Rules {
        front: "limits = [\"per-key\"]\n\
                validate.values = { \"query.k\" = \"[0-9]{1,6}\", \"header.host\" = \"[a-z]+\" }\n",
        pool: "balance = \"hash\"\nkey = \"{query.k}\"\n",
        beside: "[limits.per-key]\nkey = \"{query.k}\"\nlimit = 100000\nperiod = \"1s\"\nkeys_max = 200000\n",
        said: ", hash, limit and check of {query.k}, check of a header",
    };
    proxy(places, objects, 2, &rules)
}
