// SPDX-License-Identifier: Apache-2.0

//! `portcullis port …`.

use api::{
    Client,
    types::{Port, PortSpec, UnmadeChange},
};
use clap::{Args, Subcommand};
use netpolicy::Setting;
use serde_json::json;

use super::{
    error::CliError,
    output::{Output, or_dash, warn},
    settings::{self, SettingsArgs},
    spec_file,
};

#[derive(Debug, Subcommand)]
pub enum PortCommand {
    /// Lists the ports: each adapter's group, VF and addresses.
    List,
    /// Shows a port: addresses, counters, every setting and the level that decides it.
    Show(PortName),
    /// Overrides settings of the port's group, where the group allows it; other settings stay.
    Set(Box<SetArgs>),
    /// Cuts a port off: its link is down, and its guest may change nothing. Refused while a VM runs
    /// on a port of a PF that cannot cut it off (igb).
    Block(BlockArgs),
    /// Removes a port's own block; a block by its group stays.
    Unblock(BlockArgs),
}

#[derive(Debug, Args)]
pub struct PortName {
    /// VM and adapter, as web1/eth0, or the port's id.
    #[arg(value_name = "PORT")]
    name: String,
}

#[derive(Debug, Args)]
pub struct SetArgs {
    #[command(flatten)]
    port: PortName,
    /// Settings to override: a .toml, .yaml or .json file with a port's specification, or - for standard input. Options
    /// take precedence over it.
    #[arg(long, short, value_name = "FILE")]
    file: Option<String>,
    /// A setting to leave to the group again; may be repeated.
    #[arg(long, value_name = "SETTING", value_parser = settings::setting)]
    unset: Vec<Setting>,
    /// Only if it is at this revision.
    #[arg(long, value_name = "REVISION")]
    if_match: Option<u64>,
    #[command(flatten)]
    settings: SettingsArgs,
}

#[derive(Debug, Args)]
pub struct BlockArgs {
    #[command(flatten)]
    port: PortName,
    /// Only if it is at this revision.
    #[arg(long, value_name = "REVISION")]
    if_match: Option<u64>,
}

pub(super) async fn run(
    client: &Client,
    output: &mut Output<'_>,
    command: PortCommand,
) -> Result<(), CliError> {
    let port = match command {
        PortCommand::List => {
            let ports = client.list_ports().await?;
            let header = ["PORT", "GROUP", "PF", "VF", "ADDRESS", "INITIAL", "EFFECTIVE", "GUEST", "NOTE"];
            return Ok(output.table(&ports, header, row)?);
        }
        PortCommand::Show(port) => client.get_port(&port.name).await?,
        PortCommand::Set(args) => set(client, *args).await?,
        PortCommand::Block(args) => block(client, &args, Some(true)).await?,
        PortCommand::Unblock(args) => {
            let port = block(client, &args, None).await?;
            if port.status.policy.blocked.value {
                let (name, by) = (&port.name, port.status.policy.blocked.source);
                warn(format_args!("portcullis: {name} is still blocked by its {by}"));
            }
            port
        }
    };
    Ok(output.object(&port, details)?)
}

async fn set(client: &Client, args: SetArgs) -> Result<Port, CliError> {
    let mut spec: PortSpec = match &args.file {
        Some(file) => spec_file::read(file, "a port's specification")?,
        None => PortSpec::default(),
    };
    args.settings.apply(&mut spec.settings);
    let patch = settings::patch(&spec.settings, &args.unset);
    if patch.is_empty() {
        return Err(CliError::Usage("No change is given: name settings, or a --file".to_owned()));
    }
    Ok(client.patch_port(&args.port.name, &json!({ "settings": patch }), args.if_match).await?)
}

async fn block(client: &Client, args: &BlockArgs, blocked: Option<bool>) -> Result<Port, CliError> {
    let patch = json!({ "settings": { "blocked": blocked } });
    Ok(client.patch_port(&args.port.name, &patch, args.if_match).await?)
}

/// The warnings about a port, for the list.
fn note(port: &Port) -> String {
    let status = &port.status;
    let mut notes = Vec::new();
    if status.guest_mac != status.effective_mac {
        // Silently denied: the guest believes that it has an address that the VF does not have.
        notes.push("GUEST DIFFERS");
    }
    if status.unchecked.is_some() {
        notes.push("NOT COMPARED");
    }
    if !status.unmade.is_empty() {
        notes.push("NOT IN FORCE");
    }
    if status.pending.is_some() {
        notes.push("PENDING");
    }
    if status.policy.blocked.value {
        notes.push("BLOCKED");
    }
    notes.join(", ")
}

fn row(port: &Port) -> [String; 9] {
    let status = &port.status;
    [
        port.name.clone(),
        status.port_group.to_string(),
        or_dash(status.pf.as_ref()),
        or_dash(status.vf_index),
        or_dash(status.vf),
        status.initial_mac.to_string(),
        status.effective_mac.to_string(),
        status.guest_mac.to_string(),
        note(port),
    ]
}

fn details(port: &Port) -> Vec<(String, String)> {
    let status = &port.status;
    let vf = match (&status.pf, status.vf_index) {
        (Some(pf), Some(index)) => format!("{} (VF {index} of {pf})", or_dash(status.vf)),
        _ => String::new(),
    };
    let guest = if status.guest_mac == status.effective_mac {
        status.guest_mac.to_string()
    } else {
        format!(
            "{} (differs: the guest learns the effective one when it resets its interface)",
            status.guest_mac
        )
    };
    let unchecked = status.unchecked.as_ref().map(|unchecked| {
        let text = format!("not compared with its PF since {}: {}", unchecked.since, unchecked.detail);
        ("drift".to_owned(), text)
    });
    let pending = status.pending.as_ref().map(|pending| {
        let text =
            format!("since {}, until the guest resets its VF: {}", pending.since, pending.changes.join(", "));
        ("pending".to_owned(), text)
    });
    let counters = &status.counters;
    let mut lines: Vec<(String, String)> = [
        ("name", port.name.clone()),
        ("id", port.id.to_string()),
        ("revision", port.revision.to_string()),
        ("created", port.created.to_string()),
        ("switch", status.switch.to_string()),
        ("port group", status.port_group.to_string()),
        ("vf", vf),
        ("initial mac", status.initial_mac.to_string()),
        ("effective mac", status.effective_mac.to_string()),
        ("guest mac", guest),
        (
            "requests",
            format!(
                "{} allowed, {} denied, {} revoked, {} corrected",
                counters.allowed, counters.denied, counters.taken_back, counters.repaired
            ),
        ),
        ("overrides", settings::brief(&port.spec.settings)),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into();
    lines.extend(unchecked);
    lines.extend(pending);
    let unmade =
        |unmade: &UnmadeChange| ("not in force".to_owned(), format!("{}: {}", unmade.change, unmade.detail));
    lines.extend(status.unmade.iter().map(unmade));
    lines.extend(settings::lines(&status.policy));
    lines
}
