"""YAML files and --options that no sane person writes: a line that says what is wrong, in bounded time and memory."""

import os
from argparse import Namespace
from pathlib import Path

import pytest
from confined import told

from minigpt4.common.config import Config
from minigpt4.common.errors import UserError

pytestmark = pytest.mark.usefixtures("confined")
HEAD = "model: {arch: mini_gpt4, model_type: pretrain_vicuna}\n"


def with_model(**keys):
    return HEAD.replace("}", "".join(f", {key}: {value}" for key, value in keys.items()) + "}")


def laughs(first, again, opening, closing):
    """Ten levels of ten references: 10^10 nodes."""
    lines = [f"  a0: &a0 {opening}{first}{closing}"]
    for i in range(1, 10):
        parts = ", ".join(again.format(k=k, i=i - 1) for k in range(10))
        lines.append(f"  a{i}: &a{i} {opening}{parts}{closing}")
    return HEAD + "run:\n" + "\n".join(lines)


FILES = {
    # YAML that is none, or too much
    "empty": ("", "model.arch is not set"),
    "comment": ("# nothing", "model.arch is not set"),
    "null": ("null", "model.arch is not set"),
    "number": ("5", "YAML"),
    "text": ("just words", "section"),
    "list": ("- a", "sections"),
    "unclosed": ("model: {arch: mini_gpt4", "YAML"),
    "bomb of lists": (laughs("x", "*a{i}", "[", "]"), "YAML", "10000"),
    "bomb of maps": (laughs("k: x", "k{k}: *a{i}", "{", "}"), "YAML", "10000"),
    "bomb of merges": (HEAD + "run: {a: &a {b: 1}, c: {<<: [" + "*a, " * 20_000 + "*a]}}", "YAML"),
    "cycle of maps": (HEAD + "run: &r {a: *r}", "YAML", "recursive"),
    "cycle of lists": (HEAD + "run: {train_splits: &r [*r]}", "YAML", "recursive"),
    "cycle of merges": (HEAD + "run: &r {<<: *r}", "YAML"),
    "unknown alias": (HEAD + "run: {task: *nothing}", "YAML", "undefined alias"),
    "tag that runs code": (HEAD + "run: !!python/object/apply:os.system ['touch ran']", "YAML", "python/object"),
    "tag of a module": (HEAD + "run: !!python/module:antigravity x", "YAML"),
    "tag of one's own": (HEAD + "run: !mine {a: 1}", "YAML", "!mine"),
    "tag of a set": (HEAD + "run: {task: !!set {a, b}}", "YAML", "set"),
    "tag of pairs": (HEAD + "run: {task: !!pairs [a: 1]}", "run.task"),
    "binary": (HEAD + "run: {task: !!binary 'aGk='}", "run.task", "bytes"),
    "bad binary": (HEAD + "run: {task: !!binary x}", "YAML"),
    "tab": (HEAD + "run:\n\ttask: a", "YAML"),
    "odd indentation": (HEAD + "run:\n  a: 1\n b: 2", "YAML"),
    "deep list": (HEAD + "run: {train_splits: " + "[" * 5000 + "]" * 5000 + "}", "YAML"),
    "half deep list": (HEAD + "run: {train_splits: " + "[" * 400 + "]" * 400 + "}", "YAML"),
    "deep map": (HEAD + "run: " + "{a: " * 5000 + "}" * 5000, "YAML"),
    "deep indentation": (HEAD + "".join(" " * i + "a:\n" for i in range(1200)), "YAML"),
    "two documents": (HEAD + "---\n" + HEAD, "YAML"),
    "section twice": (HEAD + HEAD, "YAML", "duplicate"),
    "key twice": (HEAD + "run: {seed: 1, seed: 2}", "YAML", "duplicate"),
    "two megabytes": (HEAD + "#" * 2**21, "2,0", "1,048,576"),
    "zero byte": (HEAD + 'run: {task: "\0"}', "YAML"),
    "latin-1": ((HEAD + "run: {task: caf\xe9}").encode("latin-1"), "UTF-8", "0xe9 in line"),
    "utf-16": (HEAD.encode("utf-16"), "UTF-8", "0xff in line 1"),
    "half a surrogate pair": (HEAD + 'run: {task: "\\ud800"}', "YAML"),
    "number of 5000 digits": (HEAD + "run: {max_epoch: " + "9" * 5000 + "}", "YAML", "digits"),
    # keys
    "unknown section": (HEAD + "runs: {}", "'runs'", "Did you mean 'run'"),
    "unknown key": (HEAD + "run: {max_epochs: 1}", "run.max_epochs", "'max_epoch'"),
    "null as a key": (HEAD + "run: {null: 1}", "YAML", "key"),
    "list as a key": (HEAD + "run: {[1]: 2}", "YAML"),
    "number as a key": (HEAD + "run: {1: 2}", "run.1"),
    "line end in a key": (HEAD + 'run: {"a\\nb": 1}', "run.a b"),
    "escape in a key": (HEAD + 'run: {"a\\e[31m": 1}', "run.a\\x1b[31m"),
    "key of 100,000 letters": (HEAD + "run: {? " + "a" * 100_000 + " : 1}", "run.aaa", "[…]"),
    # values
    "section as a number": (HEAD + "run: 5", "'run'", "5"),
    "section as a list": (HEAD + "run: [1]", "'run'"),
    "sections as a text": (HEAD + "datasets: laion", "'datasets'"),
    "data set as a number": (HEAD + "datasets: {laion: 5}", "datasets.laion", "5"),
    "data set as a list": (HEAD + "datasets: {laion: [1]}", "datasets.laion"),
    "data set of a list type": (HEAD + "datasets: {laion: {type: [1]}}", "datasets.laion.type"),
    "data set as null": (HEAD + "datasets: {null: {}}", "YAML"),
    "data set that is none": (HEAD + "datasets: {5: {}}", "builder", "'5'", "laion"),
    "build_info as a number": (HEAD + "datasets: {laion: {build_info: 5}}", "laion.build_info", "5", "storage"),
    "arch as a list": ("model: {arch: [1], model_type: x}", "[1]", "mini_gpt4"),
    "arch as a section": ("model: {arch: {a: 1}, model_type: x}", "mini_gpt4"),
    "arch as a number": ("model: {arch: 1, model_type: x}", "'1'", "mini_gpt4"),
    "type as a list": ("model: {arch: mini_gpt4, model_type: [1]}", "model_type", "pretrain_vicuna"),
    "type as a section": ("model: {arch: mini_gpt4, model_type: {a: 1}}", "model_type", "pretrain_vicuna"),
    "list where one of several is expected": (with_model(vit_precision="[1]"), "model.vit_precision", "fp16"),
    "section where one of several is expected": (with_model(vit_precision="{a: 1}"), "model.vit_precision", "fp16"),
    "list where a section is expected": (with_model(vit_config="[1]"), "model.vit_config", "depth"),
    "text where a number is expected": (HEAD + "run: {max_epoch: two}", "run.max_epoch", "'two'", "int"),
    "fraction where a count is expected": (HEAD + "run: {max_epoch: 1.5}", "run.max_epoch", "1.5", "int"),
    "NaN": (HEAD + "run: {init_lr: .nan}", "run.init_lr", "nan", "0 or more"),
    "infinity": (HEAD + "run: {init_lr: .inf}", "run.init_lr", "inf", "0 or more"),
    "below zero": (HEAD + "run: {max_epoch: -1}", "run.max_epoch", "-1", "0 or more"),
    "batch of none": (HEAD + "run: {batch_size_train: 0}", "run.batch_size_train", "0", "1 or more"),
    "picture of no size": (with_model(image_size=0), "model.image_size", "0", "1 or more"),
    "blank value": (HEAD + "run:\n  warmup_steps:\n", "run.warmup_steps is blank", "0"),
    "blank text": (with_model(end_sym=""), "model.end_sym is blank"),
    "blank list": (HEAD + "run: {valid_splits: }", "run.valid_splits is blank"),
    "blank section below": (HEAD + "datasets: {laion: {build_info: }}", "datasets.laion.build_info is blank"),
    "list of numbers": (HEAD + "run: {train_splits: [1]}", "run.train_splits", "[1]", "list"),
    "number for a text": (HEAD + "run: {output_dir: 20241126}", "run.output_dir", "20241126", "text (in quotes)"),
    "removed key": (HEAD + "run: {resize_on_device: true}", "Remove run.resize_on_device", "workers"),
    "benchmark as a number": (HEAD + "evaluation_datasets: {gqa: 5}", "evaluation_datasets.gqa", "5"),
    "value of a megabyte": (HEAD + "run: {max_epoch: " + "x" * 1_000_000 + "}", "run.max_epoch", "int", "[…]"),
    # references
    "reference to itself": (HEAD + "run: {task: '${run.task}'}", "YAML", "task"),
    "references in a circle": (HEAD + "run: {task: '${run.runner}', runner: '${run.task}'}", "YAML"),
    "reference to nothing": (HEAD + "run: {task: '${run.nothing}'}", "YAML", "nothing"),
    "reference without end": (HEAD + "run: {task: '${run.task'}", "YAML"),
    "reference to a missing variable": (HEAD + "run: {task: '${oc.env:NOT_THERE_AT_ALL}'}", "NOT_THERE_AT_ALL"),
    "unknown resolver": (HEAD + "run: {task: '${shell:ls}'}", "shell"),
    "arch that refers to itself": ("model: {arch: '${model.arch}', model_type: x}", "YAML", "arch"),
    "value still to be given": (HEAD + "run: {task: '???'}", "run.task"),
}
OPTIONS = {
    "no value": (["run.max_epoch"], "--options", "pairs"),
    "three words": (["run.max_epoch", "2", "run.seed"], "--options", "3 words"),
    "mixed forms": (["run.max_epoch=2", "run.seed", "3"], "--options", "'run.seed'"),
    "no key": (["=5"], "--options", "'=5'"),
    "no section": (["max_epoch=5"], "--options", "section.key=value"),
    "dot": ([".=5"], "section ''"),
    "dot in front": ([".run=5"], "section ''"),
    "dot behind": (["run.=5"], "no key run."),
    "two dots": (["run..x=5"], "no key run."),
    "section in place of a key": (["run=5"], "--options", "'run=5'"),
    "empty word": ([""], "--options"),
    "blank": ([" "], "--options"),
    "unknown key": (["run.max_epochs=5"], "run.max_epochs", "Did you mean 'max_epoch'"),
    "blank number": (["run.max_epoch="], "run.max_epoch is blank", "1"),
    "blank section": (["model.vit_config="], "model.vit_config is blank"),
    "null where null has no meaning": (["run.seed=null"], "run.seed is blank", "42"),
    "text that nobody registered": (["run.task={}"], "run.task is '{}'", "image_text_pretrain"),
    "bytes that are not UTF-8": (["run.output_dir=\udcff"], "--options"),
    "unknown section": (["runs.max_epoch=5"], "'runs'", "Did you mean 'run'"),
    "unknown data set": (["datasets.laionn.sample_ratio=5"], "'laionn'", "laion"),
    "data set without name": (["datasets.=5"], "expected keys and values"),
    "number for a data set": (["datasets.laion=5"], "datasets.laion", "5"),
    "number for a section below": (["datasets.laion.build_info=5"], "datasets.laion.build_info", "5"),
    "below a text": (["model.arch.x=1"], "model", "mini_gpt4"),
    "below a number": (["run.max_epoch.x=2"], "run.max_epoch", "int"),
    "index of a number": (["run.max_epoch[0]=5"], "run.max_epoch", "int"),
    "index of a list": (["run.train_splits[9]=a"], "run.train_splits", "list"),
    "bracket as a key": (["run.[=1"], "no key run."),
    "bracket behind a key": (["run.task[=1"], "run.task"),
    "section in brackets": (["run[task]=1"], "--options", "section.key=value"),
    "open list": (["run.train_splits=["], "--options", "train_splits=["),
    "open map": (["run.seed={"], "--options", "seed={"),
    "open quote": (["run.seed='a"], "--options"),
    "map in a line": (["run.seed=a: b: c"], "--options"),
    "tab": (["run.seed=\t"], "--options"),
    "zero byte": (["run.task=\0"], "--options"),
    "half a surrogate pair": (["run.task=\ud800"], "--options"),
    "line end": (["run.a\nb=1"], "run.a b"),
    "tag": (["run.seed=!!python/name:os.system"], "--options", "python/name"),
    "cycle": (["run.train_splits=&a [*a]"], "--options", "recursive"),
    "unknown alias": (["run.seed=*a"], "--options"),
    "deep value": (["run.train_splits=" + "[" * 5000 + "]" * 5000], "--options"),
    "deep key": (["run." + "a." * 5000 + "b=1"], "--options"),
    "bomb": (["run.train_splits=[&a [x" + ",x" * 99 + "], &b [" + "*a," * 200 + "]]"], "--options", "10000"),
    "number of 5000 digits": (["run.max_epoch=" + "9" * 5000], "--options", "digits"),
    "text for a number": (["run.max_epoch=two"], "run.max_epoch", "'two'"),
    "number for a switch": (["run.amp=1"], "run.amp", "1", "bool"),
    "text for a list": (["run.train_splits=train"], "run.train_splits", "list"),
    "list for one of several": (["model.vit_precision=[1]"], "model.vit_precision", "fp16"),
    "below zero": (["run.num_workers=-1"], "run.num_workers", "-1"),
    "NaN": (["run.init_lr=.nan"], "run.init_lr", "nan"),
    "reference to nothing": (["run.task=${run.nothing}"], "nothing"),
    "reference to itself": (["run.task=${run.task}"], "task"),
    "reference without end": (["run.task=${"], "--options"),
}


