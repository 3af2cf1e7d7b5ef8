// SPDX-License-Identifier: Apache-2.0

//! Errors, and the places that were looked at.

use std::{fmt, io, time::Duration};

/// The most places that an error names.
const PLACES: usize = 24;
/// The most characters of a text from the disk in an error or in the log.
const SHOWN: usize = 300;

/// The disk boots no kernel.
#[derive(Debug, thiserror::Error)]
pub enum FindError {
    /// The host's file, or its format, failed a read.
    #[error("The disk cannot be read")]
    Read(#[source] io::Error),
    /// The search would read too much: only a damaged disk needs more.
    #[error("The search for a kernel has read {0} bytes and found none: the disk's file systems are damaged")]
    Budget(u64),
    /// The disk is slow, or one that wants to be.
    #[error(
        "The search for a kernel has taken longer than {0:?}: the disk is too slow, or its file systems are damaged"
    )]
    Late(Duration),
    /// No place has a kernel that can be booted.
    #[error("No kernel was found: {0}")]
    Nothing(Places),
}

/// The places that were looked at, each with the reason for which it boots nothing.
#[derive(Debug, Default)]
pub struct Places {
    listed: Vec<String>,
    more: usize,
}

impl Places {
    pub(crate) fn add(&mut self, place: &str, reason: &impl fmt::Display) {
        if self.listed.len() < PLACES {
            self.listed.push(printable(&format!("{place}: {reason}")));
        } else {
            self.more = self.more.saturating_add(1);
        }
    }
}

impl Places {
    pub(crate) fn is_empty(&self) -> bool {
        self.listed.is_empty()
    }
}

impl fmt::Display for Places {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.listed.join("; "))?;
        if self.more > 0 {
            write!(f, "; and {} more places", self.more)?;
        }
        Ok(())
    }
}

/// The reason for which one place boots nothing.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Fault {
    /// The host's file, or its format, failed a read. Other parts of the disk may be whole.
    #[error("the disk cannot be read ({0})")]
    Read(io::Error),
    /// Ends the whole search.
    #[error("the budget of {0} bytes is used up")]
    Budget(u64),
    /// Ends the whole search.
    #[error("the time to read the disk is over")]
    Late,
    /// A file or directory is not there.
    #[error("there is no {0}")]
    Absent(String),
    /// A structure contradicts itself.
    #[error("the file system is damaged ({0})")]
    Damaged(&'static str),
    /// A feature that this crate does not have.
    #[error("{0} is not supported")]
    Unsupported(String),
    /// A file is longer than its kind may be.
    #[error("{path} has {size} bytes, and at most {most} are possible")]
    TooLarge {
        /// Its path.
        path: String,
        /// Its size in bytes.
        size: u64,
        /// The limit in bytes.
        most: u64,
    },
    /// An entry that cannot be booted, in words.
    #[error("{0}")]
    Entry(String),
}

impl Fault {
    /// Whether it ends the whole search.
    pub(crate) fn is_end(&self) -> bool {
        matches!(self, Self::Budget(_) | Self::Late)
    }

    /// Whether a file or directory is not there, which is no fault of an optional one.
    pub(crate) fn is_absence(&self) -> bool {
        matches!(self, Self::Absent(_))
    }
}

impl From<Fault> for io::Error {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::Read(error) => error,
            late @ Fault::Late => Self::new(io::ErrorKind::TimedOut, late.to_string()),
            other => Self::other(other.to_string()),
        }
    }
}

/// A text of the disk for errors and logs: printable, and not long.
pub(crate) fn printable(text: &str) -> String {
    let plain = |c: char| if c.is_control() { '?' } else { c };
    let mut shown: String = text.chars().take(SHOWN).map(plain).collect();
    if text.chars().nth(SHOWN).is_some() {
        shown.push('…');
    }
    shown
}
