//! The D-Bus wire format (dbus-specification, "Message Protocol"), as much of it as systemd's manager needs: calls with
//! strings and properties out, short answers in. Little-endian.

use std::io::{self, Read};

/// Longest header fields and longest body that are read.
const MAX_FIELDS: usize = 64 << 10;
const MAX_BODY: usize = 1 << 20;

/// A property's value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// `b`
    Bool(bool),
    /// `i`
    I32(i32),
    /// `t`
    U64(u64),
    /// `s`
    Text(String),
    /// `au`
    U32s(Vec<u32>),
    /// `ay`
    Bytes(Vec<u8>),
}

impl Value {
    fn signature(&self) -> &'static str {
        match self {
            Self::Bool(_) => "b",
            Self::I32(_) => "i",
            Self::U64(_) => "t",
            Self::Text(_) => "s",
            Self::U32s(_) => "au",
            Self::Bytes(_) => "ay",
        }
    }
}

/// Properties as systemd takes them.
pub type Properties = Vec<(&'static str, Value)>;

/// Writes values one after the other, each at its alignment.
#[derive(Clone, Debug, Default)]
pub struct Writer(Vec<u8>);

impl Writer {
    fn align(&mut self, to: usize) {
        self.0.resize(self.0.len().next_multiple_of(to), 0);
    }

    fn u32(&mut self, value: u32) {
        self.align(4);
        self.0.extend(value.to_le_bytes());
    }

    /// `b`
    pub fn bool(&mut self, value: bool) {
        self.u32(u32::from(value));
    }

    /// `s` (and `o`)
    pub fn text(&mut self, value: &str) {
        self.u32(value.len() as u32);
        self.0.extend(value.as_bytes());
        self.0.push(0);
    }

    fn signature(&mut self, value: &str) {
        self.0.push(value.len() as u8);
        self.0.extend(value.as_bytes());
        self.0.push(0);
    }

    /// `v`
    fn variant(&mut self, value: &Value) {
        self.signature(value.signature());
        match value {
            Value::Bool(value) => self.bool(*value),
            Value::I32(value) => self.u32(value.cast_unsigned()),
            Value::U64(value) => {
                self.align(8);
                self.0.extend(value.to_le_bytes());
            }
            Value::Text(value) => self.text(value),
            Value::U32s(values) => {
                self.u32(values.len() as u32 * 4);
                values.iter().for_each(|value| self.u32(*value));
            }
            Value::Bytes(bytes) => {
                self.u32(bytes.len() as u32);
                self.0.extend(bytes);
            }
        }
    }

    /// An array of structures; its length counts neither itself nor the padding before its first element.
    fn array<T>(&mut self, items: &[T], mut one: impl FnMut(&mut Self, &T)) {
        self.u32(0);
        let place = self.0.len() - 4;
        self.align(8);
        let begin = self.0.len();
        for item in items {
            self.align(8);
            one(self, item);
        }
        let length = (self.0.len() - begin) as u32;
        self.0[place..place + 4].copy_from_slice(&length.to_le_bytes());
    }

    /// `a(sv)`
    pub fn properties(&mut self, properties: &Properties) {
        self.array(properties, |writer, (name, value)| {
            writer.text(name);
            writer.variant(value);
        });
    }

    /// `a(sa(sv))` of nothing.
    pub fn no_auxiliary_units(&mut self) {
        self.array::<()>(&[], |_, ()| {});
    }
}

/// A method call.
#[derive(Debug)]
pub struct Call<'a> {
    /// Bus name; empty where there is no bus between.
    pub destination: &'a str,
    /// Object.
    pub path: &'a str,
    /// Interface.
    pub interface: &'a str,
    /// Method.
    pub member: &'a str,
    /// Of the body.
    pub signature: &'a str,
    /// The arguments.
    pub body: Writer,
}

impl Call<'_> {
    /// The whole message.
    pub fn encode(&self, serial: u32) -> Vec<u8> {
        enum Kind {
            Path,
            Text,
            Signature,
        }
        let fields = [
            (1_u8, Kind::Path, self.path),
            (2, Kind::Text, self.interface),
            (3, Kind::Text, self.member),
            (6, Kind::Text, self.destination),
            (8, Kind::Signature, self.signature),
        ];
        let fields: Vec<_> = fields.into_iter().filter(|(.., value)| !value.is_empty()).collect();
        // Little-endian, METHOD_CALL, no flags, protocol version 1.
        let mut writer = Writer(vec![b'l', 1, 0, 1]);
        writer.u32(self.body.0.len() as u32);
        writer.u32(serial);
        writer.array(&fields, |writer, (code, kind, value)| {
            writer.0.push(*code);
            match kind {
                Kind::Path => {
                    writer.signature("o");
                    writer.text(value);
                }
                Kind::Text => {
                    writer.signature("s");
                    writer.text(value);
                }
                Kind::Signature => {
                    writer.signature("g");
                    writer.signature(value);
                }
            }
        });
        writer.align(8);
        writer.0.extend(&self.body.0);
        writer.0
    }
}

