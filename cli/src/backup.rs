//! `dormouse backup`: all objects of a cluster or a node, kept elsewhere and brought back.

mod repository;

use std::io::{self, BufRead, BufReader, Read};
use std::process::ExitCode;
use std::sync::Mutex;
use std::time::Duration;

use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use ops::Causes;
use ops::process::{self, print_line};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::admin::{Admin, AdminArgs, AdminError, with_parameters};
use crate::show;
use repository::{Entry, Repository, RepositoryError, Summary, Writer};

/// Times that a stream may break off before its backup is given up.
const BREAKS_MAX: u32 = 10;

/// Before a stream that broke off is asked for again.
const PAUSE: Duration = Duration::from_secs(1);

/// Bytes of a line of a stream: an id, a class and a name, escaped.
const LINE_BYTES_MAX: u64 = 64 << 10;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Saves the databases of all objects, each as of one commit, while they go on. What has not changed since
    /// the backup before is not copied again
    Create(CreateArgs),
    /// Lists backups
    Ls(PlaceArgs),
    /// Reads a backup and compares every database with its checksum
    Verify(ReadArgs),
    /// Brings objects back, to a cluster that has none of them
    Restore(RestoreArgs),
    /// Removes old backups
    Prune(PruneArgs),
}

#[derive(Debug, Args)]
pub(crate) struct PlaceArgs {
    /// Where the backups are
    location: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    #[command(flatten)]
    admin: AdminArgs,
    /// A directory, or s3://bucket/prefix with access as AWS_ACCESS_KEY_ID and others say
    location: String,
    /// Copy every object, changed or not
    #[arg(long)]
    full: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ReadArgs {
    #[command(flatten)]
    place: PlaceArgs,
    /// Which one; the latest if not given
    #[arg(long)]
    backup: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct RestoreArgs {
    #[command(flatten)]
    admin: AdminArgs,
    /// Where the backups are
    location: String,
    /// Which one; the latest if not given
    #[arg(long)]
    backup: Option<String>,
    /// Objects of this class only
    #[arg(long)]
    class: Option<String>,
    /// The object of this name only
    #[arg(long)]
    name: Option<String>,
    /// Replace objects that exist
    #[arg(long)]
    replace: bool,
    /// Objects that are brought back at once
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u8).range(1..=64))]
    jobs: u8,
}

#[derive(Debug, Args)]
pub(crate) struct PruneArgs {
    #[command(flatten)]
    place: PlaceArgs,
    /// Backups to keep, the latest
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    keep: u32,
}

/// Why a backup was not made or read.
#[derive(Debug, thiserror::Error)]
enum BackupError {
    #[error(transparent)]
    Admin(#[from] AdminError),
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    #[error("the stream of part {part} broke off {BREAKS_MAX} times")]
    Broken { part: u64, source: io::Error },
    #[error("part {part} sent what is no backup: {line:?}")]
    Foreign { part: u64, line: String },
    #[error("{0}")]
    Usage(String),
    #[error(
        "the backup {name} lacks {failed} objects that could not be read, the first one: {first}"
    )]
    Lacks {
        name: String,
        failed: u64,
        first: String,
    },
    #[error("{failed} of {all} objects failed, the first one: {first}")]
    Some {
        failed: u64,
        all: u64,
        first: String,
    },
}

/// A line of a worker's stream.
#[derive(Debug, Deserialize)]
struct Line {
    began_ms: Option<u64>,
    object: Option<Object>,
    cursor: Option<String>,
    error: Option<String>,
    bookmark: Option<String>,
    bytes: Option<u64>,
    #[serde(default)]
    end: bool,
}

#[derive(Debug, Deserialize)]
struct Object {
    id: String,
    class: String,
    name: Option<String>,
}

#[derive(Serialize)]
struct StreamParameters<'a> {
    since_ms: Option<u64>,
    after: Option<&'a str>,
}

pub(crate) fn main(command: &Command) -> ExitCode {
    process::exit_code("dormouse backup", run(command).map_err(Into::into))
}

