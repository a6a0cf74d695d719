use super::format::{BLOCK, DIRENT};

/// One name in a directory.
#[derive(Clone, Copy)]
pub(crate) struct DirEntry<'n> {
    pub(crate) name: &'n [u8],
    pub(crate) nid: u64,
    /// `FT_*`.
    pub(crate) file_type: u8,
}

/// Packs entries, which must come sorted by name, into directory blocks: all fixed parts first, then all names. `full`
/// gets each whole block (padded with zeros) and the return value is the last, partial one, never empty.
pub(crate) fn pack<'n, E>(
    entries: impl Iterator<Item = DirEntry<'n>>,
    mut full: impl FnMut(&[u8]) -> Result<(), E>,
) -> Result<Vec<u8>, E> {
    let mut pending: Vec<DirEntry<'n>> = Vec::new();
    let mut used = 0;
    for entry in entries {
        let size = DIRENT + entry.name.len();
        if used + size > BLOCK {
            let mut block = encode(&pending);
            block.resize(BLOCK, 0);
            full(&block)?;
            pending.clear();
            used = 0;
        }
        used += size;
        pending.push(entry);
    }
    Ok(encode(&pending))
}

/// The same split without the bytes: whole blocks, and bytes of the last one.
pub(crate) fn measure(name_lengths: impl Iterator<Item = usize>) -> (u64, usize) {
    let (mut blocks, mut used) = (0, 0);
    for length in name_lengths {
        let size = DIRENT + length;
        if used + size > BLOCK {
            blocks += 1;
            used = 0;
        }
        used += size;
    }
    (blocks, used)
}

fn encode(entries: &[DirEntry<'_>]) -> Vec<u8> {
    let mut block = Vec::with_capacity(BLOCK);
    let mut name_offset = entries.len() * DIRENT;
    for entry in entries {
        block.extend_from_slice(&entry.nid.to_le_bytes());
        block.extend_from_slice(&(name_offset as u16).to_le_bytes());
        block.extend_from_slice(&[entry.file_type, 0]);
        name_offset += entry.name.len();
    }
    for entry in entries {
        block.extend_from_slice(entry.name);
    }
    block
}
