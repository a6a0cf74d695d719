use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::fd::OwnedFd;

use super::PodMachine;
use crate::control::{CallError, Machine};
use crate::devices::virtio::StateError;
use crate::devices::virtio::block::{BlockStats, ImagesError, RangeError, SlotError, SlotHandle};
use crate::devices::virtio::fs::ServeError;
use crate::protocol::messages;

impl Machine for PodMachine {
    fn status(&mut self) -> messages::Status {
        let (agent_started_micros, agent_listening_micros) = self.progress.agent();
        let boot = self.core.memory().boot;
        let memory = self.handles.memory.as_ref();
        messages::Status {
            machine: Some(self.description.clone()),
            uptime_micros: self.progress.uptime(),
            agent_started_micros,
            agent_listening_micros,
            paused: self.core.is_paused(),
            extents: self.extents(),
            slots: self.slots(),
            activated: self.core.active_devices(),
            volumes_served: self.handles.volumes.is_served(),
            logs: self.handles.logs.handle().list(),
            memory_requested: boot + memory.map_or(0, |memory| memory.requested()),
            memory_plugged: boot + memory.map_or(0, |memory| memory.plugged()),
        }
    }

    fn add_extent(&mut self, key: &str, length: u64, file: OwnedFd) -> Result<messages::Extent, CallError> {
        let extent = self.handles.images.add(key, File::from(file), length).map_err(images_error)?;
        Ok(messages::Extent { offset: extent.offset, length: extent.length })
    }

    fn remove_extent(&mut self, key: &str) -> Result<(), CallError> {
        self.handles.images.remove(key).map_err(images_error)
    }

    fn open_scratch(&mut self, offset: u64, length: u64) -> Result<(), CallError> {
        self.handles.scratch.open(offset, length).map_err(range_error)
    }

    fn close_scratch(&mut self, offset: u64) -> Result<(), CallError> {
        self.handles.scratch.close(offset).map_err(range_error)
    }

    fn fill_slot(&mut self, slot: u32, readonly: bool, file: OwnedFd) -> Result<(), CallError> {
        self.slot(slot)?.fill(File::from(file), readonly).map(drop).map_err(slot_error)
    }

    fn clear_slot(&mut self, slot: u32) -> Result<(), CallError> {
        self.slot(slot)?.clear().map_err(slot_error)
    }

    fn serve_volumes(&mut self, server: OwnedFd) -> Result<(), CallError> {
        self.handles.volumes.serve(server).map_err(|error| match error {
            ServeError::Occupied => CallError::precondition(error.to_string()),
            _ => CallError::internal(error.to_string()),
        })
    }

    fn set_log(&mut self, container_id: &str, file: OwnedFd) -> Result<(), CallError> {
        self.handles.logs.handle().set(container_id, Some(file));
        Ok(())
    }

    fn remove_log(&mut self, container_id: &str) -> Result<(), CallError> {
        self.handles.logs.handle().remove(container_id);
        Ok(())
    }

    fn resize_memory(&mut self, bytes: u64) -> Result<(), CallError> {
        let boot = self.core.memory().boot;
        let beyond = bytes.checked_sub(boot).ok_or_else(|| {
            CallError::invalid(format!("the machine was born with {boot} bytes and cannot have {bytes}"))
        })?;
        let beyond = beyond - beyond % crate::memory::ALIGNMENT;
        match &self.handles.memory {
            Some(memory) => memory.resize(beyond).map_err(|e| CallError::invalid(e.to_string())),
            None if beyond == 0 => Ok(()),
            None => Err(CallError::invalid(format!("the machine cannot grow beyond its {boot} bytes"))),
        }
    }

    fn pause(&mut self) -> Result<(), CallError> {
        self.core.pause().map_err(state_error)
    }

    fn resume(&mut self) -> Result<(), CallError> {
        if self.core.is_paused() { self.core.resume().map_err(state_error) } else { Ok(()) }
    }

    fn save(&mut self, file: OwnedFd) -> Result<(), CallError> {
        let state = self.core.save().map_err(state_error)?;
        let mut file = BufWriter::new(File::from(file));
        serde_json::to_writer(&mut file, &state)
            .map_err(std::io::Error::from)
            .and_then(|()| file.flush())
            .map_err(|e| CallError::system("cannot write the machine's state", &e))
    }

