//! What gateways ask the objects that decide rate limits for several of them.
//!
//! A limit has [`SLICES`] objects of the class [`CLASS`], each for a part of the keys. The method [`TAKE`] has
//! two arguments: the [`Terms`](crate::rate::Terms) of the limit, and a list of at most [`ASKS_MAX`]
//! [`Ask`]s. Its result is a list of as many [`Grant`]s.

use serde::{Deserialize, Serialize};

use crate::ids::{ClassName, Home, ObjectId, ObjectName};

pub const CLASS: &str = "Limiter";
pub const TAKE: &str = "take";

/// Objects per limit.
pub const SLICES: u8 = 16;

/// Asks of one call.
pub const ASKS_MAX: usize = 256;

/// Somebody wants up to so many of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ask {
    /// [`key_hash`](crate::rate::key_hash), as 32 hex digits.
    #[serde(with = "hex")]
    pub key: u128,
    pub most: u32,
}

/// What was taken for an ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    /// At most what was asked for.
    pub taken: u32,
    /// If nothing was: after how many nanoseconds one could be.
    pub wait: u64,
}

/// The slice of a key.
pub fn slice(key: u128) -> u8 {
    // The lowest bits of a hash are as good as any.
    u8::try_from(key % u128::from(SLICES)).unwrap_or(0)
}

/// The object for a slice of a limit. `place` tells limits of one name apart: a colo, or `exact`.
pub fn object(place: &str, limit: &str, slice: u8, home: Home) -> (ObjectId, ObjectName) {
    let name: ObjectName = format!("{place}:{limit}:{slice}")
        .parse()
        .expect("colos and names of limits are short and have no control characters");
    (ObjectId::named(&class(), home, &name), name)
}

/// [`CLASS`], parsed.
pub fn class() -> ClassName {
    CLASS.parse().expect("a legal class name")
}

/// A `u128` as 32 hex digits.
mod hex {
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(key: &u128, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{key:032x}"))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<u128, D::Error> {
        let text = String::deserialize(deserializer)?;
        if text.len() != 32 {
            return Err(D::Error::custom("a key must be 32 hex digits"));
        }
        u128::from_str_radix(&text, 16).map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn asks_parse_back() {
        let ask = Ask { key: 0xab, most: 3 };
        let text = serde_json::to_string(&ask).unwrap();
        assert_eq!(
            text,
            r#"{"key":"000000000000000000000000000000ab","most":3}"#
        );
        assert_eq!(serde_json::from_str::<Ask>(&text).unwrap(), ask);
        assert!(serde_json::from_str::<Ask>(r#"{"key":"ab","most":3}"#).is_err());
    }

    #[test]
    fn colos_and_slices_have_objects_of_their_own() {
        let id = |place, slice| object(place, "per-user", slice, Home::Global).0;
        assert_ne!(id("SFO", 0), id("LHR", 0));
        assert_ne!(id("SFO", 0), id("SFO", 1));
        assert!(id("SFO", 0).check_class(&class()).is_ok());
    }
}
