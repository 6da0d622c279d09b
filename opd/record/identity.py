"""What decides the numbers of a run: its configuration, the content of its files, and its weighter."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from opd import grading, sources
from opd.benchmarks import Benchmark, described
from opd.config import Config
from opd.engine.zero_file import read_deepspeed
from opd.hooks import TokenWeighter
from opd.models import read_chat_template
from opd.rollout import environment

MACHINE = {  # section -> keys that fit a run to a machine and change no number, so it may continue with others
    "rollout": ("servers", "timeout", "gpu_memory"),
    "engine": ("phases",),
    "teacher": ("cache_gb", "servers", "timeout"),
    "log": ("to",),
}


def identity_of(
    config: Config, sections: Mapping[str, Any], benchmarks: Mapping[str, Benchmark], weighter: TokenWeighter
) -> dict[str, Any]:
    """Everything that decides the numbers of a run, as plain data. Raises InputError for files that cannot be read.

    `sections` are the configurations of extensions by name, each a dataclass.
    """
    return {
        "config": {**asdict(config), **{name: asdict(section) for name, section in sections.items()}},
        "benchmarks": {name: described(benchmark) for name, benchmark in benchmarks.items()},
        "grader": grading.VERSION,
        "environments": environment_versions(config, benchmarks) or None,
        "files": _digests(config, benchmarks),
        "weighter": f"{type(weighter).__module__}.{type(weighter).__qualname__}",
        "weighter_settings": {k: v for k, v in vars(weighter).items() if isinstance(v, str | int | float | None)},
        "deepspeed": read_deepspeed(config) if config.engine.kind == "deepspeed" else None,
    }


def environment_versions(config: Config, benchmarks: Mapping[str, Benchmark]) -> dict[str, str]:
    """The versions of all environments: that of training as data.environment, the others by benchmark.

    Raises InputError for one that cannot be made.
    """
    sections = {"data.environment": config.data.environment} | {n: b.environment for n, b in benchmarks.items()}
    loaded = {name: environment.load(section) for name, section in sections.items()}
    return {name: answers.version for name, answers in loaded.items() if answers is not None}


def differences(recorded: Mapping[str, Any], identity: Mapping[str, Any]) -> list[str]:
    """The keys in which a recorded run differs from this one, each with both settings. MACHINE does not count.

    Raises KeyError, TypeError or AttributeError where `recorded` is not what `identity_of` returns.
    """
    old, new = {key: recorded.get(key) for key in identity}, json.loads(json.dumps(identity))
    old["config"], new["config"] = without_machine(old["config"]), without_machine(new["config"])
    return _differences(old, new, "")


def without_machine(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without the keys of MACHINE."""
    return {**config} | {
        name: {key: setting for key, setting in config[name].items() if key not in MACHINE[name]}
        for name in MACHINE.keys() & config.keys()
    }


def start_folder(shared: Path, identity: Mapping[str, Any]) -> Path:
    """The folder below `shared` for runs whose step-0 models and teachers evaluate alike."""
    config = without_machine(identity["config"])
    same = {key: config[key] for key in ("student", "teacher", "data", "rollout", "eval", "engine", "seed")}
    same |= {key: identity[key] for key in ("benchmarks", "grader", "environments", "files")}
    same["loss"] = config["loss"]["chunk_bytes"]  # it decides the last bit of the measured reverse KL
    return shared / f"start_{hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:16]}"


def _differences(old: Any, new: Any, path: str) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted({*old, *new})
        return [d for k in keys for d in _differences(old.get(k), new.get(k), f"{path}.{k}" if path else k)]
    return [] if old == new else [f"{path.removeprefix('config.')} (there {json.dumps(old)}, here {json.dumps(new)})"]


def _digests(config: Config, benchmarks: Mapping[str, Benchmark]) -> dict[str, str]:
    """What tells the content of files and data sets, because another one under the same name makes another run.

    Raises InputError for one that cannot be read.
    """
    paths = [*config.data.train, *(benchmark.file for benchmark in benchmarks.values())]
    digests = {path: sources.digest(path) for path in paths}
    if template := read_chat_template(config.student):
        digests[config.student.chat_template] = hashlib.sha256(template.encode()).hexdigest()
    return digests
