use super::error::{EntryProblem, LayerError, printable};
use super::tree::NodeId;

// Of paths and targets together; no tool writes links before their targets, so a few will do; resolving
// them takes up to the square of their number.
const MAX_BYTES: u64 = 256 << 10;

/// Hard links whose target had not been seen when they came.
#[derive(Default)]
pub(super) struct PendingLinks {
    links: Vec<PendingLink>,
    bytes: u64,
}

/// One of them.
pub(super) struct PendingLink {
    /// The entry, as long as it still names this link.
    pub(super) node: NodeId,
    pub(super) path: Vec<u8>,
    pub(super) target: Vec<u8>,
}

impl PendingLinks {
    /// The number of the next link.
    pub(super) fn next(&self) -> u64 {
        self.links.len() as u64
    }

    pub(super) fn push(&mut self, link: PendingLink) -> Result<(), LayerError> {
        self.bytes += (link.path.len() + link.target.len() + size_of::<PendingLink>()) as u64;
        if self.bytes > MAX_BYTES {
            let what = "bytes of hard links that come before their targets";
            return Err(LayerError::Limit { what, limit: MAX_BYTES });
        }
        self.links.push(link);
        Ok(())
    }

    pub(super) fn into_links(self) -> Vec<PendingLink> {
        self.links
    }
}

impl PendingLink {
    /// The error when the target never came.
    pub(super) fn unresolved(&self) -> LayerError {
        LayerError::entry(&self.path, EntryProblem::LinkToNowhere(printable(&self.target)))
    }
}
