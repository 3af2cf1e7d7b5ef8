// SPDX-License-Identifier: Apache-2.0

//! `portcullis vm patch` and `vm wait`.

use std::time::{Duration, Instant};

use api::{Client, types::*};
use clap::Args;
use serde_json::{Map, Value, json};

use super::VmName;
use crate::{error::CliError, progress, spec_file};

#[derive(Debug, Args)]
pub struct PatchArgs {
    #[command(flatten)]
    vm: VmName,
    /// A JSON merge patch of its specification: a .toml, .yaml or .json file, or - for standard input. Options add to it,
    /// or override it.
    #[arg(long, short, value_name = "FILE")]
    file: Option<String>,
    /// vCPUs.
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u8).range(1..=254))]
    cpus: Option<u8>,
    /// Guest memory, as 512MiB.
    #[arg(long, value_name = "SIZE")]
    memory: Option<ByteSize>,
    /// The kernel's command line.
    #[arg(long, value_name = "TEXT")]
    cmdline: Option<String>,
    /// Whether the agent boots the VM again after its end: never, on-failure or always.
    #[arg(long, value_name = "POLICY", value_parser = restart_policy)]
    restart: Option<RestartPolicy>,
    /// Whether the agent boots the VM when the agent starts.
    #[arg(long, value_name = "true|false")]
    autostart: Option<bool>,
    /// Only if it is at this revision.
    #[arg(long, value_name = "REVISION")]
    if_match: Option<u64>,
}

fn restart_policy(text: &str) -> Result<RestartPolicy, String> {
    let all = [RestartPolicy::Never, RestartPolicy::OnFailure, RestartPolicy::Always];
    let found = all.into_iter().find(|policy| policy.as_str() == text.replace('-', "_"));
    found.ok_or_else(|| "a restart policy is never, on-failure or always".to_owned())
}

pub(super) async fn patch(client: &Client, args: PatchArgs) -> Result<Vm, CliError> {
    let mut patch: Map<String, Value> = match &args.file {
        Some(file) => spec_file::read(file, "a patch of a VM")?,
        None => Map::new(),
    };
    let mut set = |name: &str, value: Option<Value>| {
        patch.extend(value.map(|value| (name.to_owned(), value)));
    };
    set("cpus", args.cpus.map(|cpus| json!(cpus)));
    set("memory", args.memory.map(|memory| json!(memory)));
    set("restart", args.restart.map(|restart| json!(restart)));
    set("autostart", args.autostart.map(|autostart| json!(autostart)));
    if let Some(cmdline) = args.cmdline {
        let boot = patch.entry("boot").or_insert_with(|| json!({}));
        let Value::Object(boot) = boot else {
            let why = "`boot` in the file is not an object: --cmdline cannot change a member".to_owned();
            return Err(CliError::Usage(why));
        };
        boot.insert("cmdline".to_owned(), json!(cmdline));
    }
    if patch.is_empty() {
        return Err(CliError::Usage("No change is given: add options, or a --file".to_owned()));
    }
    Ok(client.patch_vm(&args.vm.name, &Value::Object(patch), args.if_match).await?)
}

#[derive(Debug, Args)]
pub struct WaitArgs {
    #[command(flatten)]
    vm: VmName,
    /// The state: running, paused, stopped, failed, …; or rest, which is defined, stopped or failed.
    #[arg(long = "for", value_name = "STATE", value_parser = goal)]
    goal: Goal,
    /// Waits at most this many seconds (exit code 6).
    #[arg(long, visible_alias = "wait", value_name = "SECONDS", default_value_t = 60)]
    timeout: u64,
}

/// The awaited state of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Goal {
    State(VmState),
    Rest,
}

fn goal(text: &str) -> Result<Goal, String> {
    if text == "rest" {
        return Ok(Goal::Rest);
    }
    let state = serde_json::from_value(json!(text)).map_err(|error| error.to_string());
    state.map(Goal::State)
}

/// The pause between two looks.
const PAUSE: Duration = Duration::from_millis(100);

pub(super) async fn wait(client: &Client, args: WaitArgs) -> Result<Vm, CliError> {
    let vm = args.vm.name.clone();
    progress::of_vm(client, &vm, "waiting for", reaches(client, args)).await
}

async fn reaches(client: &Client, args: WaitArgs) -> Result<Vm, CliError> {
    let deadline = Instant::now().checked_add(Duration::from_secs(args.timeout));
    loop {
        let vm = client.get_vm(&args.vm.name).await?;
        let state = vm.status.state;
        let there = match args.goal {
            Goal::State(goal) => state == goal,
            Goal::Rest => state.is_at_rest(),
        };
        if there {
            return Ok(vm);
        }
        if deadline.is_some_and(|deadline| deadline <= Instant::now()) {
            return Err(CliError::TooSlow { vm: vm.name.to_string(), state, waited: args.timeout });
        }
        tokio::time::sleep(PAUSE).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_on_the_command_line() {
        for (text, expect) in [
            ("never", Some(RestartPolicy::Never)),
            ("on-failure", Some(RestartPolicy::OnFailure)),
            ("on_failure", Some(RestartPolicy::OnFailure)),
            ("always", Some(RestartPolicy::Always)),
            ("sometimes", None),
        ] {
            assert_eq!(restart_policy(text).ok(), expect);
        }
        assert_eq!(goal("rest"), Ok(Goal::Rest));
        assert_eq!(goal("running"), Ok(Goal::State(VmState::Running)));
        assert!(goal("asleep").unwrap_err().contains("`running`"));
    }
}
