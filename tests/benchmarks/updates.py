"""Whole updates of this trainer outside of a run: rollouts, teacher, scoring and update, as opd.train makes them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd.batch import make_micro_batches
from opd.config import Config, load_config
from opd.data import Prompt, Rollout
from opd.engine.plain import TorchEngine
from opd.hooks import TokenWeighter, UniformWeighter
from opd.models import LanguageModel, tried
from opd.phases import Phases
from opd.progress import Watch
from opd.rollout import Decoding
from opd.rollout.local import TransformersSampler
from opd.step import Pair, train_step
from opd.teacher.local import LocalTeacher
from tip.config import TipConfig
from tip.weighter import TipWeighter

UPDATES = 1000  # of the learning rate's schedule, which is constant


def language_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, dtype: torch.dtype = torch.float32
) -> LanguageModel:
    eos_id = model.generation_config.eos_token_id
    return tried(LanguageModel(model, tokenizer, (eos_id,), dtype, name))


def weighter_of(name: str) -> TokenWeighter:
    """The weighter "plain", which keeps all tokens, or "soft_or", which keeps half of them."""
    return UniformWeighter() if name == "plain" else TipWeighter(TipConfig(rule="soft_or", retention=0.5))


def as_a_run() -> None:
    """Sets what a run sets in its process."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False


def config_of(*settings: str) -> Config:
    """The configuration of the embedded pair, of which updates read `optim`, `loss` and `engine`."""
    return load_config("configs/tiny.json", ["optim.warmup_steps=0", *settings])[0]


@dataclass
class Updates:
    """Updates of one pair on the same prompts."""

    student: LanguageModel
    teacher: LanguageModel
    prompts: Sequence[Sequence[int]]
    max_response_tokens: int
    config: Config
    weighter: TokenWeighter
    entered: Callable[[str], None] = lambda phase: None  # is told each phase once the models lie where it wants them
    left: Callable[[], None] = lambda: None  # is told the end of each phase before the models move
    step: int = 0

    def __post_init__(self) -> None:
        vocab = self.student.model.get_output_embeddings().out_features
        self.phases = Phases(self.student.device, self.config.engine.phases == 2, vllm=False)
        self.phases.add("student", self.student.model.parameters)
        head = set(self.teacher.head_scope.parameters())
        self.phases.add("teacher", lambda: [p for p in self.teacher.model.parameters() if p not in head], frozen=True)
        self.phases.add("teacher head", lambda: head, frozen=True)
        self.pair = Pair(self.student, LocalTeacher(self.teacher), vocab, self.config.loss)
        self.engine = TorchEngine(self.student, self.config, UPDATES, self.phases.content)
        self.phases.add("optimizer", self.engine.moments)
        self.sampler = TransformersSampler(self.student, self.config.rollout.batch_size)

    def enter(self, phase: str) -> None:
        self.left()
        self.phases.enter(phase)
        self.entered(phase)

    def rollouts(self, step: int) -> list[Rollout]:
        prompts = [Prompt(str(i), tuple(ids), None) for i, ids in enumerate(self.prompts)]
        seeds = [(0, "rollout", step, i) for i in range(len(prompts))]
        decoding = Decoding(1.0, 1.0, self.max_response_tokens)
        return self.sampler.sample(prompts, decoding, self.pair.vocab_size, seeds)

    def learn(self, rollouts: Sequence[Rollout], watch: Watch) -> dict[str, Any]:
        """The next update itself; returns its metrics."""
        self.step += 1
        limit, pad_id = self.config.optim.micro_batch_tokens, self.student.eos_ids[0]
        batches = make_micro_batches(rollouts, limit, pad_id, "keep", self.pair.packed_row)
        result = train_step(self.pair, self.engine, batches, self.weighter, step=self.step, seed=0, watch=watch)
        self.pair.teacher.cache.clear()
        return result.metrics

    def one(self) -> dict[str, float]:
        """One update: seconds of its phases and of the whole, those of the processor, its tokens and its loss."""
        watch, begin, cpu = Watch(self.student.device, self.enter), time.perf_counter(), time.process_time()
        with watch("rollout"):
            rollouts = self.rollouts(self.step + 1)
        metrics = self.learn(rollouts, watch)
        phases = {name: metrics[f"time/{name}"] for name in ("rollout", "teacher", "score", "update", "move")}
        tokens = sum(len(rollout.response_ids) for rollout in rollouts)
        whole = {"total": time.perf_counter() - begin, "cpu": time.process_time() - cpu}
        return {**phases, **whole, "tokens": tokens, "loss": metrics["loss/divergence"]}
