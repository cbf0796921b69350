"""MiniGPT-4 (Zhu et al., 2023): EVA-ViT and Q-Former, one linear projection, a frozen language model.

Shapes: B batch, S image side, Q queries, H width of the Q-Former, L width of the LM, T tokens of a row, N tokens of all
rows without padding.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from minigpt4.common import device as devices
from minigpt4.common.config_checks import sharding_problem
from minigpt4.common.errors import UserError
from minigpt4.common.registry import registry
from minigpt4.common.schema import ModelConfig, read_section
from minigpt4.common.utils import IMAGE_PLACEHOLDER
from minigpt4.models import language_model as lm
from minigpt4.models import loading
from minigpt4.models.answers import PromptAnswers
from minigpt4.models.loading import ModelFiles
from minigpt4.models.lora import LoraSettings, checkpoint_name, lora_settings, train_dropout
from minigpt4.models.packed_attention import PackedBatch, exclude_from_compilation, next_token_loss, recompute_layers
from minigpt4.models.Qformer import QFormer
from minigpt4.models.text_rows import IGNORE_INDEX, IMAGE_TOKEN_INDEX, TextRow, shared_length
from minigpt4.models.vision import VisionEncoder, build_vision, vision_settings

Section = Mapping[str, Any] | ModelConfig


@registry.register_model("minigpt_v2")
@registry.register_model("minigpt4")
@registry.register_model("mini_gpt4")
class MiniGPT4(PromptAnswers, VisionEncoder):
    """The whole model. The constructor joins built parts and reads no file; ``from_config`` builds and loads.

    Args:
        visual_encoder, Qformer, **vision: the arguments of ``VisionEncoder``.
        llama_model, llama_tokenizer: a causal LM and its tokenizer with a pad token, of ``language_model``.
        prompts: texts with ``<ImageHere>`` of which one is drawn for each batch; none in stage 1.
        prompt_template: the text into which a sample's own instruction is formatted.
        max_txt_len: tokens of caption and end symbol together; the rest is cut.
        end_sym: the text that ends a caption.
        lora: of LoRA weights in the LM, which ``add_lora`` adds once the LM is loaded.
        max_context_len: tokens of a conversation, images included; turns that exceed it are left out.
        conversation: the name of a chat template for conversations; None: the one that a chat would choose.
        arch: the registered name, which decides the rules of texts: ``mini_gpt4``, or one of the later family.
        chat_template: instructions of samples are put into ``prompt_template``.
    """

    PRETRAINED_MODEL_CONFIG_DICT: ClassVar[dict[str, str]] = {
        "pretrain_vicuna": "configs/models/minigpt4.yaml",
        "pretrain_vicuna0": "configs/models/minigpt4_vicuna0.yaml",
        "pretrain_llama2": "configs/models/minigpt4_llama2.yaml",
        "pretrain": "configs/models/minigpt_v2.yaml",
    }

    def __init__(
        self,
        visual_encoder: nn.Module | None,
        Qformer: QFormer | None,
        llama_model: nn.Module,
        llama_tokenizer: Any,
        prompts: Sequence[str] = (),
        prompt_template: str = "",
        max_txt_len: int = 32,
        end_sym: str = "\n",
        lora: LoraSettings | None = None,
        max_context_len: int = 3800,
        conversation: str | None = None,
        arch: str = "mini_gpt4",
        chat_template: bool = False,
        **vision: Any,
    ) -> None:
        super().__init__(visual_encoder, Qformer, **vision)
        self.llama_model, self.llama_tokenizer = llama_model, llama_tokenizer
        self.llama_proj = nn.Linear(self.feature_width, llama_model.config.hidden_size)
        self.arch, self.chat_template = arch, chat_template
        self.prompt_list, self.prompt_template = list(prompts), prompt_template
        self.max_txt_len, self.end_sym, self.conversation = max_txt_len, end_sym, conversation
        self.max_context_len = min(max_context_len, getattr(llama_model.config, "max_position_embeddings", 2**31))
        self.lora = lora
        self._has_images = True  # in the latest batch
        self.packs_rows = True  # False for architectures whose attention cannot compute packed rows
        self.frozen_parts.append(llama_model.requires_grad_(False))
        self.train()

    @classmethod
    def default_config_path(cls, model_type: str) -> Path:
        """The YAML file of a model type's defaults."""
        if model_type not in cls.PRETRAINED_MODEL_CONFIG_DICT:
            known = ", ".join(cls.PRETRAINED_MODEL_CONFIG_DICT)
            raise UserError(f"model.model_type is '{model_type}'; mini_gpt4 has: {known}.")
        return Path(__file__).parents[1] / cls.PRETRAINED_MODEL_CONFIG_DICT[model_type]

    @classmethod
    def from_config(
        cls,
        cfg: Section,
        device: torch.device | str | None = None,
        is_sharded: bool = False,
        has_vision: bool = True,
        has_language_model: bool = True,
    ) -> "MiniGPT4":
        """Builds the model of a ``model`` section, compares all its files by names and shapes, and loads them.

        On the meta device nothing is loaded. Raises UserError if a file is missing or does not match the model, or if
        quantised weights are to be sharded.

        Args:
            cfg: the section; docs/CONFIGURATION.md describes its keys.
            device: where the model goes, which decides the default precision; by default the best available one.
            is_sharded: every rank holds a shard of the LM (``run.parallel: fsdp``).
            has_vision: False where batches bring features from a cache in place of images.
            has_language_model: False where a server computes it; of its weights, only token embeddings are loaded.
        """
        cfg = read_section(ModelConfig, cfg, "model")
        device = devices.pick() if device is None else torch.device(device)
        if is_sharded and (problem := sharding_problem(cfg)):
            raise UserError(problem)
        files = loading.locate_files(cfg, has_vision)
        model = cls.build(cfg, files, torch.device("cpu") if device.type == "meta" else device, has_vision)
        states = {key: read() for key, read in loading.state_readers(model, files).items()}
        if not has_language_model:
            loading.drop_language_model(model, states)
        if device.type != "meta":
            loading.load_weights(model, states, cfg, files, device, is_sharded)
            loading.log_summary(model)
        return model.to(device)

    @classmethod
    def build(cls, cfg: ModelConfig, files: ModelFiles, device: torch.device, has_vision: bool = True) -> "MiniGPT4":
        """The model without weights: vision and LM on the meta device, in the precisions of a run on ``device``."""
        llm = lm.build_language_model(files.llama_model, loading.language_model_dtype(cfg, device))
        if cfg.llm_grad_checkpoint:
            recompute_layers(lm.decoder_layers(llm))
        vision = build_vision(cfg, has_vision)
        names = "arch", "prompt_template", "chat_template", "max_txt_len", "end_sym", "max_context_len", "conversation"
        settings = {name: getattr(cfg, name) for name in names}
        settings["lora"] = lora_settings(cfg, llm)
        settings["prompts"] = loading.read_prompts(cfg.prompt_path, cfg.prompt_template)
        tokenizer = lm.load_tokenizer(llm, files.llama_model)
        return cls(*vision, llm, tokenizer, **settings, **vision_settings(cfg, device))

    def load_checkpoint(self, path: Path) -> None:
        """Loads all trained parts from a checkpoint, ours or the reference's; UserError where it does not match."""
        loading.copy_trained_state(self, loading.trained_state(self, path, needs_lora=True), path)

    def train(self, mode: bool = True) -> "MiniGPT4":
        """Switches the trained parts only, LoRA's dropout among them; frozen parts stay in eval mode."""
        super().train(mode)
        train_dropout(self.llama_model, mode)
        return self

    def compile_parts(self) -> None:
        """Compiles the decoder layers, for any number of tokens, and the vision side, whose shapes never change."""
        exclude_from_compilation()
        for layer in lm.decoder_layers(self.llama_model):
            layer.compile(dynamic=True)
        for block in self.visual_encoder.blocks if hasattr(self, "visual_encoder") else ():
            block.compile()

    def trainable_state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint holds, by its names: the parameters that training changes, and always the projection."""
        return {
            checkpoint_name(name): parameter.detach()
            for name, parameter in self.named_parameters()
            if parameter.requires_grad or name.startswith("llama_proj.")
        }

    @property
    def device(self) -> torch.device:
        """Where the projection is."""
        return self.llama_proj.weight.device

    @property
    def eos_ids(self) -> list[int]:
        """The tokens that end an answer."""
        return [self.llama_tokenizer.eos_token_id]

    def maybe_autocast(self, dtype: torch.dtype = torch.float16) -> AbstractContextManager:
        """Mixed precision in ``dtype`` on an accelerator; on a CPU nothing changes."""
        return nullcontext() if self.device.type == "cpu" else devices.autocast(self.device, dtype)

    def encode_img(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, S, S], normalised, to LM inputs [B, Q, L] and their attention mask [B, Q] (int64 ones).

        Rows of several images [B, n, 3, S, S] are encoded one after the other.
        """
        image = image.flatten(0, 1) if image.ndim == 5 else image
        embeds = self.project_features(self.encode_images(image))
        return embeds, torch.ones(embeds.shape[:2], dtype=torch.long, device=image.device)

    def project_features(self, features: Tensor) -> Tensor:
        """Query outputs of the Q-Former [B, Q, H], in any precision, to LM inputs [B, Q, L]."""
        return self.llama_proj(features.to(self.llama_proj.weight.dtype))

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """Ids [...] to embeddings [..., L]; image positions get those of id 0."""
        return self.llama_model.get_input_embeddings()(ids.clamp(min=0))

    def embed_inputs(self, ids: Tensor, image_embeds: Tensor | None = None) -> Tensor:
        """Ids [B, T] to LM inputs [B, T, L]; image positions are filled in order from image embeddings [n, Q, L]."""
        embeds = self.embed_tokens(ids)
        if image_embeds is None:
            return embeds
        return embeds.masked_scatter((ids == IMAGE_TOKEN_INDEX).unsqueeze(-1), image_embeds.to(embeds.dtype))

    def get_context_emb(self, prompt: str, img_list: Sequence[Tensor]) -> Tensor:
        """LM inputs [1, T, L] of a prompt whose placeholders are replaced by images [1, Q, L], in their order.

        Raises UserError if there are more or fewer placeholders than images.
        """
        if (count := prompt.count(IMAGE_PLACEHOLDER)) != len(img_list):
            raise UserError(f"The prompt has {count} image placeholders, but {len(img_list)} images were given.")
        ids = torch.tensor([self.bos_ids + self.tokenize_prompt(prompt)], device=self.device)
        return self.embed_inputs(ids, torch.cat(list(img_list)) if img_list else None)

    def prompt_wrap(
        self, img_embeds: Tensor, atts_img: Tensor, prompt: str | Sequence[str] | None
    ) -> tuple[Tensor, Tensor]:
        """Puts image embeddings [B, Q, L] into a prompt, or into one prompt each; without prompt they are unchanged.

        Returns LM inputs [B, T, L] without begin token, shorter rows padded on the right, and their mask int64 [B, T].
        """
        if not prompt:
            return img_embeds, atts_img
        prompts = [prompt] * len(img_embeds) if isinstance(prompt, str) else prompt
        ids = [torch.tensor([self.tokenize_prompt(text)], device=img_embeds.device) for text in prompts]
        rows = [self.embed_inputs(row, image[None])[0] for row, image in zip(ids, img_embeds, strict=True)]
        masks = [torch.ones_like(row[0]) for row in ids]
        return pad_sequence(rows, batch_first=True), pad_sequence(masks, batch_first=True)

    def forward(self, samples: Mapping[str, Any]) -> dict[str, Any]:
        """The loss of a batch.

        Args:
            samples: ``image`` [n, 3, S, S], the images of all rows in order, or ``features`` [n, Q, H] from a cache;
                ``num_images`` (B numbers) where rows have other than equally many; ``text_input`` or ``answer`` (B
                captions), and optionally ``instruction`` (B texts or None), ``instruction_input`` (B prompts) or
                ``conversation`` (B times None or the arguments of ``tokenize_conversation``). Those of the later
                reference: ``image`` [B, n, 3, S, S] with ``length`` (B numbers), ``conv_q``, ``conv_a`` and
                ``connect_sym``.

        Returns:
            ``loss``, the mean over all target tokens (float32, scalar), and the counts ``num_tokens`` (without
            padding), ``num_padded_tokens`` (with), ``num_targets`` and ``num_truncated`` (conversations whose end was
            left out) as plain numbers.
        """
        rows = self.training_rows(samples)
        image_embeds = self._image_embeds(samples, rows)  # [m, L]
        shared = shared_length(rows) if self.packs_rows else 0  # P
        ids = rows[0].ids[:shared] + [token for row in rows for token in row.ids[shared:]]  # N
        following = [label for row in rows for label in (*row.labels[shared + 1 :], IGNORE_INDEX)]
        labels = [IGNORE_INDEX] * shared + following  # of the next token
        image_positions = [i for i, token in enumerate(ids) if token == IMAGE_TOKEN_INDEX]
        target_positions = [i for i, label in enumerate(labels) if label != IGNORE_INDEX]

        # One copy to the device; nothing in this step waits for the device.
        parts = [torch.tensor(part, dtype=torch.long) for part in (ids, image_positions, target_positions, labels)]
        on_device = torch.cat(parts).to(image_embeds.device, non_blocking=True).split([len(part) for part in parts])
        ids, image_positions, target_positions, labels = on_device
        embeds = self.embed_tokens(ids)  # [N, L]
        embeds = embeds.index_copy(0, image_positions, image_embeds.to(embeds.dtype))
        hidden = [[position - shared for position in row.hidden] for row in rows]
        batch = PackedBatch([len(row.ids) - shared for row in rows], shared, embeds.device, hidden)
        hidden = lm.last_hidden_states(self.llama_model, embeds, batch, self.packs_rows)  # [N, L]
        hidden, targets = (part.index_select(0, target_positions) for part in (hidden, labels))
        chunk = 64 if hidden.is_cpu else 256  # fewer launches
        loss = next_token_loss(hidden, lm.lm_head(self.llama_model), targets, chunk)
        lengths = [len(row.ids) for row in rows]
        counts = {"num_tokens": sum(lengths), "num_padded_tokens": max(lengths) * len(lengths)}
        counts["num_truncated"] = sum(row.is_truncated for row in rows)
        return {"loss": loss, **counts, "num_targets": len(target_positions)}

    def before_update(self) -> None:
        """Drops the projection's gradient of batches of text alone, where LoRA is trained beside it.

        As in the reference, the optimizer then leaves it as it is. On several ranks it takes part in each step, and its
        gradient is zero where no rank had an image.
        """
        for parameter in () if self._has_images or not self.lora else self.llama_proj.parameters():
            if parameter.grad is not None and not parameter.grad.any():
                parameter.grad = None

    def _image_features(self, samples: Mapping[str, Any]) -> Tensor:
        """Features [n, Q, H] of all images of a batch."""
        if (features := samples.get("features")) is not None:
            return features.flatten(0, -3)
        if (image := samples.get("image")) is not None and image.numel():
            return self.encode_images(image.flatten(0, -4))
        vision = [p for name, p in self.named_parameters() if not name.startswith("llama_")]
        if any(p.requires_grad for p in vision):  # they take part in each step, with a blank image
            blank = torch.zeros(1, 3, *self.visual_encoder.patch_embed.img_size, device=self.device)
            return self.encode_images(blank)[:0]
        return torch.zeros(0, self.num_query_token, self.feature_width, device=self.device)

    def check_samples(self, samples: Mapping[str, Any]) -> None:
        """Raises the UserError of ``forward`` for a batch whose texts do not fit its images; computes nothing."""
        parts = ((samples.get("features"), -3), (samples.get("image"), -4))
        counts = [len(part.flatten(0, last)) for part, last in parts if part is not None and part.numel()]
        self._images_by_row(samples, self.training_rows(samples), next(iter(counts), 0))

    def _images_by_row(self, samples: Mapping[str, Any], rows: Sequence[TextRow], num_images: int) -> list[int]:
        """How many of the images belong to each row; UserError where a row has another number of placeholders."""
        given, lengths, per_row = samples.get("num_images"), samples.get("length"), num_images // len(rows)
        if given is None:
            given = [per_row] * len(rows) if lengths is None else [min(per_row, int(length)) for length in lengths]
            num_images = num_images if lengths is None else sum(given)
        given, needed = [int(count) for count in given], [row.num_images for row in rows]
        if given != needed or sum(given) != num_images:
            problem = f"the batch has {num_images} images, {given} by row, and {needed} placeholders"
            raise UserError(f"Each prompt needs {IMAGE_PLACEHOLDER} once for each image; {problem}.")
        return given

    def _image_embeds(self, samples: Mapping[str, Any], rows: Sequence[TextRow]) -> Tensor:
        """LM inputs [m, L] for the image positions of the rows; those that were cut off are not among them.

        Raises UserError where the placeholders of a row are not as many as its images.
        """
        features = self._image_features(samples)
        given = self._images_by_row(samples, rows, len(features))
        if sum(given) < len(features):  # of rows with as many images, the first ones count
            keep = [torch.arange(len(features) // len(rows)) < count for count in given]
            features = features[torch.cat(keep).to(features.device)]
        embeds = self.project_features(features).flatten(0, 1)  # [n * Q, L]
        self._has_images = len(features) > 0
        if not any(row.is_truncated for row in rows):
            return embeds
        starts = [0, *accumulate(count * self.num_query_token for count in given)]
        shown = [range(start, start + row.ids.count(IMAGE_TOKEN_INDEX)) for start, row in zip(starts, rows)]  # noqa: B905
        return embeds[torch.tensor(list(chain(*shown)), dtype=torch.long, device=embeds.device)]
