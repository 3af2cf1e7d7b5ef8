// SPDX-License-Identifier: Apache-2.0

//! The capability lists of an assigned function, as hardware may have them.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| passthrough::function::fuzz::fuzz_capabilities(data));
