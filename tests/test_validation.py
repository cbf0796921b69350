"""When a validation runs: once on a batch before the training, then after each saved epoch, and again after a kill."""

import json
import os
import random

import numpy
import pytest
import torch
from behaviour import wait
from recorded_training import recorded_batch, run_of

from minigpt4.common import device as devices
from minigpt4.common.errors import UserError
from minigpt4.datasets.datasets.sample import SkipSample
from minigpt4.runners import runner_base
from minigpt4.tasks import BaseTask


class Drawing(BaseTask):
    """A task that collects results in itself, and draws random numbers of every kind."""

    def __init__(self):
        super().__init__()
        self.results, self.calls = [], []

    def train_step(self, model, samples):
        self.calls.append("train")
        noise = random.random() + numpy.random.rand() + torch.rand(()).item()
        return model(samples)["loss"] * (1 + noise / 100)

    def valid_step(self, model, samples):
        random.random(), numpy.random.rand(), torch.rand(())
        self.results += samples["text_input"]
        return samples["text_input"]

    def after_evaluation(self, val_result, split_name, epoch, **kwargs):
        self.calls.append(split_name)
        number, self.results = len(self.results), []
        return {"agg_metrics": float(epoch), "num": number}


@pytest.fixture
def runner_of(make_runner):
    """A runner of two epochs of two iterations, validated on two splits of 5 samples in batches of 2."""

    def make(task=None, **changes):
        samples = [{"image": recorded_batch(0)["image"][0], "text_input": f"{i} dogs"} for i in range(5)]
        settings = {"iters_per_epoch": 2, "max_epoch": 2, "batch_size_eval": 2, "resume": "auto", "log_freq": 1}
        settings |= {"valid_splits": ["val"], "test_splits": ["test"], **changes}
        runner = make_runner(run_of("stage1", **settings), datasets={"own": {"val": samples, "test": samples}})
        if task is not None:
            task.device, runner.task = runner.task.device, task
        devices.seed_everything(5)
        return runner

    return make


