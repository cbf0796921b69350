"""Several processes: they compute what one would, stop at the same step, and report an error once."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch
from family import picture
from omegaconf import OmegaConf
from test_family_configs import small

from quickstart import scenes

ROOT = Path(__file__).parents[1]
UPDATES = 20


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    scenes.write_shards(folder / "shards", num_shards=2, scenes_per_shard=30, seed=1)
    scenes.write_alignment(folder / "align", num_scenes=45, seed=2)
    (folder / "prompt.txt").write_text("<Img><ImageHere></Img> Describe this image in detail.\n")
    return folder


@pytest.fixture(scope="module")
def command(world):
    """train.py's arguments for the small world's stage 2 with a constant rate; more options come last."""

    def options(output_dir, *more):
        fixed = [f"datasets.cc_sbu_align.build_info.storage={world}/align", f"model.prompt_path={world}/prompt.txt"]
        fixed += [
            "model.ckpt=null",
            "model.llm_dtype=fp32",
            "run.amp=False",
            "run.init_lr=1e-3",
            "run.min_lr=1e-3",
            "run.warmup_steps=0",
            "run.max_epoch=1",
        ]
        fixed += ["run.batch_size_train=4", "run.num_workers=0", "run.log_freq=1", f"run.iters_per_epoch={UPDATES}"]
        yaml = ["--cfg-path", "train_configs/quickstart_stage2.yaml"]
        return [*yaml, "--options", *fixed, f"run.output_dir={output_dir}", *more]

    return options


def run_ranks(number, arguments, log, **kwargs):
    """Runs ranks to their ends; returns their statuses and what each wrote."""
    pids = forked.start_ranks(number, arguments, log, **kwargs)
    return [forked.wait(pid) for pid in pids], [Path(f"{log}.{rank}").read_text() for rank in range(number)]


def result(output_dir):
    (folder,) = (path.parent for path in output_dir.glob("*/checkpoint_0.pth"))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    content = torch.load(folder / "checkpoint_0.pth", weights_only=True)
    return [row["loss"] for row in rows if "loss" in row], content["model"], rows


@pytest.fixture(scope="module")
def alone(command, tmp_path_factory):
    """One process whose accumulation groups hold the batches that two ranks have at a step."""
    folder = tmp_path_factory.mktemp("alone")
    arguments = command(folder / "out", "run.accum_grad_iters=2", f"run.iters_per_epoch={2 * UPDATES}")
    assert forked.wait(forked.start(arguments, folder / "log")) == 0, (folder / "log").read_text()
    losses, model, _ = result(folder / "out")
    return [sum(losses[i : i + 2]) / 2 for i in range(0, len(losses), 2)], model


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_train_as_one_process(command, alone, tmp_path, parallel):
    arguments = command(tmp_path / "out", f"run.parallel={parallel}")
    statuses, logs = run_ranks(2, arguments, tmp_path / "log")
    assert statuses == [0, 0], logs
    losses, model, _ = result(tmp_path / "out")
    assert len(losses) == UPDATES and losses[-1] < 0.8 * losses[0]
    assert losses == pytest.approx(alone[0], abs=1e-6)
    for name, value in alone[1].items():
        assert (model[name] - value).abs().max() < 1e-6, name


def test_two_ranks_train_lora_as_one_process(command, tmp_path):
    """Beside whole and beside sharded layers; rank 0's new LoRA weights are those of all ranks."""
    lora = ("model.lora_r=4", "model.lora_dropout=0")
    arguments = command(tmp_path / "alone", *lora, "run.accum_grad_iters=2", "run.iters_per_epoch=8")
    assert forked.wait(forked.start(arguments, tmp_path / "log")) == 0, (tmp_path / "log").read_text()
    losses, expected, _ = result(tmp_path / "alone")
    for parallel in ("ddp", "fsdp"):
        arguments = command(tmp_path / parallel, *lora, f"run.parallel={parallel}", "run.iters_per_epoch=4")
        statuses, logs = run_ranks(2, arguments, tmp_path / f"log-{parallel}")
        assert statuses == [0, 0], logs
        found, model, _ = result(tmp_path / parallel)
        assert found == pytest.approx([sum(losses[i : i + 2]) / 2 for i in range(0, 8, 2)], abs=1e-5)
        assert set(model) == set(expected) and any(value.any() for name, value in model.items() if "lora_B" in name)
        for name, value in expected.items():
            assert (model[name] - value).abs().max() < 1e-5, name


