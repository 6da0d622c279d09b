"""The house: who imports whom, what the scripts may hold, what must stay in step."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = [*sorted(Path("scripts").glob("*.sh")), Path(".ci/run")]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "." * node.level


@pytest.mark.parametrize("path", sorted(Path("opd").glob("*.py")), ids=lambda p: p.stem)
def test_opd_never_imports_tip_or_data(path):
    assert not {name.split(".")[0] for name in imports(path)} & {"tip", "data", "tests"}
    assert "import_module" not in path.read_text() and "__import__" not in path.read_text()


def test_opd_is_complete_without_tip():
    """In a process where importing tip fails, every module of opd imports."""
    modules = [f"opd.{p.stem}" for p in Path("opd").glob("*.py") if p.stem != "__init__"]
    code = "import sys; sys.modules['tip'] = None; import " + ", ".join(modules)
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_unpickles_or_trusts_remote_code():
    for path in (*Path("opd").glob("*.py"), *Path("tip").glob("*.py"), *Path("data").rglob("*.py")):
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
    assert len(lines) <= 25 and "set -euo pipefail" in lines


@pytest.mark.parametrize("path", [*Path("opd").glob("*.py"), *Path("tip").glob("*.py")], ids=str)
def test_files_stay_short_enough_to_read(path):
    assert len(path.read_text().splitlines()) <= 550
