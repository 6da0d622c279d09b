"""Causal language models as this trainer sees them: a body that gives hidden states, and a head.

Any Hugging Face causal LM will do whose logits are soft_cap * tanh(scale * (h W^T + b) / soft_cap). That is not taken
on trust: on loading, the head found here is compared with the model's own logits, and a model that differs is refused.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from opd import distributed
from opd.batch import MicroBatch
from opd.cli import say
from opd.config import Config, StudentSection, TeacherSection
from opd.data import Prompt
from opd.errors import InputError, first_line
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
    """Owns the LM head's parameters beside the model, so that work on them can be called like a module.

    Under ZeRO-3 a parameter is whole only while a module that owns it runs, forward and backward; the fused loss runs
    outside of the model's own output layer, so it needs a module of its own. Elsewhere this only calls.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        layer = model.get_output_embeddings()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, hidden: Tensor, work: Callable[[Tensor], Any]) -> Any:
        return work(hidden)


def _call(work: Callable[[], Any]) -> Any:
    return work()


LARGEST = 1e30  # scale or soft cap of a head
HEAD_KEYS = ("logit_scale", "logits_scaling", "final_logit_softcapping")  # multiplier, divisor, soft cap of logits


@dataclass(frozen=True)
class LanguageModel:
    """A loaded model with what the trainer asks of it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    eos_ids: tuple[int, ...]  # every id that ends a response
    compute_dtype: torch.dtype  # autocast when it is not the weights' dtype
    name: str  # "student" or "teacher", for messages
    run: Callable[[Callable[[], Any]], Any] = _call  # whatever calls the model goes through it: DeepSpeed's forward
    sharded: bool = False  # ZeRO-3: every forward is a collective, so all ranks make the same number of them
    whole_head: Head | None = None  # of a sharded teacher: its LM head, kept whole
    head_scope: HeadScope = field(default=None)  # of the model; the one that DeepSpeed knows stays the same

    def __post_init__(self) -> None:
        if self.head_scope is None:
            object.__setattr__(self, "head_scope", HeadScope(self.model))

    def head(self, vocab_size: int) -> Head:
        """Its head, cut to the first ids. Of a sharded student only within a call of `head_scope`."""
        return (
            head_of(self.model, vocab_size)
            if self.whole_head is None
            else replace(self.whole_head, vocab_size=vocab_size)
        )

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def context(self) -> int | None:
        """Positions the model was made for, in tokens; None: unlimited."""
        return _text_values(self.model).get("max_position_embeddings")

    @contextmanager
    def precision(self) -> Iterator[None]:
        """Autocast to the compute dtype where the weights are kept in another one."""
        lower = self.compute_dtype != self.model.dtype
        with torch.autocast(self.device.type, self.compute_dtype, enabled=lower):
            yield

    def hidden_states(self, batch: MicroBatch, keep: Tensor) -> Tensor:
        """(K, H) states after the final norm that predict the kept response tokens; `keep` indexes the batch's N."""
        with self.precision():
            body = self.model.base_model(
                input_ids=batch.input_ids.to(self.device),
                attention_mask=batch.attention_mask.to(self.device),
                use_cache=False,
            ).last_hidden_state
        rows, columns = batch.rows[keep].to(self.device), batch.columns[keep].to(self.device)
        return body[rows, columns].to(self.compute_dtype)


def _text_values(model: PreTrainedModel) -> dict:
    """config.json of the language model, as a dictionary: which keys there are depends on the architecture."""
    return model.config.get_text_config().to_dict()


def head_of(model: PreTrainedModel, vocab_size: int) -> Head:
    """The head of a model, cut to the first `vocab_size` ids. Its tensors are the parameters themselves."""
    layer = model.get_output_embeddings()
    values = _text_values(model)
    multiplier, divisor, soft_cap = (values.get(name) for name in HEAD_KEYS)
    return Head(layer.weight, layer.bias, (multiplier or 1.0) / (divisor or 1.0), soft_cap, vocab_size)


def _check_head_keys(model: PreTrainedModel, where: str) -> None:
    """Refuses a scale or soft cap of the head that is no number. Raises InputError."""
    values = _text_values(model)
    for name in HEAD_KEYS:
        value = values.get(name)
        number = isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST < value < LARGEST
        if value is not None and not number:
            raise InputError(
                f"{where}: config.json has {name} = {repr(value)[:80]}, expected a number. Restore the file."
            )


def check_paths(config: Config) -> None:
    """What can be known of the two models without loading them. Raises InputError."""
    for name, section in (("student", config.student), ("teacher", config.teacher)):
        _check_folder(section, name)


