// SPDX-License-Identifier: Apache-2.0

//! Objects that do not exist: the message, with names that the caller may have meant.

use std::{borrow::Cow, collections::BTreeSet, fmt};

/// An object that does not exist. Its text is a whole message: near names, and the command that lists the existing objects.
///
/// Callers supply the existing names. Every caller of the API may list those, so that a near name discloses nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    kind: Cow<'static, str>,
    name: String,
    near: Vec<String>,
}

/// The most near names in a message.
const MOST_NEAR: usize = 3;

/// The most names to compare: a message is worth no more work.
const MOST_NAMES: usize = 10_000;

/// The longest name to compare, in bytes: a port's, with VM and adapter.
const LONGEST: usize = 127;

/// The most characters of a name in a message.
const SHOWN: usize = 80;

impl Missing {
    /// An object of this kind (`VM`, `port group`) and name, without near names.
    pub fn new(kind: impl Into<Cow<'static, str>>, name: impl fmt::Display) -> Self {
        Missing { kind: kind.into(), name: name.to_string(), near: Vec::new() }
    }

    /// An object of this kind and name, with near names among the existing ones.
    pub fn among<N: AsRef<str>>(
        kind: impl Into<Cow<'static, str>>,
        name: impl fmt::Display,
        names: impl IntoIterator<Item = N>,
    ) -> Self {
        let missing = Missing::new(kind, name);
        let near = near(&missing.name, names);
        Missing { near, ..missing }
    }

    /// The command that lists objects of the kind.
    fn list(&self) -> Option<&'static str> {
        Some(match &*self.kind {
            "VM" => "portcullis vm list",
            "PF" => "portcullis pf list",
            "VF" => "portcullis vf list",
            "switch" => "portcullis switch list",
            "port group" => "portcullis port-group list",
            "port" => "portcullis port list",
            _ => return None,
        })
    }
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "There is no {} {}", self.kind, shown(&self.name))?;
        match (self.near.is_empty(), self.list()) {
            (true, None) => Ok(()),
            (true, Some(list)) => write!(f, ": `{list}` shows those that exist"),
            (false, None) => write!(f, ": did you mean {}?", or(&self.near)),
            (false, Some(list)) => write!(f, ": did you mean {}? `{list}` shows all", or(&self.near)),
        }
    }
}

/// Names as a choice: `a`, `a or b`, `a, b or c`.
pub fn or(names: &[String]) -> String {
    let names: Vec<_> = names.iter().map(|name| shown(name)).collect();
    match names.split_last() {
        Some((last, [])) => last.clone(),
        Some((last, others)) => format!("{} or {last}", others.join(", ")),
        None => String::new(),
    }
}

/// A name for a message: printable, and not longer than a line.
fn shown(name: &str) -> String {
    netpolicy::clipped(name, SHOWN).escape_debug().to_string()
}

/// The names nearest to `name`: at most three, the nearest first. A near name differs in case, by at most two edits, or, as a
/// VM's ports do, by a slash and more behind it. The work is linear in the number of names.
pub fn near<N: AsRef<str>>(name: &str, names: impl IntoIterator<Item = N>) -> Vec<String> {
    if name.is_empty() || name.len() > LONGEST {
        return Vec::new();
    }
    let wanted = name.to_lowercase();
    let most = match wanted.chars().count() {
        1 => 0,
        2..=4 => 1,
        _ => 2,
    };
    let mut nearest: BTreeSet<(usize, String)> = BTreeSet::new();
    for other in names.into_iter().take(MOST_NAMES) {
        let other = other.as_ref();
        if other.len() > LONGEST {
            continue;
        }
        let lower = other.to_lowercase();
        let below = lower.strip_prefix(&wanted).is_some_and(|rest| rest.starts_with('/'));
        let distance = if below { Some(0) } else { distance(&wanted, &lower, most) };
        if let Some(distance) = distance {
            nearest.insert((distance, other.to_owned()));
            if nearest.len() > MOST_NEAR {
                nearest.pop_last();
            }
        }
    }
    nearest.into_iter().map(|(_, name)| name).collect()
}

