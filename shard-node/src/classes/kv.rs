//! `Kv`: a map of keys to values, over HTTP with raw bytes and over RPC with JSON.
//!
//! | request | answer |
//! |---------|--------|
//! | `GET /{key}`, `HEAD /{key}` | the bytes as they were put, with their content type; 404 if absent |
//! | `PUT /{key}` | 201 if the key is new, else 204 |
//! | `DELETE /{key}` | 204, or 404 if absent |
//! | `GET /?prefix=&start=&startAfter=&end=&limit=&reverse=` | `{"keys": [{"key", "content_type", "bytes"}], "truncated"}` |
//!
//! | call | answer |
//! |------|--------|
//! | `get(key)`, `get([keys])` | the value or null; an object of those present |
//! | `put(key, value)`, `put({key: value, …})`, each with `{allowUnconfirmed}` | null |
//! | `delete(key)`, `delete([keys])` | whether it was there; how many were |
//! | `deleteAll()` | deletes everything; the object is gone when it sleeps |
//! | `list({prefix, start, startAfter, end, limit, reverse})` | an object in the order of the keys |
//!
//! A value that was put over HTTP reads over RPC as JSON if that is its content type, as a string if
//! it is UTF-8 text, and as `{"base64": "…"}` otherwise; such an object, put over RPC, is bytes. The
//! key is the path after its first slash, percent-decoded once. Cloudflare's limits: keys to 2 KiB,
//! key and value together to 2 MiB, 128 keys in a batch.

use std::rc::Rc;

use http::header::CONTENT_TYPE;
use http::{HeaderValue, Request, Response, StatusCode};
use percent_encoding::percent_decode_str;
use protocol::{ClassName, limits};
use serde::Deserialize;
use serde_json::Map;

use super::{answer, values};
use crate::class::{Args, Body, Class, ClassError, Context, Instance, Json, Turn};
use crate::storage::{BATCH_KEYS_MAX, Entry, KvError, ListOptions};

const OCTETS: &str = "application/octet-stream";
const JSON: &str = "application/json";

/// Longest content type kept with a value.
const CONTENT_TYPE_BYTES_MAX: usize = 255;

/// Keys in one listing, unless the caller asks for fewer or more, and the most it may ask for.
const LIST_DEFAULT: u32 = 1000;
const LIST_MAX: u32 = 10_000;

/// What a caller may ask of a `put`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct PutOptions {
    /// The answer need not wait until the write is durable.
    allow_unconfirmed: bool,
}

pub struct Kv {
    name: ClassName,
}

impl Default for Kv {
    fn default() -> Self {
        Self {
            name: super::name("Kv"),
        }
    }
}

impl Class for Kv {
    fn name(&self) -> &ClassName {
        &self.name
    }

    fn methods(&self) -> &'static [&'static str] {
        &["get", "put", "delete", "list", "deleteAll"]
    }

    fn construct(&self, context: Context) -> Result<Rc<dyn Instance>, ClassError> {
        Ok(Rc::new(Pairs { context }))
    }
}

/// One map.
struct Pairs {
    context: Context,
}

impl Pairs {
    fn answer(&self, method: &str, args: Args) -> Result<Json, ClassError> {
        match method {
            "get" => self.call_get(&args),
            "put" => self.call_put(args),
            "delete" => self.call_delete(&args),
            "deleteAll" => {
                args.expect(0..=0, "deleteAll()")?;
                self.context.delete_all()?;
                Ok(Json::Null)
            }
            _ => self.call_list(args),
        }
    }

    fn call_get(&self, args: &Args) -> Result<Json, ClassError> {
        args.expect(1..=1, "get(key) or get([keys])")?;
        let storage = self.context.storage();
        match args.get(0) {
            Some(Json::Array(keys)) => {
                let mut found = Map::new();
                let mut budget = limits::RPC_BODY_BYTES_MAX;
                for key in batch_keys(args, keys)? {
                    if let Some(entry) = storage.kv_get(key)? {
                        spend(&mut budget, &entry.value)?;
                        found.insert(
                            key.to_owned(),
                            to_json(entry.media_type.as_deref(), &entry.value),
                        );
                    }
                }
                Ok(Json::Object(found))
            }
            _ => {
                let entry = storage.kv_get(args.text(0, "key")?)?;
                Ok(entry.map_or(Json::Null, |entry| {
                    to_json(entry.media_type.as_deref(), &entry.value)
                }))
            }
        }
    }

    fn call_put(&self, mut args: Args) -> Result<Json, ClassError> {
        const USAGE: &str = "put(key, value, options) or put({key: value, …}, options)";
        args.expect(1..=3, USAGE)?;
        let pairs = match args.get(0) {
            Some(Json::Object(_)) => Some(args.take(0)),
            _ => None,
        };
        let options_at = if pairs.is_some() { 1 } else { 2 };
        if pairs.is_none() && args.len() == 1 {
            let rule = "an object of keys and values, or a key followed by a value";
            return Err(args.wrong(0, "pairs", rule, args.get(0)));
        }
        args.expect(options_at..=options_at + 1, USAGE)?;
        let options = match args.take(options_at) {
            Json::Null => PutOptions::default(),
            options => serde_json::from_value(options)
                .map_err(|error| ClassError::BadRequest(format!("put: options: {error}")))?,
        };
        let put = || match &pairs {
            Some(Json::Object(pairs)) => self.put_pairs(&args, pairs),
            _ => {
                let key = args.text(0, "key")?;
                self.put_json(&args, 1, key, args.get(1))
            }
        };
        if options.allow_unconfirmed {
            self.context.storage().unconfirmed(put)?;
        } else {
            put()?;
        }
        Ok(Json::Null)
    }

