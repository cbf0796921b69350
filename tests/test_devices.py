"""Devices: which one is chosen, messages about unavailable ones, and that a single module names vendors."""

import io
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from packaging.requirements import Requirement

from minigpt4.common import device as devices
from minigpt4.common import torch_setup
from minigpt4.common.errors import UserError
from minigpt4.common.schema import RunConfig
from minigpt4.models import MiniGPT4

ROOT = Path(__file__).parents[1]
TRAIN = ("train.py", "--cfg-path", "train_configs/quickstart_stage1.yaml", "--options")
TORCH = torch.__version__.split("+")[0]
on_cpu = pytest.mark.skipif(devices.best() != "cpu", reason="this machine has an accelerator")


def test_no_other_module_names_a_vendor():
    vendors = re.compile(r"cuda|\b(npu|torch_npu|hccl|nccl|mps)\b|ascend|nvidia", re.IGNORECASE)
    files = [*(ROOT / "minigpt4").rglob("*.py"), ROOT / "train.py", ROOT / "demo.py"]
    found = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in files
        if file.name not in ("device.py", "torch_setup.py", "schema.py")  # schema.py documents the names
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if vendors.search(line.replace("cuda_enabled", ""))  # an argument's name in the reference
    ]
    assert len(files) > 40 and not found


@on_cpu
def test_an_unavailable_device_is_replaced_with_one_warning(caplog):
    devices._log_once.cache_clear()
    assert [devices.pick("cuda").type for _ in range(2)] == ["cpu", "cpu"]
    assert devices.pick("npu", index=1) == torch.device("cpu")
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    cuda, npu = caplog.messages
    assert cuda.startswith("run.device is cuda, which is not available (") and "Using cpu; run.strict_device" in cuda
    assert "torch_npu is not installed: pip install -r requirements-npu.txt" in npu


@on_cpu
@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_alone_warns_of_an_unavailable_device(caplog, monkeypatch, rank):
    devices._log_once.cache_clear()
    monkeypatch.setenv("RANK", str(rank))
    assert devices.pick("cuda").type == "cpu" and len(caplog.records) == 1 - rank
    devices._log_once.cache_clear()


@on_cpu
@pytest.mark.parametrize(
    ("kind", "why"), [("npu", "torch_npu is not installed"), ("cuda", "cuda|CUDA"), ("mps", "finds no mps device")]
)
def test_an_unavailable_device_is_an_error_with_strict_device(kind, why):
    with pytest.raises(UserError, match=rf"run\.device is {kind} and run\.strict_device is set, but .*({why})"):
        devices.from_config({"device": kind, "strict_device": True})
    assert devices.from_config({"device": "cpu", "strict_device": True}) == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "npu:-1"])
def test_unknown_devices(name):
    with pytest.raises(UserError, match=rf"run\.device is '{name}'; expected auto, cuda, npu, mps or cpu"):
        devices.pick(name)


@pytest.fixture
def on_cpu_with(monkeypatch):
    """Lets torch, or on older versions /proc/cpuinfo, report a CPU's capabilities."""

    def pretend(*capabilities, is_old):
        devices._has_native_bf16.cache_clear()
        if is_old:
            monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
            text = f"processor\t: 0\nflags\t\t: fpu avx2 {' '.join(capabilities)}\n"
            monkeypatch.setattr("builtins.open", lambda *_, **__: io.StringIO(text))
        else:
            found = dict.fromkeys(("avx2", *capabilities), True)
            monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)

    yield pretend
    monkeypatch.undo()
    devices._has_native_bf16.cache_clear()


@pytest.mark.parametrize("is_old", [False, True])
@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [(["avx512_bf16"], torch.bfloat16), (["amx_bf16"], torch.bfloat16), (["avx512f"], torch.float32)],
)
def test_a_cpu_uses_bf16_where_it_is_native(on_cpu_with, is_old, capabilities, dtype):
    on_cpu_with(*capabilities, is_old=is_old)
    cpu = torch.device("cpu")
    assert devices.default_dtype(cpu) == dtype
    assert devices.amp_dtype(RunConfig(amp=True), cpu) == dtype
    assert devices.amp_dtype(RunConfig(amp=True, amp_dtype="fp32"), cpu) == torch.float32
    assert devices.amp_dtype(RunConfig(amp=True, amp_dtype="bf16"), cpu) == torch.bfloat16
    assert devices.amp_dtype(RunConfig(amp=False, amp_dtype="bf16"), cpu) == torch.float32


@pytest.mark.parametrize(("settings", "dtype"), [({}, torch.bfloat16), ({"llm_dtype": "fp32"}, torch.float32)])
def test_the_language_model_has_the_default_precision_unless_it_is_set(on_cpu_with, tiny_config, settings, dtype):
    on_cpu_with("avx512_bf16", is_old=False)
    del tiny_config["llm_dtype"]
    model = MiniGPT4.from_config(tiny_config | settings, device=torch.device("cpu"))
    assert model.llama_model.lm_head.weight.dtype == dtype


def test_backends():
    assert devices.backend(torch.device("cpu")) == "gloo"
    assert devices.backend(torch.device("cuda:1")) == "cpu:gloo,cuda:nccl"


