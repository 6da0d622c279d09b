"""Training and evaluation, unchanged, on real architectures, real tokenizers and real problem texts.

The texts are MATH-500 and GSM8K, in the folder named by OPD_TEST_DATA; without it these tests are skipped, aloud.
Models are small and random; everything else about them is what a downloaded checkpoint has.
"""

import io
import json
import os
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from helpers import naive_loss, relative
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from opd import models as opd_models
from opd.batch import make_micro_batches
from opd.config import StudentSection, TeacherSection, load_config
from opd.data import Prompt, Rollout
from opd.errors import InputError
from opd.evaluate import command as evaluate_command
from opd.step import Pair, stats_by_batch
from opd.teacher.local import LocalTeacher
from opd.train import run
from tip.config import SECTIONS
from tip.weighter import TipWeighter

DATA = os.environ.get("OPD_TEST_DATA")
if not DATA:
    warnings.warn("OPD_TEST_DATA is not set: the tests on real problem texts are skipped", stacklevel=1)
pytestmark = pytest.mark.skipif(not DATA, reason="OPD_TEST_DATA names no folder with math500/ and gsm8k/")

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def problem_texts(count=400):
    rows = [json.loads(line) for line in (Path(DATA) / "math500/test.jsonl").read_text().split("\n")[:count] if line]
    rows2 = [json.loads(line) for line in (Path(DATA) / "gsm8k/train.jsonl").read_text().split("\n")[:count] if line]
    return [r["problem"] for r in rows] + [r["question"] + " " + r["answer"] for r in rows2]


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory):
    """A byte-level BPE of 3,000 entries, as GPT-2, Llama 3 and Qwen have."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=3000, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(problem_texts(), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = TEMPLATE
    folder = tmp_path_factory.mktemp("bpe")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sentence_piece(tmp_path_factory):
    """A sentencepiece model of 2,000 pieces with byte fallback, as Llama 2, Gemma and Mistral have."""
    import sentencepiece

    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(problem_texts()),
        model_writer=buffer,
        vocab_size=2000,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
        pad_id=3,
        user_defined_symbols=["<|im_start|>", "<|im_end|>"],
        num_threads=1,
    )
    folder = tmp_path_factory.mktemp("spm")
    (folder / "tokenizer.model").write_bytes(buffer.getvalue())
    tokenizer = LlamaTokenizer.from_pretrained(folder, eos_token="<|im_end|>", legacy=False)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.model").unlink(missing_ok=True)
    return folder


ARCHITECTURES = {  # name -> (config class, what is particular, what the teacher's head has beyond the tokenizer)
    "llama": ("LlamaConfig", {"tie_word_embeddings": False, "num_key_value_heads": 1}, 72),
    "llama_tied": ("LlamaConfig", {"tie_word_embeddings": True, "num_key_value_heads": 2}, 0),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True, "num_key_value_heads": 1}, 8),
    "qwen3": ("Qwen3Config", {"tie_word_embeddings": False, "head_dim": 16, "num_key_value_heads": 2}, 136),
    "gemma2": (
        "Gemma2Config",
        {
            "head_dim": 16,
            "final_logit_softcapping": 5.0,
            "attn_logit_softcapping": 20.0,
            "query_pre_attn_scalar": 16,
            "sliding_window": 32,
            "num_key_value_heads": 1,
            "hidden_activation": "gelu_pytorch_tanh",
        },
        16,
    ),
    "granite": ("GraniteConfig", {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "tie_word_embeddings": True}, 4),
    "cohere": ("CohereConfig", {"logit_scale": 0.5, "tie_word_embeddings": True, "num_key_value_heads": 2}, 0),
    "phi": ("PhiConfig", {"tie_word_embeddings": False, "num_key_value_heads": 4}, 12),  # a head with a bias
}


def build_pair(folder, name, tokenizer_folder, student_rows=0, **student_changes):
    """Saves a student and a larger teacher with different vocabulary padding and two EOS ids; returns their folders."""
    kind, particular, teacher_rows = ARCHITECTURES[name]
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    paths = []
    for seed, (role, size, extra) in enumerate((("student", 32, student_rows), ("teacher", 64, teacher_rows))):
        torch.manual_seed(seed)
        settings = {
            "vocab_size": len(tokenizer) + extra,
            "hidden_size": size,
            "intermediate_size": 2 * size,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 1024,
            "initializer_range": 0.1,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": None,
        } | particular
        changes = student_changes if role == "student" else {}
        model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**settings | changes))
        for module in model.modules():
            if getattr(module, "bias", None) is not None:
                torch.nn.init.normal_(module.bias, std=0.3)
        model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_start|>")]
        model.save_pretrained(folder / role)
        tokenizer.save_pretrained(folder / role)
        paths.append(folder / role)
    return paths


def attention(name):
    return "eager" if name == "gemma2" else "sdpa"  # sdpa has no soft cap


def overrides(out, student, teacher, **more):
    """Settings of a two-update run on MATH-500 texts."""
    benchmark = out / "benchmark.json"
    benchmark.write_text(
        json.dumps(
            {
                "version": 1,
                "file": f"{DATA}/math500/test.jsonl",
                "prompt_field": "problem",
                "answer_field": "answer",
                "instruction": "\nThe answer goes into \\boxed{}.",
                "greedy": True,
                "k": 1,
                "answer_lines": False,
                "temperature": 1.0,
                "top_p": 0.9,
                "max_response_tokens": 12,
            }
        )
    )
    settings = {
        "student.path": str(student),
        "teacher.path": str(teacher),
        "output_dir": str(out),
        "run_name": "run",
        "data.train": [f"{DATA}/gsm8k/train.jsonl"],
        "data.prompt_field": "question",
        "data.answer_field": "answer",
        "data.system_prompt": "You are careful.",
        "data.max_prompt_tokens": 200,
        "rollout.prompts_per_step": 3,
        "rollout.n": 2,
        "rollout.max_response_tokens": 16,
        "optim.steps": 2,
        "optim.warmup_steps": 0,
        "optim.micro_batch_tokens": 500,
        "optim.lr": 1e-3,
        "eval.benchmarks": [str(benchmark)],
        "eval.k": 1,
        "eval.limit": 4,
        "log.diagnostics_every": 1,
        "checkpoint.every": 1,
        "checkpoint.keep": 1,
    } | more
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def train(texts):
    config, sections = load_config("configs/tiny.json", texts, SECTIONS)
    return run(config, TipWeighter(sections["tip"]), sections)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_training_and_evaluation_run_on_every_architecture(name, byte_level, tmp_path, capsys):
    student, teacher = build_pair(tmp_path, name, byte_level)
    texts = overrides(
        tmp_path,
        student,
        teacher,
        **{"student.attn_implementation": attention(name), "teacher.attn_implementation": attention(name)},
    )
    folder = train(texts)
    first, second = rows(folder)
    for record in (first, second):
        assert record["loss/divergence"] > 0.01 and record["optim/grad_norm"] > 0
        assert 0 < record["tokens/kept"] < record["tokens/response"] and 0 < record["tip/mass_covered"] <= 1
    saved = folder / "checkpoints" / "step_000002"
    check_saved_student(saved, student, attention(name))
    evaluate_command(
        [
            "--config",
            "configs/tiny.json",
            "--model",
            str(saved),
            "--out",
            str(tmp_path / "eval"),
            *(part for text in texts for part in ("--set", text)),
        ]
    )
    again = json.loads((tmp_path / "eval" / "summary.json").read_text())["benchmark"]
    before = json.loads((folder / "eval" / "step_000002" / "summary.json").read_text())["benchmark"]
    assert again.pop("time/evaluation") and before.pop("time/evaluation") and again == before


def check_saved_student(saved, start, kernel="sdpa"):
    """Plain transformers loads it, it has moved, and its own head on its own states gives its own logits."""
    model, old = (AutoModelForCausalLM.from_pretrained(p, attn_implementation=kernel) for p in (saved, start))
    tokenizer = AutoTokenizer.from_pretrained(saved)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 2+3?"}], return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        a, b = model(**ids).logits, old(**ids).logits
    assert a.shape == b.shape and 1e-5 < relative(a, b) < 1
    assert model.generation_config.eos_token_id == old.generation_config.eos_token_id
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in old.named_parameters()}
    lm = opd_models.load(
        StudentSection(path=str(saved), revision=None, dtype="float32", attn_implementation=kernel),
        torch.device("cpu"),
        "student",
    )
    with torch.no_grad():
        torch.testing.assert_close(lm.model(**ids).logits, a, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_statistics_equal_those_of_the_models_own_logits(name, byte_level, tmp_path):
    """Soft cap, scale, bias, padding: the divergence from states and heads is that of the models' logits, cut alike."""
    student, teacher = build_pair(tmp_path, name, byte_level, student_rows=24)
    student = opd_models.load(
        StudentSection(path=str(student), revision=None, dtype="float32", attn_implementation=attention(name)),
        torch.device("cpu"),
        "student",
    )
    teacher = opd_models.load(
        TeacherSection(
            mode="local",
            placement="device",
            path=str(teacher),
            revision=None,
            dtype="float32",
            cache_gb=None,
            attn_implementation=attention(name),
        ),
        torch.device("cpu"),
        "teacher",
    )
    vocab = opd_models.shared_vocabulary(student, teacher)
    assert vocab == len(student.tokenizer)
    ids = student.tokenizer.encode("Natalia sold clips to 48 of her friends in April.")
    rollout = Rollout(0, Prompt("x", tuple(ids[:5]), None), tuple(ids[5:]), "stop")
    (batch,) = make_micro_batches([rollout], 1, 0, "keep")
    config = load_config("configs/tiny.json")[0]
    pair = Pair(student, LocalTeacher(teacher), vocab, config.loss)
    (found,) = stats_by_batch(pair, [batch], frozenset({"reverse_kl", "forward_kl"}))
    with torch.no_grad():
        s, t = (m.model(input_ids=torch.tensor([ids])).logits[0, 4:-1, :vocab] for m in (student, teacher))
    for key, column in found.items():
        torch.testing.assert_close(column.double(), naive_loss(key, s, t), rtol=1e-3, atol=1e-4)
    assert found["reverse_kl"].min() > 1e-3


