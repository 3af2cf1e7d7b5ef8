# SPDX-License-Identifier: Apache-2.0
"""What the tiers build with cargo, and the unit tests that cargo-nextest runs.

Every call selects the whole workspace with the same features. Cargo then compiles each crate once: a selection of packages
has features of its own, and with them a second copy of every dependency.
"""

import fnmatch
import json
import os
import subprocess
import xml.etree.ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SELECTION = ["--locked", "--workspace", "--features", "host/test-support"]


def target():
    return ROOT / os.environ.get("CARGO_TARGET_DIR", "target")


def cargo(*arguments, env=None):
    subprocess.run(["cargo", *arguments], check=True, env=env)


def integration(everything):
    """Builds what the integration tests run and returns it as the environment that names it.

    On its own a tier takes the development profile, for the agent under test as well. The complete run has the agent for
    users beside it, optimized, and takes the one with options for tests only where a test needs those.
    """
    kinds = ["--all-targets"] if everything else ["--bin", "portcullis", "--test", "suite"]
    # Beside each other: at its end each build has work for one processor only.
    with ThreadPoolExecutor() as pool:
        release = pool.submit(cargo, "build", "--quiet", "--locked", "--release") if everything else None
        cargo("build", "--quiet", *SELECTION, *kinds)
        if release:
            release.result()
    directory = target()
    # Cargo puts each binary in place anew, maybe under a running agent: tests have a copy of their own.
    for_tests = directory / "debug/portcullis-test-support"
    subprocess.run(["cp", "--force", directory / "debug/portcullis", for_tests], check=True)
    # They run in guests, which have no shared libraries.
    cargo("build", "--quiet", "--locked", "-p", "portcullis-tests", "--bins", "--target-dir",
          str(directory / "static"), env=os.environ | {"RUSTFLAGS": "-C target-feature=+crt-static"})
    return {
        "PORTCULLIS_BIN": str(directory / "release/portcullis" if everything else for_tests),
        "PORTCULLIS_TEST_BIN": str(for_tests),
        "PORTCULLIS_VF_MAILBOX": str(directory / "static/debug/vf-mailbox"),
        "PORTCULLIS_GUEST_METER": str(directory / "static/debug/guest-meter"),
    }


def test_programs():
    """The test programs as (package, directory of the package, file), for the lab, whose host has no cargo."""
    listed = subprocess.run(["cargo", "nextest", "list", *SELECTION, "--cargo-quiet", "--ignore-default-filter",
                             "--list-type", "binaries-only", "--message-format", "json"],
                            check=True, stdout=subprocess.PIPE)
    for binary in json.loads(listed.stdout)["rust-binaries"].values():
        directory = Path(binary["package-id"].split("#")[0].removeprefix("path+file://"))
        yield directory.name, directory, binary["binary-path"]


def suite():
    """The program of the integration tests."""
    [file] = [file for package, _, file in test_programs() if package == "tests" and Path(file).name.startswith("suite-")]
    return file


def nextest(profile, *arguments, env=None):
    """Runs cargo-nextest with a profile of .config/nextest.toml; returns (passed, failed, [(seconds, test)])."""
    report = target() / "nextest" / profile / "junit.xml"
    report.unlink(missing_ok=True)
    command = ["cargo", "nextest", "run", *SELECTION, "--cargo-quiet", "--profile", profile, *arguments]
    status = subprocess.run(command, env=env, check=False).returncode
    if not report.exists():
        return 0, 1, []
    passed, failed, tests = 0, 0, []
    for case in xml.etree.ElementTree.parse(report).iter("testcase"):
        bad = case.find("failure") is not None or case.find("error") is not None
        passed, failed = passed + (not bad), failed + bad
        tests.append((float(case.get("time", 0)), f"{case.get('classname')} {case.get('name')}"))
    # It may also fail without a failed test: by one that leaks processes into its output, for example.
    return passed, failed or int(status != 0), tests


# Files outside of a crate that its build or its tests read. Any other file outside is nobody's.
READ_BY = {
    "Cargo.toml": "*",
    "Cargo.lock": "*",
    "clippy.toml": "*",
    "rust-toolchain.toml": "*",
    ".config/*": "*",
    "resources/guest/*": "cli",
    "resources/grafana/*": "services",
    "resources/examples/*": "cli",
    "resources/seccomp/*": "vmm",
    "resources/openapi.json": "api",
    "docs/errors.md": "api",
    "fuzz/seeds/control/*": "protocol",
    "fuzz/seeds/kernel/*": "vmm",
    "fuzz/seeds/function_*": "passthrough",
    "fuzz/seeds/rest_bodies/*": "api",
}


def packages():
    """The workspace's packages: name -> (directory below the root, names of those that it depends on)."""
    out = subprocess.run(["cargo", "metadata", "--locked", "--no-deps", "--format-version", "1"], check=True,
                         stdout=subprocess.PIPE).stdout
    found = json.loads(out)["packages"]
    names = {package["name"] for package in found}
    return {
        package["name"]: (
            str(Path(package["manifest_path"]).parent.relative_to(ROOT)),
            {dependency["name"] for dependency in package["dependencies"]} & names,
        )
        for package in found
    }


def owners(file, directories):
    """The packages whose build or tests read a file, by the file's path below the root."""
    inside = [name for name, directory in directories.items() if file.startswith(directory + "/")]
    if inside:
        # A crate may lie below another one's directory.
        return {max(inside, key=lambda name: len(directories[name]))}
    for pattern, owner in READ_BY.items():
        if fnmatch.fnmatch(file, pattern):
            return set(directories) if owner == "*" else {owner}
    return set()


def git(*arguments):
    done = subprocess.run(["git", *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                          check=False)
    return done.stdout.split("\0") if done.returncode == 0 else None


def changed_files():
    """Files that differ from main: the branch's own commits, the working tree, and what git does not know yet."""
    base = "HEAD"
    for main in ("origin/main", "main"):
        if found := git("merge-base", "HEAD", main):
            base = found[0].strip()
            break
    files = git("diff", "--name-only", "-z", base) or []
    files += git("ls-files", "--others", "--exclude-standard", "-z") or []
    return sorted({file for file in files if file})


def affected(crates):
    """`crates` and every package of the workspace that depends on one of them."""
    depends = {name: needs for name, (_, needs) in packages().items()}
    found = set(crates)
    while more := {name for name, needs in depends.items() if needs & found} - found:
        found |= more
    return found
