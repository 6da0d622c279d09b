"""Trains an embedded pair on a CPU: teacher and student from nothing, on a task with a verifiable answer.

    python -m data.tiny.build --task chain --seed 1 --out outputs/my_pair

The pairs of seed 0 are shipped in data/tiny/pairs/, made by this file, because the same recipe trains another pair on
another kind of processor. `student(pair, seed)` is another student of a pair. Weights are stored in float16.

The recipe (this folder's source, the seed, and the library versions that change its result) is hashed; a folder made by
the same recipe is left alone. Built under a temporary name and renamed, so that it is there whole or not at all.
"""

import hashlib
import json
import math
import os
import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import torch
import transformers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from data.commands import COMMANDS
from data.tiny import addition, hinted, planning, task, trip
from data.tiny.recipe import Recipe, new_model
from opd.cli import main, say
from opd.errors import InputError
from opd.files import lock, read_object

TEST_SEED, TRAIN_SEED = 1_000_003, 1_000_033


def train_model(
    name: str, task: ModuleType, recipe: Recipe, tokenizer: PreTrainedTokenizerFast, seed: int
) -> Qwen3ForCausalLM:
    """Trains one model from nothing on fresh problems: next-token cross entropy on the response tokens."""
    rng = random.Random(seed)
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    model = new_model(recipe, tokenizer, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.01)

    def rate(step: int) -> float:
        if step < recipe.warmup:
            return (step + 1) / recipe.warmup
        progress = (step - recipe.warmup) / (recipe.steps - recipe.warmup)
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    for _ in tqdm(range(recipe.steps), desc=f"tiny {name}", unit="step", disable=not sys.stderr.isatty()):
        rows, prompt_length = [], 0  # all prompts of a task are of one length
        for _ in range(recipe.batch):
            problem = task.problem(rng)
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": problem}], add_generation_prompt=True, return_dict=False
            )
            prompt_length = len(prompt)
            text = task.response(problem, recipe.speaker, rng)
            rows.append(prompt + tokenizer.encode(text, add_special_tokens=False) + [end])
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, pad)
        targets = ids[:, prompt_length:]
        logits = model(input_ids=ids, use_cache=False).logits[:, prompt_length - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=pad)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


@dataclass(frozen=True)
class Pair:
    """A task (a module of this folder) and how its two models are made."""

    task: ModuleType
    teacher: Recipe | None  # None: the student teaches itself, or the teacher is that of another pair
    student: Recipe
    files: tuple[str, ...]  # of this folder, which decide the result beside this file
    train: Callable[[str, ModuleType, Recipe, PreTrainedTokenizerFast, int], Qwen3ForCausalLM] = train_model
    train_problems: int = 8192
    test_problems: int = 512


PAIRS = {
    "chain": Pair(
        task,
        Recipe(task.TEACHER, layers=3, hidden=96, steps=320, lr=4e-3),
        Recipe(task.STUDENT, layers=2, hidden=64, steps=400, lr=5e-3),
        ("task.py", "recipe.py"),
    ),
    "addition": Pair(
        addition,
        Recipe(addition.TEACHER, layers=3, hidden=96, steps=320, lr=4e-3),
        Recipe(addition.STUDENT, layers=2, hidden=64, steps=400, lr=5e-3),
        ("task.py", "addition.py", "recipe.py"),
    ),
    "planning": Pair(
        trip,
        Recipe(trip.TEACHER, layers=3, hidden=96, steps=260, lr=2e-2, batch=32, warmup=10),
        Recipe(trip.STUDENT, layers=2, hidden=64, steps=260, lr=2e-2, batch=32, warmup=10),
        ("task.py", "trip.py", "recipe.py", "planning.py"),
        train=planning.train_model,
        train_problems=1536,  # rows with a database are long
        test_problems=256,
    ),
    "planning_absolute": Pair(
        trip,
        None,  # that of the pair planning
        Recipe(trip.ABSOLUTE, layers=2, hidden=64, steps=260, lr=2e-2, batch=32, warmup=10),
        ("task.py", "trip.py", "recipe.py", "planning.py"),
        train=planning.train_model,
        train_problems=1536,
        test_problems=256,
    ),
    "hinted": Pair(
        hinted,
        None,
        Recipe(hinted.STUDENT, layers=2, hidden=64, steps=500, lr=2e-2, warmup=10),
        ("task.py", "trip.py", "recipe.py", "planning.py", "hinted.py"),
        train=hinted.train_model,
        train_problems=4096,  # rows with a solution are long
    ),
}


