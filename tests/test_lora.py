"""LoRA students: what learns, that it learns exactly, and what a checkpoint of it is to others."""

import json
import shutil
from dataclasses import replace

import pytest
import runs
import torch
from helpers import engine_for, one_each, pair_of, random_lm, random_rollouts, relative, tiny_config
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config

from opd import adapters, evaluate, merge, models, plan
from opd.batch import make_micro_batches
from opd.config import LoraSection, StudentSection, load_config
from opd.engine.plain import TorchEngine
from opd.errors import InputError
from opd.hooks import UniformWeighter
from opd.step import train_step
from opd.teacher.self import open_teacher
from tip import analyze
from tip.config import TipConfig
from tip.weighter import TipWeighter

LORA = LoraSection(rank=4, alpha=8.0, targets="all-linear")
AS_SETTING = 'student.lora={"rank": 4, "alpha": 8, "targets": ["q_proj", "v_proj", "down_proj"]}'
SECTION = StudentSection("nowhere", None, "float32", "sdpa", lora=LORA)
SHORT = (
    AS_SETTING,
    "optim.lr=3e-3",
    "optim.steps=8",
    "optim.warmup_steps=2",
    "eval.k=1",
    "eval.limit=8",
    "eval.every=0",
    "checkpoint.every=2",
    "checkpoint.keep=4",
    "tip.rule=soft_or",
    "tip.retention=0.5",
)


def adapted(seed=0, section=SECTION, spread=0.3, **more):
    """A random student whose adapters compute something: B is random, too."""
    lm = random_lm(seed, **more)
    adapters.add(lm.model, section, 5)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapters.trained(lm.model).items():
            if ".lora_B." in name:
                parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
    return lm


def gradients(lm):
    return {name: p.grad.clone() for name, p in adapters.trained(lm.model).items()}


def update(lm, batches, weighter=None, **settings):
    """The gradient of one update, whose engine neither clips nor steps."""
    engine = engine_for(lm, *settings.get("overrides", ()))
    kept = {}
    engine.finish = lambda apply: kept.update(gradients(lm)) or 0.0
    pair = pair_of(lm, random_lm(1, name="teacher"))
    result = train_step(pair, engine, batches, weighter or UniformWeighter(), step=1, seed=0)
    return kept, result


def test_fresh_adapters_change_nothing_and_everything_else_is_frozen():
    plain, lm = random_lm(0), random_lm(0)
    adapters.add(lm.model, SECTION, 5)
    ids = torch.arange(12).reshape(2, 6)
    assert torch.equal(lm.model(ids).logits, plain.model(ids).logits)
    learning = adapters.trained(lm.model)
    assert learning and all(".lora_" in name and p.dtype == torch.float32 for name, p in learning.items())
    assert not any("lm_head" in name or "embed" in name for name in learning)
    assert sum(p.numel() for p in learning.values()) == adapters.count(random_lm(0).model, LORA, "it")
    again, other = random_lm(0), random_lm(0)
    adapters.add(again.model, SECTION, 5), adapters.add(other.model, SECTION, 6)
    same, differ = (adapters.trained(m.model) for m in (again, other))
    assert all(torch.equal(p, same[name]) for name, p in learning.items())
    assert not any(torch.equal(p, differ[name]) for name, p in learning.items() if ".lora_A." in name)


