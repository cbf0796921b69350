"""Token ids of a conversation's prompt, shortened by its oldest turns where it is longer than the context."""

import bisect
import logging
from dataclasses import replace
from typing import NamedTuple

from minigpt4.common.errors import UserError
from minigpt4.common.templates import IMAGE_MESSAGE, Conversation
from minigpt4.common.utils import IMAGE_PLACEHOLDER
from minigpt4.models.mini_gpt4 import IMAGE_TOKEN_INDEX, MiniGPT4


class Context(NamedTuple):
    """Token ids of a prompt, with image positions, and how many of the oldest turns were left out."""

    ids: list[int]
    num_dropped_turns: int


def build_context(model: MiniGPT4, conv: Conversation, num_images: int, capacity: int) -> Context:
    """The prompt that asks for an answer in at most ``capacity`` ids; the oldest turns are left out, their images stay.

    Raises:
        UserError: there are more or fewer placeholders than images, or the last question alone is too long.
    """
    prompt_conv = conv.copy()
    prompt_conv.append_message(conv.roles[1], None)
    num_placeholders = prompt_conv.get_prompt().count(IMAGE_PLACEHOLDER)
    if num_placeholders != num_images:
        message = f"The conversation shows {num_placeholders} images and {num_images} were given; start a new chat."
        raise UserError(message)

    def tokenize(conv: Conversation) -> list[int]:
        return [*model.bos_ids, *model.tokenize_prompt(conv.get_prompt())]

    if len(ids := tokenize(prompt_conv)) <= capacity:
        return Context(ids, 0)
    shorter: list[Conversation] = []  # without the oldest turn, without the two oldest ones, …
    while drop_oldest_turn(prompt_conv):
        shorter.append(replace(prompt_conv, messages=list(prompt_conv.messages)))
    # By bisection, a long chat is tokenized a few times and not once for each of its turns.
    num_before = bisect.bisect_left(shorter, True, key=lambda conv: len(tokenize(conv)) <= capacity)
    if num_before == len(shorter):
        ids = tokenize(prompt_conv)
        num_image_ids = sum(i == IMAGE_TOKEN_INDEX for i in ids)
        raise UserError(
            f"The question is too long: the prompt has {len(ids)} tokens ({num_image_ids} of them images), "
            f"and {capacity} fit beside the answer; shorten it, or ask for a shorter answer (max_new_tokens)."
        )
    logging.warning("The chat is longer than the context: its %d oldest turns were left out.", num_before + 1)
    return Context(tokenize(shorter[num_before]), num_before + 1)


def drop_oldest_turn(conv: Conversation) -> bool:
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
