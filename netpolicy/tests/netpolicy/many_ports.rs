// SPDX-License-Identifier: Apache-2.0

//! A host with many ports, and decisions on it. For the test of scale, and for `benches/decisions.rs`.

use netpolicy::{
    Change, MacAddress, Name, Port, PortGroup, PortGroupId, PortId, Reason, Request, Setting, Settings,
    Switch, SwitchId, SwitchState, Verdict, VfRef, VmId, VmRef,
};
use uuid::Uuid;

const SWITCH: SwitchId = SwitchId(Uuid::from_u128(0x5));

/// The number of ports in one group.
const GROUP: u32 = 100;

/// A host with ports that send requests in turn.
#[derive(Debug)]
pub(crate) struct Host {
    state: SwitchState,
    ports: u32,
    round: u32,
}

fn address(n: u32) -> MacAddress {
    let [a, b, c, d] = n.to_be_bytes();
    MacAddress::new([2, 0, a, b, c, d])
}

fn port_id(n: u32) -> PortId {
    PortId(Uuid::from_u128(0x10_0000 + u128::from(n)))
}

fn name(text: String) -> Name {
    Name::new(text).unwrap()
}

impl Host {
    /// Makes a host with this many ports, all with a VF, in groups of 100 that let them change their address.
    pub(crate) fn new(ports: u32) -> Self {
        let settings: Settings = serde_json::from_str(r#"{"mac_changes": "accept"}"#).unwrap();
        let mut state = SwitchState::new();
        let switch = Switch {
            id: SWITCH,
            name: name("switch".to_owned()),
            kind: Default::default(),
            uplinks: ["pf0".to_owned()].into(),
            settings: Settings::default(),
        };
        state.add_switch(switch).unwrap();
        for n in 0..ports {
            let group = PortGroupId(Uuid::from_u128(0x1000 + u128::from(n / GROUP)));
            if n % GROUP == 0 {
                let group = PortGroup {
                    id: group,
                    name: name(format!("group{}", n / GROUP)),
                    switch: SWITCH,
                    settings: settings.clone(),
                    port_overrides: Setting::ALL.iter().copied().collect(),
                };
                state.add_port_group(group).unwrap();
            }
            let vm = VmRef { id: VmId(Uuid::from_u128(n.into())), name: name(format!("vm{n}")) };
            state.attach(Port::new(port_id(n), vm, "eth0", group, address(n))).unwrap();
            state.bind(port_id(n), VfRef { pf: "pf0".into(), index: n }).unwrap();
        }
        Self { state, ports, round: 0 }
    }

    /// Chooses another port than the last times, from all over the tables.
    fn next(&mut self) -> u32 {
        self.round = self.round.wrapping_add(1);
        self.round.wrapping_mul(7919) % self.ports
    }

    fn decide(&self, port: u32, request: &Request) -> Verdict {
        self.state.evaluate(port_id(port), request).unwrap().verdict
    }

    /// Requests the address of a port's neighbour, which is denied.
    pub(crate) fn refuse(&mut self) {
        let port = self.next();
        let verdict = self.decide(port, &Request::SetMac(address((port + 1) % self.ports)));
        assert!(matches!(verdict, Verdict::Deny(denial) if denial.reason == Reason::MacInUse));
    }

    /// Requests a free address, with all of the switch's part in granting it.
    pub(crate) fn change(&mut self) {
        let port = self.next();
        let free = address(0x00ff_0000 | self.round & 0xffff);
        let request = Request::SetMac(free);
        let Verdict::Allow(changes) = self.decide(port, &request) else { panic!("refused") };
        assert_eq!(changes, [Change::SetMac(free)]);
        self.state.begin(port_id(port), &changes).unwrap();
        assert_eq!(self.state.commit(port_id(port), &changes).unwrap().list, []);
        self.state.note_answer(port_id(port), &request, true).unwrap();
    }
}
