"""Causal language models as this trainer sees them: a body that gives hidden states, and a head.

The trainer takes every Hugging Face causal LM whose logits are soft_cap * tanh(scale * (h W^T + b) / soft_cap). After
loading it compares such logits with the model's own logits and refuses a model where they differ.

Shapes: N tokens, V vocabulary, H hidden size, K kept tokens, T positions.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.generic import is_flash_attention_requested

from opd import adapters, distributed
from opd.batch import MicroBatch, make_micro_batches
from opd.cli import say
from opd.config import StudentSection, TeacherSection
from opd.data import Prompt, Rollout
from opd.errors import InputError, first_line
from opd.files import read_text
from opd.loss import Head

DROPOUT_KEYS = (
    "attention_dropout",
    "hidden_dropout",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "dropout",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "activation_dropout",
    "residual_dropout",
)


class HeadScope(torch.nn.Module):
    """A module that owns the LM head's parameters beside the model and calls whatever works on them.

    Under ZeRO-3 a parameter is whole only while a module that owns it runs, forward and backward. The fused loss runs
    outside of the model's own output layer, so it needs this module. Without ZeRO-3 the module only makes the call.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        layer = model.get_output_embeddings()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, hidden: Tensor, work: Callable[[Tensor], Any]) -> Any:
        return work(hidden)


def _call(work: Callable[[], Any]) -> Any:
    return work()


ANY_LENGTH = 2**62  # stands for a row of whatever length
LARGEST = 1e30  # the largest scale or soft cap of a head that this trainer takes
HEAD_KEYS = ("logit_scale", "logits_scaling", "final_logit_softcapping")  # multiplier, divisor, soft cap of logits


@dataclass(frozen=True)
class LanguageModel:
    """A loaded model with its tokenizer, and how this trainer calls it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    eos_ids: tuple[int, ...]  # every id that ends a response
    compute_dtype: torch.dtype  # where the parameters have another dtype, autocast computes in this one
    name: str  # "student" or "teacher", for messages
    run: Callable[[Callable[[], Any]], Any] = _call  # every call of the model goes through it; an engine sets its own
    scope: Callable[[], AbstractContextManager] = nullcontext  # the model computes within it (opd.adapters.without)
    sharded: bool = False  # True under ZeRO-3: every forward is a collective, so all processes make equally many
    whole_head: Head | None = None  # the LM head of a sharded teacher, which stays whole on every process
    packed_row: int = 0  # tokens of the longest row in which it takes several sequences (opd.batch); 0: in none
    head_scope: HeadScope = field(default=None)  # made once, because DeepSpeed knows this object

    def __post_init__(self) -> None:
        if self.head_scope is None:
            object.__setattr__(self, "head_scope", HeadScope(self.model))

    def head(self, vocab_size: int) -> Head:
        """The head, cut to the first `vocab_size` ids. A sharded student has it only within a call of `head_scope`."""
        if self.whole_head is not None:
            return replace(self.whole_head, vocab_size=vocab_size)
        return head_of(self.model, vocab_size)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def context(self) -> int | None:
        """How many positions the model was made for, in tokens; None stands for no limit."""
        return _text_config(self.model).get("max_position_embeddings")

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Its scope, and autocast to the compute dtype where the parameters have another one."""
        differs = self.compute_dtype != self.model.dtype
        with self.scope(), torch.autocast(self.device.type, self.compute_dtype, enabled=differs):
            yield

    def hidden_states(self, batch: MicroBatch, keep: Tensor) -> Tensor:
        """The (K, H) hidden states after the final norm that predict the kept tokens, in the compute dtype.

        `keep` is (K,) int64 and picks from the micro-batch's N counted tokens.
        """
        with self.computing():
            hidden_BTH = self.model.base_model(**batch.inputs(self.device), use_cache=False).last_hidden_state
        rows_K, columns_K = batch.rows[keep].to(self.device), batch.columns[keep].to(self.device)
        return hidden_BTH[rows_K, columns_K].to(self.compute_dtype)


def _text_config(model: PreTrainedModel) -> dict:
    """The language model's part of config.json. It is a dictionary, because its keys depend on the architecture."""
    return model.config.get_text_config().to_dict()


def head_of(model: PreTrainedModel, vocab_size: int) -> Head:
    """The head of a model, cut to the first `vocab_size` ids. Its tensors are the parameters themselves."""
    layer = model.get_output_embeddings()
    config = _text_config(model)
    multiplier, divisor, soft_cap = (config.get(key) for key in HEAD_KEYS)
    return Head(layer.weight, layer.bias, (multiplier or 1.0) / (divisor or 1.0), soft_cap, vocab_size)


