"""Accuracy on held-out problems: one greedy response and k sampled ones per problem, every response written to disk.

    python -m opd.evaluate --config configs/tiny.json --model outputs/tiny/student

A benchmark is data (configs/benchmarks/NAME.json): problems, prompt, decoding and version; with the grader's version
they are written beside every number. Sampling is seeded per problem and sample, so that two models are compared on
the same random numbers and a repeated evaluation is the same evaluation.
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

from opd import grading, models
from opd.batch import make_micro_batches
from opd.cli import InputError, main, parser, say
from opd.config import ROOT, Config, Count, Student, Teacher, Text, build, doc, load_config, read_json_object, strict
from opd.data import Prompt, Rollout, make_prompts, read_problems
from opd.engine import pick_device
from opd.metrics import Progress, write_whole
from opd.models import LanguageModel
from opd.rollout import Decoding, sample
from opd.step import pair_stats

GREEDY = -1  # sample number of the greedy response in the files


@strict
class Benchmark:
    """What an accuracy is measured on, and how."""

    version: Annotated[int, doc("Raised whenever any field changes the numbers.", ge=1)]
    file: Annotated[Text, doc("JSONL file, one problem per line.")]
    prompt_field: Annotated[Text, doc("Field with the problem: a string or a list of messages.")]
    answer_field: Annotated[Text, doc("Field with the reference answer.")]
    instruction: Annotated[str, doc("Text appended to the problem.")]
    temperature: Annotated[float, doc("Of the k samples of mean@k. Paper: 1.0.", gt=0)]
    top_p: Annotated[float, doc("Of the k samples. Not stated in the paper.", gt=0, le=1)]
    max_response_tokens: Annotated[Count, doc("A response is cut here. Tokens.")]


@dataclass(frozen=True)
class LoadedBenchmark:
    name: str
    benchmark: Benchmark
    prompts: list[Prompt]


def read_benchmarks(config: Config) -> dict[str, Benchmark]:
    """The config's benchmarks by name. Raises InputError naming the file that is wrong."""
    found = {}
    for entry in config.eval.benchmarks:
        path = Path(entry) if entry.endswith(".json") else ROOT / "configs" / "benchmarks" / f"{entry}.json"
        if not path.is_file():
            known = sorted(p.stem for p in (ROOT / "configs" / "benchmarks").glob("*.json"))
            raise InputError(f"eval.benchmarks: no benchmark {entry!r}; there are {known}, or give the path of a file.")
        if path.stem in found:
            raise InputError(f"eval.benchmarks: two benchmarks are named {path.stem!r}. Rename one of the files.")
        found[path.stem] = build(Benchmark, read_json_object(path), str(path))
    return found


def load_benchmarks(config: Config, lm: LanguageModel, limit: int | None) -> list[LoadedBenchmark]:
    """Benchmarks with their problems as prompts of a model. Raises InputError naming the file that is wrong."""
    loaded = []
    for name, benchmark in read_benchmarks(config).items():
        problems = read_problems(benchmark.file, benchmark.prompt_field, benchmark.answer_field)[:limit]
        ids = [problem.id for problem in problems]
        if len(set(ids)) < len(ids):
            twice = next(i for i in ids if ids.count(i) > 1)
            raise InputError(
                f"{benchmark.file}: the id {twice!r} stands twice. Give every problem of a benchmark its own."
            )
        prompts = make_prompts(problems, lm.tokenizer, config.data, benchmark.file, benchmark.instruction)
        loaded.append(LoadedBenchmark(name, benchmark, prompts))
    return loaded


