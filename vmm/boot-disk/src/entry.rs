// SPDX-License-Identifier: Apache-2.0

//! A kernel with all that it boots with.

use std::rc::Rc;

use crate::{
    error::{Fault, printable},
    filesystem::{Contents, Part},
};

/// The largest kernel image in bytes.
const MOST_KERNEL: u64 = 128 << 20;
/// Bytes of a kernel with the signs of its format.
const HEAD: usize = 64;
/// The most parts of an initramfs.
const MOST_PARTS: usize = 16;
/// The longest command line in bytes: that of x86 Linux.
const MOST_CMDLINE: usize = 2047;

/// A kernel that the disk boots.
pub struct Entry {
    /// The kernel's image.
    pub kernel: Vec<u8>,
    /// The parts of its initramfs, in their order. Together they have no more bytes than the guest's memory.
    pub initramfs: Vec<Part>,
    /// Its command line: one line without control characters.
    pub cmdline: String,
    /// Where it was found.
    pub found: Found,
}

/// The place of a kernel, in words for people: printable, and not long.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// The partition and its file system.
    pub volume: String,
    /// The kind of entry, or the file that names the kernel.
    pub source: String,
    /// The entry's title, or the kernel's path.
    pub title: String,
    /// The kernel's path in its file system.
    pub path: String,
    /// Places before it with faults. Empty without any.
    pub passed_over: String,
}

/// An entry whose kernel is not read yet.
pub(crate) struct Draft {
    pub(crate) title: String,
    /// The kernel's path, for errors.
    pub(crate) path: String,
    pub(crate) kernel: Part,
    pub(crate) initramfs: Vec<Part>,
    pub(crate) cmdline: String,
}

impl Draft {
    /// An entry of files, without a command line.
    pub(crate) fn files(path: &str, kernel: Rc<dyn Contents>, parts: Vec<Rc<dyn Contents>>) -> Self {
        Self {
            title: printable(path),
            path: printable(path),
            kernel: Part::whole(kernel),
            initramfs: parts.into_iter().map(Part::whole).collect(),
            cmdline: String::new(),
        }
    }

    /// Reads the kernel. `memory` is that of the guest in bytes.
    pub(crate) fn read(self, volume: String, source: &str, memory: u64) -> Result<Entry, Fault> {
        let size = self.initramfs.iter().fold(0, |all: u64, part| all.saturating_add(part.size()));
        if size > memory {
            return Err(Fault::TooLarge { path: "the initramfs".to_owned(), size, most: memory });
        }
        if self.initramfs.len() > MOST_PARTS {
            return Err(Fault::Entry(format!("its initramfs has more than {MOST_PARTS} parts")));
        }
        // Tabs and line ends separate words, as blanks do.
        let cmdline = self.cmdline.split_whitespace().collect::<Vec<_>>().join(" ");
        if cmdline.len() > MOST_CMDLINE || cmdline.chars().any(char::is_control) {
            let text = "its command line is longer than 2047 bytes, or has a control character";
            return Err(Fault::Entry(text.to_owned()));
        }
        // The first bytes before all others: an entry that cannot be booted costs one read.
        let head = self.kernel.head(HEAD)?;
        if head.is_empty() {
            return Err(Fault::Entry(format!("{} is empty", self.path)));
        }
        // "zimg" behind the DOS header (drivers/firmware/efi/libstub/zboot-header.S), and the magic number of gzip.
        if head.starts_with(b"MZ") && head.get(4..8) == Some(b"zimg") || head.starts_with(&[0x1f, 0x8b]) {
            let text = format!(
                "{} is a compressed image, and only a bzImage or an ELF image can be booted",
                self.path
            );
            return Err(Fault::Entry(text));
        }
        let kernel = self.kernel.all(&self.path, MOST_KERNEL.min(memory))?;
        let (title, path) = (self.title, self.path);
        let found = Found { volume, source: source.to_owned(), title, path, passed_over: String::new() };
        Ok(Entry { kernel, initramfs: self.initramfs, cmdline, found })
    }
}