def fingerprint(name: str, seed: int) -> str:
    """Hash of everything that decides the result."""
    text = "".join(Path(__file__).parent.joinpath(file).read_text() for file in (*PAIRS[name].files, "build.py"))
    return hashlib.sha256(f"{text}{name}{seed}{torch.__version__}{transformers.__version__}".encode()).hexdigest()


def write_problems(path: Path, task: ModuleType, count: int, seed: int, without: set[str]) -> set[str]:
    """Writes `count` different problems that are not in `without`, one JSON object a line; returns them as JSON."""
    rng, rows = random.Random(seed), {}
    while len(rows) < count:
        row = task.row(rng)
        if (text := json.dumps(row)) not in without:
            rows[text] = row
    lines = [json.dumps({"id": f"{path.stem}-{i}"} | row) for i, row in enumerate(rows.values())]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return set(rows)


def build(out: Path, seed: int = 0, name: str = "chain") -> Path:
    """Makes the pair in `out` unless the same recipe already did; waits for another process that does. Returns `out`.

    Raises InputError when `out` is something else.
    """
    with lock(out, "--out", wait=lambda: None):
        recorded = out / "recipe.json"
        if _is_current(out, name, seed):
            say(f"embedded pair: {out} is current")
            return out
        if out.exists() and not recorded.exists():
            raise InputError(f"--out {out}: it exists and holds no embedded pair. Choose a folder that does not exist.")
        pair = PAIRS[name]
        who = "teacher and student" if pair.teacher else "student"
        say(f"embedded pair: training {who} into {out} (one to two minutes of one core)")

        def make(folder: Path) -> None:
            for who, recipe, number in (("teacher", pair.teacher, seed * 2), ("student", pair.student, seed * 2 + 1)):
                if recipe is None:
                    continue
                _save(pair.train(who, pair.task, recipe, pair.task.tokenizer(), number), pair, folder / who)
            test = write_problems(folder / "test.jsonl", pair.task, pair.test_problems, TEST_SEED, set())
            write_problems(folder / "train.jsonl", pair.task, pair.train_problems, TRAIN_SEED, test)
            _record(folder, name, seed)

        _made_whole(out, make)
    return out


def student(pair_folder: Path, seed: int, students: Path) -> Path:
    """The student that another seed gives an embedded pair; returns its folder below `students`, made unless it is
    there.

    A process that wants one that another process is making waits for it.
    """
    recorded = read_object(pair_folder / "recipe.json", "the recipe of an embedded pair")
    if seed == recorded["seed"]:
        return pair_folder / "student"
    name = recorded["task"]
    out = students / name / f"seed_{seed}"
    with lock(out, "output_dir", wait=lambda: None):
        if not _is_current(out, name, seed):
            say(f"embedded pair: training the student of seed {seed} into {out} (about half a minute of one core)")
            pair = PAIRS[name]

            def make(folder: Path) -> None:
                model = pair.train("student", pair.task, pair.student, pair.task.tokenizer(), seed * 2 + 1)
                _save(model, pair, folder)
                _record(folder, name, seed)

            _made_whole(out, make)
    return out


def _record(folder: Path, name: str, seed: int) -> None:
    """Writes how the folder was made."""
    pair = PAIRS[name]
    recipe = {
        "task": name,
        "seed": seed,
        "teacher": asdict(pair.teacher) if pair.teacher else None,
        "student": asdict(pair.student),
        "fingerprint": fingerprint(name, seed),
    }
    (folder / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")


def _is_current(folder: Path, name: str, seed: int) -> bool:
    """Whether today's recipe made the folder."""
    path = folder / "recipe.json"
    return path.exists() and read_object(path, "a recipe").get("fingerprint") == fingerprint(name, seed)


def _save(model: Qwen3ForCausalLM, pair: Pair, folder: Path) -> None:
    model.half().save_pretrained(folder)
    pair.task.tokenizer().save_pretrained(folder)


def _made_whole(out: Path, make: Callable[[Path], None]) -> None:
    """Fills a folder under a temporary name, on one thread, and renames it; an old `out` is replaced."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    threads = torch.get_num_threads()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)  # kernels this small get slower, not faster, with more threads
    try:
        make(temporary)
        shutil.rmtree(out, ignore_errors=True)
        temporary.rename(out)
    finally:
        torch.set_num_threads(threads)
        shutil.rmtree(temporary, ignore_errors=True)


def command(arguments: list[str]) -> None:
    options = COMMANDS["tiny.build"].parser().parse_args(arguments)
    print(build(options.out, options.seed, options.task))


if __name__ == "__main__":
    main(command)
