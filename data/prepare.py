"""Makes training and evaluation files of one schema: `python -m data.prepare NAME [--source hub|FILE]`.

Every line is {id, prompt (messages), answer, source, meta}. Written to data/prepared/NAME/{split}.jsonl, with
manifest.json: where it came from, counts, why rows were dropped, SHA-256 of every file; overlap.jsonl holds both texts
of every pair that overlaps an evaluation set. Tasks with tools bring the files of the tools along. The same source
gives the same bytes.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data import aime, contamination, dapo_math_17k, gsm8k, math500
from data.commands import COMMANDS, OUT
from data.deepplanning import tasks
from data.sources import BOXED, cut, read_rows, user
from opd.cli import main, say
from opd.errors import InputError
from opd.files import lock

EVALUATIONS = ("math500", "aime24", "aime25")
SHARES = {"dapo_math_17k": dapo_math_17k.TRAIN_SHARE, "deepplanning": tasks.TRAIN_SHARE}  # unless --split says another


@dataclass(frozen=True)
class Found:
    """A data set before it is written."""

    splits: dict[str, list[dict]]
    origins: dict[str, Any]  # where it is from, for the manifest
    share: float | None = None  # of the rows that are for training; None: nothing was split
    dropped: Counter = field(default_factory=Counter)
    overlapping: list[contamination.Overlap] = field(default_factory=list)
    write_more: Callable[[Path], dict[str, Any]] = lambda folder: {}  # writes further files; returns what they are


def prepare(
    name: str,
    source: str = "hub",
    out: Path = OUT,
    seed: int = 42,
    share: float | None = None,
    language: str = "en",
) -> Path:
    """Writes a data set whole or not at all; returns its folder.

    Args:
        source: "hub", or a file; for gsm8k a folder with train.jsonl and test.jsonl, and for deepplanning one with the
            tasks, the tools' descriptions and the databases.
        seed: of the split into training and held-out rows.
        share: of the training rows in that split. None: no split, and for dapo_math_17k and deepplanning 0.8.
        language: of deepplanning's tasks. One other than English has a folder of its own.
    Raises:
        InputError: the source, a row, or (for dapo_math_17k) an evaluation set is missing or malformed.
    """
    if language != "en" and name != "deepplanning":
        raise InputError(f"--language is for deepplanning, and {name} has one language. Leave it out.")
    folder = name if language == "en" else f"{name}_{language}"
    share = SHARES.get(name) if share is None else share
    with lock(out / folder, "--out"):
        return write(folder, _find(name, source, out, seed, share, language), seed, out)


def _find(name: str, source: str, out: Path, seed: int, share: float | None, language: str) -> Found:
    if name == "dapo_math_17k":
        raw, origin = read_rows(source, dapo_math_17k.HUB_SPLIT, dapo_math_17k.HUB)
        evaluation = [pair for other in EVALUATIONS for pair in _evaluation_texts(other, out)]
        rows, dropped, overlapping = dapo_math_17k.rows(raw, evaluation, source)
        splits = dict(zip(("train", "validation"), cut(rows, share, seed), strict=True))
        return Found(splits, {"train": origin}, share, dropped, overlapping)
    if name == "gsm8k":
        if share is not None:
            raise InputError("gsm8k comes as train and test, so there is nothing to split. Leave --split out.")
        pairs = {s: read_rows(source if source == "hub" else f"{source}/{s}.jsonl", s, gsm8k.HUB) for s in gsm8k.SPLITS}
        splits = {split: gsm8k.rows(raw, split, source) for split, (raw, _) in pairs.items()}
        return Found(splits, {split: origin for split, (_, origin) in pairs.items()})
    if name == "math500":
        raw, origin = read_rows(source, "test", math500.HUB)
        return Found(_held_out(math500.rows(raw, "test", source), share, seed), {"test": origin}, share)
    if name == "deepplanning":
        splits, origins, write_more = tasks.read_tasks(source, language, share, seed)
        return Found(splits, origins, share, write_more=write_more)
    raw, origin = read_rows(source, aime.HUB_SPLIT, aime.HUB[name])
    return Found(_held_out(aime.rows(raw, name, source), share, seed), {"test": origin}, share)


def _held_out(rows: list[dict], share: float | None, seed: int) -> dict[str, list[dict]]:
    """An evaluation set as it is, or a share of it to train on, with the boxed instruction, and the rest to test."""
    if share is None:
        return {"test": rows}
    train, test = cut(rows, share, seed)
    return {"train": [row | {"prompt": user(row["prompt"][0]["content"] + BOXED)} for row in train], "test": test}


def _evaluation_texts(name: str, out: Path) -> list[tuple[str, str]]:
    path = out / name / "test.jsonl"
    if not path.exists():
        raise InputError(
            f"{path} is missing: training problems that stand in an evaluation set are dropped, so the evaluation sets "
            f"come first. Run: python -m data.prepare {name}"
        )
    return contamination.texts(path)


def write(name: str, found: Found, seed: int, out: Path) -> Path:
    """Writes a data set whole or not at all, and says what is in it; returns its folder.

    The caller holds the lock of the folder. Raises InputError where this process may not write.
    """
    final = out / name
    temporary = out / f".{name}.{os.getpid()}.tmp"
    try:
        temporary.mkdir(parents=True)
        files = {}
        for split, rows in found.splits.items():
            data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
            (temporary / f"{split}.jsonl").write_bytes(data)
            files[f"{split}.jsonl"] = {"rows": len(rows), "sha256": hashlib.sha256(data).hexdigest()}
        if found.overlapping:
            lines = (json.dumps(asdict(pair), ensure_ascii=False) + "\n" for pair in found.overlapping)
            (temporary / "overlap.jsonl").write_text("".join(lines), encoding="utf-8")
        manifest = {
            "name": name,
            "source": found.origins,
            "seed": seed,
            "split": found.share,
            "files": files,
            "dropped": {reason: count for reason, count in sorted(found.dropped.items()) if count},
        } | found.write_more(temporary)
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
    except OSError as error:
        raise InputError(f"{final} cannot be written ({error.strerror}). Give another folder: --out DIR.") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for file, about in files.items():
        say(f"{final / file}: {about['rows']} rows")
    for reason, count in manifest["dropped"].items():
        say(f"dropped: {count} rows, {reason}")
    return final


def command(arguments: list[str]) -> None:
    options = COMMANDS["prepare"].parser().parse_args(arguments)
    print(prepare(options.name, str(options.source), options.out, options.seed, options.split, options.language))


if __name__ == "__main__":
    main(command)
