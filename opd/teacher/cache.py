"""The teacher's hidden states between its forward pass and the loss: in host memory, and beyond a limit on disk.

A hidden state is kept and not its logits: it has H_t numbers instead of V, which is 30 to 100 times fewer, and the head
gives the same logits later. So the teacher's body can leave the device before the student's backward pass starts.
"""

import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from opd import distributed
from opd.errors import RunError


class Cache(Sequence[Tensor]):
    """The hidden states of each micro-batch, (N, H_t), in pinned memory where there is a GPU.

    Args:
        limit: bytes of host memory; None sets no limit.
        folder: takes what exceeds the limit, one safetensors file for a micro-batch; `clear` removes it.
    """

    def __init__(self, limit: int | None = None, folder: Path | None = None):
        self.limit, self.folder = limit, folder
        self.held = 0  # bytes in host memory
        self.entries: list[Tensor | Path] = []

    def add(self, hidden_NH: Tensor) -> None:
        """Copies hidden states from the device. Raises RunError where their file cannot be written."""
        if self.limit is None or self.held + hidden_NH.nbytes <= self.limit:
            copy = torch.empty_like(hidden_NH, device="cpu", pin_memory=hidden_NH.is_cuda)
            self.entries.append(copy.copy_(hidden_NH, non_blocking=True))
            self.held += hidden_NH.nbytes
            return
        path = self.folder / f"rank_{distributed.rank()}_batch_{len(self.entries):06d}.safetensors"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file({"states": hidden_NH.contiguous().cpu()}, path)
        except (OSError, SafetensorError) as error:
            path.unlink(missing_ok=True)
            free = shutil.disk_usage(self.folder.parent).free
            raise RunError(
                f"the teacher's hidden states are above teacher.cache_gb and {path} cannot be written ({error}): "
                f"it takes {hidden_NH.nbytes / 2**20:.1f} MiB and {free / 2**20:.1f} MiB are free. Checkpoints are "
                "intact; make room, or raise teacher.cache_gb, and start the same command again."
            ) from error
        self.entries.append(path)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, number: int) -> Tensor:
        entry = self.entries[number]
        return load_file(entry)["states"] if isinstance(entry, Path) else entry

    def clear(self) -> None:
        """Forgets all hidden states, and removes the files of this process."""
        for entry in self.entries:
            if isinstance(entry, Path):
                entry.unlink()
        if self.folder is not None:
            with suppress(OSError):  # it was never made, or another process has files in it
                self.folder.rmdir()
        self.entries, self.held = [], 0


def clear_folder(folder: Path) -> None:
    """Removes the files that a killed process left behind."""
    shutil.rmtree(folder, ignore_errors=True)
