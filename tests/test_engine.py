"""The engine: which requests share a batch, who learns of a failure, and time limits."""

import queue
import threading
import time
from dataclasses import replace

import pytest
import torch
from serving import GREEDY

from minigpt4.common.errors import UserError
from minigpt4.conversation.answer_batch import Answer, AnswerBatch
from minigpt4.serve.engine import Engine, Request


class Log:
    """Requests whose answers are recorded, and in what order they started and finished."""

    def __init__(self):
        self.latest, self.events = {}, []
        self.all_done = threading.Event()

    def request(self, name, text="Yes?", **options):
        def on_update(update):
            if name not in self.latest:
                self.events.append((name, "begin"))
            is_over = isinstance(update, Exception) or update.finish_reason is not None
            self.latest[name] = replace(update, ids=list(update.ids)) if isinstance(update, Answer) else update
            if is_over:
                self.events.append((name, "end"))

        return Request([("user", [text])], replace(GREEDY, **options), on_update)

    @property
    def most_at_once(self):
        counts, most = 0, 0
        for _, event in self.events:
            counts += 1 if event == "begin" else -1
            most = max(most, counts)
        return most


def run_together(chat, requests, max_batch):
    """Answers requests that all wait when the engine becomes free; it ends when they are answered."""
    engine = Engine(chat, max_batch=max_batch, max_queue=len(requests) + 1, max_length=300)
    is_busy, are_all_waiting = threading.Event(), threading.Event()

    def hold(_):
        is_busy.set()
        are_all_waiting.wait(60)

    engine.submit(Request([("user", ["Yes?"])], replace(GREEDY, max_new_tokens=1), hold))
    assert is_busy.wait(60)
    for request in requests:
        engine.submit(request)
    are_all_waiting.set()
    engine.close()


@pytest.mark.parametrize("max_batch", [1, 2, 3])
def test_max_batch_is_respected_and_used(chat, max_batch):
    log = Log()
    run_together(chat, [log.request(i) for i in range(5)], max_batch)
    assert len(log.latest) == 5 and all(isinstance(answer, Answer) for answer in log.latest.values())
    assert log.most_at_once == max_batch


def test_one_request_that_is_too_long_fails_alone_within_a_batch(chat):
    log, alone = Log(), Log()
    texts = ["What is at the top?", "x" * 10_000, "How many objects are there?", "<ImageHere>"]
    run_together(chat, [log.request(i, text) for i, text in enumerate(texts)], max_batch=4)
    assert isinstance(log.latest[1], UserError) and "too long" in str(log.latest[1])
    assert isinstance(log.latest[3], UserError) and "cannot contain" in str(log.latest[3])
    for i in (0, 2):
        run_together(chat, [alone.request(i, texts[i])], max_batch=1)
        assert log.latest[i].ids == alone.latest[i].ids and log.latest[i].finish_reason is not None


def test_a_failure_is_reported_to_the_whole_batch_and_the_engine_continues(chat, monkeypatch, caplog):
    log = Log()

    def fail(*_):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(chat.model.llama_tokenizer, "decode", fail)
        run_together(chat, [log.request(i) for i in range(2)], max_batch=2)
    assert all(isinstance(update, RuntimeError) for update in log.latest.values()) and len(log.latest) == 2
    run_together(chat, [log.request("next")], max_batch=2)
    assert log.latest["next"].finish_reason is not None


def test_a_full_queue_is_reported(chat):
    engine = Engine(chat, max_batch=1, max_queue=1)
    release, updates = threading.Event(), []
    engine.submit(Request([("user", ["Yes?"])], GREEDY, lambda u: (updates.append(u), release.wait(20))))
    while not updates:  # it is being answered
        time.sleep(0.01)
    engine.submit(Request([("user", ["Yes?"])], GREEDY, updates.append))
    with pytest.raises(queue.Full):
        engine.submit(Request([("user", ["Yes?"])], GREEDY, updates.append))
    release.set()
    engine.close()


def test_a_cancelled_request_ends_before_its_next_token(chat):
    log = Log()
    request = log.request("cancelled", min_length=1000, max_new_tokens=200)
    on_update = request.on_update
    request.on_update = lambda update: (on_update(update), request.cancelled.set())
    run_together(chat, [request], max_batch=1)
    assert len(log.latest["cancelled"].ids) == 1


