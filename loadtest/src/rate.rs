//! How many requests per second are meant to be sent, over the time of a run.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Stages in which the latency of a ramp is shown.
const RAMP_STAGES: usize = 10;

/// Requests per second are drawn no slower than this: a ramp may begin at 0.
const RATE_MIN: f64 = 0.1;

/// A constant rate (`2000`), equally long steps (`1000,2000,4000`), or a ramp (`500..5000`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Rate {
    /// 0: as fast as the connections allow.
    Constant(f64),
    Steps(Vec<f64>),
    Ramp {
        from: f64,
        to: f64,
    },
}

/// Why a text is no rate.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "the rate {0:?} must be a number from 0 to ten million, steps such as 100,200,400, or a ramp such as 100..400"
)]
pub struct RateError(String);

impl Rate {
    /// The rate when this share (0 to 1) of the time has passed.
    pub(crate) fn at(&self, progress: f64) -> f64 {
        let progress = progress.clamp(0.0, 1.0);
        let rate = match self {
            Self::Constant(rate) => *rate,
            Self::Steps(steps) => steps[self.stage(progress)],
            Self::Ramp { from, to } => from + (to - from) * progress,
        };
        rate.max(RATE_MIN)
    }

    /// Parts of the run whose latency is shown apart; 1 if the rate is constant.
    pub(crate) fn stages(&self) -> usize {
        match self {
            Self::Constant(_) => 1,
            Self::Steps(steps) => steps.len(),
            Self::Ramp { .. } => RAMP_STAGES,
        }
    }

    /// The stage at this share of the time.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "a share of a small number"
    )]
    pub(crate) fn stage(&self, progress: f64) -> usize {
        let stages = self.stages();
        ((progress.max(0.0) * stages as f64) as usize).min(stages - 1)
    }

    /// The mean over the whole time.
    #[expect(clippy::cast_precision_loss, reason = "few steps")]
    pub(crate) fn mean(&self) -> f64 {
        match self {
            Self::Constant(rate) => *rate,
            Self::Steps(steps) => steps.iter().sum::<f64>() / steps.len() as f64,
            Self::Ramp { from, to } => (from + to) / 2.0,
        }
    }

    /// Whether the connections send as fast as they can.
    pub(crate) fn is_closed_loop(&self) -> bool {
        *self == Self::Constant(0.0)
    }

    /// The same with every rate multiplied.
    pub(crate) fn scaled(&self, factor: f64) -> Self {
        match self {
            Self::Constant(rate) => Self::Constant(rate * factor),
            Self::Steps(steps) => Self::Steps(steps.iter().map(|rate| rate * factor).collect()),
            Self::Ramp { from, to } => Self::Ramp {
                from: from * factor,
                to: to * factor,
            },
        }
    }
}

impl FromStr for Rate {
    type Err = RateError;

    fn from_str(text: &str) -> Result<Self, RateError> {
        let wrong = || RateError(text.to_owned());
        let number = |text: &str| {
            let rate: f64 = text.trim().parse().map_err(|_| wrong())?;
            if (0.0..1e7).contains(&rate) {
                Ok(rate)
            } else {
                Err(wrong())
            }
        };
        if let Some((from, to)) = text.split_once("..") {
            let (from, to) = (number(from)?, number(to)?);
            return Ok(Self::Ramp { from, to });
        }
        let mut steps = text.split(',').map(number).collect::<Result<Vec<_>, _>>()?;
        match steps.len() {
            1 => Ok(Self::Constant(steps.remove(0))),
            _ => Ok(Self::Steps(steps)),
        }
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Constant(rate) => write!(f, "{rate}"),
            Self::Ramp { from, to } => write!(f, "{from}..{to}"),
            Self::Steps(steps) => {
                let steps: Vec<String> = steps.iter().map(f64::to_string).collect();
                f.write_str(&steps.join(","))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_follows_its_shape() {
        let at = |text: &str, progress| text.parse::<Rate>().unwrap().at(progress);
        assert_eq!(at("100", 0.7), 100.0);
        assert_eq!(at("100,200,400", 0.0), 100.0);
        assert_eq!(at("100,200,400", 0.5), 200.0);
        assert_eq!(at("100,200,400", 1.0), 400.0);
        assert_eq!(at("100..400", 0.5), 250.0);
        assert_eq!(at("400..100", 1.0), 100.0);
        assert!(at("0..100", 0.0) > 0.0, "somebody comes at last");
    }

    #[test]
    fn a_text_and_its_rate_are_inverse() {
        for text in ["0", "2000", "0.5", "100,200,400", "100..400"] {
            assert_eq!(text.parse::<Rate>().unwrap().to_string(), text);
        }
        for text in ["", "-1", "fast", "1,,2", "1..", "1e9", "NaN"] {
            assert_eq!(text.parse::<Rate>(), Err(RateError(text.to_owned())));
        }
    }
}
