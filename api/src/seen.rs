// SPDX-License-Identifier: Apache-2.0

//! Codes that agents have returned to tests (feature `test-support`): `tests/run` checks by them that a
//! test has met each code of `docs/errors.md`.

use std::{
    collections::BTreeSet,
    env, fs,
    io::Write,
    path::Path,
    sync::{Mutex, PoisonError},
    thread,
};

use crate::{
    Problem,
    types::{Cause, Vm},
};

/// Names the directory with a file for each code. A file has a line for each test that received the code.
const DIRECTORY: &str = "PORTCULLIS_SEEN_CODES";

/// Notes a problem in an agent's response.
pub fn problem(problem: &Problem) {
    note(&format!("problem.{}", problem.code));
}

/// Notes the causes in a VM's status.
pub fn causes(vm: &Vm) {
    let status = &vm.status;
    let ports = status.nics.iter().filter_map(|nic| nic.port.as_ref());
    let adapters = status.adapters.iter().chain(ports).filter_map(|adapter| adapter.lost.as_ref());
    let devices = status.devices.iter().filter_map(|device| device.lost.as_ref());
    status.cause.iter().chain(adapters).chain(devices).for_each(|Cause { code, .. }| {
        note(&format!("cause.{}", code.as_str()));
    });
}

/// Writes a line. A line that cannot be written is missing, and `tests/run` reports that.
fn note(name: &str) {
    static WRITTEN: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let Some(directory) = env::var_os(DIRECTORY) else { return };
    // The test's name.
    let line = format!("{}\n", thread::current().name().unwrap_or_default());
    if !WRITTEN.lock().unwrap_or_else(PoisonError::into_inner).insert(format!("{name} {line}")) {
        return;
    }
    let file = fs::File::options().create(true).append(true).open(Path::new(&directory).join(name));
    drop(file.and_then(|mut file| file.write_all(line.as_bytes())));
}