/// A message that came.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Incoming {
    /// 2: the answer to a call; 3: its failure; 4: a signal.
    pub kind: u8,
    /// Of the call that it answers.
    pub reply_to: u32,
    /// Name of the failure.
    pub error: String,
    /// The first argument, if it is a string.
    pub text: String,
}

fn malformed() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "a malformed D-Bus message")
}

/// Reads one message.
pub fn receive(stream: &mut impl Read) -> io::Result<Incoming> {
    let mut head = [0; 16];
    stream.read_exact(&mut head)?;
    let number =
        |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]) as usize;
    let (body, fields) = (number(4), number(12));
    if head[0] != b'l' || head[3] != 1 || body > MAX_BODY || fields > MAX_FIELDS {
        return Err(malformed());
    }
    let mut rest = vec![0; fields.next_multiple_of(8) + body];
    stream.read_exact(&mut rest)?;
    let (header, body) = rest.split_at(fields.next_multiple_of(8));
    let mut incoming = Incoming { kind: head[1], ..Incoming::default() };
    let mut signature = String::new();
    let mut reader = Reader { bytes: &header[..fields], at: 0 };
    while reader.at < fields {
        reader.align(8);
        let code = reader.byte()?;
        match (reader.signature()?.as_str(), code) {
            ("u", 5) => incoming.reply_to = reader.u32()?,
            ("u", _) => drop(reader.u32()?),
            ("s" | "o", 4) => incoming.error = reader.text()?,
            ("s" | "o", _) => drop(reader.text()?),
            ("g", 8) => signature = reader.signature()?,
            _ => return Err(malformed()),
        }
    }
    if signature.starts_with(['s', 'o']) {
        incoming.text = Reader { bytes: body, at: 0 }.text()?;
    }
    Ok(incoming)
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    fn align(&mut self, to: usize) {
        self.at = self.at.next_multiple_of(to);
    }

    fn take(&mut self, length: usize) -> io::Result<&[u8]> {
        let end = self.at.checked_add(length).ok_or_else(malformed)?;
        let found = self.bytes.get(self.at..end).ok_or_else(malformed)?;
        self.at = end;
        Ok(found)
    }

    fn byte(&mut self) -> io::Result<u8> {
        Ok(self.take(1)?[0])
    }

    fn u32(&mut self) -> io::Result<u32> {
        self.align(4);
        let bytes = self.take(4)?;
        Ok(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    fn text(&mut self) -> io::Result<String> {
        let length = self.u32()? as usize;
        let text = String::from_utf8_lossy(self.take(length)?).into_owned();
        self.byte()?;
        Ok(text)
    }

    fn signature(&mut self) -> io::Result<String> {
        let length = usize::from(self.byte()?);
        let text = String::from_utf8_lossy(self.take(length)?).into_owned();
        self.byte()?;
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As dbus-daemon and every client library write it: checked byte by byte against the specification.
    #[test]
    fn a_call_is_laid_out_as_the_specification_says() {
        let mut body = Writer::default();
        body.text("ab");
        body.properties(&vec![("P", Value::U64(7)), ("Q", Value::Bool(true))]);
        let call =
            Call { destination: "d.e", path: "/p", interface: "i.f", member: "M", signature: "sa(sv)", body };
        let bytes = call.encode(9);
        assert_eq!(&bytes[..12], [b'l', 1, 0, 1, 56, 0, 0, 0, 9, 0, 0, 0]);
        let fields = u32::from_le_bytes(bytes[12..16].try_into().unwrap()) as usize;
        let body = &bytes[(16 + fields).next_multiple_of(8)..];
        let expected = [
            &[2, 0, 0, 0, b'a', b'b', 0, 0][..],
            &[40, 0, 0, 0, 0, 0, 0, 0],
            &[1, 0, 0, 0, b'P', 0, 1, b't', 0, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0],
            &[1, 0, 0, 0, b'Q', 0, 1, b'b', 0, 0, 0, 0, 1, 0, 0, 0],
        ]
        .concat();
        assert_eq!(body, expected);
    }

    #[test]
    fn what_was_encoded_is_read_back_and_nonsense_is_refused() {
        let mut body = Writer::default();
        body.text("/job/1");
        let call = Call { destination: "", path: "/p", interface: "i", member: "M", signature: "o", body };
        let bytes = call.encode(3);
        let incoming = receive(&mut bytes.as_slice()).unwrap();
        assert_eq!((incoming.kind, incoming.text.as_str()), (1, "/job/1"));
        for length in 0..bytes.len() {
            assert!(receive(&mut &bytes[..length]).is_err());
        }
        let mut huge = bytes.clone();
        huge[7] = 0xff;
        assert!(receive(&mut huge.as_slice()).is_err());
        for at in 16..bytes.len() {
            let mut broken = bytes.clone();
            broken[at] ^= 0xff;
            // Whatever comes of it, nobody panics.
            let _ = receive(&mut broken.as_slice());
        }
    }
}
