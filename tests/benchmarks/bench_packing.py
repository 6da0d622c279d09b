"""An update with shared rows against one with padded rows: the same rollouts, in turn, medians of paired repeats.

    PYTHONPATH=. python tests/benchmarks/bench_packing.py [--pair tiny] [--mean 64] [--rollouts 64] [--budget 4096]

Lengths are lognormal with sigma 1, and at most 8 times the mean. The pair `mid` is random: Qwen3 with 6 layers of 384
and 512, V = 4,096. `tiny` is the embedded pair. Half of the tokens are kept, by Soft-OR. The times are those of the
teacher, scoring and the update together, with one thread.
"""

import argparse
import statistics
import time

import torch

from opd import models
from opd.batch import MicroBatch, make_micro_batches
from opd.config import Config, load_config
from opd.data import Prompt, Rollout
from opd.engine.plain import TorchEngine
from opd.models import LanguageModel
from opd.step import Pair, train_step
from opd.teacher.local import LocalTeacher
from tip.config import TipConfig
from tip.weighter import TipWeighter

PROMPT = 4  # tokens of every prompt, so that nearly all positions are responses


def random_model(hidden: int, name: str) -> LanguageModel:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from data.tiny import task

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config).eval()
    return models.tried(LanguageModel(model, task.tokenizer(), (0,), torch.float32, name))


def make_pair(name: str, config: Config) -> Pair:
    if name == "mid":
        return Pair(random_model(384, "student"), LocalTeacher(random_model(512, "teacher")), 4096, config.loss)
    device = torch.device("cpu")
    student, teacher = (models.load(getattr(config, who), device, who) for who in ("student", "teacher"))
    return Pair(student, LocalTeacher(teacher), models.shared_vocabulary(student, teacher), config.loss)


def make_rollouts(mean: int, count: int, vocab: int) -> list[Rollout]:
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(count, generator=generator).exp()
    lengths = (draws / draws.mean() * mean).clamp(PROMPT + 1, 8 * mean).int().tolist()
    rollouts = []
    for i, length in enumerate(lengths):
        ids = torch.randint(vocab, (length,), generator=generator).tolist()
        rollouts.append(Rollout(i, Prompt(str(i), tuple(ids[:PROMPT]), None), tuple(ids[PROMPT:]), "length"))
    return rollouts


def main() -> None:
    cli = argparse.ArgumentParser()
    cli.add_argument("--pair", choices=("mid", "tiny"), default="mid")
    cli.add_argument("--mean", type=int, default=64)
    cli.add_argument("--rollouts", type=int, default=64)
    cli.add_argument("--budget", type=int, default=4096)
    cli.add_argument("--repeats", type=int, default=5)
    options = cli.parse_args()
    torch.set_num_threads(1)
    config, _ = load_config("configs/tiny.json", ["optim.warmup_steps=0", "optim.lr=1e-9"])
    pair = make_pair(options.pair, config)
    engine = TorchEngine(pair.student, config, 10**6)
    rollouts = make_rollouts(options.mean, options.rollouts, pair.vocab_size)
    tokens = sum(PROMPT + len(rollout.response_ids) for rollout in rollouts)

    def seconds(batches: list[MicroBatch]) -> float:
        begin = time.perf_counter()
        train_step(pair, engine, batches, TipWeighter(TipConfig(rule="soft_or")), step=1, seed=0)
        return time.perf_counter() - begin

    layouts = [make_micro_batches(rollouts, options.budget, 0, "keep", row) for row in (0, pair.packed_row)]
    padding = [100 * (1 - tokens / sum(batch.input_ids.numel() for batch in batches)) for batches in layouts]
    for batches in layouts:
        seconds(batches)  # the first update allocates
    times = [tuple(seconds(batches) for batches in layouts) for _ in range(options.repeats)]
    ratios = sorted(packed / padded for padded, packed in times)
    padded, packed = (statistics.median(column) for column in zip(*times, strict=True))
    print(
        f"longest {max(PROMPT + len(r.response_ids) for r in rollouts)}, shared up to {pair.packed_row} tokens; "
        f"padding {padding[0]:.0f} % and {padding[1]:.0f} %; {padded:.2f} s and {packed:.2f} s, "
        f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    )


if __name__ == "__main__":
    main()
