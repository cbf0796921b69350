"""The chat as a web page. Each browser has a conversation of its own; the model answers one request at a time."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_pil_to_cache
from gradio.utils import get_upload_folder
from PIL import Image
from torch import Tensor

from minigpt4.common.errors import UserError
from minigpt4.conversation.conversation import Answer, Chat, Conversation
from minigpt4.conversation.generation import GenerationOptions
from minigpt4.conversation.images import read_image

TEXTS = {
    "subtitle": ("Upload a picture and ask about it.", "上传一张图片，然后就它提问。"),
    "placeholder": ("Your question. Pictures: click, drag or paste.", "输入问题；点击、拖放或粘贴图片。"),
    "examples": ("Example pictures (click to take one)", "示例图片（点击选用）"),
    "stop": ("Stop", "停止"),
    "retry": ("Retry", "重试"),
    "clear": ("Clear", "清空"),
    "settings": ("Settings", "设置"),
    "draw": ("Draw words (otherwise always the likeliest)", "随机采样（否则总取最可能的词）"),
    "temperature": ("Temperature", "温度"),
    "beams": ("Beams", "束宽"),
    "longest": ("Longest answer (tokens)", "回答最大长度（词元）"),
    "seed": ("Seed", "随机种子"),
    "busy": (
        "The last question is still being answered: wait, or press Stop.",
        "上一个问题仍在回答：请等待，或按“停止”。",
    ),
    "nothing": ("There is no question: write one, or add a picture.", "没有问题：请输入问题，或添加图片。"),
    "no_answer": ("There is no answer yet to try again.", "还没有可以重试的回答。"),
    "stopped": ("stopped", "已停止"),
    "received": ("picture received", "已收到图片"),
    "numbers": (
        "{count} tokens, {speed:.1f} tokens/s, first after {first:.2f} s, {cached} of {context} context tokens cached",
        "{count} 个词元，{speed:.1f} 词元/秒，首个用时 {first:.2f} 秒，上下文词元 {context} 个，其中 {cached} 个已缓存",
    ),
}
ENGLISH, CHINESE = ({key: texts[i] for key, texts in TEXTS.items()} for i in range(2))
CSS = """
.gradio-container {max-width: 920px !important; width: 100% !important; margin: 0 auto !important}
#head h1 {margin: 0; font-weight: 600}
#subtitle p, #status p, #caption p {color: var(--neutral-500); margin: 0}
#status p, #caption p {font-size: var(--text-sm)}
#chat img {min-width: 160px; max-height: 260px; object-fit: contain}
#chat .message-buttons:has(.download-link) {display: none}
"""
FONT, MONOSPACE = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]  # the page needs no other host
SECONDS_BETWEEN_UPDATES = 0.08  # every update of the page costs the answer time
SHOWN_SIDE = 1024
Job = tuple[list[Image.Image], str]  # pictures and question


@dataclass
class Session:
    """One browser's chat."""

    conv: Conversation
    images: list[Tensor] = field(default_factory=list)
    view: list[dict[str, Any]] = field(default_factory=list)  # its messages as the page shows them
    job: Job | None = None  # what waits for the model, or is under way
    before: tuple[Conversation, list[Tensor], list[dict[str, Any]]] | None = None  # the chat before the job
    is_stopped: bool = False

    def begin(self, job: Job) -> None:
        """Remembers the chat as it is, and what the model is to do next."""
        self.before, self.job, self.is_stopped = (self.conv.copy(), list(self.images), list(self.view)), job, False

    def withdraw(self) -> None:
        """Back to the chat before the job."""
        if self.before:
            self.conv, self.images, self.view = self.before


