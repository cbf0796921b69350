"""Disk, memory and time of a run, from its configuration and the model without weights."""

import copy
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import OmegaConf
from torch import nn

from minigpt4.common import device as devices
from minigpt4.common.errors import see
from minigpt4.common.optims import freeze_parts
from minigpt4.common.schema import RunConfig
from minigpt4.common.templates import IMAGE_MESSAGE
from minigpt4.common.utils import IMAGE_PLACEHOLDER
from minigpt4.datasets.feature_cache import KEY, FeatureDataset, check_cache, num_samples
from minigpt4.doctor import memory
from minigpt4.doctor.files import ModelFiles
from minigpt4.doctor.findings import ERROR, OK, WARNING, Finding, size
from minigpt4.doctor.samples import SampleStats
from minigpt4.models import language_model as lm
from minigpt4.models import loading
from minigpt4.models.text_rows import captions_of
from minigpt4.runners.run_folder import check_output_dir

# Share of a card that is not present for its context and libraries, for fragmentation, and for errors of prediction.
RESERVE = 0.1
CHAT_TOKENS = 2000  # of a full chat, Chat.answer's max_length
_OUT_OF_MEMORY = see("out-of-memory")


def disk(run_cfg: RunConfig, files: ModelFiles, drawn: list[SampleStats]) -> list[Finding]:
    """Space for checkpoints and for the feature cache; UserError where ``run.output_dir`` is no place for them."""
    check_output_dir(run_cfg)
    model = files.model
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    one = 3 * 4 * trained + 20_000  # weights and AdamW's moments in float32, and a rank's state
    number = run_cfg.max_epoch
    if run_cfg.save_every_iters:
        number += run_cfg.max_epoch * (run_cfg.iters_per_epoch or 0) // run_cfg.save_every_iters
    number = min(number, run_cfg.keep_last or number) + bool(run_cfg.valid_splits)
    findings = [_space("disk, checkpoints", run_cfg.output_dir, one * number, f"{number} of {size(one)}")]
    if cache := run_cfg.feature_cache:
        num_samples = sum(part.num_samples for part in drawn)
        row = model.num_query_token * model.llama_proj.in_features * 2 * run_cfg.feature_crops
        message = f"features of about {num_samples:,.0f} samples, {size(row)} each, less what is cached"
        cached = sum(file.stat().st_size for file in Path(cache).rglob("*.safetensors"))
        findings.append(_space("disk, feature cache", cache, max(0, row * num_samples - cached), message))
    return findings


def _space(check: str, folder: str, needed: float, message: str) -> Finding:
    path = Path(folder).absolute()
    free = shutil.disk_usage(next(parent for parent in (path, *path.parents) if parent.exists())).free
    verdict = ERROR if needed > free else WARNING if needed > 0.8 * free else OK
    remedy = "Free space, or set run.keep_last." + see("disk-full")
    evidence = f"{size(needed)} ({message}) below {folder}, {size(free)} free"
    return Finding(check, verdict, evidence, remedy * (verdict != OK), {"needed": needed, "free": free})


def feature_cache(cfg: Any, files: ModelFiles, part: SampleStats) -> Finding:
    """The run's own check of a data set's feature cache, and how much of it is there."""
    check = f"{KEY}, {part.name}"
    needed = ("vit_weights", "q_former_model") if files.cfg.has_qformer else ("vit_weights",)
    if any(files.paths[name] is None for name in needed):
        message = "whether its features are those of this run can be told when the vision weights are on this machine"
        return Finding(check, WARNING, message, "First download them.")
    expected, _ = check_cache(cfg, *part.name.rsplit("/", 1), part.dataset)
    found = [file for file in expected if file.is_file()]
    count = sum(num_samples(file) for file in found)
    if len(found) == len(expected):
        FeatureDataset(part.name, found)
    evidence = f"{len(found)} of {len(expected)} parts with {count:,} samples, of this run's weights, settings and data"
    missing = f"; the run computes the other {len(expected) - len(found)} first"
    return Finding(check, OK, evidence + missing * (len(found) < len(expected)), numbers={"parts": len(found)})


class Capacity(NamedTuple):
    """Memory with which predictions are compared, in bytes, and in words."""

    num_bytes: int
    text: str


