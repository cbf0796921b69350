"""The doctor on sound set-ups and on those that users of the reference report: the true cause is named in each."""
# ruff: noqa: F811  (fixtures are imported by name)

import json
import math
import os
import re
import shutil
import tarfile
from argparse import Namespace

import foreign_formats
import pytest
import torch
from doctor_world import ROOT, WEIGHTS, diagnose, edit, edit_json, errors_of, llama, the_error, with_vocabulary, world  # noqa: F401
from PIL import Image

from minigpt4.common import device as devices
from minigpt4.doctor import language
from minigpt4.doctor.checks import run_checks
from minigpt4.doctor.files import ModelFiles
from minigpt4.doctor.findings import ERROR, OK, WARNING, worst

# sound set-ups


@pytest.mark.parametrize("stage", [1, 2])
def test_sound_set_ups(diagnose, tmp_path, stage):
    found = diagnose(stage=stage)
    assert {f.verdict for f in found.values()} == {OK}, {c: f.evidence for c, f in found.items() if f.verdict != OK}
    assert {"run.device", "model.llama_model", "LM loss", "memory, training", "memory, chat"} <= set(found)
    assert ("model.ckpt" in found) == (stage == 2)
    losses = found["LM loss"].numbers
    assert losses["captions of this run"] < losses["ln vocabulary"] == pytest.approx(math.log(768))
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.width == 8 * 160 and len(set(sheet.convert("L").tobytes())) > 20


def test_a_tokenised_sample_of_each_source_shows_its_targets(diagnose, tmp_path):
    own = foreign_formats.llava(tmp_path / "own")
    size = "vis_processor.train.image_size=64"
    more = [f"datasets.image_text.build_info.storage={own}", f"datasets.image_text.{size}"]
    found = diagnose(*more, "datasets.image_text.vis_processor.train.name=blip2_image_eval")
    shown = found["datasets.image_text/train"].evidence
    assert re.search(r"8 rows; 8 drawn.*a row of \d+ tokens, \d+ of them targets \(in ⟦⟧\)", shown), shown
    assert re.search(r"<Img> ⟨12 image positions⟩ </Img>.*Assistant: ⟦.*circle.*###⟧ ?Human: Are", shown), shown
    assert re.search(r"⟨12 image positions⟩ </Img>.*⟦The picture .*###⟧", found["datasets.cc_sbu_align/train"].evidence)
    assert found["memory, training"].verdict == OK
    short = diagnose(*more, "model.max_context_len=60")["datasets.image_text/train"]
    assert short.verdict == WARNING and "60 tokens and lose their last turns" in short.evidence


def test_an_evaluation_file_asks_for_no_training(monkeypatch, world, tmp_path):
    monkeypatch.chdir(ROOT)
    options = [f"datasets.cc_sbu_align.build_info.storage={world}/align", f"model.ckpt={world}/checkpoint_3.pth"]
    arguments = {"deep": False, "steps": 0, "samples": 8, "sheet": tmp_path / "sheet.png", "memory": None}
    found = run_checks(Namespace(cfg_path="eval_configs/quickstart_eval.yaml", options=options, **arguments))
    assert worst(found) == OK
    assert "memory, chat" in {f.check for f in found} and "memory, training" not in {f.check for f in found}


def test_the_command(programs, world, tmp_path):
    command = ["-m", "minigpt4.doctor", "--cfg-path", "train_configs/quickstart_stage1.yaml", "--json"]
    command += ["--sheet", tmp_path / "sheet.png", "--options", f"datasets.cc_sbu.build_info.storage={world}/shards"]
    command += [f"run.output_dir={tmp_path}"]
    good = programs.run(command)
    told = json.loads(good.stdout)
    assert good.returncode == 0 and told["verdict"] == "ok", good.stderr
    assert all(set(row) == {"check", "verdict", "evidence", "remedy", "numbers"} for row in told["findings"])
    command.remove("--json")
    bad = programs.run([*command, "run.max_epochs=1"])
    assert bad.returncode == 1 and re.search(r"error +configuration +.*Did you mean 'max_epoch'", bad.stdout)
    assert "Traceback" not in bad.stderr


# what users of the reference report


