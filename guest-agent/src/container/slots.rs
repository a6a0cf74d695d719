use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::protocol::messages::{self, slot::Kind};

/// What a request brought along from outside the pod: its slots, and the descriptors of its frame behind them.
#[derive(Clone, Copy, Debug)]
pub struct Slots<'a> {
    slots: &'a [messages::Slot],
    fds: &'a [OwnedFd],
}

impl<'a> Slots<'a> {
    /// `slots` of the request and the descriptors that came on its frame.
    pub const fn new(slots: &'a [messages::Slot], fds: &'a [OwnedFd]) -> Self {
        Self { slots, fds }
    }

    /// The descriptor behind the slot with this number; `None` if the request has no such slot or it is none.
    pub fn get(&self, slot: u32) -> Option<BorrowedFd<'a>> {
        let slot = self.slots.get(usize::try_from(slot).ok()?)?;
        let Some(Kind::Descriptor(number)) = slot.kind else { return None };
        Some(self.fds.get(usize::try_from(number).ok()?)?.as_fd())
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
