//! What passes through streams, in which order, and how they end.

use std::net::Shutdown;

use super::super::packet::{NEITHER, NO_RECEIVE, NO_SEND};
use super::*;

#[test]
fn data_goes_both_ways_and_ends_travel_on_their_own() {
    let mut guest = Guest::started();
    let (mut host, request) = guest.open(1 << 18);
    host.write_all(b"to the guest").unwrap();
    let (header, data) = guest.wait_for(|header| header.op == Op::Data.number());
    assert_eq!((header.source_port, &data[..]), (request.source_port, &b"to the guest"[..]));
    guest.answer(&request, Op::Data, 1 << 18, 12, b"to the host");
    let mut text = [0; 11];
    host.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"to the host");

    host.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.wait_op(Op::Shutdown).flags, NO_SEND);
    // The other way still works, and ends on its own.
    guest.answer(&request, Op::Data, 1 << 18, 12, b"late answer");
    host.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"late answer");
    guest.shutdown(&request, NO_SEND);
    assert!(closes(&mut host));
    guest.expect_streams(0);
    // Its socket closes later: then it waits for a reset.
    guest.shutdown(&request, NEITHER);
    guest.wait_op(Op::Reset);
}

#[test]
fn connections_wait_for_the_driver() {
    let mut guest = Guest::new();
    let mut host = guest.connect();
    host.write_all(b"early").unwrap();
    std::thread::sleep(Duration::from_millis(20));
    guest.activate();
    let request = guest.wait_op(Op::Request);
    guest.answer(&request, Op::Response, 1 << 18, 0, &[]);
    assert_eq!(guest.wait_for(|header| header.op == Op::Data.number()).1, b"early");
}

#[test]
fn a_guest_that_refuses_or_does_not_answer_closes_the_connection() {
    let mut guest = Guest::started();
    let mut refused = guest.connect();
    let request = guest.wait_op(Op::Request);
    guest.answer(&request, Op::Reset, 0, 0, &[]);
    assert!(closes(&mut refused));
    let start = Instant::now();
    let mut ignored = guest.connect();
    guest.wait_op(Op::Request);
    assert!(closes(&mut ignored));
    let waited = start.elapsed();
    assert!(waited >= Duration::from_secs(5) && waited < Duration::from_secs(8), "{waited:?}");
    guest.wait_op(Op::Reset);
    guest.expect_streams(0);
}

#[test]
fn the_guest_reaches_services_and_nothing_else() {
    let mut guest = Guest::started();
    let (mut service, opened) = guest.open_log(5000);
    guest.answer(&opened, Op::Data, 1 << 18, 0, b"a line\n");
    let mut line = [0; 7];
    service.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"a line\n");
    for port in [0, 22, 1024, 1026, u32::MAX] {
        guest.send(from_guest(6000, port, Op::Request), &[]);
        let reset = guest.wait_op(Op::Reset);
        assert_eq!((reset.source_port, reset.destination_port), (port, 6000));
    }
    // Half-close: the guest ends, the service answers with its own end when it has taken everything.
    guest.shutdown(&opened, NO_SEND);
    assert!(closes(&mut service));
    guest.expect_none(Op::Shutdown);
    drop(service);
    let end = guest.wait_op(Op::Shutdown);
    assert_eq!(end.flags & NO_SEND, NO_SEND);
}

#[test]
fn a_guest_sends_no_more_than_its_credit_and_is_told_when_the_reader_takes_it() {
    let mut guest = Guest::started();
    let (mut host, request) = guest.open(1 << 18);
    let window = request.buffer as usize;
    let data = pattern(1, window);
    // The socket takes some; what it does not take is credit that is used.
    let (mut sent, mut credit) = (0, window);
    let mut all = Vec::new();
    for _ in 0..2000 {
        let length = credit.min(8192);
        if length == 0 {
            break;
        }
        guest.answer(&request, Op::Data, 1 << 18, 0, &data[..length]);
        all.extend_from_slice(&data[..length]);
        sent += length;
        std::thread::sleep(Duration::from_millis(1));
        guest.poll();
        if let Some((header, _)) = guest.seen.iter().rev().find(|(h, _)| h.op == Op::CreditUpdate.number()) {
            credit = header.buffer as usize - (sent - header.forwarded as usize);
        } else {
            credit = window - sent;
        }
    }
    assert_eq!(credit, 0, "a reader that does not read stops the sender");
    assert!(guest.device.handle().metrics().waiting > 0);
    assert!(sent < 2 << 20, "{sent}");
    let mut seen = vec![0; sent];
    host.read_exact(&mut seen).unwrap();
    assert!(seen == all);
    guest.wait_for(|header| {
        header.op == Op::CreditUpdate.number() && (sent as u32).wrapping_sub(header.forwarded) < header.buffer
    });
    // More than its credit is the end of the stream.
    let (mut other, request) = guest.open(1 << 18);
    for _ in 0..20 {
        guest.answer(&request, Op::Data, 1 << 18, 0, &vec![0; 65536]);
    }
    guest.wait_for(|h| h.op == Op::Reset.number() && h.source_port == request.source_port);
    while !matches!(other.read(&mut [0; 65536]), Ok(0)) {}
}

