// SPDX-License-Identifier: Apache-2.0

//! Counters of a function's exits.

use std::sync::atomic::{AtomicU64, Ordering};

use devices::pci::bar::BARS;

use super::FunctionStats;
use crate::hardware::VfHardware;

const PAGE: u64 = 4096;
/// Pages of a BAR with a counter of their own. Later pages share one.
const COUNTED_PAGES: u64 = 1024;

pub(super) struct Counters {
    /// For each BAR its pages, then the rest.
    bars: [Vec<AtomicU64>; BARS],
    config: AtomicU64,
    resets: AtomicU64,
}

impl Counters {
    pub(super) fn new(hardware: &dyn VfHardware) -> Self {
        let bars = std::array::from_fn(|index| {
            let pages = hardware.bar(index).size.div_ceil(PAGE).min(COUNTED_PAGES);
            (0..=pages).map(|_| AtomicU64::new(0)).collect()
        });
        Self { bars, config: AtomicU64::new(0), resets: AtomicU64::new(0) }
    }

    pub(super) fn bar(&self, bar: usize, offset: u64) {
        let page = usize::try_from(offset / PAGE).unwrap_or(usize::MAX);
        let pages = self.bars.get(bar);
        if let Some(counter) = pages.and_then(|pages| pages.get(page).or_else(|| pages.last())) {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(super) fn config(&self) {
        self.config.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn reset(&self) {
        self.resets.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn snapshot(&self) -> FunctionStats {
        let mut stats = FunctionStats {
            config_exits: self.config.load(Ordering::Relaxed),
            resets: self.resets.load(Ordering::Relaxed),
            ..FunctionStats::default()
        };
        for (bar, pages) in self.bars.iter().enumerate() {
            let last = pages.len() - 1;
            for (page, counter) in pages.iter().enumerate() {
                let count = counter.load(Ordering::Relaxed);
                if count > 0 {
                    let page = if page == last { "rest".to_owned() } else { page.to_string() };
                    stats.bar_exits.insert(format!("{bar}:{page}"), count);
                }
            }
        }
        stats
    }
}
