#    Licensed under the Apache License, Version 2.0 (the "License"); you may
#    not use this file except in compliance with the License. You may obtain
#    a copy of the License at
#
#         http://www.apache.org/licenses/LICENSE-2.0
#
#    Unless required by applicable law or agreed to in writing, software
#    distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
#    WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
#    License for the specific language governing permissions and limitations
#    under the License.

"""A guest that counts its boots on its own disk.

The image is Debian's kernel and busybox in one ext4 partition, started by
GRUB, from the boot sector or from a partition for UEFI. At each boot the guest
adds one to a counter on its root disk and says on its serial console::

    BOOT-COUNTER 2
    DISK vda 131072
    DISK vdb 2097152
    DISK-COUNTER vdb 2

with the size of each virtio disk in sectors of 512 bytes, and a counter for
each further disk that holds a file system. A server that prints the next
numbers after a migration has brought its disks along. It powers off when
ACPI tells it to.

With UEFI the guest also adds a variable at each boot, and says how many it
has::

    EFI-COUNTER 2

An image with beats also writes to every disk once a second, and says at its
next boot whether all of it is there::

    BEAT 7
    DATA vdb ok
    BEATS vdb 7 7
    SWAP vdc

Nothing is mounted and nothing installed: the packages are only unpacked.
"""

import argparse
import gzip
import os
import pathlib
import shutil
import struct
import subprocess
import sys
import tempfile
from typing import Sequence

SIZE = 64 * 1024 ** 2
SECTOR = 512
BLOCK = 4096
# GRUB's core image goes between the MBR and the first partition.
PARTITION_START = 2048 * SECTOR
# The EFI system partition is the end of the image.
ESP_SIZE = 2048 * SECTOR
LABEL = 'guest-root'

PACKAGES = ('busybox-static', 'grub-common', 'grub-efi-amd64-bin',
            'grub-pc-bin', 'mtools')
KERNEL = 'linux-image-cloud-amd64'

# ext4, the serial port and evdev's core are built into the kernel.
MODULES = ('virtio_ring', 'virtio', 'virtio_pci_modern_dev',
           'virtio_pci_legacy_dev', 'virtio_pci', 'virtio_blk', 'evdev',
           'button')

GRUB_CFG = """\
{find_root}
linux /boot/vmlinuz {parameters}
initrd /boot/initrd
boot
"""

# What costs time where the processor is emulated is left out.
KERNEL_PARAMETERS = (
    'console=ttyS0,115200 quiet loglevel=1 panic=5 mitigations=off '
    'cryptomgr.notests tsc=reliable no_timer_check nokaslr '
    'audit=0 selinux=0 apparmor=0 8250.nr_uarts=1 i8042.noaux')

INITRAMFS_INIT = """\
#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
for module in {modules}; do
    insmod /modules/$module.ko
done
root=
for try in 0 1 2 3 4 5 6 7 8 9; do
    root=$(findfs LABEL={label}) && break
    sleep 0.2
done
mount -t ext4 "$root" /root || exec sh
mount -o move /dev /root/dev
mount -o move /proc /root/proc
mount -o move /sys /root/sys
exec switch_root /root /sbin/init
"""

INIT = """\
#!/bin/sh
count() {
    n=$(($(cat "$1" 2>/dev/null || echo 0) + 1))
    echo $n > "$1"
    sync
}

power_off() {
    sync
    umount /mnt/* 2>/dev/null
    mount -o remount,ro /
    poweroff -f
}

# Of a disk: whether its data is what was written, and its beats: how many
# there are, and the number of the last.
check() {
    if [ -e $1/beats ]; then
        (cd $1 && md5sum -c data.md5 >/dev/null 2>&1) && data=ok || data=bad
        echo "DATA $2 $data"
        echo "BEATS $2 $(wc -l < $1/beats) $(tail -n 1 $1/beats)"
    else
        dd if=/dev/urandom of=$1/data bs=64k count=64 2>/dev/null
        (cd $1 && md5sum data > data.md5)
        : > $1/beats
    fi
}

beat() {
    n=$(tail -n 1 /beats)
    while :; do
        n=$((n + 1))
        for mount in $mounts; do
            echo $n >> $mount/beats
        done
        sync
        echo "BEAT $n"
        sleep 1
    done
}

# A variable for each boot: efivarfs makes each immutable.
count_in_firmware() {
    variables=/sys/firmware/efi/efivars
    vendor=5b1cf3a2-0d58-4e5c-9a60-7f2a6c1de944
    insmod /boot/efivarfs.ko
    mount -t efivarfs efivarfs $variables
    n=$(($(ls $variables | grep -c '^GuestBoot') + 1))
    # The attributes: kept when off, and seen by firmware and system.
    printf '\\7\\0\\0\\0%s' $n > $variables/GuestBoot$n-$vendor
    umount $variables
    echo "EFI-COUNTER $n"
}

mounts=/
[ -e /sys/firmware/efi ] && count_in_firmware
count /boot-counter
echo "BOOT-COUNTER $n"
for disk in /sys/block/vd*; do
    dev=${disk##*/}
    echo "DISK $dev $(cat $disk/size)"
    mkdir -p /mnt/$dev
    [ -e $disk/${dev}1 ] && continue
    if mount -t ext4 /dev/$dev /mnt/$dev 2>/dev/null; then
        count /mnt/$dev/boot-counter
        echo "DISK-COUNTER $dev $n"
        mounts="$mounts /mnt/$dev"
        [ -e /beating ] && check /mnt/$dev $dev
    elif [ -e /beating ] && swapon /dev/$dev 2>/dev/null; then
        echo "SWAP $dev"
    fi
done
[ -e /beating ] && check "" vda

for name in /sys/class/input/event*/device/name; do
    if [ "$(cat $name)" = "Power Button" ]; then
        event=${name%/device/name}
        # Opened here: an event from before the file is open is lost.
        exec 3</dev/input/${event##*/}
        (dd bs=24 count=1 <&3 >/dev/null 2>&1 && power_off) &
    fi
done
echo "GUEST-READY"
[ -e /beating ] && beat
while :; do
    sleep 3600
done
"""


