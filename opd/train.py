"""The run: build the pair, then rollout -> step -> log -> checkpoint -> evaluation, once per update.

    python -m opd.train --config configs/tiny.json [--set KEY=VALUE ...] [--dry-run]

A run is a function of its configuration. Everything random is seeded by what it is (see seeds.py), so a run that was
stopped continues from its newest checkpoint exactly as if it had not been. Of several processes each samples and trains
on a share of the rollouts and knows all of them; the first one alone writes, grades and speaks.
"""

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from opd import checkpoint, distributed, dump, evaluate, files, grading, launch, models, plan, run_folder
from opd import teacher as teacher_scoring
from opd.batch import make_micro_batches, share_of_rank
from opd.benchmarks import (
    Benchmark,
    LoadedBenchmark,
    check_benchmarks,
    check_context,
    load_benchmarks,
    read_benchmarks,
    validation_benchmark,
)
from opd.cli import InputError, Interrupted, RunError, Stop, command_line, main, parser, say
from opd.config import Config, load_config
from opd.data import Prompt, Rollout, count_steps, prompts_of_step, read_problems, read_training_prompts
from opd.engine import DeepSpeedEngine, TorchEngine, load_student, load_teacher, pick_device, read_deepspeed
from opd.files import write_whole
from opd.hooks import Observer, RunningWeighter, TokenWeighter, UniformWeighter
from opd.metrics import MetricsLog, Progress, Stopwatch, duration, peak_memory_gb, reset_peak_memory
from opd.models import LanguageModel
from opd.phases import Phases
from opd.rollout import Decoding, own_logprobs, sample
from opd.seeds import generator
from opd.step import StepResult, pair_stats, train_step
from opd.vllm_engine import VllmEngine

SPILL = "teacher_states"  # folder of a run for what is above teacher.cache_gb
DIAGNOSTICS = {  # TokenStats field -> metric, the mean over response tokens
    "student_entropy": "student/entropy",
    "teacher_entropy": "teacher/entropy",
    "reverse_kl": "divergence/reverse_kl",
    "forward_kl": "divergence/forward_kl",
    "top1_agree": "divergence/top1_agree",
}


@dataclass(frozen=True)
class Parts:
    """What an update works with."""

    config: Config
    student: LanguageModel
    teacher: LanguageModel
    engine: TorchEngine | DeepSpeedEngine
    weighter: TokenWeighter
    observer: Observer | None
    prompts: list[Prompt]
    vocab_size: int
    run_dir: Path
    log: MetricsLog | None  # of the first rank
    grader: grading.Grader
    stop: Stop
    phases: Phases


def run(
    config: Config,
    weighter: TokenWeighter | None = None,
    sections: Mapping[str, Any] | None = None,
    resume: str = "auto",
    observer: Observer | None = None,
    shared: Path | None = None,
) -> Path:
    """Trains, or continues, the run of a configuration; returns its folder.

    Args:
        weighter: decides which tokens count; None is UniformWeighter(), plain on-policy distillation.
        sections: extension sections (name -> dataclass) that made the weighter; recorded and compared on resume.
        resume: "auto" continues an existing run folder of the same configuration; "none" refuses an existing one;
            else the path of one of its checkpoints to continue from.
        observer: further diagnostics and columns of token dumps; changes nothing.
        shared: folder in which runs that start alike keep the evaluations of teacher and step-0 student, made by
        whoever
            comes first.
    Raises:
        InputError: something in the configuration cannot be used; nothing was written.
        RunError: loss or gradient are not finite, or a checkpoint cannot be written.
        Interrupted: a signal stopped the run after it wrote a checkpoint.
    """
    weighter = weighter or UniformWeighter()
    device = pick_device(config.engine)
    specs = read_benchmarks(config)
    identity = {
        "config": {**asdict(config), **{name: asdict(s) for name, s in (sections or {}).items()}},
        "benchmarks": {name: asdict(b) for name, b in specs.items()},
        "grader": grading.VERSION,
        "files": run_folder.digests([*config.data.train, *(b.file for b in specs.values())]),
        "weighter": f"{type(weighter).__module__}.{type(weighter).__qualname__}",
        "weighter_settings": {k: v for k, v in vars(weighter).items() if isinstance(v, str | int | float | None)},
        "deepspeed": read_deepspeed(config) if config.engine.kind == "deepspeed" else None,
    }
    if identity["deepspeed"]:
        distributed.start(device)
    with files.lock(config.run_dir, "output_dir") if distributed.is_first() else nullcontext():
        try:
            return _run(config, weighter, identity, resume, observer, shared, device, specs)
        except ConnectionError:  # of a server, not of the disk
            raise
        except OSError as error:
            raise RunError(
                f"{config.run_dir} cannot be read or written ({error}). Checkpoints are intact; mend the cause and "
                "start the same command again."
            ) from error


