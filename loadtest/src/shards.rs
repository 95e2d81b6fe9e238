//! How many shards the sharded counters of a run have, told to an admin listener before it begins, and each of
//! them made to be there: a run measures counting, not the first time of every shard.

use std::time::Duration;

use anyhow::{Context, ensure};
use protocol::counters::{jump, key_hash};

use crate::args::RunArgs;
use crate::client::Target;

/// A change waits for the shards that leave, at most ten seconds.
const ANSWER_MAX: Duration = Duration::from_secs(30);

/// Shards that are made at a time.
const AT_ONCE: usize = 16;

/// Blocks.
pub(crate) fn reshard(args: &RunArgs, target: &Target, shards: u32) -> anyhow::Result<()> {
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .http_status_as_error(false)
        .timeout_global(Some(ANSWER_MAX))
        .build()
        .into();
    let admin = args.admin.first().context("--shards wants --admin")?;
    let admin = admin.trim_end_matches('/');
    for number in 0..args.objects {
        let url = format!("{admin}/counters/{}{number}/shards", target.prefix);
        let mut request = agent.put(&url);
        if let Some(token) = &args.admin_token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let answer = request.send(format!("{{\"count\":{shards}}}"));
        said(&url, answer)?;
        make(&agent, target, number, &one_key_each(shards))?;
    }
    Ok(())
}

/// Adds nothing to every shard of a counter, each by a key that belongs there.
fn make(agent: &ureq::Agent, target: &Target, number: u32, keys: &[String]) -> anyhow::Result<()> {
    let Target { host, prefix, .. } = target;
    let url = format!("http://{host}/counters/{prefix}{number}/increment?by=0");
    let one = |key: &String| {
        let answer = agent.post(&url).header("idempotency-key", key).send_empty();
        said(&url, answer)
    };
    let all = |keys: &[String]| keys.iter().try_for_each(one);
    std::thread::scope(|scope| {
        let parts = keys.chunks(keys.len().div_ceil(AT_ONCE).max(1));
        let makers: Vec<_> = parts.map(|part| scope.spawn(move || all(part))).collect();
        makers.into_iter().try_for_each(|maker| {
            let made = maker.join();
            made.map_err(|_| anyhow::anyhow!("a thread that makes shards panicked"))?
        })
    })
}

/// Keys that lead to the shards, in the shards' order.
fn one_key_each(shards: u32) -> Vec<String> {
    let mut keys = vec![String::new(); shards as usize];
    let mut missing = keys.len();
    for number in 0_u64.. {
        if missing == 0 {
            break;
        }
        let key = format!("warm-{number}");
        let place = &mut keys[jump(key_hash(&key), shards) as usize];
        if place.is_empty() {
            *place = key;
            missing -= 1;
        }
    }
    keys
}

fn said(url: &str, answer: Result<http::Response<ureq::Body>, ureq::Error>) -> anyhow::Result<()> {
    let mut answer = answer.with_context(|| format!("ask {url}"))?;
    let status = answer.status();
    let said = answer.body_mut().read_to_string().unwrap_or_default();
    ensure!(status.is_success(), "{url} answered {status}: {said}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shard_has_a_key() {
        for shards in [1, 2, 100, 1000] {
            let keys = one_key_each(shards);
            let places = keys.iter().map(|key| jump(key_hash(key), shards));
            assert!(places.eq(0..shards));
        }
    }
}
