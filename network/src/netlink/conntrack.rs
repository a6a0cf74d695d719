//! Forgetting tracked connections (ctnetlink).

use rustix::io::Errno;

use super::message::F_DUMP;
use super::{Attributes, Batch, NetlinkError, Socket};

// linux/netfilter/nfnetlink_conntrack.h
const GET: u16 = 1 << 8 | 1;
const DELETE: u16 = 1 << 8 | 2;
const TUPLE_ORIGINAL: u16 = 1;
const ID: u16 = 12;
const TUPLE_PROTOCOL: u16 = 2;
const PROTOCOL_NUMBER: u16 = 1;
const PROTOCOL_DESTINATION_PORT: u16 = 3;
const UDP: u8 = 17;

/// An entry to be deleted: address family, original tuple, id.
struct Entry {
    family: u8,
    tuple: Vec<u8>,
    id: Option<Vec<u8>>,
}

impl Socket {
    /// Forgets the UDP flows that were sent to one of these ports: address translation is decided by a flow's first
    /// packet, so a client that goes on sending would never reach a new receiver.
    pub(crate) fn forget_udp_flows_to(&self, ports: &[u16]) -> Result<(), NetlinkError> {
        if ports.is_empty() {
            return Ok(());
        }
        let mut batch = Batch::new();
        batch.push(GET, F_DUMP, "listing tracked connections", |m| {
            m.raw(&[0; 4]);
        });
        let mut entries = Vec::new();
        let listed = self.list(&batch, |_, payload| {
            let (Some(family), Some(rest)) = (payload.first(), payload.get(4..)) else { return };
            let attributes = Attributes(rest);
            let Some(tuple) = attributes.get(TUPLE_ORIGINAL) else { return };
            if udp_port(tuple).is_some_and(|port| ports.contains(&port)) {
                let id = attributes.get(ID).map(<[u8]>::to_vec);
                entries.push(Entry { family: *family, tuple: tuple.to_vec(), id });
            }
        });
        match listed {
            // A kernel without ctnetlink; such a flow then ends by its time-out.
            Err(error) if matches!(error.errno, Errno::INVAL | Errno::OPNOTSUPP) => return Ok(()),
            other => other?,
        }
        for some in entries.chunks(100) {
            let mut batch = Batch::new();
            for entry in some {
                batch.push_tolerating(&[Errno::NOENT], DELETE, 0, "forgetting a UDP flow", |m| {
                    m.raw(&[entry.family, 0, 0, 0]).nested(TUPLE_ORIGINAL, |m| {
                        m.raw(&entry.tuple);
                    });
                    if let Some(id) = &entry.id {
                        m.attribute(ID, id);
                    }
                });
            }
            self.execute(&batch)?;
        }
        Ok(())
    }
}

/// Destination port of a tuple, if it is a UDP flow's.
fn udp_port(tuple: &[u8]) -> Option<u16> {
    let protocol = Attributes(Attributes(tuple).get(TUPLE_PROTOCOL)?);
    if protocol.get(PROTOCOL_NUMBER)? != [UDP] {
        return None;
    }
    Some(u16::from_be_bytes(protocol.get(PROTOCOL_DESTINATION_PORT)?.try_into().ok()?))
}
