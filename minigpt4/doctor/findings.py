"""The result of a check: a verdict, the evidence, and the remedy; as a table or as JSON."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from minigpt4.common.errors import UserError

OK, WARNING, ERROR = "ok", "warning", "error"
_SEE = " See docs/"


@dataclass
class Finding:
    """One line of the table; ``check`` is a YAML key where it is one, ``numbers`` are for programs (JSON only)."""

    check: str
    verdict: str
    evidence: str
    remedy: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)


def refused(check: str, error: UserError) -> Finding:
    """A UserError as a finding; its message says what is wrong and then, after a semicolon, what to do."""
    text, _, link = str(error).partition(_SEE)
    evidence, semicolon, remedy = text.rpartition("; ")
    if not semicolon:
        evidence, remedy = text, ""
    remedy = f"{remedy}{_SEE * bool(link)}{link}".strip()
    return Finding(check, ERROR, evidence.rstrip("."), remedy[:1].upper() + remedy[1:])


def collect(check: str, look: Callable[..., Finding | Sequence[Finding]], *args: Any) -> list[Finding]:
    """The findings of a check; a UserError is a finding too, and so is any other exception."""
    try:
        found = look(*args)
    except UserError as error:
        found = refused(check, error)
    except Exception as error:  # the other checks go on
        kind, message = type(error).__name__, str(error).strip().split("\n")[0][:200]
        found = Finding(check, WARNING, f"this could not be checked ({kind}: {message})", "Run it and read its log.")
    return [found] if isinstance(found, Finding) else list(found)


def worst(findings: Sequence[Finding]) -> str:
    """The worst verdict among findings."""
    return max((f.verdict for f in findings), key=(OK, WARNING, ERROR).index, default=OK)


def as_json(findings: Sequence[Finding], **rest: Any) -> str:
    """All findings and further values as one JSON object."""
    rows = [asdict(finding) for finding in findings]
    return json.dumps({"verdict": worst(findings), **rest, "findings": rows}, indent=2, ensure_ascii=False)


def as_table(findings: Sequence[Finding]) -> str:
    """All findings as a table, one line each."""
    width = max(len(f.check) for f in findings)
    lines = (f"{f.verdict:<8} {f.check:<{width}}  {f.evidence}" + f" -> {f.remedy}" * bool(f.remedy) for f in findings)
    return "\n".join(lines)


def size(num_bytes: float) -> str:
    """Bytes with a unit."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.3g} {unit}"
    return f"{num_bytes:.0f} bytes"
