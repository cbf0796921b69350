"""Several sources of one builder: mixing, the loss of each, leaving one out, and the resume of such a run."""

import json
from argparse import Namespace

import foreign_formats
import pytest
from confined import told
from data_samples import EVAL, make_loader, pairs, shards  # noqa: F401
from forked import start, wait
from omegaconf import OmegaConf

from minigpt4.common.config import Config
from minigpt4.common.errors import UserError
from minigpt4.datasets.datasets import PairDataset, ShardDataset
from quickstart import scenes


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "loss", "loss/talk", "loss/coco", "val loss", "val loss_coco", "val loss_talk")
    return [{name: line[name] for name in kept if name in line} for line in lines]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A file of a run with three sources, and a function that trains by it."""
    folder = tmp_path_factory.mktemp("world")
    cfg = OmegaConf.load("train_configs/quickstart_stage2.yaml")
    captions, images = foreign_formats.coco(folder / "coco")
    scenes.write_alignment(folder / "align", num_scenes=4, seed=2)
    size = {"train": {"name": "blip2_image_eval", "image_size": 64}}
    own = {"builder": "image_text", "vis_processor": size}
    talk = str(foreign_formats.llava(folder / "llava"))
    cfg.datasets = {
        "talk": {**own, "build_info": {"storage": talk, "val_storage": talk}, "sample_ratio": "size"},
        "coco": {
            **own, "sample_ratio": "size",
            "build_info": {"storage": str(captions), "val_storage": str(captions), "image_root": str(images)},
        },
        "cc_sbu_align": {"vis_processor": size, "build_info": {"storage": str(folder / "align")}},
    }  # fmt: skip
    cfg.model.ckpt = None
    cfg.model.max_context_len = 70
    short = {"max_epoch": 2, "iters_per_epoch": 6, "batch_size_train": 3, "warmup_steps": 0, "log_freq": 2}
    cfg.run = {**cfg.run, **short, "valid_splits": ["val"], "device": "cpu", "output_dir": str(folder / "out")}
    OmegaConf.save(cfg, folder / "run.yaml")

    def train(name, *options):
        output = folder / name
        arguments = ["--cfg-path", folder / "run.yaml", "--options", f"run.output_dir={output}", *options]
        status = wait(start(arguments, folder / f"{name}.log"))
        log = (folder / f"{name}.log").read_text()
        assert status == 0, log
        return next(output.iterdir()), log

    return train


def test_losses_by_source_and_the_resume_of_a_mixed_run(world):
    folder, log = world("whole", "datasets.cc_sbu_align=null")
    whole = losses(folder)
    epochs = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()][1:]
    assert all({"train_loss_talk", "train_loss_coco", "val_loss_talk", "val_loss_coco"} <= set(e) for e in epochs)
    assert all("cc_sbu_align" not in line for line in map(json.dumps, epochs))
    assert sum("loss/coco" in line for line in whole) > 2 and sum("loss/talk" in line for line in whole) > 2
    assert {"loss/coco", "loss/talk"} & whole[0].keys()  # though one source was drawn so far
    assert "conversations so far were longer than the context and truncated" in log
    checkpoint = folder / "checkpoint_0.pth"
    again, _ = world("again", "datasets.cc_sbu_align=null", f"run.resume_ckpt_path={checkpoint}")
    assert losses(again) == whole[len(whole) // 2 :]
    for e in epochs:
        low, high = sorted((e["val_loss_talk"], e["val_loss_coco"]))
        assert low < e["val_loss"] < high


def test_a_section_is_left_out_by_options(tmp_path):
    file = tmp_path / "run.yaml"
    content = {"model": {"arch": "mini_gpt4", "model_type": "pretrain_vicuna"}, "run": {}}
    content["datasets"] = {"own": {"builder": "image_text", "build_info": {"storage": "x"}}, "laion": {}}
    OmegaConf.save(OmegaConf.create(content), file)

    def load(option):
        return Config(Namespace(cfg_path=str(file), options=[option])).check()

    cfg = load("datasets.laion=null")
    assert list(cfg.datasets_cfg) == ["own"] and cfg.datasets_cfg.own.data_type == "images"
    told(lambda: load("datasets.laoin=null"), "datasets.laoin=null", str(file), "'laion'")
    told(lambda: load("datasets.own.builder=imagetext"), "imagetext")


def test_weights_by_size(pairs, shards):  # noqa: F811
    sources = {"a": PairDataset("a", pairs[:4], EVAL), "b": PairDataset("b", pairs, EVAL)}
    assert make_loader(sources, {"a": "size", "b": "size"}).weights == [4, 24]
    assert make_loader(sources, {"a": "size", "b": 2}).weights == [4, 2]
    sources["c"] = ShardDataset("c", shards, EVAL)
    with pytest.raises(UserError, match=r"datasets\.c\.sample_ratio is size, but shards"):
        make_loader(sources, {"c": "size"})