def _run(
    config: Config,
    weighter: TokenWeighter,
    identity: dict[str, Any],
    resume: str,
    observer: Observer | None,
    shared: Path | None,
    device: torch.device,
    specs: dict[str, Benchmark],
) -> Path:
    """`run` as the only writer of its folder."""
    run_dir = config.run_dir
    start = run_folder.open_run(run_dir, identity, resume)
    if distributed.largest(str(start) != distributed.from_first(str(start))):
        raise InputError(
            f"the processes do not see the same {run_dir}: here it continues from {start}. Set output_dir to a folder "
            "that all machines share."
        )
    if start == run_folder.DONE:
        say(f"{run_dir}: this run is complete")
        return run_dir

    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it would write every chunk of logits once more
    reset_peak_memory(device)
    student_section = replace(config.student, path=str(start), revision=None) if start else config.student
    phases = Phases(device, config.engine.phases == 2, config.rollout.engine == "vllm")
    student = load_student(student_section, device, identity["deepspeed"])
    phases.add("student", student.model.parameters)
    teacher = load_teacher(config, device)
    head = set(teacher.head_scope.parameters())
    phases.add("teacher", lambda: [p for p in teacher.model.parameters() if p not in head])
    phases.add("teacher head", lambda: head)
    vocab_size = models.shared_vocabulary(student, teacher)
    prompts, validation = read_training_prompts(config.data, student.tokenizer, config.seed)
    benchmarks = load_benchmarks(config, student, config.eval.limit)
    if validation:
        benchmarks.append(validation_benchmark(config, validation))
    names = [loaded.name for loaded in benchmarks]
    for lm in (student, teacher):
        check_context(lm, "rollout.max_response_tokens", config.rollout.max_response_tokens, prompts)
        check_benchmarks(lm, benchmarks)
    models.check_prompt_ids([p for b in benchmarks for p in b.prompts] + prompts, teacher)
    total_steps = count_steps(prompts, config.rollout.prompts_per_step, config.data.epochs, config.optim.steps)
    if config.optim.warmup_steps >= total_steps:
        raise InputError(f"optim.warmup_steps is {config.optim.warmup_steps}, not below the run's {total_steps} steps.")
    sizes = plan.size_without_weights(config.student, "student"), plan.size_without_weights(config.teacher, "teacher")
    settings = identity["deepspeed"]
    engine = (
        DeepSpeedEngine(student, config, total_steps, settings)
        if settings
        else TorchEngine(student, config, total_steps, phases.value)
    )
    if not settings:
        phases.add("optimizer", engine.moments)
    phases.weights = engine.named_weights
    student = engine.student
    if config.rollout.engine == "vllm":
        answers = [config.rollout.max_response_tokens, *(b.benchmark.max_response_tokens for b in benchmarks)]
        asked = [*prompts, *(p for b in benchmarks for p in b.prompts)]
        longest = max(len(p.token_ids) for p in asked) + max(answers)
        phases.enter("rollout")
        phases.sampler = VllmEngine(student, config.student, config, longest)
        student = replace(student, sampler=phases.sampler)
    for name, section in identity["config"].items():
        say(f"  {name}: {json.dumps(section)}")
    longest = max((b.max_response_tokens for b in specs.values()), default=0)
    zero = settings and settings["zero_optimization"]
    found = plan.make_plan(config, *sizes, device, total_steps, longest, zero, distributed.world_size())
    say(plan.text(found, config, *sizes, device))

    first = distributed.is_first()
    if first:
        run_folder.write_identity(run_dir, identity)
    step = 0
    if start:
        step = checkpoint.step_of(start)
        phases.enter("update")
        checkpoint.load_optimizer(start, engine)
        if isinstance(weighter, RunningWeighter):
            weighter.load_state(checkpoint.load_weighter(start))
        say(f"{run_dir}: continuing after step {step} of {total_steps}")
        if (before := checkpoint.processes_of(start)) != distributed.world_size():
            say(
                f"note: {before} processes wrote this checkpoint and {distributed.world_size()} continue it: the same "
                "weights, moments and data, but sums in another order, so the run is not the unbroken one bit for bit"
            )
    if first:
        run_folder.rewind(run_dir, step, start)
        teacher_scoring.clear_folder(run_dir / SPILL)
    log = MetricsLog(run_dir, total_steps, step) if first else None
    stop, grader = Stop(), grading.Grader()
    parts = Parts(
        config, student, teacher, engine, weighter, observer, prompts, vocab_size, run_dir, log, grader, stop, phases
    )

    def alone(folder: Path) -> AbstractContextManager:
        """Runs that share an evaluation make it once: the others wait."""
        if folder.parent == run_dir / "eval" or not first:
            return nullcontext()
        return files.lock(folder, "output_dir", wait=stop.check)

    def measure(name: str, lm: LanguageModel) -> None:
        if benchmarks:
            own = run_dir / "eval" / name
            folder = (
                own
                if shared is None or name not in ("teacher", "step_000000")
                else run_folder.alike(shared, identity) / name
            )
            with alone(folder), _evaluated(parts, lm, benchmarks, folder) as (sampled, enter):
                found = evaluate.evaluate(
                    sampled,
                    sampled if lm is teacher else teacher,
                    benchmarks,
                    config,
                    vocab_size,
                    folder,
                    grader,
                    stop.check,
                    enter,
                )
            if log is None:
                return
            if folder != own:
                shutil.copytree(folder, own, dirs_exist_ok=True)
            log.scalars(evaluate.scalars(found, "teacher" if lm is teacher else "eval"), step)
            say(f"{name}: {evaluate.line(found)}")

    def save() -> None:
        if log:
            log.flush()  # no checkpoint without the metrics that lead to it
        memory = weighter.state() if isinstance(weighter, RunningWeighter) else {}
        checkpoint.save(run_dir, step, student, engine, memory, config.checkpoint.keep)

    def all_updates() -> None:
        nonlocal step
        if student.sampler:
            say(f"vLLM has the student's weights: probe within {_parity(parts):.1e} nats")
        known = evaluate.finished(run_dir / "eval" / "teacher", names)
        if step == 0 or distributed.from_first(str(known is None)) == "True":
            measure("teacher", teacher)
        if step == 0:
            measure("step_000000", student)
        while True:
            if step and (step == total_steps or _due(step, config.eval.every)):
                measure(f"step_{step:06d}", student)
            if step == total_steps:
                return
            metrics = _update(parts, step + 1)
            step += 1
            if log:
                log.write(step, metrics)
            if step == total_steps or _due(step, config.checkpoint.every):
                save()
            stop.check(together=True)

    try:
        with stop:
            try:
                all_updates()
            except Interrupted:
                if distributed.from_first(str(checkpoint.folder(run_dir, step).exists())) == "False":
                    save()
                say(f"checkpoint of step {step} is written; the same command continues from it")
                distributed.wait()  # a process that ended now would look like one that failed
                raise
    except FloatingPointError as error:
        saved = checkpoint.newest(run_dir)
        raise RunError(
            f"after step {step}: {error}. "
            f"{f'The newest checkpoint is {saved}' if saved else 'There is no checkpoint yet'}. "
            "Lower optim.lr, or look at the weights of student and teacher."
        ) from error
    except RuntimeError as error:
        if not distributed.is_lost_connection(error):
            raise
        raise RunError(
            f"after step {step}: another process of this run has ended or cannot be reached. Look at its message; "
            "checkpoints are intact, and the same command continues from the newest."
        ) from error
    finally:
        if log:
            log.close()
        grader.close()
        if student.sampler:
            student.sampler.close()
    if first:
        figures = run_folder.write_summary(run_dir, names)
        say(f"{run_dir}: done, {duration(figures['seconds']['step'])} in {total_steps} updates")
    distributed.wait()
    return run_dir