def load(
    section: StudentSection | TeacherSection,
    device: torch.device,
    name: str,
    sharding: AbstractContextManager | None = None,
) -> LanguageModel:
    """Loads model and tokenizer of a config section: safetensors only, no remote code.

    The student's weights are float32 whatever its compute dtype; the teacher's are in its dtype and frozen. With
    `sharding` (of opd.engine) each process gets its part of the weights, which cannot run before an engine has them.
    Raises InputError when folder, weights, tokenizer or architecture are not usable.
    """
    where = f"{name}.path {section.path!r}"
    _check_folder(section, name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(section.path, revision=section.revision)
        model = _read_model(section, device, sharding)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # what a broken checkpoint raises depends on what is broken, and on its architecture
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
    lm = LanguageModel(model, tokenizer, _eos_ids(model, tokenizer, where), getattr(torch, section.dtype), name)
    if sharding is None:
        check_head(lm)
    return lm


def _read_model(
    section: StudentSection | TeacherSection, device: torch.device, sharding: AbstractContextManager | None
) -> PreTrainedModel:
    """The weights of a section on the device, or with `sharding` this process's part of them."""
    with sharding or nullcontext():
        model = AutoModelForCausalLM.from_pretrained(
            section.path,
            revision=section.revision,
            dtype=torch.float32 if isinstance(section, StudentSection) else getattr(torch, section.dtype),
            use_safetensors=True,
            attn_implementation=section.attn_implementation,
        )
    if sharding is None:
        return model.to(device)
    _restore_buffers(model, device)
    return model


def _check_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    section: StudentSection | TeacherSection,
    name: str,
) -> None:
    """Refuses what loads and cannot be trained or scored here. Raises InputError."""
    where = f"{name}.path {section.path!r}"
    if not tokenizer.chat_template:
        raise InputError(
            f"{where}: the tokenizer has no chat template, so a prompt cannot be formed. Use an instruction-tuned "
            "checkpoint, or put a chat_template.jinja beside its tokenizer."
        )
    if section.attn_implementation == "sdpa" and _text_values(model).get("attn_logit_softcapping"):
        raise InputError(
            f"{where}: its attention has a soft cap (attn_logit_softcapping), which sdpa leaves out without a word. "
            f"Set {name}.attn_implementation to 'eager' or 'flash_attention_2'."
        )
    _check_head_keys(model, where)
    if model.config.is_encoder_decoder:
        raise InputError(
            f"{where}: config.json has is_encoder_decoder, expected a decoder alone. Choose another model."
        )


def _restore_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Float32 buffers of a model that was made while DeepSpeed split it: it rounds them to the weights' dtype.

    In bfloat16 the frequencies of rotary positions are off by radians after some thousand tokens, without a word.
    Raises ValueError for another kind of buffer.
    """
    for name, module in model.named_modules():
        floats = [n for n, b in module.named_buffers(recurse=False) if b.is_floating_point()]
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
    """How many ids both models compare: those both tokenizers have; padded vocabulary rows beyond them are cut.

    Raises InputError where an id means different strings; extra ids at the end of one are said aloud.
    """
    ours, theirs = (_strings(m.tokenizer) for m in (student, teacher))
    size = min(len(ours), len(theirs))
    if min(student.eos_ids) >= size:
        raise InputError(
            f"the student's EOS ids {list(student.eos_ids)} are all beyond the {size} ids that both tokenizers have, "
            "so no response could end. Use the teacher's tokenizer for the student."
        )
    for i in range(size):
        if ours[i] != theirs[i]:
            raise InputError(
                f"student and teacher tokenizers differ: id {i} is {ours[i]!r} for the student and {theirs[i]!r} for "
                "the teacher. A token-level divergence needs one vocabulary; choose a pair of the same family."
            )
    if len(ours) != len(theirs):
        more = student if len(ours) > size else teacher
        say(
            f"note: the {more.name}'s tokenizer has {max(len(ours), len(theirs)) - size} ids more at its end; "
            f"they take no part in the divergence ({size} shared ids)"
        )
    for model in (student, teacher):
        rows = model.model.get_output_embeddings().out_features
        if rows < size:
            raise InputError(f"the {model.name}'s head has {rows} rows, fewer than the {size} ids of its tokenizer.")
    return size


def embeddable(lm: LanguageModel) -> int:
    """How many ids the model can read."""
    return lm.model.get_input_embeddings().num_embeddings


def sampled_vocabulary(lm: LanguageModel, reader: LanguageModel) -> int:
    """How many ids are sampled in an evaluation: all of the model's own, so that its accuracy does not depend on its
    partner, but for ids that the model which reads the responses could not embed."""
    return min(len(lm.tokenizer), embeddable(reader))


def check_prompt_ids(prompts: Sequence[Prompt], teacher: LanguageModel) -> None:
    """Refuses prompts with ids that only the student's tokenizer has. Raises InputError."""
    for prompt in prompts:
        if max(prompt.token_ids) >= embeddable(teacher):
            raise InputError(
                f"prompt {prompt.id} holds id {max(prompt.token_ids)}, beyond the {embeddable(teacher)} ids the "
                "teacher "
                "can read. The student's tokenizer or chat template uses tokens the teacher lacks; give both the same."
            )


