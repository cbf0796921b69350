"""Merged configurations: the reference's result, both notations of options, and messages for mistakes in keys."""

from argparse import Namespace
from pathlib import Path

import pytest
import yaml
from golden_data import GOLDEN, read_json

from minigpt4.common.config import Config
from minigpt4.common.errors import UserError

MERGED = read_json("merged_configs.json", GOLDEN / "common")
ROOT = Path(__file__).parents[1]
SHIPPED = {
    "stage1": ROOT / "train_configs" / "minigpt4_stage1_pretrain.yaml",
    "stage2": ROOT / "train_configs" / "minigpt4_stage2_finetune.yaml",
    "eval": ROOT / "eval_configs" / "minigpt4_eval.yaml",
}
SMALL = {
    "model": {"arch": "mini_gpt4", "model_type": "pretrain_vicuna", "max_txt_len": 160},
    "datasets": {"cc_sbu_align": {"vis_processor": {"train": {"name": "blip2_image_eval", "image_size": 224}}}},
    "run": {"task": "image_text_pretrain", "max_epoch": 5, "init_lr": 3e-5, "train_splits": ["train"]},
}


def load(path, *options):
    return Config(Namespace(cfg_path=str(path), options=list(options) or None))


def written(folder, content):
    path = folder / "run.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return path


@pytest.fixture
def small(tmp_path):
    return written(tmp_path, SMALL)


@pytest.mark.parametrize("case", MERGED)
def test_merged_as_the_reference_merges(case):
    golden = MERGED[case]
    config = load(SHIPPED[case.split("_")[0]], *(golden["options"] or []))
    assert config.to_dict() == golden["config"]
    assert list(config.to_dict()) == golden["sections_order"]


@pytest.mark.parametrize("case", ["stage1", "stage2", "eval"])
def test_check_passes(case):
    config = load(SHIPPED[case])
    assert config.check() is config


@pytest.mark.parametrize("case", [case for case in MERGED if case.endswith("with_options")])
def test_check_refuses_what_the_reference_accepts(case):
    with pytest.raises(UserError, match=r"run\.new_key") as error:
        load(SHIPPED[case.split("_")[0]], *MERGED[case]["options"]).check()
    assert "max_epoch" in str(error.value)  # the known ones are listed


def test_later_layers_win(small):
    config = load(small)
    assert config.model_cfg.num_query_token == 32  # the model's default
    assert config.model_cfg.max_txt_len == 160  # the file
    assert config.datasets_cfg.cc_sbu_align.build_info.storage == "/path/to/cc_sbu_align/"  # the data set's default
    assert config.run_cfg.max_epoch == 5
    changed = load(small, "run.max_epoch=2", "datasets.cc_sbu_align.build_info.storage=/d", "model.num_query_token=8")
    assert changed.run_cfg.max_epoch == 2 and changed.model_cfg.num_query_token == 8
    assert changed.datasets_cfg.cc_sbu_align.build_info.storage == "/d"


def test_both_notations_of_options_agree(small):
    equals = load(small, "run.max_epoch=2", "run.init_lr=1e-3", "model.ckpt=a=b", "run.amp=True")
    pairs = load(small, "run.max_epoch", "2", "run.init_lr", "1e-3", "model.ckpt", "a=b", "run.amp", "True")
    assert equals.to_dict() == pairs.to_dict()
    assert equals.run_cfg.init_lr == 1e-3 and equals.model_cfg.ckpt == "a=b" and equals.run_cfg.amp is True


def test_saved_configuration_gives_the_same_run(small, tmp_path):
    config = load(small, "run.max_epoch=2")
    config.save(tmp_path / "saved.yaml")
    assert load(tmp_path / "saved.yaml").check().to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["run.max_epoc=2"], ["run.max_epoc", "Did you mean 'max_epoch'?"]),
        (["model.max_text_len=2"], ["model.max_text_len", "Did you mean 'max_txt_len'?"]),
        (["model.vit_config.dept=2"], ["model.vit_config.dept", "Did you mean 'depth'?"]),
        (["datasets.cc_sbu_align.sample_ratios=2"], ["cc_sbu_align.sample_ratios", "'sample_ratio'"]),
        (["preprocess.vis_processor.train.imagesize=2"], ["vis_processor.train.imagesize", "'image_size'"]),
        (["runs.max_epoch=2"], ["'runs'", "Did you mean 'run'?"]),
        (["run.max_epoch=two"], ["run.max_epoch", "'two'", "int"]),
        (["run.max_epoch=True"], ["run.max_epoch", "bool", "int"]),
        (["run.amp=1"], ["run.amp", "1", "bool"]),
        (["run.beta2=1"], ["run.beta2 is 1", "less than 1"]),
        (["model.has_qformer=1"], ["model.has_qformer is 1", "bool"]),
        (["run.train_splits=train"], ["run.train_splits", "'train'", "list"]),
        (["run.init_lr=fast"], ["run.init_lr", "'fast'", "float"]),
        (["model.vit_precision=fp8"], ["model.vit_precision", "'fp8'", "one of fp32, fp16, bf16"]),
        (["model.vit_config=5"], ["model.vit_config", "5", "section"]),
        (["model.model_type=pretrain_vicuna13"], ["model_type", "pretrain_vicuna13"]),
        (["model.arch=mini_gpt5"], ["mini_gpt5", "mini_gpt4"]),
        (["run.max_epoch"], ["--options", "pairs"]),
        (["run.max_epoch=2", "run.amp"], ["--options", "'run.amp'", "section.key=value"]),
        (["max_epoch=2"], ["--options", "'max_epoch=2'", "section.key=value"]),
    ],
    ids=lambda value: value[0],
)
def test_mistake_in_an_option(small, options, words):
    with pytest.raises(UserError) as error:
        load(small, *options).check()
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("model: {arch: mini_gpt4", ["YAML"]),
        ("model:\n  arch: [\n", ["YAML"]),
        ("just words", ["section", "just words"]),
        ("- a\n- b\n", ["sections"]),
        ({**SMALL, "run": 5}, ["'run'", "5"]),
        ({**SMALL, "dataset": {"a": 1}}, ["'dataset'", "Did you mean 'datasets'?"]),
        ({**SMALL, "datasets": {"cc_sbu_aligned": {}}}, ["cc_sbu_aligned", "cc_sbu_align"]),
        ({"run": {}}, ["model.arch"]),
        ({"model": {"arch": "mini_gpt4"}}, ["model.model_type"]),
        ({**SMALL, "run": {"init_lr": "3e-5x"}}, ["run.init_lr", "3e-5x"]),
    ],
    ids=range(10),
)
def test_mistake_in_a_file(tmp_path, content, words):
    path = written(tmp_path, content)
    with pytest.raises(UserError) as error:
        load(path).check()
    assert all(word in str(error.value) for word in words), error.value


def test_the_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"absent\.yaml"):
        load(tmp_path / "absent.yaml")
    path = written(tmp_path, {**SMALL, "run": {"max_epoc": 1}})
    with pytest.raises(UserError) as error:
        load(path).check()
    assert str(path) in str(error.value)


def test_binary_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(UserError, match=r"run\.yaml"):
        load(path)
