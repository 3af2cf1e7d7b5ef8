// SPDX-License-Identifier: Apache-2.0

//! The laws of [`ObjectStore`]. A new store adds a line to [`stores`].

use std::time::Duration;

use serde_json::json;
use tokio::time::timeout;

use super::super::*;

/// An empty store of each kind, with the directory that it may need.
fn stores() -> Vec<(tempfile::TempDir, Arc<dyn ObjectStore>)> {
    let dirs = || tempfile::tempdir().unwrap();
    let (file, memory) = (dirs(), dirs());
    let sqlite = SqliteStore::open(&file.path().join("portcullis.db")).unwrap();
    vec![(file, Arc::new(sqlite)), (memory, Arc::new(MemoryStore::default()))]
}

fn put(kind: &'static str, id: Uuid, name: &str, value: Value, expect: Expect) -> Operation {
    Operation::Put { kind, id, name: name.to_owned(), value, expect }
}

fn delete(kind: &'static str, id: Uuid, expect: Expect) -> Operation {
    Operation::Delete { kind, id, expect }
}

/// Commits one operation, and returns its revision.
async fn one(store: &dyn ObjectStore, operation: Operation) -> Result<u64, StoreError> {
    store.commit(vec![operation]).await.map(|revisions| revisions[0])
}

#[tokio::test]
async fn compare_and_swap_admits_exactly_one_of_two_writers() {
    for (_dir, store) in stores() {
        let (store, id) = (store.as_ref(), Uuid::new_v4());
        let first = one(store, put("vm", id, "a", json!(1), Expect::Absent)).await.unwrap();
        let again = one(store, put("vm", id, "a", json!(1), Expect::Absent)).await;
        assert!(matches!(again, Err(StoreError::Conflict { actual: Some(_), .. })));
        let won = one(store, put("vm", id, "a", json!(2), Expect::Revision(first))).await.unwrap();
        let lost = one(store, put("vm", id, "a", json!(3), Expect::Revision(first))).await;
        assert!(matches!(lost, Err(StoreError::Conflict { actual, .. }) if actual == Some(won)));
        let object = store.get("vm", id).await.unwrap();
        assert_eq!((object.value, object.revision), (json!(2), won));
        let lost = one(store, delete("vm", id, Expect::Revision(first))).await;
        assert!(matches!(lost, Err(StoreError::Conflict { .. })));
        one(store, delete("vm", id, Expect::Revision(won))).await.unwrap();
        assert!(matches!(store.get("vm", id).await, Err(StoreError::NotFound { .. })));
    }
}

#[tokio::test]
async fn a_deletion_of_an_absent_object_changes_nothing() {
    for (_dir, store) in stores() {
        let (store, id) = (store.as_ref(), Uuid::new_v4());
        let before = one(store, put("vm", Uuid::new_v4(), "a", json!(0), Expect::Absent)).await.unwrap();
        assert_eq!(one(store, delete("vm", id, Expect::Any)).await.unwrap(), before);
        let lost = one(store, delete("vm", id, Expect::Revision(before))).await;
        assert!(matches!(lost, Err(StoreError::Conflict { actual: None, .. })));
        assert_eq!(store.list("vm").await.unwrap().revision, before);
    }
}

#[tokio::test]
async fn names_are_unique_among_the_living_of_a_kind() {
    for (_dir, store) in stores() {
        let store = store.as_ref();
        let (first, second) = (Uuid::new_v4(), Uuid::new_v4());
        one(store, put("claim", first, "0000:01:10.0", json!({}), Expect::Absent)).await.unwrap();
        let taken = one(store, put("claim", second, "0000:01:10.0", json!({}), Expect::Absent)).await;
        assert!(matches!(taken, Err(StoreError::NameTaken { .. })));
        one(store, put("vm", second, "0000:01:10.0", json!({}), Expect::Absent)).await.unwrap();
        one(store, delete("claim", first, Expect::Any)).await.unwrap();
        one(store, put("claim", second, "0000:01:10.0", json!({}), Expect::Absent)).await.unwrap();
    }
}

