// SPDX-License-Identifier: Apache-2.0

//! The SMBIOS tables of a machine, from its specification and the agent's file of strings.

use std::{fs::File, io::Read};

use devices::smbios::{self, Identity, SmbiosError};
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
        // A longer file is cut, and ends in the middle of a string.
        if bytes.last().is_some_and(|last| *last != 0) {
            return Err(BootError::Smbios(SmbiosError::TooLong));
        }
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

#[cfg(test)]
mod tests {
    use std::io::{Seek as _, Write as _};

    use uuid::Uuid;

    use super::*;

    fn file(bytes: &[u8]) -> Option<File> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file.rewind().unwrap();
        Some(file)
    }

    fn spec() -> MachineSpec {
        MachineSpec {
            vm: Uuid::nil(),
            name: "test".into(),
            cpus: 1,
            memory: 2 << 20,
            hugepages: false,
            cmdline: String::new(),
            initramfs: 0,
            boot_disk: None,
            devices: Vec::new(),
            disks: Vec::new(),
            nics: Vec::new(),
            entropy: false,
            sandbox: protocol::SandboxSpec::of_threads(),
            placement: protocol::PlacementSpec::default(),
            features: protocol::CpuFeatures::default(),
        }
    }

    /// A guest without its credentials would not say why.
    #[test]
    fn strings_that_are_cut_are_an_error() {
        let tables = |bytes: &[u8]| tables(&spec(), file(bytes));
        assert!(tables(b"").is_ok());
        let two = tables(b"one\0two\0").unwrap();
        assert!(two.windows(8).any(|part| part == b"one\0two\0"));
        let long = vec![b'x'; OEM_STRINGS_MAX + 1];
        for cut in [&b"one\0two"[..], &long] {
            let error = tables(cut).unwrap_err();
            assert!(matches!(error, BootError::Smbios(SmbiosError::TooLong)), "{error}");
        }
    }
}
