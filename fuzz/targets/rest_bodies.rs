// SPDX-License-Identifier: Apache-2.0

//! What a client of the API can send.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| api::router::fuzz::fuzz_body(data));
