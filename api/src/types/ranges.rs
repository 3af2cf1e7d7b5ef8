// SPDX-License-Identifier: Apache-2.0

//! Readers of numbers with a narrower range than their type.

use serde::{Deserialize, Deserializer, de::Error};

/// A number of a range. All numbers outside have the same message, even those that the type could not hold.
fn within<T: TryFrom<i64>, E: Error>(number: i64, least: i64, most: i64, of: &str) -> Result<T, E> {
    let within = Some(number).filter(|number| (least..=most).contains(number));
    within.and_then(|number| T::try_from(number).ok()).ok_or_else(|| {
        let detail = format!("{number} is not a number{of} from {least} to {most}");
        E::custom(detail)
    })
}

/// vCPUs.
pub(super) fn cpus<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u8, D::Error> {
    within(i64::deserialize(deserializer)?, 1, 254, " of vCPUs")
}

/// Percent of a CPU.
pub(super) fn cpu_percent<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u32>, D::Error> {
    let percent = Option::<i64>::deserialize(deserializer)?;
    percent.map(|percent| within(percent, 1, 100_000, "")).transpose()
}

/// A share of the processor time.
pub(super) fn cpu_weight<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u16>, D::Error> {
    let weight = Option::<i64>::deserialize(deserializer)?;
    weight.map(|weight| within(weight, 1, 10_000, "")).transpose()
}

/// Requests of a disk.
pub(super) fn operations<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u32>, D::Error> {
    let count = Option::<i64>::deserialize(deserializer)?;
    count.map(|count| within(count, 1, 1_000_000_000, "")).transpose()
}
