// SPDX-License-Identifier: Apache-2.0

//! The agent's log: lines of text or JSON on stderr, for people, files and the journal.
//!
//! systemd connects a service's stderr to its journal and says so in `JOURNAL_STREAM`. The journal has a time of its
//! own and takes each line's priority from its beginning (`<6>`, sd-daemon(3)).

use std::{
    fmt,
    io::{self, IsTerminal as _},
};

use text::{printable_json, write_line};
use tracing::{Event, Level, Subscriber, field::Field};
use tracing_subscriber::{
    EnvFilter,
    field::MakeExt as _,
    filter::LevelFilter,
    fmt::{
        FmtContext, FormatEvent, FormatFields,
        format::{self, Writer},
    },
    registry::LookupSpan,
};

/// The format of lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// For people.
    Text,
    /// For programs: an object each, with the request's id in `span`.
    Json,
}

/// Starts the log of this process. `PORTCULLIS_LOG` selects its lines (`debug`, `switch=debug,info`),
/// by the names of crates.
pub fn start(format: Format) {
    let filter = EnvFilter::builder()
        .with_env_var("PORTCULLIS_LOG")
        .with_default_directive(LevelFilter::INFO.into())
        .from_env_lossy();
    let stream = std::env::var("JOURNAL_STREAM").ok();
    let journal = stream.is_some_and(|stream| is_stderr(&stream));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .fmt_fields(format::debug_fn(write_field).delimited(" "))
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal() && !journal);
    // In a test there may be one already.
    drop(match (format, journal) {
        (Format::Text, false) => log.with_target(false).try_init(),
        (Format::Text, true) => log.event_format(journal_text()).try_init(),
        (Format::Json, false) => {
            log.json().event_format(Escaped(format::format().json().with_target(false))).try_init()
        }
        (Format::Json, true) => log.json().event_format(Prioritized(journal_json())).try_init(),
    });
}

/// Writes a field in a line of text. An event is one line for any content of its fields.
fn write_field(writer: &mut Writer<'_>, field: &Field, value: &dyn fmt::Debug) -> fmt::Result {
    if field.name() != "message" {
        write!(writer, "{}=", field.name())?;
    }
    write_line(writer, format_args!("{value:?}"))
}

/// Lines of text in the format of the journal.
fn journal_text() -> Prioritized<format::Format<format::Full, ()>> {
    Prioritized(format::format().without_time().with_level(false).with_target(false).with_ansi(false))
}

/// Lines of JSON in the format of the journal.
fn journal_json() -> Escaped<format::Format<format::Json, ()>> {
    Escaped(format::format().json().without_time().with_target(false))
}

/// Lines of JSON in which characters are escaped that a terminal acts on: JSON itself escapes C0 alone.
struct Escaped<F>(F);

impl<S, N, F> FormatEvent<S, N> for Escaped<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut line = String::new();
        self.0.format_event(context, Writer::new(&mut line), event)?;
        writer.write_str(&printable_json(&line))
    }
}

/// Whether stderr is this stream, `DEVICE:INODE` (systemd.exec(5)). The variable is inherited and does not show a later
/// redirection.
fn is_stderr(stream: &str) -> bool {
    let Ok(stat) = rustix::fs::fstat(io::stderr()) else { return false };
    stream == format!("{}:{}", stat.st_dev, stat.st_ino)
}

/// Lines with their priority before them.
struct Prioritized<F>(F);

impl<S, N, F> FormatEvent<S, N> for Prioritized<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        write!(writer, "<{}>", priority(*event.metadata().level()))?;
        self.0.format_event(context, writer, event)
    }
}

/// The priority that syslog(3) has for a level.
fn priority(level: Level) -> u8 {
    match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        _ => 7,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use text::is_printable;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn lines_for_the_journal_have_their_priority_and_no_time() {
        let lines = Lines::default();
        let writer = lines.clone();
        let log = tracing_subscriber::fmt()
            .with_ansi(false)
            .with_max_level(Level::TRACE)
            .with_writer(move || writer.clone())
            .event_format(journal_text())
            .fmt_fields(format::debug_fn(write_field).delimited(" "))
            .finish();
        tracing::subscriber::with_default(log, || {
            tracing::error_span!("request", id = "r-1").in_scope(|| tracing::error!(vm = "web1", "it broke"));
            tracing::warn!("odd");
            tracing::info!("well");
            tracing::debug!("inside");
            let forged = "no\n<6>policy changed by uid 0\x1b[2J";
            tracing::info!(%forged, forged, "{forged}");
        });
        let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
        let expect = "<3>request{id=\"r-1\"}: it broke vm=\"web1\"\n<4>odd\n<6>well\n<7>inside\n";
        let line = "no\\n<6>policy changed by uid 0\\u{1b}[2J";
        let expect = format!("{expect}<6>{line} forged={line} forged=\"{line}\"\n");
        assert_eq!(text, expect);
    }

    #[test]
    fn lines_of_json_control_no_terminal() {
        let lines = Lines::default();
        let writer = lines.clone();
        let log =
            tracing_subscriber::fmt().json().with_writer(move || writer.clone()).event_format(journal_json());
        let hostile = "x\x1b[2J\u{9b}2J\x7f\u{202e}\ny";
        tracing::subscriber::with_default(log.finish(), || {
            tracing::error_span!("request", id = hostile).in_scope(|| tracing::warn!(hostile, "{hostile}"));
        });
        let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
        assert!(is_printable(&text) && text.lines().count() == 1, "{text:?}");
        let line: serde_json::Value = serde_json::from_str(&text).unwrap();
        let said = [&line["fields"]["message"], &line["fields"]["hostile"], &line["span"]["id"]];
        assert_eq!(said, [hostile; 3]);
    }

    #[test]
    fn the_journal_is_told_from_what_stderr_was_redirected_to() {
        let stat = rustix::fs::fstat(io::stderr()).unwrap();
        assert!(is_stderr(&format!("{}:{}", stat.st_dev, stat.st_ino)));
        assert!(!is_stderr(&format!("{}:{}", stat.st_dev, stat.st_ino + 1)));
        assert!(!is_stderr(""));
    }
}
