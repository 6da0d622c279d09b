"""A group of processes that train together: they start together, and the failure of one ends all."""

import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from opd.errors import Interrupted, RunError

PATIENCE = 3600  # seconds that processes have after a signal to finish their update and write a checkpoint


def run(command: Sequence[str], machines: int, here: int, meeting: Mapping[str, Any]) -> None:
    """Runs `python -m COMMAND` in `here` processes of this machine, and waits for them.

    Args:
        meeting: how the machines find each other, as arguments of torch's LaunchConfig.
    Raises:
        RunError: a process has failed; the message says which.
        Interrupted: a signal has stopped this process, which has passed it on.
    """
    settings = LaunchConfig(
        min_nodes=machines,
        max_nodes=machines,
        nproc_per_node=here,
        run_id="opd",
        max_restarts=0,
        shutdown_timeout=PATIENCE,
        **meeting,
    )
    try:
        elastic_launch(settings, sys.executable)("-u", "-m", *command)
    except SignalException as stop:
        raise Interrupted(int(stop.sigval)) from None
    except ChildFailedError as error:
        raise _explained(error) from None


def _explained(error: ChildFailedError) -> RunError | SystemExit:
    """The error that ends this process after one of its children failed."""
    # A process that was killed explains why the others lost their connections, so it goes first.
    killed = [
        r for r, failure in error.failures.items() if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM
    ]
    rank = killed[0] if killed else error.get_first_failure()[0]
    pid, code = error.failures[rank].pid, error.failures[rank].exitcode
    if code == 2:
        return SystemExit(2)  # the process itself has said what is wrong with the input
    end = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    return RunError(
        f"process {rank} (pid {pid}) {end}, so the others were stopped. Checkpoints are intact; the same command "
        "continues from the newest."
    )
