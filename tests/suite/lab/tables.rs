// SPDX-License-Identifier: Apache-2.0

//! Runs `tests/hardware` on the lab's adapter: its PF driver and the relay must answer as the tables say.

use std::{fs, path::Path, process::Command};

use crate::fixture::host;

/// The PF as users of the hardware tier have it: down and without VFs. Dropping it restores the PF.
struct Unused {
    vfs: usize,
}

impl Unused {
    fn new() -> Self {
        let vfs = host::vf_count();
        Self::set_vfs(0);
        host::run("ip", &["link", "set", host::PF, "down"]);
        Self { vfs }
    }

    fn set_vfs(count: usize) {
        fs::write(format!("/sys/class/net/{}/device/sriov_numvfs", host::PF), count.to_string()).unwrap();
    }
}

impl Drop for Unused {
    fn drop(&mut self) {
        Self::set_vfs(self.vfs);
        host::run("ip", &["link", "set", host::PF, "up"]);
        host::wait_for_carrier();
    }
}

/// Runs the script; returns its status and all of its output.
fn hardware() -> (Option<i32>, String) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let suite = std::env::current_exe().unwrap();
    let output = Command::new(root.join("hardware")).arg(host::PF).arg(suite).output().unwrap();
    let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    (output.status.code(), text.concat())
}

#[test]
fn igb_and_the_relay_in_front_of_it_answer_as_the_tables_say() {
    let (status, text) = hardware();
    assert_eq!(status, Some(2), "a PF that is up may be in use: {text}");
    assert!(text.contains("eth0 is up"), "{text}");

    let unused = Unused::new();
    let (status, text) = hardware();
    assert_eq!(status, Some(0), "{text}");
    assert!(text.contains("1 passed"), "{text}");
    assert_eq!(host::vf_count(), 0, "it leaves no VF");
    drop(unused);
}
