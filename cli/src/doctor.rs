//! `dormouse doctor` and `dormouse advise`: what the advisor says of running objects, and of plans.

use std::process::ExitCode;

use clap::{Args, ValueEnum};
use ops::advisor::questions::{Answers, Consistency, Number, Ownership, Sleep, Talk, advise};
use ops::advisor::{Finding, Level, Report};
use ops::process::{exit_code, print_line};
use serde_json::json;

use crate::admin::{Admin, AdminArgs, AdminError};
use crate::show::table;

/// The exit code if something is as bad as `--fail-on` says.
const TOO_BAD: u8 = 3;

/// Judges how classes and objects are used, and says what to use instead
#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    #[command(flatten)]
    admin: AdminArgs,
    /// Exit with code 3 if anything is as bad as this, or worse
    #[arg(long, value_enum, value_name = "LEVEL")]
    fail_on: Option<FailOn>,
    /// Show the checklist of each class, too
    #[arg(long)]
    score: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum FailOn {
    Yellow,
    YellowHigh,
    Red,
}

impl From<FailOn> for Level {
    fn from(level: FailOn) -> Self {
        match level {
            FailOn::Yellow => Self::Yellow,
            FailOn::YellowHigh => Self::YellowHigh,
            FailOn::Red => Self::Red,
        }
    }
}

pub(crate) fn main(args: &DoctorArgs) -> ExitCode {
    match examine(args) {
        Ok(level) if args.fail_on.is_some_and(|limit| level >= limit.into()) => {
            ExitCode::from(TOO_BAD)
        }
        Ok(_) => ExitCode::SUCCESS,
        Err(error) => exit_code("dormouse doctor", Err(error.into())),
    }
}

/// Asks and prints; the worst level.
fn examine(args: &DoctorArgs) -> Result<Level, AdminError> {
    let answer = Admin::new(&args.admin).get("/advisor")?;
    let report: Report =
        serde_json::from_value(answer.clone()).map_err(|source| AdminError::NotJson {
            url: format!("{}/advisor", args.admin.url()),
            source,
        })?;
    if args.admin.json {
        print_line(&answer.to_string());
    } else {
        print_line(&shown(&report, args.score));
    }
    Ok(report.level)
}

fn shown(report: &Report, with_score: bool) -> String {
    let rows: Vec<Vec<String>> = report
        .classes
        .iter()
        .map(|class| {
            let seen = &class.seen;
            vec![
                class.class.clone(),
                class.level.name().to_owned(),
                format!("{}/{}", class.score.holds, class.score.of),
                seen.objects.to_string(),
                seen.awake.to_string(),
                format!("{:.1}", seen.requests_per_second()),
                indicatif::BinaryBytes(seen.bytes).to_string(),
            ]
        })
        .collect();
    let head = [
        "CLASS",
        "LEVEL",
        "SCORE",
        "OBJECTS",
        "AWAKE",
        "REQUESTS/S",
        "STORED",
    ];
    let mut text = table(&head, &rows);
    for finding in &report.findings {
        text.push_str("\n\n");
        text.push_str(&of_finding(finding));
    }
    if report.findings.is_empty() {
        text.push_str("\n\nall green");
    }
    if with_score {
        for class in &report.classes {
            text.push_str(&format!("\n\n{}:", class.class));
            for line in &class.score.lines {
                let mark = match line.holds {
                    Some(true) => "yes",
                    Some(false) => "NO",
                    None => "?",
                };
                text.push_str(&format!("\n  {mark:3}  {} ({})", line.line, line.why));
            }
        }
    }
    for rule in &report.not_measured {
        text.push_str(&format!("\n\nnot measured: {} {}", rule.rule, rule.why));
    }
    text
}

fn of_finding(finding: &Finding) -> String {
    let whom = match &finding.object {
        None => format!("class {}", finding.class),
        Some(object) => match &object.name {
            Some(name) => format!("{} {name}", finding.class),
            None => format!("{} id:{}", finding.class, object.id),
        },
    };
    format!(
        "{} {}  {whom}: {}\n  {}: {}",
        finding.level.name(),
        finding.rule,
        finding.says,
        finding.pattern,
        finding.advice
    )
}

/// Five questions before a class is written: object, KV, SQL, queue or stateless?
#[derive(Debug, Args)]
pub(crate) struct AdviseArgs {
    /// Whom the state belongs to: nobody (there is none), one user, room or document each, or everybody
    #[arg(long, value_enum)]
    state: State,
    /// Whether everybody must see the last write at once
    #[arg(long, value_enum)]
    reads: Reads,
    /// How often the parts talk to each other
    #[arg(long, value_enum)]
    talk: How,
    /// Whether a part has nothing to do most of the time
    #[arg(long, value_enum)]
    sleep: Can,
    /// How many parts there are
    #[arg(long, value_enum)]
    count: Count,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum State {
    None,
    Owned,
    Shared,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Reads {
    Strong,
    Eventual,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum How {
    Rarely,
    Constantly,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Can {
    Yes,
    No,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Count {
    One,
    Many,
}

impl AdviseArgs {
    fn answers(&self) -> Answers {
        Answers {
            ownership: match self.state {
                State::None => Ownership::NoState,
                State::Owned => Ownership::OneOwner,
                State::Shared => Ownership::Shared,
            },
            consistency: match self.reads {
                Reads::Strong => Consistency::Strong,
                Reads::Eventual => Consistency::Eventual,
            },
            talk: match self.talk {
                How::Rarely => Talk::Rarely,
                How::Constantly => Talk::Constantly,
            },
            sleep: match self.sleep {
                Can::Yes => Sleep::Can,
                Can::No => Sleep::Cannot,
            },
            number: match self.count {
                Count::One => Number::One,
                Count::Many => Number::Many,
            },
        }
    }
}

pub(crate) fn main_advise(args: &AdviseArgs) -> ExitCode {
    let advice = advise(&args.answers());
    if args.json {
        print_line(&json!(advice).to_string());
        return ExitCode::SUCCESS;
    }
    let mut text = format!("{}: {}", advice.verdict.name(), advice.says);
    for because in &advice.because {
        text.push_str(&format!("\n  because {because}"));
    }
    for beware in &advice.beware {
        text.push_str(&format!("\n  beware: {beware}"));
    }
    print_line(&text);
    ExitCode::SUCCESS
}