def _update(parts: Parts, step: int) -> dict[str, float]:
    """Rollouts and one training step; returns the metrics of the update, on the first rank."""
    config, student = parts.config, parts.student
    begin = time.perf_counter()
    watch = Stopwatch(student.device)
    with watch("move"):
        parts.phases.enter("rollout")
    with watch("rollout"):
        rollouts = _sample_rollouts(parts, step)
    mine = share_of_rank(rollouts, distributed.rank(), distributed.world_size())
    micro_batches = make_micro_batches(
        mine, config.optim.micro_batch_tokens, student.eos_ids[0], config.rollout.truncated
    )
    diagnose, write_dump = _due(step, config.log.diagnostics_every), _due(step, config.log.token_dump_every)
    measure: frozenset[str] = frozenset()
    if diagnose:
        measure |= frozenset(DIAGNOSTICS) | (parts.observer.needs if parts.observer else frozenset())
    if write_dump:
        measure |= dump.STATS | dump.TOP5 | (parts.observer.column_needs if parts.observer else frozenset())
    limit = None if config.teacher.cache_gb is None else int(config.teacher.cache_gb * 2**30)
    cache = teacher_scoring.Cache(limit, parts.run_dir / SPILL)
    try:
        with Progress(f"scoring and update of step {step}", 3 * len(micro_batches), "micro-batches") as progress:
            result = train_step(
                student=student,
                teacher=parts.teacher,
                engine=parts.engine,
                micro_batches=micro_batches,
                weighter=parts.weighter,
                loss=config.loss,
                vocab_size=parts.vocab_size,
                step=step,
                seed=config.seed,
                measure=measure,
                progress=progress.advance,
                enter=parts.phases.enter,
                cache=cache,
            )
    except FloatingPointError as error:
        raise RunError(_dump_offenders(parts, step, rollouts, str(error))) from error
    finally:
        cache.clear()
    parts.phases.changed = True
    parity = {}
    if student.sampler:
        with watch("sync"):
            if _due(step, config.rollout.parity_every):
                parity = {"rollout/parity": _parity(parts)}
            else:
                parts.phases.enter("rollout")
    peak = distributed.largest(peak_memory_gb(student.device))
    if parts.log is None:
        return {}
    texts = [student.tokenizer.decode(r.response_ids, skip_special_tokens=True) for r in rollouts]
    metrics = {
        **result.metrics,
        **_rollout_metrics(rollouts, texts, parts.grader),
        **watch.times,
        "time/move": watch.times["time/move"] + result.metrics["time/move"],
        **parity,
        "time/step": time.perf_counter() - begin,
        "memory/peak_gb": peak,
    }
    if diagnose:
        metrics.update(_diagnose(parts, result))
        for i, (sampled, text) in enumerate(list(zip(rollouts, texts, strict=True))[: config.log.samples]):
            prompt = student.tokenizer.decode(sampled.prompt.token_ids)
            parts.log.text(f"rollout/{i}", f"```\n{prompt}{text}\n```\nreference: `{sampled.prompt.answer}`", step)
    if write_dump:
        random = generator(config.seed, "dump", step)
        columns = parts.observer.columns(result.stats, result.weights, random) if parts.observer else {}
        path = parts.run_dir / "tokens" / f"step_{step:06d}.jsonl"
        shown = rollouts[: config.log.token_dump_rollouts]
        dump.write(path, shown, result.stats, result.weights, columns, student.tokenizer)
    return metrics


