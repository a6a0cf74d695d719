//! StopContainer: asked by its stop signal, and killed if it does not end in time.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::FutureExt;
use hull_agent::protocol::messages::{self, request};
use tokio::time::Instant;

use super::objects::Container;
use super::translate::signal;
use super::{Error, Result, Runtime};
use crate::sandbox::{SandboxError, Slots};
use crate::store::record::ContainerPhase;

const SIGKILL: u32 = 9;
/// How long a killed container may take to be gone; a process in an uninterruptible wait takes what it takes.
const DEATH: Duration = Duration::from_secs(30);
/// Longest time for a container to end by itself; kubelet's longest is far below.
const MAX_GRACE: u64 = 30 * 24 * 3600;

impl Runtime {
    /// Stops a container, giving it `grace` seconds. That it does not run, or is gone, is no error.
    pub async fn stop_container(self: &Arc<Self>, id: &str, grace: i64) -> Result<()> {
        let container = match self.objects.container(id) {
            Err(Error::NotFound { .. }) => return Ok(()),
            found => found?,
        };
        let grace = Duration::from_secs(u64::try_from(grace).unwrap_or(0).min(MAX_GRACE));
        let runtime = Arc::clone(self);
        self.to_the_end(async move { runtime.stop(&container, grace).await }).await
    }

    /// Without the container's order while it waits: a second call is not held up by the first. Of several deadlines
    /// the earliest counts; the stop signal is sent once.
    pub(super) async fn stop(&self, container: &Arc<Container>, grace: Duration) -> Result<()> {
        // A start under way is waited for.
        drop(container.order.lock().await);
        if matches!(container.phase(), ContainerPhase::Created | ContainerPhase::Exited) {
            return Ok(());
        }
        let over = container.wait_over();
        tokio::pin!(over);
        container.stop_by(Instant::now() + grace);
        if !grace.is_zero() && !container.asked_to_stop.swap(true, Ordering::SeqCst) {
            let asked = match self.stop_signal(container) {
                Ok(signal) => self.signal(container, signal, false).await,
                Err(error) => Err(error),
            };
            // The next who stops it tries again.
            container.asked_to_stop.store(asked.is_ok(), Ordering::SeqCst);
            asked?;
        }
        // A timer takes a millisecond even if it has passed.
        let is_over = match grace.is_zero() {
            true => over.as_mut().now_or_never().is_some(),
            false => tokio::select! {
                biased;
                () = &mut over => true,
                () = container.wait_stop_deadline() => false,
            },
        };
        if is_over {
            return Ok(());
        }
        self.signal(container, SIGKILL, true).await?;
        match tokio::time::timeout(DEATH, over).await {
            Ok(()) => Ok(()),
            Err(_) => Err(Error::DeadlineExceeded(format!(
                "the container {} was killed, but has not ended after {} seconds",
                container.id(),
                DEATH.as_secs()
            ))),
        }
    }

    fn stop_signal(&self, container: &Container) -> Result<u32> {
        container.with_record(|record| {
            let asked = record.config.as_ref().map(|config| config.stop_signal()).unwrap_or_default();
            signal::stop_signal(asked, record.image.as_ref().map_or("", |image| &image.stop_signal))
        })
    }

    async fn signal(&self, container: &Container, signal: u32, all: bool) -> Result<()> {
        let agent = match container.pod.ready_agent() {
            Ok(agent) => agent,
            // Its end has been noted meanwhile.
            Err(_) if container.with_record(|record| record.is_over()) => return Ok(()),
            Err(error) => return Err(error),
        };
        let call = messages::Signal { container_id: container.id().to_owned(), signal, all };
        match agent.order("send a signal", request::Call::Signal(call), Slots::default()).await {
            // It ended by itself before, or its pod does now; either way its end is (being) noted.
            Ok(()) | Err(SandboxError::Lost(_)) => Ok(()),
            Err(SandboxError::Refused {
                code: messages::error::Code::NotFound | messages::error::Code::FailedPrecondition,
                ..
            }) => Ok(()),
            Err(error) => Err(Error::sandbox(format!(
                "cannot send signal {signal} to the container {}",
                container.id()
            ))(error)),
        }
    }
}