class _Page:
    """What happens on the page; the handlers change the session in place."""

    def __init__(self, chat: Chat, description: str, samples: Sequence[str]) -> None:
        self.chat = chat
        self.description = description
        self.samples = samples

    def status(self, *notes: str) -> str:
        return " · ".join((self.description, *notes))

    def post(self, session: Session, message: dict[str, Any], request: gr.Request) -> tuple[Session, Any, Any, str]:
        """Takes a message in, or refuses it: session, text box, chat, status."""
        question = (message["text"] or "").strip()
        try:
            if session.job:
                raise UserError(_text(request, "busy"))
            if not question and not message["files"]:
                raise UserError(_text(request, "nothing"))
            pictures = [_uploaded(path) for path in message["files"]]
        except UserError as error:
            gr.Warning(str(error))
            return session, {"text": question, "files": []}, session.view, self.status(f"⚠ {error}")
        session.begin((pictures, question))
        content = [{"path": _cached(picture)} for picture in pictures] + ([question] if question else [])
        session.view = [*session.view, {"role": "user", "content": content}]
        return session, {"text": "", "files": []}, session.view, self.status()

    def retry(self, session: Session, seed: float, request: gr.Request) -> tuple[Any, float]:
        """Drops the last answer, so that it is given anew: chat, seed."""
        if session.job or not session.view or session.view[-1]["role"] != "assistant":
            gr.Warning(_text(request, "busy" if session.job else "no_answer"))
            return session.view, seed
        session.begin(([], ""))
        session.conv.messages.pop()
        session.view = session.view[:-1]
        return session.view, seed + 1

    def answer(self, session: Session, request: gr.Request, *settings: Any) -> Iterator[tuple[Any, Any]]:
        """Does the session's job: chat and status, again and again."""
        if not (job := session.job):
            yield gr.skip(), gr.skip()
            return
        do_sample, temperature, top_p, num_beams, max_new_tokens, seed = settings
        options = GenerationOptions(
            do_sample=do_sample and temperature > 0, temperature=temperature, top_p=top_p, num_beams=int(num_beams),
            max_new_tokens=int(max_new_tokens), seed=int(seed or 0),
            stop=lambda ids: session.is_stopped or session.job is not job,
        )  # fmt: skip
        notes, is_done = [], False
        try:
            for notes in self._work(session, job, options, request):
                yield session.view, self.status(*notes)
            is_done = True
        except UserError as error:
            gr.Warning(str(error))
            notes = [f"⚠ {error}"]
        finally:
            if session.job is job:
                session.job = None
                if not is_done:
                    session.withdraw()
        yield session.view, self.status(*notes)

    def _work(self, session: Session, job: Job, options: GenerationOptions, request: gr.Request) -> Iterator[list[str]]:
        """Notes for the status line, while the answer grows in the session."""
        conv, images, view, (pictures, question) = session.conv, session.images, session.view, job
        if session.is_stopped:  # while others were answered
            session.withdraw()
            yield [_text(request, "stopped")]
            return
        for picture in pictures:
            self.chat.upload_img(picture, conv, images)
        if question:
            self.chat.ask(question, conv)
        elif pictures:
            yield [_text(request, "received")]
            return
        notes, updated = [], 0.0
        with closing(self.chat.stream(conv, images, options)) as parts:
            for part in parts:
                if session.job is not job:  # by Clear
                    return
                session.view = [*view, {"role": "assistant", "content": part.text}]
                notes = [_numbers(request, part)]
                if time.monotonic() - updated > SECONDS_BETWEEN_UPDATES:
                    yield notes
                    updated = time.monotonic()
                if session.is_stopped:
                    break
        yield [*notes, _text(request, "stopped")] if session.is_stopped else notes

    def take(self, message: dict[str, Any], event: gr.SelectData) -> dict[str, Any]:
        """Puts the example that was clicked into the text box."""
        return {"text": message["text"], "files": [*message["files"], self.samples[event.index]]}

    def stop(self, session: Session) -> None:
        """Ends the answer; what is there of it stays."""
        session.is_stopped = True

    def clear(self, session: Session) -> tuple[Session, Any, Any, str]:
        """Begins anew, whatever is under way: session, text box, chat, status."""
        session.conv, session.images, session.view = self.chat.template.copy(), [], []
        session.job = session.before = None
        return session, {"text": "", "files": []}, [], self.status()


def _text(request: gr.Request, key: str) -> str:
    """A text in the browser's language."""
    return (CHINESE if (request.headers.get("accept-language") or "").lower().startswith("zh") else ENGLISH)[key]


def _numbers(request: gr.Request, answer: Answer) -> str:
    """How fast an answer comes."""
    count, seconds = len(answer.ids), answer.seconds - answer.seconds_to_first_token
    speed = (count - 1) / seconds if seconds > 0 else count / answer.seconds
    numbers = {"first": answer.seconds_to_first_token, "cached": answer.cached_tokens, "context": answer.prompt_tokens}
    return _text(request, "numbers").format(count=count, speed=speed, **numbers)


def _uploaded(path: str) -> Image.Image:
    name = Path(path).name
    try:
        return read_image(path, f"'{name}'")
    except UserError as error:  # where the server keeps it is nobody's business
        raise UserError(str(error).replace(path, name)) from error


def _cached(picture: Image.Image) -> str:
    """A file that the page may show: the picture as the model sees it, whatever its own format is."""
    shown = picture.copy()
    shown.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    return save_pil_to_cache(shown, get_upload_folder())


