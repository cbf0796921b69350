"""Compiles the emulated NPU and lays it out as an installed package."""

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch
from torch.utils import cpp_extension

_HERE = Path(__file__).parent
_LIBRARY = "_emulated_npu.so"
_METADATA = "Metadata-Version: 2.1\nName: emulated_npu\nVersion: 0\nSummary: An emulated Ascend NPU for tests\n"
# Not "emulated_npu": where tests/ is on the path too, that name is the package of this file.
_MODULE = "emulated_npu_device"
_ENTRY_POINTS = f"[torch.backends]\nemulated_npu = {_MODULE}:autoload\n"


def install(folder: Path) -> None:
    """Writes into a folder what makes ``import torch`` know an npu, once the folder is on ``PYTHONPATH``.

    Args:
        folder: made where it is not there.
    """
    info = folder / "emulated_npu-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    _write(folder / f"{_MODULE}.py", (_HERE / "emulated_npu.py").read_bytes())
    _write(folder / _LIBRARY, compiled().read_bytes())
    _write(info / "METADATA", _METADATA.encode())
    _write(info / "entry_points.txt", _ENTRY_POINTS.encode())


def compiled() -> Path:
    """The compiled extension for this source, PyTorch and Python, compiled only where it is not there yet."""
    source = _HERE / "emulated_npu.cpp"
    versions = f"{torch.__version__} {torch.__file__} {sys.version}"
    key = hashlib.sha256(source.read_bytes() + versions.encode()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"emulated_npu-{os.getuid()}-{key}" / _LIBRARY
    if not library.exists():
        library.parent.mkdir(mode=0o700, exist_ok=True)
        draft = _draft(library)
        subprocess.run(_command(source, draft), check=True)
        draft.replace(library)
    return library


def compiler() -> str | None:
    """The C++ compiler that would be used, None where there is none."""
    return shutil.which(os.environ.get("CXX", "g++"))


def _draft(path: Path) -> Path:
    """A name of this process's own. Others may write the same file: whole drafts take its place, the last one stays."""
    return path.with_name(f"{path.name}.{os.getpid()}")


def _write(path: Path, content: bytes) -> None:
    _draft(path).write_bytes(content)
    _draft(path).replace(path)


def _command(source: Path, library: Path) -> list[str]:
    includes = [*cpp_extension.include_paths(), sysconfig.get_paths()["include"]]
    return [
        compiler() or "g++",
        *("-std=c++20", "-O1", "-fPIC", "-shared", "-fvisibility=hidden"),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *(f"-I{path}" for path in includes),
        str(source),
        *("-o", str(library)),
        *(f"-L{path}" for path in cpp_extension.library_paths()),
        *("-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"),
    ]


if __name__ == "__main__":
    install(Path(sys.argv[1]))
