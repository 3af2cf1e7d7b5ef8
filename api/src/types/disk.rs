// SPDX-License-Identifier: Apache-2.0

//! Disks of virtual machines.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{ByteSize, DiskLimits, Name, disk_limits::limits_if_any};
use crate::problem::Problem;

/// The most disks of a VM.
pub const MAX_DISKS: usize = 16;
/// The most backing files of a disk.
const MAX_CHAIN: usize = 16;
/// The most backing files of all disks of a VM.
const MAX_BACKING: usize = 32;
/// The longest serial number in bytes (Virtual I/O Device 1.2, 5.2.6).
pub const MAX_SERIAL: usize = 20;

/// A disk of a VM: a virtio block device (`/dev/vda`, …). The order is that of the slots on the guest's bus.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DiskSpec {
    /// Unique within the VM.
    #[schema(example = "root")]
    pub id: Name,
    /// The file or block device. A relative path is looked up in the agent's disk directories, for a read-only or
    /// ephemeral disk also in its image directories. Elsewhere the file is opened with the rights of the caller and of the specification's authors.
    #[schema(example = "web1.raw")]
    pub path: String,
    /// The format of the file. It is never guessed: a guest could write the header of another one.
    pub format: DiskFormat,
    /// The backing files of a qcow2 image, the next one first: all that the headers name, in the same order. They are only read,
    /// and several disks may share them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(max_items = 16)]
    pub backing: Vec<BackingSpec>,
    /// The guest cannot write. Several VMs may have the file then.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub read_only: bool,
    /// The guest writes, and its writes vanish at the end of the VM's process: at a stop, not at a reboot. The file and its
    /// backing files are only read, so several VMs may have them.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ephemeral: bool,
    /// The serial number in the guest (`/dev/disk/by-id/virtio-SERIAL`): 1 to 20 printable ASCII characters, without blanks.
    /// The disk's id if there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = "web1-root", min_length = 1, max_length = 20)]
    pub serial: Option<String>,
    /// The guest's discards (`fstrim`) give room back to the host.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub discard: bool,
    /// The use of the host's page cache.
    #[serde(default, skip_serializing_if = "DiskCache::is_default")]
    pub cache: DiskCache,
    /// The reaction to a full file system of the host.
    #[serde(default, skip_serializing_if = "OnFull::is_default")]
    pub on_full: OnFull,
    /// Limits of its requests. They may be changed while the VM runs.
    #[serde(default, deserialize_with = "limits_if_any", skip_serializing_if = "Option::is_none")]
    pub limits: Option<DiskLimits>,
}

/// The size of a disk of a running VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DiskSize {
    /// The disk's id.
    #[schema(example = "root")]
    pub disk: Name,
    /// The size in bytes: a multiple of 512, and not less than the disk has.
    #[schema(example = "20GiB")]
    pub size: ByteSize,
}

impl DiskSize {
    /// The rules that types cannot hold.
    ///
    /// # Errors
    /// `invalid_request` with the field `size`.
    pub fn check(&self) -> Result<(), Problem> {
        if self.size.bytes() > 0 && self.size.bytes().is_multiple_of(512) {
            return Ok(());
        }
        Err(Problem::invalid("size", format!("{} is not a multiple of 512 bytes above 0.", self.size)))
    }
}

/// The reaction to a request of the guest for which the file system of the disk's file has no room.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnFull {
    /// The VM is paused, with the cause `disk_full`, and goes on when there is room.
    #[default]
    Pause,
    /// The request fails with an I/O error in the guest.
    Error,
}

/// The use of the host's page cache for a disk's own file. Backing files are always read through it, since VMs share them. A
/// flush of the guest is durable in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum DiskCache {
    /// Reads and writes go through the cache: the guest's repeated reads are fast, and take memory of the host.
    #[default]
    Writeback,
    /// The cache is bypassed (O_DIRECT), for databases and for hosts with little memory. A raw file needs a multiple of
    /// 4 KiB. Some file systems cannot do it.
    None,
}

impl DiskCache {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl OnFull {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// A backing file of a qcow2 image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BackingSpec {
    /// The file. A relative path is looked up in the agent's disk and image directories.
    #[schema(example = "debian-12.qcow2")]
    pub path: String,
    /// The format of the file.
    pub format: DiskFormat,
}

/// The formats of disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum DiskFormat {
    /// Byte for byte: a file, or a block device.
    Raw,
    /// QEMU's format, versions 2 (for reading only) and 3, a regular file.
    Qcow2,
}

