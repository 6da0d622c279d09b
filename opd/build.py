"""Builds a run from its configuration: models, prompts, benchmarks, engine, sampler, record."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from opd import adapters, distributed, models, privileged
from opd.benchmarks import (
    LoadedBenchmark,
    check_benchmarks,
    check_context,
    load_benchmarks,
    takes_answer_lines,
    validation_benchmark,
)
from opd.cli import say
from opd.config import Config, StudentSection
from opd.data import Prompt, count_steps, read_training_prompts
from opd.engine import Engine
from opd.engine.deepspeed import DeepSpeedEngine, sharding, splits_parameters
from opd.engine.plain import TorchEngine
from opd.errors import InputError
from opd.grading import Grader
from opd.hooks import STAT_FIELDS, Observer, StatefulWeighter, TokenWeighter
from opd.models import LanguageModel
from opd.phases import Phases
from opd.progress import RunProgress, due
from opd.record import checkpoint, evaluation, folder
from opd.record.boards import open_boards
from opd.record.metrics import MetricsLog
from opd.record.record import Record
from opd.rollout import Sampler
from opd.rollout.choose import open_sampler
from opd.rollout.turns import Dialogue, open_dialogue
from opd.scorer import Scorer, load_scorer
from opd.step import Pair
from opd.stop import Stop
from opd.teacher.cache import Cache, clear_folder
from opd.teacher.choose import open_teacher, scoring_teacher
from opd.teacher.self import Average, one_model
from opd.verdicts import Verdicts

SPILLED = "teacher_states"  # folder of a run for the hidden states that teacher.cache_gb has no room for


@dataclass
class Run:
    """A run between two updates."""

    config: Config
    identity: Mapping[str, Any]
    shared: Path | None  # folder of the evaluations that runs share when they start alike
    pair: Pair
    teacher: LanguageModel
    engine: Engine
    phases: Phases
    weighter: TokenWeighter
    observer: Observer | None
    prompts: list[Prompt]
    benchmarks: list[LoadedBenchmark]
    dialogue: Dialogue | None  # what answers the student in training
    total_steps: int
    grader: Grader
    verdicts: Verdicts
    average: Average | None = None  # of the student's weights, where they are the teacher's
    sampler: Sampler | None = None  # None while it is closed
    record: Record | None = None  # None on all processes but the first
    stop: Stop = field(default_factory=Stop)
    step: int = 0  # number of the last update that is done
    progress: RunProgress = field(init=False)

    def __post_init__(self) -> None:
        evaluated = [step for step in range(self.total_steps + 1) if self.evaluates_after(step)]
        self.progress = RunProgress(self.config.run_name, self.total_steps, evaluated)

    def evaluates_after(self, step: int) -> bool:
        """Whether the student is evaluated after update `step`, where 0 is before the first."""
        return bool(self.benchmarks) and (step in (0, self.total_steps) or due(step, self.config.eval.every))

    @property
    def student(self) -> LanguageModel:
        return self.pair.student

    @property
    def teacher_benchmarks(self) -> list[LoadedBenchmark]:
        """The benchmarks with the prompts that the teacher reads."""
        return [privileged.as_the_teacher_reads(loaded) for loaded in self.benchmarks]

    @property
    def pair_outside_updates(self) -> Pair:
        """The pair for scoring outside of an update, which asks for few states at a time: none of them go to disk."""
        return replace(self.pair, teacher=self.pair.teacher.in_memory())

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and response together, in training and evaluation."""
        prompts = [*self.prompts, *(prompt for loaded in self.benchmarks for prompt in loaded.prompts)]
        responses = [loaded.benchmark.max_response_tokens for loaded in self.benchmarks]
        return max(len(p.token_ids) for p in prompts) + max(self.config.rollout.max_response_tokens, *responses, 0)


