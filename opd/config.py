"""The configuration: one JSON file per teacher-student pair, read into frozen dataclasses.

A file is complete, or extends a complete one and says what differs. A run records the resolved configuration. Every key
is required or has a default that is documented beside it, so that older files still run. A key is documented where it
is declared. `configs/schema.json` is generated from these declarations, so editors complete and explain the same text.
An extension of this trainer brings its own optional section as a dataclass whose fields all have defaults.

"Table 9" is the hyperparameter table of the TIP paper, arXiv 2604.14084.
"""

import difflib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass

from opd.arguments import address_of, path_fault
from opd.errors import InputError
from opd.files import NotJson, parse_json, read_text
from opd.words import in_our_words

strict = dataclass(frozen=True, kw_only=True, config=ConfigDict(strict=True, extra="forbid", allow_inf_nan=False))

DRAFT = "https://json-schema.org/draft/2020-12/schema"  # the version of JSON Schema that pydantic writes
SCHEMA_KEY = {"type": "string", "description": "This schema, for editors."}

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ("configs/", "data/")  # folders of the repository whose files are found from any working directory
Dtype = Literal["float32", "bfloat16"]
Attention = Literal["eager", "sdpa", "flash_attention_2"]
Text = Annotated[str, Field(min_length=1)]
MOST_THREADS = 1024  # more threads crash the libraries that start them


def _checked_path(text: str) -> str:
    if fault := path_fault(text):
        raise ValueError(f"expected a path, and this {fault}")
    return text


def located(text: str) -> str:
    """The path of a shipped file, such as configs/FILE.json, from a folder that has no such file itself.

    So commands and scripts find shipped files from any working directory. Any other text stays as it is.
    """
    is_shipped = text.startswith(SHIPPED) and not os.path.exists(text) and os.path.exists(ROOT / text)
    return str(ROOT / text) if is_shipped else text


PathText = Annotated[Text, AfterValidator(_checked_path)]  # a path to write
Source = Annotated[PathText, AfterValidator(located)]  # what is read: a path, or the name of something
MOST = 10**9  # the largest count: a larger one overflows the arrays that are made of it
Count = Annotated[int, Field(ge=1, le=MOST)]
MOST_SAMPLES = 100_000  # the most samples of one problem, and the most prompts of one update
COLDEST = 1e-3  # the lowest temperature above 0: a lower one overflows the scaled logits and samples as greedy does


def doc(text: str, **limits: Any) -> Any:
    """A key with its documentation and its limits, in pydantic's words: ge, gt, le, lt and so on.

    It is required, unless `default` is among them.
    """
    return Field(description=text, **limits)


@strict
class LoraSection:
    """Adapters that learn while the model itself stays frozen (opd/adapters.py)."""

    rank: Count = doc("Columns of an adapter's two matrices. 8 to 64 are usual; many facts to learn take more.")
    alpha: float = doc(
        "What an adapter computes is multiplied by alpha / rank. Schulman et al. used 32, and found the best optim.lr "
        "about ten times that of full fine-tuning at any rank (LoRA Without Regret, 2025).",
        gt=0,
    )
    targets: Annotated[list[Text], Field(min_length=1)] | Literal["all-linear"] = doc(
        'The kinds of linear layers that get adapters, such as "q_proj", or "all-linear": attention alone learned less '
        "than all of them (ibid.). The LM head and embeddings stay frozen."
    )


@strict
class StudentSection:
    """The model that samples and learns."""

    path: Source = doc("Folder of a Hugging Face checkpoint (safetensors), or a hub repository name.")
    revision: str | None = doc("Hub commit or tag; null for a folder or the default branch.")
    dtype: Dtype = doc(
        "Compute dtype. What learns, and the optimizer's moments, are always float32, because a bfloat16 parameter "
        "would not move at lr 1e-6."
    )
    attn_implementation: Attention = doc("Attention kernel of transformers.")
    chat_template: Source | None = doc(
        "File with the chat template, in Jinja, that makes prompts of messages, for a base model without one. "
        "Checkpoints hold it. null: the template of the model's tokenizer.",
        default=None,
    )
    lora: LoraSection | None = doc(
        "Adapters that learn in place of the parameters, which then have `dtype`. null: all parameters learn.",
        default=None,
    )


