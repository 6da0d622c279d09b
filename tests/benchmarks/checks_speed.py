"""Checks of scripts/check_gpu.sh: how fast this machine is, and whether a run that was stopped goes on bit for bit.

The answer of a check is as in checks_numbers.py. Speed is told and not judged.
"""

import gc
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_loss import CONTESTANTS
from checks_memory import BFLOAT16, Peaks, against_plan, held, joined, large_pair, plan_for, shapes
from random_models import NoEnd, classed_prompts
from updates import Updates, as_a_run, config_of, weighter_of

from opd.chunks import Head, add_product, set_product
from opd.files import sha256
from opd.loss import Objective, divergence_sum
from opd.progress import peak_memory_gb, reset_peak_memory

PEERS = {"trl": "trl", "liger": "liger_kernel"}  # contestant -> the package that it needs
CHUNK = 2**30  # bytes, as in the configurations for GPUs
UPDATES = 6  # of the run that is stopped


def seconds_of(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median seconds of some work, the first time left out."""
    seconds = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])


# --- the loss ---------------------------------------------------------------------------------------------------------
def loss_speed(device: torch.device, toy: bool) -> dict[str, Any]:
    """Time, operations per second and memory of the loss, and of other ways to the same gradient.

    The machine's own speed is that of a large matrix product, and of the bare products of the loss.
    """
    (student, teacher), tokens, repeats = shapes(toy), 64 if toy else 4096, 1 if toy else 3
    g = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=g, device=device).bfloat16()

    n = 256 if toy else 8192
    a, b = normal(n, n), normal(n, n)
    peak = 2 * n**3 / seconds_of(lambda: a @ b, device, 5)
    inputs = (
        normal(tokens, student.hidden).requires_grad_(),
        normal(student.vocab, student.hidden).requires_grad_(),
        normal(tokens, teacher.hidden),
        normal(teacher.vocab, teacher.hidden),
    )
    operations = 2 * tokens * student.vocab * (3 * student.hidden + teacher.hidden)
    trained = inputs[1].detach().float().requires_grad_()
    works = {
        "products": lambda: _products(*inputs),
        "ours": lambda: _loss(*inputs).backward(),
        "ours, float32 head": lambda: _loss(inputs[0], trained, *inputs[2:]).backward(),
        "ours, JSD": lambda: _loss(*inputs, "jsd").backward(),
    }
    works |= {who: lambda who=who: CONTESTANTS[who](*inputs).backward() for who in ("naive", *PEERS)}
    figures: dict[str, Any] = {"TFLOP/s of a matrix product": peak / 1e12}
    for who, work in works.items():
        before = held(device)
        reset_peak_memory(device)
        try:
            seconds = seconds_of(work, device, repeats)
        except (ImportError, RuntimeError) as error:  # not installed, not made for this device, or out of memory
            figures[who] = f"skipped: {str(error).splitlines()[0][:120]}"
            continue
        figures |= {f"ms, {who}": 1e3 * seconds, f"TFLOP/s, {who}": operations / seconds / 1e12}
        if device.type == "cuda":
            figures[f"GiB beyond inputs, {who}"] = peak_memory_gb(device) - before / 2**30
        for tensor in (*inputs[:2], trained):
            tensor.grad = None
    figures["ours / products"] = figures["ms, ours"] / figures["ms, products"]
    return {"figures": figures, "judged": {}}


def _loss(
    student_NH: torch.Tensor,
    student_VH: torch.Tensor,
    teacher_NH: torch.Tensor,
    teacher_VH: torch.Tensor,
    divergence: str = "reverse_kl",
) -> torch.Tensor:
    heads, weights = (Head(student_VH), Head(teacher_VH)), torch.ones(len(student_NH), device=student_NH.device)
    return divergence_sum(student_NH, heads[0], teacher_NH, heads[1], weights, None, Objective(divergence), CHUNK)


@torch.no_grad()
def _products(
    student_NH: torch.Tensor, student_VH: torch.Tensor, teacher_NH: torch.Tensor, teacher_VH: torch.Tensor
) -> None:
    """The four matrix products of the loss and nothing else, in its chunks and buffers."""
    if student_NH.device.type == "cpu":  # it has no bfloat16 product with float32 output
        student_NH, student_VH, teacher_NH, teacher_VH = (
            x.float() for x in (student_NH, student_VH, teacher_NH, teacher_VH)
        )
    vocabulary, device = len(student_VH), student_NH.device
    rows = min(CHUNK // (12 * vocabulary), len(student_NH))
    student_cV, teacher_cV = (torch.empty(rows, vocabulary, device=device) for _ in range(2))
    slope_cV = torch.zeros(rows, vocabulary, device=device, dtype=student_NH.dtype)
    states_cH = torch.empty(rows, student_NH.shape[1], device=device)
    head_VH = torch.zeros(student_VH.shape, device=device)
    for begin in range(0, len(student_NH), rows):
        states_part = student_NH[begin : begin + rows]
        c = len(states_part)
        set_product(states_part, student_VH.T, out=student_cV[:c])
        set_product(teacher_NH[begin : begin + rows], teacher_VH.T, out=teacher_cV[:c])
        set_product(slope_cV[:c], student_VH, out=states_cH[:c])
        add_product(slope_cV[:c].T, states_part, out=head_VH)


# --- a whole update ---------------------------------------------------------------------------------------------------
def updates_of(device: torch.device, toy: bool, *settings: str) -> Updates:
    """Updates of a random pair of the size of Qwen3-0.6B and Qwen3-1.7B, whose responses all have full length."""
    rollouts, prompt, response = (4, 4, 8) if toy else (64, 64, 192)
    pair = large_pair(device, toy)
    pair[0].model.register_forward_hook(NoEnd(pair[0].eos_ids[0]), with_kwargs=True)
    config = config_of(
        *BFLOAT16,
        "engine.gradient_checkpointing=true",
        f"data.max_prompt_tokens={prompt}",
        f"rollout.max_response_tokens={response}",
        f"rollout.prompts_per_step={rollouts}",
        "optim.micro_batch_tokens=8192",
        f"loss.chunk_bytes={CHUNK}",
        *settings,
    )
    prompts = classed_prompts(rollouts, prompt, shapes(toy)[0].vocab)
    return Updates(*pair, prompts, response, config, weighter_of("plain"))


def rollout_speed(device: torch.device, toy: bool) -> dict[str, Any]:
    """Tokens per second of the decode loop."""
    updates, seconds = updates_of(device, toy), []
    for step in (1, 2):
        begin = time.perf_counter()
        tokens = sum(len(rollout.response_ids) for rollout in updates.rollouts(step))
        seconds.append(time.perf_counter() - begin)
    expected = len(updates.prompts) * updates.max_response_tokens
    per_token = seconds[-1] / updates.max_response_tokens
    figures = {"tokens": tokens, "tokens/s": tokens / seconds[-1], "ms of a token of all responses": 1e3 * per_token}
    return {"figures": figures, "judged": {"missing tokens": (expected - tokens, 0)}}


def whole_update(device: torch.device, toy: bool) -> dict[str, Any]:
    """Seconds of each phase of an update: all tokens, Soft-OR, and with models that take turns on the device."""
    as_a_run()
    figures, answers, totals = {}, [], {}
    for name, weighter, phases in (("plain", "plain", 1), ("soft_or", "soft_or", 1), ("two phases", "plain", 2)):
        updates = updates_of(device, toy, f"engine.phases={phases}")
        peaks, updates.weighter = Peaks(device), weighter_of(weighter)
        planned = plan_for(toy, updates.config, device).peaks
        updates.one()  # it warms up, and makes the optimizer's moments
        peaks.watch(updates)
        times = updates.one()
        peaks.left()
        totals[name] = times["total"]
        figures |= {f"s of {phase}, {name}": times[phase] for phase in ("rollout", "teacher", "score", "update")}
        figures |= {f"s of moves, {name}": times["move"], f"s in all, {name}": times["total"]}
        figures[f"tokens/s, {name}"] = times["tokens"] / times["total"]
        answers += [
            against_plan(device, f"{phase}, {name}", peak, planned[phase]) for phase, peak in peaks.bytes.items()
        ]
        del updates
        gc.collect()  # the optimizer and its schedule refer to one another
    return joined(answers, **figures, **{"soft_or / plain": totals["soft_or"] / totals["plain"]})


# --- a run ------------------------------------------------------------------------------------------------------------
def resume(device: torch.device, toy: bool) -> dict[str, Any]:
    """A run of the embedded pair that a signal stops, and that is started again, against one that is not stopped."""
    with tempfile.TemporaryDirectory() as name:
        whole, stopped = Path(name) / "whole", Path(name) / "stopped"
        _ended(_training(whole, device))
        process = _training(stopped, device)
        first = stopped / "run/checkpoints/step_000001"
        while not first.exists() and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        code = process.wait()
        _ended(_training(stopped, device))
        last = f"run/checkpoints/step_{UPDATES:06d}"
        files = sorted(path.name for path in (whole / last).glob("*.safetensors"))
        different = [n for n in files if sha256(whole / last / n) != sha256(stopped / last / n)]
    figures = {"exit code of the run that was stopped": code, "files of a checkpoint": len(files)}
    judged = {"different files": (len(different), 0), "missing files": (int(not files), 0)}
    return {"figures": figures, "judged": judged}


def _training(out: Path, device: torch.device) -> subprocess.Popen:
    settings = [
        *(f"output_dir={out}", "run_name=run", f"optim.steps={UPDATES}", "optim.warmup_steps=0"),
        *("eval.benchmarks=[]", "checkpoint.every=1", "log.samples=0", f"engine.device={device.type}"),
        *("student.attn_implementation=eager", "teacher.attn_implementation=eager"),  # others add in any order
    ]
    command = [sys.executable, "-m", "opd.train", "--config", "configs/tiny.json"]
    command += [word for setting in settings for word in ("--set", setting)]
    path = os.pathsep.join([".", *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def _ended(process: subprocess.Popen) -> None:
    _, text = process.communicate()
    if process.returncode:
        raise RuntimeError(f"the training ended with exit code {process.returncode}: {text[-300:]}")
