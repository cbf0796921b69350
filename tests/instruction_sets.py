"""The toy files of every data set of MiniGPT-v2: where they are, and how to build them."""

from pathlib import Path

from golden_data import GOLDEN

from minigpt4.common.registry import registry

FAMILY = GOLDEN / "family"
FILES = FAMILY / "datasets"
IMAGES = str(FILES / "images")
_REF = {"image_path": IMAGES, "ann_path": str(FILES), "dataset": "refcoco", "splitBy": "unc"}
_LLAVA = {"image_path": IMAGES, "ann_path": str(FILES / "conversation_58k.json")}


def _listed(file):
    return {"image_path": IMAGES, "ann_path": str(FILES / file)}


def _lavis(file):
    return {"images": {"storage": IMAGES}, "annotations": {"train": {"storage": [str(FILES / file)]}}}


BUILD_INFO = {
    **dict.fromkeys(("refcoco", "refcocop", "refcocog"), _REF),
    **dict.fromkeys(("invrefcoco", "invrefcocop", "invrefcocog"), _REF | {"dataset": "invrefcoco"}),
    **dict.fromkeys(("llava_conversation", "llava_detail", "llava_reason", "multitask_conversation"), _LLAVA),
    "flickr_grounded_caption": _listed("groundedcaption.json"),
    "flickr_CaptionToPhrase": _listed("captiontobbox.json"),
    "flickr_ObjectToPhrase": _listed("phrasetobbox.json"),
    "unnatural_instruction": {"ann_path": str(FILES / "filtered_unnatural_instruction.json")},
    "textcaps_caption": _listed("TextCaps_0.1_train.json"),
    "ocrvqa": _listed("ocrvqa.json"),
    "coco_caption": _lavis("coco_karpathy_train.json"),
    "coco_vqa": _lavis("vqa_train.json"),
    "ok_vqa": _lavis("vqa_train.json"),
    "aok_vqa": _lavis("aokvqa_train.json"),
    "gqa": _lavis("gqa_train.json"),
}


def annotation_file(build_info):
    """The annotation file that a section names."""
    return Path(build_info.get("ann_path") or build_info["annotations"]["train"]["storage"][0])


def with_annotations(build_info, file):
    """The same section with another annotation file."""
    changed = (
        {"ann_path": str(file)} if "ann_path" in build_info else {"annotations": {"train": {"storage": str(file)}}}
    )
    return build_info | changed


def link_visual_genome(folder):
    """A folder of Visual Genome with the toy files under their published names."""
    for name in ("image_data.json", "region_descriptions.json"):
        (folder / name).symlink_to(FILES / f"VG_{name}")
    (folder / "VG_100K").symlink_to(FILES / "VG_100K")
    return {"data_dir": str(folder)}


def link_align(folder):
    """A folder of cc_sbu_align with the toy files under their published names."""
    (folder / "filter_cap.json").symlink_to(FILES / "cc_sbu_align.json")
    (folder / "image").symlink_to(IMAGES)
    return {"storage": str(folder)}


def build_set(name, build_info, image_size=28, processor="blip2_image_eval"):
    """The split ``train`` of a data set."""
    section = {"build_info": build_info, "vis_processor": {"train": {"name": processor, "image_size": image_size}}}
    section |= {"text_processor": {"train": {"name": "blip_caption"}}}
    return registry.get_builder_class(name)(section, name).build_datasets()["train"]
