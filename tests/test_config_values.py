"""Texts in options, blank values, checks across keys, keys of classes from outside, and the generated reference."""

from argparse import Namespace
from dataclasses import FrozenInstanceError, fields, is_dataclass
from pathlib import Path
from types import NoneType

import pytest
import yaml
from omegaconf import OmegaConf

from minigpt4.common.config import Config
from minigpt4.common.errors import UserError
from minigpt4.common.registry import registry
from minigpt4.common.schema import (
    DatasetConfig,
    ImageProcessorConfig,
    ModelConfig,
    RunConfig,
    VitConfig,
    choices_of,
    read_section,
    type_hints,
)
from minigpt4.datasets.builders import BaseDatasetBuilder
from minigpt4.models import MiniGPT4
from minigpt4.tools import config_reference

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "minigpt4" / "configs"
SMALL = {
    "model": {"arch": "mini_gpt4", "model_type": "pretrain_vicuna"},
    "datasets": {"cc_sbu_align": {"build_info": {"storage": "x"}}},
    "run": {"task": "image_text_pretrain", "max_epoch": 2, "iters_per_epoch": 10},
}


@registry.register_builder("own_pairs")
class OwnBuilder(BaseDatasetBuilder):
    """As in somebody's own training script."""


@registry.register_processor("own_image")
class OwnProcessor:
    """As in somebody's own training script."""


@registry.register_model("own_model")
class OwnModel(MiniGPT4):
    """As in somebody's own training script."""


@pytest.fixture
def load(tmp_path):
    def load(*options, **sections):
        path = tmp_path / "run.yaml"
        content = {name: SMALL[name] | sections.pop(name, {}) for name in SMALL} | sections
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return Config(Namespace(cfg_path=str(path), options=list(options) or None)).check()

    return load


def refused(call, *words):
    with pytest.raises(UserError) as error:
        call()
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, error.value


@pytest.mark.parametrize(
    "text",
    ["###", "a #b", "a: b", "20241126", "007", "1e3", "True", "null", "~", "a=b", "", " x ", "'q'", "[x", "{}", "\t"],
)
@pytest.mark.parametrize("notation", ["equals", "pairs"])
def test_text_arrives_unchanged(load, text, notation):
    keys = ("model.end_sym", "run.output_dir", "run.job_name")
    options = [f"{key}={text}" for key in keys] if notation == "equals" else [w for key in keys for w in (key, text)]
    config = load(*options)
    assert [config.model_cfg.end_sym, config.run_cfg.output_dir, config.run_cfg.job_name] == [text] * 3


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("/d/a #1.tar", "/d/a #1.tar"),
        ("2024", "2024"),
        ("[a, b #1]", None),
        ("[a, 'b #1']", ["a", "b #1"]),
        ("x: y",) * 2,
    ],
)
def test_storage_is_text_or_a_list(load, text, value):
    option = f"datasets.cc_sbu_align.build_info.storage={text}"
    if value is None:
        refused(lambda: load(option), "--options", option)
    else:
        assert load(option).datasets_cfg.cc_sbu_align.build_info.storage == value


@pytest.mark.parametrize(
    "key", ["run.resume_ckpt_path", "run.feature_cache", "run.resume", "model.ckpt", "run.tracker"]
)
def test_null_where_it_has_a_meaning(load, key):
    section, name = key.split(".")
    assert load(f"{key}=null").config[section][name] is None


def test_values_of_other_types_are_yaml(load):
    run = load("run.init_lr=1e-3", "run.amp=True", "run.train_splits=[train]", "run.seed=0x10").run_cfg
    assert run.init_lr == 1e-3 and run.amp is True and run.train_splits == ["train"] and run.seed == 16


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("###", "###"),
        ("a #b", "a #b"),
        ("a: b", "a: b"),
        ("007", "007"),
        ("- a", "- a"),
        ("*a", "*a"),
        ("{", "{"),
        ("5", 5),
        ("1e-3", 1e-3),
        ("true", True),
        ("null", None),
        ("word", "word"),
        ("'a #b'", "a #b"),
        ("[1, 2]", [1, 2]),
        ("{a: 1}", {"a": 1}),
    ],
)
def test_own_keys_are_yaml_unless_that_alters_them(load, text, value):
    assert load(f"datasets.own_pairs.own={text}").datasets_cfg.own_pairs.own == value


