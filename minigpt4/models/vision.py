"""The vision encoder: EVA-ViT, ln_vision, learned queries and the Q-Former, from pixels to query embeddings.

Shapes: B batch, S image side, N image tokens, W their width, Q queries, H width of the Q-Former.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from timm.models.eva import Eva
from torch import Tensor, nn

from minigpt4.common import device as devices
from minigpt4.common import weights
from minigpt4.common.schema import ModelConfig, read_section
from minigpt4.models.eva_vit import build_eva_vit, round_vit_weights
from minigpt4.models.loading import load_vision
from minigpt4.models.Qformer import QFormer, QFormerConfig


class LayerNorm(nn.LayerNorm):
    """LayerNorm computed in float32; returns the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """[…, W] -> […, W]."""
        weight, bias = self.weight.float(), self.bias.float()
        return nn.functional.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class VisionEncoder(nn.Module):
    """Encodes images into query embeddings. The constructor combines built parts; ``from_config`` builds and loads.

    Args:
        visual_encoder: images [B, 3, S, S] to tokens [B, N, W].
        Qformer: queries [B, Q, H] and tokens [B, N, W] to [B, Q, H].
        num_query_token: Q.
        freeze_vit, freeze_qformer: frozen parts stay in eval mode and their parameters get no gradients.
        vit_dtype: autocast dtype of the vision encoder; with float32 it uses the autocast of the caller, if any.
    """

    def __init__(
        self,
        visual_encoder: Eva,
        Qformer: QFormer,
        num_query_token: int = 32,
        freeze_vit: bool = True,
        freeze_qformer: bool = True,
        vit_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.visual_encoder = visual_encoder
        self.ln_vision = LayerNorm(Qformer.config.encoder_width, eps=1e-5)
        self.Qformer = Qformer
        self.query_tokens = nn.Parameter(torch.zeros(1, num_query_token, Qformer.config.hidden_size))
        nn.init.normal_(self.query_tokens, std=0.02)
        self.vit_dtype = vit_dtype
        self.frozen_parts: list[nn.Module] = [visual_encoder, self.ln_vision] if freeze_vit else []
        self.frozen_parts += [Qformer] if freeze_qformer else []
        self.query_tokens.requires_grad = not freeze_qformer
        self.is_vision_trained = not (freeze_vit and freeze_qformer)
        for module in self.frozen_parts:
            module.requires_grad_(False)

    @classmethod
    def from_config(cls, cfg: ModelConfig | Mapping[str, Any], device: torch.device) -> "VisionEncoder":
        """Builds the encoder of a ``model`` section alone, without a language model, and loads its weights."""
        cfg = read_section(ModelConfig, cfg, "model")
        files = locate_vision(cfg)
        vision = cls(*build_vision(cfg), **vision_settings(cfg, device))
        load(vision, files, cfg, device)
        return vision.to(device).train()

    def train(self, mode: bool = True) -> "VisionEncoder":
        """Switches the trained parts only; frozen parts stay in eval mode."""
        super().train(mode)
        for module in self.frozen_parts:
            module.eval()
        return self

    def encode_images(self, image: Tensor) -> Tensor:
        """Encodes normalised images [B, 3, S, S] into query embeddings [B, Q, H].

        Gradients reach the pixels if ``image`` requires them. Otherwise, a frozen encoder builds no graph.

        Raises:
            ValueError: the images are of another size than the encoder was built for.
        """
        if tuple(image.shape[-2:]) != self.visual_encoder.patch_embed.img_size:
            expected = list(self.visual_encoder.patch_embed.img_size)
            raise ValueError(f"Images are {list(image.shape[-2:])} pixels; the vision encoder expects {expected}.")
        needs_graph = self.is_vision_trained or image.requires_grad
        with (
            torch.set_grad_enabled(needs_graph and torch.is_grad_enabled()),
            devices.autocast(image.device, self.vit_dtype),
        ):
            image_tokens = self.ln_vision(self.visual_encoder(image))  # [B, N, W]
            return self.Qformer(self.query_tokens.expand(len(image), -1, -1), image_tokens)


def locate_vision(cfg: ModelConfig) -> tuple[Path, Path]:
    """Finds or downloads the files of the vision transformer and of the Q-Former; reads no weights."""
    index = "*.index.json"
    vit = weights.locate(cfg.vit_weights, "model.vit_weights", (index, "vision_model.*"))
    q_former_parts = (index, "qformer.*", "query_tokens", "vision_model.post_layernorm.*")
    return vit, weights.locate(cfg.q_former_model, "model.q_former_model", q_former_parts)


def q_former_config(cfg: ModelConfig) -> QFormerConfig:
    """The Q-Former of a ``model`` section."""
    return QFormerConfig(**asdict(cfg.qformer_config), encoder_width=cfg.vit_config.embed_dim)


def vision_settings(cfg: ModelConfig, device: torch.device) -> dict[str, Any]:
    """The constructor's arguments other than the parts, from a ``model`` section."""
    is_float32 = devices.default_dtype(device) == torch.float32 or not cfg.freeze_vit
    return {
        "num_query_token": cfg.num_query_token,
        "freeze_vit": cfg.freeze_vit,
        "freeze_qformer": cfg.freeze_qformer,
        "vit_dtype": torch.float32 if is_float32 else devices.DTYPES[cfg.vit_precision],
    }


def build_vision(cfg: ModelConfig) -> tuple[Eva, QFormer]:
    """Builds the vision transformer and Q-Former of a ``model`` section, parameters on the meta device."""
    with init_empty_weights():
        is_checkpointed = cfg.use_grad_checkpoint and not cfg.freeze_vit
        vit = build_eva_vit(cfg.image_size, cfg.drop_path_rate, is_checkpointed, cfg.vit_config)
        return vit, QFormer(q_former_config(cfg))


def load(vision: VisionEncoder, files: tuple[Path, Path], cfg: ModelConfig, device: torch.device) -> None:
    """Loads both files into a built encoder and rounds the weights as ``vit_precision`` asks."""
    load_vision(vision, *files)
    dtype = devices.DTYPES[cfg.vit_precision] if cfg.freeze_vit else torch.float32
    keeps_float32 = devices.default_dtype(device) == torch.float32
    round_vit_weights(vision.visual_encoder, dtype, keep_float32=keeps_float32)
