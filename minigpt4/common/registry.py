"""Classes by the names that YAML files use; a lookup imports the package of the built-in ones."""

import importlib
from collections.abc import Callable
from functools import partialmethod
from typing import Any, TypeVar

from minigpt4.common.errors import UserError, nearest

Class = TypeVar("Class", bound=type)

_PACKAGES = {
    "model": "minigpt4.models",
    "builder": "minigpt4.datasets.builders",
    "task": "minigpt4.tasks",
    "processor": "minigpt4.processors",
    "runner": "minigpt4.runners",
    "lr_scheduler": "minigpt4.common.optims",
}


class Registry:
    """Six tables of classes.

    ``register_KIND(name)`` is a class decorator, which raises KeyError if another class has the name;
    ``get_KIND_class(name)`` returns the class or raises UserError; ``list_KINDs()`` returns the names, sorted.
    """

    def __init__(self) -> None:
        self._classes: dict[str, dict[str, Any]] = {kind: {} for kind in _PACKAGES}

    def _register(self, kind: str, name: str) -> Callable[[Class], Class]:
        def add(cls: Class) -> Class:
            known = self._classes[kind].get(name, cls)
            # The same class is registered again when its module is reloaded.
            if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
                raise KeyError(f"The {kind} name '{name}' is already taken by {known.__module__}.{known.__qualname__}.")
            self._classes[kind][name] = cls
            return cls

        return add

    def _get(self, kind: str, name: str) -> Any:
        name, known = str(name), self._list(kind)  # a YAML file may hold any type
        if name not in known:
            hint = f"registered: {', '.join(known)}.{nearest(name, known)}"
            raise UserError(f"There is no {kind.replace('_', ' ')} named '{name}'; {hint}")
        return self._classes[kind][name]

    def _list(self, kind: str) -> list[str]:
        importlib.import_module(_PACKAGES[kind])
        return sorted(self._classes[kind])

    register_model = partialmethod(_register, "model")
    register_builder = partialmethod(_register, "builder")
    register_task = partialmethod(_register, "task")
    register_processor = partialmethod(_register, "processor")
    register_runner = partialmethod(_register, "runner")
    register_lr_scheduler = partialmethod(_register, "lr_scheduler")
    get_model_class = partialmethod(_get, "model")
    get_builder_class = partialmethod(_get, "builder")
    get_task_class = partialmethod(_get, "task")
    get_processor_class = partialmethod(_get, "processor")
    get_runner_class = partialmethod(_get, "runner")
    get_lr_scheduler_class = partialmethod(_get, "lr_scheduler")
    list_models = partialmethod(_list, "model")
    list_datasets = partialmethod(_list, "builder")
    list_tasks = partialmethod(_list, "task")
    list_processors = partialmethod(_list, "processor")
    list_runners = partialmethod(_list, "runner")
    list_lr_schedulers = partialmethod(_list, "lr_scheduler")


registry = Registry()