def test_1_the_wrong_vicuna_version(diagnose, llama):
    with_vocabulary(llama, 32000)
    found = diagnose(f"model.llama_model={llama}")
    told = the_error(found, "Vicuna version", "32000", "v1.1", "Vicuna v0 (32001)", "#the-wrong-vicuna-version")
    assert "###Human" in told.evidence
    meant = diagnose(f"model.llama_model={llama}", "model.conversation=vicuna_v0")["Vicuna version"]
    assert meant.verdict == WARNING
    with_vocabulary(llama, 32001)
    assert diagnose(f"model.llama_model={llama}")["Vicuna version"].verdict == OK


def test_1_the_tokenizer_of_another_version(diagnose, llama):
    (llama / "added_tokens.json").write_text(json.dumps({"[PAD]": 768}))
    the_error(diagnose(f"model.llama_model={llama}"), "model.llama_model", "769 tokens", "768", "same version")


def test_ids_of_generation_config_do_not_count(diagnose, llama):
    edit_json(llama / "generation_config.json", bos_token_id=0, eos_token_id=1)
    told = diagnose(f"model.llama_model={llama}")["tokenizer"]
    assert told.verdict == OK and "has bos 0, eos 1" in told.evidence and "begin 1, end 2" in told.evidence


def test_2_out_of_memory(diagnose, monkeypatch):
    monkeypatch.setattr(devices, "memory_left", lambda device: (40_000_000, 40_000_000))
    parts = diagnose("run.batch_size_train=2")["memory, training"].numbers
    fixed, row = sum(parts.values()) - parts["activations"], parts["activations"] / 2
    found = diagnose("run.batch_size_train=64")
    told = the_error(found, "memory, training", "40 MB", "activations", "#out-of-memory")
    fits = int(re.search(r"batch_size_train: (\d+) would fit", told.remedy).group(1))
    assert fits == pytest.approx((40e6 - fixed) / row, abs=2)
    assert found["memory, chat"].verdict in (OK, WARNING)


def test_2_slices_over_cards(diagnose, monkeypatch):
    """What a rank holds: all but the layers, its slice of them, and two whole layers."""
    options = ("run.parallel=fsdp", "run.batch_size_train=2", "model.llm_dtype=fp32", "run.amp=False")
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
        the_error(found, "model.llama_model", "raw delta", "apply_delta", "#a-dead-language-model")
    else:
        told = the_error(found, "LM loss", "chance is ln(768) = 6.64", "#a-dead-language-model")
        assert ("confident and wrong" if damage == "random weights" else "predicts nothing") in told.evidence
    if damage in ("untrained", "zeros"):  # told without computing anything, too
        files = ModelFiles({"llama_model": str(llama)}, torch.device("cpu"))
        files.check()
        sampled = language.sampled_weights_check(files.tensors, torch.float32)
        assert sampled.verdict == ERROR and "--deep" in sampled.evidence


def test_4_placeholder_paths(diagnose):
    found = diagnose("model.llama_model=/path/to/vicuna/weights/", "model.ckpt=/path/to/stage1/checkpoint/")
    assert set(errors_of(found)) == {"model.llama_model", "model.ckpt"}
    for finding in errors_of(found).values():
        assert "placeholder" in finding.evidence and "#placeholder-paths" in finding.remedy
    # what looks like an id of the hub is not asked for there
    asked = diagnose("model.llama_model=weights/vicuna-7b")["model.llama_model"]
    assert asked.verdict == WARNING and "not on this machine" in asked.evidence
    data = diagnose("datasets.cc_sbu_align.build_info.storage=/path/to/cc_sbu_align/")
    the_error(data, "datasets.cc_sbu_align", "placeholder")


def test_5_a_13b_projection_on_a_7b_model(diagnose, tmp_path):
    projection = {"llama_proj.weight": torch.zeros(5120, 128), "llama_proj.bias": torch.zeros(5120)}
    torch.save({"model": projection}, tmp_path / "c.pth")
    told = the_error(diagnose(f"model.ckpt={tmp_path}/c.pth"), "model.ckpt", "[5120, 128]", "13B", "160 wide")
    assert "#a-projection-for-another-language-model" in told.remedy


def test_6_nan_in_half_precision(diagnose, llama):
    def change(state):  # the same function, through numbers that fp16 does not have
        state["model.layers.1.mlp.up_proj.weight"].mul_(3e4)
        state["model.layers.1.mlp.down_proj.weight"].div_(3e4)

    edit(llama, change)
    assert not errors_of(diagnose(f"model.llama_model={llama}"))
    found = diagnose(f"model.llama_model={llama}", "model.llm_dtype=fp16")
    the_error(found, "LM loss", "In float16 it overflows", "llm_dtype: bf16", "#nan")
    assert found["precision"].verdict == WARNING


