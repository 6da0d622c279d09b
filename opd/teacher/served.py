"""A teacher in other processes: teacher servers (python -m opd.teacher_server) send its hidden states.

A hidden state has H_t numbers, 2 H_t bytes in bfloat16, where logits have V. The head comes once, at the beginning, and
projects them here. So loss, statistics and gradient are those of a local teacher, bit for bit where the servers compute
as this machine does, and no token selection has to make do with a part of the distribution.

Each process of a run has LINES connections to every server. A micro-batch goes to whichever is free. While the answer
to one is on its way, the server computes the next. Answers are taken in the order of the micro-batches.

A server that is lost is connected to once more, and asked again for what it owed. The second time the run ends, with
its checkpoints intact. What comes back is believed only if it says that it is the same teacher.
"""

import json
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from opd.arguments import address_of
from opd.batch import MicroBatch
from opd.cli import say
from opd.config import Config
from opd.errors import InputError, RunError, first_line
from opd.loss import Head
from opd.models import LanguageModel
from opd.teacher.cache import Cache
from opd.teacher.facts import KEY, PROTOCOL, facts_of
from opd.wire import CONNECTING, ServerLost, connect, hang_up, receive

LINES = 2  # connections of a process to each server: while one brings an answer, the server computes for the other
AHEAD = 2  # micro-batches per connection that are asked for before the first of them is taken


class OtherTeacher(Exception):
    """A server has another teacher than the configuration says, or than the server before it; the text says how."""


class Line:
    """One connection to a server, on which one micro-batch at a time is asked for.

    Args:
        where: the server's address, an entry of teacher.servers.
        timeout: seconds that it may take for an answer.
        check_open: called every second while a line waits; raises when the run has ended.
    """

    def __init__(self, where: str, timeout: int, check_open: Callable[[], None]):
        self.where, self.timeout, self.check_open = where, timeout, check_open
        self.connection: Connection | None = None
        self.was_lost = False

    def open(self) -> dict[str, Any]:
        """Connects. Returns what the server says about its teacher.

        Raises AuthenticationError for another key, and ServerLost where nobody answers.
        """
        key = os.environ[KEY].encode()
        self.connection = connect(address_of(self.where), key, self.timeout, CONNECTING, self.check_open)
        return self._answer()

    def ask(self, names: set[str], tensors: dict[str, Tensor] | None = None, **request: Any) -> dict[str, Tensor]:
        """The tensors of an answer, which has all these names. Raises ServerLost, and RunError where it refuses."""
        try:
            self.connection.send_bytes(json.dumps(request).encode())
            if tensors is not None:
                self.connection.send_bytes(save(tensors))
        except OSError as error:
            raise self._broken(error) from None
        self._answer()
        try:
            answer = load(self._message())
        except (SafetensorError, ValueError) as error:
            raise ServerLost(f"half an answer has come ({first_line(error)})") from None
        if names - answer.keys():
            raise ServerLost(f"its answer lacks {sorted(names - answer.keys())}")
        return answer

    def hang_up(self) -> None:
        """As opd.wire.hang_up."""
        if self.connection is not None:
            hang_up(self.connection)

    def close(self) -> None:
        if self.connection is not None:
            self.connection.close()

    def _answer(self) -> dict[str, Any]:
        """The next JSON object."""
        try:
            answer = json.loads(self._message())
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise ServerLost("half an answer has come, or one of another program")
        if "refused" in answer:
            raise RunError(f"the teacher server {self.where} refuses a request: {str(answer['refused'])[:300]}.")
        if "failed" in answer:
            raise ServerLost(f"it failed with {str(answer['failed'])[:300]}")
        return answer

    def _message(self) -> bytes:
        try:
            return receive(self.connection, self.timeout, f"{self.timeout} s (teacher.timeout)", self.check_open)
        except (OSError, EOFError) as error:
            raise self._broken(error) from None

    def _broken(self, error: BaseException) -> ServerLost:
        return ServerLost(f"the connection broke ({type(error).__name__})")


@dataclass(frozen=True)
class About:
    """What a server says of its teacher."""

    facts: dict[str, Any]
    weights: str  # digest
    packed_row: int
    micro_batch_tokens: int  # the most that it takes at once
    scale: float
    soft_cap: float | None

    @classmethod
    def of(cls, answer: dict[str, Any]) -> "About":
        """Raises OtherTeacher where it is no teacher server, or one of another version."""
        if answer.get("protocol") != PROTOCOL:
            raise OtherTeacher(f"speaks protocol {answer.get('protocol')}, expected {PROTOCOL}: install one version")
        try:
            return cls(**{name: answer[name] for name in cls.__dataclass_fields__})
        except KeyError as error:
            raise OtherTeacher(f"does not say {error}") from None


