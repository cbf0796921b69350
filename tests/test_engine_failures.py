"""The engine when something fails or is given up: others are answered, and nobody can keep the queue for himself."""

import queue
import threading
import time
from dataclasses import replace

import pytest
import torch
from serving import GREEDY

from minigpt4.common.errors import UserError
from minigpt4.conversation import generation
from minigpt4.serve.engine import Engine
from minigpt4.serve.request_queue import Request, RequestQueue


@pytest.fixture
def endless(chat, monkeypatch):
    """Answers end by their maximum length only: with ``min_length`` by no end token, and by no stop string."""
    monkeypatch.setattr(chat, "template", replace(chat.template, sep="%%"))


@pytest.fixture
def engine(chat):
    engine = Engine(chat, max_length=300, max_queue=4)
    yield engine
    engine.close(timeout_seconds=20)


class Client:
    """Submits one request and waits for its updates."""

    def __init__(self, engine, text="Yes?", client="", **options):
        self.updates, self.seen, settings = queue.Queue(), [], {"min_length": 1000, "max_new_tokens": 40} | options
        self.request = Request([("user", [text])], replace(GREEDY, **settings), self.updates.put, client=client)
        engine.submit(self.request)

    def first(self):
        return self.updates.get(timeout=60)

    def last(self):
        while not isinstance(update := self.first(), Exception) and update.finish_reason is None:
            pass
        return update


def fail(*_):
    raise ValueError("mine")


@pytest.mark.parametrize("options", [{"logits_processors": [fail]}, {"stop": fail}, {"stop": fail, "num_beams": 2}])
def test_functions_that_raise_end_their_own_answer_only(engine, endless, options):
    other = Client(engine)
    other.first()
    failing = Client(engine, **options)
    assert isinstance(failing.last(), ValueError)
    assert len(other.last().ids) == 40


def test_a_client_whose_updates_cannot_be_delivered_does_not_disturb_others(engine, endless, caplog):
    engine.submit(Request([("user", ["Why?"])], replace(GREEDY, max_new_tokens=3), fail))
    assert len(Client(engine).last().ids) == 40 and "could not be delivered" in caplog.text


def test_out_of_memory_while_a_client_leaves_ends_nothing_else(engine, endless, monkeypatch, chat):
    clients = [Client(engine, max_new_tokens=100) for _ in range(3)]
    for client in clients:
        client.first()
    chat.prefixes.clear()

    def refuse(*_):
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(generation, "copy_cache", refuse)
        clients[0].request.cancelled.set()
        assert clients[0].last().finish_reason == "stop"
    assert [len(client.last().ids) for client in clients[1:]] == [100, 100] and engine.is_alive


def test_a_failure_outside_of_a_step_is_reported_and_the_engine_continues(engine, endless, monkeypatch):
    client = Client(engine, max_new_tokens=200)
    client.first()
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_admit", fail)
        assert isinstance(client.last(), ValueError)
    assert len(Client(engine).last().ids) == 40


def test_cancelled_requests_leave_the_queue_and_do_not_block_it(chat, endless):
    """One answer is running; what waits behind it for memory, and in the queue, is cancelled."""
    engine = Engine(chat, max_length=300, max_queue=3, max_batch_tokens=400)
    running = Client(engine, max_new_tokens=150)
    running.first()
    waiting = [Client(engine, max_new_tokens=200) for _ in range(3)]
    while engine.stats.num_waiting < 3 or engine.waiting.qsize() > 2:  # the first was taken and waits for memory
        time.sleep(0.01)
    waiting.append(Client(engine))
    with pytest.raises(queue.Full):
        Client(engine)
    for client in waiting:
        client.request.cancelled.set()
    short = Client(engine, "Why?", max_new_tokens=2)
    assert len(short.last().ids) == 2 and engine.stats.num_running == 1
    assert len(running.last().ids) == 150
    engine.close()


def test_a_beam_search_gives_way_is_cancelled_and_counts_with_its_beams(chat, endless):
    engine = Engine(chat, max_length=300, max_batch_tokens=2000)
    client = Client(engine, num_beams=32, max_new_tokens=100)
    assert isinstance(error := client.last(), UserError) and "--num-beams 32" in str(error)
    search = Client(engine, num_beams=3, max_new_tokens=200)
    other = Client(engine, max_new_tokens=5)
    assert len(other.last().ids) == 5 and search.updates.empty()
    search.request.cancelled.set()
    assert search.last().ids == [] and engine.stats.num_running == 0
    engine.close()


def test_clients_take_turns_and_one_cannot_fill_the_queue():
    waiting = RequestQueue(3)

    def request(client):
        return Request([], GREEDY, print, client=client)

    own = {client: [request(client) for _ in range(3)] for client in "abcd"}
    waiting.put(own["a"])
    with pytest.raises(queue.Full):
        waiting.put([request("a")])
    for client in "bcd":
        waiting.put(own[client])
    with pytest.raises(queue.Full):
        waiting.put([request("e")])
    positions = [waiting.position(request) for request in (own["a"][0], own["b"][0], own["a"][1], own["d"][2])]
    assert positions == [0, 1, 4, 11] and waiting.position(request("a")) is None
    order = [waiting.take(may_wait=False) for _ in range(12)]
    assert order == [own[client][i] for i in range(3) for client in "abcd"] and waiting.take(may_wait=False) is None
    with pytest.raises(queue.Full):
        waiting.put([request("a") for _ in range(4)])
    assert waiting.qsize() == 0
    late = threading.Timer(0.1, waiting.close)
    late.start()
    assert waiting.take(may_wait=True) is None and waiting.is_done
    with pytest.raises(queue.Full):
        waiting.put([request("a")])
