"""What the benchmarks train: random Qwen3 models of given sizes, prompts, and responses that end where they are told.

It needs torch and transformers alone, so that another trainer's environment can import it.
"""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

PAD, END = 0, 1  # token ids of the random models
SPECIAL = 2  # ids below it are PAD and END
EMBEDDED = Path("data/tiny/pairs/chain")


@dataclass(frozen=True)
class Shape:
    """The size of a Qwen3 model with tied embeddings."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int = 32_768
    positions: int = 32_768

    def config(self) -> Qwen3Config:
        return Qwen3Config(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=self.positions,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=END,
            pad_token_id=PAD,
        )

    def with_vocab(self, vocab: int) -> "Shape":
        return replace(self, vocab=vocab)


TOY_STUDENT, TOY_TEACHER = Shape(32, 64, 2, 2, 1, 16, 512), Shape(48, 96, 2, 2, 1, 16, 512)
MIDDLE_STUDENT, MIDDLE_TEACHER = Shape(512, 1536, 8, 8, 4, 64), Shape(768, 2304, 12, 12, 4, 64)  # 42 M and 108 M
QWEN3_06B, QWEN3_17B = (Shape(hidden, 3 * hidden, 28, 16, 8, 128, 151_936) for hidden in (1024, 2048))
PAIRS = {"toy": (TOY_STUDENT, TOY_TEACHER), "middle": (MIDDLE_STUDENT, MIDDLE_TEACHER)}


def random_model(
    shape: Shape, seed: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A model with random weights, made on the device itself; equal seeds give equal weights on one device."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = Qwen3ForCausalLM(shape.config()).eval().to(dtype)
    model.generation_config = GenerationConfig(eos_token_id=END, pad_token_id=PAD)
    return model


def word_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose words are the token ids themselves, so that a text and its ids are one another's image."""
    words = {"<pad>": PAD, "<end>": END} | {str(i): i for i in range(SPECIAL, vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


@dataclass(frozen=True)
class Material:
    """A pair in float32 on the CPU, and the prompts that it answers in every update."""

    student: PreTrainedModel
    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: list[str]

    def prompt_ids(self) -> list[tuple[int, ...]]:
        return [tuple(self.tokenizer(text)["input_ids"]) for text in self.prompts]


def material(setting: dict[str, Any]) -> Material:
    """What a setting of bench_step.py names, the same in every environment with the same torch.

    With `lengths` "natural" a random student ends its responses at lognormal lengths. The embedded one is trained and
    ends them by itself. With "equal" no response ends before the limit.
    """
    if setting["pair"] == "embedded":
        made = _embedded(setting["rollouts"])
    else:
        shapes = PAIRS[setting["pair"]]
        student, teacher = (random_model(shape, seed) for seed, shape in enumerate(shapes))
        prompts = classed_prompts(setting["rollouts"], setting["prompt_tokens"], shapes[0].vocab)
        texts = [" ".join(map(str, ids)) for ids in prompts]
        made = Material(student, teacher, word_tokenizer(shapes[0].vocab), texts)
    made.teacher.requires_grad_(False)
    if setting["lengths"] == "equal":
        made.student.register_forward_hook(NoEnd(made.student.generation_config.eos_token_id), with_kwargs=True)
    elif setting["pair"] != "embedded":
        lengths = lognormal_lengths(setting["rollouts"], setting["mean"])
        hook = Ends([setting["prompt_tokens"] + length for length in lengths], shapes[0].vocab)
        made.student.register_forward_hook(hook, with_kwargs=True)
    return made


def _embedded(count: int) -> Material:
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(EMBEDDED / name, dtype=torch.float32).eval()
        for name in ("student", "teacher")
    )
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "student")
    student.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    with open(EMBEDDED / "train.jsonl") as lines:
        problems = [json.loads(line)["problem"] for _, line in zip(range(count), lines, strict=False)]
    messages = [[{"role": "user", "content": problem}] for problem in problems]
    prompts = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return Material(student, teacher, tokenizer, prompts)


def lognormal_lengths(count: int, mean: float) -> list[int]:
    """Response lengths as real ones are spread: the quantiles of a lognormal of sigma 1, at most 8 times its mean."""
    normal = statistics.NormalDist(math.log(mean) - 0.5, 1)
    quantiles = [math.exp(normal.inv_cdf((i + 0.5) / count)) for i in range(count)]
    lengths = [max(1, round(min(length, 8 * mean))) for length in quantiles]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    return [lengths[i] for i in order]


def classed_prompts(count: int, tokens: int, vocab: int) -> list[tuple[int, ...]]:
    """Random prompts; the last id of prompt i is in class i of `Ends`."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(SPECIAL, vocab, (count, tokens), generator=g)
    ids[:, -1] = SPECIAL + torch.arange(count)
    return [tuple(row) for row in ids.tolist()]


class NoEnd:
    """A forward hook under which a model never ends a response."""

    def __init__(self, end_id: int):
        self.end_id = end_id

    def __call__(self, module: torch.nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if kwargs.get("use_cache"):  # it generates; TRL calls the model for its loss too
            output.logits[:, -1, self.end_id] = -torch.inf


class Ends:
    """A forward hook under which a random model ends each response after a prescribed number of tokens.

    It keeps no state, so it works with every way of batching, of dropping finished responses and of caching keys. All
    it sees is the last token and its position. Ids fall into as many classes as there are prompts. The model draws only
    ids of the class of the last token, so every token of a response tells which prompt it answers. The rollout costs
    what it costs without the hook, and the loss does not see the hook, because it reads hidden states and head.

    Args:
        totals: of every prompt, the tokens of prompt and response, END included.
    """

    def __init__(self, totals: Sequence[int], vocab: int):
        self.totals_C = torch.tensor(totals)
        classes_V = (torch.arange(vocab) - SPECIAL) % len(totals)
        self.other_CV = classes_V[None] != torch.arange(len(totals))[:, None]
        self.other_CV[:, :SPECIAL] = True

    def __call__(self, module: torch.nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if not kwargs.get("use_cache"):
            return
        classes_B = (kwargs["input_ids"][:, -1].to("cpu") - SPECIAL) % len(self.totals_C)
        is_last_B = kwargs["position_ids"][:, -1].to("cpu") >= self.totals_C[classes_B] - 2
        self._apply(output.logits[:, -1], classes_B, is_last_B)

    def _apply(self, logits_BV: Tensor, classes_B: Tensor, is_last_B: Tensor) -> None:
        device = logits_BV.device
        logits_BV.masked_fill_(self.other_CV[classes_B].to(device), -torch.inf)
        logits_BV[is_last_B.to(device)] = -torch.inf
        logits_BV[is_last_B.to(device), END] = 0.0
