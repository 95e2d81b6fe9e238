//! The admin listener as a client sees it: one address that administers everything.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use protocol::{ClassName, Colo, Home, ObjectId, ObjectName};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value as Json;
use ureq::http::{Method, Request, Response};
use ureq::{Agent, AsSendBody, Body};

/// How long an answer may take to begin: a database of any size may have to be read before, and checked.
const ANSWER_MAX: Duration = Duration::from_secs(6 * 3600);

/// Bytes of an answer that is not saved in a file; rows of SQL take at most half of it.
const ANSWER_BYTES_MAX: u64 = 64 << 20;

/// Where to ask, and how to show the answer.
#[derive(Debug, Clone, Args)]
pub(crate) struct AdminArgs {
    /// Address of the admin listener of a gateway or a node
    #[arg(
        long,
        global = true,
        env = "DORMOUSE_ADMIN",
        value_name = "URL",
        default_value = "http://127.0.0.1:8081"
    )]
    admin: String,
    /// Bearer token of the admin listener
    #[arg(
        long,
        global = true,
        env = "DORMOUSE_ADMIN_TOKEN",
        value_name = "TOKEN",
        hide_env_values = true
    )]
    admin_token: Option<String>,
    /// Print JSON
    #[arg(long, global = true)]
    pub(crate) json: bool,
}

/// Which part of a listing.
#[derive(Debug, Clone, Args)]
pub(crate) struct PageArgs {
    /// Most rows to list, 1 to 1000
    #[arg(long, default_value_t = 100)]
    pub(crate) limit: u32,
    /// Go on after this cursor, which the page before gave
    #[arg(long, value_name = "CURSOR")]
    pub(crate) after: Option<String>,
}

impl AdminArgs {
    pub(crate) fn url(&self) -> &str {
        &self.admin
    }
}

/// Which objects.
#[derive(Debug, Clone, Args)]
pub(crate) struct Which {
    /// Of this class only
    #[arg(long)]
    pub(crate) class: Option<String>,
    /// With names that begin so
    #[arg(long, default_value = "")]
    pub(crate) prefix: String,
}

/// One object.
#[derive(Debug, Clone, Args)]
pub(crate) struct ObjectArgs {
    /// Its class
    class: ClassName,
    /// Its name, or id: followed by its id
    name: String,
    /// Its colo, if objects of this class have one
    #[arg(long)]
    colo: Option<Colo>,
}

/// Why something did not work.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AdminError {
    /// The other side's own words.
    #[error("{0}")]
    Refused(String),
    #[error("ask {url}")]
    Exchange { url: String, source: ureq::Error },
    #[error("{url} answered what is no JSON")]
    NotJson {
        url: String,
        source: serde_json::Error,
    },
    #[error("file {path}")]
    File { path: PathBuf, source: io::Error },
    #[error("the name or id of an object is not valid")]
    Name(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("{0}")]
    Usage(String),
}

impl ObjectArgs {
    pub(crate) fn id(&self) -> Result<ObjectId, AdminError> {
        let wrong = |error: Box<dyn std::error::Error + Send + Sync>| AdminError::Name(error);
        if let Some(id) = self.name.strip_prefix("id:") {
            let id: ObjectId = id.parse().map_err(|error| wrong(Box::new(error)))?;
            id.check_class(&self.class)
                .map_err(|error| wrong(Box::new(error)))?;
            return Ok(id);
        }
        let name = self.object_name()?;
        let name = name.ok_or_else(|| wrong("it is empty".into()))?;
        Ok(ObjectId::named(&self.class, self.home(), &name))
    }

    /// The name; `None` for an object that is called by its id.
    pub(crate) fn object_name(&self) -> Result<Option<ObjectName>, AdminError> {
        if self.name.starts_with("id:") {
            return Ok(None);
        }
        match self.name.parse::<ObjectName>() {
            Ok(name) => Ok(Some(name)),
            Err(error) => Err(AdminError::Name(Box::new(error))),
        }
    }

    /// Another object of the same class and colo.
    pub(crate) fn sibling(&self, name: &str) -> Self {
        Self {
            name: name.to_owned(),
            ..self.clone()
        }
    }

    fn home(&self) -> Home {
        self.colo.map_or(Home::Global, Home::Colo)
    }
}

/// An admin listener, or the listener that clients use.
pub(crate) struct Admin {
    url: String,
    token: Option<String>,
    agent: Agent,
    /// Sent with every request.
    headers: Vec<(&'static str, String)>,
}

impl Admin {
    pub(crate) fn new(args: &AdminArgs) -> Self {
        Self::at(&args.admin, args.admin_token.clone(), Vec::new())
    }

