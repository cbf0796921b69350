"""Conversations as prompts, and the choice of the chat template."""

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from itertools import groupby
from typing import Any

from minigpt4.common.errors import UserError, nearest, see
from minigpt4.common.schema import LATER
from minigpt4.common.utils import IMAGE_PLACEHOLDER

IMAGE_MESSAGE = f"<Img>{IMAGE_PLACEHOLDER}</Img>"
Turn = tuple[bool, str | None]  # whether it is the user's, and its text; None is the answer to come


class SeparatorStyle(Enum):
    """SINGLE ends messages with ``sep``; TWO ends those of the second role with ``sep2``; RENDER calls ``render``."""

    SINGLE = auto()
    TWO = auto()
    RENDER = auto()


@dataclass
class Conversation:
    """System text, two roles and their messages [role, text]; text None is the answer to come.

    ``role_delimiter`` goes between role and message. ``render`` maps system text and turns to a prompt; consecutive
    messages of one role, such as several images, are one turn. Keys and values are cached for conversations of the same
    ``owner`` only: from time and count of cached tokens, others could learn what was asked.
    """

    system: str
    roles: Sequence[str]
    messages: list[list[Any]]
    offset: int
    sep_style: SeparatorStyle = SeparatorStyle.SINGLE
    sep: str = "###"
    sep2: str | None = None
    skip_next: bool = False
    conv_id: Any = None
    role_delimiter: str = ": "
    render: Callable[[str, list[Turn]], str] | None = None
    owner: str = ""

    @property
    def stop_string(self) -> str:
        """The text that ends an answer; empty where only the end token does."""
        return self.sep if self.sep_style == SeparatorStyle.SINGLE else self.sep2 or self.sep

    @property
    def answer_marker(self) -> str:
        """The text that introduces an answer, as in "Assistant:"; empty where a template is rendered."""
        return "" if self.render else (self.roles[1] + self.role_delimiter).strip()

    def get_prompt(self) -> str:
        """The conversation as the text that the LM reads; a message without text ends with the bare ``Role:``."""
        if self.render is not None:
            turns = groupby(self.messages, lambda message: (message[0] == self.roles[0], message[1] is None))
            texts = [(kind, " ".join(text for _, text in messages if text)) for kind, messages in turns]
            return self.render(
                self.system, [(is_user, None if is_open else text) for (is_user, is_open), text in texts]
            )
        separators = (self.sep, self.sep2 if self.sep_style == SeparatorStyle.TWO else self.sep)
        prompt = self.system + self.sep
        for role, message in self.messages:  # by role and not by turns: several images may come in a row
            end = separators[role == self.roles[1]]
            prompt += role + (self.role_delimiter + message + end if message else self.role_delimiter.rstrip())
        return prompt

    def append_message(self, role: str, message: str | None) -> None:
        """Adds a message at the end."""
        self.messages.append([role, message])

    def add_system(self, text: str) -> None:
        """Adds a conversation's own system text behind the template's, as chats and training do."""
        self.system = f"{self.system} {text}".strip()

    def ask(self, text: str) -> None:
        """Adds a question; right after an image it joins the image's message."""
        last = self.messages[-1] if self.messages else None
        if last is not None and last[0] == self.roles[0] and last[1].endswith("</Img>"):
            last[1] = f"{last[1]} {text}"
        else:
            self.append_message(self.roles[0], text)

    def ask_with_images(self, question: str) -> None:
        """Adds the texts and images of a question in their order, as a chat does; ``<ImageHere>`` marks an image."""
        for i, text in enumerate(question.split(IMAGE_PLACEHOLDER)):
            if i:
                self.append_message(self.roles[0], IMAGE_MESSAGE)
            if text.strip():
                self.ask(text.strip())

    def to_gradio_chatbot(self) -> list[list[str | None]]:
        """The messages after ``offset`` as pairs [question, answer]."""
        texts = [text for _, text in self.messages[self.offset :]]
        return [[*texts[i : i + 2], None][:2] for i in range(0, len(texts), 2)]

    def copy(self) -> "Conversation":
        """A conversation with its own list of messages."""
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
)
# The same model under the later names of the reference, whose roles include the delimiter.
CONV_VISION_Vicuna0 = replace(CONV_VISION, roles=("Human: ", "Assistant: "), messages=[], role_delimiter="")
CONV_VISION_LLama2 = replace(CONV_VISION_Vicuna0, roles=("<s>[INST] ", " [/INST] "), messages=[], sep="")
CONV_VISION_minigptv2 = replace(CONV_VISION_LLama2, system="", roles=("<s>[INST] ", " [/INST]"), messages=[])
TEMPLATES = {
    "vicuna_v0": CONV_VISION,
    "vicuna_v1": Conversation(
        system="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
        roles=("USER", "ASSISTANT"), messages=[], offset=2, sep_style=SeparatorStyle.TWO, sep=" ", sep2="</s>",
    ),
    "llama_2": CONV_VISION_LLama2,
    "minigpt_v2": CONV_VISION_minigptv2,
}  # fmt: skip
# Of the later family by arch: the first one whose form the projection was trained with.
_LATER_TEMPLATES = dict(zip(LATER, ((CONV_VISION_Vicuna0, CONV_VISION_LLama2), (CONV_VISION_minigptv2,)), strict=True))


