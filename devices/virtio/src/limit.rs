// SPDX-License-Identifier: Apache-2.0

//! Limits on the rate of a device's work: token buckets, refilled by elapsed time.
//!
//! Times are durations since any fixed moment. The caller has the clock.

use std::time::Duration;

/// An allowed rate: `burst` at once, then `per_second`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Tokens per second. 0 counts as 1.
    pub per_second: u64,
    /// Tokens in a full bucket.
    pub burst: u64,
}

/// A token bucket.
#[derive(Clone, Debug)]
struct Bucket {
    rate: Rate,
    /// The time at which the bucket is full again. A time in the past means that it is full.
    full_at: Duration,
}

impl Bucket {
    /// Returns a full bucket.
    fn new(rate: Rate) -> Self {
        Self { rate, full_at: Duration::ZERO }
    }

    /// The time in which the bucket gains `amount`, rounded up to nanoseconds.
    fn time_of(&self, amount: u64) -> Duration {
        let second = Duration::from_secs(1).as_nanos();
        let nanoseconds = (u128::from(amount) * second).div_ceil(self.rate.per_second.max(1).into());
        Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX))
    }

    /// The time at which `amount` may be taken: `now` or later. More than a full bucket may be taken
    /// from a full one, which is then in debt: such a request would wait for ever otherwise.
    fn ready_at(&self, now: Duration, amount: u64) -> Duration {
        let may_miss = self.time_of(self.rate.burst.saturating_sub(amount));
        self.full_at.saturating_sub(may_miss).max(now)
    }

    /// Takes `amount`, also if there is less.
    fn take(&mut self, now: Duration, amount: u64) {
        self.full_at = self.full_at.max(now).saturating_add(self.time_of(amount));
    }
}

/// The limits of a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Of bytes that move.
    pub bytes: Option<Rate>,
    /// Of operations.
    pub operations: Option<Rate>,
}

/// The cost of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cost {
    /// Bytes that move.
    pub bytes: u64,
    /// Operations.
    pub operations: u64,
}

/// The buckets of a device.
#[derive(Clone, Debug, Default)]
pub struct Limiter {
    limits: Limits,
    bytes: Option<Bucket>,
    operations: Option<Bucket>,
}

impl Limiter {
    /// Replaces the limits. The buckets of new ones are full; equal limits keep theirs.
    pub fn set(&mut self, limits: Limits) {
        if limits != self.limits {
            let (bytes, operations) = (limits.bytes.map(Bucket::new), limits.operations.map(Bucket::new));
            *self = Self { limits, bytes, operations };
        }
    }

    /// Whether there is no limit.
    #[must_use]
    pub fn is_unlimited(&self) -> bool {
        self.limits == Limits::default()
    }

    fn both(&mut self, cost: Cost) -> impl Iterator<Item = (&mut Bucket, u64)> {
        let bytes = self.bytes.as_mut().map(|bucket| (bucket, cost.bytes));
        let operations = self.operations.as_mut().map(|bucket| (bucket, cost.operations));
        bytes.into_iter().chain(operations)
    }

    /// Charges a request that may begin now. Else charges nothing, and returns the time to wait.
    ///
    /// # Errors
    /// The time after which the request may begin, if no other one is charged meanwhile.
    pub fn charge(&mut self, now: Duration, cost: Cost) -> Result<(), Duration> {
        let ready = self.both(cost).map(|(bucket, amount)| bucket.ready_at(now, amount)).max();
        match ready.map(|ready| ready.saturating_sub(now)) {
            Some(wait) if !wait.is_zero() => Err(wait),
            _ => {
                self.owe(now, cost);
                Ok(())
            }
        }
    }

