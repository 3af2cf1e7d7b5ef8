// SPDX-License-Identifier: Apache-2.0

//! Finds the kernel that a guest has installed on its disk: [`find`].
//!
//! Places, in their order, each on all partitions:
//!
//! 1. Entries of the Boot Loader Specification, in text files and as unified kernel images: on partitions for boot loaders
//!    first, then on others, in `/loader` and `/boot/loader`.
//! 2. The default entry of GRUB's menu, if it is literal.
//! 3. Debian's links `/vmlinuz` and `/boot/vmlinuz`.
//!
//! The guest writes the disk, and may attack its own vmm by it. So nothing here trusts a number of the disk: all reads
//! come from one budget, each loop reads or goes over bytes that were read, and sizes are compared with limits before
//! memory is reserved. Paths never leave their file system.
#![forbid(unsafe_code)]

mod bls;
mod debian;
mod entry;
mod error;
mod ext4;
mod fat;
mod filesystem;
#[cfg(any(test, feature = "test-support"))]
pub mod fuzz;
mod grub;
mod partitions;
mod probe;
#[cfg(test)]
mod testing;
mod uki;
mod version;
mod volume;

use std::{io, rc::Rc};

use self::{entry::Draft, error::Fault, filesystem::FileSystem, volume::Volume};
pub use self::{
    entry::{Entry, Found},
    error::{FindError, Places},
    filesystem::Part,
};

/// The part of the budget for metadata: a journal of 1 GiB can be read once.
const METADATA: u64 = 1 << 30;

/// The contents of a disk.
pub trait Disk {
    /// Bytes.
    fn size(&self) -> u64;

    /// Fills `bytes` from `offset` on: a range inside of the disk.
    ///
    /// # Errors
    /// Those of the host's file, or of its format.
    fn read(&mut self, offset: u64, bytes: &mut [u8]) -> io::Result<()>;
}

/// A way in which systems name the kernel to boot.
struct Place {
    name: &'static str,
    find: fn(&dyn FileSystem) -> Result<Draft, Fault>,
}

const PLACES: &[Place] = &[
    Place { name: "boot loader entries", find: bls::find },
    Place { name: "GRUB's menu", find: grub::find },
    Place { name: "Debian's links", find: debian::find },
];

/// Finds the kernel to boot. `memory` is the guest's memory in bytes, which bounds the kernel and the initramfs.
///
/// # Errors
/// See [`FindError`].
pub fn find(disk: Box<dyn Disk>, memory: u64) -> Result<Entry, FindError> {
    find_within(disk, memory, memory.saturating_mul(2).saturating_add(METADATA))
}

/// The same with another budget in bytes.
fn find_within(disk: Box<dyn Disk>, memory: u64, budget: u64) -> Result<Entry, FindError> {
    let whole = Volume::whole(disk, budget);
    let mut places = Places::default();
    let mut opened: Vec<(String, Rc<dyn FileSystem>)> = Vec::new();
    let mut partitions = match partitions::list(&whole) {
        Ok(partitions) => partitions,
        Err(fault) => {
            places.add("the disk", &fault.local()?);
            Vec::new()
        }
    };
    partitions.sort_by_key(|partition| !partition.for_loaders);
    for partition in partitions {
        let name = partition.name;
        match probe::open(&partition.volume) {
            Ok(Some(files)) => opened.push((format!("{name}, {}", files.kind()), files)),
            Ok(None) => places.add(&name, &"no file system that is known"),
            Err(fault) => places.add(&name, &fault.local()?),
        }
    }
    for place in PLACES {
        for (name, files) in &opened {
            let draft = (place.find)(files.as_ref());
            match draft.and_then(|draft| draft.read(name.clone(), place.name, memory)) {
                Ok(entry) => return Ok(entry),
                Err(fault) => places.add(&format!("{name}, {}", place.name), &fault.local()?),
            }
        }
    }
    Err(FindError::Nothing(places))
}
