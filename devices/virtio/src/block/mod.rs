// SPDX-License-Identifier: Apache-2.0

//! The block device (the specification, 5.2).

mod remote;
#[cfg(test)]
mod tests;

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use devices::io_thread::{Calls, IoSource, IoTimer};
use virtio_bindings::{
    virtio_blk::{
        VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO,
        VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK,
        VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
        VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
    },
    virtio_ids::VIRTIO_ID_BLOCK,
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};

use crate::{
    disk::{Disk, GrowError, SECTOR, is_full},
    engine::{Configuration, Engine, Identity, Served, serve_in_order},
    limit::{Cost, Limiter, Limits},
    negotiation::feature,
    queue::{ActiveQueue, QueueError, Request, length, part, read_array, write_bytes},
};

use self::remote::Growth;
pub use self::remote::Remote;

/// Entries of the queue.
pub const QUEUE: u16 = 256;
/// Bytes of a serial number (the specification, 5.2.6).
pub const SERIAL: usize = 20;
/// Header and status of a request take a buffer each.
const SEGMENTS: u32 = QUEUE as u32 - 2;
/// The most bytes of a request's data. Linux sends 1.25 MiB at most, unless its user raises that.
const MOST_DATA: u64 = 32 << 20;
/// The most sectors of one discard: 1 GiB. A discard writes no data.
const MOST_DISCARDED: u32 = 1 << 21;
/// The most sectors of one request for zeroes: 16 MiB. The host may have to write them.
const MOST_ZEROES: u32 = 1 << 15;
/// Ranges in one discard or request for zeroes.
const RANGES: u32 = 1;
const HEADER: u64 = 16;
const RANGE: usize = 16;
const CAPACITY: usize = 0;
/// PCI class: mass storage, other.
const CLASS: u32 = 0x0180_0000;

/// The properties of a disk in a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// The disk's name.
    pub id: String,
    /// The guest cannot write.
    pub read_only: bool,
    /// The serial number in the guest: 20 bytes at most.
    pub serial: String,
    /// The guest may discard ranges.
    pub discard: bool,
    /// The limits at first.
    pub limits: Limits,
    /// If the host's file system is full, requests wait for room in place of failing.
    pub wait_for_room: bool,
}

/// Counters of a disk since the machine was built.
#[derive(Debug, Default)]
pub struct Counters {
    /// Requests to read.
    pub reads: AtomicU64,
    /// Requests to write, also zeroes.
    pub writes: AtomicU64,
    /// Requests to flush.
    pub flushes: AtomicU64,
    /// Requests to discard.
    pub discards: AtomicU64,
    /// Bytes read.
    pub read_bytes: AtomicU64,
    /// Bytes written.
    pub written_bytes: AtomicU64,
    /// Requests that the host's file failed.
    pub errors: AtomicU64,
    /// Nanoseconds in which the host's file was busy.
    pub busy_ns: AtomicU64,
}

/// The registers' facts of a disk.
#[must_use]
pub fn identity(options: &Options) -> Identity {
    let mut features: Vec<u32> = vec![
        VIRTIO_BLK_F_SEG_MAX,
        VIRTIO_BLK_F_BLK_SIZE,
        VIRTIO_BLK_F_FLUSH,
        VIRTIO_RING_F_INDIRECT_DESC,
        VIRTIO_RING_F_EVENT_IDX,
    ];
    if options.read_only {
        features.push(VIRTIO_BLK_F_RO);
    } else {
        features.push(VIRTIO_BLK_F_WRITE_ZEROES);
        if options.discard {
            features.push(VIRTIO_BLK_F_DISCARD);
        }
    }
    Identity {
        name: format!("disk {}", options.id),
        device: u8::try_from(VIRTIO_ID_BLOCK).unwrap_or_default(),
        class: CLASS,
        features: features.into_iter().fold(0, |all, number| all | feature(number)),
        queues: vec![QUEUE],
        calls: Calls::Disk,
    }
}

/// The configuration of a disk of `size` bytes (the specification, 5.2.4).
#[must_use]
pub fn configuration(size: u64) -> Arc<Configuration> {
    let mut bytes = vec![0; 60];
    let fields: [(usize, &[u8]); 9] = [
        (CAPACITY, &(size / SECTOR).to_le_bytes()),
        (12, &SEGMENTS.to_le_bytes()),
        (20, &u32::try_from(SECTOR).unwrap_or_default().to_le_bytes()),
        (36, &MOST_DISCARDED.to_le_bytes()),
        (40, &RANGES.to_le_bytes()),
        // The alignment of discards, in sectors: a page of the host's file.
        (44, &8_u32.to_le_bytes()),
        (48, &MOST_ZEROES.to_le_bytes()),
        (52, &RANGES.to_le_bytes()),
        // Zeroes may give room back.
        (56, &[1]),
    ];
    for (at, value) in fields {
        for (to, from) in bytes.iter_mut().skip(at).zip(value) {
            *to = *from;
        }
    }
    Configuration::new(bytes)
}

