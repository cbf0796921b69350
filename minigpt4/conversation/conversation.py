"""``Chat``, which answers conversations about images. Public names and behaviour are the reference's."""

import bisect
import functools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy
import torch
from PIL import Image
from torch import Tensor
from transformers import DynamicCache

from minigpt4.common import device as devices
from minigpt4.common.errors import UserError
from minigpt4.conversation.generation import GenerationOptions, generate, stream
from minigpt4.conversation.images import read_image
from minigpt4.conversation.prefix_cache import Prefix, PrefixCache
from minigpt4.conversation.stopping import StoppingCriteriaSub
from minigpt4.conversation.templates import CONV_VISION, Conversation, SeparatorStyle
from minigpt4.models.mini_gpt4 import IMAGE_PLACEHOLDER, IMAGE_TOKEN_INDEX, MiniGPT4

__all__ = ["CONV_VISION", "Answer", "Chat", "Conversation", "SeparatorStyle", "StoppingCriteriaSub"]

IMAGE_MESSAGE = f"<Img>{IMAGE_PLACEHOLDER}</Img>"


@dataclass
class Answer:
    """An answer while it is generated; ``decode`` maps its token ids to text."""

    prompt_tokens: int  # images included
    cached_tokens: int  # of the prompt's; they were prefilled in an earlier turn
    decode: Callable[[Sequence[int]], str]
    ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None  # "stop", or "length" at max_new_tokens
    seconds: float = 0.0  # from the start to the latest token
    seconds_to_first_token: float = 0.0

    @property
    def text(self) -> str:
        """The text so far; it is decoded on access, so that callers who wait for the end pay once."""
        return self.decode(self.ids)


