"""Strict configuration: every shipped file parses, every key is read, every fault is named."""

import ast
import json
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from opd.benchmarks import Benchmark, read_benchmarks
from opd.config import Config, build, load_config, read_json_object, schema
from opd.errors import InputError
from tip.config import SECTIONS, TipConfig
from tip.rules import RULES

PAIRS = sorted(Path("configs").glob("*.json"))
PAIRS = [p for p in PAIRS if p.name != "schema.json"]


@pytest.mark.parametrize("path", PAIRS, ids=lambda p: p.stem)
def test_every_shipped_pair_parses_and_survives_the_round_trip(path):
    config, sections = load_config(path, extensions=SECTIONS)
    assert sections["tip"] == TipConfig(rule="soft_or", retention=0.5)
    assert config.run_name == path.stem


@pytest.mark.parametrize("path", sorted(Path("configs/benchmarks").glob("*.json")), ids=lambda p: p.stem)
def test_every_shipped_benchmark_parses(path):
    build(Benchmark, read_json_object(path), str(path))


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
    benchmarks = read_benchmarks(config)
    assert {b.k for b in benchmarks.values()} == {16} and {b.temperature for b in benchmarks.values()} == {1.0}
    # not stated in the paper; the public reruns' values
    assert (config.optim.weight_decay, config.optim.grad_clip, config.optim.warmup_steps, config.seed) == (
        0.1,
        1.0,
        0,
        42,
    )


def test_schema_is_current():
    assert json.loads(Path("configs/schema.json").read_text()) == schema(SECTIONS), (
        "python -m tip.config > configs/schema.json"
    )


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
    for definition in schema(SECTIONS)["$defs"].values():
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
