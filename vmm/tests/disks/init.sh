#!/bin/sh
# The first process of the guest of tests/disks: does what the test expects and says so. Words of the kernel's command line
# with an equals sign come as variables: layer_at, layer_sectors, range_at, range_sectors.
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /layer /range
say() { echo "test: $*"; }
# try NAME COMMAND…: says whether it worked.
try() {
  name=$1; shift
  if "$@" >/tmp.out 2>&1; then say "$name worked"; else say "$name failed"; cat /tmp.out; fi
}
size() { cat "/sys/class/block/$1/size"; }
for block in /sys/block/vd*; do
  serial=$(cat "$block/serial")
  eval "$serial=${block##*/}"
  say "$serial size $(size "${block##*/}") ro $(cat "$block/ro") block $(cat "$block/queue/logical_block_size")"
done

say "first block $(dd if=/dev/$images bs=4096 count=1 2>/dev/null | md5sum)"
try "reading where nothing is" dd if=/dev/$images of=/dev/null bs=4096 skip=1000000000 count=1
try "writing to images" dd if=/dev/zero of=/dev/$images bs=4096 count=1 conv=fsync
# Without udev nobody makes names in /dev/mapper.
dmsetup create layer --noudevsync --readonly --table "0 $layer_sectors linear /dev/$images $layer_at"
try "mounting the layer" mount -t erofs -o ro /dev/dm-0 /layer
say "layer content $(md5sum < /layer/directory/content)"

dmsetup create range --noudevsync --table "0 $range_sectors linear /dev/$scratch $range_at"
try "mounting the range" mount -t ext4 /dev/dm-1 /range
dd if=/dev/zero bs=1M count=64 2>/dev/null | tr '\0' 'x' > /range/big
sync
say "written $(md5sum < /range/big)"
while [ "$(size $slot0)" = 0 ]; do usleep 20000; done
say "slot0 filled $(size $slot0)"
rm /range/big
sync
try "trimming" fstrim /range
say "trimmed"
while [ "$(size $slot1)" = 0 ]; do usleep 20000; done

say "slot1 content $(md5sum < /dev/$slot1)"
try "writing to slot1" dd if=/dev/zero of=/dev/$slot1 bs=4096 count=1 conv=fsync
try "writing to slot0" sh -c "echo 'from the guest' | dd of=/dev/$slot0 bs=4096 conv=fsync,sync"
say "slots done"
while [ "$(size $slot0)" != 0 ]; do usleep 20000; done
say "a cleared slot has $(dd if=/dev/$slot0 bs=4096 count=1 2>/dev/null | wc -c) bytes"
try "reading random numbers" dd if=/dev/hwrng of=/dev/null bs=64 count=4

# Straight from the device, so only what the host has cached counts. In hundredths of a second.
now() { sed 's/ .*//; s/\.//' /proc/uptime; }
for round in 1 2; do
  start=$(now)
  dd if=/dev/$images of=/dev/null bs=1M skip=$((layer_at / 2048)) count=$((layer_sectors / 2048)) iflag=direct 2>/dev/null
  say "read $round took $(($(now) - start))"
done
say "ready for memory"
while :; do
  say "memory $(grep MemTotal /proc/meminfo)"
  sleep 1
done