class Servers:
    """The lines of this process to all servers of a run. They have one teacher.

    Args:
        outline: the configured teacher without its weights.
    Raises:
        InputError: there is no key, nobody answers, or the teacher there is another one.
    """

    def __init__(self, config: Config, outline: LanguageModel):
        if not os.environ.get(KEY):
            raise InputError(f"teacher.mode is 'server' and {KEY} is not set: set it to the key that the servers have.")
        self.section, self.expected = config.teacher, facts_of(outline, config.teacher)
        self.closed, self.restoring = threading.Event(), threading.Lock()
        self.about: About | None = None
        self.announced: set[str] = set()  # servers that were lost
        self.free: SimpleQueue[Line] = SimpleQueue()
        where = [server for _ in range(LINES) for server in config.teacher.servers]
        self.lines = [Line(server, config.teacher.timeout, self._check_open) for server in where]
        for line in self.lines:
            self._begin(line)
        if self.about.micro_batch_tokens < config.optim.micro_batch_tokens:
            raise InputError(
                f"optim.micro_batch_tokens is {config.optim.micro_batch_tokens}, and the teacher servers take at most "
                f"{self.about.micro_batch_tokens}, which their configuration says. Lower it, or start them with more."
            )
        self.pool = ThreadPoolExecutor(len(self.lines), "teacher")

    def states(self, batches: Sequence[MicroBatch]) -> Iterator[Tensor]:
        """The hidden states of the counted tokens of each micro-batch, in order; (N, H_t) on the CPU.

        Raises RunError when a server is lost for the second time, does not come back, or refuses a request.
        """
        asked: deque[Future[Tensor]] = deque()
        try:
            for batch in batches:
                asked.append(self.pool.submit(self._states, batch.for_teacher))
                if len(asked) > AHEAD * len(self.lines):
                    yield asked.popleft().result()
            while asked:
                yield asked.popleft().result()
        finally:
            for future in asked:
                future.cancel()

    def head(self, device: torch.device) -> Head:
        """The whole head, on the device. Raises RunError as `states`."""
        tensors = self._on_free_line(lambda line: line.ask({"weight"}, do="head"))
        moved = {name: tensor.to(device) for name, tensor in tensors.items()}
        return Head(moved["weight"], moved.get("bias"), self.about.scale, self.about.soft_cap)

    def close(self) -> None:
        """Ends the lines, and the requests under way."""
        self.closed.set()
        for line in self.lines:
            line.hang_up()
        self.pool.shutdown(cancel_futures=True)
        for line in self.lines:
            line.close()

    def _begin(self, line: Line) -> None:
        """Opens a line for the first time, and compares what its server has with the configuration."""
        where = f"the teacher server {line.where}"
        try:
            about = self._compared(line.open())
        except AuthenticationError:
            raise InputError(f"{where} does not accept the key: {KEY} is another one there.") from None
        except ServerLost as lost:
            raise InputError(
                f"teacher.servers: {where} does not answer: {lost}. Start it there: {KEY}=... python -m "
                "opd.teacher_server --config FILE --listen HOST:PORT"
            ) from None
        except OtherTeacher as fault:
            raise InputError(
                f"{where} {fault}. Start it with the same pair file, or name its teacher in teacher.path."
            ) from None
        self.about = about
        self.free.put(line)

    def _compared(self, answer: dict[str, Any]) -> About:
        """What a server says. Raises OtherTeacher where it differs from the configuration or from another server."""
        about = About.of(answer)
        for name, expected in self.expected.items():
            if (got := about.facts.get(name)) != expected:
                raise OtherTeacher(f"has another teacher: its {name} is {got!r}, expected {expected!r}")
        if self.about is not None and about.weights != self.about.weights:
            raise OtherTeacher(f"has other weights: digest {about.weights}, expected {self.about.weights}")
        if self.about is not None and about != self.about:
            raise OtherTeacher(f"is set up otherwise than before, or than the others: {about}, expected {self.about}")
        return about

    def _states(self, batch: MicroBatch) -> Tensor:
        """The hidden states of one micro-batch; nobody is asked for those of no token."""
        tokens, hidden = len(batch.rows), self.expected["hidden size"]
        dtype = getattr(torch, self.section.dtype)
        if not tokens:
            return torch.empty(0, hidden, dtype=dtype)
        tensors = {"input_ids": batch.input_ids, "rows": batch.rows, "columns": batch.columns}
        tensors |= {} if batch.position_ids is None else {"position_ids": batch.position_ids}
        narrow = {name: tensor.int().contiguous() for name, tensor in tensors.items()}

        def ask(line: Line) -> Tensor:
            states_NH = line.ask({"states"}, narrow, do="states")["states"]
            if states_NH.shape != (tokens, hidden) or states_NH.dtype != dtype:
                raise ServerLost(f"it sent {tuple(states_NH.shape)} {states_NH.dtype}, not {(tokens, hidden)} {dtype}")
            return states_NH

        return self._on_free_line(ask)

    def _on_free_line(self, work: Callable[[Line], Any]) -> Any:
        """What `work` returns of the next free line; it is done again when the line was lost and has come back."""
        line = self.free.get()
        try:
            while True:
                try:
                    return work(line)
                except ServerLost as lost:
                    self._restore(line, lost)
        finally:
            self.free.put(line)

    def _restore(self, line: Line, lost: ServerLost) -> None:
        """Connects a lost line once more. Raises RunError the second time, and where the same teacher is not there."""
        where = f"the teacher server {line.where}"
        line.close()
        self._check_open()
        advice = "Checkpoints are intact; mend the cause (its own messages say more) and start the same command again."
        if line.was_lost:
            raise RunError(f"{where} is lost for the second time: {lost}. {advice}")
        line.was_lost = True
        with self.restoring:
            if line.where not in self.announced:
                self.announced.add(line.where)
                say(f"warning: {where} is lost: {lost}; connecting once more")
        try:
            self._compared(line.open())
        except (ServerLost, AuthenticationError, OtherTeacher) as fault:
            raise RunError(f"{where} was lost ({lost}) and does not come back: it {_reason(fault)}. {advice}") from None

    def _check_open(self) -> None:
        if self.closed.is_set():
            raise RunError("the run has ended, and its teacher servers are not asked any more.")