def test_keys_of_own_builders_and_processors_pass(load):
    own = {"own": {"deep": 1}, "build_info": {"storage": "x", "images": {"url": "y"}}}
    processors = {"vis_processor": {"train": {"name": "own_image", "crop": 0.5, "image_size": [3, 4]}}}
    config = load(datasets={"own_pairs": own, "cc_sbu_align": processors})
    assert config.datasets_cfg.own_pairs.own.deep == 1
    assert config.datasets_cfg.cc_sbu_align.vis_processor.train.crop == 0.5
    refused(lambda: load(datasets={"own_pairs": {"sample_ratio": "x"}}), "own_pairs.sample_ratio", "number")
    refused(lambda: load(datasets={"cc_sbu_align": {"own": 1}}), "cc_sbu_align.own")
    refused(lambda: load(datasets={"cc_sbu_align": {"build_info": {"images": 1}}}), "cc_sbu_align.build_info.images")


def test_own_models_check_their_own_keys(load):
    config = load(model={"arch": "own_model", "own": 1, "image_size": "large"})
    assert config.model_cfg.own == 1 and config.model_cfg.num_query_token == 32


def test_later_names_of_the_reference(load):
    model = {"arch": "minigpt4", "model_type": "pretrain_vicuna0", "has_qformer": True, "lora_r": 0, "lora_alpha": 16}
    model |= {"chat_template": False, "max_context_len": 3800}
    benchmarks = {"gqa": {"eval_file_path": "a.json", "img_path": "b", "max_new_tokens": 20, "batch_size": 10}}
    config = load(
        model=model,
        run={"wandb_log": False, "job_name": "finetune", "name": "evaluation", "save_path": "results"},
        datasets={"cc_sbu_align": {"batch_size": 5}},
        evaluation_datasets=benchmarks,
    )
    assert config.model_cfg.arch == "minigpt4" and config.model_cfg.num_query_token == 32
    assert config.datasets_cfg.cc_sbu_align.batch_size == 5 and config.evaluation_datasets_cfg.gqa.batch_size == 10
    assert registry.get_model_class("minigpt4") is registry.get_model_class("mini_gpt4") is MiniGPT4
    assert registry.get_model_class("minigpt_v2") is MiniGPT4
    v2 = read_section(ModelConfig, {"arch": "minigpt_v2"}, "model")
    assert (v2.has_qformer, v2.prompt_template) == (False, "[INST] {} [/INST]")
    assert read_section(ModelConfig, {"lora_r": 64}, "model").lora_target_modules == ["q_proj", "v_proj"]  # its own
    assert load(model={"lora_r": 64, "lora_alpha": 32}).model_cfg.lora_r == 64
    refused(lambda: load(run={"optim": {"lora": {"lr": 1e-4}}}), "run.optim.lora is set", "model.lora_r is 0")
    refused(lambda: load(run={"optim": {"Qformer": {"freeze": True}}}), "run.optim.Qformer", "freeze_qformer is True")
    alone = {"optim": {"llama_proj": {"freeze": True}}}
    refused(lambda: load(run=alone), "run.optim freezes all that would be trained (llama_proj)")
    load(run=alone, model={"lora_r": 4})
    refused(
        lambda: load(run={"init_lr": 0, "optim": {"llama_proj": {"lr": 1e-4}}}), "run.optim.llama_proj.lr", "init_lr"
    )
    refused(lambda: load(model={"lora_alpha": 32}), "model.lora_alpha is 32", "model.lora_r is 0")
    refused(lambda: load(model={"lora_r": 8, "lora_target_modules": []}), "model.lora_target_modules is empty")


def test_a_registered_name_belongs_to_one_class():
    with pytest.raises(KeyError, match=r"mini_gpt4.*MiniGPT4"):
        registry.register_model("mini_gpt4")(OwnModel)
    assert registry.register_model("own_model")(OwnModel) is OwnModel
    assert {"mini_gpt4", "minigpt4", "own_model"} <= set(registry.list_models())
    refused(lambda: registry.get_runner_class("runner_bas"), "runner_bas", "runner_base")


