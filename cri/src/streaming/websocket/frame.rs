//! Frames (RFC 6455, 5.2).

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt};

/// Most bytes of a data message, its frames together; Go's and JavaScript's clients send 32 KiB.
pub(super) const MAX_MESSAGE: usize = 1 << 20;
/// Control frames are short (5.5).
const MAX_CONTROL: usize = 125;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Opcode {
    Continuation = 0,
    Text = 1,
    Binary = 2,
    Close = 8,
    Ping = 9,
    Pong = 10,
}

impl Opcode {
    fn read(bits: u8) -> io::Result<Self> {
        Ok(match bits {
            0 => Self::Continuation,
            1 => Self::Text,
            2 => Self::Binary,
            8 => Self::Close,
            9 => Self::Ping,
            10 => Self::Pong,
            _ => return Err(broken("a frame of a kind that does not exist")),
        })
    }

    const fn is_control(self) -> bool {
        self as u8 >= 8
    }
}

/// One message that is whole: data, or control.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Message {
    pub(super) opcode: Opcode,
    pub(super) bytes: Vec<u8>,
}

pub(super) fn broken(reason: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

/// Reads messages; control messages may come between the frames of a data message.
#[derive(Debug)]
pub(super) struct MessageReader {
    /// Whether the peer is a client, which masks what it sends.
    masked: bool,
    begun: Option<Message>,
}

impl MessageReader {
    pub(super) const fn new(masked: bool) -> Self {
        Self { masked, begun: None }
    }

    /// The next message; None at the end of the transport.
    pub(super) async fn read(&mut self, from: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Message>> {
        loop {
            let mut head = [0; 2];
            match from.read_exact(&mut head).await {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
                Err(error) => return Err(error),
            }
            let last = head[0] & 0x80 != 0;
            if head[0] & 0x70 != 0 {
                return Err(broken("a frame uses an extension that was not agreed upon"));
            }
            let opcode = Opcode::read(head[0] & 0xf)?;
            if (head[1] & 0x80 != 0) != self.masked {
                return Err(broken("a frame is not masked as its sender's role demands"));
            }
            let bytes = self.payload(head[1] & 0x7f, opcode, from).await?;
            if opcode.is_control() {
                if !last {
                    return Err(broken("a control frame is in pieces"));
                }
                return Ok(Some(Message { opcode, bytes }));
            }
            let message = match (opcode, self.begun.take()) {
                (Opcode::Continuation, Some(mut begun)) => {
                    begun.bytes.extend_from_slice(&bytes);
                    begun
                }
                (Opcode::Continuation, None) => return Err(broken("a message goes on that has not begun")),
                (_, Some(_)) => return Err(broken("a message begins before the last one has ended")),
                (opcode, None) => Message { opcode, bytes },
            };
            if last {
                return Ok(Some(message));
            }
            self.begun = Some(message);
        }
    }

    async fn payload(
        &self,
        length: u8,
        opcode: Opcode,
        from: &mut (impl AsyncRead + Unpin),
    ) -> io::Result<Vec<u8>> {
        let length = match length {
            126 => u64::from(from.read_u16().await?),
            127 => from.read_u64().await?,
            short => u64::from(short),
        };
        let room = match opcode.is_control() {
            true => MAX_CONTROL,
            false => MAX_MESSAGE - self.begun.as_ref().map_or(0, |begun| begun.bytes.len()),
        };
        let length = usize::try_from(length).ok().filter(|length| *length <= room);
        let length = length.ok_or_else(|| broken("a message is too long"))?;
        let mut mask = [0; 4];
        if self.masked {
            from.read_exact(&mut mask).await?;
        }
        let mut bytes = vec![0; length];
        from.read_exact(&mut bytes).await?;
        apply(mask, &mut bytes);
        Ok(bytes)
    }
}

fn apply(mask: [u8; 4], bytes: &mut [u8]) {
    if mask != [0; 4] {
        for (byte, mask) in bytes.iter_mut().zip(mask.iter().cycle()) {
            *byte ^= mask;
        }
    }
}

/// A whole message in one frame; a client gives a mask.
pub(super) fn encode(opcode: Opcode, mask: Option<[u8; 4]>, parts: &[&[u8]]) -> Vec<u8> {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    let mut frame = Vec::with_capacity(length + 14);
    frame.push(0x80 | opcode as u8);
    let bit = if mask.is_some() { 0x80 } else { 0 };
    match length {
        0..126 => frame.push(bit | length as u8),
        126..65_536 => {
            frame.push(bit | 126);
            frame.extend_from_slice(&(length as u16).to_be_bytes());
        }
        _ => {
            frame.push(bit | 127);
            frame.extend_from_slice(&(length as u64).to_be_bytes());
        }
    }
    frame.extend(mask.into_iter().flatten());
    let begin = frame.len();
    for part in parts {
        frame.extend_from_slice(part);
    }
    apply(mask.unwrap_or_default(), &mut frame[begin..]);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read_all(masked: bool, bytes: &[u8]) -> io::Result<Vec<Message>> {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let (mut reader, mut from) = (MessageReader::new(masked), bytes);
            let mut messages = Vec::new();
            while let Some(message) = reader.read(&mut from).await? {
                messages.push(message);
            }
            Ok(messages)
        })
    }

    #[test]
    fn messages_of_every_length_are_read_as_written() {
        for length in [0, 1, 125, 126, 65_535, 65_536, MAX_MESSAGE] {
            for mask in [None, Some([1, 2, 3, 4])] {
                let bytes = vec![7; length];
                let frame = encode(Opcode::Binary, mask, &[&bytes]);
                let read = read_all(mask.is_some(), &frame).unwrap();
                assert_eq!(read, [Message { opcode: Opcode::Binary, bytes }]);
            }
        }
        let frame = encode(Opcode::Binary, None, &[&vec![7; MAX_MESSAGE + 1]]);
        assert!(read_all(false, &frame).is_err());
    }

    #[test]
    fn a_message_in_pieces_is_one_and_a_ping_may_come_between() {
        let pieces = b"\x02\x03one\x89\x02hi\x00\x03two\x80\x01!";
        let read = read_all(false, pieces).unwrap();
        assert_eq!(read[0], Message { opcode: Opcode::Ping, bytes: b"hi".to_vec() });
        assert_eq!(read[1], Message { opcode: Opcode::Binary, bytes: b"onetwo!".to_vec() });
    }

    #[test]
    fn what_breaks_the_rules_is_refused() {
        for bytes in [
            &b"\x80\x01x"[..],
            b"\x02\x01x\x82\x01x",
            b"\xc2\x01x",
            b"\x83\x01x",
            b"\x09\x01x",
            b"\x82\x81\0\0\0\0x",
            b"\x89\x7e\x01\x00",
            b"\x82\x7f\xff\xff\xff\xff\xff\xff\xff\xff",
        ] {
            assert!(read_all(false, bytes).is_err(), "{bytes:?}");
        }
        assert!(read_all(true, b"\x82\x01x").is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_fall_over(
            bytes in prop::collection::vec(any::<u8>(), 0..200), masked in any::<bool>(),
        ) {
            let _ = read_all(masked, &bytes);
        }
    }
}
