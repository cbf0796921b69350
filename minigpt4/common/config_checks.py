"""Checks of a merged configuration that need no file: keys by schema.py, then what keys mean together."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import chain, product
from typing import Any

from minigpt4.common.errors import UserError, nearest
from minigpt4.common.registry import registry
from minigpt4.common.schema import (
    BUILT_IN_PROCESSORS,
    SPLITS,
    DatasetConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    read_section,
)

LORA_KEYS = ("lora_alpha", "lora_dropout", "lora_target_modules")


def check_sections(sections: Mapping[str, Any], source: str) -> None:
    """Checks all sections of a merged configuration in plain containers; a UserError names ``source``, the file."""
    run = read_section(RunConfig, sections.get("run"), "run", source)
    read_section(DatasetConfig, sections.get("preprocess"), "preprocess", source)
    model, datasets, with_processors = None, {}, []
    # Own tasks and builders may add splits; an unknown task is reported below.
    has_own_splits = run.task in registry.list_tasks() and _is_own(registry.get_task_class(run.task))
    if not _is_own(registry.get_model_class(sections["model"]["arch"])):
        model = read_section(ModelConfig, sections["model"], "model", source)
    for name, section in (sections.get("datasets") or {}).items():
        is_own = _is_own(registry.get_builder_class((section or {}).get("builder") or name))
        datasets[name] = read_section(DatasetConfig, section, f"datasets.{name}", source, allow_unknown=is_own)
        has_own_splits |= is_own
        if not is_own or section.get("vis_processor"):  # own builders need not use the default processors
            with_processors.append(name)
    problems = chain(
        _run_problems(run),
        *(_processor_problems(f"datasets.{name}", datasets[name], model) for name in with_processors),
        _model_problems(run, model) if model else (),
        _split_problems(run, datasets) if datasets and not has_own_splits else (),
    )
    if problem := next(problems, None):
        raise UserError(f"{source}: {problem}")


def is_prompt_template(template: str) -> bool:
    """Whether a text has exactly one ``{}``, so that a prompt can be formatted into it."""
    try:
        return template.format("\0").count("\0") == 1
    except (ValueError, LookupError, AttributeError):
        return False


def sharding_problem(model: ModelConfig) -> str | None:
    """Why the language model cannot be sharded over ranks; None where it can."""
    if not model.quantization:
        return None
    key = "low_resource: True" if model.llm_precision == "half" else f"llm_precision: {model.llm_precision}"
    return f"run.parallel: fsdp and model.{key} exclude each other; choose one of the two."


def _is_own(cls: type) -> bool:
    """Whether a registered class is not part of this package, so that its keys are unknown."""
    return cls.__module__.split(".")[0] != "minigpt4"


def _run_problems(run: RunConfig) -> Iterator[str]:
    own = " An own one has to be imported, and so registered, before the configuration is checked."
    yield from (f"{problem}{own}" for problem in _name_problems("run.task", run.task, registry.list_tasks()))
    yield from _name_problems("run.runner", run.runner, registry.list_runners())
    yield from _name_problems("run.lr_sched", run.lr_sched, registry.list_lr_schedulers())
    if run.evaluate and not (run.valid_splits or run.test_splits):
        yield "run.evaluate is True, but no split is named; set run.valid_splits or run.test_splits, as in [val]."
    if not run.evaluate and run.max_epoch == 0:
        yield "run.max_epoch is 0, so nothing would be trained; set at least 1, or run.evaluate: True."
    given = [f"run.optim.{part.name}.lr" for part in fields(run.optim) if getattr(run.optim, part.name).lr is not None]
    if given and not run.init_lr:
        yield f"{given[0]} is set, but run.init_lr, whose schedule it follows, is 0; set run.init_lr."
    if run.warmup_steps > (total := run.max_epoch * (run.iters_per_epoch or 0)) > 0:
        total = f"{total} steps (max_epoch {run.max_epoch} × iters_per_epoch {run.iters_per_epoch})"
        yield f"run.warmup_steps is {run.warmup_steps}, but the run has only {total}; lower warmup_steps."


def _model_problems(run: RunConfig, model: ModelConfig) -> Iterator[str]:
    if (model.prompt_template or model.prompt_path) and not is_prompt_template(model.prompt_template):
        yield f"model.prompt_template is '{model.prompt_template}'; expected one {{}} where the prompt goes."
    changed = [name for name in LORA_KEYS if getattr(model, name) != getattr(ModelConfig(), name)]
    if changed and not model.lora_r:
        problem = f"model.{changed[0]} is {getattr(model, changed[0])}, but model.lora_r is 0, so there is no LoRA"
        yield f"{problem}; set model.lora_r, such as 16, or remove the key."
    if model.lora_r and not model.lora_target_modules:
        yield "model.lora_target_modules is empty; name linear layers of the language model, as in [q_proj, v_proj]."
    if run.feature_cache and not (model.freeze_vit and model.freeze_qformer):
        key = "freeze_qformer" if model.freeze_vit else "freeze_vit"
        yield f"run.feature_cache requires a frozen vision side, but model.{key} is False; set it to True."
    frozen = dict.fromkeys(("Qformer", "query_tokens"), model.freeze_qformer and "model.freeze_qformer is True")
    frozen |= {"visual_encoder": model.freeze_vit and "model.freeze_vit is True"}
    frozen |= {"lora": not model.lora_r and "model.lora_r is 0"}
    for part, cause in frozen.items():
        if cause and getattr(run.optim, part) != getattr(OptimConfig(), part):
            yield f"run.optim.{part} is set, but {cause}, so this part is not trained; change one of the two."
    parts = [part.name for part in fields(run.optim) if not frozen.get(part.name)]
    if not run.evaluate and all(getattr(run.optim, part).freeze for part in parts):
        yield f"run.optim freezes all that would be trained ({', '.join(parts)}); remove freeze from one of them."
    if run.parallel == "fsdp" and (problem := sharding_problem(model)):
        yield problem


def _name_problems(key: str, name: str, known: Sequence[str]) -> Iterator[str]:
    if name not in known:
        yield f"{key} is '{name}'; expected one of {', '.join(known)}.{nearest(str(name), known)}"


def _processor_problems(where: str, dataset: DatasetConfig, model: ModelConfig | None) -> Iterator[str]:
    for kind, split in product(("vis_processor", "text_processor"), ("train", "eval")):
        processor, key = getattr(getattr(dataset, kind), split), f"{where}.{kind}.{split}"
        if processor is not None:
            yield from _name_problems(f"{key}.name", processor.name, registry.list_processors())
        if processor is None or kind == "text_processor" or processor.name not in BUILT_IN_PROCESSORS:
            continue
        size, low, high = processor.image_size, processor.min_scale, processor.max_scale
        if model and size != model.image_size:
            yield f"{key}.image_size is {size}, but model.image_size is {model.image_size}; set both to one number."
        if low > high:
            yield f"{key}.min_scale is {low:g}, which exceeds max_scale {high:g}."


def _split_problems(run: RunConfig, datasets: Mapping[str, DatasetConfig]) -> Iterator[str]:
    if _is_own(registry.get_task_class(run.task)):  # its build_datasets may add splits
        return
    for key in ("valid_splits", "test_splits") if run.evaluate else ("train_splits", "valid_splits", "test_splits"):
        for split in getattr(run, key):
            if split not in SPLITS:
                yield f"run.{key} names the split '{split}'; expected {', '.join(SPLITS)}.{nearest(split, SPLITS)}"
            elif not any(dataset.build_info.has_split(split) for dataset in datasets.values()):
                yield f"run.{key} names '{split}', but no data set has {SPLITS[split]}; set build_info.{SPLITS[split]}."
