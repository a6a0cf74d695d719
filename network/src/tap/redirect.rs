//! tc, by netlink (linux/pkt_sched.h, pkt_cls.h, tc_act/tc_mirred.h).

use rustix::io::Errno;

use crate::netlink::{Batch, Message, NetlinkError, Socket};

const NEWQDISC: u16 = 36;
const NEWTFILTER: u16 = 44;
const DELTFILTER: u16 = 45;
const F_CREATE: u16 = 0x400;
const F_EXCL: u16 = 0x200;

const KIND: u16 = 1;
const OPTIONS: u16 = 2;

/// TC_H_INGRESS, which is also TC_H_CLSACT.
const INGRESS: u32 = 0xffff_fff1;
/// Handle of the one queueing discipline there.
const INGRESS_HANDLE: u32 = 0xffff_0000;
/// Incoming packets of an ingress or a clsact discipline (TC_H_MIN_INGRESS).
const INCOMING: u32 = 0xffff_fff2;
/// After whatever filters somebody else may have: the priority that the kernel gives first.
const PRIORITY: u32 = 0xc000;
/// ETH_P_ALL in network byte order.
const ALL_PROTOCOLS: u32 = 0x0300;

const MATCHALL_ACTIONS: u16 = 2;
// u32: one key that fits every packet.
const U32_SELECTOR: u16 = 5;
const U32_ACTIONS: u16 = 7;
const U32_TERMINAL: u8 = 1;

const ACTION_KIND: u16 = 1;
const ACTION_OPTIONS: u16 = 2;
const MIRRED_PARAMETERS: u16 = 2;
/// TC_ACT_STOLEN.
const STOLEN: u32 = 4;
/// TCA_EGRESS_REDIR.
const REDIRECT_OUT: u32 = 1;

/// Filters that take every packet. Kernels have either or both.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Filter {
    Matchall,
    U32,
}

/// Everything that comes in at one link goes out at the other. Each link is an index and a name.
pub(super) fn both_ways(socket: &Socket, a: (u32, &str), b: (u32, &str)) -> Result<(), NetlinkError> {
    let with = |filter| {
        let mut batch = Batch::new();
        for ((from, name), (to, _)) in [(a, b), (b, a)] {
            add_ingress(&mut batch, from, name);
            remove_redirection(&mut batch, from, name);
            add_redirection(&mut batch, filter, (from, name), to);
        }
        socket.execute(&batch)
    };
    match with(Filter::Matchall) {
        Err(error) if error.errno == Errno::NOENT => with(Filter::U32),
        other => other,
    }
}

/// One that is there already, also a clsact of somebody else's, serves as well.
fn add_ingress(batch: &mut Batch, link: u32, name: &str) {
    let what = format!("adding an ingress queueing discipline to {name}");
    batch.push_tolerating(&[Errno::EXIST], NEWQDISC, F_CREATE | F_EXCL, what, |m| {
        header(m, link, INGRESS_HANDLE, INGRESS, 0);
        m.string(KIND, "ingress");
    });
}

/// Of a former tap.
fn remove_redirection(batch: &mut Batch, link: u32, name: &str) {
    let what = format!("removing the former redirection from {name}");
    batch.push_tolerating(&[Errno::NOENT, Errno::INVAL], DELTFILTER, 0, what, |m| {
        header(m, link, 0, INCOMING, PRIORITY << 16 | ALL_PROTOCOLS);
    });
}

fn add_redirection(batch: &mut Batch, filter: Filter, (link, name): (u32, &str), to: u32) {
    let what = format!("redirecting what comes in at {name}");
    batch.push(NEWTFILTER, F_CREATE | F_EXCL, what, |m| {
        header(m, link, 0, INCOMING, PRIORITY << 16 | ALL_PROTOCOLS);
        let (kind, actions) = match filter {
            Filter::Matchall => ("matchall", MATCHALL_ACTIONS),
            Filter::U32 => ("u32", U32_ACTIONS),
        };
        m.string(KIND, kind).nested(OPTIONS, |m| {
            m.nested(actions, |m| {
                // The number is the place in the list of actions.
                m.nested(1, |m| {
                    m.string(ACTION_KIND, "mirred").nested(ACTION_OPTIONS, |m| {
                        m.attribute(MIRRED_PARAMETERS, &mirred(to));
                    });
                });
            });
            if filter == Filter::U32 {
                m.attribute(U32_SELECTOR, &any_packet());
            }
        });
    });
}

/// struct tcmsg: family, index, handle, parent, info.
fn header(m: &mut Message<'_>, link: u32, handle: u32, parent: u32, info: u32) {
    m.raw(&[0; 4]);
    for field in [link, handle, parent, info] {
        m.raw(&field.to_ne_bytes());
    }
}

/// struct tc_mirred: index, capab, action, refcnt, bindcnt, eaction, ifindex.
fn mirred(to: u32) -> [u8; 28] {
    let mut bytes = [0; 28];
    bytes[8..12].copy_from_slice(&STOLEN.to_ne_bytes());
    bytes[20..24].copy_from_slice(&REDIRECT_OUT.to_ne_bytes());
    bytes[24..28].copy_from_slice(&to.to_ne_bytes());
    bytes
}

/// struct tc_u32_sel with one struct tc_u32_key: mask 0 of anything is 0.
fn any_packet() -> [u8; 32] {
    let mut bytes = [0; 32];
    bytes[0] = U32_TERMINAL;
    // nkeys
    bytes[2] = 1;
    bytes
}
