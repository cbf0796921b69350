"""From BLIP's annotation files to what img2dataset gets."""

import csv
import importlib.util
import json
import os
import random
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "dataset"
_spec = importlib.util.spec_from_file_location("convert_to_tsv", FOLDER / "convert_to_tsv.py")
script = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(script)


def convert(tmp_path: Path, text: str | bytes) -> list[list[str]]:
    source, target = tmp_path / "list.json", tmp_path / "list.tsv"
    source.write_bytes(text.encode() if isinstance(text, str) else text)
    script.convert(source, target)
    with target.open(encoding="utf-8", newline="") as rows:
        return list(csv.reader(rows, delimiter="\t"))


def test_tsv_has_header_and_one_line_a_pair(tmp_path):
    entries = [
        {"caption": "a cat on a mat", "url": "http://a.example/1.jpg"},
        {"caption": "tabs\tand\nlines\r\nin  it ", "url": " http://a.example/2.jpg\n"},
        {"caption": 'he said "hello"', "url": "http://a.example/3.jpg?x=1,2", "source": "other keys are left out"},
        {"caption": "猫在垫子上 \u2028 é", "url": "http://a.example/4.jpg"},
    ]
    assert convert(tmp_path, json.dumps(entries)) == [
        ["caption", "url"],
        ["a cat on a mat", "http://a.example/1.jpg"],
        ["tabs and lines in it", "http://a.example/2.jpg"],
        ['he said "hello"', "http://a.example/3.jpg?x=1,2"],
        ["猫在垫子上 é", "http://a.example/4.jpg"],
    ]
    lines = (tmp_path / "list.tsv").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 5 and lines[0] == "caption\turl" and lines[3].startswith('"he said ""hello"""\t')


@pytest.mark.parametrize("chunk", [128, 200, 1 << 22])
def test_entries_across_chunks(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(script, "CHUNK", chunk)
    rng = random.Random(chunk)
    entries = [{"caption": "] } , [ " + "x" * rng.randrange(20), "url": f"http://u/{i}"} for i in range(200)]
    rows = convert(tmp_path, "\ufeff " + json.dumps(entries, indent=rng.choice([None, 1])))
    assert [row[1] for row in rows[1:]] == [entry["url"] for entry in entries]


def test_empty_captions_are_counted_and_broken_characters_replaced(tmp_path, capsys):
    source = tmp_path / "list.json"
    source.write_text('[{"caption": " ", "url": "http://u"}, {"caption": "half \\ud83d", "url": "http://u"}]')
    assert script.main([str(source), str(tmp_path / "list.tsv")]) == 0
    assert "1 rows; 1 entries" in capsys.readouterr().out
    assert (tmp_path / "list.tsv").read_text() == "caption\turl\nhalf ?\thttp://u\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"annotations": []}', "expected a JSON list"),
        ("", "expected a JSON list"),
        ("<html>not found</html>", "expected a JSON list"),
        ("[]", "holds no entry"),
        ('[{"caption": "a", "url": "http://u"}, {"caption": "b", "ur', "truncated at entry 1"),
        ('[{"caption": "a", "url": "http://u"}, {"caption": b, "url": "http://u"}, ' + " " * 200 + "]", "entry 1"),
        ('[{"caption": "a", "image": "x.jpg"}]', "entry 0 is"),
        ('[{"caption": ["a"], "url": "http://u"}]', "entry 0 is"),
        ('["a"]', "entry 0 is a"),
        (b'[{"caption": "\xff", "url": "http://u"}]', "not UTF-8"),
    ],
)
def test_wrong_input_is_told(tmp_path, monkeypatch, capsys, text, message):
    monkeypatch.setattr(script, "CHUNK", 128)
    source, target = tmp_path / "list.json", tmp_path / "list.tsv"
    source.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert script.main([str(source), str(target)]) == 1
    error = capsys.readouterr().err
    assert message in error and str(source) in error
    assert list(tmp_path.iterdir()) == [source]


def test_missing_input_is_told(tmp_path, capsys):
    assert script.main([str(tmp_path / "none.json"), str(tmp_path / "list.tsv")]) == 1
    assert "none.json" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "stem"), [("laion", "laion"), ("cc_sbu", "ccs")])
def test_download_script(tmp_path, name, stem):
    folder, commands = tmp_path / "annotations here", tmp_path / "bin"
    folder.mkdir()
    commands.mkdir()
    (folder / f"{stem}_synthetic_filtered_large.json").write_text('[{"caption": "a", "url": "http://u"}]')
    tool = commands / "img2dataset"
    tool.write_text('#!/bin/sh\nfor part in "$@"; do echo "$part"; done\n')
    tool.chmod(0o755)
    env = os.environ | {"PATH": f"{commands}:{os.environ['PATH']}"}
    call = ["bash", str(FOLDER / f"download_{name}.sh")]
    assert subprocess.run(call, env=env, capture_output=True).returncode == 2
    call += [str(folder), str(tmp_path / "out put"), "--retries", "2"]
    result = subprocess.run(call, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    parts = result.stdout.splitlines()[1:]  # after what the conversion says
    tsv = folder / f"{stem}_synthetic_filtered_large.tsv"
    assert parts == [
        *("--url_list", str(tsv), "--input_format", "tsv", "--url_col", "url", "--caption_col", "caption"),
        *("--output_format", "webdataset", "--output_folder", str(tmp_path / "out put"), "--image_size", "256"),
        *("--processes_count", "16", "--thread_count", "128", "--retries", "2"),
    ]
    assert tsv.read_text() == "caption\turl\na\thttp://u\n"