def test_an_answer_ends_when_its_time_is_up(chat):
    log = Log()
    request = log.request("slow", min_length=1000, max_new_tokens=200)
    on_update, request.timeout_seconds = request.on_update, 0.5
    request.on_update = lambda update: (on_update(update), time.sleep(0.05))
    run_together(chat, [request], max_batch=1)
    assert len(log.latest["slow"].ids) < 20


@pytest.fixture
def endless(chat, monkeypatch):
    """Answers end by their maximum length only: with ``min_length`` by no end token, and by no stop string."""
    monkeypatch.setattr(chat, "template", replace(chat.template, sep="%%"))


def test_a_request_joins_the_running_batch_and_others_end_meanwhile(chat, endless):
    """A short request that arrives while long ones are answered has its first token in one of their next steps."""
    log, engine, lengths = Log(), Engine(chat, max_length=300), {}

    def join(update):
        if len(update.ids) == 5 and "short" not in log.latest:
            engine.submit(short)

    long = [log.request(i, min_length=1000, max_new_tokens=100) for i in range(2)]
    short, on_long = log.request("short", "Why?", max_new_tokens=3, min_length=1000), long[0].on_update
    long[0].on_update = lambda update: (on_long(update), join(update))
    on_short = short.on_update
    short.on_update = lambda update: (lengths.setdefault(len(update.ids), len(log.latest[0].ids)), on_short(update))
    for request in long:
        engine.submit(request)
    while len(log.latest) < 3 or any(answer.finish_reason is None for answer in log.latest.values()):
        time.sleep(0.01)
    assert lengths[1] <= 7 and lengths[3] <= 9  # tokens that the long answer had then
    assert [len(log.latest[i].ids) for i in range(2)] == [100, 100]
    assert engine.stats.num_running == engine.stats.num_waiting == 0
    engine.close()


def test_a_request_waits_where_the_batch_has_no_room_and_its_position_is_known(chat, endless):
    log, engine = Log(), Engine(chat, max_length=150, max_batch_tokens=150)
    requests = [log.request(i, min_length=1000, max_new_tokens=60) for i in range(4)]
    positions, on_update = [], requests[0].on_update

    def look(update):
        on_update(update)
        positions.append([engine.position(request) for request in requests])

    requests[0].on_update = look
    for request in requests:
        engine.submit(request)
    engine.close()
    assert positions[-2] == [0, 0, 1, 2] and log.most_at_once == 1
    with pytest.raises(UserError, match=r"--max-batch-tokens is 149.*150"):
        Engine(chat, max_length=150, max_batch_tokens=149)


def test_texts_and_images_keep_their_order(chat, monkeypatch):
    size, prompts, plain = chat.vis_processor.image_size, [], AnswerBatch.plan
    image = torch.zeros(3, size, size)
    monkeypatch.setattr(AnswerBatch, "plan", lambda *args: (prompts.append(args[1].copy()), plain(*args))[1])
    messages = [
        ("developer", ["Be brief."]), ("user", ["First", "this:", image, image, "and", "that."]), ("assistant", [""]),
        ("user", [image]), ("user", ["What?"]),
    ]  # fmt: skip
    done = threading.Event()
    engine = Engine(chat)
    engine.submit(Request(messages, replace(GREEDY, max_new_tokens=1), lambda _: done.set()))
    assert done.wait(60)
    engine.close()
    conv, picture = prompts[0], "<Img><ImageHere></Img>"
    texts = ["First this:", picture, f"{picture} and that.", " ", f"{picture} What?"]
    assert [text for _, text in conv.messages] == texts and conv.system.endswith("questions. Be brief.")
    assert "###Assistant:  ###Human:" in conv.get_prompt()


def test_images_of_earlier_turns_are_not_encoded_again_for_their_client(chat, monkeypatch):
    size, encoded, plain = chat.vis_processor.image_size, [], chat.encode_img
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(chat, "encode_img", lambda batch: (encoded.append(len(batch)), plain(batch))[1])
    engine = Engine(chat)
    for client, numbers in (("a", [0]), ("a", [0, 1, 0]), ("b", [0]), ("a", [1])):
        updates = queue.Queue()
        parts = [images[i].clone() for i in numbers]
        messages = [("user", [*parts, "What?"])]
        engine.submit(Request(messages, replace(GREEDY, max_new_tokens=1), updates.put, client=client))
        assert updates.get(timeout=60).finish_reason
    engine.close()
    assert [count for count in encoded if count] == [1, 1, 1]