fn run(command: &Command) -> Result<(), BackupError> {
    match command {
        Command::Create(args) => create(args),
        Command::Ls(args) => list(args),
        Command::Verify(args) => verify(args),
        Command::Restore(args) => restore(args),
        Command::Prune(args) => prune(args),
    }
}

fn create(args: &CreateArgs) -> Result<(), BackupError> {
    let admin = Admin::new(&args.admin);
    let repository = Repository::open(&args.location)?;
    let previous = if args.full {
        None
    } else {
        repository.summaries()?.pop()
    };
    let entries = match &previous {
        Some(summary) => repository.entries(summary)?,
        None => Vec::new(),
    };
    let parts = admin.get("/backup")?["parts"].as_u64().unwrap_or(0);
    let parent = previous.as_ref().map(|summary| summary.name.as_str());
    let mut writer = Writer::new(&repository, parent, entries)?;
    let bar = spinner();
    let since_ms = previous.as_ref().map(|summary| summary.began_ms);
    for part in 0..parts {
        save(&admin, part, since_ms, &mut writer, &bar)?;
    }
    bar.finish_and_clear();
    let unread = std::mem::take(&mut writer.unread);
    let made = writer.finish()?;
    let said = format!(
        "{}: {} objects, {}; {} of them, {}, since the backup before",
        made.name,
        made.objects,
        show::bytes(&made.bytes.into()),
        made.new_objects,
        show::bytes(&made.new_bytes.into()),
    );
    show::done(args.admin.json, &json!(made), &said);
    match unread.first() {
        None => Ok(()),
        Some(first) => Err(BackupError::Lacks {
            name: made.name,
            failed: unread.len() as u64,
            first: first.clone(),
        }),
    }
}

/// Saves all objects of one worker.
fn save(
    admin: &Admin,
    part: u64,
    since_ms: Option<u64>,
    writer: &mut Writer<'_>,
    bar: &ProgressBar,
) -> Result<(), BackupError> {
    let mut after: Option<String> = None;
    let mut breaks = 0;
    loop {
        let parameters = StreamParameters {
            since_ms,
            after: after.as_deref(),
        };
        let path = with_parameters(&format!("/backup/{part}"), &parameters);
        let before = after.clone();
        let broke = match admin.open(&path) {
            Ok(mut answer) => {
                let mut stream = BufReader::with_capacity(256 << 10, answer.body_mut().as_reader());
                match save_stream(admin, part, &mut stream, &mut after, writer, bar)? {
                    None => return Ok(()),
                    Some(error) => error,
                }
            }
            // A node that starts again, perhaps.
            Err(error) if breaks > 0 || after.is_some() => io::Error::other(error),
            Err(error) => return Err(error.into()),
        };
        if after != before {
            breaks = 0;
        }
        breaks += 1;
        if breaks > BREAKS_MAX {
            return Err(BackupError::Broken {
                part,
                source: broke,
            });
        }
        std::thread::park_timeout(PAUSE);
    }
}

