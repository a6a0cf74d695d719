//! The few devices on I/O ports: a serial port, and bytes by which the guest says what becomes of it.

use vm_superio::Trigger;
use vmm_sys_util::eventfd::EventFd;

use super::console::ConsoleLog;
use crate::arch::{acpi, layout};

/// What the guest tells by a write to a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PortEvent {
    /// It wants to start over; a machine of ours ends then, as its agent is its life. With the message of its panic, if
    /// the console showed one: a kernel without pvpanic tells of it only so.
    Reset(Option<String>),
    /// It turned itself off.
    PowerOff,
    /// Its kernel panicked; the message, if the console showed one.
    Panicked(String),
    /// The agent's first instruction.
    AgentStarted,
    /// The agent listens.
    AgentListening,
}

/// pvpanic, "Panic event" bits: the guest panicked.
const PANICKED: u8 = 1;
/// Keyboard controller command: pulse the reset line.
const I8042_RESET: u8 = 0xfe;
/// ACPI sleep control (ACPI 6.5, 4.8.3.7): enter the state whose type is in bits 2 to 4.
const SLEEP_ENABLE: u8 = 1 << 5;

struct Line(EventFd);

impl Trigger for Line {
    type E = std::io::Error;

    fn trigger(&self) -> std::io::Result<()> {
        self.0.write(1)
    }
}

/// All ports of a machine.
pub struct Ports {
    serial: vm_superio::Serial<Line, vm_superio::serial::NoEvents, ConsoleLog>,
}

impl Ports {
    /// The serial port raises `interrupt` and writes to `console`.
    #[must_use]
    pub fn new(interrupt: EventFd, console: ConsoleLog) -> Self {
        Self { serial: vm_superio::Serial::new(Line(interrupt), console) }
    }

    /// The guest writes; a string instruction brings several bytes for one port.
    pub fn write(&mut self, port: u16, data: &[u8]) -> Option<PortEvent> {
        let first = *data.first()?;
        match port {
            layout::SERIAL_PORT..=0x3ff => {
                let register = (port - layout::SERIAL_PORT) as u8;
                for byte in data {
                    // A console that cannot be written is not the guest's fault.
                    let _ = self.serial.write(register, *byte);
                }
                None
            }
            layout::I8042_STATUS if first == I8042_RESET => Some(self.reset()),
            layout::PVPANIC_PORT if first & PANICKED != 0 => {
                let console = self.serial.writer_mut();
                console.flush_line();
                Some(PortEvent::Panicked(console.panic().unwrap_or("the kernel did not say why").to_owned()))
            }
            layout::POWER_PORT if first == SLEEP_ENABLE | acpi::SOFT_OFF << 2 => Some(PortEvent::PowerOff),
            RESET_PORT if first == acpi::RESET_VALUE => Some(self.reset()),
            layout::BOOT_EVENT_PORT if first == 1 => Some(PortEvent::AgentStarted),
            layout::BOOT_EVENT_PORT if first == 2 => Some(PortEvent::AgentListening),
            _ => None,
        }
    }

    fn reset(&mut self) -> PortEvent {
        let console = self.serial.writer_mut();
        console.flush_line();
        PortEvent::Reset(console.panic().map(str::to_owned))
    }

    /// The guest reads; a port without a device has all bits set.
    pub fn read(&mut self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        match port {
            layout::SERIAL_PORT..=0x3ff => {
                let register = (port - layout::SERIAL_PORT) as u8;
                for byte in data {
                    *byte = self.serial.read(register);
                }
            }
            // No output buffer is full, no input buffer either: a reset is always taken.
            layout::I8042_STATUS => data.fill(0),
            // What can be told.
            layout::PVPANIC_PORT => data.fill(PANICKED),
            // Sleep status: never woken.
            STATUS_PORT => data.fill(0),
            _ => {}
        }
    }

    /// What the console has not written yet, for the end of the machine.
    pub fn flush(&mut self) {
        self.serial.writer_mut().flush_line();
    }

    /// The state of the serial port that a restored machine needs.
    #[must_use]
    pub fn save(&self) -> SerialState {
        let state = self.serial.state();
        SerialState {
            divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
        }
    }

    /// The ports of a restored machine.
    ///
    /// # Errors
    /// The state is none.
    pub fn restore(interrupt: EventFd, console: ConsoleLog, state: &SerialState) -> std::io::Result<Self> {
        let state = vm_superio::SerialState {
            baud_divisor_low: state.divisor[0],
            baud_divisor_high: state.divisor[1],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: Vec::new(),
        };
        let serial =
            vm_superio::Serial::from_state(&state, Line(interrupt), vm_superio::serial::NoEvents, console)
                .map_err(|e| std::io::Error::new(std::io::ErrorKind::InvalidData, format!("{e:?}")))?;
        Ok(Self { serial })
    }
}

const STATUS_PORT: u16 = layout::POWER_PORT + 1;
const RESET_PORT: u16 = layout::POWER_PORT + 2;

/// Registers of the serial port.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct SerialState {
    divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::fd::OwnedFd;

    fn ports() -> (Ports, std::fs::File) {
        let path = tempfile::NamedTempFile::new().unwrap();
        let written = path.reopen().unwrap();
        let console = ConsoleLog::new(OwnedFd::from(path.into_file()));
        (Ports::new(EventFd::new(libc::EFD_NONBLOCK).unwrap(), console), written)
    }

    #[test]
    fn what_the_guest_prints_is_in_the_log_and_a_panic_is_told_with_its_reason() {
        let (mut ports, mut log) = ports();

        ports.write(layout::SERIAL_PORT, b"[    1.0] Kernel panic - not syncing: VFS\n");
        let event = ports.write(layout::PVPANIC_PORT, &[1]);

        assert_eq!(event, Some(PortEvent::Panicked("Kernel panic - not syncing: VFS".into())));
        let mut text = String::new();
        log.read_to_string(&mut text).unwrap();
        assert_eq!(text, "[    1.0] Kernel panic - not syncing: VFS\n");
    }

    #[test]
    fn every_way_to_end_is_understood() {
        let (mut ports, _) = ports();

        assert_eq!(ports.write(0x64, &[0xfe]), Some(PortEvent::Reset(None)));
        assert_eq!(ports.write(layout::POWER_PORT + 2, &[1]), Some(PortEvent::Reset(None)));
        assert_eq!(ports.write(layout::POWER_PORT, &[0x34]), Some(PortEvent::PowerOff));
        assert_eq!(ports.write(layout::BOOT_EVENT_PORT, &[1]), Some(PortEvent::AgentStarted));
        assert_eq!(ports.write(layout::BOOT_EVENT_PORT, &[2]), Some(PortEvent::AgentListening));
    }

    #[test]
    fn no_port_and_no_length_does_harm() {
        let (mut ports, _) = ports();
        for port in 0..=u16::MAX {
            for length in [0, 1, 2, 4, 64] {
                ports.read(port, &mut vec![0; length]);
                ports.write(port, &vec![0x5a; length]);
            }
        }
    }

    #[test]
    fn the_serial_port_survives_a_save() {
        let (mut ports, _) = ports();
        ports.write(layout::SERIAL_PORT + 7, &[0x42]);
        let state = ports.save();

        let console = ConsoleLog::new(OwnedFd::from(tempfile::tempfile().unwrap()));
        let mut restored =
            Ports::restore(EventFd::new(libc::EFD_NONBLOCK).unwrap(), console, &state).unwrap();

        let mut byte = [0];
        restored.read(layout::SERIAL_PORT + 7, &mut byte);
        assert_eq!(byte, [0x42]);
        assert_eq!(restored.save(), state);
    }
}
