//! Guests that break the rules: they harm themselves at most.

use super::*;
use crate::devices::virtio::driver::{INDIRECT, NEXT, WRITE};

#[test]
fn packets_that_make_no_sense_end_their_stream_at_most() {
    let mut guest = Guest::started();
    let (mut good, good_request) = guest.open(1 << 18);
    let op_of = |op: u16| move |to: &Header| Header { op, ..reply(to, Op::Data, 1 << 18, 0, 0) };
    type Bad = Box<dyn Fn(&Header) -> Header>;
    let bad: Vec<(&str, Bad)> = vec![
        ("no such operation", Box::new(op_of(0))),
        ("no such operation", Box::new(op_of(8))),
        ("no such operation", Box::new(op_of(0xffff))),
        ("a second request", Box::new(op_of(1))),
        ("a second response", Box::new(op_of(2))),
        ("longer than its chain", Box::new(|to| reply(to, Op::Data, 1 << 18, 0, 1))),
        ("longer than any", Box::new(|to| reply(to, Op::Data, 1 << 18, 0, u32::MAX as usize))),
    ];
    for (what, make) in &bad {
        let (mut host, request) = guest.open(1 << 18);
        guest.send(make(&request), &[]);
        let reset = guest.wait_op(Op::Reset);
        assert_eq!(reset.source_port, request.source_port, "{what}");
        assert!(closes(&mut host), "{what}");
    }
    // For streams that do not exist: a reset, or nothing.
    for op in [Op::Response, Op::Data, Op::Shutdown, Op::CreditRequest] {
        guest.send(from_guest(77, 4711, op), &[]);
        let reset = guest.wait_op(Op::Reset);
        assert_eq!((reset.source_port, reset.destination_port), (4711, 77));
    }
    for op in [Op::Reset, Op::CreditUpdate] {
        guest.send(from_guest(77, 4711, op), &[]);
    }
    // Of a seqpacket socket, or of other addresses.
    guest.send(Header { kind: 2, ..from_guest(78, LOGS, Op::Request) }, &[]);
    guest.wait_op(Op::Reset);
    guest.send(Header { source_cid: 9, ..from_guest(79, LOGS, Op::Request) }, &[]);
    guest.send(Header { destination_cid: 1, ..from_guest(79, LOGS, Op::Request) }, &[]);
    guest.expect_none(Op::Reset);
    guest.expect_none(Op::Response);
    // Nobody else noticed.
    guest.answer(&good_request, Op::Data, 1 << 18, 0, b"fine");
    let mut text = [0; 4];
    good.read_exact(&mut text).unwrap();
    assert_eq!(guest.device.handle().metrics().violations, bad.len() as u64);
}

#[test]
fn a_duplicate_request_of_the_guest_resets_its_stream() {
    let mut guest = Guest::started();
    let (mut service, opened) = guest.open_log(5000);
    guest.answer(&opened, Op::Data, 1 << 18, 0, b"x");
    guest.send(from_guest(5000, LOGS, Op::Request), &[]);
    guest.wait_op(Op::Reset);
    let mut seen = Vec::new();
    service.read_to_end(&mut seen).unwrap();
    assert_eq!(seen, b"x");
    // The port can be used again.
    guest.open_log(5000);
}

#[test]
fn chains_of_any_shape_harm_nobody() {
    let mut guest = Guest::started();
    let (mut host, request) = guest.open(1 << 18);
    let header = |length| reply(&request, Op::Data, 1 << 18, 0, length);
    let at = TX_AT + 70 * TX_BUFFER;
    guest.memory.write_slice(&header(4).bytes(), GuestAddress(at)).unwrap();
    guest.memory.write_slice(b"good", GuestAddress(at + 44)).unwrap();
    let readable = |address, length| Buffer { address, length, writable: false };
    // Cut anywhere, with empty buffers in between.
    let cuts: Vec<Buffer> = [(0, 1), (1, 0), (1, 20), (21, 25), (46, 0), (46, 2)]
        .map(|(offset, length)| readable(at + offset, length))
        .into();
    guest.tx.add(&cuts);
    guest.tx.add(&[readable(at, 48)]);
    // Too short; nothing; out of memory; across its end; the wrong way; huge.
    guest.tx.add(&[readable(at, 43)]);
    guest.tx.add(&[readable(at, 0)]);
    guest.tx.add(&[readable(1 << 40, 48)]);
    guest.tx.add(&[readable(u64::MAX - 10, 48)]);
    guest.tx.add(&[readable((16 << 20) - 10, 48)]);
    guest.tx.add(&[Buffer { address: at, length: 48, writable: true }]);
    guest.tx.add(&[readable(at, 44), Buffer { address: at, length: 4, writable: true }]);
    guest.tx.add(&[readable(at, u32::MAX)]);
    guest.tx.kick();
    let mut text = [0; 8];
    host.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"goodgood");

    // A loop; a next beyond the table; an indirect table that is itself, or too long, or out of memory.
    let heads: Vec<u16> = (0..4).map(|_| guest.tx.add(&[readable(at, 44)])).collect();
    guest.poll();
    guest.tx.write_descriptor(heads[0], at, 44, NEXT, heads[0]);
    guest.tx.write_descriptor(heads[1], at, 44, NEXT, 5000);
    guest.tx.write_descriptor(heads[2], 0x4000, 128 * 16, INDIRECT, 0);
    guest.tx.write_descriptor(heads[3], 1 << 41, 65535 * 16, INDIRECT | WRITE, 0);
    for head in heads {
        guest.tx.offer(head);
    }
    guest.tx.kick();
    let (_, other) = guest.open(1 << 18);
    assert_ne!(other.source_port, request.source_port);
    assert_eq!(guest.interrupt.device_status(), 0);
}

