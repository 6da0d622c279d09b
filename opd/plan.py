"""The plan of a run: memory per phase and hours. opd.doctor, --dry-run and the start of a run show it.

The sizes of parameters are exact, because the models are built on torch's meta device, without weights. Activations and
times are estimates for responses of full length. Where several processes share a run, the numbers are of one of them.
One matrix product and one copy measure the speed of the device.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from opd import adapters
from opd.benchmarks import read_benchmarks
from opd.config import Config, StudentSection, TeacherSection
from opd.errors import InputError, first_line
from opd.files import amount
from opd.models import packed_row_of


@dataclass(frozen=True)
class Size:
    """The size of one model, in numbers and not in bytes."""

    parameters: int  # tied ones count once
    multiplied: int  # parameters that every token is multiplied with; an untied input embedding is not among them
    head: int
    vocab: int
    layers: int
    hidden: int
    intermediate: int
    cache_per_token: int  # numbers of the keys and values of all layers
    repeated_per_token: int  # those of one layer, repeated for all attention heads; 0 where every head has its own
    packed_row: int  # tokens of the longest row that sequences may share under sdpa (opd.models.packed_row_of)
    adapters: int = 0  # numbers that learn in place of the parameters (opd.adapters); 0: all parameters learn

    @property
    def learning(self) -> int:
        """How many numbers learn."""
        return self.adapters or self.parameters


def size_of(model: PreTrainedModel) -> Size:
    """The size of a model, which may lie on the meta device."""
    config = model.config.get_text_config()
    optional = config.to_dict()  # for keys that only some architectures have
    parameters = sum(p.numel() for p in model.parameters())
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = optional.get("head_dim") or hidden // heads
    kv_heads = optional.get("num_key_value_heads") or heads
    return Size(
        parameters=parameters,
        multiplied=parameters - (0 if head is embedding else embedding.numel()),
        head=head.numel(),
        vocab=head.shape[0],
        layers=config.num_hidden_layers,
        hidden=hidden,
        intermediate=optional.get("intermediate_size") or 4 * hidden,
        cache_per_token=2 * config.num_hidden_layers * kv_heads * head_dim,
        repeated_per_token=2 * heads * head_dim if kv_heads < heads else 0,
        packed_row=packed_row_of(model),
    )


def size_without_weights(section: StudentSection | TeacherSection, name: str) -> Size:
    """The size of a config section's model, from its config.json alone. Raises InputError when it cannot be read."""
    try:
        config = AutoConfig.from_pretrained(section.path, revision=section.revision)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        if isinstance(section, StudentSection) and section.lora:
            return replace(size_of(model), adapters=adapters.count(model, section.lora, section.path))
        return size_of(model)
    except InputError:
        raise
    except Exception as error:  # a broken config.json can raise anything, as in opd.models.load
        raise InputError(
            f"{name}.path {section.path!r}: its config.json cannot be used ({first_line(error)})."
        ) from None


@dataclass(frozen=True)
class Plan:
    """What one process needs, in bytes and seconds."""

    parameters: tuple[int, int]  # of student and teacher
    adapters: int  # numbers of the student's adapters
    processes: int
    phases: dict[str, dict[str, int]]  # phase -> name of a part -> bytes that it takes on the device
    host: dict[str, int]  # name of a part -> bytes in host memory, all the time
    spilled: int  # bytes of teacher states on disk, during an update
    checkpoint: int  # bytes
    seconds: dict[str, float]  # phase of one update -> seconds
    updates: int
    lighter: dict[str, int]  # settings that make the update smaller, slower ones later -> bytes on the device in it

    @property
    def peaks(self) -> dict[str, int]:
        """Phase -> bytes on the device."""
        return {phase: sum(parts.values()) for phase, parts in self.phases.items()}

    def way_to_fit(self, room: int) -> str:
        """A sentence with the first settings under which the update takes at most `room` bytes on the device."""
        for settings, size in self.lighter.items():
            if size <= room:
                return f"With {settings} the update takes {amount(size)}, which fits."
        return "Neither engine.gradient_checkpointing nor a smaller optim.micro_batch_tokens makes the update fit."


