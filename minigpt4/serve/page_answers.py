"""How the web page answers: images are read, questions go to the engines, and the growing answers to the page."""

import asyncio
import json
import logging
import queue
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import torch

from minigpt4.common.boxes import phrase_boxes
from minigpt4.common.errors import UserError
from minigpt4.conversation.context import IMAGE_MESSAGE
from minigpt4.conversation.conversation import Answer
from minigpt4.conversation.sampling import GenerationOptions
from minigpt4.conversation.stopping import hold_back_partial_stop
from minigpt4.serve import page_boxes, page_chat
from minigpt4.serve.engine import Engine
from minigpt4.serve.engine import Request as EngineRequest
from minigpt4.serve.image_decoder import ImageDecoder
from minigpt4.serve.page_chat import Picture, Session, Turn
from minigpt4.serve.page_guard import MAX_BODY_BYTES
from minigpt4.serve.page_texts import Refusal, describe_answer, describe_error, describe_position, localized

UPDATE_SECONDS = 0.08  # each update of the page delays the answers
POSITION_SECONDS = 0.5
TIMEOUT_SECONDS = 300.0
MAX_KEPT_BYTES = MAX_BODY_BYTES - 200_000  # it is sent together with a question
MAX_READERS = 16  # images that are read at the same time
MAX_SEED = 2**53  # JavaScript has no larger whole numbers without gaps
Changes = dict[Any, Any]  # new values by component


@dataclass
class PageModel:
    """A model that answers: its engine, its name, and one line about it."""

    engine: Engine
    name: str
    description: str


@dataclass(eq=False)
class Job:
    """The answers of all models to one question, from its arrival to their end."""

    latest: list[Answer | Exception | None]  # the last update of each model
    requests: list[EngineRequest] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # for the status line
    is_stopped: bool = False
    is_followed: bool = False  # by the event that shows the answers
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def on_update(self, model: int, loop: asyncio.AbstractEventLoop, update: Answer | Exception) -> None:
        """Called on an engine's thread, whose answer goes on growing."""
        if isinstance(update, TimeoutError):
            update = Refusal("timeout", seconds=TIMEOUT_SECONDS)
        elif not isinstance(update, Answer | UserError):  # the engine has logged it
            update = Refusal("failed")
        self.latest[model] = replace(update, ids=list(update.ids)) if isinstance(update, Answer) else update
        with suppress(RuntimeError):  # the server has ended
            loop.call_soon_threadsafe(self.changed.set)

    def stop(self) -> None:
        """Ends the answers, waiting or growing."""
        self.is_stopped = True
        for request in self.requests:
            request.cancelled.set()
        self.changed.set()

    @property
    def is_done(self) -> bool:
        """Whether nothing more will come."""
        over = (isinstance(update, Exception) or (update and update.finish_reason) for update in self.latest)
        return self.is_stopped or all(over)


