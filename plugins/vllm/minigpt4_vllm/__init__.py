"""A vLLM plugin for folders that ``python -m minigpt4.tools.export_hf`` writes."""


def register() -> None:
    """Makes the architecture known; vLLM calls it in each of its processes, before it reads a model's config.json."""
    from vllm import ModelRegistry

    # By name: the class is imported where a model is built, as importing it initialises the accelerator.
    ModelRegistry.register_model(
        "MiniGPT4ForConditionalGeneration", "minigpt4_vllm.model:MiniGPT4ForConditionalGeneration"
    )
