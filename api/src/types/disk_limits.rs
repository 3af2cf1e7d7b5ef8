// SPDX-License-Identifier: Apache-2.0

//! Limits of a disk's requests.

use serde::{Deserialize, Deserializer, Serialize};
use utoipa::ToSchema;

use super::{ByteSize, ranges};
use crate::problem::Problem;

/// The least rate of bytes: with less, one request of a guest's kernel takes minutes, and its watchdogs end it.
const LEAST_BYTES: u64 = 64 << 10;

/// Limits of a disk's requests. A request over a limit waits in the guest's queue. They may be changed while the VM runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DiskLimits {
    /// Most bytes per second that are read and written: at least 64 KiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = "200MiB")]
    pub bytes_per_second: Option<ByteSize>,
    /// Most requests per second, flushes and discards among them.
    #[serde(default, deserialize_with = "ranges::operations", skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 1_000_000_000, example = 5000)]
    pub operations_per_second: Option<u32>,
    /// Bytes that may move at once after a pause. Those of one second if there is no number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = "1GiB")]
    pub burst_bytes: Option<ByteSize>,
    /// Requests that may be served at once after a pause. Those of one second if there is no number.
    #[serde(default, deserialize_with = "ranges::operations", skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 1_000_000_000, example = 20_000)]
    pub burst_operations: Option<u32>,
}

/// Limits that limit nothing are none.
pub(super) fn limits_if_any<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<DiskLimits>, D::Error> {
    let limits = Option::<DiskLimits>::deserialize(deserializer)?;
    Ok(limits.filter(|limits| *limits != DiskLimits::default()))
}

impl DiskLimits {
    /// The rules that types cannot hold. `field` is the place of the limits.
    pub(super) fn check(&self, field: &str) -> Result<(), Problem> {
        let invalid = |name: &str, detail: String| Err(Problem::invalid(format!("{field}.{name}"), detail));
        if let Some(rate) = self.bytes_per_second.filter(|rate| rate.bytes() < LEAST_BYTES) {
            return invalid("bytes_per_second", format!("{rate} is less than 64KiB."));
        }
        if self.burst_bytes.is_some_and(|burst| burst.bytes() == 0) {
            return invalid("burst_bytes", "A burst has at least one byte.".to_owned());
        }
        for (name, burst, rate, rate_name) in [
            ("burst_bytes", self.burst_bytes.is_some(), self.bytes_per_second.is_some(), "bytes_per_second"),
            (
                "burst_operations",
                self.burst_operations.is_some(),
                self.operations_per_second.is_some(),
                "operations_per_second",
            ),
        ] {
            if burst && !rate {
                return invalid(name, format!("A burst needs its rate: add {rate_name}."));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use crate::types::VmSpec;

    fn spec(limits: Value) -> Result<VmSpec, String> {
        let disk = json!({ "id": "root", "path": "web1.raw", "format": "raw", "limits": limits });
        let spec = json!({ "name": "web1", "memory": "2MiB", "boot": { "kernel": "k" }, "disks": [disk] });
        let spec: VmSpec = serde_json::from_value(spec).map_err(|error| error.to_string())?;
        spec.check()
            .map_err(|problem| format!("{}: {problem}", problem.field.clone().unwrap_or_default()))?;
        Ok(spec)
    }

    #[test]
    fn limits_have_rates_and_bursts_only_beside_them() {
        let all = json!({ "bytes_per_second": "200MiB", "operations_per_second": 5000,
                          "burst_bytes": "1GiB", "burst_operations": 1 });
        assert!(spec(all).is_ok());
        for (limits, field) in [
            (json!({ "bytes_per_second": "63KiB" }), "disks[0].limits.bytes_per_second"),
            (json!({ "bytes_per_second": "1MiB", "burst_bytes": 0 }), "disks[0].limits.burst_bytes"),
            (json!({ "burst_bytes": "1MiB", "operations_per_second": 1 }), "disks[0].limits.burst_bytes"),
            (
                json!({ "bytes_per_second": "1MiB", "burst_operations": 1 }),
                "disks[0].limits.burst_operations",
            ),
            (json!({ "operations_per_second": 0 }), "0 is not a number"),
            (json!({ "operations": 1 }), "unknown field"),
        ] {
            let error = spec(limits.clone()).unwrap_err();
            assert!(error.contains(field), "{limits}: {error}");
        }
    }

    #[test]
    fn limits_without_a_value_are_none() {
        assert_eq!(spec(json!({})).unwrap().disks[0].limits, None);
        assert_eq!(spec(Value::Null).unwrap().disks[0].limits, None);
    }
}
