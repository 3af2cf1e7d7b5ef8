// SPDX-License-Identifier: Apache-2.0

//! The source of the switch's verdicts, standing denials and corrections.

use netpolicy::{
    Change, Corrections, Denial, OnDenied, PortId, Request, StandingRefusal, SwitchState, Verdict,
};

/// The source of verdicts. The rest of the switch works the same with either of the two.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum VerdictSource {
    /// The policy of each port.
    #[default]
    Policy,
    /// Grants every request, and makes no corrections except of the leftovers of an earlier boot. Tests of the
    /// policy must fail with it, which proves that they detect a missing check.
    #[cfg(any(test, feature = "test-support"))]
    Permissive,
}

/// A verdict, or its absence.
pub(super) enum Evaluated {
    Changes(Vec<Change>),
    Denied(Denial, OnDenied),
    /// There is no such port.
    Unknown,
}

impl VerdictSource {
    /// The verdict on a request.
    pub(super) fn evaluate(self, state: &SwitchState, port: PortId, request: &Request) -> Evaluated {
        #[cfg(any(test, feature = "test-support"))]
        if self == Self::Permissive {
            return Evaluated::Changes(granted(request));
        }
        match state.evaluate(port, request) {
            Err(_) => Evaluated::Unknown,
            Ok(evaluation) => match evaluation.verdict {
                Verdict::Allow(changes) => Evaluated::Changes(changes),
                Verdict::Deny(denial) => Evaluated::Denied(denial, evaluation.on_denied),
            },
        }
    }

    /// The standing denial of a port, if it has one.
    pub(super) fn standing_refusal(self, state: &SwitchState, port: PortId) -> Option<StandingRefusal> {
        let refusal = state.standing_refusal(port).ok().flatten();
        refusal.filter(|_| self == Self::Policy)
    }

    /// The changes that the port needs now. None if there is no such port.
    pub(super) fn corrections(self, state: &SwitchState, port: PortId) -> Option<Corrections> {
        let mut corrections = state.corrections(port).ok()?;
        if self != Self::Policy {
            corrections.list.clear();
        }
        Some(corrections)
    }
}

/// The changes of a request that no policy restricts.
#[cfg(any(test, feature = "test-support"))]
fn granted(request: &Request) -> Vec<Change> {
    let vlan = |vid: u16| netpolicy::VlanId::new(vid).ok();
    match request {
        Request::SetMac(mac) if mac.is_assignable() => vec![Change::SetMac(*mac)],
        Request::AddUnicastFilter(mac) if mac.is_assignable() => vec![Change::AddUnicast(*mac)],
        Request::ClearUnicastFilters => vec![Change::ClearUnicast],
        Request::SetMulticast { hashes, .. } => vec![Change::SetMulticast(hashes.clone())],
        Request::SetVlan { vid, add: true } => vlan(*vid).map(Change::JoinVlan).into_iter().collect(),
        Request::SetVlan { vid, add: false } => vlan(*vid).map(Change::LeaveVlan).into_iter().collect(),
        Request::SetMaxFrame(bytes) => u16::try_from(*bytes).map(Change::SetMaxFrame).into_iter().collect(),
        Request::SetPromiscuous(mode) => vec![Change::SetPromiscuous(*mode)],
        _ => Vec::new(),
    }
}
