"""What the tests of hostile weights share."""

import torch
from golden_data import TINY

PROJECTION = torch.load(TINY / "minigpt4_ckpt.pth", weights_only=True)["model"]


def written(path, content):
    torch.save(content, path)
    return path


def replaced(name, content):
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
