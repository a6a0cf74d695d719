//! The built-in network: one bridge per daemon, an address of each range per pod, masquerading and host ports.
//!
//! The bridge and the packet filter's table are made with the first pod and removed some seconds after the last, or with
//! the end of the daemon, so that an idle one has nothing on the host. Attaching a pod is a handful of netlink messages; removing the link is
//! left to the end of the namespace and, where that does not come, to `reaper`.

mod address;
mod bridge;
mod fresh;
mod host_port;
mod link;
mod marks;
mod reaper;
mod ruleset;

use std::collections::{BTreeSet, HashSet};
use std::fs;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use tokio::sync::{OwnedRwLockReadGuard, RwLock};

use self::address::Pool;
use self::bridge::Bridge;
use self::fresh::Fresh;
pub(crate) use self::host_port::HostPort;
use self::link::Plan;
use self::marks::Marks;
use self::reaper::Reaper;
use crate::ledger::{self, BuiltinRecord, Kind, Ledger, Record};
use crate::netlink::{Batch, Socket};
use crate::{NetworkConfig, NetworkError, PodNetwork, namespace, sysctl};

/// The built-in network of one daemon.
#[derive(Debug)]
pub(crate) struct Builtin {
    ledger: Arc<Ledger>,
    marks: Marks,
    mtu: Option<u32>,
    linger: Duration,
    netns_dir: PathBuf,
    cursors: PathBuf,
    subnets: Mutex<Vec<IpNet>>,
    pool: Mutex<Pool>,
    /// The bridge and the table, once they were seen to by this process. Held for reading while a pod is attached.
    base: Arc<RwLock<Option<Bridge>>>,
    reaper: Arc<Reaper>,
    filter: Arc<Filter>,
    fresh: Arc<Fresh>,
}

/// The one socket for the packet filter, opened with first use in the daemon's own network namespace. It stays open:
/// closing one waits for what was deleted through it (an RCU grace period, 5 to 10 ms).
#[derive(Debug, Default)]
struct Filter(Mutex<Option<Socket>>);

impl Filter {
    fn with<T>(&self, work: impl FnOnce(&Socket) -> Result<T, NetworkError>) -> Result<T, NetworkError> {
        let mut socket = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let open = match socket.take() {
            Some(open) => open,
            None => Socket::netfilter()?,
        };
        // After a failure there may be an answer to come that nobody waits for.
        let done = work(&open)?;
        *socket = Some(open);
        Ok(done)
    }
}

impl Builtin {
    pub(crate) fn open(
        config: &NetworkConfig,
        subnets: Vec<IpNet>,
        ledger: Arc<Ledger>,
    ) -> Result<Arc<Self>, NetworkError> {
        check_subnets(&subnets)?;
        let cursors = config.data.join("cursors.json");
        let saved = fs::read(&cursors).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        let builtin = Arc::new(Self {
            ledger,
            marks: Marks::new(&config.bridge, &config.data),
            mtu: config.mtu,
            linger: config.linger,
            netns_dir: config.netns_dir.clone(),
            cursors,
            subnets: Mutex::new(subnets),
            pool: Mutex::new(saved.map_or_else(Pool::default, Pool::restore)),
            base: Arc::default(),
            reaper: Arc::default(),
            filter: Arc::default(),
            fresh: Fresh::new(),
        });
        let released = builtin.ledger.all().into_iter().filter(|record| record.released);
        for record in released.filter(|record| matches!(record.kind, Kind::Builtin(_))) {
            builtin.reaper.add(&record.id);
        }
        reaper::start(&builtin);
        Ok(builtin)
    }

