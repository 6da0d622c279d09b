"""Strict configuration: every shipped file parses, every key is read, every fault is named."""

import ast
import json
import re
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from opd import benchmarks, keys
from opd.benchmarks import read_benchmark, read_benchmarks
from opd.config import Config, load_config, read_json_object, read_pair, schema
from opd.errors import InputError
from opd.words import ELSEWHERE
from tip.config import SECTIONS, TipConfig
from tip.rules import RULES

PAIRS = sorted(Path("configs").glob("*.json"))
PAIRS = [p for p in PAIRS if "schema" not in p.name]


@pytest.mark.parametrize("path", PAIRS, ids=lambda p: p.stem)
def test_every_shipped_pair_parses_and_survives_the_round_trip(path):
    config, sections = load_config(path, extensions=SECTIONS)
    assert sections["tip"] == TipConfig(rule="soft_or", retention=0.5)
    assert config.run_name == path.stem


@pytest.mark.parametrize("path", sorted(Path("configs/benchmarks").glob("*.json")), ids=lambda p: p.stem)
def test_every_shipped_benchmark_parses(path):
    read_benchmark(path)


@pytest.mark.parametrize(
    "name,lr", [("qwen3_8b_to_4b", 1e-6), ("llama33_70b_to_llama31_8b", 3e-7), ("qwen25_14b_to_1.5b", 1e-6)]
)
def test_paper_pairs_have_the_hyperparameters_of_table_9(name, lr):
    config, _ = load_config(f"configs/{name}.json")
    assert config.optim.lr == lr and config.optim.schedule == "cosine"
    assert (config.rollout.prompts_per_step, config.rollout.n) == (8, 16)
    assert (config.data.max_prompt_tokens, config.rollout.max_response_tokens) == (2048, 8192)
    assert (config.rollout.temperature, config.rollout.top_p) == (1.0, 1.0)
    assert config.loss.divergence == "reverse_kl"
    measured = read_benchmarks(config).values()
    assert {b.k for b in measured} == {16} and {b.temperature for b in measured} == {1.0}
    # not stated in the paper; the public reruns' values
    assert (config.optim.weight_decay, config.optim.grad_clip, config.optim.warmup_steps, config.seed) == (
        0.1,
        1.0,
        0,
        42,
    )


def test_schemas_are_current():
    assert json.loads(Path("configs/schema.json").read_text()) == schema(SECTIONS), (
        "python -m tip.config > configs/schema.json"
    )
    assert json.loads(Path("configs/benchmark_schema.json").read_text()) == benchmarks.schema(), (
        "python -m opd.benchmarks > configs/benchmark_schema.json"
    )


def test_the_schema_wants_every_key_without_a_default_of_files_that_extend_no_other():
    found = schema(SECTIONS)
    assert found["if"] == {"not": {"required": ["extends"]}}
    sections = {f.type.__name__ for f in fields(Config) if is_dataclass(f.type)}
    assert not [name for name in sections if "required" in found["$defs"][name]] and "required" not in found
    for name in ("ScorerSection", "EnvironmentSection"):  # a key that is an object is given as a whole
        assert "name" in found["$defs"][name]["required"]
    for name in set(found["properties"]) - {"tip", "$schema", "extends"}:
        assert name in found["then"]["required"]
    assert set(found["then"]["properties"]) == {f.name for f in fields(Config) if is_dataclass(f.type)}
    assert "lr" in found["then"]["properties"]["optim"]["required"]


