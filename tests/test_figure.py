"""Figures as files."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("backend", ["module://nosuch.backend_inline", "nosuch", "svg", None])
def test_a_figure_is_written_whatever_mplbackend_is(backend, tmp_path):
    """And the backend of windows stays what was asked for, where there is one of that name."""
    code = "import os, pathlib, sys; from ranjax.figure import blank_figure, write_figure\n"
    code += "for _ in range(2): write_figure(blank_figure(2, 2), pathlib.Path(sys.argv[1]))\n"
    code += "import matplotlib; print(os.environ.get('MPLBACKEND'), dict.__getitem__(matplotlib.rcParams, 'backend'))"
    environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    environment |= {} if backend is None else {"MPLBACKEND": backend}
    command = [sys.executable, "-c", code, str(tmp_path / "a.png")]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split(maxsplit=1)
    assert said[0] == str(backend)
    assert backend != "svg" or said[1] == "svg\n"
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
