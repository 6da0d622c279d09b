"""DeepSpeed's ZeRO: it splits the optimizer (stage 1), the gradients (2) and the parameters (3) over the processes.

ZeRO-3 makes a parameter whole only while a module that owns it runs. So every use of the model goes through the forward
of the DeepSpeed engine (LanguageModel.run). Without it the gradients are silently wrong, and after ten updates a small
model is off by 28 % of its parameters' norm. For the same reason the fused loss runs in a module that owns the LM head
(opd.models.HeadScope). Both are tested.

DeepSpeed's checkpoints are pickles for a fixed number of processes, so they are not used. Parameters and moments are
gathered by parameter name instead.
"""

import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from opd import distributed, models
from opd.config import Config
from opd.engine.adamw import clip, load_moments, make_adamw, named_moments, prepare_model, set_rate
from opd.models import LanguageModel

GATHERED = 10**8  # elements of a ZeRO-3 student that are made whole at once on their way to vLLM


def initialize(**arguments: Any) -> Any:
    """deepspeed.initialize without its messages.

    On a CPU it goes without DeepSpeed's shared-memory kernels, which take two minutes to compile.
    """
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
def sharding(settings: dict[str, Any]) -> Iterator[None]:
    """Within it, from_pretrained gives each process its part of the parameters, and no process the whole model."""
    from transformers.integrations import HfDeepSpeedConfig

    config = HfDeepSpeedConfig(settings)  # transformers has a weak reference to it, so this one keeps it alive
    yield
    del config


class WholeModel(torch.nn.Module):
    """The module that DeepSpeed wraps. Its forward calls the work that LanguageModel.run is given."""

    def __init__(self, lm: LanguageModel):
        super().__init__()
        self.model, self.head_scope = lm.model, lm.head_scope

    def forward(self, work: Callable[[], Any]) -> Any:
        return work()


