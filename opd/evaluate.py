"""Accuracy on held-out problems: a greedy response and k sampled ones per problem, every response written to disk.

    python -m opd.evaluate --config configs/PAIR.json --model outputs/RUN/checkpoints/step_000060

A file configs/benchmarks/NAME.json describes a benchmark: problems, prompt, decoding and version. This description and
the grader's version stand beside every number. Sampling is seeded per problem and sample, so two models are compared
on the same random numbers, and a repeated evaluation gives the same numbers.
"""

import hashlib
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from opd import distributed, grading, models, speculative
from opd.batch import counted_tokens, equally_many, make_micro_batches, share_of_rank
from opd.benchmarks import LoadedBenchmark, check_benchmarks, described, load_benchmarks
from opd.cli import main, say
from opd.commands import COMMANDS
from opd.config import Config, StudentSection, TeacherSection, load_config
from opd.data import Prompt, Rollout
from opd.device import pick_device
from opd.errors import InputError
from opd.files import lock, read_object, sha256, write_whole
from opd.measures import GREEDY
from opd.models import LanguageModel
from opd.privileged import for_benchmark
from opd.progress import Progress
from opd.record.evaluation import ACCEPTED, Figures, finished, line, summarise
from opd.responses import PARTIAL, Place, Subject, sampled
from opd.rollout.choose import fixed_sampler
from opd.rollout.turns import Dialogue
from opd.step import Pair, score_update
from opd.teacher.choose import open_teacher, scoring_teacher
from opd.teacher.local import load_teacher

UNGRADED_PERCENT = 1  # share of all answers above which the evaluation warns


def evaluate(
    subject: Subject,
    benchmarks: Sequence[LoadedBenchmark],
    config: Config,
    out: Path,
    grader: grading.Grader,
    stop: Callable[[bool], None] = lambda together: None,
    enter: Callable[[str], None] = lambda phase: None,
) -> dict[str, Figures]:
    """Evaluates a model on every benchmark and writes the folder `out`.

    All processes share the sampling; the first one writes and grades, while others are still sampled. A stopped
    evaluation continues from responses.partial.jsonl. At the end `<name>.jsonl` holds every prompt, response, extracted
    answer, verdict and vote. The file summary.json is written last.

    Args:
        stop: called while responses are generated, with True where all processes call it; it may raise to leave early.
        enter: called with the subject's phase before it generates, and as opd.step.stats_by_batch does.
    Returns:
        benchmark -> figures on the first process, and an empty dictionary on the others.
    """
    first, begin = distributed.is_first(), time.perf_counter()
    if first:
        _begin(out)
    by_name = {loaded.name: loaded for loaded in benchmarks}
    started: dict[Place, Started] = {}

    def finished(place: Place, rollout: Rollout) -> None:
        loaded = by_name[place[0]]
        if first and loaded.dialogue is None:  # an environment judges its conversations at the end
            started[place] = start_grading(subject.lm, rollout, grader, loaded.benchmark.answer_lines)

    enter(subject.phase)
    rollouts = sampled(subject, benchmarks, config, out / PARTIAL, stop, finished)
    sampling, tokens = time.perf_counter() - begin, sum(rollout.model_tokens for rollout in rollouts.values())
    summary = {}
    for loaded in benchmarks:
        begin = time.perf_counter()
        places = [(loaded.name, number, i) for number in loaded.numbers for i in range(len(loaded.prompts))]
        compared: dict[int, dict[str, float]] = {}
        if config.eval.reverse_kl and subject.pair is not None:
            scored = _scored(loaded.numbers, config.eval.reverse_kl_samples)
            chosen = {i: rollouts[place] for i, place in enumerate(places) if place[1] in scored}
            compared = _compared(subject.pair, chosen, config, stop, enter)
        if not first:
            continue
        with Progress(f"grading of {len(places)} responses"):
            numbered = [(place[1], rollouts[place], started.get(place)) for place in places]
            rows = _judged(subject.lm, numbered, loaded, grader)
        for i, numbers in compared.items():
            rows[i] |= numbers
        share = sum(row["tokens"] for row in rows) / tokens  # of the sampling, which benchmarks do together
        figures = _written(rows, loaded, config, out / f"{loaded.name}.jsonl")
        summary[loaded.name] = figures | {"time/evaluation": share * sampling + time.perf_counter() - begin}
    if first:
        write_whole(out / "summary.json", json.dumps(summary, indent=1) + "\n")
        _clear_partial(out)
    return summary


