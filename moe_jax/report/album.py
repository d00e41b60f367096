"""The pictures of a report: each is drawn once, kept as a file and shown on the page."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from moe_jax.report.page import picture, render_svg, with_background
from moe_jax.runs import write_atomic


class Album:
    """Writes pictures to `<run>/pictures/<name>.svg` and gives their markup."""

    def __init__(self, run_path: Path) -> None:
        """Keeps the run's folder."""
        self._folder = run_path / "pictures"

    def add(self, name: str, figure: Figure, caption: str) -> str:
        """Writes a picture and returns its markup.

        Args:
          name: a word, unique on the page; names the file.
          figure: what to draw.
          caption: plain text.

        Returns:
          Markup.
        """
        svg = render_svg(figure)
        write_atomic(self._folder / f"{name}.svg", with_background(svg))
        return picture(svg, name, caption)
