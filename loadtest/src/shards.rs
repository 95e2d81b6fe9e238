//! How many shards the sharded counters of a run have, told to an admin listener before it begins.

use std::time::Duration;

use anyhow::{Context, ensure};

use crate::args::RunArgs;
use crate::client::Target;

/// A change waits for the shards that leave, at most ten seconds.
const ANSWER_MAX: Duration = Duration::from_secs(30);

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
        let mut answer = answer.with_context(|| format!("ask {url}"))?;
        let status = answer.status();
        let said = answer.body_mut().read_to_string().unwrap_or_default();
        ensure!(status.is_success(), "{url} answered {status}: {said}");
    }
    Ok(())
}
