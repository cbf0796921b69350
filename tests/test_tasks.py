"""Tasks in the reference's form and the product's: steps, evaluation, metrics, and what is built for them."""

import argparse
import json
import sys
import types

import pytest
import torch
from behaviour import RUN, align_section, load_config, write_config, write_pairs
from recorded_training import recorded_batch, run_of
from torch import nn

from minigpt4.common import dist_utils
from minigpt4.common.errors import UserError
from minigpt4.common.registry import registry
from minigpt4.runners import evaluation
from minigpt4.tasks import BaseTask, ImageTextPretrainTask, setup_task
from minigpt4.tasks.base_task import BatchLoss


@pytest.fixture
def runner_of(make_runner):
    """A runner whose task is an instance of a class, with 10 validation samples beside the recorded batches."""

    def make(task_class, **changes):
        image = recorded_batch(0)["image"][0]
        samples = [{"image": image * (1 + i / 10), "text_input": f"a picture of {i} dogs"} for i in range(10)]
        settings = {"iters_per_epoch": 2, "max_epoch": 3, "batch_size_eval": 4, "valid_splits": ["val"], **changes}
        runner = make_runner(run_of("stage1", **settings), datasets={"own": {"val": samples}})
        device, runner.task = runner.task.device, task_class()
        runner.task.device = device
        return runner

    return make


def log_of(runner):
    rows = [json.loads(line) for line in (runner.output_dir / "log.txt").read_text().splitlines()]
    return [row for row in rows if "epoch" in row]


class Recording(BaseTask):
    """A task in the reference's form that notes what its methods get."""

    metrics = (0.25, 0.75, 0.5)

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seen = []

    def train_step(self, model, samples):
        self.seen.append(("train", samples["epoch"], samples["iters"], samples["num_iters_per_epoch"], model.training))
        return model(samples)["loss"]

    def before_evaluation(self, model, dataset, **kwargs):
        self.seen.append(("before", len(dataset), model.training))

    def valid_step(self, model, samples):
        assert not model.training and not torch.is_grad_enabled()
        loss = model(samples)["loss"].item()
        return [{"text": text, "loss": loss} for text in samples["text_input"]]

    def after_evaluation(self, val_result, split_name, epoch, **kwargs):
        self.seen.append(("after", len(val_result), split_name, epoch))
        return {"agg_metrics": torch.tensor(self.metrics[epoch]), "num": len({row["text"] for row in val_result})}


def test_a_task_of_the_reference_selects_the_best_checkpoint(runner_of):
    runner = runner_of(Recording)
    runner.train()
    epoch = [("before", 10, False), ("after", 10, "val")]
    assert runner.task.seen[:4] == [("train", 0, 0, 2, True), ("train", 0, 1, 2, True), epoch[0], (*epoch[1], 0)]
    assert [row[-1] for row in runner.task.seen if row[0] == "after"] == [0, 1, 2]
    best = torch.load(runner.output_dir / "checkpoint_best.pth", weights_only=True)
    assert best["epoch"] == 1 and best["state"]["best_metric"] == 0.75
    assert [(row["val_agg_metrics"], row["val_num"]) for row in log_of(runner)] == [(0.25, 10), (0.75, 10), (0.5, 10)]


def test_the_first_split_selects_the_best_checkpoint_where_none_is_named_val(runner_of):
    class BySplit(Recording):
        def after_evaluation(self, val_result, split_name, epoch, **kwargs):
            return {"agg_metrics": {"first": (0.1, 0.9, 0.2), "second": (0.9, 0.1, 0.2)}[split_name][epoch]}

    runner = runner_of(BySplit, valid_splits=["first", "second"])
    runner.datasets = {"own": dict.fromkeys(("first", "second"), runner.datasets["own"]["val"])}
    runner.train()
    assert torch.load(runner.output_dir / "checkpoint_best.pth", weights_only=True)["epoch"] == 1


def test_an_own_evaluation_loops_over_batches_on_the_device(runner_of):
    class Own(Recording):
        def evaluation(self, model, data_loader, cuda_enabled=True):
            assert len(data_loader) == 3 and cuda_enabled is False
            batches = list(data_loader)
            assert [len(batch["text_input"]) for batch in batches] == [4, 4, 2]
            assert all(batch["image"].device == self.device for batch in batches)
            return [{"text": text} for batch in batches for text in batch["text_input"]]

    runner = runner_of(Own)
    assert runner.evaluate() == {"val_agg_metrics": 0.25, "val_num": 10}