class GuestError(Exception):
    """The image could not be built."""


def execute(*argv: str | os.PathLike, cwd: os.PathLike | None = None,
            data: bytes | None = None) -> bytes:
    """Run a command and return its output; its complaint is in the error."""
    done = subprocess.run([os.fspath(arg) for arg in argv], cwd=cwd,
                          input=data, capture_output=True)
    if done.returncode:
        raise GuestError('%s: exit status %d: %s' % (
            ' '.join(map(str, argv)), done.returncode,
            done.stderr.decode(errors='replace').strip()))
    return done.stdout


def build(path: str | os.PathLike, size: int = SIZE,
          beats: bool = False) -> None:
    """Build the image as a sparse raw file of size bytes.

    :param beats: whether the guest writes to its disks all the time
    """
    path = pathlib.Path(path).absolute()
    with tempfile.TemporaryDirectory(prefix='guest-') as name:
        work = pathlib.Path(name)
        system = unpack(work)
        core = make_grub(
            work, system, 'i386-pc', 'set root=(hd0,msdos1)', 'biosdisk')
        loader = make_grub(
            work, system, 'x86_64-efi', f'search.fs_label {LABEL} root',
            'search_label')
        tree = make_tree(work, system)
        if beats:
            (tree / 'beating').touch()
        partial = path.with_name(path.name + '.partial')
        try:
            write_image(partial, size, system, core, tree)
            write_esp(partial, size, work, system, loader)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def unpack(work: pathlib.Path) -> pathlib.Path:
    """Fetch the Debian packages and unpack them in one directory."""
    kernel = kernel_package()
    # As root: apt's own user cannot enter a temporary directory.
    execute('apt-get', 'download', '-q', '-o', 'APT::Sandbox::User=root',
            kernel, *PACKAGES, cwd=work)
    system = work / 'system'
    for package in work.glob('*.deb'):
        execute('dpkg-deb', '-x', package, system)
    return system


def kernel_package() -> str:
    """The package that the meta package for the newest kernel stands for."""
    said = execute('apt-cache', 'depends', '--important', KERNEL).decode()
    for line in said.splitlines():
        kind, _, package = line.strip().partition(': ')
        if kind == 'Depends' and package.startswith('linux-image-'):
            return package
    raise GuestError('apt knows no %s: run apt-get update' % KERNEL)


def make_grub(work: pathlib.Path, system: pathlib.Path, platform: str,
              find_root: str, module: str) -> bytes:
    """GRUB with its configuration inside: it asks nothing and waits not.

    :param find_root: the command that finds the partition of the guest
    :param module: a module of GRUB that only this platform needs
    """
    config = work / f'{platform}.cfg'
    config.write_text(GRUB_CFG.format(
        find_root=find_root, parameters=KERNEL_PARAMETERS))
    core = work / f'{platform}.img'
    execute(system / 'usr/bin/grub-mkimage', '-O', platform,
            '-d', system / 'usr/lib/grub' / platform, '-p', '/boot',
            '-c', config, '-o', core,
            module, 'part_msdos', 'ext2', 'linux')
    return core.read_bytes()