def evaluate(
    lm: LanguageModel,
    teacher: LanguageModel | None,
    benchmarks: Sequence[LoadedBenchmark],
    config: Config,
    vocab_size: int,
    out: Path,
    stop: Callable[[], None] = lambda: None,
) -> dict[str, dict]:
    """Evaluates on every benchmark unless `out` already holds the result; returns name -> figures.

    A model is sampled over its own whole vocabulary, so that its accuracy does not depend on whom it is paired with.
    Writes `<name>.jsonl` (every prompt, response, extracted answer, verdict) and then summary.json.

    Args:
        teacher: for eval.reverse_kl; None, or the evaluated model itself: not measured.
        vocab_size: ids compared in eval.reverse_kl.
        stop: called while responses are generated; may raise to leave early.
    """
    summary_path = out / "summary.json"
    if summary_path.exists():
        return json.loads(summary_path.read_text())
    out.mkdir(parents=True, exist_ok=True)
    summary = {}
    for loaded in benchmarks:
        begin = time.perf_counter()
        rollouts = _responses(lm, loaded, config, stop)
        rows = [_row(lm, number, rollout) for number, rollout in rollouts]
        if config.eval.reverse_kl and teacher is not None and teacher is not lm:
            columns = _reverse_kl(lm, teacher, [r for _, r in rollouts], config, vocab_size, stop)
            rows = [{**row, "reverse_kl": value} for row, value in zip(rows, columns, strict=True)]
        write_whole(out / f"{loaded.name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        summary[loaded.name] = {
            **summarise(rows),
            "benchmark": asdict(loaded.benchmark),
            "grader": grading.VERSION,
            "seed": config.seed,
            "time/evaluation": time.perf_counter() - begin,
        }
    write_whole(summary_path, json.dumps(summary, indent=1) + "\n")
    return summary


def _responses(
    lm: LanguageModel, loaded: LoadedBenchmark, config: Config, stop: Callable[[], None]
) -> list[tuple[int, Rollout]]:
    """(sample number, response) of every problem: the greedy ones, then k rounds of sampled ones."""
    benchmark = loaded.benchmark
    sampled = Decoding(benchmark.temperature, benchmark.top_p, benchmark.max_response_tokens)
    found = []
    with Progress(f"{lm.name} on {loaded.name}", len(loaded.prompts) * (1 + config.eval.k)) as progress:

        def advance(responses: int, tokens: int) -> None:
            progress.advance(responses, tokens)
            stop()

        for number in (GREEDY, *range(config.eval.k)):
            decoding = replace(sampled, temperature=0.0, top_p=1.0) if number == GREEDY else sampled
            seeds = [(config.seed, "eval", loaded.name, p.id, number) for p in loaded.prompts]
            rollouts = sample(
                lm, loaded.prompts, decoding, len(lm.tokenizer), config.rollout.batch_size, seeds, advance
            )
            found += [(number, rollout) for rollout in rollouts]
    return found


def _row(lm: LanguageModel, number: int, rollout: Rollout) -> dict:
    text = lm.tokenizer.decode(rollout.response_ids, skip_special_tokens=True)
    verdict = grading.grade(text, rollout.prompt.answer)
    return {
        "id": rollout.prompt.id,
        "sample": number,
        "prompt": lm.tokenizer.decode(rollout.prompt.token_ids),
        "response": text,
        "extracted": verdict.extracted,
        "answer": rollout.prompt.answer,
        "correct": verdict.correct,
        "finish_reason": rollout.finish_reason,
        "tokens": len(rollout.response_ids),
    }


def _reverse_kl(
    lm: LanguageModel,
    teacher: LanguageModel,
    rollouts: Sequence[Rollout],
    config: Config,
    vocab_size: int,
    stop: Callable[[], None],
) -> list[float]:
    """Mean KL(student || teacher) over the tokens of each response, nats."""
    numbered = [replace(rollout, sequence_id=i) for i, rollout in enumerate(rollouts)]
    sums = [0.0] * len(rollouts)
    for batch in make_micro_batches(numbered, config.optim.micro_batch_tokens, lm.eos_ids[0], "keep"):
        values = pair_stats(lm, teacher, batch, vocab_size, config.loss, frozenset({"reverse_kl"}))["reverse_kl"]
        for i, value in zip(batch.sequence_id.tolist(), values.tolist(), strict=True):
            sums[i] += value
        stop()
    return [total / len(rollout.response_ids) for total, rollout in zip(sums, rollouts, strict=True)]


