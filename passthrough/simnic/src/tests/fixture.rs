// SPDX-License-Identifier: Apache-2.0

//! A PF with its loop on a thread, and guests with a network driver on its VFs.

use std::{
    os::fd::OwnedFd,
    ptr,
    sync::Arc,
    time::{Duration, Instant},
};

use netpolicy::MacAddress;
use passthrough::{
    hardware::{IrqKind, VfHardware},
    relay::testing::{Bus, Driver, conformance::Direct},
    threads::ThreadStart,
};
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect};
use sriov::{PfControl, VfChange};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::{
    SimPf, SimVf,
    control::VfCounters,
    pf::{Options, listen, serve},
};

pub(super) const MEMORY: usize = 1 << 20;
const RECEIVE_RING: u64 = 0x1000;
const TRANSMIT_RING: u64 = 0x2000;
const RECEIVE_BUFFERS: u64 = 0x1_0000;
const TRANSMIT_BUFFER: u64 = 0x8_0000;
/// Number of descriptors of each ring.
pub(super) const RING: u32 = 32;
const BUFFER: u64 = 2048;
const ENABLE: u32 = 1 << 25;

pub(super) fn mac(last: u8) -> MacAddress {
    MacAddress::new([2, 0, 0, 0, 0, last])
}

/// Waits for the work of other threads.
pub(super) fn eventually(mut holds: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + Duration::from_secs(5);
    while Instant::now() < end {
        if holds() {
            return true;
        }
        std::thread::sleep(Duration::from_micros(100));
    }
    false
}

/// The PF's process.
pub(super) struct Adapter {
    pub(super) pf: SimPf,
    thread: Option<std::thread::JoinHandle<std::io::Result<()>>>,
    _dir: tempfile::TempDir,
}

impl Adapter {
    pub(super) fn new(vfs: u16) -> Self {
        Self::with_tap(vfs, None)
    }

    pub(super) fn with_tap(vfs: u16, tap: Option<OwnedFd>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.sock");
        let listener = listen(&path).unwrap();
        let options = Options { name: "sim0".into(), vfs, listener, tap, linger: None };
        let thread = Some(std::thread::spawn(move || serve(options)));
        Self { pf: SimPf::connect(&path).unwrap(), thread, _dir: dir }
    }

    pub(super) fn apply(&mut self, vf: u16, change: VfChange) {
        self.pf.apply(vf, &[change]).unwrap();
    }

    pub(super) fn counters(&mut self, vf: u16) -> VfCounters {
        self.pf.counters().unwrap()[&vf]
    }

    /// A VF with this address, set by the administrator.
    pub(super) fn vf(&mut self, vf: u16, mac: MacAddress) -> (Arc<SimVf>, GuestMemoryMmap) {
        self.apply(vf, VfChange::Mac(Some(mac)));
        let memory = guarded_memory();
        let connection = self.pf.attach(vf).unwrap();
        (Arc::new(SimVf::new(connection, memory.clone(), &ThreadStart::default()).unwrap()), memory)
    }

    /// A guest with a driver that has probed the VF and opened the interface.
    pub(super) fn guest(&mut self, vf: u16) -> Guest {
        let mac = mac(0x10 + u8::try_from(vf).unwrap());
        let (vf, memory) = self.vf(vf, mac);
        let mut guest = Guest::new(vf, memory);
        guest.probe();
        assert_eq!(guest.driver.netdev, mac);
        guest
    }
}

impl Drop for Adapter {
    fn drop(&mut self) {
        let stopped = self.pf.stop();
        let ended = self.thread.take().map(|thread| thread.join());
        if !std::thread::panicking() {
            stopped.unwrap();
            ended.unwrap().unwrap().unwrap();
        }
    }
}

