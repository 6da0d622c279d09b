"""Checks a configuration and this machine before a run.

    python -m opd.doctor --config configs/PAIR.json [--set KEY=VALUE ...]

Each line is a check that has passed, or says what to mend. The models are loaded, and one batch is sampled and scored.
`--dry-run` of the training commands makes the checks that need no weights, and prints plan and configuration.
"""

import json
import os
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch

from opd import adapters, distributed, launch, models, plan, privileged
from opd.batch import make_micro_batches
from opd.benchmarks import LoadedBenchmark, check_benchmarks, check_context, load_benchmarks, read_benchmarks
from opd.build import load_scorers, read_inputs
from opd.cli import command_line, main
from opd.commands import COMMANDS
from opd.config import Config, load_config
from opd.data import Prompt, Rollout, count_steps, read_problems, read_training_prompts
from opd.device import pick_device
from opd.engine.zero_file import read_deepspeed
from opd.errors import InputError
from opd.files import amount
from opd.hooks import TokenStats, TokenWeighter
from opd.models import LanguageModel
from opd.record import folder
from opd.record.boards import check_boards
from opd.record.identity import identity_of
from opd.rollout import Decoding
from opd.rollout.connection import check_installed
from opd.rollout.local import TransformersSampler
from opd.rollout.turns import Dialogue, open_dialogue
from opd.step import Pair, score_update
from opd.teacher import Teacher
from opd.teacher.choose import open_teacher, scoring_teacher
from opd.teacher.local import LocalTeacher

SCORED = 8  # prompts that are answered and scored
SCORED_TOKENS = 32  # the longest of these responses
SAME = 1e-4  # nats that a model may differ from itself by rounding
T = TypeVar("T")


def dry_run(config: Config, sections: Mapping[str, Any], weighter: TokenWeighter, resume: str) -> None:
    """Prints the plan, the command and the configuration of a run, and starts nothing.

    Raises InputError for whatever the run would find before its first update, except for what the weights alone show.
    """
    device = pick_device(config.engine)
    begin = folder.open_run(config.run_dir, identity_of(config, sections, read_benchmarks(config), weighter), resume)
    if config.rollout.engine == "vllm" and not config.rollout.servers:
        check_installed()
    check_boards(config)
    load_scorers(config, weighter)
    adapters.check_plain(config.student)
    student, teacher = models.outline(config.student, "student"), models.outline(config.teacher_model, "teacher")
    inputs = read_inputs(config, student, teacher)
    print(plan.describe(config, device, _plan(config, device, inputs.total_steps)))
    print(f"  data: {_lengths(inputs.prompts)}; {inputs.vocab_size} token ids are compared")
    if config.data.teacher_prompt:
        print(_both_prompts(inputs.prompts, student))
    where = {None: "a new run", folder.DONE: "the run in it is complete"}.get(begin, f"continues from {begin}")
    print(f"  folder: {config.run_dir}, {where}\n  command: {command_line()}\ndry run: nothing was started")
    print(resolved(config, sections))


def _both_prompts(prompts: Sequence[Prompt], student: LanguageModel) -> str:
    """A prompt as the student reads it, beside what the teacher reads; the first one that differs."""
    shown = next(prompt for prompt in prompts if prompt.privileged_ids is not None)
    texts = (
        json.dumps(student.tokenizer.decode(ids), ensure_ascii=False) for ids in (shown.token_ids, shown.teacher_ids)
    )
    return f"  prompt {shown.id}:\n    the student reads {next(texts)}\n    the teacher reads {next(texts)}"


def resolved(config: Config, sections: Mapping[str, Any]) -> str:
    """The whole configuration as JSON."""
    return json.dumps({**asdict(config), **{name: asdict(section) for name, section in sections.items()}}, indent=1)


def _plan(config: Config, device: torch.device, updates: int) -> plan.Plan:
    """The plan of one process, when as many are started as opd.launch starts."""
    zero = read_deepspeed(config)["zero_optimization"] if config.engine.kind == "deepspeed" else None
    here, machines = launch.processes(config.engine)
    return plan.plan_of(config, device, updates, zero, here * machines)


@dataclass
class Report:
    """Prints each check when it is made, and keeps what is to be mended."""

    faults: list[str] = field(default_factory=list)

    def check(self, name: str, work: Callable[[], T], describe: Callable[[T], str]) -> T | None:
        """The result of `work`, or None where it raises InputError."""
        try:
            result = work()
        except InputError as error:
            self.faults.append(name)
            _tell(f"mend  {name}: {error}")
            return None
        _tell(f"ok    {name}: {describe(result)}")
        return result


def _tell(text: str) -> None:
    if distributed.is_first():
        print(text, flush=True)


