"""The loss against its peers: seconds, bytes and gradient error, on the same inputs, in one run.

Contestants, all forward + backward of a reverse KL summed over N tokens, from hidden states and two heads:
  ours      opd.loss.divergence_sum
  naive     full logits of both models, log-softmax, autograd
  loop      the same over chunks of tokens under ordinary autograd
  trl       trl 1.16, trainer.distillation_trainer._chunked_divergence_loss at beta 1
  liger     liger-kernel 0.8.5, LigerFusedLinearJSDLoss at beta 1, not compiled
  products  only the four matrix products of `ours`, in its chunks and buffers: the least a machine can take

Time: repeats in turn (every contestant once, then all again), medians, and the ratio as the median of paired ratios.
Memory: each cell in a child process; the allocator's events (live bytes, exact) and the resident size of the process
(peak after minus before). "Beyond" is the peak minus the head's gradient and the states' gradient, which everyone
returns.
"""

import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from resident import available
from torch import Tensor

from opd.loss import DEFAULT_CHUNK_BYTES, Head, divergence_sum, token_stats

SIZES = {"V = 32,768": (32_768, 256, 512), "V = 151,936": (151_936, 1024, 1536)}  # vocabulary, H_s, H_t
TIME_CELLS = [("V = 32,768", 256), ("V = 32,768", 1024), ("V = 32,768", 4096), ("V = 151,936", 512)]
MEMORY_CELLS = [("V = 32,768", n) for n in (256, 512, 1024, 2048, 4096)] + [
    ("V = 151,936", n) for n in (256, 1024, 2048, 4096)
]
REPEATS = 5
BYTES_NEEDED = {
    "naive": 28,
    "loop": 16,
    "trl": 4,
    "liger": 2,
    "ours": 0,
    "products": 0,
}  # predicted, per token and entry


def inputs(vocab: int, h_s: int, h_t: int, n: int, dtype=torch.float32, gap: float = 1.0):
    """Hidden states and heads of a pair that disagrees, random but repeatable."""
    g = torch.Generator().manual_seed(0)
    hs = torch.randn(n, h_s, generator=g).to(dtype).requires_grad_()
    ws = (torch.randn(vocab, h_s, generator=g) * (2.0 / h_s**0.5)).to(dtype).requires_grad_()
    ht = (torch.randn(n, h_t, generator=g) * gap).to(dtype)
    wt = (torch.randn(vocab, h_t, generator=g) * (2.0 / h_t**0.5)).to(dtype)
    return hs, ws, ht, wt


# --- contestants: each returns the sum as a tensor whose backward is still to be called -------------------------------
def ours(hs, ws, ht, wt, weights=None):
    return divergence_sum(
        hs, Head(ws), ht, Head(wt), torch.ones(len(hs), device=hs.device) if weights is None else weights
    )


def naive(hs, ws, ht, wt):
    log_s, log_t = (hs @ ws.T).log_softmax(-1), (ht @ wt.T).log_softmax(-1)
    return (log_s.exp() * (log_s - log_t)).sum()


def loop(hs, ws, ht, wt, rows=128):
    return sum(naive(a, ws, b, wt) for a, b in zip(hs.split(rows), ht.split(rows), strict=True))


def trl(hs, ws, ht, wt):
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    mask = torch.ones(1, len(hs), dtype=torch.int64, device=hs.device)
    return _chunked_divergence_loss(hs[None], ht[None], ws, wt, mask, 1.0, num_items_in_batch=1)[0]


