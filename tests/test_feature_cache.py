"""The feature cache: the same numbers as the vision model, completed after an interruption, refused when stale."""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys

import forked
import pytest
import torch
from safetensors.torch import load_file

from minigpt4.common import dist_utils
from minigpt4.common.config import Config
from minigpt4.common.errors import UserError
from minigpt4.datasets import feature_cache
from minigpt4.datasets.datasets.sample import WorkerInfo
from minigpt4.datasets.feature_cache import fingerprint
from minigpt4.models import MiniGPT4
from minigpt4.models.vision import VisionEncoder
from minigpt4.tasks import setup_task
from quickstart import scenes

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    scenes.write_shards(folder / "shards", num_shards=3, scenes_per_shard=6, seed=1)
    scenes.write_alignment(folder / "align", num_scenes=10, seed=2)
    return folder


@pytest.fixture
def config(world, tmp_path):
    def make(*options, stage=1):
        data = {
            1: f"cc_sbu.build_info.storage={world}/shards/*.tar",
            2: f"cc_sbu_align.build_info.storage={world}/align",
        }
        fixed = [f"datasets.{data[stage]}", "run.device=cpu", f"run.feature_cache={tmp_path}/cache"]
        fixed += ["model.ckpt=null", "run.num_workers=0", "run.batch_size_eval=4"]
        path = f"train_configs/quickstart_stage{stage}.yaml"
        return Config(argparse.Namespace(cfg_path=path, options=[*fixed, *options])).check()

    return make


def datasets_of(cfg):
    return setup_task(cfg).build_datasets(cfg)


def plain_datasets(cfg):
    cfg.config.run.feature_cache = None
    return setup_task(cfg).build_datasets(cfg)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_features_are_what_vision_says(config, stage, num_workers):
    cfg = config(f"run.num_workers={num_workers}", stage=stage)
    (cached,) = (splits["train"] for splits in datasets_of(cfg).values())
    (plain,) = (splits["train"] for splits in plain_datasets(cfg).values())
    vision = VisionEncoder.from_config(cfg.model_cfg, CPU)
    is_stream = hasattr(plain, "iter_eval")
    samples = list(plain.iter_eval(WorkerInfo(seed=0)) if is_stream else map(plain.__getitem__, range(len(plain))))
    assert len(cached) == len(samples) == {1: 18, 2: 10}[stage]
    for index, sample in enumerate(samples):
        expected = vision.encode_images(sample["image"][None])[0]
        torch.testing.assert_close(cached[index]["features"].float(), expected, atol=2e-2, rtol=1e-2)
        assert cached[index]["text_input"] == sample["text_input"]


def test_a_model_without_vision_has_the_loss_of_one_with_it(config):
    cfg = config(stage=2)
    (cached,) = (splits["train"] for splits in datasets_of(cfg).values())
    torch.manual_seed(0)
    blind = setup_task(cfg).build_model(cfg)
    assert not hasattr(blind, "visual_encoder") and not hasattr(blind, "Qformer")
    (plain,) = (splits["train"] for splits in plain_datasets(cfg).values())
    seeing = MiniGPT4.from_config(cfg.model_cfg, device=CPU)
    seeing.llama_proj.load_state_dict(blind.llama_proj.state_dict())
    blind.prompt_list = seeing.prompt_list = seeing.prompt_list[:1]
    rows = [plain[index] for index in range(4)]
    texts = {"text_input": [row["text_input"] for row in rows]}
    loss = seeing({"image": torch.stack([row["image"] for row in rows]), **texts})["loss"]
    of_features = blind({"features": torch.stack([cached[index]["features"] for index in range(4)]), **texts})["loss"]
    assert of_features.item() == pytest.approx(loss.item(), abs=5e-3)
    of_features.backward()
    assert blind.llama_proj.weight.grad.abs().max() > 0


def test_only_missing_parts_are_computed(config, tmp_path, monkeypatch):
    cfg = config()
    datasets_of(cfg)
    folder = tmp_path / "cache" / "cc_sbu-train"
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    times = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    (folder / "part-00001.safetensors").unlink()
    (folder / "part-00002.0.tmp").write_bytes(b"left by a run that was killed")
    assert len(datasets_of(cfg)["cc_sbu"]["train"]) == 18
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    changed = [file.name for file in folder.iterdir() if file.stat().st_mtime_ns != times[file.name]]
    assert changed == ["part-00001.safetensors"]
    failing = classmethod(lambda *_: pytest.fail("no part is missing, so the vision side is not needed"))
    monkeypatch.setattr(VisionEncoder, "from_config", failing)
    datasets_of(cfg)


