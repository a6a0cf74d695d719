//! A small synchronous netlink: requests of several messages in one datagram, for rtnetlink and nf_tables alike.
//!
//! The kernel handles both families inside sendmsg, so a socket answers at once and needs no task, no timer and no
//! locking; whoever needs one opens one (5 µs) in the network namespace it is meant for.

/// Tracked connections (ctnetlink over nfnetlink).
mod conntrack;
/// The expressions that nf_tables rules are made of.
pub(crate) mod expression;
mod message;
/// Tables, chains, maps and their elements (nf_tables over nfnetlink).
pub(crate) mod nftables;
/// Links, addresses, routes and queueing disciplines (rtnetlink(7)).
pub(crate) mod route;
mod socket;

pub(crate) use message::{Attributes, Batch, Message};
pub(crate) use socket::{NetlinkError, Socket};
