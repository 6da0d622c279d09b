"""What the READMEs say: every command line parses, every name exists, every code block runs.

Each ```bash block runs whole, by bash, in a copy of scripts/ and configs/ where `python` and the launchers only write
down how they were called. So a script is followed to the Python command that it starts, and that command's own parser
and configuration loader judge the arguments.
"""

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

from opd.config import Config, load_config
from opd.rollout.environment import Environment, checked_messages, checked_score
from tip.config import SECTIONS, TipConfig
from tip.rules import RULES
from tip.tables import only, read_table

ROOT = Path(__file__).resolve().parent.parent
READMES = sorted(
    ROOT / name
    for name in subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "*README.md"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
)
FRONT = ROOT / "README.md"
FOLDERS = ("opd", "tip", "data", "configs", "scripts", "tests")
MADE_BY_COMMANDS = ("configs/mine.json", "data/prepared/")  # named, and not shipped
REPLACED = ("python", "pip", "ruff", "torchrun", "deepspeed")

each_readme = pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))


def blocks(readme, language):
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", readme.read_text(), re.S | re.M)
    return [text for kind, text in fenced if kind == language]


def prose(readme):
    return re.sub(r"^```.*?^```", "", readme.read_text(), flags=re.S | re.M)


def tree(readme):
    """Paths that the annotated file trees of a README list, from the repository's root."""
    listed = set()
    for block in blocks(readme, ""):
        if "<" in block.splitlines()[0]:
            continue  # a folder that runs make
        parents = {}  # indentation -> folder
        for line in block.splitlines():
            name = re.match(r"( *)([\w./]+/?)(?:  |$)", line)
            if not name or not (parents or name[2].endswith("/") or (ROOT / name[2]).is_dir()):
                continue
            indent = len(name[1])
            parents = {deep: folder for deep, folder in parents.items() if deep < indent}
            path = parents[max(parents)] / name[2] if parents else (ROOT / name[2])
            listed.add(path.relative_to(ROOT))
            if name[2].endswith("/"):
                parents[indent] = path
    return listed


# what a README says of files


def test_there_is_a_readme_beside_what_it_describes():
    named = {str(path.relative_to(ROOT).parent) for path in READMES}
    assert named >= {".", "opd", "tip", "configs", "configs/tables", "data", "tests/benchmarks"}


def test_the_front_page_is_short():
    text = FRONT.read_text()
    assert len(text.splitlines()) <= 230 and len(text.encode()) <= 20 * 1024


