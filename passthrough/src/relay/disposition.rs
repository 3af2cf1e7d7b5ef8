// SPDX-License-Identifier: Apache-2.0

//! The ways in which a guest's message can end.

/// The way in which one message ended. The relay acts on it, and counts the message under its [label](Self::label).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Disposition {
    /// Success, granted by the authority; the PF need not know.
    Granted,
    /// Success, from the PF.
    Forwarded,
    /// Success without a request to the authority: nothing is there to clear.
    Local,
    /// Success without a request to the authority: the VF has that address already.
    Equal,
    /// Denied; the guest saw a nack.
    Denied,
    /// Denied; the guest saw success.
    DeniedSilently,
    /// Denied: an address from before the guest's reset.
    Stale,
    /// Denied until the guest resets its VF.
    NotReset,
    /// Rejected: the words have no meaning.
    Malformed,
    /// Rejected: the opcode is not known.
    Unknown,
    /// Rejected: too many messages.
    RateLimited,
    /// The authority was away.
    Unreachable,
    /// The authority did not answer in time.
    Deadline,
    /// The PF refused a granted message.
    RefusedByPf,
    /// The PF did not answer a granted message.
    Unanswered,
    /// A reset failed.
    Failed,
    /// The guest reset its VF, or the relay stopped, before the response.
    Dropped,
}

impl Disposition {
    /// A denial, as the guest sees it.
    pub(crate) fn denied(silent: bool) -> Self {
        if silent { Self::DeniedSilently } else { Self::Denied }
    }

    /// The name in counters and metrics. It never changes, because dashboards use it.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Granted => "granted",
            Self::Forwarded => "forwarded",
            Self::Local => "local",
            Self::Equal => "equal",
            Self::Denied => "refused",
            Self::DeniedSilently => "refused_silently",
            Self::Stale => "stale",
            Self::NotReset => "not_reset",
            Self::Malformed => "malformed",
            Self::Unknown => "unknown",
            Self::RateLimited => "rate_limited",
            Self::Unreachable => "unreachable",
            Self::Deadline => "deadline",
            Self::RefusedByPf => "refused_by_pf",
            Self::Unanswered => "unanswered",
            Self::Failed => "failed",
            Self::Dropped => "dropped",
        }
    }
}