#[test]
fn without_credit_of_the_guest_nothing_is_sent() {
    let mut guest = Guest::started();
    let (mut host, request) = guest.open(1000);
    host.write_all(&pattern(2, 3000)).unwrap();
    let (_, data) = guest.wait_for(|header| header.op == Op::Data.number());
    assert_eq!(data, pattern(2, 3000)[..1000]);
    guest.wait_op(Op::CreditRequest);
    guest.expect_none(Op::Data);
    // Nonsense is none.
    guest.answer(&request, Op::CreditUpdate, 1000, 0xffff_0000, &[]);
    guest.expect_none(Op::Data);
    guest.answer(&request, Op::CreditUpdate, 1000, 400, &[]);
    assert_eq!(guest.wait_for(|h| h.op == Op::Data.number()).1, pattern(2, 3000)[1000..1400]);
    guest.answer(&request, Op::CreditUpdate, 1 << 18, 1400, &[]);
    assert_eq!(guest.wait_for(|h| h.op == Op::Data.number()).1, pattern(2, 3000)[1400..]);
}

#[test]
fn a_guest_without_buffers_gets_everything_when_it_has_some_again() {
    let mut guest = Guest::started();
    let (mut host, request) = guest.open(1 << 20);
    guest.refill = false;
    let sent = pattern(3, 1 << 20);
    let copy = sent.clone();
    let writer = std::thread::spawn(move || {
        host.write_all(&copy).unwrap();
        host
    });
    std::thread::sleep(Duration::from_millis(100));
    guest.poll();
    assert!(guest.rx.room() > 100);
    guest.refill = true;
    let missing = guest.rx.room() as u64;
    // All numbers but those that are still with the device.
    let with_device: Vec<u64> = (0..128).filter(|n| *n >= missing).collect();
    assert!(with_device.len() < 28);
    for number in 0..missing {
        guest.give(number);
    }
    guest.rx.kick();
    let mut seen = Vec::new();
    while seen.len() < sent.len() {
        seen.extend(guest.wait_for(|header| header.op == Op::Data.number()).1);
        guest.answer(&request, Op::CreditUpdate, 1 << 20, seen.len() as u32, &[]);
    }
    assert!(seen == sent);
    drop(writer.join().unwrap());
}

#[test]
fn one_reader_that_stalls_holds_up_nobody_else() {
    let mut guest = Guest::started();
    let (stalled, stalled_request) = guest.open(0);
    // Both ways: the guest gives it no credit, and the host does not read it.
    (&stalled).write_all(b"never read").unwrap();
    guest.answer(&stalled_request, Op::Data, 0, 0, &pattern(0, stalled_request.buffer as usize));
    let mut streams: Vec<(UnixStream, Header)> = (0..20).map(|_| guest.open(1 << 18)).collect();
    for (number, (host, request)) in streams.iter_mut().enumerate() {
        host.write_all(&pattern(number, 50_000)).unwrap();
        guest.answer(request, Op::Data, 1 << 18, 0, &pattern(number + 100, 10_000));
    }
    let mut seen: BTreeMap<u32, Vec<u8>> = BTreeMap::new();
    while seen.values().map(Vec::len).sum::<usize>() < 20 * 50_000 {
        let (header, data) = guest.wait_for(|header| header.op == Op::Data.number());
        seen.entry(header.source_port).or_default().extend(data);
    }
    for (number, (host, request)) in streams.iter_mut().enumerate() {
        assert!(seen[&request.source_port] == pattern(number, 50_000));
        let mut data = vec![0; 10_000];
        host.read_exact(&mut data).unwrap();
        assert!(data == pattern(number + 100, 10_000));
    }
    drop(stalled);
}

