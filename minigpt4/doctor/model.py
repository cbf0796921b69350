"""The model's files against the model that the configuration describes, by names and shapes; values stay unread."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minigpt4.common import device as devices
from minigpt4.common import weights
from minigpt4.common.fingerprints import identify, kind_of
from minigpt4.common.schema import ModelConfig, read_section
from minigpt4.doctor import language
from minigpt4.doctor.findings import OK, WARNING, Finding, collect, size
from minigpt4.models import packed
from minigpt4.models.eva_vit import round_vit_weights
from minigpt4.models.int8 import to_int8
from minigpt4.models.llama_folder import build_llama, check_folder, check_vocabulary, check_weights
from minigpt4.models.llama_tokenizer import load_tokenizer
from minigpt4.models.loading import bridge_weights, tower_weights, trained_part
from minigpt4.models.mini_gpt4 import MiniGPT4, read_prompts
from minigpt4.models.vision import build_vision, q_former_config, vision_settings

LM_KEY = "model.llama_model"


class ModelFiles:
    """The files of a ``model`` section, each looked at once, and the model on the meta device that they should fit.

    Args:
        cfg: the section.
        device: where the run would be, which decides the precisions.
    """

    def __init__(self, cfg: Mapping[str, Any], device: torch.device) -> None:
        self.cfg = cfg
        self.device = device
        wanted = cfg.get("llm_dtype")
        self.llm_dtype = devices.DTYPES[wanted] if wanted else devices.default_dtype(device)
        self.folder: Path | None = None
        self.config: dict[str, Any] = {}
        self.tokenizer: Any = None
        self.tensors: dict[str, torch.Tensor] = {}
        self.prompts: list[str] = []
        self._llama: nn.Module | None = None
        self._kept: nn.Module | None = None

    def examine(self) -> list[Finding]:
        """Every file and prompt of the section, in the order in which a run would meet them."""
        findings = collect(LM_KEY, self._language_model)
        if self.config:
            findings += collect("tokenizer", self._tokenizer)
            findings += collect("Vicuna version", language.version, self.cfg, self.config.get("vocab_size", 0))
        findings += collect("model.vit_weights", self._vision, "vit_weights", ModelConfig.vit_weights, tower_weights)
        spec = ModelConfig.q_former_model
        findings += collect("model.q_former_model", self._vision, "q_former_model", spec, bridge_weights)
        if self.cfg.get("ckpt"):
            findings += collect("model.ckpt", self._trained_part)
        if self.cfg.get("prompt_path"):
            findings += collect("model.prompt_path", self._prompts)
        return findings

    @property
    def lm_bytes(self) -> int:
        """Bytes of the LM's weights in their files."""
        return sum(value.numel() * value.element_size() for value in self.tensors.values())

    @property
    def skeleton(self) -> nn.Module:
        """The model on the meta device, in no precision in particular; where there is no LM, with a stand-in."""
        if self._kept is None:
            llama = self._llama
            if llama is None:
                llama = nn.Linear(1, 1)
                llama.config = type("Config", (), {"hidden_size": 4096})
            self._kept = self._joined(llama)
        return self._kept

    def build(self, has_vision: bool = True) -> nn.Module:
        """A fresh model on the meta device, in the precisions of the run; without vision as a feature cache allows."""
        llama = build_llama(self.folder, self.llm_dtype)
        is_int8 = self.cfg.get("low_resource") or self.cfg.get("llm_precision") == "int8"
        if is_int8 and devices.has_int8(self.device):
            to_int8(llama)
        if self.cfg.get("llm_grad_checkpoint"):
            packed.recompute_layers(llama)
        model = self._joined(llama, has_vision)
        dtype = devices.DTYPES[self.cfg.get("vit_precision", "fp16")]
        if has_vision and self.cfg.get("freeze_vit", True) and dtype != torch.float32:
            keeps_float32 = devices.default_dtype(self.device) == torch.float32
            round_vit_weights(model.visual_encoder, dtype, keep_float32=keeps_float32)
        return model

    def _joined(self, llama: nn.Module, has_vision: bool = True) -> nn.Module:
        cfg = read_section(ModelConfig, self.cfg, "model")
        with torch.device("meta"):
            return MiniGPT4(
                *(build_vision(cfg) if has_vision else (None, q_former_config(cfg))),
                llama,
                self.tokenizer,
                prompts=self.prompts,
                prompt_template=self.cfg.get("prompt_template", ""),
                max_txt_len=self.cfg.get("max_txt_len", 32),
                end_sym=self.cfg.get("end_sym", "\n"),
                **vision_settings(cfg, self.device),
            )

    def _language_model(self) -> Finding:
        spec = self.cfg.get("llama_model")
        folder = weights.whereabouts(spec, LM_KEY)
        if folder is None:
            return _fetched(LM_KEY, spec)
        config = check_folder(folder)
        self.folder, self.config = folder, config
        self._llama = build_llama(folder, self.llm_dtype)
        self.tensors = check_weights(self._llama, folder)
        numbers = {"bytes": self.lm_bytes, "tensors": len(self.tensors)}
        told = f"{kind_of(self.tensors)}; {len(self.tensors)} tensors, {size(self.lm_bytes)}, names and shapes all fit"
        return Finding(LM_KEY, OK, told, numbers=numbers)

    def _tokenizer(self) -> Finding:
        tokenizer = load_tokenizer(self.folder)
        if self._llama is not None:
            check_vocabulary(self._llama, tokenizer, self.folder)
        self.tokenizer = tokenizer
        return language.tokens(self.folder, self.tokenizer, self.config)

    def _vision(self, name: str, default: str, arguments: Callable) -> Finding:
        key = f"model.{name}"
        spec = self.cfg.get(name, default)
        file = weights.whereabouts(spec, key)
        if file is None:
            return _fetched(key, spec)
        module, state, *rest = arguments(self.skeleton, file)
        found = weights.fitting(module, state, *rest)
        return Finding(key, OK, f"{kind_of(state)}; {len(found)} tensors, names and shapes all fit")

    def _trained_part(self) -> Finding:
        file = weights.whereabouts(self.cfg["ckpt"], "model.ckpt")
        if file is None:
            return _fetched("model.ckpt", self.cfg["ckpt"])
        if not self.config:
            kind = identify(file)
            told = f"{kind}; whether it fits shows once {LM_KEY} is right"
            return Finding("model.ckpt", WARNING, told, f"First mend {LM_KEY}.")
        state = trained_part(self.skeleton, file)
        rows, columns = state["llama_proj.weight"].shape
        return Finding("model.ckpt", OK, f"{kind_of(state)}; projection {columns} to {rows}, as the LM is wide")

    def _prompts(self) -> Finding:
        self.prompts = read_prompts(self.cfg.get("prompt_path"), self.cfg.get("prompt_template", ""))
        return Finding("model.prompt_path", OK, f"{len(self.prompts)} prompts, as '{self.prompts[0].strip()[:80]}'")


def _fetched(key: str, spec: Any) -> Finding:
    told = f"'{spec}' is not on this machine: it is fetched when the run starts, and cannot be checked before"
    remedy = f"Where the run has no network, fetch it beforehand and set {key} to the local path."
    return Finding(key, WARNING, told, remedy)
