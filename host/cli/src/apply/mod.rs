// SPDX-License-Identifier: Apache-2.0

//! `portcullis apply`: makes switches, port groups and VMs as files describe them.

mod addresses;
mod diff;
mod files;

use std::{cell::Cell, collections::BTreeSet};

use api::{
    Client, ClientError, Missing, Problem, ProblemCode,
    types::{Name, VmState},
};
use clap::Args;
use serde::Serialize;

use super::{
    error::CliError,
    output::Output,
    progress::{self, Doing},
};
use addresses::Addresses;
use diff::{Difference, differences};
use files::Wanted;

#[derive(Debug, Args)]
pub struct ApplyArgs {
    /// A file, or a directory with .toml, .yaml, .yml and .json files; may be repeated. A file is
    /// the specification of a VM or, with `object` (`switch` or `port_group`) and `name`, of a
    /// switch or port group.
    #[arg(long = "file", short, value_name = "DIR", required = true)]
    files: Vec<String>,
    /// Shows the objects to create and change, and changes nothing. Fails as apply would: a change
    /// of a VM that is not stopped is `blocked`, except of `restart`, `autostart`, `cloud_init`, `credentials` and the `limits` of disks, and no two
    /// VMs may have the same address (exit code 5).
    #[arg(long)]
    dry_run: bool,
}

/// The action on an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Action {
    Create,
    Change,
    /// A change that the VM's state does not allow.
    Blocked,
    /// Equal but for texts that answers hide: only the agent can compare them, when it gets the specification.
    Compare,
    Unchanged,
}

/// The step for a file.
#[derive(Debug, Serialize)]
struct Step {
    action: Action,
    kind: &'static str,
    name: String,
    file: String,
    /// The differences from the existing object; none for a new one.
    changes: Vec<Difference>,
    #[serde(skip)]
    wanted: Wanted,
    /// The revision of the existing object.
    #[serde(skip)]
    revision: Option<u64>,
    /// The state of the existing VM.
    #[serde(skip)]
    state: Option<VmState>,
    /// The expected refusal of the agent: a reference to an object that does not exist and that no file creates, or an address
    /// that another VM has.
    #[serde(skip)]
    refusal: Option<Problem>,
}

pub(super) async fn run(client: &Client, output: &mut Output<'_>, args: ApplyArgs) -> Result<(), CliError> {
    let mut steps = plan(client, files::read_all(&args.files)?).await?;
    let possible = possible(&steps);
    if args.dry_run {
        show(output, &steps)?;
        return possible;
    }
    if possible.is_err() {
        // All or nothing: do not make a part.
        show(output, &[])?;
        return possible;
    }
    let at = Cell::new(0);
    let files: Vec<String> = steps.iter().map(|step| step.file.clone()).collect();
    let file = || files.get(at.get()).cloned().unwrap_or_default();
    let doing = async || Doing {
        what: format!("applying {}", file()),
        step: Some((at.get().saturating_add(1), files.len())),
    };
    if let Err(error) = progress::during(make_all(client, &mut steps, &at), doing).await {
        // Objects made before the failure stay: show them.
        show(output, steps.get(..at.get()).unwrap_or_default())?;
        return Err(CliError::Apply { file: file(), source: Box::new(error.into()) });
    }
    show(output, &steps)
}

/// Checks that no known obstacle is in the way of a step.
fn possible(steps: &[Step]) -> Result<(), CliError> {
    for step in steps {
        let Some(refusal) = &step.refusal else { continue };
        let source = Box::new(ClientError::from(Box::new(refusal.clone())).into());
        return Err(CliError::Apply { file: step.file.clone(), source });
    }
    let mut blocked = steps.iter().filter(|step| step.action == Action::Blocked);
    let Some(Step { name, file, state, .. }) = blocked.next() else { return Ok(()) };
    let state = state.map_or("not stopped", VmState::as_str);
    let more = match blocked.count() {
        0 => "",
        _ => " Other VMs block changes, too: see --dry-run.",
    };
    // In the words of the agent's own refusal.
    let detail = format!(
        "The VM {name} is {state}, so only restart, autostart, cloud_init, credentials and limits of disks can change: \
         stop it first (`portcullis vm stop {name}`). Nothing was changed.{more}"
    );
    let problem = Box::new(Problem::new(ProblemCode::WrongState, detail));
    Err(CliError::Apply { file: file.clone(), source: Box::new(ClientError::from(problem).into()) })
}

fn show(output: &mut Output<'_>, steps: &[Step]) -> Result<(), CliError> {
    let row = |step: &Step| {
        let action = match step.action {
            Action::Create => "create",
            Action::Change => "change",
            Action::Blocked => "blocked",
            Action::Compare => "compare",
            Action::Unchanged => "-",
        };
        let changes: Vec<String> = step.changes.iter().map(ToString::to_string).collect();
        let kind = step.kind.replace('_', " ");
        [action.to_owned(), kind, step.name.clone(), step.file.clone(), changes.join(", ")]
    };
    Ok(output.table(steps, ["ACTION", "KIND", "NAME", "FILE", "CHANGES"], row)?)
}

