"""Questions of benchmarks, read from their published annotation files."""
# ruff: noqa: RUF009 - key() returns a dataclasses.field

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minigpt4.common.errors import UserError
from minigpt4.common.sections import key
from minigpt4.common.utils import decode_text, parse_json

Row = dict[str, Any]
ID_FIELDS = ("question_id", "questionId", "image_id", "id", "image")  # of answers, as benchmarks and programs have them


@dataclass(frozen=True)
class BenchmarkConfig:
    """A section of ``evaluation_datasets``; docs/EVALUATION.md explains its keys."""

    benchmark: str | None = key(None, "The benchmark; null: the one of the section's name.")
    eval_file_path: str | None = key(None, "Annotation file, or the folder with those of several splits.")
    img_path: str = key("", "Folder to which the names of images are relative.")
    max_new_tokens: int = key(20, "Tokens of an answer.", least=1)
    batch_size: int = key(16, "Questions that are answered together.", least=1)
    num_beams: int = key(1, "Beams of the search; 1: greedy.", least=1)
    prompt: str | None = key(None, "Text with `{question}`; null: the benchmark's own.")
    system: str | None = key(None, "System text behind the chat template's, or an empty text in place of it.")
    splits: list[str] = key([], "Splits to evaluate; none: all that are there.")
    variants: list[str] = key([], "Variants of the metrics; none: all that need no further package.")
    objects: str | None = key(None, "JSON file with the objects of CHAIR and their words; null: COCO's.")
    has_labels: bool = key(True, "False: answers of people are not published; a submission is written, and no score.")
    subset: str | None = key(None, "JSON file or JSON lines whose ids are evaluated; null: all.")
    max_images: int | None = key(None, "The first so many images; null: all.", least=1)


@dataclass(frozen=True)
class Item:
    """A question about an image. ``row`` has what the metric needs; ``candidates`` are ranked in place of an answer."""

    id: str
    image: str
    question: str
    row: Row = field(repr=False)
    candidates: tuple[str, ...] = ()


Reader = Callable[[BenchmarkConfig, str], dict[str, list[Item]]]  # of a section and its name, for messages


def read_json_rows(path: Path, where: str) -> Any:
    """The content of a JSON file, or the rows of JSON lines; UserError where it is missing, damaged or truncated."""
    if not path.is_file():
        raise UserError(f"{where}: there is no file {path}; correct the path.")
    text = decode_text(path.read_bytes(), f"{where}: {path}")
    try:
        return json.loads(text)
    except ValueError:
        pass
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    return [parse_json(line, f"{where}: line {number} of {path}") for number, line in lines]


def fields_of(row: Any, names: Sequence[str], where: str) -> list[Any]:
    """The values of a row's fields; UserError where it has not all of them, as a file of another benchmark."""
    missing = [name for name in names if not isinstance(row, Mapping) or name not in row]
    if missing:
        known = ", ".join(row) if isinstance(row, Mapping) else type(row).__name__
        raise UserError(f"{where} has no '{missing[0]}' (it has: {known}); give an annotation file of this benchmark.")
    return [row[name] for name in names]


def _rows(section: BenchmarkConfig, where: str, names: Sequence[str], path: Path | None = None) -> Iterator[tuple]:
    """(number, row, values of its fields) of an annotation file that is a list; the last field is the label."""
    path = path or Path(section.eval_file_path or "")
    content = read_json_rows(path, where)
    if isinstance(content, Mapping) and names[0] in content:
        content = [content]  # one JSON line
    if isinstance(content, Mapping):
        raise UserError(f"{where}: {path} holds an object ({', '.join(list(content)[:5])}); expected a list of rows.")
    required = names if section.has_labels else names[:-1]
    for number, row in enumerate(content):
        values = fields_of(row, required, f"{where}: row {number + 1} of {path}")
        yield number, row, values if section.has_labels else [*values, None]


def image_path(section: BenchmarkConfig, name: str) -> str:
    """The file of an image by its name in the annotations."""
    return str(Path(section.img_path) / name)


def coco_image(section: BenchmarkConfig, image_id: int, subset: str = "val2014") -> str:
    """The file of a COCO image, by its plain number or under its full name; of the first form where there is none."""
    names = [f"{image_id:012d}.jpg", f"COCO_{subset}_{image_id:012d}.jpg"]
    return next(
        (path for name in names if Path(path := image_path(section, name)).is_file()), image_path(section, names[0])
    )


