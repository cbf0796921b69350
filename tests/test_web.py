"""The page in a browser, with the embedded model before any training: its answers are nonsense, but they stream."""

import argparse
import re
import shutil
import time
from contextlib import closing
from dataclasses import replace
from random import Random

import picture_kinds
import pytest
from serving import served

from minigpt4.conversation.generation import GenerationOptions
from quickstart.scenes import draw_scene, render

CHROMIUM = "/usr/bin/chromium"
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
OPTIONS = GenerationOptions(max_new_tokens=200, seed=42)
SECONDS_PER_TOKEN = 0.02  # the embedded model is faster than anyone can press Stop

pytestmark = pytest.mark.skipif(not shutil.which(CHROMIUM), reason=f"there is no browser at {CHROMIUM}")


@pytest.fixture(scope="module")
def chat():
    import demo

    args = argparse.Namespace(
        cfg_path="eval_configs/quickstart_eval.yaml", gpu_id=0, options=["model.ckpt=null", "run.device=cpu"], seed=42
    )
    chat = demo.build_chat(args)
    plain = chat.stream

    def slow_stream(conv, images, options):
        with closing(plain(conv, images, replace(options, min_length=1000))) as answers:
            for answer in answers:
                time.sleep(SECONDS_PER_TOKEN)
                yield answer

    chat.stream = slow_stream
    chat.template = replace(chat.template, sep="%%")  # a stop string that it never generates
    return chat


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for number in range(2):
        render(draw_scene(Random(number)), Random(number)).save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:60])
    return folder


@pytest.fixture(scope="module")
def address(chat, images):
    from minigpt4.serve.web import build_app

    with served(build_app(chat, "Embedded model, CPU", OPTIONS, [images / "0.png"])) as url:
        yield url


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Page:
    """What a person does on the page and sees there."""

    def __init__(self, browser, address, locale="en-US"):
        self.context = browser.new_context(locale=locale, viewport={"width": 1100, "height": 900})
        self.context.set_default_timeout(15_000)
        self.page = self.context.new_page()
        self.page.goto(address)
        self.page.wait_for_selector("#box textarea")

    def upload(self, path):
        before = self.page.locator("#box button.delete-button").count()
        self.page.set_input_files("#box input[type=file]", str(path))
        self.wait(lambda: self.page.locator("#box button.delete-button").count() > before)

    def send(self, text=""):
        self.page.fill("#box textarea", text)
        self.page.press("#box textarea", "Enter")

    def press(self, name):
        self.page.click(f"#{name}")

    @property
    def questions(self):
        texts = self.page.locator("#chat [data-testid=user]").all_inner_texts()
        return [text.strip() for text in texts if text.strip()]

    @property
    def answers(self):
        return self.page.locator("#chat [data-testid=bot]").all_inner_texts()

    @property
    def status(self):
        return self.page.inner_text("#status")

    @property
    def num_images(self):
        return self.page.locator("#chat img[src*='/file=']").count()

    @property
    def num_tokens(self):
        found = re.search(r"(\d+) tokens,", self.status)
        return int(found.group(1)) if found else 0

    def wait(self, condition, seconds=15):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"{self.status!r} {self.page.inner_text('#chat')!r}"
            self.page.wait_for_timeout(30)


@pytest.fixture
def visit(browser, address):
    pages = []

    def new(**options):
        pages.append(Page(browser, address, **options))
        return pages[-1]

    yield new
    for page in pages:
        page.context.close()


def test_answers_stream_and_stop(visit, images):
    page = visit()
    page.upload(images / "0.png")
    page.send("What is there?")
    page.wait(lambda: page.num_tokens)
    first, begun = page.num_tokens, page.answers[0]
    page.wait(lambda: page.num_tokens > first + 10)
    assert page.answers[0].startswith(begun[:10]) and len(page.answers[0]) > len(begun)
    page.press("stop")
    page.wait(lambda: "stopped" in page.status)
    count, partial = page.num_tokens, page.answers
    assert 0 < count < 200
    page.page.wait_for_timeout(500)
    assert (page.num_tokens, page.answers) == (count, partial)
    assert "Embedded model, CPU" in page.status and "tokens/s" in page.status
    assert page.questions == ["What is there?"] and page.num_images == 1

    page.send("And now?")  # the partial answer is part of the prompt
    page.wait(lambda: len(page.answers) == 2)
    cached, prompt = map(int, re.search(r"(\d+) of (\d+) prompt", page.status).groups())
    assert count < cached < prompt
    page.press("stop")
    page.wait(lambda: "stopped" in page.status)

    page.press("retry")
    page.wait(lambda: "stopped" not in page.status and page.num_tokens)
    assert len(page.answers) == 2
    page.press("clear")
    page.wait(lambda: not page.questions and not page.answers)
    page.page.wait_for_timeout(300)
    assert not page.answers and page.num_images == 0


