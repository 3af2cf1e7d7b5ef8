// SPDX-License-Identifier: Apache-2.0

//! What agents have answered to tests (feature `test-support`): `tests/run` sees by it that each code of
//! `docs/errors.md` was really answered.

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

/// Names the directory that has a file for each code, with a line for each test that was answered with it.
const DIRECTORY: &str = "PORTCULLIS_SEEN_CODES";

/// Notes a problem that an agent has answered with.
pub fn problem(problem: &Problem) {
    note(&format!("problem.{}", problem.code));
}

/// Notes the causes that a VM's status tells.
pub fn causes(vm: &Vm) {
    let status = &vm.status;
    let adapters = status.adapters.iter().filter_map(|adapter| adapter.lost.as_ref());
    let devices = status.devices.iter().filter_map(|device| device.lost.as_ref());
    status.cause.iter().chain(adapters).chain(devices).for_each(|Cause { code, .. }| {
        note(&format!("cause.{}", code.as_str()));
    });
}

/// What cannot be written is missing, and `tests/run` says so.
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