def load(path, options=None):
    return Config(Namespace(cfg_path=str(path), options=options)).check()


@pytest.mark.parametrize("case", FILES)
def test_file(tmp_path, case):
    content, *words = FILES[case]
    path = tmp_path / "run.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    told(lambda: load(path), *words)


@pytest.mark.parametrize("case", OPTIONS)
def test_option(tmp_path, case):
    options, *words = OPTIONS[case]
    path = tmp_path / "run.yaml"
    path.write_text(HEAD + "run: {max_epoch: 2}\ndatasets: {laion: {}}\n")
    told(lambda: load(path, options), *words)


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "absent", "zero byte"])
def test_what_is_no_file(tmp_path, kind):
    path = {"device": Path("/dev/zero"), "zero byte": Path("a\0b.yaml")}.get(kind, tmp_path / "run.yaml")
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    told(lambda: load(path), "no configuration file", "--cfg-path")


def test_ordinary_aliases_and_references_go_on_working(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(HEAD + "run: {train_splits: &s [train], valid_splits: *s, seed: 3, max_epoch: '${run.seed}'}")
    assert load(path).run_cfg.valid_splits == ["train"] and load(path).run_cfg.max_epoch == 3


def test_a_message_is_one_line_of_bounded_length():
    message = str(UserError("a\nb\x1b[31m\u202e\ud800 " + "x" * 10_000 + " the end"))
    assert message.startswith("a b\\x1b[31m\\u202e\\ud800 x") and message.endswith("the end")
    assert len(message) <= 1500 and str(UserError(message)) == message
