"""What a run will need, checked before it starts: ``python -m minigpt4.doctor --cfg-path FILE``."""

from minigpt4.doctor.language import check_language_model

__all__ = ["check_language_model"]
