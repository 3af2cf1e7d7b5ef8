// SPDX-License-Identifier: Apache-2.0

//! The records in the database.

use std::{
    collections::{HashMap, VecDeque},
    path::Path,
    time::Duration,
};

use api::types::{Cursor, DecisionFilter, PortCounters, Timestamp};
use netpolicy::{Decision, PortId, VmId, Weight};
use rusqlite::{Connection, Transaction, params};
use store::StoreError;

/// The divisor for the share of one VM in all records, for each weight. One guest's noise therefore
/// displaces neither the records of other VMs nor those of changes on its own adapters.
const SHARE: u32 = 10;

/// The divisor for the records that a VM may add beyond its share until the share is enforced
/// again.
const SURPLUS: u32 = 100;

/// The latest records of a port in which an equal decision may still be counted.
const RECENT: usize = 16;

/// The most ports with remembered records, and the most VMs with counted new records.
const PORTS: usize = 4096;

/// The longest wait for the store's own writes to the same file.
const PATIENCE: Duration = Duration::from_secs(10);

/// The table, through a connection of its own.
pub(super) struct Decisions {
    connection: Connection,
    kept: u32,
    recent: HashMap<PortId, VecDeque<Decision>>,
    /// New records since the share of their VM was enforced.
    added: HashMap<(VmId, Weight), u32>,
    /// New records since the last count of all.
    added_in_all: u32,
}

impl Decisions {
    pub(super) fn open(path: &Path, kept: u32) -> Result<Self, StoreError> {
        let connection = Connection::open(path)?;
        connection.busy_timeout(PATIENCE)?;
        // A power cut may lose the last records, never damage the file: the agent relies only on
        // the store.
        connection.pragma_update(None, "synchronous", "NORMAL")?;
        Ok(Self { connection, kept, recent: HashMap::new(), added: HashMap::new(), added_in_all: kept })
    }

    /// Writes decisions, equal ones into one record, and returns the records as they are now. After
    /// an error nothing is written.
    pub(super) fn record(&mut self, decisions: &[Decision]) -> Result<Vec<Decision>, StoreError> {
        let result = self.try_record(decisions);
        if result.is_err() {
            // The remembered records are not in the table, and the next attempt would count them
            // twice.
            self.recent.clear();
        }
        result
    }

    fn try_record(&mut self, decisions: &[Decision]) -> Result<Vec<Decision>, StoreError> {
        let mut stored = Vec::with_capacity(decisions.len());
        let mut counts = HashMap::new();
        let share = (self.kept / SHARE).max(1);
        let surplus = share / SURPLUS;
        if self.added.len() >= PORTS {
            self.added.clear();
        }
        let transaction = self.connection.transaction()?;
        for decision in decisions {
            if self.recent.len() >= PORTS && !self.recent.contains_key(&decision.port) {
                self.recent.clear();
            }
            let recent = self.recent.entry(decision.port).or_default();
            let count = counts.entry((decision.port, name(&decision.outcome))).or_insert(0_u64);
            *count = count.saturating_add(decision.count);
            let (vm, weight) = (decision.vm.id, decision.weight());
            let (record, is_new) = write(&transaction, recent, decision.clone())?;
            stored.push(record);
            if is_new {
                // A VM that was not counted yet may already have a full share.
                let added = self.added.entry((vm, weight)).or_insert(surplus);
                *added = added.saturating_add(1);
                self.added_in_all = self.added_in_all.saturating_add(1);
            }
        }
        for ((port, outcome), count) in counts {
            transaction
                .prepare_cached(
                    "INSERT INTO decision_counts (port, outcome, count) VALUES (?1, ?2, ?3)
                     ON CONFLICT DO UPDATE SET count = count + excluded.count",
                )?
                .execute(params![port.to_string(), outcome, count])?;
        }
        for ((vm, weight), added) in &mut self.added {
            if *added <= surplus {
                continue;
            }
            *added = 0;
            transaction
                .prepare_cached(
                    "DELETE FROM decisions WHERE seq IN
                     (SELECT seq FROM decisions WHERE vm = ?1 AND weight = ?2
                      ORDER BY last_ms DESC, seq DESC LIMIT -1 OFFSET ?3)",
                )?
                .execute(params![vm.0.to_string(), number(*weight), share])?;
        }
        if self.added_in_all > surplus {
            self.added_in_all = 0;
            // Through the index of time, from the oldest on. Light records go first.
            for condition in ["weight = 0", "TRUE"] {
                let all: u32 =
                    transaction.query_row("SELECT count(*) FROM decisions", [], |row| row.get(0))?;
                let surplus = all.saturating_sub(self.kept);
                if surplus == 0 {
                    break;
                }
                let oldest = format!(
                    "DELETE FROM decisions WHERE seq IN
                     (SELECT seq FROM decisions WHERE {condition} ORDER BY last_ms, seq LIMIT ?1)"
                );
                transaction.prepare_cached(&oldest)?.execute([surplus])?;
            }
        }
        transaction.commit()?;
        Ok(stored)
    }