def choose_template(model_cfg: Any, tokenizer: Any) -> Conversation:
    """The chat template of a ``model`` section and the LM's tokenizer; UserError where ``conversation`` is unknown.

    1. What the projection was trained with, ``prompt_template`` and ``end_sym``: ``conversation``'s or Vicuna v0's
       template where that has this form (both add a system text), else the form itself.
    2. The template named ``conversation``, or that of ``arch`` in the later family.
    3. The tokenizer's own chat template.
    4. Vicuna v0's, with a warning.
    """
    name, form, end_sym = model_cfg.conversation, model_cfg.prompt_template, model_cfg.end_sym
    if name is not None and name not in TEMPLATES:
        known = ", ".join(TEMPLATES)
        raise UserError(f"model.conversation is '{name}'.{nearest(name, TEMPLATES)} Known templates: {known}.")
    named = TEMPLATES.get(name)
    if named is not None and (not form or _has_form(named, form, end_sym)):
        return named
    if named is not None:
        logging.warning(
            "model.conversation: %s is ignored, because the projection was trained with another template: "
            "model.prompt_template is '%s' and model.end_sym '%s'." + see("the-wrong-vicuna-version"),
            *(name, form, end_sym),
        )
    candidates = _LATER_TEMPLATES.get(model_cfg.arch, (CONV_VISION,))
    if form:
        fitting = (template for template in candidates if _has_form(template, form, end_sym))
        return next(fitting, None) or _from_prompt_template(form, end_sym)
    if getattr(tokenizer, "chat_template", None):
        return _from_chat_template(tokenizer)
    logging.warning(
        "Neither model.prompt_template nor model.conversation is set, and the tokenizer has no chat template: "
        "vicuna_v0's is used ('###Human: … ###Assistant:'); set model.conversation if the model needs another one."
    )
    return CONV_VISION


def _has_form(template: Conversation, form: str, end_sym: str) -> bool:
    """Whether a template without its system text writes questions and ends answers as ``form`` does."""
    conv = replace(template, system="", messages=[[template.roles[0], "{}"], [template.roles[1], None]])
    prompt = conv.get_prompt().removeprefix("<s>")  # of Llama 2, where only the end token ends an answer
    return "".join(prompt.split()) == "".join(form.split()) and (conv.stop_string or "</s>") == end_sym.strip()


def _from_prompt_template(form: str, end_sym: str) -> Conversation:
    """Turns as in training: ``form`` with the question in place of ``{}``, the answer, ``end_sym``."""

    def render(system: str, turns: list[Turn]) -> str:
        texts = [form.format(text) if is_user else text + end_sym for is_user, text in turns if text is not None]
        return (f"{system} " if system else "") + "".join(texts)

    return Conversation("", ("user", "assistant"), [], 2, SeparatorStyle.RENDER, "", end_sym, render=render)


def _from_chat_template(tokenizer: Any) -> Conversation:
    """The tokenizer's own chat template, without the text of the begin token, which ``Chat`` adds as an id."""
    from jinja2 import TemplateError

    def apply(system: str, turns: list[Turn]) -> str:
        messages = [{"role": "system", "content": system}] if system else []
        for is_user, text in turns:
            if text is not None:
                messages.append({"role": "user" if is_user else "assistant", "content": text})
        is_asking = bool(turns) and turns[-1][1] is None
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=is_asking)

    def render(system: str, turns: list[Turn]) -> str:
        try:
            prompt = apply(system, turns)
        except TemplateError:  # some, as Gemma's, have no system role
            try:
                (is_user, text), *rest = turns
                prompt = apply("", [(is_user, f"{system}\n\n{text}".strip()), *rest])
            except (TemplateError, ValueError) as error:
                raise UserError(
                    f"The tokenizer's chat template does not accept this conversation ({error}); "
                    "start another one, or set model.conversation to use another template."
                ) from error
        return prompt.removeprefix(tokenizer.bos_token or "")

    # What follows an answer: the token that ends a turn, or the first line where that is plain text.
    end = render("", [(True, "Q"), (False, "ANSWER")]).rpartition("ANSWER")[2].strip() or tokenizer.eos_token or ""
    tokens = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    default = end.splitlines()[0] if end else ""
    stop_string = max((token for token in tokens if end.startswith(token)), key=len, default=default)
    return Conversation("", ("user", "assistant"), [], 2, SeparatorStyle.RENDER, "", stop_string, render=render)
