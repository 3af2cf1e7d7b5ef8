// SPDX-License-Identifier: Apache-2.0

mod policy;

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard},
    thread,
};

use devices::io_thread::IoEvent;
use vm_memory::{Bytes as _, GuestAddress};

use super::{control::MOST_ADDRESSES, *};
use crate::testing::{Driver, available, used};

const MAC: Mac = [2, 0, 0, 0, 0, 1];
const OTHER: Mac = [2, 0, 0, 0, 0, 2];
const GROUP: Mac = [1, 0, 0x5e, 0, 0, 9];
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
/// Guest memory for buffers.
const BUFFERS: u64 = 0x4_0000;

/// The state of a [`FakeWire`].
#[derive(Default)]
struct Line {
    incoming: [VecDeque<Vec<u8>>; 2],
    outgoing: Vec<(usize, Vec<u8>)>,
    offloads: Vec<Offloads>,
    pairs: Vec<usize>,
    fail: Option<io::ErrorKind>,
}

#[derive(Clone)]
struct FakeWire {
    pairs: usize,
    line: Arc<Mutex<Line>>,
    ready: [IoEvent; 2],
}

impl FakeWire {
    fn new(pairs: usize) -> Self {
        let ready = [IoEvent::new().unwrap(), IoEvent::new().unwrap()];
        Self { pairs, line: Arc::default(), ready }
    }

    fn line(&self) -> MutexGuard<'_, Line> {
        self.line.lock().unwrap()
    }

    /// A frame of `len` payload bytes arrives on a pair.
    fn arrives(&self, pair: usize, to: Mac, len: usize) {
        self.line().incoming[pair].push_back(frame(to, len));
        self.ready[pair].signal();
    }
}

impl Wire for FakeWire {
    fn pairs(&self) -> usize {
        self.pairs
    }

    fn source(&self, pair: usize) -> Option<IoSource> {
        self.ready.get(pair).cloned().map(IoSource::Event)
    }

    fn receive(&mut self, pair: usize, frame: &mut [u8]) -> io::Result<usize> {
        let next = self.line().incoming[pair].pop_front().ok_or(io::ErrorKind::WouldBlock)?;
        frame[..next.len()].copy_from_slice(&next);
        Ok(next.len())
    }

    fn send(&mut self, pair: usize, frame: &[VolatileSlice<'_>]) -> io::Result<()> {
        let mut bytes = vec![0; usize::try_from(length(frame)).unwrap()];
        let mut at = 0;
        for buffer in frame {
            at += buffer.copy_to(&mut bytes[at..]);
        }
        let mut line = self.line();
        match line.fail {
            Some(kind) => Err(kind.into()),
            None => {
                line.outgoing.push((pair, bytes));
                Ok(())
            }
        }
    }

    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        self.line().offloads.push(offloads);
        Ok(())
    }

    fn set_pairs(&mut self, count: usize) -> io::Result<()> {
        self.line().pairs.push(count);
        Ok(())
    }
}

/// A header, addresses, a type, and `len` bytes that count up.
fn frame(to: Mac, len: usize) -> Vec<u8> {
    let payload = (0..len).map(|byte| u8::try_from(byte % 251).unwrap());
    [0; HEADER].into_iter().chain(to).chain(OTHER).chain([8, 0]).chain(payload).collect()
}

struct Machine {
    wire: FakeWire,
    driver: Driver,
    counters: Arc<Counters>,
}

/// A device of `pairs` pairs, started with `features`.
fn machine(pairs: usize, features: &[u32]) -> Machine {
    let wire = FakeWire::new(pairs);
    let counters = Arc::<Counters>::default();
    let options = Options { id: "mgmt0".into(), mac: MAC, mtu: Some(1400) };
    let net = Net::new(Box::new(wire.clone()), options, Arc::clone(&counters));
    let mut driver = Driver::new(net.identity(), net.configuration(), Box::new(net));
    let features = features.iter().fold(1 << 32, |all, number| all | feature(*number));
    driver.start(features, 16);
    Machine { wire, driver, counters }
}