def test_crops_are_several_and_drawn(config):
    options = ("datasets.cc_sbu.vis_processor.train.name=blip2_image_train", "run.feature_crops=3")
    dataset = datasets_of(config(*options))["cc_sbu"]["train"]
    content = load_file(dataset.files[0])
    assert content["features"].shape == (6, 3, 12, 128) and content["features"].dtype == torch.bfloat16
    assert not torch.equal(content["features"][:, 0], content["features"][:, 1])
    seen = {dataset[0]["features"].float().sum().item() for _ in range(40)}
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["model.vit_precision=fp16"], "model settings"),
        (["datasets.cc_sbu.vis_processor.train.name=blip2_image_train"], "processors"),
        (["run.feature_crops=2"], "number of crops"),
        (["datasets.cc_sbu.text_processor.train.max_words=3"], "processors"),
    ],
)
def test_a_stale_cache_is_refused_with_what_differs(config, options, what):
    datasets_of(config())
    with pytest.raises(UserError, match=rf"run\.feature_cache: .*cc_sbu-train holds features with other .*{what}"):
        datasets_of(config(*options))


def test_other_weights_data_or_versions_are_refused(config, world, tmp_path, monkeypatch):
    datasets_of(config())
    weights = load_file("quickstart/weights/qformer.safetensors")
    from safetensors.torch import save_file

    save_file({name: value + 1e-3 for name, value in weights.items()}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="features with other weights than"):
        datasets_of(config(f"model.q_former_model={tmp_path}/other.safetensors"))
    with pytest.raises(UserError, match="features with other data than"):
        datasets_of(config(f"datasets.cc_sbu.build_info.storage={world}/shards/00000.tar"))
    monkeypatch.setattr(feature_cache, "VERSION", feature_cache.VERSION + 1)
    with pytest.raises(UserError, match="features with other version than"):
        datasets_of(config())


def test_bad_folders_and_damaged_parts(config, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"run\.feature_cache: .*cannot be used"):
        datasets_of(config())
    (tmp_path / "cache").unlink()
    (tmp_path / "cache" / "cc_sbu-train").mkdir(parents=True)
    (tmp_path / "cache" / "cc_sbu-train" / "letter.txt").write_text("mine")
    with pytest.raises(UserError, match="holds files but no fingerprint"):
        datasets_of(config())
    (tmp_path / "cache" / "cc_sbu-train" / "letter.txt").unlink()
    part = datasets_of(config())["cc_sbu"]["train"].files[1]
    part.write_bytes(part.read_bytes()[:50])
    with pytest.raises(UserError, match=r"part-00001\.safetensors is damaged .*; remove it, and it is computed again"):
        datasets_of(config())


def test_a_vision_side_that_learns_has_no_cache(config):
    with pytest.raises(UserError, match="requires a frozen vision side"):
        datasets_of(config("model.freeze_qformer=False"))


def test_two_ranks_fill_a_cache_together_and_a_run_goes_on_in_it(world, tmp_path):
    fixed = [f"datasets.cc_sbu.build_info.storage={world}/shards/*.tar", f"run.feature_cache={tmp_path}/cache"]
    fixed += ["run.device=cpu", "run.num_workers=1", "run.batch_size_train=3", "run.log_freq=1", "run.warmup_steps=0"]
    fixed += ["run.max_epoch=1", "run.iters_per_epoch=6", "run.save_every_iters=2", "run.resume=auto"]
    yaml = ["--cfg-path", "train_configs/quickstart_stage1.yaml", "--options", *fixed]
    pids = forked.start_ranks(2, [*yaml, f"run.output_dir={tmp_path}/two"], tmp_path / "log")
    assert [forked.wait(pid) for pid in pids] == [0, 0], (tmp_path / "log.0").read_text()
    assert len(list((tmp_path / "cache" / "cc_sbu-train").glob("part-*.safetensors"))) == 3
    arguments = [*yaml, f"run.output_dir={tmp_path}/one"]
    assert forked.wait(forked.start(arguments, tmp_path / "log1")) == 0, (tmp_path / "log1").read_text()
    assert "Computing features" not in (tmp_path / "log1").read_text()
    (folder,) = (tmp_path / "one").iterdir()
    rows = (folder / "metrics.jsonl").read_text()
    (folder / "checkpoint_0.pth").unlink()
    (folder / "checkpoint_step_6.pth").unlink()
    assert forked.wait(forked.start(arguments, tmp_path / "log2")) == 0
    again = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in again] == [json.loads(line)["loss"] for line in rows.splitlines()]


