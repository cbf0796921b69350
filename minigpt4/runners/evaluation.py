"""Evaluates one split of the data sets by the methods of a task."""

import copy
import itertools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from minigpt4.common import device as devices
from minigpt4.common import dist_utils
from minigpt4.common.errors import UserError
from minigpt4.common.schema import RunConfig
from minigpt4.datasets.batches import is_map_style
from minigpt4.datasets.loader import LOADER_KEY, eval_batches
from minigpt4.models.mini_gpt4 import MiniGPT4


def splits_of(run_cfg: RunConfig) -> list[str]:
    """Returns the splits that are evaluated after each epoch."""
    return [*run_cfg.valid_splits, *run_cfg.test_splits]


class SplitLoader:
    """This rank's share of a split of several data sets: batches with their tensors on the device, each sample once.

    ``limit`` is the largest number of batches of each data set; None: all.
    """

    def __init__(
        self, datasets: Mapping[str, Any], run_cfg: RunConfig, device: torch.device, limit: int | None = None
    ) -> None:
        settings = run_cfg.batch_size_eval, run_cfg.num_workers, run_cfg.seed, devices.has_own_memory(device)
        self.names = list(datasets)
        self.loaders = [eval_batches(name, dataset, *settings) for name, dataset in datasets.items()]
        self.is_sharded = run_cfg.parallel == "fsdp"
        self.device, self.limit = device, limit

    def __len__(self) -> int:
        return sum(len(range(len(loader))[: self.limit]) for loader in self.loaders)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for name, loader in zip(self.names, self.loaders, strict=True):
            source = {LOADER_KEY: {"source": name, "skipped": {}}}
            own = itertools.islice(loader, self.limit)
            # With a sharded model, every forward needs all ranks.
            for batch, is_own in dist_utils.lockstep(own) if self.is_sharded else ((batch, True) for batch in own):
                yield devices.move_to(batch, self.device) | source | ({} if is_own else {"is_filler": True})


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
    results = _run_task(task, model, datasets, split, run_cfg, device)
    if results is None:
        return {}
    results = [row for rank_results in dist_utils.gather_objects(results) for row in rank_results]
    metrics = task.after_evaluation(val_result=results, split_name=split, epoch=epoch) or {}
    values = {name: value.item() if torch.is_tensor(value) else value for name, value in metrics.items()}
    return dist_utils.broadcast_object(values)


def check_sources(task: Any, model: nn.Module, sources: Mapping[str, Any], run_cfg: RunConfig) -> None:
    """Compares texts and images of a sample of each listed source with the model's prompts, before the training.

    Otherwise a source whose samples do not fit would end the run at its first batch, which may come late. Tasks, models
    and data sets of others are not checked, nor are streams, whose first sample may be far away.
    """
    if type(model).forward is not MiniGPT4.forward or not _is_built_in(type(task).train_step):
        return
    known = {name: data for name, data in sources.items() if is_map_style(data) and _is_built_in(type(data))}
    one = replace(run_cfg, batch_size_eval=1, num_workers=min(1, run_cfg.num_workers), parallel="ddp")
    for batch in SplitLoader(known, one, torch.device("cpu"), limit=1):
        try:
            with devices.local_seed(run_cfg.seed):  # a prompt is drawn
                model.check_samples(batch)
        except UserError as error:
            raise UserError(f"datasets.{batch[LOADER_KEY]['source']}: {error}") from error


def _is_built_in(code: Any) -> bool:
    return code.__module__.split(".")[0] == "minigpt4"


def try_evaluation(
    task: Any, model: nn.Module, datasets: Mapping[str, Mapping[str, Any]], run_cfg: RunConfig, device: torch.device
) -> None:
    """Tries a batch of each data set of each split: an evaluation that cannot run then fails before the training.

    A copy of the task does it (``BaseTask.try_evaluation``), and the random state is restored: the run is as without
    it. Raises what the evaluation raises.
    """
    if not (splits := splits_of(run_cfg)):
        return
    logging.info("Trying one batch of each split: %s.", ", ".join(splits))
    parts = [datasets, *model.modules(), *model.parameters(), *model.buffers()]
    parts += [dataset for splits in datasets.values() for dataset in splits.values()]
    try:
        trial = copy.deepcopy(task, {id(part): part for part in parts})  # which may refer to them
    except Exception as error:  # any that the task's attributes raise
        logging.warning("No evaluation is tried before the training: the task cannot be copied (%s).", error)
        return
    state = devices.random_state(device)
    try:
        for split in splits:
            _run_task(trial, model, datasets, split, run_cfg, device, limit=1)
    finally:
        devices.set_random_state(state, device)


def _run_task(
    task: Any,
    model: nn.Module,
    datasets: Mapping[str, Mapping[str, Any]],
    split: str,
    run_cfg: RunConfig,
    device: torch.device,
    limit: int | None = None,
) -> list[Any] | None:
    """The task's results of this rank's share of a split."""
    chosen = {name: splits[split] for name, splits in datasets.items() if split in splits}
    if not chosen:
        raise UserError(f"No data set has a split '{split}'; set build_info.{split}_storage.")
    model.eval()
    dataset = [*chosen.values()] if len(chosen) > 1 else next(iter(chosen.values()))
    if limit is None:
        task.before_evaluation(model=model, dataset=dataset)
    loader = SplitLoader(chosen, run_cfg, device, limit)
    dtype = devices.amp_dtype(run_cfg, device)
    with torch.no_grad(), devices.local_seed(run_cfg.seed), devices.autocast(device, dtype):
        if limit is not None:
            return task.try_evaluation(model, dataset, loader)
        return task.evaluation(model, loader, cuda_enabled=device.type != "cpu")
