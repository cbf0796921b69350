"""Which samples a run sees, through train.py."""

import pytest
import torch
from behaviour import align_section, folder_of, logs, read_checkpoint, recorded, run_ranks, write_config, write_pairs

from quickstart import scenes


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Two epochs over eight pairs and over shards, drawn by ratio."""
    folder = tmp_path_factory.mktemp("data")
    scenes.write_shards(folder / "shards", num_shards=4, scenes_per_shard=10, seed=1)
    datasets = align_section(write_pairs(folder / "align"))
    datasets["cc_sbu_align"]["sample_ratio"] = 2
    datasets["cc_sbu"] = {
        **datasets["cc_sbu_align"],
        "sample_ratio": 1,
        "build_info": {"storage": f"{folder}/shards/*.tar", "shuffle_buffer": 5},
    }
    return write_config(folder / "run.yaml", {"iters_per_epoch": 8, "max_epoch": 2}, datasets)


def seen(folder, rank):
    """Texts and images of each batch that a rank got."""
    return [(row["texts"], row["images"]) for row in recorded(folder, rank)]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_fresh_loader_at_epoch_1_gives_what_a_continuous_run_gives(config, tmp_path, world, num_workers):
    """Resumed from a checkpoint without the loader's state, as those of the reference are."""
    options = [f"run.num_workers={num_workers}"]
    assert run_ranks(world, config, tmp_path / "whole", options) == [0] * world, logs(tmp_path / "whole")
    content = read_checkpoint(folder_of(tmp_path / "whole" / "out") / "checkpoint_0.pth")
    published = {name: content[name] for name in ("model", "optimizer", "config", "scaler", "epoch")}
    torch.save(published, tmp_path / "checkpoint_0.pth")
    options.append(f"run.resume_ckpt_path={tmp_path}/checkpoint_0.pth")
    assert run_ranks(world, config, tmp_path / "fresh", options) == [0] * world, logs(tmp_path / "fresh")
    for rank in range(world):
        whole, fresh = seen(tmp_path / "whole", rank), seen(tmp_path / "fresh", rank)
        assert len(whole) == 16 and len(fresh) == 8
        assert fresh == whole[8:]
        assert whole[:8] != whole[8:]
    if world == 2:
        assert seen(tmp_path / "whole", 0) != seen(tmp_path / "whole", 1)


def test_listed_pairs_come_once_a_pass_over_all_ranks(tmp_path):
    datasets = align_section(write_pairs(tmp_path / "align"))
    config = write_config(tmp_path / "run.yaml", {"max_epoch": 2}, datasets)
    assert run_ranks(2, config, tmp_path / "two") == [0, 0], logs(tmp_path / "two")
    ranks = [seen(tmp_path / "two", rank) for rank in (0, 1)]
    passes = [sorted(text for rank in ranks for texts, _ in rank[i : i + 2] for text in texts) for i in (0, 2)]
    assert passes[0] == passes[1] and len(set(passes[0])) == 8


def test_each_pass_has_another_order_and_other_crops(tmp_path):
    datasets = align_section(write_pairs(tmp_path / "align"))
    config = write_config(tmp_path / "run.yaml", {"iters_per_epoch": 4, "max_epoch": 3}, datasets)
    assert run_ranks(1, config, tmp_path / "one") == [0], logs(tmp_path / "one")
    order, crops = [], {}
    for texts, images in seen(tmp_path / "one", 0):
        order += texts
        for text, image in zip(texts, images, strict=True):
            crops.setdefault(text, []).append(image)
    assert len({tuple(order[i : i + 8]) for i in (0, 8, 16)}) == 3
    assert len(crops) == 8
    for text, images in crops.items():
        assert len(set(images)) == 3, text


@pytest.fixture
def shards_config(tmp_path):
    """Two epochs of nine batches over four shards of ten samples."""
    scenes.write_shards(tmp_path / "shards", num_shards=4, scenes_per_shard=10, seed=1)
    section = align_section("")["cc_sbu_align"]
    section["build_info"] = {"storage": f"{tmp_path}/shards/*.tar", "shuffle_buffer": 5}
    return write_config(tmp_path / "run.yaml", {"iters_per_epoch": 9, "max_epoch": 2}, {"cc_sbu": section})


def test_shards_are_drawn_anew_in_each_epoch(shards_config, tmp_path):
    assert run_ranks(1, shards_config, tmp_path / "run") == [0], logs(tmp_path / "run")
    batches = seen(tmp_path / "run", 0)
    assert len(batches) == 18 and sorted(batches[:9]) != sorted(batches[9:])


@pytest.mark.parametrize("step", [5, 11])
def test_a_resume_within_an_epoch_goes_on_with_the_next_worker(shards_config, tmp_path, step):
    options = ["run.num_workers=3", "run.save_every_iters=1"]
    assert run_ranks(1, shards_config, tmp_path / "whole", options) == [0], logs(tmp_path / "whole")
    checkpoint = folder_of(tmp_path / "whole" / "out") / f"checkpoint_step_{step}.pth"
    options.append(f"run.resume_ckpt_path={checkpoint}")
    assert run_ranks(1, shards_config, tmp_path / "resumed", options) == [0], logs(tmp_path / "resumed")
    assert seen(tmp_path / "resumed", 0) == seen(tmp_path / "whole", 0)[step:]
