"""Scorers: columns of TokenStats that neither model gives, such as a process reward or a label of a span.

A pair file names one in `rollout.scorer`, as "package.module:Class" with the keyword arguments of that class. A
weighter that has a column's name in its `needs` reads it as `stats.extra[name]`.
"""

import pkgutil
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from opd.batch import MicroBatch
from opd.config import ScorerSection
from opd.data import Rollout
from opd.errors import InputError, first_line
from opd.hooks import FIELDS


class Scorer(Protocol):
    """Scores rollouts before the update, from outside of both models."""

    @property
    def names(self) -> frozenset[str]:
        """The columns that it gives. It is asked only in an update where the weighter or a diagnostic needs one."""
        ...

    def __call__(self, rollouts: Sequence[Rollout]) -> Mapping[str, Sequence[Tensor]]:
        """Per name and rollout one float for every token of the response, (len(response_ids),); NaN is unknown.

        Every process asks with its own share of the update's rollouts, which may be none. An answer depends on the
        rollouts alone, or a stopped run does not continue as an unbroken one.
        """
        ...


def load_scorer(section: ScorerSection) -> Scorer:
    """The scorer that a pair file names. Raises InputError for one that cannot be found or made."""
    try:
        scorer: Scorer = pkgutil.resolve_name(section.name)(**section.settings)
        names = scorer.names
    except Exception as error:  # it is code of its own, which can raise anything
        raise InputError(
            f"rollout.scorer {section.name!r} cannot be made of settings {section.settings} "
            f"({type(error).__name__}: {first_line(error)}). Expected a class of a module that Python finds, as "
            "package.module:Class, with these keyword arguments and a frozenset `names`."
        ) from error
    if not isinstance(names, frozenset) or not names or names & FIELDS:
        raise InputError(
            f"rollout.scorer {section.name!r} has the names {names!r}, expected a frozenset of names of columns, and "
            "none of a field of opd.hooks.TokenStats."
        )
    return scorer


def token_columns(scorer: Scorer, batches: Sequence[MicroBatch]) -> list[dict[str, Tensor]]:
    """The (N,) float32 columns of every micro-batch, from one call of the scorer.

    Raises ValueError, with expected and got, when the answer is not usable.
    """
    rollouts = [rollout for batch in batches for rollout in batch.rollouts]
    answer = scorer(rollouts)
    if set(answer) != scorer.names:
        raise ValueError(f"a scorer gives the columns {sorted(answer)}, expected {sorted(scorer.names)}")
    by_id = {name: _checked(name, columns, rollouts) for name, columns in answer.items()}
    return [{name: _of_tokens(batch, columns) for name, columns in by_id.items()} for batch in batches]


def _checked(name: str, columns: Sequence[Tensor], rollouts: Sequence[Rollout]) -> dict[int, Tensor]:
    """The scores of each rollout by its sequence id."""
    if len(columns) != len(rollouts):
        raise ValueError(f"{name} has {len(columns)} columns, expected {len(rollouts)}: one per rollout")
    for rollout, column in zip(rollouts, columns, strict=True):
        where = f"{name} of rollout {rollout.sequence_id}"
        expected = (len(rollout.response_ids),)
        if tuple(column.shape) != expected:
            raise ValueError(f"{where} has shape {tuple(column.shape)}, expected {expected}: one per response token")
        if not column.is_floating_point() or column.requires_grad:
            raise ValueError(f"{where} has dtype {column.dtype}, expected a float dtype and a detached tensor")
        if column.isinf().any():
            raise ValueError(f"{where} has {int(column.isinf().sum())} infinite values, expected finite ones or NaN")
    return {r.sequence_id: column.float().cpu() for r, column in zip(rollouts, columns, strict=True)}


def _of_tokens(batch: MicroBatch, columns: Mapping[int, Tensor]) -> Tensor:
    """The scores of a micro-batch's counted tokens."""
    scores_N = torch.full(batch.position.shape, torch.nan)
    for rollout in batch.rollouts:
        rows_N = batch.sequence_id == rollout.sequence_id
        scores_N[rows_N] = columns[rollout.sequence_id][batch.position[rows_N]]
    return scores_N
