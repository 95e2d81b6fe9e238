//! Programs as one finds them, on both sides: Python and nginx behind the gateway, curl before it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use gateway::config::Config;
use gateway::server::RingFrom;

use crate::support::{Front, config, read_head, runtime};
use crate::upstream_tls::Authority;

/// A program; killed when dropped.
struct Program(Child);

impl Drop for Program {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn port_of(line: &str) -> u16 {
    let digits = line.split(|c: char| !c.is_ascii_digit());
    let mut numbers = digits.filter_map(|digits| digits.parse().ok());
    numbers.rfind(|port| *port > 1023).unwrap()
}

/// The app of `app.py`, and where it listens.
fn python_app() -> (Program, SocketAddr) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/app.py");
    let mut child = Command::new("python3")
        .arg(script)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("python3 is installed");
    let mut line = String::new();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    out.read_line(&mut line).unwrap();
    (Program(child), ([127, 0, 0, 1], port_of(&line)).into())
}

fn before(app: SocketAddr, more: &str) -> Front {
    let toml = format!(
        "upstreams.app.servers = ['{app}']\nroutes = [{{ name = 'app', path = '/*', upstream = 'app' }}]\n{more}"
    );
    let given: Config = toml::from_str(&toml).unwrap();
    let config = Config {
        upstreams: given.upstreams,
        routes: given.routes,
        tls_listen: given.tls_listen,
        certificates: given.certificates,
        ..config()
    };
    Front::start(runtime(), &config, RingFrom::Nodes)
}

fn connect(front: &Front) -> TcpStream {
    let stream = TcpStream::connect(front.gateway.address()).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(30)))
        .unwrap();
    stream
}

/// A whole frame of a client (RFC 6455, 5.2).
fn frame(kind: u8, data: &[u8]) -> Vec<u8> {
    let mut frame = vec![0x80 | kind];
    match u16::try_from(data.len()) {
        Ok(short) if short < 126 => frame.push(0x80 | data.len().to_le_bytes()[0]),
        Ok(length) => {
            frame.push(0x80 | 126);
            frame.extend(length.to_be_bytes());
        }
        Err(_) => {
            frame.push(0x80 | 127);
            frame.extend((data.len() as u64).to_be_bytes());
        }
    }
    let mask = [7, 1, 200, 93];
    frame.extend(mask);
    frame.extend(
        data.iter()
            .zip(mask.iter().cycle())
            .map(|(byte, mask)| byte ^ mask),
    );
    frame
}

/// A frame of the server: its kind and data.
fn read_frame(stream: &mut TcpStream) -> (u8, Vec<u8>) {
    let mut read = |bytes: usize| {
        let mut data = vec![0; bytes];
        stream.read_exact(&mut data).unwrap();
        data
    };
    let number = |bytes: Vec<u8>| {
        bytes
            .iter()
            .fold(0, |sum, byte| sum << 8 | usize::from(*byte))
    };
    let head = read(2);
    let length = match head[1] {
        126 => number(read(2)),
        127 => number(read(8)),
        short => usize::from(short),
    };
    (head[0] & 15, read(length))
}

#[test]
fn a_websocket_of_an_app_that_knows_nothing_of_the_gateway() {
    let (_program, app) = python_app();
    let front = before(app, "");
    let mut stream = connect(&front);
    stream
        .write_all(
            b"GET /chat HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: Upgrade\r\n\
              sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n\r\n",
        )
        .unwrap();
    let head = read_head(&mut stream).to_ascii_lowercase();
    assert!(head.starts_with("http/1.1 101"), "{head}");
    assert!(
        head.contains("sec-websocket-accept: s3pplmbitxaq9kygzzhzrbk+xoo="),
        "{head}"
    );
    let (text, binary, close, ping, pong) = (1, 2, 8, 9, 10);
    for message in ["", "hello", &"x".repeat(300), &"y".repeat(100_000)] {
        stream.write_all(&frame(text, message.as_bytes())).unwrap();
        assert_eq!(read_frame(&mut stream), (text, message.as_bytes().to_vec()));
    }
    // Many at once come back in order.
    let many: Vec<Vec<u8>> = (0..200_u8).map(|n| vec![n; usize::from(n)]).collect();
    let frames: Vec<u8> = many.iter().flat_map(|data| frame(binary, data)).collect();
    stream.write_all(&frames).unwrap();
    for data in many {
        assert_eq!(read_frame(&mut stream), (binary, data));
    }
    stream.write_all(&frame(ping, b"there?")).unwrap();
    assert_eq!(read_frame(&mut stream), (pong, b"there?".to_vec()));
    stream.write_all(&frame(close, &[3, 232])).unwrap();
    assert_eq!(read_frame(&mut stream), (close, vec![3, 232]));
    assert_eq!(stream.read(&mut [0]).unwrap(), 0, "the app has closed");
    front.eventually("gateway_requests_total{route=\"app\",code=\"101\"}", 1.0);
}

