"""The data sets of MiniGPT-v2: samples as recorded, mixing with exact resume, and files that are refused."""

import json
import pickle
import random
import shutil
from argparse import Namespace
from collections import Counter

import pytest
import torch
from data_samples import make_loader
from golden_data import read_json
from instruction_sets import (
    BUILD_INFO,
    FAMILY,
    FILES,
    annotation_file,
    build_set,
    link_align,
    link_visual_genome,
    with_annotations,
)
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file

from minigpt4.common import pickles
from minigpt4.common.errors import UserError
from minigpt4.datasets.builders.base_dataset_builder import create_builder
from minigpt4.datasets.datasets.instructions import CONNECT_SYM, FORMATS
from minigpt4.datasets.datasets.sample import SkipSample
from minigpt4.datasets.loader import LOADER_KEY
from minigpt4.doctor.findings import OK
from minigpt4.doctor.samples import check_samples, draw
from minigpt4.evaluation.benchmarks import BENCHMARKS
from minigpt4.processors import Blip2ImageEvalProcessor, BlipCaptionProcessor

RECORDED = read_json("dataset_samples.json", FAMILY)
PROCESSORS = read_json("processors.json", FAMILY)
TEMPLATES = read_json("templates.json", FAMILY)


@pytest.fixture(scope="module")
def build_infos(tmp_path_factory):
    links = {"refvg": link_visual_genome, "cc_sbu_align": link_align}
    return BUILD_INFO | {name: link(tmp_path_factory.mktemp(name)) for name, link in links.items()}


def fix_draws(monkeypatch, choice=0):
    monkeypatch.setattr(random, "choice", lambda items: items[choice % len(items)])
    monkeypatch.setattr(random, "choices", lambda items, weights=None: [items[0]])


@pytest.mark.parametrize("name", RECORDED["train"])
def test_samples_as_recorded(build_infos, monkeypatch, name):
    recorded, dataset = RECORDED["train"][name], build_set(name, build_infos[name])
    assert len(dataset) == recorded["length"]
    for row in recorded["rows"]:
        fix_draws(monkeypatch, row["choice"])
        sample = dict(dataset[row["index"]])
        image = sample.pop("image", None)
        assert (image if image is None else list(image.shape)) == row.get("image")
        if name == "cc_sbu_align":  # ours has the older names, which the model reads, too
            assert sample == {"text_input": row["answer"], "instruction": None}
            continue
        others = ("index", "choice", "image", "drawn_from")
        assert sample == {key: value for key, value in row.items() if key not in others}
        if drawn := row.get("drawn_from"):
            counts = dataset.rows[row["index"]].answer
            total = sum(counts.values())
            assert (list(counts), [n / total for n in counts.values()]) == (drawn["answers"], drawn["weights"])


@pytest.mark.parametrize("name", FORMATS)
def test_templates_as_recorded(build_infos, name):
    recorded = RECORDED["train"].get(name, {}).get("templates")
    if recorded:
        assert [text.removeprefix("[caption] ") for text in FORMATS[name].templates] == recorded
    dataset = build_set(name, build_infos[name])
    assert len(dataset) and pickle.loads(pickle.dumps(dataset)).rows == dataset.rows  # spawned workers get a copy
    assert TEMPLATES["connect_sym"] == CONNECT_SYM
    if "image" in (sample := dataset[0]):
        begin = TEMPLATES["image_wrap"].split("{")[0]
        assert sample.get("instruction_input", sample.get("conv_q")).startswith(begin)


@pytest.mark.parametrize("case", RECORDED["mixing"], ids=lambda case: str(case["seed"]))
def test_sources_are_drawn_by_ratio(case):
    names = [f"set {number}" for number in range(1 + max(case["drawn"]))]
    ratios = dict(zip(names, case["ratios"] or [None] * len(names), strict=True))
    loader, rng = make_loader({name: [0] for name in names}, ratios), random.Random(case["seed"])
    assert [rng.choices(range(len(names)), loader.weights)[0] for _ in case["drawn"]] == case["drawn"]


