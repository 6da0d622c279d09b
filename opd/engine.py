"""What holds the weights and applies the update: plain torch on one device, or DeepSpeed's ZeRO on many.

Both are AdamW on float32 weights with the same learning-rate schedule and clipping; ZeRO splits optimizer (1),
gradients (2) and parameters (3) over the processes. Their state is the same too, by parameter name, so a checkpoint of
one process continues on eight and back; DeepSpeed's own checkpoints are pickles for a fixed number of processes, and
not used.

ZeRO-3 gathers a parameter while the module that owns it runs. Two things follow, both tested: every call of the model
goes through the DeepSpeed engine's forward (LanguageModel.run; without it gradients are silently wrong, by 28 % of the
weights' norm after ten updates of a small model), and the fused loss runs in a module that owns the head
(opd.models.HeadScope).
"""

import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opd import distributed, models
from opd.cli import InputError
from opd.config import ROOT, Config, Engine, Student, Teacher, read_json_object
from opd.loss import Head
from opd.models import LanguageModel

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
GATHERED = 10**8  # numbers of a ZeRO-3 student that are whole at once on their way to vLLM
WORDS = {int: "a whole number", bool: "true or false", dict: "an object with device and pin_memory"}


def learning_rate(step: int, total_steps: int, lr: float, schedule: str, warmup_steps: int) -> float:
    """Rate of update `step` (from 1): linear warm-up to `lr`, then constant, or a cosine that reaches 0 after the last.

    A function of the step alone, so resuming needs no scheduler state.
    """
    if step <= warmup_steps:
        return lr * step / warmup_steps
    if schedule == "constant":
        return lr
    progress = (step - 1 - warmup_steps) / (total_steps - warmup_steps)
    return lr * 0.5 * (1 + math.cos(math.pi * progress))


def pick_device(engine: Engine) -> torch.device:
    """The device of config section engine; sets the CPU threads. Raises InputError when cuda is asked for and
    missing."""
    if engine.kind == "torch" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "engine.kind 'torch' trains in one process, and WORLD_SIZE says there are more. Start it plainly, or set "
            "engine.kind=deepspeed and engine.deepspeed=zero2."
        )
    if engine.device == "cuda" and not torch.cuda.is_available():
        raise InputError("engine.device is 'cuda' and torch sees no GPU. Set engine.device to 'auto' or 'cpu'.")
    if engine.cpu_threads is not None:
        torch.set_num_threads(engine.cpu_threads)
    if engine.device != "cpu" and torch.cuda.is_available():
        if engine.kind == "deepspeed":
            local, here = (int(os.environ.get(f"LOCAL_{name}", n)) for name, n in (("RANK", "0"), ("WORLD_SIZE", "1")))
            if here > torch.cuda.device_count():
                raise InputError(
                    f"{here} processes on this machine, and torch sees {torch.cuda.device_count()} GPUs. Start as many "
                    "processes as there are GPUs (NUM_GPUS)."
                )
            torch.cuda.set_device(local)
            return torch.device("cuda", local)
        return torch.device("cuda")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, which transformers imports, warns that it guessed
    return torch.device("cpu")