class Answers:
    """Answers the questions of the page's sessions, and shows what happens.

    Each handler is a generator of changes, which the page shows one after the other. The layout sets the components.
    """

    session: gr.State  # gradio forgets a session after its end only if an event has returned it
    box: gr.MultimodalTextbox
    chatbots: list[gr.Chatbot]  # one for each model
    status: gr.Markdown
    kept: gr.BrowserState
    export: gr.Markdown
    settings: dict[str, Any]  # components of GenerationOptions, by name

    def __init__(self, models: Sequence[PageModel], folder: Path, feedback: Path | None) -> None:
        self.models, self.folder, self.feedback = models, folder, feedback
        self.names = [model.name for model in models]
        self.decoder, self.readers = ImageDecoder(), asyncio.Semaphore(MAX_READERS)

    def say(self, *notes: str) -> Changes:
        """The status line, which shows names and messages as they are."""
        return {self.status: escape(" ".join(notes))}

    def nothing(self) -> Changes:
        """No change; gradio takes an empty one for an error."""
        return {self.status: gr.skip()}

    def warn(self, error: Exception, request: gr.Request) -> Changes:
        """The status line, which says what is wrong."""
        if not isinstance(error, UserError | Refusal):
            logging.error("A request of the page failed.", exc_info=error)
        return {self.status: f"**{escape(f'⚠ {describe_error(request, error)}')}**"}

    def show(self, turns: Sequence[Turn], request: gr.Request) -> Changes:
        """All chats."""
        changes, empty = {}, localized(request, "no_answer")
        for i, chatbot in enumerate(self.chatbots):
            figure = partial(page_boxes.figure, request=request) if self.models[i].engine.chat.has_boxes else None
            value = page_chat.shown_messages(turns, i, empty, figure)
            marks = [{True: "Like", False: "Dislike"}.get(turn.ratings.get(i)) for turn in turns if turn.answers]
            changes[chatbot] = gr.Chatbot(value=value, feedback_value=marks) if self.feedback else value
        return changes

    def buttons(self, is_answering: bool, value: dict[str, Any] | None = None) -> Changes:
        """The box, with a new value or as it is, and its button: to send or to stop."""
        more = {} if value is None else {"value": value}
        return {self.box: gr.MultimodalTextbox(submit_btn=not is_answering, stop_btn=is_answering, **more)}

    async def keep(self, session: Session, request: gr.Request) -> tuple[Changes, list[str]]:
        """What the browser stores, and a note if that is too much."""
        kept = await asyncio.to_thread(page_chat.to_json, session.turns, self.names, True)
        if len(json.dumps(kept)) > MAX_KEPT_BYTES:
            return {self.kept: {"too_large": True}}, [localized(request, "not_kept")]
        return {self.kept: kept}, []

    def begin(self, session: Session, message: dict[str, Any], request: gr.Request) -> Changes:
        """What is shown while a message's images are read."""
        changes = self.buttons(True) | self.say(localized(request, "reading"))
        return changes if message["files"] and not session.job else self.nothing()

    async def accept(
        self,
        session: Session,
        request: gr.Request,
        values: Sequence[Any],
        prepare: Callable[[], Awaitable[list[Turn]]],
        accepted: dict[str, Any] | None = None,
        refused: dict[str, Any] | None = None,
    ) -> Changes:
        """Has the last of the turns that ``prepare`` returns answered, or says why not and leaves the chat as it is.

        ``values`` are those of the settings; the box becomes ``accepted`` or ``refused`` where these are given. This is
        no part of ``answer``: where two updates of a generator arrive together, gradio loses values of the first one.
        """
        if session.job and (session.job.is_followed or not session.job.is_done):
            return self.warn(Refusal("busy"), request)
        session.job = job = Job([None] * len(self.models))
        try:
            turns = await prepare()
            await self.start(job, turns, dict(zip(self.settings, values, strict=True)), request)
            if job.is_stopped:
                raise Refusal("stopped")
        except Exception as error:
            if session.job is not job:  # cleared
                return self.show(session.turns, request)
            session.job = None
            return self.show(session.turns, request) | self.buttons(False, refused) | self.warn(error, request)
        session.turns = turns
        session.delete_files()  # of refused messages
        kept, job.notes = await self.keep(session, request)
        shown = self.show(self.with_answers(turns, job, request), request) | self.say()
        return {self.session: session, self.export: ""} | shown | self.buttons(True, accepted) | kept

    async def answer(self, session: Session, request: gr.Request) -> AsyncIterator[Changes]:
        """Shows the answers to an accepted question while they grow; at their end the session has them."""
        job = session.job
        if job is None or job.is_followed or not job.requests:  # it was refused, or is being read
            yield self.nothing()
            return
        job.is_followed = True
        try:
            async for changes in self.follow(session, job, request):
                yield changes
        finally:  # also where the page was closed
            job.stop()
            if session.job is job:
                session.job = None

    async def start(self, job: Job, turns: list[Turn], values: dict[str, Any], request: gr.Request) -> None:
        """Checks a question and hands it to the engines; raises what the page says about it."""
        if (seed := values["seed"]) is not None:
            if not 0 <= seed <= MAX_SEED or seed % 1:
                raise Refusal("bad_seed", limit=MAX_SEED)
            values["seed"] = int(seed)
        options, loop = GenerationOptions(**values), asyncio.get_running_loop()
        for i, model in enumerate(self.models):
            await asyncio.to_thread(_check_length, model.engine, turns)
            if (
                model.engine.chat.has_boxes
                and "[identify]" in turns[-1].question
                and not phrase_boxes(turns[-1].question)
            ):
                raise Refusal("no_box")
            messages, on_update = page_chat.model_messages(turns, i), partial(job.on_update, i, loop)
            client = request.session_hash or ""
            job.requests.append(EngineRequest(messages, options, on_update, TIMEOUT_SECONDS, client))
        if job.is_stopped:
            return
        try:
            for model, engine_request in zip(self.models, job.requests, strict=True):
                model.engine.submit(engine_request)
        except queue.Full:
            job.stop()
            raise Refusal("server_busy") from None

    async def follow(self, session: Session, job: Job, request: gr.Request) -> AsyncIterator[Changes]:
        """What the page shows until the job is done."""
        has_images = any(turn.pictures for turn in session.turns)
        notes = job.notes + ([] if has_images else [localized(request, "hint")])
        while not job.is_done:
            with suppress(TimeoutError):
                await asyncio.wait_for(job.changed.wait(), POSITION_SECONDS)
            if session.job is not job:
                break
            job.changed.clear()
            if not job.is_stopped and any(engine_request.is_over for engine_request in job.requests):
                job.latest = [update or Refusal("timeout", seconds=TIMEOUT_SECONDS) for update in job.latest]
            yield self.show(self.with_answers(session.turns, job, request), request) | self.say(
                *self.progress(job, request), *notes
            )
            await asyncio.sleep(UPDATE_SECONDS)
        if session.job is not job:  # cleared; what was shown last may have arrived later than that
            yield self.show(session.turns, request)
            return
        session.turns = self.with_answers(session.turns, job, request, is_final=True)
        kept, more = await self.keep(session, request)
        failures = [update for update in job.latest if isinstance(update, Exception)]
        notes = dict.fromkeys([*more, *notes])  # without repetitions
        status = self.warn(failures[0], request) if failures else self.say(*self.summary(job, request), *notes)
        yield self.show(session.turns, request) | self.buttons(False) | kept | status

    def with_answers(self, turns: Sequence[Turn], job: Job, request: gr.Request, is_final: bool = False) -> list[Turn]:
        """The turns, the last one with the answers so far; empty where nothing was generated."""
        texts = []
        for model, update in zip(self.models, job.latest, strict=True):
            if is_final:
                texts.append(update.text if isinstance(update, Answer) else "")
            elif isinstance(update, Exception):
                texts.append(f"⚠ {describe_error(request, update)}")
            else:
                stop_strings = [model.engine.chat.template.stop_string]
                texts.append((hold_back_partial_stop(update.text, stop_strings) if update else "") or "…")
        return [*turns[:-1], replace(turns[-1], answers=texts, is_growing=not is_final)]

    def progress(self, job: Job, request: gr.Request) -> list[str]:
        """How many questions are ahead of one that waits."""
        latest = zip(self.models, job.requests, job.latest, strict=True)
        waiting = [(model.engine, engine_request) for model, engine_request, update in latest if update is None]
        if count := max((engine.position(engine_request) for engine, engine_request in waiting), default=0):
            return [describe_position(request, count)]
        for engine, engine_request in waiting:
            stats, seconds = engine.stats, time.monotonic() - engine_request.arrival
            if stats.num_waiting and stats.num_running and seconds >= POSITION_SECONDS:
                return [localized(request, "next")]
        return []

    def summary(self, job: Job, request: gr.Request) -> list[str]:
        """Length and speed of the answers, and whether they or the chat are incomplete."""
        updates = zip(self.names, job.latest, strict=True)
        answers = [(name, update) for name, update in updates if isinstance(update, Answer)]
        notes = [localized(request, "stopped")] if job.is_stopped else []
        for name, answer in answers:
            notes.append((f"{name}: " if len(self.names) > 1 else "") + describe_answer(request, answer))
        if any(answer.finish_reason == "length" for _, answer in answers):
            notes.append(localized(request, "cut"))
        if not job.is_stopped and any(engine_request.is_over for engine_request in job.requests):
            notes.append(localized(request, "timeout", seconds=TIMEOUT_SECONDS))
        if count := max((answer.num_dropped_turns for _, answer in answers), default=0):
            notes.append(localized(request, "dropped_one" if count == 1 else "dropped", count=count))
        return notes

    async def new_turn(
        self, turns: Sequence[Turn], question: str, files: Sequence[str], session: Session, request: gr.Request
    ) -> Turn:
        """A question about uploaded images after other turns; raises what makes it unanswerable."""
        if sum(len(turn.pictures) for turn in turns) + len(files) > page_chat.MAX_IMAGES:
            raise Refusal("too_many", count=page_chat.MAX_IMAGES)
        pictures = []
        for path in map(Path, files):
            try:
                data = await asyncio.to_thread(path.read_bytes)
            except OSError as error:  # it is old
                raise Refusal("gone", name=path.name) from error
            pictures.append(await self.read(data, f"'{path.name}'", session, request))
        return Turn(question, pictures)

    async def read(self, data: bytes, name: str, session: Session, request: gr.Request) -> Picture:
        """An image file, processed for the models, and in the size of the page."""
        client, pixels = request.client.host, []
        async with self.readers:
            for model in self.models:
                size = getattr(model.engine.chat.vis_processor, "first_size", None)
                image = await asyncio.wrap_future(self.decoder.submit(data, name, size, client))
                pixels.append(await asyncio.to_thread(model.engine.chat.preprocess_image, image))
            shown = await asyncio.wrap_future(self.decoder.submit(data, name, page_chat.MAX_SHOWN_SIDE, client))
            path = await asyncio.to_thread(page_chat.save_shown, shown, session.new_file(self.folder))
        return Picture(path, pixels)


def escape(text: str) -> str:
    """Markdown that shows a text as it is."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", text)


def _check_length(engine: Engine, turns: Sequence[Turn]) -> None:
    """Raises the UserError with which the engine would refuse the last question, while it still is in the box."""
    chat = engine.chat
    conv, images = chat.template.copy(), [torch.empty(0) for turn in turns for _ in turn.pictures]
    for turn in turns:
        conv.messages += [[conv.roles[0], IMAGE_MESSAGE] for _ in turn.pictures]
        chat.ask(turn.question, conv)
        conv.messages += [[conv.roles[1], answer or " "] for answer in turn.answers[:1]]
    chat.check_length(conv, images, GenerationOptions(max_new_tokens=1), engine.max_length)
