// SPDX-License-Identifier: Apache-2.0

//! The files of a machine, which come as descriptors beside
//! [`VmmCommand::Configure`](super::VmmCommand::Configure), each with a name.

use std::{collections::BTreeMap, os::fd::OwnedFd};

/// `/dev/kvm`, open for reading and writing.
pub const KVM: &str = "kvm";
/// The console's ring file.
pub const CONSOLE: &str = "console";
/// The kernel image, unless the machine boots from a disk
/// ([`MachineSpec::boot_disk`](super::MachineSpec::boot_disk)).
pub const KERNEL: &str = "kernel";

/// The OEM strings of the guest's SMBIOS tables, if there are any: each with a NUL behind it, at most [`OEM_STRINGS_MAX`]
/// bytes. They come in a file since they are secrets, which no message has.
pub const OEM_STRINGS: &str = "oem-strings";
/// The most bytes of the OEM strings: they must fit the guest's area for the tables.
pub const OEM_STRINGS_MAX: usize = 60 << 10;

/// The files that any machine can have. `FDS_MAX` leaves room for them.
pub const OF_EVERY_MACHINE: [&str; 4] = [KVM, CONSOLE, KERNEL, OEM_STRINGS];

/// The name of an initramfs file. `number` is its place, from 0 to
/// [`MachineSpec::initramfs`](super::MachineSpec::initramfs).
#[must_use]
pub fn initramfs(number: usize) -> String {
    format!("initramfs:{number}")
}

/// The name of a simulated function's connection to its PF. `bdf` is the function's address on the
/// host.
#[must_use]
pub fn connection(bdf: &str) -> String {
    format!("connection:{bdf}")
}

/// The name of the disk with the texts for cloud-init. No disk of a specification can have it.
pub const SEED: &str = "CIDATA";

/// The name of a disk's file. `id` is the disk's name.
#[must_use]
pub fn disk(id: &str) -> String {
    format!("disk:{id}")
}

/// The name of a backing file of a disk. `number` is its place in the chain, from 0.
#[must_use]
pub fn backing(id: &str, number: usize) -> String {
    format!("disk:{id}:{number}")
}

/// The name of the file for the changes of an ephemeral disk.
#[must_use]
pub fn overlay(id: &str) -> String {
    format!("disk:{id}:overlay")
}

/// The name of a file of a NIC's interface. `number` is that of the pair of queues, from 0.
#[must_use]
pub fn nic(id: &str, number: usize) -> String {
    format!("nic:{id}:{number}")
}

/// The name of the lock of a NIC's interface, which lasts as long as the process.
#[must_use]
pub fn nic_lock(id: &str) -> String {
    format!("nic:{id}:lock")
}

/// Errors of a machine's files. All are bugs of the agent, which sends the files.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FileError {
    /// A file has no name, or a name has no file.
    #[error("The specification names {names} files, and {files} came: every file needs one name")]
    Count {
        /// Names.
        names: usize,
        /// Files.
        files: usize,
    },
    /// Two files have one name.
    #[error("Two files of the machine are called {0}: each needs a name of its own")]
    Duplicate(String),
    /// The machine needs a file that did not come.
    #[error("The machine's file {0} is missing: send it beside the specification")]
    Missing(String),
    /// No part of the machine takes the file.
    #[error("No part of the machine takes a file called {0}: agent and vmm are of different versions")]
    Unknown(String),
}

/// Files by their names. Each part of a machine takes its own.
#[derive(Debug, Default)]
pub struct Files(BTreeMap<String, OwnedFd>);

impl Files {
    /// Pairs names and files.
    ///
    /// # Errors
    /// [`FileError::Count`] and [`FileError::Duplicate`].
    pub fn new(names: Vec<String>, files: Vec<OwnedFd>) -> Result<Self, FileError> {
        if names.len() != files.len() {
            return Err(FileError::Count { names: names.len(), files: files.len() });
        }
        let mut named = BTreeMap::new();
        for (name, file) in names.into_iter().zip(files) {
            if named.contains_key(&name) {
                return Err(FileError::Duplicate(name));
            }
            named.insert(name, file);
        }
        Ok(Self(named))
    }

    /// Takes a file that need not be there.
    pub fn take(&mut self, name: &str) -> Option<OwnedFd> {
        self.0.remove(name)
    }

    /// Takes a file that must be there.
    ///
    /// # Errors
    /// [`FileError::Missing`].
    pub fn require(&mut self, name: &str) -> Result<OwnedFd, FileError> {
        self.take(name).ok_or_else(|| FileError::Missing(name.to_owned()))
    }

    /// Checks that every file was taken.
    ///
    /// # Errors
    /// [`FileError::Unknown`], with the first file that is left.
    pub fn finish(self) -> Result<(), FileError> {
        self.0.into_keys().next().map_or(Ok(()), |name| Err(FileError::Unknown(name)))
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    fn files(names: &[&str], count: usize) -> Result<Files, FileError> {
        let files = (0..count).map(|_| File::open("/dev/null").unwrap().into()).collect();
        Files::new(names.iter().map(|name| (*name).to_owned()).collect(), files)
    }

    #[test]
    fn each_file_is_taken_once_by_its_name() {
        let mut both = files(&["kvm", "kernel"], 2).unwrap();
        both.require(KERNEL).unwrap();
        assert_eq!(both.require(KERNEL).unwrap_err(), FileError::Missing("kernel".into()));
        assert!(both.take(&initramfs(0)).is_none());
        assert!(both.take(KVM).is_some());
        both.finish().unwrap();
    }

    #[test]
    fn wrong_names_are_named() {
        let check = |names: &[&str], count, expect| assert_eq!(files(names, count).unwrap_err(), expect);
        check(&["kvm"], 2, FileError::Count { names: 1, files: 2 });
        check(&["kvm", "kernel"], 1, FileError::Count { names: 2, files: 1 });
        check(&["kvm", "kernel", "kvm"], 3, FileError::Duplicate("kvm".into()));
        let left = files(&["floppy", "kvm"], 2).unwrap();
        assert_eq!(left.finish().unwrap_err(), FileError::Unknown("floppy".into()));
    }
}
