"""Names in YAML files to classes. A lookup imports the room of the built-in classes, so no star import is needed."""

import importlib
from collections.abc import Callable
from typing import Any, TypeVar

from minigpt4.common.errors import UserError, nearest

Class = TypeVar("Class", bound=type)

_ROOMS = {
    "model": "minigpt4.models",
    "builder": "minigpt4.datasets.builders",
    "task": "minigpt4.tasks",
    "processor": "minigpt4.processors",
    "runner": "minigpt4.runners",
    "lr_scheduler": "minigpt4.common.optims",
}


class Registry:
    """Six tables of classes, each filled by its ``register_*`` decorator."""

    def __init__(self) -> None:
        self._classes: dict[str, dict[str, Any]] = {kind: {} for kind in _ROOMS}

    def _register(self, kind: str, name: str) -> Callable[[Class], Class]:
        def add(cls: Class) -> Class:
            known = self._classes[kind].setdefault(name, cls)
            # The same class arrives again when its module is reloaded.
            if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
                raise KeyError(f"The {kind} name '{name}' is already taken by {known.__module__}.{known.__qualname__}.")
            self._classes[kind][name] = cls
            return cls

        return add

    def _get(self, kind: str, name: str) -> Any:
        name = str(name)  # a YAML file may give anything
        if name not in self._classes[kind]:
            importlib.import_module(_ROOMS[kind])
        if name not in self._classes[kind]:
            choices = sorted(self._classes[kind])
            raise UserError(
                f"There is no {kind.replace('_', ' ')} named '{name}'; registered: {', '.join(choices)}."
                + nearest(name, choices)
            )
        return self._classes[kind][name]

    def _list(self, kind: str) -> list[str]:
        importlib.import_module(_ROOMS[kind])
        return sorted(self._classes[kind])

    def register_model(self, name: str) -> Callable[[Class], Class]:
        """Registers a model class, the ``model.arch`` of a YAML file."""
        return self._register("model", name)

    def register_builder(self, name: str) -> Callable[[Class], Class]:
        """Registers a dataset builder, a key under ``datasets``."""
        return self._register("builder", name)

    def register_task(self, name: str) -> Callable[[Class], Class]:
        """Registers a task, the ``run.task``."""
        return self._register("task", name)

    def register_processor(self, name: str) -> Callable[[Class], Class]:
        """Registers an image or text processor, a ``name`` under ``vis_processor`` or ``text_processor``."""
        return self._register("processor", name)

    def register_runner(self, name: str) -> Callable[[Class], Class]:
        """Registers a runner, the ``run.runner``."""
        return self._register("runner", name)

    def register_lr_scheduler(self, name: str) -> Callable[[Class], Class]:
        """Registers a learning-rate schedule, the ``run.lr_sched``."""
        return self._register("lr_scheduler", name)

    def get_model_class(self, name: str) -> Any:
        """Returns the model class registered as ``name``; raises UserError with the choices otherwise."""
        return self._get("model", name)

    def get_builder_class(self, name: str) -> Any:
        """Returns the builder class registered as ``name``; raises UserError with the choices otherwise."""
        return self._get("builder", name)

    def get_task_class(self, name: str) -> Any:
        """Returns the task class registered as ``name``; raises UserError with the choices otherwise."""
        return self._get("task", name)

    def get_processor_class(self, name: str) -> Any:
        """Returns the processor class registered as ``name``; raises UserError with the choices otherwise."""
        return self._get("processor", name)

    def get_runner_class(self, name: str) -> Any:
        """Returns the runner class registered as ``name``; raises UserError with the choices otherwise."""
        return self._get("runner", name)

    def get_lr_scheduler_class(self, name: str) -> Any:
        """Returns the schedule class registered as ``name``; raises UserError with the choices otherwise."""
        return self._get("lr_scheduler", name)

    def list_models(self) -> list[str]:
        """Registered model names, sorted."""
        return self._list("model")

    def list_datasets(self) -> list[str]:
        """Registered dataset names, sorted."""
        return self._list("builder")

    def list_tasks(self) -> list[str]:
        """Registered task names, sorted."""
        return self._list("task")

    def list_processors(self) -> list[str]:
        """Registered processor names, sorted."""
        return self._list("processor")

    def list_runners(self) -> list[str]:
        """Registered runner names, sorted."""
        return self._list("runner")

    def list_lr_schedulers(self) -> list[str]:
        """Registered schedule names, sorted."""
        return self._list("lr_scheduler")


registry = Registry()