def make_tree(work: pathlib.Path, system: pathlib.Path) -> pathlib.Path:
    """What the root file system holds."""
    tree = work / 'tree'
    for name in ('bin', 'boot', 'dev', 'mnt', 'proc', 'sbin', 'sys'):
        (tree / name).mkdir(parents=True)
    busybox = system / 'bin/busybox'
    shutil.copy(busybox, tree / 'bin/busybox')
    for applet in execute(busybox, '--list').decode().split():
        if applet != 'busybox':
            (tree / 'bin' / applet).symlink_to('busybox')
    write_script(tree / 'sbin/init', INIT)
    kernel, = system.glob('boot/vmlinuz-*')
    shutil.copy(kernel, tree / 'boot/vmlinuz')
    shutil.copy(find_module(system, 'efivarfs'), tree / 'boot')
    (tree / 'boot/initrd').write_bytes(make_initramfs(work, system))
    return tree


def make_initramfs(work: pathlib.Path, system: pathlib.Path) -> bytes:
    """What finds the root disk: busybox and the modules for it."""
    tree = work / 'initramfs'
    for name in ('bin', 'dev', 'modules', 'proc', 'root', 'sys'):
        (tree / name).mkdir(parents=True)
    shutil.copy(system / 'bin/busybox', tree / 'bin/busybox')
    for module in MODULES:
        shutil.copy(find_module(system, module), tree / 'modules')
    write_script(tree / 'init', INITRAMFS_INIT.format(
        modules=' '.join(MODULES), label=LABEL))
    names = sorted(str(p.relative_to(tree)) for p in tree.rglob('*'))
    archive = execute(system / 'bin/busybox', 'cpio', '-o', '-H', 'newc',
                      '-R', '0:0', cwd=tree, data='\n'.join(names).encode())
    # Unpacking is cheap and reading through the BIOS is not.
    return gzip.compress(archive, mtime=0)


def find_module(system: pathlib.Path, module: str) -> pathlib.Path:
    for found in system.glob(f'lib/modules/*/**/{module}.ko'):
        return found
    raise GuestError(f'the kernel has no module {module}')


def write_script(path: pathlib.Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def write_image(path: pathlib.Path, size: int, system: pathlib.Path,
                core: bytes, tree: pathlib.Path) -> None:
    """Lay out MBR, GRUB and the file system in a sparse file."""
    if SECTOR + len(core) > PARTITION_START:
        raise GuestError('GRUB takes %d bytes: too many' % len(core))
    boot = (system / 'usr/lib/grub/i386-pc/boot.img').read_bytes()
    with open(path, 'wb') as image:
        image.truncate(size)
        image.write(master_boot_record(boot, size))
        image.write(core)
    # GRUB 2.06 cannot read what newer mke2fs turn on, and takes its time
    # per block: with 4 KiB the kernel loads in half the time.
    blocks = (size - ESP_SIZE - PARTITION_START) // BLOCK
    execute('mke2fs', '-q', '-F', '-t', 'ext4',
            '-L', LABEL, '-b', str(BLOCK),
            '-O', '^metadata_csum,^metadata_csum_seed,^orphan_file,^64bit',
            '-E', 'offset=%d,root_owner=0:0' % PARTITION_START,
            '-d', tree, path, str(blocks))


def write_esp(path: pathlib.Path, size: int, work: pathlib.Path,
              system: pathlib.Path, loader: bytes) -> None:
    """Make the file system that a UEFI firmware looks for, with GRUB in it."""
    mtools = system / 'usr/bin/mtools'
    where = f'{path}@@{size - ESP_SIZE}'
    file = work / 'BOOTX64.EFI'
    file.write_bytes(loader)
    execute(mtools, '-c', 'mformat', '-i', where,
            '-T', str(ESP_SIZE // SECTOR), '::')
    execute(mtools, '-c', 'mmd', '-i', where, '::/EFI', '::/EFI/BOOT')
    execute(mtools, '-c', 'mcopy', '-i', where, file, '::/EFI/BOOT')


def master_boot_record(boot: bytes, size: int) -> bytes:
    """GRUB's boot sector with two partitions: Linux, which is active, EFI."""
    esp = size - ESP_SIZE
    return (boot[:440] + bytes(6) +
            partition_entry(0x80, 0x83, PARTITION_START, esp) +
            partition_entry(0, 0xef, esp, size) + bytes(32) + b'\x55\xaa')


def partition_entry(active: int, kind: int, start: int, end: int) -> bytes:
    """An entry of the partition table, without cylinders."""
    return struct.pack('<B3sB3sII', active, b'\xfe\xff\xff', kind,
                       b'\xfe\xff\xff', start // SECTOR,
                       (end - start) // SECTOR)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('path', help='the raw image to write')
    args = parser.parse_args(argv)
    try:
        build(args.path)
    except GuestError as error:
        print('guest: %s' % error, file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
