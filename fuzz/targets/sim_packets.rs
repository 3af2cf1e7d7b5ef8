// SPDX-License-Identifier: Apache-2.0

//! Packets between the simulated adapter's VFs and its PF.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| passthrough::sim::fuzz::fuzz_packet(data));
