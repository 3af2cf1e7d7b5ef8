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

    /// Serde skips unknown members of some forms: words with a tag, such as `{"outcome": "done"}`, and maps of counters. The
    /// other objects of a vmm's messages have none.
    #[test]
    fn messages_of_a_vmm_have_no_unknown_members() {
        let mut refused = 0;
        let messages = [
            r#"{"type":"hello","version":3,"state":"running","boots":1}"#,
            r#"{"type":"refused","reason":"no"}"#,
            r#"{"type":"done","id":1,"result":{"Ok":{"outcome":"console_taken","taken":1}}}"#,
            r#"{"type":"done","id":1,"result":{"Ok":{"outcome":"taken_back","failed":[],"deferred":true}}}"#,
            r#"{"type":"done","id":1,"result":{"Err":{"code":"kvm","detail":"no"}}}"#,
            r#"{"type":"ask","id":1,"ask":{"ask":"mailbox","adapter":"a","question":{"seq":1,"request":"reset"}}}"#,
            r#"{"type":"report","seq":1,"report":{"report":"state","state":"running","boots":1}}"#,
            r#"{"type":"report","seq":1,"report":{"report":"ended","end":{"end":"failed","detail":"no"}}}"#,
            r#"{"type":"report","seq":1,"report":{"report":"device_lost","bdf":"0000:01:10.0","why":"failed"}}"#,
            r#"{"type":"report","seq":1,"report":{"report":"relay","adapter":"a","notice":{"notice":"guest_mac","mac":"02:00:00:00:00:01"}}}"#,
        ];
        let stats = crate::Stats {
            devices: [(
                "0000:01:10.0".to_owned(),
                crate::DeviceStats { relay: Some(Default::default()), ..Default::default() },
            )]
            .into(),
            disks: [("root".to_owned(), crate::DiskStats::default())].into(),
            ..crate::Stats::default()
        };
        let stats = ToAgent::Done { id: 1, result: Ok(crate::Outcome::Stats(Box::new(stats))) };
        let stats = serde_json::to_string(&stats).unwrap();
        for message in messages.into_iter().chain([stats.as_str()]) {
            let value: serde_json::Value = serde_json::from_str(message).unwrap();
            serde_json::from_value::<ToAgent>(value.clone())
                .unwrap_or_else(|error| panic!("{message}: {error}"));
            let mut places = Vec::new();
            objects(&value, "", &mut places);
            for place in places {
                // Maps, and the form of a result.
                if ["exits", "devices", "disks", "messages", "result"].iter().any(|map| place.ends_with(map))
                {
                    continue;
                }
                let mut odd = value.clone();
                odd.pointer_mut(&place).unwrap()["unknown"] = serde_json::json!([1]);
                let read = serde_json::from_value::<ToAgent>(odd.clone());
                assert!(read.is_err(), "{place}: {odd}");
                refused += 1;
            }
        }
        assert!(refused >= 20, "{refused}");
    }

    /// Every object of a message, by its JSON pointer.
    fn objects(value: &serde_json::Value, at: &str, all: &mut Vec<String>) {
        if let Some(members) = value.as_object() {
            all.push(at.to_owned());
            members.iter().for_each(|(name, value)| objects(value, &format!("{at}/{name}"), all));
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
