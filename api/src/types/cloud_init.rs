// SPDX-License-Identifier: Apache-2.0

//! First boot: the texts that cloud-init reads.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{DiskSpec, Secret};
use crate::problem::Problem;

/// The longest `user_data` in bytes.
pub const MAX_USER_DATA: usize = 256 << 10;
/// The longest `meta_data`, and the longest `network_config`, in bytes.
pub const MAX_SEED_TEXT: usize = 64 << 10;
/// The serial number of the disk with these texts.
pub const SEED_SERIAL: &str = "cidata";

/// The texts that cloud-init reads at a boot (data source NoCloud). The guest finds them on a read-only disk after its other
/// disks: a FAT file system with the label CIDATA, in a disk with the serial number `cidata`. At least one text must be given.
/// An answer has `(hidden)` in place of each text; in a request, `(hidden)` keeps the stored text.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CloudInitSpec {
    /// The file `user-data`, for instance a `#cloud-config`: at most 256 KiB. An empty file if it is not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, max_length = 262_144, example = "#cloud-config\nhostname: web1\n")]
    pub user_data: Option<Secret>,
    /// The file `meta-data`: at most 64 KiB. If it is not given, it has the VM's id as `instance-id`, and the VM's name as
    /// `local-hostname` if the name is a host name. cloud-init takes another `instance-id` for a new machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, max_length = 65_536)]
    pub meta_data: Option<Secret>,
    /// The file `network-config`: at most 64 KiB. Without it cloud-init asks for an address by DHCP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, max_length = 65_536)]
    pub network_config: Option<Secret>,
}

impl CloudInitSpec {
    /// The texts, each with its field.
    pub(super) fn secrets(&self) -> Vec<(String, &Secret)> {
        let Self { user_data, meta_data, network_config } = self;
        let all = [("user_data", user_data), ("meta_data", meta_data), ("network_config", network_config)];
        let given = all.into_iter().filter_map(|(name, secret)| Some((name, secret.as_ref()?)));
        given.map(|(name, secret)| (format!("cloud_init.{name}"), secret)).collect()
    }

    pub(super) fn secrets_mut(&mut self) -> Vec<(String, &mut Secret)> {
        let Self { user_data, meta_data, network_config } = self;
        let all = [("user_data", user_data), ("meta_data", meta_data), ("network_config", network_config)];
        let given = all.into_iter().filter_map(|(name, secret)| Some((name, secret.as_mut()?)));
        given.map(|(name, secret)| (format!("cloud_init.{name}"), secret)).collect()
    }
}

/// The rules that types cannot hold.
///
/// # Errors
/// `invalid_request` with the field of the first rule that is broken.
pub(super) fn check(seed: &CloudInitSpec, disks: &[DiskSpec]) -> Result<(), Problem> {
    let texts = seed.secrets();
    if texts.is_empty() {
        let detail =
            "No text is given: give user_data, meta_data or network_config, or leave out cloud_init.";
        return Err(Problem::invalid("cloud_init", detail));
    }
    for (field, text) in texts {
        let most = if field == "cloud_init.user_data" { MAX_USER_DATA } else { MAX_SEED_TEXT };
        let size = text.reveal().len();
        if size > most {
            return Err(Problem::invalid(field, format!("The text has {size} bytes, more than {most}.")));
        }
    }
    if let Some(number) = disks.iter().position(|disk| disk.serial() == SEED_SERIAL) {
        let detail = format!(
            "The serial number {SEED_SERIAL} is that of the disk for cloud-init: give the disk another serial."
        );
        return Err(Problem::invalid(format!("disks[{number}].serial"), detail));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::VmSpec;

    fn field(seed: Value, disks: Value) -> Option<String> {
        let spec = json!({
            "name": "web1", "memory": "2MiB", "boot": { "kernel": "k" }, "cloud_init": seed, "disks": disks,
        });
        let spec: VmSpec = serde_json::from_value(spec).unwrap();
        spec.check().err().map(|problem| problem.field.unwrap_or_default().into())
    }

    #[test]
    fn texts_are_bounded_and_there_is_one() {
        let text = |size: usize| "x".repeat(size);
        let none = || json!([]);
        for (seed, expect) in [
            (json!(null), None),
            (json!({}), Some("cloud_init")),
            (json!({ "user_data": "" }), None),
            (json!({ "user_data": text(256 << 10) }), None),
            (json!({ "user_data": text((256 << 10) + 1) }), Some("cloud_init.user_data")),
            (json!({ "meta_data": text(64 << 10) }), None),
            (json!({ "meta_data": text((64 << 10) + 1) }), Some("cloud_init.meta_data")),
            (json!({ "network_config": text(64 << 10) }), None),
            (json!({ "network_config": text((64 << 10) + 1) }), Some("cloud_init.network_config")),
        ] {
            assert_eq!(field(seed, none()).as_deref(), expect);
        }
    }

    #[test]
    fn no_disk_of_the_user_is_taken_for_the_seed() {
        let seed = || json!({ "user_data": "x" });
        let disk = |id: &str| json!({ "id": id, "path": "p", "format": "raw" });
        let named = json!({ "id": "a", "path": "p", "format": "raw", "serial": "cidata" });
        assert_eq!(field(seed(), json!([disk("root")])), None);
        assert_eq!(field(seed(), json!([disk("root"), disk("cidata")])).as_deref(), Some("disks[1].serial"));
        assert_eq!(field(seed(), json!([named])).as_deref(), Some("disks[0].serial"));
        assert_eq!(field(Value::Null, json!([named])), None);
    }

    #[test]
    fn the_seed_has_a_slot_of_the_bus() {
        let devices: Vec<_> =
            (0..14).map(|n| json!({ "id": format!("d{n}"), "path": "p", "format": "raw" })).collect();
        let spec = |adapters: usize, seed: Value| {
            let adapters: Vec<_> = (0..adapters).map(|n| json!({ "id": format!("eth{n}") })).collect();
            let spec = json!({
                "name": "web1", "memory": "2MiB", "boot": { "kernel": "k" }, "cloud_init": seed, "disks": devices,
                "adapters": adapters, "entropy": true,
            });
            serde_json::from_value::<VmSpec>(spec).unwrap().check()
        };
        assert!(spec(16, Value::Null).is_ok() && spec(15, json!({ "user_data": "x" })).is_ok());
        assert!(spec(16, json!({ "user_data": "x" })).is_err());
    }
}