/// Saves what a stream has, up to its end, or to where it broke off and why.
fn save_stream(
    admin: &Admin,
    part: u64,
    stream: &mut impl BufRead,
    after: &mut Option<String>,
    writer: &mut Writer<'_>,
    bar: &ProgressBar,
) -> Result<Option<io::Error>, BackupError> {
    let mut text = String::new();
    loop {
        text.clear();
        match stream.take(LINE_BYTES_MAX).read_line(&mut text) {
            Ok(0) => return Ok(Some(io::ErrorKind::UnexpectedEof.into())),
            Ok(_) => {}
            Err(error) => return Ok(Some(error)),
        }
        let foreign = || BackupError::Foreign {
            part,
            line: text.chars().take(200).collect(),
        };
        let line: Line = serde_json::from_str(&text).map_err(|_| foreign())?;
        if let Some(began_ms) = line.began_ms {
            let began = &mut writer.summary.began_ms;
            *began = began_ms.min(*began);
            continue;
        }
        if line.end {
            return Ok(None);
        }
        let object = line.object.ok_or_else(foreign)?;
        if let Some(error) = line.error {
            writer.unread.push(format!("object {}: {error}", object.id));
            *after = line.cursor;
            continue;
        }
        let mut entry = Entry {
            id: object.id,
            class: object.class,
            name: object.name,
            bookmark: line.bookmark.unwrap_or_default(),
            file: String::new(),
            offset: 0,
            bytes: 0,
            crc32c: 0,
        };
        match line.bytes {
            Some(bytes) => {
                entry.bytes = bytes;
                match writer.add(entry, stream) {
                    // What was begun of it in the pack is overwritten by nobody, and listed by nobody.
                    Err(RepositoryError::File(error)) => return Ok(Some(error)),
                    added => added?,
                }
            }
            None if writer.unchanged(&entry.id)? => {}
            None => {
                // Older than the backup before, which does not have it.
                let mut answer = admin.open(&format!("/objects/{}/export", entry.id))?;
                let length = answer.body().content_length();
                entry.bytes = length.ok_or_else(foreign)?;
                writer.add(entry, &mut answer.body_mut().as_reader())?;
            }
        }
        *after = line.cursor;
        bar.set_message(format!(
            "{} objects, {}",
            writer.summary.objects,
            show::bytes(&writer.summary.bytes.into())
        ));
        bar.tick();
    }
}

fn list(args: &PlaceArgs) -> Result<(), BackupError> {
    let found = Repository::open_existing(&args.location)?.summaries()?;
    if args.json {
        print_line(&json!({ "backups": found }).to_string());
        return Ok(());
    }
    let cells = |summary: &Summary| {
        vec![
            summary.name.clone(),
            show::time(&summary.began_ms.into()),
            summary.objects.to_string(),
            show::bytes(&summary.bytes.into()),
            summary.new_objects.to_string(),
            show::bytes(&summary.new_bytes.into()),
        ]
    };
    let rows: Vec<Vec<String>> = found.iter().map(cells).collect();
    let head = ["BACKUP", "AS OF", "OBJECTS", "SIZE", "NEW", "NEW SIZE"];
    print_line(&show::table(&head, &rows));
    Ok(())
}

fn verify(args: &ReadArgs) -> Result<(), BackupError> {
    let repository = Repository::open_existing(&args.place.location)?;
    let summary = repository.find(args.backup.as_deref())?;
    let entries = repository.entries(&summary)?;
    let progress = Progress::new(entries.len() as u64);
    for file in by_file(&entries) {
        let read = repository.read(file.iter().copied(), |_, read| {
            progress.count(read.map(drop).map_err(|error| Causes(&error).to_string()));
        });
        if let Err(error) = read {
            progress.fail(file.len() as u64, &Causes(&error).to_string());
        }
    }
    progress.end()?;
    let done =
        json!({ "backup": summary.name, "objects": summary.objects, "bytes": summary.bytes });
    let said = format!(
        "{}: {} objects are as they were",
        summary.name, summary.objects
    );
    show::done(args.place.json, &done, &said);
    Ok(())
}

