// SPDX-License-Identifier: Apache-2.0

//! The body of a fuzz target: it takes any bytes and asserts only laws. A property test runs it, too.
#![allow(clippy::panic, reason = "a broken law is to end the fuzzer")]

use std::fmt::Debug;

use serde::{Serialize, de::DeserializeOwned};

use super::{FRAME_MAX, ToAgent, ToVmm};

/// Takes a packet from either side: a message that parses must mean the same after it is written and read again.
pub fn fuzz_packet(data: &[u8]) {
    let data = data.get(..data.len().min(FRAME_MAX)).unwrap_or_default();
    again::<ToAgent>(data);
    again::<ToVmm>(data);
}

fn again<T: Serialize + DeserializeOwned + PartialEq + Debug>(data: &[u8]) {
    let Ok(message) = serde_json::from_slice::<T>(data) else { return };
    let written = serde_json::to_vec(&message).unwrap_or_else(|error| panic!("{message:?}: {error}"));
    let read = serde_json::from_slice::<T>(&written);
    let read = read.unwrap_or_else(|error| panic!("{message:?}: {error}"));
    assert_eq!(read, message);
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use proptest::prelude::*;

    use super::*;

    /// The fuzzer's first inputs: messages of this version of the protocol.
    fn seeds() -> Vec<(String, Vec<u8>)> {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds/control");
        let seed = |entry: std::io::Result<fs::DirEntry>| {
            let entry = entry.unwrap();
            (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap())
        };
        fs::read_dir(dir).unwrap().map(seed).collect()
    }

    #[test]
    fn the_seeds_are_messages() {
        let seeds = seeds();
        assert!(seeds.len() >= 9);
        for (name, seed) in seeds {
            let (agent, vmm) =
                (serde_json::from_slice::<ToAgent>(&seed), serde_json::from_slice::<ToVmm>(&seed));
            assert!(agent.is_ok() != vmm.is_ok(), "{name}: {agent:?} {vmm:?}");
            fuzz_packet(&seed);
        }
    }

    proptest! {
        #[test]
        fn whatever_arrives_is_a_message_or_nothing(pick: prop::sample::Index, at: prop::sample::Index, byte: u8, cut: bool) {
            let seeds = seeds();
            let mut data = pick.get(&seeds).1.clone();
            let at = at.index(data.len());
            data[at] = byte;
            if cut {
                data.truncate(at);
            }
            fuzz_packet(&data);
        }
    }
}