/// A block device over the contents of a disk.
pub struct Block {
    disk: Box<dyn Disk>,
    options: Options,
    counters: Arc<Counters>,
    features: u64,
    limiter: Limiter,
    /// Wakes the thread when a request that waits for its limit may begin.
    timer: IoTimer,
    /// The moment from which the limiter counts.
    begun: Instant,
    inbox: remote::Inbox,
    /// A request waits for room on the host's file system.
    stalled: bool,
    /// That request has paid its limit.
    paid: bool,
    /// The growth under way.
    growing: Option<Growth>,
    /// A growth has a result that the machine does not know of.
    grown: bool,
    /// The registers that show the size.
    configuration: Arc<Configuration>,
    reports: Reports,
}

/// Calls to the machine, on the disk's thread.
pub struct Reports {
    /// A request has to wait for room on the host's file system.
    pub on_full: Box<dyn Fn() + Send>,
    /// [`Remote::grown`] has a result, and the driver has been told of a new size.
    pub on_grown: Box<dyn Fn() + Send>,
}

/// The beginning of a request (5.2.6), which is read once: the guest may change it meanwhile.
#[derive(Clone, Copy)]
struct Header {
    kind: u32,
    /// None for one that no disk has.
    offset: Option<u64>,
}

impl Header {
    fn read(request: &Request<'_>) -> Option<Self> {
        let header: [u8; 16] = read_array(&request.readable)?;
        let [a, b, c, d, _, _, _, _, sector @ ..] = header;
        let offset = u64::from_le_bytes(sector).checked_mul(SECTOR);
        Some(Self { kind: u32::from_le_bytes([a, b, c, d]), offset })
    }
}

/// The end of a request that was not served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Failed {
    /// The driver's request is invalid, or the host's file failed.
    Error,
    /// The device does not have this kind of request.
    Unsupported,
    /// The host's file system has no room.
    Full,
}

/// A range of a discard, or of zeroes, in bytes.
struct Range {
    offset: u64,
    len: u64,
    flags: u32,
}

impl Block {
    /// Makes a device, and the machine's end of its commands. `configuration` has the disk's size, and is changed when
    /// the disk grows.
    ///
    /// # Errors
    /// Those of making eventfds and timers.
    pub fn new(
        disk: Box<dyn Disk>,
        options: Options,
        counters: Arc<Counters>,
        configuration: Arc<Configuration>,
        reports: Reports,
    ) -> io::Result<(Self, Remote)> {
        let (remote, inbox) = remote::pair()?;
        let (timer, begun) = (IoTimer::new()?, Instant::now());
        let mut limiter = Limiter::default();
        limiter.set(options.limits);
        let (features, stalled, paid) = (0, false, false);
        let block = Self {
            disk,
            options,
            counters,
            features,
            limiter,
            timer,
            begun,
            inbox,
            stalled,
            paid,
            growing: None,
            grown: false,
            configuration,
            reports,
        };
        Ok((block, remote))
    }

    /// Serves a request, unless it has to wait for its limit.
    fn request(&mut self, request: &Request<'_>) -> Served {
        let space = length(&request.writable);
        let Some(room) = space.checked_sub(1) else {
            // Without a byte for the status the driver learns nothing.
            return Served::Complete(0);
        };
        let header = Header::read(request);
        if !self.may_begin(header, length(&request.readable), room) {
            return Served::Later;
        }
        let result = header.ok_or(Failed::Error).and_then(|header| self.attempt(request, header, room));
        let (status, written) = match result {
            Ok(written) => (VIRTIO_BLK_S_OK, written),
            Err(Failed::Error) => (VIRTIO_BLK_S_IOERR, 0),
            Err(Failed::Unsupported) => (VIRTIO_BLK_S_UNSUPP, 0),
            Err(Failed::Full) => {
                (self.stalled, self.paid) = (true, true);
                (self.reports.on_full)();
                return Served::Later;
            }
        };
        self.paid = false;
        write_bytes(&part(&request.writable, room, 1), &[u8::try_from(status).unwrap_or(1)]);
        // The count includes all up to the status, which is the last byte (2.7.8.2: an upper bound
        // only if all of it was written).
        Served::Complete(u32::try_from(written.saturating_add(1)).unwrap_or(u32::MAX))
    }

