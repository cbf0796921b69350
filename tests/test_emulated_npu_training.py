"""train.py and demo.py on an *emulated* Ascend NPU: torch.device("npu") in host memory, "hccl" over gloo, no such card.

The scripts are the unchanged ones. The emulation enters torch as torch_npu does, see emulated_npu/.
"""

import json

import pytest
import torch

from quickstart import scenes


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    scenes.write_shards(folder / "shards", num_shards=2, scenes_per_shard=30, seed=1)
    scenes.write_alignment(folder / "align", num_scenes=30, seed=2)
    return folder


@pytest.fixture(scope="module")
def train(world, programs, npu_programs):
    """Trains on two ranks; returns losses, folder and the log of rank 0."""
    return lambda *args, on_npu: train_on(npu_programs if on_npu else programs, world, *args, on_npu=on_npu)


def train_on(programs, world, stage, name, *more, on_npu):
    short = ["max_epoch=2", "iters_per_epoch=4", "batch_size_train=4", "log_freq=1", "warmup_steps=0", "amp=False"]
    device = ["device=npu", "strict_device=True"] if on_npu else ["device=cpu"]
    run_options = [f"run.{option}" for option in (*short, *device, f"output_dir={world / name}")]
    data = {1: f"cc_sbu.build_info.storage={world}/shards/*.tar", 2: f"cc_sbu_align.build_info.storage={world}/align"}
    options = [*run_options, f"datasets.{data[stage]}", "model.llm_dtype=fp32", *more]
    yaml = f"train_configs/quickstart_stage{stage}.yaml"
    each = programs.run_ranks([["train.py", "--cfg-path", yaml, "--options", *options]] * 2)
    assert [done.returncode for done in each] == [0, 0], [done.stderr[-3000:] for done in each]
    (folder,) = (world / name).iterdir()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows], folder, each[0].stderr


@pytest.fixture(scope="module")
def both(train):
    """Both stages on two ranks, on the CPU and on two emulated NPUs: losses and folder by stage and device."""
    results = {(1, on_npu): train(1, f"stage1-{on_npu}", on_npu=on_npu) for on_npu in (False, True)}
    ckpt = f"model.ckpt={results[1, True][1]}/checkpoint_1.pth"  # written on the emulated device, read on both
    for on_npu in (False, True):
        # A large rate would blow the last digit of a near-zero gradient up: Adam's first steps follow its sign.
        rate = ("run.init_lr=3e-5", "run.min_lr=1e-5")
        results[2, on_npu] = train(2, f"stage2-{on_npu}", ckpt, *rate, on_npu=on_npu)
    return results


@pytest.mark.parametrize("stage", [1, 2])
def test_both_stages_on_two_emulated_npus_have_the_losses_of_two_cpu_ranks(both, stage):
    losses, folder, _ = both[stage, True]
    assert len(losses) == 8 and losses == pytest.approx(both[stage, False][0], abs=1e-5)
    ours, theirs = (
        torch.load(both[stage, on_npu][1] / "checkpoint_1.pth", weights_only=True)["model"] for on_npu in (True, False)
    )
    for name, value in theirs.items():
        assert (ours[name] - value).abs().max() < 1e-5
    assert (folder / "config.yaml").is_file()


def test_a_run_on_emulated_npus_resumes_from_the_middle(train, both):
    options = ("run.save_every_iters=3", "run.resume=auto")
    _, folder, _ = train(1, "left", *options, on_npu=True)
    for name in ("checkpoint_0", "checkpoint_1", "checkpoint_step_6"):
        (folder / f"{name}.pth").unlink()
    losses, again, told = train(1, "left", *options, on_npu=True)
    assert "checkpoint_step_3.pth at epoch 0, iteration 3" in told and again == folder
    assert losses == pytest.approx(both[1, True][0], abs=1e-6)


def test_a_language_model_in_slices_on_emulated_npus(train, both):
    losses, *_ = train(1, "fsdp", "run.parallel=fsdp", on_npu=True)
    assert losses == pytest.approx(both[1, False][0], abs=1e-5)


def test_chat_on_an_emulated_npu_says_what_it_says_on_the_cpu(world, both, programs, npu_programs):
    ckpt = ("--options", f"model.ckpt={both[2, False][1]}/checkpoint_1.pth", "model.llm_dtype=fp32")
    picture = world / "align" / "image" / "0.jpg"
    demo = ("demo.py", "--cfg-path", "eval_configs/quickstart_eval.yaml", "--greedy", "--max-new-tokens", "20")
    ask = ("--image", picture, "--ask", "How many objects are there?", *ckpt)
    cpu = programs.run([*demo, *ask, "run.device=cpu"])
    npu = npu_programs.run([*demo, *ask, "run.device=npu", "run.strict_device=True"])
    assert npu.returncode == 0 and npu.stdout == cpu.stdout and npu.stdout.strip(), npu.stderr[-3000:]


def test_more_ranks_than_emulated_npus(npu_programs):
    command = ["train.py", "--cfg-path", "train_configs/quickstart_stage1.yaml", "--options", "run.device=npu"]
    done = npu_programs.run(command, ASCEND_RT_VISIBLE_DEVICES="0", LOCAL_RANK="1", RANK="0")
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith("error: Device npu:1 was requested, but 1 of that kind are visible")
    assert "ASCEND_RT_VISIBLE_DEVICES is 0" in last and "--nproc-per-node" in last
