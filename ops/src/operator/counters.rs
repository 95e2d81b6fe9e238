//! What operators ask of sharded counters ([`protocol::counters`]).
//!
//! | request | answer |
//! |---------|--------|
//! | `GET /counters?prefix&after&limit` | a page of the counters, each as it stands: `{"counters": […], "next"}` |
//! | `GET /counters/{name}` | how one stands |
//! | `PUT /counters/{name}/shards` with `{"count", "strategy", "scope", "report_every_ms"}` | how it stands when that is changed |
//! | `GET /counters/export?format&exact&prefix&after&limit` | all totals, as lines of JSON or as CSV |
//!
//! A counter of the name `export` is found at `/counters/%65xport`.

use std::time::Duration;

use bytes::Bytes;
use futures_util::future::try_join_all;
use http::header::CONTENT_TYPE;
use http::{HeaderName, HeaderValue, Method, Request, Response};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use protocol::counters::{
    COORDINATOR, Change, CounterName, READ, RESHARD, STANDING, Standing, Total,
};
use protocol::{ErrorCode, ObjectName, Problem, Ring, headers};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use super::Front;
use crate::admin::{Page, full, json};
use crate::exchange;
use crate::logs::Causes;

/// How long a coordinator may take: an exact total asks every shard.
const ANSWER_MAX: Duration = Duration::from_secs(60);

const ANSWER_BYTES_MAX: usize = 1 << 20;

const CHANGE_BYTES_MAX: usize = 16 << 10;

/// Coordinators that are asked at once for a listing.
const AT_ONCE: usize = 16;

/// Rows of a page if nobody says how many, and those that an export reads at once.
const PAGE_ROWS: usize = 100;
const EXPORT_ROWS: usize = 1000;

/// An export is made before it is sent, so that it is whole or refused. About a million totals.
const EXPORT_BYTES_MAX: usize = 64 << 20;

/// Where an export of some rows goes on.
const NEXT: HeaderName = HeaderName::from_static("dormouse-next");

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct ListParameters {
    prefix: String,
    after: Option<String>,
    limit: Option<usize>,
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct ExportParameters {
    format: Format,
    exact: bool,
    prefix: String,
    after: Option<String>,
    limit: Option<usize>,
}

#[derive(Default, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Format {
    #[default]
    Json,
    Csv,
}

/// Parameters of the listing of objects, as the workers know them.
#[derive(Serialize)]
struct Objects<'a> {
    class: &'static str,
    prefix: &'a str,
    after: Option<&'a str>,
    limit: usize,
}

#[derive(Serialize)]
struct Listed {
    name: String,
    #[serde(flatten)]
    standing: Standing,
}

/// Counters, and the cursor after them if there may be more.
type Names = (Vec<CounterName>, Option<String>);

/// A line of an export. The value is a number of any size.
#[derive(Serialize)]
struct Exported<'a> {
    name: &'a str,
    value: i128,
    shards: u32,
    staleness_ms: u64,
}

impl Front {
    pub(super) async fn counters(
        &self,
        ring: &Ring,
        request: Request<Incoming>,
    ) -> Result<Page, Problem> {
        let path = request.uri().path().to_owned();
        let query = request.uri().query().unwrap_or("").to_owned();
        let parts: Vec<&str> = path.split('/').skip(2).collect();
        let method = request.method();
        match parts[..] {
            [] | [""] => {
                only(method, &Method::GET, &path)?;
                self.list_counters(ring, &query).await
            }
            ["export"] => {
                only(method, &Method::GET, &path)?;
                self.export_counters(ring, &query).await
            }
            [name] => {
                only(method, &Method::GET, &path)?;
                let name = decode(name)?;
                let standing: Standing =
                    self.ask_counter(ring, &name, STANDING, "[]".into()).await?;
                Ok(json(&standing))
            }
            [name, "shards"] => {
                only(method, &Method::PUT, &path)?;
                let name = decode(name)?;
                let change = read_change(request).await?;
                let arguments =
                    serde_json::to_string(&[change]).expect("numbers and names serialize");
                let standing: Standing = self.ask_counter(ring, &name, RESHARD, arguments).await?;
                Ok(json(&standing))
            }
            _ => Err(Problem::not_found(format!(
                "nothing is at {path:?}; there are /counters, /counters/export, /counters/{{name}} and \
                 /counters/{{name}}/shards"
            ))),
        }
    }

