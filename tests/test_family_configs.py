"""YAML files of the reference's last commit: merged as it merges them, and run with small models."""

import json
from argparse import Namespace
from pathlib import Path

import family
import pytest
import torch
from data_samples import good, shard
from golden_data import read_json
from instruction_sets import BUILD_INFO, link_align, link_visual_genome

import demo
import evaluate
import train
from minigpt4.common.config import Config
from minigpt4.common.errors import UserError
from minigpt4.common.schema import ModelConfig
from minigpt4.runners import RunnerBase, runner_base
from minigpt4.tasks import setup_task

ROOT = Path(__file__).parents[1]
MERGED = read_json("merged_configs.json", family.FAMILY)
BENCHMARKS = "minigptv2_benchmark_evaluation"
OLDER = ("minigpt4_eval", "minigpt4_stage1_pretrain", "minigpt4_stage2_finetune")  # names that both commits have
SIZES = ("image_size", "vit_config", "qformer_config", "num_query_token", "vit_precision", "llm_dtype", "lora_r")
SIZES += ("lora_alpha",)
PATHS = ("vit_weights", "q_former_model", "llama_model", "ckpt")


def last_commit(path, folder):
    """A file of the last commit: the shipped one, or where that is of the first commit, its merged content."""
    if Path(path).stem not in OLDER:
        return ROOT / path
    file = folder / Path(path).name
    file.write_text(json.dumps(MERGED[path]))
    return file


@pytest.mark.parametrize("case", MERGED)
def test_merged_as_the_reference_merges(case, tmp_path):
    path, options = (case.split(" | --options ") + [""])[:2]
    config = Config(Namespace(cfg_path=last_commit(path, tmp_path), options=options.split() or None))
    assert config.to_dict() == MERGED[case]
    config.check()


def test_gradient_checkpointing_by_its_name_in_the_reference():
    assert ModelConfig(use_grad_checkpoint_llm=True).llm_grad_checkpoint and not ModelConfig().llm_grad_checkpoint


def member_of(name):
    return next((member for member in ("v2", "llama2") if member in name), "vicuna0")


def small(member, sets=(), **others):
    """Options that make a file of a member run with its small model and toy data sets."""
    image_size = family.DIMS["image_size"][member]
    section = family.section(member)
    options = {f"model.{key}": section[key] for key in (*SIZES, *PATHS) if key in section} | others
    for name, info in dict(sets).items():
        options |= {f"datasets.{name}.build_info.{key}": value for key, value in info.items()}
        options[f"datasets.{name}.vis_processor.train.image_size"] = image_size
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in options.items()}
    return [f"{key}={value}" for key, value in texts.items()]


@pytest.fixture(scope="module")
def toy_sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    for name in ("vg", "align"):
        (folder / name).mkdir()
    shards = {"storage": shard(folder / "0.tar", [entry for number in range(8) for entry in good(number)])}
    align = link_align(folder / "align")
    stages = {"stage1_pretrain": {"laion": shards, "cc_sbu": shards}, "stage2_finetune": {"cc_sbu_align": align}}
    return {
        **{f"minigpt4_{member}{stage}": sets for stage, sets in stages.items() for member in ("", "llama2_")},
        "minigptv2_finetune": BUILD_INFO | {"refvg": link_visual_genome(folder / "vg")},
    }


