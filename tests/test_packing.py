"""Sequences that share a row: their hidden states are those of rows of their own, or the model gets no shared rows."""

from itertools import pairwise

import pytest
import torch
import transformers
from helpers import pair_of, random_lm, random_rollouts, relative
from transformers import AutoModelForCausalLM, masking_utils, modeling_flash_attention_utils

from data.tiny import task
from opd import models
from opd.batch import make_micro_batches
from opd.config import StudentSection
from opd.data import Prompt, Rollout
from opd.step import stats_by_batch

PACKED = {  # name -> (config class, what is particular)
    "llama": ("LlamaConfig", {"num_key_value_heads": 1}),
    "qwen2": ("Qwen2Config", {"num_key_value_heads": 1}),
    "qwen3": ("Qwen3Config", {"num_key_value_heads": 2, "head_dim": 16}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "mistral, window 6": ("MistralConfig", {"num_key_value_heads": 2, "sliding_window": 6}),
    "gemma2, window 6": (
        "Gemma2Config",
        {"num_key_value_heads": 1, "head_dim": 16, "sliding_window": 6, "attn_logit_softcapping": 20.0},
    ),
    "granite": ("GraniteConfig", {}),
    "cohere": ("CohereConfig", {"num_key_value_heads": 2}),
    "phi": ("PhiConfig", {"num_key_value_heads": 4}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "gpt2, learned positions": ("GPT2Config", {}),
}
ALONE = {
    "bloom, positions from the mask": ("BloomConfig", {}),
    "lfm2, short convolutions": ("Lfm2Config", {"num_key_value_heads": 2, "full_attn_idxs": [1]}),
    "mamba, a state along the row": ("MambaConfig", {"state_size": 4, "expand": 2}),
}


def random_model(name, kernel=None, **changes):
    """A small random model of an architecture of PACKED or ALONE, as a language model that was not tried yet."""
    kind, particular = (PACKED | ALONE)[name]
    tokenizer = task.tokenizer()
    torch.manual_seed(0)
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "pad_token_id": tokenizer.pad_token_id,
    } | particular
    config = getattr(transformers, kind)(**settings | changes)
    kernel = kernel or ("eager" if name.startswith("gemma2") else None)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=kernel).eval()
    return models.LanguageModel(model, tokenizer, (1,), torch.float32, "student")


def hidden_states(lm, rollouts, packed_row, max_tokens=10**6):
    """The hidden states of every counted token, by sequence and position."""
    found = {}
    for batch in make_micro_batches(rollouts, max_tokens, 0, "keep", packed_row):
        with torch.no_grad():
            states = lm.hidden_states(batch, torch.arange(len(batch.token_ids)))
        found |= dict(zip(zip(batch.sequence_id.tolist(), batch.position.tolist(), strict=True), states, strict=True))
    return torch.stack([found[key] for key in sorted(found)])


@pytest.mark.parametrize("name", PACKED)
def test_packed_hidden_states_are_those_of_separate_rows(name):
    lm = models.tried(random_model(name))
    assert lm.packed_row > 30
    rollouts = random_rollouts(lm, count=9, prompt=(1, 6), response=(1, 25))
    longest = max(len(r.prompt.token_ids) + len(r.response_ids) for r in rollouts)
    alone = hidden_states(lm, rollouts, 0, max_tokens=1)
    assert relative(hidden_states(lm, rollouts, 0), alone) < 3e-6  # padded
    assert relative(hidden_states(lm, rollouts, longest), alone) < 3e-6
    assert relative(hidden_states(lm, rollouts, longest, 2 * longest), alone) < 3e-6


@pytest.mark.parametrize("name", ALONE)
def test_architectures_that_mix_sequences_get_no_shared_rows(name):
    lm = models.tried(random_model(name))
    assert lm.packed_row == 0
    rollouts = random_rollouts(lm, count=5, prompt=(1, 6), response=(1, 25))
    longest = max(len(r.prompt.token_ids) + len(r.response_ids) for r in rollouts)
    alone = hidden_states(lm, rollouts, 0, max_tokens=1)
    assert relative(hidden_states(lm, rollouts, longest), alone) > 0.01  # what the trial has found
    assert relative(hidden_states(lm, rollouts, lm.packed_row), alone) < 3e-6  # padded


def test_a_sequence_never_attends_to_its_neighbours():
    """With other tokens before and behind it, its hidden states are the same bit for bit."""
    lm = models.tried(random_lm(0))
    states = []
    for shift in (0, 1):
        others = [tuple(4 + (7 * i + shift * (5 + i)) % 25 for i in range(n)) for n in (9, 6)]
        sequences = [others[0], (4, 9, 17, 6, 22), others[1]]
        rollouts = [Rollout(i, Prompt("", s[:1], None), s[1:], "stop") for i, s in enumerate(sequences)]
        long = Rollout(9, Prompt("", (4,), None), tuple(range(5, 24)), "stop")
        (batch,) = make_micro_batches([*rollouts, long], 40, 0, "keep", 20)
        assert batch.input_ids.shape == (2, 20) and set(batch.sequence_id[batch.rows == 1].tolist()) == {0, 1, 2}
        with torch.no_grad():
            states.append(lm.hidden_states(batch, (batch.sequence_id == 1).nonzero().squeeze(1)))
    assert others[0] != (4, 11, 18) and torch.equal(*states)