    /// Charges a request to its limits, with `sent` bytes of the driver and `room` bytes for data of the
    /// device. Returns false if it has to wait: the timer is set then.
    fn may_begin(&mut self, header: Option<Header>, sent: u64, room: u64) -> bool {
        if self.paid || self.limiter.is_unlimited() {
            return true;
        }
        let bytes = match header.map(|header| header.kind) {
            Some(VIRTIO_BLK_T_IN) => room,
            Some(VIRTIO_BLK_T_OUT) => sent.saturating_sub(HEADER),
            // Zeroes are charged once their ranges are known.
            _ => 0,
        };
        // Longer ones fail, and move nothing.
        let cost = Cost { bytes: bytes.min(MOST_DATA), operations: 1 };
        let Err(wait) = self.limiter.charge(self.begun.elapsed(), cost) else { return true };
        match self.timer.set(wait) {
            Ok(()) => false,
            Err(error) => {
                // A guest that hangs for ever is worse than one that is too fast.
                tracing::warn!(disk = self.options.id, %error, "A limit cannot be kept: the timer fails");
                true
            }
        }
    }

    /// Serves a request whose writable buffers have `room` bytes before the status.
    fn attempt(&mut self, request: &Request<'_>, header: Header, room: u64) -> Result<u64, Failed> {
        let Header { kind, offset } = header;
        let offset = offset.ok_or(Failed::Error)?;
        let counters = Arc::clone(&self.counters);
        let count = |counter: &AtomicU64, by| {
            counter.fetch_add(by, Ordering::Relaxed);
        };
        match kind {
            VIRTIO_BLK_T_IN => {
                self.check(offset, room)?;
                let buffers = part(&request.writable, 0, room);
                self.timed(|disk| disk.read(offset, &buffers))?;
                count(&counters.reads, 1);
                count(&counters.read_bytes, room);
                Ok(room)
            }
            VIRTIO_BLK_T_OUT => {
                let len = length(&request.readable) - HEADER;
                self.check_write()?;
                self.check(offset, len)?;
                let buffers = part(&request.readable, HEADER, len);
                self.timed(|disk| disk.write(offset, &buffers))?;
                self.write_through()?;
                count(&counters.writes, 1);
                count(&counters.written_bytes, len);
                Ok(0)
            }
            VIRTIO_BLK_T_FLUSH => {
                // A read-only disk has nothing to flush, but drivers may ask (firmware does).
                if !self.options.read_only {
                    self.timed(|disk| disk.flush())?;
                }
                count(&counters.flushes, 1);
                Ok(0)
            }
            VIRTIO_BLK_T_GET_ID => {
                let mut serial = [0; SERIAL];
                for (to, from) in serial.iter_mut().zip(self.options.serial.bytes()) {
                    *to = from;
                }
                Ok(write_bytes(&part(&request.writable, 0, room), &serial) as u64)
            }
            VIRTIO_BLK_T_DISCARD if self.has(VIRTIO_BLK_F_DISCARD) => {
                for Range { offset, len, flags } in self.ranges(request, MOST_DISCARDED)? {
                    if flags != 0 {
                        return Err(Failed::Unsupported);
                    }
                    self.timed(|disk| disk.discard(offset, len))?;
                }
                count(&counters.discards, 1);
                Ok(0)
            }
            VIRTIO_BLK_T_WRITE_ZEROES if self.has(VIRTIO_BLK_F_WRITE_ZEROES) => {
                let may_discard = self.options.discard;
                for Range { offset, len, flags } in self.ranges(request, MOST_ZEROES)? {
                    if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 {
                        return Err(Failed::Unsupported);
                    }
                    let unmap = may_discard && flags != 0;
                    self.timed(|disk| disk.write_zeroes(offset, len, unmap))?;
                    self.limiter.owe(self.begun.elapsed(), Cost { bytes: len, operations: 0 });
                }
                self.write_through()?;
                count(&counters.writes, 1);
                Ok(0)
            }
            _ => Err(Failed::Unsupported),
        }
    }

    fn has(&self, number: u32) -> bool {
        self.features & feature(number) != 0
    }

    /// A driver that cannot flush expects each write to be durable (5.2.6.2).
    fn write_through(&mut self) -> Result<(), Failed> {
        if self.has(VIRTIO_BLK_F_FLUSH) { Ok(()) } else { self.timed(|disk| disk.flush()) }
    }

    fn check_write(&self) -> Result<(), Failed> {
        if self.options.read_only { Err(Failed::Error) } else { Ok(()) }
    }

