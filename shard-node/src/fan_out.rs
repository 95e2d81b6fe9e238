//! Fan-out and fan-in: many calls at once, so many under way, all within a time, and what to make of those that
//! fail.

use std::future::Future;
use std::num::NonZeroUsize;
use std::time::Duration;

use futures_util::stream::{self, StreamExt};
use protocol::{ErrorCode, Problem};
use tokio::time::Instant;

use crate::class::ClassError;

/// How calls are made that belong together.
#[derive(Debug, Clone, Copy)]
pub struct FanOut {
    /// Calls under way at once.
    pub at_once: NonZeroUsize,
    /// From the begin to the last answer. What is under way then has failed, and may go on where it is.
    pub within: Duration,
    pub needs: Needs,
}

/// What must succeed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Needs {
    /// Nothing: failures are part of the result.
    Nothing,
    AtLeast(usize),
    All,
}

/// Too many calls failed. Those that had not begun then were not made.
#[derive(Debug, thiserror::Error)]
#[error("{failed} of {calls} calls failed, at least: {first}")]
pub struct TooManyFailed {
    pub calls: usize,
    pub failed: usize,
    /// The first that failed.
    pub first: ClassError,
}

impl From<TooManyFailed> for ClassError {
    fn from(failed: TooManyFailed) -> Self {
        let detail = failed.to_string();
        match failed.first {
            Self::Called(problem) => Self::Called(Problem { detail, ..problem }),
            other => other,
        }
    }
}

impl FanOut {
    /// Makes the calls, and gives their results in the order of the calls.
    ///
    /// # Errors
    /// As soon as [`needs`](Self::needs) cannot be met any more.
    pub async fn gather<T, F>(
        &self,
        calls: impl IntoIterator<Item = F>,
    ) -> Result<Vec<Result<T, ClassError>>, TooManyFailed>
    where
        F: Future<Output = Result<T, ClassError>>,
    {
        let calls: Vec<F> = calls.into_iter().collect();
        let count = calls.len();
        let may_fail = match self.needs {
            Needs::Nothing => count,
            Needs::AtLeast(least) => count.saturating_sub(least),
            Needs::All => 0,
        };
        let until = Instant::now() + self.within;
        let bounded = calls
            .into_iter()
            .enumerate()
            .map(|(place, call)| async move {
                let ended = tokio::time::timeout_at(until, call).await;
                (place, ended.unwrap_or_else(|_| Err(self.too_late())))
            });
        let mut results: Vec<Option<Result<T, ClassError>>> = Vec::new();
        results.resize_with(count, || None);
        let mut ended = stream::iter(bounded).buffer_unordered(self.at_once.get());
        let mut failed = 0;
        while let Some((place, result)) = ended.next().await {
            if result.is_err() {
                failed += 1;
            }
            match result {
                Err(first) if failed > may_fail => {
                    return Err(TooManyFailed {
                        calls: count,
                        failed,
                        first,
                    });
                }
                result => results[place] = Some(result),
            }
        }
        let all = results
            .into_iter()
            .map(|result| result.expect("every call has ended"));
        Ok(all.collect())
    }

    fn too_late(&self) -> ClassError {
        ClassError::Called(Problem::new(
            ErrorCode::TimedOut,
            format!(
                "not answered within {:?}; whether the call had an effect is unknown",
                self.within
            ),
        ))
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    fn fan_out(needs: Needs) -> FanOut {
        FanOut {
            at_once: NonZeroUsize::new(4).unwrap(),
            within: Duration::from_secs(1),
            needs,
        }
    }

    fn thrown(number: usize) -> ClassError {
        ClassError::NotFound(format!("no {number}"))
    }

    #[tokio::test(start_paused = true)]
    async fn results_come_in_the_order_of_the_calls_and_no_more_are_under_way_than_allowed() {
        let (now, most) = (Cell::new(0), Cell::new(0));
        let calls = (0..100).map(|number| {
            let (now, most) = (&now, &most);
            async move {
                now.set(now.get() + 1);
                most.set(most.get().max(now.get()));
                tokio::time::sleep(Duration::from_millis(7 * (number % 3))).await;
                now.set(now.get() - 1);
                Ok::<_, ClassError>(number)
            }
        });
        let results = fan_out(Needs::All).gather(calls).await.unwrap();
        let numbers: Vec<u64> = results.into_iter().map(Result::unwrap).collect();
        assert_eq!(numbers, (0..100).collect::<Vec<_>>());
        assert_eq!(most.get(), 4);
    }

    #[tokio::test(start_paused = true)]
    async fn what_failed_is_listed_if_nothing_is_needed() {
        let calls = (0..100).map(|number| async move {
            match number % 33 {
                5 => Err(thrown(number)),
                _ => Ok(number),
            }
        });
        let results = fan_out(Needs::AtLeast(97)).gather(calls).await.unwrap();
        let failed: Vec<usize> = (0..100).filter(|place| results[*place].is_err()).collect();
        assert_eq!(failed, [5, 38, 71]);
    }

    #[tokio::test(start_paused = true)]
    async fn when_too_many_fail_the_rest_is_not_begun() {
        let begun = Cell::new(0);
        let calls = (0..100).map(|number| {
            let begun = &begun;
            async move {
                begun.set(begun.get() + 1);
                Err::<(), _>(thrown(number))
            }
        });
        let error = fan_out(Needs::AtLeast(98)).gather(calls).await.unwrap_err();
        assert_eq!((error.calls, error.failed), (100, 3));
        assert!(begun.get() <= 8, "{}", begun.get());
    }

    #[tokio::test(start_paused = true)]
    async fn what_takes_too_long_has_failed() {
        let calls = (0..6).map(|number| async move {
            if number == 1 {
                std::future::pending::<()>().await;
            }
            Ok(number)
        });
        let results = fan_out(Needs::Nothing).gather(calls).await.unwrap();
        assert!(
            matches!(&results[1], Err(ClassError::Called(late)) if late.code == ErrorCode::TimedOut)
        );
        assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 5);
    }
}
