"""Accuracy on held-out problems: a greedy response and k sampled ones per problem, every response written to disk.

    python -m opd.evaluate --config configs/PAIR.json --model outputs/RUN/checkpoints/step_000060

A benchmark is data (configs/benchmarks/NAME.json): problems, prompt, decoding and version; with the grader's version
they are written beside every number. Sampling is seeded per problem and sample, so that two models are compared on
the same random numbers and a repeated evaluation is the same evaluation.
"""

import hashlib
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from typing_extensions import TypedDict

from opd import distributed, grading, models
from opd.batch import empty_micro_batch, make_micro_batches, share_of_rank
from opd.benchmarks import GREEDY, LoadedBenchmark, check_benchmarks, load_benchmarks
from opd.cli import main, number_argument, parser, path_argument, say
from opd.config import Config, StudentSection, TeacherSection, load_config
from opd.data import Prompt, Rollout
from opd.errors import InputError
from opd.files import check, lock, read_object, read_rows, sha256, write_whole
from opd.launch import pick_device
from opd.models import LanguageModel
from opd.progress import Progress
from opd.rollout import Decoding, Sampler
from opd.rollout.choose import fixed_sampler
from opd.step import Pair, stats_by_batch
from opd.teacher.local import LocalTeacher, load_teacher

UNGRADED_PERCENT = 1  # of all answers; above it, an accuracy needs a second look
_Timed = TypedDict("_Timed", {"time/evaluation": float})  # seconds


class Figures(_Timed):
    """What summary.json holds of one benchmark; `summarise` says what the accuracies are."""

    problems: int
    greedy: float | None
    greedy_se: float | None
    k: int
    mean_at_k: float | None
    mean_at_k_se: float | None
    mean_at_k_se_passes: float | None
    pass_at: dict[str, float]
    maj_at_k: float | None
    reverse_kl: float | None
    ungraded: int
    truncated: float
    unformatted: float
    length_mean: float
    benchmark: dict[str, Any]
    grader: str
    seed: int
    responses_sha256: str  # of <benchmark>.jsonl beside it


class Response(TypedDict):
    """A line of <benchmark>.jsonl."""

    id: str
    sample: int  # GREEDY, or 0 to k - 1
    prompt: str
    response: str
    extracted: str | None
    vote: str | None  # a text of its class of equal answers; None: it takes part in no vote
    answer: str | None
    correct: bool | None  # None: the grader gave up
    finish_reason: str
    tokens: int


@dataclass(frozen=True)
class Subject:
    """A model that is evaluated, with what the evaluation needs of others."""

    lm: LanguageModel
    sampler: Sampler
    vocab_size: int  # ids that are sampled
    pair: Pair | None  # with its teacher, for eval.reverse_kl; None: not measured
    phase: str = "rollout"  # where the models must lie while it is sampled (opd.phases)


