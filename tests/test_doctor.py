"""The doctor on sound set-ups and on those that users of the reference report: the true cause is named in each."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import tarfile
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from minigpt4.common import device as devices
from minigpt4.common import fingerprints
from minigpt4.common.config import Config
from minigpt4.common.errors import UserError
from minigpt4.doctor import language, look_ahead, memory, warn_if_dead
from minigpt4.doctor.examination import examine
from minigpt4.doctor.findings import MISTAKE, OK, WARNING, worst
from minigpt4.doctor.model import ModelFiles
from minigpt4.models.llama_folder import load_llama
from minigpt4.models.llama_tokenizer import load_tokenizer
from quickstart import scenes

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "quickstart" / "weights"
GUIDE = ROOT / "docs" / "TROUBLESHOOTING.md"
STAGES = {1: "cc_sbu", 2: "cc_sbu_align"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    scenes.write_shards(folder / "shards", num_shards=2, scenes_per_shard=30, seed=1)
    scenes.write_alignment(folder / "align", num_scenes=30, seed=2)
    projection = {"llama_proj.weight": torch.randn(160, 128) / 10, "llama_proj.bias": torch.zeros(160)}
    torch.save({"model": projection, "epoch": 3, "config": {}}, folder / "checkpoint_3.pth")
    return folder


@pytest.fixture
def diagnose(world, tmp_path, monkeypatch):
    """Examines a quickstart stage whose configuration is changed, and returns its findings by check."""
    monkeypatch.chdir(ROOT)

    def run(*changes, stage=2, **arguments):
        storage = {1: "shards", 2: "align"}[stage]
        options = [f"datasets.{STAGES[stage]}.build_info.storage={world / storage}", "run.device=cpu"]
        options += [f"run.output_dir={tmp_path / 'output'}", *([f"model.ckpt={world}/checkpoint_3.pth"] * (stage == 2))]
        settings = {"deep": False, "steps": 0, "samples": 8, "sheet": tmp_path / "sheet.png"} | arguments
        file = f"train_configs/quickstart_stage{stage}.yaml"
        found = examine(Namespace(cfg_path=file, options=[*options, *changes], **settings))
        assert len({f.check for f in found}) == len(found)
        return {f.check: f for f in found}

    return run


def mistakes(findings):
    return {check: f for check, f in findings.items() if f.verdict == MISTAKE}


def the_mistake(findings, check, *words):
    """The only mistake among findings: its check, and its words in evidence and remedy."""
    assert list(mistakes(findings)) == [check], {c: f.evidence for c, f in mistakes(findings).items()}
    finding = findings[check]
    text = f"{finding.evidence} {finding.remedy}"
    assert not [word for word in words if word not in text], text
    assert finding.remedy
    return finding


@pytest.fixture
def llama(tmp_path):
    """A copy of the small world's LM, to be damaged."""
    return shutil.copytree(WEIGHTS / "llama", tmp_path / "llama")


def edit(folder, change):
    state = {name: value.float() for name, value in load_file(folder / "model.safetensors").items()}
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def edit_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def with_vocabulary(folder, rows):
    def change(state):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            state[name] = torch.cat([state[name], state[name][:1].repeat(rows - len(state[name]), 1)])

    edit(folder, change)
    edit_json(folder / "config.json", vocab_size=rows)


# sound set-ups


@pytest.mark.parametrize("stage", [1, 2])
def test_sound_set_ups(diagnose, tmp_path, stage):
    found = diagnose(stage=stage)
    assert {f.verdict for f in found.values()} == {OK}, {c: f.evidence for c, f in found.items() if f.verdict != OK}
    assert {"run.device", "model.llama_model", "LM vitality", "memory, training", "memory, chat"} <= set(found)
    assert ("model.ckpt" in found) == (stage == 2)
    losses = found["LM vitality"].numbers
    assert losses["captions of this run"] < losses["ln vocabulary"] == pytest.approx(math.log(768))
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.width == 8 * 160 and len(set(sheet.convert("L").tobytes())) > 20


