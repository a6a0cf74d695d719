//! Pods and containers in memory: their records, their order of operations, the way to their agents.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, Weak};

use hull_agent::protocol::messages::Attach;
use hull_images::LayerHold;
use tokio::sync::{oneshot, watch};
use tokio::time::Instant;

use super::error::Result;
use super::get_container_events::{Change, Changes, Subject};
use super::{Error, host};
use crate::api::runtime::{ContainerEventType, ContainerMetadata, PodSandboxMetadata};
use crate::sandbox::{Agent, Launcher, Place, SandboxError, Slots};
use crate::stats::{DiskUsage, Rate};
use crate::store::record::{ContainerPhase, ContainerRecord, Exit, PodPhase, SandboxRecord};
use crate::store::{Store, StoreError, Table};

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A record in memory and on disk. Writes of one record are ordered by its lock, under which `tell` is called with the
/// record before and after.
#[derive(Debug)]
struct Kept<R>(Mutex<R>);

impl<R: crate::store::Record + Clone> Kept<R> {
    fn new(record: R) -> Self {
        Self(Mutex::new(record))
    }

    fn get(&self) -> R {
        lock(&self.0).clone()
    }

    /// Changes the record if `change` can; on disk first, and not at all if the disk refuses.
    fn try_change<T>(
        &self,
        table: &Table<R>,
        change: impl FnOnce(&mut R) -> T,
        tell: impl FnOnce(&R, &R),
    ) -> std::result::Result<T, StoreError> {
        let mut current = lock(&self.0);
        let mut next = current.clone();
        let result = change(&mut next);
        table.put(&next)?;
        let before = std::mem::replace(&mut *current, next);
        tell(&before, &current);
        Ok(result)
    }

    /// Notes what has happened already: kept in memory even if the disk refuses.
    fn change<T>(&self, table: &Table<R>, change: impl FnOnce(&mut R) -> T, tell: impl FnOnce(&R, &R)) -> T {
        let mut current = lock(&self.0);
        let before = current.clone();
        let result = change(&mut current);
        if let Err(error) = table.put(&current) {
            tracing::error!(id = current.id(), %error, "a change is known only until hulld restarts");
        }
        tell(&before, &current);
        result
    }
}

/// What names a pod: name, namespace, uid, attempt.
pub type PodKey = (String, String, String, u32);
/// What names a container: its pod, name, attempt.
pub type ContainerKey = (String, String, u32);

/// The key of a pod's metadata.
pub fn pod_key(metadata: &PodSandboxMetadata) -> PodKey {
    let PodSandboxMetadata { name, uid, namespace, attempt } = metadata.clone();
    (name, namespace, uid, attempt)
}

/// The key of a container's metadata.
pub fn container_key(pod: &str, metadata: &ContainerMetadata) -> ContainerKey {
    (pod.to_owned(), metadata.name.clone(), metadata.attempt)
}

/// A pod.
#[derive(Debug)]
pub struct Pod {
    id: String,
    record: Kept<SandboxRecord>,
    /// Operations on the pod as a whole write, those on one of its containers read. Taken before a container's.
    pub order: tokio::sync::RwLock<()>,
    /// One change of its size after the other.
    pub resizing: tokio::sync::Mutex<()>,
    /// How it was made.
    pub launcher: Arc<dyn Launcher>,
    directory: PathBuf,
    agent: Mutex<Option<Arc<Agent>>>,
    containers: Mutex<BTreeMap<String, Arc<Container>>>,
    ending: AtomicBool,
    agent_has_rdt: AtomicBool,
    /// Where its changes are told, once it is visible.
    audience: OnceLock<(Arc<Changes>, Weak<Pod>)>,
    /// How fast it uses processor time.
    pub rate: Rate,
}

