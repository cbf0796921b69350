"""The reference's recorded trainings: their settings, their batches, and what a runner makes of them."""

import json

from golden_data import GOLDEN
from safetensors.torch import load_file

TRAINING = json.loads((GOLDEN / "tiny" / "training.json").read_text())
TENSORS = load_file(GOLDEN / "tiny" / "training.safetensors")


def recorded_batch(k):
    index = k % len(TRAINING["captions"])
    return {"image": TENSORS["images_f16"][index].float(), "text_input": TRAINING["captions"][index]}


class RecordedLoader:
    """Gives the recorded batches, and before each the recorded choice of a prompt to the model, if there is one."""

    def __init__(self, run, model, choices=None):
        self.iters_per_epoch = run["iters_per_epoch"]
        self.choices = choices or {}
        self.model = model

    def state_dict(self):
        return {}

    def load_state_dict(self, ranks, epoch, first):
        pass

    def iter_epoch(self, epoch, first=0, draw=next):
        for k in range(epoch * self.iters_per_epoch + first, (epoch + 1) * self.iters_per_epoch):
            if k in self.choices:
                self.model.prompt_list = [self.choices[k]]
            yield recorded_batch(k)


def run_of(name, **changes):
    """The ``run`` section of a recorded training, with changes."""
    return {**next(run["run"] for run in TRAINING["runs"] if run["name"] == name), **changes}


def watch(runner):
    """Lists that get loss, learning rate and weight of every iteration."""
    losses, rates, weights, step = [], [], [], runner.train_step

    def train_step(batch, is_update):
        rates.append(runner.optimizer.param_groups[0]["lr"])
        loss = step(batch, is_update)
        losses.append(loss.item())
        weights.append(runner.model.llama_proj.weight.detach().cpu().clone())
        return loss

    runner.train_step = train_step
    return losses, rates, weights
