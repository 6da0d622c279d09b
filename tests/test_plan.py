"""The plan: sizes against real models, memory against what a run allocates, and --dry-run."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from helpers import random_lm, tiny_config
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config, Qwen3Config

from opd import plan
from opd.benchmarks import read_benchmarks
from opd.config import load_config
from opd.engine.zero_file import read_deepspeed


def test_sizes_without_weights_are_those_of_the_model(tiny_pair):
    config = tiny_config()
    for section, name in ((config.student, "student"), (config.teacher, "teacher")):
        model = AutoModelForCausalLM.from_pretrained(section.path)
        size = plan.size_without_weights(section, name)
        assert size == plan.size_of(model)
        assert size.parameters == sum(p.numel() for p in model.parameters()) == size.multiplied  # tied: counted once


def test_sizes_by_hand():
    llama = LlamaConfig(
        vocab_size=100,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        size = plan.size_of(AutoModelForCausalLM.from_config(llama))
    per_layer = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 12 + 2 * 8
    assert size.parameters == 2 * 800 + 3 * per_layer + 8 and size.multiplied == size.parameters - 800
    assert (size.head, size.vocab, size.cache_per_token) == (800, 100, 2 * 3 * 2 * 2)
    assert size.packed_row == (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 12) // (2 * 8)
    with torch.device("meta"):  # an architecture with other key names
        gpt2 = plan.size_of(AutoModelForCausalLM.from_config(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=50)))
    assert (gpt2.hidden, gpt2.layers, gpt2.cache_per_token) == (8, 2, 2 * 2 * 8)


def test_the_plain_engine_by_hand():
    config = tiny_config("student.dtype=bfloat16")
    size = plan.size_of(random_lm(0).model)
    found = plan.make_plan(config, size, size, torch.device("cpu"), 60, longest_answer=30)
    p = size.parameters
    update = found.phases["update"]
    assert (update["weights"], update["gradients"], update["optimizer"], update["copy for autocast"]) == (
        4 * p,
        4 * p,
        8 * p,
        2 * p,
    )
    assert update["teacher"] == 4 * p and "gradients" not in found.phases["rollout"] and found.checkpoint == 12 * p
    # 32 prompts x 1 response of 24 + 40 tokens; 2 layers x 1 head x (key + value) x 16 x 2 bytes
    assert found.phases["rollout"]["KV cache"] == 32 * 64 * 2 * 2 * 16 * 2 * 1.25
    assert found.phases["evaluation"]["KV cache"] == 512 * 54 * 2 * 2 * 16 * 2 * 1.25
    assert found.host == {"teacher states": 32 * 40 * size.hidden * 4}
    assert found.peaks["update"] == sum(update.values())
    half = plan.make_plan(tiny_config("rollout.max_response_tokens=20"), size, size, torch.device("cpu"), 60)
    assert half.seconds["rollout"] < found.seconds["rollout"] and "evaluation" not in half.phases


def test_two_phases_and_vllm_by_hand():
    s, t = plan.size_of(random_lm(0).model), plan.size_of(random_lm(0, hidden=48, layers=3).model)
    settings = ["student.dtype=bfloat16", "engine.phases=2", "teacher.cache_gb=1e-4"]
    found = plan.make_plan(tiny_config(*settings), s, t, torch.device("cpu"), 60, longest_answer=30)
    p, q = s.parameters, t.parameters
    assert found.phases["rollout"].keys() == {"weights", "copy for autocast", "KV cache", "attention", "logits"}
    assert found.phases["teacher"].keys() == {"teacher", "activations"} and found.phases["teacher"]["teacher"] == 4 * q
    update = found.phases["update"]
    assert update["teacher head"] == 4 * 35 * 48 and "teacher" not in update and update["optimizer"] == 8 * p
    states = 32 * 40 * 48 * 4
    assert found.host == {
        "teacher states": int(1e-4 * 2**30),
        "student waiting": 4 * p,
        "moments waiting": 8 * p,
        "teacher waiting": 4 * q,
    }
    assert found.spilled == states - found.host["teacher states"] > 0
    vllm = plan.make_plan(
        tiny_config(*settings, "rollout.engine=vllm"), s, t, torch.device("cpu"), 60, longest_answer=30
    )
    sent = 2 * (p + 35 * 32)  # bfloat16; the tied head by its own name too
    assert vllm.phases["rollout"] == vllm.phases["evaluation"] == {"vLLM": sent + 2**30}
    assert vllm.host["weights for vLLM"] == sent and vllm.phases["update"] == update
    together = plan.make_plan(tiny_config("rollout.engine=vllm"), s, t, torch.device("cpu"), 60)
    assert (
        together.phases["rollout"].keys() == {"weights", "optimizer", "teacher", "vLLM"}
        and "vLLM" not in together.phases["update"]
    )
    elsewhere = tiny_config("rollout.engine=vllm", 'rollout.servers=["a:1"]')
    assert "vLLM" not in plan.make_plan(elsewhere, s, t, torch.device("cpu"), 60).phases["rollout"]


def test_a_teacher_that_is_the_student_by_hand():
    """A second copy, none, or one in float32 with a part of the checkpoint; and the longer one of the two prompts."""
    size, cpu = plan.size_of(random_lm(0).model), torch.device("cpu")
    prompt = '{"template": "{answer}", "role": "user", "missing": "error", "max_tokens": 60}'
    half = ("student.dtype=bfloat16", "teacher.dtype=bfloat16", "teacher.mode=self", "teacher.path=null")
    p, head = size.parameters, 35 * 32
    of = {"initial": (), "live": (), "ema": ("teacher.decay=0.9",)}
    for weights, more in of.items():
        settings = (*half, f"teacher.weights={weights}", f"data.teacher_prompt={prompt}", *more)
        found = plan.make_plan(tiny_config(*settings), size, size, cpu, 60)
        two = plan.make_plan(tiny_config(*settings, "engine.phases=2"), size, size, cpu, 60)
        kept = {"initial": 2, "live": 0, "ema": 4}[weights]  # bytes a parameter
        assert all(parts.get("teacher", 0) == kept * p for parts in found.phases.values())
        assert two.phases["update"].get("teacher head", 0) == kept * head
        assert two.host.get("teacher waiting", 0) == kept * p
        assert two.phases["teacher"].get("teacher", 0) == kept * p
        assert ("weights" in two.phases["teacher"]) == (weights == "live") and "optimizer" not in two.phases["teacher"]
        assert found.checkpoint == (16 if weights == "ema" else 12) * p
        micro = 2048  # rollouts of 60 + 40 tokens
        assert found.phases["teacher"]["activations"] == micro * (8 * 32 + 3 * 64) * 2
        one = plan.make_plan(tiny_config(*settings, "optim.micro_batch_tokens=1"), size, size, cpu, 60)
        assert one.phases["teacher"]["activations"] == 100 * (8 * 32 + 3 * 64) * 2


def test_an_average_lies_where_zero3_has_the_student():
    size, cpu = plan.size_of(random_lm(0).model), torch.device("cpu")
    prompt = '{"template": "{answer}", "role": "user", "missing": "error", "max_tokens": 60}'
    settings = ("teacher.mode=self", "teacher.path=null", "teacher.weights=ema", "teacher.decay=0.9")
    config = tiny_config(*settings, f"data.teacher_prompt={prompt}", "engine.kind=deepspeed", "engine.deepspeed=zero3")
    part = -(-size.parameters // 4) * 4  # bytes of a quarter, in float32
    for zero, device, host in (
        ({"stage": 2}, 4 * size.parameters, 0),
        ({"stage": 3}, part, 0),
        ({"stage": 3, "offload_param": {"device": "cpu"}}, 0, part),
    ):
        found = plan.make_plan(config, size, size, cpu, 60, zero=zero, processes=4)
        assert found.phases["teacher"].get("teacher", 0) == device and found.host.get("teacher", 0) == host
        head = found.phases["update"].get("teacher head", 0)
        assert head == (0 if zero["stage"] == 2 else 35 * 32 * 4)


# (hidden, intermediate, layers, heads, key-value heads, head_dim, vocabulary, tied): the models' published config.json
MODELS = {
    "Qwen/Qwen3-0.6B": (1024, 3072, 28, 16, 8, 128, 151936, True),
    "Qwen/Qwen3-1.7B": (2048, 6144, 28, 16, 8, 128, 151936, True),
    "Qwen/Qwen3-4B": (2560, 9728, 36, 32, 8, 128, 151936, True),
    "Qwen/Qwen3-14B": (5120, 17408, 40, 40, 8, 128, 151936, False),
    "Qwen/Qwen3-32B": (5120, 25600, 64, 64, 8, 128, 151936, False),
    "Qwen/Qwen3-8B": (4096, 12288, 36, 32, 8, 128, 151936, False),
    "meta-llama/Llama-3.1-8B-Instruct": (4096, 14336, 32, 32, 8, 128, 128256, False),
    "meta-llama/Llama-3.3-70B-Instruct": (8192, 28672, 80, 64, 8, 128, 128256, False),
    "Qwen/Qwen2.5-1.5B-Instruct": (1536, 8960, 28, 12, 2, 128, 151936, True),
    "Qwen/Qwen2.5-14B-Instruct": (5120, 13824, 48, 40, 8, 128, 152064, False),
}


def parameters_by_hand(name):
    hidden, intermediate, layers, heads, kv, dim, vocabulary, tied = MODELS[name]
    attention = hidden * dim * (heads + 2 * kv) + heads * dim * hidden
    extra = 2 * dim if "Qwen3" in name else dim * (heads + 2 * kv) if "Qwen2" in name else 0  # head norms; biases
    return (
        vocabulary * hidden * (1 if tied else 2)
        + layers * (attention + 3 * hidden * intermediate + 2 * hidden + extra)
        + hidden
    )


def saved(folder, name):
    hidden, intermediate, layers, heads, kv, dim, vocabulary, tied = MODELS[name]
    kind = {"Qwen3": Qwen3Config, "Qwen2": Qwen2Config, "Llama": LlamaConfig}[re.search("Qwen3|Qwen2|Llama", name)[0]]
    settings = {} if kind is Qwen2Config else {"head_dim": dim}
    kind(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        **settings,
    ).save_pretrained(folder / name)
    return f"path={folder / name}"


def of_recipe(name, tmp_path, processes=1):
    pair = load_config(f"configs/{name}.json", [])[0]
    overrides = [
        f"{who}.{saved(tmp_path, section.path)}"
        for who, section in (("student", pair.student), ("teacher", pair.teacher))
    ]
    config = load_config(f"configs/{name}.json", overrides)[0]
    sizes = plan.size_without_weights(config.student, "student"), plan.size_without_weights(config.teacher, "teacher")
    by_hand = parameters_by_hand(pair.student.path), parameters_by_hand(pair.teacher.path)
    assert tuple(s.parameters for s in sizes) == by_hand
    longest = max(b.max_response_tokens for b in read_benchmarks(config).values())
    zero = read_deepspeed(config)["zero_optimization"] if config.engine.kind == "deepspeed" else None
    return config, *by_hand, plan.make_plan(config, *sizes, torch.device("cpu"), 100, longest, zero, processes)


GPU = {24: 22.0, 80: 74.0}  # GiB that a card of so many GB leaves to a program


@pytest.mark.parametrize(
    ("name", "card"), [("qwen3_1.7b_to_0.6b", 24), ("qwen3_8b_to_1.7b", 80), ("qwen3_8b_to_0.6b_drafter", 80)]
)
def test_a_recipe_for_one_gpu_fits_by_hand_arithmetic(name, card, tmp_path):
    config, p, q, found = of_recipe(name, tmp_path)
    small = "0.6b" in name
    hidden, intermediate, layers, _, kv, dim, vocabulary, _ = MODELS[f"Qwen/Qwen3-{'0.6B' if small else '1.7B'}"]
    held = 4 * p + 2 * p + 8 * p + 2 * q  # float32 weights, bfloat16 copy, moments; bfloat16 teacher
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    cache = config.rollout.batch_size * longest * layers * 2 * kv * dim * 2 * 5 // 4
    attention = config.rollout.batch_size * longest * 2 * 16 * 128 * 2  # 16 heads share 8 of keys and values
    logits = config.rollout.batch_size * vocabulary * 32
    assert found.peaks["rollout"] == held + cache + attention + logits
    one_layer = longest * (8 * hidden + 3 * intermediate) * 2  # one response to a micro-batch
    row = 3840 if small else longest  # what sequences may share; for the 1.7B model it is 12,288
    masks = longest * row * 2  # of one layer, in bfloat16
    head = 6 * vocabulary * hidden  # its gradient in float32, and its copy in bfloat16 for the products of the loss
    backward = one_layer + layers * longest * hidden * 2 + masks + config.loss.chunk_bytes + head
    assert found.peaks["update"] == held + 4 * p + backward
    assert max(found.peaks.values()) < GPU[card] * 2**30, {k: v / 2**30 for k, v in found.peaks.items()}


def test_adapters_fit_a_small_card_by_hand_arithmetic(tmp_path):
    config, p, q, found = of_recipe("qwen3_8b_to_1.7b_lora", tmp_path)
    # rank 32 at q, k, v, o, gate, up and down of 28 layers: inputs and outputs of each
    adapters = 32 * 28 * (2 * (2048 + 2048) + 2 * (2048 + 1024) + 3 * (2048 + 6144))
    weights, longest = 2 * p + 4 * adapters, 2048 + 4096
    assert found.adapters == adapters and found.checkpoint == 12 * adapters
    cache = 16 * longest * 28 * 2 * 8 * 128 * 2 * 5 // 4
    attention = 16 * longest * 2 * 16 * 128 * 2
    assert found.peaks["rollout"] == weights + cache + attention + 16 * 151936 * 32
    assert found.phases["teacher"]["teacher"] == found.host["teacher waiting"] == 2 * q
    one_layer = longest * (8 * 2048 + 3 * 6144) * 2
    backward = one_layer + 28 * longest * 2048 * 2 + longest * longest * 2 + config.loss.chunk_bytes
    assert found.peaks["update"] == weights + 12 * adapters + 2 * 151936 * 4096 + backward
    assert max(found.peaks.values()) < GPU[24] * 2**30, {k: v / 2**30 for k, v in found.peaks.items()}


@pytest.mark.parametrize("teacher", ["14b", "32b"])
def test_the_pairs_for_travel_tasks_fit_eight_gpus(teacher, tmp_path):
    *_, found = of_recipe(f"qwen3_{teacher}_to_1.7b_deepplanning", tmp_path, 8)
    assert max(found.peaks.values()) < GPU[80] * 2**30, {k: v / 2**30 for k, v in found.peaks.items()}


def test_the_papers_pairs_fit_eight_gpus_by_hand_arithmetic(tmp_path):
    for name in ("qwen3_8b_to_4b", "qwen25_14b_to_1.5b", "llama33_70b_to_llama31_8b"):
        config, p, q, found = of_recipe(name, tmp_path, 8)
        assert config.engine.deepspeed == "zero2"
        held = 2 * p + 12 * -(-p // 8)  # bfloat16 weights; an eighth of the float32 copy and the moments
        if name.startswith("llama"):  # an eighth of the teacher, and its head, 128,256 x 8,192
            held += -(-q // 8) * 2 + 2 * 128256 * 8192
            assert found.phases["teacher"]["teacher layers gathered"] == 2 * 10**9
        else:
            held += 2 * q
        hidden, intermediate, layers, heads, kv, dim, vocabulary, _ = MODELS[
            load_config(f"configs/{name}.json", [])[0].student.path
        ]
        head, batch, length = vocabulary * hidden, config.rollout.batch_size, 2048 + 8192
        gradients = (
            4 * -(-p // 8) + 2 * 2 * 200_000_000 + 4 * max(200_000_000, head)
        )  # part, two buckets, float32 reduction
        assert found.phases["update"]["gradients"] == gradients
        one_layer = 16384 * (8 * hidden + 3 * intermediate) * 2  # optim.micro_batch_tokens
        masks = 16384 * length * 2
        backward = one_layer + layers * 16384 * hidden * 2 + masks + config.loss.chunk_bytes + 4 * head
        assert found.peaks["update"] == held + gradients + backward
        cache, attention = batch * length * layers * 2 * kv * dim * 2 * 5 // 4, batch * length * 2 * heads * dim * 2
        assert found.peaks["rollout"] == held + cache + attention + batch * vocabulary * 32
        assert found.peaks["loading"] == held - 2 * p - 12 * -(-p // 8) + 4 * p
        assert max(found.peaks.values()) < GPU[80] * 2**30, (name, {k: v / 2**30 for k, v in found.peaks.items()})


def test_settings_that_make_the_update_fit_by_hand():
    """Fewer tokens at once come first, then checkpointing, then both; --dry-run and the doctor name the first one."""
    size = plan.size_of(random_lm(0).model)
    settings = ["optim.micro_batch_tokens=300", "loss.chunk_bytes=65536"]
    found = plan.make_plan(tiny_config(*settings), size, size, torch.device("cpu"), 1)
    length, row = 24 + 40, min(24 + 40, size.packed_row)
    assert row == 64 and size.packed_row == 144

    def update(tokens, checkpointing):
        held = (4 + 4 + 8 + 4) * size.parameters  # weights, gradients, moments; the teacher
        one_layer = tokens * (8 * 32 + 3 * 64) * 4
        loss = min(65536, 3 * 4 * tokens * 35) + 4 * size.head
        layers = 2 * tokens * 32 * 4 if checkpointing else 2 * one_layer
        return held + one_layer + layers + tokens * row * 4 * (1 if checkpointing else 2) + loss

    assert found.peaks["update"] == update(300, False)
    by_hand = {}
    for checkpointing in (False, True):  # 4, 2 and 1 responses of full length
        for tokens in (300, 4 * length, 2 * length, length):
            parts = ["--set engine.gradient_checkpointing=true"] * checkpointing
            parts += [f"--set optim.micro_batch_tokens={tokens}"] * (tokens < 300)
            by_hand[" ".join(parts)] = update(tokens, checkpointing)
    del by_hand[""]
    assert list(found.lighter.items()) == list(by_hand.items())
    assert found.way_to_fit(update(2 * length, False)) == (
        f"With --set optim.micro_batch_tokens=128 the update takes {plan.amount(update(128, False))}, which fits."
    )
    assert "With --set engine.gradient_checkpointing=true --set optim.micro_batch_tokens=64 " in found.way_to_fit(
        update(length, True)
    )
    assert found.way_to_fit(update(length, True) - 1).startswith("Neither engine.gradient_checkpointing nor a smaller")
    on = plan.make_plan(
        tiny_config(*settings, "engine.gradient_checkpointing=true"), size, size, torch.device("cpu"), 1
    )
    assert on.peaks["update"] == update(300, True)
    assert list(on.lighter) == [f"--set optim.micro_batch_tokens={tokens}" for tokens in (256, 128, 64)]


def test_the_plan_says_which_settings_make_the_update_fit(monkeypatch):
    config, size = tiny_config("loss.chunk_bytes=65536"), plan.size_of(random_lm(0).model)
    found = plan.make_plan(config, size, size, torch.device("cpu"), 1)
    assert "does not fit" not in plan.describe(config, torch.device("cpu"), found)
    room = next(iter(found.lighter.values()))
    monkeypatch.setattr(plan, "memory_of", lambda device: room + sum(found.host.values()))
    text = plan.describe(config, torch.device("cpu"), found)
    assert f"the update does not fit into the {plan.amount(room)} of the cpu. {found.way_to_fit(room)}" in text
    assert "With --set optim.micro_batch_tokens=1024 the update takes" in text


def test_stages_and_offload_by_hand(tmp_path):
    config = tiny_config("student.dtype=bfloat16", "teacher.dtype=bfloat16")
    size = plan.size_of(random_lm(0).model)
    p = size.parameters
    assert p % 4 == 0

    def held(stage, processes=4, placement="device", **zero):
        placed = replace(config, teacher=replace(config.teacher, placement=placement))
        found = plan.make_plan(
            placed, size, size, torch.device("cpu"), 1, 0, {"stage": stage, "reduce_bucket_size": 10, **zero}, processes
        )
        names = ("weights", "layers gathered", "optimizer", "gradients", "teacher", "teacher head")
        return [found.phases["update"].get(n, 0) for n in names], {
            k: v for k, v in found.host.items() if k != "teacher states"
        }

    reduction = 10 * 2 + 4 * size.head
    assert held(1) == ([2 * p, 0, 3 * p, 6 * p, 2 * p, 0], {})
    assert held(2) == ([2 * p, 0, 3 * p, p + reduction, 2 * p, 0], {})
    assert held(3) == ([p // 2, 2 * p, 3 * p, p + reduction, 2 * p, 0], {})
    assert held(2, offload_optimizer={"device": "cpu"}) == (
        [2 * p, 0, 0, reduction, 2 * p, 0],
        {"optimizer": 3 * p, "gradients": p},
    )
    everything = {
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "cpu"},
        "stage3_max_live_parameters": 100,
    }
    assert held(3, **everything) == (
        [0, 200, 0, reduction, 2 * p, 0],
        {"weights": p // 2, "optimizer": 3 * p, "gradients": p},
    )
    assert held(2, placement="sharded") == ([2 * p, 0, 3 * p, p + reduction, p // 2, 2 * size.head], {})
    assert held(2, placement="host") == ([2 * p, 0, 3 * p, p + reduction, 0, 2 * size.head], {"teacher": p // 2})


def test_amounts_for_people():
    assert [plan.amount(x) for x in (12, 2048, 5 * 2**20, 1.5 * 2**30, 3000 * 2**30)] == [
        "12 B",
        "2 KiB",
        "5 MiB",
        "1.5 GiB",
        "3000.0 GiB",
    ]


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
    config = json.loads(result.stdout[result.stdout.index("\n{\n") :])  # the configuration comes last
    assert config["tip"]["rule"] == "soft_or" and config["output_dir"] == f"{tmp_path}/o"
    for text in (
        "memory, by phase:",
        "    rollout: ",
        "weights 426 KiB + optimizer 85",
        "h in all",
        "disk:",
        "command: python -m tip.train --config configs/tiny.json --dry-run",
        "nothing was started",
    ):
        assert text in result.stdout
    assert not (tmp_path / "o").exists()