def test_a_data_set_without_keys_has_its_defaults(load):
    config = load(datasets={"laion": None})
    assert config.datasets_cfg.laion.build_info.storage == "/path/to/laion_dataset/{00000..10488}.tar"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["model.image_size=448"], ["cc_sbu_align.vis_processor.train.image_size is 224", "model.image_size is 448"]),
        (["datasets.cc_sbu_align.vis_processor.eval.image_size=64"], ["vis_processor.eval.image_size is 64", "224"]),
        (["datasets.cc_sbu_align.vis_processor.train.min_scale=2"], ["min_scale is 2", "max_scale 1"]),
        (["datasets.cc_sbu_align.vis_processor.train.name=blip2_image_trian"], ["train.name", "'blip2_image_train'?"]),
        (["run.valid_splits=[val]"], ["run.valid_splits names 'val'", "val_storage"]),
        (["run.test_splits=[test]"], ["run.test_splits names 'test'", "test_storage"]),
        (["run.train_splits=[trian]"], ["run.train_splits", "'trian'", "Did you mean 'train'?"]),
        (["datasets.cc_sbu_align.build_info.storage=null"], ["run.train_splits names 'train'", "storage"]),
        (["run.warmup_steps=21"], ["run.warmup_steps is 21", "20 steps"]),
        (["run.feature_cache=x", "model.freeze_vit=False"], ["run.feature_cache", "model.freeze_vit"]),
        (["run.feature_cache=x", "model.freeze_qformer=False"], ["run.feature_cache", "model.freeze_qformer"]),
        (["run.parallel=fsdp", "model.low_resource=True"], ["run.parallel: fsdp", "model.low_resource"]),
        (["run.parallel=fsdp", "model.llm_precision=int8"], ["run.parallel: fsdp", "model.llm_precision: int8"]),
        (["model.prompt_path=p.txt"], ["model.prompt_template is ''", "{}"]),
        (["model.prompt_template={} {}"], ["model.prompt_template is '{} {}'"]),
        (["model.prompt_template=no place"], ["model.prompt_template is 'no place'"]),
        (["run.lr_sched=linear_warmup_cosin_lr"], ["run.lr_sched", "Did you mean 'linear_warmup_cosine_lr'?"]),
        (["run.runner=x"], ["run.runner is 'x'", "runner_base"]),
        (["run.task=captioning"], ["run.task is 'captioning'", "image_text_pretrain", "imported", "registered"]),
        (["run.max_epoch=0"], ["run.max_epoch is 0", "at least 1"]),
        (["run.evaluate=True"], ["run.evaluate", "run.valid_splits"]),
    ],
    ids=lambda value: value[-1],
)
def test_settings_that_contradict_each_other(load, options, words):
    refused(lambda: load(*options), "run.yaml", *words)


VALIDATION = ["run.valid_splits=[val]", "datasets.cc_sbu_align.build_info.val_storage=y"]


@pytest.mark.parametrize(
    "options",
    [
        ["run.warmup_steps=20"],
        ["run.warmup_steps=21", "run.iters_per_epoch=null"],
        VALIDATION,
        ["run.valid_splits=[own]", "datasets.own_pairs.sample_ratio=1"],
        ["run.evaluate=True", "run.max_epoch=0", "datasets.cc_sbu_align.build_info.storage=null", *VALIDATION],
        ["model.image_size=448", "datasets.cc_sbu_align.vis_processor.train.image_size=448"],
        ["model.image_size=448", "datasets.cc_sbu_align.vis_processor.train.name=own_image"],
        ["run.feature_cache=x"],
        ["run.parallel=fsdp"],
        ["model.low_resource=True"],
        ["model.prompt_path=p.txt", "model.prompt_template=A {} B"],
    ],
    ids=lambda value: " ".join(value),
)
def test_settings_that_agree(load, options):
    load(*options)


