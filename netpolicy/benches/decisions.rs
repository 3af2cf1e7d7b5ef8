// SPDX-License-Identifier: Apache-2.0

//! Decisions per second with few and many ports, which must not differ much: `cargo bench -p netpolicy`.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

use divan::{Bencher, counter::ItemsCount};

use self::many_ports::Host;

#[path = "../tests/netpolicy/many_ports.rs"]
mod many_ports;

/// The last is 100 port groups.
const PORTS: [u32; 4] = [100, 1000, 3000, 10_000];

fn main() {
    divan::main();
}

fn bench(bencher: Bencher<'_, '_>, ports: u32, decide: fn(&mut Host)) {
    let mut host = Host::new(ports);
    bencher.counter(ItemsCount::new(1_u32)).bench_local(|| decide(&mut host));
}

#[divan::bench(args = PORTS, sample_size = 1000)]
fn refusals(bencher: Bencher<'_, '_>, ports: u32) {
    bench(bencher, ports, Host::refuse);
}

#[divan::bench(args = PORTS, sample_size = 1000)]
fn changes(bencher: Bencher<'_, '_>, ports: u32) {
    bench(bencher, ports, Host::change);
}
