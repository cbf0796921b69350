"""All checks of the doctor, in the order in which a run would meet what they look at."""

import copy
import importlib.metadata
import math
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from minigpt4.common import device as devices
from minigpt4.common.config import Config
from minigpt4.common.errors import UserError, see
from minigpt4.common.schema import ModelConfig, read_section
from minigpt4.common.torch_setup import PACKAGES, npu_mismatch
from minigpt4.doctor import data, language, memory
from minigpt4.doctor.findings import MISTAKE, OK, WARNING, Finding, collect, refused, size
from minigpt4.doctor.model import ModelFiles
from minigpt4.models.language_model import decoder_layers, load_language_model

SMALL_LM = 10**9  # bytes; the loss of an LM up to this size is computed without being asked for
TINY_LM = 10**8  # bytes; up to here threads wait for each other longer than they work
CHAT_TOKENS = 2000  # of a full chat, Chat.answer's max_length


def examine(args: Any) -> list[Finding]:
    """Runs every check; ``args`` are the command line's."""
    findings = collect("versions", _versions)
    try:
        cfg = Config(args).check()
    except UserError as error:
        return [*findings, refused("configuration", error)]
    findings.append(Finding("configuration", OK, f"{args.cfg_path}: every key is known and of its type"))
    run_cfg = cfg.config.get("run") or {}
    try:
        device = devices.pick(run_cfg.get("device", "auto"), 0, bool(run_cfg.get("strict_device", False)))
    except UserError as error:
        findings.append(refused("run.device", error))
        device = torch.device("cpu")
    findings += collect("run.device", _device, run_cfg, device)
    files = ModelFiles(read_section(ModelConfig, cfg.model_cfg, "model"), device)
    findings += files.examine()
    drawn, more = data.draw(cfg, args.samples)
    findings += _vitality(files, args.deep, [caption for part in drawn for caption in part.captions])
    findings += collect("precision", _precision, cfg, device, files.llm_dtype)
    findings += more
    for part in drawn:
        settings = files.tokenizer, files.cfg.max_txt_len, files.cfg.end_sym
        findings += collect(f"datasets.{part.name}", data.judge, part, *settings)
    findings += collect("contact sheet", _sheet, args, drawn)
    is_training = "init_lr" in run_cfg or "max_epoch" in run_cfg
    if is_training:
        findings += collect("disk", _disk, cfg, files, drawn)
    if files.tensors and files.tokenizer is not None:
        if is_training:
            texts = max((part.captions for part in drawn), key=len, default=[])
            findings += collect("memory, training", _training_memory, cfg, files, device, texts)
        findings += collect("memory, chat", _chat_memory, cfg, files, device, is_training)
    if is_training and args.steps:
        findings += collect("time", _timed_steps, args, cfg, files, device)
    return findings


def _versions() -> Finding:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    told = ", ".join([f"Python {sys.version.split()[0]}", *(f"{name} {found}" for name, found in versions.items())])
    if mismatch := npu_mismatch():
        return Finding("versions", MISTAKE, f"{told}: {mismatch}", "Install the two together.")
    if wrong := list(_unmet_requirements()):
        return Finding("versions", WARNING, f"{told}; {', '.join(wrong)}", "pip install -r requirements.txt")
    return Finding("versions", OK, told, numbers=versions)


def _unmet_requirements() -> Iterator[str]:
    from packaging.requirements import Requirement  # comes with transformers

    file = Path(__file__).parents[2] / "requirements.txt"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else ()
    for requirement in (Requirement(line) for line in lines if line.startswith(PACKAGES)):
        if requirement.name in PACKAGES:
            found = importlib.metadata.version(requirement.name)
            if not requirement.specifier.contains(found, prereleases=True):
                yield f"{requirement.name} {found} is not {requirement.specifier}"


def _device(run_cfg: Mapping[str, Any], device: torch.device) -> Finding:
    total, free = devices.memory_left(device)
    half = str(devices.default_dtype(device)).removeprefix("torch.")
    told = f"{device}, {size(total)} of memory, {size(free)} free, computes in {half}"
    wanted = str(run_cfg.get("device", "auto")).partition(":")[0]
    if wanted not in ("auto", device.type):
        remedy = "Right if meant; run.strict_device: True makes it an error (docs/DISTRIBUTED.md#devices)."
        return Finding("run.device", WARNING, f"{told}; {wanted} was asked for and is not there", remedy)
    return Finding("run.device", OK, told, numbers={"total": total, "free": free})


