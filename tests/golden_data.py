"""Where the golden numbers of the original are, and how to read them; golden/README.md says what each file holds."""

import json
from pathlib import Path

from safetensors.torch import load_file

GOLDEN = Path(__file__).parent / "golden"
TINY = GOLDEN / "tiny"


def read_json(name, folder=TINY):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def read_tensors(name):
    return load_file(TINY / f"{name}.safetensors")


def close(actual, expected, atol):
    """Whether two tensors agree in shape and, within ``atol``, in value."""
    return actual.shape == expected.shape and (actual - expected).abs().max().item() <= atol
