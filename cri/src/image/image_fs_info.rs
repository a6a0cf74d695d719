//! ImageFsInfo.

use std::sync::Arc;

use crate::api::runtime::{FilesystemIdentifier, FilesystemUsage, ImageFsInfoResponse, UInt64Value};
use crate::runtime::{Result, Runtime, blocking, now};

impl Runtime {
    /// What the images occupy. Writable layers lie on the same filesystem, which the answer says by naming it twice.
    pub async fn image_fs_info(&self) -> Result<ImageFsInfoResponse> {
        let images = Arc::clone(self.images());
        let usage = blocking(move || images.usage()).await??;
        let usage = FilesystemUsage {
            timestamp: now(),
            fs_id: Some(FilesystemIdentifier { mountpoint: usage.mountpoint.to_string_lossy().into_owned() }),
            used_bytes: Some(UInt64Value { value: usage.bytes }),
            inodes_used: Some(UInt64Value { value: usage.inodes }),
        };
        Ok(ImageFsInfoResponse { image_filesystems: vec![usage.clone()], container_filesystems: vec![usage] })
    }
}
