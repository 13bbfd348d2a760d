"""Pages of the documentation, for the tests."""

import re
from pathlib import Path


ROOT = Path(__file__).parent.parent
README, RECIPES, TUTORIAL = ROOT / "README.md", ROOT / "recipes" / "README.md", ROOT / "recipes" / "TUTORIAL.md"
GUIDES = ROOT / "recipes" / "guides"
PAGES = [README, RECIPES, TUTORIAL, *sorted(GUIDES.glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    """The commands of the shell blocks, a line that goes on joined with the next one."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip()]


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def quoted(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(page))