def _parity(parts: Parts) -> float:
    """vLLM, with the student's present weights, against the student: the same prompts in every update."""
    probe = [prompt.token_ids for prompt in parts.prompts[:8]]
    parts.phases.enter("update")
    own = own_logprobs(parts.student, probe)
    parts.phases.enter("rollout")
    return parts.student.sampler.check_parity(probe, own)


@contextmanager
def _evaluated(
    parts: Parts, lm: LanguageModel, benchmarks: list[LoadedBenchmark], folder: Path
) -> Iterator[tuple[LanguageModel, Callable[[str], None]]]:
    """The model with what samples it, and how its evaluation changes phases.

    vLLM has the student; for the teacher, which is evaluated once, it is closed and another one started.
    """
    phases, own = parts.phases, parts.student.sampler
    names = [loaded.name for loaded in benchmarks]
    known = distributed.from_first(str(evaluate.finished(folder, names) is not None)) == "True"
    if lm is not parts.teacher or own is None or known:
        yield lm, phases.enter
        return
    own.close()
    phases.sampler = None
    phases.enter("teacher")
    apart = partial(phases.enter, "rollout")  # vLLM has weights of its own
    with evaluate.evaluated(lm, parts.config.teacher, benchmarks, parts.config, apart) as sampled:
        yield sampled, lambda phase: None
    own.open()
    phases.sampler, phases.changed = own, True
    _parity(parts)


