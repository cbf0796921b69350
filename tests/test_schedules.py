"""Learning rates step by step, and which parameters decay."""

import pytest
import torch
from golden_data import read_json
from torch import nn

from minigpt4.common.optims import parameter_groups
from minigpt4.common.registry import registry


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
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), lr=0)
    schedule = registry.get_lr_scheduler_class("linear_warmup_cosine_lr")
    schedule(optimizer, max_epoch=1, iters_per_epoch=2, init_lr=1e-3).step(0, 0)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3] * 2


def test_groups_of_the_model(model):
    expected = read_json("checkpoint_structure.json")["optimizer"]["param_groups"]
    groups = parameter_groups(model, 0.05)
    assert [group["weight_decay"] for group in groups] == [group["weight_decay"] for group in expected]
    assert [group["params"] for group in groups] == [[model.llama_proj.weight], [model.llama_proj.bias]]


def test_what_does_not_decay():
    model = nn.ModuleDict({"proj": nn.Linear(2, 2), "ln_out": nn.Linear(2, 2, bias=False), "still": nn.Linear(2, 2)})
    model["still"].requires_grad_(False)
    decayed, plain = (group["params"] for group in parameter_groups(model, 0.1))
    assert [id(p) for p in decayed] == [id(model["proj"].weight)]
    assert {id(p) for p in plain} == {id(model["proj"].bias), id(model["ln_out"].weight)}
