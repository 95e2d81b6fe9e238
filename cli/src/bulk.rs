//! `dormouse objects bulk`: one action for many objects, at a rate that others do not feel, with a file that
//! says what became of each. Run again with the same file, it goes on where it stopped.

use std::collections::{HashMap, HashSet};
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::num::NonZeroU32;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use ops::Causes;
use protocol::Bookmark;
use serde::{Deserialize, Serialize};
use serde_json::{Value as Json, json};
use shard_node::clock::{Clock, SystemClock, monotonic_nanos};
use ureq::http::Method;

use crate::admin::{Admin, AdminArgs, AdminError, Which, with_parameters};
use crate::show;

/// Objects asked for at once.
const PAGE: u32 = 500;

#[derive(Debug, Args)]
pub(crate) struct BulkArgs {
    #[command(flatten)]
    admin: AdminArgs,
    #[command(flatten)]
    which: Which,
    /// That nobody used for so long, such as 30days (known to within an hour)
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    unused_for: Option<Duration>,
    /// Most objects per second
    #[arg(long, default_value = "100")]
    rate: NonZeroU32,
    /// What became of each object goes here, a line of JSON each
    #[arg(long, value_name = "FILE")]
    outcome: PathBuf,
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Deletes all data of each, its alarm included
    Delete {
        /// Yes, delete them
        #[arg(long)]
        yes: bool,
    },
    /// Saves the database of each in a directory
    Export { directory: PathBuf },
    /// Takes each out of memory, unless it is busy
    Sleep,
    /// Runs SQL in each; what it changed can be taken back with undo
    Sql {
        sql: String,
        /// Allow the SQL to write
        #[arg(long, requires_all = ["who", "why"])]
        write: bool,
        #[arg(long, default_value = "")]
        who: String,
        #[arg(long, default_value = "")]
        why: String,
    },
    /// Takes each back to what it was
    Restore {
        /// A bookmark, or a time (RFC 3339)
        #[arg(long, value_name = "BOOKMARK|TIME", value_parser = show::parse_moment)]
        to: Bookmark,
        #[arg(long, default_value = "")]
        who: String,
        #[arg(long, default_value = "")]
        why: String,
    },
    /// Takes back what an earlier bulk action did to its objects, by its outcome file
    Undo {
        /// The outcome file of that action
        of: PathBuf,
        #[arg(long, default_value = "")]
        who: String,
        #[arg(long, default_value = "")]
        why: String,
    },
}

/// A line of an outcome file.
#[derive(Debug, Serialize, Deserialize)]
struct Outcome {
    id: String,
    class: String,
    name: Option<String>,
    done: bool,
    /// The answer, or the error.
    detail: Json,
}

/// The first line: what the file is of.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Head {
    action: String,
}

/// An object, as listings name it.
#[derive(Debug, Clone, Deserialize)]
struct Object {
    id: String,
    class: String,
    name: Option<String>,
}

#[derive(Serialize)]
struct ListParameters<'a> {
    class: Option<&'a str>,
    prefix: &'a str,
    order: &'static str,
    below: Option<u64>,
    limit: u32,
    after: Option<&'a str>,
}