def test_an_evaluation_without_results_is_not_summarised(runner_of):
    class Silent(Recording):
        def evaluation(self, model, data_loader, cuda_enabled=True):
            return None

    runner = runner_of(Silent)
    runner.train()
    assert not [row for row in runner.task.seen if row[0] == "after"]
    assert not (runner.output_dir / "checkpoint_best.pth").exists()


def test_metrics_without_agg_metrics_select_nothing_and_are_reported(runner_of, caplog):
    class Odd(Recording):
        def after_evaluation(self, val_result, split_name, epoch, **kwargs):
            return {"accuracy": 0.5}

    runner = runner_of(Odd, max_epoch=1)
    runner.train()
    assert "Odd.after_evaluation returned no agg_metrics" in caplog.text
    assert log_of(runner)[0]["val_accuracy"] == 0.5 and not (runner.output_dir / "checkpoint_best.pth").exists()


def test_results_without_a_summary_of_their_own_give_no_metrics(runner_of):
    class Half(BaseTask):
        def valid_step(self, model, samples):
            return list(samples["text_input"])

    assert runner_of(Half).evaluate() == {}


@pytest.mark.parametrize("factor", [1.0, 2.0])
@pytest.mark.parametrize("is_mapping", [False, True])
def test_what_a_train_step_returns_is_differentiated_and_logged(runner_of, factor, is_mapping):
    class Scaled(BaseTask):
        def train_step(self, model, samples):
            loss = factor * super().train_step(model, samples)
            return {"loss": loss, "note": "own"} if is_mapping else loss

    runner = runner_of(Scaled, max_epoch=1, valid_splits=[])
    batch = recorded_batch(0)
    plain = runner.model(batch)["loss"]
    plain.backward()
    expected = factor * runner.model.llama_proj.weight.grad
    runner.model.zero_grad()
    assert runner.train_step(batch, is_update=False).item() == pytest.approx(factor * plain.item(), rel=1e-6)
    torch.testing.assert_close(runner.model.llama_proj.weight.grad, expected)
    runner.model.zero_grad()
    runner.train()
    first = json.loads((runner.output_dir / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(factor * plain.item(), rel=1e-5)
    assert first["tokens/s"] > 0 and first["images/s"] > 0  # counted from the model's output and the batch


def test_the_base_task_measures_the_mean_loss_per_target_token(runner_of):
    runner = runner_of(ImageTextPretrainTask)
    sums = torch.zeros(2, dtype=torch.float64)
    runner.model.eval()
    for sample in runner.datasets["own"]["val"]:
        with torch.no_grad():
            output = runner.model({"image": sample["image"][None], "text_input": [sample["text_input"]]})
        sums += torch.tensor([output["loss"].item() * output["num_targets"], output["num_targets"]])
    stats = runner.evaluate()
    assert stats["val_loss"] == pytest.approx((sums[0] / sums[1]).item(), abs=1e-5)
    assert stats["val_agg_metrics"] == -stats["val_loss"]


def test_batches_of_a_model_that_counts_no_targets_weigh_the_same():
    rows = [row for loss in (1.0, 2.0) for row in BaseTask().valid_step(dict, {"loss": torch.tensor(loss)})]
    metrics = BaseTask().after_evaluation(rows, "val", 0)
    assert metrics == {"agg_metrics": -1.5, "loss": 1.5}


def test_a_split_without_usable_samples_is_an_error():
    with pytest.raises(UserError, match="The split 'val' has no usable sample"):
        BaseTask().after_evaluation([], "val", 0)
    assert BaseTask().after_evaluation([BatchLoss(1.0, 3), BatchLoss(2.0, 1)], "val", 0)["loss"] == 1.25


def test_fillers_of_a_sharded_evaluation_are_computed_and_not_counted(runner_of, monkeypatch):
    """A rank that has no batches left computes fillers, because every forward of a sharded model needs all ranks."""
    runner = runner_of(Recording, parallel="fsdp")

    def lockstep(items):
        items = list(items)
        yield from ((item, True) for item in items)
        yield items[0], False

    monkeypatch.setattr(dist_utils, "lockstep", lockstep)
    forwards = []
    runner.model.register_forward_hook(lambda *_: forwards.append(1))
    assert runner.evaluate()["val_num"] == 10
    assert runner.task.seen[-1] == ("after", 10, "val", 0) and len(forwards) == 4


def test_splits_that_no_data_set_has(runner_of):
    runner = runner_of(BaseTask)
    with pytest.raises(UserError, match=r"No data set has a split 'test'.*build_info\.test_storage"):
        evaluation.evaluate_split(runner.task, runner.model, runner.datasets, "test", 0, runner.run_cfg, runner.device)


# building


@pytest.fixture
def config_of(tmp_path):
    """The configuration of a run over pairs of images and captions."""

    def make(run=None, section=None, model=None):
        folder = tmp_path / "pairs"
        datasets = align_section(folder if folder.exists() else write_pairs(folder))
        datasets["cc_sbu_align"] |= section or {}
        settings = {"output_dir": str(tmp_path / "out"), **(run or {})}
        return load_config(write_config(tmp_path / "run.yaml", settings, datasets, model))

    return make


def test_setup_task_sets_the_device(config_of):
    cfg = config_of()
    assert setup_task(cfg).device == torch.device("cpu")
    assert setup_task(cfg, torch.device("meta")).device == torch.device("meta")


def test_training_splits_know_their_name_and_ratio(config_of):
    train = setup_task(cfg := config_of(section={"sample_ratio": 3})).build_datasets(cfg)["cc_sbu_align"]["train"]
    assert train.name == "cc_sbu_align" and train.sample_ratio == 3
    train = setup_task(cfg := config_of()).build_datasets(cfg)["cc_sbu_align"]["train"]
    assert not hasattr(train, "sample_ratio")


def test_a_model_class_in_the_form_of_the_reference(config_of, monkeypatch):
    """Its from_config takes the section alone."""

    class Own(nn.Module):
        @classmethod
        def from_config(cls, cfg):
            return cls() if cfg.arch == "mini_gpt4" else None

    cfg = argparse.Namespace(run_cfg=config_of().run_cfg, model_cfg=argparse.Namespace(arch="mini_gpt4"))
    monkeypatch.setattr(registry, "get_model_class", lambda _: Own)
    assert isinstance(BaseTask().build_model(cfg), Own)


@pytest.mark.parametrize(
    ("run", "own", "size"), [({}, 3, 3), ({"batch_size_train": 2}, 3, 2), ({}, None, 1)], ids=["own", "run", "neither"]
)
def test_the_batch_size_of_a_data_set_is_used_where_the_run_has_none(config_of, monkeypatch, run, own, size):
    monkeypatch.delitem(RUN, "batch_size_train")
    monkeypatch.delitem(RUN, "iters_per_epoch")
    cfg = config_of(run, {} if own is None else {"batch_size": own})
    task = setup_task(cfg)
    parts = {"task": task, "model": task.build_model(cfg), "datasets": task.build_datasets(cfg)}
    runner = registry.get_runner_class("runner_base")(cfg=cfg, job_id="job", **parts)
    assert runner.iters_per_epoch == 8 // size  # one pass
    batch = next(runner.build_train_loader().iter_epoch(0))
    assert len(batch["text_input"]) == len(batch["image"]) == size


@pytest.mark.parametrize("settings", [{"wandb_log": True, "job_name": "finetune"}, {"tracker": "wandb"}])
def test_wandb_gets_the_metrics_and_is_closed(make_runner, monkeypatch, settings):
    calls = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, values["loss"])), finish=lambda: calls.append("finish")
    )
    fake = types.SimpleNamespace(init=lambda name, **_: calls.append(name) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    make_runner(run_of("stage1", max_epoch=1, iters_per_epoch=2, log_freq=1, **settings)).train()
    assert calls[0] == settings.get("job_name", "job") and calls[-1] == "finish"
    assert [step for step, _ in calls[1:-1]] == [0, 1]


def test_a_missing_tracker_is_an_error(make_runner, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"run\.tracker is 'wandb', which is not installed.*pip install wandb"):
        make_runner(run_of("stage1", wandb_log=True))
