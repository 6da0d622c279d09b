"""What the README says runs."""

import json
import re
from pathlib import Path

import pytest

from tip.rules import RULES

README = Path("README.md")


@pytest.mark.parametrize("name", ["sure", "confused"])
def test_the_examples_of_the_patch_point_run(name, tiny_pair, tmp_path):
    (code,) = [c for c in re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if f'"run_name={name}"' in c]
    settings = ["optim.steps=2", "optim.warmup_steps=0", "eval.limit=4", "eval.k=1", f"output_dir={tmp_path}"]
    small = ", ".join(f'"{s}"' for s in [f"run_name={name}", *settings])
    try:
        exec(compile(code.replace(f'"run_name={name}"', small), "README.md", "exec"), {})
    finally:
        RULES.pop("sure_and_apart", None)
    assert (tmp_path / name / "summary.json").exists()
    rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    assert all((0.4 < row["tokens/kept"] / row["tokens/response"] <= 0.5) == (name == "sure") for row in rows)


def test_every_file_it_names_exists():
    text = README.read_text()
    named = set(re.findall(r"\]\(([a-z][\w/.]+)\)", text)) | set(
        re.findall(r"\b((?:scripts|configs|opd|tip|data)/[\w/]+\.\w+)", text)
    )
    assert named > {"scripts/test.sh", "configs/tiny.json"}
    missing = {name for name in named if not Path(name).exists()} - {"configs/mine.json"}
    assert not missing


def test_the_tree_lists_every_module():
    text = README.read_text()
    for path in (*Path("opd").glob("*.py"), *Path("tip").glob("*.py")):
        assert path.name == "__init__.py" or path.name in text, path