def test_a_mask_that_lets_neighbours_through_is_found(monkeypatch):
    """The trial at loading runs the model, so it does not trust what transformers says of itself."""
    assert models.tried(random_lm(0)).packed_row > 0
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    assert models.tried(random_lm(0)).packed_row == 0


def test_a_forward_that_takes_no_positions_gets_none():
    lm = random_lm(0)
    forward = lm.model.model.forward
    lm.model.model.forward = lambda input_ids, use_cache: forward(input_ids=input_ids, use_cache=use_cache)
    lm.model.forward = lambda input_ids, use_cache: transformers.modeling_outputs.CausalLMOutput(
        logits=lm.model.lm_head(forward(input_ids=input_ids, use_cache=use_cache).last_hidden_state)
    )
    assert models.tried(lm).packed_row == 0


def flash(q, k, v, causal=True, softmax_scale=None, **_):
    """Stands for flash_attn_func, which has no kernel on a CPU: (B, T, heads, head_dim)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=causal, scale=softmax_scale, enable_gqa=True
    )
    return out.transpose(1, 2)


def flash_of_bounds(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **more):
    """Stands for flash_attn_varlen_func: (tokens, heads, head_dim), cut where sequences begin."""
    bounds = cu_seqlens_q.tolist()
    assert bounds == cu_seqlens_k.tolist() and max_seqlen_q == max_seqlen_k == max(cu_seqlens_q.diff().tolist())
    parts = [slice(a, b) for a, b in pairwise(bounds)]
    return torch.cat([flash(q[None, p], k[None, p], v[None, p], **more)[0] for p in parts])


@pytest.mark.parametrize("name", [name for name in PACKED if "window" not in name and "gpt2" not in name])
def test_flash_attention_reads_where_sequences_begin(name, monkeypatch):
    """Of rows of any length. The kernel is a stand-in, and what calls it is transformers."""
    calls = []
    kernels = (
        flash,
        lambda *a, **k: calls.append(len(k["cu_seqlens_q"])) or flash_of_bounds(*a, **k),
        None,
        None,
        None,
    )

    def options(query_length, key_length, is_causal, softmax_scale=None, max_seqlen_q=None, max_seqlen_k=None, **_):
        lengths = {} if max_seqlen_q is None else {"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k}
        return {"causal": is_causal, "softmax_scale": softmax_scale} | lengths

    monkeypatch.setattr(
        modeling_flash_attention_utils, "lazy_import_flash_attention", lambda *_: (kernels, (options, None))
    )
    sdpa, flashing = random_model(name), random_model(name)
    flashing.model.config._attn_implementation = "flash_attention_2"
    flashing = models.tried(flashing)
    assert flashing.packed_row == models.ANY_LENGTH and calls
    rollouts = random_rollouts(flashing, count=9, prompt=(1, 6), response=(1, 25))
    calls.clear()
    assert relative(hidden_states(flashing, rollouts, 10**6), hidden_states(sdpa, rollouts, 0, max_tokens=1)) < 3e-6
    assert len(calls) == 2 and max(calls) > 9  # once in each layer


def test_the_row_that_is_worth_its_mask_by_hand():
    lm = random_lm(0)  # hidden 32, intermediate 64, 2 heads and 1 key-value head of 16
    weights = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64
    assert models.packed_row_of(lm.model) == weights // (2 * 32)
    with torch.device("meta"):  # an architecture with other key names
        gpt2 = AutoModelForCausalLM.from_config(transformers.GPT2Config(n_embd=64, n_head=4))
    assert models.packed_row_of(gpt2) == (4 * 64 * 64 + 3 * 64 * 256) // (2 * 64)


def test_a_pair_packs_what_both_of_its_models_take():
    student, teacher = models.tried(random_lm(0)), random_lm(1, name="teacher")
    assert pair_of(student, teacher).packed_row == 0
    teacher = models.tried(random_lm(1, hidden=48, name="teacher"))
    assert 0 < pair_of(student, teacher).packed_row == min(student.packed_row, teacher.packed_row)
    assert student.packed_row != teacher.packed_row


def test_loading_tries_the_model_and_packing_leaves_the_statistics(tmp_path):
    lm = random_lm(0)
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    section = StudentSection(path=str(tmp_path), revision=None, dtype="float32", attn_implementation="sdpa")
    loaded = models.load(section, torch.device("cpu"), "student")
    assert loaded.packed_row == models.packed_row_of(lm.model)
    pair = pair_of(loaded, models.tried(random_lm(2, name="teacher")))
    rollouts = random_rollouts(loaded, count=9)
    found = {}
    for packed_row in (0, pair.packed_row):
        batches = make_micro_batches(rollouts, 10**6, 0, "keep", packed_row)
        (columns,) = stats_by_batch(pair, batches, frozenset({"reverse_kl"}))
        order = (batches[0].sequence_id * 1000 + batches[0].position).argsort()
        found[packed_row] = columns["reverse_kl"][order]
        assert (batches[0].position_ids is None) == (packed_row == 0)
    torch.testing.assert_close(found[0], found[pair.packed_row], rtol=1e-5, atol=1e-5)
