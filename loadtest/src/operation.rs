//! What a request does, and in which proportions.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// One kind of request. Every answer is checked against what was acknowledged before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Operation {
    /// `increment` of a counter: a durable write.
    Increment,
    /// `value` of a counter.
    Read,
    /// An upsert in a table.
    SqlWrite,
    /// A look-up by primary key.
    SqlRead,
    /// `put` of one value.
    KvPut,
    /// `get` of one value.
    KvGet,
    /// An increment of a sharded counter: a durable write.
    Counter,
}

/// What keeps the state that an operation is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub(crate) enum Store {
    Counter,
    Sql,
    Kv,
    /// Sharded counters, which are no objects to their clients.
    Sharded,
}

const NAMES: [(&str, Operation); 7] = [
    ("increment", Operation::Increment),
    ("read", Operation::Read),
    ("sql-write", Operation::SqlWrite),
    ("sql-read", Operation::SqlRead),
    ("kv-put", Operation::KvPut),
    ("kv-get", Operation::KvGet),
    ("counter", Operation::Counter),
];

/// Names for several operations.
const PRESETS: [(&str, &[(Operation, u32)]); 3] = [
    ("sql", &[(Operation::SqlWrite, 1), (Operation::SqlRead, 1)]),
    ("kv", &[(Operation::KvPut, 1), (Operation::KvGet, 1)]),
    (
        "mixed",
        &[
            (Operation::Increment, 1),
            (Operation::Read, 1),
            (Operation::SqlWrite, 1),
            (Operation::SqlRead, 1),
            (Operation::KvPut, 1),
            (Operation::KvGet, 1),
        ],
    ),
];

impl Operation {
    pub(crate) fn name(self) -> &'static str {
        let known = NAMES.iter().find(|(_, operation)| *operation == self);
        known.map_or("unknown", |(name, _)| name)
    }

    pub(crate) fn store(self) -> Store {
        match self {
            Self::Increment | Self::Read => Store::Counter,
            Self::SqlWrite | Self::SqlRead => Store::Sql,
            Self::KvPut | Self::KvGet => Store::Kv,
            Self::Counter => Store::Sharded,
        }
    }

    pub(crate) fn writes(self) -> bool {
        matches!(
            self,
            Self::Increment | Self::SqlWrite | Self::KvPut | Self::Counter
        )
    }
}

/// Operations with weights: `increment`, `mixed`, `increment=3,read=6,sql=1`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mix(Vec<(Operation, u32)>);

/// Why a text is no mix.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum MixError {
    #[error(
        "{0:?} must be one of increment, read, sql, sql-write, sql-read, kv, kv-put, kv-get, counter, mixed"
    )]
    Unknown(String),
    #[error("the weight {0:?} must be a whole number from 1 to 1000000")]
    Weight(String),
}

impl Mix {
    /// The sum of the weights.
    pub(crate) fn total(&self) -> u32 {
        self.0.iter().map(|(_, weight)| weight).sum()
    }

    /// The operation at a point from 0 to below [`total`](Self::total).
    pub(crate) fn at(&self, mut point: u32) -> Operation {
        for (operation, weight) in &self.0 {
            match point.checked_sub(*weight) {
                Some(rest) => point = rest,
                None => return *operation,
            }
        }
        self.0.last().map_or(Operation::Increment, |last| last.0)
    }
}

impl From<Operation> for Mix {
    fn from(operation: Operation) -> Self {
        Self(vec![(operation, 1)])
    }
}

impl FromStr for Mix {
    type Err = MixError;

    fn from_str(text: &str) -> Result<Self, MixError> {
        let mut mix = Vec::new();
        for part in text.split(',') {
            let (name, weight) = match part.split_once('=') {
                None => (part, 1),
                Some((name, weight)) => {
                    let valid = weight.parse().ok().filter(|w| (1..=1_000_000).contains(w));
                    (
                        name,
                        valid.ok_or_else(|| MixError::Weight(weight.to_owned()))?,
                    )
                }
            };
            let name = name.trim();
            if let Some((_, operation)) = NAMES.iter().find(|(known, _)| *known == name) {
                mix.push((*operation, weight));
            } else if let Some((_, several)) = PRESETS.iter().find(|(known, _)| *known == name) {
                mix.extend(several.iter().map(|(one, share)| (*one, share * weight)));
            } else {
                return Err(MixError::Unknown(name.to_owned()));
            }
        }
        Ok(Self(mix))
    }
}

impl fmt::Display for Mix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, (operation, weight)) in self.0.iter().enumerate() {
            let comma = if at > 0 { "," } else { "" };
            match self.0.len() {
                1 => f.write_str(operation.name())?,
                _ => write!(f, "{comma}{}={weight}", operation.name())?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_decide_how_often_an_operation_is_picked() {
        let mix: Mix = "increment=3,sql".parse().unwrap();
        let picked: Vec<&str> = (0..mix.total()).map(|point| mix.at(point).name()).collect();
        assert_eq!(
            picked,
            [
                "increment",
                "increment",
                "increment",
                "sql-write",
                "sql-read"
            ]
        );
        assert_eq!(mix.to_string(), "increment=3,sql-write=1,sql-read=1");
        assert_eq!(mix.to_string().parse(), Ok(mix));
        assert_eq!("read".parse::<Mix>().unwrap().to_string(), "read");
    }

    #[test]
    fn a_wrong_mix_names_the_word() {
        assert_eq!(
            "increment,reed".parse::<Mix>(),
            Err(MixError::Unknown("reed".to_owned()))
        );
        for weight in ["0", "-1", "many", "1000001"] {
            let wrong = format!("read={weight}").parse::<Mix>();
            assert_eq!(wrong, Err(MixError::Weight(weight.to_owned())));
        }
    }
}
