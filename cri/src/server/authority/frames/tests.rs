use super::*;

/// `:method POST`, `:scheme http`, `:path /`, and `:authority` as a literal that goes into the table.
fn request(authority: &str) -> Vec<u8> {
    let mut block = vec![0x83, 0x86, 0x84, 0x41, authority.len() as u8];
    block.extend(authority.as_bytes());
    block
}

/// The same request again: the authority by its entry in the dynamic table.
const REQUEST_AGAIN: &[u8] = &[0x83, 0x86, 0x84, 0xbe];

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

fn connection(frames: &[Vec<u8>]) -> Vec<u8> {
    [PREFACE, &frame(4, 0, 0, &[])].concat().into_iter().chain(frames.concat()).collect()
}

/// What the server reads when the input comes in pieces of `size`.
fn read(input: &[u8], size: usize) -> Result<Vec<u8>, String> {
    let (mut inbound, mut output) = (Inbound::new(), Vec::new());
    for piece in input.chunks(size) {
        inbound.pending.extend_from_slice(piece);
        loop {
            inbound.advance().map_err(|error| error.to_string())?;
            assert!(inbound.ready.len() < 2 * MAX_READY + MAX_BLOCK, "more is ready than was allowed");
            if inbound.ready.is_empty() {
                break;
            }
            output.extend(inbound.ready.split());
        }
        assert!(
            inbound.held.len() + inbound.pending.len() < 2 * MAX_BLOCK,
            "more is held back than was allowed"
        );
    }
    inbound.end();
    output.extend(inbound.ready.split());
    Ok(output)
}

/// The authority of each header block that the server reads, decoded with one table, and all other frames as they are.
fn understood(output: &[u8]) -> (Vec<String>, Vec<Vec<u8>>) {
    let mut rest = output.strip_prefix(PREFACE).unwrap();
    let (mut decoder, mut authorities, mut others, mut block) =
        (Decoder::new(), Vec::new(), Vec::new(), Vec::new());
    while !rest.is_empty() {
        let length = u32::from_be_bytes([0, rest[0], rest[1], rest[2]]) as usize;
        let (frame, after) = rest.split_at(FRAME_HEADER + length);
        rest = after;
        if frame[3] != HEADERS && frame[3] != CONTINUATION {
            others.push(frame.to_vec());
            continue;
        }
        let priority = if frame[3] == HEADERS && frame[4] & PRIORITY != 0 { 5 } else { 0 };
        block.extend_from_slice(&frame[FRAME_HEADER + priority..]);
        if frame[4] & END_HEADERS != 0 {
            let headers = decoder.decode(&std::mem::take(&mut block)).unwrap();
            let authority = headers.iter().find(|header| header.name == ":authority");
            authorities.extend(authority.map(|header| String::from_utf8(header.value.to_vec()).unwrap()));
        }
    }
    (authorities, others)
}

#[test]
fn a_good_connection_passes_byte_for_byte() {
    for authority in ["localhost", "127.0.0.1:80", "node-1.example", "[::1]:5000"] {
        let input = connection(&[
            frame(HEADERS, END_HEADERS, 1, &request(authority)),
            frame(0, END_STREAM, 1, b"\0\0\0\0\0"),
            frame(HEADERS, END_HEADERS | END_STREAM, 3, REQUEST_AGAIN),
        ]);
        for size in [1, 7, 64, input.len()] {
            assert_eq!(read(&input, size).unwrap(), input, "{authority} in pieces of {size}");
        }
    }
}

#[test]
fn a_socket_path_becomes_localhost_in_every_request_of_the_connection() {
    for authority in
        ["/run/hull/hull.sock", "run%2Fhull.sock", "unix:///run/hull/hull.sock", "%2Frun%2Fhull.sock", ""]
    {
        let data = frame(0, END_STREAM, 1, &[7; 3000]);
        let input = connection(&[
            frame(HEADERS, END_HEADERS, 1, &request(authority)),
            data.clone(),
            frame(HEADERS, END_HEADERS | END_STREAM, 3, REQUEST_AGAIN),
            frame(8, 0, 0, &[0, 0, 1, 0]),
            frame(HEADERS, END_HEADERS | END_STREAM, 5, REQUEST_AGAIN),
        ]);
        for size in [1, 5, 100, input.len()] {
            let (authorities, others) = understood(&read(&input, size).unwrap());
            assert_eq!(authorities, ["localhost"; 3], "{authority} in pieces of {size}");
            assert_eq!(others, [frame(4, 0, 0, &[]), data.clone(), frame(8, 0, 0, &[0, 0, 1, 0])]);
        }
    }
}

