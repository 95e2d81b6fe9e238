//! Rules that fail a run: `--fail-if "p99>5ms"`.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use crate::report::{Latency, Report};

/// One comparison of a figure of the report with a bound.
#[derive(Debug, Clone, PartialEq)]
pub struct Rule {
    figure: Figure,
    above: bool,
    /// In microseconds, requests per second, or requests.
    bound: f64,
    text: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Figure {
    Latency(Quantile),
    ServiceTime(Quantile),
    Rps,
    Errors,
    /// Errors among all answers.
    ErrorShare,
    NotSent,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Quantile {
    P50,
    P90,
    P99,
    P999,
    Max,
    Mean,
}

/// Why a text is no rule.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum RuleError {
    #[error("the rule {0:?} must be a figure, < or >, and a bound, as in p99>5ms")]
    Shape(String),
    #[error(
        "{0:?} must be one of p50, p90, p99, p99.9, max, mean, the same after \"service.\", rps, errors, not-sent"
    )]
    Figure(String),
    #[error("the bound {0:?} must be a time such as 5ms, 1.5s or 250us")]
    Time(String),
    #[error(
        "the bound {0:?} must be a number that is not negative, or for errors a share such as 0.1%"
    )]
    Number(String),
}

impl FromStr for Rule {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, RuleError> {
        let at = text
            .find(['<', '>'])
            .ok_or_else(|| RuleError::Shape(text.to_owned()))?;
        let (name, bound) = (text[..at].trim(), text[at + 1..].trim());
        let mut figure = match name {
            "rps" => Figure::Rps,
            "errors" => Figure::Errors,
            "not-sent" => Figure::NotSent,
            _ => match name.strip_prefix("service.") {
                Some(of) => Figure::ServiceTime(quantile(name, of)?),
                None => Figure::Latency(quantile(name, name)?),
            },
        };
        let bound = match figure {
            Figure::Latency(_) | Figure::ServiceTime(_) => micros(bound)?,
            Figure::Errors if bound.ends_with('%') => {
                figure = Figure::ErrorShare;
                number(bound, bound.trim_end_matches('%'))? / 100.0
            }
            _ => number(bound, bound)?,
        };
        Ok(Self {
            figure,
            above: text.as_bytes()[at] == b'>',
            bound,
            text: text.to_owned(),
        })
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

fn quantile(name: &str, of: &str) -> Result<Quantile, RuleError> {
    Ok(match of {
        "p50" => Quantile::P50,
        "p90" => Quantile::P90,
        "p99" => Quantile::P99,
        "p99.9" => Quantile::P999,
        "max" => Quantile::Max,
        "mean" => Quantile::Mean,
        _ => return Err(RuleError::Figure(name.to_owned())),
    })
}

fn micros(bound: &str) -> Result<f64, RuleError> {
    let wrong = || RuleError::Time(bound.to_owned());
    let unit = bound
        .find(|c: char| c.is_ascii_alphabetic() || c == 'µ')
        .ok_or_else(wrong)?;
    let factor = match &bound[unit..] {
        "us" | "µs" => 1.0,
        "ms" => 1e3,
        "s" => 1e6,
        _ => return Err(wrong()),
    };
    Ok(number(bound, bound[..unit].trim()).map_err(|_| wrong())? * factor)
}

fn number(bound: &str, text: &str) -> Result<f64, RuleError> {
    let number: Option<f64> = text.parse().ok();
    number
        .filter(|number| number.is_finite() && *number >= 0.0)
        .ok_or_else(|| RuleError::Number(bound.to_owned()))
}

impl Rule {
    /// What was found instead, if the rule holds and so the run fails.
    #[expect(
        clippy::cast_precision_loss,
        reason = "shown and compared, not counted"
    )]
    pub(crate) fn broken_by(&self, report: &Report) -> Option<String> {
        let errors: u64 = report.errors.values().sum();
        let time = |us: f64| (us, format!("{:.2?}", Duration::from_secs_f64(us / 1e6)));
        let (found, shown) = match self.figure {
            Figure::Latency(quantile) => time(quantile.of(&report.latency)),
            Figure::ServiceTime(quantile) => time(quantile.of(&report.service_time)),
            Figure::Rps => (report.rps, format!("{:.1}", report.rps)),
            Figure::Errors => (errors as f64, errors.to_string()),
            Figure::ErrorShare => {
                let share = errors as f64 / (errors + report.acknowledged).max(1) as f64;
                (share, format!("{:.3}%", share * 100.0))
            }
            Figure::NotSent => (report.not_sent as f64, report.not_sent.to_string()),
        };
        let holds = if self.above {
            found > self.bound
        } else {
            found < self.bound
        };
        holds.then_some(shown)
    }
}

impl Quantile {
    #[expect(
        clippy::cast_precision_loss,
        reason = "at most ten minutes in microseconds"
    )]
    fn of(self, latency: &Latency) -> f64 {
        match self {
            Self::P50 => latency.p50_us as f64,
            Self::P90 => latency.p90_us as f64,
            Self::P99 => latency.p99_us as f64,
            Self::P999 => latency.p99_9_us as f64,
            Self::Max => latency.max_us as f64,
            Self::Mean => latency.mean_us,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::report;

    #[test]
    fn a_rule_compares_a_figure_with_its_bound() {
        let report = report();
        let check = |rule: &str| rule.parse::<Rule>().unwrap().broken_by(&report);
        assert_eq!(report.latency.p99_us, 8191);
        assert_eq!(check("p99>5ms"), Some("8.19ms".to_owned()));
        assert_eq!(check("p99 > 8191us"), None);
        assert_eq!(check("max<1s"), Some("10.01ms".to_owned()));
        assert_eq!(check("service.p50>2ms"), None);
        assert_eq!(check("rps<1000"), Some("100.0".to_owned()));
        assert_eq!(check("errors>0"), Some("1".to_owned()));
        assert_eq!(check("errors>0.05%"), Some("0.100%".to_owned()));
        assert_eq!(check("errors>1%"), None);
        assert_eq!(check("not-sent>0"), None);
    }

    #[test]
    fn a_wrong_rule_names_what_is_wrong() {
        let error = |rule: &str| rule.parse::<Rule>().unwrap_err();
        assert_eq!(error("p99"), RuleError::Shape("p99".to_owned()));
        assert_eq!(error("p98>5ms"), RuleError::Figure("p98".to_owned()));
        assert_eq!(
            error("service.rps>5"),
            RuleError::Figure("service.rps".to_owned())
        );
        assert_eq!(error("p99>5"), RuleError::Time("5".to_owned()));
        assert_eq!(error("p99>5min"), RuleError::Time("5min".to_owned()));
        assert_eq!(error("rps<many"), RuleError::Number("many".to_owned()));
        assert_eq!(error("errors>-1"), RuleError::Number("-1".to_owned()));
    }
}
