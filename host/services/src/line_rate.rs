// SPDX-License-Identifier: Apache-2.0

//! Shares of the log for causes that repeat.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use netpolicy::PortId;
use passthrough::relay::{Rate, TokenBucket};

/// The lines about one port: 20 at once, then one per second.
const OF_PORT: Rate = Rate { burst: 20, period: Duration::from_secs(1) };

/// The most ports with a share of their own.
const PORTS: usize = 4096;

/// The log's share of each port, for the switch's task and for the jobs beside it. A guest repeats most jobs at its pleasure, and
/// its vmm can make them fail.
#[derive(Clone, Debug)]
pub struct PortLog {
    began: Instant,
    lines: Arc<Mutex<LineRate<PortId>>>,
}

impl Default for PortLog {
    fn default() -> Self {
        Self { began: Instant::now(), lines: Arc::new(Mutex::new(LineRate::new(OF_PORT, PORTS))) }
    }
}

impl PortLog {
    /// Calls `write` with the number of suppressed lines, or counts this line for the port's next one.
    pub fn line(&self, port: PortId, write: impl FnOnce(u64)) {
        let taken =
            self.lines.lock().unwrap_or_else(PoisonError::into_inner).take(port, self.began.elapsed());
        if let Some(suppressed) = taken {
            write(suppressed);
        }
    }
}

/// A bucket of lines for each key. A line that its bucket suppresses is counted for the next one of the key.
#[derive(Debug)]
pub struct LineRate<K> {
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
    /// Buckets of this rate, for at most this many keys.
    #[must_use]
    pub fn new(rate: Rate, keys: usize) -> Self {
        Self { rate, keys, shares: HashMap::new() }
    }

    /// The keys in memory.
    #[cfg(any(test, feature = "test-support"))]
    #[must_use]
    pub fn keys(&self) -> usize {
        self.shares.len()
    }

    /// The number of suppressed lines before this one; None if this line is suppressed too.
    pub fn take(&mut self, key: K, now: Duration) -> Option<u64> {
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