def _begin(out: Path) -> None:
    """Makes the folder of an evaluation. A summary in it could not be read, or nobody would evaluate again."""
    if (out / "summary.json").exists():
        say(f"warning: {out}: the evaluation in it is damaged and is made again")
        (out / "summary.json").unlink()
    out.mkdir(parents=True, exist_ok=True)


def _written(rows: Sequence[dict], loaded: LoadedBenchmark, config: Config, path: Path) -> dict[str, Any]:
    """Writes the rows of a benchmark, and returns their figures and what these are of, without the time."""
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
    _warn_of_ungraded(rows, path)
    return {
        **summarise(rows),
        "benchmark": described(loaded.benchmark),
        **_version(loaded.dialogue),
        "grader": grading.VERSION,
        "seed": config.seed,
        "responses_sha256": sha256(path),
    }


def known_figures(folder: Path, names: Collection[str]) -> dict[str, Figures] | None:
    """Returns `finished`, which the first process reads, on every process."""
    text = distributed.from_first(json.dumps(finished(folder, names)) if distributed.is_first() else "")
    return json.loads(text)


@dataclass(frozen=True)
class Started:
    """A response whose grading has started."""

    text: str
    verdict: Callable[[], grading.Verdict]  # waits for it


def start_grading(lm: LanguageModel, rollout: Rollout, grader: grading.Grader, answer_lines: bool) -> Started:
    """Starts to grade a response; `answer_lines` is the benchmark's."""
    text = lm.tokenizer.decode(rollout.response_ids, skip_special_tokens=True)
    return Started(text, grader.start(text, rollout.prompt.answer, answer_lines))


def _version(dialogue: Dialogue | None) -> dict[str, str]:
    return {"environment": dialogue.environment.version} if dialogue else {}


def _judged(
    lm: LanguageModel,
    numbered: Sequence[tuple[int, Rollout, Started | None]],
    loaded: LoadedBenchmark,
    grader: grading.Grader,
) -> list[dict[str, Any]]:
    if loaded.dialogue:
        return scored_by_environment(lm, [(number, rollout) for number, rollout, _ in numbered], loaded.dialogue)
    return graded(lm, numbered, grader)


def graded(
    lm: LanguageModel, numbered: Sequence[tuple[int, Rollout, Started]], grader: grading.Grader
) -> list[dict[str, Any]]:
    """A row, as Response, for every (sample number, response)."""
    verdicts = [started.verdict() for _, _, started in numbered]
    rows = [
        {
            "id": rollout.prompt.id,
            "sample": number,
            "prompt": lm.tokenizer.decode(rollout.prompt.token_ids),
            "response": started.text,
            "extracted": verdict.extracted,
            "answer": rollout.prompt.answer,
            "correct": verdict.correct,
            "vote": None,
            "finish_reason": rollout.finish_reason,
            "tokens": rollout.model_tokens,
        }
        for verdict, (number, rollout, started) in zip(verdicts, numbered, strict=True)
    ]
    samples = defaultdict(list)  # problem -> places of its sampled responses: the greedy one takes part in no vote
    for i, row in enumerate(rows):
        if row["sample"] != GREEDY:
            samples[row["id"]].append(i)
    votes = grading.votes([[verdicts[i] for i in places] for places in samples.values()], grader)
    for places, votes_of_problem in zip(samples.values(), votes, strict=True):
        for i, vote in zip(places, votes_of_problem, strict=True):
            rows[i]["vote"] = vote
    return rows


def scored_by_environment(
    lm: LanguageModel, numbered: Sequence[tuple[int, Rollout]], dialogue: Dialogue
) -> list[dict[str, Any]]:
    """A row, as Response, for every (sample number, conversation). A conversation takes part in no vote."""
    rows = []
    for number, rollout in numbered:
        score = dialogue.score(rollout)
        rows.append(
            {
                "id": rollout.prompt.id,
                "sample": number,
                "prompt": lm.tokenizer.decode(rollout.prompt.token_ids),
                "response": lm.tokenizer.decode(rollout.response_ids),
                "extracted": score.extracted if score else None,
                "answer": rollout.prompt.answer,
                "correct": score.correct if score else None,
                "vote": None,
                "finish_reason": rollout.finish_reason,
                "tokens": rollout.model_tokens,
                "share": score.share if score else None,
                "parts": dict(score.parts) if score else {},
                "turns": dialogue.texts(rollout),
            }
        )
    return rows


