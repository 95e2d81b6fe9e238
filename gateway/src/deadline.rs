//! How long a request may take: what its client says, and what the config allows at most.
//!
//! Clients say it in `grpc-timeout`, whatever they speak: it is the one header of this kind that has a
//! specification (gRPC over HTTP/2: one to eight digits and a unit) and clients that send it by themselves, and
//! a time that is left needs no two clocks to agree, as a time of day would. What is left is what goes on to
//! apps, by the same name, and to workers.

use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue};
use protocol::{ErrorCode, Problem};
use tokio::time::Instant;

/// What a client, or an app that is asked, knows of it.
pub const TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");

/// Digits that a value may have, and the most that they can say.
const DIGITS_MAX: usize = 8;
const VALUE_MAX: u128 = 99_999_999;

/// What the client allows, if it says so.
///
/// # Errors
/// `bad_request` when that cannot be read.
pub fn of_client(headers: &HeaderMap) -> Result<Option<Duration>, Problem> {
    let mut values = headers.get_all(TIMEOUT).iter();
    let Some(value) = values.next() else {
        return Ok(None);
    };
    if values.next().is_some() {
        return Err(Problem::bad_request(format!(
            "the request has more than one {TIMEOUT}"
        )));
    }
    let read = value.to_str().ok().and_then(read);
    read.map(Some).ok_or_else(|| {
        Problem::bad_request(format!(
            "{TIMEOUT}: {value:?} is not one to eight digits and a unit (H, M, S, m, u or n)"
        ))
    })
}

fn read(value: &str) -> Option<Duration> {
    let (digits, unit) = value.split_at_checked(value.len().checked_sub(1)?)?;
    let legal =
        (1..=DIGITS_MAX).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_digit());
    let count: u64 = legal.then(|| digits.parse().ok())??;
    Some(match unit {
        "H" => Duration::from_secs(count * 3600),
        "M" => Duration::from_secs(count * 60),
        "S" => Duration::from_secs(count),
        "m" => Duration::from_millis(count),
        "u" => Duration::from_micros(count),
        "n" => Duration::from_nanos(count),
        _ => return None,
    })
}

/// The value of [`TIMEOUT`] for what is left: at most that, as exact as it can be.
pub fn write(left: Duration) -> HeaderValue {
    let units = [
        ('u', left.as_micros()),
        ('m', left.as_millis()),
        ('S', u128::from(left.as_secs())),
    ];
    let fitting = units.into_iter().find(|(_, count)| *count <= VALUE_MAX);
    let (unit, count) = fitting.unwrap_or(('S', VALUE_MAX));
    HeaderValue::try_from(format!("{count}{unit}")).expect("digits and a letter")
}

/// When a request that came at `begun` must be done, by the shorter of what its client and the config allow.
pub fn of_request(
    begun: Instant,
    client: Option<Duration>,
    max: Option<Duration>,
) -> Option<Instant> {
    let allowed = match (client, max) {
        (Some(client), Some(max)) => client.min(max),
        (client, max) => client.or(max)?,
    };
    // Beyond all time is no deadline.
    begun.checked_add(allowed)
}

/// What is left of it.
pub fn left(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now())
}

/// What the client is told when its time is over.
pub fn problem(begun: Instant, deadline: Instant, nothing_ran: bool) -> Problem {
    let allowed = deadline.saturating_duration_since(begun);
    let effect = match nothing_ran {
        true => "nothing ran",
        false => "whether the request had an effect is unknown",
    };
    Problem {
        retryable: nothing_ran,
        ..Problem::new(
            ErrorCode::TimedOut,
            format!("the deadline of the request, {allowed:?} after it came, is over; {effect}"),
        )
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[track_caller]
    fn check(value: &str, want: Option<Duration>) {
        assert_eq!(read(value), want, "{value:?}");
    }

    #[test]
    fn a_timeout_is_digits_and_a_unit() {
        check("1H", Some(Duration::from_secs(3600)));
        check("2M", Some(Duration::from_secs(120)));
        check("3S", Some(Duration::from_secs(3)));
        check("250m", Some(Duration::from_millis(250)));
        check("7u", Some(Duration::from_micros(7)));
        check("99999999n", Some(Duration::from_nanos(99_999_999)));
        check("0S", Some(Duration::ZERO));
        for senseless in [
            "",
            "S",
            "5",
            "5s",
            "-5S",
            "+5S",
            "1.5S",
            "123456789S",
            " 5S",
            "5 S",
            "5é",
        ] {
            check(senseless, None);
        }
    }

    #[test]
    fn one_value_counts_and_a_wrong_one_is_named() {
        let mut headers = HeaderMap::new();
        assert_eq!(of_client(&headers).unwrap(), None);
        headers.insert(TIMEOUT, HeaderValue::from_static("soon"));
        let problem = of_client(&headers).unwrap_err();
        assert_eq!(problem.code, ErrorCode::BadRequest);
        assert!(problem.detail.contains("soon"), "{}", problem.detail);
        headers.insert(TIMEOUT, HeaderValue::from_static("5S"));
        headers.append(TIMEOUT, HeaderValue::from_static("6S"));
        assert!(of_client(&headers).is_err());
    }

    #[test]
    fn the_shorter_of_client_and_config_counts() {
        let begun = Instant::now();
        let seconds = |seconds| Some(Duration::from_secs(seconds));
        let after = |client, max| of_request(begun, client, max).map(|at| at - begun);
        assert_eq!(after(seconds(1), seconds(2)), seconds(1));
        assert_eq!(after(seconds(3), seconds(2)), seconds(2));
        assert_eq!(after(None, seconds(2)), seconds(2));
        assert_eq!(after(seconds(3), None), seconds(3));
        assert_eq!(after(None, None), None);
        assert_eq!(after(seconds(u64::MAX), None), None);
    }

    proptest! {
        #[test]
        fn what_is_written_reads_back_and_is_never_longer(left_ns in 0..99_999_999_u64 * 1_000_000_000) {
            let left = Duration::from_nanos(left_ns);
            let back = read(write(left).to_str().unwrap()).unwrap();
            prop_assert!(back <= left, "{back:?} {left:?}");
            prop_assert!(left - back < Duration::from_micros(1).max(left / 10_000), "{back:?} {left:?}");
        }
    }
}
