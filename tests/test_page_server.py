# ruff: noqa: F811  (fixtures)
"""The web page's server, without a browser: chats, their images and files, and what it says about errors."""

import gc
import json
import os
import queue
import re
import threading
import time
from pathlib import Path

import pytest
from gradio_client import Client, handle_file
from page_clients import SETTINGS, answered, ask, connect, folder, models, page, picture, readable, stored  # noqa: F401
from picture_kinds import saved
from PIL import Image
from serving import GREEDY, served

from minigpt4.common.errors import UserError
from minigpt4.serve import page_answers, page_chat, page_layout, web

SECRET = "/srv/secret/weights.pth"


def test_a_chat_has_a_limited_number_of_images(connect, picture, folder, monkeypatch):
    assert page_chat.MAX_IMAGES <= 16
    monkeypatch.setattr(page_chat, "MAX_IMAGES", 2)
    client = connect()
    for count, is_refused in ((3, True), (1, False), (2, True), (1, False), (1, True)):
        assert ("A chat can have 2 images" in ask(client, *[picture] * count)[2]) == is_refused
    client.predict(api_name="/clear")
    assert "⚠" not in ask(client, picture)[2]
    assert "一次对话最多 2 张图片" in ask(connect("zh-CN"), *[picture] * 3)[2]


def test_large_images_do_not_stay_in_memory(connect, tmp_path, folder):
    size, client = 4500, connect()
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(saved(Image.new("1", (size, size), number % 2), "PNG"))
    assert max(file.stat().st_size for file in tmp_path.iterdir()) < 20_000
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = peak_memory()
    assert "⚠" not in ask(client, *sorted(tmp_path.iterdir()))[2]
    assert peak_memory() - before < 3 * size**2  # the pixels of one image
    for file in stored(folder):
        with Image.open(file) as shown:
            assert max(shown.size) <= page_chat.MAX_SHOWN_SIDE


def peak_memory():
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text()).group(1))


def test_images_are_deleted_with_their_chat(connect, picture, folder, tmp_path):
    (broken := tmp_path / "broken.png").write_bytes(picture.read_bytes()[:50])
    client, before = connect(), set(stored(folder))
    for count in (1, 2):
        assert "'broken.png' cannot be read" in ask(client, picture, broken)[2]
        assert "⚠" not in ask(client, picture)[2]
        assert len(set(stored(folder)) - before) == count
    client.predict(api_name="/clear")
    assert set(stored(folder)) == before


def test_what_the_model_cannot_answer_can_be_asked_again(connect, picture, folder, chat, monkeypatch):
    client, before = connect(), set(stored(folder))
    monkeypatch.setattr(chat, "encode_img", lambda *_: 1 / 0)
    _, messages, status = ask(client, picture)
    assert "The model failed" in status and messages[-1]["content"][0]["text"] == "(no answer)"
    assert len(set(stored(folder)) - before) == 1
    monkeypatch.undo()
    _, messages, status = answered(client, client.predict(*SETTINGS, api_name="/regenerate"))
    assert "tokens/s" in status and messages[-1]["content"][0]["text"] != "(no answer)" and len(messages) == 3


def test_images_are_deleted_when_their_session_ends(connect, picture, folder, monkeypatch):
    monkeypatch.setenv("GRADIO_IS_E2E_TEST", "1")  # a session ends a second after its page is closed
    client, before = connect(), set(stored(folder))
    ask(client, picture)
    assert set(stored(folder)) - before
    client.close()
    end = time.monotonic() + 20
    while set(stored(folder)) - before:
        assert time.monotonic() < end
        time.sleep(0.1)


def test_two_chats_can_have_the_same_upload(connect, picture, folder):
    assert "⚠" not in ask(connect(), picture)[2]
    assert len(stored(folder, uploads=True)) == 1  # the path depends on the content only


@pytest.fixture
def reading(chat, monkeypatch):
    """Two events: an image is being read, and it may go on."""
    begun, may_end, plain = threading.Event(), threading.Event(), chat.vis_processor
    monkeypatch.setattr(chat, "vis_processor", lambda image: (begun.set(), may_end.wait(20), plain(image))[-1])
    yield begun, may_end
    may_end.set()


def sent(client, picture):
    message = {"text": "", "files": [handle_file(str(picture))]}
    return client.submit(message, {}, *SETTINGS, api_name="/submit")