def test_an_evaluation_file_asks_for_no_training(monkeypatch, world, tmp_path):
    monkeypatch.chdir(ROOT)
    options = [f"datasets.cc_sbu_align.build_info.storage={world}/align", f"model.ckpt={world}/checkpoint_3.pth"]
    arguments = {"deep": False, "steps": 0, "samples": 8, "sheet": tmp_path / "sheet.png"}
    found = examine(Namespace(cfg_path="eval_configs/quickstart_eval.yaml", options=options, **arguments))
    assert worst(found) == OK
    assert "memory, chat" in {f.check for f in found} and "memory, training" not in {f.check for f in found}


def test_the_command(world, tmp_path):
    command = [sys.executable, "-m", "minigpt4.doctor", "--cfg-path", "train_configs/quickstart_stage1.yaml", "--json"]
    command += ["--sheet", tmp_path / "sheet.png", "--options", f"datasets.cc_sbu.build_info.storage={world}/shards"]
    command += [f"run.output_dir={tmp_path}"]
    good = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    told = json.loads(good.stdout)
    assert good.returncode == 0 and told["verdict"] == "ok", good.stderr
    assert all(set(row) == {"check", "verdict", "evidence", "remedy", "numbers"} for row in told["findings"])
    command.remove("--json")
    bad = subprocess.run([*command, "run.max_epochs=1"], cwd=ROOT, capture_output=True, text=True)
    assert bad.returncode == 1 and re.search(r"mistake +configuration +.*Did you mean 'max_epoch'", bad.stdout)
    assert "Traceback" not in bad.stderr


# what users of the reference report


def test_1_the_wrong_vicuna_version(diagnose, llama):
    with_vocabulary(llama, 32000)
    found = diagnose(f"model.llama_model={llama}")
    told = the_mistake(found, "Vicuna version", "32000", "v1.1", "Vicuna v0 (32001)", "#the-wrong-vicuna-version")
    assert "###Human" in told.evidence
    meant = diagnose(f"model.llama_model={llama}", "model.conversation=vicuna_v0")["Vicuna version"]
    assert meant.verdict == WARNING
    with_vocabulary(llama, 32001)
    assert diagnose(f"model.llama_model={llama}")["Vicuna version"].verdict == OK


def test_1_the_tokenizer_of_another_version(diagnose, llama):
    (llama / "added_tokens.json").write_text(json.dumps({"[PAD]": 768}))
    the_mistake(diagnose(f"model.llama_model={llama}"), "tokenizer", "769 tokens", "768", "same version")


def test_ids_of_generation_config_do_not_count(diagnose, llama):
    edit_json(llama / "generation_config.json", bos_token_id=0, eos_token_id=1)
    told = diagnose(f"model.llama_model={llama}")["tokenizer"]
    assert told.verdict == OK and "says bos 0, eos 1" in told.evidence and "begin 1, end 2" in told.evidence


def test_2_out_of_memory(diagnose, monkeypatch):
    monkeypatch.setattr(devices, "memory_left", lambda device: (40_000_000, 40_000_000))
    parts = diagnose("run.batch_size_train=2")["memory, training"].numbers
    fixed, row = sum(parts.values()) - parts["activations"], parts["activations"] / 2
    found = diagnose("run.batch_size_train=64")
    told = the_mistake(found, "memory, training", "40 MB", "activations", "#out-of-memory")
    fits = int(re.search(r"batch_size_train: (\d+) would fit", told.remedy).group(1))
    assert fits == pytest.approx((40e6 - fixed) / row, abs=2)
    assert found["memory, chat"].verdict in (OK, WARNING)


