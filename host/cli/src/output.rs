// SPDX-License-Identifier: Apache-2.0

//! Output: aligned columns for people, JSON or YAML for scripts.

use std::{
    fmt::Display,
    io::{self, Write},
};

use clap::ValueEnum;
use serde::Serialize;
use text::{is_printable, printable, printable_json, printable_lines};

/// The form of output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Aligned columns, for people.
    Table,
    /// JSON as the API gives it, for scripts.
    Json,
    /// The same as YAML.
    Yaml,
}

/// The destination of output, and its form.
pub struct Output<'a> {
    format: Format,
    to: &'a mut (dyn Write + 'a),
}

impl<'a> Output<'a> {
    /// Output in this form, to this destination.
    pub fn new(format: Format, to: &'a mut (dyn Write + 'a)) -> Self {
        Output { format, to }
    }

    /// Writes a list: as JSON or YAML, or as the rows that `rows` makes of it, under a header.
    pub(super) fn table<T: Serialize, const N: usize>(
        &mut self,
        answer: &[T],
        header: [&str; N],
        row: impl Fn(&T) -> [String; N],
    ) -> io::Result<()> {
        match self.format {
            Format::Json | Format::Yaml => self.structured(answer),
            Format::Table => {
                let mut rows = vec![header.map(str::to_owned)];
                rows.extend(answer.iter().map(row));
                self.to.write_all(aligned(&rows).as_bytes())
            }
        }
    }

    /// Writes one object: as JSON or YAML, or as lines of a name and a value; empty values are left out.
    pub(super) fn object<T: Serialize>(
        &mut self,
        answer: &T,
        lines: impl FnOnce(&T) -> Vec<(String, String)>,
    ) -> io::Result<()> {
        match self.format {
            Format::Json | Format::Yaml => self.structured(answer),
            Format::Table => {
                let lines = lines(answer).into_iter().filter(|(_, value)| !value.is_empty());
                let rows: Vec<_> = lines.map(|(name, value)| [format!("{name}:"), value]).collect();
                self.to.write_all(aligned(&rows).as_bytes())
            }
        }
    }

    /// Writes the header of a table of unknown length; nothing in JSON and YAML.
    pub(super) fn heading<const N: usize>(
        &mut self,
        header: [&str; N],
        widths: [usize; N],
    ) -> io::Result<()> {
        match self.format {
            Format::Json | Format::Yaml => Ok(()),
            Format::Table => self.raw(padded(&header.map(str::to_owned), widths).as_bytes()),
        }
    }

    /// Writes one of a sequence of objects: a line of JSON, a YAML document, or a row with columns at least this wide.
    pub(super) fn entry<T: Serialize, const N: usize>(
        &mut self,
        answer: &T,
        row: [String; N],
        widths: [usize; N],
    ) -> io::Result<()> {
        match self.format {
            Format::Json => {
                let json = serde_json::to_string(answer).map_err(io::Error::other)?;
                self.raw(format!("{}\n", printable_json(&json)).as_bytes())
            }
            Format::Yaml => {
                self.to.write_all(b"---\n")?;
                self.structured(answer)?;
                self.to.flush()
            }
            Format::Table => self.raw(padded(&row.each_ref().map(|cell| printable(cell)), widths).as_bytes()),
        }
    }

    /// Writes bytes unchanged.
    pub(super) fn raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.to.write_all(bytes)?;
        self.to.flush()
    }

    fn structured<T: Serialize + ?Sized>(&mut self, answer: &T) -> io::Result<()> {
        let text = if self.format == Format::Yaml { yaml(answer)? } else { json(answer)? };
        self.to.write_all(text.as_bytes())
    }
}

/// JSON in lines, for terminals and programs.
pub(super) fn json<T: Serialize + ?Sized>(value: &T) -> io::Result<String> {
    let json = serde_json::to_string_pretty(value).map_err(io::Error::other)?;
    Ok(format!("{}\n", printable_json(&json)))
}

/// YAML, for terminals and programs.
pub(super) fn yaml<T: Serialize + ?Sized>(value: &T) -> io::Result<String> {
    // Through JSON: enumerations with a value would become tags, which most readers of YAML refuse.
    let text = serde_json::to_string(value).map_err(io::Error::other)?;
    let plain: yaml_serde::Value = serde_json::from_str(&text).map_err(io::Error::other)?;
    let text = yaml_serde::to_string(&plain).map_err(io::Error::other)?;
    // YAML leaves some control characters unescaped, and the writer has no choice of quotes. JSON is YAML, too.
    if is_printable(&text) { Ok(text) } else { json(value) }
}

/// Rows with columns two blanks apart. Characters that are not printable are escaped: names of kernels and causes of failures
/// can come from guests.
fn aligned<const N: usize>(rows: &[[String; N]]) -> String {
    let rows: Vec<[String; N]> = rows.iter().map(|row| row.each_ref().map(|cell| printable(cell))).collect();
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: [usize; N] = std::array::from_fn(width);
    let mut text = String::new();
    for row in &rows {
        text.push_str(&padded(row, widths));
    }
    text
}

