"""The memory that the doctor predicts, compared with what an exact device measures."""
# ruff: noqa: F811  (fixtures are imported by name)

import json

import pytest
import torch
from doctor_world import world  # noqa: F401

from minigpt4.doctor import memory


def test_weights_of_7b_by_part():
    """A model of the full size, without a byte of memory."""
    folder = {"vocab_size": 32001, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    from transformers import AutoModelForCausalLM, LlamaConfig

    from minigpt4.common.schema import ModelConfig
    from minigpt4.models.mini_gpt4 import MiniGPT4
    from minigpt4.models.vision import build_vision

    with torch.device("meta"):
        config = LlamaConfig(**folder, num_attention_heads=32)
        llm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model = MiniGPT4(*build_vision(ModelConfig()), llm, None)
    sizes = memory.weight_bytes(model)
    assert sizes["language model"] == pytest.approx(13.48e9, rel=1e-3)
    assert sizes["projection"] == 4 * (768 * 4096 + 4096)


SETTINGS = {
    "plain": (),
    "layers computed again": ("model.llm_grad_checkpoint=True",),
    "LoRA": ("model.lora_r=16", "model.lora_dropout=0", "model.lora_target_modules=[q_proj,down_proj]"),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_training_memory_is_what_an_exact_device_measures(npu_programs, world, tmp_path, settings):
    """On the emulated device, which counts every byte of every tensor."""
    command = ["-m", "minigpt4.doctor", "--cfg-path", "train_configs/quickstart_stage1.yaml", "--json"]
    command += ["--steps", "2", "--sheet", tmp_path / "sheet.png", "--options", "run.device=npu", "run.num_workers=0"]
    command += [f"datasets.cc_sbu.build_info.storage={world}/shards", f"run.output_dir={tmp_path}/out", *settings]
    done = npu_programs.run(command)
    assert done.returncode == 0, done.stderr[-2000:]
    found = {row["check"]: row["numbers"] for row in json.loads(done.stdout)["findings"]}
    assert max(found["attention"].values()) < 0.01
    measured = found["memory, measured"]
    assert measured["predicted"] == pytest.approx(measured["measured"], rel=0.1)
    assert measured["measured"] < sum(found["memory, training"].values())  # which is for the longest texts
    assert found["time"]["step"] > 0 and found["time"]["steps"] == 800
    assert not (tmp_path / "out").exists()


CHAT = """
import sys
import torch
from types import SimpleNamespace
from minigpt4.common import device as devices
from minigpt4.common.config import Config
from minigpt4.common.schema import ModelConfig, read_section
from minigpt4.conversation.conversation import CONV_VISION, Chat
from minigpt4.conversation.generation import GenerationOptions
from minigpt4.doctor import memory
from minigpt4.doctor.files import ModelFiles
from minigpt4.models import MiniGPT4

file, options = "eval_configs/quickstart_eval.yaml", ["model.ckpt=null"]
cfg = Config(SimpleNamespace(cfg_path=file, options=options)).check().model_cfg
cfg = read_section(ModelConfig, cfg, "model")
device = devices.pick("npu", 0, True)
chat, conv, images = Chat(MiniGPT4.from_config(cfg, device=device), None, device), CONV_VISION.copy(), []
chat.upload_img(torch.rand(3, 64, 64), conv, images)
chat.ask("word " * int(sys.argv[1]), conv)
for answer in chat.stream(conv, images, GenerationOptions(max_new_tokens=3, do_sample=False)):
    pass
measured = devices.max_memory_mib(device) * 2**20
files = ModelFiles(cfg, device)
files.check()
print(measured, sum(memory.chat(files.build(), device, 64, answer.prompt_tokens + len(answer.ids) - 1).values()))
"""


@pytest.mark.parametrize("num_words", [10, 300])
def test_chat_memory_is_what_an_exact_device_measures(npu_programs, num_words):
    done = npu_programs.run(["-W", "ignore", "-c", CHAT, num_words])
    assert done.returncode == 0, done.stderr[-2000:]
    measured, predicted = map(float, done.stdout.split()[-2:])
    assert predicted == pytest.approx(measured, rel=0.1)
