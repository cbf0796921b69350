"""Lets torchvision be imported beside a PyTorch that its compiled operators were not built for.

PyPI carries torchvision for one build of torch only. Beside any other its library of operators does not load, and
registering the fake kernels of ``nms`` and ``qnms`` then fails at import time, taking timm and transformers down with
it. Declaring those two schemas first is enough: nothing here ever calls them.
"""

import importlib.util
import sys
from pathlib import Path

import torch

_libraries: list[torch.library.Library] = []  # a schema lives as long as the Library that declared it


def declare_missing() -> None:
    """Declares ``torchvision::nms`` and ``::qnms`` where torchvision's own library cannot load; else does nothing."""
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
        for schema in (
            "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
            "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        ):
            library.define(schema)
