//! What a request must look like: values by pattern, sizes, the type of its body, and the body by a JSON Schema.

use std::collections::BTreeMap;
use std::path::PathBuf;

use http::HeaderMap;
use http::header::{CONTENT_ENCODING, TRANSFER_ENCODING};
use jsonschema::Validator;
use ops::config::Broken;
use protocol::{ErrorCode, Problem};
use regex::Regex;
use serde::{Deserialize, Serialize};

use crate::asked::Asked;
use crate::refusal::media_type;
use crate::template::Template;

/// Bodies that are checked by a schema are held whole; pingora holds as much.
pub const CHECKED_BODY_BYTES_MAX: u64 = 64 << 10;

/// `validate`: what a request must look like.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ValidateConfig {
    /// Values by their names in templates (`query.userId`, `path.id`, `header.x-tenant`, `jwt.sub`), each with a
    /// regular expression for the whole of it. With a `?` behind the name it may be missing.
    pub values: BTreeMap<String, String>,
    /// Bytes of path and query.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uri_bytes_max: Option<u32>,
    /// Bytes of all header names and values.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub header_bytes_max: Option<u32>,
    /// Bytes of the body; at most `requests.body_bytes_max`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub body_bytes_max: Option<u64>,
    /// Types that a body may have, without parameters. Empty: any.
    pub content_types: Vec<String>,
    /// A JSON Schema for the body, which then has at most 64 KiB.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub schema: Option<serde_json::Value>,
    /// The same in a file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub schema_file: Option<PathBuf>,
}

/// A `validate` table, ready to ask.
#[derive(Debug, Default)]
pub struct Validation {
    values: Box<[Value]>,
    uri_bytes_max: Option<u32>,
    header_bytes_max: Option<u32>,
    body_bytes_max: Option<u64>,
    content_types: Box<[String]>,
    schema: Option<Validator>,
}

#[derive(Debug)]
struct Value {
    name: Box<str>,
    place: Template,
    required: bool,
    pattern: Regex,
}

impl ValidateConfig {
    fn schema(&self) -> Result<Option<Validator>, Broken> {
        let compile = |key: &str, schema: &serde_json::Value| {
            jsonschema::validator_for(schema)
                .map(Some)
                .map_err(|error| Broken::new(key, format!("is no JSON Schema: {error}")))
        };
        match (&self.schema, &self.schema_file) {
            (None, None) => Ok(None),
            (Some(schema), None) => compile("schema", schema),
            (None, Some(path)) => {
                let broken = |error: &dyn std::fmt::Display| {
                    Broken::value("schema_file", path, format!("cannot be read: {error}"))
                };
                let text = std::fs::read(path).map_err(|error| broken(&error))?;
                let schema = serde_json::from_slice(&text).map_err(|error| broken(&error))?;
                compile("schema_file", &schema)
            }
            (Some(_), Some(_)) => Err(Broken::new(
                "schema_file",
                "and schema are there: one of them is enough",
            )),
        }
    }
}

impl Validation {
    /// `params` are those of the route's path.
    ///
    /// # Errors
    /// The key, below `validate`, that breaks a rule.
    pub fn new(config: &ValidateConfig, params: &[Box<str>]) -> Result<Self, Broken> {
        let values = config.values.iter().map(|(name, pattern)| {
            Value::new(name, pattern, params).map_err(|broken| broken.under("values"))
        });
        let schema = config.schema()?;
        if schema.is_some()
            && let Some(bytes) = config.body_bytes_max
            && bytes > CHECKED_BODY_BYTES_MAX
        {
            let rule = format!("must be at most {CHECKED_BODY_BYTES_MAX} with a schema");
            return Err(Broken::value("body_bytes_max", bytes, rule));
        }
        let default_max = schema.is_some().then_some(CHECKED_BODY_BYTES_MAX);
        Ok(Self {
            values: values.collect::<Result<_, _>>()?,
            uri_bytes_max: config.uri_bytes_max,
            header_bytes_max: config.header_bytes_max,
            body_bytes_max: config.body_bytes_max.or(default_max),
            content_types: config.content_types.clone().into(),
            schema,
        })
    }

