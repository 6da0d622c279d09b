"""MATH-500: the 500 test problems of openai/prm800k (MIT), with free-form answers. Evaluation only."""

from data.sources import Hub, need, text_of, user

HUB = Hub("HuggingFaceH4/MATH-500", None, "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be")
SPLITS = ("test",)


def rows(raw: list[dict], split: str, where: str) -> list[dict]:
    """Raw rows (problem, answer, subject, level, unique_id) as {id, prompt, answer, source, meta}."""
    found = []
    for number, row in enumerate(raw, 1):
        need(row, ("problem", "answer", "unique_id"), f"{where}, row {number}")
        found.append(
            {
                "id": text_of(row, "unique_id", f"{where}, row {number}"),
                "prompt": user(text_of(row, "problem", f"{where}, row {number}")),
                "answer": text_of(row, "answer", f"{where}, row {number}"),
                "source": "math500",
                "meta": {key: row[key] for key in ("subject", "level") if key in row},
            }
        )
    return found
