"""Loaders: mixing, order, evaluation, and every kind of data set that a builder may return."""

import itertools
import random
from collections import Counter

import numpy
import pytest
import torch
import webdataset as wds
from data_samples import EVAL, be_rank, everything, make_loader, same, shard, texts
from own_datasets import Listed, Numbers, Stream
from torch.utils.data import Dataset

from minigpt4.common.errors import UserError
from minigpt4.datasets.datasets import PairDataset, ShardDataset
from minigpt4.datasets.loader import LOADER_KEY, eval_batches
from minigpt4.processors import Blip2ImageTrainProcessor

pytestmark = pytest.mark.usefixtures("time_limit")


# mixing and order


def test_workers_do_not_change_what_pairs_give(pairs):
    dataset = PairDataset("x", pairs, Blip2ImageTrainProcessor(8))
    none, two = (list(make_loader({"x": dataset}, num_workers=number).iter_epoch(0)) for number in (0, 2))
    assert same(none, two) and len(none) == 8
    assert none[0]["image"].shape == (2, 3, 8, 8) and none[0]["image"].dtype == torch.float32
    assert none[0][LOADER_KEY] == {"source": "x", "num_sources": 1, "skipped": {}} and none[0]["instruction"] == [
        None,
        None,
    ]


def test_same_seed_same_batches(pairs, shards):
    def batches(seed, epoch):
        datasets = {
            "pairs": PairDataset("pairs", pairs, Blip2ImageTrainProcessor(8)),
            "shards": ShardDataset("shards", shards, Blip2ImageTrainProcessor(8), shuffle_buffer=5),
        }
        return list(make_loader(datasets, seed=seed).iter_epoch(epoch))

    first = batches(3, 1)
    assert same(first, batches(3, 1)) and {batch[LOADER_KEY]["source"] for batch in first} == {"pairs", "shards"}
    assert not same(first, batches(4, 1)) and not same(first, batches(3, 0))


def test_each_pass_visits_every_pair_once_in_another_order(pairs):
    loader = make_loader({"x": PairDataset("x", pairs, EVAL)}, iters_per_epoch=6)
    passes = [texts([*loader.iter_epoch(epoch), *loader.iter_epoch(epoch + 1)]) for epoch in (0, 2)]
    assert sorted(passes[0]) == sorted(passes[1]) == everything() and passes[0] != passes[1]


def test_the_order_follows_from_the_seed_and_the_name():
    def order(name="x", seed=3):
        batches = make_loader({name: Numbers(16)}, seed=seed).iter_epoch(0)
        return [index for batch in batches for index in batch["index"].tolist()]

    assert order() == order() and order() != order(name="y") and order() != order(seed=4)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_ranks_share_each_pass(pairs, monkeypatch, num_workers):
    parts = []
    for rank in range(2):
        be_rank(monkeypatch, rank, 2)
        loader = make_loader({"x": PairDataset("x", pairs, EVAL)}, num_workers=num_workers, iters_per_epoch=6)
        parts.append(texts(loader.iter_epoch(0)))
    assert sorted(parts[0] + parts[1]) == everything()


def test_the_incomplete_batch_of_a_pass_is_dropped(monkeypatch):
    for rank, world_size in ((0, 1), (1, 2)):
        be_rank(monkeypatch, rank, world_size)
        num = 11 // (2 * world_size)
        loader = make_loader({"x": Numbers(11)}, iters_per_epoch=num)
        seen = [torch.cat([batch["index"] for batch in loader.iter_epoch(epoch)]).tolist() for epoch in range(6)]
        assert all(len(set(indices)) == 2 * num for indices in seen)  # none comes twice in a pass
        assert set(itertools.chain(*seen)) == set(range(11))  # another one is left out each time


