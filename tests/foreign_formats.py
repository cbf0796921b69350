"""Writes training data as the scripts of other projects do: this file knows nothing of minigpt4."""

import csv
import io
import json
import random
import tarfile

import pyarrow
import pyarrow.parquet
from PIL import Image, ImageDraw

WORDS = ["red", "green", "blue", "yellow"]


def draw(number):
    image = Image.new("RGB", (40, 30), "white")
    ImageDraw.Draw(image).ellipse((5 + number % 10, 5, 25, 25), fill=WORDS[number % 4])
    return image


def jpeg(number):
    buffer = io.BytesIO()
    draw(number).save(buffer, "JPEG")
    return buffer.getvalue()


def write_images(folder, count=6):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        draw(number).save(folder / f"{number:012}.jpg")


def llava(folder):
    """As LLaVA's convert scripts: one JSON list; text-only rows, images at the end, several images."""
    write_images(folder)
    rows, rng = [], random.Random(0)
    for number in range(6):
        question = rng.choice(["<image>\nWhat is it?", "What is it?\n<image>"])
        turns = [question, f"A {WORDS[number % 4]} circle.", "Are you sure?", "Yes, I am."]
        said = [{"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]
        rows.append({"id": f"{number:012}", "image": f"{number:012}.jpg", "conversations": said})
    rows.append({"id": "text", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]})
    two = [{"from": "human", "value": "<image> and <image>"}, {"from": "gpt", "value": "Two circles."}]
    rows.append({"id": "two", "image": [f"{0:012}.jpg", f"{1:012}.jpg"], "conversations": two})
    with open(folder / "llava_instruct.json", "w") as file:
        json.dump(rows, file, indent=2)
    return folder / "llava_instruct.json"


def llava_jsonl(folder):
    rows = json.loads(llava(folder).read_text())
    (folder / "llava_instruct.json").unlink()
    (folder / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def sharegpt(folder):
    folder.mkdir()
    said = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]
    (folder / "sharegpt.json").write_text(json.dumps([{"id": "a_0", "conversations": said}] * 4))
    return folder / "sharegpt.json"


def factory_alpaca(folder):
    write_images(folder)
    row = {"instruction": "<image>What is it?", "input": "", "output": "A red circle.", "images": [f"{0:012}.jpg"]}
    (folder / "mllm_alpaca.json").write_text(json.dumps([row] * 4))
    return folder / "mllm_alpaca.json"


def factory_messages(folder):
    write_images(folder)
    said = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A circle."}]
    rows = [{"messages": said, "images": [f"{number:012}.jpg"]} for number in range(4)]
    (folder / "mllm_demo.json").write_text(json.dumps(rows))
    return folder / "mllm_demo.json"


def openai(folder):
    import base64

    folder.mkdir()
    url = "data:image/jpeg;base64," + base64.b64encode(jpeg(1)).decode()
    parts = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": url, "detail": "low"}}]
    said = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "A"},
    ]
    (folder / "finetune.jsonl").write_text("\n".join([json.dumps({"messages": said})] * 3))
    return folder / "finetune.jsonl"


