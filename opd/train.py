"""The run: evaluate -> rollouts -> update -> weights to the sampler -> record -> checkpoint, once per update.

    python -m opd.train --config configs/PAIR.json [--set KEY=VALUE ...] [--dry-run]

A run is a function of its configuration. Every random draw is seeded by its name (opd.seeds), so a run that was stopped
continues from its newest checkpoint exactly as an unbroken run. Of several processes each one samples and trains on a
share of the rollouts and knows all of them. The first process alone writes files, grades and speaks.
"""

import argparse
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from opd import distributed, evaluate, files, models
from opd.batch import counted_tokens, make_micro_batches, share_of_rank
from opd.benchmarks import read_benchmarks
from opd.build import Run, build, open_student_sampler
from opd.cli import main, say
from opd.commands import COMMANDS
from opd.config import Config, load_config
from opd.console import CONSOLE
from opd.data import Rollout, prompts_of_step
from opd.device import pick_device
from opd.doctor import dry_run, resolved
from opd.errors import InputError, Interrupted, RunError
from opd.hooks import Observer, StatefulWeighter, TokenWeighter, UniformWeighter
from opd.progress import Progress, Watch, due, duration, peak_memory_gb, reset_peak_memory
from opd.record import checkpoint, evaluation, folder
from opd.record.boards import check_boards
from opd.record.identity import identity_of, start_folder
from opd.record.record import fields_to_measure
from opd.responses import Subject
from opd.rollout import Decoding
from opd.rollout.choose import evaluation_sampler, fixed_sampler, make_probe
from opd.rollout.turns import converse
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
        sections: the extension sections, name -> dataclass, that the weighter was made from. They are recorded, and a
            run continues only with the same ones.
        resume: "auto" continues an existing run folder of the same configuration; "none" refuses an existing one; any
            other text is the path of the checkpoint to continue from.
        observer: adds diagnostics and columns of token dumps, and changes nothing in the training.
        shared: folder in which runs that start alike keep their evaluations of teacher and step-0 student. The first
            run that needs such an evaluation makes it.
    Raises:
        InputError: the configuration cannot be used; nothing was written.
        RunError: loss or gradient are not finite, or a checkpoint cannot be written.
        Interrupted: a signal stopped the run after it wrote a checkpoint.
    """
    weighter = weighter or UniformWeighter()
    device = pick_device(config.engine)
    identity = identity_of(config, sections or {}, read_benchmarks(config), weighter)
    if config.engine.kind == "deepspeed":
        distributed.start(device)
    with _only_writer(config.run_dir):
        continue_from = _resume_point(config.run_dir, identity, resume)
        if continue_from == folder.DONE:
            say(f"{config.run_dir}: this run is complete")
            return config.run_dir
        if distributed.is_first():
            check_boards(config)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # filling would write every chunk of logits twice
        reset_peak_memory(device)
        with Progress(f"{config.run_name}: loading models and data"):
            built = build(config, weighter, observer, identity, continue_from, shared, device)
        with _guarded(built), CONSOLE.show(built.progress):
            loop(built)
        if built.record:
            figures = folder.write_summary(config.run_dir, [loaded.name for loaded in built.benchmarks])
            updating, evaluating = duration(figures["seconds"]["step"]), duration(figures["seconds_evaluating"])
            say(f"{config.run_name}: done; {built.total_steps} updates took {updating}, evaluations {evaluating}")
        distributed.wait()
    return config.run_dir


def loop(run: Run) -> None:
    """All updates of a run. Evaluation comes first, so that a resumed run finishes an evaluation that was stopped."""
    if difference := send_weights(run):
        say(f"vLLM has the student's weights: probe within {difference['rollout/parity']:.1e} nats")
    moves = run.config.teacher.weights in ("live", "ema")  # then its weights of now are needed now
    if moves or not is_evaluated_elsewhere(run):
        evaluate_teacher(run)
    while True:
        if run.evaluates_after(run.step):
            evaluate_student(run)
        if run.step == run.total_steps:
            evaluate_teacher(run)  # the run that was at it may have failed
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
    run.verdicts.begin(rollouts)
    result = learn(run, step, rollouts, watch)
    if run.average:
        run.average.follow()
    with watch("sync"):
        parity = send_weights(run, due(step, run.config.rollout.parity_every))
    peak = distributed.largest(peak_memory_gb(run.student.device))
    if run.record:
        around = {**watch.times, **parity, "time/step": time.perf_counter() - begin, "memory/peak_gb": peak}
        run.progress.updated(step, run.record.update(rollouts, result, around))
    run.step = step


def sample_rollouts(run: Run, step: int) -> list[Rollout]:
    """The rollouts of update `step`. They do not depend on what was sampled before."""
    config, rollout = run.config, run.config.rollout
    chosen = prompts_of_step(run.prompts, step, rollout.prompts_per_step, config.data.shuffle, config.seed)
    prompts = [prompt for prompt in chosen for _ in range(rollout.n)]
    decoding = Decoding(rollout.temperature, rollout.top_p, rollout.max_response_tokens)
    seeds = [(config.seed, "rollout", step, i) for i in range(len(prompts))]
    with Progress(f"rollouts of step {step}", len(prompts)) as progress:

        def advance(responses: int, tokens: int) -> None:
            progress.advance(responses, tokens)
            run.stop.check()

        return converse(run.sampler, run.dialogue, prompts, decoding, run.pair.vocab_size, seeds, advance)


def learn(run: Run, step: int, rollouts: list[Rollout], watch: Watch) -> Update:
    """The training step on this process's share of the rollouts. Raises RunError where a number is not finite."""
    config, pad_id = run.config, run.student.eos_ids[0]
    share = share_of_rank(rollouts, distributed.rank(), distributed.world_size())
    batches = make_micro_batches(
        share, config.optim.micro_batch_tokens, pad_id, config.rollout.truncated, run.pair.packed_row
    )
    measure = fields_to_measure(config, run.observer, step)
    passes = 3 if (run.weighter.needs | measure) - run.pair.outside else 2
    with Progress(f"scoring and update of step {step}", passes * len(batches), "micro-batches") as progress:
        watch.advance = progress.advance
        try:
            return train_step(
                run.pair, run.engine, batches, run.weighter, step=step, seed=config.seed, measure=measure, watch=watch
            )
        except FloatingPointError as error:
            raise RunError(_dump_offenders(run, step, rollouts, str(error))) from error
        finally:
            run.pair.teacher.cache.clear()