/// The names that files can refer to: existing objects, and those that the files create.
struct Names {
    switches: BTreeSet<Name>,
    groups: BTreeSet<Name>,
}

impl Names {
    fn lacks(&self, wanted: &Wanted) -> Option<Problem> {
        let problem = |code, missing: Missing| {
            let detail =
                format!("{missing}. No file has it: create it, or correct the name. Nothing was changed.");
            Problem::new(code, detail)
        };
        match wanted {
            Wanted::Switch(..) => None,
            Wanted::PortGroup(_, spec) => {
                let names = self.switches.iter().map(Name::as_str);
                let missing = || Missing::among("switch", &spec.switch, names);
                (!self.switches.contains(&spec.switch))
                    .then(|| problem(ProblemCode::SwitchNotFound, missing()))
            }
            Wanted::Vm(spec) => {
                let mut named = spec.ports().filter_map(|port| port.port_group);
                let name = named.find(|name| !self.groups.contains(*name))?;
                let names = self.groups.iter().map(Name::as_str);
                Some(problem(ProblemCode::PortGroupNotFound, Missing::among("port group", name, names)))
            }
        }
    }
}

/// Compares the wanted objects with the existing ones.
async fn plan(client: &Client, wanted: Vec<(String, Wanted)>) -> Result<Vec<Step>, CliError> {
    let switches = client.list_switches().await?;
    let groups = client.list_port_groups().await?;
    let vms = client.list_vms().await?;
    let mut addresses = Addresses::new(&vms, &client.list_ports().await?, &groups, &wanted);
    let mut there = Names {
        switches: switches.iter().map(|switch| switch.name.clone()).collect(),
        groups: groups.iter().map(|group| group.name.clone()).collect(),
    };
    for (_, wanted) in &wanted {
        match wanted {
            Wanted::Switch(name, _) => drop(there.switches.insert(name.clone())),
            Wanted::PortGroup(name, _) => drop(there.groups.insert(name.clone())),
            Wanted::Vm(_) => {}
        }
    }
    // In the order of creation.
    let step = |(file, wanted): (String, Wanted)| {
        let mut refusal = there.lacks(&wanted);
        let mut state = None;
        let (mut blocked, mut hidden) = (false, false);
        let found = match &wanted {
            Wanted::Switch(name, spec) => switches
                .iter()
                .find(|switch| switch.name == *name)
                .map(|switch| (switch.revision, differences(&switch.spec, spec))),
            Wanted::PortGroup(name, spec) => groups
                .iter()
                .find(|group| group.name == *name)
                .map(|group| (group.revision, differences(&group.spec, spec))),
            Wanted::Vm(spec) => vms.iter().find(|vm| vm.name == spec.name).map(|vm| {
                state = Some(vm.status.state);
                blocked = !vm.status.state.is_at_rest() && !spec.same_machine(&vm.spec);
                hidden = spec.has_secrets();
                (vm.revision, differences(&vm.spec, &spec.masked()))
            }),
        };
        let (kind, name) = (wanted.kind(), wanted.name().to_string());
        let (action, revision, changes) = match found {
            None => (Action::Create, None, Vec::new()),
            Some((revision, changes)) if changes.is_empty() && hidden => {
                (Action::Compare, Some(revision), changes)
            }
            Some((revision, changes)) if changes.is_empty() => (Action::Unchanged, Some(revision), changes),
            Some((revision, changes)) if blocked => (Action::Blocked, Some(revision), changes),
            Some((revision, changes)) => (Action::Change, Some(revision), changes),
        };
        if let (Wanted::Vm(spec), Action::Create | Action::Change) = (&wanted, action) {
            if let Some(vm) = vms.iter().find(|vm| vm.name == spec.name) {
                addresses.release(vm, spec);
            }
            let taken = addresses.take(spec).err();
            refusal = refusal.or(taken);
        }
        Step { action, kind, name, file, changes, wanted, revision, state, refusal }
    };
    Ok(wanted.into_iter().map(step).collect())
}

/// Makes one object after the other; `at` is the number of the current one.
async fn make_all(client: &Client, steps: &mut [Step], at: &Cell<usize>) -> Result<(), ClientError> {
    for (n, step) in steps.iter_mut().enumerate() {
        at.set(n);
        make(client, step).await?;
    }
    Ok(())
}

/// Makes the object, if it is still at the revision of the comparison.
async fn make(client: &Client, step: &mut Step) -> Result<(), ClientError> {
    if step.action == Action::Unchanged {
        return Ok(());
    }
    let name = step.name.as_str();
    match (&step.wanted, step.action) {
        (Wanted::Switch(_, spec), _) => client.put_switch(name, spec, step.revision).await.map(drop),
        (Wanted::PortGroup(_, spec), _) => client.put_port_group(name, spec, step.revision).await.map(drop),
        (Wanted::Vm(spec), Action::Create) => client.create_vm(spec).await.map(drop),
        (Wanted::Vm(spec), action) => {
            let vm = client.put_vm(name, spec, step.revision).await?;
            if action == Action::Compare {
                let same = step.revision == Some(vm.revision);
                step.action = if same { Action::Unchanged } else { Action::Change };
            }
            Ok(())
        }
    }
}
