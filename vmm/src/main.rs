//! hull-vmm: one pod's virtual machine. hulld starts it, with a socket as its standard input; it is nothing to start by
//! hand.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use hull_vmm::control::{self, End, Events};
use hull_vmm::jail;
use hull_vmm::machine::{PodMachine, Progress};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Standard error is the pod's vmm.log.
            eprintln!("hull-vmm: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn std::error::Error>> {
    let born = jail::enter()?;
    let (events, receiver) = Events::channel()?;
    let progress = Progress::new(born.started, born.read);
    let listener = born.files.control_listener.try_clone()?;
    let mut machine = match PodMachine::new(born.machine, born.files, progress, &events) {
        Ok(machine) => machine,
        Err(error) => {
            born.birth.failed(&format!("cannot make the machine: {error}"));
            return Err(error.into());
        }
    };
    let end = control::serve(&mut machine, born.birth, listener, receiver, PodMachine::begin)?;
    match end {
        End::Stopped => machine.stop(),
        End::Ended(reason) => {
            machine.end();
            eprintln!("hull-vmm: {reason}");
        }
    }
    Ok(())
}
