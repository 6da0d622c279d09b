"""The configuration: one complete JSON file per teacher-student pair, read into frozen dataclasses.

Every key is required, so a file is the whole truth about a run and no default hides in code. A key is documented
where it is declared; `configs/schema.json` is generated from here, so that editors complete and explain the same text.
An extension of this trainer brings its own optional section as a dataclass whose fields all have defaults.

"Table 9" is the hyperparameter table of the TIP paper, arXiv 2604.14084.
"""

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass

from opd.cli import address_of, path_fault
from opd.errors import InputError
from opd.files import NotJson, parse_json, read_text

strict = dataclass(frozen=True, kw_only=True, config=ConfigDict(strict=True, extra="forbid", allow_inf_nan=False))

ROOT = Path(__file__).resolve().parent.parent
Dtype = Literal["float32", "bfloat16"]
Attention = Literal["eager", "sdpa", "flash_attention_2"]
Text = Annotated[str, Field(min_length=1)]
MOST_THREADS = 1024  # more crash the libraries that start them


def _path(text: str) -> str:
    if fault := path_fault(text):
        raise ValueError(f"expected a path, and this {fault}")
    return text


PathText = Annotated[Text, AfterValidator(_path)]
MOST = 10**9  # of what is counted: more overflows whoever lays it out
Count = Annotated[int, Field(ge=1, le=MOST)]
MOST_SAMPLES = 100_000  # of one problem, and prompts of one update
COLDEST = 1e-3  # temperature above 0: colder ones overflow the scaled logits, and are greedy


def doc(text: str, **limits: Any) -> Any:
    return Field(description=text, **limits)


@strict
class StudentSection:
    """The model that samples and learns."""

    path: Annotated[PathText, doc("Folder of a Hugging Face checkpoint (safetensors), or a hub repository name.")]
    revision: Annotated[str | None, doc("Hub commit or tag; null for a folder or the default branch.")]
    dtype: Annotated[
        Dtype,
        doc(
            "Compute dtype. Weights and optimizer state are always float32: a bfloat16 weight would not move at lr "
            "1e-6."
        ),
    ]
    attn_implementation: Annotated[Attention, doc("Attention kernel of transformers.")]


@strict
class TeacherSection:
    """The frozen model that scores the student's tokens."""

    mode: Annotated[Literal["local"], doc("Where the teacher runs. local: in this process.")]
    path: Annotated[PathText, doc("Folder of a Hugging Face checkpoint (safetensors), or a hub repository name.")]
    revision: Annotated[str | None, doc("Hub commit or tag; null for a folder or the default branch.")]
    dtype: Annotated[Dtype, doc("Dtype of the teacher's weights and arithmetic.")]
    attn_implementation: Annotated[Attention, doc("Attention kernel of transformers.")]
    placement: Annotated[
        Literal["device", "sharded", "host"],
        doc(
            "Where its weights lie. device: whole on every process's device; sharded: split over the processes, "
            "gathered layer by layer while it runs (ZeRO-3); host: that, in host memory. The latter two need "
            "engine.kind deepspeed."
        ),
    ]
    cache_gb: Annotated[
        float | None,
        doc(
            "GiB of host memory, per process, for its hidden states of one update, which wait there for the student; "
            "what is above goes to RUN/teacher_states/ on disk. Beside a GPU it is pinned, where torch rounds each "
            "micro-batch up to a power of two bytes. null: no limit.",
            ge=0,
            le=MOST,
        ),
    ]


@strict
class DataSection:
    """Training prompts."""

    train: Annotated[
        tuple[PathText, ...], doc("JSONL files, one problem per line; several are one mixture.", min_length=1)
    ]
    validation: Annotated[
        int,
        doc(
            "Prompts held out of the training data, chosen by the seed, and evaluated as benchmark `validation` with "
            "the rollouts' own decoding. 0: none.",
            ge=0,
        ),
    ]
    prompt_field: Annotated[
        Text,
        doc("Field of a line with the problem: a string (one user message) or a list of {role, content} messages."),
    ]
    answer_field: Annotated[str | None, doc("Field with the reference answer, for `rollout/accuracy`; null: none.")]
    system_prompt: Annotated[str | None, doc("System message put before every prompt; null: none.")]
    chat_template_args: Annotated[
        dict[str, Any], doc('Extra arguments of the chat template, for example {"enable_thinking": false}.')
    ]
    max_prompt_tokens: Annotated[Count, doc("Longer prompts are dropped and counted. Tokens. Table 9: 2048.")]
    shuffle: Annotated[bool, doc("New prompt order in every epoch, from the seed. false: file order.")]
    epochs: Annotated[
        Count | None, doc("Passes over the prompts; null when optim.steps is given. Public reruns of the paper: 1.")
    ]


