"""What two ranks do together, through train.py."""

import json
import math

import pytest
from behaviour import align_section, folder_of, logs, recorded, run_ranks, write_config, write_pairs


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """A run of two ranks of six steps each, the third of which gives NaN on rank 1."""
    folder = tmp_path_factory.mktemp("ranks")
    datasets = align_section(write_pairs(folder / "align"))
    config = write_config(folder / "run.yaml", {"iters_per_epoch": 6, "warmup_steps": 0}, datasets)

    def run(name, spoiled):
        def spoil(rank):
            from minigpt4.models import MiniGPT4

            forward, count = MiniGPT4.forward, iter(range(99))

            def spoiling(self, samples):
                output, number = forward(self, samples), next(count)
                return {**output, "loss": output["loss"] * (math.nan if (rank, number) in spoiled else 1.0)}

            MiniGPT4.forward = spoiling

        statuses = run_ranks(2, config, folder / name, before=spoil)
        assert statuses == [0, 0], logs(folder / name)
        return folder / name

    return run


def test_a_loss_of_nan_on_one_rank_skips_the_update_on_both(two_ranks):
    folder = two_ranks("nan", {(1, 2)})
    weights = [[row["weight"] for row in recorded(folder, rank)] for rank in (0, 1)]
    assert weights[0] == weights[1] and all(map(math.isfinite, weights[0])) and len(weights[0]) == 6
    changed = [after != before for before, after in zip(weights[0], weights[0][1:], strict=False)]
    assert changed == [True, True, False, True, True]


def test_the_mean_of_an_epoch_is_over_both_ranks(two_ranks):
    folder = two_ranks("mean", set())
    losses = [[row["loss"] for row in recorded(folder, rank)] for rank in (0, 1)]
    assert abs(sum(losses[0]) - sum(losses[1])) > 1e-2
    lines = [json.loads(line) for line in (folder_of(folder / "out") / "log.txt").read_text().splitlines()]
    (epoch,) = (line for line in lines if "epoch" in line)
    assert epoch["train_loss"] == pytest.approx(sum(map(sum, losses)) / 12, abs=1e-4)


def test_all_ranks_use_the_job_id_of_rank_0(tmp_path):
    """Where a broadcast is broken, the ranks wait for each other: ``run.dist_timeout`` or this test ends them then."""

    def before(rank):
        from minigpt4.common import utils
        from minigpt4.runners import RunnerBase

        utils.now = lambda: f"job{rank}"
        train = RunnerBase.train

        def noting(self):
            (tmp_path / f"folder.{rank}").write_text(str(self.output_dir))
            train(self)

        RunnerBase.train = noting

    datasets = align_section(write_pairs(tmp_path / "align"))
    config = write_config(tmp_path / "run.yaml", {"dist_timeout": 20}, datasets)
    statuses = run_ranks(2, config, tmp_path / "run", before=before, seconds=60)
    assert statuses == [0, 0], logs(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "out").iterdir()] == ["job0"]
    for rank in (0, 1):
        assert (tmp_path / f"folder.{rank}").read_text() == str(tmp_path / "run" / "out" / "job0")
