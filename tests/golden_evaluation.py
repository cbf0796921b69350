"""Reads the golden files of the original metric programs from tests/golden/evaluation.tar.xz."""

import functools
import json
import tarfile

from golden_data import GOLDEN


@functools.cache
def members():
    with tarfile.open(GOLDEN / "evaluation.tar.xz") as archive:
        return {member.name: archive.extractfile(member).read().decode() for member in archive if member.isfile()}


def read_text(name):
    return members()[name]


def read_json(name):
    return json.loads(read_text(name))


def read_rows(name):
    return [json.loads(line) for line in read_text(name).splitlines()]
