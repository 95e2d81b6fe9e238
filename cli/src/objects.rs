//! `dormouse objects` and `dormouse sql`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand, ValueEnum};
use ops::process::{self, print_line};
use protocol::Bookmark;
use serde::Serialize;
use serde_json::{Value as Json, json};
use ureq::http::Method;

use crate::admin::{Admin, AdminArgs, AdminError, ObjectArgs, PageArgs, Which, with_parameters};
use crate::bulk::{self, BulkArgs};
use crate::show;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Lists objects
    Ls(ListArgs),
    /// Shows one object
    Show(OneArgs),
    /// Saves the database of an object as a SQLite file, while the object goes on
    Export(ExportArgs),
    /// Makes a SQLite file the database of an object
    Import(ImportArgs),
    /// Copies an object to another name; the copy has no alarm
    Fork(ForkArgs),
    /// Takes an object back to what it was at a bookmark or a time, also after it was deleted
    Restore(RestoreArgs),
    /// Prints the bookmark of now, to go back to
    Bookmark(BookmarkArgs),
    /// Deletes all data of an object, its alarm included
    Delete(DeleteArgs),
    /// Takes an object out of memory, unless it is busy
    Sleep(OneArgs),
    /// Does the same to many objects
    Bulk(BulkArgs),
}

#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    #[command(flatten)]
    admin: AdminArgs,
    #[command(flatten)]
    which: Which,
    #[arg(long, value_enum, default_value = "name")]
    sort: Sort,
    /// The last first
    #[arg(long)]
    reverse: bool,
    #[command(flatten)]
    page: PageArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
enum Sort {
    Name,
    #[serde(rename = "bytes")]
    Size,
    /// When it was last used, to within an hour
    Used,
    /// When its alarm is due; objects without one are left out
    Alarm,
}

#[derive(Debug, Args)]
pub(crate) struct OneArgs {
    #[command(flatten)]
    admin: AdminArgs,
    #[command(flatten)]
    object: ObjectArgs,
}

#[derive(Debug, Args)]
pub(crate) struct FileArgs {
    #[command(flatten)]
    one: OneArgs,
    /// The SQLite file
    file: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct ExportArgs {
    #[command(flatten)]
    file: FileArgs,
    /// As it was then: a bookmark, or a time (RFC 3339)
    #[arg(long, value_name = "BOOKMARK|TIME", value_parser = show::parse_moment)]
    at: Option<Bookmark>,
}

#[derive(Debug, Args)]
pub(crate) struct RestoreArgs {
    #[command(flatten)]
    one: OneArgs,
    /// A bookmark, or a time (RFC 3339)
    #[arg(long, value_name = "BOOKMARK|TIME", value_parser = show::parse_moment)]
    to: Bookmark,
    /// Kept with the object
    #[arg(long, default_value = "")]
    who: String,
    #[arg(long, default_value = "")]
    why: String,
}

#[derive(Debug, Args)]
pub(crate) struct BookmarkArgs {
    #[command(flatten)]
    one: OneArgs,
    /// Of this time (RFC 3339), if the object can be restored to it
    #[arg(long, value_name = "TIME", value_parser = show::parse_moment)]
    at: Option<Bookmark>,
}

#[derive(Debug, Args)]
pub(crate) struct ImportArgs {
    #[command(flatten)]
    file: FileArgs,
    /// Replace an object that exists
    #[arg(long)]
    replace: bool,
    /// Leave out the alarm that the file may have
    #[arg(long)]
    without_alarm: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ForkArgs {
    #[command(flatten)]
    one: OneArgs,
    /// Name of the copy, or id: followed by its id
    new: String,
    /// As it was then: a bookmark, or a time (RFC 3339)
    #[arg(long, value_name = "BOOKMARK|TIME", value_parser = show::parse_moment)]
    at: Option<Bookmark>,
    /// Replace an object that exists
    #[arg(long)]
    replace: bool,
}

#[derive(Debug, Args)]
pub(crate) struct DeleteArgs {
    #[command(flatten)]
    one: OneArgs,
    /// Yes, delete it
    #[arg(long)]
    yes: bool,
}

#[derive(Debug, Args)]
pub(crate) struct SqlArgs {
    #[command(flatten)]
    one: OneArgs,
    /// One or several statements
    sql: String,
    /// Values of the last statement's parameters, each JSON, or a text if it is none
    params: Vec<String>,
    /// Allow the SQL to write; --who and --why are kept with the object
    #[arg(long, requires_all = ["who", "why"])]
    write: bool,
    #[arg(long, default_value = "")]
    who: String,
    #[arg(long, default_value = "")]
    why: String,
}

#[derive(Serialize)]
struct ListParameters<'a> {
    class: Option<&'a str>,
    prefix: &'a str,
    order: Sort,
    descending: bool,
    limit: u32,
    after: Option<&'a str>,
}

#[derive(Serialize)]
struct ImportParameters<'a> {
    name: Option<&'a str>,
    replace: bool,
    alarm: &'static str,
}