    /// Charges work that is already under way: later requests wait for it.
    pub fn owe(&mut self, now: Duration, cost: Cost) {
        self.both(cost).for_each(|(bucket, amount)| bucket.take(now, amount));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn limiter(bytes: Option<(u64, u64)>, operations: Option<(u64, u64)>) -> Limiter {
        let rate = |(per_second, burst)| Rate { per_second, burst };
        let mut limiter = Limiter::default();
        limiter.set(Limits { bytes: bytes.map(rate), operations: operations.map(rate) });
        limiter
    }

    fn of(bytes: u64) -> Cost {
        Cost { bytes, operations: 1 }
    }

    const fn ms(count: u64) -> Duration {
        Duration::from_millis(count)
    }

    #[test]
    fn a_burst_and_then_the_rate() {
        let mut limiter = limiter(Some((1000, 500)), None);
        let begun = ms(7000);
        assert_eq!(limiter.charge(begun, of(300)), Ok(()));
        assert_eq!(limiter.charge(begun, of(200)), Ok(()));
        assert_eq!(limiter.charge(begun, of(50)), Err(ms(50)));
        assert_eq!(limiter.charge(begun + ms(49), of(50)), Err(ms(1)));
        assert_eq!(limiter.charge(begun + ms(50), of(50)), Ok(()));
        assert_eq!(limiter.charge(begun + ms(60_000), of(500)), Ok(()), "no more than the burst is saved");
        assert_eq!(limiter.charge(begun + ms(60_000), of(1)), Err(ms(1)));
        assert_eq!(limiter.charge(begun + ms(60_000), of(0)), Ok(()), "a request without data");
    }

    #[test]
    fn a_request_beyond_the_burst_waits_for_a_full_bucket_and_leaves_a_debt() {
        let mut limiter = limiter(Some((1000, 100)), None);
        assert_eq!(limiter.charge(ms(0), of(10)), Ok(()));
        assert_eq!(limiter.charge(ms(0), of(5000)), Err(ms(10)));
        assert_eq!(limiter.charge(ms(10), of(5000)), Ok(()));
        assert_eq!(limiter.charge(ms(10), of(1)), Err(ms(4901)));
    }

    #[test]
    fn the_slower_limit_counts_and_a_refused_request_costs_nothing() {
        let mut limiter = limiter(Some((1000, 1000)), Some((10, 1)));
        assert_eq!(limiter.charge(ms(0), of(900)), Ok(()));
        for _ in 0..5 {
            assert_eq!(limiter.charge(ms(0), of(100)), Err(ms(100)), "one operation in 100 ms");
        }
        assert_eq!(limiter.charge(ms(100), of(300)), Err(ms(100)), "of 300 bytes 200 are there");
        assert_eq!(limiter.charge(ms(100), of(200)), Ok(()));
    }

    #[test]
    fn work_under_way_is_charged_without_a_wait() {
        let mut limiter = limiter(Some((1000, 10)), None);
        limiter.owe(ms(0), Cost { bytes: 510, operations: 0 });
        assert_eq!(limiter.charge(ms(0), of(10)), Err(ms(510)));
    }

    #[test]
    fn new_limits_hold_at_once_and_equal_ones_keep_their_debts() {
        let mut limiter = limiter(None, Some((1, 1)));
        limiter.charge(ms(0), of(0)).unwrap();
        limiter.set(Limits { operations: Some(Rate { per_second: 1, burst: 1 }), bytes: None });
        assert_eq!(limiter.charge(ms(0), of(0)), Err(ms(1000)));
        limiter.set(Limits::default());
        assert!(limiter.is_unlimited());
        assert_eq!(limiter.charge(ms(0), of(u64::MAX)), Ok(()));
    }

    proptest! {
        /// Nothing overflows, and in no time more passes than burst, rate and one large request.
        #[test]
        fn no_sequence_exceeds_the_rate(
            per_second in 1_u64..1 << 40,
            burst in 1_u64..1 << 40,
            requests in prop::collection::vec((0_u64..1 << 30, 0_u64..1 << 34), 1..100),
        ) {
            let mut limiter = limiter(Some((per_second, burst)), None);
            let (mut now, mut passed, mut largest) = (Duration::from_secs(5), 0_u128, 0);
            let begun = now;
            for (pause, bytes) in requests {
                now += Duration::from_nanos(pause);
                if let Err(wait) = limiter.charge(now, of(bytes)) {
                    now += wait;
                    prop_assert_eq!(limiter.charge(now, of(bytes)), Ok(()), "the wait suffices");
                }
                largest = largest.max(bytes);
                passed += u128::from(bytes);
                let allowed = (now - begun).as_nanos() * u128::from(per_second) / 1_000_000_000;
                prop_assert!(passed <= u128::from(burst) + allowed + u128::from(largest) + 1);
            }
        }

        #[test]
        fn no_number_breaks_it(numbers in prop::array::uniform5(any::<u64>())) {
            let [per_second, burst, now, bytes, operations] = numbers;
            let mut limiter = limiter(Some((per_second, burst)), Some((burst, per_second)));
            for _ in 0..3 {
                let _ = limiter.charge(Duration::from_nanos(now), Cost { bytes, operations });
            }
        }
    }
}
