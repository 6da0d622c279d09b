"""DeepSpeed's settings: the ZeRO file that engine.deepspeed names, checked, and what the pair file decides."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opd.config import ROOT, Config, read_json_object
from opd.errors import InputError

REFUSED = {  # key of DeepSpeed's file -> where the same is decided
    "optimizer": "optim.lr, optim.betas and optim.weight_decay (AdamW)",
    "scheduler": "optim.schedule and optim.warmup_steps",
    "gradient_clipping": "optim.grad_clip",
    "bf16": "student.dtype",
    "fp16": "student.dtype",
    "amp": "student.dtype",
    "torch_autocast": "student.dtype",
    "data_types": "student.dtype; gradients add up in float32",
    "communication_data_type": "nothing: gradients are reduced in float32",
    "train_batch_size": "rollout.prompts_per_step and rollout.n",
    "train_micro_batch_size_per_gpu": "optim.micro_batch_tokens",
    "gradient_accumulation_steps": "optim.micro_batch_tokens",
    "managed_gradient_accumulation": "the training step",
    "zero_force_ds_cpu_optimizer": "the engine: AdamW is torch's everywhere",
    "steps_per_print": "log",
}
ALLOWED = {"zero_optimization", "comms_logger", "flops_profiler", "wall_clock_breakdown", "memory_breakdown"}
INEXACT = {  # key of zero_optimization -> why it is refused
    "zero_quantized_weights": "it rounds weights on their way",
    "zero_quantized_gradients": "it rounds gradients",
    "zero_quantized_nontrainable_weights": "it rounds weights",
    "zenflow": "it delays updates, so rollouts are not on-policy",
    "super_offload": "it runs an optimizer of its own",
    "zero_hpz_partition_size": "moments are gathered over all processes",
    "mics_shard_size": "moments are gathered over all processes",
    "legacy_stage1": "it is another optimizer",
    "cpu_offload": "it is offload_optimizer by an old name",
    "compute_grad_norm": "gradients are clipped",
}
ZERO_KEYS = {
    "stage": int,
    "overlap_comm": bool,
    "contiguous_gradients": bool,
    "reduce_scatter": bool,
    "reduce_bucket_size": int,
    "allgather_partitions": bool,
    "allgather_bucket_size": int,
    "sub_group_size": int,
    "offload_optimizer": dict,
    "offload_param": dict,
    "round_robin_gradients": bool,
    "stage3_max_live_parameters": int,
    "stage3_max_reuse_distance": int,
    "stage3_prefetch_bucket_size": int,
    "stage3_param_persistence_threshold": int,
}
WORDS = {int: "a whole number", bool: "true or false", dict: "an object with device and pin_memory"}


def read_deepspeed(config: Config) -> dict[str, Any]:
    """DeepSpeed's settings: the file that engine.deepspeed names, checked, and what the pair file decides.

    Raises InputError for what is no ZeRO file, sets what the pair file decides, or cannot be exact here.
    """
    name = config.engine.deepspeed
    path = Path(name) if name.endswith(".json") else ROOT / "configs" / "deepspeed" / f"{name}.json"
    if not path.is_file():
        known = sorted(p.stem for p in (ROOT / "configs" / "deepspeed").glob("*.json"))
        raise InputError(f"engine.deepspeed: no file {name!r}; there are {known}, or give the path of a .json file.")
    settings = read_json_object(path)
    _check_keys(path, settings)
    zero, bf16 = settings["zero_optimization"], config.student.dtype == "bfloat16"
    _check_values(path, zero, bf16)
    return settings | {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.optim.grad_clip
        if zero["stage"]
        else 0.0,  # without ZeRO it keeps the norm to itself
        "bf16": {"enabled": bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**62,
    }


def _check_keys(path: Path, settings: Mapping[str, Any]) -> None:
    """Refuses keys that are decided elsewhere, unknown, inexact, or of another type."""
    for key in settings:
        if key in REFUSED:
            raise InputError(f"{path}: {key} is decided by {REFUSED[key]}. Remove it from DeepSpeed's file.")
        if key not in ALLOWED:
            raise InputError(f"{path}: {key} is not used here. Legal keys: {', '.join(sorted(ALLOWED))}.")
    zero = settings.get("zero_optimization")
    if not isinstance(zero, dict) or type(zero.get("stage")) is not int or zero["stage"] not in range(4):
        raise InputError(
            f"{path}: zero_optimization is {json.dumps(zero)[:80]}, expected an object with a stage from 0 to 3."
        )
    for key, value in zero.items():
        if key in INEXACT:
            raise InputError(f"{path}: zero_optimization.{key} is not supported: {INEXACT[key]}. Remove it.")
        expected = ZERO_KEYS.get(key)
        if expected is None:
            raise InputError(
                f"{path}: zero_optimization.{key} is not used here. Legal keys: {', '.join(sorted(ZERO_KEYS))}."
            )
        if type(value) is not expected:
            raise InputError(f"{path}: zero_optimization.{key} is {json.dumps(value)}, expected {WORDS[expected]}.")


def _check_values(path: Path, zero: Mapping[str, Any], bf16: bool) -> None:
    """Refuses combinations of stage, offload and dtype that ZeRO does not do, or does not do exactly."""
    stage = zero["stage"]
    offloads = {key: zero[key] for key in ("offload_optimizer", "offload_param") if key in zero}
    for key, values in offloads.items():
        if values.get("device") != "cpu":
            raise InputError(
                f"{path}: zero_optimization.{key}.device is {values.get('device')!r}, expected 'cpu': what lies on an "
                "NVMe cannot be saved and continued exactly here."
            )
        if more := set(values) - {"device", "pin_memory"}:
            raise InputError(
                f"{path}: zero_optimization.{key}.{min(more)} is not used here. Legal keys: device, pin_memory."
            )
    if "offload_param" in offloads and stage != 3:
        raise InputError(
            f"{path}: offload_param needs stage 3 and stage is {stage}: only split parameters can lie elsewhere."
        )
    if offloads and stage == 0:
        raise InputError(f"{path}: offload_optimizer needs stage 1, 2 or 3 and stage is 0. Set a stage, or remove it.")
    if zero.get("overlap_comm") and stage < 2:
        raise InputError(f"{path}: overlap_comm needs stage 2 or 3 and stage is {stage}. Remove it.")
    if stage == 0 and bf16:
        raise InputError(
            f"{path}: stage is 0 and student.dtype is 'bfloat16': DeepSpeed then adds gradients up in bfloat16. Set "
            "engine.deepspeed=zero1, or student.dtype=float32."
        )