def coco(folder):
    write_images(folder / "train2017")
    images = [{"id": 10 + n, "file_name": f"{n:012}.jpg", "width": 40, "height": 30} for n in range(6)]
    annotations = [{"id": n, "image_id": 10 + n // 2, "caption": f"Circle {n}."} for n in range(10)]
    (folder / "annotations").mkdir()
    content = {"info": {}, "licenses": [], "images": images, "annotations": annotations}
    (folder / "annotations" / "captions_train2017.json").write_text(json.dumps(content))
    return folder / "annotations" / "captions_train2017.json", folder / "train2017"


def flickr_csv(folder):
    """As Kaggle's results.csv, which has a row without its second separator, and quotation marks in texts."""
    write_images(folder / "flickr30k_images")
    lines = ["image_name| comment_number| comment"]
    lines += [f'{n:012}.jpg| {k}| A "circle , number {k} .' for n in range(4) for k in range(2)]
    (folder / "results.csv").write_text("\n".join([*lines, f"{0:012}.jpg| 4   A dog runs ."]))
    return folder / "results.csv", folder / "flickr30k_images"


def flickr_token(folder):
    write_images(folder)
    lines = [f"{n:012}.jpg#{k}\tA circle , number {k} ." for n in range(3) for k in range(2)]
    (folder / "results_20130124.token").write_text("\n".join(lines))
    return folder / "results_20130124.token"


def karpathy_csv(folder):
    write_images(folder)
    with open(folder / "flickr_annotations_30k.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["raw", "sentids", "split", "filename", "img_id"])
        for n in range(3):
            writer.writerow([json.dumps(["A circle.", "It's round."]), "[1, 2]", "train", f"{n:012}.jpg", n])
    return folder / "flickr_annotations_30k.csv"


def imagefolder(folder):
    write_images(folder)
    rows = [{"file_name": f"{n:012}.jpg", "text": f"Circle {n}."} for n in range(6)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def img2dataset_parquet(folder):
    """As img2dataset writes with output_format=parquet: row groups of 100 rows, failed downloads without bytes."""
    folder.mkdir()
    names = [pyarrow.field("jpg", pyarrow.binary())]
    names += [pyarrow.field(name, pyarrow.string()) for name in ("key", "caption", "url", "status", "error_message")]
    rows = [
        {"jpg": jpeg(n) if n % 5 else None, "key": f"{n:09}", "caption": f"Circle {n}.", "url": "https://host/a.jpg",
         "status": "success" if n % 5 else "failed_to_download", "error_message": None}
        for n in range(30)
    ]  # fmt: skip
    table = pyarrow.Table.from_pylist(rows, schema=pyarrow.schema(names))
    pyarrow.parquet.write_table(table, folder / "00000.parquet", row_group_size=10)
    return folder


def shard_list(folder):
    folder.mkdir()
    for number in range(2):
        with tarfile.open(folder / f"{number:05}.tar", "w") as tar:
            for i in range(4):
                for name, data in ((f"{i:09}.jpg", jpeg(i)), (f"{i:09}.json", json.dumps({"caption": "c"}).encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    (folder / "shards.txt").write_text("".join(f"file://{folder}/{number:05}.tar\n" for number in range(2)))
    return folder / "shards.txt"


def hf_rows():
    return {"image": [draw(n) for n in range(7)], "text": [f"Circle {n}." for n in range(7)]}


def hf_dataset():
    import datasets

    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    return datasets.Dataset.from_dict(hf_rows(), features=features)


def hf_saved(folder):
    hf_dataset().select([6, 5, 4, 3, 2]).save_to_disk(folder, num_shards=2)
    return folder


def hf_parquet(folder):
    folder.mkdir()
    hf_dataset().to_parquet(folder / "train-00000-of-00001.parquet")
    return folder / "train-00000-of-00001.parquet"


def hf_messages(folder):
    """Conversations with lists of images, as trl's vision data sets have them; one row has none."""
    import datasets

    turn = {"role": datasets.Value("string"), "content": datasets.Value("string")}
    features = datasets.Features({"messages": [turn], "images": datasets.Sequence(datasets.Image())})
    said = [{"role": "user", "content": "<image><image>?"}, {"role": "assistant", "content": "Two."}]
    rows = {"messages": [said, [said[0] | {"content": "Hi"}, said[1]]], "images": [[draw(0), draw(1)], []]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder.with_suffix(".parquet"))
    return folder.with_suffix(".parquet")


def hf_dict(folder):
    import datasets

    datasets.DatasetDict({"train": hf_dataset(), "test": hf_dataset()}).save_to_disk(folder)
    return folder


def said(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def pandas_csv(file, captions, separator):
    import pandas

    write_images(file.parent, len(captions))
    names = [f"{n:012}.jpg" for n in range(len(captions))]
    pandas.DataFrame({"image": names, "caption": captions}).to_csv(file, sep=separator, index=False)


def karpathy_splits(folder):
    """Lists in JSON and, as pandas writes them, in Python."""
    write_images(folder)
    with open(folder / "annotations.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["raw", "split", "filename"])
        for n, split in enumerate(["train", "train", "val"]):
            texts = [f"of {split}"] * 2
            writer.writerow([json.dumps(texts) if n else str(texts), split, f"{n:012}.jpg"])
    return folder / "annotations.csv"


def hub_folder(folder):
    import datasets

    folder.mkdir()
    for split, name in (("train", "train"), ("val", "validation")):
        features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
        rows = {"image": [draw(n) for n in range(2)], "text": [f"of {split}"] * 2}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{name}-00000-of-00001.parquet")
    return folder


def hf_paths(folder):
    """A table whose images are files, which it does not hold."""
    write_images(folder / "images", 3)
    rows = [{"image": {"bytes": None, "path": f"{n:012}.jpg"}, "text": f"Circle {n}."} for n in range(3)]
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    schema = pyarrow.schema([("image", kind), ("text", pyarrow.string())])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), folder / "paths.parquet")
    return folder / "paths.parquet", folder / "images"


def hf_mapped(folder):
    import datasets

    datasets.load_from_disk(str(hf_saved(folder))).map(lambda row: {"text": "mapped"})  # writes a cache beside the data
    assert list(folder.glob("cache-*.arrow"))
    return folder


def img2dataset_files(folder):
    """As img2dataset writes with output_format=files."""
    (folder / "00000").mkdir(parents=True)
    for n in range(2):
        (folder / "00000" / f"{n:09}.jpg").write_bytes(jpeg(n))
        (folder / "00000" / f"{n:09}.txt").write_text(f"c{n}")
        (folder / "00000" / f"{n:09}.json").write_text(json.dumps({"caption": f"c{n}", "url": "u", "key": f"{n:09}"}))
    rows = [{"url": "u", "caption": f"c{n}", "key": f"{n:09}", "status": "success"} for n in range(2)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "00000.parquet")
    (folder / "00000_stats.json").write_text("{}")
    return folder
