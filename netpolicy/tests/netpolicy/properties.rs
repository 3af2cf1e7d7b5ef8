// SPDX-License-Identifier: Apache-2.0

//! No sequence of guests' requests and administrators' edits gives a VF a state that its group forbids.
//!
//! The model of the adapter and the oracle here share no code with the crate: policies are read from their JSON.

use std::collections::BTreeSet;

use netpolicy::{
    Change, Evaluation, MacAddress, MacSharing, Port, PortGroupId, PromiscuousMode, Reason, Request, Setting,
    Settings, SwitchId, SwitchState, Verdict,
};
use proptest::prelude::*;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::fixture::{group, own, port, port_id, settings, switch};

const PORTS: u32 = 4;
const ID: [(SwitchId, PortGroupId); 2] = [
    (SwitchId(Uuid::from_u128(0x50)), PortGroupId(Uuid::from_u128(0x60))),
    (SwitchId(Uuid::from_u128(0x51)), PortGroupId(Uuid::from_u128(0x61))),
];

/// Ports 0, 1 and 2 are on the first switch, port 3 is on the second.
fn home(port: u32) -> usize {
    usize::from(port == 3)
}

/// Ports 0, 1 and 3 are of one VM, port 2 is of another.
fn owner(port: u32) -> u32 {
    u32::from(port == 2)
}

/// Ports 0 and 2 have VFs of one PF, each other port has one of its own.
fn uplink(port: u32) -> String {
    format!("pf{}", port % 3 % 2 + 2 * u32::from(port == 3))
}

/// The true state of the adapter, in contrast to the recorded one.
#[derive(Clone, Debug)]
struct Hardware {
    mac: MacAddress,
    unicast: BTreeSet<MacAddress>,
    vlans: BTreeSet<u16>,
    multicast: usize,
    promiscuous: PromiscuousMode,
    max_frame: u16,
    spoof_check: bool,
    port_vlan: Option<u16>,
    rate: Option<u32>,
    down: bool,
    /// Whether a reset forgets VLANs: PF drivers differ.
    forgets: bool,
}

impl Hardware {
    fn new(mac: MacAddress, forgets: bool) -> Self {
        let (unicast, vlans, promiscuous) = Default::default();
        let (multicast, max_frame, spoof_check, port_vlan, rate, down) = (0, 64, true, None, None, false);
        Self {
            mac,
            unicast,
            vlans,
            multicast,
            promiscuous,
            max_frame,
            spoof_check,
            port_vlan,
            rate,
            down,
            forgets,
        }
    }

    fn make(&mut self, change: &Change) {
        match change {
            Change::Reset => {
                if self.forgets {
                    self.vlans.clear();
                }
                self.multicast = 0;
                self.promiscuous = PromiscuousMode::OFF;
            }
            Change::SetMac(mac) => self.mac = *mac,
            Change::AddUnicast(mac) => assert!(self.unicast.insert(*mac), "a second entry for {mac}"),
            Change::ClearUnicast => self.unicast.clear(),
            Change::SetMulticast(hashes) => self.multicast = hashes.len(),
            Change::JoinVlan(vlan) => drop(self.vlans.insert(vlan.get())),
            Change::LeaveVlan(vlan) => drop(self.vlans.remove(&vlan.get())),
            Change::SetMaxFrame(bytes) => self.max_frame = *bytes,
            Change::SetPromiscuous(mode) => self.promiscuous = *mode,
            Change::SetPortVlan(vlan) => self.port_vlan = vlan.map(|vlan| vlan.id.get()),
            Change::SetSpoofCheck(on) => self.spoof_check = *on,
            Change::SetTrust(on) => assert!(!on, "nobody asked for trust"),
            Change::SetMaxTxRate(rate) => self.rate = rate.map(u32::from),
            Change::SetLink(link) => self.down = *link == netpolicy::LinkState::Down,
        }
    }
}

/// The value of a setting for a port, as JSON: the last level that decides it wins.
fn setting(levels: &[Value; 3], overrides: &BTreeSet<Setting>, name: &str, default: Value) -> Value {
    let may = overrides.iter().any(|setting| setting.name() == name)
        || (name == "blocked" && levels[2][name] == json!(true));
    let port = levels[2].get(name).filter(|_| may);
    port.or(levels[1].get(name)).or(levels[0].get(name)).cloned().unwrap_or(default)
}

