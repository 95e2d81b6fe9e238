//! The access log: one JSON object per line and request.
//!
//! Lines are made on the thread of the request and written by one of their own, which a slow disk can hold
//! up without holding up requests: when too many wait, lines are dropped, and counted.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, SystemTime};

use metrics::Counter;
use ops::Causes;
use rand::Rng;
use serde::Serialize;
use tracing::{debug, warn};

use crate::config::AccessLogConfig;

/// Lines that may wait to be written.
const WAITING_MAX: usize = 65_536;

/// Lines that are written at once.
const BUFFER_BYTES: usize = 256 << 10;

/// How long a stopping gateway waits for the last lines.
const FLUSH_MAX: Duration = Duration::from_secs(5);

/// What is written of a request. Neither the query nor any header but the agent: they may hold secrets.
#[derive(Debug, Serialize)]
pub struct Line<'a> {
    /// When it was answered, in UTC.
    pub time: String,
    pub request: &'a str,
    pub trace: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub client: Option<IpAddr>,
    pub method: &'a str,
    pub scheme: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<&'a str>,
    pub path: &'a str,
    /// As in the metrics.
    pub route: &'a str,
    /// 0 if the client went before there was one.
    pub status: u16,
    /// Of a refusal by the system.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refused: Option<&'static str>,
    /// What the cache of its route did, if that has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache: Option<&'static str>,
    /// Which server of an app answered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub server: Option<std::net::SocketAddr>,
    /// Of sending it to an app or a worker.
    pub tries: u32,
    /// Of the body.
    pub sent_bytes: usize,
    pub took_us: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agent: Option<&'a str>,
}

/// One open log.
pub struct AccessLog {
    sample: f64,
    lines: SyncSender<Order>,
    dropped: Counter,
}

enum Order {
    Write(Vec<u8>),
    /// Answered when everything before is written.
    Flush(SyncSender<()>),
}

/// Why there is no log.
#[derive(Debug, thiserror::Error)]
#[error("open the access log {path}")]
pub struct OpenError {
    path: PathBuf,
    source: io::Error,
}

impl AccessLog {
    /// `None` if none is wanted. Opening again is how a rotated file is let go.
    pub fn open(config: &AccessLogConfig, dropped: Counter) -> Result<Option<Self>, OpenError> {
        if config.file.is_empty() {
            return Ok(None);
        }
        let path = PathBuf::from(&config.file);
        let failed = |source| OpenError {
            path: path.clone(),
            source,
        };
        let file = OpenOptions::new().append(true).create(true).open(&path);
        let file = file.map_err(failed)?;
        let (lines, orders) = sync_channel(WAITING_MAX);
        // Ends when the log is dropped; what was sent before is written.
        let writer = std::thread::Builder::new().name("access-log".to_owned());
        writer.spawn(move || write(file, &orders)).map_err(failed)?;
        Ok(Some(Self {
            sample: config.sample,
            lines,
            dropped,
        }))
    }

    /// Whether a request with this outcome is written. Errors of ours or behind us always are.
    pub fn wants(&self, status: u16) -> bool {
        status >= 500 || self.sample >= 1.0 || rand::rng().random_bool(self.sample)
    }

    pub fn write(&self, line: &Line<'_>) {
        let mut text = Vec::with_capacity(512);
        if serde_json::to_writer(&mut text, line).is_err() {
            return;
        }
        text.push(b'\n');
        if let Err(TrySendError::Full(_)) = self.lines.try_send(Order::Write(text)) {
            self.dropped.increment(1);
        }
    }

    /// Waits until everything is written, within bounds. Blocks.
    pub fn flush(&self) {
        let (done, wait) = sync_channel(1);
        let asked = self.lines.send(Order::Flush(done)).is_ok();
        if !asked || wait.recv_timeout(FLUSH_MAX).is_err() {
            warn!("the last lines of the access log may be missing");
        }
    }
}

/// The time of now, as lines have it.
pub fn now() -> String {
    #[expect(
        clippy::disallowed_methods,
        reason = "for people who read logs; nothing depends on it"
    )]
    let now = SystemTime::now();
    humantime::format_rfc3339_millis(now).to_string()
}

fn write(mut file: File, orders: &Receiver<Order>) {
    let mut buffer = Vec::with_capacity(BUFFER_BYTES);
    let mut failing = false;
    while let Ok(first) = orders.recv() {
        let mut waiting = Vec::new();
        let mut next = Some(first);
        while let Some(order) = next {
            match order {
                Order::Write(line) => buffer.extend_from_slice(&line),
                Order::Flush(done) => waiting.push(done),
            }
            next = match buffer.len() < BUFFER_BYTES {
                true => orders.try_recv().ok(),
                false => None,
            };
        }
        let written = file.write_all(&buffer);
        if let Err(error) = &written
            && !failing
        {
            warn!(error = %Causes(error), "the access log cannot be written; trying on");
        }
        failing = written.is_err();
        buffer.clear();
        for done in waiting {
            if done.send(()).is_err() {
                debug!("the access log was written later than anybody waited for");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_a_part_of_the_requests_and_all_errors() {
        let dir = tempfile::tempdir().unwrap();
        let config = AccessLogConfig {
            file: dir.path().join("log").to_str().unwrap().to_owned(),
            sample: 0.25,
        };
        let log = AccessLog::open(&config, Counter::noop()).unwrap().unwrap();
        let count = (0..10_000).filter(|_| log.wants(200)).count();
        assert!((2200..2800).contains(&count), "{count}");
        assert!((0..1000).all(|_| log.wants(503)));
    }

    #[test]
    fn what_cannot_be_opened_is_named() {
        let config = AccessLogConfig {
            file: "/nowhere/log".to_owned(),
            ..AccessLogConfig::default()
        };
        let error = AccessLog::open(&config, Counter::noop()).err().unwrap();
        assert!(error.to_string().contains("/nowhere/log"), "{error}");
        assert!(
            AccessLog::open(&AccessLogConfig::default(), Counter::noop())
                .unwrap()
                .is_none()
        );
    }
}
