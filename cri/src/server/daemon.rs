//! From start to stop: directories, socket, readiness, requests, and a way out that leaves pods running.

use std::fmt;
use std::io;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use thiserror::Error;
use tokio::net::UnixListener;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::directories::DirectoryError;
use super::socket::{Socket, SocketError};
use super::{Args, descriptors, directories, logging, notify, requests, serve, socket};
use crate::api::hull::hull_server::Hull;
use crate::api::runtime::image_service_server::ImageService;
use crate::api::runtime::runtime_service_server::RuntimeService;
use crate::config::{self, Config};

/// What the daemon serves.
pub trait Node: RuntimeService + ImageService + Hull + Clone {
    /// Why it cannot be served.
    type Error: fmt::Display;

    /// Adopts what runs and gets ready for requests.
    fn open(config: Config) -> impl Future<Output = Result<Self, Self::Error>> + Send;

    /// Removes what is kept for the next pod: layer mounts, bridge, cgroups. Fails while there are pods.
    fn release(&self) -> impl Future<Output = Result<(), String>> + Send;

    /// The daemon was told to stop: streams that would never end by themselves end now.
    fn begin_stop(&self) {}

    /// Ends what belongs to the daemon; pods go on running.
    fn shutdown(&self) -> impl Future<Output = ()> + Send;
}

/// Threads that run requests. They wait most of the time; two keep one slow poll from holding up the rest.
const WORKERS: usize = 2;
/// Most threads for calls that block (conversion of layers, mounts); they end after ten idle seconds.
const BLOCKING_THREADS: usize = 64;
/// Heaps of the allocator for all these threads.
const HEAPS: u8 = 2;
/// How long requests under way may take once the daemon is told to stop.
const DRAIN: Duration = Duration::from_secs(5);
/// How often memory that a burst of requests has left free goes back to the kernel.
const TIDY: Duration = Duration::from_secs(30);

/// The whole of hulld's main function.
pub fn main<N: Node>() -> ExitCode {
    let args = Args::parse();
    let config = match config::load(args.config.as_deref(), &args.overrides()) {
        Ok(config) => config,
        Err(error) => return complain(&error),
    };
    if args.check_config {
        println!("The configuration is right.");
        return ExitCode::SUCCESS;
    }
    if args.print_config {
        return match config.to_toml() {
            Ok(text) => {
                print!("{text}");
                ExitCode::SUCCESS
            }
            Err(error) => complain(&error),
        };
    }
    hull_sys::memory::limit_heaps(HEAPS);
    logging::start(&config.log);
    let ended = match args.release {
        true => start(release::<N>(config)),
        false => start(run::<N>(config)),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn complain(error: &dyn fmt::Display) -> ExitCode {
    eprintln!("hulld: {error}");
    ExitCode::FAILURE
}

/// Why the daemon ended other than by a signal. The text is logged as the last line.
#[derive(Debug, Error)]
enum DaemonError {
    #[error("cannot start threads or take signals: {0}")]
    Threads(#[from] io::Error),
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    #[error(transparent)]
    Socket(#[from] SocketError),
    #[error("cannot start: {0}")]
    Open(String),
    #[error("cannot release the machine: {0}")]
    Release(String),
    #[error("the server has ended by itself: {0}")]
    Serve(String),
}

fn start(work: impl Future<Output = Result<(), DaemonError>>) -> Result<(), DaemonError> {
    descriptors::raise_limit();
    let mut threads = tokio::runtime::Builder::new_multi_thread();
    threads.worker_threads(WORKERS).max_blocking_threads(BLOCKING_THREADS).thread_name("hulld").enable_all();
    let threads = threads.build()?;
    let result = threads.block_on(work);
    // Requests that were given up may still sit in calls that block.
    threads.shutdown_timeout(Duration::from_secs(1));
    result
}

/// The way back from an installation: nothing is served.
async fn release<N: Node>(config: Config) -> Result<(), DaemonError> {
    directories::prepare(&config.root)?;
    directories::prepare(&config.state)?;
    let _lock = directories::lock(&config.state)?;
    let node = N::open(config).await.map_err(|error| DaemonError::Open(error.to_string()))?;
    let released = node.release().await.map_err(DaemonError::Release);
    node.shutdown().await;
    released
}

async fn run<N: Node>(config: Config) -> Result<(), DaemonError> {
    let mut signals = Signals::new()?;
    directories::prepare(&config.root)?;
    directories::prepare(&config.state)?;
    let _lock = directories::lock(&config.state)?;
    let (socket, listener) = socket::bind(&config.listen)?;
    let listener = UnixListener::from_std(listener)?;
    let endpoint = config.endpoint();
    let (root, state) = (config.root.clone(), config.state.clone());

    let node = tokio::select! {
        node = N::open(config) => node.map_err(|error| DaemonError::Open(error.to_string()))?,
        signal = signals.next() => {
            tracing::info!(signal, "stopped before it was ready");
            return Ok(());
        }
    };
    let version = env!("CARGO_PKG_VERSION");
    tracing::info!(version, endpoint, root = %root.display(), state = %state.display(), "ready");
    let tidying = tokio::spawn(tidy());
    let served = serve_until_told(&node, listener, &mut signals).await;
    tidying.abort();
    finish(&node, socket).await;
    served
}

async fn serve_until_told<N: Node>(
    node: &N,
    listener: UnixListener,
    signals: &mut Signals,
) -> Result<(), DaemonError> {
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let serving = serve(node.clone(), listener, async { drop(stopped.await) });
    let mut serving = std::pin::pin!(serving);
    notify::notify(notify::READY);
    let signal = tokio::select! {
        ended = &mut serving => {
            let reason = ended.err().map_or_else(|| "no reason given".into(), |error| error.to_string());
            return Err(DaemonError::Serve(reason));
        }
        signal = signals.next() => signal,
    };
    tracing::info!(signal, "stopping; pods go on running");
    notify::notify(notify::STOPPING);
    drop(stop);
    node.begin_stop();
    tokio::select! {
        _ = &mut serving => {}
        () = tokio::time::sleep(DRAIN) => tracing::info!("requests are still under way; they are given up"),
        signal = signals.next() => tracing::info!(signal, "stopping at once"),
    }
    Ok(())
}

async fn finish<N: Node>(node: &N, socket: Socket) {
    if tokio::time::timeout(DRAIN, node.shutdown()).await.is_err() {
        tracing::warn!("the runtime did not come to rest in time");
    }
    drop(socket);
    tracing::info!("stopped");
}

/// Gives memory back when there have been requests since the last time.
async fn tidy() {
    let mut seen = 0;
    loop {
        tokio::time::sleep(TIDY).await;
        let received = requests::received();
        if std::mem::replace(&mut seen, received) != received {
            drop(tokio::task::spawn_blocking(hull_sys::memory::give_back).await);
        }
    }
}

/// The signals that end the daemon.
#[derive(Debug)]
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Signals {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    /// Waits for the next one and says which it is.
    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}
