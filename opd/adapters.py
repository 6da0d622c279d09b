"""LoRA adapters (student.lora): small matrices that learn beside frozen linear layers, by the peft library.

A layer with the weight W answers x W^T + scale (x A^T) B^T, where A is (rank, in), B is (out, rank) and scale is
alpha / rank (Hu et al., arXiv 2106.09685). B begins at 0, so the adapted model begins as the model itself. A and B are
float32 whatever the dtype of W. LM head and embeddings stay frozen, because the fused loss projects with the head's own
weight.

A checkpoint holds the adapters in the format of peft, and names the folder of the model beneath them.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from opd.config import LoraSection, StudentSection, TeacherSection
from opd.errors import InputError
from opd.files import read_object
from opd.seeds import generator

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # peft's names for its two files
NAME = "default"  # peft's name for an adapter among several
PREFIX = "base_model.model."  # stands before every name in peft's files
BENEATH = ".base_layer."  # stands in the names of the weights that an adapted layer wraps
Section = TypeVar("Section", StudentSection, TeacherSection)


def beneath(section: Section) -> Section:
    """The section of the model beneath the adapters of a folder; of any other model the section itself.

    Raises InputError for adapters that name no model.
    """
    path = Path(section.path) / SETTINGS
    if not path.is_file():
        return section
    settings = read_object(path, "the settings of an adapter")
    model = settings.get("base_model_name_or_path")
    if not isinstance(model, str) or not model:
        raise InputError(f"{path}: it names no model beneath the adapter (base_model_name_or_path). Restore the file.")
    return replace(section, path=model, revision=settings.get("revision"))


def check_plain(section: StudentSection) -> None:
    """Refuses adapters as the model that a run begins with. Raises InputError."""
    if beneath(section) is not section:
        raise InputError(
            f"student.path {section.path!r} holds adapters, and a run begins with a plain model. Make one of it first: "
            f"python -m opd.merge {section.path} --out DIR"
        )


def is_adapted(model: PreTrainedModel) -> bool:
    """Whether layers of the model have adapters."""
    return any(BENEATH in name for name, _ in model.named_parameters())


def targets_of(model: PreTrainedModel, lora: LoraSection, where: str) -> dict[str, torch.nn.Module]:
    """The linear layers that get adapters, by name. Raises InputError for a target that `where` does not have."""
    heads = (model.get_output_embeddings(), model.get_input_embeddings())
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not any(module is head for head in heads)
    }
    if not linear:
        raise InputError(
            f"student.lora is set, and {where} has no linear layers (torch.nn.Linear) that adapters could stand "
            "beside. Set student.lora=null."
        )
    if lora.targets == "all-linear":
        return linear
    kinds = {name.rpartition(".")[2] for name in linear}
    if unknown := [target for target in lora.targets if target not in kinds]:
        raise InputError(
            f"student.lora.targets has {unknown[0][:80]!r}, which is no linear layer inside {where}. Expected some of "
            f'{", ".join(sorted(kinds))}, or "all-linear".'
        )
    return {name: module for name, module in linear.items() if name.rpartition(".")[2] in lora.targets}


def count(model: PreTrainedModel, lora: LoraSection, where: str) -> int:
    """How many numbers the adapters hold. The model needs no weights for it. Raises InputError as targets_of does."""
    layers = targets_of(model, lora, where).values()
    return sum(lora.rank * (layer.in_features + layer.out_features) for layer in layers)


def add(model: PreTrainedModel, section: StudentSection, seed: int) -> None:
    """Adds fresh adapters to a plain model, and freezes everything else. Raises InputError as targets_of does.

    A is drawn from the seed and the name of its layer, uniformly as peft draws it; B is 0.
    """
    from peft import LoraConfig  # slow to import, as all of peft is

    targets = targets_of(model, section.lora, f"student.path {section.path!r}")
    settings = LoraConfig(
        r=section.lora.rank,
        lora_alpha=section.lora.alpha,
        target_modules=sorted(targets),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=section.path,
        revision=section.revision,
    )
    _inject(model, settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_A." in name:
                bound = 1 / math.sqrt(parameter.shape[1])
                drawn = torch.rand(parameter.shape, generator=generator(seed, "adapter", name), dtype=torch.float64)
                parameter.copy_((2 * drawn - 1) * bound)


def load(model: PreTrainedModel, folder: Path) -> None:
    """Adds the adapters of a folder to the model beneath them. Raises InputError where they do not belong to it."""
    from peft import LoraConfig

    try:
        _inject(model, LoraConfig.from_pretrained(folder))
        tensors, parameters = read(folder, model), trained(model)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[name])
    except Exception as error:  # foreign files can raise anything
        raise InputError(
            f"{folder}: its adapter does not fit the model that it names ({str(error)[:300]}). Restore the folder, or "
            "the model beneath it."
        ) from error


def read(folder: Path, model: PreTrainedModel) -> dict[str, Tensor]:
    """The adapters of a folder by parameter name. Raises ValueError where the model's adapters have other names."""
    tensors = load_file(folder / WEIGHTS)
    names = {_name_in_file(name): name for name in trained(model)}
    if names.keys() != tensors.keys():
        raise ValueError(f"{min(names.keys() ^ tensors.keys())} is not in both of them")
    return {names[in_file]: tensor for in_file, tensor in tensors.items()}


