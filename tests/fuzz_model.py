"""Properties of weight files, tokenizers, prompts and conversations."""

import io
import random
import zipfile
from typing import Any

import torch
from fuzz_cases import (
    IMAGE_PLACEHOLDER,
    LLAMA,
    ROOM,
    SEEDS,
    TARGETS,
    TEXTS,
    VALUES,
    Target,
    changed,
    dumped,
    from_files,
    or_told,
    target,
    with_seed,
    written,
)
from hypothesis import strategies as st
from safetensors.torch import save

from minigpt4.common import weights
from minigpt4.common.templates import TEMPLATES
from minigpt4.conversation.context import IMAGE_MESSAGE, build_context, drop_oldest_turn
from minigpt4.conversation.conversation import Chat
from minigpt4.models.llama_tokenizer import load_tokenizer
from minigpt4.models.loading import read_prompts
from minigpt4.models.mini_gpt4 import IGNORE_INDEX, IMAGE_TOKEN_INDEX, MiniGPT4

STATE = {"model": {"llama_proj.weight": torch.ones(4, 3), "llama_proj.bias": torch.zeros(4), "n": torch.arange(3)}}


def saved(**options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(STATE, buffer, **options)
    return buffer.getvalue()


ZIPPED, OLD, SAFE = saved(), saved(_use_new_zipfile_serialization=False), save(STATE["model"])
CODE = b"cos\nsystem\n(S'true'\ntR.", b"cbuiltins\neval\n(S'1'\ntR.", b"ctorch\nload\n(S'x'\ntR."


def with_pickle(seed: int) -> bytes:
    """A whole archive, right checksums and all, whose pickle was changed."""
    rng, buffer = random.Random(seed), io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(ZIPPED)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith("data.pkl"):
                data = changed(rng.choice((data, data, data, *CODE)), rng)
            elif rng.random() < 0.05:
                data = changed(data, rng)
            new.writestr(name, data)
    return buffer.getvalue()


def with_header(seed: int) -> bytes:
    """A safetensors file whose header says something else, its length being right."""
    rng = random.Random(seed)
    size = int.from_bytes(SAFE[:8], "little")
    header = changed(SAFE[8 : 8 + size], rng)
    return len(header).to_bytes(8, "little") + header + SAFE[8 + size :]


def read_weights(suffix: str, data: bytes) -> None:
    path = written(f"weights{suffix}", data)
    layer = torch.nn.ModuleDict({"llama_proj": torch.nn.Linear(3, 4)})

    def read() -> None:
        state = weights.read_state_dict(path, "key")
        state = weights.match_state_dict(layer, weights.published_names(state), path, "key", ["n"])
        weights.assign(layer, state, path, "key")

    or_told(read)
    path.unlink()  # a mapped file must not change under its tensors


TARGETS |= {
    "checkpoints (bytes)": Target(SEEDS.map(from_files(ZIPPED)), lambda data: read_weights(".pth", data), 1),
    "checkpoints (pickles)": Target(SEEDS.map(with_pickle), lambda data: read_weights(".pth", data), 1),
    "checkpoints (old form)": Target(SEEDS.map(from_files(OLD)), lambda data: read_weights(".bin", data), 1),
    "safetensors (bytes)": Target(SEEDS.map(from_files(SAFE)), lambda data: read_weights(".safetensors", data), 1),
    "safetensors (headers)": Target(SEEDS.map(with_header), lambda data: read_weights(".safetensors", data), 1),
}
INDEX = {"metadata": {}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}


@target(st.one_of(SEEDS.map(from_files(dumped(INDEX))), with_seed(VALUES)), 1)
def indices(case: bytes) -> None:
    folder = written("index/model.safetensors.index.json", case).parent
    for file in or_told(lambda: weights.shards(folder / "model.safetensors.index.json", "key")) or []:
        assert file.parent == folder


PARTS = [
    "vision_model.",
    "encoder.layers.3.",
    "self_attn.qkv.bias",
    "layer_norm1.",
    "qformer.",
    "attention.attention.",
    "weight",
    "embeddings.",
    "class_embedding",
    "mlp.",
    "post_layernorm.",
    "layernorm.",
    "x",
    ".",
]
SHAPES = st.lists(st.integers(0, 6), max_size=3)


@target(
    st.dictionaries(st.one_of(TEXTS, st.lists(st.sampled_from(PARTS), max_size=4).map("".join)), SHAPES, max_size=5), 1
)
def key_mapping(case: dict[str, list[int]]) -> None:
    """No number is lost: what is not split into q and v comes back under one name, and published names stay."""
    state = {name: torch.ones(shape) for name, shape in case.items()}
    renamed = weights.published_names(state)
    kept = {id(value) for value in renamed.values()}
    split = [name for name, value in state.items() if id(value) not in kept]
    for name in split:
        is_thrice = name.endswith("attn.qkv.bias") and state[name].ndim == 1 and len(state[name]) % 3 == 0
        is_twice = len(
            {*weights.published_names({name: state[name]})}
            & {n for other in state if other != name for n in weights.published_names({other: state[other]})}
        )
        assert is_thrice or is_twice, name
    for name in state:
        if not name.startswith(("vision_model.", "qformer.")) and not name.endswith("attn.qkv.bias"):
            assert name in renamed


# ---- tokenizers and prompts ------------------------------------------------------------------------------------------

TOKENIZER_FILES = {name: (LLAMA / name).read_bytes() for name in ("special_tokens_map.json", "tokenizer_config.json")}
TOKENIZER_FILES |= {"added_tokens.json": b'{"[PAD]": 600}', "tokenizer.model": (LLAMA / "tokenizer.model").read_bytes()}


@target(st.tuples(st.sampled_from(sorted(TOKENIZER_FILES)), SEEDS, st.one_of(st.none(), VALUES)), 1)
def tokenizers(case: tuple[str, int, Any]) -> None:
    name, seed, value = case
    for other, data in TOKENIZER_FILES.items():
        written(f"tokenizer/{other}", data)
    data = TOKENIZER_FILES[name] if value is None or name == "tokenizer.model" else dumped(value)
    written(f"tokenizer/{name}", changed(data, random.Random(seed)))
    tokenizer = or_told(lambda: load_tokenizer(ROOM / "tokenizer"))
    if tokenizer is not None:
        ids = tokenizer.encode("a dog [PAD]</s> sits")
        assert all(type(i) is int and i >= 0 for i in ids)
        tokenizer.decode(ids)


class Packer:
    """The parts of a model that make rows of ids."""

    tokenize, tokenize_prompt, tokenize_rows = MiniGPT4.tokenize, MiniGPT4.tokenize_prompt, MiniGPT4.tokenize_rows
    bos_ids = MiniGPT4.bos_ids
    llama_tokenizer = load_tokenizer(LLAMA)
    arch, num_query_token, max_context_len, pad_id = "mini_gpt4", 3, 3800, llama_tokenizer.pad_token_id

    def __init__(self, max_txt_len: int, end_sym: str) -> None:
        self.max_txt_len, self.end_sym = max_txt_len, end_sym


PROMPTS = st.one_of(st.just(IMAGE_PLACEHOLDER), st.tuples(TEXTS, TEXTS).map(IMAGE_PLACEHOLDER.join))
BATCHES = st.lists(st.tuples(TEXTS, PROMPTS), min_size=1, max_size=5)


@target(st.tuples(BATCHES, st.integers(1, 12), st.sampled_from(["\n", "###", "</s>", ""])), 1.5)
def packing(case: tuple[list[tuple[str, str]], int, str]) -> None:
    """Labels fall on the caption and the end symbol and nowhere else, in every row of every batch."""
    rows, longest, end = case
    packer = Packer(longest, end)
    tokenizer = packer.llama_tokenizer
    found = packer.tokenize_rows([caption for caption, _ in rows], [prompt for _, prompt in rows])
    for (caption, prompt), (ids, labels, *_) in zip(rows, found, strict=True):
        prefix = [tokenizer.bos_token_id, *packer.tokenize_prompt(prompt)]
        target_ids = packer.tokenize(caption + end)[:longest]
        targets = [IGNORE_INDEX if t == tokenizer.pad_token_id else t for t in target_ids]
        assert ids == prefix + target_ids
        assert labels == [IGNORE_INDEX] * len(prefix) + targets
        assert ids.count(IMAGE_TOKEN_INDEX) == 3 * prompt.count(IMAGE_PLACEHOLDER)
        assert IMAGE_TOKEN_INDEX not in labels


@target(st.tuples(st.one_of(st.binary(max_size=60), TEXTS.map(lambda text: text.encode(errors="replace"))), TEXTS), 1)
def prompt_files(case: tuple[bytes, str]) -> None:
    for prompt in or_told(lambda: read_prompts(str(written("prompts.txt", case[0])), case[1] + "{}")) or []:
        assert prompt.count(IMAGE_PLACEHOLDER) >= 1


MESSAGES = st.lists(st.tuples(st.integers(0, 3), TEXTS), max_size=10)


@target(st.tuples(st.sampled_from(sorted(TEMPLATES)), MESSAGES, TEXTS, st.integers(5, 400)), 1.5)
def trimming(case: tuple[str, list[tuple[int, str]], str, int]) -> None:
    """The fewest oldest turns go; begin token, system text, all images and the last question stay."""
    name, messages, question, room = case
    chat, conv = object.__new__(Chat), TEMPLATES[name].copy()
    chat.model = Packer(1, "")
    num_images = 0
    for kind, text in messages:
        if kind == 0:
            num_images += 1
            conv.append_message(conv.roles[0], IMAGE_MESSAGE)
        else:
            conv.append_message(conv.roles[kind % 2], text.replace(IMAGE_PLACEHOLDER, ""))
    if or_told(lambda: chat.ask(question, conv) or True) is None:
        return
    found = or_told(lambda: build_context(chat.model, conv, num_images, room).ids)
    rest = conv.copy()
    rest.append_message(rest.roles[1], None)
    while True:  # one turn after the other
        ids = [*chat.model.bos_ids, *chat.model.tokenize_prompt(rest.get_prompt())]
        if len(ids) <= room or not drop_oldest_turn(rest):
            break
    assert found == (ids if len(ids) <= room else None)
    assert ids.count(IMAGE_TOKEN_INDEX) == 3 * num_images and rest.messages[-2][1].endswith(question)
