"""Properties of configuration files, options and their merging."""

import json
import random
from argparse import Namespace
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from fuzz_cases import HEAD, ROOM, SEEDS, TEXTS, VALUES, changed, or_told, target, written
from hypothesis import strategies as st

from minigpt4.common import schema
from minigpt4.common.config import Config

SECTIONS = (schema.RunConfig, schema.ModelConfig, schema.DatasetConfig)
KEYS = [entry.name for section in SECTIONS for entry in fields(section)]
SECTION = st.dictionaries(st.one_of(st.sampled_from(KEYS), TEXTS), VALUES, max_size=4)
DATASETS = st.dictionaries(
    st.sampled_from(["laion", "cc_sbu_align", "image_text", "x"]), st.one_of(SECTION, VALUES), max_size=2
)
FILES = st.fixed_dictionaries(
    {}, optional={"run": SECTION, "model": SECTION, "datasets": DATASETS, "preprocess": SECTION, "other": VALUES}
)


def load(path: Path, options: list[str] | None = None) -> Config:
    return Config(Namespace(cfg_path=str(path), options=options)).check()


def yaml_of(content: dict[str, Any]) -> bytes:
    content = {**content, "model": HEAD["model"] | content.get("model", {})}
    text = json.dumps(content)  # is YAML, but for half surrogate pairs; in blocks it is written without them
    return text.encode() if "\\ud" in text else yaml.safe_dump(content).encode()


@target(st.tuples(FILES, SEEDS), 0.4)
def configuration_files(case: tuple[dict[str, Any], int]) -> None:
    data = yaml_of(case[0])
    or_told(lambda: load(written("run.yaml", changed(data, random.Random(case[1])) if case[1] % 2 else data)))


OPTION = st.one_of(
    TEXTS,
    st.tuples(
        st.sampled_from(["run", "model", "datasets", "datasets.laion", "x"]),
        st.one_of(st.sampled_from(KEYS), TEXTS),
        st.one_of(TEXTS, VALUES.map(json.dumps), st.text("[]{}:,&*!|>'\"%@`#-?${} \t=.x1", max_size=12)),
    ).map(lambda parts: f"{parts[0]}.{parts[1]}={parts[2]}"),
)


@target(st.lists(OPTION, max_size=4), 0.4)
def options(case: list[str]) -> None:
    path = written("plain.yaml", yaml_of({"run": {"max_epoch": 2}, "datasets": {"laion": {}}}))
    or_told(lambda: load(path, case))


def value_for(hint: Any) -> st.SearchStrategy:
    if get_origin(hint) not in (None, list, Literal):  # T | None
        return value_for(get_args(hint)[0])
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    kinds = {
        bool: st.booleans(),
        int: st.integers(1, 9),
        float: st.floats(0, 0.9),
        str: st.sampled_from(["a", "b c", "007", "1e3", "###", "a: b", "x #1", "'q'", "{", "狗"]),
    }
    return kinds.get(hint, st.just(["train"]))


RELATED = (
    "task",
    "runner",
    "lr_sched",
    "warmup_steps",
    "evaluate",
    "optim",
)  # registered names, and what has to fit other keys
HINTS = schema.type_hints(schema.RunConfig).items()
RUN = st.fixed_dictionaries({}, optional={key: value_for(hint) for key, hint in HINTS if key not in RELATED})


@target(st.tuples(RUN, RUN), 0.4)
def merging(case: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """Options replace keys of the file, the others are kept, and the saved result is the same run."""
    in_file, in_options = case
    path = written("merged.yaml", json.dumps(HEAD | {"run": in_file}).encode())  # PyYAML does not quote '1e3'
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in in_options.items()}
    config = load(path, [f"run.{key}={text}" for key, text in texts.items()])
    assert config.to_dict()["run"] == in_file | in_options
    config.save(ROOM / "saved.yaml")
    assert load(ROOM / "saved.yaml").to_dict() == config.to_dict()
