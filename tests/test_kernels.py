"""The Triton kernels of the loss, in Triton's interpreter on a CPU, against float64 and against PyTorch's path.

They run in a Python that has Triton: one of the environments that scripts/setup.sh makes beside the tests' own.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
from kernel_errors import CASES

PYTHONS = [Path(f".venv-{name}/bin/python") for name in ("vllm", "bench")]


@pytest.fixture(scope="module")
def answers():
    python = next((path for path in PYTHONS if (path.parent.parent / "installed").exists()), None)
    if python is None:
        pytest.skip("neither .venv-vllm nor .venv-bench is there, which have Triton: bash scripts/setup.sh --vllm")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": ".", "OMP_NUM_THREADS": "1"}
    return json.loads(
        subprocess.run([python, "tests/kernel_errors.py"], env=environment, capture_output=True, check=True).stdout
    )


@pytest.mark.parametrize("case", CASES)
def test_sums_and_gradients_are_those_of_float64(case, answers):
    for name, error in answers[case].items():
        assert error < (1e-2 if "bfloat16" in name else 1e-4), name
    assert len(answers[case]) == 10


def test_loss_and_statistics_are_those_without_kernels(answers):
    assert len(answers["differences"]) == 11
    assert max(answers["differences"].values()) < 2e-5, answers["differences"]