pub(crate) fn run(args: &BulkArgs) -> Result<(), AdminError> {
    if let Action::Delete { yes: false } = args.action {
        return Err(AdminError::Usage(
            "deleting takes all data of every object that is found: say --yes if you mean it"
                .to_owned(),
        ));
    }
    let head = Head {
        action: format!(
            "{:?} class {:?} prefix {:?} unused for {:?} at {}",
            args.action,
            args.which.class,
            args.which.prefix,
            args.unused_for,
            args.admin.url()
        ),
    };
    let (mut outcome, known) = open(&args.outcome, &head)?;
    let admin = Admin::new(&args.admin);
    let style = ProgressStyle::with_template("{spinner} {pos} objects, {per_sec}, {msg}");
    let bar = ProgressBar::new_spinner().with_style(style.expect("the template is a legal one"));
    let mut pace = Pace::new(args.rate);
    let (mut done, mut failed) = (0u64, 0u64);
    let mut perform = |object: &Object, undo: Option<&str>| -> Result<(), AdminError> {
        if known.contains(&object.id) {
            return Ok(());
        }
        pace.wait();
        let performed = perform(&admin, &args.action, object, undo);
        match &performed {
            Ok(_) => done += 1,
            Err(_) => failed += 1,
        }
        bar.set_message(format!("{failed} failed"));
        bar.inc(1);
        let line = Outcome {
            id: object.id.clone(),
            class: object.class.clone(),
            name: object.name.clone(),
            done: performed.is_ok(),
            detail: performed.unwrap_or_else(|error| Causes(&error).to_string().into()),
        };
        write_line(&mut outcome, &line).map_err(|source| file_error(&args.outcome, source))
    };
    match &args.action {
        Action::Undo { of, .. } => {
            for (object, undo) in undone(of)? {
                perform(&object, Some(&undo))?;
            }
        }
        _ => each(&admin, args, |object| perform(object, None))?,
    }
    bar.finish_and_clear();
    let summary = json!({ "done": done, "failed": failed, "before": known.len() });
    let said = format!(
        "{done} objects done, {failed} failed, {} done before; see {}",
        known.len(),
        args.outcome.display()
    );
    show::done(args.admin.json, &summary, &said);
    if failed > 0 {
        return Err(AdminError::Usage(format!(
            "{failed} objects failed; the same command tries them again"
        )));
    }
    Ok(())
}

/// Every object that is asked for.
fn each(
    admin: &Admin,
    args: &BulkArgs,
    mut perform: impl FnMut(&Object) -> Result<(), AdminError>,
) -> Result<(), AdminError> {
    let below = args.unused_for.map(|time| {
        let millis = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        SystemClock.unix_millis().saturating_sub(millis)
    });
    let mut after: Option<String> = None;
    loop {
        let parameters = ListParameters {
            class: args.which.class.as_deref(),
            prefix: &args.which.prefix,
            order: if below.is_some() { "used" } else { "name" },
            below,
            limit: PAGE,
            after: after.as_deref(),
        };
        let page = admin.get(&with_parameters("/objects", &parameters))?;
        let objects = serde_json::from_value::<Vec<Object>>(page["objects"].clone());
        let objects = objects.map_err(|source| AdminError::NotJson {
            url: "/objects".to_owned(),
            source,
        })?;
        for object in &objects {
            perform(object)?;
        }
        match page["next"].as_str() {
            Some(next) => after = Some(next.to_owned()),
            None => return Ok(()),
        }
    }
}

fn perform(
    admin: &Admin,
    action: &Action,
    object: &Object,
    undo: Option<&str>,
) -> Result<Json, AdminError> {
    let path = format!("/objects/{}", object.id);
    let post = |what: &str, body: &Json| {
        admin.ask(Method::POST, &format!("{path}/{what}"), &body.to_string())
    };
    match action {
        Action::Delete { .. } => admin.ask(Method::DELETE, &path, ""),
        Action::Export { directory } => {
            let file = directory.join(format!("{}-{}.db", object.class, object.id));
            let bytes = admin.download(&format!("{path}/export"), &file)?;
            Ok(json!({ "file": file, "bytes": bytes }))
        }
        Action::Sleep => post("sleep", &json!({})),
        Action::Sql {
            sql,
            write,
            who,
            why,
        } => post(
            "sql",
            &json!({ "sql": sql, "write": write, "who": who, "why": why }),
        ),
        Action::Restore { to, who, why } => {
            let body = json!({ "bookmark": to.to_string(), "who": who, "why": why });
            post("restore", &body)
        }
        Action::Undo { who, why, .. } => post(
            "restore",
            &json!({ "bookmark": undo, "who": who, "why": why }),
        ),
    }
}

