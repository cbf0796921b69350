"""The frozen language model: any decoder-only LM of transformers, streamed to its device and checked.

This is the only module that touches transformers' model classes.

Shapes: B rows, S tokens in the cache, t new tokens, N tokens of packed rows, L width of the LM, V vocabulary.
"""

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
from minigpt4.common.utils import parse_json
from minigpt4.models import llama_tokenizer
from minigpt4.models.int8 import Int8Linear
from minigpt4.models.packed_attention import NAME, PackedBatch
from minigpt4.models.parallel import local_slice

KEY = "model.llama_model"
MAX_LAYERS = 1000  # building more takes minutes, whatever the files hold
HUB_FILES = ("*.json", "tokenizer.model", "*.safetensors", "*.bin")
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
MIN_NORM = 0.05  # mean size of a trained Llama's final norm is about 1 or more, that of a difference of two near 0
# Constants that old files store and that are computed today.
COMPUTED = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")


def load_language_model(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    prepare: Callable[[nn.Module], None] | None = None,
) -> PreTrainedModel:
    """Loads a causal LM, every key accounted for, tensor by tensor from memory-mapped files to the device.

    On a CPU, weights that are stored in ``dtype`` stay mapped, so that all processes of a machine hold them once.

    Args:
        folder: config.json beside .safetensors or .bin files (sharded or not).
        dtype: of all weights.
        device: where the weights go.
        prepare: changes the model on the meta device before its weights arrive: int8 layers, or shards over ranks.

    Returns:
        The frozen model in eval mode.

    Raises:
        UserError: files are missing or damaged, keys do not match, or the folder holds a raw delta.
    """
    llm = build_language_model(folder, dtype)
    tensors = read_weights(llm, folder)
    move_buffers(llm, torch.device(device))
    if prepare is not None:
        prepare(llm)
    fill_weights(llm, tensors, dtype, torch.device(device), folder)
    return llm


def build_language_model(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Builds the LM that a folder's config.json describes, frozen, on the meta device; reads no weights.

    Raises:
        UserError: the folder holds no configuration of a causal LM that transformers knows.
    """
    content = check_folder(folder)
    try:
        _check_sizes(content)
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        with init_empty_weights():
            llm = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=NAME)
        llm.tie_weights()  # building on the meta device makes every parameter its own
    except Exception as error:  # transformers and torch raise many kinds for values that make no sense
        cause = str(error).strip().split("\n")[0][:200]
        raise UserError(f"{KEY}: {folder} cannot be loaded ({cause}); copy or convert it again.") from error
    _use_fused_norms(llm, dtype)
    return llm.requires_grad_(False)


def _check_sizes(content: dict[str, Any]) -> None:
    for name in SIZES:
        value = content.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            raise ValueError(f"config.json has {name} {value!r:.50}; expected a positive whole number")
    if (layers := content.get("num_hidden_layers", 1)) > MAX_LAYERS:
        raise ValueError(f"config.json has {layers:,} layers; at most {MAX_LAYERS:,} are built")


def _use_fused_norms(llm: nn.Module, dtype: torch.dtype) -> None:
    """Replaces Llama's RMSNorm, under whatever name, by PyTorch's kernel: the same formula and parameter, faster."""
    for module in list(llm.modules()):
        for name, child in module.named_children():
            # Gemma's norms multiply by 1 + weight and have no such attribute.
            if type(child).__name__.endswith("RMSNorm") and hasattr(child, "variance_epsilon"):
                norm = nn.RMSNorm(child.weight.shape, child.variance_epsilon, device="meta", dtype=dtype)
                setattr(module, name, norm)


def decoder_layers(llm: PreTrainedModel) -> nn.ModuleList:
    """The decoder's layers, by whatever name the architecture has for them."""
    count = llm.config.get_text_config().num_hidden_layers
    lists = (part for part in llm.modules() if isinstance(part, nn.ModuleList) and len(part) == count)
    return next(lists)


def new_cache() -> DynamicCache:
    """An empty cache of keys and values; sliding windows are in the mask, so that every cache can be cropped."""
    return DynamicCache()


def _cache_argument(llm: PreTrainedModel) -> str:
    # transformers calls it past_key_values up to 5.17 or so, and cache later.
    return "cache" if "cache" in inspect.signature(llm.forward).parameters else "past_key_values"


def next_token_logits(llm: PreTrainedModel, embeds: Tensor, attention_mask: Tensor, cache: DynamicCache) -> Tensor:
    """Prefills or continues a cache and returns the logits of the last position, float32 [B, V].

    Args:
        llm: the LM.
        embeds: of the new tokens [B, t, L], shorter rows padded on the left.
        attention_mask: int64 [B, S + t], 0 on padding.
        cache: keys and values of the first S tokens; the new ones are appended.
    """
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, -embeds.shape[1] :]
    output = llm(
        inputs_embeds=embeds,
        attention_mask=attention_mask.to(embeds.device),
        position_ids=position_ids.to(embeds.device),
        use_cache=True,
        logits_to_keep=1,
        **{_cache_argument(llm): cache},
    )
    return output.logits[:, -1].float()


