// SPDX-License-Identifier: Apache-2.0

//! The CPUs of a thread.

use std::io;

use protocol::CpuRange;

/// The words of a mask for 8192 CPUs, the most that Linux can be built for on x86-64 (`NR_CPUS`). `rustix` and the C
/// library's `cpu_set_t` have room for 1024.
const WORDS: usize = 8192 / 64;

/// A set of CPUs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct CpuMask([u64; WORDS]);

impl CpuMask {
    /// The CPUs of these ranges. Numbers from 8192 on are left out.
    pub(super) fn of(ranges: &[CpuRange]) -> Self {
        let mut mask = Self([0; WORDS]);
        for (first, last) in ranges {
            for cpu in *first..=*last {
                if let Some(word) = mask.0.get_mut(usize::from(cpu / 64)) {
                    *word |= 1 << (cpu % 64);
                }
            }
        }
        mask
    }

    /// All CPUs that a host can have. The kernel leaves out those outside of the cpuset of a thread that enters it, and adds
    /// those that the cpuset gets later.
    pub(super) const ALL: Self = Self([u64::MAX; WORDS]);

    /// The CPUs of the calling thread that are online.
    pub(super) fn current() -> io::Result<Self> {
        let mut mask = Self([0; WORDS]);
        // SAFETY: the kernel writes at most `size_of_val` bytes, which is the size of the array. The type of the pointer
        // is that of a shorter mask; no reference of that type is made.
        let result = unsafe {
            libc::sched_getaffinity(0, size_of_val(&mask.0), mask.0.as_mut_ptr().cast::<libc::cpu_set_t>())
        };
        if result == 0 { Ok(mask) } else { Err(io::Error::last_os_error()) }
    }

    /// Moves the calling thread to these CPUs, and those of them that are in its cpuset.
    pub(super) fn enter(&self) -> io::Result<()> {
        // SAFETY: the kernel reads at most `size_of_val` bytes, which is the size of the array. The type of the pointer is
        // that of a shorter mask; no reference of that type is made.
        let result = unsafe {
            libc::sched_setaffinity(0, size_of_val(&self.0), self.0.as_ptr().cast::<libc::cpu_set_t>())
        };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// The CPUs of both sets.
    pub(super) fn with(mut self, other: &Self) -> Self {
        for (word, other) in self.0.iter_mut().zip(other.0) {
            *word |= other;
        }
        self
    }

    /// The number of CPUs.
    pub(super) fn count(&self) -> usize {
        self.0.iter().map(|word| usize::try_from(word.count_ones()).unwrap_or(0)).sum()
    }

    /// Its CPUs, as few ranges as possible.
    pub(super) fn ranges(&self) -> Vec<CpuRange> {
        let has =
            |cpu: u16| self.0.get(usize::from(cpu / 64)).is_some_and(|word| word >> (cpu % 64) & 1 == 1);
        let mut ranges: Vec<CpuRange> = Vec::new();
        for cpu in (0..8192).filter(|cpu| has(*cpu)) {
            match ranges.last_mut() {
                Some((_, last)) if last.checked_add(1) == Some(cpu) => *last = cpu,
                _ => ranges.push((cpu, cpu)),
            }
        }
        ranges
    }
}
