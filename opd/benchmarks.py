"""Benchmarks: the files configs/benchmarks/NAME.json, and their problems as prompts of a model.

`python -m opd.benchmarks` prints the JSON schema of these files, configs/benchmark_schema.json.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from opd.config import (
    COLDEST,
    DRAFT,
    MOST_SAMPLES,
    ROOT,
    SCHEMA_KEY,
    Config,
    Count,
    EnvironmentSection,
    Source,
    Text,
    build,
    doc,
    environment_faults,
    read_json_object,
    strict,
)
from opd.data import Prompt, make_prompts, read_problems
from opd.errors import InputError
from opd.measures import GREEDY
from opd.models import LanguageModel
from opd.rollout.turns import Dialogue, open_dialogue

VALIDATION = "validation"  # name of the benchmark that consists of held-out training prompts


@strict
class Benchmark:
    """The problems of a benchmark, and how a model answers them."""

    version: int = doc("Number that rises with every change that changes the figures.", ge=1)
    file: Source = doc("The problems: a file, a folder or a data set of the hub, as in data.train.")
    prompt_field: Text = doc("Field with the problem: a string or a list of messages.")
    answer_field: Text | None = doc("Field with the reference answer; null: none, where an environment scores.")
    instruction: str = doc("Text that is appended to the problem.")
    greedy: bool = doc("Also generate one greedy response per problem.")
    k: int = doc("Sampled responses per problem, for mean@k, pass@k and maj@k. Paper: 16.", ge=0, le=MOST_SAMPLES)
    temperature: float = doc("Temperature of the k samples. Paper: 1.0.", ge=COLDEST)
    top_p: float = doc("Nucleus of the k samples. Not stated in the paper.", gt=0, le=1)
    top_k: Count | None = doc(
        "Only so many of the likeliest tokens are drawn in the k samples, and top_p is a share of their probability. "
        "null: all. Not stated in the paper.",
        default=None,
    )
    max_response_tokens: Count = doc("A response is cut after this many tokens, those of an environment included.")
    answer_lines: bool = doc("In a response without a box, the last line that starts with Answer: gives the answer.")
    environment: EnvironmentSection | None = doc(
        "What answers the model between its turns and scores the conversations, as data.environment; null: a response "
        "is one turn, and its answer is graded.",
        default=None,
    )


def described(benchmark: Benchmark) -> dict[str, Any]:
    """A benchmark as plain data, as it stands beside its figures; keys that are null are left out.

    So figures that were measured before such a key existed are still of the same benchmark.
    """
    return {key: value for key, value in asdict(benchmark).items() if value is not None}


@dataclass(frozen=True)
class LoadedBenchmark:
    """A benchmark with its problems as prompts of a model."""

    name: str
    benchmark: Benchmark
    prompts: list[Prompt]
    dialogue: Dialogue | None = None  # the benchmark's environment, with the tokenizer that made the prompts

    @property
    def numbers(self) -> tuple[int, ...]:
        """The sample numbers of every problem: GREEDY where there is a greedy response, and then 0 to k - 1."""
        return tuple(range(GREEDY if self.benchmark.greedy else 0, self.benchmark.k))


def read_benchmark(path: Path) -> Benchmark:
    """The benchmark that a file describes. Raises InputError that names file and key."""
    content = read_json_object(path)
    content.pop("$schema", None)
    benchmark = build(Benchmark, content, str(path))
    for fault in environment_faults(benchmark.environment, benchmark.max_response_tokens, "the benchmark"):
        raise InputError(f"{path}: {fault}")
    if benchmark.environment is None and benchmark.answer_field is None:
        raise InputError(f"{path}: answer_field is null and there is no environment, so nothing says what is right.")
    return benchmark


def read_benchmarks(config: Config) -> dict[str, Benchmark]:
    """The configured benchmarks by name. Raises InputError that names the faulty file."""
    benchmarks = {}
    for entry in config.eval.benchmarks:
        path = Path(entry) if entry.endswith(".json") else ROOT / "configs" / "benchmarks" / f"{entry}.json"
        if not path.is_file():
            names = sorted(p.stem for p in (ROOT / "configs" / "benchmarks").glob("*.json"))
            raise InputError(f"eval.benchmarks: no benchmark {entry!r}; there are {names}, or give the path of a file.")
        if path.stem in benchmarks:
            raise InputError(f"eval.benchmarks: two benchmarks are named {path.stem!r}. Rename one of the files.")
        benchmark = read_benchmark(path)
        if config.eval.k is not None:
            benchmark = replace(benchmark, k=config.eval.k)
        if not benchmark.greedy and benchmark.k == 0:
            raise InputError(
                f"{path}: greedy is false and k is 0, so there is nothing to sample. Set eval.k or greedy."
            )
        benchmarks[path.stem] = benchmark
    return benchmarks


def load_benchmarks(config: Config, lm: LanguageModel, limit: int | None) -> list[LoadedBenchmark]:
    """The configured benchmarks with their problems as prompts of a model.

    `limit` keeps only the first problems of each; None keeps all. Raises InputError that names the faulty file.
    """
    loaded = []
    for name, benchmark in read_benchmarks(config).items():
        problems = read_problems(benchmark.file, benchmark.prompt_field, benchmark.answer_field)[:limit]
        ((problem_id, count),) = Counter(problem.id for problem in problems).most_common(1)
        if count > 1:
            raise InputError(
                f"{benchmark.file}: the id {problem_id!r} stands twice. Give every problem of a benchmark its own."
            )
        dialogue = open_dialogue(benchmark.environment, lm, config.data)
        data = dialogue.data if dialogue else config.data
        prompts = make_prompts(problems, lm.tokenizer, data, benchmark.file, benchmark.instruction)
        loaded.append(LoadedBenchmark(name, benchmark, prompts, dialogue))
    return loaded


def check_context(lm: LanguageModel, key: str, response: int, prompts: Sequence[Prompt]) -> None:
    """Refuses prompts that, with a response of so many tokens, are longer than the model's context.

    `key` names the setting of the response's length, for the message. Raises InputError.
    """
    longest = max(len(p.token_ids) for p in prompts)
    if lm.context is not None and longest + response > lm.context:
        raise InputError(
            f"the longest prompt has {longest} tokens and {key} is {response}: together {longest + response}, more "
            f"than the {lm.name}'s context of {lm.context}. Lower {key} or data.max_prompt_tokens."
        )


def check_benchmarks(lm: LanguageModel, benchmarks: Sequence[LoadedBenchmark]) -> None:
    """As check_context, for every benchmark; and that the model's turns are answered where there is an environment."""
    for loaded in benchmarks:
        if loaded.dialogue:
            loaded.dialogue.check(lm)
        key = f"max_response_tokens of benchmark {loaded.name}"
        check_context(lm, key, loaded.benchmark.max_response_tokens, loaded.prompts)


