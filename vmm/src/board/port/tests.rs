// SPDX-License-Identifier: Apache-2.0

//! Ports of a simulated PF, with an authority that decides at once.

use std::{
    sync::{Arc, Mutex, Weak},
    thread::{self, JoinHandle},
    time::Instant,
};

use netpolicy::{OnDenied, Reason};
use passthrough::{
    family::igb::IGBVF,
    hardware::VfHardware,
    relay::{Authority, Config, Decision, GuestRequest, How, Relay, RelayEvent, Unreachable, Verdict},
    threads::ThreadStart,
};
use simnic::{
    SimPf, SimVf,
    pf::{Options, listen, serve},
};
use sriov::{PfControl as _, VfChange};

use super::*;

const MACS: [Mac; 2] = [[2, 0, 0, 0, 0, 0x11], [2, 0, 0, 0, 0, 0x12]];
const FURTHER: Mac = [2, 0, 0, 0, 0, 0x21];
const FORBIDDEN: Mac = [2, 0, 0, 0, 0, 0xff];
const GROUP: Mac = [1, 0, 0x5e, 0, 0x37, 7];

/// Denies all that is about [`FORBIDDEN`], VLANs from 200 on and promiscuous mode.
struct Agent {
    relay: Mutex<Weak<Relay>>,
    pf: Arc<Mutex<SimPf>>,
    vf: u16,
    effective: Mutex<Mac>,
    seen: Mutex<Vec<Request>>,
    away: Mutex<bool>,
}

impl Authority for Agent {
    fn request(&self, guest_request: GuestRequest) -> Result<(), Unreachable> {
        if *self.away.lock().unwrap() {
            return Err(Unreachable);
        }
        let GuestRequest { seq, request } = guest_request;
        let local = Decision::Grant { how: How::Local };
        let forbidden = MacAddress::new(FORBIDDEN);
        let decision = match &request {
            Request::Reset => local,
            Request::SetMac(mac) | Request::AddUnicastFilter(mac) if *mac == forbidden => denied(),
            Request::SetVlan { vid: 200.., .. } => denied(),
            Request::SetPromiscuous(mode) if mode.unicast => denied(),
            Request::SetMac(mac) => {
                self.pf.lock().unwrap().apply(self.vf, &[VfChange::Mac(Some(*mac))]).unwrap();
                *self.effective.lock().unwrap() = mac.bytes();
                local
            }
            _ => Decision::Grant { how: How::Forward },
        };
        self.seen.lock().unwrap().push(request);
        let effective_mac = MacAddress::new(*self.effective.lock().unwrap());
        if let Some(relay) = self.relay.lock().unwrap().upgrade() {
            relay.verdict(Verdict { seq, effective_mac, decision });
        }
        Ok(())
    }

    fn event(&self, _event: RelayEvent) {}
}

fn denied() -> Decision {
    Decision::Refuse { tell: OnDenied::Nack, reason: Reason::MacChangesRejected }
}

/// A port, the agent behind it, and its relay.
struct Port {
    wire: PortWire,
    agent: Arc<Agent>,
    relay: Arc<Relay>,
}

impl Port {
    fn new(pf: &Arc<Mutex<SimPf>>, vf: u16) -> Self {
        let mac = MACS[usize::from(vf)];
        // The switch trusts a VF while the PF takes a message that needs it. Here the VF has it all the time.
        let changes = [VfChange::Mac(Some(MacAddress::new(mac))), VfChange::Trust(true)];
        pf.lock().unwrap().apply(vf, &changes).unwrap();
        let connection = pf.lock().unwrap().attach(vf).unwrap();
        let (hardware, port) = SimVf::with_port(connection, &ThreadStart::default()).unwrap();
        let hardware: Arc<dyn VfHardware> = Arc::new(hardware);
        let agent = Arc::new(Agent {
            relay: Mutex::default(),
            pf: Arc::clone(pf),
            vf,
            effective: Mutex::new(mac),
            seen: Mutex::default(),
            away: Mutex::default(),
        });
        let config = Config { adapter: "net0".into(), ..Config::default() };
        let relay =
            Relay::start(config, &IGBVF, Arc::clone(&hardware), agent.clone(), &ThreadStart::default());
        let relay = Arc::new(relay.unwrap());
        *agent.relay.lock().unwrap() = Arc::downgrade(&relay);
        let driver = Driver::new(&relay, hardware);
        let mtu = Mtu::new(1500).unwrap();
        let wire = PortWire::new("net0", port, driver, MacAddress::new(mac), mtu).unwrap();
        Self { wire, agent, relay }
    }

