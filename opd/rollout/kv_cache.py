"""The key/value cache of responses that begin and end at different times.

Row k of the cache is a response, and its columns are positions. Shapes: B rows, A attention heads, T columns, D head
size. A row that began later, or with a shorter prompt, has columns at its left that the attention mask hides.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

ROOM = 64  # columns that a buffer has free at least when it is made


class BufferedLayer(DynamicLayer):
    """A DynamicLayer whose keys and values are views of buffers with free columns, so that a token copies only itself.

    DynamicLayer copies everything for every token. Under autocast, keys that a norm left in float32 are kept in the
    dtype in which attention computes.
    """

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if torch.is_autocast_enabled(key_states.device.type):
            key_states = key_states.to(torch.get_autocast_dtype(key_states.device.type))
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
            self.key_buffer, self.value_buffer = self.keys, self.values
        end = self.keys.shape[2] + key_states.shape[2]
        self.key_buffer, self.keys = _extended(self.key_buffer, self.keys, key_states, end)
        self.value_buffer, self.values = _extended(self.value_buffer, self.values, value_states, end)
        return self.keys, self.values

    @property
    def free_columns(self) -> int:
        """How many more columns its buffers have room for."""
        return self.key_buffer.shape[2] - self.keys.shape[2]

    def hold(self, columns: int) -> None:
        """Holds the first columns of its buffers, into which someone else has written (opd.rollout.graph)."""
        self.keys, self.values = self.key_buffer[:, :, :columns], self.value_buffer[:, :, :columns]

    def replace(self, keys: Tensor, values: Tensor) -> None:
        """Holds these keys and values, (B, A, T, D), instead of its own."""
        self.key_buffer, self.keys = keys, keys
        self.value_buffer, self.values = values, values


def _extended(buffer: Tensor, held: Tensor, new: Tensor, end: int) -> tuple[Tensor, Tensor]:
    """The buffer, or a larger copy of it, with the new columns behind the held ones; and the view of both."""
    begin = held.shape[2]
    if end > buffer.shape[2]:
        buffer = new.new_empty(*new.shape[:2], end + max(ROOM, end // 4), new.shape[3])
        buffer[:, :, :begin] = held
    buffer[:, :, begin:end] = new
    return buffer, buffer[:, :, :end]


def empty_cache(model: PreTrainedModel) -> DynamicCache:
    """A cache with the layers that the model asks for, buffered where they attend to everything."""
    cache = DynamicCache(config=model.config)
    cache.layers = [BufferedLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def can_be_joined(cache: DynamicCache) -> bool:
    """Whether all that the cache holds are keys and values by column, and no recurrent states."""
    return all(type(layer) in (BufferedLayer, DynamicSlidingWindowLayer) for layer in cache.layers)


def keep_rows(cache: DynamicCache, rows: Sequence[int], hidden: int, device: torch.device) -> None:
    """Keeps these rows, and drops the first `hidden` columns, which the mask hides in all of them.

    `hidden` is 0 where the cache cannot be joined.
    """
    index = torch.tensor(rows, device=device)
    for layer in cache.layers:
        if isinstance(layer, BufferedLayer):
            layer.replace(layer.keys[index, :, hidden:], layer.values[index, :, hidden:])
        elif isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length -= hidden
            held = min(layer.cumulative_length, layer.sliding_window - 1)
            first = layer.keys.shape[2] - held
            layer.keys, layer.values = layer.keys[index, :, first:], layer.values[index, :, first:]
        else:
            layer.reorder_cache(index)


def join(cache: DynamicCache, newer: DynamicCache) -> None:
    """Adds the rows of `newer`, which has no more columns, so that all rows end at the same column.

    Both can be joined.
    """
    for layer, other in zip(cache.layers, newer.layers, strict=True):
        keys, values = _joined(layer.keys, other.keys), _joined(layer.values, other.values)
        if isinstance(layer, BufferedLayer):
            layer.replace(keys, values)
        else:
            layer.keys, layer.values = keys, values


def _joined(held: Tensor, new: Tensor) -> Tensor:
    """(B + b, A, T, D) of (B, A, T, D) and (b, A, t, D), t <= T; the hidden columns of the new rows are 0."""
    hidden = held.shape[2] - new.shape[2]
    return torch.cat([held, torch.nn.functional.pad(new, (0, 0, hidden, 0))])