def _sample_rollouts(parts: Parts, step: int) -> list[Rollout]:
    config = parts.config
    chosen = prompts_of_step(parts.prompts, step, config.rollout.prompts_per_step, config.data.shuffle, config.seed)
    chosen = [prompt for prompt in chosen for _ in range(config.rollout.n)]
    decoding = Decoding(config.rollout.temperature, config.rollout.top_p, config.rollout.max_response_tokens)
    seeds = [(config.seed, "rollout", step, i) for i in range(len(chosen))]
    with Progress(f"rollouts of step {step}", len(chosen)) as progress:

        def advance(responses: int, tokens: int) -> None:
            progress.advance(responses, tokens)
            parts.stop.check()

        return sample(parts.student, chosen, decoding, parts.vocab_size, config.rollout.batch_size, seeds, advance)


def _rollout_metrics(rollouts: list[Rollout], texts: list[str], grader: grading.Grader) -> dict[str, float]:
    metrics = {
        "rollout/length_mean": statistics.fmean(len(r.response_ids) for r in rollouts),
        "rollout/truncated": statistics.fmean(r.finish_reason == "length" for r in rollouts),
    }
    if rollouts[0].prompt.answer is not None:
        verdicts = grader.grade([(text, r.prompt.answer) for r, text in zip(rollouts, texts, strict=True)])
        metrics["rollout/ungraded"] = float(sum(verdict.correct is None for verdict in verdicts))
        metrics["rollout/accuracy"] = statistics.fmean(verdict.correct is True for verdict in verdicts)
    return metrics


def _diagnose(parts: Parts, result: StepResult) -> dict[str, float]:
    """Means of the statistics, and what the observer sees; its histograms go to TensorBoard, its warnings to the
    console."""
    columns = {name: vars(result.stats)[name] for name in DIAGNOSTICS}
    found = {DIAGNOSTICS[name]: column.mean().item() for name, column in columns.items() if len(column)}
    if parts.observer is None or not len(result.stats.position):
        return found
    diagnosis = parts.observer.diagnose(result.stats, result.weights)
    for name, column in diagnosis.histograms.items():
        parts.log.histogram(name, column, result.stats.step)
    for kind, message in diagnosis.warnings.items():
        parts.log.warn(kind, f"step {result.stats.step}: {message}", result.stats.step)
    return found | diagnosis.scalars