    fn started(pf: &Arc<Mutex<SimPf>>, vf: u16) -> Self {
        let mut port = Self::new(pf, vf);
        port.wire.start();
        assert_eq!(port.wire.state(), PortState { mac: MACS[usize::from(vf)], link_up: true });
        port.seen();
        port
    }

    /// The requests since the last call.
    fn seen(&self) -> Vec<Request> {
        std::mem::take(&mut self.agent.seen.lock().unwrap())
    }

    fn lists(&mut self, unicast: &[Mac], multicast: &[Mac]) -> bool {
        let list = |list: &[Mac]| Addresses::Only(list.to_vec());
        self.wire.decide(&Control::Lists { unicast: list(unicast), multicast: list(multicast) })
    }

    /// Sends a frame with a header of zeros.
    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut frame = [[0; HEADER].as_slice(), bytes].concat();
        self.wire.send(0, &[VolatileSlice::from(frame.as_mut_slice())])
    }

    /// The next frame within half a second, without its header.
    fn receive(&mut self) -> Option<Vec<u8>> {
        let mut frame = vec![0xee; 10_000];
        let received = eventually(|| self.wire.receive(0, &mut frame).ok());
        received.map(|len| {
            assert_eq!(frame[..HEADER], [0; HEADER]);
            frame[HEADER..len].to_vec()
        })
    }

    /// Waits until a source has woken the thread, and the state is `wanted`.
    fn becomes(&mut self, wanted: PortState) {
        let sources = self.wire.sources();
        let reached = eventually(|| {
            if sources.iter().any(IoSource::take) {
                self.wire.wake();
            }
            (self.wire.state() == wanted).then_some(())
        });
        assert!(reached.is_some(), "{:?}", self.wire.state());
    }
}

fn eventually<T>(mut look: impl FnMut() -> Option<T>) -> Option<T> {
    let end = Instant::now() + Duration::from_millis(500);
    loop {
        match look() {
            None if Instant::now() < end => thread::sleep(Duration::from_millis(1)),
            found => return found,
        }
    }
}

/// The process of a PF, here a thread.
struct Adapter {
    pf: Arc<Mutex<SimPf>>,
    thread: Option<JoinHandle<io::Result<()>>>,
    _dir: tempfile::TempDir,
}

impl Adapter {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pf.sock");
        let listener = listen(&path).unwrap();
        let options = Options { name: "sim0".into(), vfs: 2, listener, tap: None, linger: None };
        let thread = Some(thread::spawn(move || serve(options)));
        Self { pf: Arc::new(Mutex::new(SimPf::connect(&path).unwrap())), thread, _dir: dir }
    }
}

