"""The teacher's hidden states between its forward pass and the loss: in host memory, above a limit on disk.

Hidden states are kept, not logits: a token takes H_t numbers instead of V (a factor of 30 to 100), nothing is lost, and
the teacher's body can leave the device before the student's backward pass starts.
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from opd import distributed
from opd.errors import RunError


class Cache(Sequence[Tensor]):
    """Hidden states by micro-batch: in host memory, pinned where there is a GPU; above a limit in files.

    Args:
        limit: bytes of host memory; None: no limit.
        folder: where what is above it goes, one safetensors file for a micro-batch. Removed by `clear`.
    """

    def __init__(self, limit: int | None = None, folder: Path | None = None):
        self.limit, self.folder = limit, folder
        self.held = 0
        self.states: list[Tensor | Path] = []

    def add(self, states: Tensor) -> None:
        """Takes (N, H_t) states from the device. Raises RunError where the file cannot be written."""
        if self.limit is not None and self.held + states.nbytes > self.limit:
            path = self.folder / f"rank_{distributed.rank()}_batch_{len(self.states):06d}.safetensors"
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                save_file({"states": states.contiguous().cpu()}, path)
            except (OSError, SafetensorError) as error:
                path.unlink(missing_ok=True)
                free = shutil.disk_usage(self.folder.parent).free
                raise RunError(
                    f"the teacher's hidden states are above teacher.cache_gb and {path} cannot be written ({error}): "
                    f"it takes {states.nbytes / 2**20:.1f} MiB and {free / 2**20:.1f} MiB are free. Checkpoints are "
                    "intact; make room, or raise teacher.cache_gb, and start the same command again."
                ) from error
            self.states.append(path)
        else:
            kept = torch.empty_like(states, device="cpu", pin_memory=states.is_cuda)
            self.states.append(kept.copy_(states, non_blocking=True))
            self.held += states.nbytes

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, number: int) -> Tensor:
        kept = self.states[number]
        return load_file(kept)["states"] if isinstance(kept, Path) else kept

    def __iter__(self) -> Iterator[Tensor]:
        return (self[number] for number in range(len(self)))

    def clear(self) -> None:
        """Forgets all states, and this process's files."""
        for kept in self.states:
            if isinstance(kept, Path):
                kept.unlink()
        if self.folder is not None:
            with suppress(OSError):  # not there, or another process has files in it
                self.folder.rmdir()
        self.states, self.held = [], 0


def clear_folder(folder: Path) -> None:
    """Removes what a killed process has left."""
    shutil.rmtree(folder, ignore_errors=True)
