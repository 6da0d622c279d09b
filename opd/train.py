"""The run: build the pair, then rollout -> step -> log -> checkpoint -> evaluation, once per update.

    python -m opd.train --config configs/tiny.json [--set KEY=VALUE ...]

A run is a function of its configuration. Everything random is seeded by what it is (see seeds.py), so a run that was
stopped continues from its newest checkpoint exactly as if it had not been.
"""

import dataclasses
import json
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers

from opd import checkpoint, evaluate, grading, models
from opd.batch import make_micro_batches
from opd.cli import InputError, Interrupted, main, parser, say
from opd.config import ROOT, Config, load_config
from opd.data import Prompt, Rollout, count_steps, make_prompts, prompts_of_step, read_problems
from opd.engine import TorchEngine, pick_device
from opd.hooks import TokenWeighter, UniformWeighter
from opd.metrics import MetricsLog, Stopwatch, duration, peak_memory_gb, read_metrics, write_whole
from opd.models import LanguageModel
from opd.rollout import Decoding, sample
from opd.step import train_step

DIAGNOSTICS = frozenset({"student_entropy", "teacher_entropy", "reverse_kl", "forward_kl", "top1_agree"})
VERSIONED = ("torch", "transformers", "tokenizers", "safetensors", "numpy")


def run(
    config: Config,
    weighter: TokenWeighter | None = None,
    sections: Mapping[str, Any] | None = None,
    resume: str = "auto",
) -> Path:
    """Trains, or continues, the run of a configuration; returns its folder.

    Args:
        weighter: decides which tokens count; None is UniformWeighter(), plain on-policy distillation.
        sections: extension sections (name -> dataclass) that made the weighter; recorded and compared on resume.
        resume: "auto" continues an existing run folder of the same configuration; "none" refuses an existing one;
            else the path of one of its checkpoints to continue from.
    Raises:
        InputError: something in the configuration cannot be used.
        Interrupted: a signal stopped the run after it wrote a checkpoint.
    """
    weighter = weighter or UniformWeighter()
    identity = {
        "config": {**asdict(config), **{name: asdict(s) for name, s in (sections or {}).items()}},
        "weighter": f"{type(weighter).__module__}.{type(weighter).__qualname__}",
    }
    run_dir = config.run_dir
    start = _open_run(run_dir, identity, resume)
    if start == "done":
        say(f"{run_dir}: this run is complete")
        return run_dir

    torch.use_deterministic_algorithms(True, warn_only=True)
    device = pick_device(config.engine)
    student_section = replace(config.student, path=str(start), revision=None) if start else config.student
    student = models.load(student_section, device, "student")
    teacher = models.load(config.teacher, device, "teacher")
    vocab_size = models.shared_vocabulary(student, teacher)
    problems = read_problems(config.data.train, config.data.prompt_field, config.data.answer_field)
    prompts = make_prompts(problems, student.tokenizer, config.data, config.data.train)
    benchmarks = evaluate.load_benchmarks(config, student, config.eval.limit)
    _check_context(config, (student, teacher), [p for b in benchmarks for p in b.prompts] + prompts, benchmarks)
    total_steps = count_steps(prompts, config.rollout.prompts_per_step, config.data.epochs, config.optim.steps)
    engine = TorchEngine(student, config, total_steps)

    _write_identity(run_dir, identity)
    step = 0
    if start:
        step = checkpoint.verify(start)
        checkpoint.load_optimizer(start, engine)
        say(f"{run_dir}: continuing after step {step} of {total_steps}")
    else:
        say(
            f"{run_dir}: {total_steps} steps of {config.rollout.prompts_per_step} x {config.rollout.n} rollouts on {device}; "
            f"{config.engine.kind} engine, {config.rollout.engine} rollouts, {config.teacher.mode} teacher"
        )
    log = MetricsLog(run_dir, total_steps, step)
    stop = _Stop()

    def evaluate_here(name: str, lm: LanguageModel) -> None:
        if benchmarks:
            log.scalars(
                evaluate.scalars(
                    found := evaluate.evaluate(lm, benchmarks, config, vocab_size, run_dir / "eval" / name, stop.check)
                ),
                step,
            )
            say(f"{name}: {evaluate.line(found)}")

    def save() -> None:
        checkpoint.save(run_dir, step, student, engine, config.checkpoint.keep)

    try:
        with stop.listening():
            if step == 0:
                evaluate_here("teacher", teacher)
                evaluate_here("step_000000", student)
            while True:
                if step and _due(step, total_steps, config.eval.every):
                    evaluate_here(f"step_{step:06d}", student)
                if step == total_steps:
                    break
                metrics = _update(config, student, teacher, engine, prompts, weighter, vocab_size, step + 1, log, stop)
                step += 1
                log.write(step, metrics)
                if _due(step, total_steps, config.checkpoint.every):
                    save()
                stop.check()
    except Interrupted:
        if not checkpoint.folder(run_dir, step).exists():
            save()
        say(f"checkpoint of step {step} is written; the same command continues from it")
        raise
    finally:
        log.close()
    _write_summary(run_dir, student.name)
    return run_dir


