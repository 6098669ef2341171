"""Pictures."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def blank_figure(width: float, height: float) -> "Figure":
    """A figure of so many inches, to be saved as a picture; no window shows it."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
