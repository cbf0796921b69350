"""Resume: a loader that continues in the middle, or starts at a later epoch, gives what an uninterrupted one gives."""

import copy

import pytest
import torch
from data_samples import EVAL, be_rank, everything, good, make_loader, same, shard, texts
from own_datasets import Numbers, Stream

from minigpt4.common.errors import UserError
from minigpt4.datasets.datasets import PairDataset, ShardDataset
from minigpt4.processors import Blip2ImageTrainProcessor

pytestmark = pytest.mark.usefixtures("time_limit")


def mixed(pairs, shards, num_workers, **settings):
    datasets = {
        "pairs": PairDataset("pairs", pairs, Blip2ImageTrainProcessor(8)),
        "shards": ShardDataset("shards", shards, Blip2ImageTrainProcessor(8), shuffle_buffer=11),
    }
    return make_loader(datasets, {"shards": 3}, num_workers=num_workers, iters_per_epoch=14, **settings)


def saved(state):
    """What a checkpoint gives back: loaded by torch, plain containers only."""
    import io

    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("first", [1, 5, 12, 14])
def test_an_epoch_goes_on_at_any_iteration(pairs, shards, first, num_workers):
    bad = shard(shards[0], [*good(0), ("bad.jpg", b"no image"), ("bad.txt", b"c"), *good(1)])
    whole = mixed(pairs, [bad, *shards[1:]], num_workers)
    expected, state = [], None
    for i, batch in enumerate(whole.iter_epoch(1), 1):
        expected.append(batch)
        if i == first:
            state = saved(whole.state_dict())
    again = mixed(pairs, [bad, *shards[1:]], num_workers)
    again.load_state_dict([state], 1, first)
    assert same(list(again.iter_epoch(1, first)), expected[first:])
    assert again.state_dict() == whole.state_dict()
    assert same(list(again.iter_epoch(2)), list(whole.iter_epoch(2)))


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_fresh_loader_at_epoch_1_gives_what_a_continuous_run_gives(
    pairs, shards, monkeypatch, world_size, num_workers
):
    for rank in range(world_size):
        be_rank(monkeypatch, rank, world_size)
        whole = mixed(pairs, shards, num_workers)
        epochs = [list(whole.iter_epoch(epoch)) for epoch in range(3)]
        for epoch in (1, 2):
            assert same(list(mixed(pairs, shards, num_workers).iter_epoch(epoch)), epochs[epoch])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_own_map_style_data_sets_resume_exactly(num_workers):
    def draws(batches):
        return [(batch["index"].tolist(), batch["draws"].tolist()) for batch in batches]

    whole = make_loader({"x": Numbers(11)}, num_workers=num_workers)
    expected = draws(whole.iter_epoch(0))
    for first in (3, 5, 6):
        interrupted = make_loader({"x": Numbers(11)}, num_workers=num_workers)
        batches = interrupted.iter_epoch(0)
        for _ in range(first):
            next(batches)
        again = make_loader({"x": Numbers(11)}, num_workers=num_workers)
        again.load_state_dict([saved(interrupted.state_dict())], 0, first)
        assert draws(again.iter_epoch(0, first)) == expected[first:]


def test_an_iterable_begins_anew_and_says_so(caplog):
    interrupted = make_loader({"x": Stream(40)})
    batches = interrupted.iter_epoch(0)
    first = [next(batches)["index"].tolist() for _ in range(3)]
    again = make_loader({"x": Stream(40)})
    again.load_state_dict([saved(interrupted.state_dict())], 0, 3)
    assert "Data set x is an iterable, whose position is unknown: it begins anew" in caplog.text
    assert [batch["index"].tolist() for batch in again.iter_epoch(0, 3)][:3] == first


def test_a_shard_that_changed_meanwhile_is_named(pairs, shards):
    whole = mixed(pairs, shards, 0)
    batches = whole.iter_epoch(0)
    for _ in range(13):
        next(batches)
    state = whole.state_dict()
    for path in shards:
        shard(path, good(1))
    again = mixed(pairs, shards, 0)
    again.load_state_dict([state], 0, 13)
    with pytest.raises(UserError, match="no longer holds the samples that it held when the checkpoint was written"):
        list(again.iter_epoch(0, 13))


def test_pairs_go_on_with_another_number_of_ranks(pairs, monkeypatch, caplog):
    def loader(rank, world, **settings):
        be_rank(monkeypatch, rank, world)
        return make_loader({"x": PairDataset("x", pairs, EVAL)}, iters_per_epoch=12, **settings)

    seen, states = [], []
    for rank in range(2):
        two = loader(rank, 2)
        batches = two.iter_epoch(0)
        seen += texts(next(batches) for _ in range(3))
        states.append(two.state_dict())
    one = loader(0, 1, batch_size=3)
    one.load_state_dict(states, 0, 3)
    batches = one.iter_epoch(0, 3)
    seen += texts(next(batches) for _ in range(4))
    assert sorted(seen) == everything()
    assert "written by 2 ranks with 0 loader workers and batches of 2, this run has 1, 0 and 3" in caplog.text


def test_own_data_sets_continue_within_a_pass_with_another_batch_size():
    """One that drops incomplete batches: a pass has 20 of 22 samples in batches of 4, and 21 in batches of 3."""
    four = make_loader({"x": Numbers(22)}, batch_size=4)
    batches = four.iter_epoch(0)
    *_, last = (next(batches) for _ in range(6))  # the first of the second pass
    three = make_loader({"x": Numbers(22)}, batch_size=3, iters_per_epoch=11)
    three.load_state_dict([saved(four.state_dict())], 0, 6)
    seen = [last, *three.iter_epoch(0, 6)]
    assert len({index for batch in seen for index in batch["index"].tolist()}) == 4 + 5 * 3


def test_shards_are_drawn_anew_with_another_number_of_workers(pairs, shards):
    whole = mixed(pairs, shards, 2)
    batches = whole.iter_epoch(0)
    for _ in range(5):
        next(batches)
    again = mixed(pairs, shards, 1)
    again.load_state_dict([whole.state_dict()], 0, 5)
    start = copy.deepcopy(again.state_dict())
    rest = list(again.iter_epoch(0, 5))
    assert len(rest) == 9 and not same(rest[:3], list(mixed(pairs, shards, 1).iter_epoch(0))[:3])
    later = mixed(pairs, shards, 1)
    later.load_state_dict([start], 0, 5)
    assert same(list(later.iter_epoch(0, 5)), rest)


def test_a_data_set_of_another_kind_continues_by_the_step(pairs, shards):
    """As with a feature cache, which is read by index where there was a stream of shards."""
    streamed = make_loader({"x": ShardDataset("x", shards, EVAL)})
    batches = streamed.iter_epoch(0)
    for _ in range(3):
        next(batches)
    listed = make_loader({"x": PairDataset("x", pairs, EVAL)})
    listed.load_state_dict([streamed.state_dict()], 0, 3)
    assert same(
        list(listed.iter_epoch(0, 3)), list(make_loader({"x": PairDataset("x", pairs, EVAL)}).iter_epoch(0))[3:]
    )
