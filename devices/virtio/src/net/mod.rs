// SPDX-License-Identifier: Apache-2.0

//! The network device (the specification, 5.1).
//!
//! ```text
//!   driver ─▶ transmit queues ──▶ Wire::send ─────────────────────────▶ host
//!   driver ◀─ receive queues ◀── filter ◀── Wire::receive ◀──────────── host
//!   driver ─▶ control queue ──▶ control::decode ──▶ verdict: filter, offloads, queue pairs
//! ```
//!
//! A [`Wire`] is the other side: an interface of the host ([`tap`]), or a port under a policy. Without a policy
//! ([`Policy`]) the device's address is fixed: a driver that requests another address gets an error.

pub mod control;
pub mod filter;
pub mod tap;
#[cfg(test)]
mod tests;

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use devices::io_thread::{Calls, IoSource};
use virtio_bindings::{
    virtio_ids::VIRTIO_ID_NET,
    virtio_net::{
        VIRTIO_NET_ERR, VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_MAC_ADDR,
        VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_VLAN, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM,
        VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
        VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
        VIRTIO_NET_OK, VIRTIO_NET_S_LINK_UP,
    },
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};
use vm_memory::VolatileSlice;

use self::{
    control::{Mac, Request as Control},
    filter::Filter,
};
use crate::{
    engine::{Configuration, Engine, Identity, Served, serve_in_order},
    negotiation::feature,
    queue::{ActiveQueue, QueueError, Request, length, part, read_array, write_bytes},
};

/// Entries of the queues for frames.
const QUEUE: u16 = 256;
/// Entries of the control queue.
const CONTROL_QUEUE: u16 = 64;
/// The most pairs of queues.
pub const MAX_PAIRS: usize = 4;
/// Bytes of `struct virtio_net_hdr_v1`, in front of each frame.
pub const HEADER: usize = 12;
/// The offset of `num_buffers` in it.
const NUM_BUFFERS: usize = 10;
/// Bytes of the longest frame with its header: 64 KiB of IP in one segment, with Ethernet and tags.
const LONGEST: usize = HEADER + 65_535 + 22;
/// Bytes of an Ethernet header: no frame is shorter.
const SHORTEST: usize = HEADER + 14;
/// The longest time for frames of one queue in a row. Then the machine may park the thread.
const TURN: Duration = Duration::from_millis(20);
/// The most frames of one queue in a row: then the other queues have their turn.
const MOST: u32 = 128;
/// Bytes in front of a frame that the device reads itself: the header of virtio, and the destination.
const READ: usize = HEADER + 6;
/// The first five bytes of the addresses that bridges must not forward, 01:80:c2:00:00:00 to 0f (IEEE 802.1Q, 8.6.3).
const RESERVED: [u8; 5] = [0x01, 0x80, 0xc2, 0x00, 0x00];
/// The interval at which changes of the wire are allowed: the host's kernel makes each change under a lock that all
/// of its networks share.
const PER_CHANGE: Duration = Duration::from_millis(50);
/// The most changes at once.
const CHANGES: u32 = 8;
/// The most frames for an earlier driver that are dropped at a start. The host keeps fewer than that.
const MOST_STALE: u32 = 4096;
/// The most messages in the log about a failing wire.
const LOGGED: u64 = 8;
/// PCI class: network, Ethernet.
const CLASS: u32 = 0x0200_0000;

/// The offloads that a driver takes for received frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Frames without a complete checksum.
    pub checksum: bool,
    /// TCP over IPv4, several segments in one frame.
    pub tcp4: bool,
    /// TCP over IPv6, likewise.
    pub tcp6: bool,
}

impl Offloads {
    fn of(features: u64) -> Self {
        let has = |number| features & feature(number) != 0;
        Self {
            checksum: has(VIRTIO_NET_F_GUEST_CSUM),
            tcp4: has(VIRTIO_NET_F_GUEST_TSO4),
            tcp6: has(VIRTIO_NET_F_GUEST_TSO6),
        }
    }
}

