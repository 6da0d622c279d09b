"""What a run will need, before it starts: memory per phase and hours. Printed by --dry-run and at the start of a run.

Sizes are exact (models are built on torch's meta device, without weights); activations and time are estimates, for
responses of full length, of one process where several share the work. The device's speed is measured for a moment with
one matrix product and one copy.
"""

import time
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from opd.benchmarks import read_benchmarks
from opd.config import Config, StudentSection, TeacherSection
from opd.errors import InputError
from opd.files import amount


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


def size_without_weights(section: StudentSection | TeacherSection, name: str) -> Size:
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
    """Bytes and seconds; of one process, where several share the work."""

    processes: int
    phases: dict[str, dict[str, int]]  # phase -> what takes how much of the device
    host: dict[str, int]  # in host memory throughout
    spilled: int  # teacher states on disk, during an update
    checkpoint: int
    seconds: dict[str, float]  # per phase of one update
    updates: int

    @property
    def peaks(self) -> dict[str, int]:
        return {phase: sum(parts.values()) for phase, parts in self.phases.items()}


LIVE = 10**9  # parameters that ZeRO-3 keeps gathered at once, by DeepSpeed's default
BUCKET = 5 * 10**8  # numbers of a reduction


def make_plan(
    config: Config,
    student: Size,
    teacher: Size,
    device: torch.device,
    updates: int,
    longest_answer: int = 0,
    zero: dict | None = None,
    processes: int = 1,
) -> Plan:
    """Estimates for responses of full length.

    Args:
        longest_answer: max_response_tokens of the benchmarks; 0: none.
        zero: DeepSpeed's zero_optimization; None: the plain engine.
        processes: of the whole run, one per device.
    """
    s_bytes, t_bytes = (2 if section.dtype == "bfloat16" else 4 for section in (config.student, config.teacher))
    work = _Work.of(config, processes)
    held, host = _student_memory(student, s_bytes, zero, processes)
    gradients = held.pop("gradients")
    scoring = _teacher_memory(teacher, t_bytes, config.teacher.placement, processes, host)
    gathered = scoring.pop("teacher layers gathered", 0)
    states = work.rollouts * config.rollout.max_response_tokens * teacher.hidden * t_bytes
    limit = states if config.teacher.cache_gb is None else int(config.teacher.cache_gb * 2**30)
    host["teacher states"] = min(states, limit)
    beside_student = beside_teacher = learning = held | scoring
    if config.engine.phases == 2:
        waiting = {"student": held["weights"], "moments": held["optimizer"], "teacher": scoring["teacher"]}
        host |= {f"{name} waiting": size for name, size in waiting.items()}
        beside_student = {name: size for name, size in held.items() if name != "optimizer"}
        beside_teacher, learning = scoring, held | {"teacher head": teacher.head * t_bytes}
    rounds_float32 = zero is not None and zero["stage"] in (1, 2) and s_bytes == 2  # as DeepSpeed loads the student
    phases = {
        "loading": scoring | {"float32 weights": 4 * student.parameters} if rounds_float32 else {},
        "rollout": beside_student | _generation(config, student, work.together, config.rollout.max_response_tokens),
        "teacher": beside_teacher
        | {
            "teacher layers gathered": gathered,
            "activations": work.micro * (8 * teacher.hidden + 3 * teacher.intermediate) * t_bytes,
        },
        "update": learning | {"gradients": gradients} | _backward(config, student, zero, work, "optimizer" in host),
        "evaluation": beside_student | _generation(config, student, config.rollout.batch_size, longest_answer),
    }
    if config.rollout.engine == "vllm":
        host["weights for vLLM"] = sent = (student.parameters + student.head) * s_bytes
        sampler = {} if config.rollout.servers else {"vLLM": _vllm(config, device, sent)}
        phases["rollout"] = phases["evaluation"] = ({} if config.engine.phases == 2 else held | scoring) | sampler
    if not longest_answer:
        del phases["evaluation"]
    phases = {phase: {name: size for name, size in parts.items() if size} for phase, parts in phases.items() if parts}
    seconds = _seconds(config, student, teacher, device, work)
    return Plan(processes, phases, host, states - host["teacher states"], 12 * student.parameters, seconds, updates)