def _warn_of_ungraded(rows: Sequence[dict], path: Path) -> None:
    ungraded = sum(row["correct"] is None for row in rows)
    if 100 * ungraded <= UNGRADED_PERCENT * len(rows):
        return
    if "share" in rows[0]:
        say(
            f"warning: the environment failed in {ungraded} of {len(rows)} conversations of {path.stem}, and they "
            f'count as wrong. They are the rows with "correct": null in {path}. Mend the environment, raise its '
            "version, and evaluate again."
        )
    else:
        say(
            f"warning: the grader gave up on {ungraded} of {len(rows)} answers of {path.stem} (it crashed or ran out "
            f'of time), and they count as wrong. Look at the rows with "correct": null in {path}: if these are '
            "ordinary answers, the machine was too busy to grade; evaluate again, into a new folder, when it is not."
        )


def _scored(numbers: Sequence[int], most: int | None) -> tuple[int, ...]:
    """The numbers of the samples whose divergence is measured: the first `most` ones, else the greedy response."""
    samples = [number for number in numbers if number != GREEDY]
    return tuple(samples[:most]) if samples else (GREEDY,)


def _compared(
    pair: Pair,
    rollouts: Mapping[int, Rollout],
    config: Config,
    stop: Callable[[bool], None],
    enter: Callable[[str], None],
) -> dict[int, dict[str, float]]:
    """Per response the means over its tokens of what `summarise` calls by the same names. The processes share the work.

    A conversation that an environment broke has none.
    """
    rollouts = {i: rollout for i, rollout in rollouts.items() if counted_tokens(rollout, "keep")}
    numbered = [replace(rollout, sequence_id=i) for i, rollout in enumerate(rollouts.values())]
    share = share_of_rank(numbered, distributed.rank(), distributed.world_size())
    pad_id = pair.student.eos_ids[0]
    batches = make_micro_batches(share, config.optim.micro_batch_tokens, pad_id, "keep", pair.packed_row)
    batches = equally_many(batches, pad_id)
    needs = speculative.NEEDS | {"reverse_kl"}
    with Progress(f"comparison with the teacher of the {pair.student.name}", len(batches), "micro-batches") as progress:

        def advance(batches: int, tokens: int) -> None:
            progress.advance(batches, tokens)
            stop(True)

        stats = score_update(pair, batches, needs, 0, advance, enter)
    columns = {
        "reverse_kl": stats.reverse_kl.double(),
        "acceptance": (1 - stats.total_variation.double()).clamp(0, 1),
        ACCEPTED: speculative.accepted_lengths(stats),
    }
    zeros, tokens = torch.zeros(len(rollouts), dtype=torch.float64), [r.model_tokens for r in rollouts.values()]
    sums = {name: zeros.index_add(0, stats.sequence_id, column).tolist() for name, column in columns.items()}
    return {i: {name: sums[name][n] / tokens[n] for name in sums} for n, i in enumerate(rollouts)}


def command(arguments: list[str]) -> None:
    options = COMMANDS["evaluate"].parser().parse_args(arguments)
    chosen = [f"eval.benchmarks={json.dumps(options.benchmark)}"] if options.benchmark else []
    config, _ = load_config(options.config, [*options.overrides, *chosen], ignore_extensions=True)
    if not config.eval.benchmarks:
        raise InputError("eval.benchmarks is []: there is nothing to evaluate. Name one with --benchmark NAME.")
    parts = [part for part in options.model.parts[-3:] if part != "checkpoints"]
    out = options.out or Path(config.output_dir) / "eval" / "-".join(parts[-2:])
    limit = options.limit if options.limit is not None else config.eval.limit
    locked = lock(out, "--out") if os.environ.get("RANK", "0") == "0" else nullcontext()
    with locked, Progress(f"evaluation of {options.model.name}"):
        summary = _evaluate_command(config, str(options.model), limit, out)
    if distributed.is_first():
        say(line(summary))
        print(out / "summary.json")
    distributed.wait()


