"""Trains a model of the pair `planning` from nothing: conversations with tools, in which the model's turns are learnt.

Muon takes the matrices between embedding and head, and AdamW the rest. With AdamW alone the copying from the tools'
answers is learnt several times slower.
"""

import random
import sys
from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from data.tiny.recipe import Recipe, new_model
from opd.rollout.replies import Replies

ADAM_RATE = 4e-3
LAST_RATE = 0.02  # of the largest, at the end


def train_model(
    name: str, task: ModuleType, recipe: Recipe, tokenizer: PreTrainedTokenizerFast, seed: int
) -> Qwen3ForCausalLM:
    """Next-token cross entropy on what is learnt of fresh conversations (data.tiny.trip.conversation)."""
    model, rng = new_model(recipe, tokenizer, seed), random.Random(seed)
    draw = _drawer(task, recipe, tokenizer, rng)
    optimizers = _optimizers(model, recipe.lr)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, _rate(recipe)) for optimizer in optimizers]
    model.train()
    for _ in tqdm(range(recipe.steps), desc=f"tiny {name}", unit="step", disable=not sys.stderr.isatty()):
        rows = [draw() for _ in range(recipe.batch)]
        ids_BT = _padded([ids for ids, _ in rows], tokenizer.pad_token_id)
        learnt_BT = _padded([learnt for _, learnt in rows], 0)[:, 1:].bool()
        hidden_BTH = model.model(input_ids=ids_BT, use_cache=False).last_hidden_state[:, :-1]
        logits_NV = model.lm_head(hidden_BTH[learnt_BT])
        loss = torch.nn.functional.cross_entropy(logits_NV, ids_BT[:, 1:][learnt_BT])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
    return model.eval()


def _optimizers(model: Qwen3ForCausalLM, rate: float) -> list[torch.optim.Optimizer]:
    inside = {name for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name}
    matrices = [p for name, p in model.named_parameters() if name in inside]
    others = [p for name, p in model.named_parameters() if name not in inside]
    return [
        torch.optim.Muon(matrices, lr=rate, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def _rate(recipe: Recipe) -> Callable[[int], float]:
    def rate(step: int) -> float:
        if step < recipe.warmup:
            return (step + 1) / recipe.warmup
        return 1 - (1 - LAST_RATE) * (step - recipe.warmup) / (recipe.steps - recipe.warmup)

    return rate


def _drawer(
    task: ModuleType, recipe: Recipe, tokenizer: PreTrainedTokenizerFast, rng: random.Random
) -> Callable[[], tuple[list[int], list[int]]]:
    """A function that draws a conversation: its token ids, and for each of them 1 where it is learnt."""
    replies = Replies(tokenizer, [tokenizer.eos_token_id], {})

    @cache
    def prompt_ids(text: str) -> list[int]:
        messages = [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    @cache
    def piece_ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    @cache
    def reply_ids(text: str) -> list[int]:
        return list(replies.ids([{"role": "tool", "content": text}])[0])

    def draw() -> tuple[list[int], list[int]]:
        row = task.row(rng)
        ids = list(prompt_ids(row["problem"]))
        learnt = [0] * len(ids)
        for said in task.conversation(row, recipe.speaker, rng):
            if isinstance(said, str):
                parts = [(reply_ids(said), 0)]
            else:
                parts = [(piece_ids(piece.text), int(piece.learnt)) for piece in said]
            for part, is_learnt in parts:
                ids += part
                learnt += [is_learnt] * len(part)
        return ids, learnt

    return draw


def _padded(rows: list[list[int]], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, value)