@strict
class TeacherSection:
    """The model that scores the student's tokens."""

    mode: Literal["local", "self", "server"] = doc(
        "Which model the teacher is. local: the model of `path`, in this process. self: the student itself, which as "
        "its teacher reads data.teacher_prompt (opd/teacher/self.py). server: the model of `path` in other processes, "
        "which send its hidden states (opd/teacher/served.py); here only its config.json and tokenizer are read."
    )
    path: Source | None = doc(
        "Folder of a Hugging Face checkpoint (safetensors), or a hub repository name. self: null."
    )
    servers: tuple[Text, ...] = doc(
        "Addresses HOST:PORT of teacher servers, which python -m opd.teacher_server starts. They share the "
        "micro-batches. local and self: empty.",
        default=(),
    )
    timeout: Count = doc(
        "Seconds that a teacher server may take for a micro-batch; then it counts as lost, and is connected to once "
        "more. local and self: not used.",
        default=600,
    )
    revision: str | None = doc("Hub commit or tag; null for a folder or the default branch. self: null.")
    weights: Literal["initial", "live", "ema"] | None = doc(
        "Which weights of the student a self teacher has. initial: those before update 1, frozen; live: the present "
        "ones, without a gradient; ema: their exponential moving average over the updates. local: null.",
        default=None,
    )
    decay: float | None = doc(
        "Share of itself that the average keeps in each update: a = decay a + (1 - decay) student. Without ema: null.",
        default=None,
        gt=0,
        lt=1,
    )
    dtype: Dtype = doc(
        "Dtype of the teacher's weights and arithmetic. live and ema: that of the student, whose weights are float32."
    )
    attn_implementation: Attention = doc("Attention kernel of transformers.")
    placement: Literal["device", "sharded", "host"] = doc(
        "Where its parameters lie. device: whole on every process's device; sharded: split over the processes by "
        "ZeRO-3, which gathers them layer by layer while the teacher runs; host: split likewise, in host memory. "
        "sharded and host need engine.kind deepspeed."
    )
    cache_gb: float | None = doc(
        "GiB of host memory, per process, for the teacher's hidden states of one update, which wait there for the "
        "student. States beyond it go to RUN/teacher_states/ on disk. With a GPU this memory is pinned, and torch "
        "rounds each micro-batch up to a power of two bytes. null: no limit.",
        ge=0,
        le=MOST,
    )


@strict
class EnvironmentSection:
    """What answers the student between its turns, and the limits of a conversation (opd/rollout/environment.py)."""

    name: str = doc(
        "The class, as package.module:Class. It is imported and runs in this process.",
        pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$",
        max_length=200,
    )
    settings: dict[str, Any] = doc("Keyword arguments of the class.")
    max_turns: Count = doc("A conversation is cut after so many turns of the model.")
    max_turn_tokens: Count = doc(
        "A turn is cut after so many tokens, and the conversation with it. A turn begins only where a whole one fits "
        "into max_response_tokens, which counts the tokens of both sides."
    )
    max_reply_tokens: Count = doc("A conversation is cut where a reply of the environment has more tokens.")


@strict
class TeacherPromptSection:
    """What only the teacher reads of a problem, beside the prompt of the student (opd/privileged.py)."""

    template: Text = doc(
        'The text, with fields of the row in braces: "Reference solution: {solution}". {{ and }} stand for braces.'
    )
    role: Literal["user", "system"] = doc(
        "user: the text is put behind the last message of the user. system: it is a system message, or is put behind "
        "the one that there is. Blanks and line breaks between them belong to the template."
    )
    missing: Literal["error", "drop", "plain"] = doc(
        "What happens to a row without one of the fields, or with an empty one. error: the run is refused, with file "
        "and line; drop: the row is left out, and counted; plain: the teacher reads the student's prompt, and the row "
        "is counted. Of a benchmark no row is left out: there drop is plain."
    )
    max_tokens: Count = doc(
        "Longer prompts of the teacher, in tokens, are not cut: their rows are dropped and counted, and so are those "
        "that do not fit into the teacher's context with a whole response. In a benchmark the teacher reads the "
        "student's prompt there."
    )


