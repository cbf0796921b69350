"""The quickstart: small generated scenes and tiny frozen backbones, with which both stages run on a CPU."""

import minigpt4  # noqa: F401  (before any transformers: it makes torchvision importable everywhere)
