// SPDX-License-Identifier: Apache-2.0

//! One log line for each decision, as many as a port's share of that weight allows.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use netpolicy::{Committed, Decision, Outcome, PortId, Weight};

/// Lines of one weight that a port may cause at once.
const BURST: u32 = 20;

/// After that, one line in this time.
const PERIOD: Duration = Duration::from_secs(1);

/// Buckets that are remembered: those of 4096 ports.
const BUCKETS: usize = 3 * 4096;

/// Token buckets by port and weight: repeated denials suppress no line about a change.
#[derive(Debug, Default)]
pub(super) struct Lines(HashMap<(PortId, Weight), Bucket>);

#[derive(Debug)]
struct Bucket {
    tokens: u32,
    refilled: Instant,
    suppressed: u64,
}

impl Lines {
    /// Writes the line, or counts it for the next one.
    pub(super) fn say(&mut self, decision: &Decision) {
        if let Some(suppressed) = self.take((decision.port, decision.weight()), Instant::now()) {
            line(decision, suppressed);
        }
    }

    /// The number of lines that were left out before this one; None if this one is to be left out too.
    fn take(&mut self, whose: (PortId, Weight), now: Instant) -> Option<u64> {
        if self.0.len() >= BUCKETS && !self.0.contains_key(&whose) {
            self.0.clear();
        }
        let fresh = || Bucket { tokens: BURST, refilled: now, suppressed: 0 };
        let bucket = self.0.entry(whose).or_insert_with(fresh);
        let periods = now.saturating_duration_since(bucket.refilled).as_secs() / PERIOD.as_secs().max(1);
        if periods > 0 {
            let earned = u32::try_from(periods).unwrap_or(u32::MAX);
            bucket.tokens = bucket.tokens.saturating_add(earned).min(BURST);
            bucket.refilled = now;
        }
        if bucket.tokens == 0 {
            bucket.suppressed = bucket.suppressed.saturating_add(1);
            return None;
        }
        bucket.tokens -= 1;
        Some(std::mem::take(&mut bucket.suppressed))
    }
}

fn line(decision: &Decision, suppressed: u64) {
    let or_none = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".to_owned());
    let vf = decision.vf.as_ref().map_or_else(|| "-".to_owned(), ToString::to_string);
    let reason = decision.reason.map_or("-", netpolicy::Reason::name);
    let (setting, source) = decision
        .decided_by
        .map_or_else(|| ("-", "-".to_owned()), |by| (by.setting.name(), by.source.to_string()));
    macro_rules! say {
        ($level:expr, $what:literal) => {
            tracing::event!(
                $level,
                vm = %decision.vm.name,
                adapter = decision.adapter,
                port = %decision.port,
                vf,
                request = decision.request,
                requested = or_none(&decision.requested),
                old = or_none(&decision.old),
                effective = %decision.effective_mac,
                reason,
                setting,
                source,
                count = decision.count,
                detail = or_none(&decision.detail),
                edited_by = or_none(&decision.edited_by),
                suppressed,
                $what
            )
        };
    }
    use tracing::Level;
    match (decision.outcome, decision.committed) {
        (Outcome::Denied, _) => say!(Level::WARN, "Refused"),
        (Outcome::TakenBack, Committed::Failed) => say!(Level::ERROR, "Could not be taken back"),
        (Outcome::TakenBack, _) => say!(Level::WARN, "Taken back"),
        (Outcome::Repaired, Committed::Failed) => say!(Level::ERROR, "Foreign change could not be repaired"),
        (Outcome::Repaired, _) => say!(Level::WARN, "Foreign change repaired"),
        (Outcome::Reverted, Committed::Failed) => say!(Level::ERROR, "Late change could not be reverted"),
        (Outcome::Reverted, _) => say!(Level::WARN, "Late change reverted"),
        (Outcome::Allowed, Committed::Nothing) => say!(Level::DEBUG, "Allowed, nothing to change"),
        (Outcome::Allowed, _) => say!(Level::INFO, "Allowed"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_has_its_share_of_lines_and_the_rest_is_counted() {
        let (mut lines, start) = (Lines::default(), Instant::now());
        let [noisy, quiet] = [1, 2].map(|port| (PortId(uuid::Uuid::from_u128(port)), Weight::Light));
        let said = (0..1000).filter(|_| lines.take(noisy, start).is_some()).count();
        assert_eq!(said, BURST as usize);
        assert_eq!(lines.take(quiet, start), Some(0));
        assert_eq!(lines.take((noisy.0, Weight::GuestChange), start), Some(0), "what has changed is said");
        let later = start + PERIOD * 2;
        assert_eq!(lines.take(noisy, later), Some(980));
        assert_eq!(lines.take(noisy, later), Some(0));
        assert_eq!(lines.take(noisy, later), None);
    }
}
