//! One run: warm-up, load, verification.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use clap::Args;
use hdrhistogram::Histogram;
use http::Uri;
use rand::Rng;
use tokio::task::LocalSet;

use crate::client::{Client, Outcome, Target};
use crate::report::{Latency, Machine, Report, Verification};
use crate::schedule::{Arrival, Arrivals, Due, Gaps, Names, Picker, generate};

/// How long the verification waits for one object to answer.
const VERIFY_PATIENCE: Duration = Duration::from_secs(20);

/// What to do in one run.
#[derive(Debug, Clone, Args)]
pub struct RunArgs {
    /// A gateway
    #[arg(long, env = "DORMOUSE_TARGET", default_value = "http://127.0.0.1:8080")]
    pub target: String,
    /// Requests per second; 0: as fast as the connections allow (closed loop)
    #[arg(long, default_value_t = 1000.0)]
    pub rate: f64,
    /// Seconds of load, warm-up not included
    #[arg(long, default_value_t = 10.0)]
    pub duration: f64,
    /// Seconds of load before measuring begins
    #[arg(long, default_value_t = 1.0)]
    pub warmup: f64,
    /// Keep-alive connections
    #[arg(long, default_value_t = 64)]
    pub connections: u32,
    /// Objects that share the load
    #[arg(long, default_value_t = 1000)]
    pub objects: u32,
    /// How the objects are picked
    #[arg(long, value_enum, default_value = "uniform")]
    pub names: Names,
    /// Exponent of the Zipf distribution
    #[arg(long, default_value_t = 1.0)]
    pub zipf_exponent: f64,
    /// How arrivals follow each other
    #[arg(long, value_enum, default_value = "poisson")]
    pub arrivals: Arrivals,
    /// Objects are called PREFIX-0, PREFIX-1, …; they must not exist yet [default: load-SEED]
    #[arg(long)]
    pub prefix: Option<String>,
    /// The class; it must have `increment` and `value`
    #[arg(long, default_value = "Counter")]
    pub class: String,
    /// Seconds until a request counts as lost
    #[arg(long, default_value_t = 10.0)]
    pub timeout: f64,
    /// Seconds to go on sending a request that is refused while nothing of it ran
    #[arg(long, default_value_t = 0.0)]
    pub patience: f64,
    /// Makes the load repeatable [default: random]
    #[arg(long)]
    pub seed: Option<u64>,
    /// Print one JSON object instead of a table
    #[arg(long)]
    pub json: bool,
}

impl RunArgs {
    fn validate(&self) -> anyhow::Result<()> {
        let positive = [
            ("duration", self.duration),
            ("timeout", self.timeout),
            ("zipf-exponent", self.zipf_exponent),
        ];
        for (flag, value) in positive {
            ensure!(
                value > 0.0 && value < 1e6,
                "--{flag} {value} must be above 0 and below a million"
            );
        }
        let not_negative = [
            ("rate", self.rate),
            ("warmup", self.warmup),
            ("patience", self.patience),
        ];
        for (flag, value) in not_negative {
            ensure!(
                (0.0..1e7).contains(&value),
                "--{flag} {value} must not be negative, and below ten million"
            );
        }
        ensure!(self.connections > 0, "--connections 0 must be at least 1");
        ensure!(self.objects > 0, "--objects 0 must be at least 1");
        Ok(())
    }

    fn target(&self, seed: u64) -> anyhow::Result<Target> {
        let uri: Uri = self
            .target
            .parse()
            .with_context(|| format!("--target {:?}", self.target))?;
        if uri.scheme_str() != Some("http") {
            bail!("--target {:?} must begin with http://", self.target);
        }
        let authority = uri
            .authority()
            .with_context(|| format!("--target {:?} has no host", self.target))?;
        Ok(Target {
            host: match authority.port() {
                Some(_) => authority.to_string(),
                None => format!("{authority}:80"),
            },
            class: self.class.clone(),
            prefix: self
                .prefix
                .clone()
                .unwrap_or_else(|| format!("load-{seed:016x}")),
            timeout: Duration::from_secs_f64(self.timeout),
        })
    }
}

