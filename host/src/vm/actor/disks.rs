// SPDX-License-Identifier: Apache-2.0

//! The size of disks of a running VM.

use std::time::Duration;

use api::types::{DiskFormat, DiskSize, DiskSpec, VmState};
use protocol::qcow2_tables;
use services::vmm_process::allow_longer_files;

use super::{Actor, Caller, Connection, Done, Problem, ProblemCode, ToProblem as _, VmmCommand};

/// The longest time of a growth: parts of a backing file may have to be hidden, cluster by cluster.
const GROWTH: Duration = Duration::from_secs(300);

impl Actor {
    /// Enlarges a disk. The VM's task goes on meanwhile.
    pub(super) fn resize_disk(&mut self, caller: &Caller, wanted: DiskSize, done: Done) {
        let (connection, limit) = match self.growth(&wanted) {
            Ok(growth) => growth,
            Err(problem) => return drop(done.send(Err(problem))),
        };
        tracing::info!(vm = %self.name(), disk = %wanted.disk, size = %wanted.size, by = %caller, "a disk is enlarged");
        let command = VmmCommand::GrowDisk { disk: wanted.disk.to_string(), size: wanted.size.bytes() };
        tokio::spawn(async move {
            let result = connection.command(command, Vec::new(), GROWTH).await;
            let result = result.map(drop).map_err(|error| {
                let problem = error.problem();
                let cause = limit.filter(|_| problem.code == ProblemCode::DiskInvalid);
                Problem {
                    detail: cause.map_or(problem.detail.clone(), |also| format!("{} {also}", problem.detail)),
                    ..problem
                }
            });
            drop(done.send(result));
        });
    }

    /// The connection for a growth, and the reason why the limit on the length of files could not be raised.
    fn growth(&mut self, wanted: &DiskSize) -> Result<(Connection, Option<String>), Problem> {
        let state = self.run.state;
        let disk = self.disk(wanted)?;
        let needs_tables = disk.format == DiskFormat::Qcow2 || disk.ephemeral;
        if disk.read_only {
            let detail =
                format!("The disk {} of the VM {} is read-only, and keeps its size.", disk.id, self.name());
            return Err(Problem::new(ProblemCode::DiskInvalid, detail));
        }
        if state != VmState::Running {
            let cure = if state.is_at_rest() { "use `qemu-img resize`" } else { "wait until it runs" };
            let detail = format!(
                "The VM {} is {state}, and only disks of running VMs can be enlarged: {cure}.",
                self.name()
            );
            return Err(Problem::new(ProblemCode::WrongState, detail));
        }
        let link = self.link.as_ref().ok_or_else(|| self.no_connection())?;
        let (connection, size) = (link.connection.clone(), wanted.size.bytes());
        // The process cannot raise the limit by itself. A raw file is as long as its disk; of an image only the vmm knows how much
        // longer it may get, at most by all of the new size.
        let allowed = self.grown.get(&wanted.disk).is_some_and(|largest| size <= *largest);
        let longest = |now: u64| {
            if !needs_tables {
                now.max(size)
            } else if allowed {
                now
            } else {
                now.saturating_add(size).saturating_add(qcow2_tables(size))
            }
        };
        let raised = self.process.as_ref().map_or(Ok(()), |process| allow_longer_files(process, longest));
        let limit = raised.err().map(|error| {
            format!(
                "The limit on the length of files of the VM {} cannot be raised ({error}): give the agent CAP_SYS_RESOURCE, \
                 or stop the VM and enlarge the disk's file.",
                self.name()
            )
        });
        match limit {
            // The guest's later writes would fail.
            Some(detail) if needs_tables => Err(Problem::new(ProblemCode::DiskInvalid, detail)),
            // A block device needs no such limit, and a raw file may be long enough.
            limit => {
                let largest = self.grown.entry(wanted.disk.clone()).or_default();
                *largest = size.max(*largest);
                Ok((connection, limit))
            }
        }
    }

    fn disk(&self, wanted: &DiskSize) -> Result<&DiskSpec, Problem> {
        let disks = &self.vm.value.spec.disks;
        disks.iter().find(|disk| disk.id == wanted.disk).ok_or_else(|| {
            let names = disks.iter().map(|disk| disk.id.as_str()).collect::<Vec<_>>().join(", ");
            let names = if names.is_empty() { "none" } else { &names };
            let detail = format!("The VM {} has no disk {}. Its disks: {names}.", self.name(), wanted.disk);
            Problem::new(ProblemCode::NotFound, detail)
        })
    }
}