def evaluate(
    subject: Subject,
    benchmarks: Sequence[LoadedBenchmark],
    config: Config,
    out: Path,
    grader: grading.Grader,
    stop: Callable[[bool], None] = lambda together: None,
    enter: Callable[[str], None] = lambda phase: None,
) -> dict[str, Figures]:
    """Evaluates on every benchmark into `out`; returns name -> figures, on the first process, elsewhere nothing.

    The responses are shared out over all processes; the first one writes and grades. Responses are appended to
    `<name>.partial.jsonl` batch by batch, and a stopped evaluation continues from there; then `<name>.jsonl` (every
    prompt, response, extracted answer, verdict, vote) and at last summary.json are written whole.

    Args:
        stop: called while responses are generated, with True where all processes call it; may raise to leave early.
        enter: called with the subject's phase before it generates, and as opd.step.stats_by_batch does.
    """
    first, summary_path = distributed.is_first(), out / "summary.json"
    if first:
        if summary_path.exists():
            say(f"warning: {out}: the evaluation in it is damaged and is made again")
            summary_path.unlink()
        out.mkdir(parents=True, exist_ok=True)
    summary = {}
    for loaded in benchmarks:
        begin = time.perf_counter()
        enter(subject.phase)
        numbered = _responses(subject, loaded, config, out / f"{loaded.name}.partial.jsonl", stop)
        columns = [{} for _ in numbered]
        if config.eval.reverse_kl and subject.pair is not None:
            columns = _reverse_kl(subject.pair, [r for _, r in numbered], config, stop, enter)
        if not first:
            continue
        rows = graded(subject.lm, numbered, grader, loaded.benchmark.answer_lines)
        rows = [row | column for row, column in zip(rows, columns, strict=True)]
        write_whole(out / f"{loaded.name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        _warn_of_ungraded(rows, out / f"{loaded.name}.jsonl")
        summary[loaded.name] = {
            **summarise(rows),
            "benchmark": asdict(loaded.benchmark),
            "grader": grading.VERSION,
            "seed": config.seed,
            "responses_sha256": sha256(out / f"{loaded.name}.jsonl"),
            "time/evaluation": time.perf_counter() - begin,
        }
    if first:
        write_whole(summary_path, json.dumps(summary, indent=1) + "\n")
        for loaded in benchmarks:
            (out / f"{loaded.name}.partial.jsonl").unlink(missing_ok=True)
    return summary


def known_figures(folder: Path, names: Collection[str]) -> dict[str, Figures] | None:
    """As `finished`, the same on every process; the first one reads."""
    known = finished(folder, names) if distributed.is_first() else None
    text = distributed.from_first("" if known is None else json.dumps(known))
    return json.loads(text) if text else None


def finished(folder: Path, names: Collection[str]) -> dict[str, Figures] | None:
    """The figures of a finished evaluation on these benchmarks; None where there is none whose files are what was
    written."""
    path = folder / "summary.json"
    try:
        summary = read_summary(folder) if path.is_file() else None
        if summary is None or set(summary) != set(names):
            return None
        if any(sha256(folder / f"{n}.jsonl") != found["responses_sha256"] for n, found in summary.items()):
            return None
    except (InputError, OSError):
        return None
    return summary or None


def read_summary(folder: Path) -> dict[str, Figures]:
    """Benchmark -> figures, from an evaluation's summary.json. Raises InputError naming what is wrong with it."""
    path, expected = folder / "summary.json", "the figures of an evaluation"
    return check(read_object(path, expected), dict[str, Figures], str(path), expected)


def read_responses(path: Path) -> list[Response]:
    """The lines of an evaluation's <benchmark>.jsonl. Raises InputError naming the line that is wrong."""
    expected = "the responses of an evaluation"
    rows = [check(row, Response, f"{path}, line {number}", expected) for number, row in read_rows(path, expected)]
    if not rows:
        raise InputError(f"{path}: nothing is in it. Expected {expected}.")
    return rows


def _responses(
    subject: Subject, loaded: LoadedBenchmark, config: Config, partial: Path, stop: Callable[[bool], None]
) -> list[tuple[int, Rollout]]:
    """(sample number, response) of every problem, sample by sample; what `partial` holds is not generated again.

    The unit is a batch of fixed content for each process, so that a continued evaluation computes exactly what an
    unbroken one of as many processes does.
    """
    benchmark, size = loaded.benchmark, config.rollout.batch_size * distributed.world_size()
    order = sorted(range(len(loaded.prompts)), key=lambda i: -len(loaded.prompts[i].token_ids))
    batches = [(n, order[i : i + size]) for n in loaded.numbers for i in range(0, len(order), size)]
    first = distributed.is_first()
    lines = distributed.from_first(_read_partial(partial, len(batches)) if first else "").splitlines()
    done = {
        (r["sample"], i): response
        for r in map(json.loads, lines)
        for i, response in zip(r["problems"], r["responses"], strict=True)
    }
    found: dict[tuple[int, int], Rollout] = {}
    sampled = Decoding(benchmark.temperature, benchmark.top_p, benchmark.max_response_tokens)
    greedy = replace(sampled, temperature=0.0, top_p=1.0)
    with (
        partial.open("a", encoding="utf-8") if first else nullcontext() as file,
        Progress(f"{subject.lm.name} on {loaded.name}", len(batches) and len(order) * len(loaded.numbers)) as progress,
    ):

        def advance(responses: int, tokens: int) -> None:
            progress.advance(responses, tokens)
            stop(False)

        for number, chosen in batches:
            prompts = [loaded.prompts[i] for i in chosen]
            if all((number, i) in done for i in chosen):
                rollouts = [
                    Rollout(i, prompt, tuple(done[number, i][0]), done[number, i][1])
                    for i, prompt in zip(chosen, prompts, strict=True)
                ]
                progress.advance(len(rollouts), 0)
            else:
                decoding = greedy if number == GREEDY else sampled
                seeds = [(config.seed, "eval", loaded.name, p.id, number) for p in prompts]
                rollouts = subject.sampler.sample(prompts, decoding, subject.vocab_size, seeds, advance)
                if file:
                    responses = [(r.response_ids, r.finish_reason) for r in rollouts]
                    text = json.dumps({"sample": number, "problems": chosen, "responses": responses})
                    file.write(f"{crc32(text.encode()):08x} {text}\n")
                    file.flush()
                stop(True)
            found.update({(number, i): rollout for i, rollout in zip(chosen, rollouts, strict=True)})
    return [(number, found[number, i]) for number in loaded.numbers for i in range(len(order))]


def _read_partial(path: Path, batches: int) -> str:
    """The whole lines of an earlier, stopped evaluation, without their checksums; the file is cut back to them."""
    if not path.exists():
        return ""
    kept = []
    for line in path.read_bytes().split(b"\n"):
        check, _, text = line.partition(b" ")
        if check == f"{crc32(text):08x}".encode():  # else it was being written, or is damaged
            kept.append(text.decode())
    write_whole(path, "".join(f"{crc32(text.encode()):08x} {text}\n" for text in kept))
    say(f"{path.name}: {len(kept)} of {batches} batches are there")
    return "".join(text + "\n" for text in kept)


def graded(
    lm: LanguageModel, numbered: Sequence[tuple[int, Rollout]], grader: grading.Grader, lines: bool
) -> list[dict]:
    texts = [lm.tokenizer.decode(r.response_ids, skip_special_tokens=True) for _, r in numbered]
    verdicts = grader.grade([(t, r.prompt.answer) for t, (_, r) in zip(texts, numbered, strict=True)], lines)
    votes = _votes(numbered, verdicts, grader)
    return [
        {
            "id": rollout.prompt.id,
            "sample": number,
            "prompt": lm.tokenizer.decode(rollout.prompt.token_ids),
            "response": text,
            "extracted": verdict.extracted,
            "answer": rollout.prompt.answer,
            "correct": verdict.correct,  # null: the grader crashed or ran out of time; counts as wrong
            "vote": vote,  # null: it does not vote
            "finish_reason": rollout.finish_reason,
            "tokens": len(rollout.response_ids),
        }
        for text, verdict, vote, (number, rollout) in zip(texts, verdicts, votes, numbered, strict=True)
    ]


def _votes(
    numbered: Sequence[tuple[int, Rollout]], verdicts: Sequence[grading.Verdict], grader: grading.Grader
) -> list[str | None]:
    """For every response, the answer it votes for among its problem's samples; the greedy one does not vote."""
    problems: dict[str, list[int]] = {}
    for i, (number, rollout) in enumerate(numbered):
        if number != GREEDY:
            problems.setdefault(rollout.prompt.id, []).append(i)
    found: list[str | None] = [None] * len(numbered)
    chosen = grading.votes([[verdicts[i] for i in places] for places in problems.values()], grader)
    for places, votes in zip(problems.values(), chosen, strict=True):
        for i, vote in zip(places, votes, strict=True):
            found[i] = vote
    return found


def _warn_of_ungraded(rows: Sequence[dict], path: Path) -> None:
    ungraded = sum(row["correct"] is None for row in rows)
    if 100 * ungraded > UNGRADED_PERCENT * len(rows):
        say(
            f"warning: the grader gave up on {ungraded} of {len(rows)} answers of {path.stem} (it crashed or ran out "
            "of "
            f'time), and they count as wrong. Look at the rows with "correct": null in {path}: if these are ordinary '
            "answers, the machine was too busy to grade; evaluate again, into a new folder, when it is not."
        )


def _reverse_kl(
    pair: Pair,
    rollouts: Sequence[Rollout],
    config: Config,
    stop: Callable[[bool], None],
    enter: Callable[[str], None],
) -> list[dict[str, float]]:
    """Per response {"reverse_kl": mean KL(student || teacher) over its tokens, nats}; the ranks share the work."""
    numbered = [replace(rollout, sequence_id=i) for i, rollout in enumerate(rollouts)]
    mine = share_of_rank(numbered, distributed.rank(), distributed.world_size())
    batches = make_micro_batches(mine, config.optim.micro_batch_tokens, pair.student.eos_ids[0], "keep")
    missing = int(distributed.largest(len(batches))) - len(batches)
    columns = {"sequence_id": [torch.zeros(0, dtype=torch.long)], "reverse_kl": [torch.zeros(0)]}
    batches += [empty_micro_batch(pair.student.eos_ids[0])] * missing
    scored = stats_by_batch(pair, batches, frozenset({"reverse_kl"}), enter)
    for batch, found in zip(batches, scored, strict=True):
        columns["sequence_id"].append(batch.sequence_id)
        columns["reverse_kl"].append(found["reverse_kl"])
        stop(True)
    joined, _ = distributed.gather_rows({name: torch.cat(parts) for name, parts in columns.items()})
    sums = [0.0] * len(rollouts)
    for i, value in zip(joined["sequence_id"].tolist(), joined["reverse_kl"].tolist(), strict=True):
        sums[i] += value
    return [{"reverse_kl": total / len(r.response_ids)} for total, r in zip(sums, rollouts, strict=True)]


def summarise(rows: Sequence[dict]) -> dict[str, Any]:
    """Figures of one benchmark's responses; accuracies in [0, 1] over all of them, and what is ungraded is not right.

    mean_at_k: mean over problems of the share of right samples; its standard error over problems (`mean_at_k_se`) and
    over the k passes (`mean_at_k_se_passes`). pass_at: unbiased pass@j for j = 1, 2, 4, ... and k. maj_at_k: share of
    problems whose most frequent answer is right, ties counted in parts. `reverse_kl`: mean over the tokens of the
    sampled responses (the greedy ones without samples), nats. `ungraded`: how many the grader gave up on. None: not
    measured.
    """
    greedy = [float(r["correct"] is True) for r in rows if r["sample"] == GREEDY]
    problems: dict[str, list[dict]] = {}
    passes: dict[int, list[float]] = {}
    for row in rows:
        if row["sample"] != GREEDY:
            problems.setdefault(row["id"], []).append(row)
            passes.setdefault(row["sample"], []).append(float(row["correct"] is True))
    groups = list(problems.values())
    right = [sum(r["correct"] is True for r in group) for group in groups]
    means = [count / len(group) for count, group in zip(right, groups, strict=True)]
    k = max(map(len, groups), default=0)
    sizes = sorted({2**i for i in range(k.bit_length()) if 2**i <= k} | ({k} if k else set()))
    scored = [r for r in rows if "reverse_kl" in r and (r["sample"] != GREEDY) == bool(problems)]
    return {
        "problems": len({r["id"] for r in rows}),
        "greedy": statistics.fmean(greedy) if greedy else None,
        "greedy_se": standard_error(greedy),
        "k": k,
        "mean_at_k": statistics.fmean(means) if means else None,
        "mean_at_k_se": standard_error(means),
        "mean_at_k_se_passes": standard_error([statistics.fmean(values) for values in passes.values()]),
        "pass_at": {
            str(j): statistics.fmean(pass_at(len(group), count, j) for count, group in zip(right, groups, strict=True))
            for j in sizes
        },
        "maj_at_k": statistics.fmean(map(majority, groups)) if groups else None,
        "reverse_kl": sum(r["reverse_kl"] * r["tokens"] for r in scored) / sum(r["tokens"] for r in scored)
        if scored
        else None,
        "ungraded": sum(r["correct"] is None for r in rows),
        "truncated": statistics.fmean(r["finish_reason"] == "length" for r in rows),
        "unformatted": statistics.fmean(r["extracted"] is None for r in rows),
        "length_mean": statistics.fmean(r["tokens"] for r in rows),
    }


def pass_at(n: int, right: int, j: int) -> float:
    """Probability that j of n samples, drawn without replacement, hold a right one: 1 - C(n - right, j) / C(n, j)."""
    return 1.0 - math.comb(n - right, j) / math.comb(n, j)


def majority(group: Sequence[dict]) -> float:
    """1 if the most frequent answer of a problem is right; of several equally frequent, the share that is.

    A row's vote names the answer it stands for (opd.grading.votes). An answer is right if one of its voters was found
    right: another one of the same text may have been ungraded.
    """
    votes: dict[str, list[bool]] = {}
    for row in group:
        if row["vote"] is not None:
            votes.setdefault(row["vote"], []).append(row["correct"] is True)
    if not votes:
        return 0.0
    most = max(map(len, votes.values()))
    return statistics.fmean(float(any(right)) for right in votes.values() if len(right) == most)


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean, over problems; None below two."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def scalars(summary: dict[str, dict], prefix: str) -> dict[str, float]:
    """TensorBoard names, <prefix>/<benchmark>/<figure>."""
    figures = ("greedy", "mean_at_k", "maj_at_k", "reverse_kl", "ungraded", "truncated", "unformatted", "length_mean")
    return {
        f"{prefix}/{name}/{figure}": values[figure]
        for name, values in summary.items()
        for figure in figures
        if values[figure] is not None
    }


def line(summary: dict[str, dict]) -> str:
    """One line for the console."""
    return "; ".join(" ".join([name, *_parts(v)]) for name, v in summary.items())


def _parts(figures: dict) -> Iterator[str]:
    if figures["greedy"] is not None:
        yield f"greedy {percent(figures['greedy'], figures['greedy_se'])}"
    if figures["mean_at_k"] is not None:
        yield f"mean@{figures['k']} {percent(figures['mean_at_k'], figures['mean_at_k_se'])}"
    if figures["reverse_kl"] is not None:
        yield f"reverse KL {figures['reverse_kl']:.4f}"
    if figures["ungraded"]:
        yield f"ungraded {figures['ungraded']}"


def percent(value: float, error: float | None) -> str:
    return f"{100 * value:.1f}" + (f" +- {100 * error:.1f}" if error is not None else "")


def command(arguments: list[str]) -> None:
    cli = parser("python -m opd.evaluate", "Evaluate one model on a config's benchmarks.")
    cli.add_argument("--model", required=True, type=path_argument, metavar="DIR", help="checkpoint folder or hub name")
    cli.add_argument("--benchmark", action="append", metavar="NAME", help="instead of the config's; repeatable")
    cli.add_argument("--limit", type=number_argument(1), metavar="N", help="only the first N problems of each")
    cli.add_argument("--out", type=path_argument, metavar="DIR", help="default: OUTPUT_DIR/eval/<the model's name>")
    options = cli.parse_args(arguments)
    chosen = [f"eval.benchmarks={json.dumps(options.benchmark)}"] if options.benchmark else []
    config, _ = load_config(options.config, [*options.overrides, *chosen], ignore_extensions=True)
    if not config.eval.benchmarks:
        raise InputError("eval.benchmarks is []: there is nothing to evaluate. Name one with --benchmark NAME.")
    parts = [part for part in options.model.parts[-3:] if part != "checkpoints"]
    out = options.out or Path(config.output_dir) / "eval" / "-".join(parts[-2:])
    limit = options.limit if options.limit is not None else config.eval.limit
    with lock(out, "--out") if os.environ.get("RANK", "0") == "0" else nullcontext():
        _evaluate_command(config, str(options.model), limit, out)


def _evaluate_command(config: Config, model: str, limit: int | None, out: Path) -> None:
    """Evaluates a model into `out`, as its only writer."""
    section: StudentSection | TeacherSection = StudentSection(
        path=model, revision=None, dtype=config.student.dtype, attn_implementation=config.student.attn_implementation
    )
    if model == config.teacher.path:
        section = config.teacher  # in its own dtype, as in training
    device = pick_device(config.engine)
    if config.engine.kind == "deepspeed":
        distributed.start(device)
    lm = load_teacher(config, device, "model") if section is config.teacher else models.load(section, device, "model")
    benchmarks = load_benchmarks(config, lm, limit)
    check_benchmarks(lm, benchmarks)
    if distributed.is_first():
        _same_or_clear(out, model, config, benchmarks)
    pair, vocab_size = None, len(lm.tokenizer)
    if config.eval.reverse_kl:
        teacher = load_teacher(config, lm.device)
        pair = Pair(lm, LocalTeacher(teacher), models.shared_vocabulary(lm, teacher), config.loss)
        vocab_size = models.sampled_vocabulary(lm, teacher)
    prompts = [prompt for b in benchmarks for prompt in b.prompts]
    longest = max(b.benchmark.max_response_tokens for b in benchmarks)
    summary = known_figures(out, [b.name for b in benchmarks])
    if summary is None:
        with grading.Grader() as grader, fixed_sampler(lm, section, config, prompts, longest) as sampler:
            summary = evaluate(Subject(lm, sampler, vocab_size, pair), benchmarks, config, out, grader)
    if distributed.is_first():
        say(line(summary))
        print(out / "summary.json")
    distributed.wait()


def _digest(prompts: Sequence[Prompt]) -> str:
    """Of problems, answers, tokenizer and chat template at once: they are what the prompts are made of."""
    return hashlib.sha256(json.dumps([(p.id, p.token_ids, p.answer) for p in prompts]).encode()).hexdigest()


def _recorded(path: Path) -> Any:
    """What evaluation.json holds; None where there is none that can be read."""
    try:
        return read_object(path, "what an evaluation is of")
    except InputError:
        return None


def _same_or_clear(out: Path, model: str, config: Config, benchmarks: Sequence[LoadedBenchmark]) -> None:
    """A stopped evaluation of the same model in the same way continues, a finished one stands; another one is
    cleared."""
    weights = sorted(Path(model).glob("*.safetensors"))
    about = {
        "model": model,
        "weights": [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in weights],
        "benchmarks": {b.name: [asdict(b.benchmark), _digest(b.prompts)] for b in benchmarks},
        "data": asdict(config.data),
        "dtype": config.student.dtype,
        "seed": config.seed,
        "grader": grading.VERSION,
        "batch_size": config.rollout.batch_size,
        "reverse_kl": config.eval.reverse_kl and config.teacher.path,
    }
    about = json.loads(json.dumps(about))
    recorded = out / "evaluation.json"
    try:
        if _recorded(recorded) == about:
            return
        out.mkdir(parents=True, exist_ok=True)
        for path in (*out.glob("*.partial.jsonl"), out / "summary.json"):
            path.unlink(missing_ok=True)
        write_whole(recorded, json.dumps(about, indent=1) + "\n")
    except OSError as error:
        raise InputError(f"{out} cannot be written ({error.strerror}). Give another folder: --out DIR.") from None


if __name__ == "__main__":
    main(command)
