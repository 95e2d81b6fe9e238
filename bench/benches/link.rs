//! What does a request cost on a link, but for the system calls: its frame written and read, on each side?

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use protocol::link::{self, Ask, HEADER_BYTES, Request, Response, Routed};
use protocol::trace::TraceParent;
use protocol::{ClassName, Home, ObjectId, ObjectName};

/// What a browser sends, about.
const HEADERS: [(&[u8], &[u8]); 6] = [
    (b"host", b"objects.example.org"),
    (
        b"user-agent",
        b"Mozilla/5.0 (X11; Linux x86_64) Gecko/20100101",
    ),
    (
        b"accept",
        b"text/html,application/xhtml+xml;q=0.9,*/*;q=0.8",
    ),
    (b"accept-language", b"en-US,en;q=0.5"),
    (b"accept-encoding", b"gzip, deflate, br"),
    (b"cookie", b"session=0123456789abcdef0123456789abcdef"),
];

fn links(criterion: &mut Criterion) {
    let class: ClassName = "Counter".parse().expect("legal");
    let name: ObjectName = "user:8423".parse().expect("legal");
    let routed = Routed {
        id: ObjectId::named(&class, Home::Global, &name),
        epoch: 1,
        timeout_ms: None,
        trace: TraceParent {
            trace: 1,
            span: 2,
            flags: 0,
        },
        colo: "SFO",
        request: "0123456789abcdef",
        class: class.as_str(),
        name: Some(name.as_str()),
    };
    let call = Ask::Call {
        method: "increment",
    };
    let fetch = Ask::Fetch {
        method: "GET",
        path_and_query: "/room?since=12",
    };
    let asks = [("call", call, 0), ("fetch", fetch, HEADERS.len())];
    let mut out = Vec::new();
    for (which, ask, headers) in asks {
        let write = |out: &mut Vec<u8>| {
            out.clear();
            let lines = HEADERS.into_iter().take(headers);
            link::request(out, 7, black_box(&routed), &ask, lines, b"[1]")
        };
        criterion.bench_function(&format!("link/write_{which}"), |bencher| {
            bencher.iter(|| write(&mut out));
        });
        write(&mut out);
        criterion.bench_function(&format!("link/read_{which}"), |bencher| {
            bencher.iter(|| Request::read(black_box(&out[HEADER_BYTES..])).is_ok());
        });
    }
    let kind = [(&b"content-type"[..], &b"application/json"[..])];
    criterion.bench_function("link/write_and_read_answer", |bencher| {
        bencher.iter(|| {
            out.clear();
            link::response(&mut out, 7, true, 200, kind.into_iter(), b"12345");
            Response::read(black_box(&out[HEADER_BYTES..])).is_ok()
        });
    });
}

criterion_group!(benches, links);
criterion_main!(benches);