    /// Gives the pod a namespace (this one, or a new one), pinned at `pin`, and attaches it. On an error what was begun must be undone with
    /// `detach`.
    pub(crate) async fn attach(
        self: &Arc<Self>,
        pod: &PodNetwork,
        pin: PathBuf,
        given_namespace: Option<OwnedFd>,
    ) -> Result<Vec<IpAddr>, NetworkError> {
        let base = self.base().await?;
        let bridge = base.clone().ok_or_else(|| NetworkError::NotReady("the bridge is gone".into()))?;
        let given = self.reserve(pod)?;
        let plan = Plan {
            pod: pod.id.clone(),
            marks: self.marks.clone(),
            name: given.link.clone(),
            bridge: bridge.index,
            mtu: bridge.mtu,
            addresses: given.addresses.clone(),
            bandwidth: pod.bandwidth,
        };
        let addresses: Vec<IpAddr> = given.addresses.iter().map(IpNet::addr).collect();
        let (filter, table, of_pod) = (self.filter.clone(), self.marks.bridge.clone(), addresses.clone());
        namespace::make(
            pin,
            given_namespace.or_else(|| self.fresh.take()),
            || Ok(Socket::route()?),
            move |host, namespace| {
                link::connect(&plan, &host, namespace)?;
                if given.ports.is_empty() {
                    return Ok(());
                }
                filter.with(|socket| {
                    ruleset::add_host_ports(socket, &table, &given.ports, &of_pod)?;
                    Ok(socket.forget_udp_flows_to(&HostPort::udp(&given.ports))?)
                })
            },
        )
        .await?;
        drop(base);
        Ok(addresses)
    }

    /// Chooses the pod's addresses, checks its host ports, and writes both down.
    fn reserve(&self, pod: &PodNetwork) -> Result<BuiltinRecord, NetworkError> {
        let ports = HostPort::of_pod(pod)?;
        for port in &ports {
            port.check_not_listening(pod)?;
        }
        let subnets = self.subnets();
        let record = self.ledger.reserve(&pod.id, |records| {
            let others: Vec<(&String, &BuiltinRecord)> = builtin_records(records.values()).collect();
            for (id, other) in builtin_records(records.values().filter(|record| !record.released)) {
                // A released pod's ports are out of the table already.
                let collision = |port: &&HostPort| other.ports.iter().any(|taken| taken.collides(port));
                if let Some(port) = ports.iter().find(collision).filter(|_| *id != pod.id) {
                    return Err(port.in_use(pod, format!("pod {id}")));
                }
            }
            let used: HashSet<IpAddr> =
                others.iter().flat_map(|(_, other)| other.addresses.iter().map(IpNet::addr)).collect();
            let mut pool = self.pool.lock().unwrap_or_else(PoisonError::into_inner);
            let now = Instant::now();
            let addresses = subnets
                .iter()
                .map(|subnet| pool.take(&pod.id, *subnet, &used, now))
                .collect::<Result<_, _>>()?;
            Ok(Kind::Builtin(BuiltinRecord { addresses, ports, link: self.marks.link_name(&pod.id) }))
        })?;
        match record.kind {
            Kind::Builtin(given) => Ok(given),
            Kind::Cni(_) => {
                Err(NetworkError::Invalid { pod: pod.id.clone(), reason: "attached by CNI".into() })
            }
        }
    }

    /// Takes the pod's namespace and host ports away now, and hands what goes slowly to the reaper. Blocks shortly.
    pub(crate) fn detach(&self, mut record: Record, pin: &std::path::Path) -> Result<(), NetworkError> {
        let Kind::Builtin(given) = &record.kind else { return Ok(()) };
        if !record.released && !given.ports.is_empty() && self.ledger.is_of_this_boot(&record) {
            let addresses: Vec<IpAddr> = given.addresses.iter().map(IpNet::addr).collect();
            self.filter.with(|socket| {
                ruleset::delete_host_ports(socket, &self.marks.bridge, &given.ports, &addresses)?;
                Ok(socket.forget_udp_flows_to(&HostPort::udp(&given.ports))?)
            })?;
        }
        namespace::remove(pin)?;
        // Not before: of a released pod only the link is looked for after a restart.
        record.released = true;
        self.ledger.update(&record)?;
        self.reaper.add(&record.id);
        Ok(())
    }