def _update(
    config: Config,
    student: LanguageModel,
    teacher: LanguageModel,
    engine: TorchEngine,
    prompts: list[Prompt],
    weighter: TokenWeighter,
    vocab_size: int,
    step: int,
    log: MetricsLog,
    stop: "_Stop",
) -> dict[str, float]:
    """Rollouts and one training step; returns the metrics of the update."""
    begin = time.perf_counter()
    watch = Stopwatch(student.device)
    rollout, diagnose = config.rollout, _due(step, 1, config.log.diagnostics_every)
    with watch("rollout"):
        chosen = prompts_of_step(prompts, step, rollout.prompts_per_step, config.data.shuffle, config.seed)
        chosen = [prompt for prompt in chosen for _ in range(rollout.n)]
        decoding = Decoding(rollout.temperature, rollout.top_p, rollout.max_response_tokens)
        seeds = [(config.seed, "rollout", step, i) for i in range(len(chosen))]
        rollouts = sample(student, chosen, decoding, vocab_size, rollout.batch_size, seeds, lambda *_: stop.check())
    micro_batches = make_micro_batches(rollouts, config.optim.micro_batch_tokens, student.eos_ids[0], rollout.truncated)
    result = train_step(
        student=student,
        teacher=teacher,
        engine=engine,
        micro_batches=micro_batches,
        weighter=weighter,
        loss=config.loss,
        vocab_size=vocab_size,
        step=step,
        seed=config.seed,
        measure=DIAGNOSTICS if diagnose else frozenset(),
    )
    texts = [student.tokenizer.decode(r.response_ids, skip_special_tokens=True) for r in rollouts]
    metrics = {
        **result.metrics,
        **_rollout_metrics(rollouts, texts),
        **watch.times,
        "time/step": time.perf_counter() - begin,
        "memory/peak_gb": peak_memory_gb(student.device),
    }
    if diagnose:
        metrics.update(_diagnostics(result.stats))
        for i, (sampled, text) in enumerate(list(zip(rollouts, texts, strict=True))[: config.log.samples]):
            prompt = student.tokenizer.decode(sampled.prompt.token_ids)
            log.text(f"rollout/{i}", f"```\n{prompt}{text}\n```\nreference: `{sampled.prompt.answer}`", step)
    return metrics


def _rollout_metrics(rollouts: list[Rollout], texts: list[str]) -> dict[str, float]:
    metrics = {
        "rollout/length_mean": statistics.fmean(len(r.response_ids) for r in rollouts),
        "rollout/truncated": statistics.fmean(r.finish_reason == "length" for r in rollouts),
    }
    if rollouts[0].prompt.answer is not None:
        metrics["rollout/accuracy"] = statistics.fmean(
            grading.grade(text, r.prompt.answer).correct for r, text in zip(rollouts, texts, strict=True)
        )
    return metrics


def _diagnostics(stats: Any) -> dict[str, float]:
    """Means over the response tokens: student/entropy, teacher/entropy, divergence/reverse_kl, ... in nats."""
    names = {
        "student_entropy": "student/entropy",
        "teacher_entropy": "teacher/entropy",
        "reverse_kl": "divergence/reverse_kl",
        "forward_kl": "divergence/forward_kl",
        "top1_agree": "divergence/top1_agree",
    }
    return {metric: dataclasses.asdict(stats)[field].mean().item() for field, metric in names.items()}


def _due(step: int, last: int, every: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


class _Stop:
    """SIGINT and SIGTERM ask for a stop at the next safe place; a second one stops at once."""

    def __init__(self) -> None:
        self.signum = 0

    def listening(self) -> "_Stop":
        return self

    def __enter__(self) -> None:
        self.previous = {s: signal.signal(s, self._receive) for s in (signal.SIGINT, signal.SIGTERM)}

    def __exit__(self, *error: object) -> None:
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)

    def _receive(self, signum: int, frame: object) -> None:
        if self.signum:
            raise KeyboardInterrupt
        self.signum = signum
        say(f"{signal.Signals(signum).name}: stopping after a checkpoint (again: at once)")

    def check(self) -> None:
        if self.signum:
            raise Interrupted(self.signum)


