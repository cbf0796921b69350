"""Conversations as prompts, and ``Chat``, which answers them. Public names and behaviour are the reference's."""

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image
from torch import Tensor

from minigpt4.common import device as devices
from minigpt4.common.errors import UserError
from minigpt4.conversation.generation import Generated, GenerationOptions, generate
from minigpt4.models.mini_gpt4 import IMAGE_MARK, IMAGE_SLOT, MiniGPT4

IMAGE_MESSAGE = f"<Img>{IMAGE_MARK}</Img>"


class SeparatorStyle(Enum):
    """SINGLE closes every message with ``sep``; TWO closes those of the second role with ``sep2``."""

    SINGLE = auto()
    TWO = auto()


@dataclass
class Conversation:
    """System text, two roles and their messages [role, text]; text None marks the answer to come."""

    system: str
    roles: Sequence[str]
    messages: list[list[Any]]
    offset: int
    sep_style: SeparatorStyle = SeparatorStyle.SINGLE
    sep: str = "###"
    sep2: str | None = None
    skip_next: bool = False
    conv_id: Any = None

    def get_prompt(self) -> str:
        """The conversation as the text that the LM reads; a message without text ends with the bare ``Role:``."""
        separators = (self.sep, self.sep2 if self.sep_style == SeparatorStyle.TWO else self.sep)
        prompt = self.system + self.sep
        for i, (role, message) in enumerate(self.messages):
            prompt += f"{role}: {message}{separators[i % 2]}" if message else f"{role}:"
        return prompt

    def append_message(self, role: str, message: str | None) -> None:
        """Adds a message at the end."""
        self.messages.append([role, message])

    def to_gradio_chatbot(self) -> list[list[str | None]]:
        """The messages after ``offset`` as pairs [question, answer]."""
        texts = [text for _, text in self.messages[self.offset :]]
        return [[*texts[i : i + 2], None][:2] for i in range(0, len(texts), 2)]

    def copy(self) -> "Conversation":
        """A conversation that shares nothing with this one."""
        return copy.deepcopy(self)

    def dict(self) -> dict[str, Any]:
        """The plain fields, for saving."""
        names = ("system", "roles", "messages", "offset", "sep", "sep2", "conv_id")
        return {name: getattr(self, name) for name in names}


CONV_VISION = Conversation(
    system="Give the following image: <Img>ImageContent</Img>. "
    "You will be able to see the image once I provide it to you. Please answer my questions.",
    roles=("Human", "Assistant"),
    messages=[],
    offset=2,
    sep_style=SeparatorStyle.SINGLE,
    sep="###",
)


@dataclass
class StoppingCriteriaSub:
    """Tells which rows end with one of several id sequences; a stopping criterion for transformers' ``generate``."""

    stops: Sequence[Tensor] = field(default_factory=list)
    encounters: int = 1

    def __call__(self, input_ids: Tensor, scores: Tensor | None = None, **_: Any) -> Tensor:
        """Ids [B, T] to bool [B]."""
        ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for stop in self.stops:
            tail = input_ids[:, -len(stop) :]
            if tail.shape[1] == len(stop):
                ended |= (tail == stop.to(input_ids.device)).all(1)
        return ended


