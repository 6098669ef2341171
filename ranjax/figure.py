"""Figures as files. Matplotlib belongs to the extra `train` and is imported when a figure is drawn."""

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ranjax.cli import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def blank_figure(width: float, height: float) -> "Figure":
    """An empty figure of this size in inches, without a window."""
    try:
        from matplotlib.figure import Figure
    except ValueError:  # MPLBACKEND names a backend that is not here, such as a notebook's; a file needs none
        del os.environ["MPLBACKEND"]
        from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def write_figure(figure: "Figure", path: Path, dpi: int = 150) -> None:
    """Writes a figure as PNG, completely or not at all."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=dpi)
    write_whole(path, image.getvalue())