    /// Checks that the pod's link and addresses are what was recorded.
    pub(crate) fn check(&self, record: &Record, pin: &std::path::Path) -> Result<Vec<IpAddr>, NetworkError> {
        let Kind::Builtin(given) = &record.kind else { return Ok(Vec::new()) };
        let lost = |reason: String| NetworkError::Invalid { pod: record.id.clone(), reason };
        if record.released {
            return Err(lost("it was torn down".into()));
        }
        let file = namespace::open(pin)?;
        let found = hull_sys::namespace::on_thread_in(&[std::os::fd::AsFd::as_fd(&file)], || {
            Socket::route().and_then(|socket| socket.addresses())
        })
        .map_err(|source| NetworkError::Kernel { action: format!("entering {}", pin.display()), source })??;
        if let Some(missing) =
            given.addresses.iter().find(|address| !found.iter().any(|(_, has)| has == *address))
        {
            return Err(lost(format!("its address {missing} is gone")));
        }
        let links = Socket::route()?.links()?;
        match links.iter().find(|link| link.name == given.link) {
            Some(link) if link.master.is_some() => Ok(given.addresses.iter().map(IpNet::addr).collect()),
            _ => Err(lost(format!("its link {} is not on the bridge", given.link))),
        }
    }

    /// The ranges that new pods get addresses from, as the kernel allows.
    pub(crate) fn subnets(&self) -> Vec<IpNet> {
        let subnets = self.subnets.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let has_ipv6 = sysctl::has_ipv6();
        subnets.into_iter().filter(|subnet| has_ipv6 || subnet.addr().is_ipv4()).collect()
    }

    /// Gives new pods addresses from these ranges. Pods that have others keep them.
    pub(crate) async fn set_subnets(self: &Arc<Self>, subnets: Vec<IpNet>) -> Result<(), NetworkError> {
        check_subnets(&subnets)?;
        *self.subnets.lock().unwrap_or_else(PoisonError::into_inner) = subnets;
        let mut base = self.base.clone().write_owned().await;
        if base.is_some() {
            let this = self.clone();
            *base = Some(blocking(move || this.install()).await?);
        }
        Ok(())
    }

    /// The bridge and the table, made if they are missing, and kept while the guard lives.
    async fn base(self: &Arc<Self>) -> Result<OwnedRwLockReadGuard<Option<Bridge>>, NetworkError> {
        let shared = self.base.clone().read_owned().await;
        if self.is_whole(shared.as_ref())? {
            return Ok(shared);
        }
        drop(shared);
        let mut base = self.base.clone().write_owned().await;
        if !self.is_whole(base.as_ref())? {
            let this = self.clone();
            *base = Some(blocking(move || this.install()).await?);
        }
        Ok(base.downgrade())
    }

    /// Whether the bridge and the table are there; an administrator or a reload of a firewall may have removed them.
    fn is_whole(&self, base: Option<&Bridge>) -> Result<bool, NetworkError> {
        let Some(bridge) = base else { return Ok(false) };
        let has_bridge =
            Socket::route()?.link_index(&self.marks.bridge).is_ok_and(|index| index == bridge.index);
        Ok(has_bridge && self.filter.with(|socket| Ok(socket.has_table(&self.marks.bridge)?))?)
    }

    /// Makes what is missing of the bridge and the table; puts the host ports of living pods in.
    fn install(&self) -> Result<Bridge, NetworkError> {
        namespace::prepare_directory(&self.netns_dir)?;
        let records = self.attached();
        let mut subnets = self.subnets();
        for (_, record) in builtin_records(records.iter()) {
            for address in &record.addresses {
                if !subnets.contains(&address.trunc()) {
                    subnets.push(address.trunc());
                }
            }
        }
        let socket = Socket::route()?;
        let bridge = bridge::ensure(&socket, &self.marks, self.mtu, &subnets)?;
        let mut batch = Batch::new();
        builtin_records(records.iter()).for_each(|(_, record)| batch.set_bridge(&record.link, bridge.index));
        socket.execute(&batch)?;
        let pods: Vec<(Vec<HostPort>, Vec<IpAddr>)> = builtin_records(records.iter())
            .map(|(_, record)| (record.ports.clone(), record.addresses.iter().map(IpNet::addr).collect()))
            .collect();
        let known = pods.iter().map(|(ports, addresses)| (ports.as_slice(), addresses.as_slice()));
        let table = &self.marks.bridge;
        self.filter.with(|filter| {
            ruleset::install(filter, table, &subnets)?;
            ruleset::retain_host_ports(filter, table, known.clone())?;
            known
                .filter(|(ports, _)| !ports.is_empty())
                .try_for_each(|(ports, addresses)| ruleset::add_host_ports(filter, table, ports, addresses))
        })?;
        Ok(bridge)
    }

