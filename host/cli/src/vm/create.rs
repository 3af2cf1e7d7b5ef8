// SPDX-License-Identifier: Apache-2.0

//! `portcullis vm create`: from a file, or a small VM from options.

use api::{document, types::*};
use clap::Args;
use serde_json::{Map, Value, json};

use crate::{error::CliError, spec_file};

#[derive(Debug, Args)]
pub struct CreateArgs {
    /// Its specification: a .toml, .yaml or .json file, or - for standard input. With --memory: the name of a VM that the other
    /// options specify.
    #[arg(value_name = "FILE|NAME")]
    subject: String,
    #[command(flatten)]
    options: NewVm,
}

/// The options of a VM without a file.
#[derive(Debug, Args)]
#[command(next_help_heading = "A VM without a file")]
struct NewVm {
    /// Guest memory, as 512MiB.
    #[arg(long, value_name = "SIZE")]
    memory: Option<ByteSize>,
    /// vCPUs; 1 by default.
    #[arg(long, value_name = "COUNT", requires = "memory", value_parser = clap::value_parser!(u8).range(1..=254))]
    cpus: Option<u8>,
    /// The kernel: a path on the agent's host, or a name in an image directory.
    #[arg(long, value_name = "PATH", requires = "memory")]
    kernel: Option<String>,
    /// An initramfs. May be repeated: the files are concatenated.
    #[arg(long, value_name = "PATH", requires = "memory")]
    initramfs: Vec<String>,
    /// The kernel's command line.
    #[arg(long, value_name = "TEXT", requires = "memory")]
    cmdline: Option<String>,
    /// The disk whose installed kernel is booted, in place of --kernel.
    #[arg(long, value_name = "ID", requires = "memory")]
    boot_disk: Option<String>,
    /// A disk: ID,path=PATH,format=raw|qcow2, and as wanted read_only, ephemeral, discard, serial=TEXT, cache=none. May be
    /// repeated.
    #[arg(long, value_name = "ID,KEY=VALUE...", requires = "memory")]
    disk: Vec<String>,
    /// A NIC: ID,bridge=NAME (or tap, macvtap, group), and as wanted mac=ADDRESS, mtu=BYTES, queues=COUNT. May be repeated.
    #[arg(long, value_name = "ID,KEY=VALUE...", requires = "memory")]
    nic: Vec<String>,
    /// An adapter: ID, and as wanted group=NAME, mac=ADDRESS, vf=PCI-ADDRESS. May be repeated.
    #[arg(long, value_name = "ID,KEY=VALUE...", requires = "memory")]
    adapter: Vec<String>,
}

/// The specification from the command line.
///
/// # Errors
/// The file cannot be read, an option is invalid, or the specification is.
pub(super) fn spec(args: CreateArgs) -> Result<VmSpec, CliError> {
    let CreateArgs { subject, options } = args;
    let Some(memory) = options.memory else { return spec_file::read_vm(&subject) };
    let mut boot = Map::new();
    for (name, value) in
        [("kernel", options.kernel), ("cmdline", options.cmdline), ("disk", options.boot_disk)]
    {
        boot.extend(value.map(|value| (name.to_owned(), json!(value))));
    }
    if !options.initramfs.is_empty() {
        boot.insert("initramfs".to_owned(), json!(options.initramfs));
    }
    let mut vm = json!({ "name": subject, "memory": memory, "boot": boot });
    let lists = [
        ("disks", "--disk", options.disk),
        ("nics", "--nic", options.nic),
        ("adapters", "--adapter", options.adapter),
    ];
    for (member, option, texts) in lists {
        let parts = texts.iter().map(|text| part(option, text)).collect::<Result<Vec<_>, _>>()?;
        if let (Value::Object(vm), false) = (&mut vm, parts.is_empty()) {
            vm.insert(member.to_owned(), Value::Array(parts));
        }
    }
    if let (Value::Object(vm), Some(cpus)) = (&mut vm, options.cpus) {
        vm.insert("cpus".to_owned(), json!(cpus));
    }
    let wrong = |why: String| CliError::Usage(format!("The options are no valid VM: {why}"));
    let spec: VmSpec = document::read(vm).map_err(|error| wrong(error.to_string()))?;
    spec.check().map_err(|problem| {
        let field = problem.field.as_deref().map(|field| format!("{field}: ")).unwrap_or_default();
        wrong(format!("{field}{}", problem.detail))
    })?;
    Ok(spec)
}

