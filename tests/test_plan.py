"""The plan: sizes against real models, memory against what a run allocates, and --dry-run."""

import json
import subprocess
import sys

import torch
from helpers import random_lm, tiny_config
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from opd import plan


def test_sizes_without_weights_are_those_of_the_model(tiny_pair):
    config = tiny_config()
    for section, name in ((config.student, "student"), (config.teacher, "teacher")):
        model = AutoModelForCausalLM.from_pretrained(section.path)
        size = plan.size_without_weights(section, name)
        assert size == plan.size_of(model)
        assert size.parameters == sum(p.numel() for p in model.parameters()) == size.multiplied  # tied: counted once


def test_sizes_by_hand():
    llama = LlamaConfig(vocab_size=100, hidden_size=8, intermediate_size=12, num_hidden_layers=3, num_attention_heads=4,
                        num_key_value_heads=2, tie_word_embeddings=False)  # fmt: skip
    with torch.device("meta"):
        size = plan.size_of(AutoModelForCausalLM.from_config(llama))
    per_layer = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 12 + 2 * 8
    assert size.parameters == 2 * 800 + 3 * per_layer + 8 and size.multiplied == size.parameters - 800
    assert (size.head, size.vocab, size.cache_per_token) == (800, 100, 2 * 3 * 2 * 2)
    with torch.device("meta"):  # an architecture with other key names
        gpt2 = plan.size_of(AutoModelForCausalLM.from_config(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=50)))
    assert (gpt2.hidden, gpt2.layers, gpt2.cache_per_token) == (8, 2, 2 * 2 * 8)


def test_state_is_sixteen_bytes_a_parameter_and_phases_come_on_top():
    config = tiny_config()
    size = plan.size_of(random_lm(0).model)
    found = plan.make_plan(config, size, size, torch.device("cpu"), 60)
    assert found.student_state == 16 * size.parameters and found.checkpoint == 12 * size.parameters
    assert all(peak > found.student_state + found.teacher_weights for peak in found.peaks.values())
    assert found.host == 32 * 40 * size.hidden * 4
    half = plan.make_plan(tiny_config("rollout.max_response_tokens=20"), size, size, torch.device("cpu"), 60)
    assert half.seconds["rollout"] < found.seconds["rollout"]


def test_amounts_for_people():
    assert [plan.amount(x) for x in (12, 2048, 5 * 2**20, 1.5 * 2**30, 3000 * 2**30)] == [
        "12 B", "2 KiB", "5 MiB", "1.5 GiB", "3000.0 GiB"]  # fmt: skip


def test_a_dry_run_says_everything_and_starts_nothing(tiny_pair, tmp_path):
    command = [
        sys.executable,
        "-m",
        "tip.train",
        "--config",
        "configs/tiny.json",
        "--dry-run",
        "--set",
        f"output_dir={tmp_path}/o",
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    config = json.loads(result.stdout[: result.stdout.index("\n}") + 2])
    assert config["tip"]["rule"] == "soft_or" and config["output_dir"] == f"{tmp_path}/o"
    for text in ("memory: student with gradients and optimizer", "peak by phase rollout", "h in all", "disk:",
                 "command: python -m tip.train --config configs/tiny.json --dry-run", "nothing was started"):  # fmt: skip
        assert text in result.stdout
    assert not (tmp_path / "o").exists()