@strict
class DataSection:
    """Training prompts."""

    train: tuple[Source, ...] = doc(
        "Problems: .jsonl, .json, .csv and .parquet files, folders of them, and data sets of the Hugging Face hub as "
        "hub:OWNER/NAME[:CONFIG]@REVISION[/SPLIT]; several are mixed.",
        min_length=1,
    )
    validation: int = doc(
        "Number of prompts held out of the training data. The seed chooses them, and they are evaluated as benchmark "
        "`validation` with the decoding of the rollouts. 0: none.",
        ge=0,
    )
    prompt_field: Text = doc(
        "Field with the problem: a string, which is one user message, or a list of {role, content} messages."
    )
    answer_field: str | None = doc("Field with the reference answer, for `rollout/accuracy`; null: none.")
    answer_lines: bool | None = doc(
        "Whether, in a training response without a box, the last line that starts with Answer: gives the answer. null: "
        "as the benchmarks, where one of eval.benchmarks says so.",
        default=None,
    )
    system_prompt: str | None = doc("System message put before every prompt; null: none.")
    chat_template_args: dict[str, Any] = doc(
        'Extra arguments of the chat template, for example {"enable_thinking": false}.'
    )
    max_prompt_tokens: Count = doc("Longer prompts, in tokens, are dropped and counted. Table 9: 2048.")
    shuffle: bool = doc("true: a new order of the prompts in every epoch, from the seed. false: file order.")
    epochs: Count | None = doc(
        "Passes over the prompts; null when optim.steps is given. Public reruns of the paper: 1."
    )
    environment: EnvironmentSection | None = doc(
        "What answers the student between its turns, such as tools; null: a response is one turn.", default=None
    )
    teacher_prompt: TeacherPromptSection | None = doc(
        "What only the teacher reads, such as a reference solution; null: it reads the student's prompt.", default=None
    )


