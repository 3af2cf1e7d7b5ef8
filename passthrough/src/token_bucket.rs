// SPDX-License-Identifier: Apache-2.0

//! Token buckets, which bound the work that a guest can cause per second.

use std::time::Duration;

/// An allowed rate: `burst` at once, then one for each `period`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Tokens in a full bucket.
    pub burst: u32,
    /// Time until a taken token is replaced.
    pub period: Duration,
}

/// A token bucket. The caller supplies the time.
#[derive(Clone, Debug)]
pub struct TokenBucket {
    rate: Rate,
    /// The time at which the bucket is full again. A time in the past means that it is full.
    full_at: Duration,
}

impl TokenBucket {
    /// Returns a full bucket.
    #[must_use]
    pub fn new(rate: Rate) -> Self {
        Self { rate, full_at: Duration::ZERO }
    }

    /// The time at which the next token is available: `now` or later.
    #[must_use]
    pub fn ready_at(&self, now: Duration) -> Duration {
        // A token is available while at most burst - 1 are missing.
        let missing = self.rate.period.saturating_mul(self.rate.burst.saturating_sub(1));
        self.full_at.saturating_sub(missing).max(now)
    }

    /// The number of tokens available `now`.
    #[must_use]
    pub fn tokens(&self, now: Duration) -> u32 {
        let missing =
            self.full_at.saturating_sub(now).as_nanos().div_ceil(self.rate.period.as_nanos().max(1));
        self.rate.burst.saturating_sub(u32::try_from(missing).unwrap_or(u32::MAX))
    }

    /// Takes a token. Returns false if there is none.
    pub fn take(&mut self, now: Duration) -> bool {
        if self.ready_at(now) > now {
            return false;
        }
        self.full_at = self.full_at.max(now).saturating_add(self.rate.period);
        true
    }

    /// Takes this number of tokens. Returns false, and takes none, if there are fewer.
    pub fn take_many(&mut self, now: Duration, count: u32) -> bool {
        if self.tokens(now) < count {
            return false;
        }
        self.full_at = self.full_at.max(now).saturating_add(self.rate.period.saturating_mul(count));
        true
    }

    /// Puts a token back, unless the bucket is full.
    pub fn put_back(&mut self) {
        self.full_at = self.full_at.saturating_sub(self.rate.period);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bucket() -> TokenBucket {
        TokenBucket::new(Rate { burst: 3, period: Duration::from_millis(100) })
    }

    fn taken(bucket: &mut TokenBucket, at_ms: u64, tries: usize) -> usize {
        (0..tries).filter(|_| bucket.take(Duration::from_millis(at_ms))).count()
    }

    #[test]
    fn a_burst_then_the_rate() {
        let mut bucket = bucket();
        let tokens = |bucket: &TokenBucket, at_ms| bucket.tokens(Duration::from_millis(at_ms));
        assert_eq!(tokens(&bucket, 1000), 3);
        assert_eq!(taken(&mut bucket, 1000, 10), 3);
        assert_eq!([1000, 1099, 1100, 1299, 1300, 9000].map(|at| tokens(&bucket, at)), [0, 0, 1, 2, 3, 3]);
        assert_eq!(bucket.ready_at(Duration::from_millis(1000)), Duration::from_millis(1100));
        assert_eq!(taken(&mut bucket, 1099, 10), 0);
        assert_eq!(taken(&mut bucket, 1100, 10), 1);
        assert_eq!(taken(&mut bucket, 1350, 10), 2);
        assert_eq!(taken(&mut bucket, 9000, 10), 3, "no more than the burst is saved up");

        let at = Duration::from_millis;
        assert!(bucket.take_many(at(9200), 2) && !bucket.take_many(at(9200), 1));
        assert!(!bucket.take_many(at(20_000), 4) && bucket.take_many(at(20_000), 3));
        assert_eq!(tokens(&bucket, 20_100), 1);
    }
}
