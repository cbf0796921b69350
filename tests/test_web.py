# ruff: noqa: F811  (fixtures)
"""The page in a browser, with the embedded model before any training: its answers are nonsense, but they stream."""

import base64
import json
import re
import shutil

import page_browser
import pytest
from page_visits import (  # noqa: F401
    OPTIONS,
    address,
    browser,
    engine,
    images,
    ratings,
    slow_chat,
    visit,
)  # fmt: skip
from serving import served

from minigpt4.serve.engine import Engine
from minigpt4.serve.page_answers import Job, PageModel
from minigpt4.serve.web import build_app

pytestmark = pytest.mark.skipif(not shutil.which(page_browser.CHROMIUM), reason="there is no Chromium")


def asked(page, question="What is there?"):
    """Asks, and stops the answer after a few tokens."""
    page.send(question)
    page.wait(lambda: page.questions[-1:] == [question] and page.answer)
    page.press("Stop")
    page.wait(lambda: page.has_button("Send"))


def test_the_first_view_says_what_it_is_and_its_examples_run(visit):
    page = visit()
    text = page.page.inner_text("#page")
    assert "Ask about an image" in text and "Embedded model, CPU" in text
    assert not page.page.locator("#tasks").count()  # only MiniGPT-v2 has them
    assert page.page.evaluate("document.activeElement.tagName") == "TEXTAREA"
    assert page.page.evaluate("document.documentElement.lang") == "en"
    page.page.click(".example >> nth=0")
    page.wait(lambda: page.answer)
    assert page.questions == ["Describe this image in detail."] and page.num_images == 1
    assert not page.page.is_visible("#welcome") and page.page.evaluate("document.activeElement.tagName") == "TEXTAREA"
    assert page.page.get_attribute("#chat0 .message-row img", "alt") == "Image 1 of this chat"
    page.press("Stop")
    page.page.click('#chat0 button[aria-label="Full size"]')
    page.wait(lambda: page.page.evaluate("document.fullscreenElement?.querySelector('img').offsetHeight") > 600)
    page.page.keyboard.press("Escape")


def test_answers_stream_and_stop(visit, images):
    page = visit()
    page.upload(images / "0.png")
    page.send("What is there?")
    page.wait(lambda: page.answer)
    begun = page.answer
    page.wait(lambda: len(page.answer) > len(begun) + 10)
    assert page.answer.startswith(begun[:10]) and page.has_button("Stop") and not page.has_button("Send")
    page.page.fill("#box textarea", "And n")  # while the answer grows
    page.press("Stop")
    page.wait(lambda: "Stopped." in page.status)
    count, partial_answer = page.num_tokens, page.answers
    assert 0 < count < 200 and page.typed == "And n" and page.has_button("Send")
    page.page.wait_for_timeout(300)
    assert (page.num_tokens, page.answers) == (count, partial_answer)
    assert "tokens/s" in page.status and page.questions == ["What is there?"] and page.num_images == 1
    asked(page, "And now?")
    assert len(page.answers) == 2
    page.press("Retry")
    page.wait(lambda: page.has_button("Stop") and page.answer)
    assert page.page.input_value("#side input[type=number] >> nth=2") == "43"  # the seed
    page.press("new")
    page.wait(lambda: not page.questions and not page.answers and page.page.is_visible("#welcome"))
    page.page.wait_for_timeout(300)
    assert not page.answers and page.num_images == 0 and page.has_button("Send")


TYPED = "a*b*c **d** <script>e</script> <b>f</b> &lt; <img src='http://evil.example/1.png'> # g"
TYPED += " ![h](http://evil.example/2.png) [i](http://evil.example) http://evil.example/3.png $$j$$ `k`"


