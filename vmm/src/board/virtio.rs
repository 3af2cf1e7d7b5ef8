// SPDX-License-Identifier: Apache-2.0

//! Virtio devices of a machine, from its specification and files.

use std::{
    collections::BTreeMap,
    error::Error,
    fs::File,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use devices::device::Device;
use protocol::{DiskFormat, DiskLimits, DiskRate, DiskSpec, DiskStats, files, qcow2_tables};
use virtio::{
    block::{self, Block, Counters, Options, Remote, Reports},
    disk::{Disk, Format, SECTOR, qcow2::Qcow2Disk, raw::RawDisk},
    engine::{Configuration, Engine, Identity},
    entropy::{self, Entropy},
    limit::{Limits, Rate},
    transport::{Connections, VirtioFunction},
};

use super::{Board, BoardError, DiskContents, Parts};
use crate::vcpu::Event;

/// Further bytes by which its file may grow, for clusters that crashes have leaked. What was leaked before is in the length
/// of the file.
const LEAKS: u64 = 1 << 30;

/// The facts of a machine's disks that outlive their construction.
#[derive(Default)]
pub struct Disks {
    /// Counters by the disks' names.
    counters: BTreeMap<String, Arc<Counters>>,
    /// The ways to their threads, by the disks' names.
    remotes: BTreeMap<String, Remote>,
    /// The devices, by the disks' names.
    functions: BTreeMap<String, Arc<VirtioFunction>>,
    /// The length in bytes of the longest file that a disk may write.
    pub longest_file: u64,
}

impl Disks {
    /// Counters by the disks' names.
    #[must_use]
    pub fn stats(&self) -> BTreeMap<String, DiskStats> {
        self.counters.iter().map(|(id, counters)| (id.clone(), read(counters))).collect()
    }

    /// The contents of a disk, for the machine's boots.
    #[must_use]
    pub fn contents(&self, id: &str) -> Option<DiskContents> {
        Some(DiskContents::new(Arc::clone(self.functions.get(id)?)))
    }

    /// Replaces the limits of a disk.
    ///
    /// # Errors
    /// See [`DiskError`].
    pub fn limit(&self, id: &str, limits: &DiskLimits) -> Result<(), DiskError> {
        let remote = self.remotes.get(id).ok_or_else(|| DiskError::Unknown(id.to_owned()))?;
        remote.limit(of_limits(limits));
        Ok(())
    }

    /// Begins to enlarge a disk, under a number of its own. [`Event::DiskGrown`] tells that [`Self::grown`] has the result.
    ///
    /// # Errors
    /// See [`DiskError`].
    pub fn grow(&self, id: &str, number: u64, size: u64) -> Result<(), DiskError> {
        let remote = self.remotes.get(id).ok_or_else(|| DiskError::Unknown(id.to_owned()))?;
        if !size.is_multiple_of(SECTOR) {
            return Err(DiskError::Sectors(size));
        }
        remote.grow(number, size);
        Ok(())
    }

    /// Takes the result of growth `number`; None while it is under way.
    #[must_use]
    pub fn grown(&self, id: &str, number: u64) -> Option<Result<(), DiskError>> {
        let grown = self.remotes.get(id)?.grown(number)?;
        Some(grown.map_err(|source| DiskError::Grow { id: id.to_owned(), source }))
    }

    /// Ends the growth of a disk. The disk keeps its size.
    pub fn cancel_growth(&self, id: &str) {
        if let Some(remote) = self.remotes.get(id) {
            remote.cancel_growth();
        }
    }
}

/// A disk cannot carry out a command.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The machine has no such disk.
    #[error("The VM has no disk {0}")]
    Unknown(String),
    /// Disks have whole sectors.
    #[error("{0} is not a multiple of 512 bytes, and a disk has whole sectors")]
    Sectors(u64),
    /// The size cannot be changed.
    #[error("The disk {id} cannot be enlarged")]
    Grow {
        /// The disk's name.
        id: String,
        /// The cause.
        source: std::io::Error,
    },
}

fn of_limits(limits: &DiskLimits) -> Limits {
    let rate = |rate: DiskRate| Rate { per_second: rate.per_second, burst: rate.burst };
    Limits { bytes: limits.bytes.map(rate), operations: limits.operations.map(rate) }
}

fn read(counters: &Counters) -> DiskStats {
    let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    DiskStats {
        reads: read(&counters.reads),
        writes: read(&counters.writes),
        flushes: read(&counters.flushes),
        discards: read(&counters.discards),
        read_bytes: read(&counters.read_bytes),
        written_bytes: read(&counters.written_bytes),
        errors: read(&counters.errors),
        busy_ns: read(&counters.busy_ns),
    }
}

pub(super) fn failed(device: &str) -> impl FnOnce(Box<dyn Error + Send + Sync>) -> BoardError {
    move |source| BoardError::Device { device: device.to_owned(), source }
}