def test_chats_do_not_wait_for_the_images_of_others(connect, picture, folder, chat, monkeypatch):
    barrier, plain = threading.Barrier(3), chat.vis_processor
    monkeypatch.setattr(chat, "vis_processor", lambda image: (barrier.wait(20), plain(image))[-1])
    clients = [connect() for _ in range(3)]
    events = [sent(client, picture) for client in clients]
    assert all("⚠" not in readable(event.result(30))[2] for event in events)


def test_of_two_messages_at_the_same_time_one_is_refused(connect, picture, folder, reading):
    client, (begun, may_end) = connect(), reading
    first = sent(client, picture)
    assert begun.wait(20)
    assert "is being answered" in ask(client)[2]
    may_end.set()
    _, messages, status = answered(client, first.result(20))
    assert "⚠" not in status and [message["role"] for message in messages] == ["user", "user", "assistant"]


def test_a_chat_that_is_cleared_while_its_images_are_read_stays_empty(connect, picture, folder, reading):
    client, (begun, may_end) = connect(), reading
    first = sent(client, picture)
    assert begun.wait(20)
    client.predict(api_name="/clear")
    may_end.set()
    first.result(20)
    _, messages, _ = ask(client)
    assert [message["role"] for message in messages] == ["user", "assistant"]


def test_stop_ends_a_message_whose_images_are_read(connect, picture, folder, reading):
    client, (begun, may_end) = connect(), reading
    first = sent(client, picture)
    assert begun.wait(20)
    client.predict(api_name="/stop")
    may_end.set()
    _, messages, status = readable(first.result(20))
    assert "Stopped." in status and messages == []


def test_the_turns_of_images_are_those_of_addresses(connect, picture, folder, monkeypatch):
    clients, plain = set(), page_answers.ImageDecoder.submit

    def submit(self, data, name, size, client):
        clients.add(client)
        return plain(self, data, name, size, client)

    monkeypatch.setattr(page_answers.ImageDecoder, "submit", submit)
    ask(connect(), picture)
    assert clients == {"127.0.0.1"}


def test_sessions_are_limited(models, picture, monkeypatch):
    monkeypatch.setattr(page_layout, "MAX_SESSIONS", 1)
    monkeypatch.setenv("GRADIO_TEMP_DIR", os.environ["GRADIO_TEMP_DIR"])  # restored afterwards
    with served(web.build_app(models, GREEDY)) as url:
        for _ in range(2):
            ask(Client(url, verbose=False), picture)
        gc.collect()
        assert len(stored(Path(os.environ["GRADIO_TEMP_DIR"]))) == 1


def test_an_upload_that_is_gone_is_asked_for_again(connect, picture, monkeypatch):
    def delete(path):
        path.unlink()
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_bytes", delete)
    assert "⚠ ab.png is no longer on the server: add it again." in ask(connect(), picture)[2]


