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
pub(crate) use self::{
    node::bind,
    populate::{PopulateError, populate},
};

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
    /// The CPUs of all vCPUs, by their numbers.
    vcpus: Vec<CpuMask>,
    /// The CPUs of all other threads.
    others: CpuMask,
}

impl Pinning {
    /// Moves the calling thread, and the threads that it starts, to the CPUs of `place` for threads that are no vCPU's.
    /// The machine has `vcpus` vCPUs. None if the specification names no CPU: no system call is made then.
    ///
    /// # Errors
    /// [`PlacementError`].
    pub fn begin(place: &PlacementSpec, vcpus: u8) -> Result<Option<Self>, PlacementError> {
        if place.cpus.is_empty() && place.io_cpus.is_empty() {
            return Ok(None);
        }
        let free = free()?;
        let mask = |ranges: &[CpuRange]| if ranges.is_empty() { free.clone() } else { CpuMask::of(ranges) };
        let named: BTreeMap<u8, &[CpuRange]> =
            place.cpus.iter().map(|(vcpu, cpus)| (*vcpu, cpus.as_slice())).collect();
        let vcpus = (0..vcpus).map(|vcpu| mask(named.get(&vcpu).copied().unwrap_or_default())).collect();
        let pinning = Self { vcpus, others: mask(&place.io_cpus) };
        pinning.for_others()?;
        Ok(Some(pinning))
    }

    /// Moves the calling thread to the CPUs of a vCPU, whose thread it starts next.
    ///
    /// # Errors
    /// [`PlacementError`].
    pub fn for_vcpu(&self, index: u8) -> Result<(), PlacementError> {
        go_to(self.vcpus.get(usize::from(index)).unwrap_or(&self.others))
    }

    /// Does work for which a single CPU would be slow, on the CPUs of all threads of the machine.
    ///
    /// # Errors
    /// [`PlacementError`], or those of the work.
    pub fn on_all_cpus<E: From<PlacementError>>(
        &self,
        work: impl FnOnce() -> Result<(), E>,
    ) -> Result<(), E> {
        go_to(&self.vcpus.iter().fold(self.others.clone(), |all, cpus| all.with(cpus)))?;
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

/// The CPUs of a thread that has none of its own. If the calling thread may use each CPU of its cpuset, these are all
/// CPUs, so that CPUs count that the host gets later. Otherwise something has limited the process, such as `isolcpus` or
/// taskset(1), and these are its CPUs now: the scheduler leaves a thread on an isolated CPU that it may use.
///
/// # Errors
/// [`PlacementError`].
fn free() -> Result<CpuMask, PlacementError> {
    let now = CpuMask::current().map_err(PlacementError::Unreadable)?;
    go_to(&CpuMask::ALL)?;
    let most = CpuMask::current().map_err(PlacementError::Unreadable)?;
    Ok(if now == most { CpuMask::ALL } else { now })
}

/// Moves the calling thread to exactly these CPUs, or to all that the kernel allows for [`CpuMask::ALL`]. The kernel
/// leaves out those that the process's cpuset lacks.
fn go_to(wanted: &CpuMask) -> Result<(), PlacementError> {
    wanted.enter().map_err(|source| PlacementError::Refused(wanted.to_string(), source))?;
    let got = CpuMask::current().map_err(PlacementError::Unreadable)?;
    if got == *wanted || *wanted == CpuMask::ALL {
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