def test_2_slices_over_cards(diagnose, monkeypatch):
    """What a rank holds: all but the layers, its slice of them, and two whole layers."""
    options = ("run.parallel=fsdp", "run.batch_size_train=2")
    whole = sum(diagnose(*options)["memory, training"].numbers.values())
    layer = 4 * (4 * 160 * 160 + 3 * 160 * 432 + 2 * 160)
    for room, told in ((4 * layer / 2.5, "on 3 cards"), (0, None)):
        capacity = int(whole - 4 * layer + 2 * layer + room)
        monkeypatch.setattr(devices, "memory_left", lambda device, capacity=capacity: (capacity, capacity))
        found = diagnose(*options)["memory, training"]
        if told:
            assert found.verdict == OK and told in found.evidence
        else:
            assert "on 3 cards" not in found.evidence


@pytest.mark.parametrize("damage", ["raw delta", "random weights", "untrained", "zeros"])
def test_3_a_dead_language_model(diagnose, llama, damage):
    def change(state):
        for name, value in state.items():
            if damage == "raw delta":
                value.mul_(0.001)
            elif damage == "random weights" and value.ndim == 2:
                value.normal_(std=value.std().item())
            elif damage == "untrained":
                value.normal_(std=0.02) if value.ndim == 2 else value.fill_(1)
            elif damage == "zeros" and "lm_head" in name:
                value.zero_()

    torch.manual_seed(0)
    edit(llama, change)
    found = diagnose(f"model.llama_model={llama}")
    if damage == "raw delta":
        the_mistake(found, "model.llama_model", "raw delta", "apply_delta", "#a-dead-language-model")
    else:
        told = the_mistake(found, "LM vitality", "guessing has ln(768) = 6.64", "#a-dead-language-model")
        assert ("sure and wrong" if damage == "random weights" else "predicts nothing") in told.evidence
    if damage in ("untrained", "zeros"):  # told without computing anything, too
        files = ModelFiles({"llama_model": str(llama)}, torch.device("cpu"))
        files.examine()
        sampled = language.sampled_vitality(files.tensors, torch.float32)
        assert sampled.verdict == MISTAKE and "--deep" in sampled.evidence


def test_4_placeholder_paths(diagnose):
    found = diagnose("model.llama_model=/path/to/vicuna/weights/", "model.ckpt=/path/to/stage1/checkpoint/")
    assert set(mistakes(found)) == {"model.llama_model", "model.ckpt"}
    for finding in mistakes(found).values():
        assert "placeholder" in finding.evidence and "#placeholder-paths" in finding.remedy
    # what looks like an id of the hub is not asked for there
    asked = diagnose("model.llama_model=weights/vicuna-7b")["model.llama_model"]
    assert asked.verdict == WARNING and "not on this machine" in asked.evidence
    data = diagnose("datasets.cc_sbu_align.build_info.storage=/path/to/cc_sbu_align/")
    the_mistake(data, "datasets.cc_sbu_align", "placeholder")


def test_5_a_13b_projection_on_a_7b_model(diagnose, tmp_path):
    projection = {"llama_proj.weight": torch.zeros(5120, 128), "llama_proj.bias": torch.zeros(5120)}
    torch.save({"model": projection}, tmp_path / "c.pth")
    told = the_mistake(diagnose(f"model.ckpt={tmp_path}/c.pth"), "model.ckpt", "[5120, 128]", "13B", "160 wide")
    assert "#a-projection-for-another-language-model" in told.remedy


def test_6_nan_in_half_precision(diagnose, llama):
    def change(state):  # the same function, through numbers that fp16 does not have
        state["model.layers.1.mlp.up_proj.weight"].mul_(3e4)
        state["model.layers.1.mlp.down_proj.weight"].div_(3e4)

    edit(llama, change)
    assert not mistakes(diagnose(f"model.llama_model={llama}"))
    found = diagnose(f"model.llama_model={llama}", "model.llm_dtype=fp16")
    the_mistake(found, "LM vitality", "In float16 it overflows", "llm_dtype: bf16", "#nan")
    assert found["precision"].verdict == WARNING


def test_6_nan_in_the_files(diagnose, llama, world, tmp_path):
    edit(llama, lambda state: state["model.layers.0.mlp.up_proj.weight"].fill_(torch.nan))
    the_mistake(diagnose(f"model.llama_model={llama}"), "LM vitality", "NaN", "up_proj")


