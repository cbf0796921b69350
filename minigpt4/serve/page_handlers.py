"""What the parts of the web page do: sending, editing, rating, saving and reopening of chats."""

import json
from dataclasses import replace
from datetime import datetime
from typing import Any
from urllib.parse import quote

import gradio as gr
from pydantic import ValidationError

from minigpt4.serve import page_chat
from minigpt4.serve.page_answers import Answers, Changes
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
        options["seed"] = (options["seed"] or 0) + 1

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
        """Takes the last question back, to the box if that is empty."""
        if session.job or not session.turns:  # the job ends a moment after its last update
            return self.warn(Refusal("busy" if session.job else "forgotten"), request)
        *session.turns, last = session.turns
        changes = self.show(session.turns) | self.say() | (await self.keep(session, request))[0]
        if not message["text"] and not message["files"]:
            changes |= {self.box: {"text": last.question, "files": [picture.path for picture in last.pictures]}}
        return changes

    async def stop(self, session: Session) -> None:
        """Ends the answer, waiting or growing; its text so far is kept."""
        if session.job:
            session.job.stop()

    async def clear(self, session: Session) -> Changes:
        """Starts a new chat, whatever is being answered."""
        if session.job:
            session.job.stop()
        session.turns, session.job = [], None
        session.delete_files()
        return self.show([]) | self.say() | self.buttons(False, EMPTY_BOX) | {self.kept: {}}

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
            return self.warn(Refusal("no_chat"), request) | {self.export: ""}
        text = json.dumps(page_chat.to_json(session.turns, self.names), ensure_ascii=False)
        file = session.new_file(self.folder, f"minigpt4-chat-{datetime.now():%Y%m%d-%H%M%S}-", ".json")
        file.write_text(text, encoding="utf-8")
        return {self.export: f"[{file.name}](gradio_api/file={quote(str(file))})"}

    async def open_file(self, session: Session, data: bytes, request: gr.Request) -> Changes:
        """Shows a chat that was saved as a file, in place of the present one."""
        before = session.turns
        changes = await self.load(session, data, request)
        return changes if session.turns is before else changes | (await self.keep(session, request))[0]

    async def restore(self, session: Session, kept: dict[str, Any], request: gr.Request) -> Changes:
        """Shows the chat that the browser has stored, after a reload of the page or a restart of the server."""
        return await self.load(session, kept, request) if kept and not session.turns else self.say()

    async def read_kept(self, data: bytes | dict[str, Any], session: Session, request: gr.Request) -> list[Turn]:
        """The turns of a kept chat; a ValueError says what is wrong with it."""
        turns = []
        for kept in page_chat.parse_kept(data).turns:
            images = [page_chat.read_data_url(url) for url in kept.images]
            pictures = [await self.read(image, "an image", session, request) for image in images]
            turns.append(Turn(kept.question, pictures, page_chat.answers_of(kept, len(self.models))))
        return turns

    async def load(self, session: Session, data: bytes | dict[str, Any], request: gr.Request) -> Changes:
        """Replaces the chat by a kept one."""
        try:
            if session.job:
                raise Refusal("busy")
            turns = await self.read_kept(data, session, request)
        except Refusal as error:
            return self.warn(error, request)
        except ValidationError as error:
            return self.warn(Refusal("bad_chat", reason=error.errors()[0]["msg"]), request)
        except ValueError as error:  # a UserError, too
            return self.warn(Refusal("bad_chat", reason=error), request)
        except Exception as error:
            return self.warn(error, request)
        session.turns = turns
        session.delete_files()
        return {self.session: session} | self.show(turns) | self.say()
