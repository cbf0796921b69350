"""The base class of image and text processors."""

from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf


class BaseProcessor:
    """Applies ``transform`` to an item; the identity by default. Subclasses set ``transform`` or override the call."""

    def __init__(self) -> None:
        self.transform = _identity

    def __call__(self, item: Any) -> Any:
        """Processes one item."""
        return self.transform(item)

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any] | None = None) -> "BaseProcessor":
        """Builds a processor from its configuration section; the base class has no settings."""
        return cls()

    def build(self, **settings: Any) -> "BaseProcessor":
        """Builds a processor of the same class from settings given as keyword arguments."""
        return self.from_config(OmegaConf.create(settings))


def _identity(item: Any) -> Any:
    return item