def test_the_command_fills_a_cache_ahead(programs, world, tmp_path):
    storage = f"datasets.cc_sbu.build_info.storage={world}/shards/*.tar"
    command = ["-m", "minigpt4.tools.cache_features"]
    command += ["--cfg-path", "train_configs/quickstart_stage1.yaml", "--options", storage, "run.device=cpu"]
    done = programs.run([*command, f"run.feature_cache={tmp_path}/cache"])
    assert done.returncode == 0 and "features of 18 samples" in done.stderr, done.stderr
    done = programs.run(command)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: run.feature_cache is not set")
    assert dist_utils.get_world_size() == 1


# fingerprints


def changed_copy(folder):
    """A copy of the package with a comment added to every file, as an editor would leave it."""
    shutil.copytree("minigpt4", folder / "minigpt4", ignore=shutil.ignore_patterns("__pycache__"))
    for file in (folder / "minigpt4").rglob("*.py"):
        file.write_text(f"{file.read_text(encoding='utf-8')}\n# edited\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("stage", [1, 2])
def test_another_process_with_edited_comments_uses_the_cache(config, world, tmp_path, stage):
    (dataset,) = (splits["train"] for splits in datasets_of(config(stage=stage)).values())
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in dataset.files[0].parent.iterdir()}
    data = {1: f"cc_sbu.build_info.storage={world}/shards/*.tar", 2: f"cc_sbu_align.build_info.storage={world}/align"}
    command = [sys.executable, "-P", "-m", "minigpt4.tools.cache_features"]
    command += ["--cfg-path", f"train_configs/quickstart_stage{stage}.yaml", "--options", f"datasets.{data[stage]}"]
    command += ["run.device=cpu", f"run.feature_cache={tmp_path}/cache", "model.ckpt=null"]
    env = os.environ | {"PYTHONPATH": str(changed_copy(tmp_path / "copy")), "PYTHONHASHSEED": "7"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0 and "features of" in done.stderr, done.stderr
    assert "Computing features" not in done.stderr
    assert {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in dataset.files[0].parent.iterdir()} == before


def test_settings_that_equal_the_defaults_are_the_same_fingerprint(config):
    datasets_of(config())
    same = ["datasets.cc_sbu.text_processor.train.max_words=50", "datasets.cc_sbu.vis_processor.train.draft=False"]
    datasets_of(config(*same, "model.freeze_vit=True", "run.init_lr=1e-5", "run.batch_size_eval=3"))


@pytest.mark.parametrize(
    "options",
    [
        ["model.qformer_config.num_attention_heads=2"],
        ["model.vit_config.num_heads=2"],
        ["datasets.cc_sbu.vis_processor.train.mean=[0.5,0.5,0.5]"],
        ["datasets.cc_sbu.text_processor.train.prompt=a"],
    ],
    ids=lambda options: options[0].partition("=")[0],
)
def test_other_settings_are_other_fingerprints(config, options):
    def digests(*options):
        cfg = config(*options)
        cfg.config.run.feature_cache = None
        (dataset,) = (splits["train"] for splits in setup_task(cfg).build_datasets(cfg).values())
        return fingerprint(cfg, "cc_sbu", "train", dataset, 1)

    first, second = digests(), digests(*options)
    assert sum(first[part] != second[part] for part in first) == 1 and digests() == first


def test_pairs_follow_from_files_and_texts(config, world, tmp_path):
    shutil.copytree(world / "align", tmp_path / "align")
    options = f"datasets.cc_sbu_align.build_info.storage={tmp_path}/align"
    datasets_of(config(options, stage=2))
    datasets_of(config(options, "datasets.cc_sbu_align.text_processor.train.max_words=3", stage=2))  # is not applied
    content = (tmp_path / "align" / "filter_cap.json").read_text()
    (tmp_path / "align" / "filter_cap.json").write_text(content.replace("The picture", "A picture"))
    with pytest.raises(UserError, match="features with other data than"):
        datasets_of(config(options, stage=2))


def test_own_data_sets_are_refused_with_what_they_need(config):
    cfg = config()
    with pytest.raises(UserError, match=r"datasets\.mine cannot be cached, as its list has no num_parts, .*null"):
        feature_cache.with_features(cfg, {"mine": {"train": [1]}}, CPU)


def test_a_full_disk_costs_only_the_part_that_is_written(config, tmp_path):
    cfg = config()
    datasets_of(cfg)
    folder = tmp_path / "cache" / "cc_sbu-train"
    expected = {file.name: file.read_bytes() for file in folder.iterdir()}
    (folder / "part-00001.safetensors").unlink()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        words = r"cannot write .*part-00001\.safetensors \(.*it needs 1\d,\d{3} bytes, .* are free; make"
        with pytest.raises(UserError, match=words):
            datasets_of(cfg)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {file.name for file in folder.iterdir()} == expected.keys() - {"part-00001.safetensors"}
    datasets_of(cfg)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == expected
