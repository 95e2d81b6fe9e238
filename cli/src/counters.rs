//! `dormouse counters`.

use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use ops::process::{self, print_line};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use protocol::counters::{Auto, Change, Count, CounterName, Scope, Standing, Strategy};
use serde::{Deserialize, Serialize};
use serde_json::{Value as Json, json};
use ureq::http::Method;

use crate::admin::{Admin, AdminArgs, AdminError, PageArgs, with_parameters};
use crate::show;

/// How often `--wait` looks.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// Rows of one part of an export.
const EXPORT_ROWS: u32 = 1000;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Lists counters, each as it stands
    Ls(ListArgs),
    /// Shows how a counter stands
    Show(OneArgs),
    /// Changes how a counter is sharded, while it counts
    Reshard(ReshardArgs),
    /// Adds to a counter, as its clients do
    Increment(IncrementArgs),
    /// Prints the value of a counter, as its clients read it
    Value(ValueArgs),
    /// Prints the totals of all counters
    Export(ExportArgs),
}

#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    #[command(flatten)]
    admin: AdminArgs,
    /// With names that begin so
    #[arg(long, default_value = "")]
    prefix: String,
    #[command(flatten)]
    page: PageArgs,
}

#[derive(Debug, Args)]
pub(crate) struct OneArgs {
    #[command(flatten)]
    admin: AdminArgs,
    /// The counter
    name: CounterName,
}

