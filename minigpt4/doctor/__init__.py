"""What a run will need, checked before it starts: ``python -m minigpt4.doctor --cfg-path FILE``."""