    fn put_pairs(&self, args: &Args, pairs: &Map<String, Json>) -> Result<(), ClassError> {
        if pairs.len() > BATCH_KEYS_MAX {
            return Err(KvError::BatchTooLarge(pairs.len()).into());
        }
        for (key, value) in pairs {
            self.put_json(args, 0, key, Some(value))?;
        }
        Ok(())
    }

    fn put_json(
        &self,
        args: &Args,
        at: usize,
        key: &str,
        value: Option<&Json>,
    ) -> Result<(), ClassError> {
        let value = value.unwrap_or(&Json::Null);
        let storage = self.context.storage();
        match values::blob_from_json(value) {
            Some(Ok(blob)) => storage.kv_put(key, Some(OCTETS), &blob)?,
            Some(Err(rule)) => return Err(args.wrong(at, "value", &rule, Some(value))),
            None => storage.kv_put(key, Some(JSON), value.to_string().as_bytes())?,
        };
        Ok(())
    }

    fn call_delete(&self, args: &Args) -> Result<Json, ClassError> {
        args.expect(1..=1, "delete(key) or delete([keys])")?;
        let storage = self.context.storage();
        match args.get(0) {
            Some(Json::Array(keys)) => {
                let mut deleted = 0u32;
                for key in batch_keys(args, keys)? {
                    deleted += u32::from(storage.kv_delete(key)?);
                }
                Ok(deleted.into())
            }
            _ => Ok(storage.kv_delete(args.text(0, "key")?)?.into()),
        }
    }

    fn call_list(&self, mut args: Args) -> Result<Json, ClassError> {
        args.expect(
            0..=1,
            "list({prefix, start, startAfter, end, limit, reverse})",
        )?;
        let options = match args.take(0) {
            Json::Null => ListOptions::default(),
            value => serde_json::from_value(value)
                .map_err(|error| ClassError::BadRequest(format!("list: options: {error}")))?,
        };
        let options = checked(options)?;
        let mut found = Map::new();
        let mut budget = limits::RPC_BODY_BYTES_MAX;
        let mut spent = Ok(());
        self.context
            .storage()
            .kv_list(&options, |key, media_type, value| {
                spent = spend(&mut budget, value);
                found.insert(key.to_owned(), to_json(media_type, value));
                spent.is_ok()
            })?;
        spent?;
        Ok(Json::Object(found))
    }

    /// The listing over HTTP: keys without their values.
    fn index(&self, request: &Request<Body>) -> Result<Response<Body>, ClassError> {
        let mut options = ListOptions::default();
        for (name, value) in answer::query(request)? {
            match name.as_str() {
                "prefix" => options.prefix = Some(value),
                "start" => options.start = Some(value),
                "startAfter" => options.start_after = Some(value),
                "end" => options.end = Some(value),
                "limit" => options.limit = Some(answer::number("limit", &value)?),
                "reverse" => {
                    options.reverse = match value.as_str() {
                        "" | "1" | "true" => true,
                        "0" | "false" => false,
                        _ => {
                            return Err(ClassError::BadRequest(format!(
                                "reverse={value:?} must be true or false"
                            )));
                        }
                    }
                }
                _ => {
                    return Err(answer::unknown_parameter(
                        &name,
                        "prefix, start, startAfter, end, limit, reverse",
                    ));
                }
            }
        }
        let mut options = checked(options)?;
        let wanted = options.limit.unwrap_or(LIST_DEFAULT);
        // One more than wanted shows whether there are more.
        options.limit = Some(wanted + 1);
        let mut keys = Vec::new();
        self.context
            .storage()
            .kv_index(&options, |key, media_type, bytes| {
                keys.push(serde_json::json!({
                    "key": key,
                    "content_type": media_type.unwrap_or(OCTETS),
                    "bytes": bytes,
                }));
                true
            })?;
        let truncated = keys.len() > wanted as usize;
        keys.truncate(wanted as usize);
        Ok(answer::json(
            &serde_json::json!({ "keys": keys, "truncated": truncated }),
        ))
    }

    fn get(&self, key: &str) -> Result<Response<Body>, ClassError> {
        let entry: Entry = self
            .context
            .storage()
            .kv_get(key)?
            .ok_or_else(|| no_key(key))?;
        let media_type = entry.media_type.as_deref().unwrap_or(OCTETS);
        let media_type =
            HeaderValue::from_str(media_type).unwrap_or_else(|_| HeaderValue::from_static(OCTETS));
        let mut response = Response::new(Body::from(entry.value));
        response.headers_mut().insert(CONTENT_TYPE, media_type);
        Ok(response)
    }

