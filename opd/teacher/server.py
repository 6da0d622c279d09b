"""The side of the line that has the teacher: token ids in, hidden states of the counted positions out.

Every connection has a thread, and the model computes for one at a time. So a trainer that has two connections gets one
answer over the network while the next one is computed. Nothing is remembered between two requests, so any number of
runs can share a server, and one that is lost costs nothing but time.
"""

import json
import sys
import threading
from contextlib import suppress
from functools import partial
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from opd import models
from opd.batch import MicroBatch
from opd.config import Config
from opd.errors import first_line
from opd.models import LanguageModel
from opd.teacher.facts import PROTOCOL, facts_of, weights_digest
from opd.wire import HANDSHAKE, Address, admit, listen

MOST_CONNECTIONS = 256
MOST_WORDS = 2**16  # bytes of a request's JSON
MOST_IDS = 2**26  # bytes of a request's tensors


class Refused(Exception):
    """A request that the server does not answer; the text says why."""


class TeacherServer:
    """A teacher and what it answers. Every message is a JSON object; tensors follow it as one safetensors message."""

    def __init__(self, lm: LanguageModel, config: Config):
        self.lm, self.most_tokens = lm, config.optim.micro_batch_tokens
        self.computing = threading.Lock()
        head = models.head_of(lm.model, lm.model.get_output_embeddings().out_features)
        self.head = {"weight": head.weight} | ({} if head.bias is None else {"bias": head.bias})
        self.about = {
            "protocol": PROTOCOL,
            "facts": facts_of(lm, config.teacher),
            "weights": weights_digest(lm),
            "packed_row": lm.packed_row,
            "micro_batch_tokens": self.most_tokens,
            "scale": head.scale,
            "soft_cap": head.soft_cap,
        }

    def serve(self, address: Address, key: bytes) -> None:
        """Answers everybody who has the key, until the process ends. Raises InputError when the address is taken."""
        places = threading.BoundedSemaphore(MOST_CONNECTIONS)
        with listen(address, waiting=MOST_CONNECTIONS) as listener:
            _say(f"listening, with weights {self.about['weights']}")
            while True:
                connection = listener.accept()
                if places.acquire(blocking=False):
                    threading.Thread(target=self._attend, args=(connection, key, places), daemon=True).start()
                else:
                    connection.close()
                    _say(f"refused a connection (there are {MOST_CONNECTIONS})")

    def _attend(self, connection: Connection, key: bytes, places: threading.BoundedSemaphore) -> None:
        """One connection from its beginning to its end, in a thread of its own."""
        with places, connection:
            try:
                admit(connection, key, HANDSHAKE)
            except (AuthenticationError, OSError, EOFError) as error:
                return _say(f"refused a connection ({error})")
            self.answer_all(connection)

    def answer_all(self, connection: Connection) -> None:
        """Says what the teacher is, and answers one trainer until it ends or sends more than the limits."""
        with suppress(OSError, EOFError):
            _tell(connection, **self.about)
            while True:
                self._answer(connection)

    def _answer(self, connection: Connection) -> None:
        """Answers one request. A failure of the model is said, and costs neither the connection nor the server."""
        try:
            request = _object(connection.recv_bytes(MOST_WORDS))
            if request.get("do") == "head":
                return _give(connection, {name: tensor.detach().cpu() for name, tensor in self.head.items()})
            if request.get("do") != "states":
                raise Refused(f"do is {str(request.get('do'))[:80]!r}, expected 'head' or 'states'")
            batch = self._micro_batch(connection.recv_bytes(MOST_IDS))
            return _give(connection, {"states": self.hidden_states(batch)})
        except Refused as refused:
            return _tell(connection, refused=str(refused))
        except RuntimeError as error:  # of the model: such as memory that is full
            return _tell(connection, failed=f"{type(error).__name__}: {first_line(error)}")

    @torch.no_grad()
    def hidden_states(self, batch: MicroBatch) -> Tensor:
        """As LocalTeacher.hidden_states, of one micro-batch, on the CPU."""
        every_token = torch.arange(len(batch.rows))
        with self.computing:
            hidden_NH = self.lm.run(partial(self.lm.hidden_states, batch, every_token))
        return hidden_NH.cpu().contiguous()  # the next one may be computed meanwhile

    def _micro_batch(self, data: bytes) -> MicroBatch:
        """The micro-batch of a request. Raises Refused for one that the model cannot read."""
        try:
            tensors = {name: tensor.long() for name, tensor in load(data).items()}
            ids_BT, rows_N, columns_N = (tensors[name] for name in ("input_ids", "rows", "columns"))
        except (SafetensorError, KeyError, RuntimeError) as error:
            raise Refused(f"the tensors of a request cannot be read ({first_line(error)})") from None
        positions_BT = tensors.get("position_ids")
        self._check(ids_BT, positions_BT, rows_N, columns_N)
        return MicroBatch(ids_BT, positions_BT, rows_N, columns_N, {}, ())

    def _check(self, ids_BT: Tensor, positions_BT: Tensor | None, rows_N: Tensor, columns_N: Tensor) -> None:
        """Raises Refused for ids, positions or places out of bounds, on a GPU they would end the process."""
        if ids_BT.ndim != 2 or rows_N.ndim != 1 or rows_N.shape != columns_N.shape or not ids_BT.numel():
            raise Refused(
                f"shapes {[tuple(t.shape) for t in (ids_BT, rows_N, columns_N)]}, expected (B, T), (N,), (N,)"
            )
        if positions_BT is not None and positions_BT.shape != ids_BT.shape:
            raise Refused(f"position_ids has the shape {tuple(positions_BT.shape)}, expected that of input_ids")
        (rows, columns), longest = ids_BT.shape, self.lm.context
        if rows > 1 and rows * columns > self.most_tokens:
            raise Refused(f"{rows} x {columns} tokens, expected at most {self.most_tokens} (optim.micro_batch_tokens)")
        if longest is not None and columns > longest:
            raise Refused(f"rows of {columns} tokens, and the teacher was made for {longest} positions")
        for name, tensor, end in (
            ("input_ids", ids_BT, self.lm.model.get_input_embeddings().num_embeddings),
            ("position_ids", positions_BT, columns),
            ("rows", rows_N, rows),
            ("columns", columns_N, columns),
        ):
            if tensor is not None and tensor.numel() and not (int(tensor.min()) >= 0 and int(tensor.max()) < end):
                raise Refused(f"{name} go from {int(tensor.min())} to {int(tensor.max())}, expected 0 to {end - 1}")


def _object(data: bytes) -> dict[str, Any]:
    """A request. Raises Refused for what is no JSON object."""
    try:
        request = json.loads(data)
    except ValueError:
        request = None
    if not isinstance(request, dict):
        raise Refused("a request is no JSON object")
    return request


def _tell(connection: Connection, **answer: Any) -> None:
    connection.send_bytes(json.dumps(answer).encode())


def _give(connection: Connection, tensors: dict[str, Tensor]) -> None:
    """Sends tensors, announced so that who waits for the computation learns that it is done."""
    _tell(connection, done=True)
    connection.send_bytes(save(tensors))


def _say(text: str) -> None:
    print(f"teacher server: {text}", file=sys.stderr, flush=True)
