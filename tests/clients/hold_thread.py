"""hold_thread.py TID: stops one thread of another process, as a debugger does it, and prints "held" then.

It ends when the thread has; if it is ended before, the thread goes on.
"""
import ctypes
import os
import sys

PTRACE_SEIZE, PTRACE_INTERRUPT = 0x4206, 0x4207
WALL = 0x40000000  # of threads, too

libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
libc.ptrace.restype = ctypes.c_long


def trace(request, thread):
    if libc.ptrace(request, thread, None, None) == -1:
        errno = ctypes.get_errno()
        raise OSError(errno, f"cannot trace thread {thread}: {os.strerror(errno)}")


def main():
    thread = int(sys.argv[1])
    trace(PTRACE_SEIZE, thread)
    trace(PTRACE_INTERRUPT, thread)
    _, status = os.waitpid(thread, WALL)
    if not os.WIFSTOPPED(status):
        raise SystemExit(f"thread {thread} did not stop, but has status {status:#x}")
    print("held", flush=True)
    while os.WIFSTOPPED(status):
        _, status = os.waitpid(thread, WALL)


main()
