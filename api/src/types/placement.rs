// SPDX-License-Identifier: Apache-2.0

//! The place of a VM on its host, the pages of its memory, and further features of its CPUs.

use std::{collections::BTreeMap, fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Visitor};
use utoipa::{
    PartialSchema, ToSchema,
    openapi::{ObjectBuilder, OneOfBuilder, RefOr, Schema, Type},
};

use super::{ByteSize, CpuList, Invalid};
use crate::problem::Problem;

/// The most NUMA nodes of a Linux host.
pub const MAX_NODES: u16 = 1024;
/// The most ranges in all CPU lists of a VM together.
pub const MAX_RANGES: usize = 1024;

const GIB: u64 = 1 << 30;

/// The place of a VM on its host. Without a member, the host's kernel chooses that part.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PlacementSpec {
    /// The host's CPUs for the threads of vCPUs, by the vCPU's number, from 0. At most 1024 ranges together with `io_cpus`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schema(value_type = BTreeMap<String, CpuList>, example = json!({ "0": "4", "1": "5" }))]
    pub cpus: BTreeMap<VcpuNumber, CpuList>,
    /// The host's CPUs for all other threads of the VM's process: its event loop, those of disks and NICs, and those of adapters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = "2-3")]
    pub io_cpus: Option<CpuList>,
    /// The NUMA node of guest memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub numa: Option<NumaPlace>,
}

/// Reads a placement. One that says nothing is none.
pub(super) fn if_any<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<PlacementSpec>, D::Error> {
    let placement = Option::<PlacementSpec>::deserialize(deserializer)?;
    Ok(placement.filter(|placement| *placement != PlacementSpec::default()))
}

/// The number of a vCPU, 0 to 253. In JSON it is the name of a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VcpuNumber(pub u8);

impl FromStr for VcpuNumber {
    type Err = Invalid;
    fn from_str(text: &str) -> Result<Self, Invalid> {
        let number = text.parse().ok().filter(|number: &u8| number.to_string() == text);
        let wrong = || {
            let text: String = text.chars().take(40).collect();
            Invalid(format!("{text:?} is not the number of a vCPU: they are numbered from 0 to 253"))
        };
        number.filter(|number| *number < 254).map(Self).ok_or_else(wrong)
    }
}

impl TryFrom<String> for VcpuNumber {
    type Error = Invalid;
    fn try_from(text: String) -> Result<Self, Invalid> {
        text.parse()
    }
}

impl From<VcpuNumber> for String {
    fn from(number: VcpuNumber) -> Self {
        number.0.to_string()
    }
}

/// The NUMA node of guest memory: its number, or `of_adapters` for the node of the VM's adapters and devices. Those of several
/// nodes are refused at the boot. For functions without a node, simulated ones among them, memory is not placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NumaPlace {
    /// This node, 0 to 1023.
    Node(u16),
    /// The node of the VM's adapters and devices.
    OfAdapters,
}

const OF_ADAPTERS: &str = "of_adapters";

impl Serialize for NumaPlace {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Node(node) => node.serialize(serializer),
            Self::OfAdapters => OF_ADAPTERS.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for NumaPlace {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Place;

        impl Visitor<'_> for Place {
            type Value = NumaPlace;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a NUMA node from 0 to {}, or \"{OF_ADAPTERS}\"", MAX_NODES - 1)
            }

            fn visit_u64<E: serde::de::Error>(self, node: u64) -> Result<NumaPlace, E> {
                let known = u16::try_from(node).ok().filter(|node| *node < MAX_NODES);
                let wrong = || E::invalid_value(serde::de::Unexpected::Unsigned(node), &self);
                known.map(NumaPlace::Node).ok_or_else(wrong)
            }

            fn visit_str<E: serde::de::Error>(self, word: &str) -> Result<NumaPlace, E> {
                if word == OF_ADAPTERS {
                    return Ok(NumaPlace::OfAdapters);
                }
                let word: String = word.chars().take(40).collect();
                Err(E::invalid_value(serde::de::Unexpected::Str(&word), &self))
            }
        }

        deserializer.deserialize_any(Place)
    }
}

impl fmt::Display for NumaPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Node(node) => write!(f, "{node}"),
            Self::OfAdapters => f.write_str(OF_ADAPTERS),
        }
    }
}

impl PartialSchema for NumaPlace {
    fn schema() -> RefOr<Schema> {
        let node = ObjectBuilder::new().schema_type(Type::Integer);
        let node = node.minimum(Some(0)).maximum(Some(MAX_NODES - 1));
        let word = ObjectBuilder::new().schema_type(Type::String).enum_values(Some([OF_ADAPTERS]));
        let text = "The NUMA node of guest memory: its number, or `of_adapters` for the node of the VM's adapters and devices. \
                    Those of several nodes are refused at the boot. For functions without a node, simulated ones among them, \
                    memory is not placed.";
        OneOfBuilder::new().item(node).item(word).description(Some(text)).into()
    }
}

