// SPDX-License-Identifier: Apache-2.0

//! The simulated PF: any messages and frames of its VFs.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| passthrough::sim::fuzz::fuzz_pf(data));
