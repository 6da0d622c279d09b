"""The responses of an evaluation: which of them are sampled together, and what a stopped evaluation keeps.

Responses of all benchmarks that are decoded alike share their batches. So neither a small benchmark nor the end of a
sample number leaves a batch half empty.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

from opd import distributed
from opd.benchmarks import LoadedBenchmark
from opd.cli import say
from opd.config import Config
from opd.data import Rollout
from opd.files import write_whole
from opd.measures import GREEDY
from opd.models import LanguageModel
from opd.progress import Progress
from opd.rollout import Decoding, Sampler
from opd.rollout.turns import converse
from opd.step import Pair

PARTIAL = "responses.partial.jsonl"  # in the folder of an evaluation that is not finished: its responses so far
# The sampler is asked for this many batches at once. It refills a batch while responses end, so only the last of them
# runs half empty. What it was asked for is lost when the evaluation stops, which speaks against asking for more.
BATCHES = 4

Place = tuple[str, int, int]  # of a response: the benchmark, the sample number, and the place of the problem


@dataclass(frozen=True)
class Subject:
    """A model under evaluation, with its sampler."""

    lm: LanguageModel
    sampler: Sampler
    vocab_size: int  # how many ids it samples from
    pair: Pair | None  # the model with its teacher, for eval.reverse_kl; None when that is not measured
    phase: str = "rollout"  # the phase of opd.phases in which it is sampled


def sampled(
    subject: Subject,
    benchmarks: Sequence[LoadedBenchmark],
    config: Config,
    partial: Path,
    stop: Callable[[bool], None],
    finished: Callable[[Place, Rollout], None],
) -> dict[Place, Rollout]:
    """All responses of all benchmarks; those in the file `partial` are not made again.

    The processes sample requests whose content does not depend on where the evaluation was stopped. So a continued
    evaluation computes exactly what an unbroken one of as many processes computes.

    Args:
        stop: as evaluate's.
        finished: called with every response, as soon as it is there.
    """
    by_name = {loaded.name: loaded for loaded in benchmarks}
    requests = list(_requests(benchmarks, BATCHES * config.evaluation_batch * distributed.world_size()))
    first = distributed.is_first()
    rollouts: dict[Place, Rollout] = {}

    def keep(found: dict[Place, Rollout]) -> None:
        rollouts.update(found)
        for place, rollout in found.items():
            finished(place, rollout)

    keep(_kept(distributed.from_first(_read(partial, len(requests)) if first else ""), by_name))
    label = f"{subject.lm.name} on {', '.join(by_name)}"
    with (
        partial.open("a", encoding="utf-8") if first else nullcontext() as file,
        Progress(label, sum(len(places) for _, places in requests)) as progress,
    ):

        def advance(responses: int, tokens: int) -> None:
            progress.advance(responses, tokens)
            stop(False)

        for decoding, places in requests:
            if all(place in rollouts for place in places):
                progress.advance(len(places), 0)
                continue
            asked = [by_name[name].prompts[i] for name, _, i in places]
            seeds = [(config.seed, "eval", place[0], p.id, place[1]) for place, p in zip(places, asked, strict=True)]
            dialogue = by_name[places[0][0]].dialogue
            answers = converse(subject.sampler, dialogue, asked, decoding, subject.vocab_size, seeds, advance)
            if file:
                pairs = zip(places, answers, strict=True)
                rows = [(*place, r.response_ids, r.finish_reason, r.turns) for place, r in pairs]
                file.write(_with_checksum(json.dumps(rows)))
                file.flush()
            keep(dict(zip(places, answers, strict=True)))
            stop(True)
    return rollouts


def _requests(benchmarks: Sequence[LoadedBenchmark], size: int) -> Iterator[tuple[Decoding, list[Place]]]:
    """The responses that are asked for at once, at most `size`: decoded alike, and the longest prompts first.

    A benchmark with an environment shares no request with another one.
    """
    alike: dict[tuple[Decoding, str], list[tuple[int, Place]]] = defaultdict(list)  # with the length of the prompt
    for loaded in benchmarks:
        benchmark = loaded.benchmark
        for number in loaded.numbers:
            most = benchmark.max_response_tokens
            decoding = Decoding(benchmark.temperature, benchmark.top_p, most, benchmark.top_k)
            if number == GREEDY:
                decoding = Decoding(0.0, 1.0, most)
            alike[decoding, loaded.name if loaded.dialogue else ""] += [
                (len(prompt.token_ids), (loaded.name, number, i)) for i, prompt in enumerate(loaded.prompts)
            ]
    for (decoding, _), measured in alike.items():
        places = [place for _, place in sorted(measured, key=lambda pair: -pair[0])]
        for i in range(0, len(places), size):
            yield decoding, places[i : i + size]


def _kept(text: str, by_name: dict[str, LoadedBenchmark]) -> dict[Place, Rollout]:
    """The responses in the lines of `_read`."""
    rows = [row for line in text.splitlines() for row in json.loads(line)]
    return {
        (name, number, i): Rollout(
            i, by_name[name].prompts[i], tuple(ids), finish_reason, tuple((first, end) for first, end in turns)
        )
        for name, number, i, ids, finish_reason, turns in rows
    }


def _with_checksum(text: str) -> str:
    return f"{crc32(text.encode()):08x} {text}\n"


def _read(path: Path, requests: int) -> str:
    """The whole lines of a stopped evaluation, without their checksums. The file is cut back to these lines."""
    if not path.exists():
        return ""
    texts = []
    for line in path.read_bytes().split(b"\n"):
        checksum, _, text = line.partition(b" ")
        if checksum == f"{crc32(text):08x}".encode():  # a line that was cut off or damaged has another checksum
            texts.append(text.decode())
    write_whole(path, "".join(map(_with_checksum, texts)))
    say(f"{path.name}: {len(texts)} of {requests} requests are there")
    return "\n".join(texts)
