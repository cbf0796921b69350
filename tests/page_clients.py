"""What the tests of the page's server share: the server, clients without a browser, and the files that it stores."""

import io
import os
import re
import shutil
from pathlib import Path

import httpx
import pytest
from gradio_client import Client, handle_file
from picture_kinds import saved
from PIL import Image
from serving import GREEDY, served

from minigpt4.serve import web
from minigpt4.serve.engine import Engine
from minigpt4.serve.page_answers import PageModel

SETTINGS = [False, 1.0, 0.9, 1, 1, 4]  # greedy, and short
FILE = {"orig_name": "a.png", "meta": {"_type": "gradio.FileData"}}


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    file = tmp_path_factory.mktemp("uploads") / "a*b*.png"
    file.write_bytes(saved(Image.new("RGB", (40, 30), "red"), "PNG"))
    return file


@pytest.fixture(scope="module")
def models(chat):
    engine = Engine(chat, max_queue=4)
    yield [PageModel(engine, "small", "Small")]
    engine.close(2)


@pytest.fixture(scope="module")
def page(models, picture):
    with served(web.build_app(models, GREEDY, [picture])) as url:
        yield url


@pytest.fixture
def folder(page):
    """Where the server stores uploads and images of chats; afterwards without uploads."""
    folder = Path(os.environ["GRADIO_TEMP_DIR"])
    yield folder
    delete_uploads(folder)


def stored(folder, uploads=False):
    """The images of chats, or the uploads."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.parent.name != "kept"]
    return [file for file in files if file.parent.name.startswith("kept") != uploads]


def delete_uploads(folder):
    for file in stored(folder, uploads=True):
        file.unlink() if file.parent == folder else shutil.rmtree(file.parent, ignore_errors=True)


def ask(client, *files, text="Why?"):
    """Sends a message: what is left in the box, the messages of the chat, and the status line at the end."""
    message = {"text": text, "files": [handle_file(str(file)) for file in files]}
    return answered(client, client.predict(message, {}, *SETTINGS, api_name="/submit"))


def answered(client, outputs):
    """``readable`` after the answer that follows an accepted question."""
    accepted = readable(outputs)
    return accepted if "⚠" in accepted[2] else readable(client.predict(api_name="/answer"))


def readable(outputs):
    box, messages, status, *_ = outputs
    return box.get("value"), messages, re.sub(r"\\(.)", r"\1", status)


@pytest.fixture
def connect(page):
    """A new session of the page, in a language."""
    return lambda language="en": Client(page, verbose=False, headers={"Accept-Language": language})


def upload(page, name="a.png", data=b"x"):
    return httpx.post(f"{page}/gradio_api/upload", files={"files": (name, io.BytesIO(data))})
