//! JSON for values that JSON does not have: blobs are `{"base64": "…"}`, the two infinite reals are
//! `{"real": "Infinity"}` and `{"real": "-Infinity"}`. Integers keep all their 64 bits.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;

use crate::class::Json;
use crate::storage::SqlValue;

pub(super) fn blob_to_json(blob: &[u8]) -> Json {
    serde_json::json!({ "base64": BASE64_STANDARD.encode(blob) })
}

/// The blob that `value` stands for; `None` if it is no blob.
pub(super) fn blob_from_json(value: &Json) -> Option<Result<Vec<u8>, String>> {
    let object = value.as_object().filter(|object| object.len() == 1)?;
    let text = object.get("base64")?.as_str()?;
    Some(
        BASE64_STANDARD
            .decode(text)
            .map_err(|error| format!("valid base64 ({error})")),
    )
}

pub(super) fn sql_to_json(value: SqlValue) -> Json {
    match value {
        SqlValue::Null => Json::Null,
        SqlValue::Integer(integer) => integer.into(),
        // SQLite turns a NaN into NULL, so what JSON cannot say is infinite.
        SqlValue::Real(real) => match serde_json::Number::from_f64(real) {
            Some(number) => number.into(),
            None if real > 0.0 => serde_json::json!({ "real": "Infinity" }),
            None => serde_json::json!({ "real": "-Infinity" }),
        },
        SqlValue::Text(text) => text.into(),
        SqlValue::Blob(blob) => blob_to_json(&blob),
    }
}

/// # Errors
/// The rule that the value breaks, to follow "must be".
pub(super) fn sql_from_json(value: Json) -> Result<SqlValue, String> {
    const RULE: &str =
        "null, a boolean, a number, a string, {\"base64\": \"…\"} or {\"real\": \"Infinity\"}";
    match value {
        Json::Null => Ok(SqlValue::Null),
        Json::Bool(flag) => Ok(SqlValue::Integer(flag.into())),
        Json::Number(number) => match (number.as_i64(), number.as_f64()) {
            (Some(integer), _) => Ok(SqlValue::Integer(integer)),
            (None, _) if number.is_u64() => Err("an integer of 64 bits with a sign".to_owned()),
            (None, Some(real)) => Ok(SqlValue::Real(real)),
            (None, None) => Err(RULE.to_owned()),
        },
        Json::String(text) => Ok(SqlValue::Text(text)),
        Json::Object(_) => {
            if let Some(blob) = blob_from_json(&value) {
                return blob.map(SqlValue::Blob);
            }
            match value.get("real").and_then(Json::as_str) {
                Some("Infinity") => Ok(SqlValue::Real(f64::INFINITY)),
                Some("-Infinity") => Ok(SqlValue::Real(f64::NEG_INFINITY)),
                _ => Err(RULE.to_owned()),
            }
        }
        Json::Array(_) => Err(RULE.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_value() -> impl Strategy<Value = SqlValue> {
        prop_oneof![
            Just(SqlValue::Null),
            any::<i64>().prop_map(SqlValue::Integer),
            prop_oneof![any::<f64>(), Just(f64::INFINITY), Just(f64::NEG_INFINITY)]
                .prop_filter("NaN is NULL", |real| !real.is_nan())
                .prop_map(SqlValue::Real),
            any::<String>().prop_map(SqlValue::Text),
            any::<Vec<u8>>().prop_map(SqlValue::Blob),
        ]
    }

    proptest! {
        #[test]
        fn sql_values_survive_json_text(value in any_value()) {
            let text = sql_to_json(value.clone()).to_string();
            let back = sql_from_json(serde_json::from_str(&text).unwrap()).unwrap();
            prop_assert_eq!(back, value);
        }
    }

    #[test]
    fn what_is_no_sql_value_is_refused() {
        for text in [
            "[1]",
            "{}",
            r#"{"base64": 1}"#,
            r#"{"base64": "*"}"#,
            r#"{"real": "NaN"}"#,
            "9223372036854775808",
        ] {
            assert!(
                sql_from_json(serde_json::from_str(text).unwrap()).is_err(),
                "{text}"
            );
        }
    }
}
