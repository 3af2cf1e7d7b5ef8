// SPDX-License-Identifier: Apache-2.0

//! The verdict on a request.

use super::{StateError, SwitchState, policy_of, sharing::NotShared};
use crate::{
    ident::PortId,
    mac::MacAddress,
    objects::{Port, Switch},
    policy::{EffectivePolicy, MacChanges, Setting},
    request::{
        Change, DecidedBy, Denial, Evaluation, PromiscuousMode, Reason, Request, StandingRefusal, Verdict,
    },
    vlan::VlanId,
};

/// The shortest Ethernet frame in bytes (IEEE 802.3, 3.2.8).
const MIN_FRAME: u32 = 64;

impl SwitchState {
    /// Evaluates a request of a port by its policy. Changes nothing. The time is logarithmic in the number of ports.
    ///
    /// * A return to the initial address is allowed by every `mac_changes`, but not on a blocked port.
    /// * A reset is always allowed, and so is giving up further addresses, VLANs and promiscuous mode.
    /// * A request for a state that the device has already is allowed without a change, except where a PF may have
    ///   forgotten it.
    /// * VLAN 0 is no VLAN but the tag that carries only a priority: a request for it succeeds, and changes nothing.
    ///
    /// # Errors
    /// No such port.
    pub fn evaluate(&self, port: PortId, request: &Request) -> Result<Evaluation, StateError> {
        let (port, group, switch) = self.lineage(port)?;
        let policy = policy_of(port, group, switch);
        let on_denied = policy.on_denied.value;
        let verdict = match (Evaluator { state: self, port, switch, policy }).decide(request) {
            Ok(changes) => Verdict::Allow(changes),
            Err(denial) => Verdict::Deny(denial),
        };
        Ok(Evaluation { verdict, on_denied, effective_mac: port.effective_mac() })
    }

    /// The verdict of [`evaluate`](Self::evaluate) on all changes of the address except those in its exceptions. None
    /// if there is no such verdict.
    ///
    /// # Errors
    /// No such port.
    pub fn standing_refusal(&self, port: PortId) -> Result<Option<StandingRefusal>, StateError> {
        let (port, group, switch) = self.lineage(port)?;
        let policy = policy_of(port, group, switch);
        let on_denied = policy.on_denied.value;
        if policy.blocked.value {
            return Ok(Some(StandingRefusal { unless: Vec::new(), reason: Reason::PortBlocked, on_denied }));
        }
        let (reason, listed) = match &policy.mac_changes.value {
            MacChanges::Accept => return Ok(None),
            MacChanges::Reject => (Reason::MacChangesRejected, [].as_slice()),
            MacChanges::List(patterns) => (Reason::MacNotAllowed, patterns.as_slice()),
        };
        let shared = self.initials_to_share(&policy, port).map(Into::into);
        let unless = listed.iter().copied().chain([port.initial_mac.into()]).chain(shared).collect();
        Ok(Some(StandingRefusal { unless, reason, on_denied }))
    }
}

struct Evaluator<'a> {
    state: &'a SwitchState,
    port: &'a Port,
    switch: &'a Switch,
    policy: EffectivePolicy,
}

type Decided = Result<Vec<Change>, Denial>;

