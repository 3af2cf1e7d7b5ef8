// SPDX-License-Identifier: Apache-2.0

//! The records in the database.

use std::{
    collections::{HashMap, VecDeque},
    path::Path,
    time::Duration,
};

use api::types::{Cursor, DecisionFilter, Timestamp};
use netpolicy::{Decision, PortId};
use rusqlite::{Connection, Transaction, params};

use crate::store::StoreError;

/// Which part of all records one port may have, so that one guest's noise does not push out what others did.
const SHARE: u32 = 10;

/// Records of a port that an equal decision may still be counted in.
const RECENT: usize = 16;

/// Ports whose recent records are remembered.
const PORTS: usize = 4096;

/// How long to wait for the store's own writes to the same file.
const PATIENCE: Duration = Duration::from_secs(10);

/// The table, through a connection of its own.
pub(super) struct Decisions {
    connection: Connection,
    kept: u32,
    recent: HashMap<PortId, VecDeque<Decision>>,
}

impl Decisions {
    pub(super) fn open(path: &Path, kept: u32) -> Result<Self, StoreError> {
        let connection = Connection::open(path)?;
        connection.busy_timeout(PATIENCE)?;
        // A power cut may take the last records, never the file: what the agent relies on is in the store.
        connection.pragma_update(None, "synchronous", "NORMAL")?;
        Ok(Self { connection, kept, recent: HashMap::new() })
    }

    /// Writes decisions, equal ones into one record. Returns the records as they are now.
    pub(super) fn record(&mut self, decisions: Vec<Decision>) -> Result<Vec<Decision>, StoreError> {
        let mut stored = Vec::with_capacity(decisions.len());
        let mut ports = Vec::new();
        let transaction = self.connection.transaction()?;
        for decision in decisions {
            if self.recent.len() >= PORTS && !self.recent.contains_key(&decision.port) {
                self.recent.clear();
            }
            let recent = self.recent.entry(decision.port).or_default();
            ports.push(decision.port);
            stored.push(write(&transaction, recent, decision)?);
        }
        ports.sort_unstable();
        ports.dedup();
        for port in ports {
            let share = (self.kept / SHARE).max(1);
            transaction
                .prepare_cached(
                    "DELETE FROM decisions WHERE port = ?1 AND seq NOT IN
                     (SELECT seq FROM decisions WHERE port = ?1 ORDER BY last_ms DESC, seq DESC LIMIT ?2)",
                )?
                .execute(params![port.to_string(), share])?;
        }
        transaction
            .prepare_cached(
                "DELETE FROM decisions WHERE seq IN
                 (SELECT seq FROM decisions ORDER BY last_ms DESC, seq DESC LIMIT -1 OFFSET ?1)",
            )?
            .execute([self.kept])?;
        if let Err(error) = transaction.commit() {
            // What is remembered as recent is not in the table.
            self.recent.clear();
            return Err(error.into());
        }
        Ok(stored)
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
        // A record that has been counted on since then is on a page before; one that is gone had all of its moment.
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

fn write(
    transaction: &Transaction<'_>,
    recent: &mut VecDeque<Decision>,
    mut decision: Decision,
) -> Result<Decision, StoreError> {
    for record in recent.iter_mut() {
        match record.absorb(decision) {
            Ok(()) => {
                let changed = transaction
                    .prepare_cached("UPDATE decisions SET last_ms = ?2, value = ?3 WHERE id = ?1")?
                    .execute(params![record.id.to_string(), record.last_ms, json(record)?])?;
                // It may have been pushed out meanwhile.
                if changed == 0 {
                    insert(transaction, record)?;
                }
                return Ok(record.clone());
            }
            Err(other) => decision = other,
        }
    }
    insert(transaction, &decision)?;
    if recent.len() >= RECENT {
        recent.pop_front();
    }
    recent.push_back(decision.clone());
    Ok(decision)
}

fn insert(transaction: &Transaction<'_>, decision: &Decision) -> Result<(), StoreError> {
    transaction
        .prepare_cached(
            "INSERT INTO decisions (id, vm, vm_name, port, outcome, last_ms, value)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
        )?
        .execute(params![
            decision.id.to_string(),
            decision.vm.id.to_string(),
            decision.vm.name.as_str(),
            decision.port.to_string(),
            name(&decision.outcome),
            decision.last_ms,
            json(decision)?,
        ])?;
    Ok(())
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
        Outcome::TakenBack => "taken_back",
        Outcome::Repaired => "repaired",
        Outcome::Reverted => "reverted",
    }
}
