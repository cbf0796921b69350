"""English and Chinese pages have the same structure, commands, keys and links; links of all pages lead somewhere."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENGLISH_ONLY = {  # for developers, and records; everything else that users read has a Chinese page
    "ACKNOWLEDGEMENTS.md",
    "benchmarks/RESULTS.md",
    "docs/ARCHITECTURE.md",
}


def pages():
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split() if (ROOT / name).is_file()]


PAGES = pages()
CHINESE = [name for name in PAGES if name.endswith(".zh-CN.md")]
OURS = [name for name in PAGES if name in ENGLISH_ONLY or name.startswith("tests/")]
ENGLISH = [name for name in PAGES if name not in CHINESE and name not in OURS]


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def translated(name):
    return name.removesuffix(".md") + ".zh-CN.md"


def split_sections(text):
    """A page as a list of sections [heading, text without fenced blocks, fenced blocks without comments]."""
    sections, fence = [["", "", []]], None
    for line in text.splitlines():
        if line.strip().startswith("```"):
            if fence is None:
                fence = [line.strip()]
            else:
                sections[-1][2].append("\n".join(fence))
                fence = None
        elif fence is not None:
            code = re.sub(r"(^|\s+)# .*", "", line).strip()  # comments are translated
            fence += [code] if code else []
        elif re.match("#+ ", line):
            sections.append([line, "", []])
        else:
            sections[-1][1] += line + "\n"
    return sections


def code_spans(text):
    return {" ".join(code.split()) for _, code in re.findall(r"(`+)(.+?)\1", text, re.DOTALL)}


def links(text):
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", text))


def targets(text):
    """Targets of links without language and place in the page, which differ between languages."""
    return {link if "://" in link else link.split("#")[0].replace(".zh-CN.md", ".md") for link in links(text)}


def figures(text):
    """Numbers with decimals, such as measurements; others may be words, and Chinese counts in 10,000."""
    return set(re.findall(r"\d+\.\d+(?! million)", re.sub(r"`[^`]*`|\]\([^)]*\)", "", text)))


def table_rows(text):
    return len(re.findall(r"^\s*\|", text, re.MULTILINE))


def differences(english, chinese):
    """Returns one line for each difference between a page and its translation that no translation explains."""
    ours, theirs = split_sections(english), split_sections(chinese)
    levels = [[heading.split(" ")[0] for heading, *_ in sections] for sections in (ours, theirs)]
    if levels[0] != levels[1]:
        return [f"headings: {[heading for heading, *_ in ours]} {[heading for heading, *_ in theirs]}"]
    found = []
    for (heading, text, fences), (_, translation, translated_fences) in zip(ours, theirs, strict=True):
        found += [f"{heading}: {a!r} {b!r}" for a, b in zip(fences, translated_fences, strict=False) if a != b]
        if len(fences) != len(translated_fences):
            found.append(f"{heading}: {len(fences)} {len(translated_fences)} fenced blocks")
        if table_rows(text) != table_rows(translation):
            found.append(f"{heading}: {table_rows(text)} {table_rows(translation)} table rows")
        for what in (code_spans, figures, targets):
            missing, added = what(text) - what(translation), what(translation) - what(text)
            if missing or added:
                found.append(f"{heading}: only in English {sorted(missing)}, only in Chinese {sorted(added)}")
    return found


@pytest.mark.parametrize("name", ENGLISH)
def test_a_page_and_its_translation_agree(name):
    assert translated(name) in CHINESE, f"{name} has no {translated(name)}"
    english, chinese = read(name), read(translated(name))
    assert differences(english, chinese) == []
    assert f"[中文]({Path(translated(name)).name})" in english.split("\n\n")[1]
    assert f"[English]({Path(name).name})" in chinese.split("\n\n")[1]


def test_every_translation_has_its_original_and_is_linked_from_chinese_pages():
    assert {name.replace(".zh-CN", "") for name in CHINESE} == set(ENGLISH)
    for name in CHINESE:
        for link in links(read(name).split("\n\n", 2)[2]):
            target = (ROOT / name).parent / link.split("#")[0]
            if link.split("#")[0].endswith(".md") and "://" not in link and not link.split("#")[0].endswith("zh-CN.md"):
                assert not target.with_suffix(".zh-CN.md").is_file(), f"{name} links to the English {link}"


def anchors(text):
    """The anchors that GitHub gives to the headings of a page."""
    headings = [heading.lstrip("#").strip().lower() for heading, *_ in split_sections(text)]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    for link in links("".join(text for _, text, _ in split_sections(read(name)))):
        path, _, anchor = link.partition("#")
        if "://" not in link:
            target = (ROOT / name).parent / path if path else ROOT / name
            assert target.exists(), f"{name}: {link}"
            assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), f"{name}: {link}"


PAGE = """# Title

Use `run.resume`, see [more](more.md#place).

```bash
python a.py --x 1  # why
```

## Next

| `a` | 0.25 s |
"""
TRANSLATION = """# 标题

`run.resume` 见[下文](more.zh-CN.md#位置)。

```bash
python a.py --x 1  # 原因
```

## 其次

| `a` | 0.25 秒 |
"""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("--x 1", "--x 2"),
        ("python a.py --x 1", "python b.py --x 1"),
        ("`run.resume`", "`run.resumed`"),
        ("`run.resume`", "run.resume"),
        ("## 其次", "### 其次"),
        ("## 其次\n\n", ""),
        ("more.zh-CN", "other.zh-CN"),
        ("0.25", "0.26"),
        ("| `a` |", "| |\n| `a` |"),
        ("```bash\npython a.py --x 1  # 原因\n```\n", ""),
    ],
)
def test_a_change_in_one_language_is_found(old, new):
    assert differences(PAGE, TRANSLATION) == []
    assert old in TRANSLATION
    assert differences(PAGE, TRANSLATION.replace(old, new, 1))
