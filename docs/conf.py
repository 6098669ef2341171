"""The documentation site: python -m sphinx -W --keep-going -c docs . build/docs

The root of the project is the root of the sources, so that links between pages are the same here and on GitHub.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

project, author, copyright = "ranjax", "The ranjax authors", "2026, The ranjax authors"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx-mathjax-offline"]  # loads nothing else
root_doc = "docs/index"
include_patterns = [
    "docs/**.md",
    "experiments/**README.md",
    "benchmarks/README.md",
    "notebooks/*.ipynb",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
]
exclude_patterns = [".*", "build", "dist", "runs"]

html_theme = "furo"
html_title = "ranjax"
html_static_path, html_css_files = ["static"], ["site.css"]
html_extra_path = ["extra"]
html_copy_source = False

nb_execution_mode = "off"  # the outputs are those that are stored
nb_merge_streams = True
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_typehints = "none"  # shapes and types stand under Args
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
python_maximum_signature_line_length = 100


def in_rst(app, what, name, obj, options, lines):
    """Docstrings have tables and `names` as Markdown has them, and values that are returned without a type."""
    out, table, math = [], [], -1
    for line in [*one_by_one(lines), ""]:
        text, indent = line.lstrip(), len(line) - len(line.lstrip())
        if text.startswith("| "):
            table.append([cell.strip() for cell in text.strip("|").split("|")])
            continue
        if table:
            out, table = out + table_in_rst(table), []
        if text and indent <= math:
            math = -1
        if text.startswith(".. math::"):
            math = indent
        if math < 0 and not text.startswith((">>>", "...")):
            line = literal(line)
            if out and out[-1].strip() in ("Returns:", "Yields:"):
                line = " " * indent + ":" + line.lstrip()  # or what stands before a colon would be the type
        out.append(line)
    lines[:] = out[:-1]


def one_by_one(lines: list[str]) -> list[str]:
    """Attributes that are described together, `a, b: what both are`, each on its own."""
    out, names, described = [], [], []
    for line in [*lines, ""]:
        if names and line.startswith(" " * 4):
            described.append(line)
            continue
        out += [part for name in names for part in (f"  {name}{described[0]}", *described[1:])]
        together = re.fullmatch(r"  (\w+(?:, \w+)+)(: .*)", line)
        names, described = (together[1].split(", "), [together[2]]) if together else ([], [])
        out += [] if together else [line]
    return out[:-1]


def literal(line: str) -> str:
    """The line with `names` as literals, and bars that are not of a substitution."""
    parts = re.split(r"(``.*?``|(?<!:)`[^`]+`)", line)
    parts[1::2] = [f"``{part.strip('`')}``" for part in parts[1::2]]
    parts[::2] = [part.replace("|", "\\|") for part in parts[::2]]
    return re.sub(r"(?<=``)(?=s\b)", r"\\ ", "".join(parts))  # a plural: `RANCell`s


def table_in_rst(rows: list[list[str]]) -> list[str]:
    """The rows of a Markdown table as a table of reStructuredText."""
    lines = [".. list-table::", "   :header-rows: 1", ""]
    for row in rows[:1] + rows[2:]:
        lines += [f"   {'* -' if n == 0 else '  -'} {literal(cell)}" for n, cell in enumerate(row)]
    return [*lines, ""]


def without_internals(app, what, name, obj, options, signature, return_annotation):
    """Flax adds `parent` and `name` to the arguments of a module; addresses of functions change with every build."""
    if signature is None:
        return None
    signature = re.sub(r", parent=<[^>]*>, name=None(?=\))", "", signature)
    signature = re.sub(r"<function (\w+)\.<locals>\.\w+(?: at 0x[0-9a-f]+)?>", r"\1()", signature)  # an initialiser
    signature = re.sub(r"<function (?:\w+\.)*(\w+|<lambda>)(?: at 0x[0-9a-f]+)?>", r"\1", signature)
    signature = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", signature)
    return signature, return_annotation


def setup(app):
    app.connect("autodoc-process-docstring", in_rst, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", without_internals)
