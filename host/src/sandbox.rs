// SPDX-License-Identifier: Apache-2.0

//! The protections of processes without privileges, and the ones that this host lacks.

use std::{collections::BTreeSet, fs};

use anyhow::bail;
use api::types::Protection;
use protocol::SandboxSpec;
use vmm::sandbox;

/// A value of `serve --sandbox-off`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Off {
    /// A protection.
    Part(Protection),
    /// All protections that this host lacks.
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
            format!("the parts of the sandbox are {known}, or unavailable for all that this host lacks")
        })
    }
}

/// The protections to leave off: the named ones, and with `unavailable` those that this host lacks.
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
                "{why}. An agent with simulated adapters alone can run without it: --sandbox-off {part_name}"
            );
        }
        tracing::warn!("{why}: processes of VMs run without {part_name} (--sandbox-off unavailable)");
        off.insert(part);
    }
    Ok(off)
}

/// The protections that this host lacks, with cause and cure. Namespaces are not checked: to try them
/// takes a process.
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

/// The sandbox of a process: `user` if it has its own, and all protections except those that are `off`.
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