def test_two_sharded_ranks_train_minigpt_v2_as_one_process(tmp_path):
    """Conversations about two images and six without any: the projection is left as it is where no rank has one."""
    turns = [{"from": "human", "value": "what is it?"}, {"from": "gpt", "value": "a bus"}]
    about = [{"from": "human", "value": "<image> what is it?"}, turns[1]]
    rows = [{"conversations": turns}] * 6 + [{"image": str(picture(k)), "conversations": about} for k in range(2)]
    (tmp_path / "own.json").write_text(json.dumps(rows))
    file = "train_configs/minigptv2_finetune.yaml"
    run = {"device": "cpu", "amp": False, "max_epoch": 1, "warmup_steps": 0, "init_lr": 1e-3, "min_lr": 1e-3}
    run |= {"wandb_log": False, "log_freq": 1, "num_workers": 0}
    run = {f"run.{key}": value for key, value in run.items()} | {"model.lora_dropout": 0}
    arguments = [*small("v2", {"image_text": {"storage": f"{tmp_path}/own.json"}}, **run)]
    arguments += [f"datasets.{other}=null" for other in OmegaConf.load(file).datasets]
    arguments = ["--cfg-path", file, "--options", *arguments]
    own = [f"run.output_dir={tmp_path}/alone", "run.accum_grad_iters=2", "run.iters_per_epoch=8"]
    assert forked.wait(forked.start([*arguments, *own], tmp_path / "log")) == 0, (tmp_path / "log").read_text()
    losses, expected, _ = result(tmp_path / "alone")
    own = [f"run.output_dir={tmp_path}/fsdp", "run.parallel=fsdp", "run.iters_per_epoch=4"]
    statuses, logs = run_ranks(2, [*arguments, *own], tmp_path / "log2")
    assert statuses == [0, 0], logs
    found, model, _ = result(tmp_path / "fsdp")
    assert found == pytest.approx([sum(losses[i : i + 2]) / 2 for i in range(0, 8, 2)], abs=1e-5)
    assert set(model) == set(expected) and any("lora_B" in key for key in model)
    for key, value in expected.items():
        assert (model[key] - value).abs().max() < 1e-6, key


