// SPDX-License-Identifier: Apache-2.0

//! What a vmm that its guest has taken over can send to the agent, and the other way.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmm::control::fuzz::fuzz_packet(data));