/// The abilities of a wire, which decide about the features of its device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Abilities {
    /// It takes frames with several segments and without a complete checksum, and may deliver such frames.
    pub offloads: bool,
    /// It delivers frames of the VLANs only that the driver has joined.
    pub vlans: bool,
}

/// The address and the link of a device under a policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortState {
    /// The address that the device has.
    pub mac: Mac,
    /// Whether frames pass.
    pub link_up: bool,
}

/// The host's decisions about the requests of a driver. The device's I/O thread makes all calls but [`Policy::stop`] and
/// [`Policy::power_on`]. Each takes two and a half seconds at most.
pub trait Policy: Send {
    /// The sources that wake the thread for [`Policy::wake`].
    fn sources(&self) -> Vec<IoSource>;

    /// A driver is ready.
    fn start(&mut self);

    /// The driver has reset the device, or the machine has. Does not wait.
    fn stop(&mut self);

    /// The machine has been reset, after [`Policy::stop`]: the port has its initial address again. Does not wait.
    fn power_on(&mut self);

    /// Decides about an address, a receive mode, lists of addresses or a VLAN, and carries out a granted request. Returns
    /// whether the driver is to see success.
    fn decide(&mut self, request: &Control) -> bool;

    /// One of the sources has woken the thread.
    fn wake(&mut self);

    /// The address and the link now.
    fn state(&self) -> PortState;
}

/// The other side of a device. All calls come from the device's I/O thread. Frames have the header
/// of virtio in front ([`HEADER`]).
pub trait Wire: Send {
    /// The abilities of the wire.
    fn abilities(&self) -> Abilities {
        Abilities { offloads: true, vlans: false }
    }

    /// The system calls of the wire.
    fn calls(&self) -> Calls {
        Calls::Network
    }

    /// The policy of the port behind the wire. A wire with a policy filters received frames by itself.
    fn policy(&mut self) -> Option<&mut dyn Policy> {
        None
    }

    /// Pairs of queues, [`MAX_PAIRS`] at most.
    fn pairs(&self) -> usize;

    /// A source of work for received frames of a pair.
    fn source(&self, pair: usize) -> Option<IoSource>;

    /// Takes one received frame, and returns its length. A frame that is longer than the buffer is cut.
    ///
    /// # Errors
    /// `WouldBlock` if there is no frame. After any other error there is no frame, and the interface may be gone.
    fn receive(&mut self, pair: usize, frame: &mut [u8]) -> io::Result<usize>;

    /// The number of received frames that were dropped since the last call.
    fn take_dropped(&mut self) -> u64 {
        0
    }

