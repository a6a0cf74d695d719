use super::machine::{CallError, Machine};
use crate::protocol::messages::{self, request::Call, response::Outcome};
use crate::protocol::{Access, Descriptors};

/// Longest key of an extent in bytes.
const MAX_KEY: usize = 256;

/// What one request comes to.
#[derive(Debug)]
pub struct Answer {
    /// Goes back to the caller.
    pub outcome: Outcome,
    /// The machine ends then.
    pub stop: bool,
}

/// Carries out one request, whatever it is. Public for its fuzz target.
pub fn call(machine: &mut impl Machine, call: Option<Call>, fds: &mut Descriptors) -> Answer {
    let stop = matches!(call, Some(Call::Stop(_)));
    let outcome = call.map_or_else(|| Err(CallError::unknown()), |call| carry_out(machine, call, fds));
    Answer { outcome: outcome.unwrap_or_else(CallError::into_outcome), stop }
}

fn carry_out(machine: &mut impl Machine, call: Call, fds: &mut Descriptors) -> Result<Outcome, CallError> {
    let result = match call {
        Call::Status(_) => return Ok(Outcome::Status(machine.status())),
        Call::Metrics(_) => return Ok(Outcome::Metrics(machine.metrics())),
        Call::AddExtent(call) => return add_extent(machine, &call, fds),
        Call::RemoveExtent(call) => machine.remove_extent(&call.key),
        Call::OpenScratch(call) => machine.open_scratch(call.offset, call.length),
        Call::CloseScratch(call) => machine.close_scratch(call.offset),
        Call::FillSlot(call) => fill_slot(machine, &call, fds),
        Call::ClearSlot(call) => machine.clear_slot(call.slot),
        Call::ServeVolumes(call) => {
            machine.serve_volumes(fds.socket(call.server, "connection to hull-virtiofsd", false)?)
        }
        Call::SetLog(call) => {
            check_container(&call.container_id)?;
            machine.set_log(&call.container_id, fds.file(call.file, "log", Access::Append)?)
        }
        Call::RemoveLog(call) => machine.remove_log(&call.container_id),
        Call::ResizeMemory(call) => machine.resize_memory(call.memory),
        Call::Pause(_) => machine.pause(),
        Call::Resume(_) => machine.resume(),
        Call::Save(call) => machine.save(fds.file(call.file, "file for the state", Access::Write)?),
        Call::Boot(_) | Call::BootVolumes(_) => {
            Err(CallError::precondition("this machine was born long ago: it boots once"))
        }
        // The caller ends the machine once it has answered.
        Call::Stop(_) => Ok(()),
        // hull-virtiofsd's are no business of a VMM.
        Call::ServeQueues(_) | Call::HaltQueues(_) => Err(CallError::unknown()),
    };
    result.map(|()| Outcome::Done(messages::Empty {}))
}

fn add_extent(
    machine: &mut impl Machine,
    call: &messages::AddExtent,
    fds: &mut Descriptors,
) -> Result<Outcome, CallError> {
    if call.key.is_empty() || call.key.len() > MAX_KEY {
        return Err(CallError::invalid(format!("an extent's key has 1 to {MAX_KEY} bytes")));
    }
    if call.length == 0 {
        return Err(CallError::invalid(format!("the extent {} would be empty", call.key)));
    }
    let file = fds.file(call.file, "file of an extent", Access::ReadOnly)?;
    machine.add_extent(&call.key, call.length, file).map(Outcome::Extent)
}

fn fill_slot(
    machine: &mut impl Machine,
    call: &messages::FillSlot,
    fds: &mut Descriptors,
) -> Result<(), CallError> {
    // Read-only is enforced here, by a descriptor that cannot write, and never by the guest.
    let access = if call.readonly { Access::ReadOnly } else { Access::ReadWrite };
    let file = fds.disk(call.file, "disk for a slot", access)?;
    machine.fill_slot(call.slot, call.readonly, file)
}

fn check_container(id: &str) -> Result<(), CallError> {
    if hull_agent::protocol::is_valid_id(id) {
        return Ok(());
    }
    Err(CallError::invalid("a container's id has 1 to 128 letters, digits, -_."))
}