TYPED = "a*b*c **d** <script>e</script> <b>f</b> &lt; <img src='http://evil.example/1.png'> # g"
TYPED += " ![h](http://evil.example/2.png) [i](http://evil.example) http://evil.example/3.png $$j$$ `k`"


def test_texts_are_shown_as_they_are_and_nothing_comes_from_other_hosts(visit, address, images, chat, monkeypatch):
    page, hosts, messages = visit(), set(), []
    page.context.on("request", lambda request: hosts.add(re.sub(r"^(\w+:(//[^/]*)?).*", r"\1", request.url)))
    page.page.on("console", lambda message: messages.append(message.text))
    monkeypatch.setattr(chat, "decode_answer", lambda ids, conv: TYPED)
    page.page.reload()
    page.page.wait_for_selector("#box textarea")
    page.upload(images / "0.png")
    page.send(TYPED)
    page.wait(lambda: page.num_tokens)
    page.press("stop")
    page.wait(lambda: "stopped" in page.status)
    assert page.questions == page.answers == [TYPED]
    (strange := images / "[a](b) _c_.png").write_bytes(b"no image")
    page.upload(strange)
    page.send()
    page.wait(lambda: "cannot be read" in page.status)
    assert f"'{strange.name}'" in page.status and f"'{strange.name}'" in page.page.inner_text(".toast-wrap")
    page.send("Is <ImageHere> *an* image?")
    page.wait(lambda: "A question cannot contain <ImageHere>" in page.page.inner_text(".toast-wrap"))
    assert "cannot contain <ImageHere>" in page.status
    assert page.page.input_value("#box textarea") == "Is <ImageHere> *an* image?"  # the question is not lost
    assert hosts <= {address, "data:", f"blob:{address}"} and address in hosts and not messages


def test_browsers_do_not_see_each_other_and_wait_in_turn(visit, images):
    one, other = visit(), visit()
    for page, question in ((one, "First?"), (other, "Second?")):
        page.upload(images / "1.png")
        page.send(question)
        page.wait(lambda page=page: page.questions)
    one.wait(lambda: one.num_tokens)
    assert (one.questions, other.questions) == (["First?"], ["Second?"])
    assert not other.answers
    other.wait(lambda: "queue" in other.page.inner_text("#chat"))
    one.press("stop")
    other.wait(lambda: other.answers)
    assert len(one.answers) == len(other.answers) == 1
    other.press("stop")
    other.wait(lambda: "stopped" in other.status)
    third = visit()
    assert not third.questions and not third.answers and third.num_images == 0


def test_an_answer_ends_with_its_page(visit):
    left, next_one = visit(), visit()
    left.send("Anyone?")
    left.wait(lambda: left.num_tokens)
    left.context.close()
    begin = time.monotonic()
    next_one.send("Is it my turn?")
    next_one.wait(lambda: next_one.num_tokens)
    assert time.monotonic() - begin < 200 * SECONDS_PER_TOKEN / 2
    next_one.press("stop")


def test_refused_messages_leave_no_trace(visit, images):
    page = visit()
    page.send()
    page.wait(lambda: "There is no question" in page.status)
    page.upload(images / "broken.png")
    page.send("What is there?")
    page.wait(lambda: "'broken.png' cannot be read as an image" in page.status)
    assert "'broken.png' cannot be read" in page.page.inner_text(".toast-wrap")
    assert str(images) not in page.status and "gradio" not in page.status
    page.send("Is <ImageHere> an image?")
    page.wait(lambda: "A question cannot contain" in page.status)
    assert not page.questions and not page.answers and page.num_images == 0

    page.page.click("#examples button >> nth=0")  # an image alone, and the chat continues
    page.wait(lambda: page.page.locator("#box button.delete-button").count() == 1)
    page.send()
    page.wait(lambda: "image received" in page.status)
    assert page.num_images == 1 and not page.answers
    page.send("What is there?")
    page.wait(lambda: page.num_tokens)
    page.press("stop")


def test_images_of_every_kind(visit, tmp_path):
    good, bad = picture_kinds.write_all(tmp_path)
    page = visit()
    for file in good:
        page.upload(file)
        page.send()
        page.wait(lambda: page.num_images == 1 and "image received" in page.status)
        page.press("clear")
        page.wait(lambda: page.num_images == 0)
    for file in bad:
        page.upload(file)
        page.send("What is there?")
        page.wait(lambda file=file: f"'{file.name}'" in page.status)
    assert page.num_images == 0 and not page.questions


def test_labels_follow_the_language_of_the_browser(visit):
    assert visit().page.inner_text("#stop") == "Stop"
    chinese = visit(locale="zh-CN")
    assert chinese.page.inner_text("#stop") == "停止"
    chinese.send()
    chinese.wait(lambda: "没有问题" in chinese.status)