def read_pope(section: BenchmarkConfig, where: str) -> dict[str, list[Item]]:
    """A file of POPE, or a folder whose ``*_pope_SPLIT.json`` are the splits."""
    path = Path(section.eval_file_path or "")
    files = sorted(path.rglob("*_pope_*.json")) if path.is_dir() else [path]
    splits = {}
    for file in files:
        names = ("question_id", "image", "text", "label")
        items = []
        for number, row, (question_id, image, text, label) in _rows(section, where, names, file):
            if section.has_labels and label not in ("yes", "no"):
                raise UserError(f"{where}: row {number + 1} of {file} has label {label!r}; expected yes or no.")
            items.append(Item(str(question_id), image_path(section, image), text, row))
        name = file.stem.replace("_pope_", "_")
        if name in splits:
            raise UserError(f"{where}: {path} has several files {file.name}; give the folder of one data set.")
        splits[name] = items
    return splits


def read_vqa(section: BenchmarkConfig, where: str) -> dict[str, list[Item]]:
    """A folder with one file of questions and one of annotations, as VQA v2 and OK-VQA have them.

    ``okvqa_test_split.json``, where there is one, holds the questions that are asked.
    """
    folder = Path(section.eval_file_path or "")
    found = {}
    for kind in ("questions", "annotations")[: 1 + section.has_labels]:
        files = sorted(folder.glob(f"*{kind}*.json"))
        if len(files) != 1:
            names = ", ".join(file.name for file in files) or "none"
            raise UserError(f"{where}: {folder} needs one file *{kind}*.json; it has {names}.")
        found[kind] = read_json_rows(files[0], where)
        fields_of(found[kind], [kind], f"{where}: {files[0]}")
    subset = str(found["questions"].get("data_subtype") or "val2014")
    split_file = folder / "okvqa_test_split.json"
    questions = read_json_rows(split_file, where) if split_file.is_file() else found["questions"]["questions"]
    annotations, people = found.get("annotations", {}).get("annotations", ()), {}
    if section.has_labels and not split_file.is_file() and len(questions) != len(annotations):
        numbers = f"{len(questions)} questions and {len(annotations)} annotations"
        raise UserError(f"{where}: {folder} has {numbers}; give both files of one split, and a smaller part by subset.")
    for row in annotations:
        question_id, _ = fields_of(row, ("question_id", "answers"), f"{where}: an annotation in {folder}")
        people[str(question_id)] = row
    items = []
    for row in questions:
        question_id, image_id, text = fields_of(row, ("question_id", "image_id", "question"), f"{where}: a question")
        if section.has_labels and str(question_id) not in people:
            raise UserError(f"{where}: question {question_id} has no annotation; give both files of one split.")
        own = people.get(str(question_id), {})
        image = coco_image(section, image_id, subset.replace("test-dev", "test"))
        items.append(Item(str(question_id), image, text, own))
    return {subset: items}


def read_aokvqa(section: BenchmarkConfig, where: str) -> dict[str, list[Item]]:
    """A-OKVQA: a list of rows with ten direct answers."""
    names, items = ("question_id", "image_id", "question", "direct_answers"), []
    for _, _, (question_id, image_id, text, answers) in _rows(section, where, names):
        people = [{"answer": answer} for answer in answers or ()]
        items.append(Item(str(question_id), coco_image(section, image_id), text, {"answers": people}))
    return {Path(section.eval_file_path).stem: items}


def read_gqa(section: BenchmarkConfig, where: str) -> dict[str, list[Item]]:
    """GQA: the reference's list of rows, or Stanford's object by question id."""
    path = Path(section.eval_file_path or "")
    content = read_json_rows(path, where)
    if isinstance(content, Mapping):
        content = [{"question_id": name, **row, "image": f"{row.get('imageId')}.jpg"} for name, row in content.items()]
    items = []
    for number, row in enumerate(content):
        place = f"{where}: row {number + 1} of {path}"
        image, text, *_ = fields_of(row, ("image", "question", "answer")[: 2 + section.has_labels], place)
        items.append(Item(str(row.get("question_id", number)), image_path(section, image), text, row))
    return {path.stem: items}


def read_vsr(section: BenchmarkConfig, where: str) -> dict[str, list[Item]]:
    """VSR: JSON lines, or the reference's data set on the Hugging Face hub, whose split ``test`` is fetched."""
    path = Path(section.eval_file_path or "")
    if not path.exists() and len(path.parts) == 2 and not path.suffix:
        try:
            from datasets import load_dataset

            content = list(load_dataset(str(path), split="test"))
        except Exception as error:  # the package is missing, there is no network, or no such data set
            reason = str(error).split("\n")[0][:200]
            raise UserError(f"{where}: {path} is no file and cannot be fetched ({reason}); give the file.") from error
        rows = [
            (number, row, fields_of(row, ("image", "caption", "label"), where)) for number, row in enumerate(content)
        ]
    else:
        rows = list(_rows(section, where, ("image", "caption", "label")))
    return {
        "test": [
            Item(str(number), image_path(section, image), caption, row) for number, row, (image, caption, _) in rows
        ]
    }


