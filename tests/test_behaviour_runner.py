"""What a run does to its weights and leaves on the disk, through RunnerBase and train.py."""

import math
import os
from pathlib import Path

import pytest
import torch
from behaviour import (
    align_section,
    folder_of,
    load_config,
    read_checkpoint,
    wait,
    write_config,
    write_pairs,
)
from golden_data import read_tensors

from minigpt4.common import device as devices
from minigpt4.common.errors import UserError
from minigpt4.common.registry import registry
from minigpt4.runners import RunnerBase
from minigpt4.tasks import setup_task

IMAGES = read_tensors("vision")["image"]
CAPTION = "a picture of one dog"


class StubLoader:
    """Gives one and the same batch for ever."""

    def __init__(self, batch):
        self.batch = batch

    def iter_epoch(self, epoch, first=0, draw=next):
        while True:
            yield dict(self.batch)

    def state_dict(self):
        return {}

    def load_state_dict(self, *_):
        pass


def batch_of(rows=2, first=0):
    picked = [(first + row) % len(IMAGES) for row in range(rows)]
    shades = torch.linspace(0.5, 1.5, rows).view(-1, 1, 1, 1) * (first + 1)
    return {"image": IMAGES[picked] * shades, "text_input": [CAPTION] * rows, "instruction": [None] * rows}


@pytest.fixture
def make_runner(tmp_path):
    """A runner over a stub loader; the only place that knows how a runner is put together."""

    def make(run=None, model=None, datasets=None, batch=None, job_id="job"):
        run = {"output_dir": str(tmp_path / "out")} | (run or {})
        cfg = load_config(write_config(tmp_path / "run.yaml", run, datasets, model))
        task = setup_task(cfg)
        loader = StubLoader(batch or batch_of())
        built = task.build_datasets(cfg) if datasets else {}
        arguments = {"cfg": cfg, "job_id": job_id, "task": task, "model": task.build_model(cfg), "datasets": built}
        return RunnerBase(**arguments, train_loader=loader)

    return make


def gradient(runner):
    return runner.model.llama_proj.weight.grad.detach().clone()


def weight(runner):
    return runner.model.llama_proj.weight.detach().clone()


def norms_of_updates(runner):
    """The norm of the gradients of each update, as the optimizer sees them."""
    norms = []

    def note(optimizer, *_):
        gradients = [p.grad.norm() for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.stack(gradients).norm().item())

    runner.optimizer.register_step_pre_hook(note)
    return norms


def spoil_losses(runner, steps, factor=math.nan):
    """Multiplies the losses of the given training steps, counted from 0, by NaN."""
    plain, count = runner.task.train_step, iter(range(10**6))

    def train_step(model, samples):
        return plain(model, samples) * (factor if next(count) in steps else 1.0)

    runner.task.train_step = train_step


def validate_with(runner, losses):
    """Lets the validation after each epoch measure the listed losses."""
    values = iter(losses)
    runner.datasets = {"stub": {"val": [CAPTION]}}
    runner.task.evaluation = lambda *_, **__: []
    runner.task.after_evaluation = lambda *_, **__: {"agg_metrics": -next(values)}


# updates


def test_accumulated_gradients_equal_those_of_one_larger_batch(make_runner):
    """Two batches of 4 rows and one of 8; captions of equal length, so that the mean of means is the mean."""
    halves = batch_of(4), batch_of(4, first=1)
    whole = {name: halves[0][name] + halves[1][name] for name in ("text_input", "instruction")}
    whole["image"] = torch.cat([half["image"] for half in halves])
    accumulating, plain = make_runner({"accum_grad_iters": 2}), make_runner({"accum_grad_iters": 1})
    plain.model.load_state_dict(accumulating.model.state_dict())
    for half in halves:
        accumulating.train_step(half, is_update=False)
    plain.train_step(whole, is_update=False)
    assert gradient(plain).norm() > 1e-3
    torch.testing.assert_close(gradient(accumulating), gradient(plain), rtol=1e-3, atol=1e-6)


def test_clipping_gives_gradients_of_exactly_the_limit(make_runner):
    free, clipped = make_runner(), make_runner({"clip_grad_norm": 1e-4})
    norms = norms_of_updates(free), norms_of_updates(clipped)
    free.train_step(batch_of(), is_update=True)
    clipped.train_step(batch_of(), is_update=True)
    assert norms[0][0] > 1e-2
    assert norms[1] == pytest.approx([1e-4], rel=1e-3)