def takes_answer_lines(config: Config, benchmarks: Iterable[Benchmark]) -> bool:
    """How training responses are graded: data.answer_lines, and without it as the benchmarks are."""
    if config.data.answer_lines is not None:
        return config.data.answer_lines
    return any(benchmark.answer_lines for benchmark in benchmarks)


def validation_benchmark(
    config: Config, prompts: list[Prompt], answer_lines: bool, dialogue: Dialogue | None
) -> LoadedBenchmark:
    """Held-out training prompts as a benchmark: one greedy and one sampled response each, decoded as in training.

    `dialogue` is that of training.
    """
    benchmark = Benchmark(
        version=1,
        file=", ".join(config.data.train),
        prompt_field=config.data.prompt_field,
        answer_field=config.data.answer_field,
        instruction="",
        greedy=True,
        k=1,
        temperature=config.rollout.temperature or 1.0,
        top_p=config.rollout.top_p,
        max_response_tokens=config.rollout.max_response_tokens,
        answer_lines=answer_lines,
        environment=config.data.environment,
    )
    return LoadedBenchmark(VALIDATION, benchmark, prompts, dialogue)


def schema() -> dict[str, Any]:
    """The JSON schema of a benchmark's file."""
    result = TypeAdapter(Benchmark).json_schema()
    result["properties"]["$schema"] = SCHEMA_KEY
    return {"$schema": DRAFT, **result}


if __name__ == "__main__":
    print(json.dumps(schema(), indent=1))