impl ToSchema for NumaPlace {}

/// The host's pages for guest memory. On the wire `true` means pages of 2 MiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HugePages {
    /// Ordinary pages.
    #[default]
    Off,
    /// Huge pages of 2 MiB.
    Mib2,
    /// Huge pages of 1 GiB.
    Gib1,
}

impl HugePages {
    /// The size of a huge page; None for ordinary pages.
    #[must_use]
    pub fn size(self) -> Option<ByteSize> {
        match self {
            Self::Off => None,
            Self::Mib2 => Some(ByteSize::mib(2)),
            Self::Gib1 => Some(ByteSize::mib(1024)),
        }
    }
}

const MIB_2: &str = "2MiB";
const GIB_1: &str = "1GiB";

impl Serialize for HugePages {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            // As agents wrote it that knew pages of 2 MiB only.
            Self::Off => false.serialize(serializer),
            Self::Mib2 => true.serialize(serializer),
            Self::Gib1 => GIB_1.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for HugePages {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pages;

        impl Visitor<'_> for Pages {
            type Value = HugePages;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "true, false, \"{MIB_2}\" or \"{GIB_1}\"")
            }

            fn visit_bool<E>(self, on: bool) -> Result<HugePages, E> {
                Ok(if on { HugePages::Mib2 } else { HugePages::Off })
            }

            fn visit_str<E: serde::de::Error>(self, size: &str) -> Result<HugePages, E> {
                match size {
                    MIB_2 => Ok(HugePages::Mib2),
                    GIB_1 => Ok(HugePages::Gib1),
                    other => {
                        let other: String = other.chars().take(40).collect();
                        Err(E::invalid_value(serde::de::Unexpected::Str(&other), &self))
                    }
                }
            }
        }

        deserializer.deserialize_any(Pages)
    }
}

impl PartialSchema for HugePages {
    fn schema() -> RefOr<Schema> {
        let switch = ObjectBuilder::new().schema_type(Type::Boolean);
        let size = ObjectBuilder::new().schema_type(Type::String).enum_values(Some([MIB_2, GIB_1]));
        OneOfBuilder::new().item(switch).item(size).into()
    }
}

impl ToSchema for HugePages {}

/// Features of the guest's CPUs that are off by default, since both are large parts of KVM that a guest could attack.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CpuFeatures {
    /// Nested virtualization: the guest can run VMs of its own.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub nested: bool,
    /// Performance counters: `perf` counts cycles and cache misses in the guest.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub pmu: bool,
}

impl CpuFeatures {
    /// Whether it has none of them.
    #[must_use]
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// The actual place of a running VM on its host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PlacementStatus {
    /// The CPUs on which the kernel lets the thread of each vCPU run, by the vCPU's number.
    #[schema(value_type = BTreeMap<String, CpuList>, example = json!({ "0": "4", "1": "5" }))]
    pub cpus: BTreeMap<VcpuNumber, CpuList>,
    /// The CPUs on which it lets the other threads run, all of them together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = "2-3")]
    pub io_cpus: Option<CpuList>,
    /// The NUMA node of guest memory, as the agent chose it for this boot; absent if memory is not placed. The kernel reports the
    /// other members.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 0, maximum = 1023)]
    pub numa: Option<u16>,
    /// The reason why memory is not placed, although the specification places it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_placed: Option<String>,
    /// The size of the host's pages of guest memory.
    #[schema(example = "2MiB")]
    pub page_size: ByteSize,
}

/// The rules that types cannot hold.
///
/// # Errors
/// `invalid_request` with the field of the first rule that is broken.
pub(super) fn check(placement: &PlacementSpec, vcpus: u8) -> Result<(), Problem> {
    if let Some(VcpuNumber(number)) = placement.cpus.keys().find(|number| number.0 >= vcpus) {
        let detail = format!("The VM has no vCPU {number}: it has {vcpus}, numbered from 0.");
        return Err(Problem::invalid(format!("placement.cpus.{number}"), detail));
    }
    let lists = placement.cpus.values().chain(&placement.io_cpus);
    let ranges = lists.map(|list| list.ranges().len()).fold(0, usize::saturating_add);
    if ranges > MAX_RANGES {
        let detail =
            format!("The lists have {ranges} ranges together, and {MAX_RANGES} at most are possible.");
        return Err(Problem::invalid("placement.cpus", detail));
    }
    Ok(())
}