def examine(config: Config) -> list[str]:
    """Makes all checks that are possible, and returns the names of those that found something to mend."""
    report = Report()
    device = report.check("device", lambda: pick_device(config.engine), str)
    if device is None:
        return report.faults
    if config.engine.kind == "deepspeed":
        distributed.start(device)
    if config.rollout.engine == "vllm" and not config.rollout.servers:
        report.check("vLLM", check_installed, lambda _: "installed")
    report.check("boards", lambda: check_boards(config), lambda _: ", ".join(config.log.to) or "none")
    for path, prompt_field, answer_field in report.check("files", lambda: _files(config), _about_files) or ():
        read = partial(read_problems, path, prompt_field, answer_field)
        report.check(f"file {path}", read, lambda problems: f"{len(problems)} problems")
    student = report.check("student", lambda: models.load(config.student, device, "student"), _about)
    has_teacher = student is not None or not config.teacher_is_student
    teacher = report.check("teacher", lambda: open_teacher(config, student, device), _about) if has_teacher else None
    scoring = _scoring_teacher(report, config, teacher, device) if teacher else None
    prompts = benchmarks = vocab_size = None
    if student:
        section = config.data.environment
        dialogue = report.check("environment", lambda: open_dialogue(section, student, config.data), _about_dialogue)
        data = dialogue.data if dialogue else config.data
        training = partial(read_training_prompts, data, student.tokenizer, config.seed)
        if read := report.check("training data", training, lambda read: _lengths(read[0])):
            prompts, validation = read
            _tell(f"      held out as benchmark validation: {len(validation)}")
        benchmarks = report.check("benchmarks", lambda: load_benchmarks(config, student, None), _about_benchmarks)
    if student and teacher:
        vocab_size = report.check(
            "vocabularies", lambda: models.shared_vocabulary(student, teacher), lambda size: f"{size} shared token ids"
        )
    for lm in (student, teacher):
        if lm and prompts and benchmarks is not None:
            check = partial(_check_lengths, lm, config, prompts, benchmarks)
            report.check(f"context of the {lm.name}", check, lambda _, lm=lm: f"{lm.context or 'unlimited'} tokens")
    if prompts and teacher and config.data.teacher_prompt:
        add = partial(privileged.for_training, prompts, config, data, student, teacher)
        prompts = report.check("teacher prompts", add, lambda read: _both_prompts(read, student).strip())
    if prompts and teacher:
        report.check(
            "ids of the prompts", lambda: models.check_prompt_ids(prompts, teacher), lambda _: "in both models"
        )
    if prompts:
        _check_machine(report, config, device, prompts)
    if prompts and vocab_size and scoring:
        report.check("scoring", lambda: _score(config, student, scoring, vocab_size, prompts), _about_scoring)
    return report.faults


def _scoring_teacher(report: Report, config: Config, teacher: LanguageModel, device: torch.device) -> Teacher | None:
    """What scores with the teacher; None where its servers cannot be used."""
    if config.teacher.mode != "server":
        return scoring_teacher(config, teacher, device)
    return report.check(
        f"teacher servers {', '.join(config.teacher.servers)}",
        lambda: scoring_teacher(config, teacher, device),
        lambda served: f"the same teacher, with weights {served.weights}",
    )


def _files(config: Config) -> list[tuple[str, str, str | None]]:
    """Every file of problems with the fields that are read of it, for problem and answer."""
    data = config.data
    training = [(path, data.prompt_field, data.answer_field) for path in data.train]
    return training + [(b.file, b.prompt_field, b.answer_field) for b in read_benchmarks(config).values()]


def _about_files(files: Sequence[tuple[str, str, str | None]]) -> str:
    return f"{len(files)} sources of problems"


def _about(lm: LanguageModel) -> str:
    parameters = sum(p.ds_numel if lm.sharded else p.numel() for p in lm.model.parameters())
    return (
        f"{type(lm.model).__name__}, {parameters / 1e6:.2f} M parameters, computes in {lm.compute_dtype}; "
        f"{len(lm.tokenizer)} token ids, EOS {list(lm.eos_ids)}"
    )


def _about_dialogue(dialogue: Dialogue | None) -> str:
    if dialogue is None:
        return "none, a response is one turn"
    names = [tool.get("function", tool).get("name", "?") for tool in dialogue.environment.tools]
    tools = f"the tools {', '.join(map(str, names))}" if names else "no tools in the prompt"
    return f"{dialogue.limits.name}, version {dialogue.environment.version}, {tools}"


def _lengths(prompts: Sequence[Prompt]) -> str:
    lengths = [len(prompt.token_ids) for prompt in prompts]
    answers = sum(prompt.answer is not None for prompt in prompts)
    return (
        f"{len(prompts)} prompts of {statistics.median(lengths):g} tokens (median), the longest {max(lengths)}; "
        f"{answers} have a reference answer"
    )


def _about_benchmarks(benchmarks: Sequence[LoadedBenchmark]) -> str:
    return "; ".join(f"{loaded.name}: {_lengths(loaded.prompts)}" for loaded in benchmarks) or "none"


def _check_lengths(
    lm: LanguageModel, config: Config, prompts: Sequence[Prompt], benchmarks: Sequence[LoadedBenchmark]
) -> None:
    check_context(lm, "rollout.max_response_tokens", config.rollout.max_response_tokens, prompts)
    check_benchmarks(lm, benchmarks)