def build(
    config: Config,
    weighter: TokenWeighter,
    observer: Observer | None,
    identity: Mapping[str, Any],
    continue_from: Path | None,
    shared: Path | None,
    device: torch.device,
) -> Run:
    """Makes a run and opens its folder. It starts at its beginning, or at the checkpoint `continue_from`.

    Raises InputError for a setting, a file or a model that cannot be used. Nothing is written before these checks.
    """
    settings, scorers = identity["deepspeed"], load_scorers(config, weighter)
    weights, is_vllm = config.teacher.weights, config.rollout.engine == "vllm"
    phases = Phases(device, config.engine.phases == 2, is_vllm, config.teacher_is_student)
    student, teacher = _load_models(config, continue_from, device, settings, phases)
    inputs = read_inputs(config, student, teacher)
    engine = _make_engine(student, config, inputs.total_steps, settings, phases)
    teacher = one_model(config, engine.student) if config.teacher_is_student else teacher
    limit = None if config.teacher.cache_gb is None else int(config.teacher.cache_gb * 2**30)
    scoring = scoring_teacher(config, teacher, device, Cache(limit, config.run_dir / SPILLED))
    if config.teacher.mode == "server":
        phases.add("teacher head", scoring.head_tensors, frozen=True)
    grader = Grader()
    verdicts = Verdicts(grader, student.tokenizer, inputs.answer_lines, inputs.dialogue)
    run = Run(
        config=config,
        identity=identity,
        shared=shared,
        pair=Pair(engine.student, scoring, inputs.vocab_size, config.loss, (verdicts, *scorers)),
        teacher=teacher,
        engine=engine,
        phases=phases,
        weighter=weighter,
        observer=observer,
        prompts=inputs.prompts,
        benchmarks=inputs.benchmarks,
        dialogue=inputs.dialogue,
        total_steps=inputs.total_steps,
        grader=grader,
        verdicts=verdicts,
        average=Average(teacher, engine, config.teacher.decay, phases.content) if weights == "ema" else None,
    )
    _introduce(run, device)
    open_student_sampler(run)
    _enter_folder(run, continue_from)
    return run


def load_scorers(config: Config, weighter: TokenWeighter) -> tuple[Scorer, ...]:
    """The configured scorer. Raises InputError where the weighter needs a column that nothing gives."""
    scorers = (load_scorer(config.rollout.scorer),) if config.rollout.scorer else ()
    known = STAT_FIELDS.union({"verdict"}, *(scorer.names for scorer in scorers))
    if unknown := sorted(weighter.needs - known):
        raise InputError(
            f"the weighter {weighter} needs {unknown[0]!r}, which is no statistic and no column of rollout.scorer. "
            f"Expected some of {', '.join(sorted(known))}."
        )
    data = config.data
    if "verdict" in weighter.needs and data.answer_field is None and data.environment is None:
        raise InputError(
            f"the weighter {weighter} needs verdicts, and data.answer_field is null, so nothing can be graded. Name "
            "the field with the reference answer."
        )
    return scorers


def open_student_sampler(run: Run) -> None:
    """Opens the student's sampler. It samples the configured model until it gets other parameters."""
    run.phases.enter("rollout")
    run.sampler = open_sampler(run.student, run.config.student, run.config, run.longest)
    run.phases.sampler = run.sampler


def load_student(section: StudentSection, device: torch.device, settings: dict[str, Any] | None) -> LanguageModel:
    """The student of a run; with DeepSpeed's `settings` of stage 3 only this process's part. Raises InputError."""
    return models.load(section, device, "student", sharding(settings) if splits_parameters(settings) else None)


def _load_models(
    config: Config, continue_from: Path | None, device: torch.device, settings: dict[str, Any] | None, phases: Phases
) -> tuple[LanguageModel, LanguageModel]:
    """Student and teacher, registered with the phases. A checkpoint to continue from holds the student."""
    section = config.student
    if continue_from:
        section = replace(section, path=str(continue_from), revision=None)
    else:
        adapters.check_plain(section)
    student = load_student(section, device, settings)
    if section.lora and not continue_from:
        adapters.add(student.model, section, config.seed)
    phases.add("student", student.model.parameters)
    teacher, weights = open_teacher(config, student, device, settings), config.teacher.weights
    if (
        not config.teacher_is_student and config.teacher.mode != "server"
    ):  # the student is registered, servers elsewhere
        head = set(teacher.head_scope.parameters())
        body = [p for p in teacher.model.parameters() if p not in head]
        phases.add("teacher", lambda: body, frozen=weights != "ema")
        phases.add("teacher head", lambda: head, frozen=weights != "ema")
    return student, teacher


@dataclass(frozen=True)
class Inputs:
    """What a run reads besides its models."""

    vocab_size: int  # token ids below it are compared
    prompts: list[Prompt]
    benchmarks: list[LoadedBenchmark]
    dialogue: Dialogue | None
    total_steps: int
    answer_lines: bool  # how training responses are graded


