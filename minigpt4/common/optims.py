"""Learning-rate schedules and parameter groups of the reference's recipe."""

import logging
import math
from typing import Any

import torch
from torch import nn

from minigpt4.common.registry import registry
from minigpt4.common.schema import PartOptim, RunConfig


class _WarmupScheduler:
    """Linear warm-up over the first ``warmup_steps`` iterations of the run, then the decay that a subclass defines.

    Warm-up is counted over epochs; the reference restarts it in each epoch, which differs only if it is longer than
    one. It starts at ``warmup_start_lr`` (negative: ``init_lr``) and ends at ``init_lr``; the decay ends at ``min_lr``.
    A parameter group gets this rate times its ``lr_scale``, if it has one.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        max_epoch: int,
        iters_per_epoch: int = 0,
        min_lr: float = 0.0,
        init_lr: float = 0.0,
        warmup_steps: int = 0,
        warmup_start_lr: float = -1.0,
        decay_rate: float | None = None,
        **_: Any,
    ) -> None:
        self.optimizer = optimizer
        self.max_epoch = max_epoch
        self.iters_per_epoch = iters_per_epoch
        self.min_lr = min_lr
        self.init_lr = init_lr
        self.warmup_steps = warmup_steps
        self.warmup_start_lr = warmup_start_lr if warmup_start_lr >= 0 else init_lr
        self.decay_rate = 1.0 if decay_rate is None else decay_rate

    def step(self, cur_epoch: int, cur_step: int) -> float:
        """Sets and returns the rate for iteration ``cur_step`` of epoch ``cur_epoch``; called before it."""
        global_step = cur_epoch * self.iters_per_epoch + cur_step
        if global_step < self.warmup_steps:
            share = global_step / self.warmup_steps
            lr = min(self.init_lr, self.warmup_start_lr + (self.init_lr - self.warmup_start_lr) * share)
        else:
            lr = self._decayed(cur_epoch, global_step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        return lr


@registry.register_lr_scheduler("linear_warmup_cosine_lr")
class LinearWarmupCosineLRScheduler(_WarmupScheduler):
    """Warm-up, then half a cosine over the whole run, counted from step 0: the rate jumps a little in between."""

    def _decayed(self, _: int, global_step: int) -> float:
        progress = global_step / (self.max_epoch * self.iters_per_epoch)
        return (self.init_lr - self.min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress)) + self.min_lr


@registry.register_lr_scheduler("linear_warmup_step_lr")
class LinearWarmupStepLRScheduler(_WarmupScheduler):
    """Warm-up, then ``init_lr`` times ``decay_rate`` to the power of the epoch."""

    def _decayed(self, epoch: int, _: int) -> float:
        return max(self.min_lr, self.init_lr * self.decay_rate**epoch)


def part_of(name: str) -> str:
    """The part of the model to which a parameter belongs, as ``run.optim`` calls it."""
    part = "lora" if ".lora_" in name else name.split(".")[0]
    return "visual_encoder" if part == "ln_vision" else part


def freeze_parts(model: nn.Module, run_cfg: RunConfig) -> None:
    """Freezes the parts that ``run.optim`` names, in place; their modules then stay in eval mode."""
    for name, parameter in model.named_parameters():
        if getattr(run_cfg.optim, part_of(name), PartOptim()).freeze:
            parameter.requires_grad_(False)
    for name in ("visual_encoder", "Qformer"):  # which have dropout
        if getattr(run_cfg.optim, name).freeze and hasattr(model, name):
            model.frozen_parts.append(getattr(model, name))


def parameter_groups(model: nn.Module, run_cfg: RunConfig) -> list[dict[str, Any]]:
    """Trainable parameters in groups of equal ``weight_decay`` and ``lr_scale``, their rate as a multiple of the run's.

    First those that decay, then those that do not: fewer than two dimensions, bias, ln, bn. Without settings in
    ``run.optim`` these are two groups, as in the reference.
    """
    groups: dict[tuple[bool, float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = getattr(run_cfg.optim, part_of(name), PartOptim())
            is_plain = parameter.ndim < 2 or any(word in name for word in ("bias", "ln", "bn"))
            decay = run_cfg.weight_decay if part.weight_decay is None else part.weight_decay
            scale = 1.0 if part.lr is None else part.lr / run_cfg.init_lr
            scale *= getattr(part, "layer_decay", 1.0) ** _depth_below_top(name, model)
            groups.setdefault((is_plain, scale, 0 if is_plain else decay), []).append(parameter)
    ordered = sorted(groups, key=lambda group: group[0])
    return [{"params": groups[key], "lr_scale": key[1], "weight_decay": key[2]} for key in ordered]


def _depth_below_top(name: str, model: nn.Module) -> int:
    """Number of layers of the vision tower above the one of a parameter; embeddings are below the first block."""
    if not name.startswith("visual_encoder."):
        return 0
    depth, path = len(model.visual_encoder.blocks), name.split(".")
    if path[1] == "blocks":
        return depth - 1 - int(path[2])
    return depth if path[1] in ("patch_embed", "cls_token", "pos_embed") else 0


def log_trained(model: nn.Module, run_cfg: RunConfig) -> None:
    """Logs number, learning rate and weight decay of the trained parameters, a line for each part."""
    numbers: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            numbers[part_of(name)] = numbers.get(part_of(name), 0) + parameter.numel()
    for part, number in numbers.items():
        settings = getattr(run_cfg.optim, part, PartOptim())
        lr = run_cfg.init_lr if settings.lr is None else settings.lr
        decay = run_cfg.weight_decay if settings.weight_decay is None else settings.weight_decay
        logging.info("Trained: %-14s %13s parameters, lr %g, weight decay %g", part, f"{number:,}", lr, decay)
