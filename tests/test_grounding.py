"""The quickstart of boxes: data in the published layouts, its recipe for two steps, and what its backbones learn."""

from random import Random

import pytest
import torch
from PIL import Image

from quickstart import grounding
from quickstart import grounding_backbones as backbones

SETS = ("refcoco", "invrefcoco", "flickr_grounded_caption")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("grounding")


def test_data_is_trained_and_measured(folder, programs, monkeypatch):
    monkeypatch.setattr(grounding, "FOLDER", folder)
    monkeypatch.setattr(grounding, "NUM_SCENES", 24)
    monkeypatch.setattr(grounding, "NUM_HELD_OUT", 3)
    held_out = grounding.write_data()
    assert len(held_out) >= 3 and all(0 <= value <= 96 for target in held_out for value in target.box)
    paths = [f"datasets.{name}.build_info.image_path={folder}/images" for name in SETS]
    paths += [f"datasets.{name}.build_info.ann_path={folder}" for name in SETS[:2]]
    paths += [f"datasets.{SETS[2]}.build_info.ann_path={folder}/groundedcaption.json"]
    short = ["run.max_epoch=1", "run.iters_per_epoch=2", "run.warmup_steps=0", f"run.output_dir={folder}/run"]
    command = ["train.py", "--cfg-path", "train_configs/quickstart_grounding.yaml", "--options", *paths, *short]
    done = programs.run(command)
    assert done.returncode == 0, done.stderr
    row, places, names = grounding.measure("after", grounding.newest(folder / "run"), held_out)
    assert row.startswith("| after | ") and len(places) == len(names) == len(held_out)
    answers = [grounding.box_text(target.box) for target in held_out]
    grounding.draw_sheet(folder / "boxes.png", held_out, answers, 2, 1)
    assert Image.open(folder / "boxes.png").size == (640, 320)


def test_facts_are_those_of_the_scene():
    scene, boxes, _, facts = backbones.draw_facts(Random(3))
    known = facts[facts[:, 0] >= 0].tolist()
    assert len(known) == len(scene.things) == len(boxes)
    digits = {tuple(10 * row[i] + row[i + 1] for i in (3, 5, 7, 9)) for row in known}
    assert digits == {box for own in boxes for box in backbones.text_boxes(backbones.box_text(own))}
    assert {backbones.scenes.SHAPES[row[2]] for row in known} == {thing.shape for thing in scene.things}


@pytest.mark.parametrize("losses", [backbones.class_losses, backbones.value_losses])
def test_a_step_of_the_vision_side_reaches_all_of_it(losses):
    model = backbones.VisionHeads()
    loss = next(losses(model, Random(0)))
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in model.vit.parameters())


def test_a_step_of_the_language_model_reads_the_facts(monkeypatch):
    folder = backbones.WEIGHTS / "llama"
    from transformers import AutoModelForCausalLM

    from minigpt4.models.llama_tokenizer import load_tokenizer

    llm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tables = backbones.FactTables(llm.config.hidden_size)
    rows = backbones.TextRows(load_tokenizer(folder), Random(1))
    loss = next(backbones.text_losses(llm, tables, rows))
    loss.backward()
    assert loss.isfinite() and all(table.weight.grad.norm() > 0 for table in tables.tables)