#[test]
fn events_of_an_app_come_one_by_one() {
    let (mut program, app) = python_app();
    let front = before(app, "");
    let mut stream = connect(&front);
    let request = "GET /events HTTP/1.1\r\nhost: x\r\naccept: text/event-stream\r\n\r\n";
    stream.write_all(request.as_bytes()).unwrap();
    let head = read_head(&mut stream).to_ascii_lowercase();
    assert!(head.contains("content-type: text/event-stream"), "{head}");
    let mut make = program.0.stdin.take().unwrap();
    let mut lines = BufReader::new(stream).lines();
    for number in 0..50 {
        // The next event is made when this one is here.
        make.write_all(b"\n").unwrap();
        make.flush().unwrap();
        let id = lines.find(|line| line.as_ref().unwrap().starts_with("id: "));
        assert_eq!(id.unwrap().unwrap(), format!("id: {number}"));
        assert_eq!(lines.next().unwrap().unwrap(), "data: tick");
    }
    drop(make);
    assert!(
        lines.any(|line| line.unwrap() == "0"),
        "the stream ends when the app ends it"
    );
}

#[test]
fn pythons_file_server_is_an_upstream() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("a.txt"), "dormouse\n".repeat(50_000)).unwrap();
    let mut child = Command::new("python3")
        .args([
            "-u",
            "-m",
            "http.server",
            "0",
            "--bind",
            "127.0.0.1",
            "--directory",
        ])
        .arg(dir.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("python3 is installed");
    let mut line = String::new();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    out.read_line(&mut line).unwrap();
    let line = line
        .split("port ")
        .nth(1)
        .unwrap()
        .split(' ')
        .next()
        .unwrap();
    let app = SocketAddr::from(([127, 0, 0, 1], port_of(line)));
    let _program = Program(child);
    let front = before(app, "");
    // It speaks HTTP/1.0, and closes after each answer.
    for _ in 0..3 {
        let answer = front.get("/a.txt");
        assert_eq!((answer.status, answer.body.len()), (200, 450_000));
    }
    assert_eq!(front.get("/b.txt").status, 404);
}

#[test]
fn nginx_is_an_upstream() {
    let dir = tempfile::tempdir().unwrap();
    let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let app = socket.local_addr().unwrap();
    drop(socket);
    let dir_path = dir.path().display();
    let conf = format!(
        "daemon off; master_process off; pid {dir_path}/pid; error_log stderr;
         events {{}}
         http {{
           access_log off; client_body_temp_path {dir_path}; proxy_temp_path {dir_path};
           fastcgi_temp_path {dir_path}; uwsgi_temp_path {dir_path}; scgi_temp_path {dir_path};
           server {{
             listen {app};
             location / {{ return 200 \"$request_method $request_uri $http_x_forwarded_proto\"; }}
             location /file {{ root {dir_path}; }}
           }}
         }}"
    );
    let file = dir.path().join("nginx.conf");
    std::fs::write(&file, conf).unwrap();
    std::fs::write(dir.path().join("file"), "x".repeat(1_000_000)).unwrap();
    let child = Command::new("nginx")
        .arg("-c")
        .arg(&file)
        .arg("-p")
        .arg(dir.path())
        .stderr(Stdio::null())
        .spawn()
        .expect("nginx is installed");
    let _program = Program(child);
    let front = before(app, "upstreams.app.retry.tries_max = 1");
    // It says nothing when it listens.
    while front.get("/").status != 200 {
        std::thread::yield_now();
    }
    for n in 0..20 {
        let answer = front.get(&format!("/a?n={n}"));
        assert_eq!(
            String::from_utf8(answer.body).unwrap(),
            format!("GET /a?n={n} http")
        );
    }
    assert_eq!(front.get("/file").body.len(), 1_000_000);
    let part = front.request("GET", "/file").header("range", "bytes=5-9");
    let part = front.send(part, "");
    assert_eq!((part.status, part.body.len()), (206, 5));
    let unchanged = front.get("/file").headers["etag"].clone();
    let asked = front
        .request("GET", "/file")
        .header("if-none-match", unchanged);
    assert_eq!(front.send(asked, "").status, 304);
}

/// What curl prints for these arguments.
fn curl(arguments: &[&str]) -> String {
    let out = Command::new("curl")
        .args(["--silent", "--show-error", "--max-time", "30"])
        .args(arguments)
        .output()
        .expect("curl is installed");
    let said = [out.stdout, out.stderr].concat();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&said));
    String::from_utf8(said).unwrap()
}

#[test]
fn curl_speaks_every_version_to_an_app_that_speaks_one() {
    let (_program, app) = python_app();
    let authority = Authority::new();
    let (cert, key) = authority.files("localhost");
    let front = before(
        app,
        &format!(
            "tls_listen = '127.0.0.1:0'\ncertificates = [{{ cert_file = {cert:?}, key_file = {key:?} }}]"
        ),
    );
    let port = front.gateway.tls_address().unwrap().port();
    let secure = format!("https://localhost:{port}/x?y=1");
    let plain = front.url("/x?y=1");
    let ca = authority.file("ca.pem");
    let ca = ca.to_str().unwrap();
    let version = ["--write-out", " %{http_version}"];
    for (way, url, want) in [
        ("--http1.0", &plain, "1.1"),
        ("--http1.1", &plain, "1.1"),
        ("--http2-prior-knowledge", &plain, "2"),
        // An upgrade to it that the gateway does not do.
        ("--http2", &plain, "1.1"),
        ("--http1.1", &secure, "1.1"),
        ("--http2", &secure, "2"),
    ] {
        let mut arguments = vec![way, url, "--cacert", ca, "--ipv4"];
        arguments.extend(version);
        assert_eq!(curl(&arguments), format!("/x?y=1 {want}"), "{way} {url}");
        let body = "z".repeat(100_000);
        arguments.extend(["--data", &body]);
        assert_eq!(curl(&arguments), format!("{body} {want}"), "{way} {url}");
    }
}
