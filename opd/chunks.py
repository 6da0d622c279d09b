"""Chunks of tokens: their logits, and the memory in which opd.loss works on them.

Shape suffixes: N tokens, V vocabulary (the compared ids), H hidden size of the model at hand, R rows of its head
(R >= V), c tokens of a chunk.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.util import find_spec

import torch
from torch import Tensor

DEFAULT_CHUNK_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Head:
    """The last layer of a model: logits = soft_cap * tanh((h W^T + b) * scale / soft_cap); no tanh without a soft cap.

    Only the first `vocab_size` rows take part, so that padded vocabulary rows get no probability and no gradient.
    """

    weight: Tensor  # (R, H), the parameter itself
    bias: Tensor | None = None  # (R,)
    scale: float = 1.0
    soft_cap: float | None = None
    vocab_size: int | None = None  # None: all rows

    @property
    def size(self) -> int:
        return self.vocab_size or self.weight.shape[0]


@dataclass(frozen=True)
class States:
    """The hidden states of a model and the head that projects them."""

    hidden_NH: Tensor
    head: Head

    @property
    def dtype(self) -> torch.dtype:
        """What the products are made in: a CPU has no product of a lower dtype with float32 output."""
        return torch.float32 if self.hidden_NH.device.type == "cpu" else self.hidden_NH.dtype

    @cached_property
    def weight_VH(self) -> Tensor:
        """The rows of the head that are compared, in the dtype of the products where that takes less memory.

        Cast for each chunk of tokens, a float32 head would cost a GPU more time than its bfloat16 products.
        """
        weight_VH = self.head.weight[: self.head.size]
        return weight_VH.to(self.dtype) if self.dtype.itemsize < weight_VH.dtype.itemsize else weight_VH

    def chunk(self, rows_c: Tensor, tile: int) -> "Chunk":
        return Chunk(self, rows_c, self.head, tile)


@dataclass(frozen=True)
class Chunk:
    """Some tokens of a model, and the head with the width of its tiles."""

    states: States
    rows_c: Tensor
    head: Head
    tile: int

    @cached_property
    def hidden_cH(self) -> Tensor:
        """The tokens' hidden states in the dtype of the products. Nothing reads them before the first product."""
        return self.states.hidden_NH[self.rows_c].to(self.states.dtype)

    def tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """Parts of the vocabulary, and the rows of the head there, in the dtype of the hidden states."""
        for start in range(0, self.head.size, self.tile):
            part = slice(start, min(start + self.tile, self.head.size))
            yield part, self.states.weight_VH[part].to(self.hidden_cH.dtype)

    def logits(self, out: Tensor, slope_cV: Tensor | None = None) -> Tensor:
        """Writes the logits, (c, V) float32, into `out`, and the derivative of a soft cap into `slope_cV`, if given."""
        for part, weight_tile in self.tiles():
            set_product(self.hidden_cH, weight_tile.T, out=out[:, part])
        if self.head.bias is not None:
            out += self.head.bias[: self.head.size]
        if self.head.scale != 1:
            out *= self.head.scale
        if self.head.soft_cap is not None:
            out.div_(self.head.soft_cap).tanh_()
            if slope_cV is not None:
                torch.square(out, out=slope_cV).neg_().add_(1)
            out.mul_(self.head.soft_cap)
        return out


class Workspace:
    """How the work is cut, and the memory it is done in.

    Tokens of a chunk and vocabulary rows of a tile are chosen so that all (c, V) buffers and the tile stay inside the
    byte budget. A buffer is taken under the name of what it will hold. It is allocated once, and a released one is
    taken again under another name. A tile is the slice of vocabulary rows that is multiplied at once. If either head
    has to be cast to a larger dtype, both are cut into tiles; else both are used whole.
    """

    def __init__(self, student: States, teacher: States, buffers: int, chunk_bytes: int):
        self.device = student.hidden_NH.device
        self.vocabulary = self.tile = student.head.size
        models = (student, teacher)
        if any(m.dtype.itemsize > m.head.weight.dtype.itemsize for m in models):
            width = max(m.hidden_NH.shape[1] for m in models)
            self.tile = max(1, min(self.vocabulary, chunk_bytes // 8 // (4 * width)))  # two may stand at once
            chunk_bytes = chunk_bytes * 3 // 4
        self.rows = max(1, min(chunk_bytes // (4 * self.vocabulary * buffers), len(student.hidden_NH)))
        self.tokens = 0  # of the chunk at hand
        self.taken: dict[str, Tensor] = {}
        self.free: list[Tensor] = []

    def chunks(self, rows_N: Tensor) -> Iterator[Tensor]:
        """The row numbers in parts of as many as fit, (c,); every part begins with all buffers free."""
        for rows_c in rows_N.split(self.rows):
            for name in list(self.taken):
                self.release(name)
            self.tokens = len(rows_c)
            yield rows_c

    def take(self, name: str) -> Tensor:
        """(c, V) float32, with whatever was there before."""
        if not self.free:
            self.free.append(torch.empty(self.rows, self.vocabulary, device=self.device))
        self.taken[name] = self.free.pop()
        return self.taken[name][: self.tokens]

    def release(self, name: str) -> None:
        self.free.append(self.taken.pop(name))


def set_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out (float32) = a @ b, accumulated in float32 whatever the dtype of a and b."""
    if a.dtype == torch.float32:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


def add_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out (float32) += a @ b, accumulated in float32 whatever the dtype of a and b."""
    if a.dtype == torch.float32:
        out.addmm_(a, b)
    else:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)


def sum_of(function: Callable[..., Tensor], *tensors_cV: Tensor) -> Tensor:
    """sum_v function(tensors), (c,); piece by piece, so that no (c, V) result of `function` stands in memory."""
    tokens, vocabulary = tensors_cV[0].shape
    width = max(1, (2**18 if tensors_cV[0].device.type == "cpu" else 2**22) // max(tokens, 1))
    parts = (slice(start, start + width) for start in range(0, vocabulary, width))
    return sum(function(*(tensor_cV[:, part] for tensor_cV in tensors_cV)).sum(-1) for part in parts)


def dot(a_cV: Tensor, b_cV: Tensor) -> Tensor:
    """sum_v a b, (c,).

    torch.linalg.vecdot makes a (c, V) product, and a batched matrix product sums less exactly (1.8e-5 at V = 151,936).
    """
    return sum_of(torch.mul, a_cV, b_cV)


@cache
def has_kernels(device_type: str) -> bool:
    """Whether opd.kernels run on such a device. They need CUDA, Triton and a C compiler."""
    if device_type != "cuda" or find_spec("triton") is None:
        return False
    from opd import kernels

    logits = torch.zeros(1, 2, device=device_type)
    try:
        kernels.write_gradient(logits, logits, kernels.row_sums(logits, logits), None, torch.empty_like(logits))
    except Exception as error:  # whatever a compiler may say
        warnings.warn(
            f"Triton's kernels cannot be compiled here, so the loss runs without them, which takes several times as "
            f"long: {str(error).splitlines()[0]}. Install a C compiler.",
            stacklevel=2,
        )
        return False
    return True