def _precision(cfg: Any, device: torch.device, llm_dtype: torch.dtype) -> Finding:
    run_cfg, half = cfg.config.get("run") or {}, devices.default_dtype(device)
    fp16 = [
        key
        for key, value in (
            ("model.llm_dtype", cfg.model_cfg.get("llm_dtype")),
            ("run.amp_dtype", run_cfg.get("amp_dtype")),
        )
        if value == "fp16"
    ]
    if fp16 and half != torch.float16:
        other = "bf16" if half == torch.bfloat16 else "fp32"
        told = f"{' and '.join(fp16)} is fp16, which ends at 65504; this device has {other}, which does not overflow"
        return Finding("precision", WARNING, told, f"Set {fp16[0]}: {other}." + see("nan"))
    amp, lm = (str(dtype).removeprefix("torch.") for dtype in (memory.amp_dtype(run_cfg, device), llm_dtype))
    return Finding("precision", OK, f"steps in {amp}, language model in {lm}")


def _vitality(files: ModelFiles, is_deep: bool, captions: list[str]) -> list[Finding]:
    if not files.tensors:
        return []
    if files.tokenizer is None or not (is_deep or files.lm_bytes <= SMALL_LM):
        return collect("LM vitality", language.sampled_vitality, files.tensors, files.llm_dtype)

    def look() -> Finding:
        is_large = files.lm_bytes > SMALL_LM and files.device.type == "cpu"  # there, mapped weights cost no memory
        dtype = next(iter(files.tensors.values())).dtype if is_large else files.llm_dtype
        return language.vitality(load_language_model(files.folder, dtype, files.device), files.tokenizer, captions)

    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if files.lm_bytes < TINY_LM else num_threads)
        return collect("LM vitality", look)
    finally:
        torch.set_num_threads(num_threads)


def _sheet(args: Any, drawn: list[data.Drawn]) -> list[Finding]:
    path = args.sheet or Path("output") / "doctor" / f"{Path(args.cfg_path).stem}.png"
    written = data.sheet(drawn, path)
    told = f"{written}: what the model will see of {sum(len(part.pictures) for part in drawn)} samples"
    return [Finding("contact sheet", OK, told)] if written else []