/// The state that the adapter gives a port against its policy.
fn forbidden(hw: &Hardware, port: &Port, state: &SwitchState) -> Vec<String> {
    let group = state.port_group(port.group).unwrap();
    let levels = [&state.switch(group.switch).unwrap().settings, &group.settings, &port.overrides]
        .map(|settings| serde_json::to_value(settings).unwrap());
    let get = |name: &str, default: Value| setting(&levels, &group.port_overrides, name, default);
    let number = |name: &str, default: u64| get(name, json!(default)).as_u64().unwrap();

    let changes = get("mac_changes", json!("reject"));
    let bits = |text: &str| u64::from_str_radix(&text.replace(':', ""), 16).unwrap();
    let listed = |mac: MacAddress| {
        changes["list"].as_array().is_some_and(|list| {
            list.iter().any(|pattern| {
                let (address, mask) = pattern
                    .as_str()
                    .unwrap()
                    .split_once('/')
                    .unwrap_or((pattern.as_str().unwrap(), "ff:ff:ff:ff:ff:ff"));
                bits(&mac.to_string()) & bits(mask) == bits(address)
            })
        })
    };
    let shares = get("mac_sharing", json!("reject")) == "same_vm";
    let of_vm = |mac: MacAddress| {
        state
            .ports()
            .any(|other| other.vm.id == port.vm.id && other.id != port.id && other.initial_mac == mac)
    };
    let may_have = |mac: MacAddress| {
        mac == port.initial_mac || changes == json!("accept") || listed(mac) || (shares && of_vm(mac))
    };
    let real = |mac: MacAddress| mac.bytes() != [0; 6] && mac.bytes()[0] & 1 == 0;
    let vlans = get("vlan", json!("none"));
    let trunk = |vlan: u16| {
        vlans["trunk"].as_array().is_some_and(|list| {
            list.iter().any(|item| match item.as_str().and_then(|text| text.split_once('-')) {
                Some((a, b)) => (a.parse().unwrap()..=b.parse().unwrap()).contains(&vlan),
                None => item == vlan || item == &json!(vlan.to_string()),
            })
        })
    };
    let promiscuous = get("promiscuous", json!("reject"));

    let mut found = Vec::new();
    let mut must = |holds: bool, what: &str| {
        if !holds {
            found.push(format!("{what}: {hw:?}"));
        }
    };
    must(may_have(hw.mac) && real(hw.mac), "address");
    must(hw.unicast.iter().all(|mac| may_have(*mac) && real(*mac)), "further addresses");
    must(hw.unicast.len() as u64 <= number("unicast_limit", 0), "number of further addresses");
    must(hw.vlans.iter().all(|vlan| trunk(*vlan)), "VLANs");
    must(hw.vlans.len() as u64 <= number("vlan_limit", 8), "number of VLANs");
    must(hw.multicast as u64 <= number("multicast_limit", 30), "number of multicast hashes");
    must(u64::from(hw.max_frame) <= number("mtu", 1500) + 26, "frame length");
    must(!hw.promiscuous.unicast || promiscuous == "accept", "unicast promiscuous");
    must(!hw.promiscuous.multicast || promiscuous != "reject", "multicast promiscuous");
    must(hw.spoof_check == (get("forged_transmits", json!("reject")) == "reject"), "spoof check");
    must(hw.port_vlan.map(u64::from) == vlans["access"]["id"].as_u64(), "port VLAN");
    must(hw.rate.map(u64::from) == get("rate", json!("unlimited"))["max_tx_mbit"].as_u64(), "rate");
    must(hw.down == (get("blocked", json!(false)) == json!(true)), "link");
    found
}

#[derive(Clone, Debug)]
enum Step {
    /// A guest sends a request; the policy may change before the adapter has the change.
    Ask(u32, Request, Option<Box<Step>>),
    /// The adapter fails after this many changes, and the VM is started again.
    Crash(u32, Request, usize),
    Switch(usize, Settings),
    Group(usize, Settings, BTreeSet<Setting>),
    Port(u32, Settings),
    Restart(u32),
}

