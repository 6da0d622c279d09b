"""Token weighters in TRL's trainers, so that TRL trains on the tokens that a rule keeps.

    weighter = TipWeighter(TipConfig(rule="soft_or", retention=0.5))
    SelectingDistillationTrainer(weighter=weighter, model=..., teacher_model=..., args=..., train_dataset=...).train()

It runs where TRL is installed (requirements-trl.txt, requirements-bench.txt), and nothing else here imports it. A
trainer is TRL's own but for the mask of its tokens. SelectingGRPOTrainer has no teacher, so its weighter reads the
student's entropy and nothing else. Both run in one process, because TRL's processes do not show each other their
statistics.

Shapes: B rollouts, P positions of a prompt, C of a completion; N tokens that count; V ids.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from trl import DistillationTrainer, GRPOTrainer

from opd.errors import InputError
from opd.hooks import STAT_FIELDS, TokenStats, TokenWeighter
from opd.loss import token_stats
from opd.models import head_of
from opd.seeds import generator

ENTROPY = frozenset({"student_entropy"})


class SelectingDistillationTrainer(DistillationTrainer):
    """TRL's distillation on the tokens that a weighter keeps.

    Statistics and selection are of all rollouts of an update, and the loss is a mean over the kept tokens. The
    statistics are those at temperature 1. Evaluation is on all tokens.

    Raises:
        InputError: the weighter reads what TRL does not have, or there are several processes.
    """

    def __init__(self, *arguments: Any, weighter: TokenWeighter, **more: Any):
        super().__init__(*arguments, **more)
        _check(self, weighter, STAT_FIELDS, "statistics of student and teacher")
        self.weighter = weighter

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's rollouts of an update, with a mask that holds the kept tokens alone, and their number."""
        batch = super()._generate_and_score_completions(inputs)
        if not self.model.training:
            return batch
        counted_BC = (batch["completion_mask"] * batch.get("tool_mask", 1)).bool()
        columns = self._statistics(batch, counted_BC) if self.weighter.needs else {}
        weights_BC = _weights(self, _token_stats(self, batch, counted_BC, columns), counted_BC)
        if not ((weights_BC == 0) | (weights_BC == 1)).all():
            raise ValueError("the weights of the kept tokens differ, and TRL's distillation takes a mask: expected one")
        batch["tool_mask"] = weights_BC.to(batch["completion_mask"].dtype)
        batch["num_items_in_batch"] = batch["tool_mask"].sum()
        return batch

    @torch.no_grad()
    def _statistics(self, batch: Mapping[str, Any], counted_BC: Tensor) -> dict[str, Tensor]:
        """The (N,) columns that the weighter reads, by the two models' states before their heads."""
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        student, teacher = (self.accelerator.unwrap_model(model) for model in (self.model, self.teacher_model))
        size = min(lm.get_output_embeddings().weight.shape[0] for lm in (student, teacher))
        parts: list[dict[str, Tensor]] = []
        for rows in torch.arange(len(ids)).split(self.args.per_device_train_batch_size):
            states = []
            for lm in (student, teacher):
                hidden = lm.base_model(input_ids=ids[rows], attention_mask=attention[rows], use_cache=False)
                states.append(hidden.last_hidden_state[:, -counted_BC.shape[1] - 1 : -1][counted_BC[rows]])
            heads = head_of(student, size), head_of(teacher, size)
            tokens = batch["completion_ids"][rows][counted_BC[rows]]
            parts.append(token_stats(states[0], heads[0], states[1], heads[1], tokens, self.weighter.needs))
        return {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}


class SelectingGRPOTrainer(GRPOTrainer):
    """TRL's GRPO with its policy gradient on the tokens that a weighter keeps.

    TRL's own mask of tokens of high entropy (`top_entropy_quantile`) makes room for the weighter's. Its denominator
    stays the number of all tokens, as with that mask. A micro-batch is weighed by itself, so take a rule that counts in
    each rollout. Evaluation is on all tokens.

    Raises:
        InputError: the weighter reads more than the student's entropy, or there are several processes.
    """

    def __init__(self, *arguments: Any, weighter: TokenWeighter, **more: Any):
        super().__init__(*arguments, **more)
        _check(self, weighter, ENTROPY, "the student's entropy and has no teacher. Take entropy_topk, for example")
        self.weighter = weighter
        self.top_entropy_quantile = 0.0  # below 1 TRL asks for a mask; the number itself is not used any more

    def get_high_entropy_mask(self, entropies: Tensor, mask: Tensor, threshold: float) -> Tensor:
        """The weights of the tokens relative to the largest one, (B, C)."""
        if not self.model.training:
            return mask.bool()
        counted_BC = mask.bool()
        columns = {"student_entropy": entropies[counted_BC].detach().float().cpu()}
        batch = {"completion_ids": counted_BC.long()}
        return _weights(self, _token_stats(self, batch, counted_BC, columns), counted_BC)


def _check(trainer: Any, weighter: TokenWeighter, known: frozenset[str], what: str) -> None:
    if unknown := sorted(weighter.needs - known):
        raise InputError(f"the weighter {weighter} needs {unknown[0]!r}, and {type(trainer).__name__} gives {what}.")
    if trainer.accelerator.num_processes > 1:
        raise InputError(
            f"{type(trainer).__name__} selects in one process, got {trainer.accelerator.num_processes}. Start one, or "
            "use python -m tip.train, which selects over all processes."
        )


def _token_stats(
    trainer: Any, batch: Mapping[str, Any], counted_BC: Tensor, columns: Mapping[str, Tensor]
) -> TokenStats:
    """The rows of the counted tokens, by rollout and position; what TRL does not know is as in a single turn."""
    counted_BC = counted_BC.cpu()
    rollout_N, position_N = counted_BC.nonzero(as_tuple=True)
    prompts = batch.get("prompt_ids")
    prompt_B = torch.arange(len(counted_BC)) if prompts is None else prompts.cpu().unique(dim=0, return_inverse=True)[1]
    zeros = torch.zeros_like(rollout_N)
    return TokenStats(
        sequence_id=rollout_N,
        position=position_N,
        turn=zeros,
        token_id=batch["completion_ids"].cpu()[counted_BC],
        prompt_id=prompt_B[rollout_N],
        length=counted_BC.sum(1)[rollout_N],
        truncated=zeros,
        verdict=torch.full(rollout_N.shape, torch.nan),
        vocab_size=trainer.accelerator.unwrap_model(trainer.model).get_output_embeddings().weight.shape[0],
        step=trainer.state.global_step + 1,
        **columns,
    )


def _weights(trainer: Any, stats: TokenStats, counted_BC: Tensor) -> Tensor:
    """The weighter's answer as relative weights at the places of the tokens, (B, C) float32, and 0 elsewhere."""
    weights = trainer.weighter(stats, generator(trainer.args.seed, "weighter", stats.step, trainer._step))
    weights.check(stats)
    if weights.forward_share is not None:
        raise ValueError("the weighter gives a share of forward KL, which TRL's losses do not have: expected none")
    weights_BC = torch.zeros(counted_BC.shape, device=counted_BC.device)
    weights_BC[counted_BC] = weights.relative()[0].to(counted_BC.device)
    return weights_BC