impl Machine {
    /// Gives the device a receive buffer of `len` bytes, number `n` of the test.
    fn buffer(&mut self, queue: u16, n: u64, len: u32) {
        self.driver.send_on(queue, n, &[(BUFFERS + n * 0x1000, len, true)]);
    }

    /// The next received frame of a queue, over all of its buffers: its header and its other bytes.
    fn received(&mut self, queue: u16) -> Option<Vec<u8>> {
        let (head, len) = self.driver.returned_on(queue)?;
        let mut bytes = self.driver.read(BUFFERS + u64::from(head) * 0x1000, len as usize);
        let buffers = u16::from_le_bytes([bytes[10], bytes[11]]);
        for _ in 1..buffers {
            let (head, len) = self.driver.returned_on(queue).expect("all buffers of a frame are there");
            bytes.extend(self.driver.read(BUFFERS + u64::from(head) * 0x1000, len as usize));
        }
        Some(bytes)
    }

    /// Sends a request of the control queue, and returns the device's answer.
    fn control(&mut self, pairs: u16, bytes: &[u8]) -> u8 {
        self.driver.write(BUFFERS, bytes);
        self.driver.write(BUFFERS + 0x800, &[0x77]);
        let len = u32::try_from(bytes.len()).unwrap();
        self.driver.send_on(2 * pairs, 0, &[(BUFFERS, len, false), (BUFFERS + 0x800, 1, true)]);
        assert_eq!(self.driver.returned_on(2 * pairs), Some((0, 1)));
        self.driver.read(BUFFERS + 0x800, 1)[0]
    }

    fn passes(&mut self, to: Mac) -> bool {
        self.buffer(RECEIVE, 5, 0x800);
        let before = self.counters.received.load(Ordering::Relaxed);
        self.wire.arrives(0, to, 100);
        self.driver.pump();
        let passed = self.counters.received.load(Ordering::Relaxed) > before;
        assert_eq!(passed, self.received(RECEIVE).is_some());
        passed
    }
}

#[test]
fn the_configuration_has_address_link_and_sizes() {
    let machine = machine(2, &[]);
    let driver = &machine.driver;
    assert_eq!(driver.get::<6>(0x200), MAC);
    assert_eq!(driver.get::<6>(0x206), [1, 0, 2, 0, 0x78, 5], "link up, two pairs, MTU 1400");
    let offered = driver.offered();
    assert_ne!(offered & feature(VIRTIO_NET_F_MQ), 0);
    assert_eq!(self::machine(1, &[]).driver.offered() & feature(VIRTIO_NET_F_MQ), 0, "one pair");
}

#[test]
fn frames_pass_in_both_directions_as_they_are() {
    let mut machine = machine(1, &[]);
    let sent = frame(OTHER, 600);
    machine.driver.write(BUFFERS, &sent);
    let (first, rest) = (20, u32::try_from(sent.len()).unwrap() - 20);
    machine.driver.send_on(TRANSMIT, 0, &[(BUFFERS, first, false), (BUFFERS + 20, rest, false)]);
    assert_eq!(machine.driver.returned_on(TRANSMIT), Some((0, 0)));
    assert_eq!(machine.wire.line().outgoing, [(0, sent)]);
    machine.buffer(RECEIVE, 3, 0x1000);
    machine.wire.arrives(0, MAC, 700);
    let mut expected = frame(MAC, 700);
    expected[NUM_BUFFERS] = 1;
    assert_eq!(machine.received(RECEIVE), Some(expected));
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let counters = &machine.counters;
    assert_eq!(
        [&counters.received, &counters.received_bytes, &counters.sent, &counters.sent_bytes].map(count),
        [1, 714, 1, 614]
    );
    assert_eq!([&counters.dropped, &counters.refused].map(count), [0, 0]);
}

