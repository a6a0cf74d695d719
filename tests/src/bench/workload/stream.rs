use std::io;
use std::time::Instant;

use crate::bench::websocket::{STDIN, STDOUT, WebSocket};
use crate::bench::{Options, Peer, Report};

/// Bytes sent to and fro on each connection.
const TURNS: usize = 20;

pub(super) async fn run(options: &Options, peers: &[Peer], report: &mut Report) {
    let made = super::pod_for_each(options, peers).await;
    for round in 0..=options.rounds {
        for (peer, (_, container)) in peers.iter().zip(&made) {
            tokio::time::sleep(options.spaced).await;
            let whole = Instant::now();
            let url = peer.exec_url(container, &["/bin/true"]).await;
            let ended = tokio::task::spawn_blocking(move || to_the_end(&url));
            ended.await.expect("the thread").unwrap_or_else(|error| panic!("{}: {error}", peer.name));
            let stage = "streaming exec of true, to its end (ms)";
            report.add(stage, &peer.name, whole.elapsed().as_secs_f64() * 1e3);

            let url = peer.exec_url(container, &["/bin/cat"]).await;
            let turns = tokio::task::spawn_blocking(move || echo(&url));
            let turns = turns.await.expect("the thread");
            for turn in turns.unwrap_or_else(|error| panic!("{}: {error}", peer.name)) {
                report.add("one byte to cat and back (ms)", &peer.name, turn);
            }
        }
        if round == 0 {
            report.clear();
        }
    }
    for (peer, (pod, _)) in peers.iter().zip(made) {
        super::remove_all(peer, &[pod]).await;
    }
}

fn to_the_end(url: &str) -> io::Result<()> {
    let mut socket = WebSocket::connect(url)?;
    while socket.receive()?.is_some() {}
    Ok(())
}

/// How many milliseconds each turn took.
fn echo(url: &str) -> io::Result<Vec<f64>> {
    let mut socket = WebSocket::connect(url)?;
    let mut turns = Vec::new();
    // The first waits for the program to start.
    for turn in 0..=TURNS {
        let begun = Instant::now();
        socket.send(STDIN, b"x")?;
        loop {
            match socket.receive()? {
                Some((STDOUT, bytes)) if !bytes.is_empty() => break,
                Some(_) => {}
                None => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "cat has ended")),
            }
        }
        if turn > 0 {
            turns.push(begun.elapsed().as_secs_f64() * 1e3);
        }
    }
    Ok(turns)
}
