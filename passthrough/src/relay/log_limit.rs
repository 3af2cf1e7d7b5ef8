// SPDX-License-Identifier: Apache-2.0

//! A bound for the log lines that a guest can cause.

use std::time::Duration;

use crate::token_bucket::{Rate, TokenBucket};

/// Admits a bounded number of log lines and counts the others.
#[derive(Debug)]
pub(crate) struct LogLimit {
    bucket: TokenBucket,
    suppressed: u64,
}

impl LogLimit {
    pub(crate) fn new(rate: Rate) -> Self {
        Self { bucket: TokenBucket::new(rate), suppressed: 0 }
    }

    /// Returns `Some` if a line may be written now, with the number of lines suppressed since the
    /// last one.
    pub(crate) fn allow(&mut self, now: Duration) -> Option<u64> {
        if self.bucket.take(now) {
            Some(std::mem::take(&mut self.suppressed))
        } else {
            self.suppressed = self.suppressed.saturating_add(1);
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_suppressed_is_told_later() {
        let mut limit = LogLimit::new(Rate { burst: 2, period: Duration::from_secs(1) });
        let at = Duration::from_secs;
        let lines: Vec<_> = [0, 0, 0, 0, 0, 5].into_iter().map(|second| limit.allow(at(second))).collect();
        assert_eq!(lines, [Some(0), Some(0), None, None, None, Some(3)]);
    }
}