def _evaluate_command(config: Config, model: str, limit: int | None, out: Path) -> dict[str, Figures]:
    """Evaluates a model into `out`, whose lock the caller holds. Returns the figures on the first process."""
    device = pick_device(config.engine)
    if config.engine.kind == "deepspeed":
        distributed.start(device)
    say(f"model    {model}\nfolder   {out}")
    section: StudentSection | TeacherSection = replace(config.student, path=model, revision=None)
    if model == config.teacher.path:
        section = config.teacher  # in its own dtype, as in training
        lm = load_teacher(config, device, "model")
        models.set_chat_template(lm.tokenizer, config.student, f"model {model!r}")
    else:
        lm = models.load(section, device, "model")
    benchmarks = load_benchmarks(config, lm, limit)
    check_benchmarks(lm, benchmarks)
    if distributed.is_first():
        _same_or_clear(out, model, config, benchmarks)
    pair, vocab_size = None, len(lm.tokenizer)
    if config.eval.reverse_kl:
        teacher = _teacher_of(lm, config)
        benchmarks = [for_benchmark(loaded, config, lm, teacher) for loaded in benchmarks]
        pair = Pair(lm, scoring_teacher(config, teacher, device), models.shared_vocabulary(lm, teacher), config.loss)
        vocab_size = models.sampled_vocabulary(lm, teacher)
    prompts = [prompt for loaded in benchmarks for prompt in loaded.prompts]
    longest = max(loaded.benchmark.max_response_tokens for loaded in benchmarks)
    summary = known_figures(out, [loaded.name for loaded in benchmarks])
    if summary is None:
        with grading.Grader() as grader, fixed_sampler(lm, section, config, prompts, longest) as sampler:
            summary = evaluate(Subject(lm, sampler, vocab_size, pair), benchmarks, config, out, grader)
    return summary


def _teacher_of(lm: LanguageModel, config: Config) -> LanguageModel:
    """The teacher of an evaluated model. Raises InputError for an average, which its run alone has."""
    if config.teacher.weights == "ema":
        raise InputError(
            "eval.reverse_kl is true and teacher.weights is 'ema': the average of the student's weights is known to "
            "its run alone. Set eval.reverse_kl=false."
        )
    return open_teacher(config, lm, lm.device)


def _digest(prompts: Sequence[Prompt]) -> str:
    """One digest of problems, answers, tokenizer and chat template, because the prompts depend on all of them."""
    return hashlib.sha256(json.dumps([(p.id, p.token_ids, p.answer) for p in prompts]).encode()).hexdigest()


def _same_or_clear(out: Path, model: str, config: Config, benchmarks: Sequence[LoadedBenchmark]) -> None:
    """Keeps what `out` holds of an evaluation of the same model in the same way, and clears any other evaluation.

    So a stopped evaluation continues and a finished one is not made again. Raises InputError if it cannot write.
    """
    parameter_files = sorted(Path(model).glob("*.safetensors"))
    about = {
        "model": model,
        "weights": [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in parameter_files],
        "benchmarks": {b.name: [described(b.benchmark), _digest(b.prompts)] for b in benchmarks},
        "data": {key: value for key, value in asdict(config.data).items() if value or key != "teacher_prompt"},
        "dtype": config.student.dtype,
        "seed": config.seed,
        "grader": grading.VERSION,
        "environments": {b.name: b.dialogue.environment.version for b in benchmarks if b.dialogue},
        "batch_size": config.evaluation_batch,
        "reverse_kl": config.eval.reverse_kl
        and [config.teacher.path or [config.student.path, config.teacher.weights], config.eval.reverse_kl_samples],
    }
    path, text = out / "evaluation.json", json.dumps(about, indent=1) + "\n"
    try:
        with suppress(InputError):  # a missing or damaged file counts as another evaluation
            if read_object(path, "what an evaluation is of") == json.loads(text):
                return
        out.mkdir(parents=True, exist_ok=True)
        (out / "summary.json").unlink(missing_ok=True)
        _clear_partial(out)
        write_whole(path, text)
    except OSError as error:
        raise InputError(f"{out} cannot be written ({error.strerror}). Give another folder: --out DIR.") from None


def _clear_partial(out: Path) -> None:
    """Removes what a stopped evaluation has left, also by an older version, which had a file for each benchmark."""
    for outdated in out.glob("*.partial.jsonl"):
        outdated.unlink(missing_ok=True)


if __name__ == "__main__":
    main(command)