    /// Sends one frame. The guest may change it meanwhile, behind the destination.
    ///
    /// # Errors
    /// The frame is lost: it is malformed, or the interface is down, full or gone.
    fn send(&mut self, pair: usize, frame: &[VolatileSlice<'_>]) -> io::Result<()>;

    /// Sets the offloads for received frames.
    ///
    /// # Errors
    /// The interface does not have them.
    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()>;

    /// Sets the number of pairs that receive frames. These are the first ones.
    ///
    /// # Errors
    /// Those of the interface.
    fn set_pairs(&mut self, count: usize) -> io::Result<()>;
}

/// The properties of a network device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// The device's name.
    pub id: String,
    /// Its address.
    pub mac: Mac,
    /// The bytes of a frame's payload that the driver shall use. None leaves it to the driver.
    pub mtu: Option<u16>,
}

/// Counters of a device since the machine was built.
#[derive(Debug, Default)]
pub struct Counters {
    /// Frames that the guest has received.
    pub received: AtomicU64,
    /// Their bytes.
    pub received_bytes: AtomicU64,
    /// Frames that the guest has sent.
    pub sent: AtomicU64,
    /// Their bytes.
    pub sent_bytes: AtomicU64,
    /// Frames in either direction that the other side has not taken.
    pub dropped: AtomicU64,
    /// Requests of the driver that were refused.
    pub refused: AtomicU64,
}

fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

/// The features of a wire that takes frames with offloads.
const OFFLOADS: [u32; 7] = [
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6,
];

/// The facts that the registers of a device over a wire show.
fn identity(options: &Options, wire: &dyn Wire) -> Identity {
    let (pairs, abilities) = (wire.pairs().clamp(1, MAX_PAIRS), wire.abilities());
    let mut features = vec![
        VIRTIO_NET_F_MAC,
        VIRTIO_NET_F_MRG_RXBUF,
        VIRTIO_NET_F_STATUS,
        VIRTIO_NET_F_CTRL_VQ,
        VIRTIO_NET_F_CTRL_RX,
        VIRTIO_NET_F_CTRL_MAC_ADDR,
        VIRTIO_RING_F_INDIRECT_DESC,
        VIRTIO_RING_F_EVENT_IDX,
    ];
    if abilities.offloads {
        features.extend(OFFLOADS);
    }
    if abilities.vlans {
        features.push(VIRTIO_NET_F_CTRL_VLAN);
    }
    if options.mtu.is_some() {
        features.push(VIRTIO_NET_F_MTU);
    }
    if pairs > 1 {
        features.push(VIRTIO_NET_F_MQ);
    }
    let mut queues = vec![QUEUE; 2 * pairs];
    queues.push(CONTROL_QUEUE);
    Identity {
        name: format!("nic {}", options.id),
        device: u8::try_from(VIRTIO_ID_NET).unwrap_or_default(),
        class: CLASS,
        features: features.into_iter().fold(0, |all, number| all | feature(number)),
        queues,
        calls: wire.calls(),
    }
}

/// The configuration of a device with `pairs` pairs of queues (the specification, 5.1.4).
fn configuration(options: &Options, pairs: usize) -> Arc<Configuration> {
    let link = link(true);
    let pairs = u16::try_from(pairs.clamp(1, MAX_PAIRS)).unwrap_or(1);
    let mut bytes = options.mac.to_vec();
    for value in [link, pairs, options.mtu.unwrap_or_default()] {
        bytes.extend(value.to_le_bytes());
    }
    Configuration::new(bytes)
}

fn link(up: bool) -> u16 {
    if up { u16::try_from(VIRTIO_NET_S_LINK_UP).unwrap_or_default() } else { 0 }
}

/// The result of fetching frames from the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fetched {
    /// A frame for the driver waits.
    One,
    /// No frame is there.
    None,
    /// Many frames in a row are not for the driver: others have their turn.
    Others,
}

/// The place for a received frame.
#[derive(Clone)]
struct Frame {
    /// [`LONGEST`] bytes.
    bytes: Vec<u8>,
    /// The length of the frame in it, with the header. 0 if there is none.
    len: usize,
}

impl Frame {
    fn new() -> Self {
        Self { bytes: vec![0; LONGEST], len: 0 }
    }
}

/// A network device over a wire.
pub struct Net {
    wire: Box<dyn Wire>,
    options: Options,
    counters: Arc<Counters>,
    configuration: Arc<Configuration>,
    /// The last state of a port under a policy that the configuration shows.
    shown: Option<PortState>,
    /// The number of the wire's sources.
    frame_sources: usize,
    /// The sources of the policy, behind them.
    policy_sources: Vec<IoSource>,
    pairs: usize,
    features: u64,
    filter: Filter,
    /// For each pair, the place for a received frame. The frame stays there until the driver has buffers for it.
    waiting: Vec<Frame>,
    /// Messages in the log.
    logged: u64,
    /// The offloads and pairs that the wire has. None if they are not known.
    now: (Option<Offloads>, Option<usize>),
    /// The time at which the changes so far no longer count, at one [`PER_CHANGE`] each.
    paid: Option<Instant>,
}

impl Net {
    /// Makes a device.
    #[must_use]
    pub fn new(mut wire: Box<dyn Wire>, options: Options, counters: Arc<Counters>) -> Self {
        let pairs = wire.pairs().clamp(1, MAX_PAIRS);
        let filter = Filter::new(options.mac);
        let configuration = configuration(&options, pairs);
        let waiting = vec![Frame::new(); pairs];
        let frame_sources = (0..pairs).filter(|pair| wire.source(*pair).is_some()).count();
        let policy_sources = wire.policy().map(|policy| policy.sources()).unwrap_or_default();
        Self {
            wire,
            options,
            counters,
            configuration,
            shown: None,
            frame_sources,
            policy_sources,
            pairs,
            features: 0,
            filter,
            waiting,
            logged: 0,
            now: (None, None),
            paid: None,
        }
    }