def test_texts_are_shown_as_they_are_and_nothing_comes_from_other_hosts(visit, address, images, slow_chat, monkeypatch):
    page, hosts, messages = visit(), set(), []
    page.context.on("request", lambda request: hosts.add(re.sub(r"^(\w+:(//[^/]*)?).*", r"\1", request.url)))
    monkeypatch.setattr(slow_chat, "decode_answer", lambda ids, conv: TYPED)
    page.reload()
    page.page.on("console", lambda message: messages.append(message.text))
    page.page.on("pageerror", lambda error: messages.append(str(error)))
    page.upload(images / "0.png")
    asked(page, TYPED)
    assert page.questions == page.answers == [TYPED]
    (strange := images / "[a](b) _c_.png").write_bytes(b"no image")
    page.upload(strange)
    page.send()
    page.wait(lambda: "cannot be read" in page.status)
    assert f"'{strange.name}'" in page.status
    page.press("Remove this image")
    page.send("Is <ImageHere> *an* image?")
    page.wait(lambda: "A question cannot contain <ImageHere>" in page.status)
    assert page.typed == "Is <ImageHere> *an* image?"
    assert hosts <= {address, "data:", f"blob:{address}"} and address in hosts and not messages


def test_browsers_are_answered_at_the_same_time_and_do_not_see_each_other(visit, images):
    one, other = visit(), visit()
    for page, question in ((one, "First?"), (other, "Second?")):
        page.upload(images / "1.png")
        page.send(question)
    for page in (one, other):
        page.wait(lambda page=page: page.answer)
    assert one.has_button("Stop") and other.has_button("Stop")  # neither had to wait for the other's end
    assert (one.questions, other.questions) == (["First?"], ["Second?"])
    one.press("Stop"), other.press("Stop")


def test_who_waits_sees_how_many_are_before_and_can_stop(visit, engine, monkeypatch):
    monkeypatch.setattr(engine, "max_batch", 1)
    finished, plain = [], Job.on_update  # the updates with which answers ended
    note = lambda *args: getattr(args[3], "finish_reason", None) and finished.append(args[3])  # noqa: E731
    monkeypatch.setattr(Job, "on_update", lambda *args: (note(*args), plain(*args)))
    pages = [visit() for _ in range(4)]
    for page, locale in zip(pages, "1234", strict=True):
        page.send(f"Question {locale}?")
        page.wait(lambda page=page: page.questions)
    pages[0].wait(lambda: pages[0].answer)
    pages[3].wait(lambda: "2 questions are ahead of yours." in pages[3].status)
    pages[2].wait(lambda: "1 question is ahead of yours." in pages[2].status)
    pages[1].wait(lambda: "answering other questions; yours is next." in pages[1].status)
    pages[2].press("Stop")
    pages[2].wait(lambda: "Stopped." in pages[2].status)
    assert pages[2].answers == ["(no answer)"] and pages[2].has_button("Retry")
    pages[0].press("Stop")
    pages[1].wait(lambda: pages[1].answer)
    pages[1].context.close()  # an answer ends with its page
    pages[3].wait(lambda: pages[3].answer)
    assert len(finished) == 2 and all(len(answer.ids) < OPTIONS.max_new_tokens for answer in finished)


def test_chats_survive_a_reload_in_their_browser_only(visit, images):
    page = visit()
    page.upload(images / "0.png")
    asked(page)
    questions, answers = page.questions, page.answers
    page.page.fill("#box textarea", "And n")
    page.reload()
    page.wait(lambda: page.questions and page.typed == "And n")
    assert (page.questions, page.answers, page.num_images) == (questions, answers, 1)
    page.send("And now?")  # the chat goes on
    page.wait(lambda: len(page.answers) == 2 and page.answer)
    page.reload()  # in the middle of an answer
    page.wait(lambda: page.answers == [*answers, "(no answer)"] and "was interrupted" in page.status and not page.typed)
    page.press("Retry")
    page.wait(lambda: page.has_button("Stop") and len(page.answers) == 2 and page.answer != "(no answer)")
    page.press("Stop")
    other = visit()
    other.page.wait_for_timeout(300)
    assert not other.questions
    page.press("new")
    page.wait(lambda: not page.questions)
    page.reload()
    page.page.wait_for_timeout(300)
    assert not page.questions


