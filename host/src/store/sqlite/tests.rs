// SPDX-License-Identifier: Apache-2.0

use std::{fs, os::unix::fs::PermissionsExt, time::Duration};

use serde_json::json;
use tokio::time::timeout;

use super::*;

fn scratch() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state/portcullis.db");
    (dir, path)
}

/// What version 1 of this program wrote, word for word: every later version must read it.
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
    let next = store.put("vm", vm.id, "web1", json!({}), Expect::Revision(41)).await.unwrap();
    assert_eq!(next.revision, 42);
}

#[tokio::test]
async fn compare_and_swap_admits_exactly_one_of_two_writers() {
    let (_dir, path) = scratch();
    let store = SqliteStore::open(&path).unwrap();
    let id = Uuid::new_v4();
    let first = store.put("vm", id, "a", json!(1), Expect::Absent).await.unwrap();
    let again = store.put("vm", id, "a", json!(1), Expect::Absent).await;
    assert!(matches!(again, Err(StoreError::Conflict { actual: Some(_), .. })));
    let won = store.put("vm", id, "a", json!(2), Expect::Revision(first.revision)).await.unwrap();
    let lost = store.put("vm", id, "a", json!(3), Expect::Revision(first.revision)).await;
    assert!(matches!(lost, Err(StoreError::Conflict { actual, .. }) if actual == Some(won.revision)));
    assert_eq!(store.get("vm", id).await.unwrap().value, json!(2));
    assert!(matches!(
        store.delete("vm", id, Expect::Revision(first.revision)).await,
        Err(StoreError::Conflict { .. })
    ));
    store.delete("vm", id, Expect::Revision(won.revision)).await.unwrap();
    assert!(matches!(store.get("vm", id).await, Err(StoreError::NotFound { .. })));
    assert!(matches!(store.delete("vm", id, Expect::Any).await, Err(StoreError::NotFound { .. })));
}

#[tokio::test]
async fn names_are_unique_among_the_living_of_a_kind() {
    let (_dir, path) = scratch();
    let store = SqliteStore::open(&path).unwrap();
    let (one, two) = (Uuid::new_v4(), Uuid::new_v4());
    store.put("claim", one, "0000:01:10.0", json!({}), Expect::Absent).await.unwrap();
    let taken = store.put("claim", two, "0000:01:10.0", json!({}), Expect::Absent).await;
    assert!(matches!(taken, Err(StoreError::NameTaken { .. })));
    store.put("vm", two, "0000:01:10.0", json!({}), Expect::Absent).await.unwrap();
    store.delete("claim", one, Expect::Any).await.unwrap();
    store.put("claim", two, "0000:01:10.0", json!({}), Expect::Absent).await.unwrap();
}

#[tokio::test]
async fn a_watch_from_a_listing_misses_nothing_and_repeats_nothing() {
    let (_dir, path) = scratch();
    let store = SqliteStore::open(&path).unwrap();
    let ids: Vec<Uuid> = (0..3).map(|_| Uuid::new_v4()).collect();
    store.put("vm", ids[0], "before", json!(0), Expect::Absent).await.unwrap();
    let listing = store.list("vm").await.unwrap();
    let mut watch = store.watch(listing.revision);
    assert!(timeout(Duration::from_millis(50), watch.next()).await.is_err(), "nothing has happened yet");
    // More than one batch, so that the second read goes on where the first ended.
    for n in 0..600 {
        store.put("vm", ids[1], "b", json!(n), Expect::Any).await.unwrap();
    }
    store.delete("vm", ids[1], Expect::Any).await.unwrap();
    for n in 0..600 {
        let change = watch.next().await.unwrap();
        assert_eq!(change.object.unwrap().value, json!(n));
        assert_eq!(change.revision, listing.revision + 1 + n);
    }
    assert_eq!(watch.next().await.unwrap().object, None);
    store.put("port", ids[2], "c", json!(1), Expect::Absent).await.unwrap();
    assert_eq!(watch.next().await.unwrap().kind, "port");
}

#[tokio::test]
async fn a_watch_that_lags_too_far_is_told_to_list_again() {
    let (_dir, path) = scratch();
    let store = SqliteStore::open(&path).unwrap();
    store.put("vm", Uuid::new_v4(), "a", json!(0), Expect::Absent).await.unwrap();
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
    store.put("vm", id, "a", json!({"x": 1}), Expect::Absent).await.unwrap();
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
