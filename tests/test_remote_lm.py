"""``demo.py --api --lm-url``: answers of a language model on another server, here a stand-in that computes with
transformers, equal those of this process; whatever the server does wrong becomes one clear error."""

import base64
import io
import json
import queue
import re
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import TINY_CONFIG
from golden_data import DEVICE, TINY, read_tensors
from serving import GREEDY, ask, client, text_of
from transformers import AutoModelForCausalLM

import demo
from minigpt4.common.errors import UserError
from minigpt4.conversation.conversation import Chat
from minigpt4.conversation.generation import GenerationOptions
from minigpt4.models import MiniGPT4
from minigpt4.serve import remote_lm
from minigpt4.serve.engine import Engine, Request
from minigpt4.serve.remote_lm import LanguageModelServer, RemoteBatch, RemoteError
from minigpt4.serve.server import address, listen

IMAGES = list(read_tensors("vision")["image"])
LM_MODELS = [{"id": "lm", "max_model_len": 400}]


class StandIn(BaseHTTPRequestHandler):
    """Answers as vLLM does with --enable-prompt-embeds; ``fault`` is what it does instead."""

    protocol_version, fault, models, seen = "HTTP/1.1", None, LM_MODELS, []
    left, num_listed = threading.Event(), 0
    llm = AutoModelForCausalLM.from_pretrained(TINY / "llama", dtype=torch.float32)

    def log_message(self, *_):
        pass

    def send(self, status, content, kind="application/json"):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        type(self).num_listed += 1
        key = self.headers.get("Authorization", "")
        self.send(200, {"data": self.models}) if key != "Bearer bad" else self.send(401, {"error": "Unauthorized"})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).seen.append(body)
        if isinstance(self.fault, tuple):
            return self.send(*self.fault)
        embeds = torch.load(io.BytesIO(base64.b64decode(body["prompt_embeds"])), weights_only=True)
        if embeds.ndim != 2 or embeds.shape[1] != self.llm.config.hidden_size:
            return self.send(400, {"error": {"message": f"hidden_size {embeds.shape[-1]} does not match."}})
        settings = {"max_new_tokens": body["max_tokens"], "do_sample": False, "eos_token_id": body["stop_token_ids"]}
        ids = self.llm.generate(inputs_embeds=embeds[None], pad_token_id=0, **settings)[0].tolist()
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        return self.stream(ids, "stop" if ids[-1] in body["stop_token_ids"] else "length")

    def stream(self, ids, reason):
        if self.fault == "endless":
            try:
                while True:
                    self.event([ids[0]], None)
            except OSError:
                return self.left.set()
        for i in range(0, len(ids), 2):  # sometimes several tokens have become ready
            if i and self.fault == "break":
                return None
            reason = "abort" if self.fault == "abort" else reason
            if i and self.fault == "event":
                return self.wfile.write(b'data: {"error": {"message": "EngineCore died."}}\n\n')
            is_last = i + 2 >= len(ids)
            self.event({"ids": [10**6], "no ids": None}.get(self.fault, ids[i : i + 2]), reason if is_last else None)
        return self.wfile.write(b"data: [DONE]\n\n")

    def event(self, ids, reason):
        choice = {"index": 0, "text": "\u2028 \x85", "token_ids": ids, "finish_reason": reason}  # no ends of lines
        data = json.dumps({"choices": [choice]}, ensure_ascii=False)
        self.wfile.write(f": comment\n\ndata: {data}\r\n\n".encode())


@pytest.fixture(scope="module")
def url():
    with ThreadingHTTPServer(("127.0.0.1", 0), StandIn) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def remote_model():
    return MiniGPT4.from_config(TINY_CONFIG, device=DEVICE, has_language_model=False)


@contextmanager
def started(chat, batch=None):
    engine = Engine(chat, max_length=400, max_batch_tokens=4000, batch=batch)
    yield engine
    engine.close(timeout_seconds=5)


@pytest.fixture(scope="module")
def remote(url, remote_model):
    chat = Chat(remote_model, None)
    with started(chat, RemoteBatch(chat, LanguageModelServer(url))) as engine:
        yield engine


def answers(engine, conversations, options=GREEDY):
    """The final answers to several conversations, which are asked at once."""
    updates = [queue.Queue() for _ in conversations]
    engine.submit(*(Request(c, options, u.put, 60) for c, u in zip(conversations, updates, strict=True)))
    finals = []
    for own in updates:
        while getattr(update := own.get(timeout=60), "finish_reason", "") is None:
            pass
        finals.append(update)
    return finals


