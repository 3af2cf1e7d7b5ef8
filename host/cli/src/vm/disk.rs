// SPDX-License-Identifier: Apache-2.0

//! `portcullis vm disk-limits`, and disks in the output.

use api::{Client, Problem, ProblemCode, types::*};
use clap::Args;
use serde_json::json;

use super::VmName;
use crate::error::CliError;

#[derive(Debug, Args)]
pub struct LimitsArgs {
    #[command(flatten)]
    vm: VmName,
    /// The disk's id.
    disk: String,
    /// Most bytes per second that are read and written, as 200MiB.
    #[arg(long, value_name = "SIZE")]
    bytes_per_second: Option<ByteSize>,
    /// Most requests per second.
    #[arg(long, value_name = "COUNT")]
    operations_per_second: Option<u32>,
    /// Bytes that may move at once after a pause; those of one second if it is not given.
    #[arg(long, value_name = "SIZE", requires = "bytes_per_second")]
    burst_bytes: Option<ByteSize>,
    /// Requests that may be served at once after a pause; those of one second if it is not given.
    #[arg(long, value_name = "COUNT", requires = "operations_per_second")]
    burst_operations: Option<u32>,
}

pub(super) async fn limits(client: &Client, args: LimitsArgs) -> Result<Vm, CliError> {
    let vm = client.get_vm(&args.vm.name).await?;
    let mut disks = vm.spec.disks;
    let names = disks.iter().map(|disk| disk.id.as_str().to_owned()).collect::<Vec<_>>().join(", ");
    let Some(disk) = disks.iter_mut().find(|disk| disk.id.as_str() == args.disk) else {
        let names = if names.is_empty() { "none".to_owned() } else { names };
        let detail = format!("The VM {} has no disk {}. Its disks: {names}.", vm.name, args.disk);
        return Err(api::ClientError::from(Box::new(Problem::new(ProblemCode::NotFound, detail))).into());
    };
    let limits = DiskLimits {
        bytes_per_second: args.bytes_per_second,
        operations_per_second: args.operations_per_second,
        burst_bytes: args.burst_bytes,
        burst_operations: args.burst_operations,
    };
    disk.limits = Some(limits).filter(|limits| *limits != DiskLimits::default());
    // A list is replaced as a whole, so another client's change must not get lost.
    Ok(client.patch_vm(&args.vm.name, &json!({ "disks": disks }), Some(vm.revision)).await?)
}

/// The lines about an enlarged disk.
pub(super) fn size(grown: &DiskSize) -> Vec<(String, String)> {
    vec![("disk".to_owned(), grown.disk.to_string()), ("size".to_owned(), grown.size.to_string())]
}

/// A disk in `vm show`.
pub(super) fn line(disk: &DiskSpec) -> String {
    let access = match (disk.read_only, disk.ephemeral) {
        (true, _) => ", read-only",
        (false, true) => ", ephemeral",
        (false, false) => "",
    };
    let mut line = format!("{} ({}){access}", disk.path, disk.format.as_str());
    if disk.cache == DiskCache::None {
        line.push_str(", no cache");
    }
    let limits = disk.limits.unwrap_or_default();
    let bytes = limits.bytes_per_second.map(|rate| format!(", {rate}/s"));
    let operations = limits.operations_per_second.map(|rate| format!(", {rate} requests/s"));
    line.extend(bytes.into_iter().chain(operations));
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_shows_the_access_of_its_guest() {
        for (access, expect) in [
            (json!({}), "web1 (raw)"),
            (json!({"read_only": true}), "web1 (raw), read-only"),
            (json!({"ephemeral": true}), "web1 (raw), ephemeral"),
            (json!({"cache": "none"}), "web1 (raw), no cache"),
            (json!({"limits": {"operations_per_second": 50}}), "web1 (raw), 50 requests/s"),
        ] {
            let mut disk = json!({"id": "root", "path": "web1", "format": "raw"});
            disk.as_object_mut().unwrap().extend(access.as_object().unwrap().clone());
            assert_eq!(line(&serde_json::from_value(disk).unwrap()), expect);
        }
    }
}
