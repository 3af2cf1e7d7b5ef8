// SPDX-License-Identifier: Apache-2.0

use proptest::prelude::*;

use super::*;

#[derive(Debug, Clone)]
enum Step {
    Config(u16, usize, u32),
    Mmio(u64, usize, u32),
}

fn step() -> impl Strategy<Value = Step> {
    // Effective registers are written more often than others, BARs with addresses close to each other.
    let offset = prop_oneof![
        3 => Just(4u16), 6 => 0x10u16..0x28, 1 => 0u16..0x100, 2 => 0x50u16..0x80, 1 => Just(0x44u16), 1 => 0u16..4096
    ];
    let value = prop_oneof![
        (0u32..0x20).prop_map(|page| 0xc000_0000 + page * 0x1000),
        Just(0x40),
        Just(0),
        Just(2),
        Just(0x8000_0000),
        any::<u32>()
    ];
    let gpa = prop_oneof![BAR0..BAR0 + 0x2_0000, BAR3..BAR3 + 0x5000, any::<u64>()];
    let config = (offset, 0usize..3, value.clone()).prop_map(|(offset, size, value)| {
        // A guest's reset would make the rest of the sequence depend on time.
        let value = if (0xa8..0xac).contains(&(offset & !3)) { 0 } else { value };
        Step::Config(offset & !((1 << size) - 1), 1 << size, value)
    });
    let mmio = (gpa, 0usize..4, value).prop_map(|(gpa, size, value)| Step::Mmio(gpa, 1 << size, value));
    prop_oneof![3 => config, 1 => mmio]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn no_sequence_shows_what_must_stay_hidden(steps in prop::collection::vec(step(), 1..60)) {
        let f = fixture();
        for step in steps {
            match step {
                Step::Config(offset, len, value) => {
                    f.write(offset, len, value);
                    f.read(offset, len);
                }
                Step::Mmio(gpa, len, value) => {
                    let data = [value.to_le_bytes(), value.to_le_bytes()].concat();
                    let hit = f.function.mmio_write(gpa, &data[..len]);
                    prop_assert_eq!(f.mmio(gpa, len).is_some(), hit);
                }
            }
            let enabled = f.read(4, 2) & 2 != 0;
            for (gpa, host, len) in f.mapper.windows() {
                prop_assert!(enabled);
                prop_assert!(WINDOWS.iter().any(|w| w.start <= gpa && gpa + len <= w.end));
                let (bar, offset) = ((host / HOST - 1), host % HOST);
                let allowed: &[Range<u64>] = match bar {
                    0 => &[0x1000..0x4000],
                    3 => &[0x1000..0x2000, 0x3000..0x4000],
                    _ => &[],
                };
                prop_assert!(allowed.iter().any(|a| a.start <= offset && offset + len <= a.end));
                // A window lies where the registers say.
                let low = u64::from(f.read(config::BAR0 + bar as u16 * 4, 4) & !0xf);
                let high = u64::from(f.read(config::BAR0 + bar as u16 * 4 + 4, 4));
                prop_assert_eq!(gpa, (high << 32 | low) + offset);
            }
        }
    }
}