def test_mixed_batches_of_own_sizes_resume_exactly(build_infos):
    sizes = {"refcoco": 2, "coco_vqa": 3, "unnatural_instruction": 1, "llava_conversation": 2}

    def loader():
        datasets = {name: build_set(name, build_infos[name]) for name in sizes}
        ratios = {"refcoco": 25, "coco_vqa": 15, "unnatural_instruction": 10, "llava_conversation": 30}
        return make_loader(datasets, ratios, batch_size=sizes, iters_per_epoch=40, seed=1)

    def texts(batch):
        return {key: value for key, value in batch.items() if key != "image"}

    first = loader()
    batches = [(texts(batch), first.state_dict()) for batch in first.iter_epoch(0)]
    assert {batch[LOADER_KEY]["source"] for batch, _ in batches} == set(sizes)
    for batch, _ in batches:
        assert len(batch.get("answer") or batch["conv_a"]) == sizes[batch[LOADER_KEY]["source"]]
    assert len({batch["instruction_input"][0] for batch, _ in batches if batch[LOADER_KEY]["source"] == "refcoco"}) > 4
    resumed = loader()
    resumed.load_state_dict([batches[10][1]], 0, 11)
    assert [texts(batch) for batch in resumed.iter_epoch(0, 11)] == [batch for batch, _ in batches[11:]]


@pytest.mark.parametrize("name", RECORDED["evaluation"])
def test_benchmarks_ask_as_recorded(name):
    questions = ("Left bus!", "the man's (tall) tree", "boat, on lake;  right")
    asked = [BENCHMARKS[name].prompt.format(question=question) for question in questions]
    assert asked == [row[1] for row in RECORDED["evaluation"][name]]


# processors


def test_images_are_resized_and_never_cropped(build_infos):
    """Boxes refer to the whole image, so that the crop of ``blip2_image_train`` does not take place."""
    values = load_file(FAMILY / "processors.safetensors")
    processor = build_set("refcoco", build_infos["refcoco"], 448, "blip2_image_train").vis_processor
    for number in range(4):
        image = Image.open(FAMILY / "images" / f"model_{number}.png").convert("RGB")
        pixels = processor(image)
        torch.testing.assert_close(pixels.flatten()[::997], values[f"eval448_every_997th_{number}"], atol=1e-5, rtol=0)
        assert torch.equal(pixels, Blip2ImageEvalProcessor(448)(image))


def test_captions_are_cleaned_as_recorded():
    for row in PROCESSORS["blip_caption"]:
        assert BlipCaptionProcessor()(row["text"]) == row["result"]


# what is refused


def refused(name, build_info):
    with pytest.raises(UserError) as error:
        build_set(name, build_info)
    return str(error.value)


@pytest.mark.parametrize("name", BUILD_INFO)
@pytest.mark.parametrize("other", ["groundedcaption", "vqa_train", "conversation_58k", "TextCaps_0.1_train", "ocrvqa"])
def test_a_file_of_another_set_is_refused(name, other, build_infos):
    info, file = build_infos[name], str(FILES / f"{other}.json")
    if "splitBy" in info or file == str(annotation_file(info)):
        return
    key = "annotations.train.storage" if "annotations" in info else "ann_path"
    message = refused(name, with_annotations(info, file))
    assert f"datasets.{name}.build_info.{key}" in message and file in message and "expected" in message


def write_refs(folder, bbox=(1, 2, 3, 4), refs=None):
    """A folder like that of RefCOCO with one expression about image 123 of 64x48 pixels."""
    (folder / "refcoco").mkdir()
    ref = {"image_id": 123, "ann_id": 1, "split": "train", "sentences": [{"raw": "a bus"}]}
    content = {"images": [{"id": 123, "width": 64, "height": 48}], "annotations": [{"id": 1, "bbox": bbox}]}
    (folder / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps([ref], 2) if refs is None else refs)
    (folder / "refcoco" / "instances.json").write_text(json.dumps(content))
    return BUILD_INFO["refcoco"] | {"ann_path": str(folder)}


def test_files_of_refcoco_are_read_once(tmp_path, monkeypatch):
    """They are large, and the inverse data set needs the same; a changed file is read again."""
    read, plain = [], pickles.load_plain
    monkeypatch.setattr(pickles, "load_plain", lambda file: read.append(file) or plain(file))
    info = write_refs(tmp_path)
    assert len(build_set("refcoco", info)) == len(build_set("invrefcoco", info | {"dataset": "invrefcoco"})) == 1
    assert len(read) == 1
    shutil.rmtree(tmp_path / "refcoco")
    assert "outside" in refused("refcoco", write_refs(tmp_path, bbox=(70, 2, 3, 4)))
    assert len(read) == 2


PICKLES = {
    "builtins.eval": b"cbuiltins\neval\n(S'1/0'\ntR.",
    "os.system": b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00id\x85R.",
    "__builtin__.file": b"(S'/tmp/x'\ni__builtin__\nfile\n.",
    "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
    "EXT1": b"\x80\x02\x82\x01.",
    "damaged": b"\x80\x02]r\xff\xff\xff\x7f.",
    "truncated": pickle.dumps([{"a": 1}])[:-5],
}


