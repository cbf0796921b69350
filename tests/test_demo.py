"""demo.py: its command line, which processor it uses, and which mode it runs."""

import inspect
import socket
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from omegaconf import OmegaConf

import demo
from minigpt4.processors import eval_image_processor
from minigpt4.serve import web

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("script", ["demo.py", "train.py"])
def test_help_imports_nothing_heavy(script):
    code = f"""
import runpy, sys
sys.argv = ["{script}", "--help"]
try:
    runpy.run_path("{script}", run_name="__main__")
finally:
    print([name for name in ("torch", "transformers", "gradio", "omegaconf", "numpy") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--cfg-path" in done.stdout and done.stdout.splitlines()[-1] == "[]", done


def config(vis_processor=None):
    sections = {"cc_sbu_align": {"vis_processor": vis_processor}} if vis_processor else {}
    sections = OmegaConf.create({"datasets": sections, "model": {"image_size": 56}})
    return Namespace(config=sections, model_cfg=sections.model)


@pytest.mark.parametrize(
    ("vis_processor", "size"),
    [
        (None, 56),
        ({"train": {"name": "blip2_image_train", "image_size": 56}}, 56),
        ({"train": {"name": "blip2_image_train", "image_size": 28}, "eval": {"image_size": 28}}, 28),
        ({"eval": {"name": "blip2_image_eval", "image_size": 28}}, 28),
    ],
)
def test_the_eval_processor_is_deterministic_and_of_the_configured_size(vis_processor, size):
    from PIL import Image

    processor = eval_image_processor(config(vis_processor))
    image = Image.effect_noise((90, 60), 80).convert("RGB")
    assert processor(image).shape == (3, size, size) and processor(image).equal(processor(image))


def test_an_own_eval_processor_keeps_its_own_keys(monkeypatch):
    from minigpt4.common.registry import registry
    from minigpt4.processors import BaseProcessor

    class Own(BaseProcessor):
        @classmethod
        def from_config(cls, cfg=None):
            own = cls()
            own.strength = cfg["strength"]
            return own

    monkeypatch.setattr(registry, "get_processor_class", lambda name: {"own": Own}[name])
    assert eval_image_processor(config({"eval": {"name": "own", "strength": 7}})).strength == 7


@pytest.mark.parametrize(
    ("arguments", "mode"),
    [
        ([], "page"),
        (["--ask", "Why?"], "question"),
        (["--terminal"], "terminal"),
        (["--api"], "api"),
        (["--batch", "images", "--ask", "Why?"], "batch"),
    ],
)
def test_the_command_line_selects_the_mode(monkeypatch, arguments, mode):
    ran = []
    for name in demo.MODES:
        monkeypatch.setattr(demo, f"run_{name}", lambda args, name=name: ran.append((name, args.mode)))
    monkeypatch.setattr(sys, "argv", ["demo.py", "--cfg-path", "F", *arguments])
    demo.main()
    assert ran == [(mode, mode)]


MISTAKES = {
    "--batch-size 0": "--batch-size: '0' is not a whole number from 1",
    "--batch-size 2.5": "--batch-size: '2.5' is not a whole number",
    "--max-queue 0": "--max-queue: '0'",
    "--temperature -1": "--temperature: '-1' is not a number from 0 to 2",
    "--temperature nan": "--temperature: 'nan'",
    "--temperature inf": "--temperature: 'inf'",
    "--top-p 2": "--top-p: '2' is not a number from 0.01 to 1",
    "--top-p 0": "--top-p: '0'",
    "--num-beams 0": "--num-beams: '0'",
    "--max-new-tokens 0": "--max-new-tokens: '0'",
    "--max-new-tokens 2000": "--max-new-tokens: '2000'",
    "--seed -1": "--seed: '-1'",
    "--gpu-id -1": "--gpu-id: '-1'",
    "--port 99999": "--port: '99999' is not a whole number from 0 to 65535",
    "--port http": "--port: 'http'",
    "--host=": "--host: ''",
    "--ask=": "--ask: the question is empty",
    "--ask=\u3000": "--ask: the question is empty",
    "--batch . --ask=": "--ask: the question is empty",
    "--api --allow-host http://a.example/": "--allow-host: 'http://a.example/' is not a host name",
    "--api --allow-folder /absent": "--allow-folder: there is no folder '/absent'",
    "--api --terminal": "--terminal: not allowed with argument --api",
    "--batch . --api": "--api: not allowed with argument --batch",
    "--terminal --ask Why?": "--ask has no effect with --terminal; it is for --ask or --batch",
    "--api --ask Why?": "--ask has no effect with --api",
    "--image a.jpg": "--image has no effect with the web page; it is for --terminal or --ask",
    "--batch . --image a.jpg": "--image has no effect with --batch",
    "--terminal --out a.jsonl": "--out has no effect with --terminal",
    "--terminal --batch-size 2": "--batch-size has no effect with --terminal",
    "--terminal --allow-origin https://a.example": "--allow-origin has no effect with --terminal",
    "--terminal --port 80": "--port has no effect with --terminal",
    "--ask Why? --host 0.0.0.0": "--host has no effect with --ask",
    "--api --share": "--share has no effect with --api",
    "--api-key k": "--api-key has no effect with the web page; it is for --api",
    "--terminal --max-queue 2": "--max-queue has no effect with --terminal; it is for the web page or --api",
    "--api --feedback a.jsonl": "--feedback has no effect with --api; it is for the web page",
    "G --api": "--cfg-path takes one file, or two for the web page",
    "G --ask Why?": "--cfg-path takes one file, or two for the web page",
    "G H": "--cfg-path takes one file, or two for the web page",
    "--allow-host a.example": "--allow-host has no effect",
    "--allow-folder .": "--allow-folder has no effect",
    "--api --greedy --temperature 0.5": "--temperature has no effect with --greedy",
    "--api --rate-limit 0": "--rate-limit: '0' is not a whole number from 1",
    "--api --shutdown-seconds -1": "--shutdown-seconds: '-1' is not a whole number from 0",
    "--rate-limit 5": "--rate-limit has no effect with the web page; it is for --api",
    "--terminal --api-keys F": "--api-keys has no effect with --terminal; it is for --api",
    "--batch . --shutdown-seconds 9": "--shutdown-seconds has no effect with --batch",
    "--terminal --greedy --temperature 0.5": "--temperature has no effect with --greedy",
    "--ask Why? --greedy --top-p 0.5": "--top-p has no effect with --greedy",
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_a_mistake_on_the_command_line_is_one_sentence(monkeypatch, capsys, arguments):
    monkeypatch.setattr(sys, "argv", ["demo.py", "--cfg-path", "F", *arguments.split(" ")])
    with pytest.raises(SystemExit) as ended:
        demo.parse_args()
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and line.startswith(f"error: {MISTAKES[arguments]}")


def test_mistakes_are_reported_before_anything_heavy_is_imported():
    code = """
