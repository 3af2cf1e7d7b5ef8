// SPDX-License-Identifier: Apache-2.0

//! The report of the demonstration: for people as it happens, for machines at the end.

use std::{io::Write, time::Instant};

use api::types::Decision;
use serde::Serialize;
use serde_json::json;

use super::{
    super::output::{Format, Output, or_dash},
    say,
};

const BOLD: &str = "\x1b[1m";
const GREEN: &str = "\x1b[32m";
const RED: &str = "\x1b[31m";
const FAINT: &str = "\x1b[2m";
const PLAIN: &str = "\x1b[0m";

/// The account of a demonstration.
pub(super) struct Report {
    to: Box<dyn Write>,
    format: Format,
    colour: bool,
    started: Instant,
    steps: Vec<Step>,
    decisions: Vec<Decision>,
    /// The error of a write that failed: the reader is gone.
    broken: Option<std::io::Error>,
}

/// A step with its observations.
#[derive(Debug, Serialize)]
struct Step {
    title: String,
    path: Vec<Stage>,
    checks: Vec<Check>,
}

/// One stage of a request's way.
#[derive(Debug, Serialize)]
struct Stage {
    stage: String,
    what: String,
}

#[derive(Debug, Serialize)]
struct Check {
    what: String,
    expected: String,
    observed: String,
    passed: bool,
}

impl Report {
    pub(super) fn new(to: Box<dyn Write>, format: Format, colour: bool) -> Self {
        let (steps, decisions) = (Vec::new(), Vec::new());
        Self { to, format, colour, started: Instant::now(), steps, decisions, broken: None }
    }

    /// Writes prose before the first step.
    pub(super) fn introduce(&mut self, text: &str) {
        self.tell(&format!("{text}\n"));
    }

    /// Begins a step.
    pub(super) fn step(&mut self, title: &str) {
        let number = self.steps.len() + 1;
        let text = format!("\n{}\n", self.painted(BOLD, &format!("{number}  {title}")));
        self.tell(&text);
        self.steps.push(Step { title: title.to_owned(), path: Vec::new(), checks: Vec::new() });
    }

    /// Reports a stage of a request's way.
    pub(super) fn stage(&mut self, stage: &str, what: String) {
        let text = format!("   {} {what}\n", self.painted(FAINT, &format!("{stage:<8}")));
        self.tell(&text);
        if let Some(step) = self.steps.last_mut() {
            step.path.push(Stage { stage: stage.to_owned(), what });
        }
    }

    /// Compares an observed value with the expected one.
    pub(super) fn check(&mut self, what: &str, expected: &str, observed: &str) {
        let passed = expected == observed;
        let text = if passed {
            format!("   {} {what}: {observed}\n", self.painted(GREEN, "ok      "))
        } else {
            format!("   {} {what}: {observed}, not {expected}\n", self.painted(RED, "FAILED  "))
        };
        self.tell(&text);
        if let Some(step) = self.steps.last_mut() {
            let (expected, observed) = (expected.to_owned(), observed.to_owned());
            step.checks.push(Check { what: what.to_owned(), expected, observed, passed });
        }
    }

    /// Reports the decisions that the agent recorded.
    pub(super) fn decisions(&mut self, decisions: Vec<Decision>) {
        let title = self.painted(BOLD, "Decisions that the agent recorded (/v1/decisions)");
        self.tell(&format!("\n{title}\n"));
        if self.format == Format::Table {
            let mut table = Vec::new();
            let header =
                ["TIME", "VM", "REQUEST", "VALUE", "VERDICT", "REASON", "DECIDED BY", "COMMITTED", "TIMES"];
            if let Err(error) = Output::new(Format::Table, &mut table).table(&decisions, header, row) {
                self.broken = Some(error);
            }
            self.tell(&String::from_utf8_lossy(&table));
        }
        self.decisions = decisions;
    }

    /// The number of checks that did not pass.
    pub(super) fn failures(&self) -> usize {
        self.steps.iter().flat_map(|step| &step.checks).filter(|check| !check.passed).count()
    }

