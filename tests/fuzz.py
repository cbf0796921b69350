"""Properties of every reader of outside data, and how many drawn cases hold them.

    python -m tests.fuzz --cases 100000 [--seed 0] [--targets shards,weights]

Cases are drawn by hypothesis. Readers of bytes get small valid files, changed at random; each case has to end within
seconds in a result or in one of the exceptions that the reader names. test_fuzz.py runs a few cases of each target.
"""

import argparse
import asyncio
import contextlib
import io
import json
import logging
import math
import random
import re
import signal
import string
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import hypothesis
import torch
import yaml
from hypothesis import strategies as st
from safetensors.torch import save
from webdataset.tariterators import base_plus_ext

sys.path.insert(0, str(Path(__file__).parent))  # for the modules beside this one, wherever it is started

import hostile_data
import picture_kinds
from confined import Hangs

from minigpt4.common import schema, weights
from minigpt4.common.config import Config
from minigpt4.common.errors import UserError
from minigpt4.conversation.conversation import IMAGE_MESSAGE, Chat, _drop_oldest_turn
from minigpt4.conversation.pictures import read_picture
from minigpt4.conversation.templates import TEMPLATES
from minigpt4.datasets.datasets import ShardDataset
from minigpt4.datasets.datasets.pairs import read_align_folder, read_pairs
from minigpt4.datasets.datasets.sample import Place, SkipSample, check_caption, decode_image
from minigpt4.datasets.datasets.tar_files import expand_shards, key_and_suffix
from minigpt4.models.llama_tokenizer import load_tokenizer
from minigpt4.models.mini_gpt4 import IGNORED, IMAGE_PLACEHOLDER, IMAGE_SLOT, MiniGPT4, read_prompts
from minigpt4.processors import BlipCaptionProcessor
from minigpt4.serve.api_requests import ApiError, Limits, load_picture, parse
from minigpt4.serve.batch import find_questions

SECONDS_A_CASE = 10
LLAMA = Path(__file__).parent / "golden" / "tiny" / "llama"
_FOLDER = tempfile.TemporaryDirectory(prefix="fuzz-")  # gone with the process
ROOM = Path(_FOLDER.name)
SEEDS = st.integers(0, 2**64 - 1)
HEAD = {"model": {"arch": "mini_gpt4", "model_type": "pretrain_vicuna"}}


class Target:
    """A property of one drawn value: it returns, or raises what is wrong."""

    def __init__(self, strategy: st.SearchStrategy, check: Callable[[Any], None], share: float) -> None:
        self.strategy = strategy
        self.check = check
        self.share = share  # of all cases; slower targets get fewer


TARGETS: dict[str, Target] = {}


def target(strategy: st.SearchStrategy, share: float = 1.0) -> Callable:
    def register(check: Callable[[Any], None]) -> Callable[[Any], None]:
        TARGETS[check.__name__] = Target(strategy, check, share)
        return check

    return register


def or_told(call: Callable[[], Any]) -> Any:
    """The result of a call, or None where it was refused in one line."""
    try:
        return call()
    except UserError as error:
        message = str(error)
        assert message and message.isprintable() and len(message) <= 1500, repr(message)
    return None


def written(name: str, data: bytes) -> Path:
    path = ROOM / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return path


# ---- how cases are made ----------------------------------------------------------------------------------------------

ODD = [
    b"\0",
    b"\xff",
    b"\x7f\xff\xff\xff",
    b"\xff" * 8,
    b"-1",
    b"999999999999",
    b"{",
    b"[",
    b'"',
    b"\\ud800",
    b"null",
    b"1e999",
]


def changed(data: bytes, rng: random.Random) -> bytes:
    """Some bytes replaced, put in, taken out, doubled or cut off."""
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at = rng.randrange(len(data) + 1)
        length = min(rng.choice((1, 1, 2, 4, 16, 200)), len(data) - at)
        way = rng.randrange(7)
        if way == 0:
            data = data[:at] + rng.randbytes(length) + data[at + length :]
        elif way == 1:
            data = data[:at] + bytes([byte ^ 1 << rng.randrange(8) for byte in data[at : at + 1]]) + data[at + 1 :]
        elif way == 2:
            data = data[:at] + rng.choice(ODD) + data[at + rng.choice((0, length)) :]
        elif way == 3:
            data = data[:at] + data[at + length :]
        elif way == 4:
            data = data[:at] + data[at : at + length] * rng.choice((2, 3, 100)) + data[at + length :]
        elif way == 5:
            other = rng.randrange(len(data) + 1)
            data = data[:at] + data[other : other + length] + data[at:]
        elif rng.random() < 0.3:
            data = data[:at]
    return data


