"""`handmill card`: the page that tells a reader what a model is, as Markdown and as HTML."""

from pathlib import Path

from handmill import folder, page
from handmill.card import sections


def card(path: Path | str) -> tuple[Path, Path]:
    """Write card.md and card.html into a model folder and return their paths.

    Raises UserError for a folder that is not as it was written.
    """
    path = Path(path)
    content = sections(path, folder.verify(path))
    markdown, html = path / "card.md", path / "card.html"
    folder.write_text(markdown, page.markdown(content))
    folder.write_text(html, page.html(content, path))
    return markdown, html