def test_the_adapters_gradient_is_the_naive_one_in_float64():
    """The chain rule by hand: with G the gradient of W + scale B A, dA = scale B^T G and dB = scale G A^T."""
    lm, teacher = adapted(), random_lm(1, name="teacher")
    rollouts = random_rollouts(lm)
    ours, result = update(lm, one_each(rollouts))
    whole = random_lm(0)
    whole.model.load_state_dict(dict(adapters.merged_weights(lm.model)))
    whole.model.double().requires_grad_(True), teacher.model.double()
    total, count = 0.0, 0
    for r in rollouts:
        ids = torch.tensor([r.prompt.token_ids + r.response_ids])
        places = slice(len(r.prompt.token_ids) - 1, -1)
        p, q = (lm_.model(ids).logits[0, places, :35].log_softmax(-1) for lm_ in (whole, teacher))
        total, count = total + (p.exp() * (p - q.detach())).sum(), count + len(r.response_ids)
    (total / count).backward()
    assert result.loss == pytest.approx((total / count).item(), rel=1e-5)
    scale, parameters = LORA.alpha / LORA.rank, adapters.trained(lm.model)
    owners = {name.partition(".lora_")[0] for name in ours}
    assert len(owners) == len(adapters.targets_of(random_lm(0).model, LORA, "it"))
    for owner in owners:
        g = whole.model.get_parameter(f"{owner}.weight").grad
        a, b = (f"{owner}.lora_{which}.default.weight" for which in "AB")
        assert relative(ours[a], scale * parameters[b].double().T @ g) < 1e-4, owner
        assert relative(ours[b], scale * g @ parameters[a].double().T) < 1e-4, owner


@pytest.mark.parametrize(
    "weighter", [UniformWeighter(), TipWeighter(TipConfig(rule="soft_or", retention=0.5))], ids=str
)
def test_the_gradient_does_not_depend_on_micro_batches_or_checkpointing(weighter):
    rollouts = random_rollouts(adapted())
    expected, one = update(adapted(), one_each(rollouts), weighter)
    cut = make_micro_batches(rollouts, 40, 0, "keep")
    for batches, overrides in ((cut, ()), (cut[::-1], ()), (cut, ("engine.gradient_checkpointing=true",))):
        found, other = update(adapted(), batches, weighter, overrides=overrides)
        assert other.loss == pytest.approx(one.loss, rel=1e-5)
        assert torch.equal(other.weights.weights, one.weights.weights)
        assert all(relative(found[name], expected[name]) < 1e-4 for name in expected)


def test_beneath_bfloat16_the_adapters_are_float32_and_move_at_a_small_rate():
    lm = random_lm(0, dtype=torch.bfloat16)
    lm = replace(lm, model=lm.model.bfloat16(), compute_dtype=torch.bfloat16)
    adapters.add(lm.model, SECTION, 5)
    before = {name: p.clone() for name, p in lm.model.named_parameters()}
    engine = TorchEngine(lm, tiny_config("optim.lr=1e-6", "optim.warmup_steps=0"), 10)
    pair = pair_of(lm, random_lm(1, name="teacher"))
    for step in (1, 2):
        train_step(pair, engine, one_each(random_rollouts(lm)), UniformWeighter(), step=step, seed=0)
    for name, p in lm.model.named_parameters():
        assert torch.equal(p, before[name]) == (".lora_" not in name), name
    assert {p.dtype for p in adapters.trained(lm.model).values()} == {torch.float32}


def test_what_a_sampler_gets_is_a_plain_model_that_computes_the_same():
    lm, plain = adapted(), random_lm(9)
    engine = engine_for(lm)
    sent = dict(engine.named_weights())
    assert sent.keys() == plain.model.state_dict().keys()
    plain.model.load_state_dict(sent)
    ids = torch.arange(14).reshape(2, 7)
    torch.testing.assert_close(plain.model(ids).logits, lm.model(ids).logits, rtol=1e-4, atol=1e-5)
    with adapters.without(lm.model):
        assert torch.equal(lm.model(ids).logits, random_lm(0).model(ids).logits)
    assert all(p.requires_grad for p in engine.named_parameters.values())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("lora")
    runs.train(out, *SHORT)
    return out / "run"


