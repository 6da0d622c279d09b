"""What a run writes after each update: its metrics, its diagnostics, samples of its rollouts, and a token dump."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from opd.config import Config
from opd.data import Rollout
from opd.hooks import Observer
from opd.progress import due
from opd.record import dump
from opd.record.metrics import MetricsLog
from opd.rollout.environment import Score
from opd.rollout.turns import LIMITS
from opd.seeds import generator
from opd.step import Update
from opd.verdicts import Graded, Verdicts

DIAGNOSTICS = {  # TokenStats field -> the metric that is its mean over all response tokens
    "student_entropy": "student/entropy",
    "teacher_entropy": "teacher/entropy",
    "reverse_kl": "divergence/reverse_kl",
    "forward_kl": "divergence/forward_kl",
    "top1_agree": "divergence/top1_agree",
}


@dataclass(frozen=True)
class Record:
    """Writes into the folder of a run. Only the first process has one."""

    run_dir: Path
    config: Config
    log: MetricsLog
    tokenizer: PreTrainedTokenizerBase
    verdicts: Verdicts  # of the latest update
    observer: Observer | None  # adds diagnostics, and columns of token dumps

    def update(self, rollouts: Sequence[Rollout], update: Update, around: Mapping[str, float]) -> str:
        """Writes everything about an update, and returns what the console tells of it.

        `around` are metrics that the run measured around the update.
        """
        step, graded = update.stats.step, self.verdicts.result()
        metrics = {**update.metrics, **rollout_metrics(rollouts, graded), **around}
        if due(step, self.config.log.diagnostics_every):
            metrics |= self._diagnose(update)
            self._show_samples(step, rollouts, graded.texts)
        if due(step, self.config.log.token_dump_every):
            self._dump(rollouts, update, graded)
        self.log.write(step, metrics)
        return console_line(metrics)

    def _diagnose(self, update: Update) -> dict[str, float]:
        """The means of the statistics and the observer's scalars; its histograms and warnings go to the log."""
        stats = update.stats
        if not len(stats.position):
            return {}
        metrics = {metric: vars(stats)[name].mean().item() for name, metric in DIAGNOSTICS.items()}
        if self.observer is None:
            return metrics
        diagnosis = self.observer.diagnose(stats, update.weights)
        for name, column in diagnosis.histograms.items():
            self.log.histogram(name, column, stats.step)
        for kind, message in diagnosis.warnings.items():
            self.log.warn(kind, f"step {stats.step}: {message}", stats.step)
        return metrics | diagnosis.scalars

    def _show_samples(self, step: int, rollouts: Sequence[Rollout], texts: Sequence[str]) -> None:
        for i, (rollout, text) in enumerate(list(zip(rollouts, texts, strict=True))[: self.config.log.samples]):
            prompt = self.tokenizer.decode(rollout.prompt.token_ids)
            sample = f"```\n{prompt}{text}\n```\nreference: `{rollout.prompt.answer}`"
            self.log.text(f"rollout/{i}", sample, step)

    def _dump(self, rollouts: Sequence[Rollout], update: Update, graded: Graded) -> None:
        step = update.stats.step
        columns = {"verdict": torch.tensor(graded.numbers())[update.stats.sequence_id]} if graded.judged else {}
        if self.observer:
            columns |= self.observer.columns(update.stats, update.weights, generator(self.config.seed, "dump", step))
        dumped = rollouts[: self.config.log.token_dump_rollouts]
        path = self.run_dir / "tokens" / f"step_{step:06d}.jsonl"
        dump.write(path, dumped, update.stats, update.weights, columns, self.tokenizer)


def console_line(metrics: Mapping[str, float]) -> str:
    """The metrics of an update that say at a glance whether the run goes well."""
    kept = metrics["tokens/kept"] / max(metrics["tokens/response"], 1.0)
    words = [f"loss {metrics['loss/divergence']:.4f}", f"kept {kept:.1%} of {metrics['tokens/response']:.0f} tokens"]
    if "rollout/accuracy" in metrics:
        words.append(f"right {metrics['rollout/accuracy']:.0%}")
    return ", ".join([*words, f"gradient {metrics['optim/grad_norm']:.3g}", f"{metrics['time/step']:.2g} s"])


def fields_to_measure(config: Config, observer: Observer | None, step: int) -> frozenset[str]:
    """The fields of TokenStats that the record of update `step` needs; every process measures the same ones."""
    fields: frozenset[str] = frozenset()
    if due(step, config.log.diagnostics_every):
        fields |= frozenset(DIAGNOSTICS) | (observer.needs if observer else frozenset())
    if due(step, config.log.token_dump_every):
        fields |= dump.STATS | dump.TOP5 | (observer.column_needs if observer else frozenset())
    return fields


def rollout_metrics(rollouts: Sequence[Rollout], graded: Graded) -> dict[str, float]:
    """Length and truncation of the responses, and their accuracy where the prompts have reference answers."""
    metrics = {
        "rollout/length_mean": statistics.fmean(r.model_tokens for r in rollouts),  # that the student sampled
        "rollout/truncated": statistics.fmean(r.is_cut for r in rollouts),
    }
    if graded.scores is not None:
        return metrics | _conversation_metrics(rollouts, graded.scores)
    if graded.verdicts is not None:
        metrics["rollout/ungraded"] = float(sum(verdict.correct is None for verdict in graded.verdicts))
        metrics["rollout/accuracy"] = statistics.fmean(verdict.correct is True for verdict in graded.verdicts)
    return metrics


def _conversation_metrics(rollouts: Sequence[Rollout], scores: Sequence[Score | None]) -> dict[str, float]:
    """What an environment says of conversations, how often each limit ended one, and how many tokens are its own."""
    known = [score for score in scores if score is not None]
    model_tokens = sum(rollout.model_tokens for rollout in rollouts)
    return {
        "rollout/accuracy": sum(score.correct for score in known) / len(scores),
        "rollout/share": sum(score.share for score in known) / len(scores),
        "rollout/delivered": sum(score.extracted is not None for score in known) / len(scores),
        "rollout/ungraded": float(len(scores) - len(known)),
        "rollout/turns_mean": statistics.fmean(len(r.turns) for r in rollouts),
        "rollout/tool_tokens": 1 - model_tokens / sum(len(r.response_ids) for r in rollouts),
        "rollout/environment_errors": float(sum(r.finish_reason == "error" for r in rollouts)),
        "rollout/neutralised": float(sum(r.neutralised for r in rollouts)),
        **{f"rollout/cut_by_{limit}": statistics.fmean(r.limit == limit for r in rollouts) for limit in LIMITS},
    }