def _check_head_keys(model: PreTrainedModel, where: str) -> None:
    """Refuses a scale or soft cap of the head that is no number. Raises InputError."""
    config = _text_config(model)
    for key in HEAD_KEYS:
        value = config.get(key)
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST < value < LARGEST
        if value is not None and not is_number:
            raise InputError(
                f"{where}: config.json has {key} = {repr(value)[:80]}, expected a number. Restore the file."
            )


def load(
    section: StudentSection | TeacherSection,
    device: torch.device,
    name: str,
    sharding: AbstractContextManager | None = None,
) -> LanguageModel:
    """Loads the model and the tokenizer of a config section. It reads safetensors only and runs no remote code.

    The student's parameters are float32 for every compute dtype, except those beneath adapters, which are frozen in it.
    The teacher's are in its own dtype and frozen. A folder with adapters stands for the model that it names with them.

    Args:
        name: "student" or "teacher", for messages.
        sharding: context of opd.engine.deepspeed in which each process loads its part of the parameters. Such a model
            cannot run before an engine takes it over.
    Raises:
        InputError: the folder, the parameters, the tokenizer or the architecture cannot be used.
    """
    lm = _checked(section, name, lambda: _read_model(section, device, sharding))
    return tried(lm) if sharding is None else lm


def outline(section: StudentSection | TeacherSection, name: str) -> LanguageModel:
    """A model without its weights, on torch's meta device, with its tokenizer: what checks and plans need.

    Raises InputError as `load` does, except for what the weights alone show.
    """
    return _checked(section, name, lambda: _read_outline(section))


def _checked(section: StudentSection | TeacherSection, name: str, read: Callable[[], PreTrainedModel]) -> LanguageModel:
    """What `load` and `outline` have in common. Raises InputError for a model that cannot be used."""
    transformers.logging.disable_progress_bar()  # the console tells that models are loaded (opd.console)
    where = f"{name}.path {section.path!r}"
    _check_folder(section, name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(section.path, revision=section.revision)
        model = read()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a broken checkpoint can raise anything, depending on the fault and the architecture
        if isinstance(error, RuntimeError) and distributed.is_lost_connection(error):
            raise
        raise InputError(
            f"{where} does not load as a causal language model with its tokenizer: {first_line(error)} "
            "Expected a Hugging Face checkpoint in safetensors format whose architecture is part of transformers."
        ) from error
    _check_model(model, tokenizer, section, name)
    model.eval()
    if isinstance(section, TeacherSection):
        model.requires_grad_(False)
    else:
        _refuse_dropout(model, where)
        _check_generation_config(model, where)
    return LanguageModel(model, tokenizer, _eos_ids(model, tokenizer, where), getattr(torch, section.dtype), name)


def _read_outline(section: StudentSection | TeacherSection) -> PreTrainedModel:
    """The model of a section on torch's meta device, with the generation settings of its files."""
    section = adapters.beneath(section)
    config = AutoConfig.from_pretrained(section.path, revision=section.revision)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with suppress(OSError):  # a checkpoint need not have the file
        model.generation_config = GenerationConfig.from_pretrained(section.path, revision=section.revision)
    return model


def _read_model(
    section: StudentSection | TeacherSection, device: torch.device, sharding: AbstractContextManager | None
) -> PreTrainedModel:
    """The model of a section with its adapters on the device, or with `sharding` this process's part of it."""
    base = adapters.beneath(section)
    all_learn = isinstance(section, StudentSection) and section.lora is None and base is section
    with sharding or nullcontext():
        model = AutoModelForCausalLM.from_pretrained(
            base.path,
            revision=base.revision,
            dtype=torch.float32 if all_learn else getattr(torch, section.dtype),
            use_safetensors=True,
            attn_implementation=section.attn_implementation,
        )
    if base is not section:
        adapters.load(model, Path(section.path))
    if sharding is None:
        return model.to(device)
    _restore_buffers(model, device)
    return model


def _check_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, section: StudentSection | TeacherSection, name: str
) -> None:
    """Refuses a model that loads and that this trainer cannot use. Raises InputError."""
    where = f"{name}.path {section.path!r}"
    if isinstance(section, StudentSection):
        set_chat_template(tokenizer, section, where)
        if section.lora and not adapters.is_adapted(model):
            adapters.targets_of(model, section.lora, where)
    if section.attn_implementation == "sdpa" and _text_config(model).get("attn_logit_softcapping"):
        raise InputError(
            f"{where}: its attention has a soft cap (attn_logit_softcapping), which sdpa leaves out without a word. "
            f"Set {name}.attn_implementation to 'eager' or 'flash_attention_2'."
        )
    _check_head_keys(model, where)
    if model.config.is_encoder_decoder:
        raise InputError(
            f"{where}: config.json has is_encoder_decoder, expected a decoder alone. Choose another model."
        )


