//! The image calls of CRI, and hull's own pull with progress.

mod image_fs_info;
mod image_status;
mod info;
mod list_images;
mod pull;
mod pull_image;
mod remove_image;
mod stream_images;
