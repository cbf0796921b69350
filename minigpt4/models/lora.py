"""LoRA (Hu et al., 2021) on linear layers of the frozen language model, through peft.

Such a layer computes x W^T + (alpha / r) x A^T B^T: W [out, in] is frozen, in any precision, perhaps quantised or
sharded; A [r, in] and B [out, r] are trained in float32, and B begins as zero. Checkpoints hold A and B under peft's
names.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minigpt4.common.errors import UserError, nearest, see
from minigpt4.common.schema import ModelConfig
from minigpt4.models.quantization import QuantizedLinear

TARGETS = "model.lora_target_modules"
_PREFIX = "llama_model.base_model.model."  # in checkpoints: peft wraps the LM twice
_SEE = see("lora-weights-that-do-not-fit")


class LoraSettings(NamedTuple):
    """LoRA of a ``model`` section: rank, scale and dropout, and [out, in] of each layer by its name in the LM."""

    r: int
    alpha: int
    dropout: float
    layers: dict[str, tuple[int, int]]

    @property
    def scaling(self) -> float:
        """The factor of B A."""
        return self.alpha / self.r

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """The shape of each tensor by its name in a checkpoint."""
        shapes = {}
        for name, (rows, columns) in self.layers.items():
            shapes |= zip(tensor_names(name), ((self.r, columns), (rows, self.r)), strict=True)
        return shapes


def lora_settings(cfg: ModelConfig, llm: nn.Module) -> LoraSettings | None:
    """Finds the layers that ``lora_target_modules`` names in a built LM; None without ``lora_r``.

    A name matches layers by the last parts of theirs, as in peft. Raises UserError where one matches no layer, or where
    the rank exceeds the width of a layer.
    """
    if not cfg.lora_r:
        return None
    head = llm.get_output_embeddings()  # its loss is computed in chunks, without gradients of its weights
    linear = {n: layer for n, layer in llm.named_modules() if isinstance(layer, nn.Linear) and layer is not head}
    chosen: set[str] = set()
    for target in cfg.lora_target_modules:
        found = [name for name in linear if f".{name}".endswith(f".{target}")]
        if not found:
            known = list(dict.fromkeys(name.rpartition(".")[2] for name in linear))
            problem = f"'{target}' matches no linear layer of the language model's decoder"
            raise UserError(f"{TARGETS}: {problem}.{nearest(target, known)} It has: {', '.join(known)}.")
        chosen.update(found)
    layers = {name: (layer.out_features, layer.in_features) for name, layer in linear.items() if name in chosen}
    narrowest = min(layers, key=lambda name: min(layers[name]))
    if cfg.lora_r > (width := min(layers[narrowest])):
        cause = f"but {narrowest} is only {width} wide; a rank above the width has no effect of its own"
        raise UserError(f"model.lora_r is {cfg.lora_r}, {cause}. Usual ranks are 8 to 64.")
    return LoraSettings(cfg.lora_r, cfg.lora_alpha, cfg.lora_dropout, layers)


def add_lora(llm: nn.Module, settings: LoraSettings) -> None:
    """Adds new LoRA weights to the layers of a loaded LM, in place; until they are trained they change nothing."""
    from peft import LoraConfig, inject_adapter_in_model  # takes half a second to import

    targets = {"target_modules": list(settings.layers), "lora_dropout": settings.dropout}
    inject_adapter_in_model(LoraConfig(r=settings.r, lora_alpha=settings.alpha, **targets), llm)
    for parameter in lora_parameters(llm).values():  # peft creates them in the precision of the layer
        parameter.data = parameter.data.float()


def lora_parameters(llm: nn.Module) -> dict[str, nn.Parameter]:
    """The LoRA weights of an LM by their names in a checkpoint."""
    return {checkpoint_name(f"llama_model.{n}"): p for n, p in llm.named_parameters() if is_lora(n)}


def tensor_names(layer: str) -> tuple[str, str]:
    """The names of A and B in a checkpoint, for a layer by its name in the LM."""
    return f"{_PREFIX}{layer}.lora_A.weight", f"{_PREFIX}{layer}.lora_B.weight"


def is_lora(name: str) -> bool:
    """Whether a parameter's name, in a model or a checkpoint, is that of a LoRA weight."""
    return ".lora_A." in name or ".lora_B." in name


def checkpoint_name(name: str) -> str:
    """The name that a checkpoint has for a parameter of ``MiniGPT4``: peft's for LoRA weights."""
    if not is_lora(name):
        return name
    return name.replace("llama_model.", _PREFIX, 1).replace(".default.weight", ".weight")


def train_dropout(llm: nn.Module, mode: bool) -> None:
    """Switches LoRA's dropout on, where its weights are trained, or off; the frozen rest stays in eval mode."""
    mode = mode and any(parameter.requires_grad for parameter in lora_parameters(llm).values())
    for name, module in llm.named_modules():
        if name.endswith("lora_dropout"):
            module.train(mode)


