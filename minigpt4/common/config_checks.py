"""Checks of a merged configuration that need no file: keys by schema.py, then what keys mean together."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

from minigpt4.common.errors import UserError, nearest
from minigpt4.common.registry import registry
from minigpt4.common.schema import (
    SPLITS,
    DatasetConfig,
    ModelConfig,
    PreprocessConfig,
    RunConfig,
    read_section,
)


def check_sections(sections: Mapping[str, Any], source: str) -> None:
    """Checks all sections of a configuration in plain containers, merged; ``source`` is the file, for messages.

    Raises:
        UserError: the first mistake found.
    """
    run = read_section(RunConfig, sections.get("run"), "run", source)
    read_section(PreprocessConfig, sections.get("preprocess"), "preprocess", source)
    model = None
    if is_built_in(registry.get_model_class(sections["model"]["arch"])):
        model = read_section(ModelConfig, sections["model"], "model", source)
    datasets, are_built_in = {}, True
    for name, section in (sections.get("datasets") or {}).items():
        is_own = not is_built_in(registry.get_builder_class(name))
        datasets[name] = read_section(DatasetConfig, section, f"datasets.{name}", source, allow_unknown=is_own)
        are_built_in = are_built_in and not is_own
    problems = [*_run_problems(run)]
    for name, dataset in datasets.items():
        problems += _processor_problems(f"datasets.{name}", dataset, model)
    problems += _model_problems(run, model) if model else []
    problems += _split_problems(run, datasets) if datasets and are_built_in else []
    for name, section in (sections.get("evaluation_datasets") or {}).items():
        if not isinstance(section, Mapping):
            problems.append(f"evaluation_datasets.{name} is {section!r}; expected keys and values under it.")
    if problems:
        raise UserError(f"{source}: {problems[0]}")


def is_built_in(cls: type) -> bool:
    """Whether a registered class belongs to this package, so that its keys are known."""
    return cls.__module__.split(".")[0] == "minigpt4"


def is_prompt_template(template: str) -> bool:
    """Whether a text has exactly one ``{}``, so that a prompt can be formatted into it."""
    try:
        return template.format("\0").count("\0") == 1
    except (ValueError, LookupError, AttributeError):
        return False


def _run_problems(run: RunConfig) -> Iterator[str]:
    yield from _name_problems("run.task", run.task, registry.list_tasks())
    yield from _name_problems("run.runner", run.runner, registry.list_runners())
    yield from _name_problems("run.lr_sched", run.lr_sched, registry.list_lr_schedulers())
    total = run.max_epoch * (run.iters_per_epoch or 0)
    if run.warmup_steps > total > 0:
        yield (
            f"run.warmup_steps is {run.warmup_steps}, but the run has only {total} steps (max_epoch {run.max_epoch} × "
            f"iters_per_epoch {run.iters_per_epoch}); lower warmup_steps."
        )


def _model_problems(run: RunConfig, model: ModelConfig) -> Iterator[str]:
    if (model.prompt_template or model.prompt_path) and not is_prompt_template(model.prompt_template):
        yield f"model.prompt_template is '{model.prompt_template}'; expected one {{}} where the prompt goes."
    if run.feature_cache and not (model.freeze_vit and model.freeze_qformer):
        key = "freeze_qformer" if model.freeze_vit else "freeze_vit"
        yield f"run.feature_cache requires a frozen vision side, but model.{key} is False; set it to True."
    if run.parallel == "fsdp" and (model.low_resource or model.llm_precision == "int8"):
        key = "low_resource: True" if model.low_resource else "llm_precision: int8"
        yield f"run.parallel: fsdp and model.{key} exclude each other; choose one of the two."


def _name_problems(key: str, name: str, known: Sequence[str]) -> Iterator[str]:
    if name not in known:
        yield f"{key} is '{name}'; expected one of {', '.join(known)}.{nearest(str(name), known)}"


def _processor_problems(where: str, dataset: DatasetConfig, model: ModelConfig | None) -> Iterator[str]:
    known = registry.list_processors()
    for kind, split in product(("vis_processor", "text_processor"), ("train", "eval")):
        processor, key = getattr(getattr(dataset, kind), split), f"{where}.{kind}.{split}"
        if processor is None:
            continue
        yield from _name_problems(f"{key}.name", processor.name, known)
        if kind == "vis_processor" and processor.name in processor.BUILT_IN:
            if model and processor.image_size != model.image_size:
                yield (
                    f"{key}.image_size is {processor.image_size}, but model.image_size is {model.image_size}; "
                    "set both to the same number."
                )
            if processor.min_scale > processor.max_scale:
                yield f"{key}.min_scale is {processor.min_scale:g}, which exceeds max_scale {processor.max_scale:g}."


def _split_problems(run: RunConfig, datasets: Mapping[str, DatasetConfig]) -> Iterator[str]:
    named = [("train_splits", split) for split in run.train_splits if not run.evaluate]
    named += [(key, split) for key in ("valid_splits", "test_splits") for split in getattr(run, key)]
    for key, split in named:
        if split not in SPLITS:
            yield f"run.{key} names the split '{split}'; expected {', '.join(SPLITS)}.{nearest(split, SPLITS)}"
        elif not any(getattr(dataset.build_info, SPLITS[split]) for dataset in datasets.values()):
            yield f"run.{key} names '{split}', but no data set has {SPLITS[split]}; set build_info.{SPLITS[split]}."