def test_questions_are_edited_and_taken_back(visit, images):
    page = visit()
    page.upload(images / "0.png")
    asked(page, "First?")
    asked(page, "Second?")
    page.page.click('#chat0 button[aria-label="Edit"] >> nth=0')
    page.page.fill("#chat0 textarea", "First again?")
    page.page.click('#chat0 button[aria-label="Send"]')
    page.wait(lambda: page.questions == ["First again?"] and page.answer and page.has_button("Stop"))
    assert page.num_images == 1
    page.page.locator("#box .stop-button").click()
    page.wait(lambda: page.has_button("Undo"))
    page.page.fill("#box textarea", "Something else")
    page.press("Undo")
    page.wait(lambda: "Send or clear what is in the box first." in page.status)
    assert page.typed == "Something else" and page.questions == ["First again?"]
    page.page.fill("#box textarea", "")
    page.press("Undo")
    page.wait(lambda: not page.questions and page.typed == "First again?" and page.num_added == 1)
    page.page.click(".example >> nth=0")  # meanwhile
    page.wait(lambda: page.answer)
    page.press("Stop")
    page.wait(lambda: page.has_button("Send") and page.num_added == 1)
    page.page.press("#box textarea", "Enter")
    page.wait(lambda: page.questions[1:] == ["First again?"] and page.num_images == 2 and len(page.answers) == 2)
    page.press("Stop")


def test_refused_messages_stay_in_the_box_and_errors_are_chinese(visit, images):
    page = visit(locale="zh-CN")
    assert page.page.inner_text("#new") == "新对话" and page.page.evaluate("document.documentElement.lang") == "zh-CN"
    page.send()
    page.wait(lambda: "没有问题" in page.status)
    page.upload(images / "broken.png")
    page.send("What is there?")
    page.wait(lambda: "无法读取图片 'broken.png'" in page.status)
    assert page.typed == "What is there?" and page.num_added == 1 and not page.questions and not page.num_images
    assert str(images) not in page.status and not page.toasts
    page.press("移除这张图片")
    long = 3000 * "why "
    page.send(long)
    page.wait(lambda: "问题过长" in page.status)
    assert page.typed.strip() == long.strip() and not page.questions
    page.send("Why?")
    page.wait(lambda: page.answer and "还没有图片" in page.status)  # a hint, and an answer
    page.press("停止")


def test_files_are_added_by_drop_paste_and_camera(visit, images):
    page = visit()
    data = page.page.evaluate_handle(
        """async (base64) => {
            const data = new DataTransfer(), bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
            data.items.add(new File([bytes], "a.png", {type: "image/png"}));
            return data;
        }""",
        base64.b64encode((images / "0.png").read_bytes()).decode(),
    )
    page.page.dispatch_event("#intro", "drop", {"dataTransfer": data})
    page.wait(lambda: page.num_added == 1)
    page.page.evaluate(
        "(data) => document.body.dispatchEvent(new ClipboardEvent('paste', {clipboardData: data, bubbles: true}))", data
    )
    page.wait(lambda: page.num_added == 2)
    page.page.evaluate(
        """(data) => {
            data.items.add(new File(["x"], "notes.txt", {type: "text/plain"}));
            const drop = new DragEvent("drop", {bubbles: true, cancelable: true, dataTransfer: data});
            document.querySelector("#box textarea").dispatchEvent(drop);
        }""",
        data,
    )
    page.wait(lambda: page.num_added == 3 and page.page.inner_text("#note") == "notes.txt is not an image.")
    page.press("camera")
    page.wait(lambda: page.page.evaluate("document.querySelector('#shot video')?.videoWidth > 0"))
    page.page.click("#shot button >> nth=0")
    page.wait(lambda: page.num_added == 4 and not page.page.locator("#shot").count())
    asked(page)
    assert page.num_images == 4


def test_chats_are_saved_as_files_and_opened_again(visit, images, tmp_path):
    page, other = visit(), visit()
    page.upload(images / "0.png")
    asked(page)
    page.page.click(".toggle-button")
    with page.page.expect_download() as download:
        page.press("save")
    assert re.fullmatch(r"minigpt4-chat-\d{8}-\d{6}\.json", download.value.suggested_filename)
    download.value.save_as(tmp_path / "chat.json")
    other.page.set_input_files("#open input, input[accept='.json']", str(tmp_path / "chat.json"))
    other.wait(lambda: other.questions)
    assert (other.questions, other.answers, other.num_images) == (page.questions, page.answers, 1)
    page.press("new")
    page.wait(lambda: not page.questions and not page.page.locator("#export a").count())