/// Checks that whole pages make up guest memory.
///
/// # Errors
/// `invalid_request` for `memory`.
pub(super) fn check_pages(pages: HugePages, memory: ByteSize) -> Result<(), Problem> {
    if pages == HugePages::Gib1 && !memory.bytes().is_multiple_of(GIB) {
        let detail = format!("{memory} is not a multiple of 1GiB, as huge pages of 1 GiB need it.");
        return Err(Problem::invalid("memory", detail));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::VmSpec;
    use super::*;
    use crate::document;

    fn spec(members: &Value) -> Result<VmSpec, String> {
        let mut spec = json!({ "name": "web1", "memory": "2GiB", "cpus": 2, "boot": { "kernel": "k" } });
        spec.as_object_mut().unwrap().extend(members.as_object().unwrap().clone());
        document::read(spec).map_err(|error| error.to_string())
    }

    #[test]
    fn a_placement_keeps_its_form() {
        for (read, written) in [
            (json!({ "cpus": { "0": "4", "1": "7,5-6" } }), json!({ "cpus": { "0": "4", "1": "5-7" } })),
            (json!({ "io_cpus": "2-3", "numa": 1 }), json!({ "io_cpus": "2-3", "numa": 1 })),
            (json!({ "numa": "of_adapters" }), json!({ "numa": "of_adapters" })),
            (json!({}), Value::Null),
            (json!({ "cpus": {} }), Value::Null),
            (Value::Null, Value::Null),
        ] {
            let spec = spec(&json!({ "placement": read })).unwrap();
            spec.check().unwrap();
            let stored = serde_json::to_value(&spec).unwrap();
            assert_eq!(stored["placement"], written);
            assert_eq!(serde_json::from_value::<VmSpec>(stored).unwrap(), spec);
        }
        for wrong in [
            json!({ "cpus": { "254": "4" } }),
            json!({ "cpus": { "+1": "4" } }),
            json!({ "cpus": { "0": "" } }),
            json!({ "cpus": { "0": 4 } }),
            json!({ "cpus": ["4"] }),
            json!({ "numa": 1024 }),
            json!({ "numa": -1 }),
            json!({ "numa": "0" }),
            json!({ "node": 0 }),
        ] {
            assert!(spec(&json!({ "placement": wrong })).is_err(), "{wrong}");
        }
    }

    #[test]
    fn vcpus_and_the_number_of_ranges_are_checked() {
        let field = |placement: Value| {
            let spec = spec(&json!({ "placement": placement })).unwrap();
            spec.check().err().and_then(|problem| problem.field)
        };
        assert_eq!(field(json!({ "cpus": { "1": "0" } })), None);
        assert_eq!(field(json!({ "cpus": { "2": "0" } })).as_deref(), Some("placement.cpus.2"));
        let every_other = |count: u16| (0..count).map(|n| (n * 2).to_string()).collect::<Vec<_>>().join(",");
        let both = |count| json!({ "cpus": { "0": every_other(512) }, "io_cpus": every_other(count) });
        assert_eq!(field(both(512)), None);
        assert_eq!(field(both(513)).as_deref(), Some("placement.cpus"));
    }

    #[test]
    fn huge_pages_have_two_sizes_and_the_older_form() {
        for (read, pages, written) in [
            (json!(false), HugePages::Off, json!(false)),
            (json!(true), HugePages::Mib2, json!(true)),
            (json!("2MiB"), HugePages::Mib2, json!(true)),
            (json!("1GiB"), HugePages::Gib1, json!("1GiB")),
        ] {
            let spec = spec(&json!({ "hugepages": read })).unwrap();
            assert_eq!(spec.hugepages, pages);
            assert_eq!(serde_json::to_value(&spec).unwrap()["hugepages"], written);
            assert!(spec.check().is_ok());
        }
        for wrong in [json!("1gib"), json!(1), json!(["2MiB"]), json!("4KiB")] {
            assert!(spec(&json!({ "hugepages": wrong })).is_err(), "{wrong}");
        }
        let odd = |pages: Value| spec(&json!({ "hugepages": pages, "memory": "1026MiB" })).unwrap().check();
        assert!(odd(json!(true)).is_ok());
        assert_eq!(odd(json!("1GiB")).unwrap_err().field.as_deref(), Some("memory"));
    }

    #[test]
    fn features_are_off_unless_asked_for() {
        let stored = |features: Value| {
            let spec = spec(&json!({ "cpu_features": features })).unwrap();
            (spec.cpu_features, serde_json::to_value(&spec).unwrap()["cpu_features"].take())
        };
        assert_eq!(stored(json!({})), (CpuFeatures::default(), Value::Null));
        let nested = CpuFeatures { nested: true, pmu: false };
        assert_eq!(stored(json!({ "nested": true, "pmu": false })), (nested, json!({ "nested": true })));
    }
}