#[test]
fn buffers_of_any_shape_get_what_fits_and_the_useless_ones_go_back() {
    let mut guest = Guest::new();
    // Only these: none of use but the last two.
    guest.rx = Ring::new(&guest.memory, 0, 128, 0x1000);
    let writable = |address, length| Buffer { address, length, writable: true };
    guest.rx.add(&[writable(RX_AT, 44)]);
    guest.rx.add(&[writable(RX_AT, 0)]);
    guest.rx.add(&[writable(1 << 40, 4096)]);
    guest.rx.add(&[Buffer { address: RX_AT, length: 4096, writable: false }]);
    guest.rx.add(&[writable(RX_AT, 10), writable(RX_AT + 10, 40)]);
    guest.rx.add(&[writable(RX_AT + 4096, 45)]);
    guest.activate();
    let mut host = guest.connect();
    let start = Instant::now();
    let mut back = Vec::new();
    while back.len() < 5 {
        back.extend(guest.rx.take());
        assert!(start.elapsed() < Duration::from_secs(10), "{back:?}");
    }
    assert_eq!(back.iter().map(|(_, length)| *length).collect::<Vec<_>>(), [0, 0, 0, 0, 44]);
    let mut bytes = [0; HEADER];
    guest.memory.read_slice(&mut bytes, GuestAddress(RX_AT)).unwrap();
    let request = Header::parse(&bytes);
    host.write_all(b"ab").unwrap();
    guest.answer(&request, Op::Response, 1 << 18, 0, &[]);
    while back.len() < 6 {
        back.extend(guest.rx.take());
        assert!(start.elapsed() < Duration::from_secs(10), "{back:?}");
    }
    assert_eq!(back[5].1, 45);
}

#[test]
fn a_ring_that_lies_needs_a_reset_and_the_device_serves_again_after_it() {
    let mut guest = Guest::started();
    let (mut host, _) = guest.open(1 << 18);
    guest.tx.set_available_index(5000);
    guest.tx.kick();
    assert!(closes(&mut host));
    assert_ne!(guest.interrupt.device_status(), 0);
    guest.device.reset();
    guest.interrupt.reset();
    let mut again = Guest::started();
    std::mem::swap(&mut guest.device, &mut again.device);
    drop(guest);
    again.rx = Ring::new(&again.memory, 0, 128, 0x1000);
    again.tx = Ring::new(&again.memory, 1, 128, 0x4000);
    again.event = Ring::new(&again.memory, 2, 8, 0x8000);
    for address in [0x1000, 0x4000, 0x8000] {
        again.memory.write_slice(&[0; 0x1000], GuestAddress(address)).unwrap();
    }
    (0..128).for_each(|number| again.give(number));
    again.activate();
}

#[test]
fn a_flood_of_unanswerable_packets_holds_up_the_guest_and_not_the_device() {
    let mut guest = Guest::started();
    guest.refill = false;
    // No buffers for answers: packets must wait, and memory stays bounded.
    let mut sent = 0_u32;
    while guest.tx.room() >= 2 && sent < 2000 {
        let address = TX_AT + u64::from(sent % 64) * TX_BUFFER;
        let header = from_guest(sent, 4711, Op::Data);
        guest.memory.write_slice(&header.bytes(), GuestAddress(address)).unwrap();
        guest.tx.add(&[Buffer { address, length: HEADER as u32, writable: false }]);
        guest.tx.kick();
        sent += 1;
        std::thread::sleep(Duration::from_micros(100));
        while guest.tx.take().is_some() {}
    }
    assert!(sent < 600, "{sent}");
    // 128 in the guest's buffers, 128 waiting, 128 in the queue.
    guest.poll();
    guest.refill = true;
    (0..guest.rx.room() as u64).for_each(|number| guest.give(number));
    guest.rx.kick();
    let start = Instant::now();
    while guest.seen.len() < sent as usize {
        guest.poll();
        assert!(start.elapsed() < Duration::from_secs(10), "{} of {sent}", guest.seen.len());
    }
}

#[test]
fn there_is_an_end_to_streams_for_guest_and_host() {
    let mut guest = Guest::started();
    let mut services = Vec::new();
    for port in 0..512 {
        services.push(guest.open_log(10_000 + port));
    }
    guest.send(from_guest(99, LOGS, Op::Request), &[]);
    assert_eq!(guest.wait_op(Op::Reset).destination_port, 99);
    let mut hosts = Vec::new();
    for _ in 0..512 {
        hosts.push(guest.open(1 << 18));
    }
    let waiting = guest.connect();
    guest.expect_none(Op::Request);
    hosts.pop();
    let end = guest.wait_op(Op::Shutdown);
    guest.answer(&end, Op::Reset, 0, 0, &[]);
    guest.wait_op(Op::Request);
    drop(waiting);
}
