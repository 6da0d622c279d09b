"""What an accuracy is measured on: benchmark files (configs/benchmarks/NAME.json) with their problems as prompts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from opd.config import COLDEST, MOST_SAMPLES, ROOT, Config, Count, PathText, Text, build, doc, read_json_object, strict
from opd.data import Prompt, make_prompts, read_problems
from opd.errors import InputError
from opd.models import LanguageModel

VALIDATION = "validation"  # name of the benchmark of held-out training prompts
GREEDY = -1  # sample number of the greedy response in the files


@strict
class Benchmark:
    """What an accuracy is measured on, and how."""

    version: Annotated[int, doc("Raised whenever any field changes the numbers.", ge=1)]
    file: Annotated[PathText, doc("JSONL file, one problem per line.")]
    prompt_field: Annotated[Text, doc("Field with the problem: a string or a list of messages.")]
    answer_field: Annotated[Text, doc("Field with the reference answer.")]
    instruction: Annotated[str, doc("Text appended to the problem.")]
    greedy: Annotated[bool, doc("One greedy response per problem.")]
    k: Annotated[
        int, doc("Sampled responses per problem, for mean@k, pass@k and maj@k. Paper: 16.", ge=0, le=MOST_SAMPLES)
    ]
    temperature: Annotated[float, doc("Of the k samples. Paper: 1.0.", ge=COLDEST)]
    top_p: Annotated[float, doc("Of the k samples. Not stated in the paper.", gt=0, le=1)]
    max_response_tokens: Annotated[Count, doc("A response is cut here. Tokens.")]
    answer_lines: Annotated[bool, doc("Without a box, take what follows the last line that starts with Answer:.")]


@dataclass(frozen=True)
class LoadedBenchmark:
    name: str
    benchmark: Benchmark
    prompts: list[Prompt]

    @property
    def numbers(self) -> tuple[int, ...]:
        """Sample numbers of every problem; GREEDY first."""
        return (*((GREEDY,) if self.benchmark.greedy else ()), *range(self.benchmark.k))


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
        benchmark = build(Benchmark, read_json_object(path), str(path))
        if config.eval.k is not None:
            benchmark = replace(benchmark, k=config.eval.k)
        if not benchmark.greedy and benchmark.k == 0:
            raise InputError(
                f"{path}: greedy is false and k is 0, so there is nothing to sample. Set eval.k or greedy."
            )
        found[path.stem] = benchmark
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


def check_context(lm: LanguageModel, key: str, response: int, prompts: Sequence[Prompt]) -> None:
    """Refuses prompt + response beyond a model's positions; `key` names the setting that allows so long a response."""
    longest = max(len(p.token_ids) for p in prompts)
    if lm.context is not None and longest + response > lm.context:
        raise InputError(
            f"the longest prompt has {longest} tokens and {key} is {response}: together {longest + response}, more "
            f"than the {lm.name}'s context of {lm.context}. Lower {key} or data.max_prompt_tokens."
        )


def check_benchmarks(lm: LanguageModel, benchmarks: Sequence[LoadedBenchmark]) -> None:
    for b in benchmarks:
        check_context(lm, f"max_response_tokens of benchmark {b.name}", b.benchmark.max_response_tokens, b.prompts)


def validation_benchmark(config: Config, prompts: list[Prompt]) -> LoadedBenchmark:
    """Held-out training prompts as a benchmark: a greedy and a sampled response, decoded as in training."""
    benchmark = Benchmark(
        version=1,
        file=", ".join(config.data.train),
        prompt_field=config.data.prompt_field,
        answer_field=str(config.data.answer_field),
        instruction="",
        greedy=True,
        k=1,
        temperature=config.rollout.temperature or 1.0,
        top_p=config.rollout.top_p,
        max_response_tokens=config.rollout.max_response_tokens,
        answer_lines=False,
    )
    return LoadedBenchmark(VALIDATION, benchmark, prompts)