class Chat:
    """Answers conversations about images.

    Args:
        model: built and loaded; it is moved to ``device`` and switched to eval mode.
        vis_processor: PIL image to float32 [3, S, S].
        device: where to compute.
        template: what new conversations start from.
        num_kept_chats: of how many chats keys and values are kept, so that the next turn is quick.
    """

    def __init__(
        self,
        model: MiniGPT4,
        vis_processor: Callable[[Image.Image], Tensor],
        device: torch.device | str = "cpu",
        template: Conversation = CONV_VISION,
        num_kept_chats: int = 4,
    ) -> None:
        self.device = torch.device(device)
        self.model = model.to(self.device).eval()
        self.vis_processor = vis_processor
        self.template = template
        self.prefixes = PrefixCache(num_kept_chats)

    def ask(self, text: str, conv: Conversation) -> None:
        """Adds a question; right after an image it joins the image's message.

        Raises:
            UserError: the text is empty or holds ``<ImageHere>``, which only an image may bring.
        """
        if not text.strip():
            raise UserError("The question is empty; write what you want to know.")
        if IMAGE_PLACEHOLDER in text:
            raise UserError(f"A question cannot contain {IMAGE_PLACEHOLDER}; upload the image instead.")
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
        self.upload_batch([self.preprocess_image(image)], [conv], [img_list])
        return "Received."

    def preprocess_image(self, image: str | Path | bytes | Image.Image | Tensor) -> Tensor:
        """What ``upload_img`` takes, as a processed float32 tensor [3, S, S]; UserError where it cannot be read."""
        if not isinstance(image, Tensor):
            image = self.vis_processor(read_image(image))
        return image[0] if image.ndim == 4 else image

    @torch.inference_mode()
    def upload_batch(
        self, pixels: Sequence[Tensor], convs: Sequence[Conversation], img_lists: Sequence[list[Tensor]]
    ) -> None:
        """Encodes a processed image [3, S, S] for each of several conversations in one batch."""
        devices.use(self.device)
        embeds = self.model.encode_img(torch.stack(list(pixels)).to(self.device))[0]
        for embed, conv, img_list in zip(embeds.split(1), convs, img_lists, strict=True):
            img_list.append(embed)
            conv.append_message(conv.roles[0], IMAGE_MESSAGE)

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
            seed=seed,
        )
        return self.answer_batch([conv], [img_list], options, max_length)[0]

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

    def stream(
        self, conv: Conversation, img_list: list[Tensor], options: GenerationOptions, max_length: int = 2000
    ) -> Iterator[Answer]:
        """Answers the last question token by token; one answer is yielded again and again as it grows."""
        for _, answer in self.stream_batch([conv], [img_list], options, max_length):
            yield answer

    @torch.inference_mode()
    def stream_batch(
        self,
        convs: Sequence[Conversation],
        img_lists: Sequence[list[Tensor]],
        options: GenerationOptions | Sequence[GenerationOptions],
        max_length: int = 2000,
    ) -> Iterator[tuple[int, Answer]]:
        """Answers several conversations in one batch.

        A single one goes on from what is kept of it; in a batch every context is read anew. Whoever closes the
        iterator stops the answers: what is there of them is appended to the conversations.

        Args:
            convs, img_lists, max_length: as for ``answer``.
            options: for all, or one for each; their ``stop`` ends an answer beside the template's own end.

        Yields:
            (number of the conversation, its answer so far) whenever one has grown.
        """
        devices.use(self.device)  # a server's threads each begin on the first device
        begin = time.perf_counter()
        each = [options] * len(convs) if isinstance(options, GenerationOptions) else list(options)
        rows = [
            self._context_ids(conv, len(images), max_length - o.max_new_tokens)
            for conv, images, o in zip(convs, img_lists, each, strict=True)
        ]
        each = [replace(o, stop=self._stop(conv, o.stop)) for conv, o in zip(convs, each, strict=True)]
        prefix = self.prefixes.take(rows[0], img_lists[0]) if len(rows) == 1 else Prefix()
        known = len(prefix.ids)
        answers = [
            Answer(len(row), known, functools.partial(self.decode_answer, conv=conv))
            for row, conv in zip(rows, convs, strict=True)
        ]
        embeds, mask = self._embed(rows, img_lists)
        tokenizer = self.model.llama_tokenizer
        arguments = embeds[:, known:], mask, each, tokenizer.bos_token_id, tokenizer.eos_token_id
        token_lists = self._token_lists(*arguments, prefix.cache if len(rows) == 1 else None)
        try:
            for row, ids, is_end in token_lists:
                answer = answers[row]
                answer.ids += ids
                answer.seconds = time.perf_counter() - begin
                answer.seconds_to_first_token = answer.seconds_to_first_token or answer.seconds
                if is_end:
                    answer.finish_reason = "stop"
                elif len(answer.ids) >= each[row].max_new_tokens:
                    answer.finish_reason = "length"
                yield row, answer
        except Exception:  # out of memory, say: some layers have read more than others
            prefix = None
            raise
        finally:
            token_lists.close()  # now the cache has everything
            if len(rows) == 1 and prefix is not None:
                self.prefixes.put(prefix, rows[0] + answers[0].ids, img_lists[0])
            for conv, answer in zip(convs, answers, strict=True):
                if answer.ids:
                    conv.append_message(conv.roles[1], answer.text)

    def _token_lists(
        self,
        embeds: Tensor,
        mask: Tensor,
        options: Sequence[GenerationOptions],
        bos: int,
        eos: int,
        cache: DynamicCache | None,
    ) -> Iterator[tuple[int, list[int], bool]]:
        """(row, its next ids, whether it ended by itself): one by one, or by beam search all at once."""
        llm = self.model.llama_model
        if any(o.num_beams > 1 for o in options):
            for row, result in enumerate(generate(llm, embeds, mask, options, bos, eos, cache)):
                yield row, result.ids, result.ids[-1] == eos or options[row].stop(result.ids)
        else:
            for row, token_id, is_end in stream(llm, embeds, mask, options, bos, eos, cache):
                yield row, [token_id], is_end

    def _embed(self, rows: Sequence[list[int]], img_lists: Sequence[list[Tensor]]) -> tuple[Tensor, Tensor]:
        """Contexts to LM inputs [B, T, L] and mask [B, T] on the CPU, padded on the left: all end together."""
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self.model.llama_tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, width - len(row) :] = torch.tensor(row)
            mask[i, width - len(row) :] = 1
        images = [image for image_list in img_lists for image in image_list]
        embeds = self.model.embed_inputs(ids.to(self.device), torch.cat(images) if images else None)
        return embeds, mask

    def check_length(
        self, conv: Conversation, img_list: list[Tensor], options: GenerationOptions, max_length: int = 2000
    ) -> None:
        """Raises the UserError with which ``answer`` would refuse a question that is too long."""
        self._context_ids(conv, len(img_list), max_length - options.max_new_tokens)

    def decode_answer(self, ids: Sequence[int], conv: Conversation) -> str:
        """The answer in generated ids: up to the text that ends it, after the last "Assistant:", trimmed."""
        text = self.model.llama_tokenizer.decode(ids)
        return text.split(conv.stop_string)[0].split(f"{conv.roles[1]}:")[-1].strip()

    def _stops_at(self, end: str) -> Callable[[Sequence[int]], bool]:
        # An end is told by its text: it has other ids alone, after a word and after punctuation.
        def stop(ids: Sequence[int]) -> bool:
            return end in self.model.llama_tokenizer.decode(ids[-len(end) - 1 :])

        return stop

    def _stop(self, conv: Conversation, other: Callable[[Sequence[int]], bool]) -> Callable[[Sequence[int]], bool]:
        ends = self._stops_at(conv.stop_string)
        return lambda ids: ends(ids) or other(ids)

    def _context_ids(self, conv: Conversation, num_images: int, room: int) -> list[int]:
        """Ids of the prompt with image slots, of at most ``room``: the oldest turns go first, images stay."""
        prompt_conv = conv.copy()
        prompt_conv.append_message(conv.roles[1], None)
        num_marks = prompt_conv.get_prompt().count(IMAGE_PLACEHOLDER)
        if num_marks != num_images:
            raise UserError(f"The conversation shows {num_marks} images and {num_images} were given; start a new chat.")

        def ids_of(conv: Conversation) -> list[int]:
            return [self.model.llama_tokenizer.bos_token_id, *self.model.tokenize_prompt(conv.get_prompt())]

        if len(ids := ids_of(prompt_conv)) <= room:
            return ids
        shorter: list[Conversation] = []  # the chat without its oldest turn, without its two oldest ones, …
        while _drop_oldest_turn(prompt_conv):
            shorter.append(replace(prompt_conv, messages=list(prompt_conv.messages)))
        # A long chat is tokenized a few times, not once for each of its turns.
        num_before = bisect.bisect_left(shorter, True, key=lambda conv: len(ids_of(conv)) <= room)
        if num_before == len(shorter):
            ids = ids_of(prompt_conv)
            num_images_ids = sum(i == IMAGE_TOKEN_INDEX for i in ids)
            raise UserError(
                f"The question is too long: the prompt has {len(ids)} tokens ({num_images_ids} of them images), "
                f"and {room} fit beside the answer; shorten it or lower max_new_tokens."
            )
        logging.warning("The chat is longer than the context: its %d oldest turns were left out.", num_before + 1)
        return ids_of(shorter[num_before])


def _drop_oldest_turn(conv: Conversation) -> bool:
    """Removes the oldest answered turn in place, keeping its images; False where only the last question is left."""
    for i, (role, text) in enumerate(conv.messages[:-2]):
        if role == conv.roles[1]:
            question = conv.messages[i - 1] if i else None
            images = (question[1] or "").count(IMAGE_PLACEHOLDER) if question else 0
            conv.messages[max(i - 1, 0) : i + 1] = [[conv.roles[0], IMAGE_MESSAGE] for _ in range(images)]
            return True
        if IMAGE_PLACEHOLDER not in (text or ""):
            del conv.messages[i]
            return True
    return False