    fn metrics(&mut self) -> messages::Metrics {
        let mut values = BTreeMap::new();
        let mut put = |name: String, value: u64| {
            values.insert(name, value);
        };
        put("uptime_micros".into(), self.progress.uptime());
        block_metrics("images", &self.handles.images.stats(), &mut put);
        block_metrics("scratch", &self.handles.scratch.stats(), &mut put);
        if let Ok(allocated) = self.handles.scratch.allocated() {
            put("scratch_allocated_bytes".into(), allocated);
        }
        for (number, slot) in self.handles.slots.iter().enumerate() {
            if slot.volume().is_some() {
                block_metrics(&format!("slot{number}"), &slot.stats(), &mut put);
            }
        }
        self.small_metrics(&mut put);
        messages::Metrics { values }
    }
}

impl PodMachine {
    fn extents(&self) -> Vec<messages::MappedExtent> {
        let mapped =
            |(key, extent): (String, crate::devices::virtio::block::Extent)| messages::MappedExtent {
                key,
                extent: Some(messages::Extent { offset: extent.offset, length: extent.length }),
            };
        self.handles.images.list().into_iter().map(mapped).collect()
    }

    fn slots(&self) -> Vec<messages::FilledSlot> {
        let volumes = self.handles.slots.iter().zip(0..);
        let filled = volumes.filter_map(|(slot, number)| slot.volume().map(|volume| (number, volume)));
        filled.map(|(slot, (capacity, readonly))| messages::FilledSlot { slot, readonly, capacity }).collect()
    }

    fn slot(&self, number: u32) -> Result<&SlotHandle, CallError> {
        let slot = usize::try_from(number).ok().and_then(|number| self.handles.slots.get(number));
        slot.ok_or_else(|| {
            let count = self.handles.slots.len();
            CallError::not_found(format!("there is no block slot {number}; the machine has {count}"))
        })
    }

    fn small_metrics(&self, put: &mut impl FnMut(String, u64)) {
        let net = self.handles.net.metrics();
        let vsock = self.handles.vsock.metrics();
        let (asked, given) = self.handles.balloon.size();
        let (inflated, reported) = self.handles.balloon.released();
        for (name, value) in [
            ("net_to_guest_frames", net.frames_to_guest),
            ("net_to_guest_bytes", net.bytes_to_guest),
            ("net_from_guest_frames", net.frames_from_guest),
            ("net_from_guest_bytes", net.bytes_from_guest),
            ("net_to_guest_dropped", net.dropped_to_guest),
            ("net_from_guest_dropped", net.dropped_from_guest),
            ("net_spoofed", net.spoofed),
            ("vsock_streams", vsock.streams),
            ("vsock_opened", vsock.opened),
            ("vsock_refused", vsock.refused),
            ("vsock_violations", vsock.violations),
            ("vsock_to_guest_bytes", vsock.to_guest),
            ("vsock_from_guest_bytes", vsock.from_guest),
            ("vsock_waiting_bytes", vsock.waiting),
            ("balloon_asked_bytes", asked),
            ("balloon_given_bytes", given),
            ("balloon_released_bytes", inflated),
            ("balloon_reported_bytes", reported),
            ("logs_dropped_bytes", self.handles.logs.handle().dropped()),
        ] {
            put(name.to_owned(), value);
        }
    }
}

fn block_metrics(device: &str, stats: &BlockStats, put: &mut impl FnMut(String, u64)) {
    for (name, value) in [
        ("reads", stats.reads),
        ("read_bytes", stats.read_bytes),
        ("writes", stats.writes),
        ("written_bytes", stats.written_bytes),
        ("flushes", stats.flushes),
        ("discards", stats.discards),
        ("waited", stats.waited),
        ("errors", stats.errors),
        ("out_of_space", stats.out_of_space),
        ("malformed", stats.malformed),
    ] {
        put(format!("{device}_{name}"), value);
    }
}

fn state_error(error: StateError) -> CallError {
    match error {
        StateError::NotPaused { .. } => CallError::precondition(error.to_string()),
        _ => CallError::internal(error.to_string()),
    }
}

fn images_error(error: ImagesError) -> CallError {
    let message = error.to_string();
    match error {
        ImagesError::Key(_) | ImagesError::File { .. } => CallError::invalid(message),
        ImagesError::Differs { .. } => CallError::precondition(message),
        ImagesError::Full { .. } | ImagesError::StillRead { .. } => CallError::internal(message),
    }
}

fn range_error(error: RangeError) -> CallError {
    let message = error.to_string();
    match error {
        RangeError::Place { .. } => CallError::invalid(message),
        RangeError::Overlap { .. } | RangeError::TooMany => CallError::precondition(message),
        RangeError::StillWritten { .. } => CallError::internal(message),
    }
}

fn slot_error(error: SlotError) -> CallError {
    let message = error.to_string();
    match error {
        SlotError::File { .. } => CallError::invalid(message),
        SlotError::Occupied { .. } => CallError::precondition(message),
        SlotError::StillUsed { .. } => CallError::internal(message),
    }
}
