"""A chat of the web page: its turns, the messages that model and page get, and the JSON in which it is kept."""

import base64
import html
import io
import json
import logging
import secrets
import shutil
import tempfile
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from PIL import Image
from pydantic import BaseModel, Field, ValidationError
from torch import Tensor

from minigpt4.common.errors import UserError
from minigpt4.serve.page_texts import Refusal

MAX_IMAGES = 16  # of a chat
MAX_SHOWN_SIDE = 1024
MAX_KEPT_SIDE = 512  # more than any model sees
MAX_TURNS, MAX_CHARACTERS = 500, 20_000  # of a chat that is opened, and of each of its texts


@dataclass(eq=False)
class Picture:
    """An image of a chat: the file that the page shows, and the processed tensor [3, S, S] for each model."""

    path: str
    pixels: list[Tensor]

    @cached_property
    def kept(self) -> str:
        """A data URL that is small enough for the browser's storage."""
        image, data = Image.open(self.path), io.BytesIO()  # a file that this server has written
        image.thumbnail((MAX_KEPT_SIDE, MAX_KEPT_SIDE))
        image.save(data, "webp")
        return _data_url(data.getvalue())


@dataclass(eq=False)
class Turn:
    """A question, its images, and for each model its answer and how that was rated."""

    question: str
    pictures: list[Picture] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)  # none until there is one
    ratings: dict[int, bool | None] = field(default_factory=dict)  # by model; True: good
    is_growing: bool = False  # its answers are not complete


@dataclass(eq=False)
class Session:
    """One open page: its chat, the folder of the images that it shows, and what is being answered."""

    turns: list[Turn] = field(default_factory=list)
    job: Any = None  # replaced or removed when the chat changes
    folder: Path | None = None

    def new_file(self, parent: Path, suffix: str = ".webp") -> Path:
        """The path of a file for the page; the folder is deleted with the session."""
        if self.folder is None:
            self.folder = Path(tempfile.mkdtemp(prefix="kept-", dir=parent))
            weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        return self.folder / f"{secrets.token_hex(16)}{suffix}"

    def delete_files(self) -> None:
        """Deletes saved chats, and the images that the page no longer shows."""
        shown = {picture.path for turn in self.turns for picture in turn.pictures}
        for file in self.folder.iterdir() if self.folder else ():
            if file.is_dir():  # a saved chat
                shutil.rmtree(file, ignore_errors=True)
            elif str(file.with_stem(file.stem.partition("-")[0])) not in shown:  # boxes are drawn on others
                file.unlink(missing_ok=True)


def save_shown(image: Image.Image, path: Path) -> str:
    """Writes an image in the size of the page, in a format that every browser reads."""
    image.thumbnail((MAX_SHOWN_SIDE, MAX_SHOWN_SIDE))
    image.save(path)
    return str(path)


def literal(text: str) -> dict[str, str]:
    """A text of the chat, which would show HTML; only what needs it is escaped, as its copy button copies that."""
    is_html = "<" in text or html.unescape(text) != text
    return {"type": "text", "text": html.escape(text, quote=False) if is_html else text}


def shown_messages(
    turns: Sequence[Turn], model: int, empty: str, figure: Callable[[str, str, str], str | None] | None = None
) -> list[dict[str, Any]]:
    """The messages of one model's chat as the page shows them; ``turn_of`` maps them back.

    ``empty`` stands for an answer without a text: it was stopped or failed before its first token. ``figure`` returns
    the HTML of an answer with boxes, from question, answer and the path of the last image.
    """
    messages, picture = [], None

    def shown(turn: Turn, answer: str) -> dict[str, str]:
        drawn = figure(turn.question, answer, picture) if figure and picture and not turn.is_growing else None
        return {"type": "text", "text": drawn} if drawn else literal(answer or empty)

    for turn in turns:
        picture = turn.pictures[-1].path if turn.pictures else picture
        messages += [{"role": "user", "content": {"path": picture.path}} for picture in turn.pictures]
        messages.append({"role": "user", "content": literal(turn.question)})
        answers = turn.answers[model : model + 1]
        messages += [{"role": "assistant", "content": shown(turn, answer)} for answer in answers]
    return messages


