"""The chat as a web page. Each browser has its own conversation; the model answers one request at a time."""

import html
import logging
import os
import re
import secrets
import shutil
import socket
import tempfile
import threading
import time
import weakref
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
from fastapi import FastAPI
from gradio.networking import setup_tunnel
from PIL import Image
from torch import Tensor

from minigpt4.common.errors import UserError
from minigpt4.common.images import read_image
from minigpt4.conversation.conversation import Chat, Conversation
from minigpt4.conversation.generation import GenerationOptions
from minigpt4.serve.access import OriginCheck
from minigpt4.serve.image_decoder import ImageDecoder
from minigpt4.serve.page_guard import MAX_BODY_BYTES, MAX_UPLOADED_FILE_BYTES, PageGuard
from minigpt4.serve.page_texts import CHINESE, ENGLISH, describe_numbers, localized

CSS = """
.gradio-container {max-width: 920px !important; width: 100% !important; margin: 0 auto !important}
#head h1 {margin: 0; font-weight: 600}
#subtitle p, #status p, #caption p {color: var(--neutral-500); margin: 0}
#status p, #caption p {font-size: var(--text-sm)}
#chat img {min-width: 160px; max-height: 260px; object-fit: contain}
#chat .message-buttons:has(.download-link) {display: none}
"""
FONT, MONOSPACE = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]  # no fonts from other hosts
UPDATE_SECONDS = 0.08  # each update of the page delays the answer
MAX_SHOWN_SIDE = 1024
MAX_IMAGES = 16  # of a chat
MAX_SESSIONS = 200  # then the one that is unused for longest is forgotten
MAX_READERS = 16  # messages whose images are read at the same time
EMPTY_BOX = {"text": "", "files": []}


class Job(NamedTuple):
    """Images and a question to answer, or neither to repeat the last answer; ``view`` has the messages to show."""

    images: list[Tensor] | None  # processed; None while they are read
    question: str
    view: list[dict[str, Any]]


@dataclass
class Session:
    """One browser's chat, which changes when its job, waiting or being answered, is done."""

    conv: Conversation
    images: list[Tensor] = field(default_factory=list)
    view: list[dict[str, Any]] = field(default_factory=list)  # messages as the page shows them
    job: Job | None = None
    is_stopped: bool = False
    folder: Path | None = None  # of the images that the page shows

    def delete_images(self) -> None:
        """Deletes the files of images that the page no longer shows."""
        shown = {part.get("path") for message in self.view for part in message["content"]}
        for file in self.folder.iterdir() if self.folder else ():
            if str(file) not in shown:
                file.unlink(missing_ok=True)


