"""Texts as rows of token ids: prompts with image positions, and training rows with their labels."""

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from minigpt4.common.errors import UserError
from minigpt4.common.utils import IMAGE_PLACEHOLDER

IMAGE_TOKEN_INDEX = -1  # in a list of token ids: one image embedding goes here
IGNORE_INDEX = -100  # label of a position that is no target


class TextRow(NamedTuple):
    """Token ids of a training row, image positions included, and the label of each."""

    ids: list[int]
    labels: list[int]


class TextRows:
    """The part of ``MiniGPT4`` that tokenizes; its attributes are described there."""

    llama_tokenizer: Any
    num_query_token: int
    prompt_list: list[str]
    prompt_template: str
    max_txt_len: int
    end_sym: str

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
