//! One byte to an I/O port: how a guest's first process speaks to its VMM before it has any device.

use std::io;

/// Writes `value` to the I/O port `port`. Needs CAP_SYS_RAWIO and a kernel with ioperm(2).
pub fn write(port: u16, value: u8) -> io::Result<()> {
    // SAFETY: ioperm only lets this thread use the one port.
    if unsafe { libc::ioperm(port.into(), 1, 1) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: an `out` touches no memory and no flags; the port has just been allowed. What a device does with it is
    // the caller's to know.
    unsafe {
        std::arch::asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags))
    };
    Ok(())
}
