"""The vLLM servers of a run: which of them belong to this process, how they start, and the one restart they have.

A server that dies or falls silent is started once more, or connected to again, gets the weights it had, and is asked
again. The second time the run ends, with its checkpoints intact.
"""

import gc
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from opd import distributed
from opd.config import RolloutSection
from opd.errors import InputError, RunError
from opd.rollout.connection import Elsewhere, OwnProcess, Place, ServerConnection
from opd.rollout.wire import KEY
from opd.wire import ServerLost

Answer = TypeVar("Answer")


class Fleet:
    """The servers of this process: none, one or several of the `total` servers of the run.

    Args:
        model: the arguments of vllm.LLM that depend on the run.
        device: of this process; a server that it starts runs there.
    Raises:
        InputError: vLLM is not installed, or does not take the model, or nothing is where rollout.servers says.
    """

    def __init__(self, model: dict[str, Any], rollout: RolloutSection, device: torch.device):
        places = _remote_places(rollout.servers) if rollout.servers else _local_places(rollout.tensor_parallel, device)
        self.numbered = {
            number: ServerConnection(place, model, torch.get_num_threads(), rollout.timeout)
            for number, place in places.items()
        }
        self.total = len(rollout.servers) or max(distributed.world_size() // rollout.tensor_parallel, 1)
        self.restarted = False
        self.weights: Path | None = None  # folder of the weights given last; None: the servers have those of the model
        self._start(device)

    @property
    def servers(self) -> list[ServerConnection]:
        return list(self.numbered.values())

    def call(self, server: ServerConnection, work: Callable[[ServerConnection], Answer]) -> Answer:
        """What `work` returns of a server; it is done again when the server is lost and has come back.

        Raises RunError when a server is lost for the second time.
        """
        while True:
            try:
                return work(server)
            except ServerLost as lost:
                self.restart(server, lost)

    def restart(self, server: ServerConnection, lost: ServerLost) -> None:
        """Starts a lost server once more, with the weights it had. Raises RunError the second time."""
        server.end()
        if self.restarted:
            raise RunError(
                f"{server.name} is lost for the second time: {lost}. Checkpoints are intact; mend the cause (its "
                "messages are above; memory is rollout.gpu_memory, patience rollout.timeout) and start the same "
                "command again, or set rollout.engine=transformers in a new run."
            )
        self.restarted = True
        _say(f"warning: {server.name} is lost: {lost}; starting it once more")
        try:
            server.start()
            server.wait_until_loaded()
            if self.weights is not None:
                server.give(self.weights)
        except (ServerLost, InputError) as error:
            server.end()
            raise RunError(f"{server.name} was lost ({lost}) and does not come back: {error}") from None
        _say(f"{server.name} is back, with the weights it had")

    def give(self, folder: Path) -> None:
        """Gives all servers the weights in `folder`, and wakes them. Raises RunError as `call`."""
        self.weights = folder
        for server in self.servers:
            self.call(server, lambda server: server.give(folder))

    def wake(self) -> None:
        """Gives servers that sleep the weights they had. Every process calls it. Raises RunError as `call`."""
        distributed.wait()
        for server in self.servers:
            if server.asleep:
                self.call(server, lambda server: server.give(self.weights))

    def sleep(self) -> None:
        """Leaves the memory of the GPUs to others. Every process calls it. Raises RunError as `call`."""
        for server in self.servers:
            self.call(server, lambda server: server.sleep())
        distributed.wait()  # a process without a server may share its GPU with that of another process

    def close(self) -> None:
        for server in self.servers:
            server.close()

    def _start(self, device: torch.device) -> None:
        """Starts the servers; all of them load at the same time."""
        if device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()  # vLLM counts what torch keeps for later as occupied
        distributed.wait()  # one vLLM may lie on the GPUs of several processes
        failed: InputError | None = None
        try:
            for work in (lambda server: server.start(), lambda server: server.wait_until_loaded()):
                for server in self.servers:
                    work(server)
        except InputError as error:
            failed = error
        except ServerLost as lost:
            failed = InputError(f"rollout.engine is 'vllm', and {server.name} did not start: {lost}.")
        except BaseException:
            self._end()
            raise
        if distributed.largest(failed is not None):
            self._end()
            raise failed or InputError("rollout.engine is 'vllm', and that of another process did not start.")

    def _end(self) -> None:
        for server in self.servers:
            server.end()


def _remote_places(addresses: Sequence[str]) -> dict[int, Place]:
    """Which of rollout.servers this process has, by their numbers. Raises InputError without a key."""
    if KEY not in os.environ:
        raise InputError(f"rollout.servers is set and {KEY} is not: set it to the key that the servers have.")
    numbers = range(distributed.rank(), len(addresses), distributed.world_size())
    return {number: Elsewhere(addresses[number]) for number in numbers}


def _local_places(group: int, device: torch.device) -> dict[int, Place]:
    """The server of this process by its number; of a group of processes with tensor parallelism the first has one.

    Raises InputError when the processes or the GPUs of this machine do not make whole groups.
    """
    # torchrun's name, and that of the deepspeed launcher
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or distributed.world_size())
    if distributed.world_size() > 1 and here % group:
        raise InputError(
            f"rollout.tensor_parallel is {group} and this machine has {here} processes: expected a divisor of "
            "them, since each group of so many GPUs has a vLLM."
        )
    number, member = divmod(distributed.rank(), group)
    return {} if member else {number: OwnProcess(torch.get_num_threads(), gpus_of_server(device, group))}


def gpus_of_server(device: torch.device, group: int) -> str | None:
    """CUDA_VISIBLE_DEVICES of a server of `group` GPUs, of which `device` is the first; None on a CPU.

    Raises InputError when there are too few.
    """
    if device.type == "cpu":
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    first = device.index or 0
    if first + group > len(gpus):
        raise InputError(
            f"rollout.tensor_parallel is {group}, and there are {len(gpus) - first} from GPU {first} on. Lower it."
        )
    return ",".join(gpus[first : first + group])


def _say(text: str) -> None:
    """On the console, from any process and not from the first alone."""
    who = f"process {distributed.rank()}: " if distributed.world_size() > 1 else ""
    print(f"{who}{text}", file=sys.stderr, flush=True)