@each_readme
def test_every_link_leads_somewhere(readme):
    for target in re.findall(r"\]\(([^)\s]+)\)", readme.read_text()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        there = (readme.parent / path).resolve() if path else readme
        assert there.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", there.read_text(), re.M)
            assert anchor in {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}, target


@each_readme
def test_every_file_it_names_exists(readme):
    named = set(re.findall(rf"(?<![\w/.-])((?:{'|'.join(FOLDERS)})/[\w/.*-]*\w)(?![\w$])", readme.read_text()))
    beside = set(re.findall(r"`([\w.-]+\.(?:json|py|sh|txt|toml|cff))`", prose(readme)))
    written_by_runs = {"manifest.json", "table.json", "report.json", "summary.json", "config.json", "metrics.json"}
    missing = {n for n in named if not list(ROOT.glob(n)) and not n.startswith(MADE_BY_COMMANDS)}
    missing |= {n for n in beside - written_by_runs if not any((*readme.parent.rglob(n), *ROOT.glob(n)))}
    assert not missing


@each_readme
def test_every_key_and_module_it_names_exists(readme):
    sections = {f.name: f.type for f in fields(Config)} | {"tip": TipConfig}
    for name in re.findall(r"`(\w+\.\w+(?:\.\w+)?)", prose(readme)):
        section, _, key = name.partition(".")
        keys = {f.name for f in fields(sections[section])} if hasattr(sections.get(section), "__mro__") else set()
        if section not in (*sections, "opd", "tip", "data") or key in keys or (ROOT / section).is_file():
            continue
        module, _, attribute = name.rpartition(".")
        if importlib.util.find_spec(module.partition(".")[0]) is not None and _is_module(name):
            continue
        assert _is_module(module) and hasattr(importlib.import_module(module), attribute), name


def _is_module(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@each_readme
def test_every_key_it_sets_exists(readme):
    """In running text, where no command is parsed: `section.key: value` and `section.key=value`."""
    for section, key in re.findall(r"`(\w+)\.(\w+)(?:=|: )\S+`", prose(readme)):
        kind = {"tip": TipConfig}.get(section) or next(f.type for f in fields(Config) if f.name == section)
        assert key in {f.name for f in fields(kind)}, f"{section}.{key}"


def test_the_trees_list_every_module_and_folder():
    listed = set().union(*map(tree, READMES))
    modules = {
        path.relative_to(ROOT)
        for folder in ("opd", "tip", "data", "tests/benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "__init__.py" and ROOT / "tip/results" not in path.parents
    }
    assert not modules - listed
    folders = {Path(name) for name in FOLDERS} | {
        path.relative_to(ROOT)
        for name in FOLDERS
        for path in (ROOT / name).iterdir()
        if path.is_dir() and path.name not in ("__pycache__", "prepared")
    }
    assert not folders - tree(FRONT)
    assert all((ROOT / path).exists() for path in listed)


def test_every_shipped_file_and_rule_is_described():
    described = {
        "configs": [p.name for p in (*ROOT.glob("configs/*.json"), *ROOT.glob("configs/benchmarks/*.json"))],
        "configs/tables": [p.name for p in ROOT.glob("configs/tables/*.json")],
        "tip": [f"`{name}`" for name in RULES] + [f"`tip.{f.name}`" for f in fields(TipConfig)],
    }
    described["configs"] += [p.stem for p in ROOT.glob("configs/deepspeed/*.json")]
    for folder, names in described.items():
        text = (ROOT / folder / "README.md").read_text()
        assert not [name for name in names if name not in text], folder


# the commands


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory):
    """A copy of the scripts and configs, with stand-ins that write their arguments down."""
    root = tmp_path_factory.mktemp("sandbox")
    for name in ("scripts", "configs", "tests/benchmarks"):
        shutil.copytree(ROOT / name, root / name)
    for path in (*ROOT.glob("requirements*.txt"),):
        shutil.copy(path, root)
    (root / "scripts/setup.sh").write_text("exit 0\n")
    stand_ins = root / ".venv/bin"
    stand_ins.mkdir(parents=True)
    for name in REPLACED:
        path = stand_ins / name
        path.write_text(f'#!/bin/bash\nprintf "%s\\0" {name} "$@" >> "$CALLS"; echo >> "$CALLS"; echo outputs/a-run\n')
        path.chmod(0o755)
    (stand_ins / "activate").write_text(f'PATH="{stand_ins}:$PATH"\n')
    for name in ("bench", "trl"):
        shutil.copytree(stand_ins, root / f".venv-{name}/bin")
        shutil.copy(root / f"requirements-{name}.txt", root / f".venv-{name}/installed")
    return root


def calls_of(block, sandbox):
    """The commands that a block starts, scripts followed to what they start themselves."""
    log = sandbox / "calls"
    log.unlink(missing_ok=True)
    environment = os.environ | {"PATH": f"{sandbox / '.venv/bin'}:{os.environ['PATH']}", "CALLS": str(log)}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block], cwd=sandbox, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{block}\n{done.stderr}"
    lines = log.read_text().split("\0\n") if log.exists() else []
    return [line.split("\0") for line in lines if line]


@each_readme
def test_every_command_is_one_that_its_program_takes(readme, sandbox, monkeypatch):
    for block in blocks(readme, "bash"):
        calls = calls_of(block, sandbox)
        starters = [line for line in block.splitlines() if re.match(r"[^#]*\b(bash|python|torchrun|deepspeed) ", line)]
        assert len(calls) >= len(starters), block
        monkeypatch.chdir(sandbox)
        for call in calls:
            check_call(call, sandbox)
        monkeypatch.chdir(ROOT)


def check_call(call, sandbox):
    program, *arguments = call
    if program in ("pip", "ruff"):
        return
    if program in ("torchrun", "deepspeed"):
        at = next(i for i, text in enumerate(arguments) if text in ("-m", "--module"))
        check_module(arguments[at + 1], arguments[at + 2 :], call)
    elif arguments[0] == "-m":
        check_module(arguments[1], arguments[2:], call)
    else:  # python FILE ...
        path = Path(arguments[0])
        assert (ROOT / path).exists(), call
        check_module(".".join(path.with_suffix("").parts), arguments[1:], call)


class Parsed(Exception):
    """What a command's parser made of its arguments."""


def check_module(name, arguments, call):
    """Has the command parse its arguments, and checks the configuration that they name; nothing else happens."""
    if name == "pytest":
        assert all((ROOT / a).exists() for a in arguments if not a.startswith("-")), call
        return
    assert _is_module(name), call
    if name == "opd.launch":
        check_module(arguments[0], arguments[1:], call)
        return
    if name == "tip.config":
        assert not arguments
        return
    options = parse(name, arguments, call)
    if getattr(options, "config", None):
        path = str(options.config)
        sections = SECTIONS if name.startswith("tip") else None
        config, _ = load_config(path, options.overrides, sections, ignore_extensions=not sections)
        for benchmark in config.eval.benchmarks:
            assert (ROOT / f"configs/benchmarks/{benchmark}.json").exists(), call
    if name == "tip.reproduce":
        table = f"figure{options.figure}" if options.figure else options.table
        table = f"table{table}" if table.isdigit() else table
        only(read_table(table), options.arms.split(",")) if options.arms else read_table(table)


def parse(name, arguments, call):
    original = argparse.ArgumentParser.parse_args

    def stop(self, args=None, namespace=None):
        raise Parsed(original(self, arguments, namespace))

    module = _load(name)
    argparse.ArgumentParser.parse_args = stop
    try:
        with contextlib.redirect_stdout(None):
            getattr(module, "command", None)(arguments) if hasattr(module, "command") else module.main()
    except Parsed as parsed:
        return parsed.args[0]
    except SystemExit:
        pytest.fail(f"refused: {call}")
    finally:
        argparse.ArgumentParser.parse_args = original
    pytest.fail(f"parses nothing: {call}")


def _load(name):
    """A module, or a benchmark, whose peers need not be installed to parse its arguments."""
    if not name.startswith("tests."):
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name.replace('.', '/')}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@each_readme
def test_every_command_in_its_text_names_what_exists(readme):
    for text in re.findall(r"`((?:bash|python -m|PYTHONPATH=\S+ python) [^`]+)`", prose(readme)):
        words = text.split()
        if words[0] == "bash":
            assert (ROOT / words[1]).exists(), text
        elif words[1] == "-m":
            assert _is_module(words[2]), text


