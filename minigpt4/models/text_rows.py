"""Texts as rows of token ids: prompts with image positions, and training rows with their labels."""

import bisect
import random
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from minigpt4.common.errors import UserError
from minigpt4.common.templates import Conversation, choose_template
from minigpt4.common.utils import IMAGE_PLACEHOLDER

IMAGE_TOKEN_INDEX = -1  # in a list of token ids: one image embedding goes here
IGNORE_INDEX = -100  # label of a position that is no target


class TextRow(NamedTuple):
    """Token ids of a training row, image positions included, the label of each, and whether its end was cut off."""

    ids: list[int]
    labels: list[int]
    is_truncated: bool = False


class TextRows:
    """The part of ``MiniGPT4`` that tokenizes; its attributes are described there."""

    llama_tokenizer: Any
    num_query_token: int
    prompt_list: list[str]
    prompt_template: str
    max_txt_len: int
    max_context_len: int
    end_sym: str
    conversation: str | None

    @property
    def bos_ids(self) -> list[int]:
        """What every sequence begins with: the begin token, or nothing where the tokenizer has none."""
        return [] if self.llama_tokenizer.bos_token is None else [self.llama_tokenizer.bos_token_id]

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text without begin token; lone surrogates, which JSON may hold, are replaced by "?"."""
        text = text.encode(errors="replace").decode()
        return list(self.llama_tokenizer(text, add_special_tokens=False).input_ids)

    def tokenize_prompt(self, text: str) -> list[int]:
        """Ids of a prompt: each ``<ImageHere>`` is Q times IMAGE_TOKEN_INDEX, the text around it is encoded apart."""
        ids: list[int] = []
        for i, segment in enumerate(text.split(IMAGE_PLACEHOLDER)):
            ids += [IMAGE_TOKEN_INDEX] * self.num_query_token * (i > 0)
            ids += self.tokenize(segment) if segment else []
        return ids

    def tokenize_rows(self, captions: Sequence[str], prompts: Sequence[str]) -> list[TextRow]:
        """Training rows: begin token, prompt with image positions, caption with end symbol.

        Labels are the ids where they are caption or end symbol and not the pad id, which a caption may contain as text.
        """
        rows, pad = [], self.llama_tokenizer.pad_token_id
        for caption, prompt in zip(captions, prompts, strict=True):
            before = self.bos_ids + self.tokenize_prompt(prompt)
            target = self.tokenize(caption + self.end_sym)[: self.max_txt_len]
            labels = [IGNORE_INDEX if token == pad else token for token in target]
            rows.append(TextRow(before + target, [IGNORE_INDEX] * len(before) + labels))
        return rows

    @cached_property
    def template(self) -> Conversation:
        """The template in which conversations are trained, which is that of a chat with the trained model."""
        return choose_template(self, self.llama_tokenizer)

    def tokenize_conversation(self, turns: Sequence[tuple[str, str]], system: str = "") -> TextRow:
        """The training row of (question, answer)s: the ids of ``Chat``'s prompt, answers with their ends as targets.

        Turns that do not fit into ``max_context_len`` are left out from the last one on; of a single turn, the end is
        cut off, but no part of an image.

        Args:
            turns: ``<ImageHere>`` in a question marks the position of an image.
            system: in place of the template's system text.
        """

        def tokenize(number: int, is_open: bool = False) -> list[int]:
            conv = self.template.copy()
            conv.system = system or conv.system
            for i, (question, answer) in enumerate(turns[: number + is_open]):
                conv.ask_with_images(question)
                conv.append_message(conv.roles[1], answer if i < number else None)
            text, stop = conv.get_prompt(), conv.stop_string
            if not is_open and stop and stop in text:  # a template may write more than what ends a generated answer
                text = text[: text.rindex(stop) + len(stop)]
            return self.bos_ids + self.tokenize_prompt(text)

        ids, limit, number = tokenize(len(turns)), self.max_context_len, len(turns)
        is_truncated = len(ids) > limit
        if is_truncated:
            fitting = bisect.bisect_right(range(1, number), limit, key=lambda n: len(tokenize(n)))
            number = max(1, fitting)
            ids = tokenize(number)[:limit]
            num_cut = ids.count(IMAGE_TOKEN_INDEX) % self.num_query_token  # of an image that would be split
            ids = ids[: len(ids) - num_cut]
        labels = [IGNORE_INDEX] * len(ids)
        for i in range(number):  # a tokenizer may join the ends of two texts, so the common ids decide
            begin, end = (_num_common(ids, tokenize(i + 1 - is_open, is_open)) for is_open in (True, False))
            labels[begin:end] = ids[begin:end]
        return TextRow(ids, labels, is_truncated)

    def training_rows(self, samples: Mapping[str, Any]) -> list[TextRow]:
        """The rows of a batch: conversations where ``conversation`` has one, else captions with their prompts."""
        conversations = samples.get("conversation") or [None] * len(captions_of(samples))
        if all(conversations):
            return [self.tokenize_conversation(**conversation) for conversation in conversations]
        rows = self.tokenize_rows(captions_of(samples), self.choose_prompts(samples))
        pairs = zip(conversations, rows, strict=True)
        return [self.tokenize_conversation(**conversation) if conversation else row for conversation, row in pairs]

    def choose_prompts(self, samples: Mapping[str, Any]) -> list[str]:
        """A prompt for each row: the sample's own, else one that is drawn for the whole batch, else the image alone."""
        if "instruction_input" in samples:  # whole prompts
            return list(samples["instruction_input"])
        drawn = random.choice(self.prompt_list) if self.prompt_list else IMAGE_PLACEHOLDER
        instructions = samples.get("instruction") or [None] * len(captions_of(samples))
        if any(instructions) and "{}" not in self.prompt_template:
            raise UserError("Samples have instructions, but model.prompt_template is not set; see the stage-2 YAML.")
        wrapped = f"<Img>{IMAGE_PLACEHOLDER}</Img> "
        return [self.prompt_template.format(wrapped + text) if text else drawn for text in instructions]


def captions_of(samples: Mapping[str, Any]) -> Sequence[str]:
    """The texts that are to be learned, one for each row of a batch."""
    return samples["text_input"] if "text_input" in samples else samples["answer"]


def _num_common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids two sequences begin with in common."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