def send_weights(run: Run, compare: bool = True) -> dict[str, float]:
    """Gives the sampler the student's parameters, and with `compare` compares vLLM's logprobs with the student's.

    Returns the largest difference as a metric. transformers samples the student itself and gets nothing.
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
    """Writes the metrics up to the last update to the disk, and then a checkpoint of it."""
    if run.record:
        run.record.log.flush()
    memory = {
        "weighter": run.weighter.state() if isinstance(run.weighter, StatefulWeighter) else {},
        "teacher": run.average.state() if run.average else {},
    }
    with Progress(f"checkpoint of update {run.step}"):
        checkpoint.save(run.config.run_dir, run.step, run.student, run.engine, memory, run.config.checkpoint.keep)


def evaluate_student(run: Run) -> None:
    """Evaluates the student after the last update. Another run may have evaluated the same step-0 student before."""
    vocab_size = models.sampled_vocabulary(run.student, run.teacher)
    sampler = evaluation_sampler(run.sampler, run.student, run.config)
    subject = Subject(run.student, sampler, vocab_size, run.pair_outside_updates)
    _evaluate(run, f"step_{run.step:06d}", nullcontext(subject), "eval", shared=run.step == 0)


def is_evaluated_elsewhere(run: Run) -> bool:
    """Whether another run that shares the teacher's evaluation makes it at the moment. Nobody has to wait for it."""
    busy = run.shared is not None and files.is_locked(start_folder(run.shared, run.identity) / "teacher")
    return distributed.from_first(str(busy)) == "True"


