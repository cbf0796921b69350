"""Learning rates step by step, and which parameters decay."""

import pytest
import torch
from golden_data import read_json
from recorded_training import run_of
from torch import nn

from minigpt4.common.optims import freeze_parts, log_trained, parameter_groups
from minigpt4.common.registry import registry
from minigpt4.common.schema import RunConfig, read_section


@pytest.mark.parametrize("golden", read_json("lr_schedules.json"))
def test_schedule(golden):
    """Equal to the original, but for two points.

    Where warm-up is longer than an epoch the original starts it again in every epoch; here it is counted once,
    over the whole run. And a step schedule without decay_rate, on which the original fails, does not decay.
    """
    arguments = golden["args"]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0)
    schedule = registry.get_lr_scheduler_class(golden["name"])(optimizer, **arguments)
    per_epoch, warmup, top = (arguments[name] for name in ("iters_per_epoch", "warmup_steps", "init_lr"))
    start = arguments["warmup_start_lr"] if arguments["warmup_start_lr"] >= 0 else top
    for epoch, step, expected in golden["rows"]:
        global_step = epoch * per_epoch + step
        if warmup > per_epoch and epoch > 0 and global_step < warmup:
            assert expected != pytest.approx(start + (top - start) * global_step / warmup)
            expected = start + (top - start) * global_step / warmup
        elif expected == "raises TypeError":
            expected = top
        assert schedule.step(cur_epoch=epoch, cur_step=step) == pytest.approx(expected, rel=1e-9)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-9)


def test_both_groups_get_the_rate(model):
    optimizer = torch.optim.AdamW(parameter_groups(model, RunConfig()), lr=0)
    schedule = registry.get_lr_scheduler_class("linear_warmup_cosine_lr")
    schedule(optimizer, max_epoch=1, iters_per_epoch=2, init_lr=1e-3).step(0, 0)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3] * 2


def test_groups_of_the_model(model):
    expected = read_json("checkpoint_structure.json")["optimizer"]["param_groups"]
    groups = parameter_groups(model, RunConfig())
    assert [group["weight_decay"] for group in groups] == [group["weight_decay"] for group in expected]
    assert [group["params"] for group in groups] == [[model.llama_proj.weight], [model.llama_proj.bias]]


def test_what_does_not_decay():
    model = nn.ModuleDict({"proj": nn.Linear(2, 2), "ln_out": nn.Linear(2, 2, bias=False), "still": nn.Linear(2, 2)})
    model["still"].requires_grad_(False)
    decayed, plain = (group["params"] for group in parameter_groups(model, RunConfig(weight_decay=0.1)))
    assert [id(p) for p in decayed] == [id(model["proj"].weight)]
    assert {id(p) for p in plain} == {id(model["proj"].bias), id(model["ln_out"].weight)}


def parts_of(model, run, schedule="linear_warmup_cosine_lr"):
    """Rate and weight decay of every trained parameter after the first step of a schedule."""
    run = read_section(RunConfig, {"init_lr": 1e-3, **run}, "run")
    freeze_parts(model, run)
    optimizer = torch.optim.AdamW(parameter_groups(model, run), lr=0)
    registry.get_lr_scheduler_class(schedule)(optimizer, max_epoch=1, iters_per_epoch=2, init_lr=run.init_lr).step(0, 0)
    settings = {p: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    return {name: settings[parameter] for name, parameter in model.named_parameters() if parameter in settings}, run


def test_parts_have_their_own_rates_and_weight_decays(build, caplog):
    caplog.set_level("INFO")
    model = build(lora_r=2, freeze_vit=False, freeze_qformer=False)
    optim = {"lora": {"lr": 2e-4, "weight_decay": 0.0}, "Qformer": {"lr": 1e-5}, "query_tokens": {"freeze": True}}
    optim["visual_encoder"] = {"lr": 1e-4, "layer_decay": 0.5, "weight_decay": 0.1}
    found, run = parts_of(model, {"optim": optim})
    assert found["llama_proj.weight"] == (1e-3, 0.05) and found["llama_proj.bias"] == (1e-3, 0)
    assert "query_tokens" not in found
    found = {name: (round(rate, 9), decay) for name, (rate, decay) in found.items()}
    assert {value for name, value in found.items() if "lora_" in name} == {(2e-4, 0.0)}
    assert {value[0] for name, value in found.items() if name.startswith("Qformer")} == {1e-5}
    for i, rate in enumerate((2.5e-5, 5e-5, 1e-4)):  # the last block has the full rate
        values = {value for name, value in found.items() if name.startswith(f"visual_encoder.blocks.{i}.")}
        assert {value[0] for value in values} == {rate} and {value[1] for value in values} == {0, 0.1}
    assert found["visual_encoder.pos_embed"][0] == pytest.approx(1.25e-5)
    assert found["ln_vision.weight"] == (1e-4, 0)
    log_trained(model, run)
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("Trained: ")]
    assert {line.split()[1] for line in lines} == {"visual_encoder", "Qformer", "lora", "llama_proj"}
    assert any("lora" in line and "lr 0.0002, weight decay 0" in line for line in lines)


def test_a_frozen_projection_is_saved_and_does_not_learn(make_runner):
    run = run_of("stage1", optim={"llama_proj": {"freeze": True}, "lora": {"lr": 1e-2}})
    runner = make_runner(run, {"lora_r": 2})
    before = runner.model.llama_proj.weight.detach().clone()
    runner.train()
    saved = torch.load(runner.output_dir / "checkpoint_1.pth", weights_only=True)["model"]
    assert torch.equal(saved["llama_proj.weight"], before) and any(saved[n].any() for n in saved if "lora_B" in n)
    file = runner.output_dir / "checkpoint_0.pth"
    resumed = make_runner({**run, "resume_ckpt_path": str(file)}, {"lora_r": 2}, job_id="resumed")
    resumed.train()
    expected, actual = (r.model.trainable_state_dict() for r in (runner, resumed))
    assert all(torch.equal(actual[name], value) for name, value in expected.items())
