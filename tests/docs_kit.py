"""README and docs as tests read them: pages, links, code and commands."""

import dataclasses
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path
    for pattern in ("README.md", "docs/**/*.md", "notebooks/README.md", "experiments/*.md", "experiments/*/*.md")
    for path in ROOT.glob(pattern)
)
_TOKEN = re.compile(r"\bpython3?(?:\.\d+)?$|(?:^|/)python3?$")


@dataclasses.dataclass(frozen=True)
class Command:
    """A command of a page: its line, and its words without environment, redirection and the rest of a pipe."""

    page: str
    text: str
    words: tuple[str, ...]
    in_block: bool = True

    def __str__(self) -> str:
        return f"{self.page}: {' '.join(self.text.split())}"[:110]

    @property
    def module(self) -> str:
        """Of `python -m MODULE`, else ""."""
        words = self.words
        return words[2] if len(words) > 2 and words[0].startswith("python") and words[1] == "-m" else ""

    @property
    def arguments(self) -> list[str]:
        """Of `python -m MODULE`, without brackets and without dots that stand for more."""
        kept = [word.strip("[]") for word in self.words[3:]]
        return [word for word in kept if word not in ("...", "…", "")]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """(language, code) of all fenced and indented code; indented code has the language ""."""
    lines, fence, kept = text.split("\n"), None, []
    for line in [*lines, ""]:
        if fence is not None:
            if line.strip() == "```":
                yield fence, "\n".join(kept)
                fence, kept = None, []
            else:
                kept.append(line)
        elif line.startswith("```"):
            fence, kept = line[3:].strip() or "text", []
        elif line.startswith("    ") or (kept and not line.strip()):
            kept.append(line[4:])
        elif kept:
            yield "", "\n".join(kept)
            kept = []
    if kept:
        yield "", "\n".join(kept)


def prose(text: str) -> str:
    """Without fenced and indented code."""
    out, fenced = [], False
    for line in text.split("\n"):
        fenced ^= line.startswith("```")
        if not fenced and not line.startswith(("    ", "```")):
            out.append(line)
    return "\n".join(out)


def spans(text: str) -> list[str]:
    """The code in the running text."""
    return re.findall(r"`([^`\n]+(?:\n[^`\n]+)?)`", prose(text))


def _commands(line: str) -> Iterator[tuple[str, ...]]:
    """The commands in a line of shell: of pipes and lists each, and those in quotes that another program is given."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:
        return
    for word in words:
        if " " in word and re.search(r"\bpython3? -m ", word):
            yield from _commands(word[re.search(r"\bpython3? -m ", word).start() :])
    part: list[str] = []
    for word in [*words, ";"]:
        if word in (";", "&&", "|", "||", ">", "&") or word.endswith(";"):
            while part and re.fullmatch(r"[A-Z_]+=.*", part[0]) and len(part) > 1:
                part = part[1:]
            python = next((i for i, w in enumerate(part) if _TOKEN.search(w)), None)
            if python is not None and " " not in part[python]:
                yield ("python", *part[python + 1 :])
            elif part and part[0] in ("make", "pip"):
                yield tuple(part)
            part = []
        else:
            part.append(word)


def commands(path: Path) -> list[Command]:
    """All of a page that start `python`, `make` or `pip`, in code blocks and in the running text."""
    text, found = path.read_text(encoding="utf-8"), []
    lines = []
    for language, code in blocks(text):
        if language in ("", "bash", "sh", "text"):
            lines += re.sub(r"\\\n\s*", " ", code).split("\n")
        if language == "yaml":
            for listed in re.findall(r"command: \[(.*?)\]", code, re.DOTALL):
                lines.append(" ".join(part.strip() for part in listed.split(",")))
    said = [" ".join(span.split()) for span in spans(text) if re.match(r"(python3?|make|pip) ", span)]
    for line in [*lines, *said]:
        found += [Command(name_of(path), line.strip(), words, line in lines) for words in _commands(line)]
    return found


def slug(heading: str) -> str:
    """The anchor that GitHub, and the site, give a heading."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    return {slug(title) for title in re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)}


def links(path: Path) -> list[str]:
    """Targets of links and images in the running text, but for those on the net."""
    found = re.findall(r"\]\(([^()\s]+)\)", prose(path.read_text(encoding="utf-8")))
    return [target for target in found if not re.match(r"[a-z]+:", target)]
