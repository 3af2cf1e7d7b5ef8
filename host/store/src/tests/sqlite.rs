// SPDX-License-Identifier: Apache-2.0

//! The file of [`SqliteStore`].

use std::{fs, os::unix::fs::PermissionsExt, path::PathBuf};

use rusqlite::Connection;
use serde_json::json;

use super::super::*;

async fn put(store: &SqliteStore, id: Uuid, value: Value, expect: Expect) -> u64 {
    let put = Operation::Put { kind: "vm", id, name: "web1".into(), value, expect };
    store.commit(vec![put]).await.unwrap()[0]
}

fn scratch() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state/portcullis.db");
    (dir, path)
}

/// A database of version 1 of this program, word for word. Every later version must read it.
const VERSION_1: &str = r#"
    PRAGMA application_id = 1349481076;
    CREATE TABLE objects (kind TEXT NOT NULL, id TEXT NOT NULL, name TEXT NOT NULL, revision INTEGER NOT NULL,
        value TEXT NOT NULL, PRIMARY KEY (kind, id), UNIQUE (kind, name)) STRICT, WITHOUT ROWID;
    CREATE TABLE changes (revision INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, id TEXT NOT NULL,
        name TEXT, value TEXT) STRICT;
    INSERT INTO changes VALUES (41, 'vm', '6b1e3f9e-7f1d-4a53-9d5e-0d6e5a1c2b3a', 'web1', '{"cpus":2}');
    INSERT INTO objects VALUES ('vm', '6b1e3f9e-7f1d-4a53-9d5e-0d6e5a1c2b3a', 'web1', 41, '{"cpus":2}');
    PRAGMA user_version = 1;
"#;

#[tokio::test]
async fn a_database_of_version_1_opens_with_all_it_holds() {
    let (_dir, path) = scratch();
    fs::create_dir(path.parent().unwrap()).unwrap();
    Connection::open(&path).unwrap().execute_batch(VERSION_1).unwrap();
    let store = SqliteStore::open(&path).unwrap();
    let listing = store.list("vm").await.unwrap();
    assert_eq!(listing.revision, 41);
    let vm = listing.objects.first().unwrap();
    assert_eq!((vm.name.as_str(), vm.revision, &vm.value), ("web1", 41, &json!({"cpus": 2})));
    assert_eq!(put(&store, vm.id, json!({}), Expect::Revision(41)).await, 42);
}

#[tokio::test]
async fn a_watch_that_lags_too_far_is_told_to_list_again() {
    let (_dir, path) = scratch();
    let store = SqliteStore::open(&path).unwrap();
    put(&store, Uuid::new_v4(), json!(0), Expect::Absent).await;
    drop(store);
    let connection = Connection::open(&path).unwrap();
    connection
        .execute_batch("DELETE FROM changes; INSERT INTO changes VALUES (500, 'vm', 'x', NULL, NULL)")
        .unwrap();
    let store = SqliteStore::open(&path).unwrap();
    assert!(matches!(store.watch(1).next().await, Err(StoreError::Compacted { from: 1, oldest: 500 })));
    assert_eq!(store.watch(499).next().await.unwrap().revision, 500);
}

#[tokio::test]
async fn what_was_committed_is_there_after_reopening_and_the_file_is_private() {
    let (_dir, path) = scratch();
    let id = Uuid::new_v4();
    let store = SqliteStore::open(&path).unwrap();
    put(&store, id, json!({"x": 1}), Expect::Absent).await;
    for name in ["portcullis.db", "portcullis.db-wal", "portcullis.db-shm"] {
        let mode = fs::metadata(path.with_file_name(name)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
    drop(store);
    let store = SqliteStore::open(&path).unwrap();
    assert_eq!(store.get("vm", id).await.unwrap().value, json!({"x": 1}));
}

#[test]
fn files_that_are_not_ours_or_are_damaged_are_refused_with_the_cure() {
    let (_dir, path) = scratch();
    fs::create_dir(path.parent().unwrap()).unwrap();
    let refused = |what: &str| {
        let message = SqliteStore::open(&path).unwrap_err().to_string();
        assert!(message.contains("portcullis.db"), "{message}");
        assert!(message.contains(what), "{message}");
        let _ = fs::remove_file(&path);
    };
    fs::write(&path, "this is a text file, not a database at all\n".repeat(50)).unwrap();
    refused("move it away");
    Connection::open(&path).unwrap().execute_batch("CREATE TABLE other (x)").unwrap();
    refused("another program");
    drop(SqliteStore::open(&path).unwrap());
    Connection::open(&path).unwrap().pragma_update(None, "user_version", 77).unwrap();
    refused("version 77");
    fs::create_dir(&path).unwrap();
    let error = SqliteStore::open(&path).unwrap_err();
    assert!(matches!(error, StoreError::Open { .. }), "{error}");
}
