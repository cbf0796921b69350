"""Sections of a configuration as dataclasses: ``key`` declares a key, ``read_section`` checks what a user wrote."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, Field, field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from minigpt4.common.errors import UserError, nearest

T = TypeVar("T")
_REMOVED = {"run.resize_on_device": "it was removed: images are always resized by the loader's workers"}
TYPE_NAMES = {bool: "true or false", int: "whole number", float: "number", str: "text", NoneType: "null"}
BUILT_IN_PROCESSORS = ("blip2_image_train", "blip2_image_eval", "blip_caption")  # the keys of others are not checked


def key(default: Any, meaning: str, *, least: float = 0, below: float = math.inf) -> Any:
    """Declares a key. Numbers are limited to ``least <= value < below``; a class as default is a nested section."""
    metadata = {"meaning": meaning, "least": least, "below": below}
    if isinstance(default, type | list):
        return field(default_factory=default if isinstance(default, type) else default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def read_section(cls: type[T], section: Any, where: str, source: str = "", allow_unknown: bool = False) -> T:
    """Turns a mapping, a DictConfig or None into a checked ``cls`` with all defaults; returns a ``cls`` unchanged.

    ``allow_unknown`` ignores unknown keys, for classes from outside this package. Raises UserError for an unknown key,
    a value of the wrong type or out of range, or a blank value without a meaning.
    """
    if isinstance(section, cls):
        return section
    prefix = f"{source}: " if source else ""
    try:
        if isinstance(section, DictConfig):
            section = OmegaConf.to_container(section, resolve=True, throw_on_missing=True)
        return _read(cls, {} if section is None else section, where, allow_unknown)
    except (OmegaConfBaseException, RecursionError) as error:
        raise UserError(f"{prefix}{where} is not a valid section: {' '.join(str(error).split())}") from error
    except UserError as error:
        raise UserError(f"{prefix}{error}") from None


def type_hints(cls: type) -> dict[str, Any]:
    """Returns the type of every key of a section."""
    return {entry.name: entry.type for entry in fields(cls)}


def choices_of(hint: Any) -> tuple[Any, ...]:
    """Returns the members of a union, or the type itself."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _read(cls: type[T], section: Any, where: str, allow_unknown: bool) -> T:
    entries = {entry.name: entry for entry in fields(cls)}
    if not isinstance(section, Mapping):
        raise UserError(f"{where} is {section!r}; expected a section with {', '.join(entries)}.")
    is_processor = "name" in entries and cls.name in BUILT_IN_PROCESSORS
    if is_processor and section.get("name", cls.name) not in BUILT_IN_PROCESSORS:
        return cls(**{name: value for name, value in section.items() if name in entries})
    values = {}
    for name, value in section.items():
        path = f"{where}.{name}"
        if name in entries:
            values[name] = _read_value(entries[name], value, path, allow_unknown)
        elif path in _REMOVED:
            raise UserError(f"Remove {path}: {_REMOVED[path]}.")
        elif not allow_unknown:
            raise UserError(f"There is no key {path}.{nearest(str(name), entries)} Known: {', '.join(entries)}.")
    return cls(**values)


def _read_value(entry: Field, value: Any, path: str, allow_unknown: bool) -> Any:
    choices = choices_of(entry.type)
    if value is None and NoneType not in choices:
        default = "the default" if entry.default is MISSING else f"the default, {entry.default!r}"
        raise UserError(f"{path} is blank; give it a value, or remove the line to use {default}.")
    for choice in choices:
        if is_dataclass(choice) and value is not None:
            return _read(choice, value, path, allow_unknown)
        if _is_instance(value, choice):
            least, below = entry.metadata["least"], entry.metadata["below"]
            if type(value) in (int, float) and not least <= value < below:
                limit = f" and less than {below:g}" if below < math.inf else ""
                raise UserError(f"{path} is {value!r}; expected {least:g} or more{limit}.")
            return float(value) if choice is float else value
    expected = " or ".join(_describe(choice) for choice in choices if choice is not NoneType)
    raise UserError(f"{path} is {value!r} ({type(value).__name__}); expected {expected}.")


def _is_instance(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return any(type(value) is type(option) and value == option for option in get_args(hint))
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_is_instance(item, get_args(hint)[0]) for item in value)
    return type(value) is hint or (hint is float and type(value) is int)


def _describe(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " * (len(get_args(hint)) > 1) + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) is list:
        return f"a list ({'[a, b]' if get_args(hint)[0] is str else '[0.1, 0.2]'})"
    return f"{TYPE_NAMES[hint]} ({'in quotes' if hint is str else hint.__name__})"
