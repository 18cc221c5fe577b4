"""A page of sections as Markdown, and as one HTML file that needs nothing else. All text but Raw is escaped."""

import base64
import re
from html import escape
from pathlib import Path
from typing import NamedTuple


class Text(NamedTuple):
    """A paragraph."""

    text: str


class Points(NamedTuple):
    """Short sentences under one another."""

    items: list[str]


class Table(NamedTuple):
    """Rows of cells; the first row is the header, and may be empty."""

    rows: list[tuple[str, ...]]


class Code(NamedTuple):
    """Text as it is: a sample, a recipe."""

    text: str
    caption: str = ""


class Picture(NamedTuple):
    """A PNG file in the page's folder."""

    file: str
    alt: str


class Raw(NamedTuple):
    """HTML that is put into the page as it is, so its maker has escaped it; Markdown has a sentence in its place."""

    html: str
    instead: str


Block = Text | Points | Table | Code | Picture | Raw


class Section(NamedTuple):
    """A title and what stands under it. The first section of a page is its head."""

    title: str
    blocks: list[Block]


def markdown(sections: list[Section]) -> str:
    """The page in GitHub's Markdown; pictures are links to files beside it."""
    parts = []
    for mark, section in zip(["#"] + ["##"] * (len(sections) - 1), sections, strict=True):
        parts += [f"{mark} {plain(section.title)}", *map(_markdown, section.blocks)]
    return "\n\n".join(parts) + "\n"


def html(sections: list[Section], folder: Path) -> str:
    """The page as HTML, the pictures of `folder` and the style inside it."""
    parts = [f"<section><{tag}>{escape(section.title)}</{tag}>\n"
             + "\n".join(_html(block, folder) for block in section.blocks) + "</section>"
             for section, tag in zip(sections, ["h1"] + ["h2"] * (len(sections) - 1), strict=True)]
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n<meta name="viewport" '
            f'content="width=device-width, initial-scale=1">\n<title>{escape(sections[0].title)}</title>\n'
            f"<style>{_STYLE}</style></head>\n<body><main>\n" + "\n".join(parts)
            + "\n</main></body></html>\n")


def plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    text = re.sub(r"([\\`*\[\]<>|&~$#])", r"\\\1", " ".join(text.split()))
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)


def _markdown(block: Block) -> str:
    if isinstance(block, Text | Raw):
        return plain(block.text if isinstance(block, Text) else block.instead)
    if isinstance(block, Points):
        return "\n".join(f"- {plain(item)}" for item in block.items)
    if isinstance(block, Table):
        head, *rows = [f"| {' | '.join(map(plain, row))} |" for row in block.rows]
        return "\n".join([head, "|" + " --- |" * len(block.rows[0]), *rows])
    if isinstance(block, Picture):
        return f"![{plain(block.alt)}]({block.file})"
    # a fence longer than any run of backticks inside
    fence = "`" * (1 + max(2, *map(len, re.findall(r"`+", block.text)), 2))
    caption = f"{plain(block.caption)}\n\n" if block.caption else ""
    return f"{caption}{fence}text\n{block.text}\n{fence}"


def _html(block: Block, folder: Path) -> str:
    if isinstance(block, Text):
        return f"<p>{escape(block.text)}</p>"
    if isinstance(block, Points):
        return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in block.items) + "</ul>"
    if isinstance(block, Table):
        head = f"<thead>{_row(block.rows[0], 'th')}</thead>" if any(block.rows[0]) else ""
        rows = "".join(_row(row, "td") for row in block.rows[1:])
        return f'<div class="wide"><table>{head}<tbody>{rows}</tbody></table></div>'
    if isinstance(block, Picture):
        data = base64.b64encode((folder / block.file).read_bytes()).decode()
        return f'<img alt="{escape(block.alt)}" src="data:image/png;base64,{data}">'
    if isinstance(block, Raw):
        return block.html
    caption = f"<figcaption>{escape(block.caption)}</figcaption>" if block.caption else ""
    return f"<figure>{caption}<pre>{escape(block.text)}</pre></figure>"


def _row(cells: tuple[str, ...], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"


_STYLE = """
:root { color-scheme: light dark;
  --ink: #1c2126; --quiet: #5c6670; --line: #dfe3e7; --paper: #fff; --wash: #f5f7f8 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7ea; --quiet: #98a2ac; --line: #363d44; --paper: #16191c; --wash: #1f2327 }
}
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
main { max-width: 52rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .75rem }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; padding-top: 1rem; border-top: 1px solid var(--line) }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; margin: .5rem 0 }
th, td { text-align: left; vertical-align: top; padding: .3rem 1.4rem .3rem 0;
  border-bottom: 1px solid var(--line); overflow-wrap: anywhere }
th { color: var(--quiet); font-weight: 600 }
figure { margin: .75rem 0 }
figcaption { color: var(--quiet); font-size: .9rem }
pre { background: var(--wash); border-radius: 6px; padding: .8rem 1rem; margin: .3rem 0; overflow-x: auto;
  font: .85rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere }
img { max-width: 100%; border-radius: 6px; background: #fff }
li { margin: .2rem 0 }
"""