def logs_of(runner):
    """Losses by step, validations by step and epochs, as they were logged."""
    rows = [json.loads(line) for line in (runner.output_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [(row["step"], row["loss"]) for row in rows if "lr" in row]
    epochs = [json.loads(line) for line in (runner.output_dir / "log.txt").read_text().splitlines()]
    return losses, [row for row in rows if "lr" not in row], [row for row in epochs if "epoch" in row]


# before the training


@pytest.mark.parametrize("split", ["val", "test"])
def test_an_evaluation_that_cannot_run_fails_before_the_first_step(runner_of, split):
    class Broken(Drawing):
        def before_evaluation(self, model, dataset, **kwargs):
            self.num_calls = getattr(self, "num_calls", 0) + 1
            if self.num_calls == ["val", "test"].index(split) + 1:
                raise UserError(f"no ground truth for {split}")

    runner = runner_of(task := Broken())
    with pytest.raises(UserError, match=f"no ground truth for {split}"):
        runner.train()
    assert task.calls == []


def test_a_trial_does_not_prepare_an_evaluation_of_the_users_own(runner_of):
    """It may need the whole split, so that only its batches are read; it is prepared once for each evaluation."""

    calls = []  # of the copy that is tried, too

    class Own(Drawing):
        def before_evaluation(self, model, dataset, **kwargs):
            calls.append("before")

        def evaluation(self, model, data_loader, cuda_enabled=True):
            calls.append("evaluation")
            return super().evaluation(model, data_loader, cuda_enabled)

    runner_of(Own(), max_epoch=1).train()
    assert calls == ["before", "evaluation"] * 2


@pytest.mark.parametrize(
    ("data", "message"),
    [({"val": []}, "datasets.own: its builder returned"), ({}, "No data set has a split 'val'")],
    ids=["empty", "missing"],
)
def test_a_split_without_samples_fails_before_the_first_step(runner_of, data, message):
    runner = runner_of(task := Drawing(), test_splits=[])
    runner.datasets = {"own": data}
    with pytest.raises(UserError, match=message):
        runner.train()
    assert task.calls == []


def test_every_data_set_is_tried_with_its_first_usable_batch(runner_of):
    read = []

    class Noting(list):
        def __getitem__(self, index):
            read.append((len(self), index))
            if index < 2:
                raise SkipSample("unusable")
            return super().__getitem__(index)

    runner = runner_of(Drawing(), test_splits=[], max_epoch=1)
    samples = runner.datasets["own"]["val"]
    runner.datasets = {"own": {"val": Noting(samples)}, "other": {"val": Noting(samples[:4])}}
    runner_base.try_evaluation(runner.task, runner.model, runner.datasets, runner.run_cfg, runner.device)
    assert read == [(size, index) for size in (5, 4) for index in range(4)]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_trial_changes_neither_losses_nor_metrics(runner_of, monkeypatch, num_workers):
    outcomes = []
    for is_tried in (True, False):
        if not is_tried:
            monkeypatch.setattr(runner_base, "try_evaluation", lambda *_: None)
        runner = runner_of(task := Drawing(), resume=None, num_workers=num_workers)
        runner.train()
        outcomes.append(logs_of(runner))
        assert task.calls == ["train", "train", "val", "test"] * 2
    assert outcomes[0][0] == outcomes[1][0] and outcomes[0][1:] == outcomes[1][1:]
    assert [row["val_num"] for row in outcomes[0][2]] == [5, 5]


def test_random_draws_of_an_evaluation_are_the_same_each_time(runner_of):
    class Noisy(Drawing):
        def valid_step(self, model, samples):
            return [random.random() + numpy.random.rand() + torch.rand(()).item()]

        def after_evaluation(self, val_result, split_name, epoch, **kwargs):
            return {"agg_metrics": sum(val_result)}

    runner = runner_of(Noisy())
    assert runner.evaluate() == runner.evaluate()
    other = runner_of(Noisy(), seed=runner.run_cfg.seed + 1)
    assert other.evaluate() != runner.evaluate()


def test_a_task_that_refers_to_the_model_is_tried_without_a_copy_of_it(runner_of):
    tried = []

    class Owner(Drawing):
        def valid_step(self, model, samples):
            tried.append(self.parts == [model, model.llama_proj, model.llama_proj.weight])
            return super().valid_step(model, samples)

    runner = runner_of(task := Owner())
    task.parts = [runner.model, runner.model.llama_proj, runner.model.llama_proj.weight]
    runner_base.try_evaluation(runner.task, runner.model, runner.datasets, runner.run_cfg, runner.device)
    assert tried == [True, True] and task.results == []


def test_an_evaluation_of_the_users_own_gets_whole_splits_only(runner_of, tmp_path):
    class Own(Drawing):
        def evaluation(self, model, data_loader, cuda_enabled=True):
            with (tmp_path / "sizes").open("a") as file:
                file.write(f"{sum(len(samples['text_input']) for samples in data_loader)} ")
            return []

    runner_of(Own(), max_epoch=1).train()
    assert (tmp_path / "sizes").read_text() == "5 5 "


def test_a_task_that_cannot_be_copied_is_not_tried_which_is_logged(runner_of, caplog):
    runner = runner_of(task := Drawing(), max_epoch=1)
    task.file = (line for line in "generators cannot be copied")
    runner.train()
    assert "No evaluation is tried before the training" in caplog.text and task.calls[-1] == "test"


# after an epoch


def fail_at(split, action):
    """A task whose evaluation of a split does something else."""

    class Failing(Drawing):
        def after_evaluation(self, val_result, split_name, epoch, **kwargs):
            if split_name == split and epoch == 1:
                action()
            return super().after_evaluation(val_result, split_name, epoch, **kwargs)

    return Failing()


@pytest.fixture
def whole(runner_of):
    """The logs of an uninterrupted run, and its last checkpoint."""

    def run():
        runner = runner_of(Drawing(), resume=None)
        runner.train()
        return logs_of(runner), torch.load(runner.output_dir / "checkpoint_1.pth", weights_only=True)

    return run


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("is_killed", [True, False], ids=["killed", "failing"])
def test_an_epoch_whose_validation_ends_the_run_is_validated_when_it_resumes(runner_of, whole, split, is_killed):
    def fail():
        if is_killed:
            os._exit(7)
        raise UserError("no such metric")

    pid = os.fork()
    if not pid:
        try:
            runner_of(fail_at(split, fail)).train()
        except UserError:
            os._exit(7)
        finally:
            os._exit(8)
    assert wait(pid, 60) == 7
    runner = runner_of(task := Drawing())
    assert runner.resumed.name == "checkpoint_1.pth"
    runner.train()
    assert task.calls == ["val", "test"]  # nothing is trained again
    content = torch.load(runner.output_dir / "checkpoint_1.pth", weights_only=True)
    best = torch.load(runner.output_dir / "checkpoint_best.pth", weights_only=True)
    logs, expected = whole()
    assert logs_of(runner) == logs
    assert content["state"] == expected["state"] == best["state"] and content["epoch"] == 1
    assert torch.equal(content["model"]["llama_proj.weight"], expected["model"]["llama_proj.weight"])


def test_a_run_without_validation_writes_each_epoch_once(runner_of, monkeypatch):
    saved, save = [], torch.save
    monkeypatch.setattr(torch, "save", lambda content, file: saved.append(file.name) or save(content, file))
    runner_of(valid_splits=[], test_splits=[]).train()
    assert len(saved) == 2