pub(crate) fn main(command: &Command) -> ExitCode {
    process::exit_code("dormouse objects", run(command).map_err(Into::into))
}

pub(crate) fn main_sql(args: &SqlArgs) -> ExitCode {
    process::exit_code("dormouse sql", sql(args).map_err(Into::into))
}

fn run(command: &Command) -> Result<(), AdminError> {
    match command {
        Command::Ls(args) => list(args),
        Command::Show(args) => show_one(args),
        Command::Export(args) => export(args),
        Command::Import(args) => import(args),
        Command::Fork(args) => fork(args),
        Command::Restore(args) => restore(args),
        Command::Bookmark(args) => bookmark(args),
        Command::Delete(args) => delete(args),
        Command::Sleep(args) => sleep(args),
        Command::Bulk(args) => bulk::run(args),
    }
}

fn list(args: &ListArgs) -> Result<(), AdminError> {
    let parameters = ListParameters {
        class: args.which.class.as_deref(),
        prefix: &args.which.prefix,
        order: args.sort,
        descending: args.reverse,
        limit: args.page.limit,
        after: args.page.after.as_deref(),
    };
    let found = Admin::new(&args.admin).get(&with_parameters("/objects", &parameters))?;
    if args.admin.json {
        print_line(&found.to_string());
        return Ok(());
    }
    let cells = |row: &Json| {
        vec![
            show::text(&row["class"]),
            show::name(row),
            show::bytes(&row["bytes"]),
            show::time(&row["used_ms"]),
            show::time(&row["alarm"]["next_ms"]),
        ]
    };
    let rows: Vec<_> = found["objects"]
        .as_array()
        .into_iter()
        .flatten()
        .map(cells)
        .collect();
    print_line(&show::table(
        &["CLASS", "NAME", "SIZE", "USED", "ALARM"],
        &rows,
    ));
    if let Some(next) = found["next"].as_str() {
        print_line(&format!("more with --after {next}"));
    }
    Ok(())
}

fn show_one(args: &OneArgs) -> Result<(), AdminError> {
    let id = args.object.id()?;
    let found = Admin::new(&args.admin).get(&format!("/objects/{id}"))?;
    if args.admin.json {
        print_line(&found.to_string());
        return Ok(());
    }
    let mut rows = vec![
        ("class", show::text(&found["class"])),
        ("name", show::text(&found["name"])),
        ("id", show::text(&found["id"])),
        ("shard", show::text(&found["shard"])),
        ("size", show::bytes(&found["bytes"])),
        ("awake", show::text(&found["awake"])),
        ("created", show::time(&found["created_ms"])),
        ("used", show::time(&found["used_ms"])),
        ("alarm", show::time(&found["alarm"]["next_ms"])),
    ];
    if let Some(dead) = found["dead_letter"].as_object() {
        let dead = format!(
            "{} {}",
            show::time(&dead["failed_ms"]),
            show::text(&dead["error"])
        );
        rows.push(("given up", dead));
    }
    for operation in found["operations"].as_array().into_iter().flatten() {
        let said = format!(
            "{} {} by {}: {} ({})",
            show::time(&operation["at_ms"]),
            show::text(&operation["what"]),
            show::text(&operation["who"]),
            show::text(&operation["why"]),
            show::text(&operation["detail"]),
        );
        rows.push(("operation", said));
    }
    for (what, value) in rows {
        print_line(&format!("{what:10}{value}"));
    }
    Ok(())
}

fn export(args: &ExportArgs) -> Result<(), AdminError> {
    let FileArgs { one, file } = &args.file;
    let id = one.object.id()?;
    let path = with_parameters(&format!("/objects/{id}/export"), &At::new(args.at));
    let bytes = Admin::new(&one.admin).download(&path, file)?;
    let done = json!({ "id": id.to_string(), "bytes": bytes });
    let said = format!("{bytes} bytes in {}", file.display());
    show::done(one.admin.json, &done, &said);
    Ok(())
}

fn restore(args: &RestoreArgs) -> Result<(), AdminError> {
    let id = args.one.object.id()?;
    let body = json!({ "bookmark": args.to.to_string(), "who": args.who, "why": args.why });
    let admin = Admin::new(&args.one.admin);
    let path = format!("/objects/{id}/restore");
    let done = admin.ask(Method::POST, &path, &body.to_string())?;
    let said = match done["changed"].as_bool() {
        Some(false) => format!("{id} has not changed since"),
        _ => format!(
            "{id} restored; undo with --to {}",
            show::text(&done["undo"])
        ),
    };
    show::done(args.one.admin.json, &done, &said);
    Ok(())
}

