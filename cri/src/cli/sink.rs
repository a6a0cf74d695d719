//! Where an archive goes: standard output, or a file that appears when it is whole.

use std::fs::{self, File};
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};

use tonic::Streaming;

use super::error::CliError;
use crate::api::hull::Chunk;
use crate::api::hull::chunk::Fetched;

/// A place for an archive.
pub(super) enum Sink {
    /// Standard output.
    Output(io::Stdout),
    /// A file under another name until it is whole.
    File { out: File, path: PathBuf, unfinished: PathBuf },
}

impl Sink {
    /// The file, or standard output if that is no terminal.
    pub(super) fn open(file: Option<PathBuf>) -> Result<Self, CliError> {
        let Some(path) = file else {
            let out = io::stdout();
            return match out.is_terminal() {
                true => Err(CliError::Refused(
                    "an archive is nothing for a terminal: name a file with --file, or pipe it somewhere"
                        .into(),
                )),
                false => Ok(Self::Output(out)),
            };
        };
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let unfinished = path.with_file_name(format!(".{name}.{}", std::process::id()));
        let out = File::create_new(&unfinished)
            .map_err(|error| CliError::local(format!("create {}", unfinished.display()), error))?;
        Ok(Self::File { out, path, unfinished })
    }

    /// Writes all of an archive. Only then a file gets its name. What is told of layers that are fetched goes to `show`.
    pub(super) async fn take_all(
        &mut self,
        doing: &str,
        mut chunks: Streaming<Chunk>,
        mut show: impl FnMut(&Fetched),
    ) -> Result<(), CliError> {
        let failed = |status| CliError::Call { doing: doing.to_owned(), status: Box::new(status) };
        while let Some(chunk) = chunks.message().await.map_err(failed)? {
            if let Some(fetched) = &chunk.fetched {
                show(fetched);
            }
            self.write(&chunk.bytes).map_err(|error| CliError::local("write the archive", error))?;
        }
        match self {
            Self::Output(out) => out.flush().map_err(|error| CliError::local("write the archive", error)),
            Self::File { out, path, unfinished } => finish(out, unfinished, path)
                .map_err(|error| CliError::local(format!("finish {}", path.display()), error)),
        }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Output(out) => out.write_all(bytes),
            Self::File { out, .. } => out.write_all(bytes),
        }
    }
}

fn finish(out: &File, unfinished: &Path, path: &Path) -> io::Result<()> {
    out.sync_all()?;
    fs::rename(unfinished, path)
}

impl Drop for Sink {
    fn drop(&mut self) {
        if let Self::File { unfinished, .. } = self {
            // Gone already when it was finished.
            let _ = fs::remove_file(unfinished);
        }
    }
}
