//! A small server that counts increments, with one fault.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use clap::Parser;
use loadtest::{Report, RunArgs};

/// What the server does wrong.
#[derive(Clone, Copy)]
pub(crate) enum Fault {
    /// Nobody is answered for this long, once, from the given time after the first request.
    Stall { after: Duration, lasts: Duration },
    /// Every so many increments one is acknowledged and forgotten.
    Forget { every: u64 },
    /// Every so many increments one counts twice.
    Repeat { every: u64 },
    /// Answers of `value` are one increment old.
    ReadTheOld,
}

#[derive(Default)]
struct State {
    counters: HashMap<String, i64>,
    increments: u64,
    first: Option<Instant>,
}

#[derive(Default)]
struct Server {
    state: Mutex<State>,
    never: Condvar,
}

/// Starts it on a free port; it ends with the process.
pub(crate) fn start(fault: Fault) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let server = Arc::new(Server::default());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (server, stream) = (Arc::clone(&server), stream.unwrap());
            std::thread::spawn(move || server.serve(&stream, fault));
        }
    });
    url
}

impl Server {
    fn serve(&self, stream: &TcpStream, fault: Fault) {
        stream.set_nodelay(true).unwrap();
        let mut reader = BufReader::new(stream);
        let mut writer = stream;
        while let Some(path) = request(&mut reader) {
            let body = self.answer(&path, fault).to_string();
            let answer = format!(
                "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}",
                body.len()
            );
            if writer.write_all(answer.as_bytes()).is_err() {
                return;
            }
        }
    }

    #[expect(clippy::disallowed_methods, reason = "the stall is one of real time")]
    fn answer(&self, path: &str, fault: Fault) -> i64 {
        let (object, method) = path.rsplit_once('/').unwrap();
        let mut state = self.state.lock().unwrap();
        let first = *state.first.get_or_insert_with(Instant::now);
        if let Fault::Stall { after, lasts } = fault {
            let until = first + after + lasts;
            while Instant::now() >= first + after && Instant::now() < until {
                let rest = until.saturating_duration_since(Instant::now());
                state = self.never.wait_timeout(state, rest).unwrap().0;
            }
        }
        let old = *state.counters.entry(object.to_owned()).or_default();
        if method == "value" {
            return match fault {
                Fault::ReadTheOld if old > 0 => old - 1,
                _ => old,
            };
        }
        state.increments += 1;
        let by = match fault {
            Fault::Forget { every } if state.increments.is_multiple_of(every) => 0,
            Fault::Repeat { every } if state.increments.is_multiple_of(every) => 2,
            _ => 1,
        };
        *state.counters.entry(object.to_owned()).or_default() += by;
        old + 1
    }
}

/// The path of the next request.
fn request(reader: &mut impl BufRead) -> Option<String> {
    let mut path = None;
    let mut body = 0;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).ok()? == 0 {
            return None;
        }
        let line = line.trim_end();
        if line.is_empty() {
            break;
        }
        path = path.or_else(|| line.split(' ').nth(1).map(str::to_owned));
        if let Some(length) = line.strip_prefix("content-length: ") {
            body = length.parse().unwrap();
        }
    }
    reader.read_exact(&mut vec![0; body]).ok()?;
    path
}

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    args: RunArgs,
}

pub(crate) fn run(target: &str, more: &[&str]) -> Report {
    let arguments = ["run", "--target", target, "--warmup", "0", "--objects", "5"];
    let cli = Cli::parse_from(arguments.iter().chain(more));
    loadtest::run(&cli.args).unwrap()
}
