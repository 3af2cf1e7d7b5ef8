// SPDX-License-Identifier: Apache-2.0

//! The bound of a VF's sending rate.

use std::time::Duration;

/// The largest burst after a pause, in bits: some frames of the greatest length.
const BURST: u64 = 8 * 64 * 1024;

/// Tokens of one bit each.
#[derive(Clone, Debug)]
pub(super) struct TxRateLimit {
    tokens: u64,
    filled: Duration,
}

impl Default for TxRateLimit {
    fn default() -> Self {
        Self { tokens: BURST, filled: Duration::ZERO }
    }
}

impl TxRateLimit {
    /// Whether a frame of `bytes` fits into `rate` Mbit/s (0 for no bound).
    pub(super) fn take(&mut self, rate: u32, bytes: usize, now: Duration) -> bool {
        if rate == 0 {
            return true;
        }
        let elapsed = now.saturating_sub(self.filled);
        // Mbit/s is bits per microsecond.
        let micros = u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX);
        if micros > 0 {
            self.tokens = self.tokens.saturating_add(micros.saturating_mul(rate.into())).min(BURST);
            self.filled = now;
        }
        let bits = u64::try_from(bytes).unwrap_or(u64::MAX).saturating_mul(8);
        match self.tokens.checked_sub(bits) {
            Some(left) => self.tokens = left,
            None => return false,
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_holds_what_the_rate_says_and_one_burst() {
        let mut bucket = TxRateLimit::default();
        let mut passed = 0;
        for micros in 0..1_000_000 {
            passed += u64::from(bucket.take(10, 1250, Duration::from_micros(micros)));
        }
        // 10 Mbit in frames of 10 kbit.
        let expected = 1000 + BURST / 10_000;
        assert!((expected - 1..=expected + 1).contains(&passed), "{passed}");
        assert!(bucket.take(0, usize::MAX, Duration::ZERO));
    }
}