def _inject(model: PreTrainedModel, settings: Any) -> None:
    """Puts peft's layers into the model, which freezes all other parameters; the adapters are float32."""
    from peft import inject_adapter_in_model

    inject_adapter_in_model(settings, model, NAME)
    for parameter in trained(model).values():
        parameter.data = parameter.data.float()


@contextmanager
def without(model: PreTrainedModel) -> Iterator[None]:
    """Within it, the model computes as it does without its adapters."""
    layers = [module for _, module in adapted_layers(model)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def adapted_layers(model: PreTrainedModel) -> list[tuple[str, torch.nn.Module]]:
    """The names and modules of the layers that have adapters."""
    owners = sorted({name.partition(BENEATH)[0] for name, _ in model.named_parameters() if BENEATH in name})
    return [(owner, model.get_submodule(owner)) for owner in owners]


def trained(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """The parameters that learn, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _name_in_file(name: str) -> str:
    return PREFIX + name.replace(f".{NAME}.", ".")


def save(model: PreTrainedModel, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Writes the adapters `tensors`, by parameter name, as peft reads them, with the configuration of the model."""
    folder.mkdir(parents=True)
    model.peft_config[NAME].save_pretrained(folder)
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    save_file({_name_in_file(name): t.detach().cpu().contiguous() for name, t in tensors.items()}, folder / WEIGHTS)


def merged_weights(
    model: PreTrainedModel, content: Callable[[Tensor], Tensor] = Tensor.detach
) -> Iterator[tuple[str, Tensor]]:
    """Every weight of the model without adapters, under every name that it has there; adapted ones in float32.

    W + scale B A stands where W was. `content` reads a tensor that may wait in host memory (opd.phases).
    """
    for name, tensor in model.state_dict(keep_vars=True).items():
        owner, is_beneath, rest = name.partition(BENEATH)
        if not is_beneath:
            if not {"lora_A", "lora_B"} & set(name.split(".")):
                yield name, content(tensor)
        elif rest == "weight":
            yield f"{owner}.weight", _merged(model.get_submodule(owner), content)
        else:
            yield f"{owner}.{rest}", content(tensor)


def _merged(layer: torch.nn.Module, content: Callable[[Tensor], Tensor]) -> Tensor:
    a, b = (content(matrix[NAME].weight).float() for matrix in (layer.lora_A, layer.lora_B))
    return content(layer.base_layer.weight).float() + layer.scaling[NAME] * (b @ a)


def remove(model: PreTrainedModel) -> None:
    """Replaces every adapted layer by a plain one with the merged weight, so that the model is saved as any other."""
    for owner, layer in adapted_layers(model):
        plain = layer.base_layer
        plain.weight = torch.nn.Parameter(_merged(layer, Tensor.detach), requires_grad=False)
        model.set_submodule(owner, plain)