def test_accumulation_on_two_ranks_with_uneven_groups_resumes(command, tmp_path):
    options = ("run.accum_grad_iters=3", "run.iters_per_epoch=4", "run.max_epoch=2")
    statuses, logs = run_ranks(2, command(tmp_path / "out", *options), tmp_path / "log")
    assert statuses == [0, 0], logs
    losses, _, _ = result(tmp_path / "out")
    (first,) = (tmp_path / "out").glob("*/checkpoint_0.pth")
    arguments = command(tmp_path / "again", *options, f"run.resume_ckpt_path={first}")
    statuses, logs = run_ranks(2, arguments, tmp_path / "log2")
    assert statuses == [0, 0], logs
    (again,) = (tmp_path / "again").iterdir()
    rows = [json.loads(line) for line in (again / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows] == pytest.approx(losses[4:], abs=1e-6)


def test_only_gradients_of_the_projection_are_communicated(command, tmp_path):
    """Bytes of the gradients that DDP's communication hook gets."""

    def count(rank):
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        from minigpt4.runners import runner_base

        replicate = runner_base.replicate

        def counting(model, device):
            wrapped = replicate(model, device)

            def hook(state, bucket):
                with open(tmp_path / f"bytes.{rank}", "a") as file:
                    file.write(f"{bucket.buffer().nbytes}\n")
                return allreduce_hook(state, bucket)

            wrapped.register_comm_hook(None, hook)
            return wrapped

        runner_base.replicate = counting

    statuses, logs = run_ranks(2, command(tmp_path / "out", "run.iters_per_epoch=5"), tmp_path / "log", before=count)
    assert statuses == [0, 0], logs
    _, model, _ = result(tmp_path / "out")
    trained = sum(value.nbytes for value in model.values())
    for rank in range(2):
        sent = [int(line) for line in (tmp_path / f"bytes.{rank}").read_text().split()]
        assert sum(sent) == 5 * trained and set(model) == {"llama_proj.weight", "llama_proj.bias"}


def signal_rank(chosen, step, number):
    def before(rank):
        from minigpt4.runners import RunnerBase

        real = RunnerBase.train_step

        def train_step(self, *arguments, **kwargs):
            assert len(list(self.output_dir.glob("lock_*"))) == 1  # rank 0's
            if rank == chosen and self.state.step == step:
                os.kill(os.getpid(), number)
            return real(self, *arguments, **kwargs)

        RunnerBase.train_step = train_step

    return before


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_signal_to_one_rank_stops_all_at_the_same_step_and_they_resume(command, alone, tmp_path, parallel):
    arguments = command(tmp_path / "out", "run.resume=auto", f"run.parallel={parallel}")
    statuses, logs = run_ranks(2, arguments, tmp_path / "log", before=signal_rank(1, 7, signal.SIGTERM))
    assert statuses == [0, 0], logs
    assert [file.name for file in (tmp_path / "out").glob("*/*.pth")] == ["checkpoint_step_9.pth"]
    statuses, logs = run_ranks(2, arguments, tmp_path / "log2")
    assert statuses == [0, 0], logs
    losses, model, _ = result(tmp_path / "out")
    assert losses == pytest.approx(alone[0], abs=1e-6)
    assert (model["llama_proj.weight"] - alone[1]["llama_proj.weight"]).abs().max() < 1e-6


def test_resumes_on_another_number_of_ranks(command, alone, tmp_path):
    """Two ranks, then one with batches twice as large, then two again: listed pairs continue where they were."""
    stop = ("run.resume=auto", "run.save_every_iters=6")
    arguments = command(tmp_path / "out", *stop)
    _, logs = run_ranks(2, arguments, tmp_path / "log", before=signal_rank(0, 4, signal.SIGINT))
    (folder,) = (tmp_path / "out").iterdir()
    assert sorted(file.name for file in folder.glob("*.pth")) == ["checkpoint_step_6.pth"], logs
    one = command(tmp_path / "out", *stop, "run.batch_size_train=8")
    pid = forked.start(one, tmp_path / "log1", lambda: signal_rank(0, 10, signal.SIGTERM)(0))
    assert forked.wait(pid) == 0
    told = (tmp_path / "log1").read_text()
    assert "written by 2 ranks with 0 loader workers and batches of 4, this run has 1, 0 and 8" in told
    assert "has no random state for 1 ranks" in told
    statuses, logs = run_ranks(2, arguments, tmp_path / "log3")
    assert statuses == [0, 0], logs
    losses, _, rows = result(tmp_path / "out")
    assert [row["step"] for row in rows] == list(range(UPDATES))
    # A batch of 8 means over its tokens, two of 4 mean twice: the same samples, losses a little apart.
    assert losses[:6] == pytest.approx(alone[0][:6], abs=1e-6)
    assert losses[6:] == pytest.approx(alone[0][6:], rel=0.05)


def test_a_killed_rank_ends_the_others_with_one_message(command, tmp_path):
    arguments = command(tmp_path / "out", "run.resume=auto")
    statuses, logs = run_ranks(2, arguments, tmp_path / "log", before=signal_rank(1, 7, signal.SIGKILL))
    assert statuses == [1, -signal.SIGKILL]
    last = logs[0].strip().splitlines()[-1]
    assert last.startswith("error: Rank 0 lost contact with another rank") and "run.resume: auto" in last
    assert "Traceback" not in logs[0]


def test_torchrun_restarts_after_a_killed_rank(command, alone, tmp_path):
    """The real launcher: rank 1 of the first attempt kills itself; the second resumes from the newest checkpoint.

    Its ranks end before Python finalises the interpreter, in which gloo's threads aborted about one process in fifty.
    """
    script = tmp_path / "train_that_dies_once.py"
    script.write_text(
        "import os, signal, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import train\n"
        "from minigpt4.runners import RunnerBase\n"
        "real = RunnerBase.train_step\n"
        "def train_step(self, *arguments, **kwargs):\n"
        "    is_first = os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'\n"
        "    if os.environ['RANK'] == '1' and is_first and self.state.step == 9:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(self, *arguments, **kwargs)\n"
        "RunnerBase.train_step = train_step\n"
        "class Last:\n"
        "    def __del__(self):\n"
        "        print('the interpreter is finalised', flush=True)\n"
        "last = Last()\n"
        "train.main()\n"
    )
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    arguments = command(tmp_path / "out", "run.resume=auto", "run.save_every_iters=4")
    done = subprocess.run(
        [sys.executable, *launcher, str(script), *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-8000:]  # after the configuration, which each attempt prints
    assert "Resuming from" in done.stderr and "checkpoint_step_8.pth" in done.stderr
    assert "finalised" not in done.stdout
    assert result(tmp_path / "out")[0] == pytest.approx(alone[0], abs=1e-6)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_uneven_validation_does_not_hang_and_counts_every_sample_once(command, world, tmp_path, parallel):
    """Forty-five pictures are 23 and 22 for two ranks: in batches of 2, one has a batch more than the other."""
    split = (f"datasets.cc_sbu_align.build_info.val_storage={world}/align", "run.valid_splits=[val]")
    options = (*split, "run.batch_size_eval=2", "run.iters_per_epoch=2")
    statuses, logs = run_ranks(2, command(tmp_path / "two", *options, f"run.parallel={parallel}"), tmp_path / "log")
    assert statuses == [0, 0], logs
    options = (*options, "run.accum_grad_iters=2", "run.iters_per_epoch=4")
    assert forked.wait(forked.start(command(tmp_path / "one", *options), tmp_path / "log1")) == 0
    two, one = ([row["val loss"] for row in result(tmp_path / name)[2] if "val loss" in row] for name in ("two", "one"))
    assert two == pytest.approx(one, abs=1e-5)


def errors(logs):
    return [[line for line in log.splitlines() if "error: " in line] for log in logs]


def test_unusable_data_on_one_rank_ends_all(command, tmp_path):
    def spoil(rank):
        from minigpt4.datasets.datasets import pairs, sample

        if rank == 1:
            pairs.prepare_image = lambda *_: (_ for _ in ()).throw(sample.SkipSample("unreadable image"))

    statuses, logs = run_ranks(2, command(tmp_path / "out"), tmp_path / "log", before=spoil)
    assert statuses == [1, 1]
    assert "[rank 1] Data set cc_sbu_align has no usable sample" in errors(logs)[1][0]
    assert "lost contact" in errors(logs)[0][0] and "Traceback" not in "".join(logs)


def test_ranks_with_different_configurations(command, tmp_path):
    statuses, logs = run_ranks(2, command(tmp_path / "out"), tmp_path / "log", rank_arguments={1: ["run.seed=7"]})
    assert statuses == [1, 1]
    assert errors(logs)[0] == [
        "error: run.seed is 7 on rank 1 and 42 on rank 0; start all ranks with the same file and options."
    ]


def test_a_full_disk_ends_all_ranks_with_the_reason(command, tmp_path):
    def limit(rank):
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    options = ("run.iters_per_epoch=2",)
    statuses, logs = run_ranks(2, command(tmp_path / "out", *options), tmp_path / "log", before=limit)
    assert statuses == [1, 1]
    assert all("cannot be written" in lines[0] for lines in errors(logs)) and "Traceback" not in "".join(logs)


def test_a_port_in_use(command, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        names = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        with forked.environment(**names):
            pid = forked.start(command(tmp_path / "out"), tmp_path / "log")
        assert forked.wait(pid) == 1
    assert f"error: Port 127.0.0.1:{port} is in use by another program" in (tmp_path / "log").read_text()


def test_a_missing_rank(command, tmp_path):
    names = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": forked.free_port()}
    with forked.environment(**names):
        pid = forked.start(command(tmp_path / "out", "run.dist_timeout=3"), tmp_path / "log")
    assert forked.wait(pid) == 1
    log = (tmp_path / "log").read_text()
    assert "error: The processes could not connect at 127.0.0.1:" in log and "Traceback" not in log