def from_files(*files: bytes) -> Callable[[int], bytes]:
    def make(seed: int) -> bytes:
        rng = random.Random(seed)
        return changed(rng.choice(files), rng)

    return make


TEXTS = st.one_of(
    st.text(max_size=40),
    st.text(st.sampled_from(' \t\n.!"()*#:;~aB<>/sé狗\0\ud800'), max_size=60),
    st.lists(
        st.sampled_from(
            [IMAGE_PLACEHOLDER, "</s>", "<s>", "<unk>", "###", "Human: ", " ", "a dog", "</Img>", "\n", "狗"]
        ),
        max_size=8,
    ).map("".join),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=8,
)


def dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


def with_seed(strategy: st.SearchStrategy) -> st.SearchStrategy:
    """Bytes of a JSON value, changed in half of the cases."""
    return st.tuples(strategy, SEEDS).map(
        lambda pair: changed(dumped(pair[0]), random.Random(pair[1])) if pair[1] % 2 else dumped(pair[0])
    )


# ---- configurations --------------------------------------------------------------------------------------------------

SECTIONS = (schema.RunConfig, schema.ModelConfig, schema.DatasetConfig)
KEYS = [entry.name for section in SECTIONS for entry in fields(section)]
SECTION = st.dictionaries(st.one_of(st.sampled_from(KEYS), TEXTS), VALUES, max_size=4)
DATASETS = st.dictionaries(
    st.sampled_from(["laion", "cc_sbu_align", "image_text", "x"]), st.one_of(SECTION, VALUES), max_size=2
)
FILES = st.fixed_dictionaries(
    {}, optional={"run": SECTION, "model": SECTION, "datasets": DATASETS, "preprocess": SECTION, "other": VALUES}
)


def load(path: Path, options: list[str] | None = None) -> Config:
    return Config(Namespace(cfg_path=str(path), options=options)).check()


def yaml_of(content: dict[str, Any]) -> bytes:
    content = {**content, "model": HEAD["model"] | content.get("model", {})}
    text = json.dumps(content)  # is YAML, but for half surrogate pairs; in blocks it is written without them
    return text.encode() if "\\ud" in text else yaml.safe_dump(content).encode()


@target(st.tuples(FILES, SEEDS), 0.4)
def configuration_files(case: tuple[dict[str, Any], int]) -> None:
    data = yaml_of(case[0])
    or_told(lambda: load(written("run.yaml", changed(data, random.Random(case[1])) if case[1] % 2 else data)))


OPTION = st.one_of(
    TEXTS,
    st.tuples(
        st.sampled_from(["run", "model", "datasets", "datasets.laion", "x"]),
        st.one_of(st.sampled_from(KEYS), TEXTS),
        st.one_of(TEXTS, VALUES.map(json.dumps), st.text("[]{}:,&*!|>'\"%@`#-?${} \t=.x1", max_size=12)),
    ).map(lambda parts: f"{parts[0]}.{parts[1]}={parts[2]}"),
)


@target(st.lists(OPTION, max_size=4), 0.4)
def options(case: list[str]) -> None:
    path = written("plain.yaml", yaml_of({"run": {"max_epoch": 2}, "datasets": {"laion": {}}}))
    or_told(lambda: load(path, case))


def value_for(hint: Any) -> st.SearchStrategy:
    if get_origin(hint) not in (None, list, Literal):  # T | None
        return value_for(get_args(hint)[0])
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    kinds = {
        bool: st.booleans(),
        int: st.integers(1, 9),
        float: st.floats(0, 0.9),
        str: st.sampled_from(["a", "b c", "1x", "狗"]),
    }
    return kinds.get(hint, st.just(["train"]))


