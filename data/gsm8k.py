"""GSM8K (openai/grade-school-math, MIT): word problems with integer answers.

A source is a folder with train.jsonl and test.jsonl as its authors publish them (fields question and answer, the answer
ending in `#### N`), or the Hugging Face hub at a pinned revision.
"""

import json
from pathlib import Path

from opd.cli import InputError

HUB = ("openai/gsm8k", "main", "e53f048856ff4f594e959d75785d2c2d37b678ee")
INSTRUCTION = "\nPut your final answer within \\boxed{}."


def rows(split: str, source: str) -> list[dict]:
    """Problems of a split in file order, as {id, prompt, answer, source, meta}.

    Args:
        split: "train" or "test".
        source: a folder, or "hub".
    Raises:
        InputError: the source cannot be read, or a row is not what GSM8K's rows are.
    """
    raw = _from_hub(split) if source == "hub" else _from_folder(Path(source), split)
    found = []
    for number, row in enumerate(raw):
        if not isinstance(row, dict) or not {"question", "answer"} <= row.keys() or "####" not in row["answer"]:
            raise InputError(f"{source}, {split} row {number + 1}: expected question, and answer ending in '#### N'.")
        found.append({
            "id": f"gsm8k-{split}-{number}",
            "prompt": [{"role": "user", "content": row["question"].strip() + INSTRUCTION}],
            "answer": row["answer"].rpartition("####")[2].strip().replace(",", ""),
            "source": "gsm8k",
            "meta": {"split": split},
        })  # fmt: skip
    return found


def _from_folder(folder: Path, split: str) -> list[dict]:
    try:
        lines = (folder / f"{split}.jsonl").read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / split}.jsonl: cannot be read ({error}). Expected GSM8K's JSONL file.") from None


def _from_hub(split: str) -> list[dict]:
    from datasets import load_dataset  # slow to import, and not needed for a folder

    name, subset, revision = HUB
    try:
        return load_dataset(name, subset, split=split, revision=revision).to_list()
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{name}: cannot be downloaded ({str(error).splitlines()[0]}). Give a folder with GSM8K's train.jsonl and "
            "test.jsonl instead."
        ) from None