def test_a_sentencepiece_tokenizer(sentence_piece, tmp_path):
    student, teacher = build_pair(tmp_path, "llama", sentence_piece)
    folder = train(overrides(tmp_path, student, teacher))
    assert len(rows(folder)) == 2
    check_saved_student(folder / "checkpoints" / "step_000002", student)


def test_prompts_are_the_chat_template_with_system_prompt_and_instruction(byte_level, tmp_path):
    student, teacher = build_pair(tmp_path, "qwen3", byte_level)
    folder = train(overrides(tmp_path, student, teacher))
    responses = [json.loads(line) for line in (folder / "eval/step_000000/benchmark.jsonl").read_text().splitlines()]
    problem = json.loads((Path(DATA) / "math500/test.jsonl").read_text().split("\n")[0])["problem"]
    assert responses[0]["prompt"] == (
        "<|im_start|>system\nYou are careful.<|im_end|>\n<|im_start|>user\n"
        f"{problem}\nThe answer goes into \\boxed{{}}.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert len({len(r["prompt"]) for r in responses}) == 4


def test_responses_end_early_at_either_eos_id_or_are_cut(byte_level, tmp_path):
    """A student whose head prefers the two EOS ids ends often; the share that is cut is logged for what it is."""
    student, teacher = build_pair(tmp_path, "llama", byte_level)
    model = AutoModelForCausalLM.from_pretrained(student)
    tokenizer = AutoTokenizer.from_pretrained(student)
    with torch.no_grad():
        model.lm_head.weight *= 0.05
        direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
        for token in model.generation_config.eos_token_id:
            model.lm_head.weight[token] = direction
    model.save_pretrained(student)
    finals = {}
    for mode in ("keep", "drop", "mask_tail"):
        folder = train(
            overrides(
                tmp_path,
                student,
                teacher,
                **{"rollout.truncated": mode, "run_name": mode, "rollout.max_response_tokens": 3, "rollout.n": 8},
            )
        )
        finals[mode] = rows(folder)[0]
    assert tokenizer.eos_token_id in model.generation_config.eos_token_id
    assert 0 < finals["keep"]["rollout/truncated"] < 1 and finals["keep"]["rollout/length_mean"] < 3
    assert finals["keep"]["rollout/truncated"] == finals["drop"]["rollout/truncated"]
    cut = finals["keep"]["rollout/truncated"] * 24
    assert finals["drop"]["tokens/response"] == finals["keep"]["tokens/response"] - 3 * cut
    assert (
        finals["drop"]["tokens/response"] <= finals["mask_tail"]["tokens/response"] <= finals["keep"]["tokens/response"]
    )


def test_bfloat16_compute_with_gradient_checkpointing(byte_level, tmp_path):
    student, teacher = build_pair(tmp_path, "gemma2", byte_level)
    folder = train(
        overrides(
            tmp_path,
            student,
            teacher,
            **{
                "student.dtype": "bfloat16",
                "teacher.dtype": "bfloat16",
                "student.attn_implementation": "eager",
                "teacher.attn_implementation": "eager",
                "engine.gradient_checkpointing": True,
            },
        )
    )
    assert all(0 < r["loss/divergence"] < 20 for r in rows(folder))
    assert AutoModelForCausalLM.from_pretrained(folder / "checkpoints" / "step_000002").dtype == torch.float32


def test_extra_ids_at_the_end_of_one_tokenizer_are_said_and_cut(byte_level, tmp_path, capsys):
    student, teacher = build_pair(tmp_path, "qwen3", byte_level)
    longer = AutoTokenizer.from_pretrained(teacher)
    longer.add_tokens(["<tool_call>", "</tool_call>"], special_tokens=True)
    longer.save_pretrained(teacher)
    train(overrides(tmp_path, student, teacher))
    assert "the teacher's tokenizer has 2 ids more at its end" in capsys.readouterr().err


def test_sdpa_is_refused_where_it_would_leave_out_a_soft_cap(byte_level, tmp_path):
    student, teacher = build_pair(tmp_path, "gemma2", byte_level)
    with pytest.raises(InputError, match=r"soft cap .* which sdpa leaves out"):
        train(overrides(tmp_path, student, teacher))


def test_tokenizers_that_differ_are_refused(byte_level, sentence_piece, tmp_path):
    student, _ = build_pair(tmp_path / "a", "llama", byte_level)
    _, teacher = build_pair(tmp_path / "b", "llama", sentence_piece)
    with pytest.raises(InputError, match=r"tokenizers differ: id \d+ is '.*' for the student and '.*' for the teacher"):
        train(overrides(tmp_path, student, teacher))
    assert not (tmp_path / "run").exists()


def test_a_model_whose_logits_are_not_states_times_head_is_refused(byte_level, tmp_path, monkeypatch):
    student, teacher = build_pair(tmp_path, "granite", byte_level)
    monkeypatch.setattr(
        opd_models, "head_of", lambda model, vocab: opd_models.Head(model.lm_head.weight, None, 1.0, None, vocab)
    )  # a trainer that does not know logits_scaling
    with pytest.raises(InputError, match="GraniteForCausalLM are not its final states times its head"):
        train(overrides(tmp_path, student, teacher))
