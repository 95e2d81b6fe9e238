use proptest::prelude::*;

use super::*;
use crate::ids::{ClassName, Home, ObjectId};
use crate::trace::TraceParent;

fn id() -> ObjectId {
    let class: ClassName = "Kv".parse().unwrap();
    ObjectId::named(&class, Home::Global, &"a".parse().unwrap())
}

fn routed<'a>(name: Option<&'a str>, request: &'a str) -> Routed<'a> {
    Routed {
        id: id(),
        epoch: 7,
        timeout_ms: std::num::NonZeroU32::new(1500),
        trace: TraceParent {
            trace: 1 << 100,
            span: 2,
            flags: 1,
        },
        colo: "SFO",
        request,
        class: "Kv",
        name,
    }
}

#[track_caller]
fn payload(frame: &[u8], kind: Kind, end: bool) -> &[u8] {
    let header = Header::read(frame).unwrap().unwrap();
    let payload = &frame[HEADER_BYTES..];
    let want = Header {
        payload_bytes: payload.len(),
        stream: 9,
        kind,
        end,
    };
    assert_eq!(header, want);
    payload
}

type Lines = Vec<(Vec<u8>, Vec<u8>)>;

fn lines() -> impl Strategy<Value = Lines> {
    let text = || prop::collection::vec(any::<u8>(), 0..40);
    prop::collection::vec((text(), text()), 0..10)
}

fn borrowed(lines: &Lines) -> impl Iterator<Item = (&[u8], &[u8])> {
    lines
        .iter()
        .map(|(name, value)| (name.as_slice(), value.as_slice()))
}

/// Lets every reader see the bytes; how many headers and whole messages they found in them.
fn read_all(bytes: &[u8]) -> usize {
    Request::read(bytes).map_or(0, |read| read.headers.count())
        + Response::read(bytes).map_or(0, |read| read.headers.count())
        + usize::from(matches!(Header::read(bytes), Ok(Some(_))))
        + usize::from(read_credit(bytes).is_ok())
        + usize::from(read_retire(bytes).is_ok())
}

proptest! {
    #[test]
    fn a_request_is_read_as_it_was_written(
        name in prop::option::of("\\PC{0,40}"),
        path in "\\PC{0,40}",
        which in 0..4,
        lines in lines(),
        body in prop::collection::vec(any::<u8>(), 0..100),
    ) {
        let routed = routed(name.as_deref(), "0123456789abcdef");
        let ask = match which {
            0 => Ask::Fetch { method: "PUT", path_and_query: &path },
            1 => Ask::Call { method: "increment" },
            2 => Ask::Own { method: "add" },
            _ => Ask::Create,
        };
        let mut out = Vec::new();
        prop_assert!(request(&mut out, 9, &routed, &ask, borrowed(&lines), &body));
        let read = Request::read(payload(&out, Kind::Request, true)).unwrap();
        prop_assert_eq!((read.routed, read.ask, read.body), (routed, ask, body.as_slice()));
        prop_assert!(read.headers.eq(borrowed(&lines)));
    }

    #[test]
    fn a_response_is_read_as_it_was_written(
        status in any::<u16>(),
        end in any::<bool>(),
        lines in lines(),
        body in prop::collection::vec(any::<u8>(), 0..100),
    ) {
        let mut out = Vec::new();
        prop_assert!(response(&mut out, 9, end, status, borrowed(&lines), &body));
        let read = Response::read(payload(&out, Kind::Response, end)).unwrap();
        prop_assert_eq!((read.status, read.body), (status, body.as_slice()));
        prop_assert!(read.headers.eq(borrowed(&lines)));
    }

    #[test]
    fn no_bytes_make_a_reader_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(read_all(&bytes) <= bytes.len());
    }

    #[test]
    fn no_damage_to_a_request_makes_a_reader_panic(at in any::<prop::sample::Index>(), byte in any::<u8>(), cut in any::<prop::sample::Index>()) {
        let mut out = Vec::new();
        let ask = Ask::Fetch { method: "GET", path_and_query: "/a?b" };
        let lines = vec![(b"x".to_vec(), b"y".to_vec())];
        request(&mut out, 9, &routed(Some("a"), "r"), &ask, borrowed(&lines), b"body");
        let mut bytes = out.split_off(HEADER_BYTES);
        *at.get_mut(&mut bytes) = byte;
        let cut = cut.index(bytes.len());
        prop_assert!(read_all(&bytes) + read_all(&bytes[..cut]) <= 2 * bytes.len());
    }
}

#[test]
fn every_cut_of_a_head_is_noticed() {
    let mut out = Vec::new();
    let ask = Ask::Call { method: "get" };
    let lines = vec![(b"x".to_vec(), b"y".to_vec())];
    request(&mut out, 9, &routed(None, "r"), &ask, borrowed(&lines), b"");
    let whole = &out[HEADER_BYTES..];
    for cut in 0..whole.len() {
        assert!(Request::read(&whole[..cut]).is_err(), "cut at {cut}");
    }
}

#[test]
fn a_head_that_is_too_large_is_not_written() {
    let large = vec![b'x'; HEAD_BYTES_MAX];
    let lines = || std::iter::once((b"x".as_slice(), large.as_slice()));
    let mut out = b"before".to_vec();
    let ask = Ask::Create;
    assert!(!request(
        &mut out,
        9,
        &routed(None, "r"),
        &ask,
        lines(),
        b""
    ));
    assert!(!response(&mut out, 9, true, 200, lines(), b""));
    let long = "x".repeat(256);
    let ask = Ask::Call { method: &long };
    let none = std::iter::empty();
    assert!(!request(&mut out, 9, &routed(None, "r"), &ask, none, b""));
    assert_eq!(out, b"before");
}

#[test]
fn both_sides_agree_on_the_newest_common_version() {
    let hello = Hello::write(b"secret").unwrap();
    let read = Hello::read(hello.first_chunk().unwrap()).unwrap();
    assert_eq!((read.version(), read.token_bytes), (Some(1), 6));
    let range = |oldest, newest| {
        let hello = Hello {
            oldest,
            newest,
            token_bytes: 0,
        };
        hello.version()
    };
    assert_eq!(
        (range(1, 9), range(2, 9), range(0, 0)),
        (Some(1), None, None)
    );
}

#[test]
fn a_handshake_of_something_else_is_refused() {
    assert_eq!(Hello::read(b"GET / HTTP/1.1\r\n"), Err(LinkFault::Magic));
    assert_eq!(Welcome::read(b"HTTP/1.1 400 Bad"), Err(LinkFault::Magic));
    let welcome = Welcome {
        version: 1,
        verdict: Verdict::Token,
        streams_max: 5,
    };
    let mut bytes = welcome.write();
    assert_eq!(Welcome::read(&bytes), Ok(welcome));
    bytes[10] = 99;
    assert_eq!(Welcome::read(&bytes), Err(LinkFault::Verdict(99)));
    assert!(Hello::write(&[0; TOKEN_BYTES_MAX + 1]).is_err());
}

#[test]
fn frames_of_unknown_kind_or_size_are_refused() {
    let mut out = Vec::new();
    credit(&mut out, 3, 1000);
    assert_eq!(Header::read(&out[..HEADER_BYTES - 1]), Ok(None));
    assert_eq!(read_credit(&out[HEADER_BYTES..]), Ok(1000));
    out[8] = 200;
    assert_eq!(Header::read(&out), Err(LinkFault::Kind(200)));
    out[8] = 2;
    out[3] = 255;
    assert!(matches!(Header::read(&out), Err(LinkFault::Payload(_))));
}
