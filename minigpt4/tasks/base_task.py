"""From a configuration to data sets and a model, from a batch to a loss, and from a split to its metrics."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from minigpt4.common import dist_utils
from minigpt4.common.errors import UserError
from minigpt4.common.registry import registry
from minigpt4.common.schema import DatasetConfig, RunConfig, read_section
from minigpt4.datasets.builders.base_dataset_builder import create_builder
from minigpt4.datasets.feature_cache import with_features
from minigpt4.datasets.loader import LOADER_KEY


class BatchLoss(NamedTuple):
    """The result of a validation batch in tasks that measure the loss."""

    mean_loss: float
    num_targets: int
    source: str = ""


class BaseTask:
    """The base of all tasks; subclasses override what they do differently.

    Evaluation calls ``before_evaluation``, ``evaluation`` and ``after_evaluation`` for each split, in eval mode and
    without gradients; by default they measure the loss. A task whose ``valid_step`` returns other results overrides
    ``after_evaluation``, too, which computes metrics from them. Before the training, a copy of the task evaluates one
    batch of each data set by the first two methods, to find what cannot run.
    """

    device: torch.device | None = None  # of this process; set by minigpt4.tasks.setup_task

    def __init__(self, **kwargs: Any) -> None:
        pass

    @classmethod
    def setup_task(cls, cfg: Any = None, **kwargs: Any) -> "BaseTask":
        """Creates the task; subclasses may read the configuration."""
        return cls()

    def build_datasets(self, cfg: Any) -> dict[str, dict[str, Any]]:
        """Builds every data set of ``cfg.datasets_cfg``, of features if ``run.feature_cache`` is set.

        Returns:
            {name: {split: data set}}. A split ``train`` has ``name`` and, where configured, ``sample_ratio``.
        """
        run_cfg = read_section(RunConfig, cfg.run_cfg, "run")
        if run_cfg.feature_cache:  # computing features may take hours: files that do not match are reported before
            model_class = registry.get_model_class(cfg.model_cfg.arch)
            model_class.from_config(cfg.model_cfg, device="meta", has_vision=False)
        datasets = {}
        for name, section in cfg.datasets_cfg.items():
            datasets[name] = create_builder(name, section, cfg.model_cfg.get("arch", "")).build_datasets()
        if run_cfg.feature_cache:
            datasets = with_features(cfg, datasets, self.device)
        for name, section in cfg.datasets_cfg.items():
            ratio = read_section(DatasetConfig, section, f"datasets.{name}", allow_unknown=True).sample_ratio
            for dataset in (datasets[name][split] for split in run_cfg.train_splits if split in datasets[name]):
                dataset.name = name
                if ratio is not None:
                    dataset.sample_ratio = ratio
        return datasets

    def build_model(self, cfg: Any) -> nn.Module:
        """Builds the model of ``cfg.model_cfg`` with its weights, on the task's device."""
        run_cfg = read_section(RunConfig, cfg.run_cfg, "run")
        from_config = registry.get_model_class(cfg.model_cfg.arch).from_config
        settings = {
            "device": self.device,
            "is_sharded": run_cfg.parallel == "fsdp" and dist_utils.get_world_size() > 1,
            "has_vision": not run_cfg.feature_cache,
        }
        accepted = inspect.signature(from_config).parameters  # in the reference, it takes the section alone
        return from_config(cfg.model_cfg, **{name: settings[name] for name in settings if name in accepted})

    def train_step(self, model: nn.Module, samples: dict[str, Any]) -> torch.Tensor | Mapping[str, Any]:
        """Computes the loss of a batch: a scalar with a graph, or a mapping with it as ``loss``.

        The model may be wrapped in DDP. ``samples`` has its tensors on the device, ``epoch``, ``iters`` (the iteration
        in the epoch) and ``num_iters_per_epoch``.
        """
        return model(samples)["loss"]

    def valid_step(self, model: nn.Module, samples: dict[str, Any]) -> list[Any]:
        """Computes the results of a validation batch: a list of any length, of any type that can be pickled."""
        output = model(samples)
        num_targets = output.get("num_targets", 1)
        source = (samples.get(LOADER_KEY) or {}).get("source", "")
        return [BatchLoss(output["loss"].item(), num_targets, source)] if num_targets else []

    def before_evaluation(self, model: nn.Module, dataset: Any, **kwargs: Any) -> None:
        """Called before a split is evaluated; ``dataset`` is the split's data set, or a list of several."""

    def evaluation(
        self, model: nn.Module, data_loader: Iterable[dict[str, Any]], cuda_enabled: bool = True
    ) -> list[Any] | None:
        """Evaluates this rank's share of a split; ``cuda_enabled`` is whether the device is an accelerator.

        The batches have their tensors on the device. With ``run.parallel: fsdp``, ranks with fewer batches get fillers
        with ``is_filler``, which are computed but not counted.

        Returns:
            The results of all batches, or None: then ``after_evaluation`` is not called.
        """
        results: list[Any] = []
        for samples in data_loader:
            rows = self.valid_step(model=model, samples=samples)
            results.extend([] if samples.get("is_filler") else rows)
        return results

    def try_evaluation(self, model: nn.Module, dataset: Any, data_loader: Iterable[dict[str, Any]]) -> None:
        """Tries the first batches of a split before the training, on a copy of the task; results are not used.

        An ``evaluation`` that a subclass overrides may need the whole split: for it, the batches are only read.
        """
        if type(self).evaluation is BaseTask.evaluation:
            self.before_evaluation(model=model, dataset=dataset)
            self.evaluation(model, data_loader)
        else:
            for _ in data_loader:
                pass

    def after_evaluation(
        self, val_result: Sequence[Any], split_name: str, epoch: int, **kwargs: Any
    ) -> dict[str, Any] | None:
        """Computes the metrics of a split from the results of all ranks; epochs are counted from 0.

        Returns:
            Numbers by name, logged as ``{split_name}_{name}``, with ``agg_metrics``: the checkpoint of the epoch with
            the highest one is ``checkpoint_best.pth``. Here: ``loss``, the mean per target token, and its negative; of
            several data sets also ``loss_{data set}``.

        Raises:
            UserError: the split has no usable sample.
        """
        losses = [row for row in val_result if isinstance(row, BatchLoss) and row.num_targets]
        if losses:
            loss, sources = _mean_loss(losses), sorted({row.source for row in losses})
            parts = {name: _mean_loss([row for row in losses if row.source == name]) for name in sources}
            by_source = {f"loss_{name}": part for name, part in parts.items()} if len(parts) > 1 else {}
            return {"agg_metrics": -loss, "loss": loss, **by_source}
        if type(self).valid_step is BaseTask.valid_step and type(self).evaluation is BaseTask.evaluation:
            raise UserError(f"The split '{split_name}' has no usable sample; see the warnings about skipped samples.")
        return None


def _mean_loss(losses: Sequence[BatchLoss]) -> float:
    """The mean per target token."""
    return sum(row.mean_loss * row.num_targets for row in losses) / sum(row.num_targets for row in losses)
