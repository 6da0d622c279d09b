"""Signals that ask a run to stop."""

import signal
import time

from opd import distributed
from opd.console import say
from opd.errors import Interrupted


class Stop:
    """SIGINT, SIGTERM and SIGHUP ask for a stop at the next safe place; a second one stops at once."""

    def __init__(self) -> None:
        self.signum = 0
        self.when = 0.0

    def __enter__(self) -> None:
        kinds = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
            kinds.append(signal.SIGHUP)
        self.previous = {s: signal.signal(s, self._receive) for s in kinds}

    def __exit__(self, *error: object) -> None:
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)

    def _receive(self, signum: int, frame: object) -> None:
        if self.signum:
            if distributed.world_size() > 1 and time.monotonic() - self.when < 5:
                return  # the same signal again, because a scheduler sends it to the launcher and to its processes
            raise KeyboardInterrupt
        self.signum, self.when = signum, time.monotonic()
        say(f"{signal.Signals(signum).name}: stopping after a checkpoint (again: at once)")

    def check(self, together: bool = False) -> None:
        """Raises Interrupted when a signal came. Several processes stop only where all of them call it `together`."""
        if distributed.world_size() > 1 and not together:
            return
        if signum := int(distributed.largest(self.signum)):
            raise Interrupted(signum)