def test_beta2_reaches_the_optimizer(make_runner):
    runner = make_runner({"beta2": 0.9})
    runner.train()
    content = read_checkpoint(folder_of(runner.output_dir.parent) / "checkpoint_0.pth")
    assert {tuple(group["betas"]) for group in content["optimizer"]["param_groups"]} == {(0.9, 0.9)}


def test_min_lr_is_a_floor_of_the_step_schedule(make_runner):
    runner = make_runner({"lr_sched": "linear_warmup_step_lr", "lr_decay_rate": 0.1, "max_epoch": 4, "min_lr": 2e-4})
    rates = []
    runner.optimizer.register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    runner.train()
    assert rates == pytest.approx([1e-2, 1e-2, 1e-3, 1e-3, 2e-4, 2e-4, 2e-4, 2e-4])
    schedule = registry.get_lr_scheduler_class("linear_warmup_step_lr")
    schedule = schedule(optimizer=runner.optimizer, max_epoch=9, min_lr=0.3, init_lr=1.0, decay_rate=0.5)
    schedule.step(cur_epoch=2, cur_step=0)
    assert runner.optimizer.param_groups[0]["lr"] == 0.3


# the loss scaler


@pytest.fixture
def make_scaled_runner(make_runner, monkeypatch):
    """A runner with a loss scaler, as it has on a device that computes in fp16."""

    def make(scale, run=None, job_id="job"):
        monkeypatch.setattr(devices, "make_scaler", lambda *_: torch.amp.GradScaler("cpu", init_scale=scale))
        return make_runner(run, job_id=job_id)

    return make


def test_gradients_are_unscaled_before_they_are_clipped(make_scaled_runner):
    """Read from AdamW's first moment, a tenth of the first gradient: some kernels unscale inside the update."""
    runner = make_scaled_runner(2.0**10, {"clip_grad_norm": 1e-4})
    runner.train_step(batch_of(), is_update=True)
    moments = [state["exp_avg"].norm() for state in runner.optimizer.state.values()]
    assert torch.stack(moments).norm().item() == pytest.approx(1e-5, rel=1e-3)


def test_a_scaled_run_trains_as_a_plain_one(make_scaled_runner, make_runner, monkeypatch):
    scaled = make_scaled_runner(2.0**10)
    monkeypatch.undo()
    plain = make_runner()
    plain.model.load_state_dict(scaled.model.state_dict())
    for runner in (scaled, plain):
        for _ in range(2):
            runner.train_step(batch_of(), is_update=True)
    torch.testing.assert_close(weight(scaled), weight(plain), rtol=1e-4, atol=1e-6)


def test_an_overflow_skips_the_update_and_lowers_the_scale(make_scaled_runner):
    runner = make_scaled_runner(2.0**100)
    spoil_losses(runner, {0}, 2.0**50)  # the loss itself is finite, its scaled gradients are not
    before = weight(runner)
    runner.train_step(batch_of(), is_update=True)
    assert torch.equal(weight(runner), before)
    assert runner.scaler.get_scale() == 2.0**99
    runner.train_step(batch_of(), is_update=True)
    assert not torch.equal(weight(runner), before)


def test_the_scale_goes_on_after_a_resume(make_scaled_runner):
    first = make_scaled_runner(2.0**7)
    first.train()
    file = folder_of(first.output_dir.parent) / "checkpoint_0.pth"
    resumed = make_scaled_runner(2.0**16, {"resume_ckpt_path": str(file)}, job_id="resumed")
    resumed.train()
    assert resumed.scaler.get_scale() == 2.0**7


# checkpoints


def test_the_epoch_of_the_lowest_loss_is_the_best(make_runner):
    runner = make_runner({"max_epoch": 3, "valid_splits": ["val"]})
    validate_with(runner, [3.0, 1.0, 2.0])
    runner.train()
    folder = folder_of(runner.output_dir.parent)
    best, second = read_checkpoint(folder / "checkpoint_best.pth"), read_checkpoint(folder / "checkpoint_1.pth")
    assert best["epoch"] == 1 and torch.equal(best["model"]["llama_proj.weight"], second["model"]["llama_proj.weight"])


def test_a_loss_that_is_not_a_number_is_never_the_best(make_runner):
    runner = make_runner({"max_epoch": 4, "valid_splits": ["val"]})
    validate_with(runner, [math.nan, 2.0, math.nan, 3.0])
    runner.train()
    assert read_checkpoint(runner.output_dir / "checkpoint_best.pth")["epoch"] == 1


