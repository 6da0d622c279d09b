"""Sampling: the student's own distribution, reproducible from the seed, whatever the batch and the checkpoint's
files."""

import math
from dataclasses import replace

import pytest
import torch
import transformers
from helpers import random_lm
from transformers import GenerationConfig

from opd.data import Prompt
from opd.rollout import Decoding, decode, kv_cache
from opd.rollout.decode import quantile_token
from opd.rollout.graph import FixedStep, can_be_fixed, has_free_columns, try_to_fix
from opd.rollout.kv_cache import empty_cache
from opd.rollout.local import TransformersSampler
from opd.seeds import generator

FREE = Decoding(temperature=1.0, top_p=1.0, max_response_tokens=12)
PROMPTS = [Prompt(str(i), tuple(range(3, 4 + i % 5)), "0") for i in range(9)]


def draw(lm, prompts=PROMPTS, decoding=FREE, batch_size=4, seed=0, vocab_size=35):
    sampler = TransformersSampler(lm, batch_size)
    return sampler.sample(prompts, decoding, vocab_size, [(seed, p.id) for p in prompts])


def test_a_rollout_depends_on_its_seed_and_not_on_its_batch():
    lm = random_lm(1, std=0.3)
    base = draw(lm)
    assert [r.sequence_id for r in base] == list(range(9)) and [r.prompt for r in base] == PROMPTS
    for batch_size in (1, 2, 9, 100):
        assert draw(lm, batch_size=batch_size) == base
    assert [r.response_ids for r in draw(lm, PROMPTS[::-1])] == [r.response_ids for r in base[::-1]]
    assert draw(lm, seed=1) != base


def test_responses_stop_at_every_eos_id_and_keep_it():
    lm = random_lm(1, std=0.3)
    ends = (lm.eos_ids[0], 5, 9)
    rollouts = draw(replace(lm, eos_ids=ends), PROMPTS * 6)
    stopped = [r for r in rollouts if r.finish_reason == "stop"]
    assert {r.response_ids[-1] for r in stopped} == set(ends)
    assert all(not set(r.response_ids[:-1]) & set(ends) for r in rollouts)
    cut = [r for r in rollouts if r.finish_reason == "length"]
    assert cut and all(len(r.response_ids) == 12 and r.response_ids[-1] not in ends for r in cut)


def test_cached_left_padded_generation_samples_from_the_uncached_model():
    """Every sampled token is the quantile of its uniform in a plain forward pass over prompt and response."""
    lm = random_lm(1, std=0.3)
    for rollout in draw(lm, batch_size=9):
        ids = torch.tensor([rollout.prompt.token_ids + rollout.response_ids])
        with torch.no_grad():
            logits = lm.model(input_ids=ids, use_cache=False).logits[0, :, :35]
        uniforms = torch.rand(12, generator=generator(0, rollout.prompt.id), dtype=torch.float64)
        probs = logits[len(rollout.prompt.token_ids) - 1 : -1].softmax(-1).double()
        again = quantile_token(probs, uniforms[: len(probs)], 1.0)[:, 0]
        assert again.tolist() == list(rollout.response_ids)


def test_greedy_is_the_argmax():
    lm = random_lm(1, std=0.3)
    for rollout in draw(lm, decoding=Decoding(0.0, 1.0, 5)):
        ids = list(rollout.prompt.token_ids)
        for token in rollout.response_ids:
            with torch.no_grad():
                assert token == lm.model(input_ids=torch.tensor([ids])).logits[0, -1, :35].argmax()
            ids.append(token)


def test_the_checkpoints_generation_file_does_not_bend_the_distribution():
    lm = random_lm(1, std=0.3)
    base = draw(lm)
    own = GenerationConfig(
        temperature=0.1,
        top_k=1,
        top_p=0.1,
        repetition_penalty=5.0,
        do_sample=True,
        max_length=3,
        bad_words_ids=[[7]],
        suppress_tokens=[3, 4],
        min_new_tokens=9,
    )
    lm.model.generation_config = own
    assert draw(lm) == base
    assert lm.model.generation_config is own  # put back, to be saved with the student


def test_padded_vocabulary_rows_are_never_sampled():
    lm = random_lm(1, vocab_size=64, std=0.3)
    assert all(max(r.response_ids) < 35 for r in draw(lm, PROMPTS * 4))