def evaluate_teacher(run: Run) -> None:
    """Evaluates the teacher on its own prompts, unless this run has evaluated it already."""
    names = [loaded.name for loaded in run.benchmarks]
    if run.config.teacher.mode == "server":
        if run.step == 0 and names:
            say(
                "note: the teacher is elsewhere and samples nothing, so it is not evaluated: opd.evaluate does it there"
            )
        return
    if run.step > 0 and evaluate.known_figures(run.config.run_dir / "eval" / "teacher", names) is not None:
        return
    if run.step > 0 and run.benchmarks and run.config.teacher.weights in ("live", "ema"):
        say("warning: the evaluation of the teacher is damaged, and its weights of then are gone: it is left out")
        return
    _evaluate(run, "teacher", _teacher_as_subject(run), "teacher", shared=True)


@contextmanager
def _teacher_as_subject(run: Run) -> Iterator[Subject]:
    """The teacher with a sampler of its own. The student's vLLM makes room for the teacher's and comes back after."""
    teacher, vllm = run.teacher, run.config.rollout.engine == "vllm"
    vocab_size = models.sampled_vocabulary(teacher, teacher)
    prompts = [prompt for loaded in run.teacher_benchmarks for prompt in loaded.prompts]
    longest = max(loaded.benchmark.max_response_tokens for loaded in run.benchmarks)
    if vllm:
        run.sampler.close()
        run.phases.sampler = run.sampler = None
        run.phases.enter("teacher")
    make_room = partial(run.phases.enter, "rollout")  # vLLM has parameters of its own, so the teacher's can go
    with fixed_sampler(teacher, run.config.teacher_model, run.config, prompts, longest, make_room) as sampler:
        yield Subject(teacher, sampler, vocab_size, None, "rollout" if vllm else "teacher")
    if vllm:
        open_student_sampler(run)
        send_weights(run)


def _evaluate(run: Run, name: str, subject: AbstractContextManager[Subject], prefix: str, shared: bool) -> None:
    """Evaluates into the run's folder. With `shared` the runs that start alike share the evaluation.

    Such an evaluation is made in their common folder and copied into the run's.
    """
    if not run.benchmarks:
        return
    who = "teacher" if prefix == "teacher" else f"student after update {run.step}" if run.step else "step-0 student"
    run.progress.evaluates(who)
    target = run.config.run_dir / "eval" / name
    out = start_folder(run.shared, run.identity) / name if shared and run.shared else target
    benchmarks = run.teacher_benchmarks if prefix == "teacher" else run.benchmarks
    names = [loaded.name for loaded in benchmarks]
    with _made_once(run, out):
        figures = evaluate.known_figures(out, names)
        if figures is None:
            with subject as model:
                figures = evaluate.evaluate(
                    model, benchmarks, run.config, out, run.grader, run.stop.check, run.phases.enter
                )
    if run.record:
        if out != target:
            shutil.copytree(out, target, dirs_exist_ok=True)
        run.record.log.scalars(evaluation.scalars(figures, prefix), run.step)
        run.progress.evaluated(evaluation.seconds_of(figures), prefix == "teacher")
        say(f"{run.config.run_name}: {who}: {evaluation.line(figures)}")


def _made_once(run: Run, out: Path) -> AbstractContextManager:
    """The lock with which one of the runs that share an evaluation makes it, while the others wait."""
    if out.parent == run.config.run_dir / "eval" or not run.record:
        return nullcontext()
    return files.lock(out, "output_dir", wait=run.stop.check)


@contextmanager
def _only_writer(run_dir: Path) -> Iterator[None]:
    """Holds the lock of a run's folder. Raises RunError that names the folder when the disk refuses."""
    with files.lock(run_dir, "output_dir") if distributed.is_first() else nullcontext():
        try:
            yield
        except ConnectionError:  # from a server, and not from the disk
            raise
        except OSError as error:
            raise RunError(
                f"{run_dir} cannot be read or written ({error}). Checkpoints are intact; mend the cause and start the "
                "same command again."
            ) from error