def read_inputs(config: Config, student: LanguageModel, teacher: LanguageModel) -> Inputs:
    """Reads the data of a run and checks it against both models, which need no weights for it. Raises InputError."""
    vocab_size = models.shared_vocabulary(student, teacher)
    dialogue = open_dialogue(config.data.environment, student, config.data)
    data = dialogue.data if dialogue else config.data
    prompts, validation = read_training_prompts(data, student.tokenizer, config.seed)
    benchmarks = load_benchmarks(config, student, config.eval.limit)
    answer_lines = takes_answer_lines(config, [loaded.benchmark for loaded in benchmarks])
    if validation:
        benchmarks.append(validation_benchmark(config, validation, answer_lines, dialogue))
    prompts = privileged.for_training(prompts, config, data, student, teacher)
    benchmarks = [privileged.for_benchmark(loaded, config, student, teacher) for loaded in benchmarks]
    for lm in (student, teacher):
        check_context(lm, "rollout.max_response_tokens", config.rollout.max_response_tokens, prompts)
        check_benchmarks(lm, benchmarks)
    models.check_prompt_ids([prompt for loaded in benchmarks for prompt in loaded.prompts] + prompts, teacher)
    total_steps = count_steps(prompts, config.rollout.prompts_per_step, config.data.epochs, config.optim.steps)
    if config.optim.warmup_steps >= total_steps:
        raise InputError(f"optim.warmup_steps is {config.optim.warmup_steps}, not below the run's {total_steps} steps.")
    return Inputs(vocab_size, prompts, benchmarks, dialogue, total_steps, answer_lines)


def _make_engine(
    student: LanguageModel, config: Config, total_steps: int, settings: dict[str, Any] | None, phases: Phases
) -> Engine:
    if settings is not None:
        return DeepSpeedEngine(student, config, total_steps, settings)
    engine = TorchEngine(student, config, total_steps, phases.content)
    phases.add("optimizer", engine.moments)
    return engine


def _introduce(run: Run, device: torch.device) -> None:
    """Says what decides the run: in a block, or in one line where the run is one of many that share evaluations."""
    config, processes = run.config, distributed.world_size()
    where = f"{processes} processes on {device.type}" if processes > 1 else f"{device.type}"
    weighter = str(run.weighter)
    facts = {
        "student": config.student.path,
        "teacher": config.teacher.path or f"the student itself, {config.teacher.weights} weights",
        "tokens": type(run.weighter).__name__ if weighter.startswith("<") else weighter,  # "<": it has no own text
        "updates": f"{run.total_steps} of {config.rollout.prompts_per_step * config.rollout.n} rollouts, "
        f"learning rate {config.optim.lr:g}",
        "engine": f"{config.engine.kind} on {where}, rollouts by {config.rollout.engine}",
        "folder": str(config.run_dir),
    }
    if run.shared:
        say(f"{config.run_name}: {facts['tokens']}; updates: {facts['updates']}; {facts['engine']}; {facts['folder']}")
    else:
        say("\n".join(f"{name:8} {fact}" for name, fact in facts.items()))


def _enter_folder(run: Run, continue_from: Path | None) -> None:
    """Creates the run's folder, or takes it back to the checkpoint that the run continues from.

    A run that continues gets its optimizer's moments and its weighter's memory from that checkpoint.
    """
    config, run_dir = run.config, run.config.run_dir
    if distributed.is_first():
        folder.write_identity(run_dir, run.identity)
        if config.teacher.mode == "server":
            folder.keep_teacher(run_dir, run.pair.teacher.weights)
    if continue_from:
        run.step = checkpoint.step_of(continue_from)
        run.phases.enter("update")
        checkpoint.load_optimizer(continue_from, run.engine)
        if isinstance(run.weighter, StatefulWeighter):
            run.weighter.load_state(checkpoint.load_weighter(continue_from))
        if run.average:
            run.average.load_state(checkpoint.load_average(continue_from))
        say(f"{run_dir}: continuing after step {run.step} of {run.total_steps}")
        if (before := checkpoint.processes_of(continue_from)) != distributed.world_size():
            say(
                f"note: {before} processes wrote this checkpoint and {distributed.world_size()} continue it: the same "
                "weights, moments and data, but sums in another order, so the run is not the unbroken one bit for bit"
            )
    if distributed.is_first():
        folder.rewind(run_dir, run.step, continue_from)
        clear_folder(run_dir / SPILLED)
        first = evaluation.finished(run_dir / "eval" / "step_000000", [loaded.name for loaded in run.benchmarks])
        run.progress.continue_after(run.step, evaluation.seconds_of(first) if first else None)
        log = MetricsLog(run_dir, open_boards(config, run.identity["config"], run.step))
        run.record = Record(run_dir, config, log, run.student.tokenizer, run.verdicts, run.observer)
