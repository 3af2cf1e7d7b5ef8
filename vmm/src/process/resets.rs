// SPDX-License-Identifier: Apache-2.0

//! The rate of a guest's resets.
//!
//! A reset costs the host: it resets devices and memory, and the agent stores it. A kernel that crashes at its
//! first instruction would cause 1500 resets in a second. So resets have a rate, and the vmm gives up a guest that
//! never gets beyond its start.

use std::time::{Duration, Instant};

use passthrough::relay::{Rate, TokenBucket};

/// A guest may reset itself eight times in a row, as installers do, and then twice in a second.
const RATE: Rate = Rate { burst: 8, period: Duration::from_millis(500) };

/// A shorter boot counts as failed.
const SHORTEST_BOOT: Duration = Duration::from_secs(1);

/// The most failed boots in a row: half a minute at the above rate.
const MAX_FAILED_BOOTS: u32 = 64;

/// The decision about a guest's reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reset {
    /// Make it at this time, which may be now.
    At(Instant),
    /// This many boots in a row have failed: end the machine.
    GivenUp(u32),
}

/// The resets of one machine.
#[derive(Debug)]
pub(super) struct Resets {
    began: Instant,
    bucket: TokenBucket,
    booted: Instant,
    failed_boots: u32,
}

impl Resets {
    pub(super) fn new(now: Instant) -> Self {
        Self { began: now, bucket: TokenBucket::new(RATE), booted: now, failed_boots: 0 }
    }

    /// The machine has begun to boot.
    pub(super) fn booted(&mut self, now: Instant) {
        self.booted = now;
    }

    /// The guest requests a reset.
    pub(super) fn request(&mut self, now: Instant) -> Reset {
        let failed = now.saturating_duration_since(self.booted) < SHORTEST_BOOT;
        self.failed_boots = if failed { self.failed_boots.saturating_add(1) } else { 0 };
        if self.failed_boots >= MAX_FAILED_BOOTS {
            return Reset::GivenUp(self.failed_boots);
        }
        let at = self.bucket.ready_at(now.saturating_duration_since(self.began));
        self.bucket.take(at);
        Reset::At(self.began.checked_add(at).unwrap_or(now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_are_made_at_once_and_others_at_their_rate() {
        let begin = Instant::now();
        let mut resets = Resets::new(begin);
        let mut now = begin;
        let mut delays = Vec::new();
        for _ in 0..12 {
            let Reset::At(at) = resets.request(now) else { panic!("given up") };
            delays.push(at.saturating_duration_since(now));
            now = at;
            resets.booted(now);
        }
        assert_eq!(delays[..8], [Duration::ZERO; 8]);
        assert_eq!(delays[8..], [RATE.period; 4]);
    }

    #[test]
    fn a_guest_that_never_gets_beyond_its_start_is_given_up() {
        let mut now = Instant::now();
        let mut resets = Resets::new(now);
        let mut made = 0;
        let last = loop {
            match resets.request(now) {
                Reset::At(at) => (now, made) = (at, made + 1),
                Reset::GivenUp(count) => break count,
            }
            resets.booted(now);
        };
        assert_eq!((made, last), (MAX_FAILED_BOOTS - 1, MAX_FAILED_BOOTS));

        // A guest that runs for a while in between may go on for ever.
        let mut resets = Resets::new(now);
        for n in 0..10 * MAX_FAILED_BOOTS {
            now += if n % 10 == 0 { SHORTEST_BOOT } else { Duration::ZERO };
            let Reset::At(at) = resets.request(now) else { panic!("given up at {n}") };
            now = at;
            resets.booted(now);
        }
    }
}
