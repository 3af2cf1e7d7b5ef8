// SPDX-License-Identifier: Apache-2.0

//! Edits of a VM's specification.

use api::types::VmSpec;

use super::*;

impl Actor {
    /// Replaces the specification. Hidden texts are the stored ones. After an error the old specification stays.
    pub(super) async fn edit(
        &mut self,
        caller: &Caller,
        mut spec: VmSpec,
        expect: Option<u64>,
    ) -> Result<(), Problem> {
        if !self.deleting.is_empty() {
            return Err(Problem::not_found(&api::Missing::new("VM", self.vm.id)));
        }
        let old = Arc::clone(&self.vm);
        if let Some(expected) = expect.filter(|expected| *expected != old.revision) {
            return Err(Problem::revision_mismatch(expected, old.revision));
        }
        spec.unmask(Some(&old.value.spec))?;
        if spec == old.value.spec {
            return Ok(());
        }
        let same_machine = spec.same_machine(&old.value.spec);
        if !same_machine {
            if !self.run.state.is_at_rest() {
                let state = self.run.state;
                let cure =
                    if state == VmState::Stopping { "wait until it is stopped" } else { "stop it first" };
                let detail = format!(
                    "The VM {} is {state}, so only restart, autostart, cloud_init and credentials can change: {cure}.",
                    self.name()
                );
                return Err(Problem::new(ProblemCode::WrongState, detail));
            }
            // Release the claims first: they belong to the adapters of the old specification.
            self.give_back().await?;
            switch_client::attach(&self.env, old.id, &spec).await?;
        }
        let name = spec.name.to_string();
        let value = old.value.edited(spec, caller);
        let put = self.env.vms.put(old.id, &name, &value, Expect::Revision(old.revision)).await;
        let revision = match put {
            Ok(revision) => revision,
            Err(error) => {
                if let Err(also) = switch_client::attach(&self.env, old.id, &old.value.spec).await {
                    // The next boot makes the ports match the specification.
                    tracing::error!(vm = %self.name(), "its ports could not be restored: {also}");
                }
                return Err(error.problem());
            }
        };
        self.vm = Arc::new(Entry { id: old.id, name, revision, value });
        self.outlets.record.send_replace(Arc::clone(&self.vm));
        if !same_machine || self.vm.value.spec.restart != old.value.spec.restart {
            self.cancel_restart();
        }
        // Store the state under the new name. If that fails, the next change of the state does it.
        drop(self.store().await);
        let by = Some(caller.to_string());
        self.env.tell(EventKind::Changed { object: self.subject(), revision, by });
        Ok(())
    }
}
