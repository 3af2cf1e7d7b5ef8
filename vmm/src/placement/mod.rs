// SPDX-License-Identifier: Apache-2.0

//! The place of a machine on its host: the CPUs of its threads, and the NUMA node and pages of guest memory.
//!
//! A thread inherits the CPUs of the thread that starts it. So the event loop's thread moves to the CPUs of each thread
//! before it starts that thread, and stays on those of the other threads in the end. The kernel's refusal is then an
//! error of the build, and no thread needs the system call in its filter.

mod affinity;
mod node;
mod populate;

use std::{collections::BTreeMap, fmt, io};

use protocol::{CpuRange, PlacementSpec};

use self::affinity::CpuMask;
pub(crate) use self::{node::bind, populate::{PopulateError, populate}};

/// Errors of a machine's place.
#[derive(Debug, thiserror::Error)]
pub enum PlacementError {
    /// The kernel refuses these CPUs to a thread.
    #[error(
        "The host's kernel refuses the CPUs {0} to a thread of the VM: name CPUs that are online and in the cpuset of the \
         VM's process"
    )]
    Refused(String, #[source] io::Error),
    /// The kernel lets a thread use only a part of its CPUs.
    #[error(
        "A thread of the VM cannot run on all of the CPUs {wanted}, only on {got}: name CPUs that are online and in the \
         cpuset of the VM's process"
    )]
    Partly {
        /// The CPUs of the specification.
        wanted: String,
        /// Those that the kernel allows.
        got: String,
    },
    /// The CPUs of the process cannot be read.
    #[error("Cannot read the CPUs of the VM's process")]
    Unreadable(#[source] io::Error),
}

/// The CPUs of a machine's threads.
#[derive(Debug)]
pub struct Pinning {
    vcpus: BTreeMap<u8, CpuMask>,
    /// The CPUs of vCPUs that have none of their own: those of the process at its start.
    free: CpuMask,
    /// The CPUs of all other threads.
    others: CpuMask,
}

impl Pinning {
    /// Moves the calling thread, and the threads that it starts, to the CPUs of `place` for threads that are no vCPU's.
    /// None if the specification names no CPU: no system call is made then.
    ///
    /// # Errors
    /// [`PlacementError`].
    pub fn begin(place: &PlacementSpec) -> Result<Option<Self>, PlacementError> {
        if place.cpus.is_empty() && place.io_cpus.is_empty() {
            return Ok(None);
        }
        let free = CpuMask::current().map_err(PlacementError::Unreadable)?;
        let mask = |ranges: &[CpuRange]| if ranges.is_empty() { free.clone() } else { CpuMask::of(ranges) };
        let vcpus = place.cpus.iter().map(|(vcpu, cpus)| (*vcpu, mask(cpus))).collect();
        let pinning = Self { vcpus, others: mask(&place.io_cpus), free: free.clone() };
        pinning.for_others()?;
        Ok(Some(pinning))
    }

    /// Moves the calling thread to the CPUs of a vCPU, whose thread it starts next.
    ///
    /// # Errors
    /// [`PlacementError`].
    pub fn for_vcpu(&self, index: u8) -> Result<(), PlacementError> {
        go_to(self.vcpus.get(&index).unwrap_or(&self.free))
    }

    /// Does work for which a single CPU would be slow, on the CPUs of all threads of the machine.
    ///
    /// # Errors
    /// [`PlacementError`], or those of the work.
    pub fn on_all_cpus<E: From<PlacementError>>(
        &self,
        work: impl FnOnce() -> Result<(), E>,
    ) -> Result<(), E> {
        go_to(&self.vcpus.values().fold(self.others.clone(), |all, cpus| all.with(cpus)))?;
        work()?;
        Ok(self.for_others()?)
    }

    /// Moves the calling thread to the CPUs of all threads but those of vCPUs.
    ///
    /// # Errors
    /// [`PlacementError`].
    pub fn for_others(&self) -> Result<(), PlacementError> {
        go_to(&self.others)
    }
}

/// Moves the calling thread to exactly these CPUs. The kernel leaves out those that the process's cpuset lacks.
fn go_to(wanted: &CpuMask) -> Result<(), PlacementError> {
    wanted.enter().map_err(|source| PlacementError::Refused(wanted.to_string(), source))?;
    let got = CpuMask::current().map_err(PlacementError::Unreadable)?;
    if got == *wanted {
        return Ok(());
    }
    Err(PlacementError::Partly { wanted: wanted.to_string(), got: got.to_string() })
}

impl fmt::Display for CpuMask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut comma = "";
        for (first, last) in self.ranges() {
            match first == last {
                true => write!(f, "{comma}{first}")?,
                false => write!(f, "{comma}{first}-{last}")?,
            }
            comma = ",";
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
