"""DAPO-Math-17k (BytedTsinghua-SIA, described as Apache-2.0): competition problems with integer answers, for training.

The hub's default is the release without the hundredfold copies of the original. Here each problem loses DAPO's own
instruction and gets the boxed one; copies (equal up to white space and `$`) are merged, problems whose copies disagree
on the answer dropped, and so are problems that stand in an evaluation set.
"""

import re
from collections import Counter
from collections.abc import Sequence

from data.contamination import Overlap, overlaps
from data.sources import BOXED, Hub, need, text_of, user
from opd.errors import InputError

HUB = Hub("YouJiacheng/DAPO-Math-17k-dedup", None, "6e26a33abdabd3e6aaa1d742326b790758f7dbc5")
HUB_SPLIT = "train"
TRAIN_SHARE = 0.8  # as in the public reruns of the paper: 13,918 of 17,398 rows, seed 42
BEFORE = re.compile(r"^\s*Solve the following math problem step by step\..*?is the answer to the problem\.\s*", re.S)
AFTER = re.compile(r"\s*Remember to put your answer on its own line after \\?\"?Answer:\\?\"?\.?\s*$")


def problem_and_answer(row: dict, where: str) -> tuple[str, str]:
    """Of the original layout (prompt messages, reward_model.ground_truth) or of {problem, answer} rows."""
    if "reward_model" in row:
        try:
            row = {"problem": row["prompt"][0]["content"], "answer": row["reward_model"]["ground_truth"]}
        except (KeyError, IndexError, TypeError):
            raise InputError(f"{where}: expected prompt messages and reward_model.ground_truth.") from None
    need(row, ("problem", "answer"), where)
    text = AFTER.sub("", BEFORE.sub("", text_of(row, "problem", where)))
    return text.strip(), text_of(row, "answer", where)


def rows(
    raw: list[dict], evaluation: Sequence[tuple[str, str]], where: str
) -> tuple[list[dict], Counter, list[Overlap]]:
    """Rows as {id, prompt, answer, source, meta}; why others were dropped; what overlapped.

    `evaluation` is (id, text) of every evaluation problem.
    """
    dropped: Counter = Counter()
    groups: dict[str, list[tuple[str, str]]] = {}
    for number, row in enumerate(raw, 1):
        text, answer = problem_and_answer(row, f"{where}, row {number}")
        groups.setdefault(re.sub(r"[\s$]", "", text), []).append((text, answer))
    kept = []
    for group in groups.values():
        if len({answer for _, answer in group}) > 1:
            dropped["copies with different answers"] += len(group)
        else:
            dropped["copies"] += len(group) - 1
            kept.append(group[0])
    pairs = overlaps([(str(i), text) for i, (text, _) in enumerate(kept)], evaluation)
    contaminated = {int(pair.train_id) for pair in pairs}
    dropped["overlap with an evaluation set"] = len(contaminated)
    found = [
        {
            "id": f"dapo-{i:05d}",
            "prompt": user(text + BOXED),
            "answer": answer,
            "source": "dapo_math_17k",
            "meta": {"language": "zh" if re.search(r"[\u3400-\u9fff]", text) else "en"},
        }
        for i, (text, answer) in enumerate(kept)
        if i not in contaminated
    ]
    return found, dropped, pairs
