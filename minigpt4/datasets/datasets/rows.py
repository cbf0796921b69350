"""One row of a list, in the form of any known project, as a ``Pair`` or a ``Dialogue``; mistakes are reported."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from minigpt4.common.errors import UserError
from minigpt4.common.templates import IMAGE_MESSAGE
from minigpt4.common.utils import IMAGE_PLACEHOLDER
from minigpt4.datasets.datasets.conversations import DataUrl, Dialogue, ImageSource, Pair

MAX_TURNS = 1000  # pairs of question and answer; the rows of chat data have up to about 100
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant"}
_ROLES |= {"bing": "assistant", "bard": "assistant", "system": "system", "developer": "system"}
_MARKS = (IMAGE_PLACEHOLDER, "<image>")  # ours, and that of LLaVA
_EXPECTED = (
    "expected image and caption as texts, conversations or messages, instruction and output, or file_name and text; "
    "see dataset/README_OWN_DATA.md"
)


@dataclass(frozen=True)
class Location:
    """Where a row is, for messages, and the folder to which its image paths are relative."""

    text: str
    folder: Path

    def error(self, problem: str) -> UserError:
        """The error of this row."""
        return UserError(f"{self.text} {problem}.")

    def image(self, value: Any) -> ImageSource:
        """The image that a row names: a path, a file:// or data: URL, or what a table reads."""
        if not isinstance(value, str):
            if hasattr(value, "read"):
                return value
            raise self.error(f"has the image {_cut(value)}; expected a path")
        if value.startswith("data:"):
            if not value.partition(",")[0].endswith(";base64"):
                raise self.error(f"has the image '{_cut(value)}'; expected data:image/…;base64,… or a path")
            return DataUrl(value)
        if value.startswith("file://"):
            value = unquote(value.removeprefix("file://"))
        if "://" in value:
            raise self.error(f"has the image '{_cut(value)}'; expected a file: download it first")
        if "\\" in value and not os.path.isfile(self.folder / value):  # as Windows writes paths
            value = value.replace("\\", "/")
        return self.folder / value


def read_row(row: Any, where: Location) -> Pair | Dialogue:
    """A row by its keys; raises UserError where it has no known form or is not consistent."""
    keys = row.keys() if isinstance(row, dict) else set()
    for name in ("conversations", "messages"):
        if row_messages := name in keys and row[name]:
            return _read_messages(row, row_messages, where)
        if name in keys:
            raise where.error(f"has no turns in {name}; expected at least a question and its answer")
    if {"instruction", "output"} <= keys:
        return _read_alpaca(row, where)
    if "file_name" in keys:
        caption = next((row[name] for name in ("text", "caption") if name in keys), None)
        if isinstance(row["file_name"], str) and isinstance(caption, str):
            return Pair(where.image(row["file_name"]), caption)
        raise where.error(f"has {_describe(row)}; expected file_name with text or caption, both of them texts")
    caption = row.get("caption", row.get("text")) if "image" in keys else None
    if not isinstance(caption, str) or not (isinstance(row["image"], str) or hasattr(row["image"], "read")):
        raise where.error(f"is {_cut(row)}; {_EXPECTED}")
    instruction = row.get("instruction")
    if not isinstance(instruction, str | None) or any(mark in (instruction or "") for mark in _MARKS):
        expected = f"expected a text without {' and '.join(_MARKS)}, as the image always comes first"
        raise where.error(f"has the instruction '{_cut(instruction)}'; {expected}")
    return Pair(where.image(row["image"]), caption, instruction)


def _read_messages(row: Mapping[str, Any], messages: Any, where: Location) -> Dialogue:
    """LLaVA's and ShareGPT's from and value, OpenAI's role and content, and LLaMA-Factory's forms of both."""
    if isinstance(messages, dict) and all(isinstance(values, list) for values in messages.values()):
        # As the package datasets stores a Sequence of dicts.
        messages = [dict(zip(messages, values, strict=False)) for values in zip(*messages.values(), strict=False)]
    if not isinstance(messages, list):
        raise where.error(f"has conversations of type {type(messages).__name__}; expected a list of turns")
    system, texts, images = row.get("system") or "", [], _row_images(row, where)
    has_images = bool(images)
    for number, message in enumerate(messages, 1):
        tags = ("from", "value") if isinstance(message, dict) and "from" in message else ("role", "content")
        if not isinstance(message, dict) or not message.keys() >= set(tags):
            raise where.error(f"has turn {number} {_cut(message)}; expected from and value, or role and content")
        role, content = (message[tag] for tag in tags)
        if not isinstance(role, str) or role not in _ROLES:
            raise where.error(f"has the role '{_cut(role)}' in turn {number}; expected one of {', '.join(_ROLES)}")
        if message.get("weight") == 0:
            raise where.error(f"has the weight 0 in turn {number}; expected none, as every answer is trained")
        text, parts = _read_content(content, number, where)
        if has_images and parts:
            raise where.error(f"has images both in turn {number} and in its own key; expected one of the two")
        images += parts
        if _ROLES[role] == "system":
            if number > 1:
                raise where.error(f"has a system text in turn {number}; expected it in the first turn only")
            system = text
        else:
            texts.append((_ROLES[role], text))
    return _dialogue(images, texts, system, where)


