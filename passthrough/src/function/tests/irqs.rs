// SPDX-License-Identifier: Apache-2.0

//! A guest that turns its interrupts on and off without end.

use std::time::{Duration, Instant};

use super::*;

const ON: u32 = 0x8000;
const OFF: u32 = 0;
const ENABLED: Call = Call::Enable(IrqKind::Msix, VECTORS as usize);
const DISABLED: Call = Call::Disable(IrqKind::Msix);

/// The changes of interrupts since the last time.
fn changes(f: &Fixture) -> Vec<Call> {
    let is_change = |call: &Call| matches!(call, Call::Enable(..) | Call::Disable(_));
    f.hardware.take_calls().into_iter().filter(is_change).collect()
}

fn toggle(f: &Fixture, times: usize, last: u32) {
    for _ in 0..times {
        f.write(0x72, 2, ON);
        f.write(0x72, 2, OFF);
    }
    f.write(0x72, 2, last);
}

#[test]
fn changes_of_interrupts_have_a_rate_and_the_last_one_is_made() {
    for (last, expect) in [(ON, ENABLED), (OFF, DISABLED)] {
        let f = fixture();
        f.enable_memory();
        f.program(0, 40);
        let begun = Instant::now();
        toggle(&f, 5000, last);
        assert_eq!(f.read(0x72, 2), last | 2, "the guest sees its own word at once");
        let mut made = changes(&f);
        loop {
            std::thread::sleep(Duration::from_millis(300));
            let more = changes(&f);
            if more.is_empty() && made.last() == Some(&expect) {
                break;
            }
            made.extend(more);
            assert!(begun.elapsed() < Duration::from_secs(20), "{last:x}: {:?}", made.last());
        }
        let most = 64 + begun.elapsed().as_millis() / 125 + 2;
        // A change of a set that is on is two calls at most.
        assert!(made.len() as u128 <= 2 * most, "{} of {most}", made.len());
        // Later the guest has its changes at once again.
        f.write(0x72, 2, ON ^ last);
        assert_eq!(changes(&f).len(), 1);
    }
}

#[test]
fn a_reset_forgets_a_change_that_waits() {
    let f = fixture();
    f.enable_memory();
    toggle(&f, 100, ON);
    f.function.reset_and_wait(Duration::from_secs(20)).unwrap();
    changes(&f);
    std::thread::sleep(Duration::from_millis(400));
    assert_eq!(changes(&f), []);
    assert_eq!(f.read(0x72, 2), OFF | 2);
    // The next one is made.
    f.write(0x72, 2, ON);
    assert_eq!(changes(&f), [ENABLED]);
}
