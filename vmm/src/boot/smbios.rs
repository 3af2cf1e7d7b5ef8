// SPDX-License-Identifier: Apache-2.0

//! The SMBIOS tables of a machine, from its specification and the agent's file of strings.

use std::{fs::File, io::Read};

use devices::smbios::{self, Identity};
use protocol::{MachineSpec, files::OEM_STRINGS_MAX};

use super::BootError;
use crate::layout;

const MANUFACTURER: &str = "Portcullis";
const PRODUCT: &str = "Virtual Machine";

/// Builds the tables for [`layout::SMBIOS`]. `strings` has the OEM strings, each with a NUL behind it.
///
/// # Errors
/// [`BootError::Read`], and [`BootError::Smbios`] for a string that the tables cannot hold.
pub fn tables(spec: &MachineSpec, strings: Option<File>) -> Result<Vec<u8>, BootError> {
    let mut bytes = Vec::new();
    if let Some(file) = strings {
        let read = file.take(OEM_STRINGS_MAX as u64).read_to_end(&mut bytes);
        read.map_err(|error| BootError::Read("OEM strings", error))?;
    }
    let strings: Vec<&[u8]> =
        bytes.strip_suffix(&[0]).map(|all| all.split(|byte| *byte == 0).collect()).unwrap_or_default();
    let machine = Identity {
        manufacturer: MANUFACTURER.to_owned(),
        product: PRODUCT.to_owned(),
        serial: spec.vm.to_string(),
        uuid: *spec.vm.as_bytes(),
    };
    Ok(smbios::tables(layout::SMBIOS.start, &machine, &strings)?)
}
