"""Makes training and evaluation files of one schema: `python -m data.prepare NAME [--source hub|FILE] [--split SHARE]`.

Every line is {id, prompt (messages), answer, source, meta}. Written to data/prepared/NAME/{split}.jsonl, with
manifest.json: where it came from, counts, why rows were dropped, SHA-256 of every file; overlap.jsonl holds both texts
of every pair that overlaps an evaluation set. The same source gives the same bytes.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from data import aime, contamination, dapo_math_17k, gsm8k, math500
from data.commands import COMMANDS, OUT
from data.sources import BOXED, cut, read_rows, user
from opd.cli import main, say
from opd.errors import InputError
from opd.files import lock

EVALUATIONS = ("math500", "aime24", "aime25")


def prepare(name: str, source: str = "hub", out: Path = OUT, seed: int = 42, share: float | None = None) -> Path:
    """Writes a data set whole or not at all; returns its folder.

    Args:
        source: "hub", or a file; for gsm8k a folder with train.jsonl and test.jsonl.
        seed: of the split into training and held-out rows.
        share: of the training rows in that split. None: no split, and for dapo_math_17k 0.8.
    Raises:
        InputError: the source, a row, or (for dapo_math_17k) an evaluation set is missing or malformed.
    """
    with lock(out / name, "--out"):
        return _prepare(name, source, out, seed, share)


def _prepare(name: str, source: str, out: Path, seed: int, share: float | None) -> Path:
    """`prepare` as the only writer of the data set."""
    dropped: Counter = Counter()
    overlapping: list[contamination.Overlap] = []
    if name == "dapo_math_17k":
        share = share or dapo_math_17k.TRAIN_SHARE
        raw, origin = read_rows(source, dapo_math_17k.HUB_SPLIT, dapo_math_17k.HUB)
        evaluation = [pair for other in EVALUATIONS for pair in _evaluation_texts(other, out)]
        found, dropped, overlapping = dapo_math_17k.rows(raw, evaluation, source)
        splits = dict(zip(("train", "validation"), cut(found, share, seed), strict=True))
        origins = {"train": origin}
    elif name == "gsm8k":
        if share is not None:
            raise InputError("gsm8k comes as train and test, so there is nothing to split. Leave --split out.")
        pairs = {s: read_rows(source if source == "hub" else f"{source}/{s}.jsonl", s, gsm8k.HUB) for s in gsm8k.SPLITS}
        splits = {split: gsm8k.rows(raw, split, source) for split, (raw, _) in pairs.items()}
        origins = {split: origin for split, (_, origin) in pairs.items()}
    else:
        hub_split, hub = ("test", math500.HUB) if name == "math500" else (aime.HUB_SPLIT, aime.HUB[name])
        raw, origin = read_rows(source, hub_split, hub)
        test = math500.rows(raw, "test", source) if name == "math500" else aime.rows(raw, name, source)
        splits, origins = _held_out(test, share, seed), {"test": origin}
    about = {"name": name, "source": origins, "seed": seed, "split": share}
    return _write(about, splits, dropped, overlapping, out)


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


def _write(about: dict, splits: dict, dropped: Counter, overlapping: list, out: Path) -> Path:
    """Writes the rows of the splits, and a manifest that begins with `about`."""
    name = about["name"]
    final = out / name
    temporary = out / f".{name}.{os.getpid()}.tmp"
    try:
        temporary.mkdir(parents=True)
        files = {}
        for split, found in splits.items():
            data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found).encode()
            (temporary / f"{split}.jsonl").write_bytes(data)
            files[f"{split}.jsonl"] = {"rows": len(found), "sha256": hashlib.sha256(data).hexdigest()}
        if overlapping:
            lines = (json.dumps(asdict(pair), ensure_ascii=False) + "\n" for pair in overlapping)
            (temporary / "overlap.jsonl").write_text("".join(lines), encoding="utf-8")
        left_out = {reason: count for reason, count in sorted(dropped.items()) if count}
        manifest = {**about, "files": files, "dropped": left_out}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
    except OSError as error:
        raise InputError(f"{final} cannot be written ({error.strerror}). Give another folder: --out DIR.") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for file, written in files.items():
        say(f"{final / file}: {written['rows']} rows")
    for reason, count in manifest["dropped"].items():
        say(f"dropped: {count} rows, {reason}")
    return final


def command(arguments: list[str]) -> None:
    options = COMMANDS["prepare"].parser().parse_args(arguments)
    print(prepare(options.name, str(options.source), options.out, options.seed, options.split))


if __name__ == "__main__":
    main(command)