#[test]
fn a_frame_waits_for_buffers_and_takes_several_at_once() {
    let mut machine = machine(1, &[VIRTIO_NET_F_MRG_RXBUF]);
    machine.wire.arrives(0, MAC, 2500);
    machine.wire.arrives(0, MAC, 10);
    for n in 0..2 {
        machine.buffer(RECEIVE, n, 1024);
        assert_eq!(machine.driver.returned_on(RECEIVE), None, "{} bytes are too few", (n + 1) * 1024);
    }
    machine.buffer(RECEIVE, 2, 1024);
    let mut expected = frame(MAC, 2500);
    expected[NUM_BUFFERS] = 3;
    assert_eq!(machine.received(RECEIVE), Some(expected));
    machine.buffer(RECEIVE, 3, 1024);
    assert_eq!(machine.received(RECEIVE).unwrap().len(), HEADER + 24);
}

/// The driver reads the first buffer as soon as it is returned, and drops a frame whose others are not there.
#[test]
fn the_buffers_of_a_frame_become_visible_together() {
    let mut machine = machine(1, &[VIRTIO_NET_F_MRG_RXBUF]);
    let memory = Arc::clone(&machine.driver.memory);
    let end = Arc::new(AtomicU64::new(0));
    let over = Arc::clone(&end);
    let parts = thread::spawn(move || {
        let mut parts = 0;
        while over.load(Ordering::Relaxed) == 0 {
            let index: u16 = memory.load(GuestAddress(used(RECEIVE) + 2), Ordering::Acquire).unwrap();
            parts += u32::from(!index.is_multiple_of(3));
        }
        parts
    });
    for _ in 0..1000 {
        for n in 0..3 {
            machine.buffer(RECEIVE, n, 1024);
        }
        machine.wire.arrives(0, MAC, 2500);
        assert_eq!(machine.received(RECEIVE).unwrap().len(), HEADER + 2514);
    }
    end.store(1, Ordering::Relaxed);
    assert_eq!(parts.join().unwrap(), 0);
}

#[test]
fn interrupts_follow_the_drivers_wish_over_all_buffers() {
    let features = [VIRTIO_NET_F_MRG_RXBUF, VIRTIO_RING_F_EVENT_IDX];
    for (event, expected) in [(0_u16, 1_u8), (1, 1), (2, 1), (3, 0), (100, 0), (u16::MAX, 0)] {
        let mut machine = machine(1, &features);
        for n in 0..3 {
            machine.buffer(RECEIVE, n, 1024);
        }
        // Behind the ring's 16 entries.
        machine.driver.write(available(RECEIVE) + 4 + 2 * 16, &event.to_le_bytes());
        machine.wire.arrives(0, MAC, 2500);
        machine.driver.pump();
        assert_eq!(machine.driver.get::<1>(0x100), [expected], "used_event {event}, three buffers used");
    }
}

#[test]
fn a_buffer_that_is_too_short_costs_a_frame_and_no_more() {
    let mut machine = machine(1, &[]);
    machine.buffer(RECEIVE, 0, 100);
    machine.wire.arrives(0, MAC, 200);
    assert_eq!(machine.driver.returned_on(RECEIVE), Some((0, 0)), "no merging: it does not fit");
    machine.buffer(RECEIVE, 1, 1000);
    machine.wire.arrives(0, MAC, 200);
    assert_eq!(machine.received(RECEIVE).unwrap().len(), HEADER + 214);
    let mut machine = self::machine(1, &[VIRTIO_NET_F_MRG_RXBUF]);
    machine.buffer(RECEIVE, 0, 1024);
    machine.buffer(RECEIVE, 1, 11);
    machine.wire.arrives(0, MAC, 2000);
    assert_eq!(machine.driver.returned_on(RECEIVE), None);
    machine.wire.arrives(0, MAC, 100);
    assert_eq!(machine.received(RECEIVE).unwrap().len(), HEADER + 114, "the good buffer is used");
    assert_eq!(machine.counters.dropped.load(Ordering::Relaxed), 1);
}