    /// What the head of a request must be like.
    ///
    /// # Errors
    /// `bad_request` or `payload_too_large`, with the rule.
    pub fn check(&self, asked: &Asked<'_>, announced: Option<u64>) -> Result<(), Problem> {
        let uri = asked.path.len() + asked.query.map_or(0, |query| query.len() + 1);
        if let Some(max) = self.uri_bytes_max.filter(|max| uri > *max as usize) {
            return Err(Problem::new(
                ErrorCode::UriTooLong,
                format!("path and query have {uri} bytes, more than {max}"),
            ));
        }
        if let Some(max) = self.header_bytes_max {
            let bytes: usize = asked
                .headers
                .iter()
                .map(|(name, value)| name.as_str().len() + value.len())
                .sum();
            if bytes > max as usize {
                return Err(Problem::new(
                    ErrorCode::HeadersTooLarge,
                    format!("the headers have {bytes} bytes, more than {max}"),
                ));
            }
        }
        if let Some(max) = self.body_bytes_max.filter(|max| announced > Some(*max)) {
            return Err(too_large(max));
        }
        self.check_type(asked.headers, announced)?;
        self.values.iter().try_for_each(|value| value.check(asked))
    }

    fn check_type(&self, headers: &HeaderMap, announced: Option<u64>) -> Result<(), Problem> {
        let given = media_type(headers);
        let has_body = announced > Some(0) || headers.contains_key(TRANSFER_ENCODING);
        if self.content_types.is_empty() || (given.is_none() && !has_body) {
            return Ok(());
        }
        let known = |kind: &str| {
            let mut types = self.content_types.iter();
            types.any(|allowed| allowed.eq_ignore_ascii_case(kind))
        };
        if given.is_some_and(known) {
            return Ok(());
        }
        Err(Problem::bad_request(format!(
            "content-type {:?} must be one of {}",
            given.unwrap_or_default(),
            self.content_types.join(", ")
        )))
    }

    /// Most bytes that the body may have.
    pub fn body_bytes_max(&self) -> Option<u64> {
        self.body_bytes_max
    }

    /// Whether the body must be held whole, for [`check_body`](Self::check_body).
    pub fn needs_body(&self) -> bool {
        self.schema.is_some()
    }

    /// # Errors
    /// `bad_request` with the first thing that does not fit the schema.
    pub fn check_body(&self, headers: &HeaderMap, body: &[u8]) -> Result<(), Problem> {
        let Some(schema) = &self.schema else {
            return Ok(());
        };
        if headers.contains_key(CONTENT_ENCODING) {
            return Err(Problem::bad_request(
                "a body that is checked by a schema must come without a content-encoding",
            ));
        }
        let body: serde_json::Value = serde_json::from_slice(body)
            .map_err(|error| Problem::bad_request(format!("the body is no JSON: {error}")))?;
        match schema.validate(&body) {
            Ok(()) => Ok(()),
            Err(error) => {
                let shown: String = error.to_string().chars().take(300).collect();
                Err(Problem::bad_request(format!(
                    "the body does not fit its schema at {:?}: {shown}",
                    error.instance_path().to_string()
                )))
            }
        }
    }
}

impl Value {
    fn new(name: &str, pattern: &str, params: &[Box<str>]) -> Result<Self, Broken> {
        let (place, required) = match name.strip_suffix('?') {
            Some(place) => (place, false),
            None => (name, true),
        };
        let template = Template::key(&format!("{{{place}}}"), params)
            .map_err(|error| Broken::new(name, format!("is no value: {}", error.rule)))?;
        // Of the whole value, however the pattern is made up.
        let pattern = Regex::new(&format!("^(?:{pattern})$"))
            .map_err(|error| Broken::value(name, pattern, format!("is no pattern: {error}")))?;
        Ok(Self {
            name: place.into(),
            place: template,
            required,
            pattern,
        })
    }

    fn check(&self, asked: &Asked<'_>) -> Result<(), Problem> {
        let mut value = String::new();
        match self.place.render(asked, &mut value) {
            Ok(()) if self.pattern.is_match(&value) => Ok(()),
            Ok(()) => {
                let shown: String = value.chars().take(80).collect();
                Err(Problem::bad_request(format!(
                    "{} = {shown:?} does not match {}",
                    self.name, self.pattern
                )))
            }
            Err(_) if !self.required => Ok(()),
            Err(lacking) => Err(Problem::bad_request(lacking.to_string())),
        }
    }
}

/// The refusal of a body.
pub fn too_large(max: u64) -> Problem {
    Problem::new(
        ErrorCode::PayloadTooLarge,
        format!("the body is larger than {max} bytes"),
    )
}