@pytest.mark.parametrize("kind", PICKLES)
def test_pickles_with_code_are_refused(tmp_path, kind):
    message = refused("refcoco", write_refs(tmp_path, refs=PICKLES[kind]))
    assert "refs(unc).p" in message and "download" in message and "ann_path" in message
    assert kind in message or kind == "truncated"


def test_plain_pickles_are_read_as_they_are():
    refs = pickles.load_plain(FILES / "refcoco" / "refs(unc).p")
    assert refs == read_json("refs_unc_as_json.json", FILES / "refcoco")


def test_a_pickle_of_python_2_is_read(tmp_path):
    text = b"(lp0\n(dp1\nS'image_id'\np2\nI123\nsS'ann_id'\nI1\nsS'split'\nS'train'\nsS'sentences'\n"
    text += b"(lp3\n(dp4\nS'raw'\nVcaf\\u00e9 \\u4e2d\nsasa."
    assert build_set("refcoco", write_refs(tmp_path, refs=text)).rows[0].question == ("café 中",)


@pytest.mark.parametrize(
    ("bbox", "words"),
    [
        ((70, 2, 3, 4), "outside"),
        ((1, -20, 3, 4), "outside"),
        ((10, 20, -5, 4), "outside"),
        ((1, 2, 3), "expected numbers"),
        ((1, "2", 3, 4), "expected numbers"),
        ((1, 2, 3, float("inf")), "expected numbers"),
    ],
)
def test_boxes_outside_the_image_are_refused(tmp_path, bbox, words):
    message = refused("refcoco", write_refs(tmp_path, bbox))
    assert words in message and "datasets.refcoco.build_info.ann_path" in message


def test_few_boxes_outside_are_left_out_with_a_warning(tmp_path, caplog):
    rows = [{"image_id": 123, "phrase": "bus", "bbox": "{<1><2><3><4>}"}] * 150
    rows += [{"image_id": 123, "phrase": "tree", "bbox": "{<1><200><3><400>}"}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    info = BUILD_INFO["flickr_ObjectToPhrase"] | {"ann_path": str(tmp_path / "a.json")}
    assert len(build_set("flickr_ObjectToPhrase", info)) == 150
    assert "1 of 151 boxes lie outside" in caplog.text and "tree" in caplog.text


@pytest.mark.parametrize("first", ["gpt", "system"])
def test_conversations_that_do_not_begin_with_a_question_are_left_out(tmp_path, caplog, first):
    """By their places, questions would be trained as answers."""
    turns = [{"from": "human", "value": "what is it?"}, {"from": "gpt", "value": "a bus"}]
    rows = [{"id": "58", "conversations": [{"from": first, "value": "hello"}, *turns]}] * 2
    rows += [{"id": "58", "conversations": turns}, {"id": "58", "conversations": [turns[0], {"value": "a !@# bus"}]}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    dataset = build_set("llava_conversation", BUILD_INFO["llava_conversation"] | {"ann_path": f"{tmp_path}/a.json"})
    assert len(dataset) == 2 and dataset[0]["conv_a"] == "a bus"
    assert "2 conversations begin with an answer or a system text" in caplog.text and "(entry 1)" in caplog.text
    with pytest.raises(SkipSample, match="!@# in a text"):
        dataset[1]


def test_boxes_in_another_form_are_refused(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"image_id": 58, "phrase": "bus", "bbox": "[1, 2, 3, 4]"}]))
    message = refused("flickr_ObjectToPhrase", BUILD_INFO["flickr_ObjectToPhrase"] | {"ann_path": f"{tmp_path}/a.json"})
    assert "build_info.ann_path: no text has a box" in message and "[1, 2, 3, 4]" in message
    assert "expected {<left><top><right><bottom>}" in message


@pytest.mark.parametrize("name", ["text", "conversation"])
def test_boxes_in_own_texts_are_checked_for_minigpt_v2(tmp_path, name):
    row = {
        "image": str(FILES / "images" / "58.jpg"),
        "caption": "<p>a bus</p> {<10><20><130><140>}",
        "instruction": "?",
    }
    turns = [{"from": "human", "value": "<image> [identify] {<1><120><3><140>}"}, {"from": "gpt", "value": "a bus"}]
    row = row if name == "text" else {"image": row["image"], "conversations": turns}
    (tmp_path / "own.json").write_text(json.dumps([row, row | {"caption": "no"}]))
    section = {"builder": "image_text", "build_info": {"storage": f"{tmp_path}/own.json"}}
    assert len(create_builder("own", section, "mini_gpt4").build_datasets()["train"]) == 2
    if name == "text":  # it has a part in the image
        assert len(create_builder("own", section, "minigpt_v2").build_datasets()["train"]) == 2
        return
    with pytest.raises(UserError, match=r"datasets\.own\.build_info\.storage: 2 of 2 boxes lie outside.*identify"):
        create_builder("own", section, "minigpt_v2").build_datasets()


