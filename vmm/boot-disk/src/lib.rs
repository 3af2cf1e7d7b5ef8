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
//! The guest writes the disk, and may attack its own vmm by it. So no number from the disk is trusted: all reads
//! come from one budget of bytes and of time, each loop reads or goes over bytes that were read, and sizes are compared with limits before
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
#[cfg(test)]
mod tests;
mod trail;
mod uki;
mod version;
mod volume;

use std::{io, rc::Rc, time::Duration};

use self::{
    entry::Draft,
    error::Fault,
    filesystem::FileSystem,
    partitions::Role,
    trail::Trail,
    volume::{Budget, Volume},
};
pub use self::{
    entry::{Entry, Found},
    error::{FindError, Places},
    filesystem::Part,
};

/// The part of the budget for metadata: a journal of 1 GiB can be read once.
const METADATA: u64 = 1 << 30;
/// The largest budget in bytes.
const MOST: u64 = 16 << 30;
/// The time for all reads of a boot: enough for a slow disk of an honest guest, and less than the agent waits for a boot.
const TIME: Duration = Duration::from_secs(60);

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

/// A kernel, and the number of its file system in the menu.
type Numbered = Result<(usize, Draft), Fault>;

/// Finds a kernel in file systems with one menu.
enum Find {
    /// Partitions for boot loaders are one menu. Notes are faults of entries that are skipped.
    Together(fn(&[&dyn FileSystem], &mut Vec<String>) -> Numbered),
    /// Each file system has a menu.
    Each(fn(&dyn FileSystem) -> Result<Draft, Fault>),
}

/// A way in which systems name the kernel to boot.
struct Place {
    name: &'static str,
    find: Find,
    /// Its kernels come with the words of their command line.
    has_cmdline: bool,
}

const PLACES: &[Place] = &[
    Place { name: "boot loader entries", find: Find::Together(bls::find), has_cmdline: true },
    Place { name: "GRUB's menu", find: Find::Each(grub::find), has_cmdline: true },
    Place { name: "Debian's links", find: Find::Each(debian::find), has_cmdline: false },
];

/// Finds the kernel to boot. `memory` is the guest's memory in bytes, which bounds the kernel and the initramfs. `cmdline` has
/// the words that the caller appends to the kernel's command line.
///
/// # Errors
/// See [`FindError`].
pub fn find(disk: Box<dyn Disk>, memory: u64, cmdline: &str) -> Result<Entry, FindError> {
    find_within(disk, memory, cmdline, Budget::new(memory.saturating_add(METADATA).min(MOST), TIME))
}

/// The same with another budget.
fn find_within(disk: Box<dyn Disk>, memory: u64, cmdline: &str, budget: Budget) -> Result<Entry, FindError> {
    let whole = Volume::whole(disk, budget);
    let mut trail = Trail::default();
    let mut opened: Vec<(String, Rc<dyn FileSystem>)> = Vec::new();
    // The first ones, which are for boot loaders.
    let mut together = 0;
    let mut partitions = match partitions::list(&whole) {
        Ok(partitions) => partitions,
        Err(fault) => {
            trail.fault("the disk", fault)?;
            Vec::new()
        }
    };
    partitions.sort_by_key(|partition| partition.role);
    for partition in partitions {
        let name = partition.name;
        match probe::open(&partition.volume) {
            Ok(Some(files)) => {
                opened.push((format!("{name}, {}", files.kind()), files));
                together += usize::from(partition.role != Role::Other);
            }
            Ok(None) => trail.nothing(&name, &"no file system that is known"),
            Err(fault @ Fault::Unsupported(_)) => trail.other(&name, &fault),
            Err(fault) => trail.fault(&name, fault)?,
        }
    }
    for place in PLACES {
        for (volumes, files) in menus(&opened, together, &place.find) {
            let at = format!("{}, {}", volumes.join(" and "), place.name);
            let mut notes = Vec::new();
            let draft = match &place.find {
                Find::Together(find) => find(&files, &mut notes),
                Find::Each(find) => files.first().map_or_else(
                    || Err(Fault::Absent("file system".to_owned())),
                    |files| find(*files).map(|draft| (0, draft)),
                ),
            };
            for note in notes {
                trail.fault(&at, Fault::Entry(note))?;
            }
            let draft = draft.and_then(|(number, draft)| {
                let name = volumes.get(number).copied().unwrap_or_default();
                if place.has_cmdline || trail.passed_over().is_empty() || has_root(cmdline) {
                    return draft.read(name.to_owned(), place.name, memory);
                }
                let text = "its kernel has no command line, and the disk may name another one where there are \
                    faults: mend them, or give root= in boot.cmdline";
                Err(Fault::Entry(text.to_owned()))
            });
            match draft {
                Ok(mut entry) => {
                    entry.found.passed_over = trail.passed_over().to_string();
                    return Ok(entry);
                }
                Err(fault) if fault.is_absence() => trail.nothing(&at, &fault),
                Err(fault) => trail.fault(&at, fault)?,
            }
        }
    }
    Err(trail.end())
}

/// File systems with their names.
type Menu<'a> = (Vec<&'a str>, Vec<&'a dyn FileSystem>);

/// The file systems that have one menu each: the first `together` have one menu together, if the way of finding it is so.
fn menus<'a>(opened: &'a [(String, Rc<dyn FileSystem>)], together: usize, find: &Find) -> Vec<Menu<'a>> {
    let together = if matches!(find, Find::Together(_)) { together } else { 0 };
    let (first, others) = opened.split_at_checked(together).unwrap_or((&[], opened));
    let menu = |files: &'a [(String, Rc<dyn FileSystem>)]| {
        let names = files.iter().map(|(name, _)| name.as_str()).collect();
        (names, files.iter().map(|(_, files)| files.as_ref()).collect())
    };
    let first = (!first.is_empty()).then(|| menu(first));
    first.into_iter().chain(others.chunks(1).map(menu)).collect()
}

/// Whether a kernel with this command line needs no other one to find its root file system.
fn has_root(cmdline: &str) -> bool {
    cmdline.split_whitespace().any(|word| word.starts_with("root="))
}
