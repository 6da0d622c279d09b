"""The process that runs vLLM. It generates for one trainer at a time, with the parameters that the trainer sends.

    OPD_VLLM_KEY=SECRET python -m opd.vllm_server --listen 0.0.0.0:8500

A trainer starts a server beside itself, or finds servers on other GPUs or other hosts through rollout.servers. vLLM has
a process of its own, so its crash or hang costs some rollouts and not the run, and it can use other packages than the
trainer. A server knows nothing about a run; model, lengths and memory come with the first message. Each trainer gets a
fresh process. That process ends with its trainer, so that no GPU stays occupied.

JSON and safetensors travel, and never a pickle. The server listens only to a trainer that knows the key. Nothing is
encrypted.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

from opd.arguments import address_of
from opd.cli import main
from opd.commands import COMMANDS
from opd.errors import InputError
from opd.rollout.server import serve_one
from opd.rollout.wire import KEY


def command(arguments: list[str]) -> None:
    """Serves one trainer after another, each in a fresh process, until it is stopped; a child serves one."""
    options = COMMANDS["vllm-server"].parser().parse_args(arguments)
    address, key = address_of(options.listen), os.environ.get(KEY, "")
    if not key:
        raise InputError(f"{KEY} is not set. Set it to a secret, the same one here and where the trainer runs.")
    if options.child_of:
        return serve_one(address, key.encode(), options.child_of)
    print(f"vLLM server: listening on {options.listen}", file=sys.stderr, flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    while True:
        serve_in_child(arguments)
        time.sleep(1)


def serve_in_child(arguments: list[str]) -> None:
    """Serves one trainer in a process that starts with the same arguments. Exits with 2 when their address is wrong."""
    child = subprocess.Popen(
        [sys.executable, "-m", "opd.vllm_server", *arguments, "--child-of", str(os.getpid())],
        start_new_session=True,
    )
    try:
        if child.wait() == 2:
            sys.exit(2)  # the child has said what is wrong
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # a child that has crashed may leave workers behind


if __name__ == "__main__":
    main(command)
