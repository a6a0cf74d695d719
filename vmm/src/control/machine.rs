use std::io;
use std::os::fd::OwnedFd;

use crate::protocol::messages::{self, error::Code, response::Outcome};

/// What control requests can do to a machine. Calls come from the main thread, one at a time, and must be quick: while one
/// is under way, no other request is answered.
///
/// Descriptors have been checked for type and access, numbers and names for nothing but their form.
pub trait Machine {
    /// What the machine is and does. `logs`, `extents`, `slots` and the rest are filled in by it.
    fn status(&mut self) -> messages::Status;

    /// Maps the first `length` bytes of the file on the images disk. A key that is mapped keeps its extent.
    ///
    /// # Errors
    /// The key is mapped with another length, the file is shorter than that, or the disk is full.
    fn add_extent(&mut self, key: &str, length: u64, file: OwnedFd) -> Result<messages::Extent, CallError>;

    /// Unmaps what has this key; harmless if nothing has.
    ///
    /// # Errors
    /// The device does not answer.
    fn remove_extent(&mut self, key: &str) -> Result<(), CallError>;

    /// Lets the guest write to a part of the scratch disk; harmless if it may already.
    ///
    /// # Errors
    /// It is no part of the disk, or has bytes of another one.
    fn open_scratch(&mut self, offset: u64, length: u64) -> Result<(), CallError>;

    /// Lets the guest write no more to the part of the scratch disk that begins here; harmless if it may not.
    ///
    /// # Errors
    /// A write does not end.
    fn close_scratch(&mut self, offset: u64) -> Result<(), CallError>;

    /// Puts the file behind an empty block slot.
    ///
    /// # Errors
    /// There is no such slot, or something is behind it already.
    fn fill_slot(&mut self, slot: u32, readonly: bool, file: OwnedFd) -> Result<(), CallError>;

    /// Empties a block slot; harmless if it is empty.
    ///
    /// # Errors
    /// There is no such slot.
    fn clear_slot(&mut self, slot: u32) -> Result<(), CallError>;

    /// Lets hull-virtiofsd at the other end of `server` serve the volumes.
    ///
    /// # Errors
    /// One serves them already, or it does not take them.
    fn serve_volumes(&mut self, server: OwnedFd) -> Result<(), CallError>;

    /// Output of the container goes to this file.
    ///
    /// # Errors
    /// There are too many logs.
    fn set_log(&mut self, container_id: &str, file: OwnedFd) -> Result<(), CallError>;

    /// Forgets the log of a container; harmless if there is none.
    ///
    /// # Errors
    /// What was written could not be flushed.
    fn remove_log(&mut self, container_id: &str) -> Result<(), CallError>;

    /// Asks the guest to have so many bytes of memory, those it booted with included.
    ///
    /// # Errors
    /// It is less than it booted with or more than the machine can have.
    fn resize_memory(&mut self, bytes: u64) -> Result<(), CallError>;

    /// Stops the vCPUs and drains the devices; harmless if they rest already.
    ///
    /// # Errors
    /// A device could not be drained; everything runs on.
    fn pause(&mut self) -> Result<(), CallError>;

    /// Undoes [`Machine::pause`]; harmless if nothing rests.
    ///
    /// # Errors
    /// A device could not go on.
    fn resume(&mut self) -> Result<(), CallError>;

    /// Writes the state of vCPUs and devices to an empty file.
    ///
    /// # Errors
    /// The machine is not paused, or the file cannot be written.
    fn save(&mut self, file: OwnedFd) -> Result<(), CallError>;

    /// Counters by name.
    fn metrics(&mut self) -> messages::Metrics;
}

/// Why a request was not carried out: a whole sentence for people and a code for hulld.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct CallError {
    code: Code,
    message: String,
    errno: i32,
}

impl CallError {
    fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), errno: 0 }
    }

    /// The request is wrong in itself.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(Code::Invalid, message)
    }

    /// What the request names is not there.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(Code::NotFound, message)
    }

    /// The machine is not in the state that the request needs.
    pub fn precondition(message: impl Into<String>) -> Self {
        Self::new(Code::FailedPrecondition, message)
    }

    /// This VMM does not know the request.
    pub fn unknown() -> Self {
        Self::new(Code::UnknownCall, "this hull-vmm does not know the request")
    }

    /// Something failed here, whose text ends with the reason.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(Code::Internal, message)
    }

    /// A system call failed while `doing` ("cannot …").
    pub fn system(doing: impl std::fmt::Display, error: &io::Error) -> Self {
        let errno = error.raw_os_error().unwrap_or(0);
        Self { code: Code::Internal, message: format!("{doing}: {error}"), errno }
    }

    /// As it goes over the wire.
    pub fn into_outcome(self) -> Outcome {
        Outcome::Error(messages::Error { code: self.code.into(), message: self.message, errno: self.errno })
    }
}

impl From<crate::protocol::DescriptorError> for CallError {
    fn from(error: crate::protocol::DescriptorError) -> Self {
        Self::invalid(error.to_string())
    }
}
