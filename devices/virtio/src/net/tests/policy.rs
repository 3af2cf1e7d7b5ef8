// SPDX-License-Identifier: Apache-2.0

//! A device whose wire has a policy.

use devices::device::Device as _;

use super::*;

/// The state of a [`Guarded`] wire.
#[derive(Default)]
struct Gate {
    calls: Vec<&'static str>,
    requests: Vec<Control>,
    deny: bool,
    state: Option<PortState>,
}

#[derive(Clone)]
struct Guarded {
    wire: FakeWire,
    gate: Arc<Mutex<Gate>>,
    event: IoEvent,
}

impl Guarded {
    fn note(&self, call: &'static str) {
        self.gate.lock().unwrap().calls.push(call);
    }

    fn set(&self, mac: Mac, link_up: bool) {
        self.gate.lock().unwrap().state = Some(PortState { mac, link_up });
    }

    fn calls(&self) -> Vec<&'static str> {
        std::mem::take(&mut self.gate.lock().unwrap().calls)
    }
}

impl Policy for Guarded {
    fn sources(&self) -> Vec<IoSource> {
        vec![IoSource::Event(self.event.clone())]
    }

    fn start(&mut self) {
        self.note("start");
        self.set(MAC, true);
    }

    fn stop(&mut self) {
        self.note("stop");
    }

    fn power_on(&mut self) {
        self.note("power_on");
        self.set(MAC, false);
    }

    fn decide(&mut self, request: &Control) -> bool {
        let mut gate = self.gate.lock().unwrap();
        gate.requests.push(request.clone());
        if let (false, Control::Address(mac)) = (gate.deny, request) {
            gate.state = Some(PortState { mac: *mac, link_up: true });
        }
        !gate.deny
    }

    fn wake(&mut self) {
        self.note("wake");
    }

    fn state(&self) -> PortState {
        self.gate.lock().unwrap().state.unwrap_or(PortState { mac: MAC, link_up: false })
    }
}

impl Wire for Guarded {
    fn abilities(&self) -> Abilities {
        Abilities { offloads: false, vlans: true }
    }

    fn policy(&mut self) -> Option<&mut dyn Policy> {
        Some(self)
    }

    fn pairs(&self) -> usize {
        1
    }

    fn source(&self, pair: usize) -> Option<IoSource> {
        self.wire.source(pair)
    }

    fn receive(&mut self, pair: usize, frame: &mut [u8]) -> io::Result<usize> {
        self.wire.receive(pair, frame)
    }

    fn send(&mut self, pair: usize, frame: &[VolatileSlice<'_>]) -> io::Result<()> {
        self.wire.send(pair, frame)
    }

    fn set_offloads(&mut self, _: Offloads) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn set_pairs(&mut self, _: usize) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

fn guarded() -> (Guarded, Machine) {
    let wire = FakeWire::new(1);
    let guarded = Guarded { wire: wire.clone(), gate: Arc::default(), event: IoEvent::new().unwrap() };
    let counters = Arc::<Counters>::default();
    let options = Options { id: "net0".into(), mac: MAC, mtu: None };
    let net = Net::new(Box::new(guarded.clone()), options, Arc::clone(&counters));
    let mut driver = Driver::new(net.identity(), net.configuration(), Box::new(net));
    driver.start(1 << 32 | feature(VIRTIO_NET_F_CTRL_VQ) | feature(VIRTIO_NET_F_CTRL_RX), 16);
    (guarded, Machine { wire, driver, counters })
}

#[test]
fn a_wire_with_a_policy_decides_about_the_requests_of_the_driver() {
    let (guarded, mut machine) = guarded();
    let features = machine.driver.offered();
    assert_ne!(features & feature(VIRTIO_NET_F_CTRL_VLAN), 0);
    let offloads = OFFLOADS.into_iter().fold(0, |all, number| all | feature(number));
    assert_eq!(features & offloads, 0);
    assert_eq!(super::machine(1, &[]).driver.offered() & feature(VIRTIO_NET_F_CTRL_VLAN), 0);
    assert_eq!(guarded.calls(), ["start"]);
    let address = [[1, 1].as_slice(), &OTHER].concat();
    assert_eq!(machine.control(1, &address), 0);
    assert_eq!(machine.driver.get::<6>(0x200), OTHER, "the configuration has the granted address");
    assert_eq!(machine.control(1, &[2, 0, 100, 0]), 0);
    assert_eq!(machine.control(1, &[2, 1, 100, 0]), 0);
    assert_eq!(machine.control(1, &[2, 0, 0, 0x10]), 1, "there is no VLAN 4096");
    guarded.gate.lock().unwrap().deny = true;
    assert_eq!(machine.control(1, &[0, 0, 1]), 1);
    let requests = std::mem::take(&mut guarded.gate.lock().unwrap().requests);
    let vlan = |add| Control::Vlan { id: 100, add };
    assert_eq!(requests, [Control::Address(OTHER), vlan(true), vlan(false), Control::Promiscuous(true)]);
    assert_eq!(machine.control(1, &[5, 0, 0, 0, 0, 0, 0, 0, 0, 0]), 1, "offloads are the device's own");
    assert_eq!(guarded.gate.lock().unwrap().requests, []);
    assert!(machine.passes(GROUP), "the policy filters, not the device");
}

#[test]
fn the_configuration_follows_the_port() {
    let (guarded, mut machine) = guarded();
    assert_eq!(machine.driver.get::<2>(0x206), [1, 0]);
    let generation = machine.driver.get::<1>(0x15);
    guarded.set(OTHER, false);
    guarded.event.signal();
    machine.driver.pump();
    assert_eq!(guarded.calls(), ["start", "wake"]);
    assert_eq!((machine.driver.get::<6>(0x200), machine.driver.get::<2>(0x206)), (OTHER, [0, 0]));
    assert_ne!(machine.driver.get::<1>(0x15), generation);
    machine.wire.arrives(0, MAC, 100);
    machine.driver.pump();
    assert_eq!(guarded.calls(), [] as [&str; 0], "a frame is no event of the port");
    machine.driver.set_status(0);
    machine.driver.pump();
    assert_eq!(guarded.calls(), ["stop"]);
    assert_eq!(machine.driver.get::<6>(0x200), OTHER);
    assert!(machine.driver.function.reset().is_ok());
    assert_eq!(guarded.calls(), ["stop", "power_on"]);
    machine.driver.enable();
    machine.driver.place_bar();
    assert_eq!(machine.driver.get::<6>(0x200), MAC);
}
