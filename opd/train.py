"""The run: evaluate -> rollouts -> update -> weights to the sampler -> record -> checkpoint, once per update.

    python -m opd.train --config configs/PAIR.json [--set KEY=VALUE ...] [--dry-run]

A run is a function of its configuration. Everything random is seeded by what it is (opd.seeds), so a run that was
stopped continues from its newest checkpoint exactly as if it had not been. Of several processes each samples and trains
on a share of the rollouts and knows all of them; the first one alone writes, grades and speaks.
"""

import argparse
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from opd import distributed, evaluate, files, launch, models, plan
from opd.batch import make_micro_batches, share_of_rank
from opd.benchmarks import read_benchmarks
from opd.build import Run, build, open_student_sampler
from opd.cli import command_line, main, parser, say
from opd.config import Config, load_config
from opd.data import Rollout, count_steps, prompts_of_step, read_problems
from opd.engine.zero_file import read_deepspeed
from opd.errors import InputError, Interrupted, RunError
from opd.hooks import Observer, Remembering, TokenWeighter, UniformWeighter
from opd.launch import pick_device
from opd.progress import Progress, Watch, due, duration, peak_memory_gb, reset_peak_memory
from opd.record import checkpoint, folder
from opd.record.identity import identity_of, start_folder
from opd.record.record import fields_to_measure
from opd.rollout import Decoding
from opd.rollout.choose import fixed_sampler, make_probe
from opd.step import Update, stats_by_batch, train_step


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
        shared: folder in which runs that start alike keep the evaluations of teacher and step-0 student, made by the
            first of them that needs one.
    Raises:
        InputError: something in the configuration cannot be used; nothing was written.
        RunError: loss or gradient are not finite, or a checkpoint cannot be written.
        Interrupted: a signal stopped the run after it wrote a checkpoint.
    """
    weighter = weighter or UniformWeighter()
    device = pick_device(config.engine)
    identity = identity_of(config, sections or {}, read_benchmarks(config), weighter)
    if config.engine.kind == "deepspeed":
        distributed.start(device)
    with _only_writer(config.run_dir):
        start = _where_to_start(config.run_dir, identity, resume)
        if start == folder.DONE:
            say(f"{config.run_dir}: this run is complete")
            return config.run_dir
        _make_repeatable(device)
        this = build(config, weighter, observer, identity, start, shared, device)
        with _guarded(this):
            loop(this)
        if this.record:
            figures = folder.write_summary(config.run_dir, [b.name for b in this.benchmarks])
            spent = duration(figures["seconds"]["step"])
            say(f"{config.run_dir}: done, {spent} in {this.total_steps} updates")
        distributed.wait()
    return config.run_dir


def loop(run: Run) -> None:
    """All updates of a run. Evaluation comes first, so that one which was stopped is finished on resume."""
    if difference := send_weights(run):
        say(f"vLLM has the student's weights: probe within {difference['rollout/parity']:.1e} nats")
    evaluate_teacher(run)
    while True:
        if run.step in (0, run.total_steps) or due(run.step, run.config.eval.every):
            evaluate_student(run)
        if run.step == run.total_steps:
            return
        update(run)
        if run.step == run.total_steps or due(run.step, run.config.checkpoint.every):
            save(run)
        run.stop.check(together=True)


def update(run: Run) -> None:
    """One update: rollouts -> step -> weights to the sampler -> record."""
    begin, step = time.perf_counter(), run.step + 1
    watch = Watch(run.student.device, run.phases.enter)
    with watch("rollout"):
        rollouts = sample_rollouts(run, step)
    result = learn(run, step, rollouts, watch)
    with watch("sync"):
        parity = send_weights(run, due(step, run.config.rollout.parity_every))
    peak = distributed.largest(peak_memory_gb(run.student.device))
    if run.record:
        around = {**watch.times, **parity, "time/step": time.perf_counter() - begin, "memory/peak_gb": peak}
        run.record.update(rollouts, result, around)
    run.step = step


def sample_rollouts(run: Run, step: int) -> list[Rollout]:
    """The responses of update `step`, the same whatever was sampled before."""
    config = run.config
    chosen = prompts_of_step(run.prompts, step, config.rollout.prompts_per_step, config.data.shuffle, config.seed)
    chosen = [prompt for prompt in chosen for _ in range(config.rollout.n)]
    decoding = Decoding(config.rollout.temperature, config.rollout.top_p, config.rollout.max_response_tokens)
    seeds = [(config.seed, "rollout", step, i) for i in range(len(chosen))]
    with Progress(f"rollouts of step {step}", len(chosen)) as progress:

        def advance(responses: int, tokens: int) -> None:
            progress.advance(responses, tokens)
            run.stop.check()

        return run.sampler.sample(chosen, decoding, run.pair.vocab_size, seeds, advance)


def learn(run: Run, step: int, rollouts: list[Rollout], watch: Watch) -> Update:
    """The training step on this process's share of the rollouts."""
    config = run.config
    mine = share_of_rank(rollouts, distributed.rank(), distributed.world_size())
    batches = make_micro_batches(
        mine, config.optim.micro_batch_tokens, run.student.eos_ids[0], config.rollout.truncated
    )
    measure = fields_to_measure(config, run.observer, step)
    passes = 3 if run.weighter.needs | measure else 2
    with Progress(f"scoring and update of step {step}", passes * len(batches), "micro-batches") as progress:
        watch.advance = progress.advance
        try:
            return train_step(
                run.pair,
                run.engine,
                batches,
                run.weighter,
                step=step,
                seed=config.seed,
                measure=measure,
                watch=watch,
            )
        except FloatingPointError as error:
            raise RunError(_dump_offenders(run, step, rollouts, str(error))) from error
        finally:
            run.pair.teacher.cache.clear()