impl Pod {
    /// A pod with this record; `directory` is its volatile one.
    pub fn new(record: SandboxRecord, launcher: Arc<dyn Launcher>, directory: PathBuf) -> Arc<Self> {
        Arc::new(Self {
            id: record.id.clone(),
            record: Kept::new(record),
            order: tokio::sync::RwLock::new(()),
            resizing: tokio::sync::Mutex::new(()),
            launcher,
            directory,
            agent: Mutex::new(None),
            containers: Mutex::default(),
            ending: AtomicBool::new(false),
            agent_has_rdt: AtomicBool::new(true),
            audience: OnceLock::new(),
            rate: Rate::default(),
        })
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its record as it stands.
    pub fn record(&self) -> SandboxRecord {
        self.record.get()
    }

    /// Looks at its record without copying it.
    pub fn with_record<T>(&self, look: impl FnOnce(&SandboxRecord) -> T) -> T {
        look(&lock(&self.record.0))
    }

    /// Where it stands.
    pub fn phase(&self) -> PodPhase {
        self.with_record(SandboxRecord::phase)
    }

    /// Changes the record, on disk first.
    pub fn try_change<T>(&self, store: &Store, change: impl FnOnce(&mut SandboxRecord) -> T) -> Result<T> {
        Ok(self.record.try_change(&store.sandboxes, change, |before, after| self.tell(before, after))?)
    }

    /// Notes what has happened already.
    pub fn change<T>(&self, store: &Store, change: impl FnOnce(&mut SandboxRecord) -> T) -> T {
        self.record.change(&store.sandboxes, change, |before, after| self.tell(before, after))
    }

    /// Posts what a commit changed. The caller holds the record's lock.
    fn tell(&self, before: &SandboxRecord, after: &SandboxRecord) {
        match (before.phase() == PodPhase::Ready, after.phase() == PodPhase::Ready) {
            (true, false) => self.post(ContainerEventType::ContainerStoppedEvent, after),
            (false, true) => self.post(ContainerEventType::ContainerStartedEvent, after),
            _ => {}
        }
    }

    fn post(&self, kind: ContainerEventType, record: &SandboxRecord) {
        let Some((changes, pod)) = self.audience.get() else { return };
        let subject = || Subject::Pod(Box::new(record.clone()));
        changes.post(host::now(), || Change { kind, pod: Weak::clone(pod), subject: subject() });
    }

    /// Where it lives on the host.
    pub fn place(&self) -> Place {
        self.with_record(|record| Place {
            id: record.id.clone(),
            directory: self.directory.clone(),
            cgroup_parent: record.cgroup_parent.clone(),
            cgroup_levels: record.cgroup_levels,
        })
    }

    /// The way to its agent, if it is connected.
    pub fn agent(&self) -> Option<Arc<Agent>> {
        lock(&self.agent).clone()
    }

    /// Its agent is connected, or no longer.
    pub fn set_agent(&self, agent: Option<Arc<Agent>>) {
        *lock(&self.agent) = agent;
    }

    /// The agent of a pod that can run containers.
    pub fn ready_agent(&self) -> Result<Arc<Agent>> {
        if self.phase() != PodPhase::Ready {
            return Err(Error::FailedPrecondition(format!("the pod sandbox {} is not ready", self.id)));
        }
        self.agent().ok_or_else(|| {
            Error::Unavailable(format!(
                "the agent of the pod sandbox {} does not answer at the moment",
                self.id
            ))
        })
    }

    /// From now on the end of its agent is expected.
    pub fn set_ending(&self, ending: bool) {
        self.ending.store(ending, Ordering::SeqCst);
    }

    /// The end of its agent is expected.
    pub fn is_ending(&self) -> bool {
        self.ending.load(Ordering::SeqCst)
    }

    /// Whether its agent puts containers into classes of cache and memory bandwidth, as it says itself. One that this
    /// hulld starts does.
    pub fn set_agent_has_rdt(&self, has: bool) {
        self.agent_has_rdt.store(has, Ordering::SeqCst);
    }

    /// Its agent puts containers into classes of cache and memory bandwidth.
    pub fn agent_has_rdt(&self) -> bool {
        self.agent_has_rdt.load(Ordering::SeqCst)
    }

    /// It is being ended, or has no agent to be ended by: what was begun for it is of no use any more.
    pub fn is_over(&self) -> bool {
        self.is_ending() || !self.agent().is_some_and(|agent| agent.is_connected())
    }

    /// Its containers.
    pub fn containers(&self) -> Vec<Arc<Container>> {
        lock(&self.containers).values().cloned().collect()
    }

    /// One of its containers.
    pub fn container(&self, id: &str) -> Option<Arc<Container>> {
        lock(&self.containers).get(id).cloned()
    }
}

/// Somebody who wants a container's streams from its very beginning.
#[derive(Debug)]
pub struct AtStart {
    /// What is to be asked.
    pub call: Attach,
    /// Its pipes.
    pub slots: Slots,
    /// Where the answer goes.
    pub done: oneshot::Sender<std::result::Result<(), SandboxError>>,
}

/// One life of a container, from before its start to its end.
#[derive(Clone, Copy, Debug)]
struct Run {
    /// How many there were before it since hulld started.
    number: u64,
    over: bool,
}

/// A container.
#[derive(Debug)]
pub struct Container {
    id: String,
    record: Kept<ContainerRecord>,
    /// Its pod.
    pub pod: Arc<Pod>,
    /// Start, removal and updates, one after the other. Stopping does not wait for them all: a second stop may be
    /// more urgent than the first.
    pub order: tokio::sync::Mutex<()>,
    run: watch::Sender<Run>,
    /// By when it has to have ended, once it is being stopped.
    stop: watch::Sender<Option<Instant>>,
    /// It has got its stop signal, or does at this moment.
    pub asked_to_stop: AtomicBool,
    /// Who wants its streams from its very beginning; None once its start is on its way.
    at_start: Mutex<Option<Vec<AtStart>>>,
    /// How fast it uses processor time.
    pub rate: Rate,
    /// What its writable layer occupies.
    pub disk: DiskUsage,
    _layers: LayerHold,
}

impl Container {
    /// A container with this record; `layers` keeps its image's layers on disk.
    pub fn new(record: ContainerRecord, pod: Arc<Pod>, layers: LayerHold) -> Arc<Self> {
        Arc::new(Self {
            id: record.id.clone(),
            run: watch::Sender::new(Run { number: 0, over: record.is_over() }),
            stop: watch::Sender::new(None),
            asked_to_stop: AtomicBool::new(false),
            at_start: Mutex::new((record.phase() == ContainerPhase::Created).then(Vec::new)),
            record: Kept::new(record),
            pod,
            order: tokio::sync::Mutex::new(()),
            rate: Rate::default(),
            disk: DiskUsage::default(),
            _layers: layers,
        })
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its record as it stands.
    pub fn record(&self) -> ContainerRecord {
        self.record.get()
    }

    /// Looks at its record without copying it.
    pub fn with_record<T>(&self, look: impl FnOnce(&ContainerRecord) -> T) -> T {
        look(&lock(&self.record.0))
    }

    /// Where it stands.
    pub fn phase(&self) -> ContainerPhase {
        self.with_record(ContainerRecord::phase)
    }

    /// Changes the record, on disk first.
    pub fn try_change<T>(&self, store: &Store, change: impl FnOnce(&mut ContainerRecord) -> T) -> Result<T> {
        Ok(self.record.try_change(&store.containers, change, |before, after| self.tell(before, after))?)
    }

    /// Notes what has happened already.
    pub fn change<T>(&self, store: &Store, change: impl FnOnce(&mut ContainerRecord) -> T) -> T {
        self.record.change(&store.containers, change, |before, after| self.tell(before, after))
    }

    /// Posts what a commit changed. The caller holds the record's lock.
    fn tell(&self, before: &ContainerRecord, after: &ContainerRecord) {
        let started = after.started_at != 0 && after.started_at != before.started_at;
        match (before.phase(), after.phase()) {
            (ContainerPhase::Starting, ContainerPhase::Running) => {
                self.post(ContainerEventType::ContainerStartedEvent, after);
            }
            (ContainerPhase::Exited, ContainerPhase::Exited) => {}
            (ContainerPhase::Starting, ContainerPhase::Exited) if started => {
                // The report of its end overtook that of its start.
                self.post(ContainerEventType::ContainerStartedEvent, after);
                self.post(ContainerEventType::ContainerStoppedEvent, after);
            }
            (_, ContainerPhase::Exited) => self.post(ContainerEventType::ContainerStoppedEvent, after),
            _ => {}
        }
    }

    fn post(&self, kind: ContainerEventType, record: &ContainerRecord) {
        let Some((changes, pod)) = self.pod.audience.get() else { return };
        let subject = || Subject::Container(Box::new(record.clone()));
        changes.post(host::now(), || Change { kind, pod: Weak::clone(pod), subject: subject() });
    }

    /// It ended; whoever waits for that goes on. What came first counts.
    pub fn ended(&self, store: &Store, started_at: i64, exit: Exit) {
        // Without the look a repeated report would cost a write.
        if self
            .with_record(|record| matches!(record.phase(), ContainerPhase::Created | ContainerPhase::Exited))
        {
            return;
        }
        let ended = self.change(store, |record| {
            if record.is_of_earlier_run(started_at) {
                return false;
            }
            if record.started_at == 0 || record.phase() == ContainerPhase::Starting {
                record.started_at = started_at;
            }
            record.exited(exit)
        });
        if !ended {
            return;
        }
        // It was never started: nobody need wait for that.
        drop(lock(&self.at_start).take());
        self.run.send_modify(|run| run.over = true);
    }

    /// It turned out that its start never reached the agent.
    pub fn start_never_happened(&self, store: &Store) {
        self.change(store, ContainerRecord::start_never_happened);
        self.run_as_recorded();
    }

    /// Whether it is over is what its record says.
    pub fn run_as_recorded(&self) {
        let over = self.with_record(ContainerRecord::is_over);
        self.run.send_modify(|run| run.over = over);
    }

    /// It is started again: who waits from now on waits for another end. The caller holds its order.
    pub fn begin_run(&self) {
        self.asked_to_stop.store(false, Ordering::SeqCst);
        self.stop.send_replace(None);
        self.run.send_modify(|run| *run = Run { number: run.number.wrapping_add(1), over: false });
    }

    /// Attaches in the moment of its start, so that nothing of its output is missed; the receiver tells when that is
    /// done, or ends if it is never started. Gives the call back if the start is on its way already: an Attach that is
    /// sent now is the next thing that the agent does.
    pub fn attach_at_start(
        &self,
        call: Attach,
        slots: Slots,
    ) -> std::result::Result<oneshot::Receiver<std::result::Result<(), SandboxError>>, (Attach, Slots)> {
        match &mut *lock(&self.at_start) {
            Some(waiting) => {
                let (done, receiver) = oneshot::channel();
                waiting.push(AtStart { call, slots, done });
                Ok(receiver)
            }
            None => Err((call, slots)),
        }
    }

    /// Its start has just been sent to the agent: who waited for that, to be sent right behind.
    pub fn take_at_start(&self) -> Vec<AtStart> {
        lock(&self.at_start).take().unwrap_or_default()
    }

    /// It is to have ended by then, or by an earlier time that was set before.
    pub fn stop_by(&self, deadline: Instant) {
        self.stop.send_if_modified(|present| {
            let earlier = present.is_none_or(|present| deadline < present);
            if earlier {
                *present = Some(deadline);
            }
            earlier
        });
    }

    /// Waits for the time by which it has to have ended, which may come nearer meanwhile.
    pub async fn wait_stop_deadline(&self) {
        let mut stop = self.stop.subscribe();
        loop {
            let deadline = *stop.borrow_and_update();
            // The sender lives as long as this object.
            tokio::select! {
                () = async { match deadline {
                    Some(deadline) => tokio::time::sleep_until(deadline).await,
                    None => std::future::pending().await,
                } } => return,
                _ = stop.changed() => {}
            }
        }
    }

    /// Waits for the end of the run that it is in now, at the time of the call; one that has ended since is over even if
    /// it was started again.
    pub fn wait_over(&self) -> impl Future<Output = ()> + use<> {
        let mut run = self.run.subscribe();
        let present = run.borrow().number;
        async move {
            // The sender outlives everybody who asks; if it does not, nothing runs.
            let _ = run.wait_for(|run| run.over || run.number != present).await;
        }
    }
}

/// Everything there is, by id.
#[derive(Debug, Default)]
pub struct Objects {
    index: RwLock<Index>,
    changes: Arc<Changes>,
}

#[derive(Debug, Default)]
struct Index {
    pods: BTreeMap<String, Arc<Pod>>,
    containers: BTreeMap<String, Arc<Container>>,
}

impl Objects {
    fn read<T>(&self, look: impl FnOnce(&Index) -> T) -> T {
        look(&self.index.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn write<T>(&self, change: impl FnOnce(&mut Index) -> T) -> T {
        change(&mut self.index.write().unwrap_or_else(PoisonError::into_inner))
    }

    /// The pod with this id, or whose id alone begins like this.
    pub fn pod(&self, id: &str) -> Result<Arc<Pod>> {
        self.read(|index| find(&index.pods, "pod sandbox", id))
    }

    /// The container with this id, or whose id alone begins like this.
    pub fn container(&self, id: &str) -> Result<Arc<Container>> {
        self.read(|index| find(&index.containers, "container", id))
    }

    /// All pods.
    pub fn pods(&self) -> Vec<Arc<Pod>> {
        self.read(|index| index.pods.values().cloned().collect())
    }

    /// All containers.
    pub fn containers(&self) -> Vec<Arc<Container>> {
        self.read(|index| index.containers.values().cloned().collect())
    }

    /// Where changes are told.
    pub fn changes(&self) -> &Arc<Changes> {
        &self.changes
    }

    /// A pod becomes visible.
    pub fn add_pod(&self, pod: Arc<Pod>) {
        // It is added once; a second time would change nothing.
        let _ = pod.audience.set((Arc::clone(&self.changes), Arc::downgrade(&pod)));
        self.write(|index| index.pods.insert(pod.id().to_owned(), Arc::clone(&pod)));
        let record = lock(&pod.record.0);
        if record.phase() == PodPhase::Ready {
            pod.post(ContainerEventType::ContainerCreatedEvent, &record);
            pod.post(ContainerEventType::ContainerStartedEvent, &record);
        }
    }

    /// A container becomes visible.
    pub fn add_container(&self, container: Arc<Container>) {
        lock(&container.pod.containers).insert(container.id().to_owned(), Arc::clone(&container));
        self.write(|index| index.containers.insert(container.id().to_owned(), Arc::clone(&container)));
        container.post(ContainerEventType::ContainerCreatedEvent, &lock(&container.record.0));
    }

    /// A pod is gone.
    pub fn remove_pod(&self, id: &str) {
        let removed = self.write(|index| index.pods.remove(id));
        if let Some(pod) = removed {
            pod.post(ContainerEventType::ContainerDeletedEvent, &lock(&pod.record.0));
        }
    }

    /// A container is gone.
    pub fn remove_container(&self, container: &Container) {
        lock(&container.pod.containers).remove(container.id());
        self.write(|index| index.containers.remove(container.id()));
        container.post(ContainerEventType::ContainerDeletedEvent, &lock(&container.record.0));
    }
}

fn find<T>(table: &BTreeMap<String, Arc<T>>, what: &'static str, id: &str) -> Result<Arc<T>> {
    let missing = || Error::NotFound { what, id: id.to_owned() };
    if let Some(found) = table.get(id) {
        return Ok(Arc::clone(found));
    }
    if id.is_empty() {
        return Err(missing());
    }
    let mut beginning = table.range(id.to_owned()..).take_while(|(key, _)| key.starts_with(id));
    match (beginning.next(), beginning.next()) {
        (Some((_, found)), None) => Ok(Arc::clone(found)),
        (None, _) => Err(missing()),
        (Some(_), Some(_)) => Err(Error::Invalid(format!("more than one {what}'s id begins with {id:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_are_found_by_id_or_by_a_beginning_that_fits_one() {
        let table: BTreeMap<String, Arc<u8>> = [("aa1", 1), ("aa2", 2), ("b", 3), ("bb", 4)]
            .map(|(key, value)| (key.to_owned(), Arc::new(value)))
            .into();
        let find = |id: &str| find(&table, "container", id).map(|found| *found);
        assert_eq!(find("aa1").unwrap(), 1);
        assert_eq!(find("b").unwrap(), 3, "a whole id wins over a beginning");
        assert_eq!(find("bb").unwrap(), 4);
        assert!(matches!(find("aa"), Err(Error::Invalid(_))));
        assert!(matches!(find("c"), Err(Error::NotFound { .. })));
        assert!(matches!(find(""), Err(Error::NotFound { .. })));
    }
}