@strict
class ScorerSection:
    """Code that scores the tokens of rollouts for a weighter (opd.scorer). It runs in the processes of the run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")] = doc(
        "The class, as package.module:Class; Python must find the module."
    )
    settings: dict[str, Any] = doc("Keyword arguments of the class.", default_factory=dict)


@strict
class RolloutSection:
    """Sampling of responses from the student."""

    engine: Literal["transformers", "vllm"] = doc(
        "What generates the responses. vllm: runs in processes of its own, which get the student's parameters after "
        "every update."
    )
    servers: tuple[Text, ...] = doc(
        "Addresses HOST:PORT of vLLM servers, which python -m opd.vllm_server starts. Empty: a vLLM starts beside each "
        "process, on its device, and sleeps during the update. transformers: empty."
    )
    tensor_parallel: Count = doc(
        "Number of GPUs that share one vLLM; with DeepSpeed that many processes have one vLLM together. "
        "transformers: 1."
    )
    gpu_memory: float = doc(
        "Share of the GPU's memory that vLLM may take for weights and cache. transformers: not used.", gt=0, lt=1
    )
    timeout: Count = doc(
        "Seconds without a sign of life, such as a token, after which vLLM counts as lost and is started once more. "
        "transformers: not used."
    )
    parity_every: Count = doc(
        "Updates between comparisons of vLLM's logprobs with the trainer's. A difference ends the run. The first "
        "comparison comes before the first update. transformers: not used."
    )
    prompts_per_step: int = doc("Prompts of one update. Table 9: 8.", ge=1, le=MOST_SAMPLES)
    n: int = doc("Responses per prompt. Table 9: 16.", ge=1, le=MOST_SAMPLES)
    batch_size: Count = doc("Responses a process generates together. It bounds the key/value cache and not the result.")
    temperature: float = doc("Sampling temperature; 0 is greedy. Table 9: 1.0.", ge=0)
    top_p: float = doc("Nucleus: smallest set of tokens with this probability. Table 9: 1.0.", gt=0, le=1)
    max_response_tokens: Count = doc(
        "A response is cut after this many tokens, those of an environment included. Table 9: 8192."
    )
    truncated: Literal["keep", "drop", "mask_tail"] = doc(
        "Which tokens of a cut response count. keep: all; drop: none; mask_tail: all but an end that repeats itself at "
        "least three times, whose first round counts."
    )
    scorer: ScorerSection | None = doc(
        "What gives weighters further columns about tokens, such as process rewards. null: nothing does.", default=None
    )


@strict
class LossSection:
    """Divergence between student and teacher at every response token, over the whole vocabulary, at temperature 1."""

    divergence: Literal["reverse_kl", "forward_kl", "jsd", "total_variation"] = doc(
        "reverse_kl: KL(student || teacher), the paper's loss; forward_kl: KL(teacher || student); jsd: JSD_beta; "
        "total_variation: 1/2 sum |p_S - p_T|, which is how often speculative decoding rejects a drafted token."
    )
    jsd_beta: float = doc(
        "beta of JSD_beta = beta KL(p_T || m) + (1 - beta) KL(p_S || m), m = beta p_T + (1 - beta) p_S.", gt=0, lt=1
    )
    chunk_bytes: int = doc(
        "Transient memory of the loss in bytes. It bounds how many tokens are projected at once, and not the result.",
        ge=2**16,
    )


@strict
class OptimSection:
    """AdamW. Weight decay applies to matrices only, and not to norms and biases."""

    lr: float = doc("Peak learning rate. Table 9: 1e-6 (Qwen), 3e-7 (Llama).", gt=0)
    schedule: Literal["constant", "cosine"] = doc("After warm-up: constant, or cosine to 0. Table 9: cosine.")
    warmup_steps: int = doc("Updates of linear warm-up. Not stated in the paper; public reruns: 0.", ge=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = doc(
        "Adam's decay rates of the two moments."
    )
    weight_decay: float = doc("Decoupled weight decay. Not stated in the paper; public reruns: 0.1.", ge=0)
    grad_clip: float = doc("L2 norm the gradient is clipped to. Not stated; public reruns: 1.0.", gt=0)
    steps: Count | None = doc("Number of updates; null when data.epochs is given.")
    micro_batch_tokens: Count = doc(
        "Tokens of prompts and responses in one forward pass, padding included; one rollout always fits. It bounds "
        "memory and not the result."
    )


@strict
class EngineSection:
    """The engine holds the student's parameters and applies the update."""

    kind: Literal["torch", "deepspeed"] = doc(
        "torch: one process, one device. deepspeed: one process per GPU, started by opd.launch, torchrun or deepspeed."
    )
    deepspeed: Source | None = doc(
        "Name of configs/deepspeed/NAME.json, or path of such a file: ZeRO stage and offload. null with kind torch. "
        "It holds no setting that the pair file decides: optimizer, schedule, clipping, dtype or batch."
    )
    phases: Literal[1, 2] = doc(
        "2: teacher, student and vLLM take turns on the device and wait in host memory, so they need not fit together "
        "(opd/phases.py). 1: they stay, and only vLLM sleeps. It does not change the result. With deepspeed: 1, "
        "because its own files offload."
    )
    device: Literal["auto", "cpu", "cuda"] = doc("auto: cuda when there is one, else cpu.")
    cpu_threads: Annotated[int, Field(ge=1, le=MOST_THREADS)] | None = doc(
        "Threads of CPU arithmetic; null: torch's choice. Take 1 for models of a few million parameters, because more "
        "threads slow their kernels down."
    )
    gradient_checkpointing: bool = doc("Recompute activations in the backward pass, for less memory and more time.")


@strict
class EvalSection:
    """Held-out accuracy of the step-0 student, the teacher, and the student in training and at the end."""

    benchmarks: tuple[Source, ...] = doc("Names of configs/benchmarks/NAME.json, or paths of such files.")
    k: int | None = doc("Samples per problem, instead of each benchmark's own k; null: its own.", ge=0, le=MOST_SAMPLES)
    every: int = doc("Evaluate every so many updates as well; 0: only before and after.", ge=0)
    reverse_kl: bool = doc(
        "Also measure KL(student || teacher) on the sampled responses, or on the greedy ones where there are no "
        "samples, in nats per token, and how often the teacher would accept the student's tokens as drafts in "
        "speculative decoding. Costs a pass of each model."
    )
    reverse_kl_samples: Annotated[int, Field(ge=1, le=MOST_SAMPLES)] | None = doc(
        "On how many of the k samples of a problem eval.reverse_kl is measured; null: on all.", default=None
    )
    batch_size: Count | None = doc(
        "Responses a process generates together in an evaluation. It bounds the key/value cache and not the result. "
        "vLLM: at most rollout.batch_size together. null: rollout.batch_size.",
        default=None,
    )
    limit: Count | None = doc("Only the first problems of each benchmark; null: all.")


@strict
class CheckpointSection:
    """Whole checkpoints: the student in Hugging Face format, and the optimizer."""

    every: int = doc("Save every so many updates; the last update is always saved. 0: only the last.", ge=0)
    keep: Count = doc("How many of the newest checkpoints stay on disk.")


