// SPDX-License-Identifier: Apache-2.0

//! A host with one switch, one port group and ports on it.

use netpolicy::{
    Change, Denial, Evaluation, MacAddress, Name, PfCapabilities, Port, PortGroup, PortGroupId, PortId,
    Request, Setting, Settings, Switch, SwitchId, SwitchState, Verdict, VfRef, VlanId, VmId, VmRef,
};
use uuid::Uuid;

pub(crate) const SWITCH: SwitchId = SwitchId(Uuid::from_u128(0x5));
pub(crate) const GROUP: PortGroupId = PortGroupId(Uuid::from_u128(0x6));

pub(crate) fn mac(text: &str) -> MacAddress {
    text.parse().unwrap()
}

/// 02:00:00:00:00:NN.
pub(crate) fn own(n: u8) -> MacAddress {
    MacAddress::new([2, 0, 0, 0, 0, n])
}

pub(crate) fn vlan(id: u16) -> VlanId {
    VlanId::new(id).unwrap()
}

pub(crate) fn settings(json: &str) -> Settings {
    serde_json::from_str(json).unwrap()
}

pub(crate) fn switch(id: SwitchId, name: &str, pf: &str) -> Switch {
    Switch {
        id,
        name: Name::new(name).unwrap(),
        kind: Default::default(),
        uplinks: [pf.to_string()].into(),
        settings: Settings::default(),
    }
}

pub(crate) fn group(id: PortGroupId, name: &str, switch: SwitchId, settings: Settings) -> PortGroup {
    PortGroup {
        id,
        name: Name::new(name).unwrap(),
        switch,
        settings,
        port_overrides: Setting::ALL.iter().copied().collect(),
    }
}

pub(crate) fn port_id(n: u32) -> PortId {
    PortId(Uuid::from_u128(0x1000 + u128::from(n)))
}

pub(crate) fn vf(n: u32) -> VfRef {
    VfRef { pf: "pf0".into(), index: n }
}

pub(crate) fn port(n: u32, group: PortGroupId, initial: MacAddress) -> Port {
    let vm = VmRef { id: VmId(Uuid::from_u128(n.into())), name: Name::new(format!("vm{n}")).unwrap() };
    Port::new(port_id(n), vm, "eth0", group, initial)
}

/// Ports 1 and 2 with 02:00:00:00:00:01 and :02, bound to VFs, in a group with these settings.
pub(crate) fn host(group_settings: &str) -> SwitchState {
    let mut state = SwitchState::new();
    state.set_reset_clears("pf0", PfCapabilities::igb_82576().reset_clears);
    state.add_switch(switch(SWITCH, "switch", "pf0")).unwrap();
    state.add_port_group(group(GROUP, "web", SWITCH, settings(group_settings))).unwrap();
    for n in [1, 2] {
        state.attach(port(n, GROUP, own(u8::try_from(n).unwrap()))).unwrap();
        state.bind(port_id(n), vf(n)).unwrap();
    }
    state
}

pub(crate) fn evaluate(state: &SwitchState, port: u32, request: &Request) -> Result<Vec<Change>, Denial> {
    let Evaluation { verdict, .. } = state.evaluate(port_id(port), request).unwrap();
    match verdict {
        Verdict::Allow(changes) => Ok(changes),
        Verdict::Deny(denial) => Err(denial),
    }
}

/// Evaluates, commits and records like an agent whose adapter never fails.
pub(crate) fn ask(state: &mut SwitchState, port: u32, request: &Request) -> Result<Vec<Change>, Denial> {
    let decided = evaluate(state, port, request);
    if let Ok(changes) = &decided {
        state.begin(port_id(port), changes).unwrap();
        let corrections = state.commit(port_id(port), changes).unwrap();
        assert_eq!(corrections.list, [], "what was allowed is corrected");
    }
    state.note_answer(port_id(port), request, decided.is_ok()).unwrap();
    decided
}
