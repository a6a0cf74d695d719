//! Network namespaces made before their pods are asked for: the kernel takes half a millisecond for each.
//!
//! Nobody but this process has them, so they end with it. They have the settings of the host as these were when the
//! namespace was made, so an old one is given to nobody, and a daemon that starts no pods has none.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use hull_sys::namespace::{Namespaces, unshare};

use super::blocking;
use crate::refill::Refill;
use crate::{NetworkError, namespace};

/// How many wait.
const COUNT: usize = 4;
/// How old one may become.
const LIFE: Duration = Duration::from_secs(60);

/// New namespaces that wait for pods.
#[derive(Debug)]
pub(super) struct Fresh {
    waiting: Mutex<Vec<Waiting>>,
    refill: Arc<Refill>,
}

#[derive(Debug)]
struct Waiting {
    namespace: OwnedFd,
    made: Instant,
}

impl Fresh {
    /// None are made before the first was asked for. Must be called inside the runtime.
    pub(super) fn new() -> Arc<Self> {
        let refill = Arc::new(Refill::default());
        let fresh = Arc::new(Self { waiting: Mutex::default(), refill: Arc::clone(&refill) });
        let weak = Arc::downgrade(&fresh);
        tokio::spawn(async move {
            let mut idle = true;
            loop {
                let aged = tokio::select! {
                    () = refill.due(|| weak.upgrade().map_or(0, |fresh| fresh.left())) => false,
                    () = tokio::time::sleep(LIFE), if !idle => true,
                };
                // Whoever drops them wakes this task.
                let Some(fresh) = weak.upgrade() else { return };
                idle = aged;
                if aged {
                    fresh.drop_older_than(Duration::ZERO);
                    continue;
                }
                let filled = blocking(move || fresh.fill()).await;
                if let Err(error) = filled {
                    tracing::debug!(%error, "no network namespace is made in advance");
                }
            }
        });
        fresh
    }

    /// A namespace with nothing but a loopback interface that is down. `None`: there is none, and one has to be made.
    pub(super) fn take(&self) -> Option<OwnedFd> {
        self.refill.taken();
        self.drop_older_than(LIFE);
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).pop().map(|waiting| waiting.namespace)
    }

    fn left(&self) -> usize {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    fn drop_older_than(&self, age: Duration) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.retain(|waiting| waiting.made.elapsed() < age);
    }

    /// Blocks shortly.
    fn fill(&self) -> Result<(), NetworkError> {
        self.drop_older_than(LIFE);
        for _ in self.left()..COUNT {
            let made = Instant::now();
            let failed =
                |source| NetworkError::Kernel { action: "making a network namespace".into(), source };
            let namespace = make().map_err(failed)?;
            self.waiting.lock().unwrap_or_else(PoisonError::into_inner).push(Waiting { namespace, made });
        }
        Ok(())
    }
}

impl Drop for Fresh {
    fn drop(&mut self) {
        self.refill.taken();
    }
}

/// On a thread that ends with it.
fn make() -> io::Result<OwnedFd> {
    let body = || -> io::Result<OwnedFd> {
        unshare(Namespaces::NET)?;
        Ok(File::open(namespace::OWN)?.into())
    };
    let thread = std::thread::Builder::new().name("new network".into()).spawn(body)?;
    thread.join().unwrap_or_else(|_| Err(io::Error::other("it panicked")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[tokio::test]
    async fn a_namespace_is_made_in_advance_once_one_was_needed_and_is_given_to_one_pod() {
        let fresh = Fresh::new();
        assert!(fresh.take().is_none(), "none is made before one was needed");
        let mut given = Vec::new();
        for _ in 0..1000 {
            given.extend(fresh.take());
            if given.len() > COUNT {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let numbers: std::collections::BTreeSet<u64> =
            given.iter().map(|namespace| rustix::fs::fstat(namespace.as_fd()).unwrap().st_ino).collect();
        assert!(given.len() > COUNT && numbers.len() == given.len(), "{numbers:?} of {}", given.len());
        let own = std::fs::metadata(namespace::OWN).unwrap();
        assert!(!numbers.contains(&std::os::unix::fs::MetadataExt::ino(&own)), "this thread's is nobody's");
    }

    #[tokio::test]
    async fn an_old_namespace_is_given_to_nobody() {
        let fresh = Fresh { waiting: Mutex::default(), refill: Arc::default() };
        fresh.fill().unwrap();
        let old = Instant::now().checked_sub(LIFE).unwrap();
        fresh.waiting.lock().unwrap().iter_mut().for_each(|waiting| waiting.made = old);
        assert!(fresh.take().is_none());
    }
}
