"""Supervised fine-tuning of the last layers of a pretrained model on word problems with rationales.

It is next-token cross entropy on the response tokens of fresh problems. The layers below the trained ones need no
gradient, which saves most of the backward pass. Every update draws its problems by its own number and the training
state is written every few updates, so a training that was stopped goes on as if it had not been.

Shapes: B problems, T positions, N response tokens, V vocabulary, H hidden.
"""

import math
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data import word_problems
from opd.engine.adamw import load_moments, named_moments
from opd.progress import Progress
from opd.seeds import derive_seed

SAVE_EVERY = 10  # updates
LAST_RATE = 0.05  # of the largest, at the end
IGNORED = -100  # the target of a position that is not learnt


@dataclass(frozen=True)
class Recipe:
    misled: bool  # whether the rationales have the student's misconceptions
    steps: int
    lr: float
    layers: int = 10  # how many of the last layers are trained, with the norm above them
    batch: int = 16
    warmup: int = 5


def finetune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    seed: int,
    state: Path,
    label: str,
) -> None:
    """Trains the model in place.

    Args:
        state: the file that a stopped training of the same model, recipe and seed goes on from. It stays at the end.
        label: for the console.
    """
    parameters = _trained(model, recipe.layers)
    optimizer = torch.optim.AdamW(parameters.values(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    first = _load(state, parameters, optimizer) if state.exists() else 0
    model.train()
    with Progress(label, recipe.steps, "updates") as progress:
        progress.advance(first)
        for step in range(first, recipe.steps):
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * rate(step, recipe)
            ids_BT, targets_BT = batch(tokenizer, recipe, seed, step)
            response_loss(model, ids_BT, targets_BT).backward()
            torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if (step + 1) % SAVE_EVERY == 0:
                _save(state, step + 1, parameters, optimizer)
            progress.advance(1)
    model.eval()


def rate(step: int, recipe: Recipe) -> float:
    """The share of the largest learning rate at update `step`, which counts from 0: linear warm-up, then cosine."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * progress))


def batch(tokenizer: PreTrainedTokenizerBase, recipe: Recipe, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Token ids and targets of update `step`, both (B, T) int64; a target stands where its token is predicted.

    No problem is one of the held-out ones.
    """
    rng = random.Random(derive_seed(seed, "finetune", int(recipe.misled), step))
    rows = []
    for problem in word_problems.problems(recipe.batch, rng.getrandbits(63), word_problems.held_out()):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": problem.text}], add_generation_prompt=True, return_dict=False
        )
        text = word_problems.rationale(problem, recipe.misled, rng)
        response = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        rows.append((prompt + response, [IGNORED] * (len(prompt) - 1) + response + [IGNORED]))
    pad = tokenizer.eos_token_id  # its targets are ignored, and it comes last, so no value of it matters
    return _padded([ids for ids, _ in rows], pad), _padded([targets for _, targets in rows], IGNORED)


def response_loss(model: PreTrainedModel, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
    """The mean cross entropy of the response tokens in nats; the head projects no other position."""
    learnt_BT = targets_BT != IGNORED
    hidden_BTH = model.get_decoder()(input_ids=ids_BT, use_cache=False).last_hidden_state
    logits_NV = model.get_output_embeddings()(hidden_BTH[learnt_BT])
    return torch.nn.functional.cross_entropy(logits_NV, targets_BT[learnt_BT])


def _trained(model: PreTrainedModel, layers: int) -> dict[str, torch.nn.Parameter]:
    """The parameters that are trained, by name; all others are frozen."""
    last = model.config.num_hidden_layers - layers
    model.requires_grad_(False)
    for layer in model.model.layers[last:]:
        layer.requires_grad_(True)
    model.model.norm.requires_grad_(True)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, value)


def _save(state: Path, step: int, parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.AdamW) -> None:
    """Writes the state of a training, whole or not at all."""
    weights = {f"weight.{name}": parameter.detach() for name, parameter in parameters.items()}
    temporary = state.with_name(f".{state.name}.tmp")
    save_file(weights | named_moments(optimizer, parameters), temporary, {"steps": str(step)})
    os.replace(temporary, state)


def _load(state: Path, parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.AdamW) -> int:
    """Restores what `_save` wrote; returns the number of updates that it holds."""
    with safe_open(state, framework="pt") as file, torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(file.get_tensor(f"weight.{name}"))
        moments = {key: file.get_tensor(key) for key in file.keys() if not key.startswith("weight.")}  # noqa: SIM118
        load_moments(optimizer, parameters, moments)
        return int(file.metadata()["steps"])