def read_list(*names: str, id_name: str = "", image: Callable[[str], str] = str) -> Reader:
    """A reader of lists of rows with an image, a text and a label, whose ids are a field or their positions."""

    def read(section: BenchmarkConfig, where: str) -> dict[str, list[Item]]:
        items = [
            Item(str(row.get(id_name, number)), image_path(section, image(values[0])), values[1], row)
            for number, row, values in _rows(section, where, names)
        ]
        return {Path(section.eval_file_path).stem: items}

    return read


read_vizwiz = read_list("image", "question", "answers", id_name="image")
read_hm = read_list("img", "text", "label", id_name="id")


def read_iconvqa(section: BenchmarkConfig, where: str) -> dict[str, list[Item]]:
    """IconQA (choose text): candidates are ranked; images are ID/image.png."""
    items = []
    for number, row, (image_id, text, choices, _) in _rows(
        section, where, ("image_id", "question", "choices", "answer")
    ):
        candidates = tuple("_".join(choices).split("_"))  # as the reference: a choice with this sign becomes several
        items.append(Item(str(number), image_path(section, f"{image_id}/image.png"), text, row, candidates))
    return {Path(section.eval_file_path).stem: items}


def read_refcoco(name: str, splits: Sequence[str]) -> Reader:
    """A reader of DIR/NAME/NAME_SPLIT.json in the reference's layout."""

    def read(section: BenchmarkConfig, where: str) -> dict[str, list[Item]]:
        found = {}
        for split in section.splits or splits:
            file = Path(section.eval_file_path or "") / name / f"{name}_{split}.json"
            names = ("img_id", "sents", "bbox", "height", "width")
            found[split] = [
                Item(str(number), image_path(section, f"{img_id[:27]}.jpg"), sents, row)
                for number, row, (img_id, sents, *_) in _rows(section, where, names, file)
            ]
        return found

    return read


def read_easy_vqa(section: BenchmarkConfig, where: str) -> dict[str, list[Item]]:
    """easy-vqa: the installed package's test questions, or a folder with its layout."""
    if section.eval_file_path:
        folder = Path(section.eval_file_path)
    else:
        from importlib.util import find_spec

        spec = find_spec("easy_vqa")
        if spec is None:
            raise UserError(f"{where} needs the package easy-vqa: pip install --no-deps easy-vqa.")
        folder = Path(spec.origin).parent / "data" / "test"
    items = []
    for number, row in enumerate(read_json_rows(folder / "questions.json", where)):
        if not isinstance(row, list) or len(row) != 3:
            raise UserError(f"{where}: row {number + 1} of questions.json is no [question, answer, image].")
        question, answer, image_id = row
        image = str(folder / "images" / f"{image_id}.png")
        items.append(Item(str(number), image, question, {"answer": answer, "image_id": image_id}))
    return {folder.name: items}


def select(items: Sequence[Item], section: BenchmarkConfig, where: str) -> list[Item]:
    """The items that are evaluated; UserError for duplicate ids, and where none or no image is left."""
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise UserError(f"{where}: question {item.id} occurs twice; give a file without duplicates.")
        seen.add(item.id)
    if section.subset:
        rows = read_json_rows(Path(section.subset), f"{where}.subset")
        names = {str(id_of(row, f"{where}.subset")) if isinstance(row, Mapping) else str(row) for row in rows}
        items = [item for item in items if item.id in names]
    if section.max_images:
        images = set(list(dict.fromkeys(item.image for item in items))[: section.max_images])
        items = [item for item in items if item.image in images]
    if not items:
        raise UserError(f"{where} has no rows to evaluate; give other files, or another subset.")
    return list(items)


def check_images(items: Sequence[Item], where: str) -> None:
    """UserError if an image file is missing, before anything is answered."""
    images = dict.fromkeys(item.image for item in items)
    if missing := [image for image in images if not Path(image).is_file()]:
        text = f"{len(missing)} of {len(images)} images are missing, such as {missing[0]}"
        raise UserError(f"{where}: {text}; correct img_path or copy them.")


def id_of(row: Mapping[str, Any], where: str) -> Any:
    """The id of a row of answers, by any of its usual names; UserError where it has none."""
    for name in ID_FIELDS:
        if row.get(name) is not None:
            return row[name]
    raise UserError(f"{where}: a row has none of {', '.join(ID_FIELDS)} ({', '.join(row)}); add one.")