def test_answers_equal_those_of_this_process(model, remote):
    question = [("user", [IMAGES[0], "What is it?"])]
    conversations = [
        [("user", ["Why?"])], question, [("user", [IMAGES[0], "This,", IMAGES[1], "and this?"])],
        [*question, ("assistant", ["A cat."]), ("user", ["Is it red?"])],
    ]  # fmt: skip
    with started(Chat(model, None)) as own:
        expected, found = answers(own, conversations), answers(remote, conversations)
    for ours, theirs in zip(expected, found, strict=True):
        assert (theirs.ids, theirs.text, theirs.finish_reason) == (ours.ids, ours.text, ours.finish_reason)
        assert theirs.prompt_tokens == ours.prompt_tokens and theirs.ids


def test_of_the_language_model_only_its_token_embeddings_are_loaded(model, remote_model):
    (name, table), *others = remote_model.llama_model.named_parameters()
    assert name == "embed_tokens.weight" and not others and not table.requires_grad
    assert table.equal(model.llama_model.get_input_embeddings().weight)
    lora = TINY_CONFIG | {"lora_r": 2, "ckpt": None}
    with pytest.raises(UserError, match=r"lora_r is set: .* minigpt4\.tools\.merge"):
        MiniGPT4.from_config(lora, device=DEVICE, has_language_model=False)


def test_options_reach_the_server(remote, monkeypatch):
    monkeypatch.setattr(StandIn, "seen", [])
    penalties = {"presence_penalty": 0.5, "frequency_penalty": 0.25, "repetition_penalty": 1.1}
    sampled = GenerationOptions(temperature=0.7, top_p=0.0, seed=-1, max_new_tokens=3, **penalties)
    answers(remote, [[("user", ["Why?"])]], sampled)
    answers(remote, [[("user", ["Why?"])]])
    first, second = StandIn.seen
    expected = penalties | {"temperature": 0.7, "top_p": 1e-6, "top_k": 50, "seed": 2**63 - 1, "max_tokens": 3}
    assert expected.items() <= first.items() and first["model"] == "lm" and first["stop_token_ids"] == [2]
    assert second["temperature"] == 0 and not {"seed", "top_p", "top_k"} & set(second)


def test_the_api_streams_and_ends_answers_at_stop_strings(remote, monkeypatch):
    with client(remote) as api:
        text = text_of(ask(api, max_tokens=12).json())
        response = ask(api, max_tokens=12, stream=True).text
        events = [json.loads(line[6:]) for line in response.split("\n\n") if line.startswith("data: {")]
        assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == text
        assert events[-1]["choices"][0]["finish_reason"] == "length"
        monkeypatch.setattr(StandIn, "fault", "endless")
        StandIn.left.clear()
        first = text.split()[0][0]
        choice = ask(api, max_tokens=50, stop=[first]).json()["choices"][0]
        assert choice["finish_reason"] == "stop" and first not in choice["message"]["content"]
        assert StandIn.left.wait(10)  # it need not go on


FAULTS = {
    "a refusal": ((400, {"error": {"message": "Too long."}}), r"answers with status 400 \(Too long\)\."),
    "another form of it": ((422, {"detail": "no"}), r"status 422 \(\{'detail': 'no'\}\)"),
    "a proxy's page": ((503, b"<h1>Bad\n gateway</h1>", "text/html"), r"status 503 \(<h1>Bad  gateway</h1>\)"),
    "a broken stream": ("break", r"broke off the answer before its end\."),
    "an error in the stream": ("event", r"broke off the answer \(EngineCore died\.\)\."),
    "an aborted answer": ("abort", r"broke off the answer \(abort\)\."),
    "no ids": ("no ids", r"sends something else than vLLM's answers with token_ids"),
    "ids of another model": ("ids", r"has another language model: it sends unknown tokens\."),
    "no stream": ((200, {"choices": []}), r"broke off the answer before its end"),
}