def _strings(tokenizer: PreTrainedTokenizerBase) -> list[str | None]:
    by_id = {i: text for text, i in tokenizer.get_vocab().items()}
    return [by_id.get(i) for i in range(max(by_id) + 1)]


def _check_generation_config(model: PreTrainedModel, where: str) -> None:
    """Refuses what transformers reads and does not save: the run would end at its first checkpoint. Raises
    InputError."""
    try:
        model.generation_config.validate(strict=True)
    except (ValueError, TypeError) as error:  # TypeError: a value of another type, which it compares with a number
        fault = (str(error).splitlines()[1:2] or [str(error)])[0].removeprefix("- ")[:300]
        raise InputError(
            f"{where}: its generation_config.json cannot be saved again with a checkpoint ({fault}). Mend the file; "
            "the trainer itself takes nothing but the EOS ids from it."
        ) from None


def _eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, where: str) -> tuple[int, ...]:
    """Every id that ends a response. Raises InputError for what is no id, and when there is none."""
    eos_ids: set[int] = set()
    for value in (
        tokenizer.eos_token_id,
        model.config.get_text_config().eos_token_id,
        model.generation_config.eos_token_id,
    ):
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(type(i) is not int or i < 0 for i in ids):
            raise InputError(f"{where}: eos_token_id is {repr(value)[:80]}, expected a token id or a list of them.")
        eos_ids.update(ids)
    if not eos_ids:
        raise InputError(f"{where}: neither tokenizer, config.json nor generation_config.json names an EOS id.")
    return tuple(sorted(eos_ids))


def _check_folder(section: StudentSection | TeacherSection, name: str) -> None:
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
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(p.name for p in (*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")))
        raise InputError(
            f"{where}: no safetensors weights"
            + (
                f", only {pickles[0]}, a pickle, which can run code when read and is refused. Convert it with "
                "save_pretrained in an environment you trust."
                if pickles
                else ". Expected model.safetensors."
            )
        )


def _refuse_dropout(model: PreTrainedModel, where: str) -> None:
    """Scoring and the gradient must see the same student."""
    values = _text_values(model)
    for key in DROPOUT_KEYS:
        if values.get(key):
            raise InputError(
                f"{where}: config.json has {key} = {values[key]}, expected 0: with dropout the scored "
                "student is not the trained one. Set it to 0 in a copy of the checkpoint."
            )
    for module_name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and module.p > 0:
            raise InputError(f"{where}: module {module_name} has dropout {module.p}, expected 0.")


@torch.no_grad()
def check_head(lm: LanguageModel) -> None:
    """Compares the head found here with the model's own logits. Raises InputError when they differ."""
    vocab = min(lm.model.get_output_embeddings().out_features, len(lm.tokenizer))
    ids = (torch.arange(8) * 7919 % vocab)[None].to(lm.device)

    def both() -> tuple[Tensor, Tensor]:
        with lm.precision():
            own = lm.model(input_ids=ids, use_cache=False).logits[0, :, :vocab].float()
            states = lm.model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0].float()
        return own, lm.head_scope(states, lambda states: _logits(states, lm.head(vocab)))

    own, logits = lm.run(both)
    error = ((logits - own).norm() / own.norm()).item()
    if not error < (1e-4 if lm.compute_dtype == torch.float32 else 2e-2):
        raise InputError(
            f"{lm.name}.path {lm.model.name_or_path!r}: the logits of {type(lm.model).__name__} are not its final "
            f"states times its head (relative difference {error:.2g}), so divergences computed from hidden states "
            "would be wrong. Not supported."
        )


@torch.no_grad()
def sequence_logprobs(lm: LanguageModel, sequences: Sequence[Sequence[int]]) -> Tensor:
    """The model's logprobs of every token but the first of each sequence, given those before it.

    One sequence after the other, on the CPU, in nats. Every process calls it.
    """

    def logits_of(ids: Tensor) -> Tensor:
        with lm.precision():
            return lm.model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()

    parts = []
    for sequence in sequences:
        ids = torch.tensor(sequence, device=lm.device)
        logits_NV = lm.run(partial(logits_of, ids))
        parts.append(logits_NV.log_softmax(-1).gather(1, ids[1:, None])[:, 0].cpu())
    return torch.cat(parts)


def _logits(states: Tensor, head: Head) -> Tensor:
    logits = states @ head.weight[: head.size].float().T
    if head.bias is not None:
        logits += head.bias[: head.size].float()
    logits *= head.scale
    return logits if head.soft_cap is None else head.soft_cap * (logits / head.soft_cap).tanh()
