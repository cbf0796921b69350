"""vLLM's BLIP-2 with the image embeddings wherever the prompt has an image token, for any number of images."""

from collections.abc import Mapping, Sequence

from transformers import ProcessorMixin
from vllm.inputs import MultiModalInput
from vllm.model_executor.models.blip2 import (
    Blip2DummyInputsBuilder,
    Blip2ForConditionalGeneration,
    Blip2MultiModalProcessor,
    Blip2ProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalKwargsItems
from vllm.multimodal.parse import MultiModalDataItems
from vllm.multimodal.processing import ProcessorInputs, PromptReplacement, PromptUpdate, TimingContext


class MiniGPT4ProcessingInfo(Blip2ProcessingInfo):
    """What a folder says about images."""

    def get_hf_processor(self, **kwargs: object) -> ProcessorMixin:
        """The folder's processor; the default backend would give slightly other pixels than training."""
        return super().get_hf_processor(**{"backend": "pil"} | kwargs)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Any number of images."""
        return {"image": None}

    def get_image_token_id(self) -> int:
        """The id of ``<image>``."""
        return self.get_hf_config().image_token_index


class MiniGPT4DummyInputsBuilder(Blip2DummyInputsBuilder):
    """The inputs with which vLLM measures memory."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """One image token for each image."""
        return "<image>" * mm_counts.get("image", 0)


class MiniGPT4MultiModalProcessor(Blip2MultiModalProcessor):
    """Replaces each image token, in place, by one for each query."""

    def apply(self, inputs: ProcessorInputs, timing_ctx: TimingContext) -> MultiModalInput:
        """Raises ValueError, a client's error 400, unless the prompt has one image token for each image."""
        num_tokens = inputs.prompt.count(self.info.get_image_token_id())
        num_images = inputs.mm_data_items.get_count("image", strict=False)
        if num_tokens != num_images:
            raise ValueError(f"The prompt has {num_tokens} times <image> for {num_images} images.")
        return super().apply(inputs, timing_ctx)

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        image_token_id = self.info.get_image_token_id()
        image_tokens = [image_token_id] * self.info.get_num_image_tokens()
        return [PromptReplacement(modality="image", target=[image_token_id], replacement=image_tokens)]


@MULTIMODAL_REGISTRY.register_processor(
    MiniGPT4MultiModalProcessor, info=MiniGPT4ProcessingInfo, dummy_inputs=MiniGPT4DummyInputsBuilder
)
class MiniGPT4ForConditionalGeneration(Blip2ForConditionalGeneration):
    """Computes as BLIP-2; only the processor is another."""