import runpy, sys
sys.argv = ["demo.py", "--cfg-path", "F", "--port", "99999"]
try:
    runpy.run_path("demo.py", run_name="__main__")
finally:
    print([name for name in ("torch", "transformers", "gradio", "omegaconf", "numpy") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "[]\n" and len(done.stderr.splitlines()) == 1, done


@pytest.fixture
def end_of(monkeypatch):
    """The message with which demo.py ends; the model must not be loaded."""
    from minigpt4.models import MiniGPT4

    def load(*_, **__):
        raise AssertionError("the model is loaded")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["demo.py", "--cfg-path", "eval_configs/quickstart_eval.yaml", *arguments])
        with pytest.raises(SystemExit) as ended:
            demo.main()
        return ended.value.code

    monkeypatch.setattr(MiniGPT4, "from_config", load)
    return run


@pytest.mark.parametrize("mode", [[], ["--api"]])
def test_an_address_that_cannot_be_used_is_reported_before_the_model_is_loaded(end_of, mode):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        assert end_of(*mode, "--port", port).startswith(f"error: --host 127.0.0.1 --port {port} cannot be used (Addr")
    assert end_of(*mode, "--host", "host.invalid").startswith("error: --host host.invalid --port ")
    assert "cannot be used" in end_of(*mode, "--host", "x" * 70)


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [(["--api", "--port", "0"], "--max-batch-tokens"), (["--ask", "Why?"], "--num-beams or --max-new-tokens")],
)
def test_out_of_memory_names_flags_that_have_an_effect(end_of, monkeypatch, arguments, advice):
    def load(_):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(demo, "build_chat", load)
    assert f"lower {advice}, or run" in end_of(*arguments)


@pytest.fixture
def run_server(chat, monkeypatch, capsys):
    """Runs demo.py until it would serve; returns its address, the application and what it printed."""
    from minigpt4.serve import server

    def run(*arguments):
        with server.listen("127.0.0.1", 0) as probe:
            port = probe.getsockname()[1]
        served = []

        def load(args):  # clients wait meanwhile
            socket.create_connection(("127.0.0.1", port)).close()
            assert "http" not in capsys.readouterr().out
            return chat

        def serve(app, listener, *_, **__):
            served.extend((server.address(listener), app, capsys.readouterr().out))
            listener.close()

        monkeypatch.setattr(demo, "build_chat", load)
        monkeypatch.setattr(server, "serve", serve)
        name = "eval_configs/quickstart_eval.yaml"
        monkeypatch.setattr(sys, "argv", ["demo.py", "--cfg-path", name, "--port", str(port), *arguments])
        demo.main()
        return served

    return run


