// SPDX-License-Identifier: Apache-2.0

//! Leases: a VM with a lease is stopped and deleted when it has no client.
//!
//! The run record's mark `leased` outlives the agent, and the clients' connections do not. After its start, an
//! agent therefore waits for some time for a client to take the lease again.

use std::{convert::Infallible, sync::atomic::Ordering};

use api::{Lease, LeaseTerms, types::VmLease};
use tokio::time::{Instant, sleep, sleep_until};

use super::{restart::later, *};

/// The clients that hold a VM's lease.
#[derive(Default)]
pub(super) struct Tenancy {
    held: Option<Clients>,
    /// The end of the wait for a client, as an instant and as the time that users see.
    until: Option<(Instant, Timestamp)>,
}

/// At least one client, as long as the channel is open.
struct Clients {
    /// No message comes from it. It ends when the last client has dropped its sender.
    gone: mpsc::Receiver<Infallible>,
    client: mpsc::WeakSender<Infallible>,
    /// Dropped at the end of the lease.
    lease: watch::Sender<()>,
}

impl Tenancy {
    /// Completes when the VM must end: its last client is gone, or none has come in time. Does not complete while
    /// the agent shuts down: the agent then closes its clients' connections, and they take their leases from the
    /// next agent.
    pub(super) async fn lapses(&mut self, env: &Environment) {
        let Self { held, until } = self;
        let gone = async {
            match held {
                Some(clients) => drop(clients.gone.recv().await),
                None => pending().await,
            }
        };
        let late = async {
            match until {
                Some((until, _)) => {
                    sleep_until(*until).await;
                    // No client can reach an agent that does not listen yet.
                    let mut serving = env.serving.subscribe();
                    if !*serving.borrow_and_update() && serving.wait_for(|serving| *serving).await.is_ok() {
                        sleep(env.lease_grace).await;
                    }
                }
                None => pending().await,
            }
        };
        tokio::select! {
            () = gone => {}
            () = late => {}
        }
        if env.ending.load(Ordering::SeqCst) {
            pending().await
        }
    }

    /// The lease of a further client.
    fn admit(&mut self) -> Lease {
        self.until = None;
        let known =
            self.held.as_ref().and_then(|held| Some((held.client.upgrade()?, held.lease.subscribe())));
        let (client, mut lease) = known.unwrap_or_else(|| {
            let (client, gone) = mpsc::channel(1);
            let (lease, ended) = watch::channel(());
            self.held = Some(Clients { gone, client: client.downgrade(), lease });
            (client, ended)
        });
        Lease::new(async move {
            let _client = client;
            while lease.changed().await.is_ok() {}
        })
    }

    /// The lease as users see it.
    pub(super) fn shown(&self) -> VmLease {
        VmLease { until: self.until.map(|(_, until)| until) }
    }
}

impl Actor {
    pub(super) async fn take_lease(&mut self, terms: LeaseTerms) -> Result<Lease, Problem> {
        if !self.deleting.is_empty() {
            return Err(Problem::not_found(&api::Missing::new("VM", self.vm.id)));
        }
        // Refuse this even while the agent waits for the holder to reconnect. Otherwise two clients that use the
        // same name would both hold the VM.
        let taken = self.run.holder.is_some() || self.tenancy.held.is_some();
        if self.run.leased && taken && self.run.holder != terms.holder {
            let name = self.name();
            let detail = format!(
                "The VM {name} lives by the lease of another client, and is deleted when that client is gone: choose another \
                 name, or delete the VM (`portcullis vm delete {name}`)."
            );
            return Err(Problem::new(ProblemCode::WrongState, detail));
        }
        self.set_lease(Some(terms)).await?;
        let lease = self.tenancy.admit();
        self.publish();
        Ok(lease)
    }

    pub(super) async fn end_lease(&mut self) -> Result<(), Problem> {
        self.set_lease(None).await?;
        self.tenancy = Tenancy::default();
        self.publish();
        Ok(())
    }

    /// Stores whether the VM has a lease. With an old mark, the next agent would keep a VM without a client, or
    /// delete a VM that no longer has a lease.
    async fn set_lease(&mut self, terms: Option<LeaseTerms>) -> Result<(), Problem> {
        let before = (self.run.leased, self.run.holder);
        let after = (terms.is_some(), terms.and_then(|terms| terms.holder));
        if before == after {
            return Ok(());
        }
        (self.run.leased, self.run.holder) = after;
        let stored = self.store().await;
        if stored.is_err() {
            (self.run.leased, self.run.holder) = before;
            self.publish();
        }
        stored
    }

    /// Begins the wait for a client, if the VM needs one and has none.
    pub(super) fn await_client(&mut self) {
        let delay = self.env.lease_grace;
        if self.run.leased && self.tenancy.held.is_none() {
            self.tenancy.until = Instant::now().checked_add(delay).map(|until| (until, later(delay)));
            self.publish();
        }
    }

    /// Stops and deletes the VM, because it has no client any more. A failed deletion is tried again.
    pub(super) async fn lapse(&mut self) {
        self.tenancy = Tenancy::default();
        if !self.deleting.is_empty() {
            return;
        }
        tracing::info!(vm = %self.name(), id = %self.vm.id, "the client of its lease is gone: the agent stops and deletes the VM");
        let (done, result) = oneshot::channel();
        let (name, again) = (self.vm.name.clone(), self.env.lease_grace);
        tokio::spawn(async move {
            if let Ok(Err(problem)) = result.await {
                tracing::error!(vm = %name, "the VM has no client and cannot be deleted; the agent tries again in {again:?}: {problem}");
            }
        });
        self.begin_deletion(done).await;
    }
}
