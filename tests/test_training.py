"""The runner: the reference's recorded trajectories, checkpoints in both directions, resume, failures."""

import json
import math

import pytest
import torch
from golden_data import GOLDEN, on_cpu, read_json
from recorded_training import TENSORS, TRAINING, run_of, watch

from minigpt4.common import device as devices
from minigpt4.common import dist_utils
from minigpt4.common.config import Config
from minigpt4.common.errors import UserError
from minigpt4.models import MiniGPT4


@pytest.mark.parametrize("golden", TRAINING["runs"], ids=lambda run: run["name"])
def test_recorded_trajectory(golden, make_runner):
    prompts = read_json("forward.json")["stage2"]["prompt_list"]
    choices = {k: prompts[choice] for k, choice in enumerate(golden["prompt_choices"] or [])}
    runner = make_runner(golden["run"], golden["model"], choices=choices)
    losses, rates, weights = watch(runner)
    runner.train()
    assert rates == pytest.approx(golden["lr_per_iter"], rel=1e-9)
    assert losses == pytest.approx(golden["loss_per_iter"], abs=1e-4)
    recorded = {i: TENSORS.get(f"{golden['name']}.weight_after_iter{i}") for i in range(1, len(weights) + 1)}
    assert any(weight is not None for weight in recorded.values())
    for i, weight in recorded.items():
        if weight is not None:
            assert (weights[i - 1] - weight).norm() / weight.norm() < 1e-4, f"after iteration {i}"


def test_checkpoint_has_the_structure_that_the_reference_loads(make_runner):
    runner = make_runner(run_of("stage1"))
    runner.train()
    files = sorted(file.name for file in runner.output_dir.iterdir())
    assert files == ["checkpoint_0.pth", "checkpoint_1.pth", "config.yaml", "log.txt", "metrics.jsonl"]
    ours = torch.load(runner.output_dir / "checkpoint_1.pth", weights_only=True)
    structure = json.loads((GOLDEN / "tiny" / "checkpoint_structure.json").read_text())
    assert set(structure["top_level_keys"]) <= set(ours)
    assert {name: list(value.shape) for name, value in ours["model"].items()} == {
        name: shape for name, shape in structure["model_keys"].items() if name.startswith("llama_proj")
    }
    optimizer = structure["optimizer"]
    assert {
        str(i): {name: list(value.shape) for name, value in state.items()}
        for i, state in ours["optimizer"]["state"].items()
    } == optimizer["state_keys"]
    for group, golden in zip(ours["optimizer"]["param_groups"], optimizer["param_groups"], strict=True):
        assert {name: group[name] for name in ("weight_decay", "betas", "params")} == {
            "weight_decay": golden["weight_decay"],
            "betas": tuple(golden["betas"]),
            "params": golden["params"],
        }
    torch.amp.GradScaler("cpu").load_state_dict(ours["scaler"])  # the reference does so even after a run without amp
    theirs = torch.load(GOLDEN / "tiny" / "checkpoint_1.pth", weights_only=True)
    for name in ("llama_proj.weight", "llama_proj.bias"):
        torch.testing.assert_close(ours["model"][name], theirs["model"][name], rtol=1e-4, atol=1e-5)


def test_resumes_a_checkpoint_of_the_reference(make_runner):
    runner = make_runner(run_of("stage1", resume_ckpt_path=str(GOLDEN / "tiny" / "checkpoint_1.pth"), max_epoch=3))
    losses, *_ = watch(runner)
    runner.train()
    assert len(losses) == 6
    assert runner.state.step == 18


@pytest.mark.parametrize("accumulation", [1, 2], ids=["plain", "leftover gradients"])
def test_resumed_run_equals_the_uninterrupted_one(make_runner, accumulation):
    settings = run_of("stage1", iters_per_epoch=3, accum_grad_iters=accumulation)
    whole = make_runner(settings, job_id="whole")
    expected, *_ = watch(whole)
    whole.train()
    resumed = make_runner(
        {**settings, "resume_ckpt_path": str(whole.output_dir / "checkpoint_0.pth")}, job_id="resumed"
    )
    losses, *_ = watch(resumed)
    resumed.train()
    assert losses == expected[3:]
    assert torch.equal(resumed.model.llama_proj.weight, whole.model.llama_proj.weight)


def test_resumes_a_checkpoint_of_an_earlier_version(make_runner):
    """It had the lowest loss in place of the best metric, and no scaler state."""
    runner = make_runner(run_of("stage1"))
    runner.train()
    file = runner.output_dir / "checkpoint_1.pth"
    content = torch.load(file, weights_only=True)
    content["scaler"] = None
    del content["state"]["best_metric"]
    content["state"]["best_loss"] = 1.5
    torch.save(content, file)
    resumed = make_runner(run_of("stage1", resume_ckpt_path=str(file), max_epoch=3))
    resumed.train()
    assert resumed.state.best_metric == -1.5 and resumed.state.epoch == 3


def test_existing_folder_is_never_used(make_runner):
    assert make_runner(run_of("stage1")).output_dir != make_runner(run_of("stage1")).output_dir


