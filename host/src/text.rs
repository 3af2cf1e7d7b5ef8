// SPDX-License-Identifier: Apache-2.0

//! Text from outside: of files, of requests, of vmm processes. Where it is printed it could move a cursor, retitle a terminal or
//! begin a line that looks like the agent's own.

use std::fmt::{self, Write as _};

/// Most characters of one text in a line of the log.
const LONGEST: usize = 2000;

/// Text in one line: control characters, ends of lines among them, are escaped.
#[must_use]
pub fn printable(text: &str) -> String {
    escaped(text, char::is_control)
}

/// Text in lines: control characters but ends of lines are escaped.
#[must_use]
pub fn printable_lines(text: &str) -> String {
    escaped(text, |c| c.is_control() && c != '\n')
}

fn escaped(text: &str, must: impl Fn(char) -> bool) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        if must(c) {
            escaped.extend(c.escape_default());
        } else {
            escaped.push(c);
        }
    }
    escaped
}

/// Writes a value in one line that is not too long, whatever it contains.
pub(crate) fn write_line(out: &mut dyn fmt::Write, value: fmt::Arguments<'_>) -> fmt::Result {
    struct OneLine<'a> {
        out: &'a mut dyn fmt::Write,
        left: usize,
    }

    impl fmt::Write for OneLine<'_> {
        fn write_str(&mut self, text: &str) -> fmt::Result {
            for c in text.chars() {
                match self.left {
                    0 => return Ok(()),
                    1 => self.out.write_char('…')?,
                    _ if c.is_control() => write!(self.out, "{}", c.escape_default())?,
                    _ => self.out.write_char(c)?,
                }
                self.left -= 1;
            }
            Ok(())
        }
    }

    OneLine { out, left: LONGEST }.write_fmt(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_moves_the_cursor_or_begins_a_line() {
        let text = "a\x1b]0;title\x07\r\n\u{9b}2Jä";
        assert_eq!(printable(text), "a\\u{1b}]0;title\\u{7}\\r\\n\\u{9b}2Jä");
        assert_eq!(printable_lines(text), "a\\u{1b}]0;title\\u{7}\\r\n\\u{9b}2Jä");
        let mut line = String::new();
        write_line(&mut line, format_args!("{}{}", text, "x".repeat(10 * LONGEST))).unwrap();
        assert!(!line.contains(char::is_control) && line.ends_with("x…"), "{line}");
        assert!(line.len() < 2 * LONGEST);
    }
}
