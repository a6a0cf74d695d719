//! Set the wall clock by steps and by slewing.

use std::io;
use std::time::Duration;

/// Most that one call of [`slew`] corrects (the kernel's bound of adjtime(3) is far above).
pub const MAX_SLEW: Duration = Duration::from_millis(500);

/// Lets the wall clock run 0.05 % faster or slower until it has made up `offset` nanoseconds; what an earlier call
/// began is forgotten. Offsets beyond [`MAX_SLEW`] are cut to it. Needs CAP_SYS_TIME.
pub fn slew(offset: i64) -> io::Result<()> {
    let most = MAX_SLEW.as_micros() as i64;
    // SAFETY: timex is plain numbers, for which zero is valid.
    let mut timex: libc::timex = unsafe { std::mem::zeroed() };
    timex.modes = libc::ADJ_OFFSET_SINGLESHOT;
    timex.offset = (offset / 1000).clamp(-most, most);
    // SAFETY: `timex` lives across the call, which reads and writes only it.
    if unsafe { libc::adjtimex(&raw mut timex) } < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Steps the wall clock by `offset` nanoseconds, as one change that no other reader sees half of. Needs CAP_SYS_TIME.
pub fn step(offset: i64) -> io::Result<()> {
    // SAFETY: timex is plain numbers, for which zero is valid.
    let mut timex: libc::timex = unsafe { std::mem::zeroed() };
    timex.modes = libc::ADJ_SETOFFSET | libc::ADJ_NANO;
    timex.time.tv_sec = offset.div_euclid(1_000_000_000);
    // With ADJ_NANO these are nanoseconds, 0 to 999,999,999.
    timex.time.tv_usec = offset.rem_euclid(1_000_000_000);
    // SAFETY: `timex` lives across the call, which reads and writes only it.
    if unsafe { libc::adjtimex(&raw mut timex) } < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
