#!/bin/busybox sh
# PID 1 of the lab: loads modules, makes this machine's root file system its own (changes stay in memory), runs the job, powers off.
# The job's folder comes by 9p: `job.sh` in it is run, `status` receives the exit code. Its streams are virtio ports.
/bin/busybox --install -s /bin
export PATH=/bin
fail() { echo "lab: $*" > /dev/console; poweroff -f; }

mount -t devtmpfs d /dev
mount -t proc p /proc
mount -t sysfs s /sys
for module in $(cat /modules/order); do
    insmod "/modules/$module.ko" || fail "cannot load $module"
done

share=trans=virtio,version=9p2000.L,msize=512000
mount -t tmpfs -o size=80%,mode=755,nr_inodes=0 t /changes || fail "cannot make room for changes"
mkdir /changes/upper /changes/work
mount -t 9p -o "$share,cache=loose,ro" root /lower || fail "cannot mount the root file system"
mount -t overlay -o lowerdir=/lower,upperdir=/changes/upper,workdir=/changes/work root /root || fail "cannot lay changes over the root file system"

mount -t devtmpfs d /root/dev
mount -t proc p /root/proc
mount -t sysfs s /root/sys
mount -t tmpfs -o mode=755 t /root/run
mkdir -p /root/dev/pts /root/dev/shm /root/dev/mqueue /root/run/coracle-lab
mount -t devpts -o gid=5,mode=620,ptmxmode=666 p /root/dev/pts
mount -t tmpfs -o mode=1777 t /root/dev/shm
mount -t mqueue m /root/dev/mqueue
mount -t cgroup2 c /root/sys/fs/cgroup
mount -t debugfs d /root/sys/kernel/debug
mount -t 9p -o "$share,cache=none" job /root/run/coracle-lab || fail "cannot mount the job"
ln -sf /proc/self/fd /root/dev/fd
ln -sf /proc/self/fd/0 /root/dev/stdin
ln -sf /proc/self/fd/1 /root/dev/stdout
ln -sf /proc/self/fd/2 /root/dev/stderr
ip link set lo up

# Ports by name. Output goes through pipes, so that a program can open /dev/stdout again.
for port in /sys/class/virtio-ports/*; do
    case "$(cat "$port/name")" in
        stdin) stdin=/dev/${port##*/} ;;
        stdout) stdout=/dev/${port##*/} ;;
        stderr) stderr=/dev/${port##*/} ;;
    esac
done
[ -n "$stdin" ] && [ -n "$stdout" ] && [ -n "$stderr" ] || fail "a stream is missing"
mkfifo /out /err
cat /out > "$stdout" & out=$!
cat /err > "$stderr" & err=$!

setsid chroot /root /bin/sh /run/coracle-lab/job.sh < "$stdin" > /out 2> /err
status=$?

# What the job left behind holds the pipes open: end it, then wait until everything that was written is out.
for round in 1 2 3; do
    for process in /proc/[0-9]*; do
        process=${process##*/}
        case $process in 1 | "$out" | "$err") ;; *) kill -9 "$process" 2> /dev/null ;; esac
    done
done
wait "$out" "$err"
echo "$status" > /root/run/coracle-lab/status
sync -f /root/run/coracle-lab/status 2> /dev/null
poweroff -f