/// A part of a VM: its id, then members. One without a value is true.
fn part(option: &str, text: &str) -> Result<Value, CliError> {
    let mut words = text.split(',');
    let id = words.next().unwrap_or_default();
    if id.is_empty() || id.contains('=') {
        let why = format!("{option} {text:?} does not begin with an id: write ID,KEY=VALUE,…");
        return Err(CliError::Usage(why));
    }
    let mut part = Map::from_iter([("id".to_owned(), json!(id))]);
    for word in words {
        let (key, value) = match word.split_once('=') {
            Some((key @ ("mtu" | "queues"), value)) => {
                (key, value.parse::<u64>().map_or_else(|_| json!(value), |number| json!(number)))
            }
            Some((key, value)) => (key, json!(value)),
            None => (word, json!(true)),
        };
        // As in the names of the commands.
        let key = if key == "group" { "port_group" } else { key };
        if part.insert(key.to_owned(), value).is_some() {
            return Err(CliError::Usage(format!("{option} {text:?} has {key} twice")));
        }
    }
    Ok(Value::Object(part))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> NewVm {
        NewVm {
            memory: Some("512MiB".parse().unwrap()),
            cpus: Some(2),
            kernel: Some("vmlinuz".to_owned()),
            initramfs: Vec::new(),
            cmdline: None,
            boot_disk: None,
            disk: Vec::new(),
            nic: Vec::new(),
            adapter: Vec::new(),
        }
    }

    fn of(options: NewVm) -> Result<VmSpec, String> {
        spec(CreateArgs { subject: "web1".to_owned(), options }).map_err(|error| error.to_string())
    }

    #[test]
    fn options_are_a_specification() {
        let vm = of(NewVm {
            initramfs: vec!["a".to_owned(), "b".to_owned()],
            cmdline: Some("quiet".to_owned()),
            disk: vec!["root,path=web1.qcow2,format=qcow2,ephemeral,serial=0123".to_owned()],
            nic: vec!["mgmt0,bridge=br0,mtu=1400".to_owned(), "net0,group=web".to_owned()],
            adapter: vec!["eth0,group=web,mac=02:00:00:00:00:11".to_owned(), "eth1".to_owned()],
            ..options()
        })
        .unwrap();
        let wanted = json!({
            "name": "web1", "cpus": 2, "memory": "512MiB",
            "boot": { "kernel": "vmlinuz", "initramfs": ["a", "b"], "cmdline": "quiet" },
            "adapters": [{ "id": "eth0", "port_group": "web", "mac": "02:00:00:00:00:11" }, { "id": "eth1" }],
            "disks": [{ "id": "root", "path": "web1.qcow2", "format": "qcow2", "ephemeral": true, "serial": "0123" }],
            "nics": [{ "id": "mgmt0", "bridge": "br0", "mtu": 1400 }, { "id": "net0", "port_group": "web" }],
        });
        assert_eq!(vm, serde_json::from_value(wanted).unwrap());
        let from_disk = NewVm {
            kernel: None,
            boot_disk: Some("root".to_owned()),
            disk: vec!["root,path=7,format=raw".to_owned()],
            ..options()
        };
        let vm = of(from_disk).unwrap();
        assert_eq!((vm.boot.disk.unwrap().as_str(), vm.disks[0].path.as_str()), ("root", "7"));
    }

    #[test]
    fn a_wrong_option_is_named_with_its_fault() {
        let disk = |text: &str| of(NewVm { disk: vec![text.to_owned()], ..options() }).unwrap_err();
        for (text, fault) in [
            ("path=a,format=raw", "does not begin with an id"),
            ("root,path=a,path=b", "has path twice"),
            ("root,path=a", "format"),
            ("root,path=a,format=vmdk", "vmdk"),
            ("root,path=a,format=raw,size=1", "size"),
        ] {
            let error = disk(text);
            assert!(error.contains(fault), "{text}: {error}");
        }
        let error = of(NewVm { kernel: None, ..options() }).unwrap_err();
        assert!(error.contains("boot.kernel"), "{error}");
    }
}
