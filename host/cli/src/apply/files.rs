// SPDX-License-Identifier: Apache-2.0

//! The files of `portcullis apply`, and the objects that they describe.

use std::{collections::BTreeMap, fs, path::Path};

use api::{
    document,
    types::{Name, PortGroupSpec, SwitchSpec, VmSpec},
};
use serde_json::Value;

use crate::{
    error::CliError,
    spec_file::{self, SpecFile},
};

/// The most files to read from a directory.
const MAX_FILES: usize = 10_000;

/// An object that a file describes.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Wanted {
    Switch(Name, SwitchSpec),
    PortGroup(Name, PortGroupSpec),
    Vm(Box<VmSpec>),
}

impl Wanted {
    /// The kind in words; the kinds are in the order of creation.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Wanted::Switch(..) => "switch",
            Wanted::PortGroup(..) => "port_group",
            Wanted::Vm(_) => "vm",
        }
    }

    pub(super) fn name(&self) -> &Name {
        match self {
            Wanted::Switch(name, _) | Wanted::PortGroup(name, _) => name,
            Wanted::Vm(spec) => &spec.name,
        }
    }

    fn order(&self) -> u8 {
        match self {
            Wanted::Switch(..) => 0,
            Wanted::PortGroup(..) => 1,
            Wanted::Vm(_) => 2,
        }
    }
}

/// Reads all files: switches first, then port groups, then VMs, each by name, with its file.
pub(super) fn read_all(paths: &[String]) -> Result<Vec<(String, Wanted)>, CliError> {
    let mut wanted: Vec<(String, Wanted)> = Vec::new();
    for path in paths {
        for file in files(path)? {
            let object = read(&file)?;
            wanted.push((file, object));
        }
    }
    wanted.sort_by(|(_, a), (_, b)| (a.order(), a.name()).cmp(&(b.order(), b.name())));
    let mut seen: BTreeMap<(&str, &Name), &str> = BTreeMap::new();
    for (file, object) in &wanted {
        if let Some(other) = seen.insert((object.kind(), object.name()), file) {
            let (kind, name) = (object.kind(), object.name());
            return Err(CliError::Usage(format!("{other} and {file} both describe the {kind} {name}")));
        }
    }
    Ok(wanted)
}

/// The files that a path means: the path itself, or a directory's files with known endings.
fn files(path: &str) -> Result<Vec<String>, CliError> {
    let unreadable = |source| CliError::Read { path: path.to_owned(), source };
    if path == "-" || !Path::new(path).is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let mut files = Vec::new();
    for entry in fs::read_dir(path).map_err(unreadable)? {
        let file = entry.map_err(unreadable)?.path();
        // Editors and file systems keep copies under hidden names.
        if entry_is_hidden(&file) {
            continue;
        }
        let ending = file.extension().and_then(|ending| ending.to_str());
        if matches!(ending, Some("toml" | "yaml" | "yml" | "json")) && file.is_file() {
            files.push(file.to_string_lossy().into_owned());
        }
        if files.len() > MAX_FILES {
            return Err(CliError::Usage(format!(
                "{path} has more than {MAX_FILES} files: apply them in parts"
            )));
        }
    }
    if files.is_empty() {
        let why = format!("{path} has no file whose name ends in .toml, .yaml, .yml or .json");
        return Err(CliError::Usage(why));
    }
    files.sort();
    Ok(files)
}

/// Whether a file's name begins with a dot.
fn entry_is_hidden(file: &Path) -> bool {
    file.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."))
}