#[test]
fn blocks_in_several_frames_with_padding_and_priority_are_put_together() {
    let block = request("/run/hull/hull.sock");
    let (first, second) = block.split_at(7);
    let padded = [&[3][..], &[0, 0, 0, 0, 16], first, &[0; 3]].concat();
    let input = connection(&[
        frame(HEADERS, PADDED | PRIORITY | END_STREAM, 1, &padded),
        frame(CONTINUATION, 0, 1, &[]),
        frame(CONTINUATION, END_HEADERS, 1, second),
    ]);
    let output = read(&input, 11).unwrap();
    assert_eq!(understood(&output).0, ["localhost"]);
    let headers = &output[PREFACE.len() + FRAME_HEADER..];
    assert_eq!(headers[4], END_HEADERS | END_STREAM | PRIORITY);
    assert_eq!(headers[FRAME_HEADER..FRAME_HEADER + 5], [0, 0, 0, 0, 16]);
}

#[test]
fn a_block_that_grows_is_cut_into_frames() {
    // Given a header of 4,000 bytes that later requests name by its entry
    let mut block = request("/sock");
    block.extend([0x40, 1, b'a', 0x7f, 0xa1, 0x1e]);
    block.extend(vec![b'x'; 4000]);
    let again = [&[0x83, 0x86, 0x84][..], &[0xbe; 10]].concat();
    let input = connection(&[
        frame(HEADERS, END_HEADERS, 1, &block),
        frame(HEADERS, END_HEADERS | END_STREAM, 3, &again),
    ]);
    // Then the 40,000 bytes come in frames that the server accepts
    let output = read(&input, 4096).unwrap();
    assert!(output.len() > 44_000);
    assert_eq!(understood(&output).0, ["localhost"]);
}

#[test]
fn what_is_not_understood_at_first_is_left_to_the_server() {
    for (name, input) in [
        ("another protocol", b"GET / HTTP/1.1\r\n\r\n".to_vec()),
        ("half a preface", PREFACE[..10].to_vec()),
        ("broken headers", connection(&[frame(HEADERS, END_HEADERS, 1, &[0x80])])),
        ("a frame that is too large", connection(&[frame(HEADERS, END_HEADERS, 1, &vec![0; MAX_FRAME + 1])])),
        ("a continuation of nothing", connection(&[frame(CONTINUATION, END_HEADERS, 1, &[])])),
        ("only padding", connection(&[frame(HEADERS, END_HEADERS | PADDED, 1, &[200])])),
        ("data within headers", connection(&[frame(HEADERS, 0, 1, &[0x83]), frame(0, 0, 1, &[1])])),
        ("an end within headers", connection(&[frame(HEADERS, 0, 1, &[0x83])])),
    ] {
        for size in [1, 1000, input.len()] {
            assert_eq!(read(&input, size).unwrap(), input, "{name}");
        }
    }
}

#[test]
fn a_rewritten_connection_ends_at_what_is_not_understood() {
    let first = frame(HEADERS, END_HEADERS, 1, &request("/sock"));
    let endless: Vec<u8> =
        std::iter::repeat_n(frame(CONTINUATION, 0, 3, &[]), MAX_BLOCK_FRAMES).flatten().collect();
    for (name, bad) in [
        ("broken headers", frame(HEADERS, END_HEADERS, 3, &[0xff, 0xff, 0xff, 0xff, 0xff])),
        ("a frame that is too large", frame(HEADERS, END_HEADERS, 3, &vec![0; MAX_FRAME + 1])),
        ("another stream", [frame(HEADERS, 0, 3, &[0x83]), frame(CONTINUATION, 0, 5, &[])].concat()),
        ("endless continuation", [frame(HEADERS, 0, 3, &[0x83]), endless].concat()),
    ] {
        assert!(read(&connection(&[first.clone(), bad]), 4096).is_err(), "{name}");
    }
}

#[test]
fn a_few_bytes_cannot_be_blown_up_without_bound() {
    // Given many small requests that each name an entry of 4,000 bytes ten times; `read` asserts the bounds
    let mut block = request("/sock");
    block.extend([0x40, 1, b'a', 0x7f, 0xa1, 0x1e]);
    block.extend(vec![b'x'; 4000]);
    let mut frames = vec![frame(HEADERS, END_HEADERS, 1, &block)];
    let again = [&[0x83, 0x86, 0x84][..], &[0xbe; 10]].concat();
    frames.extend((1..500).map(|n| frame(HEADERS, END_HEADERS | END_STREAM, 2 * n + 1, &again)));
    let output = read(&connection(&frames), 4096).unwrap();
    assert!(output.len() > 15_000_000);
}
