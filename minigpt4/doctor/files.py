"""The files of a ``model`` section, read by the functions that load a run's model."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minigpt4.common.errors import UserError
from minigpt4.common.files import resolve_local_path
from minigpt4.common.schema import ModelConfig, read_section
from minigpt4.common.weights import describe_weights, identify_file
from minigpt4.doctor.findings import OK, WARNING, Finding, collect, refused, size
from minigpt4.doctor.language import tokenizer_check, version_check
from minigpt4.models import language_model as lm
from minigpt4.models import loading
from minigpt4.models.eva_vit import round_vit_weights
from minigpt4.models.int8 import to_int8
from minigpt4.models.mini_gpt4 import MiniGPT4
from minigpt4.models.vision import (
    VisionEncoder,
    build_vision,
    q_former_state,
    vision_dtype,
    vision_settings,
    vit_state,
)

FILES = ("llama_model", "vit_weights", "q_former_model", "ckpt")


class ModelFiles:
    """The files of a ``model`` section, each read once, and the model that they should match, without weights.

    Args:
        cfg: the section.
        device: of the run, which decides the precisions.
    """

    def __init__(self, cfg: Mapping[str, Any] | ModelConfig, device: torch.device) -> None:
        self.cfg = read_section(ModelConfig, cfg, "model")
        self.device = device
        self.dtype = loading.language_model_dtype(self.cfg, device)
        self.paths: dict[str, Path | None] = {}
        self.tensors: dict[str, torch.Tensor] = {}  # of the language model
        self.model: Any = None

    def check(self) -> list[Finding]:
        """Every file of the section, in the order in which a run reads them."""
        findings = []
        for name in FILES:
            if getattr(self.cfg, name) is not None:
                findings += collect(f"model.{name}", self._locate, name)
        if self.paths.get("llama_model") is not None:
            try:
                self.model = self.build()
            except UserError as error:
                word = str(error).split(":")[0].split()[0]
                findings.append(refused(word if word.startswith("model.") else lm.KEY, error))
        if self.model is None:
            return findings + self._check_without_language_model()
        located = [f"model.{name}" for name in FILES if self.paths.get(name) is not None]
        for key, read in loading.state_readers(self.model, self._files()).items():
            findings += collect(key, self._read, key, read) if key in located else []
        config = self.model.llama_model.config
        arguments = self.paths["llama_model"], self.model.llama_tokenizer, config.vocab_size
        findings += collect("tokenizer", tokenizer_check, *arguments)
        findings += collect("Vicuna version", version_check, self.cfg, config.model_type, config.vocab_size)
        if prompts := self.model.prompt_list:
            findings.append(Finding("model.prompt_path", OK, f"{len(prompts)} prompts, as '{prompts[0].strip()[:80]}'"))
        return findings

    @property
    def num_bytes(self) -> int:
        """Bytes of the LM's weights in their files."""
        return sum(value.nbytes for value in self.tensors.values())

    def build(self, has_vision: bool = True) -> nn.Module:
        """A new model without weights, in the precisions of the run; without vision as a feature cache allows."""
        lm.check_folder(self.paths["llama_model"])
        model = MiniGPT4.build(self.cfg, self._files(), self.device, has_vision)
        if loading.is_int8(self.cfg, self.device):
            to_int8(model.llama_model)
        if has_vision and (dtype := vision_dtype(self.cfg, self.device)) != torch.float32:
            round_vit_weights(model.visual_encoder, dtype)
            if self.cfg.freeze_qformer:
                round_vit_weights(model.Qformer, dtype)
        return model

    def _files(self) -> loading.ModelFiles:
        return loading.ModelFiles(*(self.paths.get(name) for name in FILES))

    def _locate(self, name: str) -> list[Finding]:
        key, spec = f"model.{name}", getattr(self.cfg, name)
        self.paths[name] = resolve_local_path(spec, key)
        if self.paths[name] is not None:
            return []
        message = f"'{spec}' is not on this machine: it is downloaded when the run starts and cannot be checked before"
        remedy = f"Where the run has no network, download it beforehand and set {key} to the local path."
        return [Finding(key, WARNING, message, remedy)]

    def _check_without_language_model(self) -> list[Finding]:
        """The vision files compared with the vision side; of the checkpoint only what it is."""
        findings, vision = [], VisionEncoder(*build_vision(self.cfg), **vision_settings(self.cfg, self.device))
        for name, read in (("vit_weights", vit_state), ("q_former_model", q_former_state)):
            if (path := self.paths.get(name)) is not None:
                findings += collect(f"model.{name}", self._read, f"model.{name}", partial(read, vision, path))
        if (path := self.paths.get("ckpt")) is not None:
            message = f"{identify_file(path)}; whether it matches is checked once {lm.KEY} is right"
            findings.append(Finding(loading.CKPT, WARNING, message, f"First correct {lm.KEY}."))
        return findings

    def _read(self, key: str, read: Callable[[], dict[str, torch.Tensor]]) -> Finding:
        state = read()
        message = f"{describe_weights(state)}; {len(state)} tensors, all names and shapes match"
        if key != lm.KEY:
            return Finding(key, OK, message)
        self.tensors = state
        numbers = {"bytes": self.num_bytes, "tensors": len(state)}
        return Finding(key, OK, f"{message}, {size(self.num_bytes)}", numbers=numbers)
