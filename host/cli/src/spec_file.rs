// SPDX-License-Identifier: Apache-2.0

//! Files of specifications: the API's own, as TOML, YAML or JSON.

mod place;

use std::{
    fmt,
    fs::File,
    io::{self, Read},
    path::Path,
};

use api::{document, types::VmSpec};
use serde::de::DeserializeOwned;
use serde_json::Value;

use self::place::Step;
use super::error::CliError;

/// The most bytes to read of a file: as many as the API takes.
const MAX_FILE: u64 = api::router::MAX_VM_BODY as u64;

/// The kind of a VM's file, for errors.
pub(super) const A_VM: &str = "a VM's specification";

/// Reads a VM's specification from a file, by its ending; `-` is standard input.
pub(super) fn read_vm(path: &str) -> Result<VmSpec, CliError> {
    let file = SpecFile::read(path, A_VM)?;
    let spec = file.typed(file.value.clone(), A_VM)?;
    file.check(&spec)?;
    Ok(spec)
}

/// Reads a value from a file, by its ending; `-` is standard input in any of the formats. The second argument is the expected
/// kind of file, for errors.
pub(super) fn read<T: DeserializeOwned>(path: &str, what: &'static str) -> Result<T, CliError> {
    let file = SpecFile::read(path, what)?;
    file.typed(file.value.clone(), what)
}

/// A file that was read, with its text for the places of faults.
pub(super) struct SpecFile {
    path: String,
    text: String,
    format: Format,
    /// The content.
    pub(super) value: Value,
}

impl SpecFile {
    /// Reads a file, by its ending; `-` is standard input in any of the formats. `what` is the expected kind of file.
    pub(super) fn read(path: &str, what: &'static str) -> Result<Self, CliError> {
        let not_a_spec = |why: String| CliError::NotASpec { path: path.to_owned(), what, why };
        let mut text = read_text(path).map_err(|source| CliError::Read { path: path.to_owned(), source })?;
        if u64::try_from(text.len()).is_ok_and(|length| length > MAX_FILE) {
            return Err(not_a_spec(format!("it has more than {MAX_FILE} bytes")));
        }
        // Editors of other systems put a byte order mark first.
        if text.starts_with('\u{feff}') {
            text.remove(0);
        }
        let ending = Path::new(path).extension().and_then(|e| e.to_str());
        let (format, value) = match ending {
            _ if path == "-" => guessed(&text),
            Some("json") => Format::Json.parse(&text).map(|value| (Format::Json, value)),
            Some("toml") => Format::Toml.parse(&text).map(|value| (Format::Toml, value)),
            Some("yaml" | "yml") => Format::Yaml.parse(&text).map(|value| (Format::Yaml, value)),
            _ => Err("its name must end in .toml, .yaml, .yml or .json".to_owned()),
        }
        .map_err(not_a_spec)?;
        Ok(Self { path: path.to_owned(), text, format, value })
    }

    /// Reads `value`, the content or a part of its members, as its type.
    pub(super) fn typed<T: DeserializeOwned>(&self, value: Value, what: &'static str) -> Result<T, CliError> {
        document::read(value).map_err(|error| {
            let path = error.path().to_string();
            let field = path.trim_end_matches(['?', '.']);
            self.fault(what, field, &place::of_path(error.path()), error.inner())
        })
    }

    /// The fault of a field of the file, which is no `what`.
    pub(super) fn wrong(&self, what: &'static str, field: &str, why: impl fmt::Display) -> CliError {
        self.fault(what, field, &place::of_field(field), why)
    }

    /// Checks rules that types cannot express. The agent checks them again; here the user learns of a fault without an agent.
    pub(super) fn check(&self, spec: &VmSpec) -> Result<(), CliError> {
        spec.check()
            .map_err(|problem| self.wrong(A_VM, problem.field.as_deref().unwrap_or_default(), problem.detail))
    }

    /// An error with file, field and line.
    fn fault(&self, what: &'static str, field: &str, steps: &[Step], why: impl fmt::Display) -> CliError {
        let field = if field.is_empty() { String::new() } else { format!("{field}: ") };
        let line = place::line(self.format, &self.text, steps);
        let line = line.map(|line| format!(" (line {line})")).unwrap_or_default();
        CliError::NotASpec { path: self.path.clone(), what, why: format!("{field}{why}{line}") }
    }
}

/// A format of files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Json,
    Toml,
    Yaml,
}

