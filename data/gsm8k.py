"""GSM8K (openai/grade-school-math, MIT): word problems with integer answers; train and test."""

from data.sources import BOXED, Hub, need, text_of, user
from opd.errors import InputError

HUB = Hub("openai/gsm8k", "main", "e53f048856ff4f594e959d75785d2c2d37b678ee")
SPLITS = ("train", "test")


def rows(raw: list[dict], split: str, where: str) -> list[dict]:
    """Raw rows (question, and answer ending in `#### N`) as {id, prompt, answer, source, meta}.

    Training prompts ask for a box; test problems are bare, because a benchmark brings its own instruction.
    """
    found = []
    for number, row in enumerate(raw, 1):
        need(row, ("question", "answer"), f"{where}, row {number}")
        _, mark, answer = text_of(row, "answer", f"{where}, row {number}").rpartition("####")
        if not mark:
            raise InputError(f"{where}, row {number}: expected an answer that ends in '#### N'.")
        instruction = BOXED if split == "train" else ""
        found.append(
            {
                "id": f"gsm8k-{split}-{number - 1:05d}",
                "prompt": user(text_of(row, "question", f"{where}, row {number}") + instruction),
                "answer": answer.strip().replace(",", ""),
                "source": "gsm8k",
                "meta": {"split": split},
            }
        )
    return found
