"""The parts of the web page, and which handler each event has."""

from collections.abc import Sequence
from typing import Any

import gradio as gr

from minigpt4.conversation.sampling import GenerationOptions
from minigpt4.serve.page_boxes import TASKS
from minigpt4.serve.page_chat import Session
from minigpt4.serve.page_guard import MAX_BODY_BYTES
from minigpt4.serve.page_handlers import PageHandlers

MAX_SESSIONS = 200  # then the one that is unused for longest is forgotten
QUIET = {"show_progress": "hidden"}


def build_page(page: PageHandlers, options: GenerationOptions, examples: Sequence[tuple[str, str]]) -> gr.Blocks:
    """Lays out the page and connects its events.

    ``options`` are the initial settings; each example is an image file that the page may show, and a question.
    """
    text = gr.I18n()
    with gr.Blocks(title="MiniGPT-4", analytics_enabled=False, fill_width=True) as blocks:
        blocks.state_session_capacity = MAX_SESSIONS
        page.session = session = gr.State(Session())
        # The key only keeps the text from being readable at a glance: everything of this browser profile can use it.
        page.kept = gr.BrowserState({}, storage_key="minigpt4-chat", secret="minigpt4-chat")
        with gr.Sidebar(position="right", open=False, width=320, elem_id="side"):
            page.settings = _build_settings(text, options)
            save, opened = _build_files(page, text)
        with gr.Column(elem_id="page"):
            with gr.Row(elem_id="head"):
                gr.Markdown("# MiniGPT-4\n\n" + " — ".join(model.description for model in page.models), elem_id="title")
                new = gr.Button(text("new_chat"), size="sm", elem_id="new", scale=0, min_width=90)
            buttons = _build_welcome(text, examples)
            with gr.Row(elem_id="chats"):
                page.chatbots = [_build_chatbot(page, model.name, i) for i, model in enumerate(page.models)]
            page.status = gr.Markdown(latex_delimiters=[], elem_id="status")
            if any(model.engine.chat.has_boxes for model in page.models):
                _build_tasks(text)
            with gr.Row(elem_id="input"):
                page.box = gr.MultimodalTextbox(
                    file_count="multiple", sources=["upload"], show_label=False, elem_id="box",
                    placeholder=text("placeholder"), max_plain_text_length=MAX_BODY_BYTES,
                )  # fmt: skip
                gr.Button(text("camera"), elem_id="camera", scale=0, min_width=44)
        _connect(page, blocks, session, {"save": save, "open": opened, "new": new})
        for button, example in zip(buttons, examples, strict=True):
            inputs = [session, gr.State(example), *page.settings.values()]
            _answer(page, button.click(page.run_example, inputs, _outputs(page), concurrency_limit=None, **QUIET))
    return blocks


def _outputs(page: PageHandlers) -> list[Any]:
    return [page.box, *page.chatbots, page.status, page.kept, page.settings["seed"], page.session, page.export]


def _answer(page: PageHandlers, accepted: Any) -> None:
    """Shows the answer after an event that accepts a question."""
    changed = [page.box, *page.chatbots, page.status, page.kept]
    accepted.then(page.answer, page.session, changed, concurrency_limit=None, **QUIET)


def _connect(page: PageHandlers, blocks: gr.Blocks, session: gr.State, parts: dict[str, Any]) -> None:
    settings, changed = [*page.settings.values()], _outputs(page)
    accepting = {"outputs": changed, "concurrency_limit": None, **QUIET}  # the engines limit what is answered
    begun = page.box.submit(page.begin, [session, page.box], [page.box, page.status], queue=False, **QUIET)
    _answer(page, begun.then(page.submit, [session, page.box, page.kept, *settings], **accepting))
    page.box.stop(page.stop, session, None, queue=False, **QUIET)
    parts["new"].click(page.clear, session, changed, queue=False, **QUIET)
    parts["open"].upload(page.open_file, [session, parts["open"]], **accepting)
    parts["save"].click(page.save, session, [page.export, page.status], **QUIET)
    for i, chatbot in enumerate(page.chatbots):
        _answer(page, chatbot.retry(page.regenerate, [session, *settings], **accepting))
        _answer(page, chatbot.edit(page.edit, [session, page.box, *settings], **accepting))
        chatbot.undo(page.undo, [session, page.box], changed, **QUIET)
        if page.feedback:
            chatbot.like(page.rate, [session, gr.State(i), *settings], page.status, **QUIET)
    blocks.load(page.restore, [session, page.kept], **accepting)


def _build_chatbot(page: PageHandlers, name: str, number: int) -> gr.Chatbot:
    """Messages are not grouped, as an image and its question would then have no button to edit."""
    return gr.Chatbot(
        elem_id=f"chat{number}", elem_classes="chat", height=None, label=name, show_label=len(page.models) > 1,
        buttons=["copy"], latex_delimiters=[], render_markdown=False, editable="user", group_consecutive_messages=False,
        feedback_options=("Like", "Dislike") if page.feedback else None,
    )  # fmt: skip


def _build_welcome(text: gr.I18n, examples: Sequence[tuple[str, str]]) -> list[gr.Button]:
    """What the page shows before the first message: page.css hides it afterwards."""
    with gr.Column(elem_id="welcome"):
        gr.Markdown(text("welcome"), elem_id="intro")
        with gr.Row(elem_id="examples"):
            return [gr.Button(question, icon=path, elem_classes="example") for path, question in examples]


def _build_tasks(text: gr.I18n) -> None:
    """The choice of a task for the question in the box: page.js writes and reads it there."""
    with gr.Row(elem_id="tasks"):
        for task in ("", *TASKS):
            gr.Button(task or text("no_task"), size="sm", elem_id=f"task-{task}", elem_classes="task", min_width=0)
        gr.Button(text("draw"), size="sm", elem_id="draw", min_width=0)


def _build_settings(text: gr.I18n, options: GenerationOptions) -> dict[str, Any]:
    """A component for each option that the page sets."""
    sizes, largest = {"step": 1, "precision": 0}, max(1000, options.max_new_tokens)
    gr.Markdown(text("settings"))
    return {
        "do_sample": gr.Checkbox(options.do_sample, label=text("sample")),
        "temperature": gr.Slider(0, 2, options.temperature, step=0.01, label=text("temperature")),
        "top_p": gr.Slider(0.01, 1, options.top_p, step=0.01, label="Top-p"),
        "seed": gr.Number(options.seed, label=text("seed")),
        "num_beams": gr.Slider(1, max(8, options.num_beams), options.num_beams, label=text("beams"), **sizes),
        "max_new_tokens": gr.Slider(1, largest, options.max_new_tokens, label=text("max_new_tokens"), **sizes),
    }


def _build_files(page: PageHandlers, text: gr.I18n) -> tuple[gr.Button, gr.UploadButton]:
    gr.Markdown(text("chat"))
    save = gr.Button(text("save"), size="sm", elem_id="save")
    opened = gr.UploadButton(text("open"), file_types=[".json"], type="binary", size="sm", elem_id="open")
    page.export = gr.Markdown(latex_delimiters=[], elem_id="export")  # a link, which page.js clicks
    gr.Markdown(text("privacy"), elem_classes="note")
    if page.feedback:
        gr.Markdown(text("feedback"), elem_classes="note")
    return save, opened