RUN = st.fixed_dictionaries(
    {}, optional={key: value_for(hint) for key, hint in schema.type_hints(schema.RunConfig).items()}
)


@target(st.tuples(RUN, RUN), 0.4)
def merging(case: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """What the options say stands over what the file says, the rest stays; and the saved result is the same run."""
    in_file, in_options = case
    path = written("merged.yaml", yaml_of({"run": in_file}))
    config = load(path, [f"run.{key}={json.dumps(value)}" for key, value in in_options.items()])
    assert config.to_dict()["run"] == in_file | in_options
    config.save(ROOM / "saved.yaml")
    assert load(ROOM / "saved.yaml").to_dict() == config.to_dict()


# ---- lists and captions ----------------------------------------------------------------------------------------------

ENTRY = st.one_of(VALUES, st.fixed_dictionaries({}, optional={"image_id": st.one_of(TEXTS, VALUES), "caption": VALUES}))
ROW = st.one_of(
    VALUES,
    st.fixed_dictionaries(
        {}, optional={"image": st.one_of(TEXTS, VALUES), "caption": TEXTS, "instruction": TEXTS, "question": VALUES}
    ),
)


@target(
    with_seed(
        st.one_of(VALUES, st.fixed_dictionaries({"annotations": st.one_of(VALUES, st.lists(ENTRY, max_size=4))}))
    ),
    1.5,
)
def filter_cap(case: bytes) -> None:
    written("align/filter_cap.json", case)
    for pair in or_told(lambda: read_align_folder(ROOM / "align", "key")) or []:
        assert pair.image.parent == ROOM / "align" / "image"
        with contextlib.suppress(SkipSample):
            assert check_caption(pair.caption).strip()


@target(st.lists(with_seed(ROW), max_size=4).map(b"\n".join), 1.5)
def lists_of_ones_own(case: bytes) -> None:
    for pair in or_told(lambda: read_pairs(written("own.jsonl", case), "key")) or []:
        assert isinstance(pair.caption, str) and IMAGE_PLACEHOLDER not in (pair.instruction or "")


@target(st.lists(with_seed(ROW), max_size=4).map(b"\n".join), 1.5)
def rows_of_a_batch(case: bytes) -> None:
    for question in or_told(lambda: find_questions(str(written("rows.jsonl", case)), "What?")) or []:
        assert isinstance(question.image, str) and isinstance(question.text, str)


CLEANED, AS_IS = BlipCaptionProcessor(), BlipCaptionProcessor("a photo of ", max_words=3)
PROCESS = ShardDataset("x", ["x.tar"], lambda image: image, CLEANED)


@target(
    st.tuples(
        with_seed(st.one_of(VALUES, st.fixed_dictionaries({"caption": st.one_of(TEXTS, VALUES)}))),
        st.binary(max_size=20),
    ),
    1.5,
)
def captions_of_shards(case: tuple[bytes, bytes]) -> None:
    raw = {"jpg": hostile_data.PICTURE, "json": case[0]} | ({"txt": case[1]} if len(case[1]) % 2 else {})
    with contextlib.suppress(SkipSample):
        assert isinstance(PROCESS.process(raw)["text_input"], str)


@target(TEXTS, 2)
def cleaning(case: str) -> None:
    """No marks, no capitals, no double blanks, at most 50 words; cleaning a clean caption changes nothing."""
    found = CLEANED(case)
    assert not re.search(r'[.!"()*#:;~]|\s\s', found) and found == found.strip(" ")
    assert found == found.lower() or found.lower() != found.lower().lower() or case.lower() == found.upper().lower()
    assert len(found.split(" ")) <= 50 and CLEANED(found) == found
    assert AS_IS(case) == "a photo of " + " ".join(found.split(" ")[:3])


# ---- shards and pictures ---------------------------------------------------------------------------------------------

ARCHIVES = [data for data, _, _ in hostile_data.SHARDS.values() if 500 < len(data) < 50_000]


@target(SEEDS.map(from_files(*ARCHIVES)), 1.5)
def shards(case: bytes) -> None:
    path = written("0.tar", case)
    place = Place(seed=0)
    for sample in ShardDataset("x", [str(path)], lambda image: image, CLEANED).once(place):
        assert sample["image"].mode == "RGB" and isinstance(sample["text_input"], str)
    assert sum(place.skipped.values()) < 10_000


RED = picture_kinds.RED
PICTURES = [
    *(picture_kinds.saved(RED, kind) for kind in ("AVIF", "BMP", "GIF", "JPEG2000", "PPM", "TIFF")),
    *(picture_kinds.saved(RED, "TIFF", compression=name) for name in ("tiff_lzw", "jpeg")),
    *picture_kinds.readable().values(),
    *(data for data, _ in hostile_data.PICTURES.values() if data and len(data) < 50_000),
]


@target(SEEDS.map(from_files(*PICTURES)), 1.5)
def pictures(case: bytes) -> None:
    with contextlib.suppress(SkipSample):
        assert decode_image(case).mode == "RGB"
    picture = or_told(lambda: read_picture(case))
    assert picture is None or picture.mode == "RGB"


@target(st.one_of(TEXTS, st.text("{},.0123456789ab[]*?!/", max_size=12).filter(lambda text: "0..9" not in text)), 1)
def storages(case: str) -> None:
    span = [int(number[-6:]) for number in re.findall(r"\d+", case)]
    if max(span, default=0) < 1000:  # a pattern of a billion shards is the user's own
        or_told(lambda: expand_shards(f"{ROOM}/absent/{case}", "key"))


NAMES = st.text(string.ascii_letters + string.digits + "._-/ ", min_size=1, max_size=30)


@target(NAMES, 2)
def keys_of_members(case: str) -> None:
    """As webdataset splits names, but for files that begin with a dot."""
    if not case.rpartition("/")[2].startswith("."):
        assert key_and_suffix(case) == base_plus_ext(case)


# ---- weights ---------------------------------------------------------------------------------------------------------

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
        weights.load_strictly(layer, weights.published_names(state), path, "key", ["n"])

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

    tokens, slots, pack = MiniGPT4.tokens, MiniGPT4.slots, MiniGPT4.pack
    llama_tokenizer = load_tokenizer(LLAMA)
    num_query_token = 3

    def __init__(self, max_txt_len: int, end_sym: str) -> None:
        self.max_txt_len, self.end_sym = max_txt_len, end_sym


PROMPTS = st.one_of(
    st.just(IMAGE_PLACEHOLDER), st.tuples(TEXTS, TEXTS).map(lambda parts: IMAGE_PLACEHOLDER.join(parts))
)
BATCHES = st.lists(st.tuples(TEXTS, PROMPTS), min_size=1, max_size=5)


@target(st.tuples(BATCHES, st.integers(1, 12), st.sampled_from(["\n", "###", "</s>", ""])), 1.5)
def packing(case: tuple[list[tuple[str, str]], int, str]) -> None:
    """Labels fall on the caption and the end symbol and nowhere else, in every row of every batch."""
    rows, longest, end = case
    packer = Packer(longest, end)
    ids, mask, labels = packer.pack([caption for caption, _ in rows], [prompt for _, prompt in rows])
    tokenizer = packer.llama_tokenizer
    for i, (caption, prompt) in enumerate(rows):
        prefix = [tokenizer.bos_token_id, *packer.slots(prompt)]
        target_ids = packer.tokens(caption + end)[:longest]
        length = len(prefix) + len(target_ids)
        assert ids[i].tolist() == prefix + target_ids + [tokenizer.pad_token_id] * (ids.shape[1] - length)
        assert mask[i].tolist() == [1] * length + [0] * (ids.shape[1] - length)
        wanted = [IGNORED if t == tokenizer.pad_token_id else t for t in target_ids]
        assert labels[i].tolist() == [IGNORED] * len(prefix) + wanted + [IGNORED] * (ids.shape[1] - length)
        assert (ids[i] == IMAGE_SLOT).sum() == 3 * prompt.count(IMAGE_PLACEHOLDER)
        assert not (labels[i] == IMAGE_SLOT).any()


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
    found = or_told(lambda: chat._context_ids(conv, num_images, room))
    rest = conv.copy()
    rest.append_message(rest.roles[1], None)
    while True:  # one turn after the other
        ids = [chat.model.llama_tokenizer.bos_token_id, *chat.model.slots(rest.get_prompt())]
        if len(ids) <= room or not _drop_oldest_turn(rest):
            break
    assert found == (ids if len(ids) <= room else None)
    assert ids.count(IMAGE_SLOT) == 3 * num_images and rest.messages[-2][1].endswith(question)


# ---- clients ---------------------------------------------------------------------------------------------------------

BODY = {
    "model": "m",
    "messages": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}],
    "stop": ["a"],
    "seed": 1,
    "temperature": 0.5,
    "max_tokens": 5,
    "stream": False,
}


