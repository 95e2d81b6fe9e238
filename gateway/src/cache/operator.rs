//! What operators may ask of the cache: `/cache`, `/cache/purge`, and other gateways `/cache/purges`.

use std::borrow::Cow;

use http::Method;
use ops::admin::{Page, json, refusal};
use percent_encoding::percent_decode_str;
use protocol::Problem;
use serde::Serialize;

use super::plan::Plans;
use super::{Cache, Tag, peers};

/// What a purge did here.
#[derive(Serialize)]
struct Purged {
    /// Answers that were dropped.
    purged: usize,
}

/// The page at a path; `None` if there is none.
pub fn page(
    cache: &Cache,
    plans: &Plans,
    method: &Method,
    path: &str,
    query: Option<&str>,
) -> Option<Page> {
    let query = query.unwrap_or("");
    match path {
        "/cache" => Some(json(&cache.state())),
        "/cache/purge" if *method != Method::POST => Some(refusal(&Problem::method_not_allowed(
            "POST",
            "a purge changes something: ask with POST",
        ))),
        "/cache/purge" => Some(match wanted(plans, query) {
            Ok(tags) => json(&Purged {
                purged: cache.purge(&tags),
            }),
            Err(detail) => refusal(&Problem::bad_request(detail)),
        }),
        path if path == peers::PATH => {
            let value =
                |wanted| pairs(query).find_map(|(key, value)| (key == wanted).then_some(value));
            let boot = value("boot").unwrap_or_default();
            let count = value("count").and_then(|count| count.parse().ok());
            Some(json(&cache.purges(&boot, count.unwrap_or(0))))
        }
        _ => None,
    }
}

/// The tags that a query names: `tag=…`, `key=…` (of the routes named by `route=…`, or else of all),
/// `route=…` alone, `all`.
fn wanted(plans: &Plans, query: &str) -> Result<Vec<Tag>, String> {
    let (mut tags, mut routes, mut keys) = (Vec::new(), Vec::new(), Vec::new());
    for (name, value) in pairs(query) {
        match &*name {
            "tag" => tags.push(Tag::named(&value)),
            "route" => match plans.iter().find(|plan| plan.label() == value) {
                Some(plan) => routes.push(plan),
                None => return Err(format!("no route with a cache is named {value:?}")),
            },
            "key" => keys.push(value),
            "all" => tags.push(Tag::EVERYTHING),
            _ => return Err(format!("{name:?} must be tag, key, route or all")),
        }
    }
    if keys.is_empty() {
        tags.extend(routes.iter().map(|plan| Tag::route(plan.label())));
    } else if routes.is_empty() {
        routes.extend(plans.iter());
    }
    for key in &keys {
        tags.extend(routes.iter().map(|plan| Tag::key(plan.label(), key)));
    }
    match tags.is_empty() {
        true => Err("name what to purge: tag=…, key=…, route=… or all".to_owned()),
        false => Ok(tags),
    }
}

fn pairs(query: &str) -> impl Iterator<Item = (Cow<'_, str>, Cow<'_, str>)> {
    let decode = |text| percent_decode_str(text).decode_utf8_lossy();
    let pairs = query.split('&').filter(|pair| !pair.is_empty());
    let pairs = pairs.map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    pairs.map(move |(name, value)| (decode(name), decode(value)))
}
