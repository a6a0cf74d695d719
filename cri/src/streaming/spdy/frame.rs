//! Frames of SPDY/3.1 (draft-mbelshe-httpbis-spdy, 2.2 and 2.6), read and written without IO.

use super::error::SpdyError;
use super::headers::{HeaderReader, Headers};

/// Length of what comes before every frame's payload.
pub(super) const HEAD: usize = 8;
/// Most bytes of a control frame; headers of a remote command need some dozens.
pub(super) const MAX_CONTROL: u32 = 64 << 10;

const VERSION: u16 = 3;
const SYN_STREAM: u16 = 1;
const SYN_REPLY: u16 = 2;
const RST_STREAM: u16 = 3;
const SETTINGS: u16 = 4;
const PING: u16 = 6;
const GOAWAY: u16 = 7;
const HEADERS: u16 = 8;
const WINDOW_UPDATE: u16 = 9;

const FLAG_FIN: u8 = 1;
const FLAG_UNIDIRECTIONAL: u8 = 2;
/// Stream numbers and lengths of windows have 31 bits.
const NUMBER: u32 = 0x7fff_ffff;

/// Why a stream is reset (2.6.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Reset {
    /// The peer broke the rules.
    Protocol = 1,
    /// The stream is not open.
    InvalidStream = 2,
    /// There are too many, or it is of a kind that is not wanted.
    Refused = 3,
    /// Nobody needs it any more.
    Cancel = 5,
}

/// What the first eight bytes say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Head {
    Data { stream: u32, fin: bool, length: u32 },
    Control { kind: u16, flags: u8, length: u32 },
}

impl Head {
    /// Reads it, and refuses control frames that are too long. Data may have any length: it is never held as a whole.
    pub(super) fn read(bytes: [u8; HEAD]) -> Result<Self, SpdyError> {
        let [a, b, c, d, flags, l0, l1, l2] = bytes;
        let first = u32::from_be_bytes([a, b, c, d]);
        let length = u32::from_be_bytes([0, l0, l1, l2]);
        if first & !NUMBER == 0 {
            return Ok(Self::Data { stream: first, fin: flags & FLAG_FIN != 0, length });
        }
        let version = (first >> 16) as u16 & 0x7fff;
        if version != VERSION {
            return Err(SpdyError::Version(version));
        }
        if length > MAX_CONTROL {
            return Err(SpdyError::FrameTooLong(length));
        }
        Ok(Self::Control { kind: first as u16, flags, length })
    }
}

/// A control frame, as far as hull needs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Control {
    SynStream {
        stream: u32,
        fin: bool,
        unidirectional: bool,
        headers: Headers,
    },
    SynReply {
        stream: u32,
        fin: bool,
    },
    Headers {
        stream: u32,
        fin: bool,
    },
    Reset {
        stream: u32,
    },
    Ping {
        id: u32,
    },
    GoAway,
    /// Settings, windows (neither is honoured by Go's implementation, so hull does not wait for them) and what this
    /// version does not know.
    Other,
}

impl Control {
    /// Reads the payload. Every header block passes through `headers`, wanted or not: each is the continuation of the
    /// one before it.
    pub(super) fn read(
        kind: u16,
        flags: u8,
        payload: &[u8],
        headers: &mut HeaderReader,
    ) -> Result<Self, SpdyError> {
        let number = |at: usize| {
            let bytes = payload.get(at..).and_then(|rest| rest.first_chunk::<4>());
            bytes.map(|bytes| u32::from_be_bytes(*bytes)).ok_or(SpdyError::CutOff(kind))
        };
        let rest = |at: usize| payload.get(at..).ok_or(SpdyError::CutOff(kind));
        let fin = flags & FLAG_FIN != 0;
        Ok(match kind {
            SYN_STREAM => Self::SynStream {
                stream: number(0)? & NUMBER,
                fin,
                unidirectional: flags & FLAG_UNIDIRECTIONAL != 0,
                headers: headers.read(rest(10)?)?,
            },
            SYN_REPLY | HEADERS => {
                let stream = number(0)? & NUMBER;
                headers.read(rest(4)?)?;
                match kind {
                    SYN_REPLY => Self::SynReply { stream, fin },
                    _ => Self::Headers { stream, fin },
                }
            }
            RST_STREAM => {
                number(4)?;
                Self::Reset { stream: number(0)? & NUMBER }
            }
            PING => Self::Ping { id: number(0)? },
            GOAWAY => Self::GoAway,
            SETTINGS | WINDOW_UPDATE => {
                number(0)?;
                Self::Other
            }
            _ => Self::Other,
        })
    }
}

