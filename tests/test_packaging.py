"""``pip install .``: the wheel has every file, and its commands work in a folder far from the checkout."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from email import message_from_bytes
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

from quickstart import scenes

ROOT = Path(__file__).parents[1]
EXAMPLES = ("train_configs", "eval_configs", "prompts")
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "--isolated")
# Runs the commands that the standard input lists without the packages of the extra "serve"; all in this process, as
# importing takes the most time.
DRIVER = """
import json, sys
from importlib.metadata import distribution
from packaging.requirements import Requirement
for requirement in map(Requirement, distribution("minigpt4").requires):
    if requirement.marker and requirement.marker.evaluate({"extra": "serve"}):
        sys.modules[requirement.name] = None
starts = {point.name: point.load() for point in distribution("minigpt4").entry_points}
for command in json.load(sys.stdin):
    sys.argv = command
    print("$", command[0], flush=True)
    try:
        starts[command[0]]()
    except SystemExit as ending:
        print(ending.code)
import minigpt4
print("$ from", minigpt4.__path__[0])
"""


def tracked(*places):
    listed = subprocess.run(["git", "ls-files", *places], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.splitlines() if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, as building leaves folders behind."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in tracked("minigpt4", *EXAMPLES, "*.toml", "LICENSE", "README.md", "requirements", ":(glob)*.py"):
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "source" / name)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder)
    subprocess.run([*PIP, "wheel", ".", *options], cwd=folder / "source", check=True)
    (file,) = folder.glob("*.whl")
    return file


def test_the_wheel_has_every_file_and_no_other(wheel):
    expected = {*tracked("minigpt4")} | {f"minigpt4/commands/{name}" for name in tracked(":(glob)*.py")}
    expected |= {f"minigpt4/examples/{name}" for name in tracked(*EXAMPLES)}
    expected.remove("minigpt4/commands/__init__.py")  # leads to the programs of a checkout
    with ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if ".dist-info/" not in name} == expected


def test_the_extras_are_the_files_of_requirements(wheel):
    with ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = message_from_bytes(archive.read(name))
    assert metadata.get_all("Provides-Extra") == ["npu", "serve", "eval", "dev"]
    found = {}
    for line in metadata.get_all("Requires-Dist"):
        requirement = Requirement(line)
        extra = re.findall(r'extra == "(\w+)"', str(requirement.marker)) or ["core"]
        found.setdefault(extra[0], set()).add(f"{requirement.name}{requirement.specifier}")
    for extra, packages in found.items():
        lines = (ROOT / "requirements" / f"{extra}.txt").read_text().splitlines()
        wanted = [Requirement(line) for line in lines if not line.startswith("#")]
        assert packages == {f"{requirement.name}{requirement.specifier}" for requirement in wanted}
    assert found.keys() == {"core", "npu", "serve", "eval", "dev"}


def test_an_installed_copy_checks_trains_answers_and_evaluates_in_another_folder(wheel, tmp_path):
    installed, folder = tmp_path / "installed", tmp_path / "folder"
    subprocess.run(
        [*PIP, "install", "--no-deps", "--no-index", "--no-compile", "--target", installed, wheel], check=True
    )
    shutil.copytree(installed / "minigpt4" / "examples", folder)  # as README.md says
    (folder / "quickstart").mkdir()
    (folder / "quickstart" / "weights").symlink_to(ROOT / "quickstart" / "weights")
    scenes.write_alignment(folder / "align", num_scenes=4, seed=2)
    (folder / "vizwiz.json").write_text(
        json.dumps([{"image": "0.jpg", "question": "What?", "answers": [{"answer": "a cube"}]}])
    )

    config, common = "eval_configs/quickstart_eval.yaml", ["run.device=cpu", "model.ckpt=null"]
    storage = "datasets.cc_sbu_align.build_info.storage=align"
    options = ["--options", *common, storage]
    quick = [
        "run.max_epoch=1",
        "run.iters_per_epoch=1",
        "run.batch_size_train=2",
        "run.num_workers=0",
        "run.warmup_steps=0",
    ]
    places = ["evaluation_datasets.vizwiz.eval_file_path=vizwiz.json", "evaluation_datasets.vizwiz.max_new_tokens=3"]
    places += ["evaluation_datasets.vizwiz.img_path=align/image"]
    commands = [[f"minigpt4-{name}", "--help"] for name in ("train", "demo", "doctor", "evaluate")]
    commands += [
        ["minigpt4-doctor", "--cfg-path", config, "--samples", "2", *options],
        ["minigpt4-train", "--cfg-path", "train_configs/quickstart_stage2.yaml", *options, *quick],
        ["minigpt4-demo", "--cfg-path", config, "--image", "align/image/0.jpg", "--ask", "What?", "--greedy",
         "--max-new-tokens", "3", *options],
        ["minigpt4-demo", "--cfg-path", config, "--api", "--port", "0", *options],
        ["minigpt4-evaluate", "--cfg-path", config, "--dataset", "vizwiz", *options, *places],
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-P", "-c", DRIVER],
        input=json.dumps(commands), cwd=folder, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *helped, doctor, train, ask, api, evaluation, place = done.stdout.removeprefix("$ ").split("\n$ ")
    assert place == f"from {installed / 'minigpt4'}\n"
    assert all("--cfg-path" in text and text.endswith("\n0") for text in helped) and len(helped) == 4
    assert " 0 error; " in doctor
    assert len(list(folder.glob("output/**/checkpoint_0.pth"))) == 1, train
    assert ask.splitlines()[1]
    assert "fastapi halted; None in sys.modules; in a checkout: pip install '.[serve]'" in api
    assert "| vizwiz | vizwiz | 1 | accuracy |" in evaluation


def test_the_commands_of_an_editable_installation_are_the_programs_of_the_checkout():
    from minigpt4.commands import evaluate

    assert evaluate.__file__ == str(ROOT / "evaluate.py")


def test_ci_has_what_builds_a_wheel():
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert set(needed) <= set((ROOT / "requirements" / "dev.txt").read_text().splitlines())