def test_7_silent_data_failure_in_pairs(diagnose, world, tmp_path):
    align = shutil.copytree(world / "align", tmp_path / "align")
    for i, file in enumerate(sorted((align / "image").iterdir())):
        if i % 3:
            file.unlink() if i % 2 else file.write_bytes(b"<html>not found</html>")
    key = "datasets.cc_sbu_align"
    found = diagnose(f"{key}.build_info.storage={align}", samples=30)
    the_mistake(found, f"{key}/train", "missing image file", "unreadable image", "67% unusable", "#silent-data-failure")


def test_7_silent_data_failure_in_shards(diagnose, world, tmp_path):
    for file in (world / "shards").glob("*.tar"):
        (tmp_path / file.name).write_bytes(file.read_bytes()[:700])
    found = diagnose(f"datasets.cc_sbu.build_info.storage={tmp_path}/*.tar", stage=1)
    the_mistake(found, "datasets.cc_sbu/train", "100% unusable", "unreadable shard")
    with tarfile.open(tmp_path / "0.tar", "w"):
        pass
    empty = diagnose(f"datasets.cc_sbu.build_info.storage={tmp_path}/0.tar", stage=1)
    the_mistake(empty, "datasets.cc_sbu/train", "100% unusable")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("captions", "1 different captions among 8"),
        ("colour", "8 of 8 pictures are of a single colour"),
        ("same", "many pictures are one and the same"),
        ("long", "lose their end symbol"),
    ],
)
def test_7_data_that_can_be_read_and_is_no_good(diagnose, world, tmp_path, damage, words):
    align = shutil.copytree(world / "align", tmp_path / "align")
    content = json.loads((align / "filter_cap.json").read_text())
    for entry in content["annotations"]:
        if damage in ("captions", "long"):
            entry["caption"] = "a picture" if damage == "captions" else entry["caption"] * 20
    (align / "filter_cap.json").write_text(json.dumps(content))
    for file in (align / "image").iterdir():
        if damage == "colour":
            Image.new("RGB", (64, 64), "grey").save(file)
        elif damage == "same":
            shutil.copy(world / "align" / "image" / "0.jpg", file)
    found = diagnose(f"datasets.cc_sbu_align.build_info.storage={align}")["datasets.cc_sbu_align/train"]
    assert found.verdict == WARNING and words in found.evidence and "#silent-data-failure" in found.remedy


def test_8_a_stage_1_file_as_language_model(diagnose, world):
    found = diagnose(f"model.llama_model={world}/checkpoint_3.pth")
    told = the_mistake(found, "model.llama_model", "MiniGPT-4 checkpoint", "(model.ckpt)", "Expected the folder")
    assert "#weights-that-do-not-fit" in told.remedy
    assert found["model.vit_weights"].verdict == found["model.q_former_model"].verdict == OK


def test_9_swapped_vision_files(diagnose):
    vit, q_former = WEIGHTS / "eva_vit.safetensors", WEIGHTS / "qformer.safetensors"
    found = diagnose(f"model.vit_weights={q_former}", f"model.q_former_model={vit}")
    assert set(mistakes(found)) == {"model.vit_weights", "model.q_former_model"}
    assert "It looks like BLIP-2's Q-Former" in found["model.vit_weights"].evidence
    assert "It looks like a vision transformer of 4 blocks" in found["model.q_former_model"].evidence


