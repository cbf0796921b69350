"""The frozen language model: any decoder-only LM of transformers, streamed to its device and checked.

This is the only module that computes with transformers' model classes.

Shapes: B rows, S tokens in the cache, t new tokens, N tokens of packed rows, L width of the LM, V vocabulary.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from minigpt4.common import device as devices
from minigpt4.common import weights
from minigpt4.common.errors import UserError, see
from minigpt4.common.utils import read_json_object
from minigpt4.models import llama_tokenizer
from minigpt4.models.packed_attention import NAME, PackedBatch
from minigpt4.models.parallel import local_shard
from minigpt4.models.quantization import QuantizedLinear

KEY = "model.llama_model"
MAX_LAYERS = 1000  # building more takes minutes, whatever the files hold
HUB_FILES = ("*.json", "*.jinja", "tokenizer.model")  # beside the weights
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
MIN_NORM = 0.05  # mean size of a trained Llama's final norm is about 1 or more, that of a difference of two near 0
# Constants that old files store and that are computed today.
COMPUTED = ("*rotary_emb.inv_freq", "*.attn.bias", "*.attn.masked_bias", "*.attention.bias", "*.attention.masked_bias")
Prepare = Callable[[nn.Module], None]  # changes a model on the meta device before its weights arrive


def load_language_model(
    folder: Path, dtype: torch.dtype, device: torch.device | str = "cpu", prepare: Prepare | None = None
) -> PreTrainedModel:
    """Loads a causal LM, frozen and in eval mode, tensor by tensor from memory-mapped files to the device.

    On a CPU, weights that are stored in ``dtype`` stay mapped, so that all processes of a machine hold them once.
    Raises UserError if files are missing or damaged, names or shapes differ, or the folder holds a raw delta.
    """
    llm = build_language_model(folder, dtype)
    fill_weights(llm, read_weights(llm, folder), dtype, torch.device(device), folder, prepare)
    return llm


def build_language_model(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Builds the LM of a folder's config.json, frozen, on the meta device; UserError where transformers cannot."""
    content = check_folder(folder)
    try:
        for name in SIZES:
            value, limit = content.get(name, 1), MAX_LAYERS if name == "num_hidden_layers" else 2**31 - 1
            if type(value) is not int or not 0 < value <= limit:
                raise ValueError(f"config.json has {name} {value!r:.50}; expected a whole number from 1 to {limit:,}")
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        with init_empty_weights():
            llm = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=NAME)
        llm.tie_weights()  # building on the meta device makes every parameter its own
    except Exception as error:  # transformers and torch raise many kinds for values that make no sense
        cause = str(error).strip().split("\n")[0][:200]
        raise UserError(f"{KEY}: {folder} cannot be loaded ({cause}); copy or convert it again.") from error
    for module in list(llm.modules()):  # Llama's RMSNorm, under any name: PyTorch's kernel has the same formula
        for name, child in module.named_children():
            if type(child).__name__.endswith("RMSNorm") and hasattr(child, "variance_epsilon"):  # not Gemma's
                norm = nn.RMSNorm(child.weight.shape, child.variance_epsilon, device="meta", dtype=dtype)
                setattr(module, name, norm)
    return llm.requires_grad_(False)


class TokenEmbeddings(nn.Module):
    """What remains of an LM that a server of its own computes: its configuration and its token embeddings."""

    def __init__(self, llm: PreTrainedModel) -> None:
        super().__init__()
        self.config, self.embed_tokens = llm.config, llm.get_input_embeddings()

    def get_input_embeddings(self) -> nn.Module:
        """The token embeddings."""
        return self.embed_tokens

    def get_output_embeddings(self) -> None:
        """There are none."""

    def tie_weights(self) -> None:
        """Nothing is tied."""


def decoder_layers(llm: PreTrainedModel) -> nn.ModuleList:
    """The decoder's layers, by whatever name the architecture has for them."""
    count = llm.config.get_text_config().num_hidden_layers
    return next(part for part in llm.modules() if isinstance(part, nn.ModuleList) and len(part) == count)


