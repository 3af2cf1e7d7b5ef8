// SPDX-License-Identifier: Apache-2.0

//! `portcullis port-group …`.

use std::collections::BTreeSet;

use api::{
    Client,
    types::{Name, PortGroup, PortGroupSpec},
};
use clap::{Args, Subcommand};
use netpolicy::{Setting, Settings};
use serde_json::{Map, Value, json};

use super::{
    error::CliError,
    output::Output,
    settings::{self, SettingsArgs},
    spec_file,
};

#[derive(Debug, Subcommand)]
pub enum PortGroupCommand {
    /// Lists the port groups.
    List,
    /// Shows a port group: every setting, and the level that decides it.
    Show {
        /// Its name or id.
        name: String,
    },
    /// Creates a port group, or replaces its whole specification. Running VMs are subject to it at once.
    Set(Box<SetArgs>),
    /// Changes some settings of a port group; the others stay. Running VMs are subject to it at once.
    Patch(Box<PatchArgs>),
    /// Deletes a port group; refused while ports use it.
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
    /// Its specification: a .toml, .yaml or .json file, or - for standard input. Options add to it, or
    /// override it.
    #[arg(long, short, value_name = "FILE")]
    file: Option<String>,
    /// The switch of the port group.
    #[arg(long, value_name = "NAME", required_unless_present = "file")]
    switch: Option<Name>,
    /// A setting that its ports may override; may be repeated.
    #[arg(long = "port-override", value_name = "SETTING", value_parser = settings::setting)]
    port_overrides: Vec<Setting>,
    /// Only if it is at this revision.
    #[arg(long, value_name = "REVISION")]
    if_match: Option<u64>,
    #[command(flatten)]
    settings: SettingsArgs,
}

#[derive(Debug, Args)]
pub struct PatchArgs {
    /// Its name or id.
    name: String,
    /// A JSON merge patch of its specification: a .toml, .yaml or .json file, or - for standard input.
    /// Options add to it, or override it.
    #[arg(long, short, value_name = "FILE")]
    file: Option<String>,
    /// A setting to leave to the switch again; may be repeated.
    #[arg(long, value_name = "SETTING", value_parser = settings::setting)]
    unset: Vec<Setting>,
    /// A setting that its ports may override, instead of the former ones; may be repeated.
    #[arg(long = "port-override", value_name = "SETTING", value_parser = settings::setting)]
    port_overrides: Vec<Setting>,
    /// Only if it is at this revision.
    #[arg(long, value_name = "REVISION")]
    if_match: Option<u64>,
    #[command(flatten)]
    settings: SettingsArgs,
}

pub(super) async fn run(
    client: &Client,
    output: &mut Output<'_>,
    command: PortGroupCommand,
) -> Result<(), CliError> {
    let group = match command {
        PortGroupCommand::List => {
            let groups = client.list_port_groups().await?;
            return Ok(output.table(&groups, ["NAME", "SWITCH", "PORTS", "SETTINGS"], row)?);
        }
        PortGroupCommand::Show { name } => client.get_port_group(&name).await?,
        PortGroupCommand::Set(args) => {
            let (name, if_match) = (args.name.clone(), args.if_match);
            client.put_port_group(&name, &specification(*args)?, if_match).await?.object
        }
        PortGroupCommand::Patch(args) => {
            let (name, if_match) = (args.name.clone(), args.if_match);
            client.patch_port_group(&name, &patch(*args)?, if_match).await?
        }
        PortGroupCommand::Delete { name, if_match } => {
            return Ok(client.delete_port_group(&name, if_match).await?);
        }
    };
    Ok(output.object(&group, details)?)
}

fn specification(args: SetArgs) -> Result<PortGroupSpec, CliError> {
    let mut spec = match (&args.file, args.switch) {
        (Some(file), switch) => {
            let mut spec: PortGroupSpec = spec_file::read(file, "a port group's specification")?;
            spec.switch = switch.unwrap_or(spec.switch);
            spec
        }
        (None, Some(switch)) => {
            PortGroupSpec { switch, settings: Settings::default(), port_overrides: BTreeSet::new() }
        }
        (None, None) => return Err(CliError::Usage("A port group needs --switch or --file".to_owned())),
    };
    if !args.port_overrides.is_empty() {
        spec.port_overrides = args.port_overrides.into_iter().collect();
    }
    args.settings.apply(&mut spec.settings);
    Ok(spec)
}

fn patch(args: PatchArgs) -> Result<Value, CliError> {
    let mut patch: Map<String, Value> = match &args.file {
        Some(file) => spec_file::read(file, "a patch of a port group")?,
        None => Map::new(),
    };
    let mut settings = Settings::default();
    args.settings.apply(&mut settings);
    let said = settings::patch(&settings, &args.unset);
    if !said.is_empty() {
        let settings = patch.entry("settings").or_insert_with(|| Value::Object(Map::new()));
        let Value::Object(settings) = settings else {
            let why = "`settings` in the file is not an object: options cannot change members".to_owned();
            return Err(CliError::Usage(why));
        };
        settings.extend(said);
    }
    if !args.port_overrides.is_empty() {
        patch.insert("port_overrides".to_owned(), json!(args.port_overrides));
    }
    if patch.is_empty() {
        return Err(CliError::Usage("No change is given: name settings, or a --file".to_owned()));
    }
    Ok(Value::Object(patch))
}

fn row(group: &PortGroup) -> [String; 4] {
    [
        group.name.to_string(),
        group.spec.switch.to_string(),
        group.status.ports.to_string(),
        settings::brief(&group.spec.settings),
    ]
}

fn details(group: &PortGroup) -> Vec<(String, String)> {
    let overrides: Vec<_> = group.spec.port_overrides.iter().map(|setting| setting.name()).collect();
    let mut lines: Vec<(String, String)> = [
        ("name", group.name.to_string()),
        ("id", group.id.to_string()),
        ("revision", group.revision.to_string()),
        ("created", group.created.to_string()),
        ("switch", group.spec.switch.to_string()),
        ("ports", group.status.ports.to_string()),
        ("port overrides", overrides.join(",")),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into();
    lines.extend(settings::lines(&group.status.policy));
    lines
}
