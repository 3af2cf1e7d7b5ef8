// SPDX-License-Identifier: Apache-2.0

//! An agent whose disk takes 8 ms for each durable write.

use std::{
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use api::types::{VmAction, VmState};
use store::{
    BoxFuture, Completion, Listing, Object, ObjectStore, Operation, SqliteStore, StoreError, Stores, Table,
    Watch,
};
use tokio::time::timeout;
use uuid::Uuid;

use super::fixture::Host;

const FSYNC: Duration = Duration::from_millis(8);

/// A store whose commits wait for each other, and for the disk.
struct SlowStore {
    store: SqliteStore,
    commits: mpsc::Sender<(Vec<Operation>, Completion)>,
}

impl SlowStore {
    fn new(store: SqliteStore) -> Self {
        let (commits, waiting) = mpsc::channel::<(Vec<Operation>, Completion)>();
        let disk = store.clone();
        thread::spawn(move || {
            for (operations, done) in waiting {
                thread::sleep(FSYNC);
                disk.submit(operations, done);
            }
        });
        Self { store, commits }
    }
}

impl ObjectStore for SlowStore {
    fn list(&self, kind: &str) -> BoxFuture<'_, Result<Listing, StoreError>> {
        self.store.list(kind)
    }

    fn get(&self, kind: &str, id: Uuid) -> BoxFuture<'_, Result<Object, StoreError>> {
        self.store.get(kind, id)
    }

    fn submit(&self, operations: Vec<Operation>, done: Completion) {
        self.commits.send((operations, done)).unwrap();
    }

    fn watch(&self, revision: u64) -> Box<dyn Watch> {
        self.store.watch(revision)
    }
}

/// Guests that reset themselves as fast as they can are honest. Their events wait while the agent writes, and no budget for
/// hostile processes may run out meanwhile.
#[tokio::test]
async fn guests_that_reset_themselves_are_not_taken_for_hostile_ones() {
    const HALF_SECONDS: u64 = 8;
    let mut host = Host::new().await;
    let database = host.database();
    host.env = host
        .another_agent(|env| {
            let stores = Stores::on_one_host(Arc::new(SlowStore::new(SqliteStore::open(&database).unwrap())));
            env.vms = Table::new(&stores);
            env.runs = Table::new(&stores);
            env.claims = Table::new(&stores);
            env.stores = stores;
        })
        .await;
    let mut vms = Vec::new();
    for name in ["web1", "web2"] {
        let vm = host.create(name, |_| {}).await;
        host.act(&vm, VmAction::Boot).await.unwrap();
        vms.push(vm);
    }
    for vm in &vms {
        host.tell(vm, &format!("at-highest-rate {HALF_SECONDS}")).await;
    }
    for vm in &vms {
        let mut status = vm.follow();
        let boots = 1 + 8 + HALF_SECONDS;
        let all = status.wait_for(|status| status.run.boots == boots || status.run.state.is_at_rest());
        timeout(Duration::from_secs(30), all).await.expect("all resets are noted").unwrap();
        assert_eq!((vm.state(), &vm.status().run.cause), (VmState::Running, &None));
    }
}
