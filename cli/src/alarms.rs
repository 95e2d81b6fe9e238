//! `dormouse alarms`.

use std::process::ExitCode;

use clap::{Args, Subcommand, ValueEnum};
use ops::process::{self, print_line};
use serde::Serialize;
use serde_json::Value as Json;
use ureq::http::Method;

use crate::admin::{Admin, AdminArgs, AdminError, ObjectArgs, PageArgs, with_parameters};
use crate::show;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Lists alarms, the one due first first
    Ls(ListArgs),
    /// Runs an object's alarm now
    Fire(OneArgs),
    /// Cancels an object's alarm
    Cancel(OneArgs),
    /// Lists alarms that were given up after their last retry
    Dead(DeadArgs),
    /// Runs an alarm again that was given up
    Retry(OneArgs),
    /// Forgets an alarm that was given up
    Drop(OneArgs),
}

#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    #[command(flatten)]
    admin: AdminArgs,
    /// Which alarms
    #[arg(long, value_enum, default_value = "pending")]
    state: State,
    #[command(flatten)]
    due: DueArgs,
}

#[derive(Debug, Args)]
pub(crate) struct DeadArgs {
    #[command(flatten)]
    admin: AdminArgs,
    #[command(flatten)]
    due: DueArgs,
}

#[derive(Debug, Args)]
struct DueArgs {
    /// Of this class only
    #[arg(long)]
    class: Option<String>,
    /// Due at this time or later (RFC 3339)
    #[arg(long, value_name = "TIME", value_parser = show::parse_time)]
    from: Option<u64>,
    /// Due before this time (RFC 3339)
    #[arg(long, value_name = "TIME", value_parser = show::parse_time)]
    below: Option<u64>,
    #[command(flatten)]
    page: PageArgs,
}

#[derive(Debug, Args)]
pub(crate) struct OneArgs {
    #[command(flatten)]
    admin: AdminArgs,
    #[command(flatten)]
    object: ObjectArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
enum State {
    Pending,
    /// Due, and not run yet
    Overdue,
    /// Given up
    Dead,
}

#[derive(Serialize)]
struct Parameters<'a> {
    state: State,
    class: Option<&'a str>,
    from: Option<u64>,
    below: Option<u64>,
    limit: u32,
    after: Option<&'a str>,
}

pub(crate) fn main(command: &Command) -> ExitCode {
    process::exit_code("dormouse alarms", run(command).map_err(Into::into))
}

fn run(command: &Command) -> Result<(), AdminError> {
    match command {
        Command::Ls(args) => list(&args.admin, args.state, &args.due),
        Command::Dead(args) => list(&args.admin, State::Dead, &args.due),
        Command::Fire(args) => change(args, Method::POST, "/fire", "due now"),
        Command::Cancel(args) => change(args, Method::DELETE, "", "cancelled"),
        Command::Retry(args) => change(args, Method::POST, "/retry", "due now"),
        Command::Drop(args) => change(args, Method::DELETE, "/dead", "forgotten"),
    }
}

fn list(admin: &AdminArgs, state: State, due: &DueArgs) -> Result<(), AdminError> {
    let parameters = Parameters {
        state,
        class: due.class.as_deref(),
        from: due.from,
        below: due.below,
        limit: due.page.limit,
        after: due.page.after.as_deref(),
    };
    let found = Admin::new(admin).get(&with_parameters("/alarms", &parameters))?;
    if admin.json {
        print_line(&found.to_string());
        return Ok(());
    }
    let rows = found["objects"].as_array().into_iter().flatten();
    if state == State::Dead {
        let cells = |row: &Json| {
            let dead = &row["dead_letter"];
            vec![
                show::text(&row["class"]),
                show::name(row),
                show::time(&dead["scheduled_ms"]),
                show::time(&dead["failed_ms"]),
                show::text(&dead["error"]),
            ]
        };
        let rows: Vec<_> = rows.map(cells).collect();
        let head = ["CLASS", "NAME", "SCHEDULED", "GIVEN UP", "ERROR"];
        print_line(&show::table(&head, &rows));
    } else {
        let cells = |row: &Json| {
            let alarm = &row["alarm"];
            vec![
                show::text(&row["class"]),
                show::name(row),
                show::time(&alarm["next_ms"]),
                show::text(&alarm["retries"]),
            ]
        };
        let rows: Vec<_> = rows.map(cells).collect();
        print_line(&show::table(&["CLASS", "NAME", "DUE", "RETRIES"], &rows));
    }
    if let Some(next) = found["next"].as_str() {
        print_line(&format!("more with --after {next}"));
    }
    Ok(())
}

fn change(args: &OneArgs, method: Method, action: &str, done: &str) -> Result<(), AdminError> {
    let id = args.object.id()?;
    let state = Admin::new(&args.admin).ask(method, &format!("/alarms/{id}{action}"), "")?;
    show::done(args.admin.json, &state, &format!("{id} {done}"));
    Ok(())
}
