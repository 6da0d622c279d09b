"""What the README says runs."""

import re
from pathlib import Path

README = Path("README.md")


def test_the_example_of_the_patch_point_runs(tiny_pair, tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    settings = ["optim.steps=2", "optim.warmup_steps=0", "eval.limit=4", "eval.k=1", f"output_dir={tmp_path}"]
    small = ", ".join(f'"{s}"' for s in ["run_name=confused", *settings])
    exec(compile(code.replace('"run_name=confused"', small), "README.md", "exec"), {})
    assert (tmp_path / "confused" / "summary.json").exists()


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