def test_mismatched_releases(monkeypatch):
    installed = {"torch_npu": "2.9.0.post2", "torch": "2.13.0+cpu"}
    monkeypatch.setattr(torch_setup, "package_version", installed.get)
    assert "torch_npu 2.9.0.post2 is installed beside torch 2.13.0+cpu" in torch_setup.npu_mismatch()
    installed["torch_npu"] = "2.13.0.post1"
    assert torch_setup.npu_mismatch() is None


def fake_torch_npu(folder, version, failure):
    """A stand-in for torch_npu that enters torch as the real one does and fails as the real one was seen to fail."""
    package, info = folder / "torch_npu", folder / f"torch_npu-{version}.dist-info"
    package.mkdir()
    info.mkdir()
    (package / "__init__.py").write_text(f"def _autoload(): pass\n{failure}\n")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch_npu\nVersion: {version}\n")
    (info / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    return {**os.environ, "PYTHONPATH": str(folder)}


NO_CANN = "raise ImportError('libhccl.so: cannot open shared object file: No such file or directory')"
TWO = "raise RuntimeError('Two accelerators cannot be used at the same time in PyTorch: npu and cuda.')"


@pytest.mark.parametrize(
    ("script", "version", "failure", "told"),
    [
        ("train.py", TORCH, NO_CANN, ["libhccl.so", "CANN seems to be missing", "set_env.sh", "BACKEND_AUTOLOAD=0"]),
        (
            "train.py",
            "2.1.0.post8",
            NO_CANN,
            ["torch_npu 2.1.0.post8 is installed beside", "requirements-npu.txt"],
        ),
        ("demo.py", TORCH, TWO, ["Two accelerators cannot be used", "TORCH_DEVICE_BACKEND_AUTOLOAD=0"]),
    ],
    ids=["no CANN", "mismatch", "two kinds"],
)
def test_a_broken_torch_npu_is_explained(tmp_path, script, version, failure, told):
    """An emulated installation: the real torch_npu 2.13 without CANN ended in the same ImportError."""
    environment = fake_torch_npu(tmp_path, version, failure)
    command = [sys.executable, script, "--cfg-path", "train_configs/quickstart_stage1.yaml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not [word for word in told if word not in done.stderr], done.stderr


@pytest.mark.parametrize(("given", "used"), [(None, "2000"), ("5", "5")])
def test_threads_do_not_look_for_operations_for_long(monkeypatch, given, used):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    if given:
        monkeypatch.setenv("GOMP_SPINCOUNT", given)
    torch_setup.import_torch()
    assert os.environ["GOMP_SPINCOUNT"] == used


def test_idle_threads_end():
    number, tasks = torch.get_num_threads(), Path("/proc/self/task")
    devices.set_threads(3)
    try:
        torch.ones(2**20).add(1)
        count, end = len(list(tasks.iterdir())), time.monotonic() + 10
        devices.release_threads()
        while (left := len(list(tasks.iterdir()))) > count - 2 and time.monotonic() < end:
            time.sleep(0.01)  # Linux lists a thread for a moment after its end
        assert left == count - 2
    finally:
        devices.set_threads(number)


def test_local_seed_seeds_a_block_and_restores_the_state():
    torch.manual_seed(7)
    random.seed(7)
    expected = torch.rand(3), random.random()
    torch.manual_seed(1)
    random.seed(1)
    with devices.local_seed(7):
        assert torch.equal(torch.rand(3), expected[0]) and random.random() == expected[1]
    found = torch.rand(3), random.random()
    torch.manual_seed(1)
    random.seed(1)
    assert torch.equal(torch.rand(3), found[0]) and random.random() == found[1]


def test_move_to_reaches_nested_tensors():
    class Pair(NamedTuple):
        a: torch.Tensor
        b: str

    tree = {"image": torch.ones(2), "list": [torch.ones(1), "text"], "pair": Pair(torch.ones(3), "x"), "n": 3}
    moved = devices.move_to(tree, torch.device("meta"))
    assert moved["image"].is_meta and moved["list"][0].is_meta and moved["pair"].a.is_meta
    assert moved["list"][1] == "text" and moved["pair"].b == "x" and moved["n"] == 3


def pinned(name):
    """The pins of a requirements file by package, and the files that it includes."""
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    pins = dict(line.split("==") for line in lines if "==" in line)
    return pins, [line.removeprefix("-r ") for line in lines if line.startswith("-r ")]


def test_ascend_users_install_a_pair_for_which_a_cann_exists():
    """The pairs for CANN 9.1; CUDA and CPU keep their own pin, and both share all other packages."""
    (plain, included), (npu, _) = pinned("requirements.txt"), pinned("requirements/npu.txt")
    assert included == ["requirements-common.txt"]
    assert pinned("requirements-npu.txt") == ({}, ["requirements-common.txt", "requirements/npu.txt"])
    assert npu.keys() == {"torch", "torchvision", "torch_npu"} and plain.keys() == {"torch", "torchvision"}
    pairs = {"2.10.0": ("0.25.0", {"2.10.0.post4", "2.10.0.post6"}), "2.11.0": ("0.26.0", {"2.11.0.post2"})}
    torchvision, torch_npu = pairs[npu["torch"]]
    assert npu["torchvision"] == torchvision and npu["torch_npu"] in torch_npu
    lines = (ROOT / "requirements" / "core.txt").read_text().splitlines()
    common = [Requirement(line) for line in lines if line.startswith("torch")]
    assert [package.name for package in common] == ["torch", "torchvision"]
    assert all(package.specifier.contains(pins[package.name]) for package in common for pins in (npu, plain))