#[tokio::test]
async fn a_commit_is_done_as_a_whole_or_not_at_all() {
    for (_dir, store) in stores() {
        let store = store.as_ref();
        let (first, second, third) = (Uuid::new_v4(), Uuid::new_v4(), Uuid::new_v4());
        let both = vec![
            put("port", first, "a", json!(1), Expect::Absent),
            put("mac", second, "b", json!(2), Expect::Absent),
        ];
        let revisions = store.commit(both).await.unwrap();
        assert_eq!(revisions[0] + 1, revisions[1]);
        let mut watch = store.watch(revisions[1]);
        for impossible in [
            put("mac", third, "b", json!(3), Expect::Absent),
            delete("mac", second, Expect::Revision(revisions[0])),
        ] {
            let failed = store.commit(vec![delete("port", first, Expect::Any), impossible]).await;
            assert!(failed.is_err());
        }
        assert_eq!(store.get("port", first).await.unwrap().value, json!(1));
        assert_eq!(store.list("port").await.unwrap().revision, revisions[1]);
        assert!(timeout(Duration::from_millis(50), watch.next()).await.is_err(), "nothing has changed");
        // A name that one operation gives up is free for the next one.
        let moved =
            vec![delete("mac", second, Expect::Any), put("mac", third, "b", json!(3), Expect::Absent)];
        store.commit(moved).await.unwrap();
        assert_eq!(watch.next().await.unwrap().id, second);
        assert_eq!(watch.next().await.unwrap().object.unwrap().id, third);
    }
}

#[tokio::test]
async fn a_commit_has_bounds() {
    for (_dir, store) in stores() {
        let operations = |count: usize| -> Vec<Operation> {
            (0..count).map(|n| put("vm", Uuid::new_v4(), &n.to_string(), json!(n), Expect::Absent)).collect()
        };
        assert!(matches!(store.commit(Vec::new()).await, Err(StoreError::Commit(_))));
        assert!(matches!(store.commit(operations(MAX_OPERATIONS + 1)).await, Err(StoreError::Commit(_))));
        let twice = delete("vm", Uuid::nil(), Expect::Any);
        assert!(matches!(store.commit(vec![twice.clone(), twice]).await, Err(StoreError::Commit(_))));
        assert_eq!(store.commit(operations(MAX_OPERATIONS)).await.unwrap().len(), MAX_OPERATIONS);
    }
}

#[tokio::test]
async fn a_watch_from_a_listing_misses_nothing_and_repeats_nothing() {
    for (_dir, store) in stores() {
        let store = store.as_ref();
        let ids: Vec<Uuid> = (0..3).map(|_| Uuid::new_v4()).collect();
        one(store, put("vm", ids[0], "before", json!(0), Expect::Absent)).await.unwrap();
        let listing = store.list("vm").await.unwrap();
        let mut watch = store.watch(listing.revision);
        assert!(timeout(Duration::from_millis(50), watch.next()).await.is_err(), "nothing has happened yet");
        // More changes than a store reads at once, so that a second read continues after the first.
        for n in 0..600 {
            one(store, put("vm", ids[1], "b", json!(n), Expect::Any)).await.unwrap();
        }
        one(store, delete("vm", ids[1], Expect::Any)).await.unwrap();
        for n in 0..600 {
            let change = watch.next().await.unwrap();
            assert_eq!(change.object.unwrap().value, json!(n));
            assert_eq!(change.revision, listing.revision + 1 + n);
        }
        assert_eq!(watch.next().await.unwrap().object, None);
        one(store, put("port", ids[2], "c", json!(1), Expect::Absent)).await.unwrap();
        assert_eq!(watch.next().await.unwrap().kind, "port");
    }
}

/// Records of the two scopes.
#[derive(serde::Serialize, serde::Deserialize)]
struct Everybodys(u8);
impl Record for Everybodys {
    const KIND: &'static str = "everybodys";
    const SCOPE: Scope = Scope::Shared;
}
#[derive(serde::Serialize, serde::Deserialize)]
struct Own(u8);
impl Record for Own {
    const KIND: &'static str = "own";
}

