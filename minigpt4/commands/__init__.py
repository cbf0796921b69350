"""The programs ``train``, ``demo`` and ``evaluate``: a wheel has them in this folder, a checkout at its top level."""

from pathlib import Path

__path__ = [str(Path(__file__).parents[2])]