def test_10_files_that_are_none(diagnose, tmp_path):
    (tmp_path / "page.pth").write_text("<!DOCTYPE html><html>Sign in</html>")
    (tmp_path / "pointer.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    found = diagnose(f"model.vit_weights={tmp_path}/page.pth", f"model.q_former_model={tmp_path}/pointer.pth")
    assert set(mistakes(found)) == {"model.vit_weights", "model.q_former_model"}
    assert "web page" in found["model.vit_weights"].evidence
    assert "git-lfs" in found["model.q_former_model"].evidence
    os.truncate(shutil.copy(WEIGHTS / "eva_vit.safetensors", tmp_path / "cut.safetensors"), 1000)
    the_mistake(diagnose(f"model.vit_weights={tmp_path}/cut.safetensors"), "model.vit_weights", "cut short", "#damaged")


def test_11_a_disk_that_is_full(diagnose, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Namespace(free=10_000))
    the_mistake(diagnose(), "disk, checkpoints", "10 KB free", "keep_last", "#disk-full")


# the parts


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"llama_proj.weight": (5120, 768)}, "for a 13B LM"),
        ({"llama_proj.weight": (4096, 5632)}, "Llama-2 variant"),
        ({"model.embed_tokens.weight": (32001, 4096)}, "7B, vocabulary 32001 (Vicuna v0)"),
        ({"model.embed_tokens.weight": (32000, 5120)}, "13B, vocabulary 32000 (LLaMA, or Vicuna from v1.1 on)"),
        ({"model.layers.3.mlp.up_proj.weight": (4, 4)}, "one part of several"),
        ({"tok_embeddings.weight": (32000, 4096)}, "Meta's own form"),
        ({"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": (8, 4096)}, "LoRA"),
        ({"query_tokens": (1, 32, 768), "t5_proj.weight": (4096, 768)}, "Q-Former"),
        ({"pos_embed": (1, 257, 1408)} | {f"blocks.{i}.norm1.weight": (1408,) for i in range(40)}, "eva_vit_g.pth"),
        ({"shared.weight": (1, 1), "encoder.block.0.layer.0.layer_norm.weight": (1,)}, "T5"),
        ({"a": (1,), "b": (1,)}, "a, b"),
        ({}, "without tensors"),
    ],
)
def test_kinds_of_files(shapes, words):
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    assert words in fingerprints.kind_of(state) and words in fingerprints.kind_of({"model": state})


def test_the_head_of_a_run_refuses_early_and_warns(world, monkeypatch, llama, caplog):
    monkeypatch.chdir(ROOT)

    def head(*options):
        options = [f"model.ckpt={world}/checkpoint_3.pth", *options]
        cfg = Config(Namespace(cfg_path="train_configs/quickstart_stage2.yaml", options=options)).check()
        look_ahead(cfg, torch.device("cpu"))

    head()
    assert not caplog.records
    with pytest.raises(UserError, match=r"model\.ckpt is still the placeholder.*\(1 more: python -m minigpt4\.doctor"):
        head("model.ckpt=/path/to/ckpt.pth", "model.prompt_path=absent.txt")
    with_vocabulary(llama, 32000)
    head(f"model.llama_model={llama}")
    assert {record.levelname for record in caplog.records} == {"WARNING"}
    assert "answers would be garbage" in caplog.text


def test_a_dead_model_is_told_at_the_head_of_training(llama, caplog):
    tokenizer = load_tokenizer(llama)
    warn_if_dead(Namespace(llama_model=load_llama(llama, torch.float32), llama_tokenizer=tokenizer))
    assert not caplog.records
    edit(llama, lambda state: state["lm_head.weight"].zero_())
    warn_if_dead(Namespace(llama_model=load_llama(llama, torch.float32), llama_tokenizer=tokenizer))
    assert "it predicts nothing (loss 6.64" in caplog.text and "#a-dead-language-model" in caplog.text


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("X out of memory."), RuntimeError("can't allocate memory")])
def test_out_of_memory_is_explained(error):
    told = devices.explain_out_of_memory(error, "run.batch_size_train")
    assert "lower run.batch_size_train" in told and "#out-of-memory" in told
    assert devices.explain_out_of_memory(RuntimeError("shape mismatch"), "") is None


