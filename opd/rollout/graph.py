"""One token of every response as a CUDA graph, for opd.rollout.decode.

A model of thirty layers launches about a thousand small kernels for a token, and a processor needs longer to launch
them than a GPU to run them. A graph is launched at once. It reads and writes tensors that stay where they are, so it
serves as long as no response leaves or enters and the buffers of the cache have free columns.

Shapes as in opd.rollout.decode; C columns of the buffers, of which the first T are in use.
"""

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from opd.models import LanguageModel
from opd.rollout.kv_cache import BufferedLayer

MASKED = ("sdpa", "eager")  # attention that takes a mask of four dimensions


class FixedLayer(DynamicLayer):
    """The whole buffers of a BufferedLayer, into which the next token goes at a column that a tensor names.

    The mask hides columns without a token, but not what is no number.
    """

    def __init__(self, buffered: BufferedLayer, column_1: Tensor):
        super().__init__()
        held = buffered.keys.shape[2]
        buffered.key_buffer[:, :, held:], buffered.value_buffer[:, :, held:] = 0, 0
        self.keys, self.values, self.is_initialized = buffered.key_buffer, buffered.value_buffer, True
        self.column_1 = column_1

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.column_1, key_states.to(self.keys.dtype))
        self.values.index_copy_(2, self.column_1, value_states.to(self.values.dtype))
        return self.keys, self.values


class FixedStep:
    """The forward pass of one more token of every response, over tensors that stay where they are.

    Args:
        lengths: of every response the tokens of prompt and response, the one just drawn included.
        held: T, columns that the cache holds; `free` says for how many more it has room, and is above 0.
        capture: returns what does the same work as its argument; `captured` makes a CUDA graph of it.
    """

    def __init__(
        self,
        lm: LanguageModel,
        cache: DynamicCache,
        lengths: Sequence[int],
        held: int,
        capture: Callable[[Callable[[], None]], Callable[[], None]],
    ):
        device, columns = lm.device, held + cache.layers[0].free_columns
        self.lm, self.free = lm, columns - held
        self.column_1 = torch.tensor([held], device=device)
        self.ids_B1 = torch.full((len(lengths), 1), lm.eos_ids[0], device=device)
        length_B = torch.tensor(lengths, device=device)
        self.position_B1 = length_B[:, None] - 1
        column_C = torch.arange(columns, device=device)
        hidden_BC = (column_C > held) | (column_C < held + 1 - length_B[:, None])
        mask_BC = torch.zeros(hidden_BC.shape, dtype=lm.compute_dtype, device=device)
        self.mask_B11C = mask_BC.masked_fill_(hidden_BC, -torch.inf)[:, None, None]
        self.cache = DynamicCache()
        self.cache.layers = [FixedLayer(layer, self.column_1) for layer in cache.layers]
        self.logits_BV = torch.zeros(0)
        self.work = capture(self._forward)

    def __call__(self, tokens: Sequence[int]) -> Tensor:
        """The (B, V) logits behind the last token of every response; the next call overwrites them."""
        self.ids_B1.copy_(torch.tensor(tokens)[:, None])
        self.mask_B11C.index_fill_(3, self.column_1, 0)
        self.work()
        self.column_1 += 1
        self.position_B1 += 1
        self.free -= 1
        return self.logits_BV

    def _forward(self) -> None:
        self.logits_BV = self.lm.model(
            input_ids=self.ids_B1,
            attention_mask=self.mask_B11C,
            position_ids=self.position_B1,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]


def can_be_fixed(lm: LanguageModel, cache: DynamicCache) -> bool:
    """Whether a FixedStep can take the place of the model's own forward pass, and a GPU gains by it.

    It cannot where the buffers of the cache are full, which the model's own pass enlarges.
    """
    takes_mask = lm.model.config._attn_implementation in MASKED
    return lm.device.type == "cuda" and takes_mask and not lm.sharded and has_free_columns(cache)


def has_free_columns(cache: DynamicCache) -> bool:
    """Whether all layers have buffers, with room for one more token."""
    return all(type(layer) is BufferedLayer and layer.free_columns > 0 for layer in cache.layers)


def captured(work: Callable[[], None]) -> Callable[[], None]:
    """A CUDA graph of some work, which runs once before. Raises RuntimeError where the work waits for the GPU."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def try_to_fix(lm: LanguageModel, cache: DynamicCache, lengths: Sequence[int], held: int) -> FixedStep | None:
    """A FixedStep as a CUDA graph; None, with a warning, for a model that cannot be captured."""
    try:
        return FixedStep(lm, cache, lengths, held, captured)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        warnings.warn(
            f"The {lm.name} is sampled without CUDA graphs, which takes several times as long: "
            f"{str(error).splitlines()[0]}",
            stacklevel=2,
        )
        return None
