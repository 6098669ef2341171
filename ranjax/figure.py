"""Figures as files. Matplotlib belongs to the extra `train` and is imported when a figure is drawn."""

import io
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ranjax.cli import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def blank_figure(width: float, height: float) -> "Figure":
    """An empty figure of this size in inches, without a window."""
    if "matplotlib" not in sys.modules:
        _import_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _import_matplotlib() -> None:
    """Also where MPLBACKEND names a backend that is not here, such as a notebook's: a file needs none."""
    backend = os.environ.pop("MPLBACKEND", None)
    import matplotlib

    if backend is not None:
        os.environ["MPLBACKEND"] = backend
        with suppress(ValueError):  # for windows that are opened later
            matplotlib.rcParams["backend"] = backend


def write_figure(figure: "Figure", path: Path, dpi: int = 150) -> None:
    """Writes a figure as PNG, completely or not at all."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=dpi)
    write_whole(path, image.getvalue())