class DeepSpeedEngine:
    """Implements opd.engine.Engine. Stage 0 splits nothing; every stage sums the gradients in float32.

    DeepSpeed keeps a ZeRO-3 model, the teacher's too, for the rest of the process: one run to a process.
    """

    lockstep = True  # ZeRO-2 and ZeRO-3 reduce gradients within a backward pass, which all processes have to make

    def __init__(self, student: LanguageModel, config: Config, total_steps: int, settings: dict[str, Any]):
        zero = settings["zero_optimization"]
        self.config, self.total_steps, self.stage, self.model = config, total_steps, zero["stage"], student.model
        self.named_parameters = prepare_model(student, config)
        offloads = bool(zero.get("offload_optimizer"))
        # torch's AdamW is as fast in host memory as DeepSpeed's CPU optimizer, and needs no compiler.
        self.optimizer = make_adamw(self.named_parameters.values(), config, self.stage == 3)
        # A bfloat16 model on the device makes ZeRO-1 another class of DeepSpeed's, which links its moments itself.
        links_itself = self.stage == 1 and settings["bf16"]["enabled"] and not offloads
        self.links_moments = self.stage in (1, 2) and not links_itself
        self.norm = math.nan  # of the latest gradient
        if self.stage == 0:
            self.optimizer.register_step_pre_hook(self._clip)
        self.engine = initialize(model=WholeModel(student), optimizer=self.optimizer, config=settings)
        self.student = replace(student, run=self.engine, sharded=self.stage == 3)
        self.student.model.eval()
        if self.stage == 3:
            self.student = models.tried(self.student)

    def _clip(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Clips between the reduction and AdamW's step in stage 0; the other stages clip within their step."""
        self.norm = clip((p for group in optimizer.param_groups for p in group["params"]), self.config)

    def start(self, step: int) -> float:
        self.engine.train()
        return set_rate(self.optimizer, self.config, step, self.total_steps)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss * distributed.world_size())  # DeepSpeed averages over processes, the trainer sums

    def finish(self, apply: bool) -> float:
        self.model.eval()
        if not apply:
            return 0.0
        self.engine.step()
        if self.stage:
            self.norm = float(self.engine.get_global_grad_norm())
            if not self.engine.was_step_applied():
                raise FloatingPointError(f"the norm of the gradient is {self.norm}")
        return self.norm

    def float32_parts(self) -> Iterator[tuple[str, Tensor]]:
        """As Engine.float32_parts. Stages 1 and 2 gather them one by one; in stage 3 nothing travels."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_local_fp32_param

        read = {0: Tensor.detach, 3: safe_get_local_fp32_param}.get(self.stage, safe_get_full_fp32_param)
        for name, parameter in self.named_parameters.items():
            yield name, read(parameter)

    def parameters_by_name(self) -> dict[str, Tensor]:
        """As Engine.parameters_by_name. They are gathered one by one."""
        from deepspeed.utils import safe_get_full_fp32_param

        if self.stage == 0:
            return self.model.state_dict() if distributed.is_first() else {}
        return _gathered({name: partial(safe_get_full_fp32_param, p) for name, p in self.named_parameters.items()})

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """As Engine.named_weights, in the compute dtype. ZeRO-3 gathers them bucket by bucket."""
        from deepspeed.runtime.zero import GatheredParameters

        parameters = self.model.state_dict(keep_vars=True)
        if self.stage < 3:
            yield from parameters.items()
            return
        buckets: list[dict[str, Tensor]] = [{}]
        for name, parameter in parameters.items():
            filled = sum(p.ds_numel for p in buckets[-1].values())
            if filled and filled + parameter.ds_numel > GATHERED:
                buckets.append({})
            buckets[-1][name] = parameter
        for bucket in buckets:
            with GatheredParameters(list(dict.fromkeys(bucket.values()))):  # a tied parameter has two names
                yield from ((name, parameter.data) for name, parameter in bucket.items())

    def moments_by_name(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        if self.stage == 0:
            return named_moments(self.optimizer, self.named_parameters) if distributed.is_first() else {}
        stepped = [moments for moments in self.optimizer.state.values() if moments]
        if not stepped:
            return {}
        self._link_moments()
        moments = _gathered(
            {
                f"{moment}.{name}": partial(safe_get_full_optimizer_state, p, moment)
                for name, p in self.named_parameters.items()
                for moment in ("exp_avg", "exp_avg_sq")
            }
        )
        step = stepped[0]["step"].detach().cpu()
        return moments | {f"step.{name}": step.clone() for name in self.named_parameters if moments}

    def load(self, moments: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
        """As Engine.load. Each process takes its part, also of the float32 copy beneath bfloat16 parameters."""
        if self.stage == 0:
            load_moments(self.optimizer, self.named_parameters, moments)
        elif moments:
            self._make_moments()
            step = next(tensor for name, tensor in moments.items() if name.startswith("step."))
            for created in self.optimizer.state.values():
                created["step"].copy_(step)
            for name, parameter in self.named_parameters.items():
                self._set(parameter, parameters[name], None)
                for moment in ("exp_avg", "exp_avg_sq"):
                    self._set(parameter, moments[f"{moment}.{name}"], moment)

    def _make_moments(self) -> None:
        """Makes AdamW create its moments, which it does in its first step.

        That step has rate 0 and a gradient of zeros, so it changes nothing else.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        head = self.student.head_scope

        def zero() -> Tensor:
            ids = torch.zeros(1, 1, dtype=torch.long, device=self.student.device)
            hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            return head(hidden, lambda hidden: 0.0 * (hidden.sum() + sum(p.sum() for p in head.parameters())))

        self.engine.train()
        self.engine.backward(self.engine(zero))
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

    def _set(self, parameter: torch.nn.Parameter, tensor: Tensor, moment: str | None) -> None:
        """Takes this process's part of a moment of a parameter; with None, of the float32 parameter itself."""
        from deepspeed import utils

        tensor = tensor.to(self.student.device, torch.float32)
        set_parameter, set_moment = utils.safe_set_full_fp32_param, utils.safe_set_full_optimizer_state
        if self.stage == 3:
            set_parameter, set_moment = utils.safe_set_local_fp32_param, utils.safe_set_local_optimizer_state
            tensor = own_part(tensor, parameter)
        if moment is None:
            set_parameter(parameter, tensor)
        else:
            set_moment(parameter, tensor, moment)


def splits_parameters(settings: Mapping[str, Any] | None) -> bool:
    """Whether DeepSpeed's settings split the student's parameters; None stands for the plain engine."""
    return settings is not None and settings["zero_optimization"]["stage"] == 3


def own_part(tensor: Tensor, parameter: torch.nn.Parameter) -> Tensor:
    """This process's part of a whole tensor with the shape of a split parameter, flat and padded as DeepSpeed does."""
    size = parameter.ds_tensor.ds_numel
    padding = size * distributed.world_size() - tensor.numel()
    return torch.nn.functional.pad(tensor.flatten(), (0, padding))[size * distributed.rank() :][:size]


def writable_part(parameter: torch.nn.Parameter) -> Tensor:
    """This process's part of a split parameter, flat, for a change in place. The parameter has no optimizer.

    DeepSpeed keeps small parameters whole between two uses. Such a copy is dropped, so that the next use gathers what
    was written.
    """
    parameter.partition()
    return parameter.ds_tensor


def whole_parameters(parameters: Mapping[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    """Split parameters as whole CPU tensors, gathered one by one; empty on all processes but the first."""
    from deepspeed.runtime.zero import GatheredParameters

    def whole(parameter: torch.nn.Parameter) -> Tensor:
        with GatheredParameters([parameter]):
            return parameter.detach().clone()

    return _gathered({name: partial(whole, parameter) for name, parameter in parameters.items()})


def _gathered(gathers: Mapping[str, Callable[[], Tensor]]) -> dict[str, Tensor]:
    """Calls functions that are collectives of all processes; the first process keeps their tensors, on the CPU."""
    tensors = {}
    for name, gather in gathers.items():
        tensor = gather()
        if distributed.is_first():
            tensors[name] = tensor.detach().cpu().clone()
    return tensors
