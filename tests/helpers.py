"""Small random models and batches, and the formulas of the loss written again, naively and in float64."""

import base64
import zlib
from dataclasses import replace

import torch
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from data.tiny import task
from opd.batch import make_micro_batches
from opd.config import LossSection, load_config
from opd.data import Prompt, Rollout
from opd.engine.plain import TorchEngine
from opd.hooks import TokenStats
from opd.models import LanguageModel
from opd.step import Pair
from opd.teacher.local import LocalTeacher

LOSS = LossSection(divergence="reverse_kl", jsd_beta=0.5, chunk_bytes=2**28)


def tiny_config(*overrides):
    return load_config("configs/tiny.json", overrides)[0]


def random_lm(seed, *, hidden=32, layers=2, name="student", eos_ids=None, dtype=torch.float32, std=0.15, **changes):
    """A Qwen3 with random weights, large enough that distributions are not flat, and the embedded pair's tokenizer."""
    tokenizer = task.tokenizer()
    end = tokenizer.convert_tokens_to_ids(task.END)
    torch.manual_seed(seed)
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "initializer_range": std,
        "bos_token_id": None,
        "eos_token_id": end,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = Qwen3ForCausalLM(Qwen3Config(**settings | changes)).eval()
    model.generation_config = GenerationConfig(eos_token_id=end)
    if name == "teacher":
        model.requires_grad_(False)
    return LanguageModel(model, tokenizer, eos_ids or (end,), dtype, name)


def random_rollouts(lm, count=6, seed=0, prompt=(3, 9), response=(1, 12), end="stop"):
    """Rollouts of uneven length with random tokens; each ends in EOS when `end` is "stop"."""
    generator = torch.Generator().manual_seed(seed)
    ordinary = [i for i in range(len(lm.tokenizer)) if i not in lm.eos_ids]

    def draw(low, high):
        length = int(torch.randint(low, high + 1, (1,), generator=generator))
        return tuple(ordinary[int(i)] for i in torch.randint(len(ordinary), (length,), generator=generator))

    return [
        Rollout(
            i, Prompt(f"p{i}", draw(*prompt), "0"), draw(*response) + ((lm.eos_ids[0],) if end == "stop" else ()), end
        )
        for i in range(count)
    ]


def with_privileged(rollouts, seed=5):
    """The rollouts with a prompt of the teacher for all but the second, some shorter than the student's."""
    others = random_rollouts(random_lm(1), len(rollouts), seed, prompt=(2, 20))
    return [
        replace(r, prompt=replace(r.prompt, privileged_ids=None if i == 1 else o.prompt.token_ids))
        for i, (r, o) in enumerate(zip(rollouts, others, strict=True))
    ]


def pair_of(student, teacher, loss=LOSS, vocab_size=35):
    """What an update works on; the random models' tokenizer has 35 ids."""
    return Pair(student, LocalTeacher(teacher), vocab_size, loss)


def token_stats_of(*, sequence_id, position, **columns):
    """TokenStats of single-turn responses to one prompt, with these columns; what a test does not name is 0."""
    zeros = torch.zeros_like(sequence_id)
    facts = dict.fromkeys(("turn", "token_id", "prompt_id", "truncated"), zeros)
    facts |= {"length": torch.bincount(sequence_id)[sequence_id], "verdict": torch.full(sequence_id.shape, torch.nan)}
    return TokenStats(sequence_id=sequence_id, position=position, **facts | columns)


def one_each(rollouts, pad_id=0, truncated="keep"):
    return make_micro_batches(rollouts, 1, pad_id, truncated)


def engine_for(lm, *overrides):
    return TorchEngine(lm, tiny_config(*overrides), 10)


def flat_gradient(model):
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])


def relative(a, b):
    """L2 norm of a - b over that of b."""
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-300)).item()


def naive_loss(divergence, student_logits, teacher_logits, beta=0.5):
    """Per-token divergence by probability tables, float64; nothing shared with the code under test."""
    p = torch.softmax(student_logits.double(), -1)
    q = torch.softmax(teacher_logits.double(), -1)
    if divergence == "reverse_kl":
        return (p * (p / q).log()).sum(-1)
    if divergence == "forward_kl":
        return (q * (q / p).log()).sum(-1)
    if divergence == "total_variation":
        return 1 - torch.minimum(p, q).sum(-1)
    m = beta * q + (1 - beta) * p
    return beta * (q * (q / m).log()).sum(-1) + (1 - beta) * (p * (p / m).log()).sum(-1)


def response(problem, sample, correct, extracted="x", tokens=5, **more):
    """A line of an evaluation's responses."""
    return {
        "id": problem,
        "sample": sample,
        "prompt": "q",
        "response": "r",
        "extracted": extracted,
        "vote": extracted,
        "answer": "x",
        "correct": correct,
        "finish_reason": "stop",
        "tokens": tokens,
    } | more


def evaluation_figures(**changes):
    """What an evaluation's summary.json holds of a benchmark."""
    none = ("greedy", "greedy_se", "mean_at_k", "mean_at_k_se", "mean_at_k_se_passes", "maj_at_k", "reverse_kl")
    return (
        dict.fromkeys(none)
        | {
            "problems": 8,
            "k": 0,
            "pass_at": {},
            "ungraded": 0,
            "truncated": 0.0,
            "unformatted": 0.0,
            "length_mean": 5.0,
            "benchmark": {},
            "grader": "g",
            "seed": 0,
            "responses_sha256": "",
            "time/evaluation": 1.0,
        }
        | changes
    )


def blob(text, name):
    """What a token map holds under this name (tip.results.token_map)."""
    begin = text.index(f'id="blob-{name}">') + len(f'id="blob-{name}">')
    return zlib.decompress(base64.b64decode(text[begin : text.index("<", begin)]))
