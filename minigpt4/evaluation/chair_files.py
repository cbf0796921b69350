"""The objects of CHAIR's images: from COCO's annotations, or a file that lists them."""

from collections.abc import Mapping
from pathlib import Path

from minigpt4.common.errors import UserError
from minigpt4.evaluation.chair import Objects, coco_objects, find_objects, lemmas_by_pattern_table, split_tokens
from minigpt4.evaluation.items import BenchmarkConfig, Item, coco_image, fields_of, image_path, read_json_rows


def chair_objects(section: BenchmarkConfig, where: str) -> Objects:
    """COCO's objects, or those of the section's file: ``classes`` and optionally ``double_words``."""
    if section.objects is None:
        return coco_objects()
    content = read_json_rows(Path(section.objects), f"{where}.objects")
    (classes,) = fields_of(content, ["classes"], f"{where}.objects: {section.objects}")
    return Objects(classes, content.get("double_words", {}))


def read_chair(section: BenchmarkConfig, where: str) -> dict[str, list[Item]]:
    """Images with their objects.

    From a folder with COCO's ``instances_*.json`` and ``captions_*.json``, the objects are those of the instances and
    those that the captions name, by the table of pattern.en's singular forms, as the authors' ground truth has them. A
    JSON file {image id: [objects]} is taken as it is.
    """
    path = Path(section.eval_file_path or "")
    if path.is_dir():
        return {path.name: _read_annotations(section, path, where)}
    content = read_json_rows(path, where)
    if not isinstance(content, Mapping) or not all(isinstance(value, list) for value in content.values()):
        raise UserError(f"{where}: {path} is no object of lists {{image id: [objects]}}; give such a file or a folder.")
    items = [Item(name, coco_image(section, int(name)), "", {"objects": found}) for name, found in content.items()]
    return {path.stem: items}


def _read_annotations(section: BenchmarkConfig, folder: Path, where: str) -> list[Item]:
    objects, images, found = chair_objects(section, where), {}, {}
    files = [*sorted(folder.glob("instances_*.json")), *sorted(folder.glob("captions_*.json"))]
    if len({file.name.split("_")[0] for file in files}) < 2:
        raise UserError(f"{where}: {folder} needs instances_*.json and captions_*.json of COCO.")
    for file in files:
        content = read_json_rows(file, where)
        own, annotations = fields_of(content, ("images", "annotations"), f"{where}: {file}")
        images |= {row["id"]: row["file_name"] for row in own}
        names = {row["id"]: row["name"] for row in content.get("categories", [])}
        for row in annotations:
            if "caption" in row:
                lemmas = lemmas_by_pattern_table(split_tokens(row["caption"].lower()))
                nodes = find_objects(lemmas, objects).nodes
            else:
                nodes = [objects.nodes.get(names[row["category_id"]], names[row["category_id"]])]
            found.setdefault(row["image_id"], set()).update(nodes)
    return [
        Item(str(name), image_path(section, file), "", {"objects": sorted(found.get(name, ()))})
        for name, file in images.items()
    ]