impl DiskFormat {
    /// The name on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

impl DiskSpec {
    /// The serial number in the guest.
    #[must_use]
    pub fn serial(&self) -> &str {
        let id = self.id.as_str();
        self.serial.as_deref().unwrap_or(id.get(..MAX_SERIAL).unwrap_or(id))
    }

    /// Whether the two describe the same running disk: a change between them is possible without a stop of the VM.
    #[must_use]
    pub fn same_disk(&self, other: &Self) -> bool {
        *self == Self { limits: self.limits, ..other.clone() }
    }
}

fn check_backing(n: usize, disk: &DiskSpec) -> Result<(), Problem> {
    let field = |rest: &str| format!("disks[{n}].backing{rest}");
    if disk.format == DiskFormat::Raw && !disk.backing.is_empty() {
        return Err(Problem::invalid(
            field(""),
            "A raw disk has no backing file: leave out backing, or use qcow2.",
        ));
    }
    if disk.backing.len() > MAX_CHAIN {
        let detail =
            format!("A disk has at most {MAX_CHAIN} backing files: run `qemu-img commit` on the chain.");
        return Err(Problem::invalid(field(""), detail));
    }
    for (m, backing) in disk.backing.iter().enumerate() {
        super::vm::check_path(&field(&format!("[{m}].path")), &backing.path)?;
        if backing.format == DiskFormat::Raw && m + 1 < disk.backing.len() {
            let detail = "A raw file has no backing file: it is the last of the chain.";
            return Err(Problem::invalid(field(&format!("[{m}].format")), detail));
        }
    }
    Ok(())
}

/// The rules that types cannot hold.
///
/// # Errors
/// `invalid_request` with the field of the first rule that is broken.
pub(super) fn check(disks: &[DiskSpec]) -> Result<(), Problem> {
    if disks.len() > MAX_DISKS {
        return Err(Problem::invalid("disks", format!("A VM has at most {MAX_DISKS} disks.")));
    }
    if disks.iter().map(|disk| disk.backing.len()).sum::<usize>() > MAX_BACKING {
        return Err(Problem::invalid(
            "disks",
            format!("The disks of a VM have at most {MAX_BACKING} backing files."),
        ));
    }
    for (n, disk) in disks.iter().enumerate() {
        check_backing(n, disk)?;
        let mut before = disks.iter().take(n);
        if before.any(|other| other.id == disk.id) {
            let detail = format!("The id {} is used by two disks.", disk.id);
            return Err(Problem::invalid(format!("disks[{n}].id"), detail));
        }
        super::vm::check_path(&format!("disks[{n}].path"), &disk.path)?;
        let well_formed = |serial: &String| {
            (1..=MAX_SERIAL).contains(&serial.len()) && serial.bytes().all(|byte| byte.is_ascii_graphic())
        };
        if disk.serial.as_ref().is_some_and(|serial| !well_formed(serial)) {
            let detail =
                format!("A serial number has 1 to {MAX_SERIAL} printable ASCII characters and no blank.");
            return Err(Problem::invalid(format!("disks[{n}].serial"), detail));
        }
        if disks.iter().take(n).any(|other| other.serial() == disk.serial()) {
            let detail =
                format!("The serial number {} is used by two disks: give each a serial.", disk.serial());
            return Err(Problem::invalid(format!("disks[{n}].serial"), detail));
        }
        if let Some(limits) = &disk.limits {
            limits.check(&format!("disks[{n}].limits"))?;
        }
        if disk.read_only && disk.ephemeral {
            let detail =
                "A read-only disk has no changes that could vanish: leave out ephemeral or read_only.";
            return Err(Problem::invalid(format!("disks[{n}].ephemeral"), detail));
        }
        if disk.ephemeral && disk.cache == DiskCache::None {
            let detail =
                "The changes of an ephemeral disk are in the host's cache: leave out cache or ephemeral.";
            return Err(Problem::invalid(format!("disks[{n}].cache"), detail));
        }
        if disk.read_only && disk.discard {
            let detail = "A read-only disk cannot be discarded: leave out discard or read_only.";
            return Err(Problem::invalid(format!("disks[{n}].discard"), detail));
        }
    }
    Ok(())
}
