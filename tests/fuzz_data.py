"""Properties of lists, captions, shards and images."""

import contextlib
import json
import pickle
import random
import re
import string
from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import Any

import hostile_data
import hostile_images
import instruction_sets
import picture_kinds
from fuzz_cases import IMAGE_PLACEHOLDER, ROOM, SEEDS, TEXTS, VALUES, from_files, or_told, target, with_seed, written
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

from minigpt4.common.images import read_image
from minigpt4.datasets.datasets import ShardDataset
from minigpt4.datasets.datasets.pairs import read_align_folder, read_pairs
from minigpt4.datasets.datasets.sample import SkipSample, check_caption
from minigpt4.processors import BlipCaptionProcessor
from minigpt4.serve.batch import find_questions

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
        assert isinstance(question.path, str) and isinstance(question.text, str)


JSON_SETS = {
    name: (info, json.loads(instruction_sets.annotation_file(info).read_bytes()))
    for name, info in instruction_sets.BUILD_INFO.items()
    if "splitBy" not in info
}
INSTANCES = (instruction_sets.FILES / "refcoco" / "instances.json").read_bytes()
REFS = json.loads((instruction_sets.FILES / "refcoco" / "refs_unc_as_json.json").read_bytes())


def with_value(content: Any, value: Any, rng: random.Random) -> Any:
    """A copy of a JSON value with another value in one place."""
    if not isinstance(content, dict | list) or not content or rng.random() < 0.1:
        return value
    items = content.items() if isinstance(content, dict) else enumerate(content)
    chosen = rng.choice([key for key, _ in items])
    copied = content.copy()
    copied[chosen] = with_value(content[chosen], value, rng)
    return copied


@target(st.tuples(st.sampled_from(sorted(JSON_SETS)), VALUES, SEEDS), 1)
def annotations(case: tuple[str, Any, int]) -> None:
    """A toy file of a data set of MiniGPT-v2 with one odd value: refused, or all its samples can be read."""
    name, value, seed = case
    info, content = JSON_SETS[name]
    file = written("annotations.json", json.dumps(with_value(content, value, random.Random(seed))).encode())
    info = instruction_sets.with_annotations(info, file)
    for row in (or_told(lambda: instruction_sets.build_set(name, info)) or Namespace(rows=[])).rows:
        assert len(row.images) <= 1 and all(file.is_file() for file in map(Path, row.images))


@target(SEEDS.map(from_files(pickle.dumps(REFS, 0), pickle.dumps(REFS, 2), pickle.dumps(REFS, 4))), 1)
def refs(case: bytes) -> None:
    """A changed pickle of RefCOCO's expressions: nothing but plain values comes out of it."""
    for name, data in (("refs(unc).p", case), ("instances.json", INSTANCES)):
        written(f"refcoco/{name}", data)
    info = instruction_sets.BUILD_INFO["refcoco"] | {"ann_path": str(ROOM)}
    dataset = or_told(lambda: instruction_sets.build_set("refcoco", info))
    assert dataset is None or all(isinstance(text, str) for row in dataset.rows for text in row.question)


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
    from minigpt4.datasets.datasets.sample import WorkerInfo

    path, skipped = written("0.tar", case), Counter()
    for sample in ShardDataset("x", [str(path)], lambda image: image, CLEANED).iter_eval(WorkerInfo(0), skipped):
        assert sample["image"].mode == "RGB" and isinstance(sample["text_input"], str)
    assert sum(skipped.values()) < 10_000


RED = picture_kinds.RED
PICTURES = [
    *(picture_kinds.saved(RED, kind) for kind in ("AVIF", "BMP", "GIF", "TIFF")),
    *(picture_kinds.saved(RED, "TIFF", compression=name) for name in ("tiff_lzw", "jpeg")),
    *picture_kinds.readable().values(),
    *(data for data, _ in hostile_images.PICTURES.values() if data and len(data) < 50_000),
]


@target(SEEDS.map(from_files(*PICTURES)), 1.5)
def pictures(case: bytes) -> None:
    from minigpt4.datasets.datasets.sample import decode_image

    with contextlib.suppress(SkipSample):
        assert decode_image(case).mode == "RGB"
    picture = or_told(lambda: read_image(case))
    assert picture is None or picture.mode == "RGB"


@target(st.one_of(TEXTS, st.text("{},.0123456789ab[]*?!/", max_size=12).filter(lambda text: "0..9" not in text)), 1)
def storages(case: str) -> None:
    from minigpt4.datasets.datasets.shard_urls import expand_shards

    span = [int(number[-6:]) for number in re.findall(r"\d+", case)]
    if max(span, default=0) < 1000:  # a pattern of a billion shards is the user's own
        or_told(lambda: expand_shards(f"{ROOM}/absent/{case}", "key"))


NAMES = st.text(string.ascii_letters + string.digits + "._-/ ", min_size=1, max_size=30)


@target(NAMES, 2)
def keys_of_members(case: str) -> None:
    """As webdataset splits names, but for files that begin with a dot."""
    from minigpt4.datasets.datasets.shards import key_and_suffix

    if not case.rpartition("/")[2].startswith("."):
        assert key_and_suffix(case) == base_plus_ext(case)