def _dump_offenders(parts: Parts, step: int, rollouts: list[Rollout], reason: str) -> str:
    """Writes the update's rollouts, each with whether its statistics are finite, and says what happened."""
    path = parts.run_dir / f"not_finite_step_{step:06d}.jsonl"
    lines, broken = [], []
    batches = [make_micro_batches([r], 1, parts.student.eos_ids[0], "keep")[0] for r in rollouts]
    needs = frozenset({"reverse_kl", "forward_kl"})
    scored = pair_stats(
        parts.student, parts.teacher, batches, parts.vocab_size, parts.config.loss, needs, parts.phases.enter
    )
    for rollout, columns in zip(rollouts, scored, strict=True):
        finite = all(column.isfinite().all() for column in columns.values())
        broken += [] if finite else [rollout.sequence_id]
        record = {
            "sequence_id": rollout.sequence_id,
            "id": rollout.prompt.id,
            "finite": bool(finite),
            "prompt_ids": rollout.prompt.token_ids,
            "response_ids": rollout.response_ids,
        }
        lines.append(json.dumps(record) + "\n")
    if distributed.is_first():
        write_whole(path, "".join(lines))
    which = (
        f"rollouts {broken} have statistics that are not finite" if broken else "every rollout's statistics are finite"
    )
    saved = checkpoint.newest(parts.run_dir)
    return (
        f"{reason}; {which}, all of the update are in {path}. Weights and optimizer were not changed; "
        f"{f'the newest checkpoint is {saved}' if saved else 'there is no checkpoint yet'}. "
        "Lower optim.lr, or look at these rollouts and at the teacher."
    )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def start(
    config: Config,
    weighter: TokenWeighter,
    sections: Mapping[str, Any],
    options: argparse.Namespace,
    observer: Observer | None = None,
) -> None:
    """The training commands behind their arguments: prints the run folder, or with --dry-run what would be done."""
    if not options.dry_run:
        folder = run(config, weighter, sections, options.resume, observer)
        if distributed.is_first():
            print(folder)
    else:
        dry_run(config, sections)


def dry_run(config: Config, sections: Mapping[str, Any]) -> None:
    """Prints the resolved configuration, memory, hours and command line; starts nothing."""
    device = pick_device(config.engine)
    models.check_paths(config)
    sizes = plan.size_without_weights(config.student, "student"), plan.size_without_weights(config.teacher, "teacher")
    updates = config.optim.steps
    if updates is None:
        data = config.data
        count = (
            sum(len(read_problems(path, data.prompt_field, data.answer_field)) for path in data.train) - data.validation
        )
        updates = count_steps(range(count), config.rollout.prompts_per_step, data.epochs, None)
    print(json.dumps({**asdict(config), **{name: asdict(s) for name, s in sections.items()}}, indent=1))
    zero = read_deepspeed(config)["zero_optimization"] if config.engine.kind == "deepspeed" else None
    longest = max((b.max_response_tokens for b in read_benchmarks(config).values()), default=0)
    here, machines = launch.processes(config.engine)
    found = plan.make_plan(config, *sizes, device, updates, longest, zero, here * machines)
    print(plan.text(found, config, *sizes, device))
    print(f"  command: {command_line()}\ndry run: nothing was started")


def command(arguments: list[str]) -> None:
    options = train_parser("python -m opd.train", "On-policy distillation on every response token.").parse_args(
        arguments
    )
    config, _ = load_config(options.config, options.overrides)
    start(config, UniformWeighter(), {}, options)


def train_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """The arguments all training commands share."""
    transformers.logging.disable_progress_bar()
    cli = parser(prog, description)
    cli.add_argument(
        "--resume",
        default="auto",
        metavar="auto|none|DIR",
        help="auto: continue an existing run of the same config; none: refuse one; DIR: from that checkpoint",
    )
    cli.add_argument("--dry-run", action="store_true", help="print config, memory, hours and command; start nothing")
    return cli


if __name__ == "__main__":
    main(command)
