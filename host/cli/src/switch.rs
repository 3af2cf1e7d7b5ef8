// SPDX-License-Identifier: Apache-2.0

//! `portcullis switch …`.

use api::{
    Client, ProblemCode,
    types::{Switch, SwitchSpec},
};
use clap::{Args, Subcommand};
use netpolicy::Setting;

use super::{
    error::CliError,
    output::Output,
    settings::{self, SettingsArgs},
    spec_file,
};

#[derive(Debug, Subcommand)]
pub enum SwitchCommand {
    /// Lists the switches.
    List,
    /// Shows a switch.
    Show {
        /// Its name or id.
        name: String,
    },
    /// Creates a switch, or changes it; a part without an option stays. A --file replaces its whole specification. Running VMs
    /// are subject to it at once.
    Set(Box<SetArgs>),
    /// Deletes a switch; refused while it has port groups.
    Delete {
        /// Its name or id.
        name: String,
        /// Only if it is at this revision.
        #[arg(long, value_name = "REVISION")]
        if_match: Option<u64>,
    },
}

#[derive(Debug, Args)]
pub struct SetArgs {
    /// Its name, or the id of one that exists.
    name: String,
    /// Its specification: a .toml, .yaml or .json file, or - for standard input. Options add to it, or override it.
    #[arg(long, short, value_name = "FILE")]
    file: Option<String>,
    /// An uplink: a PF with VFs for the switch's ports, by the name of the PF's interface. Replaces
    /// the former uplinks; may be repeated.
    #[arg(long = "uplink", value_name = "PF")]
    uplinks: Vec<String>,
    /// A setting to return to its built-in value; may be repeated.
    #[arg(long, value_name = "SETTING", value_parser = settings::setting)]
    unset: Vec<Setting>,
    /// Only if it is at this revision.
    #[arg(long, value_name = "REVISION")]
    if_match: Option<u64>,
    #[command(flatten)]
    settings: SettingsArgs,
}

pub(super) async fn run(
    client: &Client,
    output: &mut Output<'_>,
    command: SwitchCommand,
) -> Result<(), CliError> {
    let switch = match command {
        SwitchCommand::List => {
            let switches = client.list_switches().await?;
            let header = ["NAME", "UPLINKS", "PORT GROUPS", "PORTS", "SETTINGS"];
            return Ok(output.table(&switches, header, row)?);
        }
        SwitchCommand::Show { name } => client.get_switch(&name).await?,
        SwitchCommand::Set(args) => set(client, *args).await?,
        SwitchCommand::Delete { name, if_match } => return Ok(client.delete_switch(&name, if_match).await?),
    };
    Ok(output.object(&switch, details)?)
}

async fn set(client: &Client, args: SetArgs) -> Result<Switch, CliError> {
    let (mut spec, found) = match &args.file {
        Some(file) => (spec_file::read(file, "a switch's specification")?, None),
        None => match client.get_switch(&args.name).await {
            Ok(switch) => (switch.spec, Some(switch.revision)),
            Err(error) if error.problem().is_some_and(|problem| problem.code == ProblemCode::NotFound) => {
                (SwitchSpec::default(), None)
            }
            Err(error) => return Err(error.into()),
        },
    };
    if !args.uplinks.is_empty() {
        spec.uplinks = args.uplinks.into_iter().collect();
    }
    settings::unset(&mut spec.settings, &args.unset);
    args.settings.apply(&mut spec.settings);
    // The API has no patch of a switch: the revision keeps concurrent changes of other callers from being lost.
    Ok(client.put_switch(&args.name, &spec, args.if_match.or(found)).await?.object)
}

fn uplinks(switch: &Switch) -> String {
    switch.spec.uplinks.iter().map(String::as_str).collect::<Vec<_>>().join(",")
}

fn row(switch: &Switch) -> [String; 5] {
    [
        switch.name.to_string(),
        uplinks(switch),
        switch.status.port_groups.to_string(),
        switch.status.ports.to_string(),
        settings::brief(&switch.spec.settings),
    ]
}

fn details(switch: &Switch) -> Vec<(String, String)> {
    [
        ("name", switch.name.to_string()),
        ("id", switch.id.to_string()),
        ("revision", switch.revision.to_string()),
        ("created", switch.created.to_string()),
        ("uplinks", uplinks(switch)),
        ("settings", settings::brief(&switch.spec.settings)),
        ("port groups", switch.status.port_groups.to_string()),
        ("ports", switch.status.ports.to_string()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into()
}
