"""Backward passes and parameter updates: accumulation, loss scaling, clipping, and updates that are skipped."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minigpt4.common import device as devices
from minigpt4.common import dist_utils
from minigpt4.common.errors import UserError, see
from minigpt4.common.optims import parameter_groups
from minigpt4.common.schema import RunConfig


class Updater:
    """AdamW over the trained parameters of a model.

    An update is skipped on all ranks if the loss of any rank was not finite in its accumulation group.

    Args:
        model: only parameters that require gradients are updated.
        run_cfg: the run.
        device: of the model.
        amp_dtype: precision of autocast; fp16 needs loss scaling.
    """

    def __init__(self, model: nn.Module, run_cfg: RunConfig, device: torch.device, amp_dtype: torch.dtype) -> None:
        self.run_cfg = run_cfg
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, run_cfg.weight_decay),
            lr=run_cfg.init_lr,
            betas=(0.9, run_cfg.beta2),
            fused=devices.has_fused_optimizer(device),
        )
        self.scaler = devices.make_scaler(device, amp_dtype)
        self.num_nonfinite = self.num_nonfinite_in_a_row = 0  # skipped updates, as of the last check_finite
        # Counts on the device, so that no step waits for them: non-finite losses of the current accumulation group;
        # updates skipped because of them, in total and in a row.
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
        self._num_in_a_row += 1
        self._num_in_a_row *= is_bad
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

    def check_finite(self, step: int) -> None:
        """Logs the updates skipped since the last call; waits for the device.

        Raises:
            UserError: ``run.max_nonfinite`` updates in a row were skipped.
        """
        limit = self.run_cfg.max_nonfinite
        total, in_a_row = map(int, torch.stack([self._num_skipped, self._num_in_a_row]).tolist())
        if total > self.num_nonfinite:
            logging.warning(
                "Step %d: %d updates skipped because the loss was not finite (%d so far).",
                *(step, total - self.num_nonfinite, total),
            )
        self.num_nonfinite, self.num_nonfinite_in_a_row = total, in_a_row
        if in_a_row >= limit:
            raise UserError(
                f"The loss was not finite {in_a_row} updates in a row (run.max_nonfinite is {limit}), the last at step "
                f"{step}. Try run.amp_dtype: bf16, or run.amp: False; a language model of the wrong precision also "
                "does this." + see("nan")
            )

    def state_dict(self) -> dict[str, Any]:
        """Returns entries of a checkpoint; every rank has to call it.

        Gradients of an unfinished accumulation group are stored as their mean over the ranks, which is what the update
        would use.
        """
        world = dist_utils.get_world_size()
        # The reference loads the scaler's state unconditionally, so a run without scaler stores that of a new one.
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

    def load_state_dict(
        self, content: Mapping[str, Any], num_nonfinite: int, in_a_row: int, key: str, path: Path
    ) -> None:
        """Restores the entries of a checkpoint, ours or the reference's, and the numbers of skipped updates.

        Raises:
            UserError: the optimizer's state is of another model; ``key`` and ``path`` are for the message.
        """
        try:
            for group in content["optimizer"]["param_groups"]:  # the kernel is chosen by this run
                group |= {"fused": self.optimizer.defaults["fused"], "foreach": None}
            self.optimizer.load_state_dict(content["optimizer"])
        except (ValueError, KeyError) as error:
            raise UserError(f"{key}: the optimizer in {path} is of another model ({error}).") from error
        if self.scaler and content.get("scaler"):
            self.scaler.load_state_dict(content["scaler"])
        for parameter, gradient in zip(self.parameters, content.get("gradients") or [], strict=False):
            parameter.grad = None if gradient is None else gradient.to(parameter.device)
        self._bad_losses.fill_(content.get("bad_losses", 0) / dist_utils.get_world_size())
        self.num_nonfinite, self.num_nonfinite_in_a_row = num_nonfinite, in_a_row
        self._num_skipped.fill_(num_nonfinite)
        self._num_in_a_row.fill_(in_a_row)