def next_token_logits(llm: PreTrainedModel, embeds: Tensor, attention_mask: Tensor, cache: DynamicCache) -> Tensor:
    """Prefills or continues a cache and returns the logits of the last position, float32 [B, V].

    Args:
        llm: the LM.
        embeds: of the new tokens [B, t, L], shorter rows padded on the left.
        attention_mask: int64 [B, S + t], 0 on padding.
        cache: keys and values of the first S tokens; the new ones are appended.
    """
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, -embeds.shape[1] :]
    return forward_cached(llm, embeds, attention_mask.to(embeds.device), position_ids.to(embeds.device), cache)


def forward_cached(
    llm: PreTrainedModel, embeds: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: DynamicCache
) -> Tensor:
    """The logits float32 [B, V] of the last of the new positions [B, t, L], which the cache receives.

    ``attention_mask`` is int64 [B, S + t] or bool [B, 1, t, S + t], and like ``position_ids`` [B, t] on the device.
    """
    settings = {"use_cache": True, "logits_to_keep": 1, _cache_argument(type(llm)): cache}
    output = llm(inputs_embeds=embeds, attention_mask=attention_mask, position_ids=position_ids, **settings)
    return output.logits[:, -1].float()


@functools.cache
def _cache_argument(llm_class: type[PreTrainedModel]) -> str:
    """What a class calls the cache: past_key_values in transformers 5.17, cache in later versions."""
    return "cache" if "cache" in inspect.signature(llm_class.forward).parameters else "past_key_values"


def last_hidden_states(llm: PreTrainedModel, embeds: Tensor, batch: PackedBatch, is_packed: bool = True) -> Tensor:
    """Embeddings [N, L] of the prefix and of a batch's rows, in this order, to the decoder's last hidden states [N, L].

    ``is_packed=False`` computes padded rows, for architectures with an attention of their own.
    """
    if is_packed:
        mask = embeds.new_zeros(1, 1, 1, 1)  # transformers returns masks of four dimensions as they are
        settings = {"attention_mask": mask, "position_ids": batch.position_ids, "packed": batch}
        return llm.base_model(inputs_embeds=embeds[None], use_cache=False, **settings).last_hidden_state[0]
    settings = {"attention_mask": batch.padding_mask, "use_cache": False}
    rows = llm.base_model(inputs_embeds=batch.unpack(embeds), **settings).last_hidden_state
    return batch.pack(rows)


def lm_head(llm: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """The function from last hidden states [n, L] to logits [n, V], with what the architecture does to logits."""
    head, config = llm.get_output_embeddings(), llm.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma
    # Cohere multiplies, Granite divides.
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)

    def logits(hidden: Tensor) -> Tensor:
        values = head(hidden.to(head.weight.dtype))
        values = values if scale == 1 else values * scale
        return values if softcap is None else softcap * torch.tanh(values / softcap)

    return logits