def _adamw(
    parameters: Collection[Tensor], config: Config, sharded: bool = False, fused: bool | None = None
) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices alone. What ZeRO-3 has split keeps its dimensions in ds_shape."""
    dimensions = {p: len(p.ds_shape) if sharded else p.ndim for p in parameters}
    matrices = [p for p in parameters if dimensions[p] >= 2]
    vectors = [p for p in parameters if dimensions[p] < 2]  # norms and biases
    groups = [
        {"params": matrices, "weight_decay": config.optim.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.optim.lr, betas=config.optim.betas, fused=fused)


def _set_rate(optimizer: torch.optim.AdamW, config: Config, step: int, total_steps: int) -> float:
    optim = config.optim
    rate = learning_rate(step, total_steps, optim.lr, optim.schedule, optim.warmup_steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


class TorchEngine:
    """Owns the student's optimizer. The student's parameters are float32; autocast gives the compute dtype."""

    lockstep = False  # a micro-batch without kept tokens need not be run
    divides_late = True  # the gradient can be divided after it is summed

    def __init__(
        self,
        student: LanguageModel,
        config: Config,
        total_steps: int,
        value: Callable[[Tensor], Tensor] = Tensor.detach,
    ):
        self.student = student
        self.value = value  # of a tensor that may lie in host memory (opd.phases)
        self.config = config
        self.total_steps = total_steps
        model = student.model
        if config.engine.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.named_parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.optimizer = _adamw(self.named_parameters.values(), config)

    def start(self, step: int) -> float:
        """Before the backward passes of update `step`: training mode, no gradients, this update's learning rate."""
        self.student.model.train()  # checkpointing asks for it; there is no dropout
        self.optimizer.zero_grad(set_to_none=True)
        return _set_rate(self.optimizer, self.config, step, self.total_steps)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def finish(self, apply: bool, divisor: float = 1.0) -> float:
        """Divides the gradient, clips and steps; returns the norm of the whole gradient before clipping.

        `apply` False changes nothing.

        Raises FloatingPointError, with weights and moments unchanged, when the norm is not finite.
        """
        norm = 0.0
        if apply:
            distributed.sum_gradients(self.named_parameters.values())
            if divisor != 1:
                torch._foreach_div_([p.grad for p in self.named_parameters.values() if p.grad is not None], divisor)
            norm = torch.nn.utils.clip_grad_norm_(self.named_parameters.values(), self.config.optim.grad_clip).item()
            if not math.isfinite(norm):
                raise FloatingPointError(f"the norm of the gradient is {norm}")
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.student.model.eval()
        return norm

    def weights(self) -> dict[str, Tensor]:
        """The student's float32 weights by name, as save_pretrained takes them."""
        return dict(self.named_weights())

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight by every name it has: the LM head of a tied model under its own too. For vLLM."""
        for name, tensor in self.student.model.state_dict(keep_vars=True).items():
            yield name, self.value(tensor)

    def state(self) -> dict[str, Tensor]:
        """Optimizer moments by `<moment>.<parameter name>`; empty before the first step."""
        return {name: self.value(moment) for name, moment in _moments(self.optimizer, self.named_parameters).items()}

    def moments(self) -> list[Tensor]:
        """Of AdamW, on the device; its step counts are not."""
        return [m for state in self.optimizer.state.values() for key, m in state.items() if key != "step"]

    def load(self, moments: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        """Restores what `state` returned; the weights are there already. Raises KeyError when a moment is missing."""
        _load_moments(self.optimizer, self.named_parameters, moments)


def _moments(optimizer: torch.optim.AdamW, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        f"{key}.{name}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
    }


def _load_moments(
    optimizer: torch.optim.AdamW, parameters: Mapping[str, Tensor], moments: Mapping[str, Tensor]
) -> None:
    for name, parameter in parameters.items():
        if moments:  # a run that never stepped has none
            optimizer.state[parameter] = {
                key: moments[f"{key}.{name}"].to(parameter.device if key != "step" else "cpu")
                for key in ("step", "exp_avg", "exp_avg_sq")
            }


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
    stage, bf16 = zero["stage"], config.student.dtype == "bfloat16"
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
    return settings | {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.optim.grad_clip if stage else 0.0,  # without ZeRO it keeps the norm to itself
        "bf16": {"enabled": bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**62,
    }


def _teacher_settings(teacher: Teacher) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": 3}
    if teacher.placement == "host":
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "bf16": {"enabled": teacher.dtype == "bfloat16"},
        "steps_per_print": 2**62,
    }


def _initialize(**arguments: Any) -> Any:
    """deepspeed.initialize, quietly; on a CPU without its shared-memory kernels, which take two minutes to compile."""
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with redirect_stdout(sys.stderr):  # standard output carries results alone
        engine, *_ = deepspeed.initialize(**arguments)
    return engine


@contextmanager
def _sharding(settings: dict[str, Any]) -> Iterator[None]:
    """While it holds, from_pretrained gives each process its part of the weights and no one the whole model."""
    from transformers.integrations import HfDeepSpeedConfig

    held = HfDeepSpeedConfig(settings)  # transformers looks for it through a weak reference
    yield
    del held


class _Whole(torch.nn.Module):
    """What DeepSpeed takes as the model: its forward is whatever the trainer does with the model
    (LanguageModel.run)."""

    def __init__(self, lm: LanguageModel):
        super().__init__()
        self.model, self.head_scope = lm.model, lm.head_scope

    def forward(self, work: Callable[[], Any]) -> Any:
        return work()


def load_student(section: Student, device: torch.device, settings: dict[str, Any] | None) -> LanguageModel:
    """The student of a run; `settings` are DeepSpeed's, if it has the weights. Raises InputError like
    opd.models.load."""
    sharded = settings is not None and settings["zero_optimization"]["stage"] == 3
    return models.load(section, device, "student", _sharding(settings) if sharded else None)


def load_teacher(config: Config, device: torch.device, name: str = "teacher") -> LanguageModel:
    """The teacher where teacher.placement says. Raises InputError like opd.models.load."""
    if config.teacher.placement == "device":
        return models.load(config.teacher, device, name)
    settings = _teacher_settings(config.teacher)
    lm = models.load(config.teacher, device, name, _sharding(settings))
    engine = _initialize(model=_Whole(lm), config=settings)
    lm.model.eval()
    lm = replace(lm, run=engine, sharded=True)

    def copied(_: Tensor) -> Head:
        head = models.head_of(lm.model, lm.model.get_output_embeddings().out_features)
        return replace(head, weight=head.weight.detach().clone(), bias=None if head.bias is None else head.bias.clone())

    with torch.no_grad():
        head = lm.run(lambda: lm.head_scope(torch.zeros(1, device=device), copied))
    lm = replace(lm, whole_head=head)
    models.check_head(lm)
    return lm


class DeepSpeedEngine:
    """Owns the student through DeepSpeed. Stage 0 splits nothing; gradients are summed in float32 in every stage.

    DeepSpeed keeps a ZeRO-3 model, the teacher's too, for the rest of the process: one run to a process.
    """

    lockstep = True  # ZeRO-2 and 3 reduce within a backward pass, so ranks make the same number of them
    divides_late = False

    def __init__(self, student: LanguageModel, config: Config, total_steps: int, settings: dict[str, Any]):
        zero = settings["zero_optimization"]
        self.config, self.total_steps, self.stage = config, total_steps, zero["stage"]
        self.model = student.model
        if config.engine.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.named_parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        # on the host AdamW's kernel is fused, as DeepSpeed's own CPU optimizer is, and needs no compiler
        fused = True if zero.get("offload_optimizer") else None
        self.optimizer = _adamw(self.named_parameters.values(), config, self.stage == 3, fused)
        # ZeRO-1 of a bfloat16 model on the device is another class of DeepSpeed's, which links them itself
        separate = self.stage == 1 and settings["bf16"]["enabled"] and not zero.get("offload_optimizer")
        self.links_moments = self.stage in (1, 2) and not separate
        self.norm = math.nan
        if self.stage == 0:
            self.optimizer.register_step_pre_hook(self._clip)
        self.engine = _initialize(model=_Whole(student), optimizer=self.optimizer, config=settings)
        self.student = replace(student, run=self.engine, sharded=self.stage == 3)
        self.student.model.eval()
        if self.stage == 3:
            models.check_head(self.student)

    def _clip(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Stage 0, between the reduction and AdamW: what ZeRO does within its own step."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.optim.grad_clip).item()
        if not math.isfinite(self.norm):
            raise FloatingPointError(f"the norm of the gradient is {self.norm}")

    def start(self, step: int) -> float:
        self.engine.train()
        return _set_rate(self.optimizer, self.config, step, self.total_steps)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss * distributed.world_size())  # DeepSpeed averages over the ranks, a loss here is a sum

    def finish(self, apply: bool, divisor: float = 1.0) -> float:
        """As TorchEngine.finish. `divisor` is 1: split gradients are not divided afterwards (`divides_late`)."""
        self.model.eval()
        if not apply:
            return 0.0
        self.engine.step()
        if self.stage:
            self.norm = float(self.engine.get_global_grad_norm())
            if not self.engine.was_step_applied():
                raise FloatingPointError(f"the norm of the gradient is {self.norm}")
        return self.norm

    def weights(self) -> dict[str, Tensor]:
        """As TorchEngine.weights, gathered one parameter at a time; on the first rank, elsewhere empty."""
        from deepspeed.utils import safe_get_full_fp32_param

        if self.stage == 0:
            return self.model.state_dict() if distributed.is_first() else {}
        return _on_first({name: (safe_get_full_fp32_param, p) for name, p in self.named_parameters.items()})

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """As TorchEngine.named_weights, in the dtype of computation, on every rank; of ZeRO-3 gathered in buckets."""
        from deepspeed.runtime.zero import GatheredParameters

        whole = self.model.state_dict(keep_vars=True)
        if self.stage < 3:
            yield from whole.items()
            return
        buckets: list[dict[str, Tensor]] = [{}]
        for name, parameter in whole.items():
            held = sum(p.ds_numel for p in buckets[-1].values())
            if held and held + parameter.ds_numel > GATHERED:
                buckets.append({})
            buckets[-1][name] = parameter
        for bucket in buckets:
            with GatheredParameters(list(dict.fromkeys(bucket.values()))):
                yield from ((name, parameter.data) for name, parameter in bucket.items())

    def state(self) -> dict[str, Tensor]:
        """As TorchEngine.state; on the first rank, elsewhere empty."""
        from deepspeed.utils import safe_get_full_optimizer_state

        if self.stage == 0:
            return _moments(self.optimizer, self.named_parameters) if distributed.is_first() else {}
        stepped = [state for state in self.optimizer.state.values() if state]
        if not stepped:
            return {}
        self._link_moments()
        parts = {
            f"{key}.{name}": (safe_get_full_optimizer_state, p, key)
            for name, p in self.named_parameters.items()
            for key in ("exp_avg", "exp_avg_sq")
        }
        found = _on_first(parts)
        step = stepped[0]["step"].detach().cpu()
        return found | {f"step.{name}": step.clone() for name in self.named_parameters if found}

    def load(self, moments: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        """As TorchEngine.load, each rank its part; the float32 `weights` beneath bfloat16 parameters too."""
        if self.stage == 0:
            return _load_moments(self.optimizer, self.named_parameters, moments)
        if not moments:
            return None
        self._make_moments()
        step = next(value for name, value in moments.items() if name.startswith("step."))
        for state in self.optimizer.state.values():
            state["step"].copy_(step)
        for name, parameter in self.named_parameters.items():
            self._set(parameter, weights[name], None)
            for key in ("exp_avg", "exp_avg_sq"):
                self._set(parameter, moments[f"{key}.{name}"], key)
        return None

    def _make_moments(self) -> None:
        """AdamW makes its moments in its first step: one at rate 0 on a gradient of zeros, which changes nothing
        else."""
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        head = self.student.head_scope

        def nothing() -> Tensor:
            ids = torch.zeros(1, 1, dtype=torch.long, device=self.student.device)
            states = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            return head(states, lambda states: 0.0 * (states.sum() + sum(p.sum() for p in head.parameters())))

        self.engine.train()
        self.engine.backward(self.engine(nothing))
        self.engine.step()
        self.model.eval()
        self._link_moments()

    def _link_moments(self) -> None:
        """Tells the parameters of ZeRO-1 and 2 where their moments lie; DeepSpeed does so for the first group alone."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        if self.links_moments:
            zero = self.engine.optimizer
            for parameters, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
                lazy_init_hp_params_optimizer_state(parameters, flat, self.optimizer.state)

    def _set(self, parameter: torch.nn.Parameter, value: Tensor, moment: str | None) -> None:
        """This rank's part of a float32 weight, or of a moment of it."""
        from deepspeed import utils

        value = value.to(self.student.device, torch.float32)
        if self.stage == 3:
            size = parameter.ds_tensor.ds_numel
            whole = torch.nn.functional.pad(value.flatten(), (0, size * distributed.world_size() - value.numel()))
            part = whole[size * distributed.rank() :][:size]
            if moment is None:
                utils.safe_set_local_fp32_param(parameter, part)
            else:
                utils.safe_set_local_optimizer_state(parameter, part, moment)
        elif moment is None:
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, moment)


def _on_first(gathered: Mapping[str, tuple[Any, ...]]) -> dict[str, Tensor]:
    """Calls (function, *arguments) by name, each a collective of all ranks; the first rank keeps the tensors, on the
    CPU."""
    found = {}
    for name, (gather, *arguments) in gathered.items():
        value = gather(*arguments)
        if distributed.is_first():
            found[name] = value.detach().cpu().clone()
    return found
