"""All checks of the doctor, in the order in which a run meets what they check."""

import sys
from pathlib import Path
from typing import Any

import torch

from minigpt4.common import device as devices
from minigpt4.common.config import Config
from minigpt4.common.errors import UserError, see
from minigpt4.common.schema import RunConfig, read_section
from minigpt4.common.torch_setup import PACKAGES, npu_mismatch, package_version
from minigpt4.doctor import attention, resources, samples
from minigpt4.doctor.files import ModelFiles
from minigpt4.doctor.findings import ERROR, OK, WARNING, Finding, collect, refused, size
from minigpt4.doctor.language import CHECK, lm_loss_check, sampled_weights_check
from minigpt4.models.language_model import load_language_model

SMALL_LM = 10**9  # bytes; the loss of an LM up to this size is computed without --deep
TINY_LM = 10**8  # bytes; up to here threads wait for each other longer than they work


def run_checks(args: Any) -> list[Finding]:
    """Runs every check; ``args`` are the command line's."""
    findings = collect("versions", _versions)
    try:
        cfg = Config(args).check()
    except UserError as error:
        return [*findings, refused("configuration", error)]
    findings.append(Finding("configuration", OK, f"{args.cfg_path}: every key is known and of its type"))
    given = cfg.config.get("run") or {}
    run_cfg = read_section(RunConfig, given, "run")
    try:
        device = devices.pick(run_cfg.device, 0, run_cfg.strict_device)
    except UserError as error:
        findings.append(refused("run.device", error))
        device = torch.device("cpu")
    findings += collect("run.device", _device, run_cfg, device)
    findings += collect("attention", attention.self_test, device)
    files = ModelFiles(cfg.model_cfg, device)
    findings += files.check()
    is_training = "init_lr" in given or "max_epoch" in given
    lora = files.model.lora if files.model else None
    if lora and not (is_training or files.has_lora) and (files.paths["ckpt"] or not files.cfg.ckpt):
        problem, remedy = f"is {lora.r}, but model.ckpt holds no LoRA weights", "Remove it, or name another checkpoint."
        findings.append(Finding("model.lora_r", ERROR, problem, remedy))
    drawn, more = samples.draw(cfg, args.samples)
    captions = [caption for part in drawn for caption in part.captions]
    findings += collect(CHECK, _language_model, files, args.deep, captions)
    findings += collect("precision", _precision, run_cfg, files)
    findings += more
    for part in drawn:
        findings += collect(f"datasets.{part.name}", samples.check_samples, part, files)
        if run_cfg.feature_cache:
            findings += collect(f"run.feature_cache, {part.name}", resources.feature_cache, cfg, files, part)
    path = args.sheet or Path("output") / "doctor" / f"{Path(args.cfg_path).stem}.png"
    findings += collect("contact sheet", samples.sheet, drawn, path)
    if is_training and files.model is not None:
        findings += collect("disk", resources.disk, run_cfg, files, drawn)
    findings += _memory(args.memory, run_cfg, cfg, files, drawn, is_training)
    if is_training and args.steps:
        findings += collect("time", resources.timed_steps, run_cfg, cfg, files, args.steps)
    return findings


def _memory(
    given: float | None, run_cfg: RunConfig, cfg: Config, files: ModelFiles, drawn: list[Any], is_training: bool
) -> list[Finding]:
    card, capacity = files.on_accelerator() if given else files, resources.memory_capacity(files.device, given)
    own_sizes = [section.get("batch_size") or 1 for section in (cfg.config.get("datasets") or {}).values()]
    rows = run_cfg.batch_size_train or max(own_sizes, default=1)
    if files.model is None:
        rows = rows if is_training else 1
        return collect("memory, vision", resources.vision_memory, card, rows, capacity)
    findings = []
    if is_training:
        findings += collect("memory, training", resources.training_memory, run_cfg, card, drawn, rows, capacity)
    return findings + collect("memory, chat", resources.chat_memory, card, is_training, capacity)


def _versions() -> Finding:
    versions = {name: version for name in PACKAGES if (version := package_version(name))}
    message = ", ".join([f"Python {sys.version.split()[0]}", *(f"{name} {found}" for name, found in versions.items())])
    if mismatch := npu_mismatch():
        return Finding("versions", ERROR, f"{message}: {mismatch}", "Install the two together.")
    return Finding("versions", OK, message, numbers=versions)


def _device(run_cfg: RunConfig, device: torch.device) -> Finding:
    total, free = devices.memory_left(device)
    dtype = str(devices.default_dtype(device)).removeprefix("torch.")
    message = f"{device}, {size(total)} of memory, {size(free)} free, computes in {dtype}"
    wanted = run_cfg.device.partition(":")[0]
    if wanted not in ("auto", device.type):
        remedy = "Right if intended; run.strict_device: True makes it an error (docs/DISTRIBUTED.md#devices)."
        return Finding("run.device", WARNING, f"{message}; {wanted} was requested and is not available", remedy)
    return Finding("run.device", OK, message, numbers={"total": total, "free": free})


def _precision(run_cfg: RunConfig, files: ModelFiles) -> Finding:
    default = devices.default_dtype(files.device)
    given = (("model.llm_dtype", files.cfg.llm_dtype), ("run.amp_dtype", run_cfg.amp_dtype))
    fp16 = [key for key, value in given if value == "fp16"]
    if fp16 and default != torch.float16:
        other = "bf16" if default == torch.bfloat16 else "fp32"
        message = f"{' and '.join(fp16)} is fp16, which ends at 65504; this device has {other}, which does not overflow"
        return Finding("precision", WARNING, message, f"Set {fp16[0]}: {other}." + see("nan"))
    dtypes = devices.amp_dtype(run_cfg, files.device), files.dtype
    amp, llm = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    return Finding("precision", OK, f"steps in {amp}, language model in {llm}")


def _language_model(files: ModelFiles, is_deep: bool, captions: list[str]) -> Finding | list[Finding]:
    if not files.tensors:
        return []
    if not (is_deep or files.num_bytes <= SMALL_LM):
        return sampled_weights_check(files.tensors, files.dtype)
    is_large = files.num_bytes > SMALL_LM and files.device.type == "cpu"  # mapped weights take no memory there
    dtype = next(iter(files.tensors.values())).dtype if is_large else files.dtype
    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if files.num_bytes < TINY_LM else num_threads)
        llm = load_language_model(files.paths["llama_model"], dtype, files.device)
        return lm_loss_check(llm, files.model.llama_tokenizer, captions, files.tensors)
    finally:
        torch.set_num_threads(num_threads)
