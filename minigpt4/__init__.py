"""MiniGPT-4: a frozen vision encoder and a frozen language model, joined by one linear layer.

Rooms, in the order data walks through them: ``common`` (configuration, devices, logging), ``tasks``,
``datasets`` and ``processors``, ``models``, ``runners`` for training; ``conversation`` for chat.
"""

from minigpt4.common.device_import import import_torch

import_torch()

from minigpt4.common import torchvision_ops  # noqa: E402  (needs torch)

torchvision_ops.declare_missing()
