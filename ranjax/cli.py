"""Huge pages of memory for programs that run on a CPU."""

import os
import sys

TUNABLES = "glibc.malloc.hugetlb=1"


def restart_with_huge_pages() -> None:
    """Starts the program anew, once, with an allocator that asks for huge pages.

    XLA on a CPU takes the memory for a step's large arrays anew at each step, and mapping it in pages of 4 KiB costs
    a fifth to a third of a training step (`benchmarks/README.md`). glibc reads the setting where a program begins, so
    that only a new beginning can have it; the process keeps its number. Nothing happens on other systems, or where
    GLIBC_TUNABLES is set already, be it to nothing.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = TUNABLES
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
