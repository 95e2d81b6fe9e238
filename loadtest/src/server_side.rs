//! The server's own view: its latency histograms, read from admin listeners before and after.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, ensure};

use crate::report::ServerLatency;

/// The histograms that are compared, and what they are of.
const FAMILIES: [(&str, &str); 4] = [
    ("gateway", "gateway_request_seconds"),
    ("node", "shard_request_seconds"),
    ("mailbox", "shard_mailbox_wait_seconds"),
    ("log sync", "shard_log_sync_seconds"),
];

const ANSWER_MAX: Duration = Duration::from_secs(10);

/// Cumulative counts by upper bound in seconds, and the sum of all values in seconds; over all labels.
#[derive(Debug, Default, Clone, PartialEq)]
struct Buckets {
    up_to: Vec<(f64, f64)>,
    sum: f64,
}

/// All histograms of all listeners at one moment.
#[derive(Debug, Default)]
pub(crate) struct Scrape(BTreeMap<&'static str, Buckets>);

/// Reads `/metrics` of each listener. Blocks.
pub(crate) fn scrape(urls: &[String], token: Option<&str>) -> anyhow::Result<Scrape> {
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .http_status_as_error(false)
        .timeout_global(Some(ANSWER_MAX))
        .build()
        .into();
    let mut scrape = Scrape::default();
    for url in urls {
        let page = format!("{}/metrics", url.trim_end_matches('/'));
        let mut request = agent.get(&page);
        if let Some(token) = token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let mut answer = request.call().with_context(|| format!("read {page}"))?;
        let status = answer.status();
        ensure!(status.is_success(), "{page} answered {status}");
        let text = answer.body_mut().read_to_string();
        scrape.add(&text.with_context(|| format!("read {page}"))?);
    }
    Ok(scrape)
}

impl Scrape {
    fn add(&mut self, text: &str) {
        for (_, family) in FAMILIES {
            for line in text.lines() {
                let Some((series, value)) = line
                    .strip_prefix(family)
                    .and_then(|rest| rest.rsplit_once(' '))
                else {
                    continue;
                };
                let Ok(value) = value.parse::<f64>() else {
                    continue;
                };
                let buckets = self.0.entry(family).or_default();
                if series.starts_with("_sum") {
                    buckets.sum += value;
                } else if series.starts_with("_bucket")
                    && let Some(bound) = bound(series)
                {
                    buckets.add(bound, value);
                }
            }
        }
    }

    /// What happened since an earlier scrape; empty where a listener does not have a histogram.
    pub(crate) fn since(&self, before: &Self) -> Vec<ServerLatency> {
        let differences = FAMILIES.into_iter().filter_map(|(name, family)| {
            let mut buckets = self.0.get(family)?.clone();
            if let Some(before) = before.0.get(family) {
                buckets.sum -= before.sum;
                for (bound, count) in &before.up_to {
                    buckets.add(*bound, -count);
                }
            }
            buckets.latency(name, family)
        });
        differences.collect()
    }
}

/// The upper bound in a series `…{…,le="0.005"}`.
fn bound(series: &str) -> Option<f64> {
    let (_, rest) = series.split_once("le=\"")?;
    let (bound, _) = rest.split_once('"')?;
    bound.parse().ok() // "+Inf" parses
}

impl Buckets {
    #[expect(clippy::float_cmp, reason = "the same text was parsed")]
    fn add(&mut self, bound: f64, count: f64) {
        match self.up_to.iter_mut().find(|(known, _)| *known == bound) {
            Some((_, sum)) => *sum += count,
            None => {
                self.up_to.push((bound, count));
                self.up_to.sort_by(|a, b| a.0.total_cmp(&b.0));
            }
        }
    }

    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a count, which is whole and not negative"
    )]
    fn latency(&self, name: &'static str, family: &'static str) -> Option<ServerLatency> {
        let all = self.up_to.last()?.1;
        (all > 0.0).then(|| ServerLatency {
            name: name.to_owned(),
            metric: family.to_owned(),
            count: all as u64,
            p50_us: self.quantile(0.5) * 1e6,
            p90_us: self.quantile(0.9) * 1e6,
            p99_us: self.quantile(0.99) * 1e6,
            mean_us: self.sum / all * 1e6,
        })
    }

    /// As Prometheus' `histogram_quantile`: linear within a bucket, and the highest finite bound beyond
    /// it.
    fn quantile(&self, quantile: f64) -> f64 {
        let rank = self.up_to.last().map_or(0.0, |last| last.1) * quantile;
        let (mut lower, mut below) = (0.0, 0.0);
        for (bound, count) in &self.up_to {
            if *count >= rank && *count > below {
                if bound.is_infinite() {
                    return lower;
                }
                return lower + (bound - lower) * (rank - below) / (count - below);
            }
            (lower, below) = (*bound, *count);
        }
        lower
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEFORE: &str = "\
# TYPE gateway_request_seconds histogram
gateway_request_seconds_bucket{route=\"rpc\",code=\"200\",le=\"0.001\"} 100
gateway_request_seconds_bucket{route=\"rpc\",code=\"200\",le=\"0.002\"} 100
gateway_request_seconds_bucket{route=\"rpc\",code=\"200\",le=\"+Inf\"} 100
gateway_request_seconds_sum{route=\"rpc\",code=\"200\"} 0.05
gateway_request_seconds_count{route=\"rpc\",code=\"200\"} 100
gateway_requests_total{route=\"rpc\",code=\"200\"} 100
";
    const AFTER: &str = "\
gateway_request_seconds_bucket{route=\"rpc\",code=\"200\",le=\"0.001\"} 150
gateway_request_seconds_bucket{route=\"rpc\",code=\"200\",le=\"0.002\"} 190
gateway_request_seconds_bucket{route=\"rpc\",code=\"200\",le=\"+Inf\"} 200
gateway_request_seconds_sum{route=\"rpc\",code=\"200\"} 0.25
";

    #[test]
    fn only_what_happened_in_between_counts() {
        let scrape = |text| {
            let mut scrape = Scrape::default();
            scrape.add(text);
            scrape
        };
        let found = scrape(AFTER).since(&scrape(BEFORE));
        assert_eq!(found.len(), 1);
        let gateway = &found[0];
        assert_eq!((gateway.name.as_str(), gateway.count), ("gateway", 100));
        let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-6 * b, "{a} {b}");
        near(gateway.p50_us, 1000.0);
        near(gateway.p90_us, 2000.0);
        near(gateway.p99_us, 2000.0);
        near(gateway.mean_us, 2000.0);
    }
}
