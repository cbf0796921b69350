"""The model's files compared with the model that the configuration describes, by names and shapes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minigpt4.common.files import resolve_local_path
from minigpt4.common.schema import ModelConfig
from minigpt4.common.weights import describe_weights, identify_file
from minigpt4.doctor import language
from minigpt4.doctor.findings import OK, WARNING, Finding, collect, size
from minigpt4.models import language_model as lm
from minigpt4.models import loading
from minigpt4.models.eva_vit import round_vit_weights
from minigpt4.models.int8 import to_int8
from minigpt4.models.mini_gpt4 import MiniGPT4
from minigpt4.models.vision import vision_dtype

FILES = ("llama_model", "vit_weights", "q_former_model", "ckpt")


class ModelFiles:
    """The files of a ``model`` section, each read once, and the model on the meta device that they should match.

    Args:
        cfg: the section.
        device: of the run, which decides the precisions.
    """

    def __init__(self, cfg: ModelConfig, device: torch.device) -> None:
        self.cfg = cfg
        self.device = device
        self.llm_dtype = loading.language_model_dtype(cfg, device)
        self.paths: dict[str, Path | None] = {}
        self.tokenizer: Any = None
        self.tensors: dict[str, torch.Tensor] = {}  # of the language model
        self.model: nn.Module | None = None

    @property
    def folder(self) -> Path | None:
        """The language model's folder, if it is on this machine."""
        return self.paths.get("llama_model")

    @property
    def lm_bytes(self) -> int:
        """Bytes of the LM's weights in their files."""
        return sum(value.numel() * value.element_size() for value in self.tensors.values())

    def examine(self) -> list[Finding]:
        """Every file of the section, in the order in which a run reads them."""
        findings = []
        for name in FILES:
            if getattr(self.cfg, name) is not None:
                findings += collect(f"model.{name}", self._locate, name)
        if self.folder is not None:
            findings += collect(lm.KEY, self._build)
        if self.model is None:
            return findings + [finding for name in FILES[1:] for finding in collect(f"model.{name}", self._name, name)]
        for key, read in loading.state_readers(self.model, self._files()).items():
            findings += collect(key, self._read, key, read)
        findings += collect("tokenizer", language.tokens, self.folder, self.tokenizer, self.model.llama_model.config)
        findings += collect("Vicuna version", language.version, self.cfg, self.model.llama_model.config.vocab_size)
        if self.model.prompt_list:
            told = f"{len(self.model.prompt_list)} prompts, as '{self.model.prompt_list[0].strip()[:80]}'"
            findings.append(Finding("model.prompt_path", OK, told))
        return findings

    def build(self, has_vision: bool = True) -> nn.Module:
        """A fresh model on the meta device, in the precisions of the run; without vision as a feature cache allows."""
        model = MiniGPT4.build(self.cfg, self._files(), self.device, has_vision)
        if loading.is_int8(self.cfg, self.device):
            to_int8(model.llama_model)
        if has_vision and (dtype := vision_dtype(self.cfg, self.device)) != torch.float32:
            round_vit_weights(model.visual_encoder, dtype)
            if self.cfg.freeze_qformer:
                round_vit_weights(model.Qformer, dtype)
        return model.to("meta")

    def _files(self) -> loading.ModelFiles:
        return loading.ModelFiles(*(self.paths.get(name) for name in FILES))

    def _locate(self, name: str) -> list[Finding]:
        key, spec = f"model.{name}", getattr(self.cfg, name)
        self.paths[name] = resolve_local_path(spec, key)
        if self.paths[name] is not None:
            return []
        told = f"'{spec}' is not on this machine: it is fetched when the run starts, and cannot be checked before"
        remedy = f"Where the run has no network, fetch it beforehand and set {key} to the local path."
        return [Finding(key, WARNING, told, remedy)]

    def _build(self) -> list[Finding]:
        lm.check_folder(self.folder)
        self.model = MiniGPT4.build(self.cfg, self._files(), self.device)
        self.tokenizer = self.model.llama_tokenizer
        return []

    def _name(self, name: str) -> list[Finding]:
        """What a file is, where there is no model to compare it with."""
        if (path := self.paths.get(name)) is None:
            return []
        told = f"{identify_file(path)}; whether it matches is checked once {lm.KEY} is right"
        return [Finding(f"model.{name}", WARNING, told, f"First correct {lm.KEY}.")]

    def _read(self, key: str, read: Callable[[], dict[str, torch.Tensor]]) -> Finding:
        state = read()
        told = f"{describe_weights(state)}; {len(state)} tensors, all names and shapes match"
        if key != lm.KEY:
            return Finding(key, OK, told)
        self.tensors = state
        numbers = {"bytes": self.lm_bytes, "tensors": len(state)}
        return Finding(key, OK, f"{told}, {size(self.lm_bytes)}", numbers=numbers)


