"""DeepSpeed's settings: the checked ZeRO file that engine.deepspeed names, and the settings of the pair file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opd.config import ROOT, Config, read_json_object
from opd.errors import InputError

DECIDED = {  # key of DeepSpeed's file -> the key of the pair file that decides it
    "optimizer": "optim.lr, optim.betas and optim.weight_decay (AdamW)",
    "scheduler": "optim.schedule and optim.warmup_steps",
    "gradient_clipping": "optim.grad_clip",
    **dict.fromkeys(("bf16", "fp16", "amp", "torch_autocast"), "student.dtype"),
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
REFUSED = {  # key of zero_optimization -> why it is refused
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
NUMBERS = ("stage", "sub_group_size", "reduce_bucket_size", "allgather_bucket_size")
STAGE3_NUMBERS = (
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
)
SWITCHES = ("overlap_comm", "contiguous_gradients", "reduce_scatter", "allgather_partitions", "round_robin_gradients")
OFFLOADS = ("offload_optimizer", "offload_param")
ZERO_KEYS = {
    **dict.fromkeys(NUMBERS + STAGE3_NUMBERS, int),
    **dict.fromkeys(SWITCHES, bool),
    **dict.fromkeys(OFFLOADS, dict),
}
WORDS = {int: "a whole number", bool: "true or false", dict: "an object with device and pin_memory"}


def read_deepspeed(config: Config) -> dict[str, Any]:
    """The settings that deepspeed.initialize takes for this configuration.

    Raises:
        InputError: the file is no ZeRO file, or sets what the pair file decides, or cannot be exact here.
    """
    name = config.engine.deepspeed
    path = Path(name) if name.endswith(".json") else ROOT / "configs" / "deepspeed" / f"{name}.json"
    if not path.is_file():
        known = sorted(p.stem for p in (ROOT / "configs" / "deepspeed").glob("*.json"))
        raise InputError(f"engine.deepspeed: no file {name!r}; there are {known}, or give the path of a .json file.")
    settings = read_json_object(path)
    if fault := _fault(settings, config.student.dtype == "bfloat16"):
        raise InputError(f"{path}: {fault}")
    has_stage = settings["zero_optimization"]["stage"] > 0
    return settings | {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.optim.grad_clip if has_stage else 0.0,  # without ZeRO it hides the norm
        "bf16": {"enabled": config.student.dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**62,
    }


def _fault(settings: Mapping[str, Any], bf16: bool) -> str | None:
    """The first thing that is wrong with the keys of a file, and what to do; None when nothing is."""
    for key in settings:
        if key in DECIDED:
            return f"{key} is decided by {DECIDED[key]}. Remove it from DeepSpeed's file."
        if key not in ALLOWED:
            return f"{key} is not used here. Legal keys: {', '.join(sorted(ALLOWED))}."
    zero = settings.get("zero_optimization")
    if not isinstance(zero, dict) or type(zero.get("stage")) is not int or zero["stage"] not in range(4):
        return f"zero_optimization is {json.dumps(zero)[:80]}, expected an object with a stage from 0 to 3."
    for key, value in zero.items():
        if key in REFUSED:
            return f"zero_optimization.{key} is not supported: {REFUSED[key]}. Remove it."
        if key not in ZERO_KEYS:
            return f"zero_optimization.{key} is not used here. Legal keys: {', '.join(sorted(ZERO_KEYS))}."
        if type(value) is not ZERO_KEYS[key]:
            return f"zero_optimization.{key} is {json.dumps(value)}, expected {WORDS[ZERO_KEYS[key]]}."
    return _combination_fault(zero, bf16)


def _combination_fault(zero: Mapping[str, Any], bf16: bool) -> str | None:
    """As _fault, for a stage, offloads and a dtype that do not go together, or not exactly."""
    stage = zero["stage"]
    offloads = {key: zero[key] for key in OFFLOADS if key in zero}
    for key, offload in offloads.items():
        if offload.get("device") != "cpu":
            return (
                f"zero_optimization.{key}.device is {offload.get('device')!r}, expected 'cpu': what lies on an NVMe "
                "cannot be saved and continued exactly here."
            )
        if unknown := set(offload) - {"device", "pin_memory"}:
            return f"zero_optimization.{key}.{min(unknown)} is not used here. Legal keys: device, pin_memory."
    if "offload_param" in offloads and stage != 3:
        return f"offload_param needs stage 3 and stage is {stage}: only split parameters can lie elsewhere."
    if offloads and stage == 0:
        return "offload_optimizer needs stage 1, 2 or 3 and stage is 0. Set a stage, or remove it."
    if zero.get("overlap_comm") and stage < 2:
        return f"overlap_comm needs stage 2 or 3 and stage is {stage}. Remove it."
    if stage == 0 and bf16:
        return (
            "stage is 0 and student.dtype is 'bfloat16': DeepSpeed then adds gradients up in bfloat16. Set "
            "engine.deepspeed=zero1, or student.dtype=float32."
        )
    return None