/// What the connections found out together.
struct Tally {
    /// Only what was intended after the warm-up is measured.
    measure_from: Instant,
    latency: Histogram<u64>,
    service_time: Histogram<u64>,
    acknowledged: u64,
    errors: BTreeMap<String, u64>,
    objects: HashMap<u32, Counts>,
    last_answer: Instant,
}

/// The increments of one object.
#[derive(Default, Clone, Copy)]
struct Counts {
    acknowledged: u64,
    unknown: u64,
}

impl Tally {
    fn record(&mut self, arrival: Arrival, sent: Instant, outcome: Outcome) {
        let now = now();
        let counts = self.objects.entry(arrival.object).or_default();
        match outcome {
            Outcome::Acknowledged(_) => counts.acknowledged += 1,
            Outcome::Unknown(_) => counts.unknown += 1,
            Outcome::Refused(_) => {}
        }
        if arrival.intended < self.measure_from {
            return;
        }
        self.last_answer = self.last_answer.max(now);
        match outcome {
            Outcome::Acknowledged(_) => {
                self.acknowledged += 1;
                self.latency
                    .saturating_record(micros(now - arrival.intended));
                self.service_time.saturating_record(micros(now - sent));
            }
            Outcome::Refused(why) | Outcome::Unknown(why) => {
                *self.errors.entry(why).or_default() += 1
            }
        }
    }
}

/// Runs the load and verifies its totals.
///
/// # Errors
/// When the arguments are wrong or the first connection cannot be made. What goes wrong later is in
/// the report.
pub fn run(args: &RunArgs) -> anyhow::Result<Report> {
    args.validate()?;
    ops::process::raise_descriptor_limit();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    LocalSet::new().block_on(&runtime, load(args))
}

async fn load(args: &RunArgs) -> anyhow::Result<Report> {
    let seed = args.seed.unwrap_or_else(|| rand::rng().random());
    let target = args.target(seed)?;
    tokio::net::TcpStream::connect(&target.host)
        .await
        .with_context(|| format!("connect to {}", target.host))?;
    let begin = now();
    let measure_from = begin + Duration::from_secs_f64(args.warmup);
    let whole = Duration::from_secs_f64(args.warmup + args.duration);
    let tally = Rc::new(RefCell::new(Tally {
        measure_from,
        latency: histogram()?,
        service_time: histogram()?,
        acknowledged: 0,
        errors: BTreeMap::new(),
        objects: HashMap::new(),
        last_answer: measure_from,
    }));
    let picker = |salt: u64| Picker::new(args.names, args.objects, args.zipf_exponent, seed ^ salt);
    let due = Arc::new(Due::default());
    let patience = Duration::from_secs_f64(args.patience);
    let mut connections = tokio::task::JoinSet::new();
    for number in 0..args.connections {
        let tally = Rc::clone(&tally);
        let client = Client::new(target.clone());
        if args.rate > 0.0 {
            connections.spawn_local(follow(client, Arc::clone(&due), patience, tally));
        } else {
            let picker = picker(u64::from(number) + 1)?;
            connections.spawn_local(saturate(client, picker, begin + whole, patience, tally));
        }
    }
    if args.rate > 0.0 {
        let gaps = Gaps::new(args.arrivals, args.rate, !seed);
        let (due, picker) = (Arc::clone(&due), picker(0)?);
        std::thread::Builder::new()
            .name("arrivals".to_owned())
            .spawn(move || generate(&due, begin, whole, gaps, picker))?;
    }
    while let Some(ended) = connections.join_next().await {
        ended.context("a connection's task panicked")?;
    }
    let objects = std::mem::take(&mut tally.borrow_mut().objects);
    let verification = verify(&target, objects, args.connections).await?;
    let mut tally = tally.borrow_mut();
    let seconds = (tally.last_answer - measure_from)
        .as_secs_f64()
        .max(f64::EPSILON);
    Ok(Report {
        target: args.target.clone(),
        seed,
        commit: env!("DORMOUSE_COMMIT"),
        machine: Machine::this(),
        rate: args.rate,
        connections: args.connections,
        objects: args.objects,
        names: format!("{:?}", args.names).to_lowercase(),
        seconds,
        rps: tally.acknowledged as f64 / seconds,
        acknowledged: tally.acknowledged,
        errors: std::mem::take(&mut tally.errors),
        not_sent: due.not_sent(),
        latency: Latency::of(&tally.latency),
        service_time: Latency::of(&tally.service_time),
        verification,
    })
}