def _reason(fault: Exception) -> str:
    """Why a server cannot be used again, as the end of a sentence about it."""
    if isinstance(fault, AuthenticationError):
        return f"does not accept the key {KEY}"
    return str(fault) if isinstance(fault, OtherTeacher) else f"is not reached: {fault}"


class ServedTeacher:
    """Implements opd.teacher.Teacher. Without a `cache` the hidden states wait in host memory, without a limit."""

    def __init__(self, servers: Servers, whole_head: Head, cache: Cache | None = None):
        self.servers, self.whole_head = servers, whole_head
        self.cache = Cache() if cache is None else cache

    def hidden_states(
        self, batches: Sequence[MicroBatch], advance: Callable[[int, int], None] = lambda batches, tokens: None
    ) -> Cache:
        """As Teacher.hidden_states, in the teacher's dtype. Raises RunError as Servers.states and Cache.add do."""
        self.cache.clear()
        for batch, states_NH in zip(batches, self.servers.states(batches), strict=True):
            self.cache.add(states_NH)
            advance(1, len(batch.token_ids))
        return self.cache

    def head(self, vocab_size: int) -> Head:
        return replace(self.whole_head, vocab_size=vocab_size)

    def head_tensors(self) -> list[Tensor]:
        """What of the teacher lies on this process's device."""
        return [tensor for tensor in (self.whole_head.weight, self.whole_head.bias) if tensor is not None]

    @property
    def weights(self) -> str:
        """The digest of the teacher's weights."""
        return self.servers.about.weights

    @property
    def packed_row(self) -> int:
        return self.servers.about.packed_row

    def in_memory(self) -> "ServedTeacher":
        """As Teacher.in_memory."""
        return ServedTeacher(self.servers, self.whole_head)

    def close(self) -> None:
        """As Teacher.close."""
        self.servers.close()


def open_served(config: Config, outline: LanguageModel, device: torch.device, cache: Cache) -> ServedTeacher:
    """The teacher of teacher.servers. Raises InputError as Servers."""
    servers = Servers(config, outline)
    return ServedTeacher(servers, servers.head(device), cache)
