//! What may be sent again, and after how long.

use std::time::Duration;

use http::Method;

use crate::config::RetryConfig;

/// Longest pause between two tries.
const PAUSE_MAX: Duration = Duration::from_millis(500);

/// Why a try came to nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// No connection: nothing was sent.
    NotSent,
    /// The worker refused with `not_owner`: nothing ran.
    NotOwner,
    /// A kept-alive connection turned out to be closed before any byte of the answer.
    StaleConnection,
    /// An app answered with a status that its pool wants tried again.
    Status,
    /// No byte came in time. The request may have had its effect, and waiting was expensive.
    Silent,
    /// The request may have had its effect.
    Sent,
}

/// Whether a request with this method may be sent again after this failure.
pub fn is_safe(failure: Failure, method: &Method) -> bool {
    match failure {
        Failure::NotSent | Failure::NotOwner => true,
        // It may have been processed before the connection closed.
        Failure::StaleConnection => method.is_idempotent(),
        Failure::Status | Failure::Silent | Failure::Sent => false,
    }
}

/// The same for an app, whose GET does what HTTP says (RFC 9110, 9.2.2): an idempotent request may be
/// sent again whatever became of it, unless the wait was long already. The code of an object is run at most once per request instead.
pub fn is_safe_for_app(failure: Failure, method: &Method) -> bool {
    is_safe(failure, method) || (failure != Failure::Silent && method.is_idempotent())
}

/// The pause before the next try, after `tries` of them; `None` when it was tried enough.
pub fn pause(config: &RetryConfig, tries: u32) -> Option<Duration> {
    if tries >= config.tries_max {
        return None;
    }
    let doublings = tries.saturating_sub(1).min(16);
    Some((config.pause * (1 << doublings)).min(PAUSE_MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_idempotent_requests_survive_a_stale_connection() {
        assert!(is_safe(Failure::StaleConnection, &Method::GET));
        assert!(is_safe(Failure::StaleConnection, &Method::PUT));
        assert!(!is_safe(Failure::StaleConnection, &Method::POST));
        assert!(is_safe(Failure::NotOwner, &Method::POST));
        assert!(is_safe(Failure::NotSent, &Method::POST));
        assert!(!is_safe(Failure::Sent, &Method::GET));
    }

    #[test]
    fn apps_get_idempotent_requests_again_and_no_others() {
        for failure in [Failure::Sent, Failure::Status, Failure::StaleConnection] {
            assert!(is_safe_for_app(failure, &Method::GET));
            assert!(is_safe_for_app(failure, &Method::DELETE));
            assert!(!is_safe_for_app(failure, &Method::POST));
            assert!(!is_safe_for_app(failure, &Method::PATCH));
        }
        assert!(is_safe_for_app(Failure::NotSent, &Method::POST));
        assert!(!is_safe_for_app(Failure::Silent, &Method::GET));
    }

    #[test]
    fn pauses_double_up_to_a_bound_and_end() {
        let config = RetryConfig {
            tries_max: 8,
            ..RetryConfig::default()
        };
        let pauses: Vec<u128> = (1..)
            .map_while(|tries| pause(&config, tries))
            .map(|pause| pause.as_millis())
            .collect();
        assert_eq!(pauses, [20, 40, 80, 160, 320, 500, 500]);
    }
}