@strict
class RolloutSection:
    """Sampling of responses from the student."""

    engine: Annotated[
        Literal["transformers", "vllm"],
        doc("What generates. vllm: in processes of its own, which get the weights after every update."),
    ]
    servers: Annotated[
        tuple[Text, ...],
        doc(
            "Where vLLM servers run (python -m opd.vllm_server), each HOST:PORT. Empty: vLLM starts beside each "
            "process, on its device, and sleeps during the update. transformers: empty."
        ),
    ]
    tensor_parallel: Annotated[
        Count, doc("GPUs that share one vLLM; with DeepSpeed, of so many processes one has it. transformers: 1.")
    ]
    gpu_memory: Annotated[
        float,
        doc("Share of the GPU's memory that vLLM may take for weights and cache. transformers: not used.", gt=0, lt=1),
    ]
    timeout: Annotated[
        Count,
        doc(
            "Seconds without a sign of life (a token, a bucket of weights) after which vLLM counts as lost and is "
            "started once more. transformers: not used."
        ),
    ]
    parity_every: Annotated[
        Count,
        doc(
            "Updates between comparisons of vLLM's logprobs with the trainer's, which end the run when they differ. "
            "The first one is always before the first update. transformers: not used."
        ),
    ]
    prompts_per_step: Annotated[int, doc("Prompts of one update. Table 9: 8.", ge=1, le=MOST_SAMPLES)]
    n: Annotated[int, doc("Responses per prompt. Table 9: 16.", ge=1, le=MOST_SAMPLES)]
    batch_size: Annotated[
        Count, doc("Responses a process generates together; bounds the key/value cache. Not the result.")
    ]
    temperature: Annotated[float, doc("Sampling temperature; 0 is greedy. Table 9: 1.0.", ge=0)]
    top_p: Annotated[float, doc("Nucleus: smallest set of tokens with this probability. Table 9: 1.0.", gt=0, le=1)]
    max_response_tokens: Annotated[Count, doc("A response is cut here. Tokens. Table 9: 8192.")]
    truncated: Annotated[
        Literal["keep", "drop", "mask_tail"],
        doc(
            "What a cut response contributes. keep: all its tokens; drop: none; "
            "mask_tail: all but the end that only repeats itself (a loop of at least three rounds, from its second on)."
        ),
    ]


@strict
class LossSection:
    """Divergence between student and teacher at every response token, over the whole vocabulary, at temperature 1."""

    divergence: Annotated[
        Literal["reverse_kl", "forward_kl", "jsd"],
        doc("reverse_kl: KL(student || teacher), the paper's loss; forward_kl: KL(teacher || student); jsd: JSD_beta."),
    ]
    jsd_beta: Annotated[
        float,
        doc(
            "beta of JSD_beta = beta KL(p_T || m) + (1 - beta) KL(p_S || m), m = beta p_T + (1 - beta) p_S.", gt=0, lt=1
        ),
    ]
    chunk_bytes: Annotated[
        int,
        doc(
            "Transient memory of the loss in bytes; sets how many tokens are projected at once. Not the result.",
            ge=2**16,
        ),
    ]


@strict
class OptimSection:
    """AdamW; weight decay on matrices only (not on norms and biases)."""

    lr: Annotated[float, doc("Peak learning rate. Table 9: 1e-6 (Qwen), 3e-7 (Llama).", gt=0)]
    schedule: Annotated[Literal["constant", "cosine"], doc("After warm-up: constant, or cosine to 0. Table 9: cosine.")]
    warmup_steps: Annotated[int, doc("Updates of linear warm-up. Not stated in the paper; public reruns: 0.", ge=0)]
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]],
        doc("Adam's decay rates of the two moments."),
    ]
    weight_decay: Annotated[float, doc("Decoupled weight decay. Not stated in the paper; public reruns: 0.1.", ge=0)]
    grad_clip: Annotated[float, doc("L2 norm the gradient is clipped to. Not stated; public reruns: 1.0.", gt=0)]
    steps: Annotated[Count | None, doc("Number of updates; null when data.epochs is given.")]
    micro_batch_tokens: Annotated[
        Count,
        doc(
            "Padded tokens (prompt + response) of one forward; one rollout always fits. Bounds memory, not the result."
        ),
    ]


