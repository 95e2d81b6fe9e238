//! Logs on stderr: a constant message, what varies as fields.

use std::error::Error;
use std::fmt;

use tracing_subscriber::EnvFilter;

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum LogFormat {
    #[default]
    Text,
    Json,
}

/// Starts logging for the whole process. `filter` is a level or a list of `target=level`, as in
/// <https://docs.rs/tracing-subscriber/latest/tracing_subscriber/filter/struct.EnvFilter.html>.
///
/// A panic becomes one `error` line with its place instead of bare text on stderr.
///
/// # Errors
/// When the filter does not parse, or logging was started before.
pub fn start(format: LogFormat, filter: &str) -> Result<(), Box<dyn Error + Send + Sync>> {
    let builder = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::try_new(filter)?)
        .with_writer(std::io::stderr);
    match format {
        LogFormat::Text => builder.with_ansi(false).try_init()?,
        LogFormat::Json => builder.json().flatten_event(true).try_init()?,
    }
    std::panic::set_hook(Box::new(|panic| {
        let message = panic
            .payload_as_str()
            .unwrap_or("a panic whose payload is no text");
        let place = panic.location().map(ToString::to_string);
        tracing::error!(message_of_panic = message, place, "panicked");
    }));
    Ok(())
}

/// An error and its sources, joined with `: `.
pub struct Causes<'a>(pub &'a (dyn Error + 'static));

impl fmt::Display for Causes<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut next = self.0.source();
        while let Some(cause) = next {
            write!(f, ": {cause}")?;
            next = cause.source();
        }
        Ok(())
    }
}
