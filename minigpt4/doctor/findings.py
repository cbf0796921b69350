"""What a check found: a verdict, the evidence, and the remedy; as a table or as JSON."""

import json
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from minigpt4.common.errors import UserError

OK, WARNING, MISTAKE = "ok", "warning", "mistake"
_SEE = " See docs/"


@dataclass
class Finding:
    """One line of the table.

    Args:
        check: what was looked at, a YAML key where it is one.
        verdict: ok, warning or mistake.
        evidence: what was seen there.
        remedy: what to do, empty where there is nothing.
        numbers: for programs, in the JSON only.
        refusal: the message with which the run itself would stop, where it would.
    """

    check: str
    verdict: str
    evidence: str
    remedy: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)
    refusal: str = ""


def refused(check: str, error: UserError) -> Finding:
    """The library's own refusal as a finding; it says what is wrong and then, behind a semicolon, what to do."""
    text, _, link = str(error).partition(_SEE)
    evidence, semicolon, remedy = text.rpartition("; ")
    if not semicolon:
        evidence, remedy = text, ""
    remedy = f"{remedy}{_SEE * bool(link)}{link}".strip()
    return Finding(check, MISTAKE, evidence.rstrip("."), remedy[:1].upper() + remedy[1:], refusal=str(error))


def collect(check: str, look: Callable[..., Finding | Sequence[Finding]], *args: Any) -> list[Finding]:
    """What a check finds; a refusal of the library is a finding too, and so is whatever else it raises."""
    try:
        found = look(*args)
    except UserError as error:
        found = refused(check, error)
    except Exception as error:  # the other checks have to go on
        kind, told = type(error).__name__, str(error).strip().split("\n")[0][:200]
        found = Finding(check, WARNING, f"this could not be checked ({kind}: {told})", "Run it and read its messages.")
    return [found] if isinstance(found, Finding) else list(found)


def worst(findings: Sequence[Finding]) -> str:
    """The worst verdict among findings."""
    return max((f.verdict for f in findings), key=(OK, WARNING, MISTAKE).index, default=OK)


def as_json(findings: Sequence[Finding], **rest: Any) -> str:
    """All findings, and whatever else is told, as one JSON object."""
    rows = [{key: value for key, value in asdict(f).items() if key != "refusal"} for f in findings]
    return json.dumps({"verdict": worst(findings), **rest, "findings": rows}, indent=2, ensure_ascii=False)


def as_table(findings: Sequence[Finding], width: int | None = None) -> str:
    """All findings as a table: on a terminal long cells are broken over lines, elsewhere each finding is one line."""
    width = width or (shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000)
    names, verdicts = max(len(f.check) for f in findings), len(MISTAKE)
    room = max(40, width - names - verdicts - 4)
    lines = []
    for finding in findings:
        told = finding.evidence + (f" -> {finding.remedy}" if finding.remedy else "")
        cells = list(_wrapped(told, room))
        lines.append(f"{finding.verdict:<{verdicts}}  {finding.check:<{names}}  {cells[0]}")
        lines += [f"{'':<{verdicts + names + 4}}{cell}" for cell in cells[1:]]
    return "\n".join(lines)


def _wrapped(text: str, width: int) -> Iterator[str]:
    yield from textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]


def size(num_bytes: float) -> str:
    """Bytes for people."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.3g} {unit}"
    return f"{num_bytes:.0f} bytes"