    fn has(&self, number: u32) -> bool {
        self.features & feature(number) != 0
    }

    /// The configuration that the device shows.
    #[must_use]
    pub fn configuration(&self) -> Arc<Configuration> {
        Arc::clone(&self.configuration)
    }

    /// The facts that the device's registers show.
    #[must_use]
    pub fn identity(&self) -> Identity {
        identity(&self.options, self.wire.as_ref())
    }

    /// Shows the state of a port under a policy to the driver.
    fn show_state(&mut self) {
        let Some(state) = self.wire.policy().map(|policy| policy.state()) else { return };
        if self.shown.replace(state) != Some(state) {
            let mut bytes = state.mac.to_vec();
            bytes.extend(link(state.link_up).to_le_bytes());
            self.configuration.change(0, &bytes);
        }
    }

    fn warn(&mut self, error: &io::Error) {
        self.logged += 1;
        if self.logged <= LOGGED {
            tracing::warn!(nic = self.options.id, %error, "The host's interface failed a request of a NIC");
        }
    }

    /// Takes the next frame for the driver from the wire. No other one may wait: they have one place.
    fn fetch(&mut self, pair: usize) -> Fetched {
        for _ in 0..MOST {
            let Some(waiting) = self.waiting.get_mut(pair) else { return Fetched::None };
            let len = match self.wire.receive(pair, &mut waiting.bytes) {
                Ok(len) => len,
                Err(error) => {
                    if error.kind() != io::ErrorKind::WouldBlock {
                        self.warn(&error);
                    }
                    return Fetched::None;
                }
            };
            let frame = waiting.bytes.get(..len).unwrap_or_default();
            if len >= SHORTEST && self.filter.passes(frame.get(HEADER..).unwrap_or_default()) {
                waiting.len = frame.len();
                return Fetched::One;
            }
        }
        Fetched::Others
    }