def test_a_killed_run_ends_as_the_unbroken_one(trained, tmp_path, monkeypatch):
    runs.interrupted_before(4, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        runs.train(tmp_path, *SHORT)
    monkeypatch.undo()
    runs.train(tmp_path, *SHORT)
    for step in range(2, 9, 2):
        for file in (adapters.WEIGHTS, "trainer/optimizer.safetensors"):
            ours, theirs = (
                load_file(run / f"checkpoints/step_{step:06d}" / file) for run in (tmp_path / "run", trained)
            )
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    ours, theirs = (run / "eval/step_000008/tiny.jsonl" for run in (tmp_path / "run", trained))
    assert ours.read_text() == theirs.read_text()


def test_a_checkpoint_holds_the_adapters_alone_and_peft_reads_it(trained):
    folder = trained / "checkpoints" / "step_000008"
    names = load_file(folder / adapters.WEIGHTS).keys()
    assert not (folder / "model.safetensors").exists() and all(".lora_" in name for name in names)
    assert json.loads((folder / adapters.SETTINGS).read_text())["r"] == 4
    section = replace(tiny_config(AS_SETTING).student, path=str(folder))
    ours = models.load(section, torch.device("cpu"), "student")
    base = AutoModelForCausalLM.from_pretrained(tiny_config().student.path, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, folder)
    ids = torch.arange(14).reshape(2, 7)
    assert torch.equal(ours.model(ids).logits, theirs(ids).logits)
    with theirs.disable_adapter():
        assert not torch.equal(ours.model(ids).logits, theirs(ids).logits)


def test_merged_it_is_a_plain_checkpoint_that_answers_alike(trained, tmp_path, capsys):
    out = tmp_path / "merged"
    merge.command([str(trained), "--out", str(out)])
    assert capsys.readouterr().out.strip() == str(out) and not (out / adapters.SETTINGS).exists()
    adapted_folder = trained / "checkpoints" / "step_000008"
    section = replace(tiny_config(AS_SETTING).student, path=str(adapted_folder))
    lm, plain = (
        models.load(s, torch.device("cpu"), "student") for s in (section, replace(section, path=str(out), lora=None))
    )
    assert not adapters.is_adapted(plain.model)
    ids = torch.arange(14).reshape(2, 7)
    torch.testing.assert_close(plain.model(ids).logits, lm.model(ids).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="is not empty"):
        merge.command([str(trained), "--out", str(out)])
    with pytest.raises(InputError, match="holds no adapters"):
        merge.command([str(out), "--out", str(tmp_path / "twice")])


def test_an_evaluation_of_a_checkpoint_is_the_runs_own(trained, tmp_path):
    folder = trained / "checkpoints" / "step_000008"
    settings = [word for setting in (*SHORT[:1], "eval.k=1") for word in ("--set", setting)]
    evaluate.command(
        ["--config", runs.CONFIG, *settings, "--limit", "8", "--model", str(folder), "--out", str(tmp_path / "eval")]
    )
    again, own = (path.read_text() for path in (tmp_path / "eval/tiny.jsonl", trained / "eval/step_000008/tiny.jsonl"))
    assert again == own


def test_selection_is_analysed_on_a_checkpoint_and_no_second_adapter_is_added(trained, tmp_path, monkeypatch):
    folder = trained / "checkpoints" / "step_000008"
    monkeypatch.setattr(analyze, "plots", lambda *_: {})  # they take most of the time
    monkeypatch.setattr(analyze, "page", lambda *_: "")
    found = {}
    for name, path in (("adapted", folder), ("plain", tiny_config().student.path)):
        options = [
            *runs.words(f"student.path={path}"),
            "--prompts",
            "8",
            "--oracle-tokens",
            "60",
            "--out",
            str(tmp_path / name),
        ]
        analyze.command(options)
        found[name] = json.loads((tmp_path / name / "analysis.json").read_text())["rules"]
    assert found["adapted"].keys() == found["plain"].keys() and found["adapted"] != found["plain"]
    for more in SHORT, SHORT[1:]:  # with student.lora and without it
        with pytest.raises(InputError, match=r"holds adapters.*opd\.merge"):
            runs.train(tmp_path, *more, f"student.path={folder}")


def test_a_model_without_linear_layers_is_refused():
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=50))
    with pytest.raises(InputError, match="it has no linear layers"):
        adapters.targets_of(gpt2, LORA, "it")


