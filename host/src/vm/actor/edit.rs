// SPDX-License-Identifier: Apache-2.0

//! Edits of a VM's specification.

use api::types::{DiskSpec, VmSpec};

use super::*;

/// The longest wait for a vmm that receives new limits: the VM's task does nothing else meanwhile.
const LIMIT: Duration = Duration::from_secs(5);

impl Actor {
    /// Replaces the specification. A hidden text keeps its stored value. After an error the old specification
    /// stays.
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
        // Check again: with the stored texts the specification may be larger than the caller's.
        spec.check()?;
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
                    "The VM {} is {state}, so only restart, autostart, cloud_init, credentials and limits of disks can \
                     change: {cure}.",
                    self.name()
                );
                return Err(Problem::new(ProblemCode::WrongState, detail));
            }
            // Release the claims first: they belong to the adapters of the old specification.
            self.give_back().await?;
            switch_client::attach(&self.env, old.id, &spec).await?;
        } else if let Err(problem) = self.limit_disks(&old.value.spec.disks, &spec.disks).await {
            // Restore the limits that were changed before the failure.
            drop(self.limit_disks(&spec.disks, &old.value.spec.disks).await);
            return Err(problem);
        }
        let (name, new_disks) = (spec.name.to_string(), spec.disks.clone());
        let value = old.value.edited(spec, caller);
        let put = self.env.vms.put(old.id, &name, &value, Expect::Revision(old.revision)).await;
        let revision = match put {
            Ok(revision) => revision,
            Err(error) => {
                if same_machine {
                    drop(self.limit_disks(&new_disks, &old.value.spec.disks).await);
                } else if let Err(also) = switch_client::attach(&self.env, old.id, &old.value.spec).await {
                    // Only log this: the next boot makes the ports match the specification.
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

    /// Changes the limits of the disks of a running VM from those of `old` to those of `new`.
    async fn limit_disks(&self, old: &[DiskSpec], new: &[DiskSpec]) -> Result<(), Problem> {
        if !matches!(self.run.state, VmState::Running | VmState::Paused | VmState::Rebooting) {
            return Ok(());
        }
        for (_, disk) in old.iter().zip(new).filter(|(old, new)| old.limits != new.limits) {
            let link = self.link.as_ref().ok_or_else(|| self.no_connection())?;
            let command = limits_of(disk);
            link.connection.command(command, Vec::new(), LIMIT).await.map_err(|error| error.problem())?;
        }
        Ok(())
    }

    /// Sends the limits of the disks again: an agent that died during an edit may have left other limits in the
    /// process. A later edit's command comes behind these.
    pub(super) fn repeat_limits(&self) {
        let Some(link) = &self.link else { return };
        for command in self.vm.value.spec.disks.iter().map(limits_of) {
            link.connection.post(command);
        }
    }
}

fn limits_of(disk: &DiskSpec) -> VmmCommand {
    VmmCommand::LimitDisk { disk: disk.id.to_string(), limits: boot::disk_limits(disk.limits) }
}
