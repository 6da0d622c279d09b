"""The house: who imports whom, how long a function may be, what the scripts may hold, what must stay in step."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = [*(p for p in sorted(Path("scripts").glob("*.sh")) if p.name != "help.sh"), Path(".ci/run")]
OPD, TIP, DATA, TESTS = (sorted(Path(name).rglob("*.py")) for name in ("opd", "tip", "data", "tests"))
WINGS = {"rollout", "teacher", "engine", "record"}
HALL = {"opd.train", "opd.build", "opd.evaluate", "opd.plan"}  # what uses the wings and is not used by them
MOST_LINES, MOST_PARAMETERS = 60, 8


def module(path):
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def imports(path):
    """The modules that a file imports, wherever in it."""
    known = {module(p) for p in (*OPD, *TIP, *DATA)}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            submodules = [name for name in names if name in known]
            yield from submodules
            if len(submodules) < len(names):
                yield node.module or "." * node.level


def functions(path):
    return [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_the_files_of_every_folder_are_looked_at():
    assert {"opd/step.py", "opd/rollout/local.py", "opd/record/folder.py"} <= set(map(str, OPD))
    assert "tip/results/collect.py" in map(str, TIP) and "data/tiny/build.py" in map(str, DATA)


@pytest.mark.parametrize("path", OPD, ids=str)
def test_opd_never_imports_tip_or_data(path):
    assert not {name.split(".")[0] for name in imports(path)} & {"tip", "data", "tests"}
    assert "import_module" not in path.read_text() and "__import__" not in path.read_text()


@pytest.mark.parametrize("path", OPD, ids=str)
def test_opd_names_neither_its_extension_nor_its_example(path):
    assert not re.findall(r"\btip\b|\btiny\b", path.read_text())


def test_no_import_goes_in_a_circle():
    known = {module(path): path for path in (*OPD, *TIP, *DATA)}
    graph = {name: {found for found in imports(path) if found in known} for name, path in known.items()}
    finished: set[str] = set()

    def visit(name, above):
        assert name not in above, " -> ".join([*above[above.index(name) :], name])
        if name not in finished:
            for below in sorted(graph[name]):
                visit(below, [*above, name])
            finished.add(name)

    for name in graph:
        visit(name, [])


@pytest.mark.parametrize("path", [p for p in OPD if p.parts[1] in WINGS], ids=str)
def test_wings_are_not_above_the_hall(path):
    upwards = set(imports(path)) & HALL
    if path.parts[1] == "rollout":
        upwards -= {"opd.plan"}  # it knows the size of a model
    assert not upwards


def test_opd_is_complete_without_tip():
    """In a process where importing tip fails, every module of opd imports; its kernels need Triton, and so CUDA."""
    modules = ", ".join(module(path) for path in OPD if path.stem != "kernels")
    subprocess.run([sys.executable, "-c", f"import sys; sys.modules['tip'] = None; import {modules}"], check=True)


@pytest.mark.parametrize("path", [*OPD, *TIP, *DATA, *TESTS], ids=str)
def test_private_names_stay_in_their_module(path):
    """No `other._name`, and no `from other import _name`; methods of one's own class are fine."""
    tree = ast.parse(path.read_text())
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            ours = isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("opd", "tip", "data")
            assert not ours or not [a.name for a in node.names if a.name.startswith("_")], path
            modules |= {a.asname or a.name.split(".")[0] for a in node.names} if ours else set()
    used = {
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules
        if node.attr.startswith("_") and not node.attr.startswith("__")
    }
    assert not used


@pytest.mark.parametrize("path", [*OPD, *TIP, *DATA], ids=str)
def test_functions_fit_on_a_screen(path):
    for function in functions(path):
        lines = function.end_lineno - function.lineno + 1
        arguments = function.args
        parameters = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        count = len([p for p in parameters if p.arg not in ("self", "cls", "ctx")])
        assert lines <= MOST_LINES, f"{function.name} has {lines} lines"
        assert count <= MOST_PARAMETERS, f"{function.name} has {count} parameters"


def test_the_update_is_short_enough_to_be_read_at_once():
    for function in functions(Path("opd/step.py")):
        assert function.end_lineno - function.lineno + 1 <= 45, function.name


def test_the_formatter_has_no_exceptions():
    for path in (*OPD, *TIP, *DATA, *TESTS):
        assert "fmt: " + "skip" not in path.read_text() and "fmt: " + "off" not in path.read_text(), path


def test_nothing_unpickles_or_trusts_remote_code():
    for path in (*OPD, *TIP, *DATA):
        source = path.read_text()
        for word in ("torch.load", "import pickle", "trust_remote_code=True", "eval(", "exec("):
            found = [
                line for line in source.splitlines() if word in line and ".eval(" not in line and "def " not in line
            ]
            assert not found, (path, found)


def test_requirements_differ_only_in_vllm():
    gpu, cpu = (
        {line for line in Path(name).read_text().splitlines() if line and not line.startswith("#")}
        for name in ("requirements.txt", "requirements-cpu.txt")
    )
    assert {line.partition("==")[0] for line in gpu - cpu} == {"vllm"} and cpu < gpu
    assert all("==" in line for line in gpu)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_are_thin(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 32 and "set -euo pipefail" in lines
