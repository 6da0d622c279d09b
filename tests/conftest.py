"""Fixtures. Tests marked slow run with --run-slow; the embedded pair is the shipped one."""

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
