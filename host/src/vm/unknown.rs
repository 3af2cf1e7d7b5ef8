// SPDX-License-Identifier: Apache-2.0

//! Processes of VMs that run and that the database does not have: it was replaced by an older copy,
//! or removed.
//!
//! Such a VM runs on unmanaged, with its VFs. No other VM gets these: VFIO reports an open group, a
//! simulated PF an attached VF.

use std::{collections::BTreeSet, fs, path::Path};

use protocol::Channel;
use services::vmm_process::VmDirectory;
use uuid::Uuid;

/// The most lines in the log.
const LINES: usize = 32;

/// The VMs in the run directory with a listening process that are not `known` to run.
fn unknown(run_dir: &Path, known: &BTreeSet<Uuid>) -> Vec<Uuid> {
    let entries = fs::read_dir(run_dir.join("vms")).into_iter().flatten().flatten();
    let ids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<Uuid>().ok());
    let listens = |vm: &Uuid| Channel::connect(&VmDirectory::new(run_dir, *vm).control()).is_ok();
    ids.filter(|vm| !known.contains(vm)).filter(listens).collect()
}

/// Names these VMs in the log.
pub fn tell(run_dir: &Path, known: &BTreeSet<Uuid>) {
    let unknown = unknown(run_dir, known);
    for vm in unknown.iter().take(LINES) {
        let directory = run_dir.join("vms").join(vm.to_string());
        tracing::error!(
            vm_id = %vm,
            directory = %directory.display(),
            "a VM runs that the database does not have, or does not have as running: it keeps its VFs, and \
             no agent manages it. Start the agent with the database that has it, or end its process: pkill \
             -KILL -f {vm}"
        );
    }
    if unknown.len() > LINES {
        tracing::error!(more = unknown.len() - LINES, "more VMs run that the database does not have");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_listens_and_is_not_known_is_found() {
        let run = tempfile::tempdir().unwrap();
        let [known, lives, ended, empty] = [1, 2, 3, 4].map(Uuid::from_u128);
        let listeners = [known, lives, ended].map(|vm| {
            let directory = VmDirectory::new(run.path(), vm);
            directory.create().unwrap();
            directory.bind().unwrap()
        });
        VmDirectory::new(run.path(), empty).create().unwrap();
        fs::write(run.path().join("vms/notes"), "").unwrap();
        let [of_known, of_living, of_ended] = listeners;
        drop(of_ended);
        assert_eq!(unknown(run.path(), &[known].into()), [lives]);
        drop((of_known, of_living));
        assert_eq!(unknown(&run.path().join("absent"), &BTreeSet::new()), [] as [Uuid; 0]);
    }
}