def read_chat_template(section: StudentSection) -> str | None:
    """The template that the student's section names; None stands for the tokenizer's own. Raises InputError."""
    if section.chat_template is None:
        return None
    expected = "a chat template in Jinja"
    template = read_text(section.chat_template, expected)
    if not template.strip():
        raise InputError(f"student.chat_template {section.chat_template}: the file is empty. Expected {expected}.")
    return template


def set_chat_template(tokenizer: PreTrainedTokenizerBase, section: StudentSection, where: str) -> None:
    """Gives a tokenizer that makes prompts the template that the student's section names, if it names one.

    Raises InputError that begins with `where` for a tokenizer that has no template in the end.
    """
    if template := read_chat_template(section):
        tokenizer.chat_template = template
    if not tokenizer.chat_template:
        raise InputError(
            f"{where}: the tokenizer has no chat template, so a prompt cannot be formed. Use an instruction-tuned "
            "checkpoint, or name a file with the template: student.chat_template."
        )


def _restore_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Computes float32 buffers anew, because DeepSpeed rounds them to the parameters' dtype while it splits a model.

    With bfloat16 frequencies the angles of rotary positions would be off by radians after some thousand tokens.
    Raises ValueError for a buffer of another kind.
    """
    for name, module in model.named_modules():
        floats = [n for n, buffer in module.named_buffers(recurse=False) if buffer.is_floating_point()]
        if not floats:
            continue
        if "inv_freq" not in floats:
            raise ValueError(
                f"its module {name} has the buffer {floats[0]}, which cannot be restored when weights are split"
            )
        fresh = type(module)(module.config)
        for n in floats:
            setattr(module, n, fresh.get_buffer(n).to(device))


def shared_vocabulary(student: LanguageModel, teacher: LanguageModel) -> int:
    """How many ids both models compare, from 0 on: those that both tokenizers have.

    Padded rows of a head beyond them are cut, and ids that only one tokenizer has at its end get a note on the console.
    Raises InputError where an id means different strings in the two tokenizers.
    """
    student_tokens, teacher_tokens = strings_of(student.tokenizer), strings_of(teacher.tokenizer)
    size = min(len(student_tokens), len(teacher_tokens))
    if min(student.eos_ids) >= size:
        raise InputError(
            f"the student's EOS ids {list(student.eos_ids)} are all beyond the {size} ids that both tokenizers have, "
            "so no response could end. Use the teacher's tokenizer for the student."
        )
    for i, (ours, theirs) in enumerate(zip(student_tokens, teacher_tokens, strict=False)):
        if ours != theirs:
            raise InputError(
                f"student and teacher tokenizers differ: id {i} is {ours!r} for the student and {theirs!r} for "
                "the teacher. A token-level divergence needs one vocabulary; choose a pair of the same family."
            )
    if extra := abs(len(student_tokens) - len(teacher_tokens)):
        longer = student if len(student_tokens) > size else teacher
        say(
            f"note: the {longer.name}'s tokenizer has {extra} ids more at its end; "
            f"they take no part in the divergence ({size} shared ids)"
        )
    for lm in (student, teacher):
        rows = lm.model.get_output_embeddings().out_features
        if rows < size:
            raise InputError(f"the {lm.name}'s head has {rows} rows, fewer than the {size} ids of its tokenizer.")
    return size


def _embeddable(lm: LanguageModel) -> int:
    """How many ids the model can read."""
    return lm.model.get_input_embeddings().num_embeddings


def sampled_vocabulary(lm: LanguageModel, reader: LanguageModel) -> int:
    """How many ids a model samples from in an evaluation: all of its own that `reader` can embed as well.

    The reader is the model that scores the responses. Its tokenizer does not matter, so the accuracy of a model does
    not depend on its partner.
    """
    return min(len(lm.tokenizer), _embeddable(reader))


def check_prompt_ids(prompts: Sequence[Prompt], teacher: LanguageModel) -> None:
    """Refuses prompts with ids that only the student's tokenizer has. Raises InputError."""
    readable = _embeddable(teacher)
    for prompt in prompts:
        if max(prompt.token_ids) >= readable:
            raise InputError(
                f"prompt {prompt.id} holds id {max(prompt.token_ids)}, beyond the {readable} ids the teacher can read. "
                "The student's tokenizer or chat template uses tokens the teacher lacks; give both the same."
            )