def leaves(kind, prefix=""):
    for field in fields(kind):
        if is_dataclass(field.type):
            yield from leaves(field.type, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def attribute_chains():
    """Every a.b.c in the code of opd, tip and data, as text, without the declarations."""
    for path in (*Path("opd").rglob("*.py"), *Path("tip").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                yield ast.unparse(node)


def test_every_key_that_exists_is_read_and_every_key_that_is_read_exists():
    chains = set(attribute_chains())
    sections = {f.name: f.type for f in fields(Config) if is_dataclass(f.type)}
    # a section handed on under its own name, and the two that share a parameter, count as well
    spoken = {"student": "section", "teacher": "section"}
    for leaf in leaves(Config):
        section, _, key = leaf.rpartition(".")
        ways = {f"{owner}config.{leaf}" for owner in ("", "self.", "run.")} | {
            f"{section}.{key}",
            f"self.{section}.{key}",
            f"{spoken.get(section)}.{key}",
        }
        ways |= set() if section else {f"self.{key}"}
        assert ways & chains, f"nothing reads {leaf}"
    for chain in chains:
        parts = chain.removeprefix("self.").split(".")
        if parts[0] == "config" and len(parts) >= 3 and parts[1] in sections:
            assert parts[2] in {f.name for f in fields(sections[parts[1]])}, chain
    for field in fields(TipConfig):
        ways = {f"{owner}config.{field.name}" for owner in ("", "self.", "axes.", "self.weighter.")}
        assert (ways | {f"self.{field.name}"}) & chains, f"nothing reads tip.{field.name}"


def test_every_key_is_documented():
    for definition in (*schema(SECTIONS)["$defs"].values(), benchmarks.schema()):
        assert definition["description"]
        for name, key in definition["properties"].items():
            assert key.get("description") or "$ref" in key, name


def test_rules_and_their_names_agree():
    rule = schema(SECTIONS)["$defs"]["TipConfig"]["properties"]["rule"]
    assert set(RULES) == set(rule["enum"])


def test_set_goes_through_the_same_checks():
    overrides = ["optim.lr=1e-6", "run_name=x", "eval.benchmarks=[]", "eval.k=0", "tip.rule=random"]
    config, sections = load_config("configs/tiny.json", overrides, SECTIONS)
    assert config.optim.lr == 1e-6 and config.run_name == "x" and config.eval.benchmarks == ()
    assert sections["tip"].rule == "random" and sections["tip"].retention == 0.5


@pytest.mark.parametrize(
    "overrides,message",
    [
        (["optim.lrr=1"], "optim.lrr is not a known key. Did you mean optim.lr?"),
        (["lr=1"], "lr is not a known key. Did you mean optim.lr?"),
        (["optim.lr=fast"], 'optim.lr is "fast". Expected: input should be a valid number'),
        (["optim.lr=0"], "greater than 0"),
        (["optim.lr=NaN"], "finite"),
        (["seed=1.5"], "valid integer"),
        (["seed=true"], "seed is true"),
        (["optim.betas=[0.9]"], "optim.betas.1 is missing"),
        (["optim={}"], "optim.lr is missing"),
        (["rollout.truncated=maybe"], "'keep', 'drop' or 'mask_tail'"),
        (["loss.jsd_beta=1"], "less than 1"),
        (["loss.jsd_beta=0"], "greater than 0"),
        (["rollout.temperature=0", "rollout.n=2"], "greedy responses to one prompt"),
        (["optim.steps=null"], "give one, set the other to null"),
        (["data.epochs=1"], "give one, set the other to null"),
        (["optim.warmup_steps=60"], "not below optim.steps"),
        (["run_name=../x"], "run_name"),
        (["eval.k"], "expected KEY=VALUE"),
        (["seed.x=1"], "'seed' is a value, not a section"),
        (['eval.benchmarks=["tiny","tiny"]'], "names a benchmark twice"),
        (["eval.benchmarks=[]", "eval.k=4"], "eval.k is 4 without eval.benchmarks"),
        (["tip.rule=softor"], 'tip: rule is "softor". Expected: one of all, random'),
        (["tip.retention=0"], "retention is 0"),
        (["tip.retention=1.1"], "retention is 1.1"),
        (["log.diagnostics_every=0"], "log.samples is 4"),
        (["rollout.temperature=0", "rollout.top_p=0.9"], "has no nucleus"),
        (["tip=3"], "tip is int, expected an object"),
    ],
)
def test_faults_are_named(overrides, message):
    with pytest.raises(InputError) as caught:
        load_config("configs/tiny.json", overrides, SECTIONS)
    assert message in str(caught.value)


def test_plain_training_refuses_a_file_with_a_selection():
    with pytest.raises(InputError, match=r"section 'tip' belongs to an extension.*remove the section"):
        load_config("configs/tiny.json", ["tip.rule=soft_or"])


@pytest.mark.parametrize(
    "text,message",
    [
        ("{", "not JSON (Expecting property name enclosed in double quotes, column 2)"),
        ("[1]", "the file is list, expected an object"),
        ('{"a": 1, "a": 2}', "key 'a' stands twice"),
        ("\ufeff{}", "student is missing"),
        ("{}", "student is missing"),
    ],
)
def test_broken_files_are_named(tmp_path, text, message):
    path = tmp_path / "pair.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load_config(path)
    assert message in str(caught.value) and "pair.json" in str(caught.value)


def test_a_missing_file_names_the_nearest():
    with pytest.raises(InputError, match=r"configs/tinny.json: no such file. Did you mean configs/tiny.json"):
        load_config("configs/tinny.json")


# --- files that extend others -----------------------------------------------------------------------------------------
def pair_file(path, **content):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def family(tmp_path):
    """deep/mine.json extends ../middle.json, which extends a complete file."""
    pair_file(
        tmp_path / "middle.json",
        extends=str(Path("configs/tiny.json").resolve()),
        optim={"lr": 1e-5, "steps": 9},
        data={"chat_template_args": {"a": 1, "b": 2}},
        tip={"rule": "q3", "retention": 0.2},
    )
    return pair_file(
        tmp_path / "deep/mine.json",
        **{"$schema": "x"},
        extends="../middle.json",
        run_name="mine",
        optim={"lr": 2e-5},
        data={"chat_template_args": {"c": 3}},
        tip={"retention": 0.1},
    )


def test_a_file_that_extends_others_is_the_written_out_file(family, tmp_path):
    content = json.loads(Path("configs/tiny.json").read_text()) | {"run_name": "mine"}
    content["optim"] |= {"lr": 2e-5, "steps": 9}
    content["data"]["chat_template_args"] = {"c": 3}  # a key is replaced as a whole
    content["tip"] = {"rule": "q3", "retention": 0.1}
    written = pair_file(tmp_path / "written.json", **content)
    assert load_config(family, ["seed=3"], SECTIONS) == load_config(written, ["seed=3"], SECTIONS)


def in_middle(path, **changes):
    middle = path.parent.parent / "middle.json"
    middle.write_text(json.dumps(json.loads(middle.read_text()) | changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"optim": {"lrr": 1}}, "{tiny}: optim.lrr is not a known key. Did you mean optim.lr?"),
        ({"optim": {"lr": 0}, "extends": "no.json"}, "{dir}/deep/../no.json: no such file"),
        ({"loss": 3}, "{tiny}: loss is 3"),
        ({"extends": "deep/mine.json"}, "{dir}/deep/../deep/mine.json: the files extend each other in a circle"),
        ({"extends": ["a.json"]}, '{dir}/deep/../middle.json: extends is ["a.json"], expected the path of a pair file'),
        ({"extends": None}, "{dir}/deep/../middle.json: extends is null, expected the path"),
        ({"extends": ""}, '{dir}/deep/../middle.json: extends is "", expected the path'),
        ({"tip": {"rho": 1}}, "{tiny}: tip: rho is not a known key"),
    ],
)
def test_faults_name_the_chain_of_files(family, changes, message):
    in_middle(family, **changes)
    top = family.parent.parent
    with pytest.raises(InputError) as caught:
        load_config(family, [], SECTIONS)
    chain = f"{family}, which extends {top}/deep/../middle.json"
    message = message.replace("{tiny}", f"{chain}, which extends {Path('configs/tiny.json').resolve()}")
    message = message.replace("{dir}", str(top))
    assert message in str(caught.value) and str(caught.value).startswith(chain), str(caught.value)


def test_a_file_that_extends_itself_is_a_circle(tmp_path):
    path = pair_file(tmp_path / "a.json", extends="a.json")
    with pytest.raises(InputError, match=r"a.json, which extends .*a.json: the files extend each other in a circle"):
        read_pair(path)


def test_words_of_other_trainers_are_answered_with_ours(tmp_path):
    legal = keys.documented().keys()
    for word, answer in ELSEWHERE.items():
        named = re.findall(r"\b(?:student|teacher|data|rollout|loss|optim|engine|eval|checkpoint|log)\.[a-z_]+", answer)
        assert set(named) <= legal, word
        with pytest.raises(InputError, match=re.escape(f"{word} is not a known key: {answer}")):
            load_config("configs/tiny.json", [f"{word}=1"])
    path = tmp_path / "pair.json"
    path.write_text(json.dumps(read_json_object("configs/tiny.json") | {"lora": {"r": 8}}))
    with pytest.raises(InputError, match=r"lora is not a known key: it is student\.lora"):
        load_config(path)
    with pytest.raises(InputError, match=r"optim\.learning_rate is not a known key: it is optim\.lr"):
        load_config("configs/tiny.json", ["optim.learning_rate=1"])
