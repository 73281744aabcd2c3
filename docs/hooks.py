"""Hooks of mkdocs.yml: what the site has beside the pages of docs/.

- a page for each room of lcm_jax, of its docstrings: api/ROOM.md;
- the pages of experiments/ and notebooks/ with their figures, at their paths in the repository;
- links: one that leads out of docs/ leads to the page of that file, or stays text where the site has none; a dotted
  name in backquotes, as `diffusion.phases.jump`, leads to its docstring.

`mkdocs build --strict` fails at a link, an anchor or a name that leads nowhere.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PUBLISHED = ("experiments", "notebooks")
ROOMS = sorted(path.parent.name for path in (ROOT / "lcm_jax").glob("*/__init__.py"))
NAME = re.compile(rf"(?<!\[)`(?:lcm_jax\.)?(?P<name>(?:{'|'.join(ROOMS)})\.[a-z]\w*(?:\.\w+)+)`(?!\])")
LINK = re.compile(r"(\[[^\]]*\])\(([^()\s]+)\)")


def api_pages() -> dict[str, str]:
    """Room -> its page: the docstrings of its public modules. "programs" are the modules beside the rooms."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "lcm_jax").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        room = parts[1] if len(parts) > 1 and parts[1] in ROOMS else "programs"
        found.setdefault(room, []).append(".".join(parts))
    return {
        room: f"# {'Programs' if room == 'programs' else f'lcm_jax.{room}'}\n\n"
        + "\n\n".join(f"::: {module}" for module in modules)
        for room, modules in found.items()
    }


def in_repository(page: str) -> str:
    """Path in the repository of a page of the site."""
    return page if page.split("/")[0] in PUBLISHED else f"docs/{page}"


def on_files(files: Any, config: Any) -> Any:
    for room, text in api_pages().items():
        files.append(File.generated(config, f"api/{room}.md", content=text))
    for folder in PUBLISHED:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".md", ".png"):
                name = path.relative_to(ROOT).as_posix()
                files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    here = page.file.src_uri
    if here.startswith("api/"):
        return markdown

    def link(found: re.Match[str]) -> str:
        text, target = found.groups()
        path, hash_, anchor = target.partition("#")
        if not path or ":" in path:
            return found[0]
        there = posixpath.normpath(posixpath.join(posixpath.dirname(in_repository(here)), path))
        if (ROOT / there).is_dir() and (ROOT / there / "README.md").is_file():
            there += "/README.md"
        uri = there.removeprefix("docs/")
        if files.get_file_from_path(uri) is not None:
            return f"{text}({posixpath.relpath(uri, posixpath.dirname(here) or '.')}{hash_}{anchor})"
        return text[1:-1] if (ROOT / there).exists() else found[0]

    lines, fenced = [], False
    for line in markdown.split("\n"):
        fenced ^= line.lstrip().startswith("```")
        if not fenced and not line.startswith("    "):
            line = NAME.sub(r"[\g<0>][lcm_jax.\g<name>]", LINK.sub(link, line))
        lines.append(line)
    return "\n".join(lines)