def strings_of(tokenizer: PreTrainedTokenizerBase) -> list[str | None]:
    """The string of every id; None for an id that has none."""
    by_id = {i: text for text, i in tokenizer.get_vocab().items()}
    return [by_id.get(i) for i in range(max(by_id) + 1)]


def _check_generation_config(model: PreTrainedModel, where: str) -> None:
    """Refuses settings that transformers reads and does not save, because they end a run at its first checkpoint.

    Raises InputError.
    """
    try:
        model.generation_config.validate(strict=True)
    except (ValueError, TypeError) as error:  # TypeError: transformers compares a value of a wrong type with a number
        fault = (str(error).splitlines()[1:2] or [str(error)])[0].removeprefix("- ")[:300]
        raise InputError(
            f"{where}: its generation_config.json cannot be saved again with a checkpoint ({fault}). Mend the file; "
            "the trainer itself takes nothing but the EOS ids from it."
        ) from None


def _eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, where: str) -> tuple[int, ...]:
    """Every id that ends a response. Raises InputError for a value that is no id, and when there is no id at all."""
    eos_ids: set[int] = set()
    for value in (
        tokenizer.eos_token_id,
        model.config.get_text_config().eos_token_id,
        model.generation_config.eos_token_id,
    ):
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(type(i) is not int or i < 0 for i in ids):
            raise InputError(f"{where}: eos_token_id is {repr(value)[:80]}, expected a token id or a list of them.")
        eos_ids.update(ids)
    if not eos_ids:
        raise InputError(f"{where}: neither tokenizer, config.json nor generation_config.json names an EOS id.")
    return tuple(sorted(eos_ids))


def _check_folder(section: StudentSection | TeacherSection, name: str) -> None:
    """Refuses a path that is neither a checkpoint folder in safetensors format nor a hub name. Raises InputError."""
    path, where = section.path, f"{name}.path {section.path!r}"
    folder = Path(path)
    if not folder.is_dir():
        if path.count("/") == 1 and not path.startswith((".", "~", "/")) and not folder.parent.is_dir():
            return  # a hub name, owner/model
        raise InputError(f"{where}: no such folder, and not a hub name (owner/model).")
    if section.revision is not None:
        raise InputError(
            f"{name}.revision is {section.revision[:80]!r} and {where} is a folder, which has no revisions. Set it to "
            "null, or name a hub repository."
        )
    if not (folder / "config.json").is_file():
        raise InputError(f"{where}: the folder has no config.json. Expected a Hugging Face checkpoint.")
    is_elsewhere = isinstance(section, TeacherSection) and section.mode == "server"
    if is_elsewhere or any(folder.glob("*.safetensors")):
        return
    pickles = sorted(file.name for kind in ("bin", "pt", "pth") for file in folder.glob(f"*.{kind}"))
    if pickles:
        raise InputError(
            f"{where}: no safetensors weights, only {pickles[0]}, a pickle, which can run code when read and is "
            "refused. Convert it with save_pretrained in an environment you trust."
        )
    raise InputError(f"{where}: no safetensors weights. Expected model.safetensors.")


def _refuse_dropout(model: PreTrainedModel, where: str) -> None:
    """Refuses dropout, because the scoring pass and the gradient must see the same student. Raises InputError."""
    config = _text_config(model)
    for key in DROPOUT_KEYS:
        if config.get(key):
            raise InputError(
                f"{where}: config.json has {key} = {config[key]}, expected 0: with dropout the scored "
                "student is not the trained one. Set it to 0 in a copy of the checkpoint."
            )
    for module_name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and module.p > 0:
            raise InputError(f"{where}: module {module_name} has dropout {module.p}, expected 0.")


def tried(lm: LanguageModel) -> LanguageModel:
    """A model that can run, with what running it shows: how it takes sequences that share a row.

    Raises InputError for a model whose head this trainer does not understand. Every process calls it.
    """
    _check_head(lm)
    return replace(lm, packed_row=packed_row_of(lm.model) if _tells_sequences_apart(lm) else 0)