def test_ratings_are_stored(visit, images, ratings):
    page = visit()
    page.upload(images / "0.png")
    asked(page)
    page.press("Like")
    page.wait(lambda: "rating is stored" in page.status)
    row = json.loads(ratings.read_text(encoding="utf-8").splitlines()[-1])
    assert row["rating"] == "up" and row["model"] == "embedded" and row["settings"]["max_new_tokens"] == 200
    question, answer = row["conversation"]
    assert question["content"] == "What is there?" and question["images"][0].startswith("data:image/webp;base64,")
    assert answer == {"role": "assistant", "content": page.answer} and row["time"]


def test_two_models_answer_side_by_side(visit, engine, chat, images):
    models = [PageModel(engine, "slow", "Slow model"), PageModel(Engine(chat), "quick", "Quick model")]
    with served(build_app(models, OPTIONS, [images / "0.png"])) as url:
        page = visit(url)
        assert "Slow model" in page.page.inner_text("#title") and not page.has_button("Like")
        page.page.click(".example >> nth=0")
        page.wait(lambda: page.answer and page.page.locator("#chat1 [data-testid=bot]").count())
        page.press("Stop")
        page.wait(lambda: "slow:" in page.status and "quick:" in page.status)
        assert "slow" in page.page.inner_text("#chat0") and "quick" in page.page.inner_text("#chat1")
        for width in (1100, 390):
            page.page.set_viewport_size({"width": width, "height": 844})
            boxes = [page.page.locator(f"#chat{i}").bounding_box() for i in range(2)]
            assert (boxes[0]["y"] == boxes[1]["y"]) == (width > 640)  # below each other on a phone
    models[1].engine.close(2)


def test_a_drawn_box_becomes_a_question_and_boxes_of_answers_are_drawn(visit, engine, slow_chat, images, monkeypatch):
    answer = "<p>a ring</p> {<5><30><40><60>} and <p>two <b> dots</p> {<50><50><70><70>}<delim>{<80><10><99><30>}"
    monkeypatch.setattr(slow_chat.model, "arch", "minigpt_v2")
    monkeypatch.setattr(slow_chat, "decode_answer", lambda *_, **__: answer)
    with served(build_app([PageModel(engine, "embedded", "")], OPTIONS)) as url:
        page = visit(url)
        page.press("draw")
        assert "Add an image first." in page.page.inner_text("#note")
        page.upload(images / "0.png")
        page.press("task-grounding")
        assert page.typed == "[grounding] describe this image in detail"
        page.press("draw")
        area, mouse = page.page.locator("#drawing section").bounding_box(), page.page.mouse
        for step, (x, y) in enumerate(((0.805, 0.705), (0.255, 0.205))):
            mouse.move(area["x"] + x * area["width"], area["y"] + y * area["height"])
            mouse.up() if step else mouse.down()
        page.page.fill("#drawing input >> nth=2", "75")
        page.page.click("#drawing button >> nth=0")
        question = "[identify] what is this {<25><20><75><70>}"
        assert page.typed == question
        page.press("draw")
        page.touch("#drawing section", (0.805, 0.705), (0.4, 0.3), (-0.1, -0.1))
        page.wait(
            lambda: [box.input_value() for box in page.page.locator("#drawing input").all()] == ["0", "0", "80", "70"]
        )
        page.page.click("#drawing button >> nth=0")  # headless Chromium gives some taps that follow a stroke no click
        page.wait(lambda: page.typed == "[identify] what is this {<0><0><80><70>}")
        assert page.page.get_attribute("#task-identify", "aria-pressed") == "true"
        page.send(question)
        page.wait(lambda: page.answer)
        page.press("Stop")
        page.wait(lambda: page.page.locator(".grounded img").count())
        alt = "The image with boxes around: a ring, two <b> dots"
        assert page.page.get_attribute(".grounded img", "alt") == alt and page.num_images == 2
        page.wait(lambda: page.page.evaluate("document.querySelector('.grounded img').naturalWidth") == 500)
        assert page.page.inner_text(".grounded p").split() == ["a", "ring", "and", "two", "<b>", "dots"]
        page.press("Edit")
        page.wait(lambda: page.page.locator("#chat0 textarea").count())
        page.wait(lambda: page.page.input_value("#chat0 textarea") == question)