def test_errors_show_neither_paths_nor_tracebacks(connect, picture, chat, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError(f"cannot read {SECRET}")

    client, chinese = connect(), connect("zh-CN,zh;q=0.9")
    monkeypatch.setattr(chat, "vis_processor", fail)
    shown = [ask(client, picture), ask(chinese, picture)]
    monkeypatch.undo()
    monkeypatch.setattr(chat, "encode_img", fail)
    shown += [ask(client, picture), ask(chinese, picture)]
    monkeypatch.undo()
    texts = [status for _, _, status in shown]
    assert all(("The model failed" in text) == (i % 2 == 0) for i, text in enumerate(texts))
    assert all(("模型出错" in text) == (i % 2 == 1) for i, text in enumerate(texts))
    assert caplog.text.count("RuntimeError: cannot read") == 4  # where the operator finds the reason
    monkeypatch.setattr(page_chat.Session, "delete_files", fail)
    with pytest.raises(Exception) as error:
        client.predict(api_name="/clear")
    monkeypatch.undo()
    shown = json.dumps([shown, str(error.value)])
    assert "minigpt4/" not in shown and SECRET not in shown and "RuntimeError" not in shown
    client.predict(api_name="/clear")
    assert "⚠" not in ask(client)[2]  # the chat continues


def test_too_many_questions_and_slow_answers_are_refused(connect, models, monkeypatch):
    def full(request):
        raise queue.Full

    monkeypatch.setattr(models[0].engine, "submit", full)
    assert "Too many questions are waiting" in ask(connect())[2]
    assert "等待的问题过多" in ask(connect("zh"))[2]
    monkeypatch.undo()
    monkeypatch.setattr(page_answers, "TIMEOUT_SECONDS", -1.0)
    assert "took longer than" in ask(connect())[2] and "已中止" in ask(connect("zh"))[2]


def test_left_out_turns_are_reported(connect, models, monkeypatch):
    client, engine = connect(), models[0].engine
    ask(client, text=60 * "why ")
    monkeypatch.setattr(engine, "max_length", 200)
    monkeypatch.setattr(engine._batch, "max_length", 200)
    assert "its oldest question and answer were left out" in ask(client, text=60 * "how ")[2]


def test_images_of_every_kind(connect, folder, image_kinds):
    (good, bad), client = image_kinds, connect()
    for file in bad:
        assert f"'{file.name}'" in ask(client, file)[2]
    for count in (0, 16):
        assert "⚠" not in ask(client, *good[count : count + 16])[2]
        client.predict(api_name="/clear")


def test_kept_chats_are_restored_in_any_session_and_checked(connect, picture, folder):
    client = connect()
    message = {"text": "Why?", "files": [handle_file(str(picture))]}
    client.predict(message, {}, *SETTINGS, api_name="/submit")
    outputs = client.predict(api_name="/answer")
    kept, messages = outputs[3], outputs[1]
    restored = connect().predict(kept, api_name="/restore")[1]
    assert [message["role"] for message in restored] == [message["role"] for message in messages]
    assert restored[1:] == messages[1:]
    restarted = connect()  # its page is still open, and was not reloaded
    _, continued, _ = answered(restarted, restarted.predict({"text": "How?"}, kept, *SETTINGS, api_name="/submit"))
    assert continued[1:3] == messages[1:3] and len(continued) == 5
    question = kept["turns"][0]
    for wrong in (
        {"turns": []},
        {"minigpt4_chat": 2, "turns": []},
        kept | {"turns": [question | {"question": 5}]},
        kept | {"turns": [question | {"question": "x" * 30_000}]},
        kept | {"turns": [question | {"images": ["/etc/passwd"]}]},
        kept | {"turns": [question | {"images": ["data:image/webp;base64,%%"]}]},
        kept
        | {"turns": [question | {"images": question["images"] * 10}, question | {"images": question["images"] * 10}]},
    ):
        status = str(connect().predict(wrong, api_name="/restore"))
        assert re.search("is not a saved chat|has 20 images|Image 1 of the file|Only uploaded files", status), wrong
    images = [question["images"][0], question["images"][0][:63]]
    for wrong, text in ((kept | {"turns": [question | {"images": images}]}, "无法读取文件中的第 2 张图片。"), (
        kept | {"turns": [question | {"question": "<ImageHere>"}]}, "问题中不能包含 <ImageHere>：请直接添加图片。"
    ), ({}, "")):  # fmt: skip
        status = connect("zh").predict(wrong, api_name="/restore")[2]
        assert text in re.sub(r"\\(.)", r"\1", status) and bool(text) == ("⚠" in status)


def test_a_chat_that_no_browser_could_store_is_missed(connect, monkeypatch):
    monkeypatch.setattr(page_answers, "MAX_KEPT_BYTES", 50)
    client = connect()
    client.predict({"text": "Why?"}, {}, *SETTINGS, api_name="/submit")
    _, _, status, kept, *_ = client.predict(api_name="/answer")
    assert kept == {"too_large": True} and status.count("too large") == 1
    restarted = connect()
    assert "no longer has the earlier messages" in restarted.predict(kept, api_name="/restore")[2]
    box, messages, status, *_ = restarted.predict({"text": "And?"}, kept, *SETTINGS, api_name="/submit")
    assert "no longer has the earlier messages" in status and not messages and "value" not in box
    box, _, _, kept, *_ = restarted.predict(api_name="/clear")
    assert kept == {} and "value" not in box  # the question is still there
    assert "⚠" not in restarted.predict({"text": "And?"}, kept, *SETTINGS, api_name="/submit")[2]


@pytest.mark.parametrize("seed", [-1, 1.5, 2**60])
def test_seeds_are_whole_numbers(connect, seed):
    settings = [seed if number == 3 else value for number, value in enumerate(SETTINGS)]
    outputs = connect().predict({"text": "Why?"}, {}, *settings, api_name="/submit")
    assert "has to be a whole number from 0 to 9007199254740992" in readable(outputs)[2]


def test_a_file_of_ratings_that_cannot_be_written_is_refused_at_the_start(tmp_path):
    with pytest.raises(UserError, match=r"--feedback: .* cannot be written \(Is a directory\); give another file"):
        page_chat.check_writable(tmp_path)