    /// Records of this boot's pods that were not torn down.
    fn attached(&self) -> Vec<Record> {
        let lives = |record: &Record| !record.released && self.ledger.is_of_this_boot(record);
        self.ledger.all().into_iter().filter(lives).collect()
    }

    /// Removes the links of pods that are neither in `live` nor recorded, with their namespaces, and sees to the bridge
    /// and the table: whole if there are pods, gone if there are none.
    pub(crate) async fn collect(self: &Arc<Self>, live: BTreeSet<String>) -> Result<(), NetworkError> {
        let mut base = self.base.clone().write_owned().await;
        let this = self.clone();
        blocking(move || this.collect_links(&live, &mut base)).await
    }

    fn collect_links(&self, live: &BTreeSet<String>, base: &mut Option<Bridge>) -> Result<(), NetworkError> {
        let socket = Socket::route()?;
        let mut batch = Batch::new();
        for link in socket.links()? {
            if let Some(pod) = self.marks.pod_of(&link)
                && !live.contains(pod)
                && self.ledger.get(pod).is_none()
            {
                tracing::info!(pod, link = link.name, "removing the link of an unknown pod");
                namespace::remove(&namespace_path(&self.netns_dir, pod))?;
                batch.delete_link(&link.name);
            }
        }
        socket.execute(&batch)?;
        let has_pods = !self.attached().iter().all(|record| matches!(record.kind, Kind::Cni(_)));
        if has_pods {
            *base = Some(self.install()?);
        } else if !self.ledger.all().iter().any(|record| matches!(record.kind, Kind::Builtin(_))) {
            self.uninstall(base)?;
        }
        Ok(())
    }

    /// Removes the bridge and the table, if they are this daemon's: another may have a bridge of the same name.
    fn uninstall(&self, base: &mut Option<Bridge>) -> Result<(), NetworkError> {
        let socket = Socket::route()?;
        if bridge::is_ours(&socket, &self.marks)? {
            // The bridge goes last: while it is there, what is left of the rest is known to be ours.
            self.filter.with(|socket| ruleset::remove(socket, &self.marks.bridge))?;
            bridge::remove(&socket, &self.marks)?;
        }
        *base = None;
        namespace::release_directory(&self.netns_dir);
        Ok(())
    }

    fn save_cursors(&self) -> Result<(), NetworkError> {
        let cursors = self.pool.lock().unwrap_or_else(PoisonError::into_inner).cursors();
        let bytes = serde_json::to_vec(&cursors).unwrap_or_default();
        ledger::replace(&self.cursors, &bytes)
    }
}

/// Runs what waits for the kernel off the runtime's own threads.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, NetworkError> + Send + 'static,
) -> Result<T, NetworkError> {
    let failed = |source: tokio::task::JoinError| NetworkError::Kernel {
        action: "waiting for work on the network".into(),
        source: source.into(),
    };
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(failed(error)))
}

/// Path of the pin of a pod's namespace.
pub(crate) fn namespace_path(directory: &std::path::Path, pod: &str) -> PathBuf {
    directory.join(format!("hull-{pod}"))
}

fn builtin_records<'a>(
    records: impl Iterator<Item = &'a Record>,
) -> impl Iterator<Item = (&'a String, &'a BuiltinRecord)> {
    records.filter_map(|record| match &record.kind {
        Kind::Builtin(given) => Some((&record.id, given)),
        Kind::Cni(_) => None,
    })
}

/// Whether the built-in network can give pods addresses from these ranges.
pub(crate) fn check_subnets(subnets: &[IpNet]) -> Result<(), NetworkError> {
    subnets.iter().try_for_each(|subnet| address::check(*subnet))?;
    let count = |v4: bool| subnets.iter().filter(|subnet| subnet.addr().is_ipv4() == v4).count();
    if subnets.is_empty() || count(true) > 1 || count(false) > 1 {
        let given: Vec<String> = subnets.iter().map(IpNet::to_string).collect();
        return Err(NetworkError::Config(format!(
            "pods need one IPv4 range, one IPv6 range, or one of each; given: [{}]",
            given.join(", ")
        )));
    }
    Ok(())
}
