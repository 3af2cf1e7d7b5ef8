// SPDX-License-Identifier: Apache-2.0

//! Shares of the log for causes that repeat.

use std::{collections::HashMap, hash::Hash, time::Duration};

use passthrough::relay::{Rate, TokenBucket};

/// A bucket of lines for each key. A line that its bucket suppresses is counted for the next one of the key.
#[derive(Debug)]
pub(crate) struct LineRate<K> {
    rate: Rate,
    /// The most keys at once. One more, and all shares begin anew.
    keys: usize,
    shares: HashMap<K, Share>,
}

#[derive(Debug)]
struct Share {
    bucket: TokenBucket,
    suppressed: u64,
}

impl<K: Copy + Eq + Hash> LineRate<K> {
    pub(crate) fn new(rate: Rate, keys: usize) -> Self {
        Self { rate, keys, shares: HashMap::new() }
    }

    /// The keys in memory.
    #[cfg(test)]
    pub(crate) fn keys(&self) -> usize {
        self.shares.len()
    }

    /// The number of suppressed lines before this one; None if this line is suppressed too.
    pub(crate) fn take(&mut self, key: K, now: Duration) -> Option<u64> {
        if self.shares.len() >= self.keys && !self.shares.contains_key(&key) {
            self.shares.clear();
        }
        let fresh = || Share { bucket: TokenBucket::new(self.rate), suppressed: 0 };
        let share = self.shares.entry(key).or_insert_with(fresh);
        if !share.bucket.take(now) {
            share.suppressed = share.suppressed.saturating_add(1);
            return None;
        }
        Some(std::mem::take(&mut share.suppressed))
    }
}
