"""Fixtures. Tests marked slow run with --run-slow; the embedded pair is built once into outputs/tiny and reused."""

from pathlib import Path

import pytest
import torch

from data.tiny import build

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser):
    parser.addoption("--run-slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--run-slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: run with --run-slow"))


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.chdir(ROOT)  # paths in the shipped configs start at the repository


@pytest.fixture(scope="session")
def tiny_pair() -> Path:
    """Folder of the embedded pair."""
    return build.build(ROOT / "outputs" / "tiny")