@strict
class EngineSection:
    """What holds the weights and applies the update."""

    kind: Annotated[
        Literal["torch", "deepspeed"],
        doc(
            "torch: one process, one device. deepspeed: one process per GPU, started by opd.launch, torchrun or "
            "deepspeed."
        ),
    ]
    deepspeed: Annotated[
        PathText | None,
        doc(
            "Name of configs/deepspeed/NAME.json, or path of such a file: ZeRO stage and offload. null with kind "
            "torch. What the pair file decides (optimizer, schedule, clipping, dtype, batch) has no place in it."
        ),
    ]
    phases: Annotated[
        Literal[1, 2],
        doc(
            "2: teacher, student and vLLM take turns on the device and wait in host memory (opd/phases.py): the pair "
            "needs not "
            "fit together. 1: they stay, and only vLLM sleeps. Not the result. With deepspeed 1: its files offload."
        ),
    ]
    device: Annotated[Literal["auto", "cpu", "cuda"], doc("auto: cuda when there is one, else cpu.")]
    cpu_threads: Annotated[
        Annotated[int, Field(ge=1, le=MOST_THREADS)] | None,
        doc(
            "Threads of CPU arithmetic; null: torch's choice. 1 for models of a few million parameters: more threads "
            "slow their kernels down."
        ),
    ]
    gradient_checkpointing: Annotated[bool, doc("Recompute activations in the backward pass: less memory, more time.")]


@strict
class EvalSection:
    """Held-out accuracy of the step-0 student, the teacher, and the student in training and at the end."""

    benchmarks: Annotated[tuple[PathText, ...], doc("Names of configs/benchmarks/NAME.json, or paths of such files.")]
    k: Annotated[
        int | None,
        doc("Samples per problem, instead of each benchmark's own k; null: its own.", ge=0, le=MOST_SAMPLES),
    ]
    every: Annotated[int, doc("Evaluate every so many updates as well; 0: only before and after.", ge=0)]
    reverse_kl: Annotated[
        bool,
        doc("Also measure KL(student || teacher) on the sampled responses, nats per token; one pass of both models."),
    ]
    limit: Annotated[Count | None, doc("Only the first problems of each benchmark; null: all.")]


@strict
class CheckpointSection:
    """Whole checkpoints: the student in Hugging Face format, and the optimizer."""

    every: Annotated[int, doc("Save every so many updates; the last update is always saved. 0: only the last.", ge=0)]
    keep: Annotated[Count, doc("How many of the newest checkpoints stay on disk.")]


@strict
class LogSection:
    """Diagnostics beyond the metrics of every step."""

    diagnostics_every: Annotated[
        int,
        doc(
            "Updates between diagnostics (entropies, divergences, quadrants); costs one scoring pass where the rule "
            "needs none. 0: never.",
            ge=0,
        ),
    ]
    samples: Annotated[int, doc("Rollouts written as text to TensorBoard on a diagnostics step.", ge=0)]
    token_dump_every: Annotated[
        int,
        doc(
            "Updates between token dumps (tokens/step_000010.jsonl: every statistic of every token, top 5 of both "
            "models, what each rule would keep). 0: never.",
            ge=0,
        ),
    ]
    token_dump_rollouts: Annotated[Count, doc("How many of the update's rollouts, from the first, a token dump holds.")]


@strict
class Config:
    """A teacher-student pair and how it is trained."""

    student: StudentSection
    teacher: TeacherSection
    data: DataSection
    rollout: RolloutSection
    loss: LossSection
    optim: OptimSection
    engine: EngineSection
    eval: EvalSection
    checkpoint: CheckpointSection
    log: LogSection
    seed: Annotated[int, doc("Seed of data order, sampling and random rules.", ge=0, lt=2**31)]
    run_name: Annotated[
        str, doc("Name of the run's folder below output_dir.", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)
    ]
    output_dir: Annotated[PathText, doc("Folder that holds the run folders.")]

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir) / self.run_name