def test_the_best_loss_is_known_after_a_resume(make_runner):
    settings = {"valid_splits": ["val"], "resume": "auto"}
    for max_epoch, losses, best in ((2, [3.0, 1.0], 1), (3, [2.0], 1), (4, [0.5], 3)):
        runner = make_runner({**settings, "max_epoch": max_epoch})
        validate_with(runner, losses)
        runner.train()
        folder = folder_of(runner.output_dir.parent)
        assert read_checkpoint(folder / "checkpoint_best.pth")["epoch"] == best


def test_killed_between_its_writes_a_run_has_the_best_checkpoint(make_runner, tmp_path):
    """The best one is written while the named one is still that of before the validation, which is then repeated."""
    settings = {"valid_splits": ["val"], "resume": "auto"}
    pid = os.fork()
    if pid == 0:
        count, save = iter(range(9)), torch.save
        torch.save = lambda *arguments, **options: os._exit(7) if next(count) == 2 else save(*arguments, **options)
        try:
            runner = make_runner(settings)
            validate_with(runner, [1.0])
            runner.train()
        finally:
            os._exit(8)
    assert wait(pid, 60) == 7
    folder = folder_of(tmp_path / "out")
    assert read_checkpoint(folder / "checkpoint_best.pth")["state"]["best_metric"] == -1.0
    named = read_checkpoint(folder / "checkpoint_0.pth")
    assert named["epoch"] == 0 and named["state"]["epoch"] == 0 and named["state"]["best_metric"] == -math.inf


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(make_runner, monkeypatch):
    synced, fsync = [], os.fsync

    def note(fd):
        synced.append(Path(os.readlink(f"/proc/self/fd/{fd}")))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", note)
    runner = make_runner()
    runner.train()
    folder = folder_of(runner.output_dir.parent)
    files = [path for path in synced if path.parent == folder and path.name.startswith("checkpoint_0")]
    assert files and files[0].name != "checkpoint_0.pth"  # written under another name
    assert folder in synced[synced.index(files[0]) :]


def test_the_higher_step_wins_over_the_later_file(make_runner):
    first = make_runner({"max_epoch": 3, "resume": "auto"})
    first.train()
    folder = folder_of(first.output_dir.parent)
    for age, epoch in enumerate((2, 0, 1)):
        os.utime(folder / f"checkpoint_{epoch}.pth", (2_000_000_000 + age, 2_000_000_000 + age))
    resumed = make_runner({"max_epoch": 3, "resume": "auto"})
    steps = norms_of_updates(resumed)
    resumed.train()
    assert steps == [] and torch.equal(weight(resumed), weight(first))


def test_skipped_updates_are_counted_on_after_a_resume(make_runner):
    def skipped(runner):
        return read_checkpoint(sorted(runner.output_dir.glob("checkpoint_?.pth"))[-1])["state"]["num_nonfinite"]

    first = make_runner({"max_nonfinite": 3})
    spoil_losses(first, {0, 1})
    first.train()
    assert skipped(first) == 2
    settings = {"resume_ckpt_path": str(first.output_dir / "checkpoint_0.pth"), "max_epoch": 2, "max_nonfinite": 4}
    resumed = make_runner(settings, job_id="resumed")
    spoil_losses(resumed, {0})
    resumed.train()
    assert skipped(resumed) == 3
    last = make_runner({**settings, "max_nonfinite": 3}, job_id="last")  # two in a row before, one more here
    spoil_losses(last, {0})
    with pytest.raises(UserError, match="not finite 3 updates in a row"):
        last.train()


# validation


def test_validation_runs_in_eval_mode_and_training_goes_on_in_train_mode(make_runner, tmp_path):
    """With dropout, the validation loss would depend on the seed."""
    folder = write_pairs(tmp_path / "align")
    datasets = align_section(folder, "blip2_image_eval", val_storage=str(folder))
    losses = set()
    for seed in (1, 2):
        settings = {"seed": seed, "valid_splits": ["val"], "max_epoch": 2}
        runner = make_runner(settings, {"freeze_qformer": False}, datasets)
        modes, steps = [], {"train": runner.task.train_step, "valid": runner.task.valid_step}

        def note(kind, samples, runner=runner, modes=modes, steps=steps):
            modes.append((kind, runner.model.Qformer.training))
            return steps[kind](runner.model, samples)

        runner.task.train_step = lambda model, samples, note=note: note("train", samples)
        runner.task.valid_step = lambda model, samples, note=note: note("valid", samples)
        for _ in range(2):
            runner.model.train()
            losses.add(round(runner.evaluate()["val_loss"], 6))
        runner.train()
        assert set(modes) == {("train", True), ("valid", False)}
    assert len(losses) == 1
