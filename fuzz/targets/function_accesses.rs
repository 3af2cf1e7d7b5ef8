// SPDX-License-Identifier: Apache-2.0

//! What a guest can do to an assigned function: configuration space and BARs.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| passthrough::function::fuzz::fuzz_accesses(data));
