"""Peak memory of the loss and of a whole update, against ordinary full logits under autograd.

    PYTHONPATH=. python tests/benchmarks/bench_memory.py [--quick] [--out FOLDER]

Ways to the gradient of a reverse KL:
  full logits  the logits of student and teacher at the kept tokens, log-softmax, autograd
  ours         opd.loss.divergence_sum on the kept tokens

Three questions, each cell in a forked child:
  shares   one micro-batch of which 100, 50 or 10 % of the tokens are kept
  tokens   one micro-batch of more and more tokens, all kept
  lengths  a whole update of a small random pair, one response of more and more tokens, all kept

The peak is what comes on top of what is there after the imports: of resident memory on a CPU (VmHWM), of torch's
allocations on a GPU. A cell whose full logits would not fit into half of the free memory is left out.
"""

import argparse
import ctypes
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from child import in_child
from random_models import TOY_STUDENT, TOY_TEACHER, random_model, word_tokenizer
from resident import available, resident
from torch import Tensor
from updates import Updates, config_of, language_model, weighter_of

from opd.data import Prompt, Rollout
from opd.loss import Head, divergence_sum
from opd.progress import Watch, peak_memory_gb, reset_peak_memory

WAYS = ("full logits", "ours")
SHARES = (1.0, 0.5, 0.1)
CPU = {"vocab": 32_768, "hidden": (512, 768), "shares_of": 4096, "tokens": (1024, 2048, 4096, 8192, 16_384, 32_768)}
SIZES = {
    "cpu": CPU | {"lengths": (256, 512, 1024, 2048, 4096, 8192)},
    "cuda": CPU | {"vocab": 151_936, "hidden": (1024, 2048), "lengths": (256, 512, 1024, 2048, 4096, 8192)},
    "quick": {"vocab": 8192, "hidden": (32, 48), "shares_of": 512, "tokens": (256, 1024), "lengths": (64, 256)},
}
BYTES_OF_FULL = 28  # of full logits, per token and vocabulary entry: seven float32 tensors


def device_here() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"