@dataclass(frozen=True)
class _Work:
    """How much one process does in an update."""

    rollouts: int
    together: int  # responses that are generated at once
    length: int  # tokens of the longest prompt and response
    micro: int  # padded tokens of a micro-batch
    processes: int  # that share the run

    @classmethod
    def of(cls, config: Config, processes: int) -> "_Work":
        length = config.data.max_prompt_tokens + config.rollout.max_response_tokens
        rollouts = -(-config.rollout.prompts_per_step * config.rollout.n // processes)
        micro = max(min(config.optim.micro_batch_tokens, rollouts * length), length)
        return cls(rollouts, min(config.rollout.batch_size, rollouts), length, micro, processes)


def _generation(config: Config, student: Size, responses: int, tokens: int) -> dict[str, int]:
    """Bytes that transformers takes to generate so many responses of so many tokens at once."""
    compute_bytes = 2 if config.student.dtype == "bfloat16" else 4
    cache = responses * (config.data.max_prompt_tokens + tokens) * student.cache_per_token * compute_bytes
    return {
        "KV cache": cache,
        "logits": responses * student.vocab * (4 + 4 + 8 + 8),
    }  # scores, softmax, both as float64


def _backward(config: Config, student: Size, zero: dict | None, work: _Work, moments_on_host: bool) -> dict[str, int]:
    """Bytes of the larger of two peaks of an update: the backward pass, and AdamW's step."""
    compute_bytes = 2 if config.student.dtype == "bfloat16" else 4
    one_layer = work.micro * (8 * student.hidden + 3 * student.intermediate) * compute_bytes
    kept = work.micro * student.hidden * compute_bytes if config.engine.gradient_checkpointing else one_layer
    loss = min(config.loss.chunk_bytes, 12 * work.micro * student.vocab)  # three (tokens, vocabulary) buffers
    backward = {"activations": one_layer + student.layers * kept, "loss": loss + 4 * student.head}
    split = 1 if zero is None or zero["stage"] == 0 else work.processes
    adam = {"AdamW's temporaries": 0 if moments_on_host else 4 * student.parameters // split}
    return max(backward, adam, key=lambda parts: sum(parts.values()))


def _seconds(config: Config, student: Size, teacher: Size, device: torch.device, work: _Work) -> dict[str, float]:
    """Seconds of an update's phases, by what the device does in a moment."""
    compute_bytes = 2 if config.student.dtype == "bfloat16" else 4
    flops, bandwidth = device_speed(device, torch.bfloat16 if compute_bytes == 2 else torch.float32)
    overhead = 2e-4 * student.layers  # launching a layer's kernels
    batches = -(-work.rollouts // work.together)
    reading = student.parameters * compute_bytes / bandwidth
    one_token = max(2 * student.multiplied * work.together / flops, reading) + overhead
    tokens = work.rollouts * work.length
    passes = 1 + 1 + 2 + (1 if config.engine.gradient_checkpointing else 0)  # scoring, forward, backward, recomputation
    launches = -(-tokens // work.micro)
    return {
        "rollout": batches * config.rollout.max_response_tokens * one_token,
        "teacher": 2 * teacher.multiplied * tokens / flops + launches * 2e-4 * teacher.layers,
        "update": 2 * student.multiplied * tokens * passes / flops + launches * passes * overhead,
    }


def _vllm(config: Config, device: torch.device, weights: int) -> int:
    """Bytes it takes while it is awake."""
    if device.type == "cuda":
        return int(config.rollout.gpu_memory * torch.cuda.get_device_properties(device).total_memory)
    return weights + 2**30


def _student_memory(
    student: Size, compute_bytes: int, zero: dict | None, processes: int
) -> tuple[dict[str, int], dict[str, int]]:
    """What the student holds on the device, "gradients" of the update among it, and in host memory."""
    parameters = student.parameters
    if zero is None:  # float32, and a copy in the compute dtype while autocast holds
        copy = 2 * parameters if compute_bytes == 2 else 0
        return {
            "weights": 4 * parameters,
            "copy for autocast": copy,
            "gradients": 4 * parameters,
            "optimizer": 8 * parameters,
        }, {}
    stage, part = zero["stage"], -(-parameters // processes)
    if stage == 0:
        return {"weights": 4 * parameters, "gradients": 4 * parameters, "optimizer": 8 * parameters}, {}
    device, host = {}, {}
    if stage == 3:
        live = min(parameters, zero.get("stage3_max_live_parameters", LIVE))
        (host if zero.get("offload_param") else device)["weights"] = part * compute_bytes
        device["layers gathered"] = live * compute_bytes
    else:
        device["weights"] = parameters * compute_bytes
    (host if zero.get("offload_optimizer") else device)["optimizer"] = 12 * part  # float32 copy and two moments
    # gradients add up in float32: whole in stage 1, where a bfloat16 model has its own as well; else this rank's part
    bucket = zero.get("reduce_bucket_size", BUCKET)
    buckets = bucket * compute_bytes * (2 if zero.get("overlap_comm") else 1)
    if compute_bytes == 2:  # reduced in float32; a gradient larger than a bucket, such as the head's, goes whole
        buckets += 4 * max(bucket, student.head)
    if stage == 1:
        device["gradients"] = 4 * parameters + (2 * parameters if compute_bytes == 2 else 0)
    elif zero.get("offload_optimizer"):
        host["gradients"], device["gradients"] = 4 * part, buckets
    else:
        device["gradients"] = 4 * part + buckets
    return device, host


def _teacher_memory(
    teacher: Size, bytes_each: int, placement: str, processes: int, host: dict[str, int]
) -> dict[str, int]:
    """What the teacher holds on the device, "teacher layers gathered" only while it scores; adds to `host`."""
    if placement == "device":
        return {"teacher": teacher.parameters * bytes_each}
    part = -(-teacher.parameters // processes) * bytes_each
    device = {
        "teacher head": teacher.head * bytes_each,
        "teacher layers gathered": min(teacher.parameters, LIVE) * bytes_each,
    }
    if placement == "host":
        host["teacher"] = part
    else:
        device["teacher"] = part
    return device


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


def describe(config: Config, device: torch.device, updates: int, zero: dict | None, processes: int) -> str:
    """The plan of a configuration in a few lines. Raises InputError when a model's config.json cannot be read.

    Args:
        zero: DeepSpeed's zero_optimization; None: the plain engine.
    """
    sizes = size_without_weights(config.student, "student"), size_without_weights(config.teacher, "teacher")
    longest = max((b.max_response_tokens for b in read_benchmarks(config).values()), default=0)
    return text(make_plan(config, *sizes, device, updates, longest, zero, processes), config, *sizes, device)


def text(plan: Plan, config: Config, student: Size, teacher: Size, device: torch.device) -> str:
    """The plan in a few lines."""
    per_update = sum(plan.seconds.values())
    times = ", ".join(f"{name} {value:.2g} s" for name, value in plan.seconds.items())
    each = f" of each of {plan.processes} processes" if plan.processes > 1 else ""
    peaks = [
        f"    {phase}: {amount(plan.peaks[phase])} = "
        + " + ".join(f"{name} {amount(size)}" for name, size in parts.items())
        for phase, parts in plan.phases.items()
    ]
    host = " + ".join(f"{name} {amount(size)}" for name, size in plan.host.items())
    return "\n".join(
        [
            f"plan of {config.run_dir}: {plan.updates} updates of {config.rollout.prompts_per_step} prompts x "
            f"{config.rollout.n} responses of up to {config.rollout.max_response_tokens} tokens on {device}; "
            f"{config.engine.kind} engine, {config.rollout.engine} rollouts, {config.teacher.mode} teacher",
            f"  parameters: student {student.parameters / 1e6:.2f} M, teacher {teacher.parameters / 1e6:.2f} M",
            f"  memory{each}, by phase:",
            *peaks,
            f"    host memory throughout: {amount(sum(plan.host.values()))} = {host}",
            f"  disk: {amount((config.checkpoint.keep + 1) * plan.checkpoint)} for checkpoints "
            f"({config.checkpoint.keep} kept, one being written)"
            + (f", and {amount(plan.spilled)} for teacher states above teacher.cache_gb" if plan.spilled else ""),
            f"  time, if every response were of full length: {per_update:.2g} s an update ({times}), "
            f"{plan.updates * per_update / 3600:.2g} h in all; evaluations not counted",
        ]
    )