@target(
    st.one_of(
        SEEDS.map(from_files(dumped(BODY))), st.fixed_dictionaries({}, optional=dict.fromkeys(BODY, VALUES)).map(dumped)
    ),
    1.5,
)
def requests(case: bytes) -> None:
    try:
        parse(case)
    except ApiError as error:
        assert error.status == 400 and str(error).isprintable()


URLS = st.one_of(
    TEXTS,
    st.tuples(
        st.sampled_from(["data:", "file://", "http://", "pipe:", ""]), st.text("abc:/@[]%?#;,=.0159é\0 ", max_size=20)
    ).map("".join),
    SEEDS.map(from_files(b"data:image/png;base64,aGVsbG8=", b"file:///a.png", b"http://u:p@[::1]:80/a?b#c")).map(
        lambda data: data.decode("latin-1")
    ),
)


@target(URLS, 1.5)
def addresses(case: str) -> None:
    (ROOM / "allowed").mkdir(exist_ok=True)
    or_told(lambda: asyncio.run(load_picture(case, Limits(allowed_folder=ROOM / "allowed"))))


# ---- running ---------------------------------------------------------------------------------------------------------


def run(name: str, cases: int, seed: int, keep_on: bool) -> tuple[int, Counter]:
    """Draws cases; returns how many ran and what was raised, with the place where it was."""
    raised: Counter = Counter()
    count = 0

    def case(value: Any) -> None:
        nonlocal count
        count += 1
        signal.alarm(SECONDS_A_CASE)
        try:
            TARGETS[name].check(value)
        except (Exception, Hangs) as error:
            if not keep_on:
                raise
            frames = [f for f in traceback.extract_tb(error.__traceback__) if "minigpt4/" in f.filename] or [None]
            where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames[-1] else "fuzz.py"
            if not raised[f"{type(error).__name__} at {where}"]:
                print(f"{name}: {value!r}"[:1500], file=sys.stderr)
                traceback.print_exception(error)
            raised[f"{type(error).__name__} at {where}"] += 1
        finally:
            signal.alarm(0)

    def stop(*_: Any) -> None:
        raise Hangs(f"{name} hangs")

    before = signal.signal(signal.SIGALRM, stop)
    settings = hypothesis.settings(
        max_examples=cases, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            hypothesis.seed(seed)(settings(hypothesis.given(TARGETS[name].strategy)(case)))()
    finally:
        signal.signal(signal.SIGALRM, before)
    return count, raised


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=100_000, help="of all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", help="some of: " + ", ".join(TARGETS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    names = args.targets.split(",") if args.targets else list(TARGETS)
    shares, total, num_raised = sum(TARGETS[name].share for name in names), 0, 0
    print("| target | cases | unhandled exceptions | seconds |\n|---|---|---|---|", flush=True)
    for name in names:
        begin = time.monotonic()
        cases = math.ceil(args.cases * TARGETS[name].share / shares)
        count, raised = run(name, cases, args.seed, keep_on=True)
        total, num_raised = total + count, num_raised + sum(raised.values())
        told = f" ({', '.join(f'{n} × {what}' for what, n in raised.items())})" if raised else ""
        label = name.replace("_", " ")
        print(f"| {label} | {count:,} | {sum(raised.values())}{told} | {time.monotonic() - begin:.0f} |", flush=True)
    print(f"| all | {total:,} | {num_raised} | |")
    return int(num_raised > 0)


if __name__ == "__main__":
    sys.exit(main())
