"""The chat as a web page. Each browser has its own conversation; the model answers one request at a time."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
from gradio.processing_utils import save_pil_to_cache
from gradio.utils import get_upload_folder
from PIL import Image
from torch import Tensor

from minigpt4.common.errors import UserError
from minigpt4.common.images import read_image
from minigpt4.conversation.conversation import Answer, Chat, Conversation
from minigpt4.conversation.generation import GenerationOptions

TEXTS = {
    "subtitle": ("Upload an image and ask about it.", "上传一张图片，然后就它提问。"),
    "placeholder": ("Your question. Images: click, drag or paste.", "输入问题；点击、拖放或粘贴图片。"),
    "examples": ("Example images (click to use one)", "示例图片（点击选用）"),
    "stop": ("Stop", "停止"),
    "retry": ("Retry", "重试"),
    "clear": ("Clear", "清空"),
    "settings": ("Settings", "设置"),
    "sample": ("Sample (otherwise greedy)", "随机采样（否则贪心解码）"),
    "temperature": ("Temperature", "温度"),
    "beams": ("Beams", "束宽"),
    "max_new_tokens": ("Maximum length (tokens)", "最大长度（词元）"),
    "seed": ("Seed", "随机种子"),
    "busy": ("The last question is being answered: wait, or press Stop.", "正在回答上一个问题：请等待，或按“停止”。"),
    "nothing": ("There is no question: write one, or add an image.", "没有问题：请输入问题，或添加图片。"),
    "no_answer": ("There is no answer to retry yet.", "还没有可以重试的回答。"),
    "stopped": ("stopped", "已停止"),
    "received": ("image received", "已收到图片"),
    "numbers": (
        "{count} tokens, {speed:.1f} tokens/s, first after {first:.2f} s, {cached} of {prompt} prompt tokens cached",
        "{count} 个词元，{speed:.1f} 词元/秒，首个用时 {first:.2f} 秒，提示词元 {prompt} 个，其中 {cached} 个已缓存",
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
FONT, MONOSPACE = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]  # no fonts from other hosts
UPDATE_SECONDS = 0.08  # each update of the page delays the answer
MAX_SHOWN_SIDE = 1024
EMPTY_BOX = {"text": "", "files": []}


class Job(NamedTuple):
    """Images and a question to answer, or neither to repeat the last answer; ``view`` has the messages to show."""

    images: list[Image.Image]
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


class _Page:
    """Layout and event handlers, which change the session in place."""

    def __init__(self, chat: Chat, description: str, examples: Sequence[str | Path]) -> None:
        self.chat, self.description = chat, description
        self.examples = [_cache_for_display(read_image(path)) for path in examples]

    def build(self, options: GenerationOptions) -> gr.Blocks:
        """Lays out the page and connects its events; ``options`` are the initial settings."""
        text, quiet = gr.I18n(), {"show_progress": "hidden"}
        with gr.Blocks(title="MiniGPT-4", analytics_enabled=False, fill_width=True) as blocks:
            session = gr.State(Session(self.chat.template.copy()))
            gr.Markdown("# MiniGPT-4", elem_id="head")
            gr.Markdown(text("subtitle"), elem_id="subtitle")
            chatbot = gr.Chatbot(
                elem_id="chat", height="48vh", min_height=320, show_label=False, buttons=["copy"],
                latex_delimiters=[], feedback_options=None,
            )  # fmt: skip
            status = gr.Markdown(self.status(), elem_id="status")
            box = gr.MultimodalTextbox(
                file_types=["image"], file_count="multiple", sources=["upload"], show_label=False, elem_id="box",
                placeholder=text("placeholder"), autofocus=True,
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
            box.submit(self.submit, [session, box], everything, **quiet).success(**answer)
            retry.click(self.retry, [session, seed], [chatbot, seed], **quiet).success(**answer)
            stop.click(self.stop, session, None, queue=False, **quiet)
            gr.on([clear.click, chatbot.clear], self.clear, session, everything, queue=False, **quiet)
        return blocks

    def status(self, *notes: str) -> str:
        return " · ".join((self.description, *notes))

    def submit(self, session: Session, message: dict[str, Any], request: gr.Request) -> tuple[Session, Any, Any, str]:
        """Accepts or refuses a message: session, text box, chat, status."""
        question = (message["text"] or "").strip()
        try:
            if session.job:
                raise UserError(_text(request, "busy"))
            if not question and not message["files"]:
                raise UserError(_text(request, "nothing"))
            # By their bytes: no message may show the server's folders.
            images = [read_image(Path(path).read_bytes(), f"'{Path(path).name}'") for path in message["files"]]
        except UserError as error:
            gr.Warning(str(error))
            return session, EMPTY_BOX | {"text": question}, gr.skip(), self.status(f"⚠ {error}")
        content = [{"path": _cache_for_display(image)} for image in images] + ([question] if question else [])
        view = [*session.view, {"role": "user", "content": content}]
        session.job, session.is_stopped = Job(images, question, view), False
        return session, EMPTY_BOX, view, self.status()

    def retry(self, session: Session, seed: float, request: gr.Request) -> tuple[Any, float]:
        """Removes the last answer, to be generated again with the next seed: chat, seed."""
        if session.job or not session.view or session.view[-1]["role"] != "assistant":
            gr.Warning(_text(request, "busy" if session.job else "no_answer"))
            return gr.skip(), seed
        session.job, session.is_stopped = Job([], "", session.view[:-1]), False
        return session.job.view, (seed or 0) + 1

    def answer(self, session: Session, request: gr.Request, *values: Any) -> Iterator[tuple[Any, Any]]:
        """Answers the session's job with the values of the settings: chat and status, repeatedly."""
        if not (job := session.job):
            yield gr.skip(), gr.skip()
            return
        notes = []
        try:
            stop = {"stop": lambda ids: session.is_stopped or session.job is not job}
            options = GenerationOptions(**dict(zip(self.settings, values, strict=True)), **stop)
            for view, notes in self._generate(session, job, options, request):
                yield view, self.status(*notes)
        except UserError as error:
            gr.Warning(str(error))
            notes = [f"⚠ {error}"]
        finally:
            if session.job is job:
                session.job = None
        yield (session.job or session).view, self.status(*notes)  # a cleared chat may have a new job

    def _generate(
        self, session: Session, job: Job, options: GenerationOptions, request: gr.Request
    ) -> Iterator[tuple[list[dict[str, Any]], list[str]]]:
        """Messages and notes for the status line while the answer grows; the session changes at the end."""
        if session.is_stopped:  # while waiting
            yield session.view, [_text(request, "stopped")]
            return
        conv, images, view, notes = session.conv.copy(), list(session.images), job.view, [_text(request, "received")]
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
                    view = [*job.view, {"role": "assistant", "content": answer.text}]
                    notes = [_numbers(request, answer)]
                    if time.monotonic() - updated > UPDATE_SECONDS:
                        yield view, notes
                        updated = time.monotonic()
        if session.job is job:  # not cleared
            session.conv, session.images, session.view = conv, images, view
            yield view, [*notes, _text(request, "stopped")] if session.is_stopped else notes

    def add_example(self, message: dict[str, Any], event: gr.SelectData) -> dict[str, Any]:
        """Adds the clicked example to the text box."""
        return message | {"files": [*message["files"], self.examples[event.index]]}

    def stop(self, session: Session) -> None:
        """Ends the answer; its text so far is kept."""
        session.is_stopped = True

    def clear(self, session: Session) -> tuple[Session, Any, Any, str]:
        """Starts a new chat, whatever is being answered: session, text box, chat, status."""
        session.conv, session.images, session.view, session.job = self.chat.template.copy(), [], [], None
        return session, EMPTY_BOX, [], self.status()


