use rustix::io::Errno;

use super::expression::Rule;
use super::message::{F_CREATE, F_DUMP};
use super::{Attributes, Batch, Message, NetlinkError, Socket};

// linux/netfilter/nfnetlink.h
const SUBSYSTEM: u16 = 10 << 8;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const INET: u8 = 1;
const F_APPEND: u16 = 0x800;

// linux/netfilter/nf_tables.h
const NEW_TABLE: u16 = SUBSYSTEM;
const GET_TABLE: u16 = SUBSYSTEM | 1;
const DELETE_TABLE: u16 = SUBSYSTEM | 2;
const NEW_CHAIN: u16 = SUBSYSTEM | 3;
const NEW_RULE: u16 = SUBSYSTEM | 6;
const DELETE_RULE: u16 = SUBSYSTEM | 8;
const NEW_SET: u16 = SUBSYSTEM | 9;
const NEW_ELEMENT: u16 = SUBSYSTEM | 12;
const GET_ELEMENT: u16 = SUBSYSTEM | 13;
const DELETE_ELEMENT: u16 = SUBSYSTEM | 14;
const SET_IS_MAP: u32 = 8;
const LIST_ELEMENT: u16 = 1;
const DATA_VALUE: u16 = 1;
const ELEMENT_KEY: u16 = 1;
const ELEMENT_DATA: u16 = 2;

/// Where a chain is called from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Hook {
    /// `filter` or `nat`.
    pub(crate) kind: &'static str,
    /// NF_INET_PRE_ROUTING and so on.
    pub(crate) number: u32,
    /// The lower, the earlier.
    pub(crate) priority: i32,
}

/// A map from one concatenation of fields to another.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Map {
    pub(crate) name: &'static str,
    /// nft's numbers of the key's field types, six bits each; for people who list the table.
    pub(crate) key_type: u32,
    /// Bytes of the key, each field padded to four.
    pub(crate) key_length: u32,
    pub(crate) data_type: u32,
    pub(crate) data_length: u32,
}

/// Changes to one table of the inet family that take effect together or not at all.
#[derive(Debug)]
pub(crate) struct Transaction<'a> {
    table: &'a str,
    batch: Batch,
    sets: u32,
}

impl<'a> Transaction<'a> {
    pub(crate) fn new(table: &'a str) -> Self {
        let mut batch = Batch::new();
        batch.push_unacknowledged(BATCH_BEGIN, "changing the packet filter", |m| {
            m.raw(&[0, 0, 0, 10]);
        });
        Self { table, batch, sets: 0 }
    }

    /// Adds the table if it is missing.
    pub(crate) fn add_table(&mut self) {
        self.push(NEW_TABLE, F_CREATE, format!("adding nft table {}", self.table), |table, m| {
            m.string(1, table).be32(2, 0);
        });
    }

    pub(crate) fn delete_table(&mut self) {
        self.push(DELETE_TABLE, 0, format!("deleting nft table {}", self.table), |table, m| {
            m.string(1, table);
        });
    }

    /// Adds the map if it is missing.
    pub(crate) fn add_map(&mut self, map: &Map) {
        self.sets += 1;
        let id = self.sets;
        self.push(NEW_SET, F_CREATE, format!("adding nft map {}", map.name), |table, m| {
            m.string(1, table).string(2, map.name).be32(3, SET_IS_MAP);
            m.be32(4, map.key_type).be32(5, map.key_length).be32(6, map.data_type).be32(7, map.data_length);
            m.be32(10, id);
        });
    }

    /// Adds the chain if it is missing, and empties it.
    pub(crate) fn add_chain(&mut self, name: &str, hook: Option<Hook>) {
        self.push(NEW_CHAIN, F_CREATE, format!("adding nft chain {name}"), |table, m| {
            m.string(1, table).string(3, name);
            if let Some(hook) = hook {
                m.nested(4, |m| {
                    m.be32(1, hook.number).be32(2, hook.priority as u32);
                });
                const POLICY_ACCEPT: u32 = 1;
                m.be32(5, POLICY_ACCEPT).string(7, hook.kind);
            }
        });
        self.push(DELETE_RULE, 0, format!("emptying nft chain {name}"), |table, m| {
            m.string(1, table).string(2, name);
        });
    }