    /// Ends the report. `error` is the reason if the demonstration did not reach its end.
    pub(super) fn end(mut self, error: Option<String>) -> std::io::Result<()> {
        let took = self.started.elapsed();
        match self.format {
            Format::Json | Format::Yaml => {
                let whole = json!({
                    "passed": error.is_none(), "took_ms": u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
                    "error": error, "steps": self.steps, "decisions": self.decisions,
                });
                let text = match self.format {
                    Format::Yaml => yaml_serde::to_string(&whole).map_err(std::io::Error::other)?,
                    _ => format!("{whole:#}\n"),
                };
                say(&mut self.to, &text)?;
            }
            Format::Table if error.is_none() => {
                let checks = self.steps.iter().map(|step| step.checks.len()).sum::<usize>();
                let all = self.painted(GREEN, &format!("All {checks} expectations were met"));
                self.tell(&format!("\n{all} in {:.1} s. Nothing is left behind.\n", took.as_secs_f64()));
            }
            Format::Table => {}
        }
        self.broken.map_or(Ok(()), Err)
    }

    fn tell(&mut self, text: &str) {
        if self.format == Format::Table
            && self.broken.is_none()
            && let Err(error) = say(&mut self.to, text)
        {
            self.broken = Some(error);
        }
    }

    fn painted(&self, paint: &str, text: &str) -> String {
        if self.colour { format!("{paint}{text}{PLAIN}") } else { text.to_owned() }
    }
}

fn row(decision: &Decision) -> [String; 9] {
    let time = decision.last.to_string();
    let clock = time.split_once('T').map_or(time.as_str(), |(_, clock)| clock);
    let by = decision.decided_by.map(|by| format!("{} ({})", by.setting, by.source));
    [
        clock.to_owned(),
        decision.owner.name.clone(),
        decision.request.clone(),
        or_dash(decision.requested.as_ref()),
        word(&decision.verdict),
        decision.reason.as_ref().map_or_else(|| "-".to_owned(), word),
        or_dash(by),
        word(&decision.committed),
        decision.count.to_string(),
    ]
}

/// A value's name on the wire.
pub(super) fn word(value: &impl Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => word,
        Ok(other) => other.to_string(),
        Err(error) => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io,
        sync::{Arc, Mutex},
    };

    use super::*;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn told(format: Format, colour: bool, observed: &str) -> (String, usize) {
        let sink = Sink::default();
        let mut report = Report::new(Box::new(sink.clone()), format, colour);
        report.step("Traffic");
        report.stage("guest", "pings".into());
        report.check("answers", "3", observed);
        let failures = report.failures();
        report.end((failures > 0).then(|| "no".to_owned())).unwrap();
        (String::from_utf8(sink.0.lock().unwrap().clone()).unwrap(), failures)
    }

    #[test]
    fn people_read_it_as_it_happens() {
        let (text, failures) = told(Format::Table, false, "3");
        assert!(text.starts_with("\n1  Traffic\n   guest    pings\n   ok       answers: 3\n"), "{text:?}");
        assert!(text.contains("All 1 expectations were met in ") && failures == 0, "{text:?}");
        let (text, failures) = told(Format::Table, false, "2");
        assert!(text.ends_with("   FAILED   answers: 2, not 3\n") && failures == 1, "{text:?}");
        assert!(told(Format::Table, true, "3").0.contains("\x1b[32mok      \x1b[0m answers"));
    }

    #[test]
    fn machines_get_one_object() {
        for (observed, passed) in [("3", true), ("2", false)] {
            let (text, _) = told(Format::Json, false, observed);
            let whole: serde_json::Value = serde_json::from_str(&text).unwrap();
            assert_eq!(whole["passed"], passed);
            assert_eq!(whole["steps"][0]["checks"][0]["observed"], observed);
            assert_eq!(whole["steps"][0]["path"][0]["stage"], "guest");
        }
    }
}