@pytest.mark.parametrize(("fault", "message"), FAULTS.values(), ids=FAULTS)
def test_faults_of_the_server_are_one_sentence(remote, monkeypatch, fault, message):
    with client(remote) as api:
        with monkeypatch.context() as patch:
            patch.setattr(StandIn, "fault", fault)
            response = ask(api, max_tokens=8)
            error = response.json()["error"]
            assert (response.status_code, error["code"]) == (502, "language_model_server")
            assert re.search(message, error["message"]), error
            assert re.search(message, ask(api, max_tokens=8, stream=True).text)
        assert ask(api, max_tokens=3).status_code == 200


def test_health_is_that_of_the_server_too(url, remote_model, monkeypatch, caplog):
    chat, server = Chat(remote_model, None), LanguageModelServer(url)
    with started(chat, RemoteBatch(chat, server)) as engine, client(engine) as api:

        def health():
            found = api.get("/health")
            return found.status_code, found.json().get("problem")

        StandIn.num_listed = 0
        assert [health() for _ in range(3)] == 3 * [(200, None)] and StandIn.num_listed == 1
        monkeypatch.setattr(remote_lm, "_PROBE_INTERVAL_SECONDS", 0)
        monkeypatch.setattr(StandIn, "models", [{"id": "another"}])
        assert health() == (
            503,
            "The language model's server now has the model another in place of lm; restart demo.py.",
        )
        monkeypatch.undo()
        monkeypatch.setattr(remote_lm, "_PROBE_INTERVAL_SECONDS", 0)
        assert health() == (200, None)
        monkeypatch.setattr(server, "url", "http://127.0.0.1:9/v1")  # it is down
        caplog.clear()
        for _ in range(2):
            status, problem = health()
            assert status == 503 and re.fullmatch(r"The language model's server cannot be reached \(.*\)\.", problem)
        assert caplog.text.count("server http://127.0.0.1:9/v1 cannot be reached (") == 1
        monkeypatch.setattr(remote_lm, "_PROBE_SECONDS", 0.1)
        with listen("127.0.0.1", 0) as silent:
            monkeypatch.setattr(server, "url", address(silent))
            assert health() == (503, "The language model's server gives no answer in time (ReadTimeout).")


def test_what_needs_the_model_here_is_refused(remote):
    with client(remote) as api:
        for fields in ({"logprobs": True}, {"logit_bias": {"5": 1}}, {"response_format": {"type": "json_object"}}):
            response = ask(api, **fields)
            assert response.status_code == 400 and "are not available where" in response.json()["error"]["message"]


def test_a_server_that_cannot_answer_is_reported_at_the_start(url, remote_model, monkeypatch):
    chat = Chat(remote_model, None)
    with pytest.raises(RemoteError, match=r"server http://127\.0\.0\.1:9/v1 cannot be reached \("):
        LanguageModelServer("http://127.0.0.1:9/v1/")
    with pytest.raises(RemoteError, match=r"status 401 \(Unauthorized\)"):
        LanguageModelServer(url, "bad")
    with monkeypatch.context() as patch:
        patch.setattr(StandIn, "models", 2 * LM_MODELS)
        with pytest.raises(RemoteError, match="has 2 models; start one"):
            LanguageModelServer(url)
        patch.setattr(StandIn, "models", [{"name": "x"}])
        with pytest.raises(RemoteError, match="sends something else"):
            LanguageModelServer(url)
    monkeypatch.setattr(StandIn, "fault", (400, {"error": {"message": "You must set `--enable-prompt-embeds`"}}))
    with pytest.raises(RemoteError, match="must set `--enable-prompt-embeds`"):
        RemoteBatch(chat, LanguageModelServer(url))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--terminal"], "--lm-url has no effect with --terminal; it is for --api."),
        (["--batch", "x"], "--lm-url has no effect with --batch; it is for --api."),
        ([], "--lm-url has no effect with the web page; it is for --api."),
        (["--api", "--num-beams", "2"], "--num-beams is not for a language model on a server"),
        (["--api", "--port", "0"], "server http://127.0.0.1:9/v1 cannot be reached"),
    ],
)
def test_the_command_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(demo, "build_chat", lambda _: pytest.fail("the model is loaded"))
    command = ["demo.py", "--cfg-path", "eval_configs/quickstart_eval.yaml", "--lm-url", "http://127.0.0.1:9"]
    monkeypatch.setattr(sys, "argv", [*command, *arguments])
    with pytest.raises(SystemExit) as ended:
        demo.main()
    assert message in str(ended.value.code) + capsys.readouterr().err
