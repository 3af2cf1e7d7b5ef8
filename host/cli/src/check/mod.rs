// SPDX-License-Identifier: Apache-2.0

//! `portcullis check`: compares this host with the needs of VMs with VFs. It runs without an agent.

mod adapters;
mod machine;
mod placement;

use std::{
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
};

use clap::Args;
use options::{
    assignable::{Assignable, AssignableList},
    user_ids::UserArgs,
};
use serde::Serialize;
use sriov::{FlowControl, Sysfs};

use super::{
    error::CliError,
    output::{Format, Output},
};

#[derive(Debug, Args)]
pub struct CheckArgs {
    /// The directory with the host's dev, etc, proc and sys.
    #[arg(long, value_name = "DIR", default_value = "/")]
    root: PathBuf,
    /// The user ids of VMs' processes: the agent's own options.
    #[command(flatten)]
    users: UserArgs,
    /// A function that VMs may have: as the option of `serve`.
    #[arg(long, value_name = "BDF|VENDOR:DEVICE|PF")]
    assignable: Vec<Assignable>,
}

/// The state of a requirement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Verdict {
    /// Fulfilled.
    Ok,
    /// Some VMs, or some of their settings, will not work.
    Warn,
    /// No VM with a VF can be booted.
    Fail,
}

/// The result of one check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Finding {
    /// The stable name of the check.
    check: &'static str,
    /// The PF, if the check runs for each PF.
    #[serde(skip_serializing_if = "Option::is_none")]
    subject: Option<String>,
    verdict: Verdict,
    /// The fact that the check found.
    found: String,
    /// A command that mends it, run as root, with remarks as the shell's comment; or the cure in words where no command exists.
    #[serde(skip_serializing_if = "Option::is_none")]
    fix: Option<String>,
}

impl Finding {
    fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Finding { check, subject: None, verdict: Verdict::Ok, found: found.into(), fix: None }
    }

    fn wrong(
        verdict: Verdict,
        check: &'static str,
        found: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        Finding { verdict, fix: Some(fix.into()), ..Self::ok(check, found) }
    }

    fn of(self, subject: &str) -> Self {
        Finding { subject: Some(subject.to_owned()), ..self }
    }
}

/// The host's files below a root, and its interfaces.
struct Host {
    root: PathBuf,
    sysfs: Sysfs,
    /// Reads the flow control of an interface; None if its driver has none.
    flow_control: fn(&str) -> io::Result<Option<FlowControl>>,
}

impl Host {
    fn new(root: &Path) -> Self {
        // Another root has files, and no interfaces.
        let flow_control = if root == Path::new("/") { sriov::flow_control } else { |_: &str| Ok(None) };
        Host { root: root.to_owned(), sysfs: Sysfs::new(root.join("sys")), flow_control }
    }

    fn path(&self, relative: &str) -> PathBuf {
        self.root.join(relative)
    }

    /// A file's text, at most 1 MiB of it; None if it cannot be read.
    fn text(&self, relative: &str) -> Option<String> {
        let mut bytes = Vec::new();
        File::open(self.path(relative)).ok()?.take(1 << 20).read_to_end(&mut bytes).ok()?;
        Some(String::from_utf8_lossy(&bytes).trim().to_owned())
    }

    fn number(&self, relative: &str) -> Option<u64> {
        self.text(relative)?.parse().ok()
    }

    fn has(&self, relative: &str) -> bool {
        self.path(relative).exists()
    }

    fn entries(&self, relative: &str) -> usize {
        fs::read_dir(self.path(relative)).map_or(0, Iterator::count)
    }
}

fn examine(host: &Host, users: &UserArgs, assignable: &AssignableList) -> Vec<Finding> {
    let pfs = host.sysfs.pfs();
    // Without an adapter only simulated ones are possible, which need KVM alone.
    let needed = match &pfs {
        Ok(pfs) if pfs.is_empty() => Verdict::Warn,
        _ => Verdict::Fail,
    };
    let mut findings = vec![machine::kvm(host)];
    findings.push(machine::iommu(host, needed));
    findings.push(machine::interrupt_remapping(host, needed));
    findings.push(machine::vfio(host, needed));
    findings.push(machine::memlock(host));
    findings.push(placement::hugepages(host));
    findings.push(placement::giant_pages(host));
    findings.extend(placement::nodes(host, pfs.as_deref().unwrap_or_default()));
    findings.push(placement::nested(host));
    findings.push(placement::counters(host));
    findings.push(machine::control_groups(host));
    findings.push(machine::user_ids(host, users));
    findings.extend(adapters::all(host, pfs));
    findings.extend(adapters::assignable(host, assignable));
    findings
}

pub(super) fn run(args: &CheckArgs, format: Format) -> Result<(), CliError> {
    let findings = examine(&Host::new(&args.root), &args.users, &args.assignable.clone().into());
    let mut stdout = std::io::stdout().lock();
    show(&findings, &mut Output::new(format, &mut stdout))?;
    verdict(&findings)
}

fn verdict(findings: &[Finding]) -> Result<(), CliError> {
    match findings.iter().filter(|finding| finding.verdict == Verdict::Fail).count() {
        0 => Ok(()),
        fails => Err(CliError::Unfit(fails)),
    }
}

fn show(findings: &[Finding], output: &mut Output<'_>) -> Result<(), CliError> {
    let row = |finding: &Finding| {
        let verdict = match finding.verdict {
            Verdict::Ok => "ok",
            Verdict::Warn => "warn",
            Verdict::Fail => "FAIL",
        };
        let subject = finding.subject.as_ref().map(|subject| format!(" {subject}")).unwrap_or_default();
        let fix = finding.fix.as_ref().map(|fix| format!(". Fix: {fix}")).unwrap_or_default();
        [verdict.to_owned(), format!("{}{subject}", finding.check), format!("{}{fix}", finding.found)]
    };
    Ok(output.table(findings, ["", "WHAT", "FOUND"], row)?)
}

#[cfg(test)]
mod tests;
