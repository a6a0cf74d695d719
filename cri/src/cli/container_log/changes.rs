//! Waiting for a directory's files to change.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use tokio::io::unix::AsyncFd;

/// How often to look where the kernel cannot tell.
const WITHOUT: Duration = Duration::from_millis(100);

/// Tells when a file of a directory was written, made or renamed.
#[derive(Debug)]
pub(super) struct Changes {
    inotify: Option<AsyncFd<OwnedFd>>,
}

impl Changes {
    /// Without inotify (too many watches, a file system that has none) it looks from time to time instead.
    pub(super) fn of(directory: &Path) -> Self {
        Changes { inotify: watch(directory).ok() }
    }

    /// Waits until something has changed since the last call.
    pub(super) async fn next(&mut self) {
        let Some(inotify) = &self.inotify else { return tokio::time::sleep(WITHOUT).await };
        let Ok(mut readable) = inotify.readable().await else {
            self.inotify = None;
            return;
        };
        let mut events = [0u8; 4096];
        while matches!(rustix::io::read(inotify.get_ref(), &mut events), Ok(length) if length > 0) {}
        readable.clear_ready();
    }
}

fn watch(directory: &Path) -> std::io::Result<AsyncFd<OwnedFd>> {
    let inotify = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
    inotify::add_watch(&inotify, directory, WatchFlags::MODIFY | WatchFlags::CREATE | WatchFlags::MOVED_TO)?;
    // Its successor is unsafe, for types whose descriptor may change or close under it; an OwnedFd's does not.
    #[expect(deprecated)]
    AsyncFd::new(inotify)
}