# the code


CODE = [(readme, code) for readme in READMES for code in blocks(readme, "python")]
ENVIRONMENTS = [(readme, code) for readme, code in CODE if "import Score" in code]
CODE = [block for block in CODE if block not in ENVIRONMENTS]


def test_every_shown_way_to_extend_is_there():
    names = {str(readme.relative_to(ROOT)) for readme, _ in CODE}
    assert names == {"README.md", "opd/README.md", "tip/README.md"}


@pytest.mark.parametrize("readme,code", CODE, ids=[str(readme.relative_to(ROOT)) for readme, _ in CODE])
def test_every_code_block_runs(readme, code, tmp_path):
    name = re.search(r'"run_name=(\w+)"', code)[1]
    settings = ["optim.steps=2", "optim.warmup_steps=0", "eval.limit=4", "eval.k=1", f"output_dir={tmp_path}"]
    small = ", ".join(f'"{s}"' for s in [f"run_name={name}", *settings])
    shipped = set(RULES)
    try:
        exec(compile(code.replace(f'"run_name={name}"', small), str(readme), "exec"), {})
    finally:
        for rule in set(RULES) - shipped:
            del RULES[rule]
    assert (tmp_path / name / "summary.json").exists()
    rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    kept = [row["tokens/kept"] / row["tokens/response"] for row in rows]
    if name == "sure":  # half of each rollout
        assert all(0.4 < share <= 0.5 for share in kept)
    elif name == "unsure":  # a schedule from a half to a fifth of the update
        assert kept == pytest.approx([0.5, 0.2], abs=0.01)
        assert all(row["tip/forward_share"] == 0.5 for row in rows)
    else:  # weights, not a selection
        assert all(share > 0.5 for share in kept)


def test_the_shown_environment_is_one():
    ((_, code),) = ENVIRONMENTS
    names = {}
    exec(compile(code, "README", "exec"), names)
    clock, problem = names["Clock"](), {"time": "ten"}
    assert isinstance(clock, Environment)
    assert checked_messages(clock.reply(problem, ["call clock"])) == [{"role": "tool", "content": "ten"}]
    assert clock.reply(problem, ["call clock", "it is ten"]) is None
    assert checked_score(clock.score(problem, ["call clock", "it is ten"])).parts == {"time": True}


def test_python_is_the_version_that_is_asked_for():
    target = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["target-version"]
    assert f"Python 3.{target.removeprefix('py3')}" in FRONT.read_text()
