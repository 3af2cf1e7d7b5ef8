//! Every code of `docs/errors.md` is brought about by a test. Which test that is, its source tells: it names the code.

use std::{
    fs,
    path::{Path, PathBuf},
};

use api::{ProblemCode, types::CauseCode};

/// What is not written by hand, or not for this workspace.
const NOT_SOURCES: [&str; 4] = ["target", ".git", "fuzz", "resources"];

fn sources(directory: &Path, found: &mut Vec<(PathBuf, String)>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() && !NOT_SOURCES.contains(&name.as_str()) {
            sources(&path, found);
        } else if name.ends_with(".rs") {
            found.push((path.clone(), fs::read_to_string(&path).unwrap()));
        }
    }
}

/// The part of a source that is test code.
fn tests_of<'a>(path: &Path, text: &'a str) -> &'a str {
    let whole = path.components().any(|part| part.as_os_str() == "tests") || path.ends_with("tests.rs");
    // A module of tests is the last of its file.
    let from = if whole { Some(0) } else { text.find("#[cfg(test)]\nmod tests {") };
    from.map_or("", |from| &text[from..])
}

/// Whether a text names the variant, and not one that begins with its name.
fn names(text: &str, variant: &str) -> bool {
    let after = |(at, found): (usize, &str)| text[at + found.len()..].chars().next();
    text.match_indices(variant).map(after).any(|next| !next.is_some_and(|c| c.is_alphanumeric() || c == '_'))
}

#[test]
fn every_code_of_the_docs_is_brought_about_by_a_test() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().unwrap();
    let mut all = Vec::new();
    sources(&root, &mut all);
    // Of what the API itself refuses: its tests' backend is none, and what that refuses proves nothing.
    let own = |variant: &str| {
        let routes = root.join("api/src/router");
        all.iter().any(|(path, text)| {
            path.starts_with(&routes) && !path.ends_with("codes.rs") && names(text, variant)
        })
    };
    let api = root.join("api");
    let mut missing = Vec::new();
    let mut check = |variant: String, code: Option<ProblemCode>| {
        let by_api = own(&variant) || variant.ends_with("::InvalidRequest");
        // As it is checked in the bytes of an answer.
        let wire = code.map_or_else(Vec::new, |code| {
            let status = code.status();
            vec![format!("problem({status}, \"{code}\")"), format!("\"{status} {code}\"")]
        });
        let tested = all.iter().any(|(path, text)| {
            let counts = !path.starts_with(&api) || by_api && path.starts_with(api.join("tests"));
            let tests = tests_of(path, text);
            counts && (names(tests, &variant) || wire.iter().any(|text| tests.contains(text)))
        });
        if !tested {
            missing.push(variant);
        }
    };
    for code in ProblemCode::ALL {
        check(format!("ProblemCode::{code:?}"), Some(*code));
    }
    for code in CauseCode::ALL {
        check(format!("CauseCode::{code:?}"), None);
    }
    assert!(missing.is_empty(), "no test brings these about: {missing:?}");
}

#[test]
fn test_code_is_told_from_the_rest() {
    let of = |path: &str, text| tests_of(Path::new(path), text).to_owned();
    assert_eq!(of("host/src/vm/tests.rs", "a"), "a");
    assert_eq!(of("tests/suite/local/rest.rs", "a"), "a");
    assert_eq!(of("host/src/vm/boot.rs", "a"), "");
    assert_eq!(of("host/src/a.rs", "x\n#[cfg(test)]\nmod tests {y"), "#[cfg(test)]\nmod tests {y");
    assert!(names("a(Code::NotFound)", "Code::NotFound") && !names("Code::NotFoundHere", "Code::NotFound"));
}