    /// The listener that clients use.
    pub(crate) fn public(url: &str, headers: Vec<(&'static str, String)>) -> Self {
        Self::at(url, None, headers)
    }

    fn at(url: &str, token: Option<String>, headers: Vec<(&'static str, String)>) -> Self {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .timeout_connect(Some(Duration::from_secs(10)))
            .timeout_recv_response(Some(ANSWER_MAX))
            .build();
        Self {
            url: url.trim_end_matches('/').to_owned(),
            token,
            agent: config.into(),
            headers,
        }
    }

    /// Sends a request; the answer if it is a good one.
    fn send(
        &self,
        method: Method,
        path: &str,
        body: impl AsSendBody,
    ) -> Result<Response<Body>, AdminError> {
        let url = format!("{}{path}", self.url);
        let failed = |source| AdminError::Exchange {
            url: url.clone(),
            source,
        };
        let mut request = Request::builder().method(method).uri(&url);
        if let Some(token) = &self.token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        for (name, value) in &self.headers {
            request = request.header(*name, value);
        }
        let request = request.body(body).map_err(|error| failed(error.into()))?;
        let mut answer = self.agent.run(request).map_err(failed)?;
        if answer.status().is_success() {
            return Ok(answer);
        }
        let status = answer.status();
        let text = answer.body_mut().read_to_string().map_err(failed)?;
        let problem: Option<Json> = serde_json::from_str(&text).ok();
        let detail = problem
            .as_ref()
            .and_then(|problem| problem["detail"].as_str());
        Err(AdminError::Refused(match detail {
            Some(detail) => detail.to_owned(),
            None => format!("{url} answered {status}: {text}"),
        }))
    }

    pub(crate) fn ask(&self, method: Method, path: &str, body: &str) -> Result<Json, AdminError> {
        self.read(method, path, body)
    }

    /// The same, read as what it is known to be.
    pub(crate) fn read<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: &str,
    ) -> Result<T, AdminError> {
        let text = self.text(method, path, body)?;
        serde_json::from_str(&text).map_err(|source| AdminError::NotJson {
            url: format!("{}{path}", self.url),
            source,
        })
    }

    /// The text of an answer.
    pub(crate) fn text(
        &self,
        method: Method,
        path: &str,
        body: &str,
    ) -> Result<String, AdminError> {
        let mut answer = self.send(method, path, body)?;
        let url = format!("{}{path}", self.url);
        let body = answer.body_mut().with_config().limit(ANSWER_BYTES_MAX);
        body.read_to_string()
            .map_err(|source| AdminError::Exchange { url, source })
    }

    pub(crate) fn get(&self, path: &str) -> Result<Json, AdminError> {
        self.ask(Method::GET, path, "")
    }

    /// Asks for what is read piece by piece.
    pub(crate) fn open(&self, path: &str) -> Result<Response<Body>, AdminError> {
        self.send(Method::GET, path, "")
    }

    /// Sends what a reader has.
    pub(crate) fn put(&self, path: &str, mut body: &mut dyn Read) -> Result<(), AdminError> {
        let body = ureq::SendBody::from_reader(&mut body);
        let mut answer = self.send(Method::PUT, path, body)?;
        // Read, so that the connection can be used again.
        let read = answer.body_mut().read_to_string();
        read.map(drop).map_err(|source| AdminError::Exchange {
            url: format!("{}{path}", self.url),
            source,
        })
    }

    /// Saves an answer in a file, which is there whole or not at all.
    pub(crate) fn download(&self, path: &str, file: &Path) -> Result<u64, AdminError> {
        let mut answer = self.send(Method::GET, path, "")?;
        let failed = |source| AdminError::File {
            path: file.to_owned(),
            source,
        };
        let partial = partial_path(file);
        let length = answer.body().content_length();
        let bar = progress(length);
        let mut reader = bar.wrap_read(answer.body_mut().as_reader());
        let copied = (|| {
            let mut out = File::create(&partial)?;
            let bytes = io::copy(&mut reader, &mut out)?;
            if length.is_some_and(|length| length != bytes) {
                return Err(io::Error::other(format!(
                    "the answer broke off after {bytes} bytes"
                )));
            }
            out.flush()?;
            out.sync_all()?;
            std::fs::rename(&partial, file)?;
            Ok(bytes)
        })();
        bar.finish_and_clear();
        copied.map_err(|error| {
            // What is left of it is of no use; that it stays does no harm.
            drop(std::fs::remove_file(&partial));
            failed(error)
        })
    }

    /// Sends a file.
    pub(crate) fn upload(&self, path: &str, file: &Path) -> Result<Json, AdminError> {
        let failed = |source| AdminError::File {
            path: file.to_owned(),
            source,
        };
        let opened = File::open(file).map_err(failed)?;
        let length = opened.metadata().map_err(failed)?.len();
        let bar = progress(Some(length));
        let mut reader: Box<dyn Read> = Box::new(bar.wrap_read(opened));
        let sent = self.send(Method::PUT, path, ureq::SendBody::from_reader(&mut reader));
        bar.finish_and_clear();
        let mut answer = sent?;
        let text = answer.body_mut().read_to_string();
        let text = text.map_err(|source| AdminError::Exchange {
            url: format!("{}{path}", self.url),
            source,
        })?;
        serde_json::from_str(&text).map_err(|source| AdminError::NotJson {
            url: self.url.clone(),
            source,
        })
    }
}

fn partial_path(file: &Path) -> PathBuf {
    let mut name = file.file_name().unwrap_or_default().to_owned();
    name.push(".partial");
    file.with_file_name(name)
}

/// A bar on the terminal, if there is one.
fn progress(length: Option<u64>) -> ProgressBar {
    let style = "{bar:40} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left";
    let bar = length.map_or_else(ProgressBar::new_spinner, ProgressBar::new);
    bar.with_style(ProgressStyle::with_template(style).expect("the template is a legal one"))
}

/// A path with parameters.
pub(crate) fn with_parameters(path: &str, parameters: &impl Serialize) -> String {
    let query = serde_urlencoded::to_string(parameters)
        .expect("texts, numbers and flags always make a query");
    if query.is_empty() {
        path.to_owned()
    } else {
        format!("{path}?{query}")
    }
}
