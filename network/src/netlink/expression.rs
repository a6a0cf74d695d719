use super::Message;

// linux/netfilter/nf_tables.h
const LIST_ELEMENT: u16 = 1;
const NAME: u16 = 1;
const DATA: u16 = 2;
const DATA_VALUE: u16 = 1;
const DATA_VERDICT: u16 = 2;
const VERDICT_CODE: u16 = 1;
const VERDICT_CHAIN: u16 = 2;
const VERDICT_REGISTER: u32 = 0;
const BASE_NETWORK: u32 = 1;
const BASE_TRANSPORT: u32 = 2;
const META_IIFNAME: u32 = 6;
const META_OIFNAME: u32 = 7;
const META_NFPROTO: u32 = 15;
const META_L4PROTO: u32 = 16;
const CT_STATUS: u32 = 2;
/// IPS_DST_NAT (linux/netfilter/nf_conntrack_common.h).
const STATUS_DNAT: u32 = 1 << 5;
const FIB_ADDRESS_TYPE: u32 = 3;
const FIB_DESTINATION: u32 = 2;
/// RTN_LOCAL (linux/rtnetlink.h).
const ADDRESS_IS_LOCAL: u32 = 2;
const NAT_DESTINATION: u32 = 1;
const DROP: u32 = 0;
const ACCEPT: u32 = 1;
const JUMP: u32 = -3i32 as u32;
/// Length of an interface name as the kernel compares it.
const INTERFACE_NAME: usize = 16;

/// A 32 bit register, numbered as the kernel does (NFT_REG32_00 is 8): four bytes each, values of more span several.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Register(u32);

impl Register {
    /// The n-th of the sixteen registers.
    pub(crate) const fn nth(n: u32) -> Self {
        Self(8 + n)
    }
}

/// IP version of a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Version {
    V4,
    V6,
}

impl Version {
    /// NFPROTO_*.
    pub(crate) fn protocol(self) -> u8 {
        match self {
            Self::V4 => 2,
            Self::V6 => 10,
        }
    }

    /// Length of an address in bytes.
    pub(crate) fn address_length(self) -> u32 {
        match self {
            Self::V4 => 4,
            Self::V6 => 16,
        }
    }

    fn source_offset(self) -> u32 {
        match self {
            Self::V4 => 12,
            Self::V6 => 8,
        }
    }

    fn destination_offset(self) -> u32 {
        self.source_offset() + self.address_length()
    }
}

/// The expressions of one rule, written in the order in which they are evaluated. Each condition that does not hold
/// ends the rule.
#[derive(Debug)]
pub(crate) struct Rule<'a, 'b>(pub(super) &'a mut Message<'b>);

impl Rule<'_, '_> {
    pub(crate) fn version(&mut self, version: Version) -> &mut Self {
        self.load_meta(META_NFPROTO, Register::nth(0)).compare(true, &[version.protocol()])
    }

    pub(crate) fn input_interface(&mut self, name: &str) -> &mut Self {
        self.load_meta(META_IIFNAME, Register::nth(0)).compare(true, &padded(name))
    }

    pub(crate) fn output_interface(&mut self, is: bool, name: &str) -> &mut Self {
        self.load_meta(META_OIFNAME, Register::nth(0)).compare(is, &padded(name))
    }

    /// Source is (or is not) in the network with this address and prefix length. The version was checked before.
    pub(crate) fn source(&mut self, version: Version, is: bool, network: &[u8], prefix: u8) -> &mut Self {
        self.address(version.source_offset(), is, network, prefix)
    }

    pub(crate) fn destination(
        &mut self,
        version: Version,
        is: bool,
        network: &[u8],
        prefix: u8,
    ) -> &mut Self {
        self.address(version.destination_offset(), is, network, prefix)
    }

    fn address(&mut self, offset: u32, is: bool, network: &[u8], prefix: u8) -> &mut Self {
        let whole = usize::from(prefix.div_ceil(8));
        self.load_payload(BASE_NETWORK, offset, whole as u32, Register::nth(0));
        if !prefix.is_multiple_of(8) {
            let mask: Vec<u8> =
                (0..whole).map(|byte| prefix_mask(usize::from(prefix).saturating_sub(byte * 8))).collect();
            self.mask(&mask);
        }
        self.compare(is, network.get(..whole).unwrap_or(network))
    }

    /// The connection's destination was translated.
    pub(crate) fn translated(&mut self) -> &mut Self {
        self.expression("ct", |m| {
            m.be32(1, 8).be32(2, CT_STATUS);
        });
        // Connection tracking status is in the machine's byte order.
        self.mask(&STATUS_DNAT.to_ne_bytes()).compare(false, &[0; 4])
    }

