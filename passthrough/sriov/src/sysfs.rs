// SPDX-License-Identifier: Apache-2.0

//! Access to the attributes of sysfs, below a root that tests can replace.

use std::{
    fs, io,
    io::Write,
    path::{Path, PathBuf},
    sync::Arc,
};

use thiserror::Error;

use super::Bdf;

/// Longer than any attribute that is read here.
const LONGEST_ATTRIBUTE: u64 = 4096;

/// An error of sysfs itself.
#[derive(Debug, Error)]
pub enum SysfsError {
    /// A file cannot be read.
    #[error("Cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
    /// The kernel refused a write.
    #[error("Cannot write \"{}\" to {}", value.trim_end(), path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The value.
        value: String,
        /// The kernel's error.
        source: io::Error,
    },
    /// A file has unexpected content.
    #[error("{} holds \"{value}\" where {expected} is expected", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Its content, shortened.
        value: String,
        /// The expected content.
        expected: &'static str,
    },
}

/// The way to write attributes: the kernel's sysfs, or a fake that simulates the kernel's reactions.
pub trait AttributeWriter: Send + Sync {
    /// Writes `value` to the attribute at `path` with one `write`.
    ///
    /// # Errors
    /// Those of the kernel, which are the driver's answers.
    fn write(&self, path: &Path, value: &str) -> io::Result<()>;
}

/// The kernel's own sysfs.
#[derive(Clone, Copy, Debug, Default)]
pub struct KernelWriter;

impl AttributeWriter for KernelWriter {
    fn write(&self, path: &Path, value: &str) -> io::Result<()> {
        // Do not create the file: a missing attribute must be an error in a fake tree too.
        fs::OpenOptions::new().write(true).open(path)?.write_all(value.as_bytes())
    }
}

/// The host's sysfs, with its PFs, VFs, IOMMU groups and drivers.
///
/// Every call reads afresh. Nothing is cached, because other programs change the same state.
#[derive(Clone)]
pub struct Sysfs {
    root: PathBuf,
    dev: PathBuf,
    writer: Arc<dyn AttributeWriter>,
}

impl Default for Sysfs {
    fn default() -> Self {
        Self::new("/sys")
    }
}

impl Sysfs {
    /// The tree at `root`: `/sys`, or a fake one.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self::with_writer(root, Arc::new(KernelWriter))
    }

    /// The tree at `root` with its own writer. Device nodes are those of the host for `/sys`, otherwise those in `dev`
    /// below the root.
    pub fn with_writer(root: impl Into<PathBuf>, writer: Arc<dyn AttributeWriter>) -> Self {
        let root = root.into();
        let dev = if root == Path::new("/sys") { PathBuf::from("/dev") } else { root.join("dev") };
        Self { root, dev, writer }
    }

    /// The device node of an IOMMU group.
    pub(crate) fn group_node(&self, group: &str) -> PathBuf {
        self.dev.join("vfio").join(group)
    }

    /// The device node of a block device. Its name in sysfs has `!` for a slash.
    pub(crate) fn node(&self, block_device: &str) -> PathBuf {
        self.dev.join(block_device.replace('!', "/"))
    }

    /// The directory of a PCI function. It need not exist.
    pub fn device_dir(&self, bdf: Bdf) -> PathBuf {
        self.path("bus/pci/devices").join(bdf.to_string())
    }

    /// Whether the PCI function exists at this moment.
    pub fn has_device(&self, bdf: Bdf) -> bool {
        self.device_dir(bdf).exists()
    }

    pub(crate) fn path(&self, relative: &str) -> PathBuf {
        self.root.join(relative)
    }

    /// The text of an attribute without its line end; `None` if the file does not exist.
    pub(crate) fn text(&self, path: &Path) -> Result<Option<String>, SysfsError> {
        use std::io::Read;

        let read = || {
            let mut text = String::new();
            fs::File::open(path)?.take(LONGEST_ATTRIBUTE).read_to_string(&mut text)?;
            Ok::<_, io::Error>(text)
        };
        match read() {
            Ok(text) => Ok(Some(text.trim_end_matches('\n').to_owned())),
            // A device that disappears while it is read answers ENODEV.
            Err(e) if e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(libc::ENODEV) => {
                Ok(None)
            }
            Err(source) => Err(SysfsError::Read { path: path.to_owned(), source }),
        }
    }

    /// The number in an attribute, decimal or with 0x; `None` if the file does not exist.
    pub(crate) fn number(&self, path: &Path) -> Result<Option<u32>, SysfsError> {
        let Some(text) = self.text(path)? else { return Ok(None) };
        let number = match text.strip_prefix("0x") {
            Some(digits) => u32::from_str_radix(digits, 16),
            None => text.parse(),
        };
        number.map(Some).map_err(|_| malformed(path, &text, "a number"))
    }

    /// Whether a switch is on; `None` if the file does not exist.
    pub(crate) fn flag(&self, path: &Path) -> Result<Option<bool>, SysfsError> {
        match self.text(path)?.as_deref() {
            None => Ok(None),
            Some("0" | "N") => Ok(Some(false)),
            Some("1" | "Y") => Ok(Some(true)),
            Some(other) => Err(malformed(path, other, "0 or 1")),
        }
    }

    /// The last component of a link's target; `None` if there is no link.
    pub(crate) fn link_name(&self, path: &Path) -> Result<Option<String>, SysfsError> {
        match fs::read_link(path) {
            Ok(target) => Ok(target.file_name().map(|name| name.to_string_lossy().into_owned())),
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
            Err(source) => Err(SysfsError::Read { path: path.to_owned(), source }),
        }
    }

    /// The sorted names in a directory; none if it does not exist.
    pub(crate) fn names(&self, path: &Path) -> Result<Vec<String>, SysfsError> {
        let fail = |source| SysfsError::Read { path: path.to_owned(), source };
        let entries = match fs::read_dir(path) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(fail(e)),
        };
        let mut names = Vec::new();
        for entry in entries {
            names.push(entry.map_err(fail)?.file_name().to_string_lossy().into_owned());
        }
        names.sort_unstable();
        Ok(names)
    }

    pub(crate) fn write(&self, path: &Path, value: &str) -> Result<(), SysfsError> {
        tracing::debug!(path = %path.display(), value = value.trim_end(), "sysfs write");
        self.writer.write(path, value).map_err(|source| SysfsError::Write {
            path: path.to_owned(),
            value: value.to_owned(),
            source,
        })
    }
}

pub(crate) fn malformed(path: &Path, value: &str, expected: &'static str) -> SysfsError {
    SysfsError::Malformed { path: path.to_owned(), value: value.chars().take(40).collect(), expected }
}
