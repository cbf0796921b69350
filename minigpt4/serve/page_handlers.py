"""What the parts of the web page do: sending, editing, rating, saving and reopening of chats."""

import json
import logging
import shutil
import tempfile
from dataclasses import replace
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr

from minigpt4.serve import page_chat
from minigpt4.serve.page_answers import MAX_SEED, Answers, Changes
from minigpt4.serve.page_chat import Session, Turn
from minigpt4.serve.page_texts import Refusal, localized

QUESTION = "Describe this image in detail."  # of images that come without one
MAX_FEEDBACK_BYTES = 2**30
EMPTY_BOX = {"text": "", "files": []}


class PageHandlers(Answers):
    """The handlers of the page's events, which change the session in place and return the components that change."""

    async def submit(
        self, session: Session, message: dict[str, Any], kept: Any, request: gr.Request, *values: Any
    ) -> Changes:
        """Answers the message in the box, which keeps it if it is refused.

        ``kept`` is what the browser has stored: the chat's beginning, if the server has been restarted meanwhile.
        """
        question, files = (message["text"] or "").strip(), message["files"]

        async def prepare() -> list[Turn]:
            if not question and not files:
                raise Refusal("nothing")
            if kept and not session.turns and "too_large" in kept:
                raise Refusal("lost")
            turns = session.turns or (await self.read_kept(kept, session, request) if kept else [])
            return [*turns, await self.new_turn(turns, question or QUESTION, files, session, request)]

        return await self.accept(session, request, values, prepare, accepted=EMPTY_BOX)

    async def run_example(
        self, session: Session, example: tuple[str, str], request: gr.Request, *values: Any
    ) -> Changes:
        """Answers a question about an image of the server."""
        path, question = example

        async def prepare() -> list[Turn]:
            turns = session.turns
            return [*turns, await self.new_turn(turns, question, [path], session, request)]

        return await self.accept(session, request, values, prepare)

    async def regenerate(self, session: Session, request: gr.Request, *values: Any) -> Changes:
        """Answers the last question again, with the next seed."""
        options = dict(zip(self.settings, values, strict=True))
        options["seed"] = ((options["seed"] or 0) + 1) % (MAX_SEED + 1)

        async def prepare() -> list[Turn]:
            if not session.turns:
                raise Refusal("forgotten")
            return [*session.turns[:-1], replace(session.turns[-1], answers=[], ratings={})]

        changes = await self.accept(session, request, [*options.values()], prepare)
        return changes | {self.settings["seed"]: options["seed"]}

    async def edit(
        self, session: Session, message: dict[str, Any], event: gr.EditData, request: gr.Request, *values: Any
    ) -> Changes:
        """Asks an earlier question in other words; what followed it goes. A refused one moves to an empty box."""
        question = str(event.value).strip()

        async def prepare() -> list[Turn]:
            if not question:
                raise Refusal("nothing")
            if not session.turns:
                raise Refusal("forgotten")
            index = page_chat.turn_of(session.turns, event.index)
            return [*session.turns[:index], Turn(question, session.turns[index].pictures)]

        refused = None if message["text"] else message | {"text": question}
        return await self.accept(session, request, values, prepare, refused=refused)

    async def undo(self, session: Session, message: dict[str, Any], request: gr.Request) -> Changes:
        """Takes the last question back to the box, which has to be empty."""
        if session.job or not session.turns:  # the job ends a moment after its last update
            return self.warn(Refusal("busy" if session.job else "forgotten"), request)
        if message["text"] or message["files"]:
            return self.warn(Refusal("box_full"), request)
        *turns, last = session.turns
        files, folder = [], Path(tempfile.mkdtemp(dir=self.folder))  # deleted like an upload
        for number, picture in enumerate(last.pictures, 1):
            files.append(shutil.copy(picture.path, f"{folder}/image{number}.webp"))
        session.turns = turns
        changes = self.show(turns, request) | self.say() | (await self.keep(session, request))[0]
        return changes | {self.box: {"text": last.question, "files": files}}

    async def stop(self, session: Session) -> None:
        """Ends the answer, waiting or growing; its text so far is kept."""
        if session.job:
            session.job.stop()

    async def clear(self, session: Session, request: gr.Request) -> Changes:
        """Starts a new chat, whatever is being answered; where there was none, the box keeps what is in it."""
        box = EMPTY_BOX if session.turns or session.job else None
        if session.job:
            session.job.stop()
        session.turns, session.job = [], None
        session.delete_files()
        return self.show([], request) | self.say() | self.buttons(False, box) | {self.kept: {}, self.export: ""}

    def rate(self, session: Session, model: int, event: gr.LikeData, request: gr.Request, *values: Any) -> Changes:
        """Stores a rating, or that it was taken back."""
        rating = event.liked if isinstance(event.liked, bool) else None
        try:
            if session.job:
                raise Refusal("busy")
            index = page_chat.turn_of(session.turns, event.index)
            turn = session.turns[index]
            if turn.ratings.get(model) == rating:
                return self.nothing()
            if self.feedback.exists() and self.feedback.stat().st_size > MAX_FEEDBACK_BYTES:
                raise Refusal("feedback_full")
            page_chat.append_row(self.feedback, {
                "time": datetime.now().astimezone().isoformat("T", "seconds"),
                "model": self.names[model],
                "settings": dict(zip(self.settings, values, strict=True)),
                "rating": {True: "up", False: "down"}.get(rating),
                "conversation": page_chat.rated_messages(session.turns[: index + 1], model),
            })  # fmt: skip
            turn.ratings[model] = rating
        except Exception as error:  # no place on the disk, for example
            return self.warn(error, request)
        return self.say(localized(request, "rated"))

    def save(self, session: Session, request: gr.Request) -> Changes:
        """A link to a file of the chat; the file is deleted with the next message, or the session."""
        if not session.turns:
            return self.beside_files(self.warn(Refusal("no_chat"), request))
        text = json.dumps(page_chat.to_json(session.turns, self.names), ensure_ascii=False)
        file = session.new_file(self.folder, "") / f"minigpt4-chat-{datetime.now():%Y%m%d-%H%M%S}.json"
        file.parent.mkdir()
        file.write_text(text, encoding="utf-8")
        return {self.export: f"[{file.name}](gradio_api/file={quote(str(file))})"}

    def beside_files(self, changes: Changes) -> Changes:
        """The status line's text below the buttons for files, where it is seen on a phone, too."""
        return {self.export if part is self.status else part: value for part, value in changes.items()}

    async def open_file(self, session: Session, data: bytes, request: gr.Request) -> Changes:
        """Shows a chat that was saved as a file, in place of the present one."""
        before = session.turns
        changes = await self.load(session, data, request)
        if session.turns is before:
            return self.beside_files(changes)
        return changes | (await self.keep(session, request))[0]

    async def restore(self, session: Session, kept: dict[str, Any], request: gr.Request) -> Changes:
        """Shows the chat that the browser has stored, after a reload of the page or a restart of the server."""
        if not kept or session.turns:
            return self.say()
        if "too_large" in kept:
            return self.warn(Refusal("lost"), request)
        return await self.load(session, kept, request)

    async def read_kept(self, data: bytes | dict[str, Any], session: Session, request: gr.Request) -> list[Turn]:
        """The turns of a kept chat; a Refusal or UserError says what is wrong with it."""
        turns, numbers, chat = [], count(1), self.models[0].engine.chat
        for kept in page_chat.parse_kept(data).turns:
            chat.ask(kept.question, chat.template.copy())  # refuses marks of images
            pictures = []
            for url, number in zip(kept.images, numbers, strict=False):
                try:
                    pictures.append(await self.read(page_chat.read_data_url(url), "an image", session, request))
                except ValueError as error:  # a UserError, too
                    logging.info("A saved chat was refused: %s", error)
                    raise Refusal("bad_image", number=number) from error
            turns.append(Turn(kept.question, pictures, page_chat.answers_of(kept, len(self.models))))
        if turns and not turns[-1].answers:  # the server or the page ended meanwhile
            turns[-1].answers = [""] * len(self.models)
        return turns

    async def load(self, session: Session, data: bytes | dict[str, Any], request: gr.Request) -> Changes:
        """Replaces the chat by a kept one."""
        try:
            if session.job:
                raise Refusal("busy")
            turns = await self.read_kept(data, session, request)
        except Exception as error:
            return self.warn(error, request)
        session.turns = turns
        session.delete_files()
        is_interrupted = turns and not any(turns[-1].answers)
        status = self.say(localized(request, "interrupted")) if is_interrupted else self.say()
        return {self.session: session, self.export: ""} | self.show(turns, request) | status