LIVE = 10**9  # the most parameters that ZeRO-3 keeps gathered at once, by DeepSpeed's default
BUCKET = 5 * 10**8  # how many numbers DeepSpeed reduces at once, by its default


def _bytes_each(section: StudentSection | TeacherSection) -> int:
    """Bytes of a number in the dtype of a section."""
    return 2 if section.dtype == "bfloat16" else 4


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
    """The plan of a run whose responses are all of full length.

    Args:
        updates: how many updates the run makes.
        longest_answer: the largest max_response_tokens of the benchmarks; 0 when there are none.
        zero: DeepSpeed's zero_optimization; None for the plain engine.
        processes: how many processes the run has, one per device.
    """
    s_bytes, t_bytes = _bytes_each(config.student), _bytes_each(config.teacher)
    work = _Work.of(config, processes)
    held, host = _student_memory(student, s_bytes, zero, processes)  # on the device, in host memory
    gradients = held.pop("gradients")
    kept = _kept_bytes_each(config)
    scoring = _teacher_memory(teacher, kept, _teacher_placement(config.teacher, zero), processes, host)
    gathered = scoring.pop("teacher layers gathered", 0)
    teacher_states = work.rollouts * config.rollout.max_response_tokens * teacher.hidden * t_bytes
    limit = teacher_states if config.teacher.cache_gb is None else int(config.teacher.cache_gb * 2**30)
    host["teacher states"] = min(teacher_states, limit)
    beside_student = beside_teacher = learning = held | scoring
    if config.engine.phases == 2:
        waiting = {"student": held["weights"], "moments": held["optimizer"], "teacher": sum(scoring.values())}
        host |= {f"{name} waiting": size for name, size in waiting.items() if size}
        beside_student = {name: size for name, size in held.items() if name != "optimizer"}
        beside_teacher = scoring if kept else beside_student
        learning = held | {"teacher head": teacher.head * kept}
    loads_float32 = zero is not None and zero["stage"] in (1, 2) and s_bytes == 2 and not student.adapters
    phases = {
        "loading": scoring | {"float32 weights": 4 * student.parameters} if loads_float32 else {},
        "rollout": beside_student | _generation(config, student, work.together, config.rollout.max_response_tokens),
        "teacher": beside_teacher
        | {
            "teacher layers gathered": gathered,
            "activations": 0 if config.teacher.mode == "server" else _one_layer(teacher, work, t_bytes),
        },
        "update": learning | {"gradients": gradients} | _backward(config, student, work),
        "evaluation": beside_student | _generation(config, student, config.evaluation_batch, longest_answer),
    }
    if config.rollout.engine == "vllm":
        host["weights for vLLM"] = sent = (student.parameters + student.head) * s_bytes
        sampler = {} if config.rollout.servers else {"vLLM": _vllm(config, device, sent)}
        phases["rollout"] = phases["evaluation"] = ({} if config.engine.phases == 2 else held | scoring) | sampler
    if not longest_answer:
        del phases["evaluation"]
    phases = {phase: {name: size for name, size in parts.items() if size} for phase, parts in phases.items() if parts}
    seconds = _seconds(config, student, teacher, device, work)
    parameters, spilled = (student.parameters, teacher.parameters), teacher_states - host["teacher states"]
    saved = (16 if config.teacher.weights == "ema" else 12) * student.learning  # weights, two moments, an average
    lighter = _lighter(config, student, work, sum(learning.values()) + gradients)
    return Plan(parameters, student.adapters, processes, phases, host, spilled, saved, seconds, updates, lighter)


def _kept_bytes_each(config: Config) -> int:
    """Bytes of a number of the weights that the teacher keeps beside the student; an average is float32."""
    if config.teacher_is_student:
        return 0
    return 4 if config.teacher.weights == "ema" else _bytes_each(config.teacher)