#[derive(Debug, Args)]
pub(crate) struct ReshardArgs {
    #[command(flatten)]
    one: OneArgs,
    /// How many shards, 10 to 1000 in most cases, or `auto`: more while they run hot
    #[arg(value_name = "N|auto", value_parser = parse_count)]
    count: Option<Count>,
    /// Which shard an increment goes to
    #[arg(long, value_enum)]
    strategy: Option<StrategyArg>,
    /// Whether each colo has shards of its own
    #[arg(long, value_enum)]
    scope: Option<ScopeArg>,
    /// How long a shard waits before it reports, in milliseconds
    #[arg(long, value_name = "MS")]
    report_every_ms: Option<u64>,
    /// Wait until the totals of all shards that leave are in the base
    #[arg(long)]
    wait: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum StrategyArg {
    /// By client: one client, one shard
    Hash,
    Random,
    RoundRobin,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ScopeArg {
    Global,
    Colo,
}

/// Where clients ask.
#[derive(Debug, Args)]
struct PublicArgs {
    /// Address that clients connect to
    #[arg(
        long,
        env = "DORMOUSE_TARGET",
        value_name = "URL",
        default_value = "http://127.0.0.1:8080"
    )]
    target: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct IncrementArgs {
    #[command(flatten)]
    public: PublicArgs,
    /// The counter
    name: CounterName,
    /// By how much; may be negative
    #[arg(long, default_value_t = 1, allow_hyphen_values = true)]
    by: i64,
    /// An idempotency key: with the same one it is counted once
    #[arg(long)]
    key: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct ValueArgs {
    #[command(flatten)]
    public: PublicArgs,
    /// The counter
    name: CounterName,
    /// Ask every shard now
    #[arg(long)]
    exact: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ExportArgs {
    #[command(flatten)]
    admin: AdminArgs,
    #[arg(long, value_enum, default_value = "json")]
    format: Format,
    /// Ask every shard now
    #[arg(long)]
    exact: bool,
    /// With names that begin so
    #[arg(long, default_value = "")]
    prefix: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum Format {
    /// An object per line
    Json,
    Csv,
}

#[derive(Serialize)]
struct ListParameters<'a> {
    prefix: &'a str,
    limit: u32,
    after: Option<&'a str>,
}

#[derive(Serialize)]
struct ExportParameters<'a> {
    format: Format,
    exact: bool,
    prefix: &'a str,
    limit: u32,
    after: Option<String>,
}

#[derive(Deserialize)]
struct Value {
    value: i128,
    shards: u32,
    staleness_ms: u64,
}

fn parse_count(text: &str) -> Result<Count, String> {
    match text {
        "auto" => Ok(Count::Auto(Auto::Auto)),
        digits => digits
            .parse()
            .map(Count::Fixed)
            .map_err(|_| format!("{text:?} is no number of shards, nor auto")),
    }
}

/// Everything but what RFC 3986, 2.3 calls unreserved.
const RESERVED: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~');

fn path(name: &CounterName) -> String {
    let encoded = utf8_percent_encode(name.as_str(), RESERVED).to_string();
    match encoded.as_str() {
        // `export` itself is the totals of all.
        "export" => "/counters/%65xport".to_owned(),
        name => format!("/counters/{name}"),
    }
}

pub(crate) fn main(command: &Command) -> ExitCode {
    process::exit_code("dormouse counters", run(command).map_err(Into::into))
}

fn run(command: &Command) -> Result<(), AdminError> {
    match command {
        Command::Ls(args) => list(args),
        Command::Show(args) => {
            let standing = stand(&Admin::new(&args.admin), &args.name)?;
            show(args, &standing);
            Ok(())
        }
        Command::Reshard(args) => reshard(args),
        Command::Increment(args) => increment(args),
        Command::Value(args) => value(args),
        Command::Export(args) => export(args),
    }
}

fn list(args: &ListArgs) -> Result<(), AdminError> {
    let parameters = ListParameters {
        prefix: &args.prefix,
        limit: args.page.limit,
        after: args.page.after.as_deref(),
    };
    let found = Admin::new(&args.admin).get(&with_parameters("/counters", &parameters))?;
    if args.admin.json {
        print_line(&found.to_string());
        return Ok(());
    }
    let cells = |row: &Json| {
        let shards = match row["auto"] == true {
            true => format!("{} (auto)", show::text(&row["shards"])),
            false => show::text(&row["shards"]),
        };
        vec![
            show::text(&row["name"]),
            show::text(&row["value"]),
            shards,
            show::text(&row["retiring"]),
            show::text(&row["strategy"]),
            show::text(&row["scope"]),
        ]
    };
    let rows = found["counters"].as_array().into_iter().flatten();
    let rows: Vec<_> = rows.map(cells).collect();
    let head = ["NAME", "VALUE", "SHARDS", "RETIRING", "STRATEGY", "SCOPE"];
    print_line(&show::table(&head, &rows));
    if let Some(next) = found["next"].as_str() {
        print_line(&format!("more with --after {next}"));
    }
    Ok(())
}

fn stand(admin: &Admin, name: &CounterName) -> Result<Standing, AdminError> {
    admin.read(Method::GET, &path(name), "")
}

fn show(args: &OneArgs, standing: &Standing) {
    let json = json!(standing);
    if args.admin.json {
        print_line(&json.to_string());
        return;
    }
    let auto = if standing.auto { " (auto)" } else { "" };
    let mut rows = vec![
        ("value", standing.value.to_string()),
        ("shards", format!("{}{auto}", standing.shards)),
        ("retiring", standing.retiring.to_string()),
        ("base", standing.base.to_string()),
        ("strategy", show::text(&json["strategy"])),
        ("scope", show::text(&json["scope"])),
        ("version", standing.version.to_string()),
        ("stale", format!("{} ms at most", standing.staleness_ms)),
    ];
    if let Some(skew) = standing.skew {
        rows.push(("skew", format!("{skew:.2}")));
    }
    if let (Some(seat), Some(rate)) = (standing.hottest, standing.hottest_rate) {
        rows.push(("hottest", format!("{seat}, {rate:.0} turns/s")));
    }
    for (what, value) in rows {
        print_line(&format!("{what:10}{value}"));
    }
    warn(standing);
}

fn warn(standing: &Standing) {
    for warning in &standing.warnings {
        print_line(&format!("warning: {warning}"));
    }
}

fn reshard(args: &ReshardArgs) -> Result<(), AdminError> {
    let change = Change {
        count: args.count,
        strategy: args.strategy.map(|strategy| match strategy {
            StrategyArg::Hash => Strategy::Hash,
            StrategyArg::Random => Strategy::Random,
            StrategyArg::RoundRobin => Strategy::RoundRobin,
        }),
        scope: args.scope.map(|scope| match scope {
            ScopeArg::Global => Scope::Global,
            ScopeArg::Colo => Scope::Colo,
        }),
        report_every_ms: args.report_every_ms,
    };
    if change == Change::default() {
        return Err(AdminError::Usage(
            "nothing to change: say how many shards, or --strategy, --scope or --report-every-ms"
                .to_owned(),
        ));
    }
    let OneArgs { admin, name } = &args.one;
    let asked = Admin::new(admin);
    let body = json!(change).to_string();
    let to = format!("{}/shards", path(name));
    let mut standing: Standing = asked.read(Method::PUT, &to, &body)?;
    let changed = standing.version;
    // Whoever changes it again meanwhile has shards that leave, too.
    while args.wait && standing.retiring > 0 {
        pause();
        standing = stand(&asked, name)?;
    }
    if admin.json {
        print_line(&json!(standing).to_string());
        return Ok(());
    }
    let retiring = match standing.retiring {
        0 => String::new(),
        some => format!(", {some} retiring"),
    };
    print_line(&format!(
        "{name} has {} shards by plan {changed}{retiring}",
        standing.shards
    ));
    warn(&standing);
    Ok(())
}

#[expect(
    clippy::disallowed_methods,
    reason = "the only thread of a command that waits for others"
)]
fn pause() {
    std::thread::sleep(LOOK_EVERY);
}