class _Page:
    """Layout and event handlers, which change the session in place."""

    def __init__(self, chat: Chat, description: str, examples: Sequence[str | Path], folder: Path) -> None:
        self.chat, self.description, self.folder = chat, description, folder
        self.decoder, self.lock = ImageDecoder(), threading.Lock()
        (folder / "kept").mkdir()
        self.examples = [_save_for_display(read_image(path), folder / "kept") for path in examples]

    def build(self, options: GenerationOptions) -> gr.Blocks:
        """Lays out the page and connects its events; ``options`` are the initial settings."""
        text, quiet = gr.I18n(), {"show_progress": "hidden"}
        with gr.Blocks(title="MiniGPT-4", analytics_enabled=False, fill_width=True) as blocks:
            blocks.state_session_capacity = MAX_SESSIONS
            session = gr.State(Session(self.chat.template.copy()))
            gr.Markdown("# MiniGPT-4", elem_id="head")
            gr.Markdown(text("subtitle"), elem_id="subtitle")
            chatbot = gr.Chatbot(
                elem_id="chat", height="48vh", min_height=320, show_label=False, buttons=["copy"],
                latex_delimiters=[], feedback_options=None, render_markdown=False,
            )  # fmt: skip
            status = gr.Markdown(self.status(), latex_delimiters=[], elem_id="status")
            box = gr.MultimodalTextbox(
                file_types=["image"], file_count="multiple", sources=["upload"], show_label=False, elem_id="box",
                placeholder=text("placeholder"), autofocus=True, max_plain_text_length=MAX_BODY_BYTES,
            )  # fmt: skip
            with gr.Row():
                names = ("stop", "retry", "clear")
                stop, retry, clear = (gr.Button(text(name), size="sm", elem_id=name) for name in names)
            if self.examples:
                gr.Markdown(text("examples"), elem_id="caption")
                gallery = gr.Gallery(
                    self.examples, show_label=False, columns=10, fit_columns=False, height=108, allow_preview=False,
                    buttons=[], object_fit="contain", interactive=False, container=False, elem_id="examples",
                )  # fmt: skip
                gallery.select(self.add_example, box, box, queue=False, **quiet)
            self.settings = _build_settings(text, options)
            answer = {
                "fn": self.answer, "inputs": [session, *self.settings.values()], "outputs": [chatbot, status],
                "concurrency_limit": 1, "concurrency_id": "model", "show_progress": "minimal",
            }  # fmt: skip
            everything, seed = [session, box, chatbot, status], self.settings["seed"]
            reading = {"concurrency_limit": MAX_READERS, **quiet}
            box.submit(self.submit, [session, box], everything, **reading).success(**answer)
            retry.click(self.retry, [session, seed], [chatbot, seed], **quiet).success(**answer)
            stop.click(self.stop, session, None, queue=False, **quiet)
            gr.on([clear.click, chatbot.clear], self.clear, session, everything, queue=False, **quiet)
        return blocks

    def status(self, *notes: str) -> str:
        """Markdown of the status line, which shows names and messages as they are."""
        return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", " · ".join((self.description, *notes)))

    def warn(self, error: Exception, request: gr.Request) -> str:
        """Shows why something failed, and returns the status line that says so."""
        if not isinstance(error, UserError):
            logging.error("A message of the page failed.", exc_info=error)
        text = str(error) if isinstance(error, UserError) else localized(request, "failed")
        gr.Warning(html.escape(text))
        return self.status(f"⚠ {text}")

    def submit(self, session: Session, message: dict[str, Any], request: gr.Request) -> tuple[Session, Any, Any, Any]:
        """Accepts or refuses a message: session, text box, chat, status."""
        question, files = (message["text"] or "").strip(), message["files"]
        job = Job(None, question, session.view)
        try:
            with self.lock:  # of two messages at the same time, one is refused
                if session.job:
                    raise UserError(localized(request, "busy"))
                if not question and not files:
                    raise UserError(localized(request, "nothing"))
                if len(session.images) + len(files) > MAX_IMAGES:
                    raise UserError(localized(request, "too_many").format(count=MAX_IMAGES))
                self.chat.ask(question, session.conv.copy())
                session.job = job
        except UserError as error:
            return session, gr.skip(), gr.skip(), self.warn(error, request)
        try:
            images = [self.read(Path(path), request) for path in files]
            if session.job is not job:  # cleared
                return session, gr.skip(), gr.skip(), gr.skip()
            if images and session.folder is None:
                session.folder = Path(tempfile.mkdtemp(prefix="kept-", dir=self.folder))
                weakref.finalize(session, shutil.rmtree, session.folder, ignore_errors=True)
            session.delete_images()  # of refused messages
            content = [{"path": _save_for_display(shown, session.folder)} for _, shown in images]
        except Exception as error:  # one message must not end the others' chats
            session.job = None if session.job is job else session.job
            return session, EMPTY_BOX | {"text": question}, gr.skip(), self.warn(error, request)
        content += [_literal(question)] if question else []
        view = [*session.view, {"role": "user", "content": content}]
        session.job, session.is_stopped = Job([pixels for pixels, _ in images], question, view), False
        return session, EMPTY_BOX, view, self.status()

    def read(self, path: Path, request: gr.Request) -> tuple[Tensor, Image.Image]:
        """An uploaded image, processed for the model, and in the size of the page."""
        try:
            data = path.read_bytes()
        except OSError as error:  # it is old
            raise UserError(localized(request, "gone").format(name=path.name)) from error
        decode = partial(self.decoder.decode, data, f"'{path.name}'", client=request.client.host)
        pixels = self.chat.preprocess_image(decode(size=getattr(self.chat.vis_processor, "first_size", None)))
        return pixels, decode(size=MAX_SHOWN_SIDE)

    def retry(self, session: Session, seed: float, request: gr.Request) -> tuple[Any, float]:
        """Removes the last answer, to be generated again with the next seed: chat, seed."""
        with self.lock:
            if session.job or not session.view or session.view[-1]["role"] != "assistant":
                self.warn(UserError(localized(request, "busy" if session.job else "no_answer")), request)
                return gr.skip(), seed
            job = Job([], "", session.view[:-1])
            session.job, session.is_stopped = job, False
        return job.view, (seed or 0) + 1

    def answer(self, session: Session, request: gr.Request, *values: Any) -> Iterator[tuple[Any, Any]]:
        """Answers the session's job with the values of the settings: chat and status, repeatedly."""
        if not (job := session.job) or job.images is None:
            yield gr.skip(), gr.skip()
            return
        status = self.status()
        try:
            stop = {"stop": lambda ids: session.is_stopped or session.job is not job}
            options = GenerationOptions(**dict(zip(self.settings, values, strict=True)), **stop)
            for view, notes in self._generate(session, job, options, request):
                status = self.status(*notes)
                yield view, status
        except Exception as error:  # out of memory, for example; the server continues
            status = self.warn(error, request)
        finally:
            if session.job is job:
                session.job = None
        yield (session.job or session).view, status  # a cleared chat may have a new job

    def _generate(
        self, session: Session, job: Job, options: GenerationOptions, request: gr.Request
    ) -> Iterator[tuple[list[dict[str, Any]], list[str]]]:
        """Messages and notes for the status line while the answer grows; the session changes at the end."""
        if session.is_stopped:  # while waiting
            yield session.view, [localized(request, "stopped")]
            return
        conv, images = session.conv.copy(), list(session.images)
        view, notes = job.view, [localized(request, "received")]
        conv.owner = request.session_hash
        for image in job.images:
            self.chat.upload_img(image, conv, images)
        if job.question:
            self.chat.ask(job.question, conv)
        elif not job.images:
            conv.messages.pop()  # the answer to repeat
        if job.question or not job.images:
            updated = 0.0
            with closing(self.chat.stream(conv, images, options)) as answers:
                for answer in answers:
                    if session.job is not job:  # cleared
                        return
                    view = [*job.view, {"role": "assistant", "content": [_literal(answer.text)]}]
                    notes = [describe_numbers(request, answer)]
                    if time.monotonic() - updated > UPDATE_SECONDS:
                        yield view, notes
                        updated = time.monotonic()
        if session.job is job:  # not cleared
            session.conv, session.images, session.view = conv, images, view
            yield view, [*notes, localized(request, "stopped")] if session.is_stopped else notes

    def add_example(self, message: dict[str, Any], event: gr.SelectData) -> dict[str, Any]:
        """Adds the clicked example to the text box."""
        return message | {"files": [*message["files"], self.examples[event.index]]}

    def stop(self, session: Session) -> None:
        """Ends the answer; its text so far is kept."""
        session.is_stopped = True

    def clear(self, session: Session) -> tuple[Session, Any, Any, str]:
        """Starts a new chat, whatever is being answered: session, text box, chat, status."""
        session.conv, session.images, session.view, session.job = self.chat.template.copy(), [], [], None
        session.delete_images()
        return session, EMPTY_BOX, [], self.status()


