"""demo.py: its command line, which processor it uses, and which mode it runs."""

import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import demo
from minigpt4.processors import eval_image_processor

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
        ([], "run_page"),
        (["--ask", "Why?"], "run_question"),
        (["--ask", ""], "run_question"),  # an empty question is refused, and does not open the page
        (["--terminal"], "run_terminal"),
        (["--api"], "run_api"),
        (["--batch", "images", "--ask", "Why?"], "run_batch"),
    ],
)
def test_the_command_line_selects_the_mode(monkeypatch, arguments, mode):
    ran = []
    for name in ("run_page", "run_question", "run_terminal", "run_api", "run_batch"):
        monkeypatch.setattr(demo, name, lambda args, chat, name=name: ran.append((name, chat)))
    monkeypatch.setattr(demo, "build_chat", lambda args: "chat")
    monkeypatch.setattr(sys, "argv", ["demo.py", "--cfg-path", "F", *arguments])
    demo.main()
    assert ran == [(mode, "chat")]


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
