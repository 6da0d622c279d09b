"""Builds the embedded pair on a CPU: `python -m data.tiny.build` writes outputs/tiny/{teacher,student,*.jsonl}.

The recipe (this folder's source, the seed, and the library versions that change its result) is hashed; a folder made
by the same recipe is left alone. Built under a temporary name and renamed, so that it is there whole or not at all.
"""

import argparse
import hashlib
import json
import math
import os
import random
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from data.tiny import task
from opd.cli import InputError, main, say

TRAIN_PROBLEMS, TEST_PROBLEMS = 8192, 512
TEST_SEED, TRAIN_SEED = 1_000_003, 1_000_033


@dataclass(frozen=True)
class Recipe:
    """Size and training of one model. head_dim is 32, which every rollout engine's kernels take."""

    speaker: task.Speaker
    layers: int
    hidden: int
    steps: int
    lr: float
    batch: int = 64
    warmup: int = 30


TEACHER = Recipe(task.TEACHER, layers=3, hidden=96, steps=320, lr=4e-3)
STUDENT = Recipe(task.STUDENT, layers=2, hidden=64, steps=400, lr=5e-3)


def fingerprint(seed: int) -> str:
    """Hash of everything that decides the result."""
    text = "".join(Path(__file__).parent.joinpath(name).read_text() for name in ("task.py", "build.py"))
    return hashlib.sha256(f"{text}{seed}{torch.__version__}{transformers.__version__}".encode()).hexdigest()


def train_model(name: str, recipe: Recipe, tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """Trains one model from nothing on fresh problems: next-token cross entropy on the response tokens."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    end = tokenizer.convert_tokens_to_ids(task.END)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=recipe.hidden,
            intermediate_size=3 * recipe.hidden,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.hidden // 32,
            num_key_value_heads=recipe.hidden // 32,
            head_dim=32,
            tie_word_embeddings=True,
            initializer_range=0.04,
            max_position_embeddings=128,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            bos_token_id=None,
            eos_token_id=end,
            pad_token_id=tokenizer.pad_token_id,
            dtype="float32",
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.01)

    def rate(step: int) -> float:
        if step < recipe.warmup:
            return (step + 1) / recipe.warmup
        progress = (step - recipe.warmup) / (recipe.steps - recipe.warmup)
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    for _ in tqdm(range(recipe.steps), desc=f"tiny {name}", unit="step", disable=not sys.stderr.isatty()):
        rows, prompt_length = [], 0
        for _ in range(recipe.batch):
            problem = task.problem(rng)
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": problem}], add_generation_prompt=True, return_dict=False
            )
            prompt_length = len(prompt)
            text = task.response(problem, recipe.speaker, rng)
            rows.append(prompt + tokenizer.encode(text, add_special_tokens=False) + [end])
        ids = torch.tensor(rows)
        logits = model(input_ids=ids, use_cache=False).logits[:, prompt_length - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, prompt_length:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=tokenizer.pad_token_id)
    return model.eval()


def write_problems(path: Path, count: int, seed: int, without: set[str]) -> set[str]:
    """Writes `count` different problems that are not in `without`, one JSON object a line; returns their texts."""
    rng, texts = random.Random(seed), {}
    while len(texts) < count:
        text = task.problem(rng)
        if text not in without:
            texts[text] = None
    lines = [
        json.dumps({"id": f"{path.stem}-{i}", "problem": t, "answer": str(task.answer(t))}) for i, t in enumerate(texts)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return set(texts)


def build(out: Path, seed: int = 0) -> Path:
    """Makes the pair in `out` unless the same recipe already did. Returns `out`."""
    mark = fingerprint(seed)
    recorded = out / "recipe.json"
    if recorded.exists() and json.loads(recorded.read_text())["fingerprint"] == mark:
        say(f"embedded pair: {out} is current")
        return out
    if out.exists() and not recorded.exists():
        raise InputError(f"--out {out}: it exists and holds no embedded pair. Choose a folder that does not exist.")
    say(f"embedded pair: training teacher and student into {out} (one to two minutes of one core)")
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    threads = torch.get_num_threads()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)  # kernels this small get slower, not faster, with more threads
    try:
        tokenizer = task.tokenizer()
        for name, recipe, offset in (("teacher", TEACHER, 0), ("student", STUDENT, 1)):
            model = train_model(name, recipe, tokenizer, seed * 2 + offset)
            model.save_pretrained(temporary / name)
            tokenizer.save_pretrained(temporary / name)
        test = write_problems(temporary / "test.jsonl", TEST_PROBLEMS, TEST_SEED, set())
        write_problems(temporary / "train.jsonl", TRAIN_PROBLEMS, TRAIN_SEED, test)
        recipe = {"fingerprint": mark, "seed": seed, "teacher": asdict(TEACHER), "student": asdict(STUDENT)}
        (temporary / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")
        shutil.rmtree(out, ignore_errors=True)
        temporary.rename(out)
    finally:
        torch.set_num_threads(threads)
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def command(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m data.tiny.build", description="Build the embedded pair.")
    parser.add_argument("--out", type=Path, default=Path("outputs/tiny"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    print(build(options.out, options.seed))


if __name__ == "__main__":
    main(command)
