// SPDX-License-Identifier: Apache-2.0

//! `portcullis pf …` and `portcullis vf …`.

use api::{
    Client,
    types::{Pf, Vf},
};
use clap::Subcommand;

use super::{
    error::CliError,
    output::{Output, or_dash},
};

#[derive(Debug, Subcommand)]
pub enum PfCommand {
    /// Lists the PFs.
    List,
    /// Shows a PF.
    Show {
        /// Its interface's name, or its id.
        name: String,
    },
    /// Changes the number of VFs of a PF; refused while any of them is in use.
    SetVfs {
        /// Its interface's name, or its id.
        name: String,
        /// 0 removes all.
        count: u32,
        /// Only if it is at this revision.
        #[arg(long, value_name = "REVISION")]
        if_match: Option<u64>,
    },
}

#[derive(Debug, Subcommand)]
pub enum VfCommand {
    /// Lists the VFs.
    List,
}

pub(super) async fn run_pf(
    client: &Client,
    output: &mut Output<'_>,
    command: PfCommand,
) -> Result<(), CliError> {
    let pf = match command {
        PfCommand::List => {
            let pfs = client.list_pfs().await?;
            let header = ["NAME", "ADDRESS", "DRIVER", "UP", "VFS", "IN USE", "MAX", "MAC"];
            return Ok(output.table(&pfs, header, row)?);
        }
        PfCommand::Show { name } => client.get_pf(&name).await?,
        PfCommand::SetVfs { name, count, if_match } => client.set_vfs(&name, count, if_match).await?,
    };
    Ok(output.object(&pf, details)?)
}

pub(super) async fn run_vf(
    client: &Client,
    output: &mut Output<'_>,
    command: VfCommand,
) -> Result<(), CliError> {
    let VfCommand::List = command;
    let header = ["ADDRESS", "PF", "VF", "GROUP", "DRIVER", "MAC", "OWNER"];
    Ok(output.table(&client.list_vfs().await?, header, vf_row)?)
}

fn row(pf: &Pf) -> [String; 8] {
    let status = &pf.status;
    [
        pf.name.clone(),
        status.bdf.to_string(),
        or_dash(status.driver.as_ref()),
        yes_no(status.up),
        status.vfs.to_string(),
        status.vfs_in_use.to_string(),
        status.max_vfs.to_string(),
        or_dash(status.mac.as_ref()),
    ]
}

fn details(pf: &Pf) -> Vec<(String, String)> {
    let status = &pf.status;
    [
        ("name", pf.name.clone()),
        ("id", pf.id.to_string()),
        ("revision", pf.revision.to_string()),
        ("address", status.bdf.to_string()),
        ("device", status.device.clone()),
        ("driver", or_dash(status.driver.as_ref())),
        ("mac", or_dash(status.mac.as_ref())),
        ("up", yes_no(status.up)),
        ("carrier", status.carrier.map(yes_no).unwrap_or_default()),
        ("mtu", or_dash(status.mtu)),
        ("vfs", format!("{} of {}, {} in use", status.vfs, status.max_vfs, status.vfs_in_use)),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into()
}

fn vf_row(vf: &Vf) -> [String; 7] {
    let owner = vf.owner.as_ref().map(|owner| match &owner.adapter {
        Some(adapter) => format!("{}/{adapter}", owner.name),
        None => owner.name.clone(),
    });
    [
        vf.bdf.to_string(),
        vf.pf.clone(),
        vf.index.to_string(),
        or_dash(vf.iommu_group),
        or_dash(vf.driver.as_ref()),
        or_dash(vf.mac.as_ref()),
        or_dash(owner.or_else(|| vf.used_by.as_ref().map(|usage| format!("({usage})")))),
    ]
}

fn yes_no(value: bool) -> String {
    if value { "yes".to_owned() } else { "no".to_owned() }
}
