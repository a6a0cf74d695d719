//! The calls of a guest.

use super::super::Server;
use super::super::calls::done;
use super::super::exec::own_end;
use super::super::failure::CallError;
use crate::container::Slots;
use crate::guest::slots::{Holdings, Resolver, number_devices};
use crate::guest::{GuestError, machine, measure};
use crate::protocol::messages::{
    Dial, Measure, Measured, Request, VolumeContent, request::Call, response::Outcome,
};

impl Server {
    /// A request to an agent in a guest: finds out what is behind its slots, then answers it as on a host.
    pub(in super::super) fn call_in_guest(&mut self, connection: u32, id: u64, mut request: Request) {
        if self.park(connection, id, &mut request) {
            return;
        }
        let Request { slots, mut call } = request;
        let mut holdings = Holdings::default();
        let resolved = self.prepare(&slots, call.as_mut(), &mut holdings);
        let container = match &call {
            Some(Call::StartContainer(spec)) if resolved.is_ok() => Some(spec.id.clone()),
            _ => None,
        };
        match resolved {
            Ok(resolved) => self.answer_call(connection, id, call, &Slots::resolved(&slots, &resolved)),
            Err(error) => self.connections.respond(connection, id, error.into_outcome(), &self.poll),
        }
        // By now the mounts that the slots led to are the container's alone, or nobody's.
        let started = container.and_then(|id| self.containers.iter_mut().find(|one| one.id == id));
        match (started, &mut self.guest) {
            (Some(container), _) => container.holdings = holdings,
            (None, Some(machine)) => holdings.give_back(&mut machine.ranges),
            (None, None) => {}
        }
    }

    /// What is behind each slot, and in which devices a container's block slots are.
    fn prepare(
        &mut self,
        slots: &[crate::protocol::messages::Slot],
        call: Option<&mut Call>,
        holdings: &mut Holdings,
    ) -> Result<Vec<Option<std::os::fd::OwnedFd>>, CallError> {
        let mut container = None;
        if let Some(Call::StartContainer(spec)) = call {
            self.check_new(&spec.id, &spec.cgroup_leaf)?;
            number_devices(&mut spec.devices).map_err(|error| {
                CallError::from(error).during(format!("cannot start container {}", spec.id))
            })?;
            container = Some(spec.id.clone());
        }
        let Some(machine) = &mut self.guest else { return Ok(Vec::new()) };
        let mut resolver = Resolver {
            ranges: &mut machine.ranges,
            volumes: &machine.volumes,
            streams: &mut machine.streams,
        };
        resolver.resolve(slots, container.as_deref(), holdings).map_err(|error| match container {
            Some(id) => CallError::from(error).during(format!("cannot start container {id}")),
            None => error.into(),
        })
    }

    /// A call that only an agent in a guest knows.
    pub(in super::super) fn guest_call(
        &mut self,
        call: &Call,
        slots: &Slots<'_>,
    ) -> Result<Outcome, CallError> {
        let Some(machine) = &mut self.guest else { return Err(CallError::only_in_a_guest("the call")) };
        match call {
            Call::AddVolume(call) => Ok(done(machine.volumes.add(call, &mut machine.ranges)?)),
            Call::RemoveVolume(call) => {
                machine.volumes.remove(&call.id, &mut machine.ranges);
                Ok(done(()))
            }
            Call::WriteVolume(call) => Ok(done(machine.volumes.write(call)?)),
            Call::ReadVolume(call) => {
                Ok(Outcome::VolumeContent(VolumeContent { content: machine.volumes.read(call)? }))
            }
            Call::Measure(call) => Ok(Outcome::Measured(self.measure(call))),
            Call::Dial(call) => self.dial(call, slots).map(done),
            Call::Resize(call) => Ok(done(machine::bring_online(call.cpus)?)),
            Call::Ping(call) => {
                machine.clock.told(call.wall_clock_ns);
                Ok(done(()))
            }
            _ => Err(CallError::unknown_call()),
        }
    }

    fn measure(&self, call: &Measure) -> Measured {
        let Some(machine) = &self.guest else { return Measured::default() };
        let mut measured = measure::machine(&self.pod.cgroup, &machine.ranges, &machine.volumes);
        let asked = self.containers.iter().filter(|one| call.container_ids.contains(&one.id));
        measured.containers = asked
            .map(|container| {
                let first = container.running().map(|_| container.started.pid);
                let scratch = container.holdings.scratch();
                measure::container(&container.id, &container.leaf, first, scratch, &machine.ranges)
            })
            .collect();
        measured
    }

    fn dial(&mut self, call: &Dial, slots: &Slots<'_>) -> Result<(), CallError> {
        let stream = own_end(slots, call.slot, "stream")?;
        let port = u16::try_from(call.port).ok().filter(|port| *port != 0);
        let port = port.ok_or_else(|| CallError::invalid(format!("{} is not a port", call.port)))?;
        let doing = || format!("cannot connect to port {port} of the pod");
        let connection = super::relays::connect(port).map_err(|error| CallError::system(doing(), error))?;
        self.join(connection, stream).map_err(|error| CallError::system(doing(), error))
    }
}

impl From<GuestError> for CallError {
    fn from(error: GuestError) -> Self {
        match error {
            GuestError::Invalid(message) => Self::invalid(message),
            GuestError::Precondition(message) => Self::precondition(message),
            GuestError::NotFound(message) => Self::not_found(message),
            // What is wrong with a path or a file is the request's fault, not the machine's.
            GuestError::System { doing, error } if error.kind() == std::io::ErrorKind::InvalidInput => {
                Self::invalid(format!("cannot {doing}: {error}"))
            }
            GuestError::System { doing, error } => Self::system(format_args!("cannot {doing}"), error),
        }
    }
}