    /// Whole sectors of the disk, not too many.
    fn check(&self, offset: u64, len: u64) -> Result<(), Failed> {
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.disk.size());
        if inside && len.is_multiple_of(SECTOR) && len <= MOST_DATA { Ok(()) } else { Err(Failed::Error) }
    }

    /// The ranges of a discard or of zeroes, `most` sectors each (5.2.6, `virtio_blk_discard_write_zeroes`).
    fn ranges(&self, request: &Request<'_>, most: u32) -> Result<Vec<Range>, Failed> {
        self.check_write()?;
        let len = length(&request.readable) - HEADER;
        let count = len / RANGE as u64;
        if !len.is_multiple_of(RANGE as u64) || count > RANGES.into() {
            return Err(Failed::Error);
        }
        let read = |number| {
            let offset = HEADER.saturating_add(number * RANGE as u64);
            let bytes: [u8; RANGE] =
                read_array(&part(&request.readable, offset, RANGE as u64)).ok_or(Failed::Error)?;
            let [a, b, c, d, e, f, g, h, i, j, k, l, flags @ ..] = bytes;
            let sectors = u32::from_le_bytes([i, j, k, l]);
            let offset =
                u64::from_le_bytes([a, b, c, d, e, f, g, h]).checked_mul(SECTOR).ok_or(Failed::Error)?;
            let len = u64::from(sectors) * SECTOR;
            let inside = offset.checked_add(len).is_some_and(|end| end <= self.disk.size());
            if !inside || sectors > most {
                return Err(Failed::Error);
            }
            Ok(Range { offset, len, flags: u32::from_le_bytes(flags) })
        };
        let ranges: Result<Vec<Range>, Failed> = (0..count).map(read).collect();
        Ok(ranges?.into_iter().filter(|range| range.len > 0).collect())
    }

    fn take_limits(&mut self) {
        if let Some(limits) = self.inbox.limits() {
            self.limiter.set(limits);
        }
    }

    /// Takes a step to enlarge the disk, and shows the new size to the driver after the last one. Returns whether this was the
    /// last one.
    fn grow(&mut self, size: u64) -> io::Result<bool> {
        let now = self.disk.size();
        if size < now {
            return Err(GrowError::Smaller { has: now, wanted: size }.into());
        }
        if size > now {
            if !self.disk.grow(size)? {
                return Ok(false);
            }
            self.configuration.change(CAPACITY, &(size / SECTOR).to_le_bytes());
        }
        Ok(true)
    }

    fn timed(&mut self, work: impl FnOnce(&mut dyn Disk) -> io::Result<()>) -> Result<(), Failed> {
        let begin = Instant::now();
        let result = work(self.disk.as_mut());
        let busy = u64::try_from(begin.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.counters.busy_ns.fetch_add(busy, Ordering::Relaxed);
        result.map_err(|error| {
            if self.options.wait_for_room && is_full(&error) {
                return Failed::Full;
            }
            // The count shows all; the log, the first ones.
            if self.counters.errors.fetch_add(1, Ordering::Relaxed) < 8 {
                tracing::warn!(disk = self.options.id, %error, "The host's file failed a request of the guest");
            }
            Failed::Error
        })
    }
}

impl Engine for Block {
    fn sources(&self) -> Vec<(usize, IoSource)> {
        vec![(0, IoSource::Timer(self.timer.clone())), (0, IoSource::Event(self.inbox.event.clone()))]
    }

    fn wake(&mut self, _: usize) {
        self.take_limits();
        self.growing = self.inbox.growth(self.growing);
        let Some(Growth { id, size }) = self.growing else { return };
        match self.grow(size) {
            // The machine may want to park the thread between two steps.
            Ok(false) => self.inbox.event.signal(),
            result => {
                self.growing = None;
                self.inbox.grown(id, result.map(drop));
                self.grown = true;
            }
        }
    }

    fn settled(&mut self) {
        if std::mem::take(&mut self.grown) {
            (self.reports.on_grown)();
        }
    }

    fn start(&mut self, features: u64) {
        self.features = features;
    }

    fn serve(&mut self, _: usize, queue: &mut ActiveQueue) -> Result<bool, QueueError> {
        if self.stalled {
            return Ok(false);
        }
        serve_in_order(queue, |request| self.request(request))
    }

    fn is_stalled(&self) -> bool {
        self.stalled
    }

    fn retry(&mut self) {
        self.stalled = false;
    }

    fn stop(&mut self) {
        self.features = 0;
        (self.stalled, self.paid) = (false, false);
        // The machine's reset drops events, and with them the news of other limits and of a size. The reset runs on another
        // thread, which must not touch the file.
        self.take_limits();
        self.inbox.repeat(self.growing);
    }

    fn disk(&mut self) -> Option<&mut dyn Disk> {
        Some(self.disk.as_mut())
    }

    fn close(&mut self) {
        if !self.options.read_only
            && let Err(error) = self.disk.close()
        {
            tracing::warn!(disk = self.options.id, %error, "The last changes of a disk may be lost");
        }
    }
}