@pytest.mark.parametrize("path", [path for path in MERGED if "--options" not in path and path.startswith("train")])
def test_training(path, toy_sets, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(runner_base, "write_report", lambda folder: None)
    name = Path(path).stem
    run = {"run.device": "cpu", "run.max_epoch": 1, "run.iters_per_epoch": 3, "run.warmup_steps": 1}
    run |= {"run.num_workers": 0, "run.wandb_log": False, "run.output_dir": str(tmp_path)}
    cfg = Config(
        Namespace(cfg_path=last_commit(path, tmp_path), options=small(member_of(name), toy_sets[name], **run))
    ).check()
    task = setup_task(cfg)
    datasets = task.build_datasets(cfg)
    assert set(datasets) == set(MERGED[path]["datasets"])
    runner = RunnerBase(cfg=cfg, job_id="job", task=task, model=task.build_model(cfg), datasets=datasets)
    sizes = {key: section["batch_size"] for key, section in MERGED[path]["datasets"].items()}
    assert runner.build_train_loader().batch_size == sizes
    runner.train()
    assert (tmp_path / "job" / "checkpoint_0.pth").is_file()
    assert "train_loss" in (tmp_path / "job" / "log.txt").read_text()


@pytest.mark.parametrize(("member", "file"), [("llama2", "llama2_stage2_finetune"), ("v2", "stage2_finetune")])
def test_features_without_a_q_former_are_cached(member, file, toy_sets, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    options = small(member, toy_sets["minigpt4_llama2_stage2_finetune"])
    others = {"llama2": [], "v2": ["model.arch=minigpt_v2", "model.model_type=pretrain", "model.end_sym=</s>"]}
    options += [*others[member], f"run.feature_cache={tmp_path}", "run.device=cpu", "run.num_workers=0"]
    cfg = Config(Namespace(cfg_path=f"train_configs/minigpt4_{file}.yaml", options=options)).check()
    (cached,) = (splits["train"] for splits in setup_task(cfg).build_datasets(cfg).values())
    cfg.config.run.feature_cache = None
    (plain,) = (splits["train"] for splits in setup_task(cfg).build_datasets(cfg).values())
    expected = family.shared(member).encode_images(torch.stack([sample["image"] for sample in plain]))
    torch.testing.assert_close(torch.stack([s["features"] for s in cached]).float(), expected, atol=2e-2, rtol=1e-2)


def test_benchmarks(tmp_path, monkeypatch):
    """Of the last commit's file, each with one question that is made up; VSR is on the hub."""
    monkeypatch.chdir(ROOT)
    image = str(family.picture(0))
    refer = [{"img_id": "0", "sents": "a bus", "bbox": [1, 2, 30, 40], "height": 48, "width": 64}]
    asked = {"image": image, "question": "What is it?"}
    rows = {
        "gqa": [asked | {"question_id": "1", "answer": "a bus"}],
        "vizwiz": [asked | {"answers": [{"answer": "bus", "answer_confidence": "yes"}] * 10}],
        "iconvqa": [{"image_id": "1", "question": "Which one?", "choices": ["a", "b c"], "answer": 1}],
        "hm": [{"id": 1, "img": image, "label": 1, "text": "hello"}],
        "vsr": [{"image": image, "caption": "The bus is red.", "label": 1, "relation": "is"}],
        "okvqa/questions": {"questions": [{"image_id": 0, "question": "What is it?", "question_id": 1}]},
        "okvqa/annotations": {"annotations": [{"image_id": 0, "question_id": 1, "answers": [{"answer": "bus"}] * 10}]},
        **{f"{name}/{name}_val": refer for name in ("refcoco", "refcoco+", "refcocog")},
    }
    options = small("v2", {"cc_sbu_align": {}}, **{"run.device": "cpu"})
    for name, content in rows.items():
        file = tmp_path / f"{name}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content[0] if name in ("hm", "vsr") else content))
        key, is_folder = name.split("/")[0], "/" in name
        place = tmp_path if key.startswith("refcoco") else file.parent if is_folder else file
        options += [
            f"evaluation_datasets.{key}.eval_file_path={place}",
            f"evaluation_datasets.{key}.img_path={tmp_path}",
        ]
        options += [f"evaluation_datasets.{key}.splits=[val]"] * key.startswith("refcoco")
    for name in ("0.jpg", "000000000000.jpg", "1/image.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(image)
    flags = {"resample": False, "score_only": None, "api_url": None, "api_model": None, "api_stop": None}
    flags |= {"gpu_id": None, "dataset": None}
    results = evaluate.evaluate(
        Namespace(cfg_path=f"eval_configs/{BENCHMARKS}.yaml", options=options, out=tmp_path, **flags)
    )
    assert {row["benchmark"] for row in results} == set(
        MERGED[f"eval_configs/{BENCHMARKS}.yaml"]["evaluation_datasets"]
    )
    assert not any(row["errors"] for row in results)


@pytest.mark.parametrize(
    ("run", "key"),
    [(train.train, "output_dir"), (evaluate.evaluate, "save_path")],
    ids=["train", "evaluate"],
)
def test_the_folder_of_results_is_checked_before_anything_is_read(run, key, monkeypatch):
    monkeypatch.chdir(ROOT)
    file = {"output_dir": "train_configs/minigptv2_finetune.yaml"}.get(key, f"eval_configs/{BENCHMARKS}.yaml")
    with pytest.raises(UserError, match=f"run.{key} is still the placeholder '/path/to/save"):
        run(Namespace(cfg_path=file, options=["run.device=cpu"], out=None))


@pytest.mark.parametrize("name", ["minigptv2_eval", "minigpt4_llama2_eval", "minigpt4_eval"])
def test_chat(name, tmp_path):
    options = small(member_of(name), {"cc_sbu_align": {}}, **{"run.device": "cpu", "model.low_resource": False})
    chat = demo.build_chat(
        Namespace(cfg_path=last_commit(f"eval_configs/{name}.yaml", tmp_path), options=options, gpu_id=0, seed=1)
    )
    conv = chat.template.copy()
    images = []
    chat.upload_img(str(family.picture(0)), conv, images)
    chat.ask("What is this?", conv)
    assert isinstance(chat.answer(conv, images, max_new_tokens=5, do_sample=False)[0], str)
