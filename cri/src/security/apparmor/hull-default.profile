# The AppArmor profile of containers that ask for the runtime's default. hulld loads it when it starts.
#
# It allows what a container does with its own files, network and capabilities, and denies what changes the machine: the
# kernel's interfaces in /proc and /sys, mounts, and processes outside of containers. The container's own namespaces,
# capabilities and read-only paths deny most of it as well; this holds where one of those was given away.
profile hull-default flags=(attach_disconnected,mediate_deleted) {
  file,
  network,
  unix,
  capability,
  umount,

  # Processes: other containers under this profile, and signals from outside (the agent's, kill(1) on the node).
  signal (send,receive) peer=hull-default,
  signal (receive) peer=unconfined,
  ptrace (trace,read,tracedby,readby) peer=hull-default,
  ptrace (tracedby,readby) peer=unconfined,

  deny mount,

  # /proc itself, and what in it is not a process.
  deny /proc/* w,
  deny /proc/{acpi,asound,bus,driver,dynamic_debug,fs,ide,irq,scsi,tty}/** wl,
  deny /proc/{kcore,kmem,mem,sysrq-trigger} rwklx,
  deny /proc/{kallsyms,kpagecgroup,kpagecount,kpageflags,timer_list} r,

  # Sysctls: those of the network, of message queues, and of System V IPC belong to namespaces.
  deny /proc/sys/{abi,crypto,debug,dev,sunrpc,user,vm}/** wl,
  deny /proc/sys/fs/[^m]** wl,
  deny /proc/sys/fs/m[^q]** wl,
  deny /proc/sys/kernel/[^ms]** wl,
  deny /proc/sys/kernel/m[^s]** wl,
  deny /proc/sys/kernel/ms[^g]** wl,
  deny /proc/sys/kernel/s[^eh]** wl,
  deny /proc/sys/kernel/se[^m]** wl,
  deny /proc/sys/kernel/sh[^m]** wl,

  # Of /sys only the cgroups that are mounted there are a container's.
  deny /sys/{block,bus,class,dev,devices,firmware,hypervisor,kernel,module,power}/** wklx,
  deny /sys/fs/[^c]** wklx,
  deny /sys/fs/c[^g]** wklx,
  deny /sys/{firmware,devices/virtual/powercap,kernel/debug,kernel/security,kernel/tracing}/** r,
}