def test_two_phases_change_nothing(trained, tmp_path):
    runs.train(tmp_path, *SHORT, "engine.phases=2", "optim.steps=4", "eval.benchmarks=[]", "eval.k=null")
    ours, theirs = (
        load_file(run / "checkpoints/step_000004" / adapters.WEIGHTS) for run in (tmp_path / "run", trained)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_initial_teacher_of_itself_is_the_model_beneath_the_adapters():
    config, _ = load_config("configs/tiny_self.json", [AS_SETTING], ignore_extensions=True)
    assert config.teacher_is_student and config.teacher.weights == "initial"
    lm = adapted()
    teacher = open_teacher(config, lm, torch.device("cpu"))
    assert teacher.model is lm.model
    rollouts = random_rollouts(lm)
    batch, every = one_each(rollouts)[0], torch.arange(len(rollouts[0].response_ids))
    beneath = random_lm(0).hidden_states(batch, every)
    assert torch.equal(teacher.hidden_states(batch, every), beneath)
    assert not torch.equal(lm.hidden_states(batch, every), beneath)
    other, _ = load_config("configs/tiny_self.json", [AS_SETTING, "teacher.dtype=bfloat16"], ignore_extensions=True)
    assert not other.teacher_is_student


def test_the_plan_counts_what_learns():
    config, size = tiny_config(AS_SETTING), plan.size_without_weights(tiny_config(AS_SETTING).student, "student")
    hidden, intermediate, layers = size.hidden, size.intermediate, size.layers
    model = AutoModelForCausalLM.from_pretrained(config.student.path)
    q, v = (model.model.layers[0].self_attn.get_submodule(n) for n in ("q_proj", "v_proj"))
    by_hand = 4 * layers * ((hidden + q.out_features) + (hidden + v.out_features) + (intermediate + hidden))
    assert size.adapters == by_hand == size.learning and size.parameters == model.num_parameters()
    teacher = plan.size_without_weights(config.teacher, "teacher")
    made = plan.make_plan(config, size, teacher, torch.device("cpu"), 10)
    assert made.phases["update"]["weights"] == 4 * size.parameters + 4 * by_hand
    assert made.phases["update"]["optimizer"] == 8 * by_hand and made.phases["update"]["gradients"] == 4 * by_hand
    assert made.checkpoint == 12 * by_hand


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (['student.lora={"rank": 4, "alpha": 8, "targets": ["q_porj"]}'], "'q_porj'.*Expected some of .*q_proj"),
        (
            ['student.lora={"rank": 4, "alpha": 8, "targets": ["lm_head"]}'],
            "'lm_head', which is no linear layer inside",
        ),
        (['student.lora={"rank": 0, "alpha": 8, "targets": "all-linear"}'], "student.lora.rank"),
        (['student.lora={"rank": 4, "alpha": 0, "targets": "all-linear"}'], "student.lora.alpha"),
        (['student.lora={"rank": 4, "alpha": 8, "targets": []}'], "student.lora.targets"),
        (['student.lora={"rank": 4, "alpha": 8, "targets": "all-linear", "lora_dropout": 0.1}'], "have no dropout"),
        ([AS_SETTING, "engine.kind=deepspeed", "engine.deepspeed=zero3"], "whole on every process"),
    ],
)
def test_wrong_settings_get_one_message(settings, message, tmp_path):
    with pytest.raises(InputError, match=message):
        runs.train(tmp_path, *settings)


def test_a_damaged_adapter_and_a_missing_model_beneath_are_named(trained, tmp_path):
    folder = tmp_path / "adapter"
    section = replace(tiny_config(AS_SETTING).student, path=str(folder))
    shutil.copytree(trained / "checkpoints" / "step_000008", folder)
    (folder / adapters.WEIGHTS).write_bytes(b"half")
    with pytest.raises(InputError, match="does not fit the model that it names"):
        models.load(section, torch.device("cpu"), "student")
    settings = json.loads((folder / adapters.SETTINGS).read_text()) | {"base_model_name_or_path": None}
    (folder / adapters.SETTINGS).write_text(json.dumps(settings))
    with pytest.raises(InputError, match="names no model beneath"):
        models.load(section, torch.device("cpu"), "student")


def test_the_plan_tells_what_learns():
    config, cpu = tiny_config(AS_SETTING), torch.device("cpu")
    size = plan.size_without_weights(config.student, "student")
    made = replace(plan.plan_of(config, cpu, 10, None, 1), adapters=10**6 * size.adapters)  # it is told in millions
    assert f"M with adapters of {size.adapters}.00 M, teacher" in plan.describe(config, cpu, made)