/// Few addresses, so that they clash: the ports' own, two of a pattern, some that are no adapter's.
fn an_address() -> BoxedStrategy<MacAddress> {
    prop_oneof![
        8 => (0_u8..8).prop_map(own),
        4 => (0_u8..4).prop_map(|n| MacAddress::new([0, 0, 0x5e, 0, 1, n])),
        1 => Just(MacAddress::ZERO),
        1 => Just(MacAddress::new([1, 0, 0x5e, 0, 0, 1])),
    ]
    .boxed()
}

fn a_request() -> BoxedStrategy<Request> {
    prop_oneof![
        2 => Just(Request::Reset),
        4 => an_address().prop_map(Request::SetMac),
        1 => Just(Request::ClearUnicastFilters),
        4 => an_address().prop_map(Request::AddUnicastFilter),
        2 => (0_u16..34, -1_i8..2).prop_map(|(count, off)| Request::SetMulticast {
            count,
            hashes: (0..count.saturating_add_signed(off.into())).collect(),
        }),
        5 => (prop_oneof![0_u16..12, Just(4094), Just(4095), any::<u16>()], prop::bool::weighted(0.8))
            .prop_map(|(vid, add)| Request::SetVlan { vid, add }),
        2 => prop_oneof![Just(1522_u32), Just(1526), Just(1527), Just(9026), any::<u32>(), 0_u32..9300].prop_map(Request::SetMaxFrame),
        2 => (any::<bool>(), any::<bool>())
            .prop_map(|(multicast, unicast)| Request::SetPromiscuous(PromiscuousMode { multicast, unicast })),
        1 => any::<u16>().prop_map(|opcode| Request::Unknown { opcode }),
    ]
    .boxed()
}

fn some_settings() -> BoxedStrategy<Settings> {
    let one = |name: &'static str, values: Vec<Value>| {
        prop::option::of(prop::sample::select(values)).prop_map(move |value| (name, value))
    };
    (
        one(
            "mac_changes",
            vec![
                json!("reject"),
                json!("accept"),
                json!({"list": ["00:00:5e:00:01:00/ff:ff:ff:ff:ff:fe", "02:00:00:00:00:05"]}),
            ],
        ),
        (
            one("mac_sharing", vec![json!("reject"), json!("same_vm")]),
            one("forged_transmits", vec![json!("reject"), json!("accept")]),
        ),
        one("promiscuous", vec![json!("reject"), json!("multicast"), json!("accept")]),
        one(
            "vlan",
            vec![
                json!("none"),
                json!({"access": {"id": 5}}),
                json!({"trunk": ["1-5"]}),
                json!({"trunk": [3, "7-4094"]}),
            ],
        ),
        one("multicast_limit", vec![json!(0), json!(7), json!(30)]),
        one("unicast_limit", vec![json!(0), json!(1), json!(3), json!(3)]),
        one("vlan_limit", vec![json!(0), json!(1), json!(3)]),
        one("mtu", vec![json!(68), json!(1500), json!(9000)]),
        one("rate", vec![json!("unlimited"), json!({"max_tx_mbit": 5})]),
        (one("on_denied", vec![json!("nack"), json!("silent")]), prop::option::weighted(0.2, any::<bool>())),
    )
        .prop_map(|(a, (sharing, b), c, d, e, f, g, h, i, (j, blocked))| {
            let blocked = ("blocked", blocked.map(|on| json!(on)));
            let named = [a, sharing, b, c, d, e, f, g, h, i, j, blocked].into_iter();
            let object =
                named.filter_map(|(name, value)| value.map(|value| (name.to_string(), value))).collect();
            serde_json::from_value(Value::Object(object)).unwrap()
        })
        .boxed()
}

fn an_edit() -> BoxedStrategy<Step> {
    let permissions = prop::sample::subsequence(Setting::ALL, 0..=Setting::ALL.len());
    prop_oneof![
        (0_usize..2, some_settings()).prop_map(|(n, settings)| Step::Switch(n, settings)),
        (0_usize..2, some_settings(), permissions).prop_map(|(n, settings, may)| Step::Group(
            n,
            settings,
            may.into_iter().collect()
        )),
        (0..PORTS, some_settings()).prop_map(|(n, settings)| Step::Port(n, settings)),
    ]
    .boxed()
}

