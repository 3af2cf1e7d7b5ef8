// SPDX-License-Identifier: Apache-2.0

//! Counters of a relay.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use serde::{Deserialize, Serialize};

use super::disposition::Disposition;
use crate::channel::mailbox::registers::RegisterCounts;

/// Upper bounds of the round trips' buckets in microseconds; the last bucket has none.
pub const BUCKETS_US: [u64; 11] =
    [50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 50_000, 200_000, 1_000_000];

/// Counters of one relay since its start.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RelayStats {
    /// Messages by `opcode:outcome`, for instance `set_mac:refused`.
    pub messages: BTreeMap<String, u64>,
    /// Times from REQ to the response, for all messages that got one.
    pub round_trips: RoundTrips,
    /// REQs dropped because a message was in flight.
    pub dropped_requests: u64,
    /// Buffer writes dropped because a message was in flight.
    pub dropped_writes: u64,
    /// Ignored accesses: not aligned, or not 32 bit wide.
    pub bad_width: u64,
    /// Accesses to registers that are not emulated.
    pub unknown_registers: u64,
    /// VF resets by the guest (VTCTRL.RST).
    pub resets: u64,
    /// Log lines that were suppressed.
    pub suppressed_log_lines: u64,
    /// Accesses that reached the hardware without the relay, for families whose mailbox page is
    /// [shared](crate::channel::mailbox::layout::Layout::is_shared). Left out for the others: agents of earlier versions
    /// do not know this member, nor those families.
    #[serde(default, skip_serializing_if = "PassedAccesses::is_none")]
    pub passed: PassedAccesses,
}

/// Accesses to passed registers of the mailbox page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PassedAccesses {
    /// Reads.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
}

impl PassedAccesses {
    fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

/// The counters of passed accesses. vCPU threads increase them without a lock.
#[derive(Debug, Default)]
pub(crate) struct PassedCounters {
    pub(crate) reads: AtomicU64,
    pub(crate) writes: AtomicU64,
}

impl PassedCounters {
    pub(crate) fn snapshot(&self) -> PassedAccesses {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        PassedAccesses { reads: read(&self.reads), writes: read(&self.writes) }
    }
}

/// A histogram of times.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RoundTrips {
    /// Number of times added.
    pub count: u64,
    /// Sum in microseconds.
    pub sum_us: u64,
    /// Maximum in microseconds.
    pub max_us: u64,
    /// Numbers by bucket (not cumulative): see [`BUCKETS_US`], and one more bucket above them.
    pub buckets: [u64; BUCKETS_US.len() + 1],
}

impl RoundTrips {
    pub(crate) fn add(&mut self, time: Duration) {
        let us = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.count = self.count.saturating_add(1);
        self.sum_us = self.sum_us.saturating_add(us);
        self.max_us = self.max_us.max(us);
        let bucket = BUCKETS_US.partition_point(|&bound| bound < us);
        if let Some(count) = self.buckets.get_mut(bucket) {
            *count = count.saturating_add(1);
        }
    }
}

/// The counters behind the lock. Their names are a closed set.
#[derive(Debug, Default)]
pub(crate) struct Stats {
    messages: BTreeMap<(&'static str, Disposition), u64>,
    pub(crate) round_trips: RoundTrips,
    pub(crate) resets: u64,
    pub(crate) suppressed: u64,
}

impl Stats {
    pub(crate) fn message(&mut self, opcode: &'static str, end: Disposition) {
        let count = self.messages.entry((opcode, end)).or_default();
        *count = count.saturating_add(1);
    }

    pub(crate) fn snapshot(&self, registers: RegisterCounts, passed: PassedAccesses) -> RelayStats {
        let name = |(opcode, end): &(&str, Disposition)| format!("{opcode}:{}", end.label());
        RelayStats {
            messages: self.messages.iter().map(|(key, count)| (name(key), *count)).collect(),
            round_trips: self.round_trips.clone(),
            dropped_requests: registers.dropped_requests,
            dropped_writes: registers.dropped_writes,
            bad_width: registers.bad_width,
            unknown_registers: registers.unknown,
            resets: self.resets,
            suppressed_log_lines: self.suppressed,
            passed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_fall_into_their_buckets() {
        let mut times = RoundTrips::default();
        for us in [0, 50, 51, 1_000_000, 1_000_001] {
            times.add(Duration::from_micros(us));
        }
        assert_eq!((times.count, times.sum_us, times.max_us), (5, 2_000_102, 1_000_001));
        assert_eq!((times.buckets[0], times.buckets[1], times.buckets[10], times.buckets[11]), (2, 1, 1, 1));
    }
}