/// Guesses the format of standard input: JSON begins with a brace or bracket, and no YAML mapping is TOML.
fn guessed(text: &str) -> Result<(Format, Value), String> {
    if text.trim_start().starts_with(['{', '[']) {
        return Format::Json.parse(text).map(|value| (Format::Json, value));
    }
    let toml = match Format::Toml.parse(text) {
        Ok(value) => return Ok((Format::Toml, value)),
        Err(error) => error,
    };
    match Format::Yaml.parse(text) {
        Ok(value) if value.is_object() => Ok((Format::Yaml, value)),
        // `name = "web1"` is a text in YAML.
        Ok(_) => Err(toml),
        Err(yaml) if text.lines().any(|line| line.contains('=')) => Err(format!("{toml}; as YAML: {yaml}")),
        Err(yaml) => Err(yaml),
    }
}

impl Format {
    /// The document as one JSON value.
    fn parse(self, text: &str) -> Result<Value, String> {
        match self {
            Self::Json => document::json(text.as_bytes()).map_err(|error| error.to_string()),
            Self::Toml => toml::Deserializer::parse(text)
                .and_then(document::value)
                .map_err(|error| toml_error(text, &error)),
            Self::Yaml => document::value(yaml_serde::Deserializer::from_str(text))
                .map_err(|error| clipped(&error.to_string())),
        }
    }
}

/// An error of TOML with its place. Its own text would show the whole line, of any length.
fn toml_error(text: &str, error: &toml::de::Error) -> String {
    let before = error.span().and_then(|span| text.get(..span.start));
    let place = before.map(|before| {
        let line = before.matches('\n').count() + 1;
        let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
        format!(" (line {line}, column {column})")
    });
    format!("as TOML: {}{}", clipped(error.message()), place.unwrap_or_default())
}

/// An error's text, clipped because it may quote a very long line.
fn clipped(text: &str) -> String {
    const MOST: usize = 400;
    netpolicy::clipped(text, MOST)
}