def summarise(rows: Sequence[dict]) -> dict[str, float | int | None]:
    """Greedy accuracy and mean@k with standard errors over problems, in [0, 1]; shares over all responses.

    `reverse_kl` is the mean over the tokens of the sampled responses (of the greedy ones when k is 0), nats; None where
    it was not measured.
    """
    greedy = [float(r["correct"]) for r in rows if r["sample"] == GREEDY]
    by_problem: dict[str, list[float]] = {}
    for row in rows:
        if row["sample"] != GREEDY:
            by_problem.setdefault(row["id"], []).append(float(row["correct"]))
    means = [statistics.fmean(values) for values in by_problem.values()]
    scored = [r for r in rows if "reverse_kl" in r and (r["sample"] != GREEDY) == bool(means)]
    return {
        "problems": len(greedy),
        "greedy": statistics.fmean(greedy),
        "greedy_se": standard_error(greedy),
        "k": len(next(iter(by_problem.values()), [])),
        "mean_at_k": statistics.fmean(means) if means else None,
        "mean_at_k_se": standard_error(means),
        "reverse_kl": sum(r["reverse_kl"] * r["tokens"] for r in scored) / sum(r["tokens"] for r in scored)
        if scored
        else None,
        "truncated": statistics.fmean(r["finish_reason"] == "length" for r in rows),
        "unformatted": statistics.fmean(r["extracted"] is None for r in rows),
        "length_mean": statistics.fmean(r["tokens"] for r in rows),
    }


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean, over problems; None below two."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def scalars(summary: dict[str, dict], prefix: str) -> dict[str, float]:
    """TensorBoard names, <prefix>/<benchmark>/<figure>."""
    figures = ("greedy", "mean_at_k", "reverse_kl", "truncated", "unformatted", "length_mean")
    return {
        f"{prefix}/{name}/{figure}": values[figure]
        for name, values in summary.items()
        for figure in figures
        if values[figure] is not None
    }


def line(summary: dict[str, dict]) -> str:
    """One line for the console."""
    return "; ".join(
        f"{name} greedy {percent(v['greedy'], v['greedy_se'])}"
        + (f", mean@{v['k']} {percent(v['mean_at_k'], v['mean_at_k_se'])}" if v["k"] else "")
        + (f", reverse KL {v['reverse_kl']:.4f}" if v["reverse_kl"] is not None else "")
        for name, v in summary.items()
    )


def percent(value: float, error: float | None) -> str:
    return f"{100 * value:.1f}" + (f" +- {100 * error:.1f}" if error is not None else "")


def command(arguments: list[str]) -> None:
    cli = parser("python -m opd.evaluate", "Evaluate one model on a config's benchmarks.")
    cli.add_argument("--model", required=True, metavar="DIR", help="checkpoint folder or hub name")
    cli.add_argument("--benchmark", action="append", metavar="NAME", help="instead of the config's; repeatable")
    cli.add_argument("--limit", type=int, metavar="N", help="only the first N problems of each")
    cli.add_argument("--out", type=Path, metavar="DIR", help="default: OUTPUT_DIR/eval/<the model's name>")
    options = cli.parse_args(arguments)
    if options.limit is not None and options.limit < 1:
        raise InputError(f"--limit is {options.limit}, expected a positive number of problems.")
    config, _ = load_config(options.config, options.overrides, ignore=("tip",))
    if options.benchmark:
        config = replace(config, eval=replace(config.eval, benchmarks=tuple(options.benchmark)))
    section: Student | Teacher = Student(
        path=options.model,
        revision=None,
        dtype=config.student.dtype,
        attn_implementation=config.student.attn_implementation,
    )
    if options.model == config.teacher.path:
        section = config.teacher  # in its own dtype, as in training
    lm = models.load(section, pick_device(config.engine), "model")
    limit = options.limit if options.limit is not None else config.eval.limit
    benchmarks = load_benchmarks(config, lm, limit)
    parts = [part for part in Path(options.model).parts[-3:] if part != "checkpoints"]
    out = options.out or Path(config.output_dir) / "eval" / "-".join(parts[-2:])
    (out / "summary.json").unlink(missing_ok=True)  # asked for again: measured again
    teacher, vocab_size = None, len(lm.tokenizer)
    if config.eval.reverse_kl:
        teacher = models.load(config.teacher, lm.device, "teacher")
        vocab_size = models.shared_vocabulary(lm, teacher)
    summary = evaluate(lm, teacher, benchmarks, config, vocab_size, out)
    say(line(summary))
    print(out / "summary.json")


if __name__ == "__main__":
    main(command)