    async fn list_counters(&self, ring: &Ring, query: &str) -> Result<Page, Problem> {
        let parameters: ListParameters = parameters(query)?;
        let limit = parameters.limit.unwrap_or(PAGE_ROWS);
        let names = self.counter_names(ring, &parameters.prefix, parameters.after, limit);
        let (names, next) = match names.await? {
            Ok(names) => names,
            Err(refused) => return Ok(refused),
        };
        let mut listed = Vec::with_capacity(names.len());
        for some in names.chunks(AT_ONCE) {
            let standings = some
                .iter()
                .map(|name| self.ask_counter::<Standing>(ring, name, STANDING, "[]".into()));
            let standings = try_join_all(standings).await?;
            let named = some.iter().zip(standings);
            listed.extend(named.map(|(name, standing)| Listed {
                name: name.to_string(),
                standing,
            }));
        }
        Ok(json(
            &serde_json::json!({ "counters": listed, "next": next }),
        ))
    }

    /// The counters of a page, and where the next one begins; or what a worker says instead.
    async fn counter_names(
        &self,
        ring: &Ring,
        prefix: &str,
        after: Option<String>,
        limit: usize,
    ) -> Result<Result<Names, Page>, Problem> {
        let objects = serde_urlencoded::to_string(Objects {
            class: COORDINATOR,
            prefix,
            after: after.as_deref(),
            limit,
        });
        let objects = objects.map_err(|error| Problem::bad_request(error.to_string()))?;
        let uri = format!("/objects?{objects}")
            .parse()
            .map_err(|error: http::uri::InvalidUri| Problem::bad_request(error.to_string()))?;
        Ok(self.rows(ring, &uri).await?.map(|(rows, next)| {
            // Whoever called a coordinator by an id has no counter.
            let name = |row: &Json| row["name"].as_str()?.parse().ok();
            (rows.iter().filter_map(name).collect(), next)
        }))
    }

    async fn export_counters(&self, ring: &Ring, query: &str) -> Result<Page, Problem> {
        let parameters: ExportParameters = parameters(query)?;
        let mut body = String::new();
        if let Format::Csv = parameters.format {
            body.push_str("name,value,shards,staleness_ms\r\n");
        }
        let mut after = parameters.after;
        let mut left = parameters.limit.unwrap_or(usize::MAX);
        let next = loop {
            let limit = left.min(EXPORT_ROWS);
            let names = self.counter_names(ring, &parameters.prefix, after, limit);
            let (names, next) = match names.await? {
                Ok(names) => names,
                Err(refused) => return Ok(refused),
            };
            left -= limit;
            for some in names.chunks(AT_ONCE) {
                let exact = parameters.exact;
                let totals = some
                    .iter()
                    .map(|name| self.ask_counter::<Total>(ring, name, READ, format!("[{exact}]")));
                for (name, total) in some.iter().zip(try_join_all(totals).await?) {
                    put(&mut body, parameters.format, name, &total);
                }
            }
            if body.len() > EXPORT_BYTES_MAX {
                return Err(Problem::new(
                    ErrorCode::PayloadTooLarge,
                    format!(
                        "the export is larger than {EXPORT_BYTES_MAX} bytes: ask for parts with limit, and after \
                         as the header {NEXT} says"
                    ),
                ));
            }
            if next.is_none() || left == 0 {
                break next;
            }
            after = next;
        };
        let mut page = Response::new(full(body));
        let kind = match parameters.format {
            Format::Json => "application/x-ndjson",
            Format::Csv => "text/csv; charset=utf-8",
        };
        let head = page.headers_mut();
        head.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
        if let Some(next) = next.and_then(|next| HeaderValue::try_from(next).ok()) {
            head.insert(NEXT, next);
        }
        Ok(page)
    }

