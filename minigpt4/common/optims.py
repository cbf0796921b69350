"""Learning-rate schedules and parameter groups of the reference's recipe."""

import math
from typing import Any

import torch
from torch import nn

from minigpt4.common.registry import registry


class _WarmupScheduler:
    """Linear warm-up over the first ``warmup_steps`` iterations of the run, then the decay that a subclass defines.

    Warm-up is counted over epochs; the reference restarts it in each epoch, which differs only if it is longer than
    one. It starts at ``warmup_start_lr`` (negative: ``init_lr``) and ends at ``init_lr``; the decay ends at ``min_lr``.
    All parameter groups get the same rate.
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
            group["lr"] = lr
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


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: decayed, and those that are not (fewer than two dimensions, bias, ln, bn)."""
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_plain = parameter.ndim < 2 or any(word in name for word in ("bias", "ln", "bn"))
            (plain if is_plain else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0}]