def test_pairs_extend_into_the_next_pass(pairs, monkeypatch):
    """None is left out, and the samples of a step do not depend on how ranks divide it."""
    dataset, steps = PairDataset("x", pairs[:7], Blip2ImageTrainProcessor(8)), []
    for world_size in (1, 2):
        parts = []
        for rank in range(world_size):
            be_rank(monkeypatch, rank, world_size)
            loader = make_loader({"x": dataset}, batch_size=4 // world_size, iters_per_epoch=7)
            parts.append([*loader.iter_epoch(0), *loader.iter_epoch(1)])
        steps.append([torch.cat([batch["image"] for batch in step]) for step in zip(*parts, strict=True)])
        seen = [text for step in zip(*parts, strict=True) for text in texts(step)]
        assert all(sorted(seen[i : i + 7]) == everything(7) for i in range(0, 56, 7))
    assert all(map(torch.equal, *steps))


def test_a_data_set_smaller_than_a_batch(monkeypatch):
    batches = []
    for rank in range(2):
        be_rank(monkeypatch, rank, 2)
        batches.append(list(make_loader({"x": Numbers(3)}, batch_size=4, iters_per_epoch=3).iter_epoch(0)))
    indices = [index for step in zip(*batches, strict=True) for part in step for index in part["index"].tolist()]
    assert len(indices) == 24 and all(set(indices[i : i + 3]) == {0, 1, 2} for i in range(0, 24, 3))


def test_a_sample_has_a_random_state_of_its_own():
    """Another crop in the next pass and of the next sample; the same whatever the number of workers."""
    none, two = (
        torch.cat([batch["draws"] for batch in make_loader({"x": Numbers(8)}, num_workers=n).iter_epoch(0)])
        for n in (0, 2)
    )
    assert torch.equal(none, two) and len(none) == 16  # two passes
    assert all(len(set(none[:, kind].tolist())) == 16 for kind in range(3))


def test_loaders_leave_the_random_state_outside_alone():
    def state():
        return random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = state()
    for dataset in (Numbers(8), Stream(8)):
        for num_workers in (0, 1):
            list(make_loader({"x": dataset}, num_workers=num_workers).iter_epoch(0))
    assert state() == before


def test_sources_are_mixed_by_ratio(pairs):
    datasets = {name: PairDataset(name, pairs, lambda image: torch.zeros(1)) for name in ("a", "b", "c")}
    loader = make_loader(datasets, {"a": 3, "b": 1, "c": 0}, batch_size=1, iters_per_epoch=400)
    counts = Counter(batch[LOADER_KEY]["source"] for batch in loader.iter_epoch(0))
    assert set(counts) == {"a", "b"} and 260 < counts["a"] < 340
    assert make_loader(datasets, {"a": None}).weights == [1, 1, 1]


def test_listed_sources_have_workers_by_their_share(pairs, shards, monkeypatch):
    made = {}
    monkeypatch.setattr(
        "minigpt4.datasets.loader._load", lambda name, batches, places, workers, *_: made.update({name: workers})
    )
    datasets = {"half": PairDataset("half", pairs, EVAL), "few": PairDataset("few", pairs, EVAL)}
    datasets["shards"] = ShardDataset("shards", shards, EVAL, str)
    loader = make_loader(datasets, {"half": 50, "few": 8, "shards": 42}, num_workers=6, iters_per_epoch=100)
    with pytest.raises(TypeError):  # the first batch: there is no loader
        next(loader.iter_epoch(0))
    assert made == {"half": 6, "few": 1, "shards": 6}


@pytest.mark.parametrize("ratios", [{"a": 0}, {"a": -1}])
def test_bad_ratios(ratios):
    with pytest.raises(UserError, match="sample_ratio of a"):
        make_loader({"a": Numbers(1)}, ratios)


def test_no_source():
    with pytest.raises(UserError, match="train_splits"):
        make_loader({})


def test_skipped_samples_arrive_with_the_batches(pairs):
    pairs[0].image.write_bytes(b"no image")
    batches = list(make_loader({"x": PairDataset("x", pairs, EVAL)}, iters_per_epoch=12).iter_epoch(0))
    assert sum((Counter(batch[LOADER_KEY]["skipped"]) for batch in batches), Counter()) == {"unreadable image": 1}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_skipped_samples_of_a_stream_arrive_once(shards, tmp_path, num_workers):
    entries = [(f"{n}.{suffix}", b"x") for n in range(3) for suffix in ("jpg", "txt")]
    dataset = ShardDataset("x", [shard(tmp_path / "bad.tar", entries), *shards], EVAL)
    batches = eval_batches("x", dataset, 2, num_workers, seed=0)
    assert len(texts(batches)) == 24 and batches.skipped == {"unreadable image": 3}


# kinds of data sets


def test_numbers_become_tensors_and_texts_lists():
    batch = next(make_loader({"x": Numbers(8)}).iter_epoch(0))
    assert set(batch) == {"index", "draws", "text_input", LOADER_KEY}
    assert batch["index"].dtype == torch.int64 and batch["draws"].shape == (2, 3) and len(batch["text_input"]) == 2


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_own_collater_makes_the_batches_inside_the_workers(num_workers):
    batches = list(make_loader({"x": Listed(8)}, num_workers=num_workers, iters_per_epoch=4).iter_epoch(0))
    assert sorted(index for batch in batches for index in batch["index"]) == list(range(8))
    assert all(batch["worker"] == (num_workers > 0) for batch in batches)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_iterable_keeps_running_from_epoch_to_epoch_and_begins_anew(num_workers):
    loader = make_loader({"x": Stream(12)}, num_workers=num_workers, iters_per_epoch=3)
    epochs = [list(loader.iter_epoch(epoch)) for epoch in range(4)]
    seen = [index for batches in epochs for batch in batches for index in batch["index"].tolist()]
    assert sorted(seen[:12]) == sorted(seen[12:]) == list(range(12))
    draws = [draw for batches in epochs for batch in batches for draw in batch["draw"].tolist()]
    assert len(set(draws)) == 24
    again = make_loader({"x": Stream(12)}, num_workers=num_workers, iters_per_epoch=12).iter_epoch(0)
    assert [draw for batch in again for draw in batch["draw"].tolist()] == draws


def test_a_webdataset_pipeline(shards):
    pipeline = wds.DataPipeline(
        wds.ResampledShards(shards),
        wds.tarfile_to_samples(),
        wds.shuffle(5),
        wds.decode("pilrgb"),
        wds.to_tuple("jpg", "json"),
        wds.map(lambda pair: {"image": EVAL(pair[0]), "text_input": pair[1]["caption"]}),
    )
    for num_workers in (0, 2):
        batches = list(make_loader({"x": pipeline}, num_workers=num_workers).iter_epoch(0))
        assert len(batches) == 8 and all(batch["image"].shape == (2, 3, 8, 8) for batch in batches)
        assert set(texts(batches)) <= set(everything())


@pytest.mark.parametrize(
    ("dataset", "words"), [(5, "returned 5"), ([], "returned \\[\\]"), (Dataset(), "returned <torch")]
)
def test_what_is_no_data_set(dataset, words):
    with pytest.raises(UserError, match=rf"^datasets\.mine: its builder {words}|^datasets\.mine: .*{words}"):
        make_loader({"mine": dataset})


# evaluation


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_sees_every_sample_once(pairs, shards, num_workers):
    for dataset in (PairDataset("x", pairs, EVAL), ShardDataset("x", shards, EVAL)):
        batches = eval_batches("x", dataset, batch_size=5, num_workers=num_workers, seed=0)
        for _ in range(2):  # can be iterated again
            found = list(batches)
            assert sorted(texts(found)) == everything() and max(len(batch["image"]) for batch in found) == 5
    assert len(eval_batches("x", PairDataset("x", pairs, EVAL), 5, num_workers, seed=0)) == 5
    with pytest.raises(TypeError, match="stream"):
        len(batches)


def test_ranks_share_an_evaluation_unless_each_wants_it_whole(pairs, monkeypatch):
    dataset, parts = PairDataset("x", pairs, EVAL), []
    for rank in range(2):
        be_rank(monkeypatch, rank, 2)
        parts += texts(eval_batches("x", dataset, 5, 0, seed=0))
        assert sorted(texts(eval_batches("x", dataset, 5, 0, seed=0, is_whole=True))) == everything()
    assert sorted(parts) == everything()


def test_evaluation_of_own_data_sets():
    for dataset in (Numbers(7), Stream(7)):
        found = list(eval_batches("x", dataset, 3, 0, seed=0))
        assert [batch["index"].tolist() for batch in found] == [[0, 1, 2], [3, 4, 5], [6]]
    listed = list(eval_batches("x", Listed(4), 3, 0, seed=0))
    assert [batch["index"] for batch in listed] == [[0, 1, 2], [3]]


def test_a_batch_of_nothing_usable_is_left_out(pairs, caplog):
    for pair in pairs[:4]:
        pair.image.write_bytes(b"no image")
    batches = eval_batches("x", PairDataset("x", pairs, EVAL), 2, 0, seed=0)
    for _ in range(2):  # counted anew each time
        assert len(list(batches)) == 10 and batches.skipped == {"unreadable image": 4}
    assert "x: skipped 4 samples" in caplog.text
