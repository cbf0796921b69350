"""The small world in which the whole of MiniGPT-4 runs on a CPU: scenes, tiny frozen backbones, both stages."""

import minigpt4  # noqa: F401  (before any transformers: it makes torchvision importable everywhere)
