"""The training loop: epochs of a fixed number of iterations, evaluation, checkpoints, resume."""

import copy
import logging
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from datetime import timedelta
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from minigpt4.common import device as devices
from minigpt4.common import dist_utils, weights
from minigpt4.common.errors import UserError
from minigpt4.common.optims import freeze_parts, log_trained
from minigpt4.common.registry import registry
from minigpt4.common.schema import DatasetConfig, RunConfig, read_section
from minigpt4.datasets.loader import TrainLoader
from minigpt4.models.parallel import replicate
from minigpt4.runners import checkpoints, run_folder
from minigpt4.runners.checkpoints import BEST, RESUME_KEY, TrainState
from minigpt4.runners.evaluation import check_sources, evaluate_split, splits_of, try_evaluation
from minigpt4.runners.progress import EpochProgress, Tracker
from minigpt4.runners.report import write_report
from minigpt4.runners.signals import StopRequest, StopWaiting
from minigpt4.runners.updater import Updater

_COUNTS = ("num_tokens", "num_padded_tokens", "num_truncated")


@registry.register_runner("runner_base")
class RunnerBase:
    """Trains the parameters of a model that require gradients.

    Args:
        cfg: the merged configuration.
        job_id: name of the folder below ``run.output_dir``; rank 0's is used, with a suffix if the folder exists.
        task: defines the training step and the evaluation; its device is the runner's.
        model: built and loaded; it is moved to the device.
        datasets: {name: {split: data set}}.
        train_loader: used in place of a ``TrainLoader`` over the data sets; has its methods.
    """

    def __init__(
        self,
        cfg: Any,
        job_id: str,
        task: Any,
        model: nn.Module,
        datasets: dict[str, dict[str, Any]],
        train_loader: Any = None,
    ) -> None:
        self.config = cfg
        self.run_cfg = read_section(RunConfig, cfg.run_cfg, "run")
        self.task = task
        self.datasets = datasets
        self._sources = self._training_sources()
        self.device = task.device or devices.from_config(self.run_cfg)
        self.model = model.to(self.device)
        freeze_parts(model, self.run_cfg)
        log_trained(model, self.run_cfg)
        self.wrapped_model = replicate(model, self.device)
        self.amp_dtype = devices.amp_dtype(self.run_cfg, self.device)
        self.updater = Updater(model, self.run_cfg, self.device, self.amp_dtype)
        self.optimizer, self.scaler = self.updater.optimizer, self.updater.scaler
        self.state = TrainState()
        self._token_counts: dict[str, int] = {}
        model.register_forward_hook(self._record_token_counts)
        self.max_epoch = self.run_cfg.max_epoch
        self.iters_per_epoch = self._iters_per_epoch()
        self.lr_scheduler = self._build_lr_scheduler()
        self._compile()
        self.train_loader = train_loader
        self.output_dir, self.resumed, self.lock = run_folder.open_folder(self.run_cfg, job_id, cfg)
        self.tracker = Tracker(self.run_cfg, self.output_dir, cfg.to_dict())
        self.progress = EpochProgress(self.device, self.tracker, self.run_cfg.log_freq)

    def _training_sources(self) -> dict[str, Any]:
        sources = {}
        for name, data in self.datasets.items():
            found = [split for split in dict.fromkeys(self.run_cfg.train_splits) if split in data]
            if len(found) > 1:
                advice = "name one of them, with all its files in the list build_info.storage."
                raise UserError(f"run.train_splits names {' and '.join(found)}, both of data set {name}; {advice}")
            if found:
                sources[name] = data[found[0]]
        return sources

    def _record_token_counts(self, _: nn.Module, __: Any, output: Any) -> None:
        """Forward hook: tasks return the loss alone, while the model also reports numbers of tokens."""
        self._token_counts = {k: output[k] for k in _COUNTS if k in output} if isinstance(output, Mapping) else {}

    def _build_lr_scheduler(self) -> Any:
        cfg = self.run_cfg
        return registry.get_lr_scheduler_class(cfg.lr_sched)(
            optimizer=self.optimizer,
            max_epoch=cfg.max_epoch,
            iters_per_epoch=self.iters_per_epoch,
            min_lr=cfg.min_lr,
            init_lr=cfg.init_lr,
            warmup_steps=cfg.warmup_steps,
            warmup_start_lr=cfg.warmup_lr,
            decay_rate=cfg.lr_decay_rate,
        )

    def _compile(self) -> None:
        if self.run_cfg.compile and devices.compiles(self.device):
            with devices.autocast(self.device, self.amp_dtype):  # the precision that the shared prefix is computed in
                self.model.compile_parts()
        elif self.run_cfg.compile:
            logging.info("run.compile is ignored on %s, where compiling is not known to pay.", self.device.type)

    def _batch_size(self, name: str) -> int:
        """Samples per batch and rank of a data set: ``run.batch_size_train``, else its own ``batch_size``, else 1."""
        section = (self.config.datasets_cfg or {}).get(name)
        own = read_section(DatasetConfig, section, f"datasets.{name}", allow_unknown=True).batch_size
        return self.run_cfg.batch_size_train or own or 1

    def _iters_per_epoch(self) -> int:
        if self.run_cfg.iters_per_epoch is not None:
            return self.run_cfg.iters_per_epoch
        if not self._sources or not all(hasattr(source, "__len__") for source in self._sources.values()):
            raise UserError("run.iters_per_epoch is not set; shards have no length, so give it a number.")
        num_batches = sum(Fraction(len(data), self._batch_size(name)) for name, data in self._sources.items())
        return max(1, int(num_batches / dist_utils.get_world_size()))

    def train(self) -> None:
        """Trains the remaining epochs, or with ``run.evaluate`` only evaluates.

        The signals of ``dist_utils.STOP_SIGNALS`` end the training after a step, with a checkpoint.
        """
        logging.info("Writing to %s", self.output_dir)
        try:
            if self.train_loader is None and not self.run_cfg.evaluate:
                self.train_loader = self.build_train_loader()
            if self.resumed is not None:
                self.load_checkpoint(self.resumed)
            self.evaluate() if self.run_cfg.evaluate else self._train_epochs()
        finally:
            if self.lock is not None:
                self.lock.release()
            self.tracker.close()

    def _train_epochs(self) -> None:
        if not self.updater.parameters:
            raise UserError("Nothing in this model is trained: all parameters are frozen.")
        if self.state.epoch >= self.max_epoch:
            logging.warning(
                "Nothing is left to train: %s has finished %d epochs, and run.max_epoch is %d. Raise run.max_epoch to "
                "continue, or set another run.output_dir to start anew.",
                self.resumed,
                self.state.epoch,
                self.max_epoch,
            )
            return
        check_sources(self.task, self.model, self._sources, self.run_cfg)
        try_evaluation(self.task, self.model, self.datasets, self.run_cfg, self.device)
        logging.info("Start training")
        start = time.time()
        with StopRequest() as stop:
            while self.state.epoch < self.max_epoch:
                stats = self.train_epoch(stop)
                if stats is None:
                    write_report(self.output_dir)
                    logging.info("Stopped at step %d; run.resume: auto resumes from here.", self.state.step)
                    return
                self._finish_epoch(stats)
        logging.info("Training time %s", timedelta(seconds=int(time.time() - start)))

    def _finish_epoch(self, stats: dict[str, Any]) -> None:
        """Validates, logs and saves a trained epoch; it is saved before, too, as a validation may fail or be killed."""
        epoch, name = self.state.epoch, f"checkpoint_{self.state.epoch}.pth"
        if splits_of(self.run_cfg):
            self.save_checkpoint(name)
        stats |= self.evaluate()
        if dist_utils.is_main_process():
            run_folder.append_line(self.output_dir / "log.txt", {"epoch": epoch, **stats})
        self.state.epoch, self.state.iteration = epoch + 1, 0
        self.save_checkpoint(name, stats)
        write_report(self.output_dir)

    def build_train_loader(self) -> TrainLoader:
        """Builds the loader over the training splits, with this run's batch size and sample ratios."""
        return TrainLoader(
            self._sources,
            {name: getattr(dataset, "sample_ratio", None) for name, dataset in self._sources.items()},
            batch_size=self.run_cfg.batch_size_train or {name: self._batch_size(name) for name in self._sources},
            iters_per_epoch=self.iters_per_epoch,
            num_workers=self.run_cfg.num_workers,
            seed=self.run_cfg.seed,
            pin_memory=devices.has_own_memory(self.device),
        )

    def train_epoch(self, stop: StopRequest | None = None) -> dict[str, float] | None:
        """Trains the remaining iterations of an epoch.

        As in the reference, gradients of an incomplete group of ``accum_grad_iters`` carry over to the next epoch.

        Returns:
            The means of loss and learning rate, or None after a stop request.
        """
        epoch, state, save_every = self.state.epoch, self.state, self.run_cfg.save_every_iters
        self.wrapped_model.train()
        logging.info("Start training epoch %d, %d iters per inner epoch.", epoch, self.iters_per_epoch)
        batches = self.train_loader.iter_epoch(epoch, state.iteration, stop.next_batch if stop else next)
        with self.progress.run_epoch(epoch, self.iters_per_epoch, state.iteration):
            for i in range(state.iteration, self.iters_per_epoch):
                start = time.perf_counter()
                try:
                    batch = next(batches)
                except StopWaiting:
                    self.save_checkpoint(f"checkpoint_step_{state.step}.pth")
                    return None
                data_time = time.perf_counter() - start
                lr = self.lr_scheduler.step(cur_epoch=epoch, cur_step=i)
                loss = self.train_step(batch, is_update=(i + 1) % self.run_cfg.accum_grad_iters == 0)
                state.step += 1
                state.iteration += 1
                if self.progress.add(i, state.step - 1, loss, self._token_counts, batch, lr, data_time):
                    self.updater.check_finite(state)
                is_stopped = stop is not None and stop.should_stop()
                if is_stopped or (save_every and state.step % save_every == 0):
                    self.save_checkpoint(f"checkpoint_step_{state.step}.pth")
                if is_stopped:
                    return None
        stats = self.progress.finish()
        logging.info("Averaged stats: lr: %.6g  loss: %.4f", stats["train_lr"], stats["train_loss"])
        return stats

    def train_step(self, batch: dict[str, Any], is_update: bool) -> torch.Tensor:
        """Computes the gradients of a batch and, if ``is_update``, updates the parameters; returns the loss."""
        state, num_iters = self.state, self.iters_per_epoch
        position = {"epoch": state.epoch, "iters": state.iteration, "num_iters_per_epoch": num_iters}
        samples = devices.move_to(batch, self.device) | position
        is_local = not is_update and isinstance(self.wrapped_model, DistributedDataParallel)
        with self.wrapped_model.no_sync() if is_local else nullcontext():
            with devices.autocast(self.device, self.amp_dtype):
                output = self.task.train_step(self.wrapped_model, samples)
            loss = output["loss"] if isinstance(output, Mapping) else output
            self.updater.backward(loss)
        if is_update:
            self.updater.step()
        return loss.detach()

    def evaluate(self) -> dict[str, Any]:
        """Evaluates every validation and test split over all ranks; returns the metrics as ``{split}_{name}``."""
        stats: dict[str, Any] = {}
        if not (splits := splits_of(self.run_cfg)):
            logging.info("No validation splits found.")
        for split in splits:
            settings = self.state.epoch, self.run_cfg, self.device
            metrics = evaluate_split(self.task, self.model, self.datasets, split, *settings)
            logging.info("Evaluated %s: %s", split, metrics)
            self.tracker.log(self.state.step - 1, {f"{split} {name}": value for name, value in metrics.items()})
            stats |= {f"{split}_{name}": value for name, value in metrics.items()}
        return stats

    def _is_best(self, stats: dict[str, Any]) -> bool:
        """Whether the metric that selects the best checkpoint improved: that of split ``val``, else of the first."""
        splits = self.run_cfg.valid_splits
        split = "val" if "val" in splits else splits[0] if splits else None
        metric = stats.get(f"{split}_agg_metrics")
        if metric is None and any(name.startswith(f"{split}_") for name in stats):
            logging.warning("%s.after_evaluation returned no agg_metrics: no %s.", type(self.task).__name__, BEST)
        if metric is None or not metric > self.state.best_metric:  # no NaN is the best
            return False
        self.state.best_metric = float(metric)
        return True

    def save_checkpoint(self, name: str, stats: dict[str, Any] | None = None) -> None:
        """Writes a checkpoint and, if the validation metric among ``stats`` improved, checkpoint_best.pth.

        It has the trained parameters under the reference's keys, and what a resume needs: optimizer, counters, waiting
        gradients, and each rank's random state, position in the data and running sums.
        """
        is_best = self._is_best(stats or {})
        self.updater.check_finite(self.state)
        rank_state = {
            "random": devices.random_state(self.device),
            "data": self.train_loader.state_dict(),
            "progress": self.progress.state_dict(),
        }
        content = {
            "model": self.model.trainable_state_dict(),
            **self.updater.state_dict(),
            "config": self.config.to_dict(),
            "epoch": self.state.epoch - (self.state.iteration < self.iters_per_epoch),  # the last complete one
            "state": asdict(self.state),
            "ranks": dist_utils.gather_objects(rank_state),
        }

        def write() -> None:
            self.lock.check()
            for path in [self.output_dir / BEST] * is_best + [self.output_dir / name]:
                logging.info("Saving step %d to %s.", self.state.step, path)
                checkpoints.write(devices.move_to(content, torch.device("cpu")), path, self.run_cfg.keep_last)
            checkpoints.prune(self.output_dir, self.run_cfg.keep_last, path)

        dist_utils.run_on_main(write)

    def load_checkpoint(self, path: Path) -> None:
        """Resumes from a checkpoint, ours or the reference's.

        Raises:
            UserError: the file is damaged, of another model, or has weights only.
        """
        content = weights.read_file(path, RESUME_KEY)
        if "optimizer" not in content or "epoch" not in content:
            raise UserError(f"{RESUME_KEY}: {path} has weights only; to start from them set model.ckpt instead.")
        self.model.load_checkpoint(path)
        try:
            rest = {name: value for name, value in content.items() if name != "model"}
            self._restore(copy.deepcopy(rest))  # a file that stays mapped takes space even when it is pruned
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{RESUME_KEY}: cannot resume from {path} ({type(error).__name__}: {error}); it is damaged, or of "
                "another model or version. To start from its weights set model.ckpt instead."
            ) from error
        if self.output_dir == path.parent and not self.run_cfg.evaluate:
            dist_utils.run_on_main(lambda: self._clean_folder(path))
        logging.info("Resuming from %s at epoch %d, iteration %d.", path, self.state.epoch, self.state.iteration)

    def _clean_folder(self, resumed: Path) -> None:
        checkpoints.prune(self.output_dir, self.run_cfg.keep_last, resumed)  # first: the disk may be full
        run_folder.truncate_logs(self.output_dir, self.state)

    def _restore(self, content: Mapping[str, Any]) -> None:
        epoch = content["epoch"] + 1
        state = dict(content.get("state") or {"epoch": epoch, "step": epoch * self.iters_per_epoch})
        if "best_loss" in state:  # of earlier versions
            state["best_metric"] = -state.pop("best_loss")
        self.state = TrainState(**state)
        self.updater.load_state_dict(content, self.state)
        ranks, world = content.get("ranks") or [], dist_utils.get_world_size()
        if ranks:
            self.progress.load_state_dict([rank["progress"] for rank in ranks], self.state.iteration)
        if ranks and self.train_loader is not None:
            data = [rank["data"] for rank in ranks]
            self.train_loader.load_state_dict(data, self.state.epoch, self.state.iteration)
        if len(ranks) == world:
            devices.set_random_state(ranks[dist_utils.get_rank()]["random"], self.device)
        else:
            logging.warning("The checkpoint has no random state for %d ranks; using new ones.", world)
