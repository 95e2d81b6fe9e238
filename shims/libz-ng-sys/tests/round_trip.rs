//! flate2, as pingora uses it, on this crate.

use std::io::{Read, Write};

use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;

#[test]
fn what_is_compressed_comes_back() {
    let text = "a dormouse sleeps ".repeat(10_000);
    for level in [1, 6, 9] {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::new(level));
        encoder.write_all(text.as_bytes()).unwrap();
        let compressed = encoder.finish().unwrap();
        assert!(
            compressed.len() < text.len() / 50,
            "{} bytes",
            compressed.len()
        );
        let mut back = String::new();
        GzDecoder::new(compressed.as_slice())
            .read_to_string(&mut back)
            .unwrap();
        assert_eq!(back, text);
    }
}

#[test]
fn damage_is_an_error() {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(b"a dormouse sleeps").unwrap();
    let mut compressed = encoder.finish().unwrap();
    compressed[12] ^= 0xff;
    assert!(
        GzDecoder::new(compressed.as_slice())
            .read_to_end(&mut Vec::new())
            .is_err()
    );
}
