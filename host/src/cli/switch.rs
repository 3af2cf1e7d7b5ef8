//! `portcullis switch …`.

use api::{
    Client,
    types::{Switch, SwitchSpec},
};
use clap::{Args, Subcommand};

use super::{
    error::CliError,
    output::Output,
    settings::{self, SettingsArgs},
    spec_file,
};

#[derive(Debug, Subcommand)]
pub(super) enum SwitchCommand {
    /// Lists the switches.
    List,
    /// Shows a switch.
    Show {
        /// Its name or id.
        name: String,
    },
    /// Creates a switch, or replaces its whole specification. Running VMs are subject to it at once.
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
pub(super) struct SetArgs {
    /// Its name, or the id of one that exists.
    name: String,
    /// Its specification: a .toml, .yaml or .json file, or - for JSON from standard input. Options say more, or other.
    #[arg(long, short, value_name = "FILE")]
    file: Option<String>,
    /// A PF whose VFs its ports get, by its interface's name; may be repeated.
    #[arg(long = "uplink", value_name = "PF")]
    uplinks: Vec<String>,
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
        SwitchCommand::Set(args) => {
            let mut spec: SwitchSpec = match &args.file {
                Some(file) => spec_file::read(file, "a switch's specification")?,
                None => SwitchSpec::default(),
            };
            if !args.uplinks.is_empty() {
                spec.uplinks = args.uplinks.into_iter().collect();
            }
            args.settings.apply(&mut spec.settings);
            client.put_switch(&args.name, &spec, args.if_match).await?.object
        }
        SwitchCommand::Delete { name, if_match } => return Ok(client.delete_switch(&name, if_match).await?),
    };
    Ok(output.object(&switch, details)?)
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