@strict
class LogSection:
    """Where metrics are shown, and diagnostics beyond those of every step."""

    to: tuple[Literal["tensorboard", "wandb"], ...] = doc(
        "Boards that show the metrics. tensorboard: files in RUN/tensorboard. wandb: Weights & Biases, with your "
        "login; with WANDB_MODE=offline its files stay in RUN/wandb. metrics.jsonl holds the same numbers in any case.",
        default=("tensorboard",),
    )
    diagnostics_every: int = doc(
        "Updates between diagnostics: entropies, divergences, quadrants. They cost a scoring pass where the rule needs "
        "none. 0: never.",
        ge=0,
    )
    samples: int = doc("Rollouts written as text to the boards on a diagnostics step.", ge=0)
    token_dump_every: int = doc(
        "Updates between token dumps. A dump tokens/step_000010.jsonl holds every statistic of every token, the top 5 "
        "of both models, and what each rule would keep. 0: never.",
        ge=0,
    )
    token_dump_rollouts: Count = doc("How many rollouts of the update, from the first, a token dump holds.")


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
    # Annotated, because pydantic lists fields with a doc() value before those without one.
    seed: Annotated[int, doc("Seed of data order, sampling and random rules.", ge=0, lt=2**31)]
    run_name: Annotated[
        str, doc("Name of the run's folder below output_dir.", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)
    ]
    output_dir: Annotated[PathText, doc("Folder that holds the run folders.")]

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir) / self.run_name

    @property
    def teacher_model(self) -> TeacherSection:
        """The teacher's section with the model that it starts from, which in mode self is the student's."""
        if self.teacher.mode == "self":
            return replace(self.teacher, path=self.student.path, revision=self.student.revision)
        return self.teacher

    @property
    def teacher_is_student(self) -> bool:
        """Whether student and teacher are one model in memory: the student as it is, or beneath its adapters."""
        student, teacher = self.student, self.teacher
        alike = (teacher.dtype, teacher.attn_implementation) == (student.dtype, student.attn_implementation)
        beneath = teacher.weights == "initial" and student.lora is not None and teacher.placement == "device"
        return teacher.weights == "live" or (beneath and alike)

    @property
    def evaluation_batch(self) -> int:
        """Responses that a process generates together in an evaluation."""
        return self.eval.batch_size or self.rollout.batch_size


def load_config(
    path: str | Path,
    overrides: Iterable[str] = (),
    extensions: Mapping[str, type] | None = None,
    ignore_extensions: bool = False,
) -> tuple[Config, dict[str, Any]]:
    """Reads a pair file and applies `KEY=VALUE` overrides through the same typed checks.

    Args:
        path: the JSON file.
        overrides: texts such as `optim.lr=1e-6`; a value that is not JSON is a string.
        extensions: optional sections by name, each a `strict` dataclass whose fields all have defaults.
        ignore_extensions: True for a command that works on files of every extension and reads none of their sections.
    Returns:
        the configuration and one object per extension section, which has its defaults where the file lacks the section.
    Raises:
        InputError: it names the JSON path, what was got, what was expected, and the nearest legal name.
    """
    tree, where = read_pair(path)
    for text in overrides:
        _override(tree, text)
    sections = {
        name: build(kind, _object(tree.pop(name, {}), name, where), f"{where}: {name}")
        for name, kind in (extensions or {}).items()
    }
    for name in tree.keys() - {field.name for field in fields(Config)}:
        if ignore_extensions:
            del tree[name]
        elif (
            isinstance(tree[name], dict)
            and not in_our_words(name)
            and not difflib.get_close_matches(name, _leaf_names(Config), 1, 0.6)
        ):
            raise InputError(
                f"{where}: section {name[:80]!r} belongs to an extension of this trainer, and this command trains "
                "without it. Start the extension's own command, or remove the section."
            )
    config = build(Config, tree, where)
    for fault in _faults(config):
        raise InputError(f"{where}: {fault}")
    for server in (*config.rollout.servers, *config.teacher.servers):
        address_of(server)
    return config, sections