def _resume_point(run_dir: Path, identity: Mapping[str, Any], resume: str) -> Path | str | None:
    """As folder.open_run. Raises InputError also when the processes do not see the same folder."""
    continue_from = folder.open_run(run_dir, identity, resume)
    if distributed.largest(str(continue_from) != distributed.from_first(str(continue_from))):
        raise InputError(
            f"the processes do not see the same {run_dir}: here it continues from {continue_from}. Set output_dir to a "
            "folder that all machines share."
        )
    return continue_from


@contextmanager
def _guarded(run: Run) -> Iterator[None]:
    """Ends a run in good order: a signal leaves a checkpoint, a failure leaves one message, and all parts close."""
    try:
        with run.stop:
            try:
                yield
            except Interrupted:
                is_saved = checkpoint.folder(run.config.run_dir, run.step).exists()
                if distributed.from_first(str(is_saved)) == "False":
                    save(run)
                say(f"checkpoint of step {run.step} is written; the same command continues from it")
                distributed.wait()  # to the others, a process that ends earlier looks like one that failed
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
        run.verdicts.close()
        run.grader.close()
        run.pair.teacher.close()
        if run.sampler:
            run.sampler.close()


def _newest(run: Run) -> str:
    """A sentence about the newest checkpoint."""
    newest = checkpoint.newest(run.config.run_dir)
    return f"The newest checkpoint is {newest}." if newest else "There is no checkpoint yet."


def _dump_offenders(run: Run, step: int, rollouts: list[Rollout], reason: str) -> str:
    """Writes the update's rollouts, each with whether its statistics are finite, and returns a message about them."""
    path = run.config.run_dir / f"not_finite_step_{step:06d}.jsonl"
    lines, broken = [], []
    rollouts = [r for r in rollouts if counted_tokens(r, "keep")]
    batches = [make_micro_batches([r], 1, run.student.eos_ids[0], "keep")[0] for r in rollouts]
    needs = frozenset({"reverse_kl", "forward_kl"})
    scored = stats_by_batch(run.pair_outside_updates, batches, needs, run.phases.enter)
    for rollout, columns in zip(rollouts, scored, strict=True):
        finite = all(bool(column.isfinite().all()) for column in columns.values())
        broken += [] if finite else [rollout.sequence_id]
        record = {
            "sequence_id": rollout.sequence_id,
            "id": rollout.prompt.id,
            "finite": finite,
            "prompt_ids": rollout.prompt.token_ids,
            "response_ids": rollout.response_ids,
        }
        lines.append(json.dumps(record) + "\n")
    if run.record:
        files.write_whole(path, "".join(lines))
    which = f"rollouts {broken} have statistics that are not" if broken else "every rollout's statistics are"
    return (
        f"{reason}; {which} finite, all of the update are in {path}. Weights and optimizer were not changed. "
        f"{_newest(run)} Lower optim.lr, or look at these rollouts and at the teacher."
    )


def start(
    config: Config,
    weighter: TokenWeighter,
    sections: Mapping[str, Any],
    options: argparse.Namespace,
    observer: Observer | None = None,
) -> None:
    """Does what the arguments of a training command ask: trains and prints the run's folder, or only plans."""
    if options.dry_run:
        return dry_run(config, sections, weighter, options.resume)
    if options.verbose:
        say(resolved(config, sections))
    run_dir = run(config, weighter, sections, options.resume, observer)
    if distributed.is_first():
        print(run_dir)


def command(arguments: list[str]) -> None:
    options = COMMANDS["train"].parser().parse_args(arguments)
    config, _ = load_config(options.config, options.overrides)
    start(config, UniformWeighter(), {}, options)


if __name__ == "__main__":
    main(command)
