//! rtnetlink, as far as one interface needs it: requests built by hand, each answered before the next is sent.

use std::io;
use std::os::fd::OwnedFd;

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

// linux/netlink.h and linux/rtnetlink.h.
const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const HEADER: usize = 16;

/// Flag of a request that makes something: what is there already is replaced.
pub(super) const CREATE_OR_REPLACE: u16 = 0x400 | 0x100;
/// Flag of a request that changes something that exists.
pub(super) const CHANGE: u16 = 0;

pub(super) const RTM_NEWLINK: u16 = 16;
pub(super) const RTM_NEWADDR: u16 = 20;
pub(super) const RTM_NEWROUTE: u16 = 24;
pub(super) const RTM_NEWNEIGH: u16 = 28;

/// One request: header, the fixed part of its kind, attributes.
#[derive(Debug)]
pub(super) struct Request(Vec<u8>);

impl Request {
    /// A request of this kind; `fixed` is its struct (ifinfomsg, rtmsg, …).
    pub(super) fn new(kind: u16, flags: u16, fixed: &[u8]) -> Self {
        let mut bytes = vec![0; HEADER];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&(NLM_F_REQUEST | NLM_F_ACK | flags).to_ne_bytes());
        bytes.extend_from_slice(fixed);
        let mut request = Self(bytes);
        request.align();
        request
    }

    /// Adds an attribute (struct rtattr). Values are a few bytes long, so their length fits.
    pub(super) fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        let length = (4 + value.len()) as u16;
        self.0.extend_from_slice(&length.to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self.align();
        self
    }

    fn align(&mut self) {
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    fn finish(mut self, sequence: u32) -> Vec<u8> {
        let length = self.0.len() as u32;
        self.0[..4].copy_from_slice(&length.to_ne_bytes());
        self.0[8..12].copy_from_slice(&sequence.to_ne_bytes());
        self.0
    }
}

/// A conversation with the network namespace that this process is in.
#[derive(Debug)]
pub(super) struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

impl Netlink {
    pub(super) fn open() -> io::Result<Self> {
        // Protocol 0 is NETLINK_ROUTE.
        let (family, flags) = (AddressFamily::NETLINK, SocketFlags::CLOEXEC);
        let socket = rustix::net::socket_with(family, SocketType::RAW, flags, None)?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Sends a request and waits for its acknowledgement.
    pub(super) fn ask(&mut self, request: Request) -> io::Result<()> {
        self.sequence += 1;
        let bytes = request.finish(self.sequence);
        rustix::io::retry_on_intr(|| rustix::net::send(&self.socket, &bytes, SendFlags::empty()))?;
        let mut answer = [0; 4096];
        loop {
            let receive = || rustix::net::recv(&self.socket, &mut answer[..], RecvFlags::empty());
            let (length, _) = rustix::io::retry_on_intr(receive)?;
            if let Some(result) = acknowledgement(&answer[..length.min(4096)], self.sequence) {
                return result;
            }
        }
    }
}

/// What the acknowledgement of the request with this number says, if it is in the datagram.
fn acknowledgement(mut datagram: &[u8], sequence: u32) -> Option<io::Result<()>> {
    while datagram.len() >= HEADER {
        let number = |at: usize| Some(u32::from_ne_bytes(*datagram.get(at..)?.first_chunk()?));
        let length = (number(0)? as usize).clamp(HEADER, datagram.len());
        let kind = u16::from_ne_bytes([datagram[4], datagram[5]]);
        if kind == NLMSG_ERROR && number(8)? == sequence {
            // struct nlmsgerr: a negative errno, 0 for success.
            let error = number(HEADER)? as i32;
            let failed = || Err(io::Error::from_raw_os_error(error.unsigned_abs() as i32));
            return Some(if error == 0 { Ok(()) } else { failed() });
        }
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_aligned_and_the_length_counts_everything() {
        let bytes = Request::new(RTM_NEWLINK, CHANGE, &[1; 16]).attribute(3, b"eth0\0").finish(7);
        assert_eq!(bytes.len(), 16 + 16 + 12);
        assert_eq!(bytes[..4], 44_u32.to_ne_bytes());
        assert_eq!(bytes[8..12], 7_u32.to_ne_bytes());
        assert_eq!(bytes[32..34], 9_u16.to_ne_bytes());
        assert_eq!(&bytes[36..], b"eth0\0\0\0\0");
    }

    #[test]
    fn an_answer_is_found_by_its_number_and_a_torn_one_is_none() {
        let mut datagram = vec![0; 20];
        datagram[..4].copy_from_slice(&20_u32.to_ne_bytes());
        datagram[4..6].copy_from_slice(&NLMSG_ERROR.to_ne_bytes());
        datagram[8..12].copy_from_slice(&5_u32.to_ne_bytes());
        datagram[16..].copy_from_slice(&(-17_i32).to_ne_bytes());
        assert_eq!(acknowledgement(&datagram, 5).unwrap().unwrap_err().raw_os_error(), Some(17));
        assert!(acknowledgement(&datagram, 6).is_none());
        assert!(acknowledgement(&datagram[..18], 5).is_none());
        assert!(acknowledgement(&[], 5).is_none());
    }
}
