// SPDX-License-Identifier: Apache-2.0

//! The body of a fuzz target: takes any bytes and only asserts laws. A property test runs it, too.
#![allow(clippy::panic, reason = "a broken law is to end the fuzzer")]

use std::fmt::Debug;

use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use super::{MAX_VM_BODY, merge::merged};
use crate::types::{DecisionFilter, PfSpec, PortGroupSpec, PortSpec, SwitchSpec, VfCount, VmSpec};

/// Reads a request's body as a handler does; the first byte selects the type. An accepted body means the same when it is
/// written and read again, and a checked specification is within its bounds.
pub fn fuzz_body(data: &[u8]) {
    let Some((kind, body)) = data.split_first() else { return };
    let body = body.get(..body.len().min(MAX_VM_BODY)).unwrap_or_default();
    match kind % 8 {
        0 => check_vm(body),
        1 => _ = again::<SwitchSpec>(body),
        2 => _ = again::<PortGroupSpec>(body),
        3 => _ = again::<PortSpec>(body),
        4 => _ = (again::<VfCount>(body), again::<PfSpec>(body)),
        5 => {
            let pairs = form_urlencoded::parse(body);
            let deserializer = serde_urlencoded::Deserializer::new(pairs);
            let Ok(filter) = serde_path_to_error::deserialize::<_, DecisionFilter>(deserializer) else {
                return;
            };
            let written = serde_urlencoded::to_string(&filter).unwrap_or_else(|error| panic!("{error}"));
            let read = serde_urlencoded::from_str::<DecisionFilter>(&written);
            assert_eq!(read.ok().as_ref(), Some(&filter), "{written}");
        }
        _ => {
            let Ok(patch) = serde_json::from_slice::<Value>(body) else { return };
            patch_of(&SwitchSpec::default(), &patch);
            patch_of(&PortSpec::default(), &patch);
        }
    }
}

fn again<T: Serialize + DeserializeOwned + PartialEq + Debug>(body: &[u8]) -> Option<T> {
    let mut json = serde_json::Deserializer::from_slice(body);
    let value: T = serde_path_to_error::deserialize(&mut json).ok()?;
    let written = serde_json::to_vec(&value).unwrap_or_else(|error| panic!("{value:?}: {error}"));
    let read = serde_json::from_slice::<T>(&written);
    let read = read.unwrap_or_else(|error| panic!("{value:?}: {error}"));
    assert_eq!(read, value);
    Some(value)
}

fn check_vm(body: &[u8]) {
    let Some(spec) = again::<VmSpec>(body) else { return };
    if spec.check().is_err() {
        return;
    }
    // The agent relies on these bounds without further checks.
    assert!((1..=254).contains(&spec.cpus), "{}", spec.cpus);
    assert!(spec.memory.bytes() > 0 && spec.memory.bytes() % (2 << 20) == 0, "{:?}", spec.memory);
    assert!(spec.functions() <= 16);
    let ports: Vec<_> = spec.ports().collect();
    for (n, port) in ports.iter().enumerate() {
        let same = |other: &crate::types::WantedPort<'_>| {
            other.id == port.id || (port.mac.is_some() && other.mac == port.mac)
        };
        assert!(!ports.iter().skip(n + 1).any(same), "{spec:?}");
    }
    for (n, adapter) in spec.adapters.iter().enumerate() {
        let same = |other: &crate::types::AdapterSpec| {
            other.id == adapter.id
                || (adapter.mac.is_some() && other.mac == adapter.mac)
                || (adapter.vf.is_some() && other.vf == adapter.vf)
        };
        assert!(!spec.adapters.iter().skip(n + 1).any(same), "{spec:?}");
    }
    let initramfs = spec.boot.initramfs.iter().flat_map(|initramfs| initramfs.paths());
    // Either a file or a disk of the VM, which brings its own initramfs.
    assert!(spec.boot.kernel.is_some() != spec.boot.disk.is_some(), "{:?}", spec.boot);
    if let Some(id) = &spec.boot.disk {
        assert!(spec.disks.iter().any(|disk| disk.id == *id) && spec.boot.initramfs.is_none(), "{spec:?}");
    }
    for path in spec.boot.kernel.iter().chain(initramfs) {
        assert!(!path.is_empty() && !path.contains('\0') && path.len() < 4096, "{path:?}");
    }
    assert!(!spec.boot.cmdline.bytes().any(|byte| byte == 0), "{:?}", spec.boot.cmdline);
}

/// A patch is applied as a whole, and is idempotent.
fn patch_of<T: Serialize + DeserializeOwned + PartialEq + Debug>(spec: &T, patch: &Value) {
    let Ok(once) = merged(spec, patch) else { return };
    assert_eq!(merged(&once, patch).ok().as_ref(), Some(&once), "{patch}");
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Bodies that handlers accept.
    fn seeds() -> Vec<(String, Vec<u8>)> {
        let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds/rest_bodies");
        let seed = |entry: std::io::Result<std::fs::DirEntry>| {
            let path = entry.unwrap().path();
            (path.display().to_string(), std::fs::read(path).unwrap())
        };
        std::fs::read_dir(dir).unwrap().map(seed).collect()
    }

    #[test]
    fn the_seeds_are_bodies() {
        let seeds = seeds();
        assert!(seeds.len() >= 7);
        for (name, seed) in seeds {
            fuzz_body(&seed);
            let body = &seed[1..];
            let taken = match seed[0] {
                0 => again::<VmSpec>(body).is_some_and(|spec| spec.check().is_ok()),
                1 => again::<SwitchSpec>(body).is_some(),
                2 => again::<PortGroupSpec>(body).is_some(),
                3 => again::<PortSpec>(body).is_some(),
                _ => true,
            };
            assert!(taken, "{name}");
        }
    }

    proptest! {
        #[test]
        fn whatever_arrives_is_a_body_or_nothing(
            pick: prop::sample::Index,
            at: prop::sample::Index,
            bytes in prop::collection::vec(any::<u8>(), 0..4),
            cut: bool,
        ) {
            let mut data = pick.get(&seeds()).1.clone();
            let at = at.index(data.len());
            let end = if cut { data.len() } else { (at + bytes.len()).min(data.len()) };
            data.splice(at..end, bytes);
            fuzz_body(&data);
        }
    }
}
