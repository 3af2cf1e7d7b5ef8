// SPDX-License-Identifier: Apache-2.0

//! Which protections processes get, and what this host has of them.

use std::{collections::BTreeSet, fs};

use anyhow::bail;
use api::types::Protection;
use vmm::{control::SandboxSpec, sandbox};

/// A word of `serve --sandbox-off`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Off {
    /// A protection.
    Part(Protection),
    /// Whatever this host cannot do.
    Unavailable,
}

impl std::str::FromStr for Off {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        if word == "unavailable" {
            return Ok(Self::Unavailable);
        }
        let part = Protection::ALL.into_iter().find(|part| part.as_str() == word);
        part.map(Self::Part).ok_or_else(|| {
            let known = Protection::ALL.map(Protection::as_str).join(", ");
            format!("the parts of the sandbox are {known}, or unavailable for what this host cannot do")
        })
    }
}

/// The protections to leave off: those that were named, which this host may then lack.
///
/// # Errors
/// A protection that the host cannot give and that was not named.
pub fn off(words: &[Off]) -> anyhow::Result<BTreeSet<Protection>> {
    let named: BTreeSet<_> = words
        .iter()
        .filter_map(|word| match word {
            Off::Part(part) => Some(*part),
            Off::Unavailable => None,
        })
        .collect();
    let mut off = named.clone();
    for (part, why) in unavailable().into_iter().filter(|(part, _)| !named.contains(part)) {
        let part_name = part.as_str();
        if !words.contains(&Off::Unavailable) {
            bail!(
                "{why}. An agent that serves simulated adapters alone may do without: --sandbox-off {part_name}"
            );
        }
        tracing::warn!("{why}: processes of VMs run without {part_name} (--sandbox-off unavailable)");
        off.insert(part);
    }
    Ok(off)
}

/// What this host lacks, with cause and cure. Namespaces are not asked for: to try them takes a process.
fn unavailable() -> Vec<(Protection, String)> {
    const ACTIONS: &str = "/proc/sys/kernel/seccomp/actions_avail";
    let mut missing = Vec::new();
    if !fs::read_to_string(ACTIONS).is_ok_and(|actions| actions.contains("kill_process")) {
        let why = format!(
            "The host cannot filter system calls ({ACTIONS} does not list kill_process): it needs a kernel of version \
             4.14 or newer with CONFIG_SECCOMP_FILTER"
        );
        missing.push((Protection::Seccomp, why));
    }
    if let Err(error) = sandbox::landlock_available() {
        missing.push((Protection::Landlock, error.to_string()));
    }
    missing
}

/// What a process becomes: `user` if it is to have its own, and all protections but those that are `off`.
#[must_use]
pub fn spec(user: Option<u32>, off: &[Protection]) -> SandboxSpec {
    let on = |part| !off.contains(&part);
    let user = user.filter(|_| on(Protection::OwnUser));
    SandboxSpec {
        uid: user,
        gid: user,
        limits: on(Protection::Limits),
        namespaces: on(Protection::Namespaces),
        empty_root: on(Protection::EmptyRoot),
        seccomp: on(Protection::Seccomp),
        landlock: on(Protection::Landlock),
    }
}