/// What an earlier action did, and the way back.
fn undone(path: &Path) -> Result<Vec<(Object, String)>, AdminError> {
    let file = File::open(path).map_err(|source| file_error(path, source))?;
    // Of several tries the first one that did anything knows the way back to before all.
    let mut order = Vec::new();
    let mut found: HashMap<String, String> = HashMap::new();
    for line in lines(BufReader::new(file)).map_err(|source| file_error(path, source))? {
        let changed = line.detail["changed"] != Json::Bool(false);
        let Some(undo) = line.detail["undo"]
            .as_str()
            .filter(|_| line.done && changed)
        else {
            continue;
        };
        if !found.contains_key(&line.id) {
            found.insert(line.id.clone(), undo.to_owned());
            order.push(Object {
                id: line.id,
                class: line.class,
                name: line.name,
            });
        }
    }
    if order.is_empty() {
        return Err(AdminError::Usage(format!(
            "{} has nothing that can be taken back: only sql --write and restore leave a way back",
            path.display()
        )));
    }
    let with_undo = order.into_iter().map(|object| {
        let undo = found[&object.id].clone();
        (object, undo)
    });
    Ok(with_undo.collect())
}

/// Opens an outcome file, or begins one; which objects are done.
fn open(path: &Path, head: &Head) -> Result<(File, HashSet<String>), AdminError> {
    let failed = |source| file_error(path, source);
    let mut options = OpenOptions::new();
    let mut file = options
        .read(true)
        .append(true)
        .create(true)
        .open(path)
        .map_err(failed)?;
    if file.metadata().map_err(failed)?.len() == 0 {
        write_line(&mut file, head).map_err(failed)?;
        return Ok((file, HashSet::new()));
    }
    let mut first = String::new();
    let mut reader = BufReader::new(&file);
    reader.read_line(&mut first).map_err(failed)?;
    if serde_json::from_str::<Head>(&first).ok().as_ref() != Some(head) {
        return Err(AdminError::Usage(format!(
            "{} is the outcome of another action: {}",
            path.display(),
            first.trim()
        )));
    }
    end_last_line(&mut &file).map_err(failed)?;
    let done = lines(reader).map_err(failed)?.into_iter();
    let done = done.filter(|line| line.done).map(|line| line.id).collect();
    Ok((file, done))
}

/// All outcomes. A line that broke off, when the command was killed, is of an object that is tried again.
fn lines(file: impl BufRead) -> io::Result<Vec<Outcome>> {
    let mut found = Vec::new();
    for line in file.lines() {
        let line = line?;
        if line.is_empty() || serde_json::from_str::<Head>(&line).is_ok() {
            continue;
        }
        match serde_json::from_str(&line) {
            Ok(outcome) => found.push(outcome),
            Err(error) if error.is_eof() => {}
            Err(error) => return Err(io::Error::other(format!("{line:?}: {error}"))),
        }
    }
    Ok(found)
}

/// What is written next begins a line of its own.
fn end_last_line(file: &mut &File) -> io::Result<()> {
    let mut last = [b'\n'];
    let length = file.metadata()?.len();
    if length > 0 {
        file.read_exact_at(&mut last, length - 1)?;
    }
    if last != [b'\n'] {
        file.write_all(b"\n")?;
    }
    Ok(())
}

fn write_line(file: &mut File, line: &impl Serialize) -> io::Result<()> {
    let mut text = serde_json::to_vec(line)?;
    text.push(b'\n');
    file.write_all(&text)
}

fn file_error(path: &Path, source: io::Error) -> AdminError {
    AdminError::File {
        path: path.to_owned(),
        source,
    }
}

/// Lets so many pass per second.
struct Pace {
    every: Duration,
    begun: Duration,
    passed: u32,
}

impl Pace {
    fn new(rate: NonZeroU32) -> Self {
        Self {
            every: Duration::from_secs(1) / rate.get(),
            begun: Duration::from_nanos(monotonic_nanos()),
            passed: 0,
        }
    }

    fn wait(&mut self) {
        let due = self.begun + self.every * self.passed;
        self.passed += 1;
        let now = Duration::from_nanos(monotonic_nanos());
        if let Some(pause) = due.checked_sub(now) {
            std::thread::park_timeout(pause);
        } else if self.passed > 1 {
            // What was slow is not made up for at once.
            self.begun = now;
            self.passed = 1;
        }
    }
}
