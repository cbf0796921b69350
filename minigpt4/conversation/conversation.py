"""``Chat``, which answers conversations about images. Public names and behaviour are the reference's."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image
from torch import Tensor
from transformers import StoppingCriteriaList

from minigpt4.common import device as devices
from minigpt4.common.boxes import is_outside, text_boxes
from minigpt4.common.errors import UserError
from minigpt4.common.images import read_image
from minigpt4.common.schema import LATER
from minigpt4.common.templates import (
    CONV_VISION,
    IMAGE_MESSAGE,
    CONV_VISION_LLama2,
    CONV_VISION_minigptv2,
    CONV_VISION_Vicuna0,
    Conversation,
    SeparatorStyle,
)  # fmt: skip
from minigpt4.common.utils import IMAGE_PLACEHOLDER
from minigpt4.conversation.answer_batch import Answer, AnswerBatch
from minigpt4.conversation.context import build_context
from minigpt4.conversation.generation import GenerationOptions
from minigpt4.conversation.prefix_cache import PrefixCache
from minigpt4.conversation.sampling import OWN_OPTIONS
from minigpt4.conversation.stopping import StoppingCriteriaSub, StopStringCriteria, hold_back_partial_stop
from minigpt4.models.lora import check_trained
from minigpt4.models.mini_gpt4 import MiniGPT4

__all__ = [
    "CONV_VISION", "Answer", "CONV_VISION_LLama2", "CONV_VISION_Vicuna0", "CONV_VISION_minigptv2", "Chat",
    "Conversation", "SeparatorStyle", "StoppingCriteriaSub",
]  # fmt: skip
Stop = Callable[[Sequence[int]], bool]
# A file, its content, a PIL image, or a processed tensor [3, S, S] or [1, 3, S, S].
ImageSource = str | Path | bytes | Image.Image | Tensor


class Chat:
    """Answers conversations about images.

    Args:
        model: built and loaded; it is switched to eval mode and moved to ``device``.
        vis_processor: PIL image to float32 [3, S, S].
        device: by default where the model is; a kind that is unavailable is replaced by the best available one. A
            number is the index of an accelerator, as evaluation kits pass it.
        stopping_criteria: further ends of answers beside the end token and the template's stop string.
        template: the conversation that new chats start from.
        num_kept_chats: number of chats whose key-value caches are kept for their next turn.

    Set ``records_steps`` to replay recorded decoding steps on devices that can, without hooks of the LM's modules: one
    token of a 7B model takes a fast GPU a third of the time. The API, the web page and batches do.

    Raises UserError for a model whose LoRA weights were never trained: its checkpoint holds none.
    """

    def __init__(
        self,
        model: MiniGPT4,
        vis_processor: Callable[[Image.Image], Tensor],
        device: torch.device | str | int | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        template: Conversation = CONV_VISION,
        num_kept_chats: int = 4,
    ) -> None:
        name = f"auto:{device}" if isinstance(device, int) else str(device)
        self.device = model.device if device is None else devices.pick(name)
        self.model = model.to(self.device).eval()
        if getattr(model, "lora", None):
            check_trained(model.llama_model, model.lora)
        self.vis_processor = vis_processor
        self.template = template
        self._template_stop = StopStringCriteria(model.llama_tokenizer, template.stop_string)
        is_default = stopping_criteria is None
        self.stopping_criteria = StoppingCriteriaList([self._template_stop]) if is_default else stopping_criteria
        self.prefixes = PrefixCache(num_kept_chats)
        self.records_steps = False

    @property
    def has_boxes(self) -> bool:
        """Whether texts hold boxes, see ``common.boxes``: those of MiniGPT-v2's tasks."""
        return self.model.arch == "minigpt_v2"

    def ask(self, text: str, conv: Conversation) -> None:
        """Adds a question; right after an image it joins the image's message. An empty question is accepted.

        Raises:
            UserError: the text contains ``<ImageHere>``, which only an image may add, or for MiniGPT-v2 a box that has
                no part in the image.
        """
        if IMAGE_PLACEHOLDER in text:
            raise UserError(f"A question cannot contain {IMAGE_PLACEHOLDER}; upload the image instead.")
        outside = filter(is_outside, text_boxes(text) if self.has_boxes else ())
        if box := next(outside, None):
            numbers = "its numbers are left, top, right and bottom in hundredths of the image's sides"
            raise UserError(f"The box {list(box)} lies outside the image. Correct it: {numbers}, from 0 to 100.")
        conv.ask(text)

    def upload_img(self, image: ImageSource, conv: Conversation, img_list: list[Tensor]) -> str:
        """Encodes an image and adds it to a conversation.

        Raises:
            UserError: the file is not an image that can be read.
        """
        self.upload_batch([self.preprocess_image(image)], [conv], [img_list])
        return "Received."

    def preprocess_image(self, image: ImageSource) -> Tensor:
        """Reads and processes an image to float32 [3, S, S]; UserError where it cannot be read."""
        if not isinstance(image, Tensor):
            image = self.vis_processor(read_image(image))
        return image[0] if image.ndim == 4 else image

    def upload_batch(
        self, pixels: Sequence[Tensor], convs: Sequence[Conversation], img_lists: Sequence[list[Tensor]]
    ) -> None:
        """Encodes a processed image [3, S, S] for each of several conversations in one batch."""
        for embed, conv, img_list in zip(self._encode(pixels), convs, img_lists, strict=True):
            img_list.append(embed)
            conv.append_message(conv.roles[0], IMAGE_MESSAGE)

    def encode_img(self, img_list: list[Any]) -> None:
        """Replaces images in a list by their embeddings [1, Q, L]; embeddings, as of ``upload_img``, stay."""
        places = [i for i, image in enumerate(img_list) if not isinstance(image, Tensor) or image.shape[-3] == 3]
        pixels = [self.preprocess_image(img_list[i]) for i in places]
        for i, embed in zip(places, self._encode(pixels) if pixels else (), strict=True):
            img_list[i] = embed

    @torch.no_grad()
    def _encode(self, pixels: Sequence[Tensor]) -> Sequence[Tensor]:
        devices.use(self.device)  # the threads of a server start on the first device
        return self.model.encode_img(torch.stack(list(pixels)).to(self.device))[0].split(1)

    def get_context_emb(self, conv: Conversation, img_list: list[Tensor]) -> Tensor:
        """LM inputs [1, T, L] of a conversation that ends with the answer to come (text None)."""
        return self.model.get_context_emb(conv.get_prompt(), img_list)

    def answer(
        self,
        conv: Conversation,
        img_list: list[Tensor],
        max_new_tokens: int = 300,
        num_beams: int = 1,
        min_length: int = 1,
        top_p: float = 0.9,
        repetition_penalty: float | None = None,
        length_penalty: float = 1.0,
        temperature: float = 1.0,
        max_length: int = 2000,
        do_sample: bool = True,
        seed: int | None = None,
    ) -> tuple[str, numpy.ndarray]:
        """Answers the last question and appends the answer to the conversation.

        Args:
            conv: ends with a question.
            img_list: the images [1, Q, L] of its placeholders, in order.
            max_length: of context and answer in tokens; beyond it the prompt leaves out the oldest turns.
            repetition_penalty: None: the reference's, 1.05 in the later family, else 1.
            do_sample: sample (``temperature``, ``top_p``) or take the most probable token, as at temperature 0.
            seed: makes sampling repeatable.

        Returns:
            The answer's text and its token ids int64 [n].
        """
        options = GenerationOptions(
            max_new_tokens=max_new_tokens, num_beams=num_beams, do_sample=do_sample, min_length=min_length, top_p=top_p,
            temperature=temperature, repetition_penalty=repetition_penalty, length_penalty=length_penalty, seed=seed,
        )  # fmt: skip
        return self.answer_batch([conv], [img_list], options, max_length)[0]

    def with_defaults(self, options: GenerationOptions) -> GenerationOptions:
        """The options with the reference's repetition penalty, 1.05 in the later family, where they name none."""
        if options.repetition_penalty is not None:
            return options
        return replace(options, repetition_penalty=1.05 if self.model.arch in LATER else 1.0)

    def answer_batch(
        self,
        convs: Sequence[Conversation],
        img_lists: Sequence[list[Tensor]],
        options: GenerationOptions | Sequence[GenerationOptions],
        max_length: int = 2000,
    ) -> list[tuple[str, numpy.ndarray]]:
        """``answer`` for several conversations in one batch."""
        answers: dict[int, Answer] = dict(self.stream_batch(convs, img_lists, options, max_length))
        return [(answers[i].text, numpy.array(answers[i].ids, dtype=numpy.int64)) for i in range(len(convs))]

    def answer_prepare(
        self, conv: Conversation, img_list: list[Tensor], max_length: int = 2000, **settings: Any
    ) -> dict[str, Any]:
        """Arguments for ``model.llama_model.generate``, with ``inputs_embeds`` [1, T, L]; settings as for ``answer``.

        The conversation then ends with the answer to come (text None), as in the reference.
        """
        options = self.with_defaults(GenerationOptions(**settings))
        ids, _ = build_context(self.model, conv, len(img_list), max_length - options.max_new_tokens)
        images = torch.cat(img_list) if img_list else None
        with torch.no_grad():
            embeds = self.model.embed_inputs(torch.tensor([ids], device=self.device), images)
        conv.append_message(conv.roles[1], None)
        arguments = {name: value for name, value in vars(options).items() if name not in OWN_OPTIONS}
        return {"inputs_embeds": embeds, "stopping_criteria": self.stopping_criteria, **arguments}

    def stream_answer(
        self,
        conv: Conversation,
        img_list: list[Tensor],
        max_length: int = 2000,
        options: GenerationOptions | None = None,
        **settings: Any,
    ) -> Iterator[str]:
        """Answers the last question in pieces of text, which add up to the answer; settings as for ``answer``."""
        sent = ""
        for answer in self.stream(conv, img_list, options or GenerationOptions(**settings), max_length):
            text = answer.text
            final = text if answer.finish_reason else hold_back_partial_stop(text, [conv.stop_string])
            if final.startswith(sent) and final != sent:
                yield final[len(sent) :]
                sent = final

    def stream(
        self, conv: Conversation, img_list: list[Tensor], options: GenerationOptions, max_length: int = 2000
    ) -> Iterator[Answer]:
        """Answers the last question token by token; yields the same answer each time it has grown."""
        for _, answer in self.stream_batch([conv], [img_list], options, max_length):
            yield answer

    def stream_batch(
        self,
        convs: Sequence[Conversation],
        img_lists: Sequence[list[Tensor]],
        options: GenerationOptions | Sequence[GenerationOptions],
        max_length: int = 2000,
    ) -> Iterator[tuple[int, Answer]]:
        """Answers several conversations in one batch; each continues from its chat's cached prefix.

        Closing the iterator stops the answers; what has been generated is appended to the conversations.

        Args:
            convs, img_lists, max_length: as for ``answer``.
            options: for all, or one for each; their ``stop`` ends an answer beside the template's stop string.

        Yields:
            (index of the conversation, its answer so far) whenever one has grown.
        """
        each = [options] * len(convs) if isinstance(options, GenerationOptions) else options
        batch = AnswerBatch(self, max_length)
        rows = list(zip(convs, img_lists, each, strict=True))
        plans = [batch.plan(conv, len(images), option) for conv, images, option in rows]
        answers = [batch.add(conv, images, plan) for (conv, images, _), plan in zip(rows, plans, strict=True)]
        numbers = {id(answer): i for i, answer in enumerate(answers)}
        try:
            while len(batch):
                for answer in batch.step():
                    if answer.error is not None:
                        raise answer.error
                    yield numbers[id(answer)], answer
        finally:
            batch.close()

    def check_length(
        self, conv: Conversation, img_list: list[Tensor], options: GenerationOptions, max_length: int = 2000
    ) -> None:
        """Raises the UserError with which ``answer`` would refuse a question that is too long."""
        build_context(self.model, conv, len(img_list), max_length - options.max_new_tokens)

    def decode_answer(self, ids: Sequence[int], conv: Conversation) -> str:
        """The answer in generated ids: up to its stop string, after the last "Assistant:", stripped.

        In the later family special tokens are left out, and both texts count for every template, as in the reference.
        """
        if self.model.arch in LATER:
            text = self.model.decode_plain(ids)
            for stop in filter(None, {"###", conv.stop_string}):
                text = text.split(stop)[0]
            return text.split("Assistant:")[-1].strip()
        text = self.model.llama_tokenizer.decode(ids)
        # The reference keeps an end token that is not the template's own stop string.
        stops = [conv.stop_string, self.model.llama_tokenizer.eos_token if conv.render or not conv.stop_string else ""]
        for stop in filter(None, stops):
            text = text.split(stop)[0]
        return (text.split(conv.answer_marker)[-1] if conv.answer_marker else text).strip()

    def stop_function(
        self, conv: Conversation, other: Callable[[Sequence[int]], bool]
    ) -> Callable[[Sequence[int]], bool]:
        """Whether new ids end an answer: by the template's stop string, ``other`` or the caller's criteria."""
        own = StopStringCriteria(self.model.llama_tokenizer, conv.stop_string)
        criteria = [criterion for criterion in self.stopping_criteria if criterion is not self._template_stop]

        def stop(ids: Sequence[int]) -> bool:
            if own.ends(ids) or other(ids):
                return True
            history = torch.tensor([[*self.model.bos_ids, *ids]], device=self.device) if criteria else None
            return any(bool(criterion(history, None)) for criterion in criteria)

        return stop
