"""What both ends of the line to a vLLM server share, beside opd.wire: the key's name, and a place for weights."""

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

KEY = "OPD_VLLM_KEY"  # environment variable: the secret that both ends must know
SHUTDOWN = 20  # seconds that a server has to put vLLM away


class Scratch:
    """A new folder for `size` bytes of weights, in shared memory where there is room; locked while its process lives.

    Making one removes the folders of processes that were killed, which would occupy memory until the machine restarts.
    """

    def __init__(self, size: int):
        self.size = size
        roots = [Path("/dev/shm"), Path(tempfile.gettempdir())]
        with (roots[-1] / f"opd-weights-{os.getuid()}.lock").open("w") as one_at_a_time:
            fcntl.flock(one_at_a_time, fcntl.LOCK_EX)
            for folder in (p for root in roots for p in root.glob("opd-weights-*") if p.is_dir()):
                _remove_if_abandoned(folder)
            root = next((r for r in roots if r.is_dir() and shutil.disk_usage(r).free > 1.1 * size), roots[-1])
            self.path = Path(tempfile.mkdtemp(prefix="opd-weights-", dir=root))
            self.handle = os.open(self.path, os.O_RDONLY)
            fcntl.flock(self.handle, fcntl.LOCK_EX)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self.handle)


def _remove_if_abandoned(folder: Path) -> None:
    """Removes a folder unless the process that made it lives, belongs to another user, or removes it just now."""
    with suppress(FileNotFoundError, PermissionError, BlockingIOError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(handle)
