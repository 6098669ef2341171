"""Imports point one way, and the core needs few packages."""

import subprocess
import sys
from graphlib import TopologicalSorter

import layout
import pytest

pytestmark = pytest.mark.core

RANKS = {name: rank for rank, names in enumerate(layout.ORDER) for name in names}


def test_every_module_has_a_place_in_the_order():
    assert {layout.room(name) for name in layout.modules()} == set(RANKS)


@pytest.mark.parametrize("name", layout.modules())
def test_imports_point_down(name):
    rank = RANKS[layout.room(name)]
    up = [below for above, below in layout.arrows() if above == name and RANKS[layout.room(below)] >= rank]
    up += [other for other in layout.imports(name)[1] if other.startswith("ranjax")]
    assert not up, f"{name} imports {up}, which stand beside or above it"


def test_no_module_imports_itself_through_others():
    TopologicalSorter({name: layout.imports(name)[0] for name in layout.modules()}).prepare()


@pytest.mark.parametrize("name", [name for name in layout.modules() if layout.room(name) in layout.CORE])
def test_the_core_needs_jax_flax_numpy_and_jaxtyping_only(name):
    if name == layout.RENDERING:
        pytest.skip("it draws, which is no part of the core")
    others = layout.imports(name)[1] - sys.stdlib_module_names
    assert others <= {"jax", "flax", "numpy", "jaxtyping"}


def test_at_most_twelve_floors():
    assert max(map(layout.floor, RANKS)) <= 12


def test_the_listing_by_floors_is_printed():
    command = [sys.executable, "-m", "tests.layout"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=layout.PACKAGE.parent).stdout
    assert "lm" in printed
    assert "floors" in printed