#[test]
fn streams_take_turns() {
    let mut guest = Guest::started();
    let mut streams: Vec<(UnixStream, Header)> = (0..8).map(|_| guest.open(1 << 20)).collect();
    guest.refill = false;
    // Everything is there before the guest has buffers for it.
    while guest.rx.room() < 128 {
        streams[0].0.write_all(&[0; 4000]).unwrap();
        std::thread::sleep(Duration::from_micros(200));
        guest.poll();
    }
    guest.seen.clear();
    for (host, _) in &mut streams {
        host.write_all(&[1; 100_000]).unwrap();
    }
    std::thread::sleep(Duration::from_millis(20));
    (0..128).for_each(|number| guest.give(number));
    guest.rx.kick();
    std::thread::sleep(Duration::from_millis(100));
    guest.poll();
    let mut shares: BTreeMap<u32, usize> = BTreeMap::new();
    for (header, data) in &guest.seen {
        *shares.entry(header.source_port).or_default() += data.len();
    }
    assert_eq!(shares.len(), 8, "{shares:?}");
    let (least, most) = (shares.values().min().unwrap(), shares.values().max().unwrap());
    assert!(*most <= 2 * least, "{shares:?}");
}

#[test]
fn what_the_guest_sent_before_it_closed_reaches_a_slow_host() {
    let mut guest = Guest::started();
    let (mut host, request) = guest.open(1 << 18);
    let data = pattern(4, request.buffer as usize);
    let mut sent = 0;
    // Fill the socket, then this process.
    for round in 0_u64.. {
        guest.poll();
        let latest = guest.seen.iter().rev().find(|(header, _)| header.op == Op::CreditUpdate.number());
        let (buffer, forwarded) = latest.map_or((request.buffer, 0), |(h, _)| (h.buffer, h.forwarded));
        let credit = buffer as usize - (sent - forwarded as usize);
        if credit == 0 {
            break;
        }
        let length = credit.min(data.len() - sent % data.len()).min(60_000);
        guest.answer(&request, Op::Data, 1 << 18, 0, &data[sent % data.len()..][..length]);
        sent += length;
        std::thread::sleep(Duration::from_millis(2));
        assert!(round < 1000);
    }
    assert!(guest.device.handle().metrics().waiting > 0);
    guest.shutdown(&request, NEITHER);
    guest.wait_op(Op::Reset);
    guest.expect_streams(1);
    let mut seen = Vec::new();
    host.read_to_end(&mut seen).unwrap();
    assert_eq!(seen.len(), sent);
    assert!(seen.iter().enumerate().all(|(at, byte)| *byte == data[at % data.len()]));
    guest.expect_streams(0);
    assert_eq!(guest.device.handle().metrics().waiting, 0);
}

#[test]
fn what_the_host_sent_before_it_closed_reaches_a_slow_guest() {
    let mut guest = Guest::started();
    let (mut host, request) = guest.open(0);
    host.write_all(&pattern(5, 100_000)).unwrap();
    drop(host);
    guest.expect_none(Op::Data);
    guest.answer(&request, Op::CreditUpdate, 1 << 20, 0, &[]);
    let mut seen = Vec::new();
    while seen.len() < 100_000 {
        seen.extend(guest.wait_for(|header| header.op == Op::Data.number()).1);
    }
    assert!(seen == pattern(5, 100_000));
    assert_eq!(guest.wait_op(Op::Shutdown).flags, NEITHER);
    guest.expect_streams(1);
    guest.answer(&request, Op::Reset, 0, 0, &[]);
    guest.expect_streams(0);
}

#[test]
fn a_host_that_goes_away_without_reading_frees_the_guest() {
    let mut guest = Guest::started();
    let (host, request) = guest.open(1 << 18);
    guest.answer(&request, Op::Data, 1 << 18, 0, &pattern(0, request.buffer as usize));
    drop(host);
    let end = guest.wait_for(|header| header.op == Op::Shutdown.number() && header.flags == NEITHER).0;
    assert_eq!(end.source_port, request.source_port);
    // A guest that never answers that is given up.
    guest.wait_op(Op::Reset);
    guest.expect_streams(0);
    assert_eq!(guest.device.handle().metrics().waiting, 0);
}

#[test]
fn a_guest_that_will_not_receive_makes_the_host_stop() {
    let mut guest = Guest::started();
    let (mut host, request) = guest.open(0);
    guest.shutdown(&request, NO_RECEIVE);
    let start = Instant::now();
    while host.write_all(&[0; 1000]).is_ok() {
        assert!(start.elapsed() < Duration::from_secs(10));
    }
    guest.answer(&request, Op::Data, 0, 0, b"still");
    let mut text = [0; 5];
    host.read_exact(&mut text).unwrap();
}