def read_pair(path: str | Path) -> tuple[dict[str, Any], str]:
    """The sections of a pair file, over those of the files that it extends, and the files' names for messages.

    A file names the one that it extends by a path that starts in its own folder. A key of a section replaces the same
    key beneath it as a whole. Raises InputError that names all files down to the faulty one.
    """
    tree: dict[str, Any] = {}
    place = Path(located(str(path)))
    where, seen = str(place), set()
    while place.resolve() not in seen:
        seen.add(place.resolve())
        try:
            content = read_json_object(place)
        except InputError as error:
            raise InputError(f"{where.removesuffix(str(place))}{error}") from None
        content.pop("$schema", None)
        is_last, base = "extends" not in content, content.pop("extends", "")
        tree = _merged(content, tree)
        if is_last:
            return tree, where
        if not isinstance(base, str) or path_fault(base):
            raise InputError(f"{where}: extends is {json.dumps(base)[:80]}, expected the path of a pair file.")
        place = place.parent / base
        where = f"{where}, which extends {place}"
    raise InputError(f"{where}: the files extend each other in a circle. Remove `extends` from one of them.")


def _merged(beneath: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """The content of a file with the keys of another one over it, section by section."""
    both = {k for k in beneath.keys() & above.keys() if isinstance(beneath[k], dict) and isinstance(above[k], dict)}
    return beneath | above | {name: beneath[name] | above[name] for name in both}


def read_json_object(path: str | Path) -> dict[str, Any]:
    """Reads a JSON file that holds an object without repeated keys. Raises InputError that names file and place."""
    if not Path(path).exists():
        near = difflib.get_close_matches(str(path), [str(p) for p in Path(path).parent.glob("*.json")], 1, 0.5)
        raise InputError(f"{path}: no such file.{f' Did you mean {near[0]}?' if near else ''}")
    return _object(parse_json(read_text(path, "a JSON file"), str(path), "a JSON file"), "the file", path)


def _object(value: Any, name: str, path: str | Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{path}: {name} is {type(value).__name__}, expected an object {{...}}.")
    return value


def _override(tree: dict[str, Any], text: str) -> None:
    """Sets one key of the nested dictionaries that a pair file was read into. Raises InputError."""
    key, equals, raw = text.partition("=")
    if not equals or not key:
        raise InputError(f"--set {text[:80]!r}: expected KEY=VALUE, for example --set optim.lr=1e-6.")
    try:
        value = parse_json(raw, f"--set {text[:80]!r}")
    except NotJson:
        value = raw
    *parents, name = key.split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise InputError(
                f"--set {text[:80]!r}: {parent[:80]!r} is a value, not a section. See configs/schema.json."
            )
    node[name] = value


def build(kind: type, tree: dict[str, Any], where: str) -> Any:
    """Builds a `strict` dataclass from an object as JSON gives it. Raises InputError that lists every fault."""
    try:
        return TypeAdapter(kind).validate_json(json.dumps(tree))
    except pydantic.ValidationError as error:
        raise InputError("\n".join(_explain(kind, fault, where) for fault in error.errors())) from None


def _explain(kind: type, fault: Any, where: str) -> str:
    """The message about one fault that pydantic reports."""
    path = [str(part) for part in fault["loc"]]
    name = ".".join(path)
    if fault["type"] in ("unexpected_keyword_argument", "missing"):
        legal = _leaf_names(kind)
        if fault["type"] == "missing":
            return f"{where}: {name[:200]} is missing. Every key must be there; see configs/schema.json."
        if ours := in_our_words(name):
            return f"{where}: {name[:200]} is not a known key: {ours}."
        near = difflib.get_close_matches(name, legal, 1, 0.6) or [n for n in legal if n.endswith("." + path[-1])][:1]
        return f"{where}: {name[:200]} is not a known key.{f' Did you mean {near[0]}?' if near else ''}"
    got = json.dumps(fault["input"], default=str)
    message = fault["msg"].removeprefix("Value error, expected ")
    return f"{where}: {name} is {got[:200]}. Expected: {message[0].lower()}{message[1:]}."


def _leaf_names(kind: type, prefix: str = "") -> list[str]:
    """The names of all keys and sections, written with dots."""
    names = []
    for field in fields(kind):
        names.append(prefix + field.name)
        if hasattr(field.type, "__dataclass_fields__"):
            names += _leaf_names(field.type, f"{prefix}{field.name}.")
    return names


def _faults(config: Config) -> Iterator[str]:
    """Combinations of settings that have no meaning, each as a message."""
    yield from _schedule_faults(config)
    yield from _sampling_faults(config.rollout)
    yield from environment_faults(config.data.environment, config.rollout.max_response_tokens, "rollout")
    yield from _evaluation_faults(config)
    yield from _engine_faults(config)
    yield from _server_faults(config.teacher)
    yield from _self_faults(config) if config.teacher.mode == "self" else _teacher_faults(config)


def _schedule_faults(config: Config) -> Iterator[str]:
    optim, epochs = config.optim, config.data.epochs
    if (optim.steps is None) == (epochs is None):
        yield f"optim.steps is {optim.steps} and data.epochs is {epochs}: give one, set the other to null."
    if optim.steps is not None and optim.warmup_steps >= optim.steps:
        yield f"optim.warmup_steps is {optim.warmup_steps}, not below optim.steps = {optim.steps}."
    if len(set(config.log.to)) < len(config.log.to):
        yield f"log.to names a board twice: {list(config.log.to)}."
    if config.log.samples > 0 and config.log.diagnostics_every == 0:
        yield (
            f"log.samples is {config.log.samples}, but samples are written on diagnostics steps and "
            "log.diagnostics_every is 0."
        )


def _sampling_faults(rollout: RolloutSection) -> Iterator[str]:
    if 0 < rollout.temperature < COLDEST:
        yield f"rollout.temperature is {rollout.temperature}, expected 0 (greedy) or at least {COLDEST}."
    if rollout.temperature == 0 and rollout.n > 1:
        yield (
            f"rollout.temperature is 0 and rollout.n is {rollout.n}: greedy responses to one prompt are all the same. "
            "Set rollout.n=1 or a temperature above 0."
        )
    if rollout.temperature == 0 and rollout.top_p < 1:
        yield (
            f"rollout.top_p is {rollout.top_p} with temperature 0: a greedy response has no nucleus. Set "
            "rollout.top_p=1."
        )
    if rollout.engine == "transformers" and (rollout.servers or rollout.tensor_parallel > 1):
        yield (
            "rollout.engine is 'transformers', and servers and tensor_parallel are vLLM's. Set rollout.engine=vllm, or "
            "rollout.servers=[] and rollout.tensor_parallel=1."
        )
    if len(set(rollout.servers)) < len(rollout.servers):
        yield f"rollout.servers names a server twice: {list(rollout.servers)}. One serves one process of a run."


def environment_faults(environment: EnvironmentSection | None, most: int, owner: str) -> Iterator[str]:
    """Limits of an environment with which no conversation begins, for responses of at most so many tokens."""
    if environment is not None and environment.max_turn_tokens > most:
        yield (
            f"environment.max_turn_tokens is {environment.max_turn_tokens}, more than the {most} of {owner}."
            "max_response_tokens: no turn would fit. Lower it, or raise the other."
        )


def _evaluation_faults(config: Config) -> Iterator[str]:
    data, benchmarks = config.data, config.eval.benchmarks
    if data.validation > 0 and data.answer_field is None and data.environment is None:
        yield f"data.validation is {data.validation} and data.answer_field is null: nothing to validate against."
    if len(set(benchmarks)) < len(benchmarks):
        yield f"eval.benchmarks names a benchmark twice: {list(benchmarks)}."
    if config.eval.k and not benchmarks:
        yield f"eval.k is {config.eval.k} without eval.benchmarks: name one, or set eval.k=null."


def _engine_faults(config: Config) -> Iterator[str]:
    engine = config.engine
    if (engine.kind == "deepspeed") != (engine.deepspeed is not None):
        yield (
            f"engine.kind is {engine.kind!r} and engine.deepspeed is {engine.deepspeed!r}: the file belongs to kind "
            '"deepspeed" and to it alone. For example --set engine.kind=deepspeed --set engine.deepspeed=zero2.'
        )
    if engine.kind == "torch" and config.teacher.placement != "device":
        yield (
            f"teacher.placement is {config.teacher.placement!r} and engine.kind is 'torch': weights are split or kept "
            'in host memory by ZeRO-3. Set engine.kind to "deepspeed", or teacher.placement to "device".'
        )
    if engine.kind == "deepspeed" and engine.phases == 2:
        yield (
            "engine.phases is 2 and engine.kind is 'deepspeed': there the weights wait in host memory with "
            "engine.deepspeed=zero2_offload or zero3_offload, and teacher.placement=host. Set engine.phases=1."
        )


def _teacher_faults(config: Config) -> Iterator[str]:
    teacher = config.teacher
    if teacher.path is None:
        yield f'teacher.path is null and teacher.mode is "{teacher.mode}": name a model, or set teacher.mode=self.'
    for key, value in (("weights", teacher.weights), ("decay", teacher.decay)):
        if value is not None:
            yield f'teacher.{key} is {json.dumps(value)}, and it belongs to teacher.mode "self". Set it to null.'


def _server_faults(teacher: TeacherSection) -> Iterator[str]:
    if teacher.mode == "server" and not teacher.servers:
        yield (
            'teacher.servers is [] and teacher.mode is "server": name the address of one, for example --set '
            "'teacher.servers=[\"10.0.0.2:8600\"]'."
        )
    if teacher.mode != "server" and teacher.servers:
        yield (
            f'teacher.servers is {json.dumps(list(teacher.servers))} and teacher.mode is "{teacher.mode}": set '
            "teacher.mode=server, or teacher.servers=[]."
        )
    if len(set(teacher.servers)) < len(teacher.servers):
        yield f"teacher.servers names a server twice: {list(teacher.servers)}."


def _self_faults(config: Config) -> Iterator[str]:
    """Settings with which a student cannot teach itself."""
    student, teacher = config.student, config.teacher
    for key, value in (("path", teacher.path), ("revision", teacher.revision)):
        if value is not None:
            yield (
                f'teacher.{key} is {value!r} and teacher.mode is "self": the teacher is the student of student.path. '
                f"Set teacher.{key}=null, or teacher.mode=local."
            )
    if teacher.weights is None:
        yield 'teacher.weights is null and teacher.mode is "self": expected "initial", "live" or "ema".'
    if (teacher.weights == "ema") != (teacher.decay is not None):
        yield (
            f"teacher.weights is {json.dumps(teacher.weights)} and teacher.decay is {json.dumps(teacher.decay)}: the "
            "decay belongs to ema and to it alone. For example --set teacher.weights=ema --set teacher.decay=0.98."
        )
    if teacher.weights == "ema" and student.lora:
        yield (
            'teacher.weights is "ema" and student.lora is set: the average is of whole models. Set teacher.weights to '
            '"initial", which is the model beneath the adapters, or to "live".'
        )
    if config.data.teacher_prompt is None:
        yield (
            'teacher.mode is "self" and data.teacher_prompt is null: student and teacher would be one model that reads '
            "one prompt, so the loss would be 0. Set data.teacher_prompt."
        )
    if teacher.weights not in ("live", "ema"):
        return
    for key, ours, theirs in (
        ("dtype", teacher.dtype, student.dtype),
        ("attn_implementation", teacher.attn_implementation, student.attn_implementation),
    ):
        if ours != theirs:
            yield (
                f"teacher.{key} is {ours!r} and student.{key} is {theirs!r}: with teacher.weights {teacher.weights!r} "
                "the teacher computes as the student does. Set both alike."
            )
    if teacher.placement != "device":
        yield (
            f"teacher.placement is {teacher.placement!r}: with teacher.weights {teacher.weights!r} the teacher lies "
            "where the student does. Set teacher.placement=device."
        )


def schema(extensions: Mapping[str, type]) -> dict[str, Any]:
    """The JSON schema of a pair file with these optional extension sections."""
    result = TypeAdapter(Config).json_schema()
    complete: dict[str, Any] = {"required": result.pop("required"), "properties": {}}
    for name, key in result["properties"].items():
        if "$ref" in key:
            section = result["$defs"][key["$ref"].rpartition("/")[2]]
            complete["properties"][name] = {"required": section.pop("required")}
    result |= {"if": {"not": {"required": ["extends"]}}, "then": complete}
    for name, kind in extensions.items():
        section = TypeAdapter(kind).json_schema()
        result["$defs"].update(section.pop("$defs", {}))
        result["$defs"][kind.__name__] = section
        result["properties"][name] = {"$ref": f"#/$defs/{kind.__name__}"}
    result["properties"]["$schema"] = SCHEMA_KEY
    result["properties"]["extends"] = {
        "type": "string",
        "description": "Path of a pair file, from the folder of this file, which holds the keys that differ from it.",
    }
    return {"$schema": DRAFT, **result}