/// Reads one file: a VM's specification, or with `object` and `name` a switch's or port group's.
pub(super) fn read(path: &str) -> Result<Wanted, CliError> {
    const WHAT: &str = "a file of portcullis apply";
    let file = SpecFile::read(path, WHAT)?;
    let mut value = file.value.clone();
    let Some(members) = value.as_object_mut() else {
        return Err(file.wrong(WHAT, "", "it has no members"));
    };
    let object = match members.remove("object") {
        Some(Value::String(object)) => object,
        None => "vm".to_owned(),
        Some(_) => return Err(file.wrong(WHAT, "object", "write vm, switch or port_group")),
    };
    if object == "vm" {
        let spec: VmSpec = file.typed(value, spec_file::A_VM)?;
        file.check(&spec)?;
        return Ok(Wanted::Vm(Box::new(spec)));
    }
    let name = members.remove("name").ok_or_else(|| file.wrong(WHAT, "name", "it is missing"))?;
    let name: Name = document::read(name).map_err(|error| file.wrong(WHAT, "name", error.inner()))?;
    match object.as_str() {
        "switch" => file.typed(value, "a switch's specification").map(|spec| Wanted::Switch(name, spec)),
        "port_group" => {
            file.typed(value, "a port group's specification").map(|spec| Wanted::PortGroup(name, spec))
        }
        _ => Err(file.wrong(WHAT, "object", format_args!("{object:?} is not vm, switch or port_group"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(name: &str, text: &str) -> Result<Wanted, String> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(name);
        fs::write(&path, text).unwrap();
        read(path.to_str().unwrap()).map_err(|error| error.to_string())
    }

    #[test]
    fn a_file_is_a_vm_unless_it_says_otherwise() {
        let vm = parse("a.toml", "name = \"web1\"\nmemory = \"2MiB\"\nboot = { kernel = \"k\" }").unwrap();
        assert_eq!((vm.kind(), vm.name().as_str()), ("vm", "web1"));
        let switch =
            parse("a.yaml", "object: switch\nname: lab\nuplinks: [eth0]\nsettings: {mtu: 9000}").unwrap();
        let Wanted::Switch(_, spec) = &switch else { panic!("{switch:?}") };
        assert!(spec.uplinks.contains("eth0") && switch.name().as_str() == "lab");
        let group = parse("a.json", r#"{"object": "port_group", "name": "web", "switch": "lab"}"#).unwrap();
        assert_eq!((group.kind(), group.name().as_str()), ("port_group", "web"));
    }

    #[test]
    fn errors_name_file_and_place() {
        for (text, expect) in [
            (r#"{"object": "router", "name": "a"}"#, "\"router\" is not vm, switch or port_group"),
            (r#"{"object": 1}"#, "object"),
            (r#"{"object": "switch"}"#, "name: it is missing"),
            (r#"{"object": "switch", "name": "A"}"#, "name: "),
            (r#"{"object": "switch", "name": "a", "colour": 1}"#, "colour: unknown field"),
            (
                r#"{"object": "port_group", "name": "a", "switch": "b", "settings": {"mtu": 1}}"#,
                "settings.mtu: ",
            ),
            (r#"{"name": "a", "memory": "2MiB", "boot": {"kernel": "k"}, "cpus": 0}"#, "cpus: "),
            (r#"{"name": "a", "memory": "2MiB", "boot": {"kernal": "k"}}"#, "boot.kernal: unknown field"),
            ("[]", "no members"),
        ] {
            let error = parse("wrong.json", text).unwrap_err();
            assert!(error.contains("wrong.json is not") && error.contains(expect), "{error}");
        }
    }

    #[test]
    fn errors_name_the_line_in_each_format() {
        let wrong = |name: &str, text: &str| parse(name, text).unwrap_err();
        for (name, text, field, line) in [
            (
                "a.json",
                "{\"name\": \"a\", \"memory\": \"2MiB\",\n\"boot\": {\n\"kernal\": \"k\"}}",
                "boot.kernal",
                3,
            ),
            ("a.toml", "name = \"a\"\nmemory = \"2MiB\"\n[boot]\nkernal = \"k\"\n", "boot.kernal", 4),
            ("a.yaml", "name: a\nmemory: 2MiB\nboot:\n  kernal: k\n", "boot.kernal", 4),
            // A rule beyond the types.
            (
                "a.json",
                "{\"name\": \"a\", \"memory\": \"2MiB\", \"boot\": {\"kernel\": \"k\"},\n\"cpus\": 255}",
                "cpus",
                2,
            ),
            ("a.toml", "name = \"a\"\nmemory = \"2MiB\"\nboot.kernel = \"k\"\ncpus = 255\n", "cpus", 4),
            ("a.yaml", "name: a\nmemory: 2MiB\ncpus: 255\nboot: {kernel: k}\n", "cpus", 3),
            ("a.json", "{\"object\": \"switch\",\n\"name\": \"A\"}", "name", 2),
            ("a.toml", "object = \"switch\"\nname = \"a\"\n[settings]\nvlan = 0\n", "settings.vlan", 4),
            (
                "a.toml",
                "object = \"switch\"\nname = \"a\"\n[settings.vlan.access]\nid = 0\n",
                "settings.vlan.access.id",
                4,
            ),
            ("a.yaml", "name: b\n\nobject: router\n", "object", 3),
        ] {
            let (error, place) = (wrong(name, text), format!("(line {line})"));
            let expect = [format!("{name} is not"), format!(": {field}: ")];
            assert!(
                expect.iter().all(|part| error.contains(part)) && error.ends_with(&place),
                "{text}: {error}"
            );
        }
    }

    /// Each object of each kind of file, written as a list of its values, in each format.
    #[test]
    fn a_list_in_place_of_an_object_is_refused_in_every_format() {
        let documents = [
            serde_json::json!({
                "name": "web1", "memory": "2MiB", "boot": { "kernel": "k" },
                "adapters": [{ "id": "eth0", "port_group": "web" }], "limits": { "cpu_percent": 150 },
            }),
            serde_json::json!({
                "object": "switch", "name": "lab", "uplinks": ["eth0"],
                "settings": { "vlan": { "access": { "id": 100, "qos": 3 } }, "rate": { "max_tx_mbit": 100 } },
            }),
            serde_json::json!({
                "object": "port_group", "name": "web", "switch": "lab",
                "settings": { "mac_changes": { "list": ["02:00:00:00:00:01"] }, "vlan": { "trunk": [7] } },
            }),
        ];
        let mut refused = 0;
        for document in documents {
            let mut places = Vec::new();
            objects(&document, "", &mut places);
            for name in ["a.json", "a.yaml", "a.toml"] {
                let text = |value: &Value| if name == "a.toml" { toml_of(value) } else { value.to_string() };
                parse(name, &text(&document)).unwrap();
                // TOML has no list in place of the whole document.
                for (pointer, field) in places.iter().filter(|place| name != "a.toml" || !place.0.is_empty())
                {
                    let mut wrong = document.clone();
                    let place = wrong.pointer_mut(pointer).unwrap();
                    *place = place.as_object().unwrap().values().cloned().collect();
                    let error = parse(name, &text(&wrong)).expect_err(&text(&wrong));
                    let expect = if field.is_empty() { "it has no members" } else { "list, expected " };
                    assert!(
                        error.contains(&format!("{field}: ")) && error.contains(expect),
                        "{wrong}: {error}"
                    );
                    refused += 1;
                }
            }
        }
        assert_eq!(refused, 3 * 13 - 3);
    }

    /// A document as TOML.
    fn toml_of(document: &Value) -> String {
        fn inline(value: &Value) -> String {
            match value {
                Value::Object(_) => format!("{{ {} }}", members(value).join(", ")),
                Value::Array(items) => {
                    format!("[{}]", items.iter().map(inline).collect::<Vec<_>>().join(", "))
                }
                scalar => scalar.to_string(),
            }
        }
        fn members(value: &Value) -> Vec<String> {
            value
                .as_object()
                .unwrap()
                .iter()
                .map(|(name, value)| format!("{name} = {}", inline(value)))
                .collect()
        }
        members(document).join("\n")
    }

    /// Every object of a document: its JSON pointer and its name in errors.
    fn objects(value: &Value, at: &str, all: &mut Vec<(String, String)>) {
        match value {
            Value::Object(members) => {
                let field = at.trim_start_matches('/').replace("/0", "[0]").replace('/', ".");
                all.push((at.to_owned(), field));
                members.iter().for_each(|(name, value)| objects(value, &format!("{at}/{name}"), all));
            }
            Value::Array(items) => {
                items.iter().enumerate().for_each(|(n, item)| objects(item, &format!("{at}/{n}"), all));
            }
            _ => {}
        }
    }

    #[test]
    fn a_directory_is_read_in_the_order_of_what_needs_what() {
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(directory.path().join(name), text).unwrap();
        write("1.json", r#"{"name": "web1", "memory": "2MiB", "boot": {"kernel": "k"}}"#);
        write("2.json", r#"{"object": "port_group", "name": "web", "switch": "lab"}"#);
        write("3.yml", "{object: switch, name: lab}");
        write("README.md", "no such thing");
        write(".web2.yaml", "{name: web2, memory: 2MiB, boot: {kernel: k}}");
        write(".1.json.swp.json", "no such thing");
        let path = [directory.path().to_str().unwrap().to_owned()];
        let kinds: Vec<_> = read_all(&path).unwrap().iter().map(|(_, wanted)| wanted.kind()).collect();
        assert_eq!(kinds, ["switch", "port_group", "vm"]);
        write("4.yml", "{object: switch, name: lab}");
        let error = read_all(&path).unwrap_err().to_string();
        assert!(
            error.contains("3.yml and ") && error.contains("4.yml both describe the switch lab"),
            "{error}"
        );
        let empty = tempfile::tempdir().unwrap();
        let error = read_all(&[empty.path().to_str().unwrap().to_owned()]).unwrap_err();
        assert_eq!(error.code(), 2);
    }

    #[test]
    fn every_example_is_read() {
        let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../resources/examples");
        let mut directories = vec![examples];
        let mut kinds = Vec::new();
        while let Some(directory) = directories.pop() {
            for entry in fs::read_dir(&directory).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    directories.push(path);
                } else if path.extension().is_some_and(|ending| ending != "md") {
                    kinds.push(read(path.to_str().unwrap()).unwrap_or_else(|error| panic!("{error}")).kind());
                }
            }
        }
        assert!(["switch", "port_group", "vm"].iter().all(|kind| kinds.contains(kind)), "{kinds:?}");
    }
}