fn a_step() -> BoxedStrategy<Step> {
    let meanwhile = prop::option::weighted(0.1, an_edit().prop_map(Box::new));
    prop_oneof![
        20 => (0..PORTS, a_request(), meanwhile).prop_map(|(n, request, step)| Step::Ask(n, request, step)),
        2 => an_edit(),
        1 => (0..PORTS, a_request(), 0_usize..3).prop_map(|(n, request, made)| Step::Crash(n, request, made)),
        1 => (0..PORTS).prop_map(Step::Restart),
    ]
    .boxed()
}

struct World {
    state: SwitchState,
    hardware: Vec<Hardware>,
}

impl World {
    fn new(forgets: bool) -> Self {
        let mut state = SwitchState::new();
        for (n, (switch_id, group_id)) in ID.into_iter().enumerate() {
            let mut new = switch(switch_id, &format!("switch{n}"), "pf9");
            new.uplinks = (0..PORTS).filter(|port| home(*port) == n).map(uplink).collect();
            state.add_switch(new).unwrap();
            let open = settings(
                r#"{"mac_changes": "accept", "mac_sharing": "same_vm", "unicast_limit": 3, "vlan": {"trunk": ["1-4094"]}}"#,
            );
            state.add_port_group(group(group_id, &format!("group{n}"), switch_id, open)).unwrap();
        }
        let mut hardware = Vec::new();
        for n in 0..PORTS {
            // Port 3 has the address of port 0, on the other switch.
            let mac = own(u8::try_from(n % 3).unwrap());
            let vm = port(owner(n), ID[home(n)].1, mac).vm;
            state.attach(Port { vm, ..port(n, ID[home(n)].1, mac) }).unwrap();
            let vf = netpolicy::VfRef { pf: uplink(n), index: n };
            let baseline = state.bind(port_id(n), vf).unwrap();
            hardware.push(Hardware::new(mac, forgets));
            baseline.changes().iter().for_each(|change| hardware[n as usize].make(change));
        }
        Self { state, hardware }
    }

    fn make(&mut self, n: u32, changes: &[Change]) {
        changes.iter().for_each(|change| self.hardware[n as usize].make(change));
    }

    fn correct(&mut self, n: u32) -> Result<(), TestCaseError> {
        let changes = self.state.corrections(port_id(n)).unwrap().changes();
        self.make(n, &changes);
        let more = self.state.commit(port_id(n), &changes).unwrap();
        prop_assert_eq!(more.list, [], "corrections do not end");
        Ok(())
    }

    fn start_again(&mut self, n: u32) -> Result<(), TestCaseError> {
        let all = self.state.revocations_for_reboot(port_id(n)).unwrap();
        self.make(n, &all);
        let hw = &self.hardware[n as usize];
        let left = (hw.vlans.len(), hw.unicast.len(), hw.multicast, hw.promiscuous, hw.mac);
        let initial = self.state.port(port_id(n)).unwrap().initial_mac;
        prop_assert_eq!(left, (0, 0, 0, PromiscuousMode::OFF, initial), "something outlives the tenant");
        let baseline = self.state.restart(port_id(n)).unwrap();
        // The next driver sets the longest frame, which is harmless until then.
        self.hardware[n as usize].max_frame = 64;
        self.make(n, &baseline.changes());
        Ok(())
    }

