// SPDX-License-Identifier: Apache-2.0

use proptest::prelude::*;

use super::*;

const LOW: Range<u64> = 0xc000_0000..0xe000_0000;
const HIGH: Range<u64> = 0x40_0000_0000..0x80_0000_0000;

fn memory(size: u64, is_64bit: bool, prefetchable: bool) -> Option<BarLayout> {
    Some(BarLayout { size, is_64bit, prefetchable })
}

/// Like an 82576 VF: 64-bit BARs 0 and 3, here with a 32-bit BAR 2.
fn bars() -> Bars {
    let layouts = [
        memory(0x4000, true, false),
        None,
        memory(0x1000, false, false),
        memory(0x4000, true, true),
        None,
        None,
    ];
    Bars::new(layouts, Arc::from([LOW, HIGH])).unwrap()
}

fn dword(bars: &Bars, register: u16) -> u32 {
    let mut data = [0; 4];
    bars.read(register * 4, &mut data);
    u32::from_le_bytes(data)
}

#[test]
fn sizing_reads_back_the_size_and_the_flags() {
    let mut bars = bars();
    let mut check = |register: u16, before: u32, sized: u32| {
        assert_eq!(dword(&bars, register), before, "register {register}");
        bars.write(register * 4, &[0xff; 4]);
        assert_eq!(dword(&bars, register), sized, "register {register}");
    };
    check(0, 0x4, 0xffff_c004);
    check(1, 0, 0xffff_ffff);
    check(2, 0, 0xffff_f000);
    check(3, 0xc, 0xffff_c00c);
    check(4, 0, 0xffff_ffff);
    check(5, 0, 0);
}

#[test]
fn bars_decode_only_inside_of_the_windows_and_while_memory_is_enabled() {
    let check = |low: u32, high: u32, enabled: bool, gpa: u64, expect: Option<(usize, u64)>| {
        let mut bars = bars();
        bars.write(0, &low.to_le_bytes());
        bars.write(4, &high.to_le_bytes());
        bars.set_memory_enabled(enabled);
        assert_eq!(bars.decode(gpa, 4), expect, "{high:#x}{low:08x} {enabled} {gpa:#x}");
    };
    check(0xc000_0000, 0, true, 0xc000_0000, Some((0, 0)));
    check(0xc000_0000, 0, true, 0xc000_3ffc, Some((0, 0x3ffc)));
    check(0xc000_0000, 0, true, 0xc000_3ffd, None);
    check(0xc000_0000, 0, false, 0xc000_0000, None);
    check(0xc000_0ff0, 0, true, 0xc000_0010, Some((0, 0x10)));
    check(0xdfff_c000, 0, true, 0xdfff_ffff, None);
    check(0xdfff_c000, 0, true, 0xdfff_fffc, Some((0, 0x3ffc)));
    check(0x0000_8000, 0x40, true, 0x40_0000_8004, Some((0, 4)));
    check(0x0010_0000, 0, true, 0x0010_0000, None);
    check(0xfee0_0000, 0, true, 0xfee0_0000, None);
    check(0xffff_c000, 0xffff_ffff, true, 0xffff_ffff_ffff_c000, None);
}

#[test]
fn overlapping_bars_answer_in_their_order() {
    let mut bars = bars();
    bars.write(0, &0xc000_0000u32.to_le_bytes());
    bars.write(8, &0xc000_1000u32.to_le_bytes());
    bars.set_memory_enabled(true);
    assert_eq!(bars.decode(0xc000_1000, 4), Some((0, 0x1000)));
    bars.write(0, &0xc001_0000u32.to_le_bytes());
    assert_eq!(bars.decode(0xc000_1000, 4), Some((2, 0)));
}

#[test]
fn assigned_addresses_come_back_at_power_on_only() {
    let mut bars = bars();
    bars.assign(0, 0x40_0000_0000).unwrap();
    bars.assign(2, 0xc000_0000).unwrap();
    assert_eq!(bars.assign(2, 0xc000_0800), Err(BarError::Address { bar: 2, address: 0xc000_0800 }));
    assert!(bars.assign(2, 0x40_0000_0000).is_err(), "32-bit");
    assert!(bars.assign(0, 0x1000_0000).is_err(), "guest memory");
    assert_eq!(bars.assign(1, 0xc000_0000), Err(BarError::Absent { bar: 1 }));
    bars.set_memory_enabled(true);
    assert_eq!(bars.decoded(0), Some(0x40_0000_0000..0x40_0000_4000));
    bars.clear();
    assert_eq!((dword(&bars, 0), dword(&bars, 1), bars.decoded(0)), (4, 0, None));
    bars.power_on();
    assert_eq!((dword(&bars, 1), dword(&bars, 2), bars.decoded(2)), (0x40, 0xc000_0000, None));
}

#[test]
fn impossible_layouts_are_refused() {
    let check = |layouts: [Option<BarLayout>; BARS], expect: BarError| {
        assert_eq!(Bars::new(layouts, Arc::from([LOW])).unwrap_err(), expect);
    };
    let small = [memory(8, false, false), None, None, None, None, None];
    check(small, BarError::Size { bar: 0, size: 8 });
    check(
        [memory(0x3000, true, false), None, None, None, None, None],
        BarError::Size { bar: 0, size: 0x3000 },
    );
    let large = [memory(1 << 32, false, false), None, None, None, None, None];
    check(large, BarError::Size { bar: 0, size: 1 << 32 });
    let twice = [memory(0x1000, true, false), memory(0x1000, false, false), None, None, None, None];
    check(twice, BarError::NoUpperHalf { bar: 0 });
    check([None, None, None, None, None, memory(0x1000, true, false)], BarError::NoUpperHalf { bar: 5 });
}

proptest! {
    #[test]
    fn any_writes_keep_addresses_aligned_and_inside(
        writes in prop::collection::vec((0u16..24, 0usize..3, any::<u32>(), any::<bool>()), 0..40),
        probes in prop::collection::vec(any::<u64>(), 8),
    ) {
        let mut bars = bars();
        for (offset, size, value, enabled) in writes {
            let len = [1, 2, 4][size];
            let offset = offset & !((1 << size) - 1);
            bars.write(offset, &value.to_le_bytes()[..len]);
            bars.set_memory_enabled(enabled);
            for (bar, layout) in bars.layouts() {
                let Some(range) = bars.decoded(bar) else { continue };
                prop_assert!(enabled);
                prop_assert!(range.start.is_multiple_of(layout.size));
                prop_assert_eq!(range.end - range.start, layout.size);
                prop_assert!([LOW, HIGH].iter().any(|w| w.start <= range.start && range.end <= w.end));
                prop_assert!(bars.decode(range.end - 1, 1).is_some());
            }
            for probe in &probes {
                let gpa = [*probe, LOW.start + probe % (LOW.end - LOW.start)];
                for gpa in gpa {
                    if let Some((bar, offset)) = bars.decode(gpa, 4) {
                        let range = bars.decoded(bar).unwrap();
                        prop_assert_eq!(range.start + offset, gpa);
                    }
                }
            }
        }
    }
}
