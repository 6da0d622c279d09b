"""What survives of divergences, scores and selections when the teacher shows only a part of its distribution.

A served teacher shows its k likeliest ids and their probabilities, or the probability of the sampled token alone. With
the top k all other ids are one class, the tail, which makes every divergence a lower bound. With the sampled token a
divergence is an unbiased estimate from that one token. Both are functions of opd.divergence. The same tokens are scored
with the whole teacher and with each such part of it, and the rules select from both.

Shapes: N scored tokens of an update; c tokens at a time; V compared ids; H hidden.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from opd import divergence
from opd.batch import MicroBatch
from opd.hooks import TokenStats
from opd.models import head_logits
from opd.progress import Progress
from opd.seeds import generator
from opd.step import Pair, TokenTable
from tip.config import TipConfig
from tip.diagnostics import jaccard, keep_by_every_rule, rank_correlation
from tip.divergences import DIVERGENCES, divergence_of, fields_of
from tip.results.grid import grid
from tip.rules import RULES
from tip.scores import Axes

BUFFERS = 8  # (c, V) float32 tensors that stand at once
SAMPLED = "sampled token"
MASSES = ("teacher_mass", "student_mass")  # of the ids that are shown


@torch.no_grad()
def topk_views(
    pair: Pair, batches: Sequence[MicroBatch], stats: TokenStats, ks: Sequence[int]
) -> dict[str, TokenStats]:
    """The statistics as a teacher gives them that shows its k likeliest ids: `top k` -> `stats` with its divergences.

    `extra` holds both models' mass on these ids. `stats` is of the same micro-batches.
    """
    table = TokenTable(batches, [torch.zeros(0)] * len(batches))
    with Progress("teacher's top k", len(batches), "micro-batches") as progress:
        for batch, _, columns in table:
            parts = list(_columns(pair, batch, ks))
            columns |= {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            progress.advance(1, len(batch.token_ids))
    extra, views = table.gather(pair.vocab_size, stats.step).extra, {}
    for k in ks:
        of_k = {name: extra[f"{name} {k}"] for name in (*DIVERGENCES, *MASSES)}
        masses = {name: of_k.pop(name) for name in MASSES}
        views[f"top {k}"] = replace(stats, **of_k, extra=masses)
    return views


def _columns(pair: Pair, batch: MicroBatch, ks: Sequence[int]) -> Iterator[dict[str, Tensor]]:
    """Of some tokens at a time: (c,) columns named `<divergence> <k>` and `<mass> <k>`, on the CPU."""
    (teacher_hidden_NH,) = pair.teacher.hidden_states([batch])
    student_hidden_NH = pair.student.hidden_states(batch, torch.arange(len(batch.token_ids)))
    at_once = max(1, pair.loss.chunk_bytes // (4 * pair.vocab_size * BUFFERS))
    for student_cH, teacher_cH in zip(student_hidden_NH.split(at_once), teacher_hidden_NH.split(at_once), strict=True):
        student_cV = head_logits(student_cH.float(), pair.student.head(pair.vocab_size))
        teacher_cV = head_logits(teacher_cH.to(student_cH.device).float(), pair.teacher.head(pair.vocab_size))
        columns = {}
        for k in ks:
            classes = divergence.topk_classes(student_cV, teacher_cV, k)
            columns |= {
                f"reverse_kl {k}": divergence.reverse_kl(*classes),
                f"forward_kl {k}": divergence.forward_kl(*classes),
                f"jsd {k}": divergence.jsd(*classes, pair.loss.jsd_beta),
                f"total_variation {k}": divergence.total_variation(*classes),
            }
            for name, log_p in zip(("student_mass", "teacher_mass"), classes, strict=True):
                columns[f"{name} {k}"] = log_p[:, :k].exp().sum(-1)
        yield {name: column.clamp(min=0).cpu() for name, column in columns.items()}


def sampled_view(stats: TokenStats, jsd_beta: float) -> TokenStats:
    """The statistics as a teacher gives them that shows the probability of the sampled token alone.

    `stats` has student_logprob and teacher_logprob.
    """
    logprobs = stats.student_logprob, stats.teacher_logprob
    return replace(
        stats,
        reverse_kl=divergence.sampled_reverse_kl(*logprobs),
        forward_kl=divergence.sampled_forward_kl(*logprobs),
        jsd=divergence.sampled_jsd(*logprobs, jsd_beta).clamp(min=0),
        total_variation=divergence.sampled_total_variation(*logprobs),
        extra={name: logprob.exp() for name, logprob in zip(MASSES, reversed(logprobs), strict=True)},
    )


def rules_of_divergence(axis: str) -> list[str]:
    """The rules that take the top of a score of divergences and entropy: a partial teacher gives all that they read."""
    known = DIVERGENCES.keys() | {"student_entropy"}
    needs = {name: fields_of(rule.needs, axis) for name, rule in RULES.items() if rule.mechanic == "top"}
    return [name for name, fields in needs.items() if fields & DIVERGENCES.keys() and fields <= known]


def survival(
    stats: TokenStats, views: dict[str, TokenStats], config: TipConfig, seed: int, retentions: tuple[float, ...]
) -> dict[str, Any]:
    """Per view: the mass that is shown, what is left of d and how wrong it is; per rule its scores and selections."""
    d_N, names, found = divergence_of(stats, config.axis).double(), rules_of_divergence(config.axis), {}
    whole = keep_by_every_rule(stats, config, retentions, generator(seed, "partial"), names)
    for label, view in views.items():
        shown_N = divergence_of(view, config.axis).double()
        error_N = (shown_N - d_N).abs()
        kept = keep_by_every_rule(view, config, retentions, generator(seed, "partial"), names)
        found[label] = {
            **{name: view.extra[name].double().mean().item() for name in MASSES},
            "divergence": (shown_N.sum() / d_N.sum().clamp(min=1e-300)).item(),  # its share of the true sum
            "mean_error": error_N.mean().item(),
            "largest_error": error_N.max().item(),
            "rules": {
                name: {
                    "rank_correlation": rank_correlation(*(_score(name, s, config) for s in (view, stats))),
                    "jaccard": {f"{r:g}": jaccard(kept[f"{name}@{r:g}"], whole[f"{name}@{r:g}"]) for r in retentions},
                }
                for name in names
            },
        }
    return found


def _score(name: str, stats: TokenStats, config: TipConfig) -> Tensor:
    return RULES[name].score(stats, Axes(stats, config))


def table(found: dict[str, Any], axis: str) -> str:
    """The result of `survival` as Markdown."""
    d, share = DIVERGENCES[axis], "{:.1f} %".format
    rows = [
        (
            label,
            *(share(100 * view[name]) for name in MASSES),
            share(100 * view["divergence"]),
            *(d.shown(view[name]) for name in ("mean_error", "largest_error")),
        )
        for label, view in found.items()
    ]
    header = ("the teacher shows", "its mass there", "student's mass", f"{d.title} left", "mean error", "largest error")
    parts = [f"a teacher that shows only a part of its distribution\n\n{grid(header, rows)}"]
    first = next(iter(found.values()))["rules"]
    retentions = next(iter(first.values()))["jaccard"]
    rows = [
        (name, label, f"{rule['rank_correlation']:.3f}", *(f"{overlap:.2f}" for overlap in rule["jaccard"].values()))
        for name in first
        for label, rule in ((label, view["rules"][name]) for label, view in found.items())
    ]
    header = ("rule", "the teacher shows", "rank correlation of scores", *(f"Jaccard at {r}" for r in retentions))
    parts.append(f"its scores and selections against those of the whole teacher\n\n{grid(header, rows)}")
    return "\n\n".join(parts)