    fn step(&mut self, step: &Step) -> Result<(), TestCaseError> {
        match step {
            Step::Ask(n, request, meanwhile) => {
                let before = self.hardware[*n as usize].clone();
                let evaluation = self.state.evaluate(port_id(*n), request).unwrap();
                self.check_standing(*n, request, &evaluation)?;
                let changes = match evaluation.verdict {
                    Verdict::Allow(changes) => changes,
                    Verdict::Deny(denial) => {
                        self.state.note_refusal(port_id(*n), request, denial.reason).unwrap();
                        return Ok(());
                    }
                };
                self.state.begin(port_id(*n), &changes).unwrap();
                if let Some(step) = meanwhile {
                    self.edit(step)?;
                }
                self.make(*n, &changes);
                let corrections = self.state.commit(port_id(*n), &changes).unwrap();
                self.state.note_answer(port_id(*n), request, true).unwrap();
                if meanwhile.is_none() {
                    prop_assert_eq!(&corrections.list, &[], "{:?} was allowed, and is corrected", request);
                    let blocked = before.down && *request != Request::Reset;
                    let hw = &self.hardware[*n as usize];
                    prop_assert!(
                        !blocked || (hw.mac == before.mac && hw.vlans.is_subset(&before.vlans)),
                        "blocked, but gave"
                    );
                }
                let got = &self.hardware[*n as usize];
                match request {
                    Request::SetMac(mac) if meanwhile.is_none() => prop_assert_eq!(got.mac, *mac),
                    Request::SetVlan { vid, add: false } => prop_assert!(!got.vlans.contains(vid)),
                    Request::SetVlan { vid, add: true } if *vid > 0 => prop_assert!(got.vlans.contains(vid)),
                    _ => {}
                }
            }
            Step::Crash(n, request, made) => {
                let Verdict::Allow(changes) = self.state.evaluate(port_id(*n), request).unwrap().verdict
                else {
                    return Ok(());
                };
                self.state.begin(port_id(*n), &changes).unwrap();
                self.make(*n, changes.get(..*made).unwrap_or(&changes));
                self.start_again(*n)?;
            }
            Step::Restart(n) => self.start_again(*n)?,
            edit => self.edit(edit)?,
        }
        Ok(())
    }

    /// A standing refusal must deny what a request would be denied, with the same reason, and must cover all such
    /// requests.
    fn check_standing(&self, n: u32, request: &Request, asked: &Evaluation) -> Result<(), TestCaseError> {
        let standing = self.state.standing_refusal(port_id(n)).unwrap();
        let Request::SetMac(mac) = request else { return Ok(()) };
        if !mac.is_assignable() || *mac == asked.effective_mac {
            return Ok(());
        }
        let refused = match &asked.verdict {
            Verdict::Deny(denial) if denial.reason != Reason::MacInUse => {
                Some((denial.reason, asked.on_denied))
            }
            _ => None,
        };
        let standing = standing.filter(|standing| standing.covers(*mac));
        prop_assert_eq!(standing.map(|standing| (standing.reason, standing.on_denied)), refused);
        Ok(())
    }

    /// Changes policies, and nothing on the adapter.
    fn edit(&mut self, step: &Step) -> Result<(), TestCaseError> {
        let expect = |state: &SwitchState| -> Vec<_> {
            let all = (0..PORTS).map(|n| state.corrections(port_id(n)).unwrap());
            all.filter(|corrections| !corrections.list.is_empty()).collect()
        };
        let named = match step {
            Step::Switch(n, settings) => {
                let mut switch = self.state.switch(ID[*n].0).unwrap().clone();
                switch.settings = settings.clone();
                self.state.update_switch(switch).unwrap()
            }
            Step::Group(n, settings, permissions) => {
                let mut group = self.state.port_group(ID[*n].1).unwrap().clone();
                group.settings = settings.clone();
                group.port_overrides = permissions.clone();
                self.state.update_port_group(group).unwrap()
            }
            Step::Port(n, settings) => match self.state.update_port(port_id(*n), settings.clone()) {
                Ok(corrections) if corrections.list.is_empty() => Vec::new(),
                Ok(corrections) => vec![corrections],
                Err(_) => return Ok(()),
            },
            _ => return Ok(()),
        };
        prop_assert_eq!(named, expect(&self.state), "an edit that does not name all that must follow");
        Ok(())
    }

    /// Brings each port to its policy, and offers the addresses that were given up.
    fn settle(&mut self) -> Result<(), TestCaseError> {
        loop {
            for n in 0..PORTS {
                self.correct(n)?;
            }
            let freed = self.state.take_freed();
            if freed.is_empty() {
                break;
            }
            for (switch, mac) in freed {
                let wanting = self.state.offer(switch, mac);
                let due = |port: netpolicy::PortId| {
                    self.state.corrections(port).unwrap().changes().contains(&Change::AddUnicast(mac))
                };
                prop_assert!((0..PORTS).map(port_id).all(|port| !due(port) || wanting.contains(&port)));
            }
        }
        Ok(())
    }

