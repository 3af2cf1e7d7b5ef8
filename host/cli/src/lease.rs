// SPDX-License-Identifier: Apache-2.0

//! The lease of the VM of `portcullis run --rm`, by which the VM ends also when this process is killed.

use std::time::Duration;

use api::{Client, ClientError, ProblemCode, client::Lease};
use tokio::task::JoinHandle;
use uuid::Uuid;

/// The time between two attempts to reach an agent that is away.
pub(super) const AGAIN: Duration = Duration::from_millis(250);

/// A VM's lease. The agent deletes the VM when it is dropped.
pub(super) struct Kept(JoinHandle<()>);

impl Kept {
    /// Takes the lease of a VM for `holder`, and takes it again of each agent that follows.
    ///
    /// # Errors
    /// The first attempt failed.
    pub(super) async fn take(client: &Client, vm: String, holder: Uuid) -> Result<Self, ClientError> {
        let lease = client.lease_vm(&vm, Some(holder)).await?;
        Ok(Self(tokio::spawn(keep(client.clone(), vm, holder, lease))))
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn keep(client: Client, vm: String, holder: Uuid, mut lease: Lease) {
    // A lease that ends in order does so with its VM, or leaves it.
    while lease.ended().await.is_err() {
        lease = loop {
            tokio::time::sleep(AGAIN).await;
            match client.lease_vm(&vm, Some(holder)).await {
                Ok(lease) => break lease,
                Err(error) if gone(&error) => return,
                Err(_) => {}
            }
        };
    }
}

/// Whether the VM is gone, or lives by the lease of another client since this one was ended.
fn gone(error: &ClientError) -> bool {
    is_others(error) || error.problem().is_some_and(|problem| problem.code == ProblemCode::NotFound)
}

/// Whether the VM lives by the lease of another client.
pub(super) fn is_others(error: &ClientError) -> bool {
    error.problem().is_some_and(|problem| problem.code == ProblemCode::WrongState)
}

/// Whether the agent, and not the request, is the reason of an error: the next agent may do it.
pub(super) fn is_away(error: &ClientError) -> bool {
    matches!(error, ClientError::NoAgent { .. } | ClientError::Broken { .. } | ClientError::TimedOut { .. })
        || error.problem().is_some_and(|problem| problem.code == ProblemCode::Unavailable)
}