    /// Calls the coordinator of a counter, as a gateway does. `arguments` is the JSON array of them.
    async fn ask_counter<T: DeserializeOwned>(
        &self,
        ring: &Ring,
        counter: &CounterName,
        method: &'static str,
        arguments: String,
    ) -> Result<T, Problem> {
        let (id, name) = counter.coordinator();
        let shard = ring.shard_of(id);
        let address = super::owner(ring, id)?;
        let request = Request::post("/")
            .header(headers::CLASS, COORDINATOR)
            .header(headers::OBJECT, id.to_string())
            .header(headers::NAME, &*headers::encode_name(&name))
            .header(headers::SHARD, HeaderValue::from(shard.0))
            .header(headers::EPOCH, HeaderValue::from(ring.version().0.get()))
            .header(headers::METHOD, method)
            .header(headers::INTERNAL, "1")
            .body(Full::new(Bytes::from(arguments)))
            .map_err(|error| Problem::bad_request(error.to_string()))?;
        let asked = async {
            let answer = exchange::send(address, self.token.as_ref(), request).await;
            let answer = answer.map_err(|error| unanswered(method, &Causes(&error)))?;
            let status = answer.status();
            let body = Limited::new(answer.into_body(), ANSWER_BYTES_MAX);
            let body = body.collect().await;
            let body = body.map_err(|error| unanswered(method, &error))?;
            Ok((status, body.to_bytes()))
        };
        let late = |_| {
            let detail =
                format!("the coordinator of {counter} did not answer within {ANSWER_MAX:?}");
            Problem::new(ErrorCode::TimedOut, detail)
        };
        let (status, body) = tokio::time::timeout(ANSWER_MAX, asked)
            .await
            .map_err(late)??;
        let senseless = |detail: String| {
            let detail = format!("the coordinator of {counter} answered {status}: {detail}");
            Problem::new(ErrorCode::Internal, detail)
        };
        match status.is_success() {
            true => serde_json::from_slice(&body).map_err(|error| senseless(error.to_string())),
            false => Err(match Problem::from_json(&body) {
                Some(problem) if problem.code == ErrorCode::NotOwner => Problem::unavailable(
                    "the shard of this counter's coordinator is moving between workers",
                ),
                Some(problem) => problem,
                None => senseless(String::from_utf8_lossy(&body).into_owned()),
            }),
        }
    }
}

/// What did not come may have been done.
fn unanswered(method: &str, error: &dyn std::fmt::Display) -> Problem {
    match method {
        RESHARD => Problem::outcome_unknown(format!(
            "{error}; the shards may be changed all the same: asking again does no harm"
        )),
        _ => Problem::unavailable(error.to_string()),
    }
}

fn only(method: &Method, allowed: &Method, path: &str) -> Result<(), Problem> {
    match method == allowed {
        true => Ok(()),
        false => Err(Problem::method_not_allowed(
            allowed.to_string(),
            format!("{method} is not offered at {path}"),
        )),
    }
}

fn decode(segment: &str) -> Result<CounterName, Problem> {
    let name = ObjectName::decode(segment);
    let name = name.map_err(|error| Problem::bad_request(error.to_string()))?;
    CounterName::new(name).map_err(|error| Problem::bad_request(error.to_string()))
}

async fn read_change(request: Request<Incoming>) -> Result<Change, Problem> {
    let body = Limited::new(request.into_body(), CHANGE_BYTES_MAX)
        .collect()
        .await;
    let body = body.map_err(|error| Problem::bad_request(error.to_string()))?;
    let change: Change = serde_json::from_slice(&body.to_bytes()).map_err(|error| {
        Problem::bad_request(format!(
            "the body must be {{\"count\": a number or \"auto\", \"strategy\": \"hash\", \"random\" or \
             \"round_robin\", \"scope\": \"global\" or \"colo\", \"report_every_ms\"}}, or some of it: {error}"
        ))
    })?;
    match change == Change::default() {
        true => Err(Problem::bad_request(
            "the body changes nothing: it has none of count, strategy, scope, report_every_ms",
        )),
        false => Ok(change),
    }
}

fn parameters<T: DeserializeOwned>(query: &str) -> Result<T, Problem> {
    serde_urlencoded::from_str(query)
        .map_err(|error| Problem::bad_request(format!("parameters {query:?}: {error}")))
}

fn put(body: &mut String, format: Format, name: &CounterName, total: &Total) {
    match format {
        Format::Json => {
            let line = serde_json::to_string(&Exported {
                name: name.as_str(),
                value: total.value,
                shards: total.shards,
                staleness_ms: total.staleness_ms,
            });
            body.push_str(&line.expect("texts and numbers always serialize"));
            body.push('\n');
        }
        Format::Csv => {
            // As RFC 4180 quotes.
            let name = name.as_str().replace('"', "\"\"");
            body.push_str(&format!(
                "\"{name}\",{},{},{}\r\n",
                total.value, total.shards, total.staleness_ms
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exports_keep_all_digits_and_quote_names() {
        let total = Total {
            value: i128::from(i64::MIN) * 10,
            shards: 100,
            staleness_ms: 0,
        };
        let name: CounterName = "a,\"b\"".parse().unwrap();
        let mut body = String::new();
        put(&mut body, Format::Csv, &name, &total);
        assert_eq!(body, "\"a,\"\"b\"\"\",-92233720368547758080,100,0\r\n");
        body.clear();
        put(&mut body, Format::Json, &name, &total);
        assert_eq!(
            body,
            "{\"name\":\"a,\\\"b\\\"\",\"value\":-92233720368547758080,\"shards\":100,\"staleness_ms\":0}\n"
        );
    }
}
