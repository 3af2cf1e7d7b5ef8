// SPDX-License-Identifier: Apache-2.0

//! The database's schema as a list of migrations. The file's `user_version` counts the applied
//! ones.

use rusqlite::Connection;

/// "Port" in ASCII: distinguishes our files from other programs' databases.
pub(super) const APPLICATION_ID: i32 = 0x506f_7274;

/// Migration *n* leads from version *n* to *n* + 1. Released ones are never edited, new ones are
/// appended.
pub(super) const MIGRATIONS: &[&str] = &[
    // 1: objects, and the log of changes that watches read.
    "CREATE TABLE objects (
        kind TEXT NOT NULL,
        id TEXT NOT NULL,
        name TEXT NOT NULL,
        revision INTEGER NOT NULL,
        value TEXT NOT NULL,
        PRIMARY KEY (kind, id),
        UNIQUE (kind, name)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE changes (
        revision INTEGER PRIMARY KEY AUTOINCREMENT,
        kind TEXT NOT NULL,
        id TEXT NOT NULL,
        name TEXT,
        value TEXT
    ) STRICT;",
    // 2: decisions. `value` is the whole record, the other columns serve queries.
    "CREATE TABLE decisions (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        vm TEXT NOT NULL,
        vm_name TEXT NOT NULL,
        port TEXT NOT NULL,
        outcome TEXT NOT NULL,
        last_ms INTEGER NOT NULL,
        value TEXT NOT NULL
    ) STRICT;
    CREATE INDEX decisions_time ON decisions (last_ms, seq);
    CREATE INDEX decisions_port ON decisions (port, last_ms, seq);",
    // 3: each VM has a share of the decisions of each weight (netpolicy::Weight). Old decisions get
    // the weight that their outcome implies.
    "ALTER TABLE decisions ADD COLUMN weight INTEGER NOT NULL DEFAULT 0;
    UPDATE decisions SET weight = CASE outcome WHEN 'denied' THEN 0 WHEN 'allowed' THEN 1 ELSE 2 END;
    DROP INDEX decisions_port;
    CREATE INDEX decisions_share ON decisions (vm, weight, last_ms, seq);
    CREATE TABLE decision_counts (
        port TEXT NOT NULL,
        outcome TEXT NOT NULL,
        count INTEGER NOT NULL,
        PRIMARY KEY (port, outcome)
    ) STRICT, WITHOUT ROWID;
    INSERT INTO decision_counts SELECT port, outcome, sum(json_extract(value, '$.count')) FROM decisions GROUP BY port, outcome;",
];

/// The result of [`migrate`].
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Migrated {
    /// The schema is now the newest.
    Newest,
    /// The file is newer than this build: its version.
    Newer(u32),
}

/// Brings the schema to the end of `migrations`, each in its own transaction.
pub(super) fn migrate(connection: &mut Connection, migrations: &[&str]) -> rusqlite::Result<Migrated> {
    let found: u32 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
    let start = usize::try_from(found).unwrap_or(usize::MAX);
    let Some(missing) = migrations.get(start..) else { return Ok(Migrated::Newer(found)) };
    for (version, migration) in (found + 1..).zip(missing) {
        let transaction = connection.transaction()?;
        transaction.execute_batch(migration)?;
        transaction.pragma_update(None, "user_version", version)?;
        transaction.commit()?;
    }
    Ok(Migrated::Newest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(connection: &Connection) -> u32 {
        connection.pragma_query_value(None, "user_version", |row| row.get(0)).unwrap()
    }

    #[test]
    fn each_migration_runs_once_and_in_order() {
        let mut connection = Connection::open_in_memory().unwrap();
        let first = ["CREATE TABLE a (x INTEGER)"];
        assert_eq!(migrate(&mut connection, &first).unwrap(), Migrated::Newest);
        connection.execute("INSERT INTO a VALUES (7)", []).unwrap();
        let both = [first[0], "ALTER TABLE a ADD COLUMN y INTEGER; UPDATE a SET y = x + 1"];
        migrate(&mut connection, &both).unwrap();
        migrate(&mut connection, &both).unwrap();
        let y: i64 = connection.query_row("SELECT y FROM a", [], |row| row.get(0)).unwrap();
        assert_eq!((y, version(&connection)), (8, 2));
    }

    #[test]
    fn a_failing_migration_leaves_the_version_before_it() {
        let mut connection = Connection::open_in_memory().unwrap();
        let broken =
            ["CREATE TABLE a (x INTEGER)", "CREATE TABLE b (x INTEGER); INSERT INTO nowhere VALUES (1)"];
        assert!(migrate(&mut connection, &broken).is_err());
        assert_eq!(version(&connection), 1);
        assert!(connection.execute("INSERT INTO b VALUES (1)", []).is_err(), "b was rolled back");
    }

    #[test]
    fn a_newer_file_is_told() {
        let mut connection = Connection::open_in_memory().unwrap();
        connection.pragma_update(None, "user_version", 9).unwrap();
        assert_eq!(migrate(&mut connection, MIGRATIONS).unwrap(), Migrated::Newer(9));
    }
}