def test_every_link_into_the_guide_leads_somewhere():
    def anchor(title):
        return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")

    text = GUIDE.read_text(encoding="utf-8")
    anchors = {anchor(title) for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}
    named = set()
    for file in [*(ROOT / "minigpt4").rglob("*.py"), ROOT / "train.py", ROOT / "demo.py"]:
        code = file.read_text(encoding="utf-8")
        named |= set(re.findall(r"""\bsee\(\s*"([^"]+)"\s*\)""", code))
        named |= set(re.findall(r"TROUBLESHOOTING\.md#([\w-]+)", code)) - {"anchor"}
        named |= set(re.findall(r'_ANCHOR = "([^"]+)"', code))
    assert len(named) >= 10 and named <= anchors
    assert set(re.findall(r"\]\(#([\w-]+)\)", text)) <= anchors
    for link in re.findall(r"\]\(([^)#]+)(?:#[\w-]+)?\)", text):
        assert (GUIDE.parent / link).exists(), link


# memory


def test_weights_of_7b_by_part():
    """A model of the full size, without a byte of memory."""
    folder = {"vocab_size": 32001, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    from minigpt4.models.llama import Llama, LlamaConfig
    from minigpt4.models.mini_gpt4 import MiniGPT4
    from minigpt4.models.vision import build_vision

    with torch.device("meta"):
        llm = Llama(LlamaConfig(**folder, num_attention_heads=32)).bfloat16()
        model = MiniGPT4(*build_vision({}), llm, None)
    sizes = memory.weight_bytes(model)
    assert sizes["language model"] == pytest.approx(13.48e9, rel=1e-3)
    assert sizes["projection"] == 4 * (768 * 4096 + 4096)


@pytest.mark.parametrize("settings", [(), ("model.llm_grad_checkpoint=True",)], ids=["plain", "layers computed again"])
def test_training_memory_is_what_an_exact_device_measures(world, tmp_path, settings):
    """On the emulated device, which counts every byte of every tensor."""
    build = pytest.importorskip("emulated_npu.build")
    if build.compiler() is None:
        pytest.skip("the emulated device is compiled, and no g++ is here")
    build.install(tmp_path / "npu")
    command = [sys.executable, "-m", "minigpt4.doctor", "--cfg-path", "train_configs/quickstart_stage1.yaml", "--json"]
    command += ["--steps", "2", "--sheet", tmp_path / "sheet.png", "--options", "run.device=npu", "run.num_workers=0"]
    command += [f"datasets.cc_sbu.build_info.storage={world}/shards", f"run.output_dir={tmp_path}/out", *settings]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "npu"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found = {row["check"]: row["numbers"] for row in json.loads(done.stdout)["findings"]}
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
from minigpt4.conversation.conversation import CONV_VISION, Chat
from minigpt4.conversation.generation import GenerationOptions
from minigpt4.doctor import memory
from minigpt4.doctor.model import ModelFiles
from minigpt4.models import MiniGPT4

file, options = "eval_configs/quickstart_eval.yaml", ["model.ckpt=null"]
cfg = Config(SimpleNamespace(cfg_path=file, options=options)).check().model_cfg
device = devices.pick("npu", 0, True)
chat, conv, images = Chat(MiniGPT4.from_config(cfg, device=device), None, device), CONV_VISION.copy(), []
chat.upload_img(torch.rand(3, 64, 64), conv, images)
chat.ask("word " * int(sys.argv[1]), conv)
for answer in chat.stream(conv, images, GenerationOptions(max_new_tokens=3, do_sample=False)):
    pass
measured = devices.max_memory_mib(device) * 2**20
files = ModelFiles(cfg, device)
files.examine()
print(measured, sum(memory.chat(files.build(), device, 64, answer.num_context + len(answer.ids) - 1).values()))
"""


@pytest.mark.parametrize("num_words", [10, 300])
def test_chat_memory_is_what_an_exact_device_measures(tmp_path, num_words):
    build = pytest.importorskip("emulated_npu.build")
    if build.compiler() is None:
        pytest.skip("the emulated device is compiled, and no g++ is here")
    build.install(tmp_path / "npu")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path / 'npu'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", CHAT, str(num_words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    measured, predicted = map(float, done.stdout.split()[-2:])
    assert predicted == pytest.approx(measured, rel=0.1)
