"""Token ids of a conversation's prompt, shortened by its oldest turns where it is longer than the context."""

import bisect
import functools
import logging
from dataclasses import replace
from typing import Any, NamedTuple

from minigpt4.common.errors import ContextTooLong, UserError
from minigpt4.common.templates import IMAGE_MESSAGE, Conversation
from minigpt4.common.utils import IMAGE_PLACEHOLDER
from minigpt4.models.mini_gpt4 import MiniGPT4


class Context(NamedTuple):
    """Token ids of a prompt, with image positions, and how many of the oldest turns were left out."""

    ids: list[int]
    num_dropped_turns: int


def build_context(model: MiniGPT4, conv: Conversation, num_images: int, capacity: int) -> Context:
    """The prompt that asks for an answer in at most ``capacity`` ids; the oldest turns are left out, their images stay.

    Raises:
        UserError: there are more or fewer placeholders than images, or the last question is too long (ContextTooLong).
    """
    prompt_conv = conv.copy()
    prompt_conv.append_message(conv.roles[1], None)
    num_placeholders = prompt_conv.get_prompt().count(IMAGE_PLACEHOLDER)
    if num_placeholders != num_images:
        message = f"The conversation shows {num_placeholders} images and {num_images} were given; start a new chat."
        raise UserError(message)

    def tokenize(conv: Conversation) -> list[int]:
        return [*model.bos_ids, *model.tokenize_prompt(conv.get_prompt())]

    shorter = [replace(prompt_conv, messages=list(prompt_conv.messages))]  # and without 1, 2, … of the oldest turns
    while drop_oldest_turn(prompt_conv):
        shorter.append(replace(prompt_conv, messages=list(prompt_conv.messages)))
    longest = _longest_token(model.llama_tokenizer)
    ids = functools.cache(lambda i: tokenize(shorter[i]))

    def fits(i: int) -> bool:  # what cannot fit with the longest tokens is not tokenized: a book would take seconds
        return len(shorter[i].get_prompt()) <= capacity * longest and len(ids(i)) <= capacity

    # By bisection, a long chat is tokenized a few times and not once for each of its turns.
    last = len(shorter) - 1
    num_dropped = 0 if fits(0) else bisect.bisect_left(range(len(shorter)), True, lo=1, key=fits)
    if num_dropped <= last:
        if num_dropped:
            logging.warning("The chat is longer than the context: its %d oldest turns were left out.", num_dropped)
        return Context(ids(num_dropped), num_dropped)
    num_characters = len(shorter[last].get_prompt())
    is_huge = num_characters > capacity * longest
    num_tokens = num_characters // longest if is_huge else len(ids(last))
    num_image_ids = num_images * model.num_query_token
    raise ContextTooLong(
        f"The question is too long: the prompt has {'at least ' * is_huge}{num_tokens} tokens ({num_image_ids} of them "
        f"images), and {capacity} fit beside the answer; shorten it, or ask for a shorter answer (max_new_tokens)."
    )


@functools.lru_cache(maxsize=8)
def _longest_token(tokenizer: Any) -> int:
    """Characters of the longest token."""
    return max(map(len, tokenizer.get_vocab()))


def drop_oldest_turn(conv: Conversation) -> bool:
    """Removes the oldest turn in place, keeping its images; False where only what follows the last answer is left."""
    answers = [i for i, (role, text) in enumerate(conv.messages) if role == conv.roles[1] and text is not None]
    for i, (role, text) in enumerate(conv.messages[: max(answers, default=-1) + 1]):
        if role == conv.roles[1]:
            question = conv.messages[i - 1] if i else None
            images = (question[1] or "").count(IMAGE_PLACEHOLDER) if question else 0
            conv.messages[max(i - 1, 0) : i + 1] = [[conv.roles[0], IMAGE_MESSAGE] for _ in range(images)]
            return True
        if IMAGE_PLACEHOLDER not in (text or ""):
            del conv.messages[i]
            return True
    return False
