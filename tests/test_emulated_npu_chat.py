"""Answers on the emulated NPU are those of the CPU: greedy, penalised, sampled, with beams, and in a batch."""

SCRIPT = """
from types import SimpleNamespace

import torch

from minigpt4.common import device as devices
from minigpt4.common.config import Config
from minigpt4.conversation.conversation import CONV_VISION, Chat
from minigpt4.conversation.generation import GenerationOptions
from minigpt4.models import MiniGPT4

OPTIONS = [
    {"do_sample": False},
    {"do_sample": False, "num_beams": 3},
    {"do_sample": False, "repetition_penalty": 1.3, "min_length": 6},
    {"num_beams": 3, "seed": 3},
    {"seed": 3},
]
options = ["model.ckpt=null", "model.llm_dtype=fp32"]
cfg = Config(SimpleNamespace(cfg_path="eval_configs/quickstart_eval.yaml", options=options)).model_cfg
answers = {}
for name in ("cpu", "npu"):
    device = devices.pick(name, 0, True)
    torch.manual_seed(0)
    chat = Chat(MiniGPT4.from_config(cfg, device=device), None, device)
    found = answers[name] = []
    conv, images = CONV_VISION.copy(), []
    chat.upload_img(torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(1)), conv, images)
    for settings in OPTIONS:
        chat.ask("What is it?", conv)
        found.append(chat.answer(conv, images, max_new_tokens=8, **settings)[1].tolist())
    convs = [CONV_VISION.copy() for _ in range(3)]
    for i, each in enumerate(convs):
        chat.ask("Why? " * (i + 1), each)
    each = [GenerationOptions(count, do_sample=False) for count in (3, 8, 5)]
    found += [ids.tolist() for _, ids in chat.answer_batch(convs, [[], [], []], each)]
    assert chat.device.type == images[0].device.type == name
assert answers["cpu"] == answers["npu"], answers
assert len({tuple(ids) for ids in answers["cpu"]}) > 4
"""


def test_answers_are_those_of_the_cpu(npu_programs):
    done = npu_programs.run(["-W", "ignore", "-c", SCRIPT])
    assert done.returncode == 0, done.stderr[-2000:]
