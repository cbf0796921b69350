"""Measurements that print a table; no test depends on a time."""

import minigpt4  # noqa: F401  (before any torchvision: it makes that importable beside any torch)