def test_read_section():
    assert read_section(RunConfig, None, "run") == read_section(RunConfig, {}, "run") == RunConfig()
    run = RunConfig(seed=1)
    assert read_section(RunConfig, run, "run") is run
    whole = OmegaConf.create({"run": {"seed": "${model.image_size}", "init_lr": 1}, "model": {"image_size": 7}})
    found = read_section(RunConfig, whole.run, "run")
    assert found.seed == 7 and found.init_lr == 1.0 and isinstance(found.init_lr, float)
    assert read_section(ModelConfig, {"vit_config": {"depth": 2}}, "model").vit_config == VitConfig(depth=2)
    own = read_section(DatasetConfig, {"x": 1, "build_info": {"y": 2}}, "datasets.own", allow_unknown=True)
    assert own == DatasetConfig()
    assert read_section(ImageProcessorConfig, {"name": "own", "image_size": [1]}, "x").image_size == [1]
    with pytest.raises(FrozenInstanceError):
        run.seed = 2
    for section in (5, [1], {"seed": "${nothing}"}, {"seed": "???"}):
        refused(lambda section=section: read_section(RunConfig, section, "run", "my.yaml"), "my.yaml: run")


def keys(cls):
    for entry in fields(cls):
        hint = type_hints(cls)[entry.name]
        yield entry, hint
        for choice in choices_of(hint):
            if is_dataclass(choice):
                yield from keys(choice)


@pytest.mark.parametrize("cls", [RunConfig, ModelConfig, DatasetConfig])
def test_every_key_has_a_meaning_and_null_too(cls):
    for entry, hint in keys(cls):
        meaning = entry.metadata["meaning"]
        assert meaning.endswith(".")
        assert ("null" in meaning) == (NoneType in choices_of(hint)), entry.name


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_default_yamls_hold_the_defaults_of_the_dataclasses(path):
    content = yaml.safe_load(path.read_text())
    model = content.get("model", {})
    differing = (
        {"arch", "llama_model", "has_qformer", "lora_r", "image_size"} if path.name != "minigpt4.yaml" else set()
    )
    assert {name for name in model if model[name] != getattr(ModelConfig(), name)} <= differing
    for section in [content.get("preprocess", {}), *content.get("datasets", {}).values()]:
        without_storage = {key: value for key, value in section.items() if key not in ("build_info", "data_type")}
        assert read_section(DatasetConfig, section, "x").build_info.shuffle_buffer == 1000
        evaluation = without_storage.get("vis_processor", {}).pop("eval", None)
        if (size := model.get("image_size", 224)) != 224:
            assert without_storage["vis_processor"]["train"].pop("image_size") == size
        assert evaluation in (None, {"name": "blip2_image_eval", "image_size": size})
        without_storage.get("text_processor", {}).pop("eval", None)
        assert read_section(DatasetConfig, without_storage, "x") == DatasetConfig()


def test_the_reference_is_up_to_date():
    text = (ROOT / "docs" / "CONFIGURATION.md").read_text(encoding="utf-8")
    assert text == config_reference.reference(), "run: python -m minigpt4.tools.config_reference"
    for entry, _ in keys(RunConfig):
        assert f"{entry.name}` |" in text and entry.metadata["meaning"] in text


def test_the_chinese_reference_is_up_to_date_and_its_translations_are_complete():
    used = set()

    def translate(english):
        used.add(english)
        return config_reference.to_chinese(english)

    text = config_reference.CHINESE.read_text(encoding="utf-8")
    assert text == config_reference.reference(config_reference.CHINESE, translate), (
        "run: python -m minigpt4.tools.config_reference"
    )
    assert set(config_reference.translations()) == used, "unused texts in docs/CONFIGURATION.zh-CN.yaml"
    with pytest.raises(UserError, match=r"CONFIGURATION.zh-CN.yaml has no Chinese text for 'A new key.'. Add it"):
        config_reference.to_chinese("A new key.")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["run.warmup_steps", "30000"], ["run.warmup_steps is 30000", "20000 steps"]),
        (["run.max_epoch="], ["run.max_epoch is blank"]),
    ],
    ids=lambda value: value[0],
)
def test_train_reports_a_mistake_in_one_line_before_anything_is_loaded(programs, options, words):
    command = ["train.py", "--cfg-path", "train_configs/minigpt4_stage1_pretrain.yaml"]
    done = programs.run([*command, "--options", *options])
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == 1 and len(lines) == 1, done.stderr
    assert all(word in lines[0] for word in ["minigpt4_stage1_pretrain.yaml", *words]), lines[0]
