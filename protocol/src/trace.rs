//! W3C Trace Context (<https://www.w3.org/TR/trace-context/>), version 00 of `traceparent`.

use std::fmt;

/// Bytes of a header value of version 00.
const HEADER_BYTES: usize = 55;

/// Which trace a request belongs to, and which span of it is its parent.
///
/// Prints as the value of a `traceparent` header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceParent {
    pub trace: u128,
    pub span: u64,
    pub flags: u8,
}

impl TraceParent {
    /// Reads a header value; `None` when it is malformed, and then a new trace begins (section 3.2.3).
    pub fn parse(value: &str) -> Option<Self> {
        let mut parts = value.splitn(5, '-');
        let (version, trace, span, flags) =
            (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        // A later version may append fields; version 00 may not, and ff is forbidden.
        if hex(version, 2)? == 0xff || (version == "00" && parts.next().is_some()) {
            return None;
        }
        let trace = hex(trace, 32)?;
        let span = u64::try_from(hex(span, 16)?).ok()?;
        let flags = u8::try_from(hex(flags, 2)?).ok()?;
        (trace != 0 && span != 0).then_some(Self { trace, span, flags })
    }

    /// The same trace as seen by the next hop: this hop's span is its parent.
    #[must_use]
    pub fn child(self, span: u64) -> Self {
        Self { span, ..self }
    }

    /// The value of a header. Every request that goes on gets one, and `fmt` would take ten times as long.
    pub fn to_bytes(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = *b"00-00000000000000000000000000000000-0000000000000000-00";
        put_hex(&mut bytes[3..35], self.trace);
        put_hex(&mut bytes[36..52], self.span.into());
        put_hex(&mut bytes[53..], self.flags.into());
        bytes
    }
}

impl fmt::Display for TraceParent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(std::str::from_utf8(&self.to_bytes()).map_err(|_| fmt::Error)?)
    }
}

/// Fills `digits` with the last ones of a number.
fn put_hex(digits: &mut [u8], mut number: u128) {
    for digit in digits.iter_mut().rev() {
        *digit = b"0123456789abcdef"[(number & 0xf) as usize];
        number >>= 4;
    }
}

/// Exactly `digits` lower-case hex digits, as the specification demands.
fn hex(text: &str, digits: usize) -> Option<u128> {
    let legal = text.len() == digits
        && text
            .bytes()
            .all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
    legal.then(|| u128::from_str_radix(text, 16).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLE: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn example_of_the_specification_round_trips() {
        let parent = TraceParent::parse(EXAMPLE).unwrap();
        assert_eq!(parent.to_string(), EXAMPLE);
        assert_eq!(parent.child(7).trace, parent.trace);
    }

    #[test]
    fn malformed_values_begin_a_new_trace() {
        for value in [
            "",
            "00",
            "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-x",
        ] {
            assert_eq!(TraceParent::parse(value), None, "{value:?}");
        }
    }
}