impl Drop for Adapter {
    fn drop(&mut self) {
        let _ = self.pf.lock().unwrap().stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn frame(to: Mac, from: Mac, rest: &[u8]) -> Vec<u8> {
    let mut bytes = [to.as_slice(), &from, rest].concat();
    bytes.resize(bytes.len().max(60), 0);
    bytes
}

#[test]
fn tags_are_in_the_frames_of_the_guest() {
    let adapter = Adapter::new();
    let [mut one, mut two] = [0, 1].map(|vf| Port::started(&adapter.pf, vf));
    // A port that its driver has not started is deaf.
    for port in [&mut one, &mut two] {
        port.wire.port.open(true);
        assert!(port.wire.decide(&Control::Vlan { id: 100, add: true }));
    }
    let tagged = frame(MACS[1], MACS[0], &[0x81, 0, 0x60, 100, 8, 0, 1, 2, 3]);
    for sent in [frame(MACS[1], MACS[0], &[8, 0, 1, 2, 3]), tagged] {
        one.send(&sent).unwrap();
        let received = two.receive().unwrap();
        assert_eq!(received[..sent.len().min(received.len())], sent[..sent.len().min(received.len())]);
    }
    assert!(one.send(&vec![0; LONGEST + 1]).is_err(), "longer than any frame");
    assert!(one.send(&[0; 10]).is_err(), "shorter than any frame");
    let mut segments = frame(MACS[1], MACS[0], &[8, 0]);
    segments.splice(0..0, [0, 1].into_iter().chain([0; HEADER - 2]));
    assert!(
        one.wire.send(0, &[VolatileSlice::from(segments.as_mut_slice())]).is_err(),
        "of several segments"
    );
    two.wire.stop();
    one.send(&frame(MACS[1], MACS[0], &[8, 0])).unwrap();
    assert_eq!(two.receive(), None);
}

#[test]
fn requests_of_the_control_queue_become_messages_of_a_vf() {
    let adapter = Adapter::new();
    let mut port = Port::started(&adapter.pf, 0);
    let modes = |multicast, unicast| Request::SetPromiscuous(PromiscuousMode { multicast, unicast });
    // No message without a change.
    assert!(
        port.wire.decide(&Control::Promiscuous(false)) && port.wire.decide(&Control::AllMulticast(false))
    );
    assert!(port.lists(&[], &[]) && port.wire.decide(&Control::Address(MACS[0])));
    assert!(port.wire.decide(&Control::Vlan { id: 7, add: false }));
    assert_eq!(port.seen(), []);
    assert!(port.lists(&[FURTHER], &[GROUP]));
    let hash = 0x073; // Bits 47:36 of the address.
    let groups = Request::SetMulticast { count: 1, hashes: vec![hash] };
    assert_eq!(port.seen(), [Request::AddUnicastFilter(MacAddress::new(FURTHER)), groups]);
    // A list that is too long becomes a mode, and a shorter one ends it.
    let many: Vec<Mac> = (0..=MOST_GROUPS).map(|n| [1, 0, 0x5e, 0, 0, u8::try_from(n).unwrap()]).collect();
    assert!(port.lists(&[FURTHER], &many));
    assert_eq!(port.seen(), [modes(true, false)]);
    assert!(port.lists(&[FURTHER], &[GROUP]));
    assert_eq!(port.seen().pop(), Some(modes(false, false)));
    // A denial leaves what was there.
    assert!(!port.wire.decide(&Control::Promiscuous(true)));
    assert_eq!(port.seen(), [modes(true, true)]);
    assert!(
        port.wire.decide(&Control::AllMulticast(true)) && port.wire.decide(&Control::AllMulticast(false))
    );
    assert_eq!(port.seen(), [modes(true, false), modes(false, false)]);
    assert!(!port.lists(&[FORBIDDEN, FURTHER], &[GROUP]));
    assert_eq!(port.seen().len(), 3, "clear, the denied one, and the one behind it");
    // What the PF has is not known now, so that the same list is sent in full.
    assert!(port.lists(&[FURTHER], &[GROUP]));
    assert_eq!(
        port.seen(),
        [Request::ClearUnicastFilters, Request::AddUnicastFilter(MacAddress::new(FURTHER))]
    );
    // Without the mode that a long list needs, the VF keeps its filters.
    let many: Vec<Mac> = (0..=MOST_FILTERS).map(|n| [2, 0, 0, 0, 1, u8::try_from(n).unwrap()]).collect();
    assert!(!port.lists(&many, &[GROUP]));
    assert_eq!(port.seen(), [modes(false, true)]);
    assert!(port.lists(&[FURTHER], &[GROUP]) && port.seen().is_empty());
    assert!(!port.wire.decide(&Control::Address(FORBIDDEN)) && port.wire.decide(&Control::Address(FURTHER)));
    assert_eq!(port.wire.state().mac, FURTHER);
    port.wire.stop();
    assert!(!port.wire.decide(&Control::Address(MACS[0])), "no driver");
}

#[test]
fn a_port_that_must_reset_asks_again_for_the_rights_of_its_driver() {
    let adapter = Adapter::new();
    let mut port = Port::started(&adapter.pf, 0);
    assert!(port.lists(&[FURTHER], &[GROUP]));
    for id in [7, 100] {
        assert!(port.wire.decide(&Control::Vlan { id, add: true }));
    }
    assert!(port.wire.decide(&Control::AllMulticast(true)));
    port.seen();
    // The host takes the address away, and another one takes its place.
    let mac = MacAddress::new([2, 0, 0, 0, 0, 0x55]);
    adapter.pf.lock().unwrap().apply(0, &[VfChange::Mac(Some(mac))]).unwrap();
    *port.agent.effective.lock().unwrap() = mac.bytes();
    port.relay.set_effective_mac(mac);
    port.relay.make_guest_reset();
    port.becomes(PortState { mac: mac.bytes(), link_up: true });
    let seen = port.seen();
    assert_eq!(seen[0], Request::Reset);
    let vlans = [7, 100].map(|vid| Request::SetVlan { vid, add: true });
    assert!(vlans.iter().all(|vlan| seen.contains(vlan)), "{seen:?}");
    assert!(seen.contains(&Request::AddUnicastFilter(MacAddress::new(FURTHER))), "{seen:?}");
    assert!(seen.iter().any(|request| matches!(request, Request::SetMulticast { .. })), "{seen:?}");
    let all = PromiscuousMode { multicast: true, unicast: false };
    assert!(seen.contains(&Request::SetPromiscuous(all)), "{seen:?}");
}

#[test]
fn the_link_follows_the_pf_and_the_agent_may_be_away() {
    let adapter = Adapter::new();
    let mut port = Port::started(&adapter.pf, 0);
    let down = PortState { mac: MACS[0], link_up: false };
    adapter.pf.lock().unwrap().set_link(false).unwrap();
    port.becomes(down);
    adapter.pf.lock().unwrap().set_link(true).unwrap();
    port.becomes(PortState { link_up: true, ..down });
    *port.agent.away.lock().unwrap() = true;
    assert!(!port.wire.decide(&Control::Address(FURTHER)), "denied while the agent is away");
    *port.agent.away.lock().unwrap() = false;
    // The next boot begins with the initial address.
    assert!(port.wire.decide(&Control::Address(FURTHER)));
    port.wire.stop();
    port.wire.power_on();
    assert_eq!(port.wire.state(), down);
    drop(adapter);
    assert!(eventually(|| port.wire.port.is_gone().then_some(())).is_some());
    let begun = Instant::now();
    port.wire.start();
    assert!(!port.lists(&[FURTHER], &[GROUP]));
    assert_eq!(port.wire.state(), down, "the PF is gone");
    assert!(begun.elapsed() < Duration::from_millis(500), "nobody waits for it");
}

#[test]
fn the_next_driver_finds_the_address_of_the_port_and_no_filters_of_the_last_one() {
    let adapter = Adapter::new();
    let mut port = Port::started(&adapter.pf, 0);
    assert!(port.lists(&[FURTHER], &[]) && port.wire.decide(&Control::Vlan { id: 7, add: true }));
    port.wire.stop();
    // The host revokes the address of a guest without a driver.
    let mac = MacAddress::new([2, 0, 0, 0, 0, 0x55]);
    *port.agent.effective.lock().unwrap() = mac.bytes();
    port.relay.set_effective_mac(mac);
    port.becomes(PortState { mac: mac.bytes(), link_up: false });
    port.seen();
    adapter.pf.lock().unwrap().apply(0, &[VfChange::Mac(Some(mac))]).unwrap();
    port.wire.start();
    assert_eq!(port.wire.state(), PortState { mac: mac.bytes(), link_up: true });
    let seen = port.seen();
    assert!(seen.contains(&Request::ClearUnicastFilters), "{seen:?}");
    assert!(!seen.iter().any(|request| matches!(request, Request::SetVlan { .. })), "{seen:?}");
}

#[test]
fn a_mode_without_a_verdict_is_asked_for_again() {
    let adapter = Adapter::new();
    let mut port = Port::started(&adapter.pf, 0);
    // No time is left for the message.
    let wanted = Wanted { all_multicast: true, ..Wanted::default() };
    assert!(!port.wire.receive_state(wanted, Instant::now()));
    assert!(port.wire.decide(&Control::AllMulticast(false)));
    assert_eq!(port.seen(), [Request::SetPromiscuous(PromiscuousMode::OFF)]);
}

#[test]
fn a_start_that_fails_is_repeated_and_nothing_is_lost_by_it() {
    let adapter = Adapter::new();
    let mut port = Port::started(&adapter.pf, 0);
    assert!(port.lists(&[FURTHER], &[]) && port.wire.decide(&Control::Vlan { id: 7, add: true }));
    // As after a start without a response.
    port.wire.started = false;
    port.wire.owed = Some(std::mem::take(&mut port.wire.granted));
    assert!(!port.wire.decide(&Control::Vlan { id: 8, add: true }));
    port.seen();
    port.wire.events.look.set(Duration::from_millis(1)).unwrap();
    port.becomes(PortState { mac: MACS[0], link_up: true });
    let seen = port.seen();
    let add = Request::AddUnicastFilter(MacAddress::new(FURTHER));
    assert!(seen.contains(&Request::SetVlan { vid: 7, add: true }) && seen.contains(&add), "{seen:?}");
    assert_eq!((port.wire.granted.vlans.len(), &port.wire.owed), (1, &None));
}