/// The number of edits from one text to the other; None if there are more than `most`. An edit inserts, deletes or replaces a
/// character, or swaps two neighbours.
fn distance(from: &str, to: &str, most: usize) -> Option<usize> {
    let (from, to): (Vec<char>, Vec<char>) = (from.chars().collect(), to.chars().collect());
    if from.len().abs_diff(to.len()) > most {
        return None;
    }
    let at = |row: &[usize], n: usize| row.get(n).copied().unwrap_or(usize::MAX / 2);
    let mut before: Vec<usize> = Vec::new();
    let mut last: Vec<usize> = (0..=to.len()).collect();
    for (n, char) in from.iter().enumerate() {
        let mut row = vec![n + 1];
        for (m, other) in to.iter().enumerate() {
            let mut edits = at(&last, m) + usize::from(char != other);
            edits = edits.min(at(&last, m + 1) + 1).min(at(&row, m) + 1);
            let neighbours = n > 0 && m > 0 && from.get(n - 1) == Some(other) && to.get(m - 1) == Some(char);
            if neighbours {
                edits = edits.min(at(&before, m - 1) + 1);
            }
            row.push(edits);
        }
        if row.iter().min().is_some_and(|least| *least > most) {
            return None;
        }
        (before, last) = (last, row);
    }
    last.last().copied().filter(|edits| *edits <= most)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_names_are_those_that_a_slip_of_the_finger_leads_from() {
        let names = ["web1", "web2", "db", "a", "frontend", "web1/eth0", "Web9"];
        for (name, expect) in [
            ("web3", vec!["Web9", "web1", "web2"]),
            ("wbe1", vec!["web1"]),
            ("WEB1", vec!["web1", "web1/eth0", "Web9"]),
            ("fronted", vec!["frontend"]),
            ("front", vec![]),
            ("A", vec!["a"]),
            ("b", vec![]),
            ("dc", vec!["db"]),
            ("", vec![]),
            ("web1/eth1", vec!["web1/eth0"]),
        ] {
            assert_eq!(near(name, names), expect, "{name}");
        }
        assert_eq!(near("web1", ["web1/eth0", "web1/eth1", "web10/eth0"]), ["web1/eth0", "web1/eth1"]);
    }

    #[test]
    fn a_message_has_name_near_names_and_command() {
        let text = |kind, name: &str, names: &[&str]| Missing::among(kind, name, names).to_string();
        assert_eq!(
            text("VM", "web3", &["web1", "web2", "db"]),
            "There is no VM web3: did you mean web1 or web2? `portcullis vm list` shows all"
        );
        assert_eq!(
            text("port group", "x", &["web"]),
            "There is no port group x: `portcullis port-group list` shows those that exist"
        );
        assert_eq!(text("record", "x", &[]), "There is no record x");
        let long = text("PF", &"e\x1b".repeat(4000), &["eth0"]);
        assert!(long.len() < 600 && long.contains('…') && !long.contains('\x1b'), "{long}");
        let hostile = text("PF", "eth1", &["eth\u{7}"]);
        assert!(hostile.contains("eth\\u{7}"), "{hostile}");
    }

    /// Long names and many names cost little, although the caller bounds neither.
    #[test]
    fn the_work_is_bounded() {
        let names = (0..1_000_000).map(|n| {
            assert!(n < MOST_NAMES, "only so many are looked at");
            format!("{n:0>120}")
        });
        assert_eq!(near(&"9".repeat(120), names), Vec::<String>::new());
        assert!(near(&"9".repeat(1 << 20), ["9".repeat(1 << 20)]).is_empty());
    }

    proptest::proptest! {
        // At most four bytes a character: no name is too long to compare.
        #[test]
        fn no_name_panics_and_each_is_near_to_itself(name in ".{1,31}", other in ".{0,60}") {
            let _ = Missing::among("VM", &name, [&other]).to_string();
            proptest::prop_assert!(near(&name, [&name]).contains(&name));
        }
    }
}
