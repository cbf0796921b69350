"""The recipes for a card of 24 GB: their files load, and the doctor accepts them with small models."""
# ruff: noqa: F811  (fixtures are imported by name)

from argparse import Namespace

import pytest
from doctor_world import ROOT, errors_of, world  # noqa: F401
from omegaconf import OmegaConf

from minigpt4.doctor.checks import run_checks

SIZES = ("image_size", "vit_precision", "num_query_token", "vit_config", "qformer_config")
FILES = ("vit_weights", "q_former_model", "llama_model")


@pytest.mark.parametrize("name", ["minigpt4_stage2_24gb", "minigpt4_stage2_lora_24gb"])
def test_the_doctor_accepts_a_recipe_with_small_models(world, tmp_path, monkeypatch, name):
    monkeypatch.chdir(ROOT)
    small = OmegaConf.load("train_configs/quickstart_stage2.yaml").model
    options = [f"model.{key}={OmegaConf.to_container(small)[key]}" for key in (*SIZES, *FILES)]
    options += [f"model.ckpt={world}/checkpoint_3.pth", f"datasets.cc_sbu_align.build_info.storage={world}/align"]
    options += ["datasets.cc_sbu_align.vis_processor.train.image_size=64", f"run.output_dir={tmp_path}/output"]
    options += [f"run.feature_cache={tmp_path}/features", "run.num_workers=0"]
    settings = {"deep": False, "steps": 1, "samples": 4, "memory": 24e9, "sheet": tmp_path / "sheet.png"}
    found = run_checks(Namespace(cfg_path=f"train_configs/{name}.yaml", options=options, **settings))
    assert not errors_of({f.check: f for f in found}), [f.evidence for f in found]
    (memory,) = [f for f in found if f.check == "memory, training"]
    assert memory.numbers["vision"] == 0  # the feature cache takes its place
    assert ("LoRA" in memory.numbers) == ("lora" in name)