fn bookmark(args: &BookmarkArgs) -> Result<(), AdminError> {
    let id = args.one.object.id()?;
    let path = with_parameters(&format!("/objects/{id}/bookmark"), &At::new(args.at));
    let found = Admin::new(&args.one.admin).get(&path)?;
    show::done(args.one.admin.json, &found, &show::text(&found["bookmark"]));
    Ok(())
}

/// A moment as a parameter.
#[derive(Serialize)]
struct At {
    bookmark: Option<String>,
}

impl At {
    fn new(at: Option<Bookmark>) -> Self {
        let bookmark = at.map(|at| at.to_string());
        Self { bookmark }
    }
}

fn import(args: &ImportArgs) -> Result<(), AdminError> {
    let one = &args.file.one;
    let id = one.object.id()?;
    let name = one.object.object_name()?;
    let parameters = ImportParameters {
        name: name.as_ref().map(|name| name.as_str()),
        replace: args.replace,
        alarm: if args.without_alarm { "drop" } else { "keep" },
    };
    let path = with_parameters(&format!("/objects/{id}/import"), &parameters);
    let done = Admin::new(&one.admin).upload(&path, &args.file.file)?;
    show::done(
        one.admin.json,
        &done,
        &format!("{id} imported, {} bytes", show::text(&done["bytes"])),
    );
    Ok(())
}

fn fork(args: &ForkArgs) -> Result<(), AdminError> {
    let from = args.one.object.id()?;
    let copy = args.one.object.sibling(&args.new);
    let to = copy.id()?;
    let name = copy.object_name()?;
    let body = json!({
        "to": to.to_string(),
        "name": name.as_ref().map(|name| name.as_str()),
        "replace": args.replace,
        "bookmark": args.at.map(|at| at.to_string()),
    });
    let admin = Admin::new(&args.one.admin);
    let path = format!("/objects/{from}/fork");
    let done = admin.ask(Method::POST, &path, &body.to_string())?;
    show::done(
        args.one.admin.json,
        &done,
        &format!("{from} copied to {to}"),
    );
    Ok(())
}

fn delete(args: &DeleteArgs) -> Result<(), AdminError> {
    let id = args.one.object.id()?;
    if !args.yes {
        return Err(AdminError::Usage(format!(
            "deleting {id} takes all its data: say --yes if you mean it"
        )));
    }
    let done = Admin::new(&args.one.admin).ask(Method::DELETE, &format!("/objects/{id}"), "")?;
    show::done(args.one.admin.json, &done, &format!("{id} deleted"));
    Ok(())
}

fn sleep(args: &OneArgs) -> Result<(), AdminError> {
    let id = args.object.id()?;
    let path = format!("/objects/{id}/sleep");
    let done = Admin::new(&args.admin).ask(Method::POST, &path, "")?;
    let said = if done["awake"] == true {
        "is busy and stays awake"
    } else {
        "sleeps"
    };
    show::done(args.admin.json, &done, &format!("{id} {said}"));
    Ok(())
}

fn sql(args: &SqlArgs) -> Result<(), AdminError> {
    let id = args.one.object.id()?;
    let params = args.params.iter().map(|param| {
        let json = serde_json::from_str(param);
        json.unwrap_or_else(|_| Json::String(param.clone()))
    });
    let body = json!({
        "sql": args.sql,
        "params": params.collect::<Vec<Json>>(),
        "write": args.write,
        "who": args.who,
        "why": args.why,
    });
    let admin = Admin::new(&args.one.admin);
    let path = format!("/objects/{id}/sql");
    let found = admin.ask(Method::POST, &path, &body.to_string())?;
    if args.one.admin.json {
        print_line(&found.to_string());
        return Ok(());
    }
    let columns = found["columns"].as_array();
    let columns: Vec<String> = columns.into_iter().flatten().map(show::text).collect();
    if columns.is_empty() {
        print_line(&format!(
            "{} rows written",
            show::text(&found["rows_written"])
        ));
        return Ok(());
    }
    let rows = found["rows"].as_array().into_iter().flatten();
    let cells = |row: &Json| {
        row.as_array()
            .into_iter()
            .flatten()
            .map(show::text)
            .collect()
    };
    let rows: Vec<Vec<String>> = rows.map(cells).collect();
    let head: Vec<&str> = columns.iter().map(String::as_str).collect();
    print_line(&show::table(&head, &rows));
    Ok(())
}