/// Guest memory between forbidden pages: an access to them kills the test. Never unmapped.
fn guarded_memory() -> GuestMemoryMmap {
    const GUARD: usize = 1 << 16;
    // SAFETY: a new mapping, at an address that the kernel chooses.
    let start = unsafe {
        mmap_anonymous(ptr::null_mut(), MEMORY + 2 * GUARD, ProtFlags::empty(), MapFlags::PRIVATE).unwrap()
    };
    let inside = start.wrapping_byte_add(GUARD);
    // SAFETY: inside of that mapping, to which nothing else refers.
    unsafe { mprotect(inside, MEMORY, MprotectFlags::READ | MprotectFlags::WRITE).unwrap() };
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: the range was mapped above and stays mapped.
    let region = unsafe { MmapRegion::build_raw(inside.cast(), MEMORY, prot, libc::MAP_PRIVATE) }.unwrap();
    GuestMemoryMmap::from_regions(vec![GuestRegionMmap::new(region, GuestAddress(0)).unwrap()]).unwrap()
}

/// A frame that the guest received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Received {
    pub(super) bytes: Vec<u8>,
    pub(super) tag: Option<u16>,
}

/// A guest with igbvf's mailbox code, and with queues and interrupts set up as in igbvf.
pub(super) struct Guest {
    pub(super) vf: Arc<SimVf>,
    pub(super) memory: GuestMemoryMmap,
    pub(super) driver: Driver<Direct>,
    /// Transmit, receive, mailbox.
    pub(super) vectors: [EventFd; 3],
    next_received: u32,
    next_sent: u32,
}

impl Guest {
    pub(super) fn new(vf: Arc<SimVf>, memory: GuestMemoryMmap) -> Self {
        let driver = Driver::new(Direct(vf.clone()));
        let vectors = [(); 3].map(|()| EventFd::new(libc::EFD_NONBLOCK).unwrap());
        Self { vf, memory, driver, vectors, next_received: 0, next_sent: 0 }
    }

    /// Probe and open.
    pub(super) fn probe(&mut self) {
        // Enable memory and bus mastering, as the function in front of the VF does.
        self.vf.config_write(4, &[6, 0]);
        self.vf.enable_irqs(IrqKind::Msix, &self.vectors).unwrap();
        self.driver.probe();
        self.open(0x0200_0002);
    }

    /// `igbvf_open`, with this SRRCTL.
    pub(super) fn open(&mut self, split: u32) {
        (self.next_received, self.next_sent) = (0, 0);
        self.memory.write_slice(&[0; 0x2000], GuestAddress(RECEIVE_RING)).unwrap();
        self.write_ring(0x2800, RECEIVE_RING);
        self.write(0x280c, split);
        self.write(0x2828, ENABLE);
        for index in 0..RING - 1 {
            self.supply(index);
        }
        self.write_ring(0x3800, TRANSMIT_RING);
        self.write(0x3828, ENABLE);
        // RX on vector 1, TX on 0, the mailbox on 2.
        self.write(0x1700, 0x8081);
        self.write(0x1740, 0x82);
        self.write(0x152c, 7);
        self.write(0x1530, 7);
        self.write(0x1524, 7);
    }

    pub(super) fn write(&mut self, offset: u64, value: u32) {
        self.driver.bus.write(offset, value);
    }

    pub(super) fn read(&mut self, offset: u64) -> u32 {
        self.driver.bus.read(offset)
    }

    fn write_ring(&mut self, registers: u64, base: u64) {
        self.write(registers, u32::try_from(base).unwrap());
        self.write(registers + 4, 0);
        self.write(registers + 8, RING * 16);
        self.write(registers + 0x10, 0);
        self.write(registers + 0x18, 0);
    }

    /// Hands over receive buffer `index`.
    fn supply(&mut self, index: u32) {
        let buffer = RECEIVE_BUFFERS + u64::from(index) * BUFFER;
        let at = GuestAddress(RECEIVE_RING + u64::from(index) * 16);
        self.memory.write_obj(buffer.to_le(), at).unwrap();
        // The header buffer is at the end of an otherwise unused page.
        let header = 0x6_0000 + u64::from(index) * 128;
        self.memory.write_obj(header.to_le(), GuestAddress(at.0 + 8)).unwrap();
        self.write(0x2818, (index + 1) % RING);
    }