def liger(hs, ws, ht, wt):
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=False)
    return loss(hs, ws, ht, wt, torch.zeros(len(hs), dtype=torch.int64, device=hs.device)) * len(hs)


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hs, ws, ht, wt):
        rows = max(1, min(DEFAULT_CHUNK_BYTES // (4 * ws.shape[0] * 3), len(hs)))
        grad_h, grad_w = torch.zeros_like(hs), torch.zeros_like(ws)
        student, teacher = (torch.empty(rows, ws.shape[0]) for _ in range(2))
        for start in range(0, len(hs), rows):
            part = slice(start, min(start + rows, len(hs)))
            size = part.stop - part.start
            torch.mm(hs[part], ws.T, out=student[:size])
            torch.mm(ht[part], wt.T, out=teacher[:size])
            torch.mm(student[:size], ws, out=grad_h[part])
            grad_w.addmm_(student[:size].T, hs[part])
        ctx.grads = grad_h, grad_w
        return hs.new_zeros(())

    @staticmethod
    def backward(ctx, grad):
        return *ctx.grads, None, None


def products(hs, ws, ht, wt):
    return _Products.apply(hs, ws, ht, wt)


CONTESTANTS = {"ours": ours, "trl": trl, "liger": liger, "naive": naive, "loop": loop, "products": products}


def run(work, data) -> float:
    """Seconds of forward and backward."""
    hs, ws, *_ = data
    hs.grad = ws.grad = None
    begin = time.perf_counter()
    work(*data).backward()
    seconds = time.perf_counter() - begin
    return seconds


# --- time -------------------------------------------------------------------------------------------------------------
def with_scoring(needs: set[str], retention: float):
    """A scoring pass over all tokens, then the loss on the share that is kept."""

    def work(hs, ws, ht, wt):
        ids = torch.zeros(len(hs), dtype=torch.int64)
        token_stats(hs.detach(), Head(ws), ht, Head(wt), ids, frozenset(needs))
        return ours(hs, ws, ht, wt, kept(len(hs), retention))

    return work


def kept(n: int, retention: float) -> Tensor:
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    return torch.zeros(n).index_fill_(0, order[: int(retention * n)], 1.0)


BOTH_AXES = {"student_entropy", "reverse_kl"}
RETENTIONS = {
    "retention 0.5, no scoring pass": lambda *d: ours(*d, kept(len(d[0]), 0.5)),
    "retention 0.5, entropy and reverse KL scored": with_scoring(BOTH_AXES, 0.5),
    "retention 0.2, entropy and reverse KL scored": with_scoring(BOTH_AXES, 0.2),
    "retention 0.5, total variation scored": with_scoring({"total_variation"}, 0.5),
    "retention 0.2, total variation scored": with_scoring({"total_variation"}, 0.2),
}


def time_cell(name: str, n: int, repeats: int, extra: dict) -> dict:
    data = inputs(*SIZES[name], n)
    works = CONTESTANTS | extra
    seconds = {key: [] for key in works}
    run(ours, data)  # warm
    for _ in range(repeats):
        for key, work in works.items():
            seconds[key].append(run(work, data))
    median = {key: statistics.median(values) for key, values in seconds.items()}
    ratio = {  # ours / other for peers, other / ours for our own variants
        key: statistics.median(
            (a / b if key in CONTESTANTS else b / a) for a, b in zip(seconds["ours"], values, strict=True)
        )
        for key, values in seconds.items()
        if key != "ours"
    }
    return {"cell": name, "N": n, "repeats": repeats, "seconds": median, "ratio": ratio, "all": seconds}


# --- memory -----------------------------------------------------------------------------------------------------------
def memory_child(who: str, name: str, n: int) -> None:
    """Runs one cell and prints its figures."""
    vocab, h_s, h_t = SIZES[name]
    run(CONTESTANTS[who], inputs(512, 16, 24, 64))  # imports and thread pools are there
    data = inputs(vocab, h_s, h_t, n)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident("VmRSS")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run(CONTESTANTS[who], data)
    rss = resident("VmHWM") - before
    live = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    returned = 4 * (vocab * h_s + n * h_s)
    print(json.dumps({"live_beyond": peak - returned, "resident_beyond": rss - returned}))


def resident(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split(field + ":")[1].split()[0]) * 1024


def memory_cell(who: str, name: str, n: int) -> dict:
    vocab, h_s, h_t = SIZES[name]
    needed = 4 * vocab * (3 * h_s + h_t) + BYTES_NEEDED[who] * vocab * n + 2**30
    cell = {"cell": name, "N": n, "who": who}
    if needed > (free := available()):
        return cell | {"does_not_fit": f"predicted {needed / 2**30:.1f} GiB, free {free / 2**30:.1f} GiB"}
    result = subprocess.run(
        [sys.executable, __file__, "--child", who, name, str(n)], capture_output=True, text=True, env=os.environ
    )
    if result.returncode:
        return cell | {"does_not_fit": f"killed or failed: {result.stderr.strip().splitlines()[-1:]}"}
    return cell | json.loads(result.stdout.splitlines()[-1])


# --- exactness --------------------------------------------------------------------------------------------------------
def bf16_cell(gap: float) -> dict:
    """Relative error of the gradients against float64 on identical bf16 inputs; the teacher is the student,
    perturbed."""
    g = torch.Generator().manual_seed(0)
    vocab, h, n = 8192, 128, 64
    hs = torch.randn(n, h, generator=g).bfloat16().requires_grad_()
    ws = (torch.randn(vocab, h, generator=g) * 2 / h**0.5).bfloat16().requires_grad_()
    ht = torch.cat([hs.detach().float(), gap * torch.randn(n, h, generator=g)], 1).bfloat16()
    wt = torch.cat([ws.detach(), (torch.randn(vocab, h, generator=g) * 2 / h**0.5).bfloat16()], 1)
    exact = [x.detach().double().requires_grad_() for x in (hs, ws)] + [x.double() for x in (ht, wt)]
    value = naive(*exact)
    value.backward()
    errors = {}
    for who in ("ours", "naive", "trl", "liger"):
        hs.grad = ws.grad = None
        CONTESTANTS[who](hs, ws, ht, wt).backward()
        errors[who] = [
            ((a.grad.double() - b.grad).norm() / b.grad.norm()).item() for a, b in zip((hs, ws), exact[:2], strict=True)
        ]
    return {"kl": value.item() / n, "error_states_head": errors}


# --- report -----------------------------------------------------------------------------------------------------------
def table(results: dict) -> str:
    lines = ["seconds, medians of paired repeats (ratio: ours / theirs)", ""]
    names = list(CONTESTANTS)
    lines += ["| cell | N | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for cell in results["time"]:
        shown = [f"{cell['seconds'][k]:.2f}" + (f" ({cell['ratio'][k]:.2f})" if k != "ours" else "") for k in names]
        lines.append(f"| {cell['cell']} | {cell['N']} | " + " | ".join(shown) + " |")
    variants = results["time"][-1]
    lines += ["", f"our own variants at {variants['cell']}, N = {variants['N']} (ratio: to our own retention 1.0)", ""]
    lines += [f"- {key}: {variants['seconds'][key]:.2f} s, {variants['ratio'][key]:.2f}" for key in RETENTIONS]
    lines += ["", "peak memory beyond inputs and returned gradients, MiB: live storage / resident size", ""]
    people = [w for w in CONTESTANTS if w != "products"]
    lines += ["| cell | N | " + " | ".join(people) + " |", "|---" * (len(people) + 2) + "|"]
    cells = {(c["cell"], c["N"], c["who"]): c for c in results["memory"]}
    for name, n in dict.fromkeys((c["cell"], c["N"]) for c in results["memory"]):
        shown = [
            "does not fit"
            if "does_not_fit" in c
            else f"{c['live_beyond'] / 2**20:.0f} / {c['resident_beyond'] / 2**20:.0f}"
            for c in (cells[name, n, who] for who in people)
        ]
        lines.append(f"| {name} | {n} | " + " | ".join(shown) + " |")
    lines += ["", "bf16 inputs: relative gradient error against float64, states / head, in %", ""]
    who = list(results["bf16"][0]["error_states_head"])
    lines += ["| KL | " + " | ".join(who) + " |", "|---" * (len(who) + 1) + "|"]
    for cell in results["bf16"]:
        shown = [" / ".join(f"{100 * e:.2f}" for e in cell["error_states_head"][w]) for w in who]
        lines.append(f"| {cell['kl']:.4f} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def plots(results: dict, out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4))
    labels = [f"{c['cell']}\nN = {c['N']}" for c in results["time"]]
    for i, who in enumerate(CONTESTANTS):
        heights = [c["seconds"][who] / c["seconds"]["products"] for c in results["time"]]
        axis.bar([x + i * 0.13 for x in range(len(labels))], heights, 0.13, label=who)
    axis.set_xticks([x + 0.33 for x in range(len(labels))], labels)
    axis.set_ylabel("time / time of the bare products")
    axis.legend(ncols=3, fontsize=8)
    figure.tight_layout()
    figure.savefig(out / "time.png", dpi=150)
    sizes = list(dict.fromkeys(c["cell"] for c in results["memory"]))
    figure, axes = pyplot.subplots(1, len(sizes), figsize=(9, 4), squeeze=False)
    for axis, name in zip(axes[0], sizes, strict=True):
        for who in (w for w in CONTESTANTS if w != "products"):
            points = [
                (c["N"], c["live_beyond"] / 2**30)
                for c in results["memory"]
                if c["cell"] == name and c["who"] == who and "live_beyond" in c
            ]
            axis.plot(*zip(*points, strict=True), marker="o", label=who)
        axis.set_title(name)
        axis.set_xlabel("tokens")
        axis.set_ylabel("peak beyond inputs and gradients, GiB")
        axis.set_yscale("log")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(out / "memory.png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="small cells")
    parser.add_argument("--child", nargs=3)
    parser.add_argument("--out", type=Path, default=Path("outputs/bench_loss"))
    options = parser.parse_args()
    if options.child:
        memory_child(options.child[0], options.child[1], int(options.child[2]))
        return
    time_cells = TIME_CELLS[:1] if options.quick else TIME_CELLS
    memory_cells = MEMORY_CELLS[:2] if options.quick else MEMORY_CELLS
    begin = time.monotonic()
    results = {
        "machine": {
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "processor": platform.processor(),
            "torch": torch.__version__,
        },
        "time": [],
        "memory": [],
        "bf16": [],
    }
    for gap in (0.44, 0.135, 0.041):
        results["bf16"].append(bf16_cell(gap))
        say(begin, json.dumps(results["bf16"][-1]))
    for name, n in time_cells:
        results["time"].append(time_cell(name, n, REPEATS, RETENTIONS if (name, n) == time_cells[-1] else {}))
        say(begin, f"time {name} N {n}: {results['time'][-1]['seconds']}")
    for name, n in memory_cells:
        for who in (w for w in CONTESTANTS if w != "products"):
            results["memory"].append(memory_cell(who, name, n))
            say(begin, json.dumps(results["memory"][-1]))
    results["minutes"] = (time.monotonic() - begin) / 60
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (options.out / "table.md").write_text(table(results) + "\n")
    plots(results, options.out)
    print(table(results))


def say(begin: float, text: str) -> None:
    print(f"[{(time.monotonic() - begin) / 60:.1f} min] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
