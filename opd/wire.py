"""What both ends of a line between two processes share: the key, time limits, whole messages.

Only JSON and safetensors travel, and never a pickle. Each end proves to the other that it has the key, and sends
nothing before that. Nothing is encrypted. vLLM's servers (opd.rollout.server) and teacher servers
(opd.teacher.server) speak through it.
"""

import os
import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, answer_challenge, deliver_challenge

from opd.errors import InputError

CONNECTING = 120  # seconds until a server on another host must have time for this run
HANDSHAKE = 20  # seconds in which each end must show that it has the key

Address = tuple[str, int] | str  # host and port, or the path of a Unix socket


class ServerLost(Exception):
    """A server died, failed or fell silent; the text says which."""


def limit(connection: Connection, seconds: int) -> None:
    """Lets a read that has begun, and a write, fail with BlockingIOError after so many seconds; 0 lets them wait.

    A host that vanishes without a word is noticed within two minutes.
    """
    with socket.socket(fileno=os.dup(connection.fileno())) as raw:
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            raw.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", seconds, 0))
        if raw.family in (socket.AF_INET, socket.AF_INET6):
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4)):
                raw.setsockopt(socket.IPPROTO_TCP, option, value)


def listen(address: Address, waiting: int = 1) -> Listener:
    """A place where others connect, of whom `waiting` may wait for their turn. Raises InputError when it is taken."""
    try:
        return Listener(address, backlog=waiting)
    except OSError as error:
        raise InputError(
            f"--listen {address}: cannot listen there ({error}). Give another address, or stop who has it."
        ) from None


def admit(connection: Connection, key: bytes, seconds: int) -> None:
    """Lets who has connected prove that it has the key, and proves the same to it.

    Raises AuthenticationError, OSError or EOFError where it does not do so in time.
    """
    limit(connection, seconds)  # a client that connects and says nothing does not keep others out
    deliver_challenge(connection, key)
    answer_challenge(connection, key)
    limit(connection, 0)


def connect(
    address: Address, key: bytes, timeout: int, patience: float, between_tries: Callable[[], None] = lambda: None
) -> Connection:
    """The connection to a server, tried until it has time for this run. Reads and writes have `timeout` seconds.

    `between_tries` may raise.

    Raises:
        AuthenticationError: the server has another key.
        ServerLost: nobody answers within `patience` seconds.
    """
    until = time.monotonic() + patience
    while True:
        try:
            connection = Client(address)
            limit(connection, min(timeout, HANDSHAKE))
            answer_challenge(connection, key)
            deliver_challenge(connection, key)
            limit(connection, timeout)
            return connection
        except AuthenticationError:
            raise
        except (OSError, EOFError) as error:
            between_tries()
            if time.monotonic() > until:
                raise ServerLost(f"nobody there has time for this run ({error})") from None
            time.sleep(0.1)


def receive(connection: Connection, patience: float, allowance: str, waiting: Callable[[], None]) -> bytes:
    """The next message. `waiting` is called every second until it comes, and may raise.

    Raises ServerLost after `patience` seconds, for which the message has the words `allowance`, and OSError or EOFError
    when the connection breaks.
    """
    until = time.monotonic() + patience
    while not connection.poll(min(1.0, patience)):
        waiting()
        if time.monotonic() >= until:
            raise ServerLost(f"it gave no sign of life for {allowance}")
    return connection.recv_bytes()


def hang_up(connection: Connection) -> None:
    """Ends a connection that another thread may be reading; to that thread it looks as if the other end had ended."""
    with suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as raw:
        raw.shutdown(socket.SHUT_RDWR)