def build_page(
    chat: Chat,
    description: str,
    examples: Sequence[str | Path] = (),
    do_sample: bool = True,
    temperature: float = 1.0,
    top_p: float = 0.9,
    num_beams: int = 1,
    max_new_tokens: int = 300,
    seed: int = 42,
) -> gr.Blocks:
    """The page, yet to be launched.

    Args:
        chat: answers, one request at a time; the others see their place in the queue.
        description: model, device and precision in one line.
        examples: pictures that a click takes.
        do_sample, temperature, top_p, num_beams, max_new_tokens, seed: where the settings stand at first.

    Raises:
        UserError: an example cannot be read.
    """
    samples = [_cached(read_image(path)) for path in examples]
    say, page = gr.I18n(), _Page(chat, description, samples)
    with gr.Blocks(title="MiniGPT-4", analytics_enabled=False, fill_width=True) as blocks:
        session = gr.State(Session(chat.template.copy()))
        gr.Markdown("# MiniGPT-4", elem_id="head")
        gr.Markdown(say("subtitle"), elem_id="subtitle")
        chatbot = gr.Chatbot(
            elem_id="chat", height="48vh", min_height=320, show_label=False, buttons=["copy"],
            latex_delimiters=[], feedback_options=None,
        )  # fmt: skip
        status = gr.Markdown(page.status(), elem_id="status")
        box = gr.MultimodalTextbox(
            file_types=["image"], file_count="multiple", sources=["upload"], show_label=False, elem_id="box",
            placeholder=say("placeholder"), autofocus=True,
        )  # fmt: skip
        with gr.Row():
            stop = gr.Button(say("stop"), size="sm", elem_id="stop")
            retry = gr.Button(say("retry"), size="sm", elem_id="retry")
            clear = gr.Button(say("clear"), size="sm", elem_id="clear")
        if samples:
            gr.Markdown(say("examples"), elem_id="caption")
            gallery = gr.Gallery(
                samples, show_label=False, columns=10, fit_columns=False, height=108, allow_preview=False, buttons=[],
                object_fit="contain", interactive=False, container=False, elem_id="examples",
            )  # fmt: skip
        with gr.Accordion(say("settings"), open=False, elem_id="settings"):
            with gr.Row():
                drawn = gr.Checkbox(do_sample, label=say("draw"))
                seed_box = gr.Number(seed, label=say("seed"), precision=0)
            with gr.Row():
                heat = gr.Slider(0, 2, temperature, step=0.05, label=say("temperature"))
                mass = gr.Slider(0.05, 1, top_p, step=0.05, label="Top-p")
            with gr.Row():
                beams = gr.Slider(1, 8, num_beams, step=1, label=say("beams"))
                longest = gr.Slider(1, 1000, max_new_tokens, step=1, label=say("longest"))

        answer = {
            "fn": page.answer,
            "inputs": [session, drawn, heat, mass, beams, longest, seed_box],
            "outputs": [chatbot, status],
            "concurrency_limit": 1,
            "concurrency_id": "model",
            "show_progress": "minimal",
        }
        everything = [session, box, chatbot, status]
        box.submit(page.post, [session, box], everything, show_progress="hidden").success(**answer)
        retry.click(page.retry, [session, seed_box], [chatbot, seed_box], show_progress="hidden").success(**answer)
        stop.click(page.stop, session, None, queue=False, show_progress="hidden")
        gr.on([clear.click, chatbot.clear], page.clear, session, everything, queue=False, show_progress="hidden")
        if samples:
            gallery.select(page.take, box, box, queue=False, show_progress="hidden")
    return blocks


def serve(
    chat: Chat,
    description: str,
    host: str = "127.0.0.1",
    port: int = 7860,
    share: bool = False,
    examples: Sequence[str | Path] = (),
    is_blocking: bool = True,
    **settings: Any,
) -> gr.Blocks:
    """Serves the page until it is interrupted; ``settings`` and the rest as for ``build_page``.

    Args:
        host: address to listen on; 0.0.0.0 for all of the machine's.
        port: port to listen on.
        share: also opens a public tunnel.
        is_blocking: otherwise the page is served in the background, until its ``close``.

    Raises:
        UserError: the port is taken.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    page = build_page(chat, description, examples, **settings).queue()
    look = gr.themes.Default(primary_hue="slate", secondary_hue="slate", font=FONT, font_mono=MONOSPACE)
    try:
        page.launch(
            server_name=host, server_port=port, share=share, prevent_thread_lock=not is_blocking, theme=look, css=CSS,
            i18n=gr.I18n(en=ENGLISH, zh=CHINESE), footer_links=[], run_history=False, ssr_mode=False,
            quiet=not is_blocking, max_file_size="50mb",
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"Port {port} of {host} is taken or not allowed: choose another one with --port.") from error
    return page