    /// The number of decisions of each port and outcome, including those without a record now.
    pub(super) fn counters(&self) -> Result<HashMap<PortId, PortCounters>, StoreError> {
        let mut query = self.connection.prepare("SELECT port, outcome, count FROM decision_counts")?;
        let mut rows = query.query([])?;
        let mut counters: HashMap<PortId, PortCounters> = HashMap::new();
        while let Some(row) = rows.next()? {
            let (port, outcome, count): (String, String, u64) = (row.get(0)?, row.get(1)?, row.get(2)?);
            let Ok(port) = port.parse() else { continue };
            let counters = counters.entry(PortId(port)).or_default();
            let counter = match outcome.as_str() {
                "allowed" => &mut counters.allowed,
                "denied" => &mut counters.denied,
                "repaired" => &mut counters.repaired,
                _ => &mut counters.taken_back,
            };
            *counter = counter.saturating_add(count);
        }
        Ok(counters)
    }

    /// Deletes the counts of a port. Its records stay.
    pub(super) fn forget(&self, port: PortId) -> Result<(), StoreError> {
        self.connection.execute("DELETE FROM decision_counts WHERE port = ?1", [port.to_string()])?;
        Ok(())
    }

    pub(super) fn query(&self, filter: &DecisionFilter) -> Result<Vec<Decision>, StoreError> {
        let verdict = filter.verdict.map(|verdict| name(&verdict));
        let since = filter.since.map(|since| since.unix_ms());
        let mut query = self.connection.prepare_cached(
            "SELECT value FROM decisions
             WHERE (?1 IS NULL OR vm = ?1 OR vm_name = ?1) AND (?2 IS NULL OR port = ?2)
               AND (?3 IS NULL OR outcome = ?3) AND (?4 IS NULL OR last_ms >= ?4)
               AND (?6 IS NULL OR last_ms < ?6
                    OR (last_ms = ?6 AND seq < (SELECT seq FROM decisions WHERE id = ?7)))
             ORDER BY last_ms DESC, seq DESC LIMIT ?5",
        )?;
        let port = filter.port.map(|port| port.to_string());
        let vm = filter.vm.as_ref().map(|vm| vm.to_lowercase());
        // A record that was counted again since then is on an earlier page. If the cursor's record
        // is deleted, all records of its time count as read.
        let (before, id) = filter.cursor.as_ref().and_then(Cursor::decision).unzip();
        let (before, id) = (before.map(Timestamp::unix_ms), id.map(|id| id.to_string()));
        let mut rows = query.query(params![vm, port, verdict, since, filter.limit, before, id])?;
        let mut found = Vec::new();
        while let Some(row) = rows.next()? {
            let value: String = row.get(0)?;
            match serde_json::from_str(&value) {
                Ok(decision) => found.push(decision),
                // One damaged record does not hide the others.
                Err(error) => tracing::error!("A stored decision cannot be read: {error}"),
            }
        }
        Ok(found)
    }
}

/// Writes a decision; returns its record and whether the record is new.
fn write(
    transaction: &Transaction<'_>,
    recent: &mut VecDeque<Decision>,
    mut decision: Decision,
) -> Result<(Decision, bool), StoreError> {
    for record in recent.iter_mut() {
        match record.absorb(decision) {
            Ok(()) => {
                let changed = transaction
                    .prepare_cached("UPDATE decisions SET last_ms = ?2, value = ?3 WHERE id = ?1")?
                    .execute(params![record.id.to_string(), record.last_ms, json(record)?])?;
                // The record may have been displaced meanwhile.
                if changed == 0 {
                    insert(transaction, record)?;
                }
                return Ok((record.clone(), changed == 0));
            }
            Err(other) => decision = other,
        }
    }
    insert(transaction, &decision)?;
    if recent.len() >= RECENT {
        recent.pop_front();
    }
    recent.push_back(decision.clone());
    Ok((decision, true))
}

fn insert(transaction: &Transaction<'_>, decision: &Decision) -> Result<(), StoreError> {
    transaction
        .prepare_cached(
            "INSERT OR REPLACE INTO decisions (id, vm, vm_name, port, outcome, last_ms, value, weight)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
        )?
        .execute(params![
            decision.id.to_string(),
            decision.vm.id.to_string(),
            decision.vm.name.as_str(),
            decision.port.to_string(),
            name(&decision.outcome),
            decision.last_ms,
            json(decision)?,
            number(decision.weight()),
        ])?;
    Ok(())
}

/// The weight as the table stores it. Only the order of the numbers matters.
fn number(weight: Weight) -> u8 {
    match weight {
        Weight::Light => 0,
        Weight::GuestChange => 1,
        Weight::HostChange => 2,
    }
}

fn json(decision: &Decision) -> Result<String, StoreError> {
    serde_json::to_string(decision).map_err(|source| StoreError::Malformed {
        kind: "decision".into(),
        id: decision.id,
        source,
    })
}

/// The name on the wire.
fn name(outcome: &netpolicy::Outcome) -> &'static str {
    use netpolicy::Outcome;
    match outcome {
        Outcome::Allowed => "allowed",
        Outcome::Denied => "denied",
        Outcome::Revoked => "taken_back",
        Outcome::Repaired => "repaired",
        Outcome::Reverted => "reverted",
    }
}