class Chat:
    """Answers conversations about images.

    Args:
        model: built and loaded; it is moved to ``device`` and switched to eval mode.
        vis_processor: PIL image to float32 [3, S, S].
        device: where to compute.
    """

    def __init__(
        self, model: MiniGPT4, vis_processor: Callable[[Image.Image], Tensor], device: torch.device | str = "cpu"
    ) -> None:
        self.device = torch.device(device)
        self.model = model.to(self.device).eval()
        self.vis_processor = vis_processor

    def ask(self, text: str, conv: Conversation) -> None:
        """Adds a question; right after an image it joins the image's message.

        Raises:
            UserError: the text holds ``<ImageHere>``, which only an image may bring.
        """
        if IMAGE_MARK in text:
            raise UserError(f"A question cannot contain {IMAGE_MARK}; upload the image instead.")
        last = conv.messages[-1] if conv.messages else None
        if last is not None and last[0] == conv.roles[0] and last[1].endswith("</Img>"):
            last[1] = f"{last[1]} {text}"
        else:
            conv.append_message(conv.roles[0], text)

    @torch.inference_mode()
    def upload_img(self, image: str | Path | Image.Image | Tensor, conv: Conversation, img_list: list[Tensor]) -> str:
        """Encodes an image (file, PIL image, or processed tensor [3, S, S] or [1, 3, S, S]) into the conversation.

        Raises:
            UserError: the file is not an image that can be read.
        """
        if isinstance(image, str | Path):
            try:
                image = Image.open(image).convert("RGB")
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                raise UserError(f"'{image}' cannot be read as an image ({error}).") from error
        if not isinstance(image, Tensor):
            image = self.vis_processor(image.convert("RGB"))
        pixels = image if image.ndim == 4 else image.unsqueeze(0)
        img_list.append(self.model.encode_img(pixels.to(self.device))[0])
        conv.append_message(conv.roles[0], IMAGE_MESSAGE)
        return "Received."

    def answer(
        self,
        conv: Conversation,
        img_list: list[Tensor],
        max_new_tokens: int = 300,
        num_beams: int = 1,
        min_length: int = 1,
        top_p: float = 0.9,
        repetition_penalty: float = 1.0,
        length_penalty: float = 1.0,
        temperature: float = 1.0,
        max_length: int = 2000,
        do_sample: bool = True,
        seed: int | None = None,
    ) -> tuple[str, numpy.ndarray]:
        """Answers the last question and appends the answer to the conversation.

        Args:
            conv: ends with a question.
            img_list: the images [1, Q, L] that its ``<ImageHere>`` marks stand for, in order.
            max_length: of context and answer in tokens; beyond it the oldest turns are left out of the prompt.
            do_sample: draw tokens (``temperature``, ``top_p``), or take the best; always the best at temperature 0.
            seed: makes drawing repeatable.

        Returns:
            The answer's text and its token ids int64 [n].
        """
        options = GenerationOptions(
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            do_sample=do_sample and temperature > 0,
            min_length=min_length,
            top_p=top_p,
            temperature=temperature,
            repetition_penalty=repetition_penalty,
            length_penalty=length_penalty,
        )
        if seed is not None:
            devices.seed_everything(seed)
        return self.answer_all([conv], [img_list], options, max_length)[0]

    @torch.inference_mode()
    def answer_all(
        self,
        convs: Sequence[Conversation],
        img_lists: Sequence[list[Tensor]],
        options: GenerationOptions,
        max_length: int = 2000,
    ) -> list[tuple[str, numpy.ndarray]]:
        """``answer`` for several conversations in one batch."""
        options.stop = self._stops_at(convs[0].sep)
        rows = [
            self._context_ids(conv, len(images), max_length - options.max_new_tokens)
            for conv, images in zip(convs, img_lists, strict=True)
        ]
        tokenizer = self.model.llama_tokenizer
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):  # padded on the left, so that all rows end where generation begins
            ids[i, width - len(row) :] = torch.tensor(row)
            mask[i, width - len(row) :] = 1
        images = [image for image_list in img_lists for image in image_list]
        embeds = self.model.embed(ids.to(self.device), torch.cat(images) if images else None)
        results = generate(
            self.model.llama_model,
            embeds,
            mask.to(self.device),
            options,
            tokenizer.bos_token_id,
            tokenizer.eos_token_id,
        )
        return [self._append(conv, result) for conv, result in zip(convs, results, strict=True)]

    def _append(self, conv: Conversation, result: Generated) -> tuple[str, numpy.ndarray]:
        text = self.text_of(result.ids, conv)
        conv.append_message(conv.roles[1], text)
        return text, numpy.array(result.ids, dtype=numpy.int64)

    def text_of(self, ids: Sequence[int], conv: Conversation) -> str:
        """The answer in generated ids: up to the first separator, after the last "Assistant:", trimmed."""
        text = self.model.llama_tokenizer.decode(ids)
        return text.split(conv.sep)[0].split(f"{conv.roles[1]}:")[-1].strip()

    def _stops_at(self, separator: str) -> Callable[[Sequence[int]], bool]:
        # A separator is told by its text: it has other ids alone, after a word and after punctuation.
        def stop(ids: Sequence[int]) -> bool:
            return separator in self.model.llama_tokenizer.decode(ids[-len(separator) - 1 :])

        return stop

    def _context_ids(self, conv: Conversation, num_images: int, room: int) -> list[int]:
        """Ids of the prompt with image slots, of at most ``room``: the oldest turns go first, images stay."""
        prompt_conv = conv.copy()
        prompt_conv.append_message(conv.roles[1], None)
        num_marks = prompt_conv.get_prompt().count(IMAGE_MARK)
        if num_marks != num_images:
            raise UserError(f"The conversation shows {num_marks} images and {num_images} were given; start a new chat.")
        num_dropped = 0
        while True:
            ids = [self.model.llama_tokenizer.bos_token_id, *self.model.slots(prompt_conv.get_prompt())]
            if len(ids) <= room:
                break
            if not _drop_oldest_turn(prompt_conv):
                num_images_ids = sum(i == IMAGE_SLOT for i in ids)
                raise UserError(
                    f"The question is too long: the prompt has {len(ids)} tokens ({num_images_ids} of them images), "
                    f"and {room} fit beside the answer; shorten it or lower max_new_tokens."
                )
            num_dropped += 1
        if num_dropped:
            logging.warning("The chat is longer than the context: its %d oldest turns were left out.", num_dropped)
        return ids


def _drop_oldest_turn(conv: Conversation) -> bool:
    """Removes the oldest answered turn in place, keeping its images; False where only the last question is left."""
    for i, (role, text) in enumerate(conv.messages[:-2]):
        if role == conv.roles[1]:
            question = conv.messages[i - 1] if i else None
            images = (question[1] or "").count(IMAGE_MARK) if question else 0
            conv.messages[max(i - 1, 0) : i + 1] = [[conv.roles[0], IMAGE_MESSAGE] for _ in range(images)]
            return True
        if IMAGE_MARK not in (text or ""):
            del conv.messages[i]
            return True
    return False
