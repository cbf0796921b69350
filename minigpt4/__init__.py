"""MiniGPT-4: a frozen vision encoder and a frozen language model, joined by one linear layer.

Rooms, in the order data walks through them: ``common`` (configuration, devices, logging), ``tasks``,
``datasets`` and ``processors``, ``models``, ``runners`` for training; ``conversation`` for chat.
"""

from minigpt4.common.torch_setup import import_torch

import_torch()
