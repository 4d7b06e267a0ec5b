"""A kernel in QEMU, by TCG, so that it needs no KVM: an initramfs of busybox, a root image, and one with what is run.

Knows how they are made, and hands on what the console says. Knows nothing of what is run.
"""

from __future__ import annotations

import contextlib
import lzma
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Iterator, List

from debs import Kernel
from roots import remove, scratch

# What a Debian kernel has as modules and needs before it sees a disk, in this order; whichever of them there are.
_MODULES = (
    "virtio virtio_ring virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_blk "
    "crc16 crc32c_generic crc32c-generic libcrc32c mbcache jbd2 ext4"
).split()
_INIT = """#!/bin/busybox sh
/bin/busybox mkdir -p /dev /root
/bin/busybox mount -t devtmpfs dev /dev
for module in {modules}; do /bin/busybox insmod /$module.ko 2>/dev/null; done
n=0
until [ -b /dev/vdb ]; do n=$((n + 1)); [ $n -lt 600 ] || exec /bin/busybox poweroff -f; /bin/busybox usleep 100000; done
/bin/busybox mount -t ext4 /dev/vda /root
/bin/busybox mount -t ext4 /dev/vdb /root/mnt
exec /bin/busybox switch_root /root /bin/sh /mnt/init
"""
# A virtual machine that stands still for a while is no reason for the kernel to speak up, or to give up.
_CONSOLE = "console=ttyS0 quiet panic=-1 no_timer_check tsc=unstable clocksource=acpi_pm rcupdate.rcu_cpu_stall_suppress=1"
_MEMORY_MIB = 2048


def image_of(root: Path) -> Path:
    """An ext4 image of a root file system, made once, beside it."""
    image = root.with_suffix(".ext4")
    if not image.exists():
        making = image.with_suffix(".making")
        making.unlink(missing_ok=True)
        _make_image(root, making, spare_mib=512)
        making.rename(image)
    return image


def _make_image(source: Path, image: Path, spare_mib: int) -> None:
    mib = int(subprocess.check_output(["du", "-sm", str(source)], text=True).split()[0])
    with image.open("wb") as file:
        file.truncate((mib * 5 // 4 + spare_mib) << 20)
    subprocess.run(
        ["mke2fs", "-q", "-F", "-t", "ext4", "-O", "^metadata_csum,^orphan_file", "-d", str(source), str(image)], check=True
    )


def _make_initramfs(kernel: Kernel, place: Path) -> Path:
    tree = place / "initramfs"
    (tree / "bin").mkdir(parents=True)
    shutil.copy(shutil.which("busybox") or "/bin/busybox", tree / "bin/busybox")
    for path in kernel.modules.rglob("*.ko*"):
        name = path.name.split(".")[0]
        if name in _MODULES:
            data = path.read_bytes()
            (tree / f"{name}.ko").write_bytes(lzma.decompress(data) if path.suffix == ".xz" else data)
    (tree / "init").write_text(_INIT.format(modules=" ".join(_MODULES)))
    (tree / "init").chmod(0o755)
    packed = place / "initramfs.cpio"
    with packed.open("wb") as out:
        names = "\n".join(str(path.relative_to(tree)) for path in sorted(tree.rglob("*")))
        subprocess.run(["cpio", "-o", "-H", "newc", "--quiet"], cwd=tree, input=names.encode(), stdout=out, check=True)
    return packed


@contextlib.contextmanager
def booted(kernel: Kernel, root: Path, payload: Path) -> Iterator[Iterator[str]]:
    """The lines on its console until it powers off. `payload` has `init`, a script that is the first process; it is on /mnt."""
    place = scratch("emulated")
    try:
        second = place / "payload.ext4"
        shutil.copytree(kernel.modules, payload / "modules", symlinks=True, ignore=shutil.ignore_patterns("build", "source"))
        _make_image(payload, second, spare_mib=256)
        command = _command(kernel, _make_initramfs(kernel, place), [image_of(root), second])
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(place)},
        ) as process:
            try:
                yield _lines(process)
            finally:
                process.kill()
    finally:
        remove(place)


def _lines(process: subprocess.Popen[bytes]) -> Iterator[str]:
    assert process.stdout
    for line in process.stdout:
        yield re.sub(r"\x1b\[[0-9;]*[A-Za-z]|\r", "", line.decode(errors="replace")).rstrip()


def _command(kernel: Kernel, initramfs: Path, disks: List[Path]) -> List[str]:
    """Its disks are written to beside themselves (snapshot), in TMPDIR; and it ends with this process."""
    return [
        *("setpriv", "--pdeathsig=KILL"),
        *("qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", str(_MEMORY_MIB)),
        *("-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot"),
        *("-kernel", str(kernel.image), "-initrd", str(initramfs), "-append", _CONSOLE),
        *(word for disk in disks for word in ("-drive", f"file={disk},if=virtio,format=raw,snapshot=on")),
    ]