#[test]
fn frames_that_no_adapter_sends_are_dropped() {
    let mut machine = machine(1, &[]);
    for (len, sent) in [(HEADER - 1, 0), (SHORTEST - 1, 0), (SHORTEST, 1), (LONGEST, 2), (LONGEST + 1, 2)] {
        let len = u32::try_from(len).unwrap();
        machine.driver.send_on(TRANSMIT, 0, &[(BUFFERS, len, false)]);
        assert_eq!(machine.driver.returned_on(TRANSMIT), Some((0, 0)), "{len} bytes");
        assert_eq!(machine.wire.line().outgoing.len(), sent, "{len} bytes");
    }
    machine.wire.line().fail = Some(io::ErrorKind::NotConnected);
    machine.driver.send_on(TRANSMIT, 0, &[(BUFFERS, 100, false)]);
    assert_eq!(machine.driver.returned_on(TRANSMIT), Some((0, 0)), "the interface is down");
    assert_eq!(machine.counters.dropped.load(Ordering::Relaxed), 4);
}

#[test]
fn the_drivers_filter_decides_about_received_frames() {
    let mut machine = machine(1, &[VIRTIO_NET_F_CTRL_RX]);
    let rx = |command: u8, on: u8| [0, command, on];
    let expect = |machine: &mut Machine, expected: [bool; 4], when: &str| {
        let passed = [MAC, OTHER, GROUP, [0xff; 6]].map(|to| machine.passes(to));
        assert_eq!(passed, expected, "own, other, group, broadcast {when}");
    };
    expect(&mut machine, [true, false, false, true], "at the start");
    assert_eq!(machine.control(1, &rx(1, 1)), 0);
    expect(&mut machine, [true, false, true, true], "with all multicast");
    assert_eq!(machine.control(1, &rx(1, 0)), 0);
    assert_eq!(machine.control(1, &rx(0, 1)), 0);
    expect(&mut machine, [true, true, true, true], "promiscuous");
    assert_eq!(machine.control(1, &rx(0, 0)), 0);
    let lists = |unicast: &[Mac], multicast: &[Mac]| {
        let list = |addresses: &[Mac]| {
            let count = u32::try_from(addresses.len()).unwrap();
            [&count.to_le_bytes()[..], &addresses.concat()].concat()
        };
        [vec![1, 0], list(unicast), list(multicast)].concat()
    };
    assert_eq!(machine.control(1, &lists(&[OTHER], &[GROUP])), 0);
    expect(&mut machine, [true, true, true, true], "with lists");
    assert_eq!(machine.control(1, &lists(&[], &[[1, 0, 0x5e, 0, 0, 8]])), 0);
    expect(&mut machine, [true, false, false, true], "with other lists");
    let many = vec![[1, 0, 0x5e, 1, 1, 1]; MOST_ADDRESSES + 1];
    assert_eq!(machine.control(1, &lists(&[], &many)), 0);
    expect(&mut machine, [true, false, true, true], "with more groups than fit");
}

#[test]
fn requests_that_the_device_refuses_change_nothing() {
    let features = [VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_MQ];
    let mut machine = machine(2, &features);
    let lines = |machine: &Machine| {
        let line = machine.wire.line();
        (line.offloads.clone(), line.pairs.clone())
    };
    let before = lines(&machine);
    let refused: [&[u8]; 12] = [
        &[1, 1, 2, 0, 0, 0, 0, 2],
        &[1, 1, 2],
        &[1, 0, 1, 0, 0, 0],
        &[1, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff],
        &[0, 9, 1],
        &[9, 0, 1],
        &[0],
        &[4, 0, 0, 0],
        &[4, 0, 3, 0],
        &[4, 0, 1],
        &[5, 0, 0x80, 0, 0, 0, 0, 0, 0, 0],
        &[5, 0, 2],
    ];
    for (n, request) in refused.into_iter().enumerate() {
        assert_eq!(machine.control(2, request), 1, "{request:?}");
        assert_eq!(machine.counters.refused.load(Ordering::Relaxed), n as u64 + 1);
    }
    assert_eq!(lines(&machine), before);
    assert_eq!(machine.control(2, &[1, 1, 2, 0, 0, 0, 0, 1]), 0, "the address that it has");
    assert_eq!(machine.control(2, &[4, 0, 2, 0]), 0);
    assert_eq!(machine.control(2, &[5, 0, 2, 0, 0, 0, 0, 0, 0, 0]), 0);
    assert_eq!(machine.control(2, &[5, 0, 0, 0, 0, 0, 0, 0, 0, 0]), 0);
    let on = Offloads { checksum: true, ..Offloads::default() };
    assert_eq!(lines(&machine), (vec![on, Offloads::default()], vec![1, 2]), "and what is so already");
}