impl Evaluator<'_> {
    fn decide(&self, request: &Request) -> Decided {
        match request {
            Request::Reset => Ok(vec![Change::Reset]),
            Request::SetMac(mac) => self.set_mac(*mac),
            Request::ClearUnicastFilters
                if self.port.device.unicast.is_empty() && self.port.pending.is_empty() =>
            {
                Ok(vec![])
            }
            Request::ClearUnicastFilters => Ok(vec![Change::ClearUnicast]),
            Request::AddUnicastFilter(mac) => self.add_unicast(*mac),
            Request::SetMulticast { count, hashes } => self.set_multicast(*count, hashes),
            Request::SetVlan { vid, add } => self.set_vlan(*vid, *add),
            Request::SetMaxFrame(bytes) => self.set_max_frame(*bytes),
            Request::SetPromiscuous(mode) => self.set_promiscuous(*mode),
            Request::Unknown { opcode } => {
                Err(deny(Reason::UnknownMessage, None, None, format!("opcode {opcode:#06x}")))
            }
        }
    }

    fn set_mac(&self, mac: MacAddress) -> Decided {
        let old = self.port.effective_mac();
        self.check_address(mac, old)?;
        if mac == old {
            return Ok(vec![]);
        }
        self.check_mac_policy(mac, old)?;
        Ok(vec![Change::SetMac(mac)])
    }

    fn add_unicast(&self, mac: MacAddress) -> Decided {
        let (device, old) = (&self.port.device, self.port.effective_mac());
        self.check_address(mac, old)?;
        if mac == old || device.unicast.contains(&mac) {
            return Ok(vec![]);
        }
        self.check_mac_policy(mac, old)?;
        if !self.policy.unicast_limit.value.allows(device.unicast.len() + 1) {
            let held = format!("{} further addresses", device.unicast.len());
            return Err(self.deny(Reason::LimitExceeded, Setting::UnicastLimit, Some(held), mac.to_string()));
        }
        Ok(vec![Change::AddUnicast(mac)])
    }

    fn check_address(&self, mac: MacAddress, old: MacAddress) -> Result<(), Denial> {
        if mac.is_assignable() {
            return Ok(());
        }
        Err(deny(Reason::MacInvalid, None, Some(old.to_string()), mac.to_string()))
    }

    fn check_mac_policy(&self, mac: MacAddress, old: MacAddress) -> Result<(), Denial> {
        let requested = mac.to_string();
        self.check_open(Some(old.to_string()), &requested)?;
        let changes = &self.policy.mac_changes.value;
        let reason = if self.state.allows_mac(&self.policy, mac, self.port) {
            let Some(conflict) = self.state.conflict(self.switch.id, mac, self.port) else { return Ok(()) };
            let setting = Setting::MacSharing;
            let decided_by = (conflict.why == NotShared::Rejected)
                .then(|| DecidedBy { setting, source: self.policy.source(setting) });
            let denial = deny(Reason::MacInUse, decided_by, Some(old.to_string()), requested);
            return Err(Denial { detail: Some(conflict.detail()), ..denial });
        } else if matches!(changes, MacChanges::List(_)) {
            Reason::MacNotAllowed
        } else {
            Reason::MacChangesRejected
        };
        Err(self.deny(reason, Setting::MacChanges, Some(old.to_string()), requested))
    }

    fn set_multicast(&self, count: u16, hashes: &[u16]) -> Decided {
        let old = Some(format!("{} hashes", self.port.device.multicast.len()));
        let requested = format!("{count} hashes");
        if count > 0 {
            self.check_open(old.clone(), &requested)?;
        }
        if !self.policy.multicast_limit.value.allows(hashes.len().max(count.into())) {
            return Err(self.deny(Reason::LimitExceeded, Setting::MulticastLimit, old, requested));
        }
        if hashes.len() != usize::from(count) {
            return Err(deny(Reason::MalformedMessage, None, old, requested));
        }
        // The driver ixgbe gives a VF with any list, even an empty one, the groups of all VFs.
        if count == 0 && self.port.device.multicast.is_empty() && self.port.pending.is_empty() {
            return Ok(vec![]);
        }
        Ok(vec![Change::SetMulticast(hashes.to_vec())])
    }

    fn set_vlan(&self, vid: u16, add: bool) -> Decided {
        let device = &self.port.device;
        if vid == 0 {
            return Ok(vec![]);
        }
        let old = || {
            let held: Vec<_> = device.vlans.iter().map(ToString::to_string).collect();
            if held.is_empty() { None } else { Some(held.join(",")) }
        };
        let Ok(vlan) = VlanId::new(vid) else {
            return Err(self.deny(Reason::VlanNotAllowed, Setting::Vlan, old(), vid.to_string()));
        };
        if !add {
            let held = device.vlans.contains(&vlan) || device.stale_vlans.contains(&vlan);
            let held = held || self.port.pending.contains(&Change::JoinVlan(vlan));
            return Ok(if held { vec![Change::LeaveVlan(vlan)] } else { vec![] });
        }
        self.check_open(old(), &vid.to_string())?;
        if !self.policy.vlan.value.allows(vlan) {
            return Err(self.deny(Reason::VlanNotAllowed, Setting::Vlan, old(), vid.to_string()));
        }
        let limit = self.policy.vlan_limit.value;
        let own = device.vlans.len() + usize::from(!device.vlans.contains(&vlan));
        if !limit.allows(own) {
            return Err(self.deny(Reason::LimitExceeded, Setting::VlanLimit, old(), vid.to_string()));
        }
        // VLANs from before the last reset make room, so that they do not count against the guest, nor exceed the
        // limit if the PF has kept them.
        let stale = device.stale_vlans.iter().filter(|stale| **stale != vlan);
        let room = usize::from(limit.get()).saturating_sub(own);
        let leave = stale.clone().count().saturating_sub(room);
        Ok(stale.take(leave).map(|stale| Change::LeaveVlan(*stale)).chain([Change::JoinVlan(vlan)]).collect())
    }

    fn set_max_frame(&self, bytes: u32) -> Decided {
        let old = self.port.device.max_frame.map(|bytes| format!("{bytes} bytes"));
        let requested = format!("{bytes} bytes");
        self.check_open(old.clone(), &requested)?;
        if bytes < MIN_FRAME {
            return Err(deny(Reason::MalformedMessage, None, old, requested));
        }
        match u16::try_from(bytes) {
            Ok(bytes) if bytes <= self.policy.mtu.value.max_frame() => Ok(vec![Change::SetMaxFrame(bytes)]),
            _ => Err(self.deny(Reason::MtuExceeded, Setting::Mtu, old, requested)),
        }
    }

    fn set_promiscuous(&self, mode: PromiscuousMode) -> Decided {
        let old = self.port.device.promiscuous;
        if mode == PromiscuousMode::OFF {
            // Where a reset keeps the mode, the PF may have it from before this port.
            let known = self.state.reset_clears(self.port.id).is_ok_and(|clears| clears.promiscuous);
            let off = known && old == PromiscuousMode::OFF && self.port.pending.is_empty();
            return Ok(if off { vec![] } else { vec![Change::SetPromiscuous(mode)] });
        }
        self.check_open(Some(old.to_string()), &mode.to_string())?;
        if self.policy.promiscuous.value.allows(mode) {
            Ok(vec![Change::SetPromiscuous(mode)])
        } else {
            let (reason, setting) = (Reason::PromiscuousRejected, Setting::Promiscuous);
            Err(self.deny(reason, setting, Some(old.to_string()), mode.to_string()))
        }
    }

    fn check_open(&self, old: Option<String>, requested: &str) -> Result<(), Denial> {
        if self.policy.blocked.value {
            Err(self.deny(Reason::PortBlocked, Setting::Blocked, old, requested.into()))
        } else {
            Ok(())
        }
    }

    fn deny(&self, reason: Reason, setting: Setting, old: Option<String>, requested: String) -> Denial {
        deny(reason, Some(DecidedBy { setting, source: self.policy.source(setting) }), old, requested)
    }
}

fn deny(reason: Reason, decided_by: Option<DecidedBy>, old: Option<String>, requested: String) -> Denial {
    Denial { reason, decided_by, old, requested, detail: None }
}
