//! The image calls of CRI, and hull's own for images: pulls with progress, names, files, checks, images of containers.

mod check;
mod files;
mod image_fs_info;
mod image_status;
mod info;
mod list_images;
mod of_container;
mod prune;
mod pull;
mod pull_image;
mod push;
mod remove_image;
mod stream_images;
mod tag;