def match_lora(
    settings: LoraSettings | None, state: Mapping[str, Tensor], where: str, alpha: int | None, is_required: bool
) -> dict[str, Tensor]:
    """The LoRA weights among the tensors of a checkpoint, compared with a model's settings; reads no values.

    Args:
        settings: of the model.
        state: tensors by name.
        where: key and path of the file, for messages.
        alpha: the file's ``lora_alpha``, if it has one.
        is_required: whether a file without LoRA is an error; otherwise nothing is returned for it.

    Raises UserError if only one of model and file has LoRA, or where layers, rank, width or ``lora_alpha`` differ.
    """
    found = {name.replace(".default.weight", ".weight"): value for name, value in state.items() if ".lora_" in name}
    if settings is None and found:
        ranks, modules = _describe(found)
        keys = f"model.lora_r: {ranks}, model.lora_alpha: {alpha or '(as trained)'} and {TARGETS}: [{modules}]"
        raise UserError(f"{where} holds LoRA weights, but model.lora_r is 0; set {keys}.{_SEE}")
    if settings is None or not (found or is_required):
        return {}
    if not found:
        raise UserError(f"{where} holds no LoRA weights, but model.lora_r is {settings.r}; remove model.lora_r.{_SEE}")
    if problem := _difference(settings, found):
        raise UserError(f"{where} does not match the model's LoRA: {problem}.{_SEE}")
    if alpha not in (None, settings.alpha):
        raise UserError(f"{where} was trained with model.lora_alpha {alpha}, not {settings.alpha}; set {alpha}.{_SEE}")
    return found


def _difference(settings: LoraSettings, found: Mapping[str, Tensor]) -> str | None:
    """How LoRA weights differ from those of a model; None where they match."""
    expected = settings.shapes
    ranks, modules = _describe(found)
    _, own = _describe(settings.shapes)
    if ranks != str(settings.r):
        return f"the file has rank {ranks}, model.lora_r is {settings.r}"
    if unknown := [name for name in found if name not in expected]:
        share = f"{len(unknown)} of its {len(found)} tensors are of layers without LoRA here"
        return f"{share}, such as '{unknown[0].removeprefix(_PREFIX)}' (trained: {modules}; {TARGETS}: {own})"
    for name, value in found.items():
        if tuple(value.shape) != expected[name] or not value.is_floating_point():
            shapes = f"is {list(value.shape)} {value.dtype} in the file and {list(expected[name])} in the model"
            return f"'{name.removeprefix(_PREFIX)}' {shapes}; it was trained with another language model"
    if missing := [name.removeprefix(_PREFIX) for name in expected if name not in found]:
        share = f"{len(missing)} of {len(expected)} tensors are missing ({', '.join(missing[:3])})"
        return f"{share}; the file is incomplete, or was trained with other layers ({modules}; {TARGETS}: {own})"
    return None


def _describe(weights: Mapping[str, Any]) -> tuple[str, str]:
    """Ranks and modules of LoRA weights, given as tensors or shapes, in words."""
    shapes = {name: tuple(getattr(value, "shape", value)) for name, value in weights.items()}
    ranks = {shape[0] for name, shape in shapes.items() if ".lora_A." in name and len(shape) == 2}
    modules = dict.fromkeys(name.split(".lora_")[0].rpartition(".")[2] for name in shapes)
    return " or ".join(map(str, sorted(ranks))), ", ".join(modules)


def lora_delta(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """What LoRA weights A [r, in] and B [out, r] add to a layer's weight, float32 [out, in]."""
    return scaling * (b.float() @ a.float())


def check_trained(llm: nn.Module, settings: LoraSettings) -> None:
    """Raises UserError where LoRA weights were never trained, as where the checkpoint of a chat holds none."""
    changed = [parameter.any() for name, parameter in lora_parameters(llm).items() if ".lora_B." in name]
    if changed and not any(changed):
        problem = f"model.lora_r is {settings.r}, but model.ckpt holds no LoRA weights"
        raise UserError(f"{problem}; remove model.lora_r, or set model.ckpt to a checkpoint of a run with LoRA.")


@torch.no_grad()
def merge_lora(llm: nn.Module, settings: LoraSettings) -> None:
    """Adds trained LoRA weights to those of their layers, in place, and removes them; quantised layers keep theirs.

    Raises UserError if they were never trained.
    """
    check_trained(llm, settings)
    parameters = lora_parameters(llm)
    for name in settings.layers:
        parent, _, leaf = name.rpartition(".")
        layer = llm.get_submodule(name).base_layer
        if isinstance(layer, QuantizedLinear):  # rounding the sum would lose much of what was trained
            continue
        a, b = (parameters[part] for part in tensor_names(name))
        total = (layer.weight.float() + lora_delta(a, b, settings.scaling)).to(layer.weight.dtype)
        layer.weight = nn.Parameter(total, requires_grad=False)  # a mapped file is not written to
        setattr(llm.get_submodule(parent), leaf, layer)