    /// The packet's destination is an address of this host.
    pub(crate) fn destination_is_local(&mut self) -> &mut Self {
        self.expression("fib", |m| {
            m.be32(1, 8).be32(2, FIB_ADDRESS_TYPE).be32(3, FIB_DESTINATION);
        });
        self.compare(true, &ADDRESS_IS_LOCAL.to_ne_bytes())
    }

    pub(crate) fn load_destination(&mut self, version: Version, into: Register) -> &mut Self {
        self.load_payload(BASE_NETWORK, version.destination_offset(), version.address_length(), into)
    }

    pub(crate) fn load_protocol(&mut self, into: Register) -> &mut Self {
        self.load_meta(META_L4PROTO, into)
    }

    pub(crate) fn load_destination_port(&mut self, into: Register) -> &mut Self {
        self.load_payload(BASE_TRANSPORT, 2, 2, into)
    }

    /// Looks the key at `from` up in a map of the same table; the rule ends if it is not there.
    pub(crate) fn map(&mut self, name: &str, from: Register, into: Register) -> &mut Self {
        self.expression("lookup", |m| {
            m.string(1, name).be32(2, from.0).be32(3, into.0);
        })
    }

    /// Rewrites the destination to the address and port in these registers.
    pub(crate) fn translate_destination(&mut self, version: Version, address: Register, port: Register) {
        self.expression("nat", |m| {
            m.be32(1, NAT_DESTINATION)
                .be32(2, u32::from(version.protocol()))
                .be32(3, address.0)
                .be32(5, port.0);
        });
    }

    /// Rewrites the source to the address of the interface that the packet leaves through.
    pub(crate) fn masquerade(&mut self) {
        self.expression("masq", |_| {});
    }

    pub(crate) fn accept(&mut self) {
        self.verdict(ACCEPT, None);
    }

    pub(crate) fn drop(&mut self) {
        self.verdict(DROP, None);
    }

    pub(crate) fn jump(&mut self, chain: &str) {
        self.verdict(JUMP, Some(chain));
    }

    fn verdict(&mut self, code: u32, chain: Option<&str>) {
        self.expression("immediate", |m| {
            m.be32(1, VERDICT_REGISTER).nested(2, |m| {
                m.nested(DATA_VERDICT, |m| {
                    m.be32(VERDICT_CODE, code);
                    if let Some(chain) = chain {
                        m.string(VERDICT_CHAIN, chain);
                    }
                });
            });
        });
    }

    fn load_meta(&mut self, key: u32, into: Register) -> &mut Self {
        self.expression("meta", |m| {
            m.be32(1, into.0).be32(2, key);
        })
    }

    fn load_payload(&mut self, base: u32, offset: u32, length: u32, into: Register) -> &mut Self {
        self.expression("payload", |m| {
            m.be32(1, into.0).be32(2, base).be32(3, offset).be32(4, length);
        })
    }

    /// Compares register 0 with a value.
    fn compare(&mut self, equal: bool, value: &[u8]) -> &mut Self {
        self.expression("cmp", |m| {
            m.be32(1, 8).be32(2, u32::from(!equal)).nested(3, |m| {
                m.attribute(DATA_VALUE, value);
            });
        })
    }

    /// Ands register 0 with a mask.
    fn mask(&mut self, mask: &[u8]) -> &mut Self {
        let nothing = vec![0; mask.len()];
        self.expression("bitwise", |m| {
            m.be32(1, 8).be32(2, 8).be32(3, mask.len() as u32);
            m.nested(4, |m| {
                m.attribute(DATA_VALUE, mask);
            });
            m.nested(5, |m| {
                m.attribute(DATA_VALUE, &nothing);
            });
        })
    }

    fn expression(&mut self, name: &str, body: impl FnOnce(&mut Message<'_>)) -> &mut Self {
        self.0.nested(LIST_ELEMENT, |m| {
            m.string(NAME, name).nested(DATA, body);
        });
        self
    }
}

fn prefix_mask(bits: usize) -> u8 {
    match bits {
        0 => 0,
        1..=7 => 0xff << (8 - bits),
        _ => 0xff,
    }
}

fn padded(name: &str) -> [u8; INTERFACE_NAME] {
    let mut bytes = [0; INTERFACE_NAME];
    for (to, from) in bytes.iter_mut().zip(name.bytes().take(INTERFACE_NAME - 1)) {
        *to = from;
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_of_partial_bytes() {
        assert_eq!([0, 1, 3, 7, 8, 20].map(prefix_mask), [0, 0x80, 0xe0, 0xfe, 0xff, 0xff]);
    }
}