@pytest.mark.parametrize(("mode", "path"), [([], ""), (["--api"], "/v1")])
def test_the_address_is_printed_when_it_can_be_used(run_server, mode, path):
    address, _, printed = run_server(*mode)
    assert printed == f"Model 'quickstart_eval' at {address}{path}\n"


def test_the_tunnel_of_share_is_opened_before_the_model_is_loaded(run_server, end_of, monkeypatch):
    def open_tunnel(local_host, local_port, share_token, share_server_address, share_server_tls_certificate):
        assert local_host == "127.0.0.1" and len(share_token) > 30
        return "http://1234.gradio.live"

    assert list(inspect.signature(open_tunnel).parameters) == list(inspect.signature(web.setup_tunnel).parameters)
    monkeypatch.setattr(web, "setup_tunnel", open_tunnel)
    address, app, printed = run_server("--share", "--allow-origin", "https://chat.example")
    assert printed == f"Model 'quickstart_eval' at {address} and https://1234.gradio.live\n"
    with TestClient(app, base_url="https://1234.gradio.live") as client:
        for host in ("1234.gradio.live", "chat.example"):
            assert client.get("/", headers={"Host": host, "Origin": f"https://{host}"}).status_code == 200
        assert client.get("/", headers={"Host": "5678.gradio.live"}).status_code == 403
        assert client.get("/", headers={"Origin": "https://5678.gradio.live"}).status_code == 403
    monkeypatch.setattr(web, "setup_tunnel", lambda *_: 1 / 0)
    assert end_of("--share", "--port", "0").startswith("error: --share: no public tunnel can be opened (division")


def test_the_terminal_reads_any_bytes_and_ends_with_the_reader_of_its_output(programs, tmp_path):
    options = ["--options", "model.ckpt=null", "run.device=cpu"]
    command = ["demo.py", "--cfg-path", "eval_configs/quickstart_eval.yaml", "--terminal", *options]
    with programs.running(command, tmp_path / "errors") as process:
        process.stdin.buffer.write(b"What is \xff?\n" + 50 * b"Why?\n")
        process.stdin.close()
        assert process.stdout.read(1)
        process.stdout.close()
        status, errors = process.wait(), (tmp_path / "errors").read_text()
    assert status == 141 and "Traceback" not in errors, errors


@pytest.mark.parametrize("mode", [["--terminal"], ["--ask", "Why?"]])
def test_an_unreadable_image_is_reported_before_the_model_is_loaded(end_of, mode, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"this is no image")
    assert end_of(*mode, "--image", f"{tmp_path}/a.jpg").startswith(f"error: '{tmp_path}/a.jpg' cannot be read")
    assert "absent.jpg" in end_of(*mode, "--image", f"{tmp_path}/absent.jpg")


def test_an_output_that_cannot_be_written_is_reported_before_the_model_is_loaded(end_of, tmp_path):
    (tmp_path / "a.jpg").touch()
    (out := tmp_path / "out.jsonl").mkdir()
    arguments = ("--batch", str(tmp_path), "--out", str(out), "--options", "model.ckpt=null")
    assert end_of(*arguments).startswith(f"error: --out: {out} cannot be")


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_an_accelerator_that_is_not_used_is_refused(end_of, device, monkeypatch):
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available: None)
    message = end_of("--gpu-id", "9", "--terminal", "--options", f"run.device={device}")
    assert message.startswith(f"error: --gpu-id is 9, but run.device is {device} and the model would run on cpu")


def test_generation_options_of_the_command_line(monkeypatch):
    def options(*arguments):
        monkeypatch.setattr(sys, "argv", ["demo.py", "--cfg-path", "F", *arguments])
        return demo.generation_options(demo.parse_args())

    default = options()
    assert (default.do_sample, default.temperature, default.top_p, default.seed) == (True, 1.0, 0.9, 42)
    assert not options("--greedy").do_sample and not options("--temperature", "0").do_sample
    numbers = {"temperature": 0.5, "top-p": 0.3, "num-beams": 4, "max-new-tokens": 7, "seed": 5}
    given = options(*(word for name, value in numbers.items() for word in (f"--{name}", str(value))))
    assert [getattr(given, name.replace("-", "_")) for name in numbers] == list(numbers.values())


def test_the_accelerator_of_the_command_line_is_used(monkeypatch):
    from minigpt4.common import device as devices
    from minigpt4.common.errors import UserError

    picked = []

    def pick(*arguments):
        picked.append(arguments)
        raise UserError("enough")

    monkeypatch.setattr(devices, "pick", pick)
    options = ["run.device=cuda", "run.strict_device=True"]
    arguments = ["--cfg-path", "eval_configs/quickstart_eval.yaml", "--gpu-id", "3", "--options", *options]
    monkeypatch.setattr(sys, "argv", ["demo.py", *arguments])
    with pytest.raises(SystemExit, match="error: enough"):
        demo.main()
    assert picked == [("cuda", 3, True)]
