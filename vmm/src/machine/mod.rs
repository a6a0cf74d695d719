//! A pod's machine, put together.

mod core;
mod state;

pub use core::{BuildError, Core, CoreConfig, CoreFiles, Kernel};
pub use state::{CoreState, RestoreError};
