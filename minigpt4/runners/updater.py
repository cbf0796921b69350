"""Backward passes and parameter updates: accumulation, loss scaling, clipping, skipped updates."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minigpt4.common import device as devices
from minigpt4.common import dist_utils
from minigpt4.common.errors import UserError, see
from minigpt4.common.optims import parameter_groups
from minigpt4.common.schema import RunConfig
from minigpt4.runners.checkpoints import TrainState


class Updater:
    """AdamW over the parameters of a model that require gradients; with fp16 autocast, losses are scaled.

    An update is skipped on all ranks if the loss of any rank was not finite in its accumulation group.
    """

    def __init__(self, model: nn.Module, run_cfg: RunConfig, device: torch.device, amp_dtype: torch.dtype) -> None:
        self.run_cfg = run_cfg
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, run_cfg),
            lr=run_cfg.init_lr,
            betas=(0.9, run_cfg.beta2),
            fused=devices.has_fused_optimizer(device),
        )
        if hasattr(model, "before_update"):
            self.optimizer.register_step_pre_hook(lambda *_: model.before_update())
        self.scaler = devices.make_scaler(device, amp_dtype)
        # Counted on the device, so that no step waits: non-finite losses of the current accumulation group, and updates
        # skipped because of them, in total and in a row.
        self._bad_losses, self._num_skipped, self._num_in_a_row = torch.zeros(3, device=device)

    def backward(self, loss: Tensor) -> None:
        """Adds a batch's gradients, divided by the number of batches of an update."""
        scaled = loss / self.run_cfg.accum_grad_iters
        (self.scaler.scale(scaled) if self.scaler else scaled).backward()
        self._bad_losses += ~loss.detach().isfinite()

    def step(self) -> None:
        """Clips and applies the gradients, or skips them."""
        is_bad = (dist_utils.all_reduce_sum(self._bad_losses) > 0).float()
        self._num_skipped += is_bad
        self._num_in_a_row.add_(1).mul_(is_bad)
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        if self.run_cfg.clip_grad_norm:
            nn.utils.clip_grad_norm_(self.parameters, self.run_cfg.clip_grad_norm)
        if self.scaler is None and self.optimizer.defaults["fused"]:
            self.optimizer.found_inf = is_bad  # as GradScaler does: the fused kernel skips the update
            self.optimizer.step()
        elif not is_bad.item():
            self.scaler.step(self.optimizer) if self.scaler else self.optimizer.step()
        if self.scaler:
            self.scaler.update()
        self.optimizer.zero_grad()
        self._bad_losses.zero_()

    def check_finite(self, state: TrainState) -> None:
        """Counts the skipped updates in ``state`` and logs those since the last call; waits for the device.

        Raises:
            UserError: ``run.max_nonfinite`` updates in a row were skipped.
        """
        total, in_a_row = map(int, torch.stack([self._num_skipped, self._num_in_a_row]).tolist())
        if num_new := total - state.num_nonfinite:
            logging.warning("Step %d: skipped %d updates of a non-finite loss (%d so far).", state.step, num_new, total)
        state.num_nonfinite, state.num_nonfinite_in_a_row = total, in_a_row
        if in_a_row >= self.run_cfg.max_nonfinite:
            raise UserError(
                f"The loss was not finite {in_a_row} updates in a row (run.max_nonfinite), last at step {state.step}; "
                "try run.amp_dtype: bf16 or run.amp: False, and check model.llm_dtype." + see("nan")
            )

    def state_dict(self) -> dict[str, Any]:
        """Returns entries of a checkpoint; every rank has to call it.

        Gradients of an unfinished accumulation group are stored as their mean over the ranks, as an update uses them.
        """
        world = dist_utils.get_world_size()
        # The reference loads the scaler's state always, so a run without scaler stores that of a new one.
        scaler = self.scaler or torch.amp.GradScaler("cpu")
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "gradients": [
                None if p.grad is None else (dist_utils.all_reduce_sum(p.grad.clone()) / world).cpu()
                for p in self.parameters
            ],
            "bad_losses": dist_utils.all_reduce_sum(self._bad_losses.clone()).item(),
        }

    def load_state_dict(self, content: Mapping[str, Any], state: TrainState) -> None:
        """Restores the entries of a checkpoint, ours or the reference's, and the numbers of skipped updates.

        Raises:
            ValueError: the optimizer's state is of another model.
        """
        groups = content["optimizer"]["param_groups"]
        for group, own in zip(groups, self.optimizer.param_groups, strict=False):  # this run chooses kernel and rate
            group |= {"fused": self.optimizer.defaults["fused"], "foreach": None, "lr_scale": own["lr_scale"]}
        self.optimizer.load_state_dict(content["optimizer"])
        if self.scaler and content.get("scaler"):
            self.scaler.load_state_dict(content["scaler"])
        for parameter, gradient in zip(self.parameters, content.get("gradients") or [], strict=False):
            parameter.grad = None if gradient is None else gradient.to(parameter.device)
        self._bad_losses.fill_(content.get("bad_losses", 0) / dist_utils.get_world_size())
        self._num_skipped.fill_(state.num_nonfinite)
        self._num_in_a_row.fill_(state.num_nonfinite_in_a_row)
