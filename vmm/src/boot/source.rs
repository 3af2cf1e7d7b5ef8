// SPDX-License-Identifier: Apache-2.0

//! The places from which a machine boots: files of the host, or the kernel that its guest has installed on a disk.

use std::{
    fs::File,
    io::{Cursor, Read, Seek, SeekFrom},
};

use boot_disk::Found;
use vm_memory::{Bytes, GuestAddress, ReadVolatile};

use super::BootError;
use crate::{board::DiskContents, memory::GuestMemory};

/// Bytes of an initramfs that are read from a disk at once.
const CHUNK: usize = 256 << 10;
/// The most log lines of one machine about other kernels than that of the last boot: the guest can change its disk at each
/// reboot.
const LOGGED: u32 = 32;

/// The source of a machine's kernel and initramfs, kept for reboots.
pub enum Source {
    /// Files of the host.
    Files {
        /// The kernel image.
        kernel: File,
        /// The initramfs files, in their order.
        initramfs: Vec<File>,
    },
    /// A disk of the machine. Each boot looks for the kernel again, so that the guest's upgrades take effect.
    Disk(InstalledKernel),
}

/// The disk with the kernel that a guest has installed.
pub struct InstalledKernel {
    disk: String,
    contents: DiskContents,
    last: Option<Found>,
    logged: u32,
}

impl InstalledKernel {
    /// Boots from this disk.
    #[must_use]
    pub fn new(disk: String, contents: DiskContents) -> Self {
        Self { disk, contents, last: None, logged: 0 }
    }

    fn find(&mut self, memory: u64, cmdline: &str) -> Result<boot_disk::Entry, BootError> {
        let entry = boot_disk::find(Box::new(self.contents.clone()), memory, cmdline)
            .map_err(|source| BootError::NoKernelOnDisk { disk: self.disk.clone(), source })?;
        let Found { volume, source, title, path, passed_over } = &entry.found;
        if self.last.as_ref() != Some(&entry.found) && self.logged < LOGGED {
            self.logged += 1;
            tracing::info!(disk = self.disk, volume, source, title, path, "Boots the kernel on a disk");
            if !passed_over.is_empty() {
                tracing::info!(disk = self.disk, places = passed_over, "Passed over places with faults");
            }
        }
        self.last = Some(entry.found.clone());
        Ok(entry)
    }
}

/// A kernel image that can be loaded.
pub(super) trait KernelImage: Read + ReadVolatile + Seek {}

impl<T: Read + ReadVolatile + Seek> KernelImage for T {}

/// A part of an initramfs.
pub(super) struct Part<'a> {
    pub(super) size: u64,
    bytes: PartBytes<'a>,
}

enum PartBytes<'a> {
    File(&'a mut File),
    Disk(boot_disk::Part),
}

impl Source {
    /// Opens the kernel and the initramfs, and passes them to `load`, with the command line of the boot entry. `memory` is
    /// the guest's memory in bytes, `cmdline` the command line of the specification.
    pub(super) fn open<T>(
        &mut self,
        memory: u64,
        cmdline: &str,
        load: impl Load<Output = T>,
    ) -> Result<T, BootError> {
        match self {
            Self::Files { kernel, initramfs } => {
                let parts = initramfs.iter_mut().map(Part::file).collect::<Result<Vec<_>, _>>()?;
                load.load(kernel, parts, "")
            }
            Self::Disk(disk) => {
                let entry = disk.find(memory, cmdline)?;
                let parts = entry.initramfs.into_iter().map(Part::disk).collect();
                let loaded = load.load(&mut Cursor::new(entry.kernel), parts, &entry.cmdline);
                loaded.map_err(|source| BootError::Installed {
                    disk: disk.disk.clone(),
                    volume: entry.found.volume,
                    path: entry.found.path,
                    source: Box::new(source),
                })
            }
        }
    }
}

/// Loads an open kernel: a closure that takes any kind of image.
pub(super) trait Load {
    type Output;

    fn load(
        self,
        kernel: &mut impl KernelImage,
        initramfs: Vec<Part<'_>>,
        cmdline: &str,
    ) -> Result<Self::Output, BootError>;
}

impl<'a> Part<'a> {
    fn file(file: &'a mut File) -> Result<Self, BootError> {
        let read = |e| BootError::Read("initramfs", e);
        let size = file.seek(SeekFrom::End(0)).map_err(read)?;
        file.rewind().map_err(read)?;
        Ok(Self { size, bytes: PartBytes::File(file) })
    }

    fn disk(part: boot_disk::Part) -> Self {
        Self { size: part.size(), bytes: PartBytes::Disk(part) }
    }

    /// Writes the part to guest memory.
    pub(super) fn place(self, memory: &GuestMemory, at: GuestAddress) -> Result<(), BootError> {
        let count = usize::try_from(self.size).unwrap_or(usize::MAX);
        match self.bytes {
            PartBytes::File(file) => {
                memory.read_exact_volatile_from(at, file, count).map_err(BootError::Memory)
            }
            PartBytes::Disk(mut part) => {
                let mut buffer = vec![0; CHUNK.min(count)];
                let mut done = 0;
                while done < count {
                    let chunk = buffer.len().min(count - done);
                    let chunk = buffer.get_mut(..chunk).unwrap_or_default();
                    part.read_exact(chunk).map_err(|e| BootError::Read("initramfs", e))?;
                    let to = at.0.saturating_add(done as u64);
                    memory.write_slice(chunk, GuestAddress(to)).map_err(BootError::Memory)?;
                    done += chunk.len();
                }
                Ok(())
            }
        }
    }
}
