"""Small file systems on loop devices: cut off from their power, frozen, filled up. Needs root."""

import ctypes
import fcntl
import itertools
import os
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN and XFS_IOC_GOINGDOWN: _IOR('X', 125, __u32)
_NO_LOG_FLUSH = 2
_FREEZE, _THAW = 0xC0045877, 0xC0045878  # FIFREEZE, FITHAW
_PACKAGES = {
    "btrfs": "btrfs-progs",
    "mkfs.btrfs": "btrfs-progs",
    "mkfs.ext4": "e2fsprogs",
    "mkfs.xfs": "xfsprogs",
    "strace": "strace",
}
_SIZES_MIB = {"ext4": 32, "xfs": 300, "btrfs": 256}
_MIB = 2**20
_RELEASE_S = 60.0
_numbers = itertools.count()


def need(*tools: str) -> None:
    """Fail where this machine lacks something: an attack that cannot be carried out has not been survived."""
    assert os.geteuid() == 0, "needs root, for loop devices and mounts"
    for tool in tools:
        assert shutil.which(tool), f"needs {tool}: apt-get install {_PACKAGES.get(tool, tool)}"


class Volume:
    """A mounted file system in a file."""

    def __init__(self, folder: Path, kind: str, mib: int, options: str = "loop") -> None:
        need(f"mkfs.{kind}")
        number = next(_numbers)
        self.kind = kind
        self.options = options
        self.image = folder / f"volume-{number}.img"
        self.path = folder / f"volume-{number}"
        self.path.mkdir()
        with open(self.image, "wb") as file:
            file.truncate(mib * _MIB)
        quiet = ["-q", "-F", "-m", "0"] if kind == "ext4" else ["-q", "-f"]
        subprocess.run([f"mkfs.{kind}", *quiet, str(self.image)], check=True, stdout=subprocess.DEVNULL)
        self.mount()

    def mount(self, *more: str) -> None:
        """Mount it; a file system that was cut off replays its log."""
        options = ",".join([self.options, *more])
        subprocess.run(["mount", "-t", self.kind, "-o", options, str(self.image), str(self.path)], check=True)

    def unmount(self) -> None:
        """Unmount it."""
        subprocess.run(["umount", str(self.path)], check=True)

    def _control(self, request: int, value: int) -> None:
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, request, struct.pack("I", value))
        finally:
            os.close(descriptor)

    def cut(self) -> None:
        """Cut the power: nothing that is not on the disk now ever gets there, the log included."""
        self._control(_SHUTDOWN, _NO_LOG_FLUSH)

    def reboot(self) -> None:
        """Come back after a cut; nobody may use the volume any more.

        A container that is just being started holds a copy of every mount for a moment. A mount would then give back
        the dead file system, on which a whole file is unreadable: wait until its loop device is free.
        """
        self.unmount()
        deadline = time.monotonic() + _RELEASE_S
        while subprocess.run(["losetup", "-j", self.image], check=True, capture_output=True).stdout:
            assert time.monotonic() < deadline, f"{self.path} is still mounted in another namespace"
            time.sleep(0.01)
        self.mount()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Let every write hang."""
        self._control(_FREEZE, 0)
        try:
            yield
        finally:
            self._control(_THAW, 0)

    def fill(self, leave_bytes: int = 0) -> None:
        """Take all the space that is left but so much."""
        with suppress(OSError), open(self.path / f".filler-{next(_numbers)}", "ab") as file:
            free = shutil.disk_usage(self.path).free
            for size in (_MIB, 4096):
                while free - size >= leave_bytes:
                    try:
                        os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, size)
                    except OSError:
                        break
                    free = shutil.disk_usage(self.path).free

    def empty(self) -> None:
        """Give the space back."""
        for filler in self.path.glob(".filler-*"):
            filler.unlink()

    def close(self) -> None:
        """Remove it."""
        subprocess.run(["umount", "--lazy", str(self.path)], check=False)
        self.image.unlink(missing_ok=True)


@contextmanager
def volume(folder: Path, kind: str, mib: int = 0, options: str = "loop") -> Iterator[Volume]:
    """Make a volume for a while."""
    made = Volume(folder, kind, mib or _SIZES_MIB[kind], options)
    try:
        yield made
    finally:
        made.close()


def sync_everything() -> None:
    """Write all dirty pages of the machine, so that they do not slow down what is measured next."""
    ctypes.CDLL(None).sync()
