// SPDX-License-Identifier: Apache-2.0

//! Generates completions and man pages from the command line's definition.

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
};

use clap::{Args, Command};
use clap_complete::Shell;

use super::error::CliError;

#[derive(Debug, Args)]
pub struct CompletionsArgs {
    /// The shell. For bash: `portcullis completions bash > /etc/bash_completion.d/portcullis`.
    shell: Shell,
}

#[derive(Debug, Args)]
pub struct ManArgs {
    /// The directory of the pages; created if it is missing.
    #[arg(value_name = "DIR")]
    directory: PathBuf,
}

/// Writes the completion script of the shell.
pub(super) fn completions(
    args: &CompletionsArgs,
    mut whole: Command,
    to: &mut dyn Write,
) -> Result<(), CliError> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut whole, "portcullis", &mut script);
    Ok(to.write_all(&script)?)
}

/// Writes a page for each command.
pub(super) fn man(args: &ManArgs, whole: Command) -> Result<(), CliError> {
    let write = |directory: &Path| -> io::Result<()> {
        fs::create_dir_all(directory)?;
        clap_mangen::generate_to(whole, directory)
    };
    write(&args.directory).map_err(|source| {
        let path = args.directory.display().to_string();
        CliError::Write { path, source }
    })
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory as _, Parser, ValueEnum as _};

    use super::*;
    use crate::{Common, EXIT_CODES};

    #[derive(Parser)]
    #[command(name = "portcullis", after_help = EXIT_CODES)]
    struct Whole {
        #[command(flatten)]
        _common: Common,
        #[command(subcommand)]
        _command: crate::Command,
    }

    #[test]
    fn each_shell_gets_all_commands() {
        for shell in Shell::value_variants() {
            let mut script = Vec::new();
            completions(&CompletionsArgs { shell: *shell }, Whole::command(), &mut script).unwrap();
            let script = String::from_utf8(script).unwrap();
            for word in ["portcullis", "apply", "port-group", "set-vfs", "dry-run"] {
                assert!(script.contains(word), "{shell}: {word}");
            }
        }
    }

    #[test]
    fn each_command_has_a_page() {
        let directory = tempfile::tempdir().unwrap();
        man(&ManArgs { directory: directory.path().join("man") }, Whole::command()).unwrap();
        let page = |name: &str| fs::read_to_string(directory.path().join("man").join(name)).unwrap();
        let whole = page("portcullis.1");
        assert!(whole.contains("EXIT CODES") || whole.contains("Exit codes"), "{whole}");
        assert!(page("portcullis-vm-boot.1").contains("\\-\\-wait"));
        assert!(page("portcullis-console.1").contains("Ctrl"));
        let error = man(&ManArgs { directory: "/proc/nothing".into() }, Whole::command()).unwrap_err();
        assert!(error.to_string().contains("/proc/nothing"), "{error}");
    }
}