    /// Puts the waiting frame into buffers of the driver. Returns false if there are too few. A doorbell follows
    /// when there are more.
    fn deliver(&mut self, pair: usize, queue: &mut ActiveQueue) -> Result<bool, QueueError> {
        let merge = self.has(VIRTIO_NET_F_MRG_RXBUF);
        let Some(waiting) = self.waiting.get_mut(pair) else { return Ok(false) };
        let frame = waiting.bytes.get_mut(..waiting.len).unwrap_or_default();
        let memory = queue.memory();
        let mut taken: Vec<(Request<'_>, u32)> = Vec::new();
        let mut done = 0;
        while let Some(rest) = frame.get(done..).filter(|rest| !rest.is_empty()) {
            let Some(request) = queue.next(&memory)? else {
                // Ask for the doorbell before the buffers go back, because it must ring for the buffers after them.
                if queue.watch()? {
                    continue;
                }
                queue.put_back(taken.len());
                return Ok(false);
            };
            let room = length(&request.writable);
            // A buffer must not be shorter than the header or, without merging, than the frame (5.1.6.3.1).
            if room < HEADER as u64 || (!merge && room < rest.len() as u64) {
                if taken.is_empty() {
                    queue.complete(&request, 0)?;
                } else {
                    queue.put_back(taken.len() + 1);
                }
                waiting.len = 0;
                count(&self.counters.dropped, 1);
                return Ok(true);
            }
            let written = usize::try_from(room).unwrap_or(usize::MAX).min(rest.len());
            taken.push((request, u32::try_from(written).unwrap_or_default()));
            done += written;
        }
        if let Some(number) = frame.get_mut(NUM_BUFFERS..HEADER) {
            number.copy_from_slice(&u16::try_from(taken.len()).unwrap_or(1).to_le_bytes());
        }
        let mut at = 0;
        for (request, _) in &taken {
            at += write_bytes(&request.writable, frame.get(at..).unwrap_or_default());
        }
        queue.publish(&taken)?;
        count(&self.counters.received, 1);
        count(&self.counters.received_bytes, frame.len().saturating_sub(HEADER) as u64);
        waiting.len = 0;
        Ok(true)
    }

    /// Moves received frames to the driver.
    fn receive(&mut self, pair: usize, queue: &mut ActiveQueue) -> Result<bool, QueueError> {
        let end = Instant::now() + TURN;
        count(&self.counters.dropped, self.wire.take_dropped());
        queue.doze()?;
        for _ in 0..MOST {
            let waits = self.waiting.get(pair).is_some_and(|frame| frame.len > 0);
            let fetched = if waits { Fetched::One } else { self.fetch(pair) };
            if fetched == Fetched::None || (fetched == Fetched::One && !self.deliver(pair, queue)?) {
                queue.notify()?;
                return Ok(false);
            }
            if fetched == Fetched::Others || Instant::now() >= end {
                break;
            }
        }
        queue.notify()?;
        Ok(true)
    }

    /// Sends frames of the driver.
    fn send(&mut self, pair: usize, queue: &mut ActiveQueue) -> Result<bool, QueueError> {
        serve_in_order(queue, |request| {
            let len = length(&request.readable);
            if !(SHORTEST as u64..=LONGEST as u64).contains(&len) {
                count(&self.counters.dropped, 1);
                return Served::Complete(0);
            }
            // Read once: the guest may change its memory after the check.
            let Some(mut head) = read_array::<READ>(&request.readable) else { return Served::Complete(0) };
            let reserved = head.get(HEADER..).is_some_and(|destination| {
                destination.starts_with(&RESERVED) && destination.last().is_some_and(|last| *last < 0x10)
            });
            let rest = part(&request.readable, READ as u64, len);
            let frame: Vec<_> = [VolatileSlice::from(head.as_mut_slice())].into_iter().chain(rest).collect();
            if reserved || self.wire.send(pair, &frame).is_err() {
                count(&self.counters.dropped, 1);
            } else {
                count(&self.counters.sent, 1);
                count(&self.counters.sent_bytes, len - HEADER as u64);
            }
            Served::Complete(0)
        })
    }

    /// Decides about a request of the control queue.
    fn control(&mut self, request: &Request<'_>) -> u32 {
        let space = length(&request.writable);
        if space == 0 {
            return 0;
        }
        let granted = control::decode(&request.readable).is_some_and(|control| self.apply(control));
        if !granted {
            count(&self.counters.refused, 1);
        }
        let status = if granted { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
        let bytes = [u8::try_from(status).unwrap_or(1)];
        u32::try_from(write_bytes(&part(&request.writable, 0, 1), &bytes)).unwrap_or_default()
    }

    /// Applies a request. Returns whether it was granted.
    fn apply(&mut self, request: Control) -> bool {
        let of_device = matches!(request, Control::Pairs(_) | Control::Offloads(_));
        if let Some(policy) = self.wire.policy().filter(|_| !of_device) {
            let granted = policy.decide(&request);
            self.show_state();
            return granted;
        }
        match request {
            // A device without a policy does not offer it.
            Control::Vlan { .. } => return false,
            Control::Promiscuous(on) => self.filter.promiscuous = on,
            Control::AllMulticast(on) => self.filter.all_multicast = on,
            Control::Lists { unicast, multicast } => {
                (self.filter.unicast, self.filter.multicast) = (unicast, multicast);
            }
            Control::Address(mac) => return mac == self.options.mac,
            Control::Pairs(wanted) => {
                let wanted = usize::from(wanted);
                if !self.has(VIRTIO_NET_F_MQ) || !(1..=self.pairs).contains(&wanted) {
                    return false;
                }
                return self.set_pairs(wanted);
            }
            Control::Offloads(bits) => {
                let known = [VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6];
                let known = known.into_iter().fold(0, |all, number| all | feature(number));
                if !self.has(VIRTIO_NET_F_CTRL_GUEST_OFFLOADS) || bits & !(known & self.features) != 0 {
                    return false;
                }
                return self.set_offloads(Offloads::of(bits));
            }
        }
        true
    }

    /// Sets the offloads. Returns whether the wire has them.
    fn set_offloads(&mut self, offloads: Offloads) -> bool {
        if self.now.0 == Some(offloads) {
            return true;
        }
        let done = self.change(|wire| wire.set_offloads(offloads));
        self.now.0 = done.then_some(offloads);
        done
    }

    /// Sets the count of pairs in use. Returns whether the wire has it.
    fn set_pairs(&mut self, pairs: usize) -> bool {
        if self.now.1 == Some(pairs) {
            return true;
        }
        let done = self.change(|wire| wire.set_pairs(pairs));
        self.now.1 = done.then_some(pairs);
        done
    }

    /// Changes the wire, not more often than [`PER_CHANGE`] and [`CHANGES`] allow. Returns whether that succeeded.
    fn change(&mut self, change: impl FnOnce(&mut dyn Wire) -> io::Result<()>) -> bool {
        let credit = PER_CHANGE * (CHANGES - 1);
        let owed = |paid: Option<Instant>| {
            paid.map(|paid| paid.saturating_duration_since(Instant::now())).unwrap_or_default()
        };
        while let Some(wait) = owed(self.paid).checked_sub(credit).filter(|wait| !wait.is_zero()) {
            thread::park_timeout(wait);
        }
        self.paid = Some(Instant::now() + owed(self.paid) + PER_CHANGE);
        match change(self.wire.as_mut()) {
            Ok(()) => true,
            Err(error) => {
                self.warn(&error);
                false
            }
        }
    }

    /// Drops frames for an earlier driver, which have its offloads.
    fn drop_stale_frames(&mut self) {
        for (pair, waiting) in self.waiting.iter_mut().enumerate() {
            for _ in 0..MOST_STALE {
                if self.wire.receive(pair, &mut waiting.bytes).is_err() {
                    break;
                }
            }
        }
    }
}

impl Engine for Net {
    fn sources(&self) -> Vec<(usize, IoSource)> {
        let frames = (0..self.pairs).filter_map(|pair| Some((2 * pair, self.wire.source(pair)?)));
        frames.chain(self.policy_sources.iter().map(|source| (0, source.clone()))).collect()
    }

    fn wake(&mut self, source: usize) {
        if source < self.frame_sources {
            return;
        }
        if let Some(policy) = self.wire.policy() {
            policy.wake();
        }
        self.show_state();
    }

    fn start(&mut self, features: u64) {
        self.features = features;
        if let Some(policy) = self.wire.policy() {
            policy.start();
            self.show_state();
            // The port filters by itself, according to the granted requests.
            self.filter.promiscuous = true;
            self.drop_stale_frames();
            return;
        }
        // One pair until the driver asks for more (5.1.6.5.5).
        self.set_pairs(1);
        self.set_offloads(Offloads::of(features));
        // A driver that cannot set the filter gets all frames.
        self.filter.promiscuous = !self.has(VIRTIO_NET_F_CTRL_RX);
        self.drop_stale_frames();
    }

    fn serve(&mut self, index: usize, queue: &mut ActiveQueue) -> Result<bool, QueueError> {
        // The control queue follows the pairs that the driver knows (5.1.2).
        let control = if self.has(VIRTIO_NET_F_MQ) { 2 * self.pairs } else { 2 };
        match index {
            _ if index == control => serve_in_order(queue, |request| Served::Complete(self.control(request))),
            _ if index > control => Ok(false),
            _ if index.is_multiple_of(2) => self.receive(index / 2, queue),
            _ => self.send(index / 2, queue),
        }
    }

    fn stop(&mut self) {
        self.features = 0;
        if let Some(policy) = self.wire.policy() {
            policy.stop();
        }
        self.filter = Filter::new(self.options.mac);
        self.waiting.iter_mut().for_each(|frame| frame.len = 0);
    }

    fn power_on(&mut self) {
        if let Some(policy) = self.wire.policy() {
            policy.power_on();
        }
        self.show_state();
    }
}