def _check_machine(report: Report, config: Config, device: torch.device, prompts: Sequence[Prompt]) -> None:
    """Compares what the run takes with what this machine has."""
    steps = partial(count_steps, prompts, config.rollout.prompts_per_step, config.data.epochs, config.optim.steps)
    if (updates := report.check("updates", steps, str)) is None:
        return
    if (needed := report.check("plan", lambda: _plan(config, device, updates), lambda _: "made")) is None:
        return
    report.check("memory", lambda: _check_memory(needed, device), str)
    report.check("disk", lambda: _check_disk(config, needed), str)
    hours = updates * sum(needed.seconds.values()) / 3600
    _tell(f"      time: {hours:.2g} h of updates, if every response were of full length; evaluations are not counted")


def _check_memory(needed: plan.Plan, device: torch.device) -> str:
    """Raises InputError where a phase of the plan is larger than the device, or the whole larger than the machine."""
    phase, peak = max(needed.peaks.items(), key=lambda item: item[1])
    host, machine, has = sum(needed.host.values()), plan.memory_of(torch.device("cpu")), plan.memory_of(device)
    on_gpu = device.type == "cuda"
    takes = peak if on_gpu else peak + host
    text = f"phase {phase} takes {amount(takes)} of the {device.type}'s {amount(has)}"
    if takes > has:
        lower = "Lower rollout.batch_size or optim.micro_batch_tokens."
        way = needed.way_to_fit(has - takes + peak) if phase == "update" else lower
        raise InputError(
            f"{text}. {way} engine.phases=2 and more devices (engine.kind=deepspeed) help too. --dry-run shows the "
            "parts."
        )
    if on_gpu and host > machine:
        raise InputError(f"host memory: the run takes {amount(host)} of {amount(machine)}. Set teacher.cache_gb.")
    return text


def _check_disk(config: Config, needed: plan.Plan) -> str:
    takes = (config.checkpoint.keep + 1) * needed.checkpoint + needed.spilled
    place = next(p for p in (config.run_dir.absolute(), *config.run_dir.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(place).free
    text = f"checkpoints and states take {amount(takes)} of {amount(free)} free at {place}"
    if takes > free:
        raise InputError(f"{text}. Make room, lower checkpoint.keep, or set another output_dir.")
    if not os.access(place, os.W_OK):
        raise InputError(f"{place} cannot be written. Set output_dir to a folder you may write to.")
    return text


@dataclass(frozen=True)
class _Scored:
    tokens: int
    from_itself: float  # the largest divergence of a token, in nats
    from_teacher: float  # the mean, in nats


def _score(
    config: Config, student: LanguageModel, teacher: Teacher, vocab_size: int, prompts: Sequence[Prompt]
) -> _Scored:
    """Samples a few responses, and scores them with the student as its own teacher and with the teacher."""
    chosen, rollout = prompts[:SCORED], config.rollout
    decoding = Decoding(rollout.temperature, rollout.top_p, min(rollout.max_response_tokens, SCORED_TOKENS))
    seeds = [(config.seed, "doctor", i) for i in range(len(chosen))]
    rollouts = TransformersSampler(student, SCORED).sample(chosen, decoding, vocab_size, seeds)
    plain = [replace(rollout, prompt=replace(rollout.prompt, privileged_ids=None)) for rollout in rollouts]

    def scores(scoring: Teacher, rollouts: Sequence[Rollout]) -> TokenStats:
        pair = Pair(student, scoring, vocab_size, config.loss)
        micro, pad_id = config.optim.micro_batch_tokens, student.eos_ids[0]
        batches = make_micro_batches(rollouts, micro, pad_id, "keep", min(student.packed_row, teacher.packed_row))
        return score_update(pair, batches, frozenset({"reverse_kl"}), 0)

    itself, other = scores(LocalTeacher(student), plain), scores(teacher, rollouts)
    scored = _Scored(len(itself.position), itself.reverse_kl.max().item(), other.reverse_kl.mean().item())
    if not scored.from_itself <= SAME:
        raise InputError(
            f"the divergence between the student and itself is {scored.from_itself:.2g} nats, expected 0, so scores "
            "would be wrong. Set student.dtype to 'float32' or another student.attn_implementation, and report this."
        )
    return scored


def _about_scoring(scored: _Scored) -> str:
    return (
        f"{scored.tokens} sampled tokens; KL(student || student) is at most {scored.from_itself:.1g} nats, "
        f"KL(student || teacher) {scored.from_teacher:.3g} nats on average"
    )


def command(arguments: list[str]) -> None:
    options = COMMANDS["doctor"].parser().parse_args(arguments)
    config, _ = load_config(options.config, options.overrides, ignore_extensions=True)
    if faults := examine(config):
        raise InputError(f"{options.config} is not ready: mend {', '.join(faults)}. The lines above say how.")
    _tell("ready")


if __name__ == "__main__":
    main(command)