def memory_capacity(device: torch.device, memory_bytes: float | None) -> Capacity:
    """The memory of a device, or of a card of ``memory_bytes`` that is not present, less a tenth."""
    if memory_bytes is None:
        total, _ = devices.memory_left(device)
        return Capacity(total, size(total))
    usable = int(memory_bytes * (1 - RESERVE))
    return Capacity(usable, f"{size(usable)} ({size(memory_bytes)} less {RESERVE:.0%} for the card itself)")


def _listed(parts: Mapping[str, int], capacity: Capacity) -> str:
    listed = ", ".join(f"{name} {size(value)}" for name, value in parts.items())
    return f"{size(sum(parts.values()))} predicted of {capacity.text}: {listed}"


def longest_batch(files: ModelFiles, drawn: Sequence[SampleStats], rows: int) -> dict[str, Any]:
    """A batch of the longest texts: captions of ``max_txt_len``, or the longest conversation that was drawn."""
    captions = max((part.captions for part in drawn if not part.conversations), key=len, default=[])
    words = " ".join(captions) or "a picture of something"
    pair = {"text_input": [(words + " ") * (files.cfg.max_txt_len // max(1, len(words) // 8) + 1)] * rows}
    if files.cfg.chat_template:
        pair["instruction_input"] = [f"{IMAGE_MESSAGE} describe this image in detail "] * rows
    length = {id(c): len(files.model.tokenize_conversation(**c).ids) for part in drawn for c in part.conversations}
    conversations = [conversation for part in drawn for conversation in part.conversations]
    longest = max(conversations, key=lambda conversation: length[id(conversation)], default=None)
    if longest is None or (captions and length[id(longest)] <= len(files.model.training_rows(pair)[0].ids)):
        return pair
    num_images = sum(question.count(IMAGE_PLACEHOLDER) for question, _ in longest["turns"])
    return {"text_input": [""] * rows, "conversation": [longest] * rows, "num_images": [num_images] * rows}


def training_memory(
    run_cfg: RunConfig, files: ModelFiles, drawn: Sequence[SampleStats], rows: int, capacity: Capacity
) -> Finding:
    """Memory of a step of ``rows`` rows with the longest texts, compared with the device's."""
    batch = longest_batch(files, drawn, rows)
    model = files.build(has_vision=not run_cfg.feature_cache)
    layers = lm.decoder_layers(model.llama_model)
    sharded = sum(weight.numel() * weight.element_size() for weight in layers.parameters())
    parts = predict(run_cfg, files, model, batch)
    total, verdict, remedy = sum(parts.values()), OK, ""
    evidence = f"{_listed(parts, capacity)} ({rows} rows of the longest texts)"
    capacity = capacity.num_bytes
    # A layer is whole while it computes, and the next one while it is gathered.
    space = capacity - (total - sharded) - 2 * sharded // len(layers)
    if run_cfg.parallel == "fsdp" and space > 0:
        evidence += f"; sharded by run.parallel: fsdp it fits on {math.ceil(sharded / space)} cards or more"
    elif total > capacity:
        row = parts["activations"] / rows
        fits = int((capacity - total + parts["activations"]) / row)
        verdict, remedy = ERROR, f"run.batch_size_train: {fits} would fit, with run.accum_grad_iters for the rest."
        if fits < 1:
            remedy = "Not one row fits: use half precision, model.low_resource, run.parallel: fsdp or a larger card."
        elif not files.cfg.llm_grad_checkpoint:
            remedy = f"{remedy[:-1]}; or model.llm_grad_checkpoint: True."
    elif total > 0.9 * capacity:
        verdict = WARNING
    return Finding("memory, training", verdict, evidence, (remedy + _OUT_OF_MEMORY * (verdict != OK)).strip(), parts)


def texts_of(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch without its tensors, and the number of images of each row."""
    texts = {name: value for name, value in batch.items() if not isinstance(value, torch.Tensor)}
    num_rows, images = len(captions_of(batch)), batch.get("image", batch.get("features", ()))
    return {"num_images": texts.pop("length", [len(images) // num_rows] * num_rows)} | texts


def predict(run_cfg: RunConfig, files: ModelFiles, model: nn.Module, samples: Mapping[str, Any]) -> dict[str, int]:
    """Bytes by part at the peak of a training step with such a batch."""
    freeze_parts(model, run_cfg)
    amp = devices.amp_dtype(run_cfg, files.device)
    return memory.training(model, files.device, amp, files.cfg.image_size, samples)


def chat_memory(files: ModelFiles, is_training: bool, capacity: Capacity) -> Finding:
    """Memory of a full chat, compared with the device's."""
    has_lora = bool(loading.quantization(files.cfg, files.device))  # into other layers the weights are merged
    parts = memory.chat(files.build(has_lora=has_lora), files.device, files.cfg.image_size, CHAT_TOKENS)
    stored = size(parts["keys and values"])
    evidence = f"{_listed(parts, capacity)} (a chat of {CHAT_TOKENS} tokens; each further one that is kept {stored})"
    if sum(parts.values()) <= capacity.num_bytes:
        return Finding("memory, chat", OK, evidence, numbers=parts)
    remedy = "model.low_resource: True, model.llm_dtype in a half precision, or a larger card." + _OUT_OF_MEMORY
    return Finding("memory, chat", WARNING if is_training else ERROR, evidence, remedy, parts)


def vision_memory(files: ModelFiles, rows: int, capacity: Capacity) -> Finding:
    """Memory of the vision side alone, where the language model's configuration is not on this machine."""
    parts = memory.vision(files.build_vision(), files.device, files.cfg.image_size, rows)
    evidence = f"{_listed(parts, capacity)} ({rows} images); the language model, which is unknown, comes on top"
    remedy = f"For all of it, set {lm.KEY} to a folder with the language model's config.json and tokenizer."
    return Finding("memory, vision", WARNING, evidence, remedy, parts)


def timed_steps(run_cfg: RunConfig, cfg: Any, files: ModelFiles, num_steps: int) -> list[Finding]:
    """Real training steps in a temporary folder: their time, and the memory they took beside the prediction."""
    from minigpt4.runners import RunnerBase
    from minigpt4.tasks import setup_task

    with tempfile.TemporaryDirectory() as folder:
        changes = {"output_dir": folder, "resume": None, "resume_ckpt_path": None, "tracker": None, "wandb_log": False}
        short = copy.copy(cfg)
        short.config = OmegaConf.merge(cfg.config, {"run": {**changes, "feature_cache": None}})
        task = setup_task(short, files.device)
        model, datasets = task.build_model(short), task.build_datasets(short)
        runner = RunnerBase(cfg=short, job_id="doctor", task=task, model=model, datasets=datasets)
        runner.wrapped_model.train()
        seconds, waits, batches = [], [], []
        loader = runner.build_train_loader().iter_epoch(0)
        for _ in range(min(num_steps, runner.iters_per_epoch)):
            start = time.perf_counter()
            batch = next(loader)
            waits.append(time.perf_counter() - start)
            loss = runner.train_step(batch, is_update=True)
            devices.synchronize(files.device)
            seconds.append(time.perf_counter() - start)
            batches.append(texts_of(batch))
    step, wait = statistics.median(seconds[1:] or seconds), statistics.median(waits[1:] or waits)
    left, loss = runner.max_epoch * runner.iters_per_epoch, loss.item()
    duration = timedelta(seconds=round(step * left))
    message = f"{step:.3g} s a step ({wait:.2g} s of it waiting for data): {left:,} steps take {duration}"
    findings = [Finding("time", OK, message, numbers={"step": step, "data": wait, "steps": left, "loss": loss})]
    if not math.isfinite(loss):
        findings.append(Finding("loss", ERROR, f"after {len(seconds)} steps it is not finite", see("nan").strip()))
    if files.device.type != "cpu":  # there it is the process's memory, its code and the mapped files included
        measured = devices.max_memory_mib(files.device) * 2**20
        total = max(sum(predict(run_cfg, files, files.build(), batch).values()) for batch in batches)
        message = f"{size(measured)} at most, {size(total)} predicted for these batches ({total / measured - 1:+.1%})"
        findings.append(Finding("memory, measured", OK, message, numbers={"measured": measured, "predicted": total}))
    return findings