def _read_content(content: Any, number: int, where: Location) -> tuple[str, list[ImageSource]]:
    """The text of a turn, with a mark for each image in its parts, and those images that the parts name."""
    if isinstance(content, str):
        return content, []
    if not isinstance(content, list):
        raise where.error(f"has turn {number} with {_cut(content)}; expected a text or a list of parts")
    text, images = "", []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            text += f" {part['text']}"  # as the API joins them
        elif kind in ("image_url", "image"):
            value = next((part[key] for key in ("image_url", "image", "url", "path") if part.get(key)), None)
            value = value.get("url") if isinstance(value, dict) else value
            images += [] if value is None else [where.image(value)]
            text += IMAGE_PLACEHOLDER
        else:
            raise where.error(f"has the part {_cut(part)} in turn {number}; expected the type text or image_url")
    return text, images


def _read_alpaca(row: Mapping[str, Any], where: Location) -> Dialogue:
    """LLaMA-Factory's instruction, input, output, history, system and images."""
    texts: list[tuple[str, Any]] = []
    history = row.get("history") or []
    if not isinstance(history, list):
        raise where.error(f"has the history {_cut(history)}; expected a list of questions and answers")
    for pair in history:
        if not isinstance(pair, list) or len(pair) != 2:
            raise where.error(f"has {_cut(pair)} in its history; expected lists of a question and an answer")
        texts += [("user", pair[0]), ("assistant", pair[1])]
    question = [text for text in (row["instruction"], row.get("input")) if text]
    if not all(isinstance(text, str) for text in question):
        raise where.error(f"has {_describe(row)}; expected instruction and input as texts")
    texts += [("user", "\n".join(question)), ("assistant", row["output"])]
    return _dialogue(_row_images(row, where), texts, row.get("system") or "", where)


def _row_images(row: Mapping[str, Any], where: Location) -> list[ImageSource]:
    if other := [key for key in ("video", "videos", "audio", "audios") if row.get(key)]:
        raise where.error(f"has the key {other[0]}; expected texts and images only")
    values = [row[key] for key in ("image", "images") if row.get(key)]
    return [where.image(image) for value in values for image in (value if isinstance(value, list) else [value])]


def _dialogue(images: list[ImageSource], texts: Sequence[tuple[str, Any]], system: Any, where: Location) -> Dialogue:
    """Checks roles, texts and the number of images; raises UserError for what cannot be trained."""
    if len(texts) > 2 * MAX_TURNS:
        raise where.error(f"has {len(texts):,} turns; expected at most {2 * MAX_TURNS:,}: divide it")
    if not isinstance(system, str):
        raise where.error(f"has the system text {_cut(system)}; expected a text")
    if any(mark in system for mark in _MARKS):
        raise where.error(f"has an image in the system text '{_cut(system)}'; expected images in questions only")
    for i, (role, text) in enumerate(texts):
        expected = ("user", "assistant")[i % 2]
        if role != expected:
            raise where.error(f"has text {i + 1} by the {role}; expected the {expected}, as both take turns")
        if not isinstance(text, str) or not text.strip():
            kind = "answer" if i % 2 else "question"
            raise where.error(f"has the {kind} {text!r} as text {i + 1}; expected a text that is not empty")
        if i % 2 and any(mark in text for mark in _MARKS):
            raise where.error(f"has an image in the answer '{_cut(text)}'; expected images in questions only")
    if not texts or len(texts) % 2:
        raise where.error("ends with a question; expected its answer" if texts else "has no turns; expected some")
    plain = [
        text.strip().replace(IMAGE_MESSAGE, IMAGE_PLACEHOLDER).replace("<image>", IMAGE_PLACEHOLDER)
        for _, text in texts
    ]
    if (num_marks := sum(text.count(IMAGE_PLACEHOLDER) for text in plain)) != len(images):
        raise where.error(f"has {len(images)} images and {num_marks} times {_MARKS[1]}; expected one for each image")
    return Dialogue(tuple(images), tuple(zip(plain[::2], plain[1::2], strict=True)), system.strip())


def _describe(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} ({type(value).__name__})" for key, value in list(row.items())[:8])


def _cut(value: Any) -> str:
    return str(value)[:80]