def load_config(
    path: str | Path,
    overrides: Iterable[str] = (),
    extensions: Mapping[str, type] | None = None,
    ignore_extensions: bool = False,
) -> tuple[Config, dict[str, Any]]:
    """Reads a pair file and applies `KEY=VALUE` overrides through the same typed checks.

    Args:
        path: the JSON file.
        overrides: texts such as `optim.lr=1e-6`; the value is JSON, else a string.
        extensions: optional sections by name, each a `strict` dataclass whose fields all have defaults.
        ignore_extensions: leaves sections alone that extensions read and this command does not.
    Returns:
        the configuration and one object per extension section (its defaults where the file has no such section).
    Raises:
        InputError: naming the JSON path, what was got, what was expected, and the nearest legal name.
    """
    extensions = extensions or {}
    values = read_json_object(path)
    values.pop("$schema", None)
    for text in overrides:
        _override(values, text)
    sections = {
        name: build(kind, _section(values.pop(name, {}), name, path), f"{path}: {name}")
        for name, kind in extensions.items()
    }
    for name in values.keys() - {field.name for field in fields(Config)}:
        if ignore_extensions:
            del values[name]
        elif isinstance(values[name], dict) and not difflib.get_close_matches(name, _leaf_names(Config), 1, 0.6):
            raise InputError(
                f"{path}: section {name[:80]!r} belongs to an extension of this trainer, and this command trains "
                "without it. Start the extension's own command, or remove the section."
            )
    config = build(Config, values, str(path))
    _check(config, str(path))
    return config, sections


def read_json_object(path: str | Path) -> dict[str, Any]:
    """Reads a JSON file that holds an object without repeated keys. Raises InputError naming file and place."""
    if not Path(path).exists():
        near = difflib.get_close_matches(str(path), [str(p) for p in Path(path).parent.glob("*.json")], 1, 0.5)
        raise InputError(f"{path}: no such file.{f' Did you mean {near[0]}?' if near else ''}")
    return _section(parse_json(read_text(path, "a JSON file"), str(path), "a JSON file"), "the file", path)


