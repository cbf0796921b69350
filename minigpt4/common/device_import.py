"""Imports torch, and tells what to do where an installation for Ascend NPUs keeps it from loading.

torch_npu loads itself whenever torch is imported. Without CANN, or beside a torch it was not built for, the import of
torch itself then fails, before any of this project's code could speak.
"""

import os
from importlib import metadata

_AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"


PACKAGES = ("torch", "torchvision", "timm", "transformers", "torch_npu")  # whose versions matter most


def import_torch() -> None:
    """Imports torch once for all.

    Raises:
        ImportError: torch is not there, or torch_npu keeps it from loading; the message says why and what to do.
    """
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise ImportError(f"PyTorch cannot be imported ({error}); pip install -r requirements.txt.") from error
    except (RuntimeError, OSError) as error:
        raise ImportError(_explain(error)) from error


def npu_mismatch() -> str | None:
    """A sentence where torch_npu is installed beside a torch of another release, else None."""
    torch_npu, torch = version("torch_npu"), version("torch")
    if torch_npu is None or torch is None or torch_npu.split(".")[:2] == torch.split(".")[:2]:
        return None
    return (
        f"torch_npu {torch_npu} is installed beside torch {torch}; they have to be of the same release: "
        "pip install -r requirements-npu.txt."
    )


def version(package: str) -> str | None:
    """The installed version of a package, None without it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _explain(error: Exception) -> str:
    cause = str(error.__cause__ or error).strip().split("\n")[0]
    if "torch_npu" not in f"{error}{error.__cause__}" and version("torch_npu") is None:
        return f"PyTorch cannot be imported ({cause})."
    if mismatch := npu_mismatch():
        return mismatch
    if "Two accelerators" in cause:
        return f"{cause} Install one of the two, or set {_AUTOLOAD}=0 to leave the NPU out."
    home = os.environ.get("ASCEND_HOME_PATH") or os.environ.get("ASCEND_TOOLKIT_HOME")
    where = f"ASCEND_HOME_PATH is {home}" if home else "ASCEND_HOME_PATH is not set"
    return (
        f"torch_npu is installed but cannot be loaded ({cause}); CANN seems to be missing ({where}). Install CANN and "
        f"source its set_env.sh, or set {_AUTOLOAD}=0 to go on without the NPU."
    )
