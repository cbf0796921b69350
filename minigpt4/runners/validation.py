"""The loss of data that a run does not train on."""

from typing import TYPE_CHECKING, Any

import torch

from minigpt4.common import device as devices
from minigpt4.common import dist_utils
from minigpt4.common.errors import UserError
from minigpt4.datasets.loader import eval_batches

if TYPE_CHECKING:
    from minigpt4.runners.runner_base import RunnerBase


def mean_loss(runner: "RunnerBase", datasets: dict[str, Any]) -> float:
    """The mean loss per target token of data sets by name, each sample once, over all ranks.

    Raises:
        UserError: there is no usable sample.
    """
    runner.model.eval()
    cfg, device = runner.run_cfg, runner.device
    batch_size, num_workers = int(cfg.get("batch_size_eval", 1)), int(cfg.get("num_workers", 0))
    seed = int(cfg.get("seed", 42))
    sums = torch.zeros(2, dtype=torch.float64)  # of losses and of target tokens
    for name, dataset in datasets.items():
        batches = eval_batches(name, dataset, batch_size, num_workers, seed, devices.pins_memory(device))
        is_sharded = cfg.get("parallel") == "fsdp"  # then every forward is the work of all ranks
        counted = dist_utils.lockstep(batches) if is_sharded else ((batch, True) for batch in batches)
        with devices.local_seed(seed):  # the same prompts every time
            for batch, is_own in counted:
                with devices.autocast(device, runner.amp_dtype):
                    output = runner.task.valid_step(runner.model, devices.move_to(batch, device))
                if is_own and output["num_targets"]:
                    sums += torch.tensor([output["loss"].item() * output["num_targets"], output["num_targets"]])
    sums = dist_utils.all_reduce_sum(sums.float().to(device)).cpu()
    if sums[1] == 0:
        raise UserError(f"The validation split of {', '.join(datasets)} holds no usable sample.")
    return (sums[0] / sums[1]).item()
