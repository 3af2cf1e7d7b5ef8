// SPDX-License-Identifier: Apache-2.0

//! Files of specifications: the API's own, as TOML, YAML or JSON.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
};

use api::types::VmSpec;
use serde::de::DeserializeOwned;

use super::error::CliError;

/// The most bytes of a file that are read: as much as the API takes.
const MAX_FILE: u64 = 64 << 10;

/// What a VM's file is.
pub(super) const A_VM: &str = "a VM's specification";

/// Reads a VM's specification from a file, by its ending; `-` is JSON from standard input.
pub(super) fn read_vm(path: &str) -> Result<VmSpec, CliError> {
    let spec: VmSpec = read(path, A_VM)?;
    check(path, &spec)?;
    Ok(spec)
}

/// Checks what types cannot hold. The agent does it again; here the user learns it without one.
pub(super) fn check(path: &str, spec: &VmSpec) -> Result<(), CliError> {
    spec.check().map_err(|problem| {
        let field = problem.field.map(|field| format!("{field}: ")).unwrap_or_default();
        CliError::NotASpec { path: path.to_owned(), what: A_VM, why: format!("{field}{}", problem.detail) }
    })
}

/// Reads a value from a file, by its ending; `-` is JSON from standard input. `what` it should be is said in errors.
pub(super) fn read<T: DeserializeOwned>(path: &str, what: &'static str) -> Result<T, CliError> {
    let not_a_spec = |why: String| CliError::NotASpec { path: path.to_owned(), what, why };
    let text = read_text(path).map_err(|source| CliError::Read { path: path.to_owned(), source })?;
    if u64::try_from(text.len()).is_ok_and(|length| length > MAX_FILE) {
        return Err(not_a_spec(format!("it has more than {MAX_FILE} bytes")));
    }
    let ending =
        if path == "-" { Some("json") } else { Path::new(path).extension().and_then(|e| e.to_str()) };
    match ending {
        Some("json") => from_json(&text),
        Some("toml") => toml::from_str(&text).map_err(|error| error.to_string().trim_end().to_owned()),
        Some("yaml" | "yml") => yaml_serde::from_str(&text).map_err(|error| error.to_string()),
        _ => Err("its name must end in .toml, .yaml, .yml or .json".to_owned()),
    }
    .map_err(not_a_spec)
}

fn read_text(path: &str) -> io::Result<String> {
    let mut text = String::new();
    // One byte more than is allowed tells that there is more.
    if path == "-" {
        io::stdin().lock().take(MAX_FILE + 1).read_to_string(&mut text)?;
    } else {
        File::open(path)?.take(MAX_FILE + 1).read_to_string(&mut text)?;
    }
    Ok(text)
}

fn from_json<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    serde_path_to_error::deserialize(&mut serde_json::Deserializer::from_str(text))
        .map_err(|error| placed(&error))
}

/// What is wrong, with its place.
pub(super) fn placed<E: std::fmt::Display>(error: &serde_path_to_error::Error<E>) -> String {
    let path = error.path().to_string();
    match path.trim_end_matches(['?', '.']) {
        "" => error.inner().to_string(),
        field => format!("{field}: {}", error.inner()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(name: &str, text: &str) -> Result<VmSpec, String> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(name);
        std::fs::write(&path, text).unwrap();
        read_vm(path.to_str().unwrap()).map_err(|error| error.to_string())
    }

    const JSON: &str = r#"{ "name": "web1", "cpus": 2, "memory": "512MiB",
        "boot": { "kernel": "vmlinuz", "initramfs": "initrd.img", "cmdline": "console=ttyS0" },
        "adapters": [ { "id": "eth0", "port_group": "web", "mac": "02:00:00:00:00:11", "vf": "0000:01:10.0" } ] }"#;

    const TOML: &str = r#"
        name = "web1"
        cpus = 2
        memory = "512MiB"
        boot = { kernel = "vmlinuz", initramfs = "initrd.img", cmdline = "console=ttyS0" }
        [[adapters]]
        id = "eth0"
        port_group = "web"
        mac = "02:00:00:00:00:11"
        vf = "0000:01:10.0"
    "#;

    const YAML: &str = "
name: web1
cpus: 2
memory: 536870912
boot:
  kernel: vmlinuz
  initramfs: initrd.img
  cmdline: console=ttyS0
adapters:
- id: eth0
  port_group: web
  mac: 02:00:00:00:00:11
  vf: 0000:01:10.0
";

    #[test]
    fn the_same_vm_in_three_formats() {
        let spec = parse("vm.json", JSON).unwrap();
        assert_eq!(parse("vm.toml", TOML).unwrap(), spec);
        assert_eq!(parse("vm.yaml", YAML).unwrap(), spec);
        assert_eq!(parse("vm.yml", YAML).unwrap(), spec);
    }

    #[test]
    fn errors_name_the_field() {
        for (name, text, expect) in [
            ("vm.json", JSON.replace("00:11", "00:1g"), "adapters[0].mac"),
            ("vm.toml", TOML.replace("00:11", "00:1g"), "mac = \"02:00:00:00:00:1g\""),
            (
                "vm.yaml",
                YAML.replace("00:11", "00:1g"),
                "00:1g\" is not a MAC address such as 02:00:00:00:00:11 at line",
            ),
            ("vm.json", JSON.replace("\"cpus\": 2", "\"cpus\": 255"), "cpus: 255"),
            ("vm.toml", TOML.replace("cpus", "cpu"), "unknown field `cpu`"),
            ("vm.yaml", YAML.replace("cpus", "cpu"), "unknown field `cpu`"),
            ("vm.yaml", YAML.replace("memory: 536870912", "memory: 1000"), "memory: 1000"),
            ("vm.ini", String::new(), ".toml, .yaml, .yml or .json"),
            ("vm.json", " ".repeat(70_000), "more than 65536 bytes"),
        ] {
            let error = parse(name, &text).unwrap_err();
            assert!(error.contains(expect), "{name}: {error}");
        }
        assert!(matches!(read_vm("/nonexistent/vm.json"), Err(CliError::Read { .. })));
    }
}
