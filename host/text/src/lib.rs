// SPDX-License-Identifier: Apache-2.0

//! Text from outside: of files, of requests, of vmm processes. Where it is printed it could move a cursor, retitle a terminal or
//! begin a line that looks like the agent's own.

mod chain;

use std::fmt::{self, Write as _};

pub use chain::chain;

/// Most characters of one text in a line of the log.
const LONGEST: usize = 2000;

/// Whether a terminal or a viewer of logs acts on this character in place of showing it.
///
/// These are the control characters C0, DEL and C1, of which U+009B begins a sequence as ESC [ does; the separators of lines and
/// paragraphs; and the controls of the bidirectional algorithm (Unicode, UAX #9), which show a line in another order than it has.
#[must_use]
pub fn is_active(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Text in one line: [active](is_active) characters, ends of lines among them, are escaped.
#[must_use]
pub fn printable(text: &str) -> String {
    escaped(text, is_active)
}

/// Text in lines: active characters but ends of lines are escaped.
#[must_use]
pub fn printable_lines(text: &str) -> String {
    escaped(text, |c| is_active(c) && c != '\n')
}

/// JSON with the same meaning, in which active characters are escaped. JSON itself demands that of C0 alone. Ends of lines stay,
/// since they are not parts of strings.
#[must_use]
pub fn printable_json(json: &str) -> String {
    let mut escaped = String::with_capacity(json.len());
    for c in json.chars() {
        if is_active(c) && c != '\n' {
            // All of them have four hexadecimal digits at most. Writing to a string does not fail.
            let _ = write!(escaped, "\\u{:04x}", u32::from(c));
        } else {
            escaped.push(c);
        }
    }
    escaped
}

/// Whether text in lines has active characters.
#[must_use]
pub fn is_printable(text: &str) -> bool {
    !text.contains(|c| is_active(c) && c != '\n')
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
///
/// # Errors
/// Those of `out`.
pub fn write_line(out: &mut dyn fmt::Write, value: fmt::Arguments<'_>) -> fmt::Result {
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
                    _ if is_active(c) => write!(self.out, "{}", c.escape_default())?,
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
    fn nothing_shows_a_line_in_another_order() {
        let text = "a\u{202e}b\u{2066}c\u{2028}d";
        let escaped = "a\\u{202e}b\\u{2066}c\\u{2028}d";
        assert_eq!(printable(text), escaped);
        assert_eq!(printable_lines(text), escaped);
        assert_eq!(printable(&netpolicy::clipped(text, 2)), "a\\u{202e}…");
        let mut line = String::new();
        write_line(&mut line, format_args!("{text}")).unwrap();
        assert_eq!(line, escaped);
        // Scripts that are written from right to left need none of them.
        assert_eq!(printable("שלום e\u{301} 👩\u{200d}🚀"), "שלום e\u{301} 👩\u{200d}🚀");
    }

    #[test]
    fn escaped_json_has_the_same_meaning() {
        let all: String = (0..0x3000).filter_map(char::from_u32).collect();
        let json = serde_json::to_string_pretty(&[all.as_str()]).unwrap();
        assert!(!is_printable(&json));
        let escaped = printable_json(&json);
        assert!(is_printable(&escaped));
        assert_eq!(serde_json::from_str::<[String; 1]>(&escaped).unwrap(), [all]);
    }

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