/// Makes a function, and puts it on the bus.
pub(super) fn insert(
    board: &Board,
    parts: &mut Parts<'_>,
    identity: Identity,
    configuration: Arc<Configuration>,
    engine: Box<dyn Engine>,
) -> Result<Arc<VirtioFunction>, BoardError> {
    let name = identity.name.clone();
    let connections = Connections {
        memory: Arc::new(parts.memory.clone()),
        router: parts.router(),
        doorbells: parts.doorbells(),
        windows: parts.pci.bars(),
    };
    let insert = || -> Result<Arc<VirtioFunction>, Box<dyn Error + Send + Sync>> {
        let function = VirtioFunction::new(identity, configuration, engine, connections)?;
        let address =
            parts.bars.take(function.bar()).ok_or("the guest's PCI windows have no room for its BAR")?;
        function.assign(address)?;
        let function = Arc::new(function);
        board.pci.add(function.clone())?;
        Ok(function)
    };
    insert().map_err(failed(&name))
}

/// Builds the disks, in their order.
pub(super) fn disks(board: &Board, parts: &mut Parts<'_>) -> Result<Vec<Arc<dyn Device>>, BoardError> {
    let specs = &parts.spec.disks;
    specs.iter().map(|spec| disk(board, parts, spec)).collect()
}

fn disk(board: &Board, parts: &mut Parts<'_>, spec: &DiskSpec) -> Result<Arc<dyn Device>, BoardError> {
    let file = parts.files.require(&files::disk(&spec.id)).map_err(|error| failed(&spec.id)(error.into()))?;
    let (disk, longest) = open(parts, spec, File::from(file))?;
    if !spec.read_only {
        parts.disks.longest_file = parts.disks.longest_file.max(longest);
    }
    let options = Options {
        id: spec.id.clone(),
        read_only: spec.read_only,
        serial: spec.serial.clone(),
        discard: spec.discard,
        limits: of_limits(&spec.limits),
        wait_for_room: spec.wait_for_room,
    };
    let counters = Arc::<Counters>::default();
    parts.disks.counters.insert(spec.id.clone(), Arc::clone(&counters));
    let (identity, configuration) = (block::identity(&options), block::configuration(disk.size()));
    let (events, id) = (Arc::clone(parts.events), spec.id.clone());
    let growth = Arc::clone(parts.events);
    let reports = Reports {
        on_full: Box::new(move || events.send(Event::DiskFull { disk: id.clone() })),
        on_grown: Box::new(move || growth.send(Event::DiskGrown)),
    };
    let (block, remote) = Block::new(disk, options, counters, Arc::clone(&configuration), reports)
        .map_err(|error| failed(&spec.id)(error.into()))?;
    parts.disks.remotes.insert(spec.id.clone(), remote);
    let function = insert(board, parts, identity, configuration, Box::new(block))?;
    parts.disks.functions.insert(spec.id.clone(), Arc::clone(&function));
    Ok(function)
}

/// Opens the format of a disk. Returns the length that its file may reach, too.
fn open(parts: &mut Parts<'_>, spec: &DiskSpec, file: File) -> Result<(Box<dyn Disk>, u64), BoardError> {
    if spec.format == DiskFormat::Raw && !spec.ephemeral {
        let disk = RawDisk::new(file).map_err(|error| failed(&spec.id)(error.into()))?;
        let longest = disk.file_length();
        return Ok((Box::new(disk), longest));
    }
    let mut take = |name: &str| {
        let file = parts.files.require(name);
        file.map(File::from).map_err(|error| failed(&spec.id)(error.into()))
    };
    let mut backing = Vec::new();
    for (number, format) in spec.backing.iter().enumerate() {
        backing.push((of_format(*format), take(&files::backing(&spec.id, number))?));
    }
    let disk = if spec.ephemeral {
        let overlay = take(&files::overlay(&spec.id))?;
        Qcow2Disk::overlay(overlay, (of_format(spec.format), file), backing)
    } else {
        Qcow2Disk::open(file, backing, !spec.read_only)
    };
    let disk = disk.map_err(|source| BoardError::Disk { id: spec.id.clone(), source })?;
    let tables = qcow2_tables(disk.size());
    let longest = disk.file_length().saturating_add(disk.size()).saturating_add(tables).saturating_add(LEAKS);
    Ok((Box::new(disk), longest))
}

fn of_format(format: DiskFormat) -> Format {
    match format {
        DiskFormat::Raw => Format::Raw,
        DiskFormat::Qcow2 => Format::Qcow2,
    }
}

/// Builds the entropy device, if the machine has it.
pub(super) fn entropy(board: &Board, parts: &mut Parts<'_>) -> Result<Vec<Arc<dyn Device>>, BoardError> {
    if !parts.spec.entropy {
        return Ok(Vec::new());
    }
    let device = insert(board, parts, entropy::identity(), Configuration::new(Vec::new()), Box::new(Entropy));
    Ok(vec![device? as Arc<dyn Device>])
}