def test_6_nan_in_the_files(diagnose, llama, world, tmp_path):
    edit(llama, lambda state: state["model.layers.0.mlp.up_proj.weight"].fill_(torch.nan))
    the_error(diagnose(f"model.llama_model={llama}"), "LM loss", "NaN", "up_proj")


def test_7_silent_data_failure_in_pairs(diagnose, world, tmp_path):
    align = shutil.copytree(world / "align", tmp_path / "align")
    for i, file in enumerate(sorted((align / "image").iterdir())):
        if i % 3:
            file.unlink() if i % 2 else file.write_bytes(b"<html>not found</html>")
    key = "datasets.cc_sbu_align"
    found = diagnose(f"{key}.build_info.storage={align}", samples=30)
    the_error(found, f"{key}/train", "missing image file", "unreadable image", "67% unusable", "#silent-data-failure")


def test_7_silent_data_failure_in_shards(diagnose, world, tmp_path):
    for file in (world / "shards").glob("*.tar"):
        (tmp_path / file.name).write_bytes(file.read_bytes()[:700])
    found = diagnose(f"datasets.cc_sbu.build_info.storage={tmp_path}/*.tar", stage=1)
    the_error(found, "datasets.cc_sbu/train", "100% unusable", "unreadable shard")
    with tarfile.open(tmp_path / "0.tar", "w"):
        pass
    empty = diagnose(f"datasets.cc_sbu.build_info.storage={tmp_path}/0.tar", stage=1)
    the_error(empty, "datasets.cc_sbu/train", "100% unusable")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("captions", "1 different captions among 8"),
        ("colour", "8 of 8 images are of a single colour"),
        ("same", "many images are one and the same"),
        ("long", "lose their end symbol"),
        ("headings", "8 of 8 texts contain '###', at which answers end"),
    ],
)
def test_7_data_that_can_be_read_and_is_no_good(diagnose, world, tmp_path, damage, words):
    align = shutil.copytree(world / "align", tmp_path / "align")
    content = json.loads((align / "filter_cap.json").read_text())
    for entry in content["annotations"]:
        if damage in ("captions", "long"):
            entry["caption"] = "a picture" if damage == "captions" else entry["caption"] * 20
        elif damage == "headings":
            entry["caption"] = f"### Objects\n{entry['caption']}"
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
    told = the_error(found, "model.llama_model", "a checkpoint of MiniGPT-4", "(model.ckpt)", "Expected the folder")
    assert "#weights-that-do-not-fit" in told.remedy
    assert found["model.vit_weights"].verdict == found["model.q_former_model"].verdict == OK


def test_9_swapped_vision_files(diagnose):
    vit, q_former = WEIGHTS / "eva_vit.safetensors", WEIGHTS / "qformer.safetensors"
    found = diagnose(f"model.vit_weights={q_former}", f"model.q_former_model={vit}")
    assert set(errors_of(found)) == {"model.vit_weights", "model.q_former_model"}
    assert "It looks like BLIP-2's Q-Former" in found["model.vit_weights"].evidence
    assert "It looks like a vision transformer of 4 blocks" in found["model.q_former_model"].evidence


def test_10_files_that_are_none(diagnose, tmp_path):
    (tmp_path / "page.pth").write_text("<!DOCTYPE html><html>Sign in</html>")
    (tmp_path / "pointer.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    found = diagnose(f"model.vit_weights={tmp_path}/page.pth", f"model.q_former_model={tmp_path}/pointer.pth")
    assert set(errors_of(found)) == {"model.vit_weights", "model.q_former_model"}
    assert "web page" in found["model.vit_weights"].evidence
    assert "git-lfs" in found["model.q_former_model"].evidence
    os.truncate(shutil.copy(WEIGHTS / "eva_vit.safetensors", tmp_path / "cut.safetensors"), 1000)
    the_error(diagnose(f"model.vit_weights={tmp_path}/cut.safetensors"), "model.vit_weights", "cut short", "#damaged")


def test_11_a_disk_that_is_full(diagnose, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Namespace(free=10_000))
    the_error(diagnose(), "disk, checkpoints", "10 KB free", "keep_last", "#disk-full")