    fn put(
        &self,
        key: &str,
        media_type: Option<&HeaderValue>,
        value: &[u8],
    ) -> Result<Response<Body>, ClassError> {
        let media_type = match media_type {
            None => OCTETS,
            Some(given) if given.len() > CONTENT_TYPE_BYTES_MAX => {
                return Err(ClassError::BadRequest(format!(
                    "content-type of {} bytes is longer than {CONTENT_TYPE_BYTES_MAX}",
                    given.len()
                )));
            }
            Some(given) => given.to_str().map_err(|_| {
                ClassError::BadRequest(format!("content-type {given:?} must be ASCII"))
            })?,
        };
        let new = self
            .context
            .storage()
            .kv_put(key, Some(media_type), value)?;
        Ok(answer::empty(if new {
            StatusCode::CREATED
        } else {
            StatusCode::NO_CONTENT
        }))
    }

    fn delete(&self, key: &str) -> Result<Response<Body>, ClassError> {
        if self.context.storage().kv_delete(key)? {
            Ok(answer::empty(StatusCode::NO_CONTENT))
        } else {
            Err(no_key(key))
        }
    }
}

impl Instance for Pairs {
    fn fetch(self: Rc<Self>, request: Request<Body>) -> Turn<Response<Body>> {
        let key = match decode_key(request.uri().path()) {
            Ok(key) => key,
            Err(error) => return Turn::Done(Err(error)),
        };
        let wrong_method = |allow| {
            Turn::Done(Err(ClassError::MethodNotAllowed {
                allow,
                detail: format!("{} is not offered here; {allow} are", request.method()),
            }))
        };
        match (key.is_empty(), request.method().as_str()) {
            (true, "GET" | "HEAD") => Turn::Done(self.index(&request)),
            (true, _) => wrong_method("GET, HEAD"),
            (false, "GET" | "HEAD") => Turn::Done(self.get(&key)),
            (false, "DELETE") => Turn::Done(self.delete(&key)),
            (false, "PUT") => Turn::run(async move {
                let (head, body) = request.into_parts();
                let max = self.context.storage().pair_bytes_max();
                let value = body.read(max).await?;
                self.put(&key, head.headers.get(CONTENT_TYPE), &value)
            }),
            (false, _) => wrong_method("GET, HEAD, PUT, DELETE"),
        }
    }

    fn call(self: Rc<Self>, method: &str, args: Args) -> Turn<Json> {
        Turn::Done(self.answer(method, args))
    }
}

fn decode_key(path: &str) -> Result<String, ClassError> {
    let encoded = path.strip_prefix('/').unwrap_or(path);
    percent_decode_str(encoded)
        .decode_utf8()
        .map(|key| key.into_owned())
        .map_err(|_| ClassError::BadRequest(format!("key {encoded:?} is not UTF-8 after decoding")))
}

fn no_key(key: &str) -> ClassError {
    ClassError::NotFound(format!("there is no key {key:?}"))
}

fn batch_keys<'a>(args: &Args, keys: &'a [Json]) -> Result<Vec<&'a str>, ClassError> {
    if keys.len() > BATCH_KEYS_MAX {
        return Err(KvError::BatchTooLarge(keys.len()).into());
    }
    keys.iter()
        .map(|key| {
            key.as_str()
                .ok_or_else(|| args.wrong(0, "keys", "an array of strings", Some(key)))
        })
        .collect()
}

fn checked(options: ListOptions) -> Result<ListOptions, ClassError> {
    if options.start.is_some() && options.start_after.is_some() {
        return Err(ClassError::BadRequest(
            "start and startAfter exclude each other".to_owned(),
        ));
    }
    match options.limit {
        Some(0) => Err(ClassError::BadRequest(
            "limit=0 must be at least 1".to_owned(),
        )),
        Some(limit) if limit > LIST_MAX => Err(ClassError::BadRequest(format!(
            "limit={limit} must be at most {LIST_MAX}"
        ))),
        limit => Ok(ListOptions {
            limit: Some(limit.unwrap_or(LIST_DEFAULT)),
            ..options
        }),
    }
}

/// Keeps one answer within the bound of an RPC result.
fn spend(budget: &mut usize, value: &[u8]) -> Result<(), ClassError> {
    *budget = budget.checked_sub(value.len() + 64).ok_or_else(|| {
        ClassError::PayloadTooLarge(format!(
            "the result is larger than {} bytes: ask for fewer keys",
            limits::RPC_BODY_BYTES_MAX
        ))
    })?;
    Ok(())
}

fn to_json(media_type: Option<&str>, value: &[u8]) -> Json {
    let essence = media_type
        .unwrap_or(OCTETS)
        .split(';')
        .next()
        .unwrap_or("")
        .trim();
    if essence.eq_ignore_ascii_case(JSON)
        && let Ok(json) = serde_json::from_slice(value)
    {
        return json;
    }
    match std::str::from_utf8(value) {
        Ok(text) if !essence.eq_ignore_ascii_case(OCTETS) => text.into(),
        _ => values::blob_to_json(value),
    }
}
