"""Verdicts: whether the rollouts of an update are right. They are graded in a thread while the models work."""

import json
import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from opd import distributed
from opd.data import Rollout
from opd.grading import Grader, Verdict
from opd.rollout.environment import Score
from opd.rollout.turns import Dialogue


@dataclass(frozen=True)
class Graded:
    """The responses of an update as texts, and what the grader or the environment says of them."""

    texts: list[str]
    verdicts: list[Verdict] | None = None  # None where the prompts have no reference answers
    scores: list[Score | None] | None = None  # of an environment; None for one that it cannot judge

    @property
    def judged(self) -> bool:
        """Whether the grader or an environment has looked at the responses."""
        return self.verdicts is not None or self.scores is not None

    def numbers(self) -> list[float]:
        """1 right, 0 wrong, an environment's share, or NaN where nobody can tell."""
        if self.scores is not None:
            return [math.nan if score is None else score.share for score in self.scores]
        if self.verdicts is None:
            return [math.nan] * len(self.texts)
        return [math.nan if verdict.correct is None else float(verdict.correct) for verdict in self.verdicts]


class Verdicts:
    """Implements opd.scorer.Scorer for the column `verdict`.

    The first process grades all rollouts of an update, once. Nobody waits for it before somebody asks for the result.

    Args:
        answer_lines: as of Grader.grade.
        dialogue: with the environment that judges the rollouts in place of the grader, if there is one.
    """

    names = frozenset({"verdict"})

    def __init__(
        self, grader: Grader, tokenizer: PreTrainedTokenizerBase, answer_lines: bool, dialogue: Dialogue | None = None
    ):
        self.grader, self.tokenizer, self.answer_lines, self.dialogue = grader, tokenizer, answer_lines, dialogue
        self.thread = ThreadPoolExecutor(1)
        self.graded: Future[Graded] | None = None

    def begin(self, rollouts: Sequence[Rollout]) -> None:
        """Starts to grade all rollouts of an update, in the order of their sequence ids. Every process calls it."""
        if distributed.is_first():
            self.graded = self.thread.submit(self._grade, rollouts)

    def result(self) -> Graded:
        """Waits for the verdicts of the latest update. The first process alone has them."""
        return self.graded.result()

    def __call__(self, rollouts: Sequence[Rollout]) -> dict[str, list[Tensor]]:
        """As Scorer.__call__. The first process tells the others, so every process has to call it."""
        text = json.dumps(self.result().numbers()) if distributed.is_first() else ""
        numbers = json.loads(distributed.from_first(text))
        return {"verdict": [torch.full((len(r.response_ids),), numbers[r.sequence_id]) for r in rollouts]}

    def close(self) -> None:
        """Ends the thread, after what it grades at the moment."""
        self.thread.shutdown()

    def _grade(self, rollouts: Sequence[Rollout]) -> Graded:
        skip = self.dialogue is None  # in a conversation the special tokens show who speaks
        texts = [self.tokenizer.decode(r.response_ids, skip_special_tokens=skip) for r in rollouts]
        if self.dialogue:
            return Graded(texts, scores=[self.dialogue.score(rollout) for rollout in rollouts])
        if rollouts[0].prompt.answer is None:
            return Graded(texts)
        pairs = [(text, r.prompt.answer) for r, text in zip(rollouts, texts, strict=True)]
        return Graded(texts, self.grader.grade(pairs, self.answer_lines))
