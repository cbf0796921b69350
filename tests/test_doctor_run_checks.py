"""What the doctor leaves to the run's own checks: feature caches, and shards of another layout."""
# ruff: noqa: F811  (fixtures are imported by name)

import argparse
import io
import shutil
import tarfile

import pytest
from doctor_world import ROOT, diagnose, errors_of, world  # noqa: F401

from minigpt4.common.config import Config
from minigpt4.common.errors import UserError
from minigpt4.datasets.datasets.sample import WorkerInfo
from minigpt4.doctor.findings import OK, WARNING, refused
from minigpt4.tasks import setup_task

CHECK = "run.feature_cache, cc_sbu/train"


@pytest.fixture(scope="module")
def build(world):
    """Builds the data sets of stage 1 as a run does."""

    def datasets(folder, *changes):
        options = [f"datasets.cc_sbu.build_info.storage={world}/shards", "run.device=cpu", "run.num_workers=0"]
        options += ["run.batch_size_eval=16", f"run.feature_cache={folder}", *changes]
        cfg = Config(argparse.Namespace(cfg_path=ROOT / "train_configs/quickstart_stage1.yaml", options=options))
        return setup_task(cfg.check()).build_datasets(cfg)

    return datasets


@pytest.fixture(scope="module")
def complete(build, tmp_path_factory):
    """A complete feature cache of two shards."""
    folder = tmp_path_factory.mktemp("features") / "cache"
    patch = pytest.MonkeyPatch()
    patch.chdir(ROOT)
    build(folder)
    patch.undo()
    return folder


@pytest.fixture
def cache(complete, tmp_path):
    return shutil.copytree(complete, tmp_path / "cache")


def contents(folder):
    return {file: file.stat().st_mtime_ns for file in folder.rglob("*")}


def test_a_complete_cache(diagnose, cache):
    before = contents(cache)
    found = diagnose(f"run.feature_cache={cache}", stage=1)[CHECK]
    assert found.verdict == OK and "2 of 2 parts with 60 samples" in found.evidence and "first" not in found.evidence
    assert contents(cache) == before


def test_a_cache_that_is_incomplete(diagnose, cache):
    (cache / "cc_sbu-train" / "part-00001.safetensors").unlink()
    (cache / "cc_sbu-train" / "part-00001.0.tmp").touch()
    before = contents(cache)
    found = diagnose(f"run.feature_cache={cache}", stage=1)[CHECK]
    assert found.verdict == OK and "1 of 2 parts with 30 samples" in found.evidence
    assert "the run computes the other 1 first" in found.evidence
    assert contents(cache) == before


def test_a_cache_that_is_not_begun(diagnose, tmp_path):
    found = diagnose(f"run.feature_cache={tmp_path}/new", stage=1)[CHECK]
    assert found.verdict == OK and "0 of 2 parts" in found.evidence and not (tmp_path / "new").exists()


def spoil_nothing(folder):
    pass


def spoil_fingerprint(folder):
    (folder / "fingerprint.json").unlink()


def spoil_part(folder):
    (folder / "part-00000.safetensors").write_bytes(b"damaged")


@pytest.mark.parametrize(
    ("spoil", "change", "words"),
    [
        (spoil_nothing, "run.feature_crops=2", "other number of crops"),
        (spoil_nothing, "model.vit_precision=fp16", "other model settings"),
        (spoil_fingerprint, "run.seed=1", "no fingerprint.json"),
        (spoil_part, "run.seed=1", "is damaged"),
    ],
)
def test_a_cache_that_the_run_refuses(diagnose, build, cache, monkeypatch, spoil, change, words):
    spoil(cache / "cc_sbu-train")
    found = diagnose(f"run.feature_cache={cache}", change, stage=1)
    with pytest.raises(UserError) as refusal:
        build(cache, change)
    assert found[CHECK] == refused(CHECK, refusal.value) and words in found[CHECK].evidence
    assert list(errors_of(found)) == [CHECK]


def test_a_cache_of_weights_that_are_not_here(diagnose, cache):
    found = diagnose(f"run.feature_cache={cache}", "model.vit_weights=https://127.0.0.1:1/none.pth", stage=1)[CHECK]
    assert found.verdict == WARNING and "vision weights" in found.evidence


def test_shards_of_another_layout(diagnose, tmp_path):
    """The remedy is the run's: the shard was not damaged, it holds other files."""
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name in ("000.image.bin", "000.caption", "001.image.bin", "001.caption"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    options = f"datasets.cc_sbu.build_info.storage={tmp_path}/0.tar"
    found = diagnose(options, stage=1)["datasets.cc_sbu/train"]
    cfg = Config(argparse.Namespace(cfg_path="train_configs/quickstart_stage1.yaml", options=[options])).check()
    dataset = setup_task(cfg).build_datasets(cfg)["cc_sbu"]["train"]
    with pytest.raises(UserError) as refusal:
        next(dataset.iter_train(WorkerInfo(seed=0)))
    expected = refused("", refusal.value)
    assert found.remedy == expected.remedy and "KEY.jpg" in f"{found.evidence} {found.remedy}"
    assert "Download or copy" not in found.remedy
