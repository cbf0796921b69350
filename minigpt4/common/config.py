"""YAML files and ``--options``, merged: model defaults < data set defaults < the file < ``--options``."""

import io
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from operator import attrgetter
from pathlib import Path
from types import NoneType
from typing import Any, get_origin

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from minigpt4.common.config_checks import check_sections
from minigpt4.common.errors import UserError, nearest
from minigpt4.common.registry import registry
from minigpt4.common.schema import DatasetConfig, ModelConfig, RunConfig, choices_of, type_hints
from minigpt4.common.utils import decode_text

SECTIONS = {"run": RunConfig, "model": ModelConfig, "preprocess": DatasetConfig}
SECTIONS |= {"datasets": DatasetConfig, "evaluation_datasets": None}  # these hold a section for each data set
MAX_BYTES = 2**20  # of a YAML file: the parser takes seconds for a megabyte
_INVALID = (yaml.YAMLError, OmegaConfBaseException, ValueError, OSError, RecursionError)


class Config:
    """The merged configuration of a run.

    ``args`` has ``cfg_path`` and ``options`` (None, ["a.b=c", …] or ["a.b", "c", …]). Raises UserError if a file is
    missing or not valid YAML, or there is no model, model type or data set of a given name.
    """

    def __init__(self, args: Any) -> None:
        self.args, self._source = args, str(args.cfg_path)
        file, options = _read_yaml(Path(args.cfg_path)), _parse_options(args.options)
        for name in (*file, *options):
            if name not in SECTIONS:
                hint = f"{nearest(str(name), SECTIONS)} Known: {', '.join(SECTIONS)}."
                raise UserError(f"{self._source}: there is no section '{name}'.{hint}")
        with _explained(self._source):
            _leave_out(file, options, self._source)
            given = OmegaConf.merge(file, options)
            defaults = self._model_defaults(given.get("model", {})), self._dataset_defaults(given)
            self.config = OmegaConf.merge({"run": {}}, *defaults, file, options)

    def _model_defaults(self, model: DictConfig) -> DictConfig:
        arch, model_type = model.get("arch"), model.get("model_type")
        if not arch or not model_type:
            key, expected = ("model_type", "pretrain_vicuna") if arch else ("arch", "mini_gpt4")
            raise UserError(f"{self._source}: model.{key} is not set; expected {key}: {expected}.")
        return _read_yaml(Path(registry.get_model_class(arch).default_config_path(str(model_type))))

    def _dataset_defaults(self, given: DictConfig) -> DictConfig:
        merged = OmegaConf.create({"datasets": {}})
        for kind in ("datasets", "evaluation_datasets"):
            for name, section in given.get(kind, {}).items():
                if not isinstance(section, DictConfig):
                    raise UserError(f"{self._source}: {kind}.{name} is {section!r}; expected keys and values under it.")
                own = str(section.get("builder") or name)
                builder = registry.get_builder_class(own) if kind == "datasets" else None
                path = builder and builder.default_config_path(str(section.get("type", "default")))
                defaults = _read_yaml(Path(path)) if path else {}
                if path and own != name:
                    defaults = {"datasets": {name: next(iter(defaults.datasets.values()))}}
                merged = OmegaConf.merge(merged, defaults)
        return merged

    run_cfg = property(attrgetter("config.run"), doc="The section ``run``.")
    model_cfg = property(attrgetter("config.model"), doc="The section ``model``.")
    datasets_cfg = property(attrgetter("config.datasets"), doc="A section for each data set.")
    evaluation_datasets_cfg = property(attrgetter("config.evaluation_datasets"), doc="Those of benchmarks, unchecked.")

    def check(self) -> "Config":
        """Checks every key by itself and with others, and returns self; a UserError reports the first mistake."""
        with _explained(self._source):
            sections = OmegaConf.to_container(self.config, resolve=True, throw_on_missing=True)
        check_sections(sections, self._source)
        return self

    def pretty_print(self) -> None:
        """Logs all sections."""
        logging.info("Configuration of %s:\n%s", self._source, json.dumps(self.to_dict(), indent=2))

    def to_dict(self) -> dict[str, Any]:
        """Returns plain containers."""
        return OmegaConf.to_container(self.config)

    def save(self, path: Path) -> None:
        """Writes the merged configuration as a YAML file that gives the same run again."""
        OmegaConf.save(self.config, path)


