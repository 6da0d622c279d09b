"""Does this trainer work on this machine's GPU, and how fast is it? Every answer goes into one table.

    PYTHONPATH=. python tests/benchmarks/check_gpu.py [--minutes N] [--toy] [--only NAME,NAME] [--out FOLDER]

Each check is a function in a checks_*.py. It runs in a forked child, so that one that crashes, or takes all memory,
takes nothing along. Its share of the time, and what the checks before it have left, is all the time it has: a check
that does not end within it is skipped. On a CPU, and with --toy, the same code runs at toy sizes.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from child import in_child

PACKAGES = ("torch", "transformers", "pydantic", "rich", "safetensors", "math-verify", "deepspeed", "vllm", "trl")
PACKAGES += ("liger-kernel", "triton", "flash-attn")
NEEDED = ("torch", "transformers")
OWN = ("opd", "tip", "data", "checks_numbers", "checks_memory", "checks_speed")


@dataclass(frozen=True)
class Check:
    """A function `name` of `module`, and the share of the time that it has."""

    name: str
    module: str
    share: float


CHECKS = (
    Check("loss", "checks_numbers", 0.06),
    Check("statistics", "checks_numbers", 0.04),
    Check("products", "checks_numbers", 0.03),
    Check("adamw", "checks_numbers", 0.03),
    Check("batching", "checks_numbers", 0.06),
    Check("decoding", "checks_numbers", 0.05),
    Check("two_phases", "checks_memory", 0.06),
    Check("loss_memory", "checks_memory", 0.06),
    Check("loss_speed", "checks_speed", 0.09),
    Check("update_memory", "checks_memory", 0.11),
    Check("rollout_speed", "checks_speed", 0.09),
    Check("whole_update", "checks_speed", 0.20),
    Check("resume", "checks_speed", 0.12),
)


def machine() -> dict[str, Any]:
    """What this machine is. It asks the GPU, so it runs in a child."""
    import torch

    facts: dict[str, Any] = {"cores": os.cpu_count(), "python": sys.version.split()[0], "device": "cpu"}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {"device": "cuda", "gpu": properties.name, "GiB": properties.total_memory / 2**30}
        facts |= {"capability": f"{properties.major}.{properties.minor}", "cuda": torch.version.cuda}
    return facts


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing"
    return found


def work_of(check: Check, device: str, toy: bool) -> dict[str, Any]:
    """Runs a check in this process. A package that is missing skips it."""
    import torch

    try:
        function = getattr(importlib.import_module(check.module), check.name)
        return function(torch.device(device), toy)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in OWN:
            raise
        return {"skipped": f"the package {error.name} is missing"}


def judge(answer: dict[str, Any], seconds: float, allowed: float) -> dict[str, Any]:
    """The result of a check, from what came of its child."""
    result: dict[str, Any] = {"seconds": seconds, "figures": {}, "judged": {}}
    if "value" not in answer:
        if seconds >= allowed:
            return result | {"status": "skipped", "reason": f"it does not fit: {answer['error']}"}
        return result | {"status": "failed", "reason": answer["error"]}
    value = answer["value"]
    if "skipped" in value:
        return result | {"status": "skipped", "reason": value["skipped"]}
    beyond = [name for name, (number, most) in value["judged"].items() if not number <= most]
    reason = "; ".join(
        f"{name} is {value['judged'][name][0]:.3g}, at most {value['judged'][name][1]:g}" for name in beyond
    )
    return result | value | {"status": "failed" if beyond else "passed", "reason": reason}


def table(results: dict[str, Any]) -> str:
    lines = [f"{name}: {fact}" for name, fact in results["machine"].items()]
    lines += ["", "packages: " + ", ".join(f"{name} {version}" for name, version in results["packages"].items()), ""]
    lines += ["| check | result | s | what |", "|---|---|---|---|"]
    for name, result in results["checks"].items():
        lines.append(
            f"| {name} | {result['status']} | {result['seconds']:.1f} | {result['reason'].replace('|', '/')} |"
        )
    lines += ["", "| check | figure | value | at most |", "|---|---|---|---|"]
    for name, result in results["checks"].items():
        lines += [f"| {name} | {key} | {number:.3g} | {most:g} |" for key, (number, most) in result["judged"].items()]
        lines += [f"| {name} | {key} | {_shown(value)} | |" for key, value in result["figures"].items()]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")


def run_all(checks: list[Check], results: dict[str, Any], out: Path, minutes: float, toy: bool) -> None:
    """Runs the checks one after another; after each one the files hold all that is known."""
    whole = sum(check.share for check in checks)
    end = begin = time.monotonic()
    for check in checks:
        end += 60 * minutes * check.share / whole
        start = time.monotonic()
        answer = in_child(partial(work_of, check, results["machine"]["device"], toy), max(1.0, end - start))
        seconds = time.monotonic() - start
        result = results["checks"][check.name] = judge(answer, seconds, max(1.0, end - start))
        say(begin, f"{check.name}: {result['status']} in {seconds:.1f} s {result['reason']}")
        (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        (out / "table.md").write_text(table(results) + "\n")


def main() -> None:
    cli = argparse.ArgumentParser()
    cli.add_argument("--minutes", type=float, default=8.0, help="the time that all checks have together (8)")
    cli.add_argument("--toy", action="store_true", help="toy sizes on a GPU too")
    cli.add_argument("--only", help="names of checks, comma separated: " + ", ".join(check.name for check in CHECKS))
    cli.add_argument("--out", type=Path, default=Path("outputs/check_gpu"))
    options = cli.parse_args()
    wanted = options.only.split(",") if options.only else [check.name for check in CHECKS]
    if unknown := set(wanted) - {check.name for check in CHECKS}:
        cli.error(f"--only names {sorted(unknown)}, expected names out of {[check.name for check in CHECKS]}")
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        sys.exit(f"error: {sys.executable} has no {' and no '.join(missing)}, without which nothing can be checked")
    for module in dict.fromkeys(check.module for check in CHECKS):  # imported once, so that the children need not
        with suppress(ModuleNotFoundError):
            importlib.import_module(module)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else a matrix product may add in another order
    results = {"machine": in_child(machine)["value"], "packages": versions(), "checks": {}}
    options.out.mkdir(parents=True, exist_ok=True)
    toy = options.toy or results["machine"]["device"] == "cpu"
    run_all([check for check in CHECKS if check.name in wanted], results, options.out, options.minutes, toy)
    print(table(results))
    sys.exit(any(result["status"] == "failed" for result in results["checks"].values()))


def say(begin: float, text: str) -> None:
    print(f"[{time.monotonic() - begin:.0f} s] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