def _build_settings(text: gr.I18n, options: GenerationOptions) -> dict[str, Any]:
    """The panel of settings: a component for each option that the page sets."""
    sizes = {"step": 1, "precision": 0}
    with gr.Accordion(text("settings"), open=False, elem_id="settings"):
        with gr.Row():
            sample = gr.Checkbox(options.do_sample, label=text("sample"))
            seed = gr.Number(options.seed, label=text("seed"), precision=0)
        with gr.Row():
            temperature = gr.Slider(0, 2, options.temperature, step=0.01, label=text("temperature"))
            top_p = gr.Slider(0.01, 1, options.top_p, step=0.01, label="Top-p")
        with gr.Row():
            beams = gr.Slider(1, max(8, options.num_beams), options.num_beams, label=text("beams"), **sizes)
            largest = max(1000, options.max_new_tokens)
            length = gr.Slider(1, largest, options.max_new_tokens, label=text("max_new_tokens"), **sizes)
    names = ("do_sample", "seed", "temperature", "top_p", "num_beams", "max_new_tokens")
    return dict(zip(names, (sample, seed, temperature, top_p, beams, length), strict=True))


def _literal(text: str) -> dict[str, str]:
    """A text of the chat, which would show HTML; only what needs it is escaped, as its copy button copies that."""
    is_html = "<" in text or html.unescape(text) != text
    return {"type": "text", "text": html.escape(text, quote=False) if is_html else text}