fn read_text(path: &str) -> io::Result<String> {
    let mut text = String::new();
    // One byte more than is allowed shows that there is more.
    if path == "-" {
        io::stdin().lock().take(MAX_FILE + 1).read_to_string(&mut text)?;
    } else {
        File::open(path)?.take(MAX_FILE + 1).read_to_string(&mut text)?;
    }
    Ok(text)
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
            (
                "vm.json",
                JSON.replace("00:11", "00:1g"),
                "00:1g\" is not a MAC address such as 02:00:00:00:00:11 (line 3)",
            ),
            ("vm.toml", TOML.replace("00:11", "00:1g"), "adapters[0].mac"),
            (
                "vm.toml",
                TOML.replace("00:11", "00:1g"),
                "00:1g\" is not a MAC address such as 02:00:00:00:00:11 (line 9)",
            ),
            (
                "vm.yaml",
                YAML.replace("00:11", "00:1g"),
                "00:1g\" is not a MAC address such as 02:00:00:00:00:11 (line 12)",
            ),
            ("vm.yaml", YAML.replace("  kernel: vmlinuz", "  kernal: vmlinuz"), "boot.kernal: unknown field"),
            ("vm.json", JSON.replace("\"cpus\": 2", "\"cpus\": 255"), "cpus: 255"),
            ("vm.json", JSON.replace("\"cpus\": 2", "\"cpus\": 255"), "(line 1)"),
            ("vm.toml", TOML.replace("cpus = 2", "cpus = 255"), "(line 3)"),
            ("vm.yaml", YAML.replace("cpus: 2", "cpus: 255"), "(line 3)"),
            ("vm.toml", TOML.replace("cpus", "cpu"), "unknown field `cpu`"),
            ("vm.yaml", YAML.replace("cpus", "cpu"), "unknown field `cpu`"),
            ("vm.yaml", YAML.replace("memory: 536870912", "memory: 1000"), "memory: 1000"),
            ("vm.toml", TOML.replace("cpus = 2", "cpus = = 2"), "(line 3, column 16)"),
            (
                "vm.toml",
                format!("name = \"{}\nmemory = 3", "x".repeat(20_000)),
                "as TOML: invalid basic string, expected `\"` (line 1, column 20009)",
            ),
            ("vm.ini", String::new(), ".toml, .yaml, .yml or .json"),
            ("vm.json", " ".repeat(530_000), "more than 524288 bytes"),
        ] {
            let error = parse(name, &text).unwrap_err();
            assert!(error.contains(expect) && error.len() < 1000, "{name}: {error}");
        }
        assert!(matches!(read_vm("/nonexistent/vm.json"), Err(CliError::Read { .. })));
    }

    /// Documents that readers of other formats would understand in their own way: each has the same meaning in all three, or
    /// none.
    #[test]
    fn each_format_is_read_by_the_same_rules() {
        const SETTINGS: &str = "a port group's specification";
        let read = |name: &str, text: &str| {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join(name);
            std::fs::write(&path, text).unwrap();
            super::read::<api::types::PortGroupSpec>(path.to_str().unwrap(), SETTINGS)
                .map_err(|error| error.to_string())
        };
        let json = r#"{"switch": "lab", "settings": {"vlan": {"access": {"id": 100, "qos": 3}},
                       "mac_changes": {"list": ["02:00:00:00:00:01"]}, "rate": {"max_tx_mbit": 100}}}"#;
        let group = read("g.json", json).unwrap();
        for (name, text) in [
            ("g.json", format!("\u{feff}{json}")),
            ("g.yaml", json.to_owned()),
            (
                "g.yaml",
                "switch: lab\nsettings:\n  vlan: {access: {id: 100, qos: 3}}\n  mac_changes:\n    list: [02:00:00:00:00:01]\n  \
                 rate: {max_tx_mbit: 100}\n"
                    .to_owned(),
            ),
            (
                "g.toml",
                "\u{feff}switch = \"lab\"\n[settings]\nvlan.access = { id = 100, qos = 3 }\nrate.max_tx_mbit = 100\n\
                 mac_changes.list = [\"02:00:00:00:00:01\"]\n"
                    .to_owned(),
            ),
        ] {
            assert_eq!(read(name, &text).unwrap_or_else(|error| panic!("{name}: {error}")), group, "{text}");
        }
        let short = r#"{"switch": "lab", "settings": {"vlan": 100}}"#;
        let group =
            read("g.json", r#"{"switch": "lab", "settings": {"vlan": {"access": {"id": 100}}}}"#).unwrap();
        for (name, text) in [
            ("g.json", short),
            ("g.yaml", short),
            ("g.yaml", "switch: lab\nsettings:\n  vlan: 100\n"),
            ("g.toml", "switch = \"lab\"\nsettings.vlan = 100\n"),
        ] {
            assert_eq!(read(name, text).unwrap_or_else(|error| panic!("{name}: {error}")), group, "{text}");
        }
        for (name, text, expect) in [
            ("g.json", r#"{"switch": "a", "settings": {"vlan": 4095}}"#, "settings.vlan: VLAN 4095 does not"),
            ("g.yaml", "switch: a\nsettings:\n  vlan: 0\n", "VLAN 0 does not exist: use 1 to 4094 (line 3)"),
            (
                "g.toml",
                "switch = \"a\"\nsettings.vlan = -1\n",
                "VLAN -1 does not exist: use 1 to 4094 (line 2)",
            ),
            (
                "g.yaml",
                "switch: a\nsettings:\n  vlan: true\n",
                r#"expected "none", 100, {"access": {"id": 100}} or"#,
            ),
            ("g.json", r#"{"switch": "a", "switch": "b"}"#, "duplicate field `switch`"),
            ("g.yaml", "switch: a\nswitch: b\n", "duplicate"),
            ("g.toml", "switch = \"a\"\nswitch = \"b\"\n", "duplicate"),
            ("g.json", r#"{"switch": "a"} {"switch": "b"}"#, "trailing characters"),
            ("g.yaml", "switch: a\n---\nswitch: b\n", "more than one document"),
            ("g.json", r#"{"switch": null}"#, "switch: invalid type: null"),
            ("g.yaml", "switch: ~\n", "switch: invalid type: null"),
            ("g.yaml", "switch: null\n", "switch: invalid type: null"),
            ("g.json", r#"{"switch": 4711}"#, "switch: invalid type: integer"),
            ("g.yaml", "switch: 4711\n", "switch: invalid type: integer"),
            ("g.toml", "switch = 4711\n", "switch: invalid type: integer"),
            (
                "g.yaml",
                "switch: a\nsettings:\n  vlan: !access {id: 100}\n",
                "a tag such as !access is not supported",
            ),
            ("g.yaml", "switch: a\nsettings:\n  mtu: 1\n", "settings.mtu: "),
            ("g.yaml", "switch: a\nsettings:\n  mtu: 1\n", "(line 3)"),
            ("g.toml", "switch = \"a\"\n[settings]\nmtu = 1\n", "(line 3)"),
        ] {
            let error = read(name, text).unwrap_err();
            assert!(error.contains(expect), "{name} {text}: {error}");
        }
    }

    #[test]
    fn standard_input_may_have_any_format() {
        for (text, format) in [(JSON, Format::Json), (TOML, Format::Toml), (YAML, Format::Yaml)] {
            assert_eq!(guessed(text).unwrap().0, format);
        }
        let error = guessed("name = web1\n").unwrap_err();
        assert!(error.contains("TOML"), "{error}");
        assert!(guessed("name: [web1\n").is_err());
        assert!(guessed("{\"a\": 1,}").unwrap_err().contains("line 1"));
    }
}