    /// Adds a rule at the end of a chain.
    pub(crate) fn add_rule(&mut self, chain: &str, body: impl FnOnce(&mut Rule<'_, '_>)) {
        self.push(
            NEW_RULE,
            F_CREATE | F_APPEND,
            format!("adding a rule to nft chain {chain}"),
            |table, m| {
                m.string(1, table).string(2, chain).nested(4, |m| body(&mut Rule(m)));
            },
        );
    }

    /// Adds elements to a map; one that is there with the same value is fine.
    pub(crate) fn add_elements(&mut self, map: &Map, elements: &[(Vec<u8>, Vec<u8>)]) {
        self.elements(NEW_ELEMENT, F_CREATE, "adding to", map, elements.iter().map(|(k, v)| (k, Some(v))));
    }

    /// Deletes elements from a map; the transaction fails if one of them is not there.
    pub(crate) fn delete_elements(&mut self, map: &Map, keys: &[Vec<u8>]) {
        self.elements(DELETE_ELEMENT, 0, "deleting from", map, keys.iter().map(|k| (k, None)));
    }

    fn elements<'e>(
        &mut self,
        kind: u16,
        flags: u16,
        verb: &str,
        map: &Map,
        elements: impl Iterator<Item = (&'e Vec<u8>, Option<&'e Vec<u8>>)>,
    ) {
        // An attribute is at most 64 KiB long: far more elements than these.
        const MOST: usize = 200;
        let elements: Vec<_> = elements.collect();
        for some in elements.chunks(MOST) {
            self.push(kind, flags, format!("{verb} nft map {}", map.name), |table, m| {
                m.string(1, table).string(2, map.name).nested(3, |m| {
                    for (key, data) in some {
                        m.nested(LIST_ELEMENT, |m| {
                            value(m, ELEMENT_KEY, key);
                            if let Some(data) = data {
                                value(m, ELEMENT_DATA, data);
                            }
                        });
                    }
                });
            });
        }
    }

    fn push(&mut self, kind: u16, flags: u16, what: String, body: impl FnOnce(&str, &mut Message<'_>)) {
        let table = self.table;
        self.batch.push(kind, flags, what, |m| {
            m.raw(&[INET, 0, 0, 0]);
            body(table, m);
        });
    }

    /// Makes the changes.
    pub(crate) fn commit(mut self, socket: &Socket) -> Result<(), NetlinkError> {
        self.batch.push_unacknowledged(BATCH_END, "changing the packet filter", |m| {
            m.raw(&[0, 0, 0, 10]);
        });
        socket.execute(&self.batch)
    }
}

impl Socket {
    /// Whether there is a table of this name in the inet family.
    pub(crate) fn has_table(&self, table: &str) -> Result<bool, NetlinkError> {
        let mut batch = Batch::new();
        batch.push(GET_TABLE, 0, format!("looking for nft table {table}"), |m| {
            m.raw(&[INET, 0, 0, 0]).string(1, table);
        });
        match self.execute(&batch) {
            Err(error) if error.errno == Errno::NOENT => Ok(false),
            other => other.map(|()| true),
        }
    }

    /// The keys in a map.
    pub(crate) fn map_keys(&self, table: &str, map: &Map) -> Result<Vec<Vec<u8>>, NetlinkError> {
        let mut batch = Batch::new();
        batch.push(GET_ELEMENT, F_DUMP, format!("listing nft map {}", map.name), |m| {
            m.raw(&[INET, 0, 0, 0]).string(1, table).string(2, map.name);
        });
        let mut keys = Vec::new();
        self.list(&batch, |_, payload| {
            let elements = payload.get(4..).and_then(|rest| Attributes(rest).get(3)).unwrap_or_default();
            for (_, element) in Attributes(elements) {
                let key =
                    Attributes(element).get(ELEMENT_KEY).and_then(|key| Attributes(key).get(DATA_VALUE));
                keys.extend(key.map(<[u8]>::to_vec));
            }
        })?;
        keys.sort();
        keys.dedup();
        Ok(keys)
    }
}

fn value(m: &mut Message<'_>, kind: u16, bytes: &[u8]) {
    m.nested(kind, |m| {
        m.attribute(DATA_VALUE, bytes);
    });
}