def packed_row_of(model: PreTrainedModel) -> int:
    """Tokens of the longest row in which several sequences are worth their mask. The model needs no weights for it.

    Flash attention reads where sequences begin and computes nothing between them. The other kernels compute whole rows
    against themselves. At the length that is returned, this costs as much as the products with a layer's weights.
    """
    if is_flash_attention_requested(model.config):
        return ANY_LENGTH
    config, optional = model.config.get_text_config(), _text_config(model)
    hidden, heads = config.hidden_size, config.num_attention_heads
    intermediate = optional.get("intermediate_size") or 4 * hidden
    kv_heads, width = (
        optional.get("num_key_value_heads") or heads,
        heads * (optional.get("head_dim") or hidden // heads),
    )
    weights = 2 * hidden * width * (1 + kv_heads / heads) + 3 * hidden * intermediate
    return int(weights / (2 * width))


@torch.no_grad()
def _tells_sequences_apart(lm: LanguageModel) -> bool:
    """Whether sequences that share a row get the hidden states that they get in rows of their own.

    Some architectures carry states along a row, or ignore positions. So a few tokens are run both ways.
    """
    vocab_size = min(lm.model.get_output_embeddings().out_features, len(lm.tokenizer))
    numbers = tuple(i * 7919 % vocab_size for i in range(28))
    sequences = [numbers[:12], numbers[12:19], numbers[19:24], numbers[24:]]  # rows of 12, of 7 and 5, and of 4
    rollouts = [Rollout(i, Prompt("", ids[:1], None), ids[1:], "stop") for i, ids in enumerate(sequences)]
    (apart,), (shared,) = (make_micro_batches(rollouts, 1000, 0, "keep", row) for row in (0, ANY_LENGTH))
    every_token = torch.arange(len(apart.token_ids))
    try:
        apart_NH, shared_NH = (
            lm.run(partial(lm.hidden_states, batch, every_token)).double() for batch in (apart, shared)
        )
    except (TypeError, ValueError, RuntimeError):  # its forward takes no positions
        return False
    error = (shared_NH - apart_NH).norm(dim=1).max() / apart_NH.norm(dim=1).mean()
    return bool(error < (1e-4 if lm.compute_dtype == torch.float32 else 5e-2))


@torch.no_grad()
def _check_head(lm: LanguageModel) -> None:
    """Compares the logits of `head_of` with the model's own logits. Raises InputError when they differ."""
    vocab_size = min(lm.model.get_output_embeddings().out_features, len(lm.tokenizer))
    ids_1T = (torch.arange(8) * 7919 % vocab_size)[None].to(lm.device)

    def both_logits() -> tuple[Tensor, Tensor]:
        with lm.computing():
            expected_TV = lm.model(input_ids=ids_1T, use_cache=False).logits[0, :, :vocab_size].float()
            hidden_TH = lm.model.base_model(input_ids=ids_1T, use_cache=False).last_hidden_state[0].float()
        return expected_TV, lm.head_scope(hidden_TH, lambda hidden_TH: head_logits(hidden_TH, lm.head(vocab_size)))

    expected_TV, logits_TV = lm.run(both_logits)
    error = ((logits_TV - expected_TV).norm() / expected_TV.norm()).item()
    if not error < (1e-4 if lm.compute_dtype == torch.float32 else 2e-2):
        raise InputError(
            f"{lm.name}.path {lm.model.name_or_path!r}: the logits of {type(lm.model).__name__} are not its final "
            f"states times its head (relative difference {error:.2g}), so divergences computed from hidden states "
            "would be wrong. Not supported."
        )


@torch.no_grad()
def sequence_logprobs(lm: LanguageModel, sequences: Sequence[Sequence[int]]) -> Tensor:
    """The model's logprobs of every token but the first of each sequence, given the tokens before it.

    The result is (N,) float32 in nats on the CPU, one sequence after the other. Every process calls it.
    """

    def logits_of(ids_T: Tensor) -> Tensor:
        with lm.computing():
            return lm.model(input_ids=ids_T[None], use_cache=False).logits[0, :-1].float()

    parts = []
    for sequence in sequences:
        ids_T = torch.tensor(sequence, device=lm.device)
        logits_NV = lm.run(partial(logits_of, ids_T))
        parts.append(logits_NV.log_softmax(-1).gather(1, ids_T[1:, None])[:, 0].cpu())
    return torch.cat(parts)


def head_logits(hidden_NH: Tensor, head: Head) -> Tensor:
    """The (N, V) float32 logits of hidden states, written as in the docstring of opd.loss.Head."""
    logits_NV = hidden_NH @ head.weight[: head.size].float().T
    if head.bias is not None:
        logits_NV += head.bias[: head.size].float()
    logits_NV *= head.scale
    return logits_NV if head.soft_cap is None else head.soft_cap * (logits_NV / head.soft_cap).tanh()
