"""The commands of README.md, as a reader would type them."""

import re
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"
CHAPTER = "On several machines"


def section(heading: str) -> str:
    """The text below a heading of any level, up to the next one."""
    parts = re.split(r"^##+ (.+)$", README.read_text(encoding="utf-8"), flags=re.M)
    texts = dict(zip(parts[1::2], parts[2::2], strict=True))
    return texts[heading]


def blocks(heading: str) -> list[str]:
    """The section's code blocks."""
    return re.findall(r"^```[^\n]*\n(.*?)^```", section(heading), re.M | re.S)


def commands(heading: str) -> list[str]:
    """Each command of the section's code blocks, on one line, without its comment."""
    text = "".join(blocks(heading)).replace("\\\n", " ")
    lines = (re.sub(r"\s+# .*$", "", line) for line in text.splitlines())
    return [re.sub(r"\s+", " ", line).strip() for line in lines if line.strip()]
