"""Fixtures. Tests marked slow run with --run-slow; the embedded pair is the shipped one."""

import json
import shutil
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser):
    parser.addoption("--run-slow", action="store_true", help="also run the tests marked slow")
    parser.addoption("--run-vllm", action="store_true", help="also run the tests that start vLLM")


def pytest_collection_modifyitems(config, items):
    for item in items:
        for mark, how in (("slow", "--run-slow"), ("vllm", "scripts/test.sh --vllm")):
            if mark in item.keywords and not config.getoption(f"--run-{mark}"):
                item.add_marker(pytest.mark.skip(reason=f"{mark}: run with {how}"))


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.chdir(ROOT)  # paths in the shipped configs start at the repository


@pytest.fixture(scope="session")
def tiny_pair() -> Path:
    """Folder of the embedded pair."""
    return ROOT / "data" / "tiny" / "pairs" / "chain"


@pytest.fixture
def setup(tiny_pair, tmp_path):
    """A folder with a working pair, problems, benchmark and config; nothing in it refers to anything outside."""
    shutil.copytree(tiny_pair, tmp_path / "pair")
    benchmark = json.loads(Path("configs/benchmarks/tiny.json").read_text())
    benchmark["file"] = str(tmp_path / "pair/test.jsonl")
    (tmp_path / "bench.json").write_text(json.dumps(benchmark))
    config = json.loads(Path("configs/tiny.json").read_text())
    config["student"]["path"] = str(tmp_path / "pair/student")
    config["teacher"]["path"] = str(tmp_path / "pair/teacher")
    config["data"]["train"] = [str(tmp_path / "pair/train.jsonl")]
    config["eval"] |= {"benchmarks": [str(tmp_path / "bench.json")], "limit": 4}
    config["output_dir"] = str(tmp_path / "out")
    (tmp_path / "pair.json").write_text(json.dumps(config))
    return tmp_path
