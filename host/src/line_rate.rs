// SPDX-License-Identifier: Apache-2.0

//! Shares of the log for causes that repeat.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{LazyLock, Mutex, PoisonError},
    time::{Duration, Instant},
};

use netpolicy::PortId;
use passthrough::relay::{Rate, TokenBucket};

/// The lines that jobs write about one port: so many at once, then one in a second.
const OF_PORT: Rate = Rate { burst: 20, period: Duration::from_secs(1) };

/// Ports that are remembered.
const PORTS: usize = 4096;

/// Writes a line about a job of a port, or counts it for the port's next line. A guest repeats most jobs at its pleasure, and its
/// vmm can make them fail. `say` gets the number of suppressed lines.
pub(crate) fn say_of_port(port: PortId, say: impl FnOnce(u64)) {
    static LINES: LazyLock<(Instant, Mutex<LineRate<PortId>>)> =
        LazyLock::new(|| (Instant::now(), Mutex::new(LineRate::new(OF_PORT, PORTS))));
    let (began, lines) = &*LINES;
    let taken = lines.lock().unwrap_or_else(PoisonError::into_inner).take(port, began.elapsed());
    if let Some(suppressed) = taken {
        say(suppressed);
    }
}

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
