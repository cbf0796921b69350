"""YAML files and command-line options, merged: model defaults < data-set defaults < the file < ``--options``."""

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from minigpt4.common.errors import UserError, nearest
from minigpt4.common.registry import registry
from minigpt4.common.schema import DatasetConfig, ModelConfig, PreprocessConfig, RunConfig, read_section

SECTIONS = ("run", "model", "preprocess", "datasets")
MAX_BYTES = 2**20  # of a YAML file; the parser takes seconds for a megabyte


class Config:
    """The merged configuration of a run; what is merged stays as it is.

    Args:
        args: has ``cfg_path`` and ``options`` (None, ["a.b=c", …] or ["a.b", "c", …]).

    Raises:
        UserError: a file is missing or no YAML, or a model, type or data set has no such name.
    """

    def __init__(self, args: Any) -> None:
        self.args = args
        self._source = str(args.cfg_path)
        file = _read_yaml(Path(args.cfg_path))
        options = _parse_options(args.options)
        if strangers := [name for name in (*file, *options) if name not in SECTIONS]:
            raise UserError(
                f"{self._source}: there is no section '{strangers[0]}'.{nearest(str(strangers[0]), SECTIONS)} "
                f"Known: {', '.join(SECTIONS)}."
            )
        model_section = OmegaConf.merge({"model": file.get("model") or {}}, {"model": options.get("model") or {}})
        with _explained(self._source):
            self.config = OmegaConf.merge(
                {"run": file.get("run") or {}},
                self._model_defaults(model_section.model),
                {"model": file.get("model") or {}},
                {"preprocess": file.preprocess} if file.get("preprocess") else {},
                self._dataset_defaults(file.get("datasets") or {}),
                {"datasets": file.get("datasets") or {}},
                options,
            )

    def _model_defaults(self, model: DictConfig) -> DictConfig:
        arch, model_type = model.get("arch"), model.get("model_type")
        if not arch or not model_type:
            raise UserError(
                f"{self._source}: model.{'model_type' if arch else 'arch'} is not set; "
                "expected arch: mini_gpt4 and model_type: pretrain_vicuna."
            )
        return _read_yaml(Path(registry.get_model_class(arch).default_config_path(str(model_type))))

    def _dataset_defaults(self, datasets: DictConfig) -> DictConfig:
        merged = OmegaConf.create({"datasets": {}})
        for name, section in datasets.items():
            builder = registry.get_builder_class(name)
            if section is not None and not isinstance(section, DictConfig):
                raise UserError(f"{self._source}: datasets.{name} is {section!r}; expected keys and values under it.")
            path = builder.default_config_path(str((section or {}).get("type", "default")))
            if path is not None:
                merged = OmegaConf.merge(merged, _read_yaml(Path(path)))
        return merged

    def check(self) -> "Config":
        """Holds every key against the schema and returns self; models of other archs check their own.

        Raises:
            UserError: an unknown key, with its nearest known neighbour, a value of the wrong type, or one that refers
                to what is not there.
        """
        with _explained(self._source):
            plain = OmegaConf.to_container(self.config, resolve=True, throw_on_missing=True)
        read_section(RunConfig, plain.get("run"), "run", self._source)
        if plain["model"].get("arch") == "mini_gpt4":
            read_section(ModelConfig, plain["model"], "model", self._source)
        read_section(PreprocessConfig, plain.get("preprocess"), "preprocess", self._source)
        for name, section in (plain.get("datasets") or {}).items():
            is_own = not registry.get_builder_class(name).__module__.startswith("minigpt4.")
            read_section(DatasetConfig, section, f"datasets.{name}", self._source, allow_unknown=is_own)
        return self

    @property
    def run_cfg(self) -> DictConfig:
        """How to train."""
        return self.config.run

    @property
    def datasets_cfg(self) -> DictConfig:
        """What to train on, a section a data set."""
        return self.config.datasets

    @property
    def model_cfg(self) -> DictConfig:
        """What to train."""
        return self.config.model

    def pretty_print(self) -> None:
        """Logs all sections."""
        logging.info("Configuration of %s:\n%s", self._source, json.dumps(self.to_dict(), indent=2))

    def to_dict(self) -> dict[str, Any]:
        """Plain containers."""
        return OmegaConf.to_container(self.config)

    def save(self, path: Path) -> None:
        """Writes the merged configuration as a YAML file that gives the same run again."""
        OmegaConf.save(self.config, path)


def _read_yaml(path: Path) -> DictConfig:
    if not os.path.isfile(path):
        raise UserError(f"There is no configuration file {path} (seen from {Path.cwd()}); correct --cfg-path.")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise UserError(f"{path} has {size:,} bytes; expected a configuration of at most {MAX_BYTES:,}.")
    with _explained(str(path)):
        content = OmegaConf.load(path)  # refuses tags, cycles, and aliases that unfold to more than 10,000 nodes
    if not isinstance(content, DictConfig):
        raise UserError(f"{path} holds no sections; expected {', '.join(SECTIONS)}.")
    for name, section in content.items_ex(resolve=False):
        if name in SECTIONS and section is not None and not isinstance(section, DictConfig):
            raise UserError(f"{path}: section '{name}' is {section!r}; expected keys and values under it.")
    return content


def _parse_options(options: Sequence[str] | None) -> DictConfig:
    options = list(options or [])
    if options and "=" not in options[0]:
        if len(options) % 2:
            raise UserError(f"--options got {len(options)} words; expected pairs 'key value' or 'key=value' each.")
        options = [f"{key}={value}" for key, value in zip(options[::2], options[1::2], strict=True)]
    for option in options:
        key = option.partition("=")[0]
        if "=" not in option or "." not in key:
            raise UserError(f"--options: '{option}' is not of the form section.key=value, as in run.max_epoch=2.")
    with _explained(f"--options: {' '.join(options)[:200]}"):
        return OmegaConf.from_dotlist(options)


@contextmanager
def _explained(source: str) -> Iterator[None]:
    """Tells in a sentence whatever YAML and OmegaConf make of a strange text."""
    try:
        yield
    except UserError:
        raise
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, OSError, RecursionError) as error:
        raise UserError(f"{source} is no valid YAML configuration: {' '.join(str(error).split())}") from error