#[test]
fn each_pair_has_frames_of_its_own() {
    let mut machine = machine(2, &[VIRTIO_NET_F_MQ]);
    machine.buffer(0, 0, 1024);
    machine.buffer(2, 1, 1024);
    machine.wire.arrives(1, MAC, 10);
    assert_eq!(machine.received(2).unwrap().len(), HEADER + 24);
    assert_eq!(machine.driver.returned_on(0), None);
    machine.driver.send_on(3, 2, &[(BUFFERS, 100, false)]);
    assert_eq!(machine.driver.returned_on(3), Some((2, 0)));
    assert_eq!(machine.wire.line().outgoing[0].0, 1);
}

#[test]
fn nothing_of_an_earlier_driver_reaches_the_next() {
    let mut machine = machine(1, &[VIRTIO_NET_F_CTRL_RX]);
    assert_eq!(machine.control(1, &[0, 0, 1]), 0);
    machine.wire.arrives(0, OTHER, 10);
    machine.driver.pump();
    machine.driver.set_status(0);
    machine.driver.pump();
    machine.wire.arrives(0, MAC, 20);
    machine.driver.start(1 << 32 | feature(VIRTIO_NET_F_GUEST_TSO4) | feature(VIRTIO_NET_F_CTRL_RX), 16);
    machine.buffer(RECEIVE, 0, 1024);
    assert_eq!(machine.received(RECEIVE), None, "neither the frame that waited nor the one between");
    assert!(!machine.passes(OTHER), "no longer promiscuous");
    assert!(machine.wire.line().offloads.last().unwrap().tcp4);
}

/// The host's kernel makes each change under a lock of all its networks.
#[test]
fn changes_of_the_wire_have_a_rate() {
    let mut machine = machine(2, &[VIRTIO_NET_F_MQ]);
    let begun = Instant::now();
    for _ in 0..CHANGES {
        for pairs in [2, 1] {
            assert_eq!(machine.control(2, &[4, 0, pairs, 0]), 0);
        }
    }
    // Two changes at the start, and these.
    assert!(begun.elapsed() >= PER_CHANGE * CHANGES, "{:?}", begun.elapsed());
    assert_eq!(machine.wire.line().pairs.len(), 1 + 2 * CHANGES as usize);
}

#[test]
fn frames_for_the_next_bridge_only_are_not_sent() {
    let mut machine = machine(1, &[]);
    let last = [0x01, 0x80, 0xc2, 0, 0, 0x10];
    for (to, sent) in [([0x01, 0x80, 0xc2, 0, 0, 0], 0), ([0x01, 0x80, 0xc2, 0, 0, 0x0f], 0), (last, 1)] {
        machine.driver.write(BUFFERS, &frame(to, 60));
        machine.driver.send_on(TRANSMIT, 0, &[(BUFFERS, 86, false)]);
        assert_eq!(machine.driver.returned_on(TRANSMIT), Some((0, 0)));
        assert_eq!(machine.wire.line().outgoing.len(), sent, "{to:x?}");
    }
    assert_eq!(machine.wire.line().outgoing, [(0, frame(last, 60))]);
}

#[test]
fn a_driver_without_the_features_has_its_control_queue_and_all_frames() {
    let mut machine = machine(2, &[]);
    assert!(machine.passes(OTHER) && machine.passes(GROUP), "it cannot set the filter");
    assert_eq!(machine.control(1, &[4, 0, 2, 0]), 1, "the queue behind the one pair, and no other pair");
}