/// Open loop: sends what is due.
async fn follow(mut client: Client, due: Arc<Due>, patience: Duration, tally: Rc<RefCell<Tally>>) {
    while let Some(arrival) = due.next().await {
        increment(&mut client, arrival, patience, &tally).await;
    }
}

/// Closed loop: sends the next request as soon as the last one is answered.
async fn saturate(
    mut client: Client,
    mut picker: Picker,
    until: Instant,
    patience: Duration,
    tally: Rc<RefCell<Tally>>,
) {
    loop {
        let intended = now();
        if intended >= until {
            return;
        }
        let arrival = Arrival {
            intended,
            object: picker.pick(),
        };
        increment(&mut client, arrival, patience, &tally).await;
    }
}

async fn increment(
    client: &mut Client,
    arrival: Arrival,
    patience: Duration,
    tally: &RefCell<Tally>,
) {
    let sent = now();
    let outcome = client
        .call_patiently(arrival.object, "increment", patience)
        .await;
    tally.borrow_mut().record(arrival, sent, outcome);
}

/// Reads the total of every object that was touched.
async fn verify(
    target: &Target,
    objects: HashMap<u32, Counts>,
    connections: u32,
) -> anyhow::Result<Verification> {
    let all: Vec<(u32, Counts)> = objects.into_iter().collect();
    let share = all.len().div_ceil(connections as usize).max(1);
    let mut readers = tokio::task::JoinSet::new();
    for part in all.chunks(share) {
        let (part, mut client) = (part.to_vec(), Client::new(target.clone()));
        readers.spawn_local(async move {
            let mut found = Verification::default();
            for (object, counts) in part {
                let outcome = client
                    .call_patiently(object, "value", VERIFY_PATIENCE)
                    .await;
                found.add(counts, &outcome);
            }
            found
        });
    }
    let mut sum = Verification::default();
    while let Some(part) = readers.join_next().await {
        let part = part.context("a reader's task panicked")?;
        sum.acknowledged += part.acknowledged;
        sum.found += part.found;
        sum.surplus += part.surplus;
        sum.unknown += part.unknown;
        sum.objects += part.objects;
        sum.unread += part.unread;
    }
    Ok(sum)
}

impl Verification {
    fn add(&mut self, counts: Counts, outcome: &Outcome) {
        self.objects += 1;
        self.acknowledged += counts.acknowledged;
        self.unknown += counts.unknown;
        match outcome {
            Outcome::Acknowledged(total) => {
                let total = u64::try_from(*total).unwrap_or(0);
                self.found += total.min(counts.acknowledged);
                self.surplus += total.saturating_sub(counts.acknowledged + counts.unknown);
            }
            Outcome::Refused(_) | Outcome::Unknown(_) => self.unread += 1,
        }
    }
}

/// From 1 µs to 10 minutes with three digits.
fn histogram() -> anyhow::Result<Histogram<u64>> {
    Histogram::new_with_bounds(1, 600_000_000, 3).context("histogram")
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros())
        .unwrap_or(u64::MAX)
        .max(1)
}

#[expect(clippy::disallowed_methods, reason = "a load test measures real time")]
fn now() -> Instant {
    Instant::now()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_or_repeated_increment_fails_the_verification() {
        let judged = |acknowledged, unknown, total| {
            let mut verification = Verification::default();
            verification.add(
                Counts {
                    acknowledged,
                    unknown,
                },
                &Outcome::Acknowledged(total),
            );
            verification.passed()
        };
        assert!(judged(5, 0, 5));
        assert!(!judged(5, 0, 4), "one is lost");
        assert!(!judged(5, 0, 6), "one was counted twice");
        assert!(
            judged(5, 2, 5) && judged(5, 2, 7),
            "each unknown one may be in or not"
        );
        assert!(!judged(5, 2, 8));
        let mut unread = Verification::default();
        unread.add(Counts::default(), &Outcome::Refused(String::new()));
        assert!(!unread.passed());
    }
}
