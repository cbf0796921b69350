"""The chat as a web page, whose browsers the engines answer at the same time."""

import os
import secrets
import socket
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, closing
from pathlib import Path

import gradio as gr
from fastapi import FastAPI
from gradio.networking import setup_tunnel

from minigpt4.common.errors import UserError
from minigpt4.common.images import read_image
from minigpt4.conversation.sampling import GenerationOptions
from minigpt4.serve.access import OriginCheck
from minigpt4.serve.page_answers import PageModel
from minigpt4.serve.page_chat import save_shown
from minigpt4.serve.page_examples import QUESTIONS, draw_examples
from minigpt4.serve.page_guard import MAX_UPLOADED_FILE_BYTES, PageGuard
from minigpt4.serve.page_handlers import PageHandlers
from minigpt4.serve.page_layout import build_page
from minigpt4.serve.page_texts import CHINESE, ENGLISH

FONT, MONOSPACE = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]  # no fonts from other hosts


def build_app(
    models: Sequence[PageModel],
    options: GenerationOptions,
    examples: Sequence[str | Path] = (),
    host: str = "127.0.0.1",
    origins: Sequence[str] = (),
    feedback: Path | None = None,
) -> OriginCheck:
    """Builds the server of the page; ``host`` and ``origins`` are those of ``OriginCheck``.

    All ``models`` answer each question, side by side. ``options`` are the initial settings, ``examples`` up to three
    image files to try, by default drawings, and ``feedback`` is the JSONL file to which ratings are added; without it
    there are none. Raises UserError if an example cannot be read.
    """
    folder = tempfile.TemporaryDirectory(prefix="minigpt4-page-")
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": os.path.realpath(folder.name)}
    kept = Path(os.environ["GRADIO_TEMP_DIR"]) / "kept"
    kept.mkdir()
    shown = [save_shown(read_image(path), kept / f"{i}.webp") for i, path in enumerate(examples or draw_examples(kept))]
    page = PageHandlers(models, kept.parent, feedback)

    @asynccontextmanager
    async def clean_up(_: FastAPI) -> AsyncIterator[None]:
        with folder, closing(page.decoder):
            yield

    theme = gr.themes.Default(primary_hue="blue", secondary_hue="slate", font=FONT, font_mono=MONOSPACE)
    css, script = (Path(__file__).with_name(f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    app = FastAPI(lifespan=clean_up, docs_url=None, redoc_url=None, openapi_url=None)
    gr.mount_gradio_app(
        app, build_page(page, options, list(zip(shown, QUESTIONS, strict=False))).queue(), path="/", theme=theme,
        css=css, head=f"<script>{script}</script>", i18n=gr.I18n(en=ENGLISH, zh=CHINESE), footer_links=[],
        run_history=False, ssr_mode=False, show_error=False, max_file_size=MAX_UPLOADED_FILE_BYTES,
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
