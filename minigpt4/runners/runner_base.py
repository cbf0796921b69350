"""The training loop: epochs of a fixed number of iterations, validation, checkpoints, resume."""

import json
import logging
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from minigpt4.common import device as devices
from minigpt4.common import dist_utils, weights
from minigpt4.common.errors import UserError, see
from minigpt4.common.optims import parameter_groups
from minigpt4.common.registry import registry
from minigpt4.datasets.loader import TrainLoader
from minigpt4.models.parallel import replicate
from minigpt4.runners import checkpoints, validation
from minigpt4.runners.checkpoints import RESUME_KEY
from minigpt4.runners.progress import EpochProgress, Tracker
from minigpt4.runners.signals import StopRequest


@dataclass
class TrainState:
    """What a resumed run must know besides weights and optimizer."""

    epoch: int = 0  # the one to train next, or to go on with
    iteration: int = 0  # iterations done in it
    step: int = 0  # iterations done in all
    best_loss: float = float("inf")
    num_nonfinite: int = 0  # updates left out because a loss was not finite
    num_nonfinite_in_a_row: int = 0


@registry.register_runner("runner_base")
class RunnerBase:
    """Trains the parts of a model that require gradients.

    Args:
        cfg: the merged configuration.
        job_id: name of the folder under ``run.output_dir``; rank 0's counts, and an existing folder is never used.
        task: gives the steps.
        model: built and loaded; the runner moves it to the device.
        datasets: {name: {split: data set}}.
    """

    def __init__(self, cfg: Any, job_id: str, task: Any, model: nn.Module, datasets: dict[str, dict[str, Any]]) -> None:
        self.config = cfg
        self.run_cfg = cfg.run_cfg
        self.task = task
        self.datasets = datasets
        self.device = devices.of_run(self.run_cfg)
        self.model = model.to(self.device)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.wrapped_model = replicate(model, self.device)
        self.amp_dtype = self._amp_dtype()
        self.scaler = devices.make_scaler(self.device, self.amp_dtype)
        self.state = TrainState()
        # Counts that stay on the device, so that no step waits to read them: losses that are not finite in the present
        # accumulation group; updates left out because of them, in all and in a row.
        self._bad_losses, self._left_out, self._in_a_row = torch.zeros(3, device=self.device)
        self.max_epoch = int(self.run_cfg.get("max_epoch", 1))
        self.iters_per_epoch = self._iters_per_epoch()
        self.accum_grad_iters = int(self.run_cfg.get("accum_grad_iters", 1))
        init_lr = float(self.run_cfg.get("init_lr", 1e-4))
        groups = parameter_groups(model, float(self.run_cfg.get("weight_decay", 0.05)))
        beta2, is_fused = self.run_cfg.get("beta2", 0.999), devices.has_fused_optimizer(self.device)
        self.optimizer = torch.optim.AdamW(groups, lr=init_lr, betas=(0.9, beta2), fused=is_fused)
        if self.run_cfg.get("compile") and devices.compiles(self.device):
            with devices.autocast(self.device, self.amp_dtype):  # as in a step, which attends to what is read here
                model.compile_parts()
        elif self.run_cfg.get("compile"):
            logging.info("run.compile: not on %s, where it is not known to save more than it takes.", self.device.type)
        self.lr_scheduler = registry.get_lr_scheduler_class(self.run_cfg.get("lr_sched", "linear_warmup_cosine_lr"))(
            optimizer=self.optimizer,
            max_epoch=self.max_epoch,
            iters_per_epoch=self.iters_per_epoch,
            min_lr=float(self.run_cfg.get("min_lr", 0.0)),
            init_lr=init_lr,
            warmup_steps=int(self.run_cfg.get("warmup_steps", 0)),
            warmup_start_lr=float(self.run_cfg.get("warmup_lr", -1)),
            decay_rate=self.run_cfg.get("lr_decay_rate"),
        )
        self.resumed = checkpoints.find_resume_checkpoint(self.run_cfg)
        self.output_dir, is_new = checkpoints.find_folder(self.run_cfg, job_id, self.resumed, cfg)
        if is_new:
            self._log_line({"config": cfg.to_dict()})
        self.tracker = Tracker(self.run_cfg.get("tracker"), self.output_dir, cfg.to_dict())
        self.progress = EpochProgress(self.device, self.tracker)

    def _amp_dtype(self) -> torch.dtype:
        if not self.run_cfg.get("amp", False):
            return torch.float32
        half, wanted = devices.default_dtype(self.device), self.run_cfg.get("amp_dtype")
        if half == torch.float32:
            logging.info("run.amp: computing in float32, as this device has no faster half precision.")
            return half
        return devices.DTYPES[wanted] if wanted else half

    def _iters_per_epoch(self) -> int:
        if self.run_cfg.get("iters_per_epoch"):
            return int(self.run_cfg.iters_per_epoch)
        splits = self.run_cfg.get("train_splits", ["train"])
        sources = [dataset[split] for dataset in self.datasets.values() for split in splits if split in dataset]
        if not sources or not all(hasattr(source, "__len__") for source in sources):
            raise UserError("run.iters_per_epoch is not set; shards have no length, so give it a number.")
        batch = int(self.run_cfg.get("batch_size_train", 1)) * dist_utils.get_world_size()
        return max(1, sum(len(source) for source in sources) // batch)

    @dist_utils.main_process
    def _log_line(self, content: dict[str, Any]) -> None:
        with (self.output_dir / "log.txt").open("a", encoding="utf-8") as file:
            file.write(json.dumps(content) + "\n")

    def train(self) -> None:
        """Runs what the configuration asks for: all epochs, or with ``run.evaluate`` the validation alone.

        SIGTERM or SIGINT ends it behind a step, with a checkpoint.
        """
        start = time.time()
        logging.info("Writing to %s", self.output_dir)
        loader = None if self.run_cfg.get("evaluate", False) else self._train_loader()
        if self.resumed is not None:
            self.load_checkpoint(self.resumed, loader)
        if loader is None:
            self.evaluate()
            return
        if not self.trained:
            raise UserError("Nothing in this model is trained: all parameters are frozen.")
        logging.info("Start training")
        with StopRequest() as stop:
            while self.state.epoch < self.max_epoch:
                stats = self.train_epoch(loader, stop)
                if stats is None:
                    logging.info("Stopped at step %d; run.resume: auto goes on from here.", self.state.step)
                    return
                stats |= self.evaluate()
                self._log_line({"epoch": self.state.epoch, **stats})
                self.state.epoch, self.state.iteration = self.state.epoch + 1, 0
                self.save_checkpoint(f"checkpoint_{self.state.epoch - 1}.pth", loader, stats)
        logging.info("Training time %s", timedelta(seconds=int(time.time() - start)))

    def _train_loader(self) -> TrainLoader:
        sources, ratios = {}, {}
        for name, splits in self.datasets.items():
            for split in self.run_cfg.get("train_splits", ["train"]):
                if split in splits:
                    sources[name] = splits[split]
                    section = (self.config.config.get("datasets") or {}).get(name) or {}
                    ratios[name] = section.get("sample_ratio")
        return TrainLoader(
            sources,
            ratios,
            batch_size=int(self.run_cfg.get("batch_size_train", 1)),
            iters_per_epoch=self.iters_per_epoch,
            num_workers=int(self.run_cfg.get("num_workers", 0)),
            seed=int(self.run_cfg.get("seed", 42)),
            pin_memory=devices.pins_memory(self.device),
        )

    def train_epoch(self, loader: TrainLoader, stop: StopRequest | None = None) -> dict[str, float] | None:
        """What is left of an epoch of ``iters_per_epoch`` iterations; returns its mean loss and rate, None if stopped.

        Gradients of iterations that do not fill a group of ``accum_grad_iters`` carry into the next epoch's first
        update, as in the reference.
        """
        epoch, state = self.state.epoch, self.state
        self.wrapped_model.train()
        log_freq, save_every = int(self.run_cfg.get("log_freq", 50)), self.run_cfg.get("save_every_iters")
        logging.info("Start training epoch %d, %d iters per inner epoch.", epoch, self.iters_per_epoch)
        self.progress.begin(epoch, self.iters_per_epoch, log_freq, state.iteration)
        batches = loader.iter_epoch(epoch, state.iteration)
        with self.progress:
            for i in range(state.iteration, self.iters_per_epoch):
                asked = time.perf_counter()
                batch = next(batches)
                waited = time.perf_counter() - asked
                lr = self.lr_scheduler.step(cur_epoch=epoch, cur_step=i)
                output = self.train_step(batch, is_update=(i + 1) % self.accum_grad_iters == 0)
                state.step += 1
                state.iteration += 1
                if self.progress.add(i, state.step - 1, output, batch, lr, waited):
                    self._check_finite()
                is_stopped = stop is not None and stop.should_stop()
                if is_stopped or (save_every and state.step % save_every == 0):
                    self.save_checkpoint(f"checkpoint_step_{state.step}.pth", loader)
                if is_stopped:
                    return None
        stats = self.progress.finish()
        logging.info("Averaged stats: lr: %.6g  loss: %.4f", stats["train_lr"], stats["train_loss"])
        return stats

    def train_step(self, batch: dict[str, Any], is_update: bool) -> dict[str, Any]:
        """Forward and backward of one batch and, at the end of a group, the update; returns the model's output."""
        waits = not is_update and isinstance(self.wrapped_model, DistributedDataParallel)
        with self.wrapped_model.no_sync() if waits else nullcontext():
            with devices.autocast(self.device, self.amp_dtype):
                output = self.task.train_step(self.wrapped_model, devices.move_to(batch, self.device))
            loss = output["loss"] / self.accum_grad_iters
            (self.scaler.scale(loss) if self.scaler else loss).backward()
        self._bad_losses += ~output["loss"].detach().isfinite()
        if is_update:
            self._update()
        return output

    def _update(self) -> None:
        """Clips and applies the gradients; a group with a loss that is not finite is left out on all ranks."""
        is_bad = (dist_utils.all_reduce_sum(self._bad_losses) > 0).float()
        self._left_out += is_bad
        self._in_a_row += 1
        self._in_a_row *= is_bad
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        if self.run_cfg.get("clip_grad_norm"):
            nn.utils.clip_grad_norm_(self.trained, float(self.run_cfg.clip_grad_norm))
        if self.scaler is None and self.optimizer.defaults["fused"]:
            self.optimizer.found_inf = is_bad  # the fused kernel leaves the update out by itself
            self.optimizer.step()
        elif not is_bad.item():
            self.scaler.step(self.optimizer) if self.scaler else self.optimizer.step()
        if self.scaler:
            self.scaler.update()
        self.optimizer.zero_grad()
        self._bad_losses.zero_()

    def _check_finite(self) -> None:
        """Tells of updates left out since the last time; raises UserError where there are too many in a row."""
        state, limit = self.state, int(self.run_cfg.get("max_nonfinite", 20))
        total, in_a_row = map(int, torch.stack([self._left_out, self._in_a_row]).tolist())
        if total > state.num_nonfinite:
            logging.warning(
                "Step %d: %d updates left out because the loss was not finite (%d so far).",
                *(state.step, total - state.num_nonfinite, total),
            )
        state.num_nonfinite, state.num_nonfinite_in_a_row = total, in_a_row
        if in_a_row >= limit:
            raise UserError(
                f"The loss was not finite {in_a_row} updates in a row (run.max_nonfinite is {limit}), the last at step "
                f"{state.step}. Try run.amp_dtype: bf16, or run.amp: False; a language model of the wrong precision "
                "also does this." + see("nan")
            )

    def evaluate(self) -> dict[str, float]:
        """The mean loss per target token of every validation and test split, over all ranks."""
        stats = {}
        splits = [*(self.run_cfg.get("valid_splits") or []), *(self.run_cfg.get("test_splits") or [])]
        if not splits:
            logging.info("No validation splits found.")
        for split in splits:
            found = {name: dataset[split] for name, dataset in self.datasets.items() if split in dataset}
            if not found:
                raise UserError(f"No data set has a split '{split}'; give one build_info.{split}_storage.")
            stats[f"{split}_loss"] = validation.mean_loss(self, found)
            logging.info("%s loss: %.4f", split, stats[f"{split}_loss"])
            self.tracker.log(self.state.step - 1, {f"{split} loss": stats[f"{split}_loss"]})
        return stats

    def save_checkpoint(self, name: str, loader: TrainLoader, stats: dict[str, float] | None = None) -> None:
        """Writes a checkpoint and, where the validation losses among ``stats`` got better, checkpoint_best.pth.

        The trained parameters stand under the reference's keys, which it can load; the rest is for going on here:
        counters, gradients that wait for an update, and each rank's random state, place in the data and running sums.
        """
        valid_losses = [
            value for key, value in (stats or {}).items() if key.removesuffix("_loss") in self._valid_splits()
        ]
        is_best = bool(valid_losses) and sum(valid_losses) < self.state.best_loss
        self.state.best_loss = sum(valid_losses) if is_best else self.state.best_loss
        self._check_finite()
        rank_state = {
            "random": devices.random_state(self.device),
            "data": loader.state_dict(),
            "progress": self.progress.state_dict(),
        }
        content = {
            "model": self.model.trainable_state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "config": self.config.to_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "epoch": self.state.epoch - 1,  # the last whole one, as in the reference
            "state": asdict(self.state),
            "ranks": dist_utils.gather_objects(rank_state),
            "gradients": self._waiting_gradients(),
            "bad_losses": dist_utils.all_reduce_sum(self._bad_losses.clone()).item(),
        }

        def write() -> None:
            for file in ["checkpoint_best.pth"] * is_best + [name]:
                logging.info("Saving step %d to %s.", self.state.step, self.output_dir / file)
                checkpoints.write(devices.on_host(content), self.output_dir / file)
            checkpoints.prune(self.output_dir, self.run_cfg.get("keep_last"))

        dist_utils.run_on_main(write)

    def _waiting_gradients(self) -> list[torch.Tensor | None]:
        """Gradients of an unfinished accumulation group as their mean over the ranks, which is what an update takes."""
        world = dist_utils.get_world_size()
        return [
            None if p.grad is None else (dist_utils.all_reduce_sum(p.grad.clone()) / world).cpu() for p in self.trained
        ]

    def _valid_splits(self) -> list[str]:
        return list(self.run_cfg.get("valid_splits") or [])

    def load_checkpoint(self, path: Path, loader: TrainLoader | None = None) -> None:
        """Takes up a run where a checkpoint, ours or the reference's, left it.

        Raises:
            UserError: the file is damaged, of another model, or weights alone.
        """
        try:
            self._take_up(path, loader)
        except UserError:
            raise
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{RESUME_KEY}: {path} cannot be gone on from ({type(error).__name__}: {error}); it is damaged or of "
                "another version. To start from its weights set model.ckpt instead."
            ) from error

    def _take_up(self, path: Path, loader: TrainLoader | None) -> None:
        content = weights.read_file(path, RESUME_KEY)
        if "optimizer" not in content or "epoch" not in content:
            raise UserError(f"{RESUME_KEY}: {path} holds weights alone; to start from them set model.ckpt instead.")
        self.model.load_checkpoint(path)
        try:
            for group in content["optimizer"]["param_groups"]:  # which kernel computes is this run's affair
                group |= {"fused": self.optimizer.defaults["fused"], "foreach": None}
            self.optimizer.load_state_dict(content["optimizer"])
        except (ValueError, KeyError) as error:
            raise UserError(f"{RESUME_KEY}: the optimizer in {path} is of another model ({error}).") from error
        if self.scaler and content.get("scaler"):
            self.scaler.load_state_dict(content["scaler"])
        epoch = content["epoch"] + 1
        self.state = TrainState(**(content.get("state") or {"epoch": epoch, "step": epoch * self.iters_per_epoch}))
        for parameter, gradient in zip(self.trained, content.get("gradients") or [], strict=False):
            parameter.grad = None if gradient is None else gradient.to(parameter.device)
        self._bad_losses.fill_(content.get("bad_losses", 0) / dist_utils.get_world_size())
        self._left_out.fill_(self.state.num_nonfinite)
        self._in_a_row.fill_(self.state.num_nonfinite_in_a_row)
        ranks = content.get("ranks") or []
        if ranks:
            self.progress.load_state_dict([rank["progress"] for rank in ranks])
        if ranks and loader is not None:
            loader.load_state_dict([rank["data"] for rank in ranks], self.state.epoch, self.state.iteration)
        if len(ranks) == dist_utils.get_world_size():
            devices.set_random_state(ranks[dist_utils.get_rank()]["random"], self.device)
        else:
            logging.warning(
                "%s holds no random state for %d ranks; going on with fresh ones.", path, dist_utils.get_world_size()
            )
        if self.output_dir == path.parent:
            dist_utils.run_on_main(lambda: checkpoints.truncate_logs(path.parent, self.state.epoch, self.state.step))
        logging.info("Resuming from %s at epoch %d, iteration %d.", path, self.state.epoch, self.state.iteration)
