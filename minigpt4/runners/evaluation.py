"""Evaluates one split of the data sets by the methods of a task."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from minigpt4.common import device as devices
from minigpt4.common import dist_utils
from minigpt4.common.errors import UserError
from minigpt4.common.schema import RunConfig
from minigpt4.datasets.loader import eval_batches


class SplitLoader:
    """This rank's share of a split of several data sets: batches with their tensors on the device, each sample once."""

    def __init__(self, datasets: Mapping[str, Any], run_cfg: RunConfig, device: torch.device) -> None:
        settings = run_cfg.batch_size_eval, run_cfg.num_workers, run_cfg.seed, devices.has_own_memory(device)
        self.loaders = [eval_batches(name, dataset, *settings) for name, dataset in datasets.items()]
        self.is_sharded = run_cfg.parallel == "fsdp"
        self.device = device

    def __len__(self) -> int:
        return sum(map(len, self.loaders))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for loader in self.loaders:
            # With a sharded model, every forward needs all ranks.
            batches = dist_utils.lockstep(loader) if self.is_sharded else ((batch, True) for batch in loader)
            for batch, is_own in batches:
                yield devices.move_to(batch, self.device) | ({} if is_own else {"is_filler": True})


def evaluate_split(
    task: Any,
    model: nn.Module,
    datasets: Mapping[str, Mapping[str, Any]],
    split: str,
    epoch: int,
    run_cfg: RunConfig,
    device: torch.device,
) -> dict[str, Any]:
    """Evaluates a split of ``datasets``, {name: {split: data set}}, over all ranks, with the same seed each time.

    Returns:
        The metrics by name, equal on all ranks; none if the task (see ``BaseTask``) returns none.

    Raises:
        UserError: no data set has the split.
    """
    chosen = {name: splits[split] for name, splits in datasets.items() if split in splits}
    if not chosen:
        raise UserError(f"No data set has a split '{split}'; set build_info.{split}_storage.")
    model.eval()
    task.before_evaluation(model=model, dataset=[*chosen.values()] if len(chosen) > 1 else next(iter(chosen.values())))
    loader = SplitLoader(chosen, run_cfg, device)
    dtype = devices.amp_dtype(run_cfg, device)
    with torch.no_grad(), devices.local_seed(run_cfg.seed), devices.autocast(device, dtype):
        results = task.evaluation(model, loader, cuda_enabled=device.type != "cpu")
    if results is None:
        return {}
    results = [row for rank_results in dist_utils.gather_objects(results) for row in rank_results]
    metrics = task.after_evaluation(val_result=results, split_name=split, epoch=epoch) or {}
    values = {name: value.item() if torch.is_tensor(value) else value for name, value in metrics.items()}
    return dist_utils.broadcast_object(values)