    /// Puts descriptors into the transmit ring and hands them over.
    pub(super) fn put(&mut self, descriptors: &[[u32; 4]]) {
        for descriptor in descriptors {
            let at = TRANSMIT_RING + u64::from(self.next_sent) * 16;
            for (word, offset) in descriptor.iter().zip([0, 4, 8, 12]) {
                self.memory.write_obj(word.to_le(), GuestAddress(at + offset)).unwrap();
            }
            self.next_sent = (self.next_sent + 1) % RING;
        }
        let tail = self.next_sent;
        self.write(0x3818, tail);
    }

    /// Waits for the report of the last descriptor.
    pub(super) fn reported(&mut self) -> bool {
        let last = (self.next_sent + RING - 1) % RING;
        let status = GuestAddress(TRANSMIT_RING + u64::from(last) * 16 + 12);
        eventually(|| self.memory.read_obj::<u32>(status).unwrap() & 1 != 0)
    }

    /// A data descriptor for the transmit buffer, the packet's last.
    pub(super) fn data(len: usize, command: u32, status: u32) -> [u32; 4] {
        let command = command | 0x2b30_0000 | u32::try_from(len).unwrap();
        [u32::try_from(TRANSMIT_BUFFER).unwrap(), 0, command, status | u32::try_from(len).unwrap() << 14]
    }

    pub(super) fn fill(&mut self, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(TRANSMIT_BUFFER)).unwrap();
    }

    /// Sends a frame and waits until the adapter has taken it.
    pub(super) fn send(&mut self, bytes: &[u8]) {
        self.fill(bytes);
        self.put(&[Self::data(bytes.len(), 0, 0)]);
        assert!(self.reported());
    }

    /// Sends a frame with the tag in the descriptor.
    pub(super) fn send_tagged(&mut self, bytes: &[u8], tag: u16) {
        self.fill(bytes);
        let context = [u32::from(tag) << 16, 0, 0x2020_0000, 0];
        self.put(&[context, Self::data(bytes.len(), 1 << 30, 0)]);
        assert!(self.reported());
    }

    /// The next frame, which must arrive.
    pub(super) fn receive(&mut self) -> Received {
        let mut received = Received { bytes: Vec::new(), tag: None };
        loop {
            let index = self.next_received;
            let at = RECEIVE_RING + u64::from(index) * 16;
            let word = |offset| self.memory.read_obj::<u32>(GuestAddress(at + offset)).unwrap();
            assert!(eventually(|| word(8) & 1 != 0 && word(12) != 0xffff_ffff), "no frame came");
            let (status, length) = (word(8), word(12));
            let info = word(0) >> 16;
            if info & 0x8000 != 0 {
                let mut header = vec![0; ((info & 0x7fe0) >> 5) as usize];
                self.memory.read_slice(&mut header, GuestAddress(0x6_0000 + u64::from(index) * 128)).unwrap();
                received.bytes.extend(header);
            }
            let mut bytes = vec![0; (length & 0xffff) as usize];
            let buffer = RECEIVE_BUFFERS + u64::from(index) * BUFFER;
            self.memory.read_slice(&mut bytes, GuestAddress(buffer)).unwrap();
            received.bytes.extend(bytes);
            self.next_received = (index + 1) % RING;
            // The adapter always needs one free descriptor to stop at: return the one before.
            self.memory.write_obj(0u64, GuestAddress(at + 8)).unwrap();
            self.supply((index + RING - 1) % RING);
            if status & 2 != 0 {
                received.tag = (status & 8 != 0).then_some((length >> 16) as u16);
                return received;
            }
        }
    }
}

/// A test frame with a text.
pub(super) fn frame(to: MacAddress, from: MacAddress, text: &str) -> Vec<u8> {
    let mut frame = [to.bytes(), from.bytes()].concat();
    frame.extend([0x88, 0xb5]);
    frame.extend(text.as_bytes());
    frame.resize(frame.len().max(60), 0);
    frame
}

/// The text of a frame made by `frame`.
pub(super) fn text(received: &Received) -> &str {
    std::str::from_utf8(&received.bytes[14..]).unwrap().trim_end_matches('\0')
}
