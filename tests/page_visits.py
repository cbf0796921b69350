"""The fixtures of the page in a browser: a model that streams slowly, its server, the browser and its visits."""

import time
from dataclasses import replace
from functools import partial
from random import Random

import page_browser
import pytest
from serving import build_chat, served

from minigpt4.conversation.sampling import GenerationOptions
from minigpt4.serve import page_answers
from minigpt4.serve.engine import Engine
from minigpt4.serve.page_answers import PageModel
from minigpt4.serve.web import build_app
from quickstart.scenes import draw_scene, render

OPTIONS = GenerationOptions(max_new_tokens=200, seed=42)
SECONDS_PER_STEP = 0.02  # the embedded model is faster than anyone can press Stop


@pytest.fixture(scope="module")
def slow_chat():
    chat = build_chat()
    llm, plain = chat.model.llama_model, chat.model.llama_model.forward
    llm.forward = lambda *arguments, **named: (time.sleep(SECONDS_PER_STEP), plain(*arguments, **named))[1]
    chat.template = replace(chat.template, sep="%%")  # a stop string that it never generates
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page_answers, "GenerationOptions", partial(GenerationOptions, min_length=1000))
        yield chat


@pytest.fixture(scope="module")
def engine(slow_chat):
    engine = Engine(slow_chat)
    yield engine
    engine.close(2)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for number in range(2):
        render(draw_scene(Random(number)), Random(number)).save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:60])
    return folder


@pytest.fixture(scope="module")
def ratings(tmp_path_factory):
    return tmp_path_factory.mktemp("ratings") / "ratings.jsonl"


@pytest.fixture(scope="module")
def address(engine, images, ratings):
    model = PageModel(engine, "embedded", "Embedded model, CPU")
    with served(build_app([model], OPTIONS, [images / "0.png"], feedback=ratings)) as url:
        yield url


@pytest.fixture(scope="module")
def browser():
    with page_browser.browser() as chromium:
        yield chromium


@pytest.fixture
def visit(browser, address):
    pages = []

    def new(url=address, **options):
        pages.append(page_browser.Page(browser, url, **options))
        return pages[-1]

    yield new
    for page in pages:
        page.context.close()