def test_inverse_transform_has_the_right_frequencies():
    probs = torch.tensor([[0.5, 0.0, 0.3, 0.2]], dtype=torch.float64)
    grid = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    tokens = quantile_token(probs.expand(1000, 4), grid, 1.0)[:, 0]
    assert torch.bincount(tokens, minlength=4).tolist() == [500, 0, 300, 200]
    # nucleus of 0.6: tokens 0 and 2, renormalised to 5/8 and 3/8
    tokens = quantile_token(probs.expand(1000, 4), grid, 0.6)[:, 0]
    assert torch.bincount(tokens, minlength=4).tolist() == [625, 0, 375, 0]
    assert set(quantile_token(probs.expand(1000, 4), grid, 0.5)[:, 0].tolist()) == {0}
    assert quantile_token(probs, torch.tensor([0.0], dtype=torch.float64), 1.0).item() == 0
    assert (
        quantile_token(torch.tensor([[0.0, 1.0, 0.0]]).double(), torch.tensor([1.0], dtype=torch.float64), 1.0).item()
        == 1
    )


def test_the_top_k_by_hand():
    probs = torch.tensor([[0.1, 0.4, 0.1, 0.3, 0.1]], dtype=torch.float64)

    def drawn(top_p, top_k):
        uniforms = torch.linspace(0, 1, 101, dtype=torch.float64)
        return set(quantile_token(probs.expand(101, 5), uniforms, top_p, top_k)[:, 0].tolist())

    assert [drawn(1.0, k) for k in (1, 2, 3, 5, 99)] == [{1}, {1, 3}, {0, 1, 3}, {0, 1, 2, 3, 4}, {0, 1, 2, 3, 4}]
    # the nucleus is a share of the top k: .4 / .7 of the top 2 reaches .5, and .4 of all does not
    assert drawn(0.5, 2) == {1} and drawn(0.5, None) == drawn(0.5, 5) == {1, 3}


def test_no_token_outside_the_top_k_is_drawn():
    lm = random_lm(1, std=0.3)
    decoding = replace(FREE, top_k=3)
    rollouts = draw(lm, PROMPTS * 4, decoding)
    assert draw(lm, PROMPTS * 4, decoding, batch_size=36) == rollouts != draw(lm, PROMPTS * 4)
    places = set()
    for rollout in rollouts:
        ids = torch.tensor([rollout.prompt.token_ids + rollout.response_ids])
        with torch.no_grad():
            logits = lm.model(input_ids=ids, use_cache=False).logits[0, len(rollout.prompt.token_ids) - 1 : -1, :35]
        for row, token in zip(logits, rollout.response_ids, strict=True):
            places.add(int((row > row[token]).sum()))
    assert places == {0, 1, 2}


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_without_a_top_k_nothing_changes(top_p):
    """A top k of the whole vocabulary, and none, draw what the nucleus alone draws."""
    lm, decoding = random_lm(1, std=0.3), replace(FREE, top_p=top_p)
    assert draw(lm, decoding=decoding) == draw(lm, decoding=replace(decoding, top_k=35))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_first_token_frequencies_follow_the_student(temperature):
    lm = random_lm(4, std=0.1)
    prompts = [Prompt(str(i), (3, 4), "0") for i in range(4000)]
    decoding = Decoding(temperature, 1.0, 1)
    counts = torch.bincount(
        torch.tensor([r.response_ids[0] for r in draw(lm, prompts, decoding, batch_size=1000)]), minlength=35
    )
    with torch.no_grad():
        p = (lm.model(input_ids=torch.tensor([[3, 4]])).logits[0, -1] / temperature).softmax(-1).double()
    chi_squared = ((counts - 4000 * p) ** 2 / (4000 * p))[4000 * p > 5].sum().item()
    cells = int((4000 * p > 5).sum())
    assert chi_squared < cells + 4 * math.sqrt(2 * cells)


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 35}
ARCHITECTURES = {  # name -> (its configuration, what is particular); the longest rollout fills the context
    "llama": ("LlamaConfig", {"num_key_value_heads": 1}),
    "qwen3": ("Qwen3Config", {"num_key_value_heads": 2, "head_dim": 16}),
    "gemma2": ("Gemma2Config", {"num_key_value_heads": 1, "head_dim": 16, "sliding_window": 8}),  # and full attention
    "mistral": ("MistralConfig", {"num_key_value_heads": 2, "sliding_window": 8}),  # sliding windows alone
    "phi": ("PhiConfig", {"num_key_value_heads": 4}),
    "gpt2": ("GPT2Config", {"n_positions": 68, "bos_token_id": None}),  # learned positions
    "bloom": ("BloomConfig", {"n_layer": 2, "n_head": 4}),  # no positions but a bias
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"] * 2, "num_key_value_heads": 2}),  # states, too
}


