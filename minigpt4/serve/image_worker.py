"""Decodes images for ``image_decoder`` in a process of its own, with limits on memory and CPU time.

A request is a line of JSON, ``{"num_bytes": n, "name": …, "size": [w, h], a side, or null, "seconds": s}``, and the n
bytes of a file; the answer is ``{"size": [w, h]}`` and the RGB pixels, or ``{"error": …}``. Run by its path: the import
of ``minigpt4`` would load torch, which takes longer than most images.
"""

import json
import sys
import time
import types
from pathlib import Path
from typing import Any

MAX_BYTES = 2**31  # of address space; an image of 100 million pixels with transparency takes three quarters


def limit(kind: str, amount: int) -> None:
    """Sets a limit of this process, such as ``RLIMIT_AS``, where the system has it."""
    try:
        import resource

        resource.setrlimit(getattr(resource, kind), (amount, resource.getrlimit(getattr(resource, kind))[1]))
    except (ImportError, AttributeError, ValueError, OSError):
        return


def decode(request: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    """The answer to a request and the pixels."""
    from PIL import Image

    from minigpt4.common.errors import UserError
    from minigpt4.common.images import read_image

    try:
        image = read_image(data, request["name"])
        if isinstance(request["size"], int):
            image.thumbnail((request["size"], request["size"]))
        elif request["size"]:
            image = image.resize(request["size"], Image.Resampling.BICUBIC)
        return {"size": image.size}, image.tobytes()
    except UserError as error:
        return {"error": str(error)}, b""
    except MemoryError:
        return {"error": f"{request['name']} takes too much memory to decode; make it smaller."}, b""


def main() -> None:
    """Answers requests until the end of the input."""
    package = types.ModuleType("minigpt4")
    package.__path__ = [str(Path(__file__).parents[1])]
    sys.modules["minigpt4"] = package
    import minigpt4.common.images  # noqa: F401

    limit("RLIMIT_AS", MAX_BYTES)
    print("ready", flush=True)
    while line := sys.stdin.buffer.readline():
        request = json.loads(line)
        # The process that kills this one after the seconds may have been killed itself.
        limit("RLIMIT_CPU", int(time.process_time() + request["seconds"]) + 2)
        answer, pixels = decode(request, sys.stdin.buffer.read(request["num_bytes"]))
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n" + pixels)
        sys.stdout.flush()


if __name__ == "__main__":
    main()
