// SPDX-License-Identifier: Apache-2.0

//! Errors of images.

use std::{fmt, io};

/// A file of the chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layer {
    /// The disk's own file.
    Image,
    /// A backing file. The first one has number 1.
    Backing(usize),
    /// The new image over a disk's own file.
    Overlay,
}

impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Image => f.write_str("The image"),
            Self::Backing(number) => write!(f, "Backing file {number}"),
            Self::Overlay => f.write_str("The overlay of the ephemeral disk"),
        }
    }
}

/// An image that cannot be a disk.
#[derive(Debug, thiserror::Error)]
#[error("{layer} {refusal}")]
pub struct OpenError {
    /// The file at fault.
    pub layer: Layer,
    /// The cause, and its cure.
    pub refusal: Refusal,
}

/// The cause for which an image is refused. Its text goes on after the name of a file.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// The first bytes are others.
    #[error("is not in the format qcow2: correct the format, or run `qemu-img convert -O qcow2` on it")]
    NotQcow2,
    /// A later version of the format.
    #[error("has version {0} of qcow2, and 2 and 3 are supported: run `qemu-img convert -O qcow2` on it")]
    Version(u32),
    /// The file ends in its header.
    #[error("ends within its header: restore it from a copy")]
    HeaderCut,
    /// A field of the header is out of range, or a table is outside of the file.
    #[error(
        "has an invalid header ({field} is {value:#x}): run `qemu-img check -r all` on it, or restore it"
    )]
    Header {
        /// The field's name in the specification of the format.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// The L1 table has more than 32 MiB.
    #[error(
        "has {size} bytes, and {largest} are supported with its clusters: \
         run `qemu-img convert -O qcow2 -o cluster_size=2M` on it"
    )]
    TooLarge {
        /// Bytes of the disk.
        size: u64,
        /// The most bytes with clusters of this size.
        largest: u64,
    },
    /// Each cluster is encrypted.
    #[error("is encrypted (method {0}): run `qemu-img convert -O qcow2` on it")]
    Encrypted(u32),
    /// The data is in another file.
    #[error("has its data in another file: run `qemu-img convert -O qcow2` on it")]
    ExternalData,
    /// Extended L2 entries.
    #[error("has extended L2 entries: run `qemu-img convert -O qcow2 -o extended_l2=off` on it")]
    ExtendedL2,
    /// Compression by zstd, or by a later method.
    #[error(
        "has compression method {0}, and zlib (0) is supported: \
         run `qemu-img convert -O qcow2 -o compression_type=zlib` on it"
    )]
    Compression(u8),
    /// Incompatible features of later versions.
    #[error("has unknown incompatible features {0:#x}: run `qemu-img convert -O qcow2` on it")]
    Features(u64),
    /// The last writer has not closed it, and its refcounts are old.
    #[error("is marked as dirty: run `qemu-img check -r all` on it")]
    Dirty,
    /// A writer has found it corrupt.
    #[error("is marked as corrupt: run `qemu-img check -r all` on it")]
    Corrupt,
    /// Clusters of the disk are behind the end of the file.
    #[error("is cut: data at {offset:#x} is behind its end at {len:#x}. Restore it from a copy")]
    Truncated {
        /// Offset in the file of a cluster in use.
        offset: u64,
        /// Length of the file.
        len: u64,
    },
    /// It needs a backing file.
    #[error(
        "has the backing file {0:?}, and the disk's chain ends here: add that, or run `qemu-img rebase` on it"
    )]
    BackingMissing(String),
    /// It has no backing file.
    #[error(
        "has no backing file, and the disk's chain goes on: remove the rest, or run `qemu-img rebase` on it"
    )]
    BackingUnexpected,
    /// The chain is too long.
    #[error(
        "is one of more than {0} files: run `qemu-img commit` or `qemu-img convert -O qcow2` on the chain"
    )]
    ChainTooLong(usize),
    /// Version 2 has no zero clusters: a discard would show the backing file again.
    #[error("has version 2 of qcow2, which is for reading only: run `qemu-img amend -o compat=1.1` on it")]
    WriteOld,
    /// Each small cluster has a cost of its own: one request could take minutes.
    #[error(
        "has clusters of {0} bytes and is for reading only: \
         run `qemu-img convert -O qcow2 -o cluster_size=64k` on it"
    )]
    WriteSmall(u64),
    /// Internal snapshots.
    #[error("has internal snapshots and is for reading only: remove them by `qemu-img snapshot -d`")]
    WriteSnapshots,
    /// A file that cannot grow.
    #[error("is not a regular file and is for reading only: copy it to a file, or use the format raw")]
    WriteDevice,
    /// A file for a new image that is not empty.
    #[error("has contents already: agent and vmm are of different versions. Restart the agent")]
    OverlayInUse,
    /// The L1 table of a new image would have more than 32 MiB.
    #[error(
        "has {size} bytes, and {largest} are supported: make the disk read_only, or make an overlay by `qemu-img create`"
    )]
    OverlayTooLarge {
        /// Bytes of the disk.
        size: u64,
        /// The most bytes.
        largest: u64,
    },
    /// Metadata that is seen at the open only.
    #[error("is damaged. {0}")]
    Damaged(Damage),
    /// The host's file failed.
    #[error("cannot be read: {0}. Check the host's storage")]
    Io(io::Error),
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        match error.downcast::<Damage>() {
            Ok(damage) => Self::Damaged(damage),
            Err(error) => Self::Io(error),
        }
    }
}

/// Metadata that contradicts itself, seen during a request. The request fails.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Damage {
    /// A table is not aligned, outside of the file, or over another table.
    #[error("A table of the qcow2 image cannot be at {at:#x}: run `qemu-img check -r all` on it")]
    Table {
        /// Offset in the file.
        at: u64,
    },
    /// A table is for mappings and for refcounts.
    #[error("Two tables of the qcow2 image are at {at:#x}: run `qemu-img check -r all` on it")]
    TwoTables {
        /// Offset in the file.
        at: u64,
    },
    /// Data is not aligned, outside of the file, or over a table.
    #[error("Data of the qcow2 image cannot be at {at:#x}: run `qemu-img check -r all` on it")]
    Data {
        /// Offset in the file.
        at: u64,
    },
    /// An L2 table that a snapshot has, too.
    #[error("An L2 table of the qcow2 image at {at:#x} is not its own: run `qemu-img check -r all` on it")]
    SharedTable {
        /// Offset in the file.
        at: u64,
    },
    /// The bytes are no compressed cluster.
    #[error("A compressed cluster of the qcow2 image at {at:#x} is invalid: restore the image from a copy")]
    Compressed {
        /// Offset in the file.
        at: u64,
    },
    /// All clusters behind the end have refcounts.
    #[error("The refcounts of the qcow2 image leave no cluster free: run `qemu-img check -r all` on it")]
    Refcounts,
    /// The refcount table is at its largest size.
    #[error("The refcount table of the qcow2 image is full: run `qemu-img convert -O qcow2` on it")]
    Full,
    /// No row of clusters for a longer L1 table is free.
    #[error(
        "The qcow2 image has no room for a longer L1 table: stop the VM, and run `qemu-img resize` on it"
    )]
    Scattered,
    /// The host's file has lost data. A later flush must not hide that.
    #[error("An earlier flush of the qcow2 image has failed: stop the VM, and check the host's storage")]
    LostWrites,
}

impl From<Damage> for io::Error {
    fn from(damage: Damage) -> Self {
        let kind = match damage {
            Damage::Full => io::ErrorKind::StorageFull,
            _ => io::ErrorKind::InvalidData,
        };
        Self::new(kind, damage)
    }
}