fn padded<const N: usize>(row: &[String; N], widths: [usize; N]) -> String {
    let line: String = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}  ")).collect();
    format!("{}\n", line.trim_end())
}

/// Writes lines for people to stderr, with all characters escaped that control a terminal. The command line writes to stderr by
/// this function alone.
#[allow(clippy::print_stderr, reason = "the one place")]
pub fn warn(text: impl Display) {
    eprintln!("{}", printable_lines(&text.to_string()));
}

/// Writes one line, likewise, on a terminal in raw mode.
#[allow(clippy::print_stderr, reason = "beside the one place")]
pub(super) fn warn_raw(text: impl Display) {
    eprint!("{}\r\n", printable(&text.to_string()));
}

/// The value, or `-` if it is absent.
pub(super) fn or_dash<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_align_and_escapes_are_shown() {
        let rows =
            [["NAME", "STATE"], ["longer-name", "\x1b[2J"], ["a", ""]].map(|row| row.map(str::to_owned));
        assert_eq!(aligned(&rows), "NAME         STATE\nlonger-name  \\u{1b}[2J\na\n");
    }

    #[test]
    fn one_answer_in_each_format() {
        for (format, expect) in
            [(Format::Table, "N\n1\n2\n"), (Format::Json, "[\n  1,\n  2\n]\n"), (Format::Yaml, "- 1\n- 2\n")]
        {
            let mut bytes = Vec::new();
            Output::new(format, &mut bytes).table(&[1, 2], ["N"], |n| [n.to_string()]).unwrap();
            assert_eq!(String::from_utf8(bytes).unwrap(), expect);
        }
    }

    /// A program that reads YAML knows no tags, and `set -f` must accept a file of this output.
    #[test]
    fn yaml_has_no_tags_and_is_read_again() {
        let json = serde_json::json!({"switch": "lab", "settings": {
            "vlan": {"access": {"id": 100}}, "mac_changes": {"list": ["02:00:00:00:00:01"]},
            "rate": {"max_tx_mbit": 100}, "mtu": 1500, "on_denied": "nack"}});
        let group: api::types::PortGroupSpec = serde_json::from_value(json.clone()).unwrap();
        let mut bytes = Vec::new();
        Output::new(Format::Yaml, &mut bytes).object(&group, |_| Vec::new()).unwrap();
        let text = String::from_utf8(bytes).unwrap();
        assert!(!text.contains('!') && text.starts_with("switch: lab"), "{text}");
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("group.yaml");
        std::fs::write(&path, &text).unwrap();
        let again: api::types::PortGroupSpec =
            crate::spec_file::read(path.to_str().unwrap(), "a port group's specification").unwrap();
        assert_eq!(again, group, "{text}");
    }

    /// Files and causes are untrusted texts. JSON escapes C0 alone, YAML shows characters that reorder text.
    #[test]
    fn no_format_controls_the_terminal_and_programs_read_the_same() {
        let hostile = "\x1b[2J\r\nx\x07\x7f\u{85}\u{9b}2J\u{2028}\u{202e}y";
        for format in [Format::Table, Format::Json, Format::Yaml] {
            let mut all = Vec::new();
            let mut output = Output::new(format, &mut all);
            output.object(&hostile, |text| vec![("why".into(), (*text).to_owned())]).unwrap();
            output.table(&[hostile], ["WHY"], |text| [(*text).to_owned()]).unwrap();
            output.entry(&hostile, [hostile.to_owned()], [3]).unwrap();
            let text = String::from_utf8(all).unwrap();
            assert!(is_printable(&text), "{format:?}: {text:?}");
        }
        let read = |text: String| yaml_serde::from_str::<Vec<String>>(&text).unwrap();
        assert_eq!(read(yaml(&[hostile]).unwrap()), [hostile]);
        assert_eq!(serde_json::from_str::<Vec<String>>(&json(&[hostile]).unwrap()).unwrap(), [hostile]);
        assert_eq!(yaml(&["x"]).unwrap(), "- x\n");
    }

    #[test]
    fn what_has_no_end_is_a_line_each() {
        for (format, expect) in
            [(Format::Table, "A    B\nx\\n  y\n"), (Format::Json, "\"x\"\n"), (Format::Yaml, "---\nx\n")]
        {
            let mut bytes = Vec::new();
            let mut output = Output::new(format, &mut bytes);
            output.heading(["A", "B"], [3, 3]).unwrap();
            output.entry(&"x", ["x\n".to_owned(), "y".to_owned()], [3, 3]).unwrap();
            assert_eq!(String::from_utf8(bytes).unwrap(), expect);
        }
    }
}