@dataclass(frozen=True)
class _Work:
    """The work of one process in an update."""

    rollouts: int
    together: int  # responses that it generates at once
    length: int  # tokens of the longest prompt that a model reads and the longest response
    micro: int  # tokens of a micro-batch, padding included
    processes: int  # how many processes share the run

    @classmethod
    def of(cls, config: Config, processes: int) -> "_Work":
        privileged = config.data.teacher_prompt
        prompt = max(config.data.max_prompt_tokens, privileged.max_tokens if privileged else 0)
        length = prompt + config.rollout.max_response_tokens
        rollouts = -(-config.rollout.prompts_per_step * config.rollout.n // processes)
        micro = max(min(config.optim.micro_batch_tokens, rollouts * length), length)
        return cls(rollouts, min(config.rollout.batch_size, rollouts), length, micro, processes)


def _one_layer(model: Size, work: _Work, bytes_each: int) -> int:
    """Bytes of the activations of one layer for a micro-batch."""
    return work.micro * (8 * model.hidden + 3 * model.intermediate) * bytes_each


def _generation(config: Config, student: Size, responses: int, tokens: int) -> dict[str, int]:
    """Bytes that transformers takes to generate so many responses of so many tokens at once."""
    length = config.data.max_prompt_tokens + tokens
    return {
        # its buffers have up to a quarter of their columns free (opd/rollout/kv_cache.py)
        "KV cache": responses * length * student.cache_per_token * _bytes_each(config.student) * 5 // 4,
        "attention": responses * length * student.repeated_per_token * _bytes_each(config.student),
        "logits": responses * student.vocab * 4 * 8,  # what a draw makes of them, measured on a GPU
    }


def _backward(config: Config, student: Size, work: _Work) -> dict[str, int]:
    """Bytes of the backward pass. AdamW's step comes after it and takes nothing beside its moments."""
    compute_bytes = _bytes_each(config.student)
    one_layer = _one_layer(student, work, compute_bytes)
    kept = work.micro * student.hidden * compute_bytes if config.engine.gradient_checkpointing else one_layer
    # sdpa keeps the mask of shared rows with the activations of each layer
    row = min(work.length, student.packed_row) if config.student.attn_implementation == "sdpa" else 0
    masks = work.micro * row * compute_bytes * (1 if config.engine.gradient_checkpointing else student.layers)
    loss = min(config.loss.chunk_bytes, 12 * work.micro * student.vocab)  # three (tokens, vocabulary) buffers
    if compute_bytes == 2 and config.engine.kind == "torch" and not student.adapters:
        loss += 2 * student.head  # a copy for the products, because its parameters are float32
    head_gradient = 0 if student.adapters else 4 * student.head
    return {"activations": one_layer + student.layers * kept, "masks": masks, "loss": loss + head_gradient}


def _lighter(config: Config, student: Size, work: _Work, held: int) -> dict[str, int]:
    """As Plan.lighter; `held` is what the update takes beside its backward pass.

    Fewer tokens at once cost least, and are tried first, down to one response of full length. Checkpointing computes
    every layer's forward pass once more.
    """
    found, responses = {}, work.micro // work.length
    halvings = [(responses >> i) * work.length for i in range(responses.bit_length())]
    sizes = dict.fromkeys([work.micro, *halvings])
    for checkpointing, micro in product(sorted({config.engine.gradient_checkpointing, True}), sizes):
        engine = replace(config.engine, gradient_checkpointing=checkpointing)
        changed = [] if engine == config.engine else ["--set engine.gradient_checkpointing=true"]
        changed += [] if micro == work.micro else [f"--set optim.micro_batch_tokens={micro}"]
        backward = _backward(replace(config, engine=engine), student, replace(work, micro=micro))
        if changed:
            found[" ".join(changed)] = held + sum(backward.values())
    return found


def _seconds(config: Config, student: Size, teacher: Size, device: torch.device, work: _Work) -> dict[str, float]:
    """Seconds of an update's phases, from the measured speed of the device."""
    compute_bytes = _bytes_each(config.student)
    flops, bandwidth = device_speed(device, torch.bfloat16 if compute_bytes == 2 else torch.float32)
    overhead = 2e-4 * student.layers  # for the launch of the layers' kernels
    batches = -(-work.rollouts // work.together)
    reading = student.parameters * compute_bytes / bandwidth
    one_token = max(2 * student.multiplied * work.together / flops, reading) + overhead
    tokens = work.rollouts * work.length
    passes = 1 + 1 + 2 + (1 if config.engine.gradient_checkpointing else 0)  # scoring, forward, backward, recomputation
    launches = -(-tokens // work.micro)
    scoring = 2 * teacher.multiplied * tokens / flops + launches * 2e-4 * teacher.layers
    if config.teacher.mode == "server":
        scoring = 0.0  # on a device that is not known here
    return {
        "rollout": batches * config.rollout.max_response_tokens * one_token,
        "teacher": scoring,
        "update": 2 * student.multiplied * tokens * passes / flops + launches * passes * overhead,
    }


def _vllm(config: Config, device: torch.device, weights: int) -> int:
    """Bytes that vLLM takes while it is awake; on a CPU they are `weights` bytes and a GiB for its cache."""
    if device.type == "cuda":
        return int(config.rollout.gpu_memory * torch.cuda.get_device_properties(device).total_memory)
    return weights + 2**30


def _student_memory(
    student: Size, compute_bytes: int, zero: dict | None, processes: int
) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes that the student takes on the device and in host memory, as two dictionaries from part to bytes.

    The part "gradients" is there during the update only.
    """
    parameters, half = student.parameters, compute_bytes == 2
    stage = 0 if zero is None else zero["stage"]
    if student.adapters:  # the frozen model beneath them is whole on every process
        learning = replace(student, parameters=student.adapters, adapters=0, head=0)
        device, host = _student_memory(learning, 4 if zero is None else compute_bytes, zero, processes)
        return device | {"weights": device["weights"] + parameters * compute_bytes}, host
    if stage == 0:
        copy = 2 * parameters if half and zero is None else 0  # the plain engine's, while autocast holds
        four = 4 * parameters
        return {"weights": four, "copy for autocast": copy, "gradients": four, "optimizer": 2 * four}, {}
    device, host, part = {}, {}, -(-parameters // processes)
    if stage == 3:
        live = min(parameters, zero.get("stage3_max_live_parameters", LIVE))
        (host if zero.get("offload_param") else device)["weights"] = part * compute_bytes
        device["layers gathered"] = live * compute_bytes
    else:
        device["weights"] = parameters * compute_bytes
    (host if zero.get("offload_optimizer") else device)["optimizer"] = 12 * part  # float32 copy and two moments
    bucket = zero.get("reduce_bucket_size", BUCKET)
    buckets = bucket * compute_bytes * (2 if zero.get("overlap_comm") else 1)
    if half:  # reduced in float32; a gradient larger than a bucket, such as the head's, goes as a whole
        buckets += 4 * max(bucket, student.head)
    # Gradients add up in float32. In stage 1 every process has all of them, and a bfloat16 model has its own as well.
    if stage == 1:
        device["gradients"] = 4 * parameters + (2 * parameters if half else 0)
    elif zero.get("offload_optimizer"):
        host["gradients"], device["gradients"] = 4 * part, buckets
    else:
        device["gradients"] = 4 * part + buckets
    return device, host


def _teacher_placement(section: TeacherSection, zero: dict | None) -> str:
    """Where the teacher lies, as teacher.placement says it. An average lies where ZeRO-3 has the student.

    A teacher of servers lies "elsewhere".
    """
    if section.mode == "server":
        return "elsewhere"
    if section.weights != "ema" or zero is None or zero["stage"] < 3:
        return section.placement
    return "host" if zero.get("offload_param") else "sharded"


def _teacher_memory(
    teacher: Size, bytes_each: int, placement: str, processes: int, host: dict[str, int]
) -> dict[str, int]:
    """Bytes that the teacher takes on the device; bytes in host memory are added to `host`.

    The part "teacher layers gathered" is there only while the teacher scores.
    """
    if placement == "elsewhere":
        return {"teacher head": teacher.head * bytes_each}
    if placement == "device":
        return {"teacher": teacher.parameters * bytes_each}
    device = {
        "teacher head": teacher.head * bytes_each,
        "teacher layers gathered": min(teacher.parameters, LIVE) * bytes_each,
    }
    (host if placement == "host" else device)["teacher"] = -(-teacher.parameters // processes) * bytes_each
    return device


def memory_of(device: torch.device) -> int:
    """Bytes of memory of a device; of a CPU, those of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def device_speed(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Floating-point operations per second and bytes per second, each the best of three short measurements."""
    n = 512 if device.type == "cpu" else 4096
    matrix, block = torch.ones(n, n, device=device, dtype=dtype), torch.ones(2**24, device=device)

    def shortest(work: Callable[[], object]) -> float:
        seconds = []
        for _ in range(3):
            begin = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - begin)
        return min(seconds)

    return 2 * n**3 / shortest(lambda: matrix @ matrix), 2 * block.nbytes / shortest(block.clone)


def plan_of(config: Config, device: torch.device, updates: int, zero: dict | None, processes: int) -> Plan:
    """The plan of a configuration; `updates`, `zero` and `processes` are as in make_plan.

    Raises InputError when a model's config.json cannot be read.
    """
    student = size_without_weights(config.student, "student")
    teacher = size_without_weights(config.teacher_model, "teacher")
    longest = max((benchmark.max_response_tokens for benchmark in read_benchmarks(config).values()), default=0)
    return make_plan(config, student, teacher, device, updates, longest, zero, processes)


def describe(config: Config, device: torch.device, plan: Plan) -> str:
    """A plan in a few lines."""
    per_update = sum(plan.seconds.values())
    times = ", ".join(f"{phase} {seconds:.2g} s" for phase, seconds in plan.seconds.items())
    each = f" of each of {plan.processes} processes" if plan.processes > 1 else ""
    peaks = [
        f"    {phase}: {amount(plan.peaks[phase])} = "
        + " + ".join(f"{name} {amount(size)}" for name, size in parts.items())
        for phase, parts in plan.phases.items()
    ]
    host = " + ".join(f"{name} {amount(size)}" for name, size in plan.host.items())
    room = memory_of(device) - (0 if device.type == "cuda" else sum(plan.host.values()))
    student, teacher = plan.parameters
    learning = f" with adapters of {plan.adapters / 1e6:.2f} M" if plan.adapters else ""
    fit = []
    if plan.peaks["update"] > room:
        has = f"{amount(room)} of the {device.type}"
        fit = [f"    the update does not fit into the {has}. {plan.way_to_fit(room)}"]
    elsewhere = []
    if config.teacher.mode == "server":
        sent = plan.host["teacher states"] + plan.spilled
        elsewhere = [f"  teacher servers: up to {amount(sent)} of hidden states an update; their time is not counted"]
    return "\n".join(
        [
            f"plan of {config.run_dir}: {plan.updates} updates of {config.rollout.prompts_per_step} prompts x "
            f"{config.rollout.n} responses of up to {config.rollout.max_response_tokens} tokens on {device}; "
            f"{config.engine.kind} engine, {config.rollout.engine} rollouts, "
            f"{' '.join(filter(None, (config.teacher.mode, config.teacher.weights)))} teacher",
            f"  parameters: student {student / 1e6:.2f} M{learning}, teacher {teacher / 1e6:.2f} M",
            f"  memory{each}, by phase:",
            *peaks,
            *fit,
            f"    host memory throughout: {amount(sum(plan.host.values()))} = {host}",
            f"  disk: {amount((config.checkpoint.keep + 1) * plan.checkpoint)} for checkpoints "
            f"({config.checkpoint.keep} kept, one being written)"
            + (f", and {amount(plan.spilled)} for teacher states above teacher.cache_gb" if plan.spilled else ""),
            f"  time, if every response were of full length: {per_update:.2g} s an update ({times}), "
            f"{plan.updates * per_update / 3600:.2g} h in all; evaluations not counted",
            *elsewhere,
        ]
    )
