"""The device of a process, as the configuration and the launcher say."""

import os

import torch

from opd.config import EngineSection
from opd.errors import InputError


def pick_device(engine: EngineSection) -> torch.device:
    """The device of this process, as the config section `engine` says. It also sets the number of CPU threads.

    Raises InputError when the configured GPU is missing, or when the processes do not fit the GPUs.
    """
    if engine.kind == "torch" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "engine.kind 'torch' trains in one process, and WORLD_SIZE says there are more. Start it plainly, or set "
            "engine.kind=deepspeed and engine.deepspeed=zero2."
        )
    if engine.device == "cuda" and not torch.cuda.is_available():
        raise InputError("engine.device is 'cuda' and torch sees no GPU. Set engine.device to 'auto' or 'cpu'.")
    if engine.cpu_threads is not None:
        torch.set_num_threads(engine.cpu_threads)
    if engine.device == "cpu" or not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns on import that it guesses the device
        return torch.device("cpu")
    if engine.kind == "torch":
        return torch.device("cuda")
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if here > gpus:
        raise InputError(
            f"{here} processes on this machine, and torch sees {gpus} GPUs. Start as many processes as there are GPUs "
            "(NUM_GPUS)."
        )
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device
