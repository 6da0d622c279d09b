"""The student that a seed gives a pair: the embedded pairs and the one of SmolLM2 have another one for every seed."""

from pathlib import Path

from data import smollm2
from data.tiny import build
from opd.files import read_object


def student(pair: Path, seed: int, students: Path) -> Path:
    """The student's folder, which is made below `students` unless it is there. Raises InputError for a foreign pair."""
    recorded = read_object(pair / "recipe.json", "the recipe of a pair")
    make = smollm2.student if recorded.get("task") == smollm2.TASK else build.student
    return make(pair, seed, students)
