"""What the behaviour tests share: a small data set, its configuration, runners, and ranks that record their batches."""

import json
import os
import signal
import time
from argparse import Namespace
from pathlib import Path

import forked
import numpy
import torch
import yaml
from conftest import TINY_CONFIG
from PIL import Image

from minigpt4.common.config import Config

MODEL = TINY_CONFIG | {"arch": "mini_gpt4", "model_type": "pretrain_vicuna", "llm_dtype": "fp32"}
RUN = {
    "task": "image_text_pretrain",
    "lr_sched": "linear_warmup_cosine_lr",
    "init_lr": 1e-2,
    "min_lr": 1e-3,
    "max_epoch": 1,
    "iters_per_epoch": 2,
    "batch_size_train": 2,
    "batch_size_eval": 2,
    "num_workers": 0,
    "log_freq": 1,
    "amp": False,
    "device": "cpu",
}
CAPTIONS = [
    f"a picture of {count} {animal}" for count in ("one", "two") for animal in ("dogs", "cats", "birds", "cows")
]


def write_pairs(folder, captions=CAPTIONS, side=64, suffix=""):
    """Writes a folder in the form of cc_sbu_align, each caption with its own noise image; returns it."""
    (folder / "image").mkdir(parents=True)
    rng = numpy.random.default_rng(len(captions))
    for i in range(len(captions)):
        noise = rng.integers(0, 255, (8, 8, 3), dtype=numpy.uint8)
        Image.fromarray(noise).resize((side, side)).save(folder / "image" / f"{suffix}{i}.jpg", "JPEG")
    annotations = [{"image_id": f"{suffix}{i}", "caption": caption} for i, caption in enumerate(captions)]
    (folder / "filter_cap.json").write_text(json.dumps({"annotations": annotations}))
    return folder


def align_section(storage, processor="blip2_image_train", **build_info):
    """The section of cc_sbu_align for such a folder."""
    return {
        "cc_sbu_align": {
            "data_type": "images",
            "build_info": {"storage": str(storage), **build_info},
            "vis_processor": {"train": {"name": processor, "image_size": 28}},
            "text_processor": {"train": {"name": "blip_caption"}},
        }
    }


def write_config(file, run, datasets=None, model=None):
    """Writes the YAML file of a run of the tiny model; returns its path."""
    content = {"model": MODEL | (model or {}), "datasets": datasets or {}, "run": RUN | run}
    file.write_text(yaml.safe_dump(content))
    return file


def load_config(file, options=()):
    return Config(Namespace(cfg_path=str(file), options=list(options))).check()


def recording(folder):
    """What start_ranks runs in each rank: every batch that the model gets goes to the file FOLDER/RANK.jsonl."""

    def before(rank):
        from minigpt4.models import MiniGPT4

        plain = MiniGPT4.forward

        def forward(self, samples):
            before = self.llama_proj.weight.detach().double().sum().item()
            output = plain(self, samples)
            row = {
                "texts": list(samples["text_input"]),
                "images": [image.double().sum().item() for image in samples["image"]],
                "loss": output["loss"].item(),
                "weight": before,
            }
            with (folder / f"{rank}.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            return output

        MiniGPT4.forward = forward

    return before


def recorded(folder, rank=0):
    return [json.loads(line) for line in (folder / f"{rank}.jsonl").read_text().splitlines()]


def run_ranks(number, config, folder, options=(), before=None, seconds=60):
    """Runs ranks of train.py that record into a new folder; returns their exit statuses, -9 for one that hung."""
    folder.mkdir()
    record = recording(folder)

    def prepare(rank):
        record(rank)
        if before is not None:
            before(rank)

    arguments = ["--cfg-path", config, "--options", f"run.output_dir={folder}/out", *options]
    pids = forked.start_ranks(number, arguments, folder / "log", before=prepare)
    return [wait(pid, seconds) for pid in pids]


def wait(pid, seconds):
    """The exit status of a process; one that has not ended within ``seconds`` is killed."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    return forked.wait(pid)


def logs(folder):
    return "\n".join(Path(file).read_text() for file in sorted(folder.glob("log.*")))


def folder_of(output_dir):
    """The only run's folder below an output folder."""
    (folder,) = (path for path in Path(output_dir).iterdir() if path.is_dir())
    return folder


def read_checkpoint(file):
    return torch.load(file, weights_only=True)
