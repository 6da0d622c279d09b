"""The responses of all processes: each generates a share, and each needs all of them."""

from collections.abc import Callable, Collection, Sequence

import torch

from opd import distributed
from opd.data import Prompt, Rollout


def all_rollouts(
    prompts: Sequence[Prompt],
    responses: dict[int, tuple[int, ...]],
    eos_ids: Collection[int],
    advance: Callable[[int, int], None],
) -> list[Rollout]:
    """The rollouts of all prompts, in order.

    Args:
        responses: this process's share, place in `prompts` -> token ids.
        advance: told what the other processes have generated.
    """
    everyone = _gathered(responses)
    if distributed.world_size() > 1:
        tokens_here = sum(map(len, responses.values()))
        advance(len(prompts) - len(responses), sum(map(len, everyone.values())) - tokens_here)
    return [
        Rollout(place, prompt, everyone[place], "stop" if everyone[place][-1] in eos_ids else "length")
        for place, prompt in enumerate(prompts)
    ]


def _gathered(responses: dict[int, tuple[int, ...]]) -> dict[int, tuple[int, ...]]:
    """Responses by place, of all processes. They travel as one row per token."""
    places = [place for place, ids in responses.items() for _ in ids]
    tokens = [token for ids in responses.values() for token in ids]
    columns = {"place": torch.tensor(places, dtype=torch.long), "token": torch.tensor(tokens, dtype=torch.long)}
    joined, _ = distributed.gather_rows(columns)
    everyone: dict[int, list[int]] = {}
    for place, token in zip(joined["place"].tolist(), joined["token"].tolist(), strict=True):
        everyone.setdefault(place, []).append(token)
    return {place: tuple(ids) for place, ids in everyone.items()}