@pytest.mark.parametrize(
    ("name", "fixed"), [*((name, False) for name in ARCHITECTURES), *((n, True) for n in ("llama", "qwen3", "gpt2"))]
)
def test_rows_that_come_and_go_sample_from_the_uncached_model(name, fixed, monkeypatch):
    """Every sampled token is the quantile of its number in a plain forward pass, and few rows are computed in vain.

    With `fixed`, tokens are computed over tensors that stay where they are, as for a CUDA graph.
    """
    steps = []

    def fix(*args):
        steps.append(FixedStep(*args, capture=lambda work: lambda: steps.append(None) or work()))
        return steps[-1]

    if fixed:
        monkeypatch.setattr(decode, "can_be_fixed", lambda lm, cache: has_free_columns(cache))
        monkeypatch.setattr(decode, "try_to_fix", fix)
        monkeypatch.setattr(decode, "STEADY", 1)
        monkeypatch.setattr(kv_cache, "ROOM", 4)  # so that buffers grow
    kind, particular = ARCHITECTURES[name]
    torch.manual_seed(3)
    config = getattr(transformers, kind)(
        **SIZES | {"max_position_embeddings": 68, "initializer_range": 0.3} | particular
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    lm = replace(random_lm(1), model=model, eos_ids=(5, 9), head_scope=None)
    prompts = [Prompt(str(i), tuple(10 + (7 * i + j) % 20 for j in range(3 + 5 * i % 26)), "0") for i in range(30)]
    computed = []
    model.register_forward_pre_hook(lambda _, __, inputs: computed.append(len(inputs["input_ids"])), with_kwargs=True)
    decoding = Decoding(1.0, 1.0, 40)
    sampler = TransformersSampler(lm, 8)
    rollouts = sampler.sample(prompts, decoding, 35, [(0, p.id) for p in prompts])
    sampled = sum(len(r.response_ids) for r in rollouts)
    assert {r.finish_reason for r in rollouts} == {"stop", "length"} and sampled < 0.9 * 40 * len(rollouts)
    assert sum(computed) < sampled * (1.15 if name != "lfm2" else 1.6)
    made = sum(step is not None for step in steps)
    assert (made > 5 and len(steps) - made > 30) if fixed else not steps
    for rollout in rollouts:
        ids = torch.tensor([rollout.prompt.token_ids + rollout.response_ids])
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, :, :35]
        uniforms = torch.rand(40, generator=generator(0, rollout.prompt.id), dtype=torch.float64)
        probs = logits[len(rollout.prompt.token_ids) - 1 : -1].softmax(-1)
        assert quantile_token(probs, uniforms[: len(probs)], 1.0)[:, 0].tolist() == list(rollout.response_ids)


def test_the_quantile_by_blocks_is_that_of_the_running_sum():
    torch.manual_seed(0)
    for size in (3, 511, 512, 513, 3000):
        probs = (3 * torch.randn(200, size)).softmax(-1)
        probs[:, torch.rand(size) < 0.3] = 0
        probs[:, -1] += 1e-9
        uniform = torch.rand(200, dtype=torch.float64)
        uniform[:3] = torch.tensor([0.0, 1.0, 1 - 1e-17])
        token = quantile_token(probs, uniform, 1.0)[:, 0]
        assert (probs[torch.arange(200), token] > 0).all()
        cumulative = probs.double().cumsum(-1)
        expected = [int((row <= u * row[-1]).sum()) for row, u in zip(cumulative[3:], uniform[3:], strict=True)]
        assert token[3:].tolist() == expected


def test_a_graph_is_for_models_on_a_gpu_with_full_attention(monkeypatch):
    lm = random_lm(1)
    assert not can_be_fixed(lm, empty_cache(lm.model))  # it is on a CPU

    def fail(*args):
        raise RuntimeError("it waits for the GPU")

    monkeypatch.setattr("opd.rollout.graph.FixedStep", fail)
    with pytest.warns(UserWarning, match="student is sampled without CUDA graphs.*it waits for the GPU"):
        assert try_to_fix(lm, empty_cache(lm.model), [3], 2) is None
