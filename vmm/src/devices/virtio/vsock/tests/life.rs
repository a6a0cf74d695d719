//! The device itself: pauses, saved states, what it tells and what it costs.

use super::*;

#[test]
fn a_paused_device_rests_and_goes_on_with_its_streams() {
    let mut guest = Guest::started();
    let (mut host, request) = guest.open(1 << 18);
    guest.device.pause().unwrap();
    host.write_all(b"while paused").unwrap();
    guest.answer(&request, Op::Data, 1 << 18, 0, b"from a paused one");
    guest.expect_none(Op::Data);
    guest.device.resume().unwrap();
    assert_eq!(guest.wait_for(|header| header.op == Op::Data.number()).1, b"while paused");
    let mut text = [0; 17];
    host.read_exact(&mut text).unwrap();
}

#[test]
fn a_restored_device_is_silent_until_the_driver_has_taken_the_transport_reset() {
    let mut guest = Guest::started();
    let (mut host, _) = guest.open(1 << 18);
    assert!(guest.device.save().is_err());
    guest.device.pause().unwrap();
    let state = guest.device.save().unwrap();
    assert!(closes(&mut host));
    let text = serde_json::to_string(&state).unwrap();
    let state: crate::devices::virtio::DeviceState = serde_json::from_str(&text).unwrap();
    guest.poll();

    // Another device takes over the same memory.
    let mut other = Guest::new();
    other.device.restore(state.inner).unwrap();
    std::mem::swap(&mut guest.device, &mut other.device);
    std::mem::swap(&mut guest.directory, &mut other.directory);
    drop(other);
    let sizes = guest.device.queue_sizes().to_vec();
    let rings = [&guest.rx, &guest.tx, &guest.event];
    let queues =
        state.queues.iter().zip(sizes).zip(rings).enumerate().map(|(index, ((saved, size), ring))| {
            let queue = saved.restore(size).unwrap();
            crate::devices::virtio::ActiveQueue::new(index as u16, queue, ring.kick_event())
        });
    let queues: Vec<_> = queues.collect();
    guest.device.activate(guest.activation(queues)).unwrap();
    let host = guest.connect();
    // A machine that goes on kicks everything once; that is no answer.
    for ring in [&guest.rx, &guest.tx, &guest.event] {
        ring.kick();
    }
    guest.expect_none(Op::Request);
    let (_, length) = guest.event.take().unwrap();
    assert_eq!(length, 4);
    guest.event.add(&[Buffer { address: 0x9000, length: 8, writable: true }]);
    guest.event.kick();
    guest.wait_op(Op::Request);
    drop(host);
}

#[test]
fn a_state_that_is_none_is_refused() {
    let mut guest = Guest::new();
    for text in ["{}", "[]", "7", r#"{"reset":"Maybe"}"#, r#"{"reset":{"Sent":99999999}}"#] {
        assert!(guest.device.restore(serde_json::from_str(text).unwrap()).is_err(), "{text}");
    }
    guest.device.restore(serde_json::Value::Null).unwrap();
}

#[test]
fn the_configuration_tells_the_address_and_nothing_beyond() {
    let guest = Guest::new();
    let mut bytes = [0xff; 12];
    guest.device.read_config(0, &mut bytes);
    assert_eq!(bytes, [3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    for offset in [8, 9, u64::MAX] {
        guest.device.read_config(offset, &mut bytes);
        assert_eq!(bytes, [0; 12]);
    }
}

#[test]
fn a_quiet_stream_costs_as_little_as_the_documentation_says() {
    let own = size_of::<stream::Stream>() + size_of::<Box<stream::Stream>>();
    // Entries of the table, of the worker's list of descriptors and of the guest's ports, in trees that are half full.
    let tables = 2 * (16 + 8 + 12);
    assert!(own + tables <= 500, "{own} + {tables}");
}