def _disk(cfg: Any, files: ModelFiles, drawn: list[data.Drawn]) -> list[Finding]:
    run_cfg = cfg.run_cfg
    model = files.model
    if model is None:
        return []
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    one = 3 * 4 * trained + 20_000  # weights and AdamW's means in float32, and a rank's state
    epochs, per_epoch = int(run_cfg.get("max_epoch", 1)), int(run_cfg.get("iters_per_epoch") or 0)
    every = run_cfg.get("save_every_iters")
    number = epochs + (epochs * per_epoch // int(every) if every else 0)
    number = min(number, int(run_cfg.get("keep_last") or number)) + bool(run_cfg.get("valid_splits"))
    findings = [
        _room("disk, checkpoints", run_cfg.get("output_dir", "output"), one * number, f"{number} of {size(one)}")
    ]
    if cache := run_cfg.get("feature_cache"):
        samples = sum(part.num_samples for part in drawn)
        row = model.query_tokens.shape[1] * model.query_tokens.shape[2] * 2 * int(run_cfg.get("feature_crops", 1))
        told = f"features of about {samples:,.0f} samples, {size(row)} each, less what is there"
        there = sum(file.stat().st_size for file in Path(cache).rglob("*.safetensors"))
        findings.append(_room("disk, feature cache", cache, max(0, row * samples - there), told))
    return findings


def _room(check: str, folder: str, needed: float, told: str) -> Finding:
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    evidence = f"{size(needed)} ({told}) below {folder}, {size(free)} free"
    numbers = {"needed": needed, "free": free}
    if needed > free:
        return Finding(check, MISTAKE, evidence, "Make room, or set run.keep_last." + see("disk-full"), numbers)
    return Finding(check, WARNING if needed > 0.8 * free else OK, evidence, numbers=numbers)


def _told(parts: Mapping[str, int], capacity: int) -> tuple[str, int]:
    total = sum(parts.values())
    listed = ", ".join(f"{name} {size(value)}" for name, value in parts.items())
    return f"{size(total)} predicted of {size(capacity)}: {listed}", total


def _training_memory(cfg: Any, files: ModelFiles, device: torch.device, captions: list[str]) -> Finding:
    rows = int(cfg.run_cfg.get("batch_size_train", 1))
    words = " ".join(captions) or "a picture of something"
    longest = (words + " ") * (files.cfg.max_txt_len // max(1, len(words) // 8) + 1)
    model = files.build(has_vision=not cfg.run_cfg.get("feature_cache"))
    parts = predicted(cfg, model, device, {"text_input": [longest] * rows})
    capacity, _ = devices.memory_left(device)
    evidence, total = _told(parts, capacity)
    evidence += f" ({rows} rows of the longest texts)"
    if cfg.run_cfg.get("parallel") == "fsdp":
        layers = decoder_layers(model.llama_model)
        sliced = sum(weight.numel() * weight.element_size() for weight in layers.parameters())
        # A layer is whole while it computes, and the next one while it is fetched.
        if (room := capacity - (total - sliced) - 2 * sliced // len(layers)) > 0:
            evidence += f"; sliced by run.parallel: fsdp it fits on {math.ceil(sliced / room)} cards or more"
            return Finding("memory, training", OK, evidence, numbers=parts)
    if total > capacity:
        fixed = total - parts["activations"]
        fits = int((capacity - fixed) / (parts["activations"] / rows))
        remedy = f"run.batch_size_train: {fits} would fit, with run.accum_grad_iters for the rest."
        if fits < 1:
            remedy = (
                "Not even one row fits: take a half precision, model.low_resource, run.parallel: fsdp, a larger card."
            )
        elif not files.cfg.llm_grad_checkpoint:
            remedy = f"{remedy[:-1]}; or model.llm_grad_checkpoint: True."
        return Finding("memory, training", MISTAKE, evidence, remedy + see("out-of-memory"), parts)
    verdict = WARNING if total > 0.9 * capacity else OK
    return Finding("memory, training", verdict, evidence, see("out-of-memory").strip() * (verdict != OK), parts)


def predicted(cfg: Any, model: nn.Module, device: torch.device, samples: Mapping[str, Any]) -> dict[str, int]:
    """Bytes by part at the height of a training step of a built model with such a batch."""
    amp, side = memory.amp_dtype(cfg.run_cfg, device), int(cfg.model_cfg.get("image_size", 224))
    return memory.training(model, device, amp, side, samples)


def _chat_memory(cfg: Any, files: ModelFiles, device: torch.device, is_training: bool) -> Finding:
    parts = memory.chat(files.build(), device, int(cfg.model_cfg.get("image_size", 224)), CHAT_TOKENS)
    capacity, _ = devices.memory_left(device)
    evidence, total = _told(parts, capacity)
    evidence += f" (a chat of {CHAT_TOKENS} tokens; each further one that is kept {size(parts['keys and values'])})"
    if total <= capacity:
        return Finding("memory, chat", OK, evidence, numbers=parts)
    remedy = "model.low_resource: True, model.llm_dtype in a half precision, or a larger card." + see("out-of-memory")
    return Finding("memory, chat", WARNING if is_training else MISTAKE, evidence, remedy, parts)


def _timed_steps(args: Any, cfg: Any, files: ModelFiles, device: torch.device) -> list[Finding]:
    """Real training steps in a folder that goes away: their time, and the memory they took beside the prediction."""
    from minigpt4.runners import RunnerBase
    from minigpt4.tasks import setup_task

    with tempfile.TemporaryDirectory() as folder:
        changes = {"output_dir": folder, "resume": None, "resume_ckpt_path": None, "tracker": None}
        short = copy.copy(cfg)
        short.config = OmegaConf.merge(cfg.config, {"run": {**changes, "feature_cache": None}})
        task = setup_task(short)
        model, datasets = task.build_model(short), task.build_datasets(short)
        runner = RunnerBase(cfg=short, job_id="doctor", task=task, model=model, datasets=datasets)
        runner.wrapped_model.train()
        seconds, waited, batches = [], [], []
        loader = runner._train_loader().iter_epoch(0)
        for _ in range(min(args.steps, runner.iters_per_epoch)):
            start = time.perf_counter()
            batch = next(loader)
            waited.append(time.perf_counter() - start)
            output = runner.train_step(batch, is_update=True)
            devices.synchronize(device)
            seconds.append(time.perf_counter() - start)
            batches.append({"text_input": batch["text_input"], "instruction": batch["instruction"]})
    step, wait = statistics.median(seconds[1:] or seconds), statistics.median(waited[1:] or waited)
    left = runner.max_epoch * runner.iters_per_epoch
    cached = "; run.feature_cache would save the vision part of it" * bool(cfg.run_cfg.get("feature_cache"))
    told = (
        f"{step:.3g} s a step ({wait:.2g} s of it waiting for data), the first {seconds[0]:.3g} s: {left:,} steps "
        f"take {timedelta(seconds=round(step * left))}{cached}"
    )
    numbers = {"step": step, "data": wait, "steps": left, "loss": output["loss"].item()}
    findings = [Finding("time", OK, told, numbers=numbers)]
    if not math.isfinite(numbers["loss"]):
        findings.append(Finding("loss", MISTAKE, f"after {args.steps} steps it is not finite", see("nan").strip()))
    if device.type != "cpu":  # there it is the process's memory, its code and the mapped files included
        measured = devices.max_memory_mib(device) * 2**20
        parts = max((predicted(cfg, files.build(), device, batch) for batch in batches), key=lambda p: sum(p.values()))
        total = sum(parts.values())
        told = f"{size(measured)} at most, {size(total)} predicted for these batches ({total / measured - 1:+.1%})"
        findings.append(Finding("memory, measured", OK, told, numbers={"measured": measured, "predicted": total}))
    return findings