def _section(value: Any, name: str, path: str | Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{path}: {name} is {type(value).__name__}, expected an object {{...}}.")
    return value


def _override(values: dict[str, Any], text: str) -> None:
    key, equals, raw = text.partition("=")
    if not equals or not key:
        raise InputError(f"--set {text[:80]!r}: expected KEY=VALUE, for example --set optim.lr=1e-6.")
    try:
        value = parse_json(raw, f"--set {text[:80]!r}")
    except NotJson:
        value = raw
    *parents, name = key.split(".")
    node = values
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise InputError(
                f"--set {text[:80]!r}: {parent[:80]!r} is a value, not a section. See configs/schema.json."
            )
    node[name] = value


def build(kind: type, values: dict[str, Any], where: str) -> Any:
    """Builds a `strict` dataclass from plain JSON values. Raises InputError that lists every fault."""
    try:
        return TypeAdapter(kind).validate_json(json.dumps(values))
    except pydantic.ValidationError as error:
        raise InputError("\n".join(_explain(kind, fault, where) for fault in error.errors())) from None


def _explain(kind: type, fault: Any, where: str) -> str:
    path = [str(part) for part in fault["loc"]]
    name = ".".join(path)
    if fault["type"] in ("unexpected_keyword_argument", "missing"):
        legal = _leaf_names(kind)
        if fault["type"] == "missing":
            return f"{where}: {name[:200]} is missing. Every key must be there; see configs/schema.json."
        near = difflib.get_close_matches(name, legal, 1, 0.6) or [n for n in legal if n.endswith("." + path[-1])][:1]
        return f"{where}: {name[:200]} is not a known key.{f' Did you mean {near[0]}?' if near else ''}"
    got = json.dumps(fault["input"], default=str)
    message = fault["msg"].removeprefix("Value error, expected ")
    return f"{where}: {name} is {got[:200]}. Expected: {message[0].lower()}{message[1:]}."


def _leaf_names(kind: type, prefix: str = "") -> list[str]:
    names = []
    for field in fields(kind):
        names.append(prefix + field.name)
        if hasattr(field.type, "__dataclass_fields__"):
            names += _leaf_names(field.type, f"{prefix}{field.name}.")
    return names


def _check(config: Config, where: str) -> None:
    """Refuses combinations that have no meaning. Raises InputError."""
    rules = (*_schedule_rules(config), *_sampling_rules(config), *_evaluation_rules(config), *_engine_rules(config))
    for holds, text in rules:
        if not holds:
            raise InputError(f"{where}: {text}")
    for server in config.rollout.servers:
        address_of(server)


def _schedule_rules(config: Config) -> Iterator[tuple[bool, str]]:
    """(what must hold, what to say where it does not) of the length of a run and of its record."""
    optim, epochs = config.optim, config.data.epochs
    yield (
        (optim.steps is None) != (epochs is None),
        f"optim.steps is {optim.steps} and data.epochs is {epochs}: give one, set the other to null.",
    )
    yield (
        optim.steps is None or optim.warmup_steps < optim.steps,
        f"optim.warmup_steps is {optim.warmup_steps}, not below optim.steps = {optim.steps}.",
    )
    yield (
        config.log.samples == 0 or config.log.diagnostics_every > 0,
        f"log.samples is {config.log.samples}, but samples are written on diagnostics steps and log.diagnostics_every "
        "is 0.",
    )


def _sampling_rules(config: Config) -> Iterator[tuple[bool, str]]:
    """The same of how responses are sampled, and by what."""
    rollout = config.rollout
    yield (
        rollout.temperature == 0 or rollout.temperature >= COLDEST,
        f"rollout.temperature is {rollout.temperature}, expected 0 (greedy) or at least {COLDEST}.",
    )
    yield (
        rollout.temperature > 0 or rollout.n == 1,
        f"rollout.temperature is 0 and rollout.n is {rollout.n}: greedy responses to one prompt are all the same. Set "
        "rollout.n=1 or a temperature above 0.",
    )
    yield (
        rollout.temperature > 0 or rollout.top_p == 1,
        f"rollout.top_p is {rollout.top_p} with temperature 0: a greedy response has no nucleus. Set rollout.top_p=1.",
    )
    yield (
        rollout.engine == "vllm" or (not rollout.servers and rollout.tensor_parallel == 1),
        "rollout.engine is 'transformers', and servers and tensor_parallel are vLLM's. Set rollout.engine=vllm, or "
        "rollout.servers=[] and rollout.tensor_parallel=1.",
    )
    yield (
        len(set(rollout.servers)) == len(rollout.servers),
        f"rollout.servers names a server twice: {list(rollout.servers)}. One serves one process of a run.",
    )


def _evaluation_rules(config: Config) -> Iterator[tuple[bool, str]]:
    """The same of what is evaluated."""
    evaluation, data = config.eval, config.data
    yield (
        data.validation == 0 or data.answer_field is not None,
        f"data.validation is {data.validation} and data.answer_field is null: nothing to validate against.",
    )
    yield (
        len(set(evaluation.benchmarks)) == len(evaluation.benchmarks),
        f"eval.benchmarks names a benchmark twice: {list(evaluation.benchmarks)}.",
    )
    yield (
        not evaluation.k or len(evaluation.benchmarks) > 0,
        f"eval.k is {evaluation.k} without eval.benchmarks: name one, or set eval.k=null.",
    )


def _engine_rules(config: Config) -> Iterator[tuple[bool, str]]:
    """The same of where weights lie."""
    engine = config.engine
    yield (
        (engine.kind == "deepspeed") == (engine.deepspeed is not None),
        f"engine.kind is {engine.kind!r} and engine.deepspeed is {engine.deepspeed!r}: the file belongs to kind "
        '"deepspeed" and to it alone. For example --set engine.kind=deepspeed --set engine.deepspeed=zero2.',
    )
    yield (
        engine.kind == "deepspeed" or config.teacher.placement == "device",
        f"teacher.placement is {config.teacher.placement!r} and engine.kind is 'torch': weights are split or kept in "
        'host memory by ZeRO-3. Set engine.kind to "deepspeed", or teacher.placement to "device".',
    )
    yield (
        engine.kind == "torch" or engine.phases == 1,
        "engine.phases is 2 and engine.kind is 'deepspeed': there the weights wait in host memory with "
        "engine.deepspeed=zero2_offload or zero3_offload, and teacher.placement=host. Set engine.phases=1.",
    )


def schema(extensions: Mapping[str, type]) -> dict[str, Any]:
    """The JSON schema of a pair file with these optional extension sections."""
    result = TypeAdapter(Config).json_schema()
    for name, kind in extensions.items():
        section = TypeAdapter(kind).json_schema()
        result["$defs"].update(section.pop("$defs", {}))
        result["$defs"][kind.__name__] = section
        result["properties"][name] = {"$ref": f"#/$defs/{kind.__name__}"}
    result["properties"]["$schema"] = {"type": "string", "description": "This schema, for editors."}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **result}