def turn_of(turns: Sequence[Turn], index: int) -> int:
    """The turn that a shown message belongs to; IndexError if there is none."""
    places = [i for i, turn in enumerate(turns) for _ in range(len(turn.pictures) + 1 + bool(turn.answers))]
    return places[index]


def model_messages(turns: Sequence[Turn], model: int) -> list[tuple[str, list[str | Tensor]]]:
    """The messages of an engine's request, which ends with the last question."""
    messages: list[tuple[str, list[str | Tensor]]] = []
    for i, turn in enumerate(turns):
        messages.append(("user", [*(picture.pixels[model] for picture in turn.pictures), turn.question]))
        if turn.answers and i < len(turns) - 1:
            messages.append(("assistant", [turn.answers[model]]))
    return messages


_Text = Annotated[str, Field(max_length=MAX_CHARACTERS)]


class KeptTurn(BaseModel):
    """A turn of a kept chat; images are data URLs."""

    question: _Text
    images: list[str] = []
    answers: list[_Text] = Field([], max_length=16)


class KeptChat(BaseModel):
    """A chat as JSON: in a file that the user saves, and in the browser's storage."""

    minigpt4_chat: int = Field(ge=1, le=1)  # the version of this format
    models: list[_Text] = Field([], max_length=16)
    turns: list[KeptTurn] = Field(max_length=MAX_TURNS)


def to_json(turns: Sequence[Turn], models: Sequence[str], is_small: bool = False) -> dict[str, Any]:
    """A chat in the format of ``KeptChat``; a small one has its images in ``MAX_KEPT_SIDE``."""
    kept = [
        {
            "question": turn.question,
            "images": [p.kept if is_small else _data_url(Path(p.path).read_bytes()) for p in turn.pictures],
            "answers": turn.answers,
        }
        for turn in turns
    ]
    return {"minigpt4_chat": 1, "models": list(models), "turns": kept}


def parse_kept(data: bytes | dict[str, Any]) -> KeptChat:
    """Validates a kept chat; raises Refusal."""
    try:
        chat = KeptChat.model_validate_json(data) if isinstance(data, bytes) else KeptChat.model_validate(data)
    except ValidationError as error:
        logging.info("A saved chat was refused: %s", error.errors()[0]["msg"])
        raise Refusal("bad_chat") from error
    if (count := sum(len(turn.images) for turn in chat.turns)) > MAX_IMAGES:
        raise Refusal("chat_images", count=count, limit=MAX_IMAGES)
    return chat


def read_data_url(url: str) -> bytes:
    """The bytes of an image in a kept chat; ValueError for any other text."""
    head, _, data = url.partition(",")
    if not head.startswith("data:image/") or not head.endswith(";base64"):
        raise ValueError("an image is no data URL")
    return base64.b64decode(data, validate=True)


def _data_url(data: bytes) -> str:
    return "data:image/webp;base64," + base64.b64encode(data).decode()


def answers_of(kept: KeptTurn, num_models: int) -> list[str]:
    """The answers of a kept turn for this page's models; where there were fewer models, those of the first."""
    return [kept.answers[i if i < len(kept.answers) else 0] for i in range(num_models) if kept.answers]


def rated_messages(turns: Sequence[Turn], model: int) -> list[dict[str, Any]]:
    """A conversation for the file of ratings, with its images."""
    messages = []
    for turn in turns:
        messages.append({"role": "user", "content": turn.question, "images": [p.kept for p in turn.pictures]})
        messages += [{"role": "assistant", "content": answer} for answer in turn.answers[model : model + 1]]
    return messages


def check_writable(file: Path) -> Path:
    """The file, to which rows can be appended; UserError if not."""
    try:
        file.open("ab").close()
    except OSError as error:
        raise UserError(f"--feedback: {file} cannot be written ({error.strerror}); give another file.") from error
    return file


def append_row(file: Path, row: dict[str, Any]) -> None:
    """Appends a line to a JSONL file, in one write."""
    with file.open("ab", buffering=0) as output:
        output.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
