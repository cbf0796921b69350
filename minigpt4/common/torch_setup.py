"""Imports torch and torchvision where an installation would keep them from loading, or explains what to do.

torch_npu is loaded whenever torch is imported; without CANN or beside another release of torch, that import fails.
"""

import importlib.util
import os
import sys
from importlib import metadata
from pathlib import Path

PACKAGES = ("torch", "torchvision", "timm", "transformers", "torch_npu")  # whose versions matter most
# How often a thread of GNU's OpenMP looks for its next operation before it sleeps. With its default of 300,000, other
# work on the same processors made batches several times as slow; benchmarks/RESULTS.md has the measurements.
_SPIN_COUNT = "2000"
_AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
_OPERATOR = "{}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_libraries: list[object] = []  # a schema lives as long as the Library that declared it


def import_torch() -> None:
    """Imports torch and makes torchvision importable beside it.

    Raises:
        ImportError: torch is not installed, or torch_npu prevents its import; the message gives cause and remedy.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", _SPIN_COUNT)
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise ImportError(f"PyTorch cannot be imported ({error}); pip install -r requirements.txt.") from error
    except (RuntimeError, OSError) as error:
        raise ImportError(_explain(error)) from error
    _declare_missing_operators()


def _declare_missing_operators() -> None:
    """Declares ``torchvision::nms`` and ``::qnms`` where torchvision's own library of operators cannot be loaded.

    PyPI has torchvision for one build of torch only. Beside another one its library does not load, and importing it,
    timm or transformers fails at the fake kernels of these two operators, which are never called here.
    """
    import torch

    spec = importlib.util.find_spec("torchvision")
    if _libraries or spec is None or spec.origin is None or "torchvision" in sys.modules:
        return
    try:
        for library in sorted(Path(spec.origin).parent.glob("_C*.so")):
            torch.ops.load_library(library)
        torch.ops.torchvision.nms  # noqa: B018  (the attribute access is the question)
    except (OSError, AttributeError, RuntimeError):
        library = torch.library.Library("torchvision", "FRAGMENT")
        _libraries.append(library)
        for name in ("nms", "qnms"):
            library.define(_OPERATOR.format(name))


def npu_mismatch() -> str | None:
    """Returns a sentence if torch_npu is installed beside a torch of another release, else None."""
    torch_npu, torch = package_version("torch_npu"), package_version("torch")
    if torch_npu is None or torch is None or torch_npu.split(".")[:2] == torch.split(".")[:2]:
        return None
    remedy = "both have to be of the same release: pip install -r requirements-npu.txt in an environment of its own."
    return f"torch_npu {torch_npu} is installed beside torch {torch}; {remedy}"


def package_version(package: str) -> str | None:
    """Returns the installed version of a package, None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _explain(error: Exception) -> str:
    cause = str(error.__cause__ or error).strip().split("\n")[0]
    if "torch_npu" not in f"{error}{error.__cause__}" and package_version("torch_npu") is None:
        return f"PyTorch cannot be imported ({cause})."
    if mismatch := npu_mismatch():
        return mismatch
    if "Two accelerators" in cause:
        return f"{cause} Install one of the two, or set {_AUTOLOAD}=0 to run without the NPU."
    home = os.environ.get("ASCEND_HOME_PATH", "not set")
    return (
        f"torch_npu is installed but cannot be loaded ({cause}); CANN seems to be missing (ASCEND_HOME_PATH is "
        f"{home}). Install CANN and source its set_env.sh, or set {_AUTOLOAD}=0 to run without the NPU."
    )