def _build_settings(text: gr.I18n, options: GenerationOptions) -> dict[str, Any]:
    """The panel of settings: a component for each option that the page sets."""
    sizes = {"step": 1, "precision": 0}
    with gr.Accordion(text("settings"), open=False, elem_id="settings"):
        with gr.Row():
            sample = gr.Checkbox(options.do_sample, label=text("sample"))
            seed = gr.Number(options.seed, label=text("seed"), precision=0)
        with gr.Row():
            temperature = gr.Slider(0, 2, options.temperature, step=0.05, label=text("temperature"))
            top_p = gr.Slider(0.05, 1, options.top_p, step=0.05, label="Top-p")
        with gr.Row():
            beams = gr.Slider(1, 8, options.num_beams, label=text("beams"), **sizes)
            length = gr.Slider(1, 1000, options.max_new_tokens, label=text("max_new_tokens"), **sizes)
    names = ("do_sample", "seed", "temperature", "top_p", "num_beams", "max_new_tokens")
    return dict(zip(names, (sample, seed, temperature, top_p, beams, length), strict=True))


def _text(request: gr.Request, key: str) -> str:
    """A text in the browser's language."""
    return (CHINESE if (request.headers.get("accept-language") or "").lower().startswith("zh") else ENGLISH)[key]


def _numbers(request: gr.Request, answer: Answer) -> str:
    """Length and speed of an answer."""
    count, first = len(answer.ids), answer.seconds_to_first_token
    speed = (count - 1) / (answer.seconds - first) if answer.seconds > first else count / answer.seconds
    numbers = {"count": count, "speed": speed, "first": first}
    return _text(request, "numbers").format(**numbers, cached=answer.cached_tokens, prompt=answer.prompt_tokens)


def _cache_for_display(image: Image.Image) -> str:
    """The path of a file that the page may show, in a format that every browser reads."""
    shown = image.copy()
    shown.thumbnail((MAX_SHOWN_SIDE, MAX_SHOWN_SIDE))
    return save_pil_to_cache(shown, get_upload_folder())


def serve(
    chat: Chat,
    description: str,
    options: GenerationOptions,
    host: str = "127.0.0.1",
    port: int = 7860,
    share: bool = False,
    examples: Sequence[str | Path] = (),
    is_blocking: bool = True,
) -> gr.Blocks:
    """Serves the page until it is interrupted, or in the background until its ``close`` if not ``is_blocking``.

    ``description`` is shown under the chat, ``options`` are the initial settings, ``share`` also opens a public tunnel,
    and ``examples`` are image files that a click adds. Raises UserError if the port is in use, or an example cannot be
    read.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    page = _Page(chat, description, examples).build(options).queue()
    theme = gr.themes.Default(primary_hue="slate", secondary_hue="slate", font=FONT, font_mono=MONOSPACE)
    try:
        page.launch(
            server_name=host, server_port=port, share=share, prevent_thread_lock=not is_blocking, theme=theme, css=CSS,
            i18n=gr.I18n(en=ENGLISH, zh=CHINESE), footer_links=[], run_history=False, ssr_mode=False,
            quiet=not is_blocking, max_file_size="50mb",
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"Port {port} of {host} is in use or not allowed: choose another one with --port.") from error
    return page