def send_weights(run: Run, compare: bool = True) -> dict[str, float]:
    """Gives the sampler the student's weights; with `compare`, vLLM's logprobs are held against the student's.

    Returns the comparison as a metric. transformers samples the student itself, so there is nothing to send.
    """
    if run.config.rollout.engine != "vllm":
        return {}
    probe = None
    if compare:
        run.phases.enter("update")
        probe = make_probe(run.student, run.prompts)
    run.phases.enter("rollout")
    difference = run.sampler.take(run.engine.named_weights, probe)
    return {"rollout/parity": difference} if compare else {}


def save(run: Run) -> None:
    """A checkpoint of the last update, and before it the metrics that lead to it."""
    if run.record:
        run.record.log.flush()
    memory = run.weighter.state() if isinstance(run.weighter, Remembering) else {}
    checkpoint.save(run.config.run_dir, run.step, run.student, run.engine, memory, run.config.checkpoint.keep)


def evaluate_student(run: Run) -> None:
    """The student after the last update; the step-0 student may be one that another run has evaluated."""
    name = f"step_{run.step:06d}"
    vocab_size = models.sampled_vocabulary(run.student, run.teacher)
    subject = evaluate.Subject(run.student, run.sampler, vocab_size, run.pair_outside_updates)
    _evaluate(run, name, nullcontext(subject), "eval", shared=run.step == 0)


def evaluate_teacher(run: Run) -> None:
    """The teacher, unless it is evaluated already. Where vLLM samples, the student's makes room for the teacher's."""
    names = [loaded.name for loaded in run.benchmarks]
    known = evaluate.finished(run.config.run_dir / "eval" / "teacher", names) is not None
    if run.step > 0 and distributed.from_first(str(known)) == "True":
        return
    _evaluate(run, "teacher", _teacher_as_subject(run), "teacher", shared=True)


@contextmanager
def _teacher_as_subject(run: Run) -> Iterator[evaluate.Subject]:
    teacher, vllm = run.teacher, run.config.rollout.engine == "vllm"
    vocab_size = models.sampled_vocabulary(teacher, teacher)
    prompts = [prompt for b in run.benchmarks for prompt in b.prompts]
    longest = max(b.benchmark.max_response_tokens for b in run.benchmarks)
    if vllm:
        run.sampler.close()
        run.phases.sampler = run.sampler = None
        run.phases.enter("teacher")
    before_start = partial(run.phases.enter, "rollout")  # vLLM has weights of its own, so the teacher can go
    phase = "rollout" if vllm else "teacher"
    with fixed_sampler(teacher, run.config.teacher, run.config, prompts, longest, before_start) as sampler:
        yield evaluate.Subject(teacher, sampler, vocab_size, None, phase)
    if vllm:
        open_student_sampler(run)
        send_weights(run)


def _evaluate(
    run: Run, name: str, subject: AbstractContextManager[evaluate.Subject], prefix: str, shared: bool
) -> None:
    """Evaluates into the run's folder, by way of the folder that runs which start alike share."""
    if not run.benchmarks:
        return
    target = run.config.run_dir / "eval" / name
    out = start_folder(run.shared, run.identity) / name if shared and run.shared else target
    names = [loaded.name for loaded in run.benchmarks]
    with _made_once(run, out):
        figures = evaluate.known_figures(out, names)
        if figures is None:
            with subject as who:
                figures = evaluate.evaluate(
                    who, run.benchmarks, run.config, out, run.grader, run.stop.check, run.phases.enter
                )
    if run.record:
        if out != target:
            shutil.copytree(out, target, dirs_exist_ok=True)
        run.record.log.scalars(evaluate.scalars(figures, prefix), run.step)
        say(f"{name}: {evaluate.line(figures)}")


def _made_once(run: Run, out: Path) -> AbstractContextManager:
    """Runs that share an evaluation make it once: the others wait for the one that began."""
    if out.parent == run.config.run_dir / "eval" or not run.record:
        return nullcontext()
    return files.lock(out, "output_dir", wait=run.stop.check)


