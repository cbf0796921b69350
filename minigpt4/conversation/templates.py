"""Conversations as prompts, and the templates that the LMs were trained with, as data."""

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from minigpt4.common.errors import UserError, nearest, see


class SeparatorStyle(Enum):
    """SINGLE closes every message with ``sep``; TWO closes those of the second role with ``sep2``; LLAMA_2 brackets."""

    SINGLE = auto()
    TWO = auto()
    LLAMA_2 = auto()


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

    @property
    def stop_string(self) -> str:
        """The text that ends an answer."""
        return self.sep if self.sep_style == SeparatorStyle.SINGLE else self.sep2 or self.sep

    def get_prompt(self) -> str:
        """The conversation as the text that the LM reads; a message without text ends with the bare ``Role:``."""
        if self.sep_style == SeparatorStyle.LLAMA_2:
            return self._llama_2_prompt()
        separators = (self.sep, self.sep2 if self.sep_style == SeparatorStyle.TWO else self.sep)
        prompt = self.system + self.sep
        for role, message in self.messages:  # by role and not by turns: several images may come in a row
            prompt += f"{role}: {message}{separators[role == self.roles[1]]}" if message else f"{role}:"
        return prompt

    def _llama_2_prompt(self) -> str:
        prompt, system = "", f"<<SYS>>\n{self.system}\n<</SYS>>\n\n"
        for role, message in self.messages:
            if role == self.roles[0]:
                prompt += f"{'<s>' if prompt else ''}[INST] {system}{message} [/INST]"
                system = ""
            elif message:
                prompt += f" {message} {self.sep2}"
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
TEMPLATES = {
    "vicuna_v0": CONV_VISION,
    "vicuna_v1": Conversation(
        system="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
        roles=("USER", "ASSISTANT"),
        messages=[],
        offset=2,
        sep_style=SeparatorStyle.TWO,
        sep=" ",
        sep2="</s>",
    ),
    "llama_2": Conversation(
        system=CONV_VISION.system,
        roles=("[INST]", "[/INST]"),
        messages=[],
        offset=2,
        sep_style=SeparatorStyle.LLAMA_2,
        sep="",
        sep2="</s>",
    ),
}
_VICUNA_VOCABULARIES = {32001: "vicuna_v0", 32000: "vicuna_v1"}


def usual_template(vocab_size: int) -> str | None:
    """The name of the template that an LM of this vocabulary was trained with, None where nobody knows."""
    return _VICUNA_VOCABULARIES.get(vocab_size)


def choose_template(name: str | None, vocab_size: int) -> Conversation:
    """The template of ``model.conversation``, or the one that an LM of this vocabulary was trained with.

    Vicuna v0 added a pad token (32001 entries); v1.1 and later, and Llama-2, have 32000. Other LMs get Vicuna v0's.

    Raises:
        UserError: there is no template of that name.
    """
    usual = usual_template(vocab_size)
    if name is None:
        return TEMPLATES[usual or "vicuna_v0"]
    if name not in TEMPLATES:
        raise UserError(
            f"model.conversation is '{name}'.{nearest(name, TEMPLATES)} Known templates: {', '.join(TEMPLATES)}."
        )
    if usual and (name == "vicuna_v0") != (usual == "vicuna_v0"):
        logging.warning(
            "model.conversation is %s, but an LM with %d tokens usually speaks %s; wrong answers or answers that "
            "do not end would come from that." + see("the-wrong-vicuna-version"),
            *(name, vocab_size, usual),
        )
    return TEMPLATES[name]
