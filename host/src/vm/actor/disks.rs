// SPDX-License-Identifier: Apache-2.0

//! The size of disks of a running VM.

use std::time::Duration;

use api::types::{DiskFormat, DiskSize, DiskSpec, VmState};
use services::vmm_process::allow_longer_files;

use super::{Actor, Caller, Done, Problem, ProblemCode, ToProblem as _, VmmCommand};

/// The longest time of a growth: parts of a backing file may have to be hidden, cluster by cluster.
const GROWTH: Duration = Duration::from_secs(300);

/// The part of a qcow2 image's size by which its file is longer, at most, with clusters of 4 KiB or more.
const TABLES: u64 = 32;

impl Actor {
    /// Enlarges a disk. The VM's task goes on meanwhile.
    pub(super) fn resize_disk(&self, caller: &Caller, wanted: DiskSize, done: Done) {
        let (connection, command) = match self.growth(&wanted) {
            Ok(growth) => growth,
            Err(problem) => return drop(done.send(Err(problem))),
        };
        tracing::info!(vm = %self.name(), disk = %wanted.disk, size = %wanted.size, by = %caller, "a disk is enlarged");
        tokio::spawn(async move {
            let result = connection.command(command, Vec::new(), GROWTH).await;
            drop(done.send(result.map(drop).map_err(|error| error.problem())));
        });
    }

    fn growth(&self, wanted: &DiskSize) -> Result<(super::Connection, VmmCommand), Problem> {
        let (name, state) = (self.name(), self.run.state);
        let disk = self.disk(wanted)?;
        if disk.read_only {
            let detail = format!("The disk {} of the VM {name} is read-only, and keeps its size.", disk.id);
            return Err(Problem::new(ProblemCode::DiskInvalid, detail));
        }
        if state != VmState::Running {
            let cure = if state.is_at_rest() { "use `qemu-img resize`" } else { "wait until it runs" };
            let detail =
                format!("The VM {name} is {state}, and disks of running VMs alone can be enlarged: {cure}.");
            return Err(Problem::new(ProblemCode::WrongState, detail));
        }
        let link = self.link.as_ref().ok_or_else(|| self.no_connection())?;
        let size = wanted.size.bytes();
        // The process cannot raise the limit by itself. A raw file is as long as its disk.
        let tables = if disk.format == DiskFormat::Raw && !disk.ephemeral { 0 } else { size / TABLES };
        let raised = self
            .process
            .as_ref()
            .map_or(Ok(()), |process| allow_longer_files(process, size.saturating_add(tables)));
        raised.map_err(|error| {
            let detail = format!(
                "The limit on the length of files of the VM {name} cannot be raised ({error}): give the agent \
                 CAP_SYS_RESOURCE, or stop the VM and enlarge the disk's file."
            );
            Problem::new(ProblemCode::DiskInvalid, detail)
        })?;
        let command = VmmCommand::GrowDisk { disk: wanted.disk.to_string(), size };
        Ok((link.connection.clone(), command))
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
