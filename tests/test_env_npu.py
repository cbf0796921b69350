"""scripts/env_npu.sh with a tree of folders in place of CANN, and an emulated NPU: no card is involved."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from emulated_npu.build import compiler, install

ROOT = Path(__file__).parents[1]
VARIABLES = ("HCCL_CONNECT_TIMEOUT", "TASK_QUEUE_ENABLE", "PYTORCH_NPU_ALLOC_CONF", "FAKE_CANN")


@pytest.fixture
def source(tmp_path):
    """Sources the script; ``files`` are contents by path, executable ones below ``bin``."""

    def run(files, command="source scripts/env_npu.sh", **variables):
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
            path.chmod(0o755)
        path = f"{tmp_path}/bin:{Path(sys.executable).parent}:/usr/bin:/bin"
        environment = {"PATH": path, "HOME": os.environ["HOME"], "ASCEND_ROOT": str(tmp_path), **variables}
        shown = "".join(f' && echo "{name}=${name}"' for name in VARIABLES)
        return subprocess.run(
            ["bash", "-c", f"{command}{shown}"], cwd=ROOT, env=environment, capture_output=True, text=True
        )

    return run


CANN = {"cann/set_env.sh": "export FAKE_CANN=9"}
DRIVER = {"bin/npu-smi": "#!/bin/sh\n"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "CANN is not found: neither"),
        ({"cann/set_env.sh": "return 3"}, "set_env.sh failed"),
        (CANN, "npu-smi is not found: install the driver and the firmware"),
        (CANN | {"bin/npu-smi": "#!/bin/sh\nexit 1\n"}, "'npu-smi info' fails"),
        (CANN | DRIVER, "torch_npu is not installed: pip install -r requirements-npu.txt"),
    ],
)
def test_what_is_missing_is_one_sentence(source, files, message):
    result = source(files)
    assert result.returncode == 1 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("env_npu.sh: ") and message in line


def test_it_has_to_be_sourced(source):
    result = source({}, "bash scripts/env_npu.sh")
    assert result.returncode == 1 and "has to be sourced: source scripts/env_npu.sh" in result.stderr


@pytest.mark.skipif(shutil.which("dash") is None, reason="needs dash")
def test_it_needs_bash(source):
    result = source({}, "dash -c '. scripts/env_npu.sh'")
    assert result.returncode == 1 and "is no bash" in result.stderr and "dash:" not in result.stderr


@pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")
def test_a_complete_installation(source, tmp_path):
    install(tmp_path / "emulated")
    settings = {"PYTHONPATH": str(tmp_path / "emulated"), "TASK_QUEUE_ENABLE": "2"}
    older = {"ascend-toolkit/set_env.sh": "export FAKE_CANN=8"}
    result = source(older | DRIVER, **settings)
    assert result.returncode == 0, result.stderr
    first, *shown = result.stdout.splitlines()
    assert first.startswith("env_npu.sh: 2 NPUs, torch ")
    assert shown == [
        "HCCL_CONNECT_TIMEOUT=6000",
        "TASK_QUEUE_ENABLE=2",
        "PYTORCH_NPU_ALLOC_CONF=expandable_segments:True",
        "FAKE_CANN=8",
    ]