@on_cpu
def test_layers_are_compiled_where_that_pays(make_runner, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(MiniGPT4, "compile_parts", lambda _: compiled.append(torch.is_autocast_enabled("cpu")))
    compiled = []
    make_runner(run_of("stage1", compile=True))
    assert not compiled and "run.compile is ignored on cpu" in caplog.text
    monkeypatch.setattr(devices, "compiles", lambda _: True)
    monkeypatch.setattr(devices, "default_dtype", lambda _: torch.bfloat16)
    make_runner(run_of("stage1", compile=True, amp=True))
    make_runner(run_of("stage1", compile=False, amp=True))
    assert compiled == [True]


def test_updates_with_nonfinite_losses_are_skipped_and_then_end_the_run(make_runner):
    runner = make_runner(run_of("stage1", max_nonfinite=3))
    before = runner.model.llama_proj.weight.detach().clone()
    step = runner.task.train_step
    runner.task.train_step = lambda model, samples: step(model, samples) * float("nan")
    with pytest.raises(UserError, match="not finite 3 updates in a row"):
        runner.train()
    assert torch.equal(runner.model.llama_proj.weight, before)


def means_of(runner):
    """The losses that a run has logged, by step and by epoch."""
    rows = [json.loads(line) for line in (runner.output_dir / "metrics.jsonl").read_text().splitlines()]
    epochs = [json.loads(line) for line in (runner.output_dir / "log.txt").read_text().splitlines()[1:]]
    return [row["loss"] for row in rows], [row["train_loss"] for row in epochs]


def test_a_resume_counts_updates_in_a_row_only_if_they_were_the_last(make_runner):
    def spoil(runner, bad):
        plain, steps = runner.task.train_step, iter(range(100))
        runner.task.train_step = lambda model, samples: plain(model, samples) * (math.nan if next(steps) in bad else 1)

    settings = run_of("stage1", iters_per_epoch=4, max_epoch=1, max_nonfinite=3, log_freq=1)
    first = make_runner(settings)
    spoil(first, {0, 1})
    first.train()
    file = first.output_dir / "checkpoint_0.pth"
    resumed = make_runner({**settings, "max_epoch": 2, "resume_ckpt_path": str(file)}, job_id="resumed")
    spoil(resumed, {0, 1})
    resumed.train()
    assert resumed.state.num_nonfinite == 4 and resumed.state.epoch == 2


def test_means_leave_out_losses_that_are_not_finite(make_runner):
    runner = make_runner(run_of("stage1", iters_per_epoch=3, max_epoch=2, log_freq=2))
    losses = iter([2.0, math.nan, 3.0, math.inf, math.nan, math.nan])
    step = runner.task.train_step
    runner.task.train_step = lambda model, samples: (loss := step(model, samples)) / loss.detach() * next(losses)
    runner.train()
    windows, epochs = means_of(runner)  # reported at the first iteration of an epoch, every second, and at the last
    assert windows == [2.0, 3.0, None, None] and epochs == [2.5, None]


@pytest.mark.parametrize("is_earlier", [False, True], ids=["this version", "an earlier one"])
def test_means_continue_after_a_resume(make_runner, is_earlier):
    settings = run_of("stage1", iters_per_epoch=4, max_epoch=1, log_freq=4, save_every_iters=2)
    whole = make_runner(settings, job_id="whole")
    whole.train()
    file = whole.output_dir / "checkpoint_step_2.pth"
    content = torch.load(file, weights_only=True)
    if is_earlier:  # it counted all losses as finite
        del content["ranks"][0]["progress"]["num_losses"], content["ranks"][0]["progress"]["num_window_losses"]
        torch.save(content, file)
    resumed = make_runner({**settings, "resume_ckpt_path": str(file)}, job_id="resumed")
    resumed.train()
    (_, *windows), epochs = means_of(whole)
    assert means_of(resumed) == (windows, epochs)


def test_times_are_those_since_the_last_report(make_runner, monkeypatch):
    """Each iteration takes ten seconds of a clock that stands still otherwise."""
    runner = make_runner(run_of("stage1", iters_per_epoch=4, max_epoch=2, log_freq=2))
    plain, seconds = runner.task.train_step, [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: seconds[0])

    def train_step(model, samples):
        seconds[0] += 10
        return plain(model, samples)

    runner.task.train_step = train_step
    runner.train()
    rows = [json.loads(line) for line in (runner.output_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["time"] for row in rows] == [10.0] * 6


def test_skipped_samples_are_reported_once_after_a_resume_on_fewer_ranks(make_runner, caplog):
    progress = make_runner(run_of("stage1")).progress
    counts = [{"x": {"no image": 2}}, {"x": {"no image": 3}, "y": {"no caption": 1}}]
    progress.load_state_dict([progress.state_dict() | {"skipped": skipped} for skipped in counts], iteration=1)
    with progress.run_epoch(0, 2, first=1):
        progress.finish()
    assert progress.skipped == {"x": {"no image": 5}, "y": {"no caption": 1}}
    assert "x: skipped 5 samples" in caplog.text


def test_two_splits_of_one_data_set_are_not_mixed_up(make_runner):
    """One of them would be left out."""
    with pytest.raises(UserError, match="train_splits names train and more, both of data set own"):
        make_runner(run_of("stage1", train_splits=["train", "more"]), datasets={"own": {"train": [1], "more": [2]}})


def test_only_the_projection_learns(make_runner):
    runner = make_runner(run_of("stage1"))
    before = {name: value.clone() for name, value in runner.model.state_dict().items()}
    runner.train()
    changed = {n for n, value in runner.model.state_dict().items() if not torch.equal(value, before[n])}
    assert changed == {"llama_proj.weight", "llama_proj.bias"}
    assert not runner.model.visual_encoder.training and not runner.model.llama_model.training
    assert dist_utils.get_world_size() == 1


def test_a_checkpoint_with_weights_only_cannot_be_resumed(make_runner):
    runner = make_runner(run_of("stage1", resume_ckpt_path=str(GOLDEN / "tiny" / "minigpt4_ckpt.pth")))
    with pytest.raises(UserError, match=r"run\.resume_ckpt_path.*weights only.*model\.ckpt"):
        runner.train()


def test_config_class_is_what_the_runner_takes(tmp_path):
    assert {"run_cfg", "model_cfg", "datasets_cfg", "to_dict"} <= set(dir(Config))
