use std::time::{Duration, Instant};

use k8s_cri::v1 as cri;

use crate::bench::{Network, Options, Peer, Report, processes};

/// Containers of one pod.
const IN_A_POD: usize = 50;

pub(super) async fn run(options: &Options, peers: &[Peer], report: &mut Report) {
    super::pull_for_all(options, peers).await;
    for peer in peers {
        let (pods, last) = gather(options, peer).await;
        if let Some(daemon) = processes::of(peer.daemon_pid()) {
            report.add("daemon, resident (MiB)", &peer.name, daemon.resident as f64 / 1024.0);
        }
        for round in 0..=options.rounds {
            let mut warm_up = Report::new("");
            ask(peer, &last, if round == 0 { &mut warm_up } else { &mut *report }).await;
        }
        events(options, peer, report).await;
        super::remove_all(peer, &pods).await;
    }
}

/// Pods full of sleeping containers, and one of these.
async fn gather(options: &Options, peer: &Peer) -> (Vec<String>, String) {
    let (mut pods, mut last) = (Vec::new(), String::new());
    for number in 0..options.containers.div_ceil(IN_A_POD) {
        let config = peer.pod_config(&format!("crowd-{number}"), Network::Host);
        let pod = peer.run_pod(config.clone()).await;
        for container in 0..IN_A_POD.min(options.containers - number * IN_A_POD) {
            let (name, command) = (format!("c{container}"), ["/bin/sleep", "100000"]);
            last = peer.create_named(&pod, &config, &options.image, &name, &command).await;
            peer.start(&last).await;
        }
        pods.push(pod);
    }
    (pods, last)
}

async fn ask(peer: &Peer, container_id: &str, report: &mut Report) {
    let (name, id) = (&peer.name, container_id.to_owned());
    let mut runtime = peer.runtime.clone();
    let all = runtime.list_containers(cri::ListContainersRequest::default());
    let (all, _) = report.timed("ListContainers (ms)", name, all).await;
    let listed = peer.answer(all).containers.len();
    assert!(listed > 0, "{name} lists nothing");
    let pods = runtime.list_pod_sandbox(cri::ListPodSandboxRequest::default());
    peer.answer(report.timed("ListPodSandbox (ms)", name, pods).await.0);
    let stats = runtime.list_container_stats(cri::ListContainerStatsRequest::default());
    peer.answer(report.timed("ListContainerStats (ms)", name, stats).await.0);
    let filter = cri::ContainerFilter { id: id.clone(), ..Default::default() };
    let one = runtime.list_containers(cri::ListContainersRequest { filter: Some(filter) });
    peer.answer(report.timed("ListContainers, one by its id (ms)", name, one).await.0);
    let status = runtime.container_status(cri::ContainerStatusRequest { container_id: id, verbose: false });
    peer.answer(report.timed("ContainerStatus (ms)", name, status).await.0);
}

/// From the answer to a start to its event. A runtime without events has no row.
async fn events(options: &Options, peer: &Peer, report: &mut Report) {
    let mut runtime = peer.runtime.clone();
    let Ok(events) = runtime.get_container_events(cri::GetEventsRequest {}).await else { return };
    let mut events = events.into_inner();
    let started = cri::ContainerEventType::ContainerStartedEvent as i32;
    for round in 0..options.rounds {
        let config = peer.pod_config(&format!("event-{round}"), Network::Host);
        let pod = peer.run_pod(config.clone()).await;
        let container = peer.create(&pod, &config, &options.image).await;
        let begun = Instant::now();
        let starting = peer.start(&container);
        let told = async {
            loop {
                match tokio::time::timeout(Duration::from_secs(10), events.message()).await {
                    Ok(Ok(Some(event)))
                        if event.container_id == container && event.container_event_type == started =>
                    {
                        return Some(begun.elapsed());
                    }
                    Ok(Ok(Some(_))) => {}
                    _ => return None,
                }
            }
        };
        let ((), told) = tokio::join!(starting, told);
        super::remove_all(peer, &[pod]).await;
        let Some(told) = told else { return };
        report.add("StartContainer asked to its event (ms)", &peer.name, told.as_secs_f64() * 1e3);
    }
}