fn restore(args: &RestoreArgs) -> Result<(), BackupError> {
    let admin = Admin::new(&args.admin);
    let repository = Repository::open_existing(&args.location)?;
    let summary = repository.find(args.backup.as_deref())?;
    let wanted = |entry: &Entry| {
        let of_class = args
            .class
            .as_ref()
            .is_none_or(|class| *class == entry.class);
        of_class && (args.name.is_none() || args.name == entry.name)
    };
    let mut entries = repository.entries(&summary)?;
    entries.retain(wanted);
    if entries.is_empty() {
        let what = format!("backup {} has no such object", summary.name);
        return Err(BackupError::Usage(what));
    }
    let all = args.class.is_none() && args.name.is_none();
    if all && !args.replace {
        let found = admin.get("/objects?limit=1")?;
        if found["objects"]
            .as_array()
            .is_some_and(|found| !found.is_empty())
        {
            return Err(BackupError::Usage(
                "there are objects already: a restore wants none, or --replace, and what the backup has then \
                 takes the place of what is there"
                    .to_owned(),
            ));
        }
    }
    let progress = Progress::new(entries.len() as u64);
    let files = Mutex::new(by_file(&entries).into_iter());
    std::thread::scope(|scope| {
        for _ in 0..args.jobs {
            scope.spawn(|| {
                loop {
                    let file = files.lock().ok().and_then(|mut files| files.next());
                    let Some(file) = file else { return };
                    let read = repository.read(file.iter().copied(), |entry, read| {
                        let put = read
                            .map_err(BackupError::from)
                            .and_then(|database| put(&admin, entry, database, args.replace));
                        progress.count(
                            put.map_err(|error| format!("object {}: {}", entry.id, Causes(&error))),
                        );
                    });
                    if let Err(error) = read {
                        progress.fail(file.len() as u64, &Causes(&error).to_string());
                    }
                }
            });
        }
    });
    progress.end()?;
    let done = json!({ "backup": summary.name, "objects": entries.len() });
    let said = format!(
        "{} objects of backup {} are back",
        entries.len(),
        summary.name
    );
    show::done(args.admin.json, &done, &said);
    Ok(())
}

#[derive(Serialize)]
struct ImportParameters<'a> {
    name: Option<&'a str>,
    replace: bool,
}

fn put(
    admin: &Admin,
    entry: &Entry,
    mut database: impl Read,
    replace: bool,
) -> Result<(), BackupError> {
    let parameters = ImportParameters {
        name: entry.name.as_deref(),
        replace,
    };
    let path = with_parameters(&format!("/objects/{}/import", entry.id), &parameters);
    admin.put(&path, &mut database)?;
    Ok(())
}

fn prune(args: &PruneArgs) -> Result<(), BackupError> {
    let repository = Repository::open_existing(&args.place.location)?;
    let gone = repository.prune(args.keep as usize)?;
    let said = match gone.as_slice() {
        [] => "there are no more than that".to_owned(),
        gone => format!("removed {}", gone.join(", ")),
    };
    show::done(args.place.json, &json!({ "removed": gone }), &said);
    Ok(())
}

/// Entries of the same file side by side.
fn by_file(entries: &[Entry]) -> Vec<Vec<&Entry>> {
    let mut sorted: Vec<&Entry> = entries.iter().collect();
    sorted.sort_by(|left, right| (&left.file, left.offset).cmp(&(&right.file, right.offset)));
    let files = sorted.chunk_by(|left, right| left.file == right.file);
    files.map(<[&Entry]>::to_vec).collect()
}

/// What became of many objects, and a bar for it.
struct Progress {
    bar: ProgressBar,
    all: u64,
    failed: Mutex<(u64, Option<String>)>,
}

impl Progress {
    fn new(all: u64) -> Self {
        let style = "{bar:40} {pos} of {len} objects, {per_sec}, {eta} left";
        let style = ProgressStyle::with_template(style).expect("the template is a legal one");
        Self {
            bar: ProgressBar::new(all).with_style(style),
            all,
            failed: Mutex::default(),
        }
    }

    fn count(&self, done: Result<(), String>) {
        if let Err(error) = done {
            self.fail(1, &error);
        } else {
            self.bar.inc(1);
        }
    }

    fn fail(&self, count: u64, error: &str) {
        self.bar.inc(count);
        if let Ok(mut failed) = self.failed.lock() {
            failed.0 += count;
            failed.1.get_or_insert_with(|| error.to_owned());
        }
    }

    fn end(&self) -> Result<(), BackupError> {
        self.bar.finish_and_clear();
        match &*self.failed.lock().expect("no thread panics with it") {
            (_, None) => Ok(()),
            (failed, Some(first)) => Err(BackupError::Some {
                failed: *failed,
                all: self.all,
                first: first.clone(),
            }),
        }
    }
}

fn spinner() -> ProgressBar {
    let style = ProgressStyle::with_template("{spinner} {msg}, {elapsed}");
    ProgressBar::new_spinner().with_style(style.expect("the template is a legal one"))
}
