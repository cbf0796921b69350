"""The later family: three recorded trainings of each member, and the structure of their checkpoints."""

import argparse
import random

import pytest
import torch
from family import FAMILY, MEMBERS, images, load, picture, recorded, tensors
from golden_data import DEVICE
from omegaconf import OmegaConf

from minigpt4.common.errors import UserError
from minigpt4.datasets.datasets.conversations import Pair
from minigpt4.datasets.datasets.pairs import PairDataset
from minigpt4.models.lora import checkpoint_name
from minigpt4.processors import Blip2ImageEvalProcessor
from minigpt4.runners import RunnerBase, runner_base
from minigpt4.tasks import setup_task

RUNS = [(member, number) for member in MEMBERS for number in range(3)]


class RecordedLoader:
    """The recorded batches of a run."""

    def __init__(self, member, run):
        self.member, self.batches, self.iters_per_epoch = member, run["batches"], run["run"]["iters_per_epoch"]

    def state_dict(self):
        return {}

    def load_state_dict(self, ranks, epoch, first):
        pass

    def iter_epoch(self, epoch, first=0, draw=next):
        for k in range(epoch * self.iters_per_epoch + first, (epoch + 1) * self.iters_per_epoch):
            batch = dict(self.batches[k % len(self.batches)])
            if "image" in batch:
                batch["image"] = images(self.member, batch["image"]["idx"])
            yield batch


def trained(member, run, folder, monkeypatch):
    """A runner after its training; losses, learning rates, and the trained weights after each iteration."""
    monkeypatch.setattr(runner_base, "write_report", lambda folder: None)
    settings = OmegaConf.create({**run["run"], "output_dir": str(folder), "device": str(DEVICE)})
    cfg = argparse.Namespace(
        run_cfg=settings, datasets_cfg=OmegaConf.create({}), config=OmegaConf.create({}), to_dict=lambda: {},
        save=lambda path: path.write_text("run: {}"),
    )  # fmt: skip
    model = load(member, prompt_path=str(FAMILY / "prompts.txt"))
    monkeypatch.setattr("random.choice", lambda prompts: prompts[0])
    parts = {"task": setup_task(cfg), "model": model, "datasets": {}, "train_loader": RecordedLoader(member, run)}
    runner = RunnerBase(cfg=cfg, job_id="job", **parts)
    losses, rates, weights, step = [], [], [], runner.train_step

    def train_step(batch, is_update):
        rates.append(runner.optimizer.param_groups[0]["lr"])
        loss = step(batch, is_update)
        losses.append(loss.item())
        own = {checkpoint_name(n): p for n, p in model.named_parameters() if p.requires_grad}
        weights.append({name: value.detach().cpu().clone() for name, value in own.items()})
        return loss

    runner.train_step = train_step
    runner.train()
    return runner, losses, rates, weights


@pytest.mark.parametrize(("member", "number"), RUNS)
def test_recorded_training(member, number, tmp_path, monkeypatch):
    golden, recorded_tensors = recorded(member, "training")["runs"][number], tensors(member, "training")
    name = golden["name"]
    if name == "long_warmup":  # warm-up counts over epochs here; with the reference's rates the weights are its own
        own = runner_base.registry.get_lr_scheduler_class("linear_warmup_cosine_lr")

        def as_in_the_reference(scheduler, cur_epoch, cur_step):
            for group in scheduler.optimizer.param_groups:
                group["lr"] = golden["lr_per_iteration"][2 * cur_epoch + cur_step]
            return group["lr"]

        monkeypatch.setattr(own, "step", as_in_the_reference)
    runner, losses, rates, weights = trained(member, golden, tmp_path, monkeypatch)
    assert rates == pytest.approx(golden["lr_per_iteration"], rel=1e-9)
    assert losses == pytest.approx(golden["loss_per_iteration"], abs=1e-5)
    for entry in golden["after_each_step"]:
        for key, norm in entry["weight_norm"].items():
            assert weights[entry["after_iteration"] - 1][key].norm().item() == pytest.approx(norm, rel=1e-4), key
    for key, value in recorded_tensors.items():
        run, when, parameter = key.split(".", 2)
        if run == name:
            after = weights[0 if when == "step1" else -1][parameter]
            assert (after - value).norm() < 1e-4 * value.norm(), key
    for group, expected in zip(runner.optimizer.param_groups, golden["param_groups"], strict=True):
        assert list(group["betas"]) == expected["betas"] and group["weight_decay"] == expected["weight_decay"]
        assert len(group["params"]) == len(expected["parameters"])
    if name == "plain":
        check_checkpoint(member, runner)


def check_checkpoint(member, runner):
    """The last checkpoint beside the recorded one; buffers that the reference saves along are left out."""
    structure = recorded(member, "checkpoint_structure")
    assert set(structure["files"]) <= {file.name for file in runner.output_dir.iterdir()}
    ours = torch.load(runner.output_dir / "checkpoint_1.pth", weights_only=True)
    theirs = torch.load(FAMILY / member / "checkpoint_1.pth", weights_only=True)
    assert set(structure["top"]) <= set(ours) and ours["epoch"] == structure["epoch"] == theirs["epoch"]
    buffers = {name for name in structure["model"] if name.endswith(("inv_freq", "position_ids"))}
    assert {name: list(value.shape) for name, value in ours["model"].items()} == {
        name: shape for name, (shape, _) in structure["model"].items() if name not in buffers
    }
    for name, value in ours["model"].items():
        assert (value - theirs["model"][name]).norm() < 1e-4 * value.norm(), name
    states = {str(i): {k: list(v.shape) for k, v in s.items()} for i, s in ours["optimizer"]["state"].items()}
    assert states == structure["optimizer_state"]
    for group, expected in zip(ours["optimizer"]["param_groups"], structure["optimizer_param_groups"], strict=True):
        assert group["params"] == expected["params"] and group["weight_decay"] == expected["weight_decay"]
    again = load(member, ckpt=str(FAMILY / member / "checkpoint_1.pth"))  # with the reference's buffers
    assert torch.equal(again.llama_proj.weight.cpu(), theirs["model"]["llama_proj.weight"])


def test_a_source_that_does_not_fit_ends_the_run_before_the_training(tmp_path, monkeypatch):
    run = recorded("v2", "training")["runs"][0]["run"] | {"output_dir": str(tmp_path), "device": str(DEVICE)}
    cfg = argparse.Namespace(
        run_cfg=OmegaConf.create(run), datasets_cfg=OmegaConf.create({}), config=OmegaConf.create({}),
        to_dict=lambda: {}, save=lambda path: path.write_text("run: {}"),
    )  # fmt: skip
    captions = PairDataset("captions", [Pair(picture(0), "a bus")], Blip2ImageEvalProcessor(112))
    parts = {"task": setup_task(cfg), "model": load("v2"), "datasets": {"captions": {"train": captions}}}
    runner = RunnerBase(cfg=cfg, job_id="job", **parts)
    monkeypatch.setattr(runner, "train_epoch", lambda *_: pytest.fail("the training began"))
    state = torch.get_rng_state(), random.getstate()
    with pytest.raises(UserError, match=r"datasets\.captions: model\.chat_template is True, but"):
        runner.train()
    assert torch.equal(state[0], torch.get_rng_state()) and state[1] == random.getstate()
