#!/usr/bin/env bash
# Prepares a shell for Ascend NPUs and checks it: source scripts/env_npu.sh
#
# CANN is searched below ASCEND_ROOT (/usr/local/Ascend), first where CANN 9 installs it, then where earlier releases do.
# Variables that are already set keep their values.

if [ -z "${BASH_VERSION:-}" ]; then
    echo "env_npu.sh: this shell is no bash; start bash, then: source scripts/env_npu.sh" >&2
    return 1 2>/dev/null || exit 1
fi
if ! (return 0 2>/dev/null); then
    echo "env_npu.sh: it sets variables of the shell, so it has to be sourced: source scripts/env_npu.sh" >&2
    exit 1
fi

_env_npu_fail() {
    echo "env_npu.sh: $1" >&2
    return 1
}

_env_npu() {
    local root="${ASCEND_ROOT:-/usr/local/Ascend}" file="" candidate
    for candidate in "$root/cann/set_env.sh" "$root/ascend-toolkit/set_env.sh"; do
        if [ -f "$candidate" ]; then
            file="$candidate"
            break
        fi
    done
    if [ -z "$file" ]; then
        _env_npu_fail "CANN is not found: neither $root/cann nor $root/ascend-toolkit has a set_env.sh; install CANN, or set ASCEND_ROOT to the folder that holds it."
        return
    fi
    # shellcheck source=/dev/null
    if ! source "$file"; then
        _env_npu_fail "$file failed: the installation of CANN seems to be incomplete."
        return
    fi
    if ! command -v npu-smi >/dev/null; then
        _env_npu_fail "npu-smi is not found: install the driver and the firmware that the notes of this CANN release name."
        return
    fi
    if ! npu-smi info >/dev/null 2>&1; then
        _env_npu_fail "'npu-smi info' fails: check that the driver is loaded and that this user, or this container, may use the devices."
        return
    fi

    export HCCL_CONNECT_TIMEOUT="${HCCL_CONNECT_TIMEOUT:-6000}"  # seconds; ranks load weights at different speeds
    export HCCL_WHITELIST_DISABLE="${HCCL_WHITELIST_DISABLE:-1}"
    export TASK_QUEUE_ENABLE="${TASK_QUEUE_ENABLE:-1}"
    export COMBINED_ENABLE="${COMBINED_ENABLE:-1}"
    export ASCEND_GLOBAL_LOG_LEVEL="${ASCEND_GLOBAL_LOG_LEVEL:-3}"  # errors only
    export PYTORCH_NPU_ALLOC_CONF="${PYTORCH_NPU_ALLOC_CONF:-expandable_segments:True}"

    local folder
    folder="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
    PYTHONPATH="$folder${PYTHONPATH:+:$PYTHONPATH}" python - <<'PYTHON'
import sys

from minigpt4.common.errors import UserError
from minigpt4.common.torch_setup import import_torch

try:
    import_torch()
    import torch

    from minigpt4.common import device as devices

    devices.pick("npu", is_strict=True)
    print(f"env_npu.sh: {torch.accelerator.device_count()} NPUs, torch {torch.__version__}.")
except (ImportError, UserError) as error:
    sys.exit(f"env_npu.sh: {error}")
PYTHON
}

_env_npu