@contextmanager
def _only_writer(run_dir: Path) -> Iterator[None]:
    """Holds the lock of a run's folder, and names the folder where the disk refuses."""
    with files.lock(run_dir, "output_dir") if distributed.is_first() else nullcontext():
        try:
            yield
        except ConnectionError:  # it comes from a server, not from the disk
            raise
        except OSError as error:
            raise RunError(
                f"{run_dir} cannot be read or written ({error}). Checkpoints are intact; mend the cause and start the "
                "same command again."
            ) from error


def _where_to_start(run_dir: Path, identity: Mapping[str, Any], resume: str) -> Path | str | None:
    start = folder.open_run(run_dir, identity, resume)
    if distributed.largest(str(start) != distributed.from_first(str(start))):
        raise InputError(
            f"the processes do not see the same {run_dir}: here it continues from {start}. Set output_dir to a folder "
            "that all machines share."
        )
    return start


def _make_repeatable(device: torch.device) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it would write every chunk of logits once more
    reset_peak_memory(device)


@contextmanager
def _guarded(run: Run) -> Iterator[None]:
    """Ends a run well however it ends: a signal after a checkpoint, a failure with one message, all parts closed."""
    try:
        with run.stop:
            try:
                yield
            except Interrupted:
                there = checkpoint.folder(run.config.run_dir, run.step).exists()
                if distributed.from_first(str(there)) == "False":
                    save(run)
                say(f"checkpoint of step {run.step} is written; the same command continues from it")
                distributed.wait()  # a process that ended now would look like one that failed
                raise
    except FloatingPointError as error:
        raise RunError(
            f"after step {run.step}: {error}. {_newest(run)} Lower optim.lr, or look at the weights of student and "
            "teacher."
        ) from error
    except RuntimeError as error:
        if not distributed.is_lost_connection(error):
            raise
        raise RunError(
            f"after step {run.step}: another process of this run has ended or cannot be reached. Look at its message; "
            "checkpoints are intact, and the same command continues from the newest."
        ) from error
    finally:
        if run.record:
            run.record.log.close()
        run.grader.close()
        if run.sampler:
            run.sampler.close()


def _newest(run: Run) -> str:
    saved = checkpoint.newest(run.config.run_dir)
    return f"The newest checkpoint is {saved}." if saved else "There is no checkpoint yet."


def _dump_offenders(run: Run, step: int, rollouts: list[Rollout], reason: str) -> str:
    """Writes the update's rollouts, each with whether its statistics are finite, and says what happened."""
    path = run.config.run_dir / f"not_finite_step_{step:06d}.jsonl"
    lines, broken = [], []
    batches = [make_micro_batches([r], 1, run.student.eos_ids[0], "keep")[0] for r in rollouts]
    needs = frozenset({"reverse_kl", "forward_kl"})
    scored = stats_by_batch(run.pair_outside_updates, batches, needs, run.phases.enter)
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
    if run.record:
        files.write_whole(path, "".join(lines))
    which = (
        f"rollouts {broken} have statistics that are not finite" if broken else "every rollout's statistics are finite"
    )
    return (
        f"{reason}; {which}, all of the update are in {path}. Weights and optimizer were not changed. {_newest(run)} "
        "Lower optim.lr, or look at these rollouts and at the teacher."
    )


def start(
    config: Config,
    weighter: TokenWeighter,
    sections: Mapping[str, Any],
    options: argparse.Namespace,
    observer: Observer | None = None,
) -> None:
    """The training commands behind their arguments: prints the run folder, or with --dry-run what would be done."""
    if options.dry_run:
        dry_run(config, sections)
        return
    run_dir = run(config, weighter, sections, options.resume, observer)
    if distributed.is_first():
        print(run_dir)


def dry_run(config: Config, sections: Mapping[str, Any]) -> None:
    """Prints the resolved configuration, memory, hours and command line; starts nothing."""
    device = pick_device(config.engine)
    models.check_paths(config)
    updates = config.optim.steps
    if updates is None:
        data = config.data
        problems = [read_problems(path, data.prompt_field, data.answer_field) for path in data.train]
        count = sum(map(len, problems)) - data.validation
        updates = count_steps(range(count), config.rollout.prompts_per_step, data.epochs, None)
    zero = read_deepspeed(config)["zero_optimization"] if config.engine.kind == "deepspeed" else None
    here, machines = launch.processes(config.engine)
    described = plan.describe(config, device, updates, zero, here * machines)
    print(json.dumps({**asdict(config), **{name: asdict(s) for name, s in sections.items()}}, indent=1))
    print(f"{described}\n  command: {command_line()}\ndry run: nothing was started")


def command(arguments: list[str]) -> None:
    cli = train_parser("python -m opd.train", "On-policy distillation on every response token.")
    options = cli.parse_args(arguments)
    config, _ = load_config(options.config, options.overrides)
    start(config, UniformWeighter(), {}, options)


def train_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """The arguments that all training commands share."""
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
