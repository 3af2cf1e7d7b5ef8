// SPDX-License-Identifier: Apache-2.0

//! One log line for each decision, limited for each port and weight.

use std::time::{Duration, Instant};

use netpolicy::{Committed, Decision, Outcome, PortId, Weight};
use passthrough::relay::Rate;

use crate::line_rate::LineRate;

/// The lines that a port may cause for each weight: a burst, then one each second.
const RATE: Rate = Rate { burst: 20, period: Duration::from_secs(1) };

/// Rates that are remembered: three weights of 4096 ports.
const SHARES: usize = 3 * 4096;

/// The line rates of each port and weight. Repeated denials therefore suppress no line about a
/// change.
#[derive(Debug)]
pub(super) struct Lines {
    began: Instant,
    rate: LineRate<(PortId, Weight)>,
}

impl Default for Lines {
    fn default() -> Self {
        Self { began: Instant::now(), rate: LineRate::new(RATE, SHARES) }
    }
}

impl Lines {
    /// Writes the line, or counts it as suppressed for the next line.
    pub(super) fn say(&mut self, decision: &Decision) {
        if let Some(suppressed) = self.rate.take((decision.port, decision.weight()), self.began.elapsed()) {
            line(decision, suppressed);
        }
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
        (Outcome::Denied, _) => say!(Level::WARN, "Denied"),
        (Outcome::Revoked, Committed::Failed) => say!(Level::ERROR, "Not revoked"),
        (Outcome::Revoked, _) => say!(Level::WARN, "Revoked"),
        (Outcome::Repaired, Committed::Failed) => say!(Level::ERROR, "Drift not corrected"),
        (Outcome::Repaired, _) => say!(Level::WARN, "Drift corrected"),
        (Outcome::Reverted, Committed::Failed) => say!(Level::ERROR, "Late change not rolled back"),
        (Outcome::Reverted, _) => say!(Level::WARN, "Late change rolled back"),
        (Outcome::Allowed, Committed::Nothing) => say!(Level::DEBUG, "Allowed, nothing to change"),
        (Outcome::Allowed, _) => say!(Level::INFO, "Allowed"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_has_its_share_of_lines_and_the_rest_is_counted() {
        let (mut lines, start) = (Lines::default().rate, Duration::from_secs(100));
        let [noisy, quiet] = [1, 2].map(|port| (PortId(uuid::Uuid::from_u128(port)), Weight::Light));
        let said = (0..1000).filter(|_| lines.take(noisy, start).is_some()).count();
        assert_eq!(said, RATE.burst as usize);
        assert_eq!(lines.take(quiet, start), Some(0));
        assert_eq!(lines.take((noisy.0, Weight::GuestChange), start), Some(0), "what has changed is said");
        let later = start + RATE.period * 2;
        assert_eq!(lines.take(noisy, later), Some(980));
        assert_eq!(lines.take(noisy, later), Some(0));
        assert_eq!(lines.take(noisy, later), None);
    }
}
