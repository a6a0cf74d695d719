use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::protocol::messages::{self, slot::Kind};

/// What a request brought along from outside the pod: its slots, and the descriptors of its frame behind them.
#[derive(Clone, Copy, Debug)]
pub struct Slots<'a> {
    slots: &'a [messages::Slot],
    behind: Behind<'a>,
}

/// Where the descriptors are.
#[derive(Clone, Copy, Debug)]
enum Behind<'a> {
    /// On the request's frame, numbered by the slots.
    Frame(&'a [OwnedFd]),
    /// One for each slot, if there is one.
    Resolved(&'a [Option<OwnedFd>]),
}

impl<'a> Slots<'a> {
    /// `slots` of the request and the descriptors that came on its frame.
    pub const fn new(slots: &'a [messages::Slot], fds: &'a [OwnedFd]) -> Self {
        Self { slots, behind: Behind::Frame(fds) }
    }

    /// `slots` of a request to an agent in a guest, and what each of them has turned out to be.
    pub const fn resolved(slots: &'a [messages::Slot], resolved: &'a [Option<OwnedFd>]) -> Self {
        Self { slots, behind: Behind::Resolved(resolved) }
    }

    /// The descriptor behind the slot with this number; `None` if the request has no such slot or it is none.
    pub fn get(&self, slot: u32) -> Option<BorrowedFd<'a>> {
        let index = usize::try_from(slot).ok()?;
        match self.behind {
            Behind::Frame(fds) => {
                let Some(Kind::Descriptor(number)) = self.slots.get(index)?.kind else { return None };
                Some(fds.get(usize::try_from(number).ok()?)?.as_fd())
            }
            Behind::Resolved(resolved) => Some(resolved.get(index)?.as_ref()?.as_fd()),
        }
    }

    /// The container id under which a guest's VMM logs, if the slot is for that.
    pub fn log(&self, slot: u32) -> Option<&'a str> {
        match &self.slots.get(usize::try_from(slot).ok()?)?.kind {
            Some(Kind::Log(container)) => Some(container),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    #[test]
    fn a_slot_leads_to_the_descriptor_it_names_and_nowhere_else() {
        let fds =
            [std::fs::File::open("/dev/null").unwrap().into(), std::fs::File::open("/").unwrap().into()];
        let slot = |number| messages::Slot { kind: Some(Kind::Descriptor(number)) };
        let list = [slot(1), slot(0), slot(2), messages::Slot { kind: None }];
        let slots = Slots::new(&list, &fds);
        assert_eq!(slots.get(0).unwrap().as_raw_fd(), fds[1].as_raw_fd());
        assert_eq!(slots.get(1).unwrap().as_raw_fd(), fds[0].as_raw_fd());
        assert!(slots.get(2).is_none() && slots.get(3).is_none() && slots.get(u32::MAX).is_none());
    }
}