def _save_for_display(image: Image.Image, folder: Path) -> str:
    """The path of a new file that the page may show, in a format that every browser reads."""
    image.thumbnail((MAX_SHOWN_SIDE, MAX_SHOWN_SIDE))
    path = folder / f"{secrets.token_hex(16)}.webp"
    image.save(path)
    return str(path)


def build_app(
    chat: Chat,
    description: str,
    options: GenerationOptions,
    examples: Sequence[str | Path] = (),
    host: str = "127.0.0.1",
    origins: Sequence[str] = (),
) -> OriginCheck:
    """Builds the server of the page; ``host`` and ``origins`` are those of ``OriginCheck``.

    ``description`` is shown under the chat, ``options`` are the initial settings, and ``examples`` are image files that
    a click adds. Raises UserError if an example cannot be read.
    """
    folder = tempfile.TemporaryDirectory(prefix="minigpt4-page-")

    @asynccontextmanager
    async def clean_up(_: FastAPI) -> AsyncIterator[None]:
        with folder, closing(page.decoder):
            yield

    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": os.path.realpath(folder.name)}
    page = _Page(chat, description, examples, Path(os.environ["GRADIO_TEMP_DIR"]))
    theme = gr.themes.Default(primary_hue="slate", secondary_hue="slate", font=FONT, font_mono=MONOSPACE)
    app = FastAPI(lifespan=clean_up, docs_url=None, redoc_url=None, openapi_url=None)
    gr.mount_gradio_app(
        app, page.build(options).queue(), path="/", theme=theme, css=CSS, i18n=gr.I18n(en=ENGLISH, zh=CHINESE),
        footer_links=[], run_history=False, ssr_mode=False, show_error=False, max_file_size=MAX_UPLOADED_FILE_BYTES,
        enable_monitoring=False,
    )  # fmt: skip
    return OriginCheck(PageGuard(app, Path(folder.name), origins), host, origins)


def open_tunnel(listener: socket.socket) -> str:
    """Opens a public tunnel to a listening socket and returns its URL; UserError if that fails."""
    host, port = listener.getsockname()[:2]
    try:
        url = setup_tunnel(host, port, secrets.token_urlsafe(32), None, None)
    except Exception as error:  # no network, a firewall, an incompatible platform, …
        raise UserError(f"--share: no public tunnel can be opened ({error}); leave it out, or try again.") from error
    return f"https://{url.partition('://')[2]}"
