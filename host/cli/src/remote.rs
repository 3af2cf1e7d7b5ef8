// SPDX-License-Identifier: Apache-2.0

//! An agent on another host, or one that is to be used over TCP.

use std::{fs, path::PathBuf};

use api::{Client, Remote};
use clap::Args;
use options::token_file;

use super::error::CliError;

#[derive(Debug, Args)]
pub(super) struct RemoteArgs {
    /// The agent's address, in place of its socket: https://HOST:PORT.
    #[arg(long, global = true, value_name = "URL", env = "PORTCULLIS_URL")]
    url: Option<String>,
    /// A file with the token for --url: a line NAME:TOKEN as in the agent's own file; no other user
    /// may read it. For `serve`: the tokens of the clients of --listen.
    #[arg(long, global = true, value_name = "FILE", env = "PORTCULLIS_TOKEN_FILE")]
    pub(super) token_file: Option<PathBuf>,
    /// The certificates (PEM) of the authorities that vouch for the agent at an https --url.
    #[arg(long, global = true, value_name = "FILE", env = "PORTCULLIS_CA_FILE")]
    ca_file: Option<PathBuf>,
}

impl RemoteArgs {
    /// The client of the agent that the command line names.
    pub(super) fn client(&self, socket: PathBuf) -> Result<Client, CliError> {
        let Some(url) = &self.url else { return Ok(Client::new(socket)) };
        let file = self.token_file.as_ref().ok_or_else(|| {
            CliError::Usage("--url needs a token: name its file with --token-file".to_owned())
        })?;
        let tokens = token_file::read(file)?;
        let authorities = match &self.ca_file {
            None => None,
            Some(path) => Some(fs::read(path).map_err(|source| {
                let path = path.display().to_string();
                CliError::Read { path, source }
            })?),
        };
        Ok(Client::remote(Remote::new(url, &tokens, authorities.as_deref())?))
    }
}