def _open_run(run_dir: Path, identity: Mapping[str, Any], resume: str) -> Path | str | None:
    """Where to start: None for a new run, a checkpoint, or "done"."""
    recorded_path = run_dir / "config.json"
    if not run_dir.exists() or not any(run_dir.iterdir()):
        if resume not in ("auto", "none"):
            raise InputError(f"--resume {resume}: {run_dir} has no run to continue. Expected an existing run folder.")
        return None
    if resume == "none":
        raise InputError(f"{run_dir} exists, and --resume none starts a new run. Choose another --set run_name=NAME.")
    if not recorded_path.is_file():
        raise InputError(f"{run_dir} exists and is not a run folder (no config.json). Choose another run_name.")
    recorded = json.loads(recorded_path.read_text())
    differing = _differences({k: recorded.get(k) for k in identity}, json.loads(json.dumps(identity)))
    if differing:
        raise InputError(
            f"{run_dir} holds a run of another configuration; it differs in {'; '.join(differing)}. "
            "Choose another --set run_name=NAME, or give the same configuration to continue it."
        )
    if resume != "auto":
        try:
            checkpoint.verify(Path(resume))
        except checkpoint.CheckpointError as error:
            raise InputError(f"--resume {resume}: {error}. Expected a checkpoint of {run_dir}.") from None
        return Path(resume)
    if (run_dir / "summary.json").exists():
        return "done"
    return checkpoint.newest(run_dir)


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            d
            for key in sorted({*old, *new})
            for d in _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        ]
    return [] if old == new else [f"{path.removeprefix('config.')} (there {json.dumps(old)}, here {json.dumps(new)})"]


def _write_identity(run_dir: Path, identity: Mapping[str, Any]) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if (run_dir / "config.json").exists():
            return
        write_whole(
            run_dir / "config.json",
            json.dumps(
                {
                    **identity,
                    "versions": {name: metadata.version(name) for name in VERSIONED},
                    "python": platform.python_version(),
                    "git_commit": _git_commit(),
                    "command": shlex.join(["python", "-m", *sys.orig_argv[2:]])
                    if "-m" in sys.orig_argv
                    else shlex.join(sys.orig_argv),
                },
                indent=1,
            )
            + "\n",
        )
    except OSError as error:
        raise InputError(
            f"{run_dir} cannot be written ({error.strerror}). Set output_dir to a folder you may write to."
        ) from None


def _git_commit() -> str | None:
    result = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"],
        capture_output=True,
        text=True,
        check=False,
    )
    return result.stdout.strip() or None


def _check_context(
    config: Config, pair: tuple[LanguageModel, ...], prompts: list[Prompt], benchmarks: list[evaluate.LoadedBenchmark]
) -> None:
    longest_prompt = max(len(p.token_ids) for p in prompts)
    response = max([config.rollout.max_response_tokens, *(b.benchmark.max_response_tokens for b in benchmarks)])
    for lm in pair:
        if lm.context is not None and longest_prompt + response > lm.context:
            raise InputError(
                f"the longest prompt has {longest_prompt} tokens and a response may have {response}: together more than "
                f"the {lm.name}'s context of {lm.context}. Lower data.max_prompt_tokens, rollout.max_response_tokens or "
                "the benchmark's max_response_tokens."
            )


def _write_summary(run_dir: Path, name: str) -> None:
    """summary.json: the final figures of a run, from its own files."""
    rows = read_metrics(run_dir)
    evals = {p.parent.name: json.loads(p.read_text()) for p in sorted((run_dir / "eval").glob("*/summary.json"))}
    steps = sorted(n for n in evals if n.startswith("step_"))
    figures = {
        "steps": len(rows),
        "eval": {
            "teacher": evals.get("teacher"),
            "step_0": evals.get("step_000000"),
            "final": evals[steps[-1]] if steps else None,
        },
        "tokens": {k: sum(r[f"tokens/{k}"] for r in rows) for k in ("response", "kept")},
        "seconds": {k.removeprefix("time/"): sum(r[k] for r in rows) for k in rows[-1] if k.startswith("time/")},
        "seconds_evaluating": sum(b["time/evaluation"] for e in evals.values() for b in e.values()),
        "peak_memory_gb": max(r["memory/peak_gb"] for r in rows),
        "mass_covered": _mean(r["tip/mass_covered"] for r in rows if "tip/mass_covered" in r),
    }
    write_whole(run_dir / "summary.json", json.dumps(figures, indent=1) + "\n")
    say(f"{run_dir}: done, {duration(figures['seconds']['step'])} in {len(rows)} updates")


def _mean(values: Any) -> float | None:
    values = list(values)
    return statistics.fmean(values) if values else None


def command(arguments: list[str]) -> None:
    cli = train_parser("python -m opd.train", "On-policy distillation on every response token.")
    options = cli.parse_args(arguments)
    config, _ = load_config(options.config, options.overrides)
    print(run(config, UniformWeighter(), resume=options.resume))


def train_parser(prog: str, description: str) -> Any:
    """The arguments all training commands share."""
    transformers.logging.disable_progress_bar()
    cli = parser(prog, description)
    cli.add_argument(
        "--resume",
        default="auto",
        metavar="auto|none|DIR",
        help="auto: continue an existing run of the same config; none: refuse one; DIR: from that checkpoint",
    )
    return cli


if __name__ == "__main__":
    main(command)