#[tokio::test]
async fn a_record_is_in_the_store_of_its_scope() {
    let (shared, local) = (Arc::new(MemoryStore::default()), Arc::new(MemoryStore::default()));
    let stores = Stores::new(shared.clone(), local.clone());
    let id = Uuid::new_v4();
    Table::new(&stores).put(id, "a", &Everybodys(1), Expect::Absent).await.unwrap();
    Table::new(&stores).put(id, "a", &Own(2), Expect::Absent).await.unwrap();
    assert!(shared.get("everybodys", id).await.is_ok() && shared.get("own", id).await.is_err());
    assert!(local.get("own", id).await.is_ok() && local.get("everybodys", id).await.is_err());
}

#[tokio::test]
async fn a_transaction_stays_in_one_scope() {
    let stores = Stores::on_one_host(Arc::new(MemoryStore::default()));
    let id = Uuid::new_v4();
    let local = stores.transaction(Scope::Local).put(id, "a", &Own(1), Expect::Absent).unwrap();
    assert_eq!(local.commit().await.unwrap(), [1]);
    let mixed = stores.transaction(Scope::Local).remove::<Own>(id).unwrap().remove::<Everybodys>(id);
    assert!(matches!(mixed.map(drop), Err(StoreError::Commit(_))));
    assert_eq!(Table::<Own>::new(&stores).list().await.unwrap().len(), 1);
}

/// Submits all commits before it waits for the first result.
async fn together(
    store: &dyn ObjectStore,
    commits: Vec<Vec<Operation>>,
) -> Vec<Result<Vec<u64>, StoreError>> {
    let mut waiting = Vec::new();
    for operations in commits {
        let (done, result) = tokio::sync::oneshot::channel();
        store.submit(operations, Box::new(move |revisions| drop(done.send(revisions))));
        waiting.push(result);
    }
    let mut results = Vec::new();
    for result in waiting {
        results.push(result.await.unwrap());
    }
    results
}

#[tokio::test]
async fn commits_that_wait_together_take_effect_in_their_order_each_with_its_own_result() {
    for (_dir, store) in stores() {
        let (one, other) = (Uuid::new_v4(), Uuid::new_v4());
        let any = |id, name, value| vec![put("vm", id, name, json!(value), Expect::Any)];
        let mut commits: Vec<_> = (0..40).map(|value| any(one, "web1", value)).collect();
        commits.push(vec![put("vm", other, "web1", json!("taken"), Expect::Absent)]);
        commits.push(vec![put("vm", other, "web2", json!(1), Expect::Absent)]);
        commits.push(vec![put("vm", other, "web2", json!(2), Expect::Absent)]);
        commits.push(vec![delete("vm", one, Expect::Any)]);
        commits.push(any(one, "web3", 41));
        commits.push(Vec::new());
        let mut results = together(&*store, commits).await;
        assert!(matches!(results.pop(), Some(Err(StoreError::Commit(_)))));
        let failed: Vec<usize> =
            results.iter().enumerate().filter(|(_, result)| result.is_err()).map(|(at, _)| at).collect();
        assert_eq!(failed, [40, 42], "{results:?}");
        assert!(matches!(results[40], Err(StoreError::NameTaken { .. })));
        assert!(matches!(results[42], Err(StoreError::Conflict { .. })));
        let shown = store.get("vm", one).await.unwrap();
        assert_eq!((shown.name.as_str(), shown.value), ("web3", json!(41)));
        assert_eq!(results[44].as_ref().unwrap(), &[shown.revision]);
        assert_eq!(store.get("vm", other).await.unwrap().value, json!(1));
    }
}

#[tokio::test]
async fn a_condition_holds_for_what_was_submitted_before_it() {
    for (_dir, store) in stores() {
        let id = Uuid::new_v4();
        let first = one(&*store, put("vm", id, "web1", json!(0), Expect::Absent)).await.unwrap();
        for _ in 0..20 {
            let commits = vec![
                vec![put("vm", Uuid::new_v4(), &Uuid::new_v4().to_string(), json!(0), Expect::Any)],
                vec![put("vm", id, "web1", json!(1), Expect::Any)],
                vec![put("vm", id, "web1", json!(2), Expect::Revision(first))],
                vec![put("vm", id, "web1", json!(3), Expect::Any)],
            ];
            let results = together(&*store, commits).await;
            assert!(matches!(results[2], Err(StoreError::Conflict { .. })), "{results:?}");
            assert_eq!(store.get("vm", id).await.unwrap().value, json!(3));
        }
    }
}
