// SPDX-License-Identifier: Apache-2.0

//! The deletion of a VM.

use super::*;

impl Actor {
    /// Deletes the VM if it is at this revision.
    pub(super) async fn delete(&mut self, caller: Caller, expect: Option<u64>, done: Done) {
        let revision = self.vm.revision;
        if let Some(expected) = expect.filter(|expected| *expected != revision) {
            return drop(done.send(Err(Problem::revision_mismatch(expected, revision))));
        }
        self.deleted_by = Some(caller.to_string());
        self.begin_deletion(done).await;
    }

    /// Stops the VM if it runs; [`Self::forget`] completes its deletion.
    pub(super) async fn begin_deletion(&mut self, done: Done) {
        self.deleting.push(done);
        self.cancel_restart();
        if !self.run.state.is_at_rest() {
            self.stop().await;
        } else {
            self.progress.begin(OperationAction::Delete, self.release_stages());
        }
    }

    /// If the VM is to be deleted and at rest: forgets it.
    pub(super) async fn forget(&mut self) -> bool {
        if self.deleting.is_empty() || !self.run.state.is_at_rest() {
            return false;
        }
        if let Err(problem) = self.give_back().await {
            self.not_deleted();
            for done in self.deleting.drain(..) {
                drop(done.send(Err(problem.clone())));
            }
            return false;
        }
        self.progress.enter(Stage::Forgetting);
        let removed = async {
            reach(Point::DeleteBegun);
            switch_client::detach(&self.env, self.vm.id).await?;
            reach(Point::DeleteDetached);
            if let Err(error) = self.directory.remove() {
                tracing::warn!(vm = %self.name(), "its run directory cannot be removed: {error}");
            }
            // Remove the VM's record last: as long as it is there, the next agent finds the rest.
            self.env.forget_vm(self.vm.id).await.map_err(|e| e.problem())?;
            reach(Point::DeleteStored);
            Ok(())
        };
        let result = removed.await;
        let forgotten = result.is_ok();
        if forgotten {
            self.env.tell(EventKind::Deleted { object: self.subject(), by: self.deleted_by.take() });
        } else {
            self.not_deleted();
        }
        for done in self.deleting.drain(..) {
            drop(done.send(result.clone()));
        }
        forgotten
    }

    fn not_deleted(&mut self) {
        self.progress.end();
        // If the VM has no client, the deletion is tried again after a while.
        self.await_client();
        self.publish();
    }
}