fn increment(args: &IncrementArgs) -> Result<(), AdminError> {
    let key = args.key.iter();
    let headers = key.map(|key| ("idempotency-key", key.clone())).collect();
    let to = format!("{}/increment?by={}", path(&args.name), args.by);
    let public = Admin::public(&args.public.target, headers);
    let answer: Json = public.ask(Method::POST, &to, "")?;
    let repeated = match answer["repeated"] == true {
        true => ", which it had been before",
        false => "",
    };
    let said = format!(
        "{} by {} in shard {}{repeated}",
        args.name,
        args.by,
        show::text(&answer["shard"])
    );
    show::done(args.public.json, &answer, &said);
    Ok(())
}

fn value(args: &ValueArgs) -> Result<(), AdminError> {
    let public = Admin::public(&args.public.target, Vec::new());
    let to = match args.exact {
        true => format!("{}?exact=true", path(&args.name)),
        false => path(&args.name),
    };
    let text = public.text(Method::GET, &to, "")?;
    if args.public.json {
        print_line(&text);
        return Ok(());
    }
    let value: Value = serde_json::from_str(&text).map_err(|source| AdminError::NotJson {
        url: format!("{}{to}", args.public.target),
        source,
    })?;
    print_line(&match value.staleness_ms {
        0 => format!("{}, of {} shards, now", value.value, value.shards),
        stale => format!(
            "{}, of {} shards, at most {stale} ms ago",
            value.value, value.shards
        ),
    });
    Ok(())
}

fn export(args: &ExportArgs) -> Result<(), AdminError> {
    let admin = Admin::new(&args.admin);
    let mut parameters = ExportParameters {
        format: args.format,
        exact: args.exact,
        prefix: &args.prefix,
        limit: EXPORT_ROWS,
        after: None,
    };
    let mut is_first = true;
    loop {
        let to = with_parameters("/counters/export", &parameters);
        let mut part = admin.open(&to)?;
        let next = part.headers().get("dormouse-next");
        parameters.after = next.and_then(|next| next.to_str().ok()).map(str::to_owned);
        let text = part.body_mut().read_to_string();
        let text = text.map_err(|source| AdminError::Exchange {
            url: format!("{}{to}", args.admin.url()),
            source,
        })?;
        let head = args.format == Format::Csv && !is_first;
        let lines = text.lines().skip(usize::from(head));
        lines.for_each(print_line);
        if parameters.after.is_none() {
            return Ok(());
        }
        is_first = false;
    }
}