@torch.inference_mode(False)  # the result is used in training later
@torch.no_grad()
def compute_prefix_kv(llm: PreTrainedModel, ids: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Keys and values [1, G, P, D] of each layer for P tokens that training rows begin with; none for no tokens."""
    if not ids:
        return []
    cache, embedding = new_cache(), llm.get_input_embeddings()
    embeds = embedding(torch.tensor([ids], device=embedding.weight.device))
    next_token_logits(llm, embeds, torch.ones(1, len(ids), dtype=torch.long), cache)
    return [(layer.keys, layer.values) for layer in cache.layers]


def last_hidden_states(llm: PreTrainedModel, embeds: Tensor, batch: PackedBatch, is_packed: bool = True) -> Tensor:
    """Packed token embeddings [N, L] to the decoder's last hidden states [N, L].

    Args:
        llm: the LM.
        embeds: of all rows, one after the other.
        batch: the rows.
        is_packed: False computes padded rows, for architectures whose attention is not their own function; such rows
            have no shared prefix.
    """
    if is_packed:
        mask = embeds.new_zeros(1, 1, 1, 1)  # transformers returns masks of four dimensions as they are
        settings = {"attention_mask": mask, "position_ids": batch.position_ids, "packed": batch}
        return llm.base_model(inputs_embeds=embeds[None], use_cache=False, **settings).last_hidden_state[0]
    mask = batch.unpack(torch.ones(len(embeds), dtype=torch.long, device=embeds.device))
    rows = llm.base_model(inputs_embeds=batch.unpack(embeds), attention_mask=mask, use_cache=False).last_hidden_state
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

    Only the values of the final norm are read, so a wrong folder is reported before its gigabytes are.

    Raises:
        UserError: names or shapes differ, or the folder holds a raw delta.
    """
    expected = llm.state_dict(keep_vars=True)  # parameters themselves: tied ones are one object
    found = {name: value for file in weight_files(folder) for name, value in _read(file, expected, llm).items()}
    unknown = sorted(map(str, found.keys() - expected.keys()))
    misshapen = [
        f"{name} {list(getattr(value, 'shape', []))} instead of {list(expected[name].shape)}"
        for name, value in found.items()
        if name in expected
        and not (weights.is_plain(value) and value.is_floating_point() and value.shape == expected[name].shape)
    ]
    given = {id(expected[name]) for name in found if name in expected}  # tied weights are stored once
    missing = sorted(name for name in expected.keys() - found.keys() if id(expected[name]) not in given)
    if missing or unknown or misshapen:
        raise UserError(
            f"{KEY}: the files in {folder} do not match its config.json: missing {missing[:3]}, "
            f"unknown {unknown[:3]}, other shapes {sorted(misshapen)[:3]}; "
            "the folder mixes two models or a shard is missing." + see("weights-that-do-not-fit")
        )
    norm = found.get("model.norm.weight")
    if llm.config.model_type == "llama" and (mean := norm.float().abs().mean().item()) < MIN_NORM:
        raise UserError(
            f"{KEY}: {folder} looks like a raw delta (mean of the final norm is {mean:.4f}, in a real model near 1 or "
            "above); add it to its base model first: python -m minigpt4.tools.apply_delta, see PrepareVicuna.md."
            + see("a-dead-language-model")
        )
    return found


def _read(file: Path, expected: dict[str, Tensor], llm: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors of a file under the model's names: some old files leave out the base model's own."""
    content = weights.read_file(file, KEY)
    prefix = f"{llm.base_model_prefix}."
    named = {f"{prefix}{name}" if f"{prefix}{name}" in expected else name: value for name, value in content.items()}
    return {name: value for name, value in named.items() if name in expected or not str(name).endswith(COMPUTED)}


def fill_weights(
    llm: PreTrainedModel, tensors: dict[str, Tensor], dtype: torch.dtype, device: torch.device, folder: Path
) -> None:
    """Moves tensors into a built model, in ``dtype`` on ``device``, and switches it to eval mode.

    Args:
        llm: built, its parameters on the meta device, its buffers on ``device``.
        tensors: of ``read_weights``; emptied on the way, so that mapped files are closed one after the other.
        dtype, device: of the weights.
        folder: where they come from, for messages.
    """
    num_threads = torch.get_num_threads()
    # Each worker takes whole tensors: mapped pages are read, checked and copied by several at once, and none waits for
    # another at the end of each tensor, as the threads of one operation would.
    with ThreadPoolExecutor(min(8, num_threads), initializer=_start_worker, initargs=(device,)) as workers:
        names = list(tensors)
        puts = [workers.submit(_put, llm, name, tensors.pop(name), dtype, device, folder) for name in names]
        for put in puts:
            put.result()
    torch.set_num_threads(num_threads)  # of threads to come, such as the autograd engine's
    llm.tie_weights()
    llm.eval()


def move_buffers(llm: PreTrainedModel, device: torch.device) -> None:
    """Moves the constants of an LM whose parameters are on the meta device; sharding expects them on the device."""
    for module in llm.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def _put(
    llm: PreTrainedModel, name: str, value: Tensor, dtype: torch.dtype, device: torch.device, folder: Path
) -> None:
    parent, _, leaf = name.rpartition(".")
    module = llm.get_submodule(parent)
    is_sharded = hasattr(getattr(module, leaf), "placements")
    value = local_slice(value, getattr(module, leaf), device) if is_sharded else value.to(device)
    local = value.to_local() if is_sharded else value
    if local.sum().isnan():  # one pass, no copy; finite values never add up to NaN
        raise UserError(f"{KEY}: '{name}' in {folder} holds NaN; the files are damaged, copy them again." + see("nan"))
    value = value.to(dtype)
    if isinstance(module, Int8Linear) and leaf == "weight":
        module.quantize(value)
    elif leaf in dict(module.named_buffers(recurse=False)):
        module.register_buffer(leaf, value)
    else:
        setattr(module, leaf, nn.Parameter(value, requires_grad=False))


def _start_worker(device: torch.device) -> None:
    torch.set_num_threads(1)
    devices.use(device)


def weight_files(folder: Path, key: str = KEY) -> list[Path]:
    """The files that hold a folder's weights, .safetensors before .bin; UserError where there are none."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            return weights.shards(index, key)
    raise UserError(f"{key}: {folder} holds no model.safetensors or pytorch_model.bin, nor an index of their parts.")


def load_tokenizer(llm: PreTrainedModel, folder: Path) -> Any:
    """The tokenizer of the LM's folder; the LM's own ``generate`` then ends and pads with the tokenizer's ids.

    Raises:
        UserError: its files are missing or damaged, or it has ids for which the LM has no embedding.
    """
    tokenizer = llama_tokenizer.load_tokenizer(folder)
    check_vocabulary(llm, tokenizer, folder)
    for role in ("bos", "eos", "pad"):  # published generation_config.json files name other ids
        setattr(llm.generation_config, f"{role}_token_id", getattr(tokenizer, f"{role}_token_id"))
    return tokenizer


def check_vocabulary(llm: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    """Raises UserError where the tokenizer has ids for which the model has no embedding."""
    rows = llm.get_input_embeddings().weight.shape[0]
    if (needed := max(len(tokenizer), 1 + max(tokenizer.added_tokens_decoder, default=0))) > rows:
        raise UserError(
            f"{KEY}: the tokenizer in {folder} has {needed} tokens, the model {rows} embeddings "
            "(Vicuna v0 has 32001, v1.1 and later 32000); take both from the same version."
            + see("the-wrong-vicuna-version")
        )


def check_folder(folder: Path, key: str = KEY) -> dict[str, Any]:
    """Returns config.json of a model folder; raises UserError where the folder cannot be one, reading no weights."""
    if not folder.is_dir():
        raise UserError(
            f"{key}: {folder} is a file ({weights.identify_file(folder)}); expected the folder with config.json and "
            "the weight files of the language model." + see("weights-that-do-not-fit")
        )
    if not (folder / "config.json").is_file():
        raise UserError(f"{key}: {folder} has no config.json; expected a Hugging Face model folder.")
    config = parse_json((folder / "config.json").read_bytes(), f"{key}: {folder / 'config.json'}")
    if not isinstance(config, dict):
        raise UserError(f"{key}: {folder / 'config.json'} holds no JSON object; copy it again.")
    for index in folder.glob("*.index.json"):
        weights.shards(index, key)
    weight_files(folder, key)
    return config
