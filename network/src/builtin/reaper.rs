//! What goes slowly after a pod: its link, and the bridge after the last.
//!
//! Deleting a link costs 26 ms of the kernel's one routing lock, so nobody waits for it. A link goes by itself when its
//! namespace ends, which the kernel does in batches of its own; this looks a moment later and deletes, in one request,
//! those whose namespace something still holds.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use super::{Builtin, blocking};
use crate::NetworkError;
use crate::ledger::Kind;
use crate::netlink::{Batch, Socket};

/// From a pod's end to the first look at its link.
const DELAY: Duration = Duration::from_millis(100);
/// After a failure.
const AGAIN: Duration = Duration::from_secs(5);

/// The pods whose links are to go.
#[derive(Debug, Default)]
pub(super) struct Reaper {
    pods: Mutex<BTreeSet<String>>,
    wake: Notify,
    /// One pass at a time.
    pass: tokio::sync::Mutex<()>,
}

impl Reaper {
    pub(super) fn add(&self, pod: &str) {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner).insert(pod.to_owned());
        self.wake.notify_one();
    }

    fn take(&self) -> BTreeSet<String> {
        std::mem::take(&mut *self.pods.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Starts the background work of this network; it ends with it.
pub(super) fn start(builtin: &Arc<Builtin>) {
    let (reaper, linger) = (builtin.reaper.clone(), builtin.linger);
    let builtin = Arc::downgrade(builtin);
    tokio::spawn(async move {
        // Whether the bridge may be there for no pod.
        let mut idle = false;
        loop {
            let woken = tokio::select! {
                () = reaper.wake.notified() => true,
                () = tokio::time::sleep(linger), if idle => false,
            };
            if woken {
                tokio::time::sleep(DELAY).await;
            }
            // Whoever drops the network wakes this task.
            let Some(builtin) = builtin.upgrade() else { return };
            if !woken {
                let removed = builtin.remove_if_idle().await;
                idle = removed.is_err();
                if let Err(error) = removed {
                    tracing::warn!(%error, "removing the bridge of no pod; trying again");
                }
                continue;
            }
            idle = true;
            if let Err(error) = builtin.reap().await {
                tracing::warn!(%error, "removing what ended pods left; trying again");
                drop(builtin);
                tokio::time::sleep(AGAIN).await;
                reaper.wake.notify_one();
            }
        }
    });
}

impl Drop for Builtin {
    fn drop(&mut self) {
        self.reaper.wake.notify_one();
    }
}

impl Builtin {
    /// Removes what is left of the pods given to the reaper, and forgets them.
    pub(crate) async fn reap(self: &Arc<Self>) -> Result<(), NetworkError> {
        let _pass = self.reaper.pass.lock().await;
        let pods = self.reaper.take();
        if pods.is_empty() {
            return Ok(());
        }
        let (this, of_thread) = (self.clone(), pods.clone());
        let reaped = blocking(move || this.reap_pods(&of_thread)).await;
        if reaped.is_err() {
            self.reaper.pods.lock().unwrap_or_else(PoisonError::into_inner).extend(pods);
        }
        reaped
    }

    fn reap_pods(&self, pods: &BTreeSet<String>) -> Result<(), NetworkError> {
        // A pod that was set up again meanwhile has a fresh record.
        let records: Vec<_> =
            pods.iter().filter_map(|id| self.ledger.get(id)).filter(|record| record.released).collect();
        let socket = Socket::route()?;
        let mut batch = Batch::new();
        for record in &records {
            if let Kind::Builtin(given) = &record.kind
                && socket.link_index(&given.link).is_ok()
            {
                batch.delete_link(&given.link);
            }
        }
        socket.execute(&batch)?;
        self.save_cursors()?;
        for record in records {
            if let Kind::Builtin(given) = &record.kind {
                let mut pool = self.pool.lock().unwrap_or_else(PoisonError::into_inner);
                given.addresses.iter().for_each(|address| pool.release(address.addr(), Instant::now()));
            }
            self.ledger.remove(&record.id)?;
        }
        Ok(())
    }

    /// Removes the bridge and the table if no pod has a record.
    pub(super) async fn remove_if_idle(self: &Arc<Self>) -> Result<(), NetworkError> {
        let mut base = self.base.clone().write_owned().await;
        if self.ledger.all().iter().any(|record| matches!(record.kind, Kind::Builtin(_))) {
            return Ok(());
        }
        let this = self.clone();
        blocking(move || this.uninstall(&mut base)).await
    }

    /// Finishes the reaper's work now.
    pub(crate) async fn release(self: &Arc<Self>) -> Result<(), NetworkError> {
        self.reap().await?;
        self.remove_if_idle().await
    }
}
