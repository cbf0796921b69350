"""The limits that keep the code readable: sizes of files and functions, and which package may import which."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_LIBRARY_LINES = 350, 60, 21_605
ALLOWED = {  # as docs/ARCHITECTURE.md lists it
    "common": set(),
    "processors": {"common"},
    "models": {"common"},
    "datasets": {"common", "models", "processors"},
    "tasks": {"common", "datasets"},
    "runners": {"common", "datasets", "models"},
    "conversation": {"common", "models"},
    "serve": {"common", "conversation"},
    "evaluation": {"common", "conversation", "datasets", "models", "serve"},
    "doctor": {"common", "conversation", "datasets", "models", "processors", "runners", "tasks"},
    "tools": {"common", "models", "processors", "tasks"},
}


def python_files():
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [file for name in listed.split() if (file := ROOT / name).is_file()]


FILES = python_files()


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_files_and_functions_are_short(file):
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno + 1 <= MAX_FUNCTION_LINES, node.name


def test_the_library_stays_small():
    lines = sum(len(file.read_text().splitlines()) for file in FILES if file.is_relative_to(ROOT / "minigpt4"))
    assert lines <= MAX_LIBRARY_LINES


def imported_packages(file):
    """Packages of the library that a file imports, at the top or inside functions."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "minigpt4":
            names = [node.module] if "." in node.module else [f"minigpt4.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("minigpt4.")]
        yield from (name.split(".")[1] for name in names)


@pytest.mark.parametrize("package", ALLOWED)
def test_packages_import_only_what_they_may(package):
    files = [file for file in FILES if file.is_relative_to(ROOT / "minigpt4" / package)]
    assert files
    for file in files:
        assert set(imported_packages(file)) - {package} <= ALLOWED[package], file


def test_only_one_module_names_accelerators():
    for file in FILES:
        if file.is_relative_to(ROOT / "minigpt4") and file.stem not in ("device", "torch_setup"):
            text = file.read_text(encoding="utf-8")
            assert "torch.cuda" not in text and "torch.npu" not in text and "import torch_npu" not in text, file
