// SPDX-License-Identifier: Apache-2.0

use std::{
    io,
    time::{Duration, Instant},
};

use devices::pci::config;

use super::*;
use crate::function::ResetError;

const LONG: Duration = Duration::from_secs(20);

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + LONG;
    while !done() {
        assert!(Instant::now() < end, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_guests_reset_does_not_hold_up_the_vcpu() {
    let f = with(Duration::from_millis(200));
    f.enable_memory();
    f.program(0, 40);
    f.write(0x72, 2, 0x8000);
    f.hardware.take_calls();
    let start = Instant::now();
    f.write(0xa8, 2, 0x8010);
    assert!(f.all_ones(), "at once");
    assert_eq!(f.mmio(BAR0 + 0x1000, 4), Some(vec![0xff; 4]));
    assert_eq!(f.mmio(BAR0 + 0x800, 4), Some(vec![0xff; 4]), "handlers are not asked");
    assert_eq!(f.mmio(BAR3, 4), Some(vec![0xff; 4]));
    f.write(config::COMMAND, 2, 2);
    f.write(0xa8, 2, 0x8000);
    assert!(start.elapsed() < Duration::from_millis(150), "the vCPU waited");
    wait_until("the end of the reset", || !f.all_ones());
    assert!(start.elapsed() >= Duration::from_millis(200));
    assert_eq!(
        f.hardware.take_calls(),
        [
            Call::Config(0xa8, vec![0x10, 0]),
            Call::Disable(IrqKind::Msix),
            Call::Config(4, vec![0, 0]),
            Call::Reset(0)
        ],
        "one reset; windows, interrupts and DMA are gone before it"
    );
    assert_eq!(
        [f.read(4, 2), f.read(0x10, 4), f.read(0x72, 2)],
        [0, 4, 2],
        "registers are at their reset values"
    );
    assert_eq!(f.router.connected(), [0u32; 0]);
    assert_eq!(f.page.0.lock().unwrap()[..], ["before reset", "after reset"]);
    f.write(0x10, 4, 0xc000_0000);
    f.write(4, 2, 2);
    assert_eq!(f.mapper.windows().len(), 1, "BAR 0 is back");
    assert_eq!(f.mmio(BAR3, 4), None);
}

#[test]
fn the_machines_reset_comes_back_to_the_assigned_addresses() {
    let f = fixture();
    f.enable_memory();
    f.write(0x10, 4, 0xd000_0000);
    f.program(0, 40);
    f.write(0x72, 2, 0x8000);
    f.function.reset_and_wait(LONG).unwrap();
    assert_eq!([f.read(4, 2), f.read(0x10, 4), f.read(0x20, 4), f.read(0x72, 2)], [0, 0xc000_0004, 0x40, 2]);
    assert_eq!(f.mapper.windows(), []);
    f.enable_memory();
    assert_eq!(f.mapper.windows(), expected(BAR0, BAR3));
    assert_eq!(f.mmio(BAR3 + 12, 4), Some(vec![1, 0, 0, 0]), "masked");
    assert_eq!(f.function.stats().resets, 1);
}

#[test]
fn a_machines_reset_follows_a_guests_one_and_has_a_limit() {
    let f = with(Duration::from_millis(100));
    f.function.request_reset();
    assert!(matches!(f.function.reset_and_wait(Duration::from_millis(20)), Err(ResetError::Timeout(_))));
    f.function.reset_and_wait(LONG).unwrap();
    assert_eq!(f.read(0x10, 4), 0xc000_0004);
    assert_eq!(f.function.stats().resets, 3);
}

#[test]
fn a_failed_reset_leaves_the_function_closed_until_one_succeeds() {
    let f = fixture();
    f.enable_memory();
    *f.hardware.refuse_reset.lock().unwrap() = Some(io::ErrorKind::Unsupported);
    assert!(matches!(f.function.reset_and_wait(LONG), Err(ResetError::Failed(_))));
    assert!(f.all_ones());
    assert_eq!(f.mapper.windows(), []);
    *f.hardware.refuse_reset.lock().unwrap() = None;
    f.function.reset_and_wait(LONG).unwrap();
    assert_eq!(f.read(0x10, 4), 0xc000_0004);
}

#[test]
fn guests_that_reset_in_a_loop_are_slowed_down_but_not_the_machine() {
    let f = fixture();
    for _ in 0..8 {
        f.function.request_reset();
        wait_until("a reset", || !f.all_ones());
    }
    f.function.request_reset();
    std::thread::sleep(Duration::from_millis(300));
    assert!(f.all_ones(), "the ninth in a row waits");
    let start = Instant::now();
    f.function.reset_and_wait(LONG).unwrap();
    assert!(start.elapsed() < Duration::from_secs(2));
    assert!(!f.all_ones());
}

#[test]
fn a_lost_function_reads_all_ones_and_lets_go_of_everything() {
    let f = fixture();
    f.enable_memory();
    f.program(0, 40);
    f.write(0x72, 2, 0x8000);
    let access = f.function.access();
    f.function.lose();
    assert!(f.all_ones() && f.function.is_lost());
    assert_eq!(f.mapper.windows(), []);
    assert_eq!(f.router.connected(), [0u32; 0]);
    wait_until("letting go of the hardware", || Arc::strong_count(&f.hardware) == 1);
    f.enable_memory();
    assert_eq!(f.mapper.windows(), []);
    assert!(matches!(f.function.reset_and_wait(LONG), Err(ResetError::Gone)));
    assert!(access.is_closed());
    f.function.shutdown();
    f.function.lose();
}

#[test]
fn a_function_lost_during_a_reset_stays_lost() {
    let f = with(Duration::from_millis(100));
    f.enable_memory();
    f.function.request_reset();
    f.function.lose();
    f.function.shutdown();
    assert!(f.all_ones());
    assert_eq!(Arc::strong_count(&f.hardware), 1);
    assert_eq!(f.mapper.windows(), []);
}

#[test]
fn dropping_a_function_gives_routes_and_windows_back() {
    let f = fixture();
    f.enable_memory();
    f.program(0, 40);
    f.write(0x72, 2, 0x8000);
    let Fixture { function, mapper, router, hardware, .. } = f;
    drop(function);
    assert_eq!(mapper.windows(), []);
    assert!(router.routes.lock().unwrap().is_empty());
    assert_eq!(Arc::strong_count(&hardware), 1);
}
