"""The front door: `--help` of every command and script answers before anything heavy is imported or set up."""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
from setuptools import find_packages

from data.commands import COMMANDS as DATA
from opd import entry, keys
from opd.commands import COMMANDS as OPD
from opd.config import ROOT, located
from opd.errors import InputError
from tip.commands import COMMANDS as TIP

COMMANDS = {command.module: command for commands in (OPD, TIP, DATA) for command in commands.values()}
SCRIPTS = sorted(path.name for path in Path("scripts").glob("*.sh") if path.name != "help.sh")
HEAVY = ("torch", "transformers", "numpy", "datasets", "rich")


@pytest.mark.parametrize("module", COMMANDS)
def test_help_imports_nothing_heavy(module):
    command = [sys.executable, "-X", "importtime", "-m", module, "--help"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.startswith(f"usage: python -m {module}")
    assert COMMANDS[module].summary in result.stdout and f"example:\n  {COMMANDS[module].example}\n" in result.stdout
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "argparse" in imported and not imported & set(HEAVY)


@pytest.mark.parametrize("module", COMMANDS)
def test_the_module_exists_and_takes_its_example(module):
    assert importlib.util.find_spec(module)
    words = shlex.split(COMMANDS[module].example)
    at = words.index(module)
    assert words[at - 2 : at] == ["python", "-m"]
    COMMANDS[module].parser().parse_known_args(words[at + 1 :])


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_explain_themselves_and_set_nothing_up(script, tmp_path):
    shutil.copytree("scripts", tmp_path / "scripts")
    for flag in ("--help", "-h"):
        command = ["bash", f"scripts/{script}", flag]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0 and result.stderr == ""
        assert f"bash scripts/{script}" in result.stdout and "\nExample: " in result.stdout
        assert not result.stdout.startswith("#") and "set -euo" not in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["scripts"]


def entered(monkeypatch, *arguments):
    """Exit code of `opd ARGUMENTS`, or the command line that it becomes."""

    def become(program, line):
        raise SystemExit(line[1:])

    monkeypatch.setattr(sys, "argv", ["opd", *arguments])
    monkeypatch.setattr(os, "execv", become)
    with pytest.raises(SystemExit) as ended:
        entry.enter("opd", "What it is.", OPD)
    return ended.value.code


def test_the_entry_point_lists_and_starts_its_commands(monkeypatch, capsys):
    for arguments in ((), ("--help",)):
        assert entered(monkeypatch, *arguments) == 0
        text = capsys.readouterr().out
        assert all(name in text and command.summary in text for name, command in OPD.items())
    assert entered(monkeypatch, "train", "--help") == 0
    assert capsys.readouterr().out.startswith("usage: python -m opd.train")
    assert entered(monkeypatch, "trian") == 2
    assert "did you mean 'train'?" in capsys.readouterr().err
    assert entered(monkeypatch, "config", "optim.lr") == ["-m", "opd.keys", "optim.lr"]


def test_the_package_declares_both_entry_points():
    scripts = tomllib.loads(Path("pyproject.toml").read_text())["project"]["scripts"]
    assert scripts.keys() == {"opd", "tip"}
    for target in scripts.values():
        module, name = target.split(":")
        assert callable(getattr(import_module(module), name))


def test_keys_are_explained(capsys):
    keys.command(["rollout"])
    lines = capsys.readouterr().out
    assert "rollout.truncated: Which tokens of a cut response count." in lines and "optim.lr" not in lines
    keys.command(["tip.rule"])
    assert "Default: 'soft_or'." in " ".join(capsys.readouterr().out.split())
    with pytest.raises(InputError, match=r"Did you mean 'optim\.lr'"):
        keys.command(["optim.lrr"])


def test_shipped_files_are_found_from_any_folder(tmp_path):
    """As after an editable install, which puts the checkout on Python's path."""
    code = "from opd.config import load_config as load; print(load('configs/tiny.json', ['output_dir=data/x'])[0])"
    environment = os.environ | {"PYTHONPATH": str(Path.cwd())}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    for path in ("data/tiny/pairs/chain/student", "data/tiny/pairs/chain/train.jsonl"):
        assert repr(f"{Path.cwd()}/{path}") in result.stdout
    assert "output_dir='data/x'" in result.stdout


def test_a_path_that_exists_here_or_nowhere_stays_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/tiny.json").write_text("{}")
    for text in ("configs/tiny.json", "configs/nothing.json", "Qwen/Qwen3-4B", "README.md", "opd/README.md"):
        assert located(text) == text
    assert located("configs/smollm2.json") == str(ROOT / "configs/smollm2.json")


def test_a_wheel_holds_the_two_packages_and_an_editable_install_the_whole_checkout():
    settings = tomllib.loads(Path("pyproject.toml").read_text())["tool"]["setuptools"]
    found = find_packages(include=settings["packages"]["find"]["include"])
    assert {name.partition(".")[0] for name in found} == {"opd", "tip"}
    assert settings["package-dir"] == {"": "."}  # setuptools makes a plain path of the checkout only then