def _leave_out(file: DictConfig, options: DictConfig, source: str) -> None:
    """Removes the data sets that ``--options datasets.NAME=null`` leaves out."""
    sections = options.get("datasets", {})
    for name in [name for name, section in sections.items() if section is None]:
        if name not in file.get("datasets", {}):
            known = list(file.get("datasets", {}))
            hint = f"{nearest(name, known)} It has: {', '.join(known) or 'none'}."
            raise UserError(f"--options: datasets.{name}=null leaves out a data set that {source} does not have.{hint}")
        del sections[name], file.datasets[name]


def _read_yaml(path: Path) -> DictConfig:
    if not os.path.isfile(path):
        raise UserError(f"There is no configuration file {path} (seen from {Path.cwd()}); correct --cfg-path.")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise UserError(f"{path} has {size:,} bytes; expected a configuration of at most {MAX_BYTES:,}.")
    with _explained(str(path)):
        text = decode_text(path.read_bytes(), str(path))
        # OmegaConf refuses tags, cycles, and aliases that expand to more than 10,000 nodes
        content = OmegaConf.load(io.StringIO(text))
    if not isinstance(content, DictConfig):
        raise UserError(f"{path} holds no sections; expected {', '.join(SECTIONS)}.")
    for name, section in list(content.items_ex(resolve=False)):
        if section is None:
            content[name] = {}
        elif name in SECTIONS and not isinstance(section, DictConfig):
            raise UserError(f"{path}: section '{name}' is {section!r}; expected keys and values under it.")
    for name, section in content.get("datasets", {}).items():
        if section is None:  # "laion:" alone: the data set with its defaults
            content.datasets[name] = {}
    return content


def _parse_options(options: Sequence[str] | None) -> DictConfig:
    options = list(options or [])
    if options and "=" not in options[0]:
        if len(options) % 2:
            raise UserError(f"--options got {len(options)} words; expected pairs 'key value' or 'key=value' each.")
        options = [f"{key}={value}" for key, value in zip(options[::2], options[1::2], strict=True)]
    parsed = OmegaConf.create({})
    for option in options:
        key, equals, text = option.partition("=")
        if not equals or "." not in key:
            raise UserError(f"--options: '{option}' is not of the form section.key=value, as in run.max_epoch=2.")
        with _explained(f"--options: {option[:200]}"):
            OmegaConf.update(parsed, key, _parse_value(key, text))
    return parsed


def _parse_value(key: str, text: str) -> Any:
    """Reads an option as its key's type asks: text as it is, everything else as YAML."""
    hint = _find_hint(key.split("."))
    choices = choices_of(hint)
    is_list = text.startswith("[") and any(get_origin(choice) is list for choice in choices)
    if str in choices and not is_list:
        if b"\0" in text.encode():  # which raises ValueError for bytes that are not UTF-8
            raise ValueError("the value holds a zero byte")
        return None if text == "null" and NoneType in choices else text
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]
    except _INVALID:
        if hint is None:
            return text
        raise
    # YAML drops part of some texts, which keys of unknown type need whole: comments, leading zeros, "a: b".
    is_yaml = hint or type(value) in (bool, float) or text in ("null", "~", str(value)) or text[:1] in [*"[{'\""]
    return value if is_yaml else text


def _find_hint(names: Sequence[str]) -> Any:
    """The type of a dotted key, such as run.seed or datasets.laion.sample_ratio; None if it is unknown."""
    hint = SECTIONS.get(names[0])
    for name in names[2:] if names[0] == "datasets" else names[1:]:
        hint = next((type_hints(choice).get(name) for choice in choices_of(hint) if is_dataclass(choice)), None)
    return hint


@contextmanager
def _explained(source: str) -> Iterator[None]:
    """Turns errors of YAML and OmegaConf into a UserError of one sentence."""
    try:
        yield
    except UserError:
        raise
    except _INVALID as error:
        raise UserError(f"{source} is not a valid YAML configuration: {' '.join(str(error).split())}") from error