/// The head of a data frame; `length` fits 24 bits.
pub(super) fn data_head(stream: u32, fin: bool, length: u32) -> [u8; HEAD] {
    let [a, b, c, d] = (stream & NUMBER).to_be_bytes();
    let [_, l0, l1, l2] = length.to_be_bytes();
    [a, b, c, d, u8::from(fin), l0, l1, l2]
}

fn control(kind: u16, flags: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(HEAD + payload.len());
    frame.extend_from_slice(&(0x8000 | VERSION).to_be_bytes());
    frame.extend_from_slice(&kind.to_be_bytes());
    let [_, length @ ..] = (payload.len() as u32).to_be_bytes();
    frame.push(flags);
    frame.extend_from_slice(&length);
    frame.extend_from_slice(payload);
    frame
}

/// Accepts a stream; `block` is a compressed header block.
pub(super) fn syn_reply(stream: u32, block: &[u8]) -> Vec<u8> {
    control(SYN_REPLY, 0, &[&stream.to_be_bytes(), block].concat())
}

/// Ends a stream at once.
pub(super) fn reset(stream: u32, reason: Reset) -> Vec<u8> {
    control(RST_STREAM, 0, &[stream.to_be_bytes(), (reason as u32).to_be_bytes()].concat())
}

/// Asks for an answer, or is one.
pub(super) fn ping(id: u32) -> Vec<u8> {
    control(PING, 0, &id.to_be_bytes())
}

/// No stream after `last` will be accepted; `status` is 0 for an ordinary end and 1 for a broken rule (2.6.6).
pub(super) fn go_away(last: u32, status: u32) -> Vec<u8> {
    control(GOAWAY, 0, &[last.to_be_bytes(), status.to_be_bytes()].concat())
}

/// Opens a stream, as a client does.
pub(super) fn syn_stream(stream: u32, fin: bool, block: &[u8]) -> Vec<u8> {
    control(SYN_STREAM, u8::from(fin), &[&stream.to_be_bytes()[..], &[0; 6], block].concat())
}

#[cfg(test)]
mod tests {
    use super::super::headers::HeaderWriter;
    use super::*;
    use proptest::prelude::*;

    fn read(frame: &[u8]) -> Control {
        let Head::Control { kind, flags, length } = Head::read(*frame.first_chunk().unwrap()).unwrap() else {
            panic!("not a control frame")
        };
        assert_eq!(length as usize, frame.len() - HEAD);
        Control::read(kind, flags, &frame[HEAD..], &mut HeaderReader::new()).unwrap()
    }

    #[test]
    fn frames_are_read_as_written() {
        let headers = Headers::default().with("streamtype", "stdin");
        let block = HeaderWriter::new().unwrap().write(&headers).unwrap();
        let opened = read(&syn_stream(5, true, &block));
        assert_eq!(opened, Control::SynStream { stream: 5, fin: true, unidirectional: false, headers });
        assert_eq!(read(&syn_reply(5, &block)), Control::SynReply { stream: 5, fin: false });
        assert_eq!(read(&reset(7, Reset::Refused)), Control::Reset { stream: 7 });
        assert_eq!(read(&ping(9)), Control::Ping { id: 9 });
        assert_eq!(read(&go_away(3, 0)), Control::GoAway);
        let head = Head::read(data_head(3, true, 0xff_ffff)).unwrap();
        assert_eq!(head, Head::Data { stream: 3, fin: true, length: 0xff_ffff });
    }

    #[test]
    fn another_version_and_a_frame_too_long_are_refused() {
        let mut frame = ping(1);
        frame[1] = 2;
        assert!(matches!(Head::read(*frame.first_chunk().unwrap()), Err(SpdyError::Version(2))));
        let mut frame = ping(1);
        frame[5] = 0xff;
        assert!(matches!(Head::read(*frame.first_chunk().unwrap()), Err(SpdyError::FrameTooLong(_))));
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_fall_over(
            head in any::<[u8; HEAD]>(),
            kind in 0_u16..12,
            flags in any::<u8>(),
            payload in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let _ = Head::read(head);
            let _ = Control::read(kind, flags, &payload, &mut HeaderReader::new());
        }

        #[test]
        fn a_damaged_header_block_is_refused_or_read(
            at in any::<prop::sample::Index>(), byte in any::<u8>(), cut in any::<prop::sample::Index>(),
        ) {
            let headers = Headers::default().with("streamtype", "stdin").with("port", "80");
            let mut block = HeaderWriter::new().unwrap().write(&headers).unwrap();
            let at = at.index(block.len());
            block[at] = byte;
            block.truncate(cut.index(block.len()) + 1);
            let _ = HeaderReader::new().read(&block);
        }
    }
}
