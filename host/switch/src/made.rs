// SPDX-License-Identifier: Apache-2.0

//! The record of changes that the switch makes by itself.

use netpolicy::{
    Change, Committed, Correction, DecidedBy, Decision, Outcome, PortId, Reason, Request, Route,
};

use super::actor::Actor;

/// The detail of an address that a guest got after an earlier denial.
const FREED: &str = "Denied before, while another port had the address";

/// The detail of a change that is made through the VF's mailbox.
const BY_ITS_WORD: &str = "Reported by the VM's process: the PF does not show it";

impl Actor {
    pub(super) fn record_correction(&mut self, port: PortId, correction: &Correction, error: Option<String>) {
        let committed = committed(&correction.change, error.is_some());
        if let (Change::AddUnicast(mac), None) = (&correction.change, &correction.decided_by) {
            let allowed = error.is_none();
            let outcome = if allowed { Outcome::Allowed } else { Outcome::Denied };
            let decision =
                self.decision(port, Request::AddUnicastFilter(*mac).name(), outcome).map(|decision| {
                    Decision {
                        reason: (!allowed).then_some(Reason::CommitFailed),
                        requested: Some(mac.to_string()),
                        committed,
                        detail: Some(error.unwrap_or_else(|| FREED.to_owned())),
                        ..decision
                    }
                });
            return self.record(decision);
        }
        // A correction that revokes nothing is recorded only if it failed.
        if !correction.revokes && error.is_none() {
            return;
        }
        let detail = error.or_else(|| (committed == Committed::Mailbox).then(|| BY_ITS_WORD.to_owned()));
        let (decided_by, old) = (correction.decided_by, Some(correction.old.clone()));
        let made = MadeChange { change: &correction.change, decided_by, old, committed, detail };
        let edited_by = self.port_queues.get(&port).and_then(|port_queue| port_queue.edited_by.clone());
        self.record_made(port, Outcome::Revoked, edited_by, made);
    }

    pub(super) fn record_made(
        &mut self,
        port: PortId,
        outcome: Outcome,
        edited_by: Option<String>,
        made: MadeChange<'_>,
    ) {
        let decision = self.decision(port, name(made.change), outcome).map(|decision| Decision {
            decided_by: made.decided_by,
            old: made.old,
            requested: value(made.change),
            committed: made.committed,
            detail: made.detail,
            edited_by,
            ..decision
        });
        self.record(decision);
    }
}

/// One change that was made, or that failed.
pub(super) struct MadeChange<'a> {
    pub(super) change: &'a Change,
    pub(super) decided_by: Option<DecidedBy>,
    pub(super) old: Option<String>,
    pub(super) committed: Committed,
    pub(super) detail: Option<String>,
}

pub(super) fn committed(change: &Change, failed: bool) -> Committed {
    match change.route() {
        _ if failed => Committed::Failed,
        Route::Pf => Committed::Pf,
        Route::Mailbox => Committed::Mailbox,
    }
}

/// The name of a change in decisions: that of the corresponding request, where there is one.
pub(super) fn name(change: &Change) -> &'static str {
    match change {
        Change::Reset => "reset",
        Change::SetMac(_) => "set_mac",
        Change::AddUnicast(_) => "add_unicast_filter",
        Change::ClearUnicast => "clear_unicast_filters",
        Change::SetMulticast(_) => "set_multicast",
        Change::JoinVlan(_) | Change::LeaveVlan(_) => "set_vlan",
        Change::SetMaxFrame(_) => "set_max_frame",
        Change::SetPromiscuous(_) => "set_promiscuous",
        Change::SetPortVlan(_) => "set_port_vlan",
        Change::SetSpoofCheck(_) => "set_spoof_check",
        Change::SetTrust(_) => "set_trust",
        Change::SetMaxTxRate(_) => "set_max_tx_rate",
        Change::SetLink(_) => "set_link",
    }
}

/// A change as one text, from its name and value in a decision.
pub(super) fn describe(change: &Change) -> String {
    let value = value(change);
    [name(change), value.as_deref().unwrap_or_default()].join(" ").trim_end().to_owned()
}

/// The value of a change, for people.
fn value(change: &Change) -> Option<String> {
    let on_off = |on: bool| if on { "on" } else { "off" }.to_owned();
    Some(match change {
        Change::Reset | Change::ClearUnicast => return None,
        Change::SetMac(mac) | Change::AddUnicast(mac) => mac.to_string(),
        Change::SetMulticast(hashes) => format!("{} hashes", hashes.len()),
        Change::JoinVlan(vlan) => vlan.to_string(),
        Change::LeaveVlan(vlan) => format!("leave {vlan}"),
        Change::SetMaxFrame(bytes) => format!("{bytes} bytes"),
        Change::SetPromiscuous(mode) => mode.to_string(),
        Change::SetPortVlan(vlan) => vlan.map_or_else(|| "none".to_owned(), |vlan| vlan.to_string()),
        Change::SetSpoofCheck(on) | Change::SetTrust(on) => on_off(*on),
        Change::SetMaxTxRate(rate) => {
            rate.map_or_else(|| "unlimited".to_owned(), |rate| format!("{rate} Mbit/s"))
        }
        Change::SetLink(link) => format!("{link:?}").to_lowercase(),
    })
}
