"""Images of a server's clients: the pixels of the direct path, limits of time and memory, and turns among clients."""

import contextlib
import functools
import gc
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import Future

import openai
import picture_kinds
import psutil
import pytest
import torch
from PIL import Image
from serving import Server, content, data_url

from minigpt4.common.errors import UserError
from minigpt4.common.images import read_image
from minigpt4.processors import Blip2ImageEvalProcessor
from minigpt4.serve import api, image_decoder, image_worker
from minigpt4.serve.completions import Completions
from minigpt4.serve.image_decoder import ImageDecoder

READABLE, UNREADABLE = picture_kinds.readable(), picture_kinds.unreadable()
LARGE = picture_kinds.saved(Image.new("1", (10_000, 9_990)), "PNG")  # seconds to decode


@pytest.fixture
def new_decoder():
    decoders = []
    yield lambda: decoders.append(ImageDecoder()) or decoders[-1]
    for decoder in decoders:
        decoder.close()


@pytest.fixture
def decoder(new_decoder):
    return new_decoder()


@pytest.fixture(scope="module")
def shared_decoder():
    """One for tests that leave its processes as they are."""
    decoder = ImageDecoder()
    yield decoder
    decoder.close()


def workers(others=()):
    """The processes that decode images, without those that were there before."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # it has ended
            found += [child] if "image_worker" in " ".join(child.cmdline()) else []
    return [child for child in found if child not in others]


@pytest.mark.parametrize("name", READABLE)
def test_the_same_pixels_as_without_a_process(chat, shared_decoder, name):
    data, size = READABLE[name], chat.vis_processor.first_size
    image = shared_decoder.decode(data)
    assert (image.mode, image.size, image.tobytes()) == ("RGB", (direct := read_image(data)).size, direct.tobytes())
    assert torch.equal(chat.preprocess_image(shared_decoder.decode(data, size=size)), chat.preprocess_image(data))


def test_a_photo_gives_the_same_tensor(chat, shared_decoder):
    data = picture_kinds.saved(Image.effect_mandelbrot((900, 700), (-2, -1, 1, 1), 50).convert("RGB"), "JPEG")
    expected = chat.preprocess_image(data)
    assert torch.equal(chat.preprocess_image(shared_decoder.decode(data, size=chat.vis_processor.first_size)), expected)


def test_an_own_processor_gets_the_whole_image():
    class Own(Blip2ImageEvalProcessor):
        pass

    assert Own(28).first_size is None and Blip2ImageEvalProcessor(28).first_size == (28, 28)


def test_the_api_uses_the_tensor_of_the_chat(chat, scene_folder, monkeypatch):
    data, pixels, processor = (scene_folder / "0.png").read_bytes(), [], chat.vis_processor
    expected = chat.preprocess_image(data)

    class Recorded(Blip2ImageEvalProcessor):
        first_size = processor.first_size

        def __call__(self, image):
            pixels.append((image.size, super().__call__(image)))
            return pixels[-1][1]

    monkeypatch.setattr(chat, "vis_processor", Recorded(processor.image_size))
    server = Server(chat)
    try:
        assert server.ask(content(data_url(data))).choices
    finally:
        server.close()
    ((size, actual),) = pixels
    assert size == processor.first_size and torch.equal(actual, expected)  # reduced by the process


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_images_have_the_same_messages(shared_decoder, name):
    data, messages = UNREADABLE[name], []
    for read in (shared_decoder.decode, read_image):
        with pytest.raises(UserError) as error:
            read(data, "'a.png'")
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_a_slow_image_is_refused_and_its_process_replaced(monkeypatch, new_decoder, scene_folder):
    monkeypatch.setattr(image_decoder, "QUICK_SECONDS", 0.1)
    monkeypatch.setattr(image_decoder, "MAX_SECONDS", 0.5)
    decoder = new_decoder()
    with pytest.raises(UserError, match=r"'a\.png' takes longer than 0\.5 s"):
        decoder.decode(LARGE, "'a.png'")
    assert decoder.decode((scene_folder / "0.png").read_bytes())


def test_slow_images_do_not_delay_others(monkeypatch, new_decoder, scene_folder):
    """Of the same client, too: all slow images wait for one process."""
    monkeypatch.setattr(image_decoder, "QUICK_SECONDS", 0.2)
    decoder = new_decoder()
    slow = [decoder.submit(LARGE, client="same") for _ in range(4)]
    quick = decoder.submit((scene_folder / "0.png").read_bytes(), client="same")
    assert quick.result().mode == "RGB" and not any(future.done() for future in slow[1:])
    for future in slow:
        future.cancel()


def test_an_image_is_processed_before_its_future_ends():
    decoder, data = ImageDecoder(), picture_kinds.saved(Image.new("RGB", (8, 9)), "PNG")
    assert decoder.submit(data, process=lambda image: image.size).result(20) == (8, 9)
    with pytest.raises(ZeroDivisionError):
        decoder.submit(data, process=lambda image: 1 / 0).result(20)
    assert decoder.decode(data).size == (8, 9)
    decoder.close()


def test_clients_take_turns(monkeypatch):
    order, is_free = [], threading.Event()

    def ask(process, job, seconds):
        is_free.wait(20)
        order.append(job.name)
        return Image.new("RGB", (1, 1))

    monkeypatch.setattr(image_decoder, "_ask", ask)
    lane = image_decoder._Lane(1, 20, None)
    names = ["a1", "a2", "a3", "a4", "b1", "b2", "c1"]
    jobs = [image_decoder._Job(b"", name, None, client=name[0]) for name in names]
    for job in jobs:
        lane.put(job)
        while job is jobs[0] and lane.num_waiting("a"):  # it is being decoded
            time.sleep(0.01)
    is_free.set()
    for job in jobs:
        job.image.result(20)
    lane.close()
    assert order == ["a1", "b1", "c1", "a2", "b2", "a3", "a4"]


def test_waiting_images_are_counted_by_client(monkeypatch, new_decoder):
    is_free = threading.Event()
    monkeypatch.setattr(image_decoder, "_ask", lambda *_: is_free.wait(20))
    decoder = new_decoder()
    images = [decoder.submit(b"", client=client) for client in "aaaaab"]
    deadline = time.monotonic() + 20
    while decoder.num_waiting("a") + decoder.num_waiting("b") > 4:  # two are being decoded
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert (decoder.num_waiting("a"), decoder.num_waiting("b")) in ((3, 1), (4, 0)) and not decoder.num_waiting("c")
    is_free.set()
    assert all(image.result(20) for image in images)


def test_a_closed_decoder_refuses_waiting_and_later_images(monkeypatch, new_decoder):
    started, is_free = threading.Semaphore(0), threading.Event()
    monkeypatch.setattr(image_decoder, "_ask", lambda *_: (started.release(), is_free.wait(20)))
    decoder = new_decoder()
    busy = [decoder.submit(b"") for _ in range(2)]
    for _ in busy:
        assert started.acquire(timeout=20)
    waiting = decoder.submit(b"")
    decoder.close()
    for image in (waiting, decoder.submit(b"")):
        with pytest.raises(UserError, match="The server is ending"):
            image.result(20)
    is_free.set()


def test_an_image_that_is_being_decoded_is_refused_at_the_end(new_decoder):
    others, decoder = workers(), new_decoder()
    image = decoder.submit(LARGE)
    while not workers(others):
        time.sleep(0.01)
    decoder.close()
    with pytest.raises(UserError, match="The server is ending"):
        image.result(20)


def test_an_image_is_not_kept_after_its_answer(decoder):
    image = decoder.submit(b"no image")
    assert isinstance(image.exception(20), UserError)
    kept = weakref.ref(image)
    del image
    end = time.monotonic() + 20
    while gc.collect() or kept():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_cancelling_ends_the_process(new_decoder, scene_folder):
    others, decoder = workers(), new_decoder()
    future = decoder.submit(LARGE)
    while not workers(others):
        time.sleep(0.01)
    time.sleep(0.2)
    running = workers(others)
    assert future.cancel()
    _, alive = psutil.wait_procs(running, timeout=10)
    assert not alive and decoder.decode((scene_folder / "0.png").read_bytes())


@pytest.mark.parametrize("answer", ["", "no JSON", '{"size": [100000, 100000]}', '{"size": [9, 9]}', "[]"])
def test_a_process_that_fails_costs_one_image(monkeypatch, decoder, scene_folder, answer):
    with monkeypatch.context() as patch:
        code = f"input(print('ready', flush=True)); print({answer!r})"
        patch.setattr(image_decoder, "_COMMAND", [sys.executable, "-c", code])
        with pytest.raises(UserError, match="makes the decoder fail"):
            decoder.decode(b"data")
    assert decoder.decode((scene_folder / "0.png").read_bytes())


def test_a_process_that_cannot_start_is_an_error_of_the_server(monkeypatch, chat, scene_folder):
    monkeypatch.setattr(image_decoder, "_COMMAND", [sys.executable, "-c", "raise SystemExit(3)"])
    server = Server(chat, allowed_folder=scene_folder)
    try:
        with pytest.raises(openai.InternalServerError, match="log has the reason"):
            server.ask(content("file:///0.png"))
        assert server.ask("Why?").choices
    finally:
        server.close()


def test_memory_is_limited(monkeypatch, new_decoder, scene_folder):
    path = image_worker.__file__
    code = (
        f"source = open({path!r}).read(); exec(source.replace('2**31', '2**29'), {{**globals(), '__file__': {path!r}}})"
    )
    monkeypatch.setattr(image_decoder, "_COMMAND", [sys.executable, "-c", code])
    monkeypatch.setattr(image_decoder, "QUICK_SECONDS", 15.0)
    decoder = new_decoder()
    with pytest.raises(UserError, match=r"memory|Memory"):
        decoder.decode(LARGE)
    assert decoder.decode((scene_folder / "0.png").read_bytes())


def test_processes_start_without_torch_and_end_with_their_parent():
    command = [sys.executable, "-P", "-X", "importtime", image_worker.__file__]
    done = subprocess.run(command, input="", capture_output=True, text=True)
    assert done.stdout == "ready\n" and "minigpt4.common.images" in done.stderr and "torch" not in done.stderr


class Endless:
    """A decoder that never ends."""

    def __init__(self):
        self.futures, self.waiting = [], 0

    def submit(self, *_, **__):
        self.futures.append(Future())
        return self.futures[-1]

    def num_waiting(self, client):
        return self.waiting if client == "127.0.0.1" else 0

    def close(self):
        pass


@pytest.fixture
def endless(monkeypatch):
    decoder = Endless()
    monkeypatch.setattr(api, "Completions", functools.partial(Completions, decoder=decoder))
    return decoder


def test_the_requests_time_includes_its_images(chat, endless, scene_folder):
    server = Server(chat, allowed_folder=scene_folder, timeout_seconds=0.3)
    try:
        with pytest.raises(openai.InternalServerError, match=r"longer than 0\.3 s"):
            server.ask(content("file:///0.png"))
        assert endless.futures[0].cancelled()
    finally:
        server.close()


def test_a_client_that_leaves_ends_the_decoding(chat, endless, scene_folder):
    server = Server(chat, allowed_folder=scene_folder)
    try:
        with pytest.raises(openai.APITimeoutError):
            server.ask(content("file:///0.png"), timeout=0.3)
        deadline = time.monotonic() + 10
        while not endless.futures[0].cancelled():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        server.close()


def test_images_that_wait_fill_the_queue(chat, endless, scene_folder):
    server, endless.waiting = Server(chat, allowed_folder=scene_folder, max_queue=8), 8
    try:
        with pytest.raises(openai.RateLimitError):
            server.ask(content("file:///0.png"))
    finally:
        server.close()