def test_missing_images(tmp_path, caplog):
    info = BUILD_INFO["flickr_ObjectToPhrase"]
    message = refused("flickr_ObjectToPhrase", info | {"image_path": str(tmp_path)})
    assert "3 of 3 images are missing" in message and "build_info.image_path" in message and "123.jpg" in message
    (tmp_path / "58.jpg").symlink_to(FILES / "images" / "58.jpg")
    assert len(build_set("flickr_ObjectToPhrase", info | {"image_path": str(tmp_path)})) == 1
    assert "2 of 3 images are missing" in caplog.text and "left out" in caplog.text


def test_own_boxes_under_a_name_of_ones_own(tmp_path):
    rows = [{"image_id": "a.png", "phrase": "the red ball", "bbox": "{<12><30><57><99>}"}]
    (tmp_path / "phrases.json").write_text(json.dumps(rows))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    info = {"image_path": str(tmp_path), "ann_path": f"{tmp_path}/phrases.json"}
    section = {"builder": "flickr_ObjectToPhrase", "build_info": info}
    sample = create_builder("my_boxes", section, "minigpt_v2").build_datasets()["train"][0]
    assert sample["answer"] == "<p>the red ball</p> {<12><30><57><99>}" and sample["image"].shape == (3, 224, 224)


def test_images_in_the_folders_of_coco(tmp_path):
    (tmp_path / "train2014").symlink_to(FILES / "images")
    for name in ("refcoco", "coco_vqa", "llava_detail"):
        info = BUILD_INFO[name] | {"image_path": str(tmp_path), "images": {"storage": str(tmp_path)}}
        assert len(build_set(name, info)) == RECORDED["train"].get(name, {}).get("length")


def test_a_placeholder_in_a_text_is_refused(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"image_id": 1, "grounded_caption": "<ImageHere>"}]))
    info = BUILD_INFO["flickr_grounded_caption"] | {"ann_path": str(tmp_path / "a.json")}
    assert "<ImageHere>" in refused("flickr_grounded_caption", info)


def test_paths_that_are_not_set():
    assert "ann_path is not set" in refused("gqa", {})
    assert "image_path is not set" in refused("gqa", {"annotations": BUILD_INFO["gqa"]["annotations"]})
    assert "placeholder" in refused("refvg", {"data_dir": "/path/to/visual_genome"})
    assert "has no image_data.json" in refused("refvg", {"data_dir": str(FILES)})
    assert "refs(google).p" in refused("refcoco", BUILD_INFO["refcoco"] | {"splitBy": "google"})


def test_frequent_answers_are_drawn_more_often(build_infos):
    dataset = build_set("coco_vqa", build_infos["coco_vqa"])
    random.seed(0)
    counts = Counter(dataset[0]["answer"] for _ in range(200))
    assert set(counts) == {"yes", "no", "Yes."} and 70 < counts["yes"] < 130


def test_the_doctor_shows_their_samples(tmp_path):
    """Text without images, conversations, and answers that questions share, which are no sign of wrong captions."""
    (tmp_path / "a.json").write_text(
        json.dumps([row | {"answer": "yes"} for row in read_json("gqa_train.json", FILES) * 2])
    )
    sections = {name: {"build_info": BUILD_INFO[name]} for name in ("unnatural_instruction", "llava_conversation")}
    sections["gqa"] = {"build_info": BUILD_INFO["gqa"] | {"annotations": {"train": {"storage": f"{tmp_path}/a.json"}}}}
    cfg = OmegaConf.create({"model": {"arch": "minigpt_v2"}, "datasets": sections})
    drawn, refusals = draw(Namespace(config=cfg, model_cfg=cfg.model), 5)
    found = [check_samples(part, Namespace(model=None)) for part in drawn]
    assert not refusals and [finding.verdict for finding in found] == [OK] * 3
    words = ("no images; captions such as 'the", "captions such as 'Answer 0", "5 drawn, 0% unusable; images of 224")
    assert all(part in finding.evidence for part, finding in zip(words, found, strict=True))