def read_weights(llm: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    """The memory-mapped tensors of a folder, every name and shape compared with a built model.

    Only the values of the final norm are read. Raises UserError if names or shapes differ, or for a raw delta.
    """
    expected, prefix, state = llm.state_dict(), f"{llm.base_model_prefix}.", {}
    for file in weights.weight_files(folder, KEY):
        content = weights.read_file(file, KEY)
        weights.check_tensors(content, file, KEY)
        for name, value in content.items():  # some old files leave out the name of the base model
            state[f"{prefix}{name}" if f"{prefix}{name}" in expected else name] = value
    hint = "Does the folder mix two models, or is a shard missing?"
    state = weights.match_state_dict(llm, state, folder, KEY, COMPUTED, hint)
    norm = state.get("model.norm.weight")
    if llm.config.model_type == "llama" and (mean := norm.float().abs().mean().item()) < MIN_NORM:
        raise UserError(
            f"{KEY}: {folder} looks like a raw delta (mean of the final norm is {mean:.4f}, in a real model near 1 or "
            "above); add it to its base model first: python -m minigpt4.tools.apply_delta, see PrepareVicuna.md."
            + see("a-dead-language-model")
        )
    return state


def fill_weights(
    llm: PreTrainedModel,
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
    device: torch.device,
    folder: Path,
    prepare: Prepare | None = None,
) -> None:
    """Moves the tensors of ``read_weights`` into a built model on the meta device, and switches it to eval mode.

    ``tensors`` is emptied on the way, so that mapped files are closed one after the other.
    """
    for module in llm.modules():  # sharding expects constants on the device
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    if prepare is not None:
        prepare(llm)

    def start_worker() -> None:
        devices.set_threads(1)
        devices.use(device)

    def put(name: str, value: Tensor) -> None:
        parent, _, leaf = name.rpartition(".")
        module = llm.get_submodule(parent)
        is_sharded = hasattr(getattr(module, leaf), "placements")
        value = local_shard(value, getattr(module, leaf), device) if is_sharded else value.to(device)
        if (value.to_local() if is_sharded else value).sum().isnan():  # finite values never add up to NaN
            cause = "the files are damaged, copy them again." + see("nan")
            raise UserError(f"{KEY}: '{name}' in {folder} holds NaN; {cause}")
        value = value.to(dtype)
        if isinstance(module, QuantizedLinear) and leaf == "weight":
            module.quantize(value)
        elif leaf in dict(module.named_buffers(recurse=False)):
            module.register_buffer(leaf, value)
        else:
            setattr(module, leaf, nn.Parameter(value, requires_grad=False))

    num_threads = torch.get_num_threads()
    # Each worker takes whole tensors: mapped pages are read, checked and copied by several at once, and none waits for
    # another at the end of each tensor, as the threads of one operation would.
    with ThreadPoolExecutor(min(8, num_threads), initializer=start_worker) as workers:
        for done in [workers.submit(put, name, tensors.pop(name)) for name in list(tensors)]:
            done.result()
    torch.set_num_threads(num_threads)  # of threads to come, such as the autograd engine's
    llm.tie_weights()
    llm.eval()


def load_tokenizer(llm: PreTrainedModel, folder: Path) -> Any:
    """The tokenizer of the LM's folder; the LM's own ``generate`` then ends and pads with the tokenizer's ids.

    Raises UserError if its files are missing or damaged, or it has ids for which the LM has no embedding.
    """
    tokenizer = llama_tokenizer.load_tokenizer(folder)
    rows = llm.get_input_embeddings().weight.shape[0]
    if (needed := max(len(tokenizer), 1 + max(tokenizer.added_tokens_decoder, default=0))) > rows:
        raise UserError(
            f"{KEY}: the tokenizer in {folder} has {needed} tokens, the model {rows} embeddings "
            "(Vicuna v0 has 32001, v1.1 and later 32000); take both from the same version."
            + see("the-wrong-vicuna-version")
        )
    for role in ("bos", "eos", "pad"):  # published generation_config.json files name other ids
        setattr(llm.generation_config, f"{role}_token_id", getattr(tokenizer, f"{role}_token_id"))
    return tokenizer


def cached_config_folder(spec: str) -> Path | None:
    """The folder in the Hugging Face cache with config.json and tokenizer of a repository, perhaps without weights."""
    from huggingface_hub import try_to_load_from_cache

    with contextlib.suppress(ValueError):  # it is no repository's id
        config, *tokenizers = (try_to_load_from_cache(spec, n) for n in ("config.json", *llama_tokenizer.FILES))
        if isinstance(config, str) and any(isinstance(file, str) for file in tokenizers):
            return Path(config).parent
    return None


def check_folder(folder: Path, key: str = KEY) -> dict[str, Any]:
    """Returns config.json of a model folder; raises UserError where the folder cannot be one, reading no weights."""
    if not folder.is_dir():
        expected = "expected the folder with config.json and the weights of the LM." + see("weights-that-do-not-fit")
        raise UserError(f"{key}: {folder} is a file ({weights.identify_file(folder)}); {expected}")
    if not (folder / "config.json").is_file():
        raise UserError(f"{key}: {folder} has no config.json; expected a Hugging Face model folder.")
    return read_json_object(folder / "config.json", key)
