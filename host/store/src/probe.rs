// SPDX-License-Identifier: Apache-2.0

//! Finds out by a write whether the store can be written: a database on a full disk can still be
//! read.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use text::chain;
use tokio::sync::Mutex;
use uuid::Uuid;

use super::{Expect, Record, Stores, Table};

/// The time for which a result is reused. A durable write for each health request would cost too
/// much.
pub const GOOD_FOR: Duration = Duration::from_secs(10);

/// The record of the probe: the number of the attempt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct ProbeRecord {
    tries: u64,
}

impl Record for ProbeRecord {
    const KIND: &'static str = "probe";
}

/// Writes one record again and again.
pub struct WriteProbe {
    table: Table<ProbeRecord>,
    good_for: Duration,
    last: Mutex<Last>,
}

#[derive(Default)]
struct Last {
    at: Option<Instant>,
    tries: u64,
    complaint: Option<String>,
}

impl WriteProbe {
    /// A probe with results that are valid for `good_for`.
    #[must_use]
    pub fn new(stores: &Stores, good_for: Duration) -> Self {
        Self { table: Table::new(stores), good_for, last: Mutex::default() }
    }

    /// Why the store cannot be written; None if it can.
    pub async fn complaint(&self) -> Option<String> {
        let mut last = self.last.lock().await;
        if last.at.is_none_or(|at| at.elapsed() >= self.good_for) {
            last.tries = last.tries.saturating_add(1);
            let record = ProbeRecord { tries: last.tries };
            let put = self.table.put(Uuid::nil(), "probe", &record, Expect::Any).await;
            last.complaint = put.err().map(|error| format!("Cannot write the database: {}", chain(&error)));
            last.at = Some(Instant::now());
        }
        last.complaint.clone()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::SqliteStore;

    #[tokio::test]
    async fn a_store_that_can_only_be_read_is_complained_about_until_it_can_be_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("test.db");
        let stores = Stores::on_one_host(Arc::new(SqliteStore::open(&path).unwrap()));
        let (probe, lazy) = (WriteProbe::new(&stores, Duration::ZERO), WriteProbe::new(&stores, GOOD_FOR));
        assert_eq!((probe.complaint().await, lazy.complaint().await), (None, None));
        let other = rusqlite::Connection::open(&path).unwrap();
        let full =
            "CREATE TRIGGER full BEFORE INSERT ON changes BEGIN SELECT RAISE(ABORT, 'disk is full'); END";
        other.execute_batch(full).unwrap();
        let complaint = probe.complaint().await.unwrap();
        assert!(complaint.contains("disk is full"), "{complaint}");
        assert_eq!(lazy.complaint().await, None, "not every question is a write");
        other.execute_batch("DROP TRIGGER full").unwrap();
        assert_eq!(probe.complaint().await, None);
    }
}