    fn check(&self) -> Result<(), TestCaseError> {
        for (n, hw) in (0..PORTS).zip(&self.hardware) {
            let port = self.state.port(port_id(n)).unwrap();
            prop_assert_eq!(forbidden(hw, port, &self.state), Vec::<String>::new(), "port {}", n);
            prop_assert_eq!(port.effective_mac(), hw.mac);
            let known: BTreeSet<_> =
                port.device.vlans.union(&port.device.stale_vlans).map(|vlan| vlan.get()).collect();
            prop_assert!(hw.vlans.is_subset(&known), "VLANs that are not recorded");
        }
        // Count addresses without the index. `own(0..8)` and the pattern's are all that exist.
        let all = (0..8).map(own).chain((0..4).map(|n| MacAddress::new([0, 0, 0x5e, 0, 1, n])));
        for mac in all {
            for (s, (switch, _)) in ID.iter().enumerate() {
                let holders = (0..PORTS).zip(&self.hardware).filter(|(n, hw)| {
                    let initial = self.state.port(port_id(*n)).unwrap().initial_mac;
                    home(*n) == s && (hw.mac == mac || hw.unicast.contains(&mac) || initial == mac)
                });
                let holders: Vec<_> = holders.map(|(n, _)| n).collect();
                self.check_holders(mac, &holders)?;
                let indexed: Vec<_> = self.state.ports_of_mac(*switch, mac).map(|port| port.id).collect();
                let expect: Vec<_> = holders.into_iter().map(port_id).collect();
                prop_assert_eq!(indexed, expect, "index of {}", mac);
            }
        }
        Ok(())
    }
}

impl World {
    /// Ports of one switch with the same address are of one VM and on different PFs, and all but one that has it as its initial
    /// address share it by their policies.
    fn check_holders(&self, mac: MacAddress, holders: &[u32]) -> Result<(), TestCaseError> {
        if holders.len() < 2 {
            return Ok(());
        }
        let different =
            |of: &dyn Fn(u32) -> String| holders.iter().map(|n| of(*n)).collect::<BTreeSet<_>>().len();
        prop_assert_eq!(different(&|n| owner(n).to_string()), 1, "{} is held by {:?}", mac, holders);
        prop_assert_eq!(different(&uplink), holders.len(), "{} is held by {:?} on one PF", mac, holders);
        for n in holders {
            let sharing = self.state.effective_policy(port_id(*n)).unwrap().mac_sharing.value;
            let initial = self.state.port(port_id(*n)).unwrap().initial_mac == mac;
            prop_assert!(initial || sharing == MacSharing::SameVm, "{} is held by {:?}", mac, holders);
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn no_vf_ever_has_what_its_policy_forbids(steps in prop::collection::vec(a_step(), 1..80), forgets: bool) {
        let mut world = World::new(forgets);
        world.check()?;
        for step in &steps {
            world.step(step)?;
            world.settle()?;
            world.check()?;
        }
    }

    #[test]
    fn ports_and_policies_survive_the_store(steps in prop::collection::vec(a_step(), 1..40)) {
        let mut world = World::new(true);
        for step in &steps {
            world.step(step)?;
            world.settle()?;
        }
        let mut restored = SwitchState::new();
        for switch in world.state.switches() {
            restored.add_switch(serde_json::from_value(serde_json::to_value(switch).unwrap()).unwrap()).unwrap();
        }
        for group in world.state.port_groups() {
            restored.add_port_group(serde_json::from_value(serde_json::to_value(group).unwrap()).unwrap()).unwrap();
        }
        for port in world.state.ports() {
            restored.attach(serde_json::from_value(serde_json::to_value(port).unwrap()).unwrap()).unwrap();
        }
        prop_assert_eq!(restored, world.state);
    }

    #[test]
    fn requests_and_verdicts_survive_the_wire(n in 0..PORTS, request in a_request()) {
        let world = World::new(true);
        let text = serde_json::to_string(&request).unwrap();
        prop_assert_eq!(serde_json::from_str::<Request>(&text).unwrap(), request.clone());
        let evaluation = world.state.evaluate(port_id(n), &request).unwrap();
        let text = serde_json::to_string(&evaluation).unwrap();
        prop_assert_eq!(serde_json::from_str::<netpolicy::Evaluation>(&text).unwrap(), evaluation);
        let policy = world.state.effective_policy(port_id(n)).unwrap();
        let text = serde_json::to_string(&policy).unwrap();
        prop_assert_eq!(serde_json::from_str::<netpolicy::EffectivePolicy>(&text).unwrap(), policy);
    }
}
