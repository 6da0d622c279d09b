"""AIME 2024 and 2025 (problems of the Mathematical Association of America): 30 integers from 0 to 999 each.

The key is the *answer column*. The first \\boxed{} of a written solution is often an intermediate result (it is wrong
for 5 of the 30 problems of 2024). Keys are written with leading zeros or a degree sign here and there: `033` is 33,
`336^\\circ` is 336.
"""

import re

from data.sources import Hub, need, text_of, user
from opd.errors import InputError

HUB = {
    "aime24": Hub("HuggingFaceH4/aime_2024", None, "2fe88a2f1091d5048c0f36abc874fb997b3dd99a"),
    "aime25": Hub("yentinglin/aime_2025", None, "6f71d77b0b89b9dabe07ab466c51df33f514df7f"),
}
SPLITS = ("test",)
HUB_SPLIT = "train"  # where the hub's data sets keep them


def key(value: object) -> str:
    """`033`, `33.0`, `33^\\circ`, `$33$` and 33 are all "33". Raises ValueError for what is no integer from 0 to
    999."""
    text = re.sub(r"\^?\s*\{?\s*(\\circ|°)\s*\}?|\$|\s", "", str(value))
    match = re.fullmatch(r"(\d+)(\.0*)?", text)
    if not match or int(match[1]) > 999:
        raise ValueError(f"{value!r} is not an integer from 0 to 999")
    return str(int(match[1]))


def rows(raw: list[dict], name: str, where: str) -> list[dict]:
    """Raw rows (problem and answer, in any letter case) as {id, prompt, answer, source, meta}."""
    found = []
    for number, row in enumerate(raw, 1):
        fields = {k.lower(): v for k, v in row.items()}
        need(fields, ("problem", "answer"), f"{where}, row {number}")
        try:
            answer = key(fields["answer"])
        except ValueError as error:
            raise InputError(f"{where}, row {number}: the answer {error}.") from None
        found.append(
            {
                "id": f"{name}-{fields.get('id', number)}",
                "prompt": user(text_of(fields, "problem", f"{where}, row {number}")),
                "answer": answer,
                "source": name,
                "meta": {},
            }
        )
    return found
