"""DeepSpeed's ZeRO: it splits the optimizer (stage 1), the gradients (2) and the parameters (3) over the processes.

ZeRO-3 gathers a parameter while the module that owns it runs. Two things follow, and both are tested. Every call of the
model goes through the DeepSpeed engine's forward (LanguageModel.run); without it the gradients are silently wrong, by
28 % of the weights' norm after ten updates of a small model. And the fused loss runs in a module that owns the head
(opd.models.HeadScope).

DeepSpeed's own checkpoints are pickles for a fixed number of processes, so they are not used: moments and weights are
gathered by parameter name.
"""

import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from opd import distributed, models
from opd.config import Config
from opd.engine.adamw import load_moments, make_adamw, moments_by_name, set_rate
from opd.models import LanguageModel

GATHERED = 10**8  # numbers of a ZeRO-3 student that are whole at once on their way to vLLM


def initialize(**arguments: Any) -> Any:
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
def sharding(settings: dict[str, Any]) -> Iterator[None]:
    """While it holds, from_pretrained gives each process its part of the weights and no one the whole model."""
    from transformers.integrations import HfDeepSpeedConfig

    held = HfDeepSpeedConfig(settings)  # transformers looks for it through a weak reference
    yield
    del held


class WholeModel(torch.nn.Module):
    """What DeepSpeed takes as the model: its forward is whatever the trainer does with the model
    (LanguageModel.run)."""

    def __init__(self, lm: LanguageModel):
        super().__init__()
        self.model, self.head_scope = lm.model, lm.head_scope

    def forward(self, work: Callable[[], Any]) -> Any:
        return work()


class DeepSpeedEngine:
    """Owns the student through DeepSpeed. Stage 0 splits nothing; gradients are summed in float32 in every stage.

    DeepSpeed keeps a ZeRO-3 model, the teacher's too, for the rest of the process: one run to a process.
    """

    lockstep = True  # ZeRO-2 and 3 reduce within a backward pass

    def __init__(self, student: LanguageModel, config: Config, total_steps: int, settings: dict[str, Any]):
        zero = settings["zero_optimization"]
        self.config, self.total_steps, self.stage = config, total_steps, zero["stage"]
        self.model = student.model
        if config.engine.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.named_parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        # on the host AdamW's kernel is fused, as DeepSpeed's own CPU optimizer is, and needs no compiler
        fused = True if zero.get("offload_optimizer") else None
        self.optimizer = make_adamw(self.named_parameters.values(), config, self.stage == 3, fused)
        # ZeRO-1 of a bfloat16 model on the device is another class of DeepSpeed's, which links them itself
        separate = self.stage == 1 and settings["bf16"]["enabled"] and not zero.get("offload_optimizer")
        self.links_moments = self.stage in (1, 2) and not separate
        self.norm = math.nan
        if self.stage == 0:
            self.optimizer.register_step_pre_hook(self._clip)
        self.engine = initialize(model=WholeModel(student), optimizer=self.optimizer, config=settings)
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
        return set_rate(self.optimizer, self.config, step, self.total_steps)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss * distributed.world_size())  # DeepSpeed averages over the ranks, a loss here is a sum

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

    def weights(self) -> dict[str, Tensor]:
        """As Engine.weights; they are gathered one parameter at a time."""
        from deepspeed.utils import safe_get_full_fp32_param

        if self.stage == 0:
            return self.model.state_dict() if distributed.is_first() else {}
        return _on_first({name: (safe_get_full_fp32_param, p) for name, p in self.named_parameters.items()})

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """As Engine.named_weights, in the dtype of computation; ZeRO-3 gathers them bucket by bucket."""
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
        from deepspeed.utils import safe_get_full_optimizer_state

        if self.stage == 0:
            return moments_by_name(self.optimizer, self.named_parameters) if distributed.is_first() else {}
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
        """As Engine.load; each process takes its part, and the float32 weights beneath bfloat16 parameters too."""
        if self.stage == 0:
            return load_moments(self.optimizer, self.named_parameters, moments)
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
