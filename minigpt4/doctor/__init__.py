"""What a run will need, checked before it starts: ``python -m minigpt4.doctor --cfg-path FILE``."""

from minigpt4.doctor.head import look_ahead, warn_if_dead

__all__ = ["look_ahead", "warn_if_dead"]
