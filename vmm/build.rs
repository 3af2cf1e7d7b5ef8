// SPDX-License-Identifier: Apache-2.0

//! Compiles the seccomp filters (`resources/seccomp`) to BPF, so that a process installs them without parsing anything.

use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    error::Error,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use seccompiler::{TargetArch, compile_from_json};
use serde_json::{Value, json};

/// A filter's file, and the name of the constant that it becomes.
const FILTERS: [(&str, &str); 10] = [
    ("main", "MAIN"),
    ("vcpu", "VCPU"),
    ("io-thread", "IO"),
    ("disk-thread", "DISK"),
    ("network-thread", "NETWORK"),
    ("port-thread", "PORT"),
    ("relay", "RELAY"),
    ("function-thread", "FUNCTION"),
    ("simulated-vf", "SIMULATED_VF"),
    ("simulated-pf", "SIMULATED_PF"),
];

fn main() -> Result<(), Box<dyn Error>> {
    let root = Path::new(&env::var("CARGO_MANIFEST_DIR")?).join("../resources/seccomp");
    println!("cargo::rerun-if-changed={}", root.display());
    let arch = TargetArch::try_from(env::var("CARGO_CFG_TARGET_ARCH")?.as_str())?;
    let mut code = String::new();
    for (file, constant) in FILTERS {
        writeln!(code, "{}", definition(file, constant, &rules(&root, file)?, arch)?)?;
    }
    fs::write(PathBuf::from(env::var("OUT_DIR")?).join("seccomp.rs"), code)?;
    Ok(())
}

/// The definition of a filter's constant.
fn definition(
    file: &str,
    constant: &str,
    rules: &[Value],
    arch: TargetArch,
) -> Result<String, Box<dyn Error>> {
    check(file, rules)?;
    let mut code = format!("pub(super) const {constant}: &[(u16, u8, u8, u32)] = &[\n");
    for (operation, jt, jf, k) in program(&by_number(rules, arch)?) {
        writeln!(code, "    ({operation}, {jt}, {jf}, {k}),")?;
    }
    Ok(code + "];")
}

/// The rules of a file and of those that it includes, in seccompiler's format.
fn rules(root: &Path, file: &str) -> Result<Vec<Value>, Box<dyn Error>> {
    let path = root.join(file).with_extension("json");
    println!("cargo::rerun-if-changed={}", path.display());
    let text = fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    let mut parsed: Value =
        serde_json::from_str(&text).map_err(|error| format!("{}: {error}", path.display()))?;
    let mut all = Vec::new();
    for included in parsed["include"].as_array().into_iter().flatten() {
        all.extend(rules(root, included.as_str().ok_or("an include is no name")?)?);
    }
    let Value::Array(own) = parsed["filter"].take() else {
        return Err(format!("{}: it has no list called filter", path.display()).into());
    };
    all.extend(own);
    Ok(all)
}

/// An instruction: code, jt, jf, k.
type Instruction = (u16, u8, u8, u32);

/// The instructions that begin the filter, and the instructions for each system call, by its number.
type Parts = (Vec<Instruction>, BTreeMap<u32, Vec<Instruction>>);

// linux/bpf_common.h, linux/seccomp.h
const LOAD: u16 = 0x20;
const JUMP: u16 = 0x05;
const JUMP_IF_AT_LEAST: u16 = 0x35;
const JUMP_IF_EQUAL: u16 = 0x15;
const RETURN: u16 = 0x06;
const KILL_PROCESS: u32 = 0x8000_0000;
const ALLOW: u32 = 0x7fff_0000;
/// The length of seccompiler's prelude: load the architecture, compare it, kill, load the number.
const PRELUDE: usize = 4;

/// Compiles the rules of each system call with seccompiler: instructions by the call's number, which end in a
/// verdict.
fn by_number(rules: &[Value], arch: TargetArch) -> Result<Parts, String> {
    let mut by_name: BTreeMap<&str, Vec<&Value>> = BTreeMap::new();
    for rule in rules {
        by_name.entry(rule["syscall"].as_str().unwrap_or_default()).or_default().push(rule);
    }
    let (mut prelude, mut calls) = (Vec::new(), BTreeMap::new());
    for (name, rules) in by_name {
        let filter =
            json!({ name: { "mismatch_action": "kill_process", "match_action": "allow", "filter": rules } });
        let mut compiled = compile_from_json(filter.to_string().as_bytes(), arch)
            .map_err(|error| format!("{name}: {error}"))?;
        let instructions = compiled.remove(name).unwrap_or_default();
        let instructions: Vec<Instruction> =
            instructions.into_iter().map(|i| (i.code, i.jt, i.jf, i.k)).collect();
        let number = match instructions.get(..=PRELUDE) {
            Some(
                [
                    (LOAD, ..),
                    (JUMP_IF_EQUAL, ..),
                    (RETURN, ..),
                    (LOAD, _, _, 0),
                    (JUMP_IF_EQUAL, _, _, number),
                ],
            ) => *number,
            _ => {
                return Err(format!(
                    "{name}: seccompiler builds filters in another way than this script expects"
                ));
            }
        };
        let (before, call) = instructions.split_at(PRELUDE);
        prelude = before.to_vec();
        let plain = rules.iter().all(|rule| rule["args"].is_null());
        // Replace seccompiler's code, which is twice as long: the kernel translates it at each start of a thread.
        let short = [(JUMP_IF_EQUAL, 0, 1, number), (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, KILL_PROCESS)];
        calls.insert(number, if plain { short.to_vec() } else { call.to_vec() });
    }
    Ok((prelude, calls))
}

/// Joins all filters to one, with a binary search for the system call's number.
///
/// seccompiler itself would compare the number with one after the other. The kernel runs a new filter for every
/// system call that exists, which took 0.2 ms of each start of a thread.
fn program((prelude, calls): &Parts) -> Vec<Instruction> {
    let calls: Vec<_> = calls.iter().collect();
    [prelude.clone(), halves(&calls)].concat()
}

fn halves(calls: &[(&u32, &Vec<Instruction>)]) -> Vec<Instruction> {
    match calls {
        [] => vec![(RETURN, 0, 0, KILL_PROCESS)],
        [(_, call)] => (*call).clone(),
        _ => {
            let (low, high) = calls.split_at(calls.len() / 2);
            let (first, low, high) =
                (high.first().map_or(0, |(number, _)| **number), halves(low), halves(high));
            let over = u32::try_from(low.len()).unwrap_or(u32::MAX);
            [vec![(JUMP_IF_AT_LEAST, 0, 1, first), (JUMP, 0, 0, over)], low, high].concat()
        }
    }
}

/// Checks that each rule and condition has a comment, which names its caller, and that no rule hides another.
/// seccompiler treats a system call that has one rule with conditions and one without as a call with conditions.
fn check(file: &str, rules: &[Value]) -> Result<(), String> {
    let (mut plain, mut conditional) = (BTreeSet::new(), BTreeSet::new());
    for rule in rules {
        let name = rule["syscall"].as_str().unwrap_or_default();
        let commented = |value: &Value| value["comment"].as_str().is_some_and(|comment| !comment.is_empty());
        let args = rule["args"].as_array();
        if !commented(rule) || !args.into_iter().flatten().all(commented) {
            return Err(format!(
                "{file}: a rule or a condition for {name} has no comment that names its caller"
            ));
        }
        let new = if args.is_some() {
            conditional.insert(name);
            true
        } else {
            plain.insert(name)
        };
        if !new || (plain.contains(name) && conditional.contains(name)) {
            return Err(format!("{file}: {name} has two rules, one of them without conditions"));
        }
    }
    Ok(())
}