# --- one cell, in a child ---------------------------------------------------------------------------------------------
def full_logits(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> Tensor:
    """The ordinary loss: sum over the tokens of the reverse KL."""
    log_p, log_q = (hidden @ head.T).log_softmax(-1), (teacher_hidden @ teacher_head.T).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum()


def fused(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> Tensor:
    ones = torch.ones(len(hidden), device=hidden.device)
    return divergence_sum(hidden, Head(head), teacher_hidden, Head(teacher_head), ones)


LOSSES = {"full logits": full_logits, "ours": fused}


def loss_of_micro_batch(cell: dict[str, Any]) -> Callable[[], None]:
    """Forward and backward of the loss of a micro-batch, of which a share of the tokens is kept."""
    device, (own, others), kept = device_here(), cell["hidden"], int(cell["share"] * cell["tokens"])
    hidden, head = (torch.randn(n, own, device=device).requires_grad_() for n in (cell["tokens"], cell["vocab"]))
    teacher_hidden, teacher_head = (torch.randn(n, others, device=device) for n in (cell["tokens"], cell["vocab"]))
    return lambda: LOSSES[cell["way"]](hidden[:kept], head, teacher_hidden[:kept], teacher_head).backward()


def whole_update(cell: dict[str, Any]) -> Callable[[], None]:
    """Teacher, update and AdamW for one response of a random pair; what it says does not matter."""
    shapes = [
        replace(shape, vocab=cell["vocab"], hidden=hidden, intermediate=3 * hidden)
        for shape, hidden in zip((TOY_STUDENT, TOY_TEACHER), (128, 192), strict=True)
    ]
    models = [random_model(shape, seed, device_here()) for seed, shape in enumerate(shapes)]
    models[1].requires_grad_(False)
    ids = torch.randint(2, cell["vocab"], (cell["tokens"],)).tolist()
    if cell["way"] == "full logits":
        return lambda: _full_update(*models, torch.tensor([[2, 2, *ids]], device=device_here()))
    tokenizer = word_tokenizer(cell["vocab"])
    updates = Updates(
        student=language_model(models[0], tokenizer, "student"),
        teacher=language_model(models[1], tokenizer, "teacher"),
        prompts=[(2, 2)],
        max_response_tokens=cell["tokens"],
        config=config_of(),
        weighter=weighter_of("plain"),
    )
    rollouts = [Rollout(0, Prompt("0", (2, 2), None), tuple(ids), "length")]
    return lambda: updates.learn(rollouts, Watch(device_here()))


def _full_update(student: torch.nn.Module, teacher: torch.nn.Module, ids: Tensor) -> None:
    """The same update, as a plain training loop writes it."""
    optimizer = torch.optim.AdamW(student.parameters(), fused=True)
    with torch.no_grad():
        log_q = teacher(input_ids=ids, use_cache=False).logits[0, 1:-1].log_softmax(-1)
    log_p = student(input_ids=ids, use_cache=False).logits[0, 1:-1].log_softmax(-1)
    (log_p.exp() * (log_p - log_q)).sum(-1).mean().backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()


WORKS = {"shares": loss_of_micro_batch, "tokens": loss_of_micro_batch, "lengths": whole_update}


def held(device: torch.device) -> float:
    """GiB that are there at present."""
    return (torch.cuda.memory_allocated(device) if device.type == "cuda" else resident()) / 2**30


def measure(cell: dict[str, Any]) -> dict[str, float]:
    """Runs a cell: GiB of its inputs, and of its peak with them, beyond what was there after the imports."""
    device = device_here()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    make = WORKS[cell["question"]]
    make({**cell, "tokens": 8, "vocab": 64})()  # the imports and the libraries' own buffers are there
    if device.type == "cpu":
        ctypes.CDLL(None).malloc_trim(0)
    before = held(device)
    work = make(cell)
    inputs = held(device) - before
    reset_peak_memory(device)
    work()
    return {"inputs": inputs, "peak": peak_memory_gb(device) - before}


# --- all cells --------------------------------------------------------------------------------------------------------
def cells(size: dict[str, Any]) -> list[dict[str, Any]]:
    common = {"vocab": size["vocab"], "hidden": size["hidden"], "share": 1.0}
    places = [{"question": "shares", "tokens": size["shares_of"], "share": share} for share in SHARES]
    places += [{"question": "tokens", "tokens": tokens} for tokens in size["tokens"]]
    places += [{"question": "lengths", "tokens": tokens} for tokens in size["lengths"]]
    return [{**common, **place, "way": way} for place in places for way in WAYS]


def free_bytes() -> int:
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else available()


def run_cell(cell: dict[str, Any]) -> dict[str, Any]:
    """The figures of a cell, or the reason why there are none; it runs in a child."""
    needed = BYTES_OF_FULL * cell["vocab"] * cell["tokens"] * cell["share"] if cell["way"] == "full logits" else 0
    if needed > free_bytes() / 2:
        raise MemoryError(f"it takes about {needed / 2**30:.1f} GiB, and {free_bytes() / 2**30:.1f} GiB are free")
    return measure(cell)


def table(results: dict[str, Any]) -> str:
    lines = [
        f"Peak memory in MiB on {results['device']}, beyond the imports; V = {results['cells'][0]['vocab']:,}.",
        "",
        "| question | tokens | kept | full logits | ours | ours / full logits | inputs |",
        "|---|---|---|---|---|---|---|",
    ]
    pairs = zip(results["cells"][::2], results["cells"][1::2], strict=True)
    for full, own in pairs:
        both = "peak" in full and "peak" in own
        ratio = f"{own['peak'] / full['peak']:.2f}" if both else ""
        lines.append(
            f"| {own['question']} | {own['tokens']:,} | {own['share']:.0%} | {_shown(full, 'peak')} "
            f"| {_shown(own, 'peak')} | {ratio} | {_shown(own, 'inputs')} |"
        )
    return "\n".join(lines)


def _shown(cell: dict[str, Any], name: str) -> str:
    return f"{cell[name] * 1024:,.0f}" if name in cell else "left out"


def plot(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(10, 3.5))
    labels = {"shares": "share of the tokens that is kept", "tokens": "tokens", "lengths": "tokens of the response"}
    for axis, (question, label) in zip(axes, labels.items(), strict=True):
        for way in WAYS:
            found = [c for c in results["cells"] if c["question"] == question and c["way"] == way and "peak" in c]
            x = [cell["share"] if question == "shares" else cell["tokens"] for cell in found]
            axis.plot(x, [cell["peak"] for cell in found], marker="o", label=way)
        axis.set_xlabel(label)
        axis.set_title("whole update" if question == "lengths" else "loss of a micro-batch", fontsize=9)
        axis.set_ylim(bottom=0)
    axes[0].set_ylabel("peak beyond the imports, GiB")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    cli = argparse.ArgumentParser()
    cli.add_argument("--quick", action="store_true", help="toy sizes")
    cli.add_argument("--out", type=Path, default=Path("outputs/bench_memory"))
    options = cli.parse_args()
    begin, results = time.monotonic(), {"device": in_child(device_name)["value"], "cells": []}
    size = "quick" if options.quick else "cpu" if results["device"] == "a CPU" else "cuda"
    for cell in cells(SIZES[size]):
        answer = in_child(partial(run_cell, cell))
        results["cells"].append(cell | answer.get("value", {"left_out": answer.get("error")}))
        print(f"[{(time.monotonic() - begin) / 60:.1f} min] {results['cells'][-1]}", file=sys.stderr, flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (options.out / "table.md").write_text(table(results) + "\n")
    plot(results, options.out / "memory.png")
    print(table(results))


if __name__ == "__main__":
    main()
