"""What a run will need, before it starts: memory per phase and hours. Printed by --dry-run and at the start of a run.

Sizes are exact (models are built on torch's meta device, without weights); activations and time are estimates, for
responses of full length. The device's speed is measured for a moment with one matrix product and one copy.
"""

import time
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from opd.cli import InputError
from opd.config import Config, Student, Teacher


@dataclass(frozen=True)
class Size:
    """Of one model; counts of numbers, not bytes."""

    parameters: int  # tied weights once
    multiplied: int  # parameters that meet every token in a matrix product (an untied input embedding does not)
    head: int
    vocab: int
    layers: int
    hidden: int
    intermediate: int
    cache_per_token: int  # key and value numbers of all layers


def size_of(model: PreTrainedModel) -> Size:
    config = model.config.get_text_config()
    values = config.to_dict()  # for what only some architectures have
    parameters = sum(p.numel() for p in model.parameters())
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = values.get("head_dim") or hidden // heads
    return Size(
        parameters=parameters,
        multiplied=parameters - (0 if head is embedding else embedding.numel()),
        head=head.numel(),
        vocab=head.shape[0],
        layers=config.num_hidden_layers,
        hidden=hidden,
        intermediate=values.get("intermediate_size") or 4 * hidden,
        cache_per_token=2 * config.num_hidden_layers * (values.get("num_key_value_heads") or heads) * head_dim,
    )


def size_without_weights(section: Student | Teacher, name: str) -> Size:
    """From config.json alone. Raises InputError when it cannot be read."""
    try:
        config = AutoConfig.from_pretrained(section.path, revision=section.revision)
        with torch.device("meta"):
            return size_of(AutoModelForCausalLM.from_config(config))
    except Exception as error:  # as in models.load
        first = (str(error).strip().splitlines() or [""])[0]
        raise InputError(f"{name}.path {section.path!r}: its config.json cannot be used ({first}).") from None


@dataclass(frozen=True)
class Plan:
    """Bytes and seconds."""

    student_state: int
    teacher_weights: int
    peaks: dict[str, int]  # per phase, with what stays on the device throughout
    host: int  # teacher hidden states waiting in host memory
    checkpoint: int
    seconds: dict[str, float]  # per phase of one update
    updates: int


def make_plan(config: Config, student: Size, teacher: Size, device: torch.device, updates: int) -> Plan:
    """Estimates for responses of full length."""
    s_bytes, t_bytes = (2 if section.dtype == "bfloat16" else 4 for section in (config.student, config.teacher))
    length = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    rollouts = config.rollout.prompts_per_step * config.rollout.n
    together = min(config.rollout.batch_size, rollouts)
    micro = max(min(config.optim.micro_batch_tokens, rollouts * length), length)

    student_state = 16 * student.parameters  # float32 weights, gradients, two moments
    adam = 4 * student.parameters  # temporaries of AdamW's update of all tensors at once
    lower_copy = 2 * student.parameters if config.student.dtype == "bfloat16" else 0
    resident = student_state + teacher.parameters * t_bytes
    logits = together * student.vocab * (4 + 4 + 8 + 8)  # scores, softmax, and both in float64
    one_layer = micro * (8 * student.hidden + 3 * student.intermediate) * s_bytes
    kept_layers = student.layers * (
        micro * student.hidden * s_bytes if config.engine.gradient_checkpointing else one_layer
    )
    loss = min(config.loss.chunk_bytes, 12 * micro * student.vocab)  # three (tokens, vocabulary) buffers
    peaks = {
        "rollout": resident + lower_copy + together * length * student.cache_per_token * s_bytes + logits,
        "teacher": resident + micro * (8 * teacher.hidden + 3 * teacher.intermediate) * t_bytes,
        "update": resident + lower_copy + max(one_layer + kept_layers + loss + 4 * student.head, adam),
    }
    flops, bandwidth = device_speed(device, torch.bfloat16 if s_bytes == 2 else torch.float32)
    overhead = 2e-4 * student.layers  # launching a layer's kernels
    batches = -(-rollouts // together)
    one_token = max(2 * student.multiplied * together / flops, student.parameters * s_bytes / bandwidth) + overhead
    tokens = rollouts * length
    passes = 1 + 1 + 2 + (1 if config.engine.gradient_checkpointing else 0)  # scoring, forward, backward, recomputation
    launches = -(-tokens // micro)
    seconds = {
        "rollout": batches * config.rollout.max_response_tokens * one_token,
        "teacher": 2 * teacher.multiplied * tokens / flops + launches * 2e-4 * teacher.layers,
        "update": 2 * student.multiplied * tokens * passes / flops + launches * passes * overhead,
    }
    return Plan(
        student_state=student_state, teacher_weights=teacher.parameters * t_bytes, peaks=peaks,
        host=rollouts * config.rollout.max_response_tokens * teacher.hidden * t_bytes,
        checkpoint=12 * student.parameters, seconds=seconds, updates=updates,
    )  # fmt: skip


def device_speed(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """(multiply-add FLOP/s, bytes/s), each the best of three short measurements."""
    n = 512 if device.type == "cpu" else 4096
    a, block = torch.ones(n, n, device=device, dtype=dtype), torch.ones(2**24, device=device)

    def best(work) -> float:
        times = []
        for _ in range(3):
            begin = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - begin)
        return min(times)

    return 2 * n**3 / best(lambda: a @ a), 2 * block.nbytes / best(block.clone)


def text(plan: Plan, config: Config, student: Size, teacher: Size, device: torch.device) -> str:
    """The plan in a few lines."""
    per_update = sum(plan.seconds.values())
    phases = ", ".join(f"{name} {value:.2g} s" for name, value in plan.seconds.items())
    peaks = ", ".join(f"{name} {amount(value)}" for name, value in plan.peaks.items())
    return "\n".join([
        f"plan of {config.run_dir}: {plan.updates} updates of {config.rollout.prompts_per_step} prompts x {config.rollout.n} "
        f"responses of up to {config.rollout.max_response_tokens} tokens on {device}; {config.engine.kind} engine, "
        f"{config.rollout.engine} rollouts, {config.teacher.mode} teacher",
        f"  parameters: student {student.parameters / 1e6:.2f} M, teacher {teacher.parameters / 1e6:.2f} M",
        f"  memory: student with gradients and optimizer {amount(plan.student_state)}, teacher {amount(plan.teacher_weights)}; "
        f"peak by phase {peaks}; teacher states in host memory {amount(plan.host)}",
        f"  disk: {amount((config.checkpoint.keep + 1) * plan.checkpoint)} for checkpoints ({config.checkpoint.keep} kept, one "
        "being written)",
        f"  time, if every response were of full length: {per_update:.2g} s an update ({phases}), "
        f"{plan.updates * per_update / 3600:.2g} h in all; evaluations not counted",
    ])  # fmt: skip


def amount(size: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
