"""Executes notebooks and stores their outputs; writes the badge and the set-up cell that all of them share.

python notebooks/build.py                 # all of them
python notebooks/build.py 01_quickstart
python notebooks/build.py --no-run        # keeps the outputs: after REPOSITORY in set_up.py has changed
"""

import argparse
import os
import re
import tempfile
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
NAMES = sorted(path.stem for path in HERE.glob("[0-9][0-9]_*.py"))
SET_UP = (HERE / "set_up.py").read_text("utf-8").strip()
REPOSITORY = re.search(r'REPOSITORY = "(.*?)"', SET_UP)[1]
COLAB = "https://colab.research.google.com"
METADATA = {
    "accelerator": "TPU",
    "colab": {"gpuType": "V5E1", "provenance": []},
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def badge(name: str) -> str:
    """The line that opens a notebook on Colab."""
    page = f"{COLAB}/github/{REPOSITORY}/blob/main/notebooks/{name}.ipynb"
    return f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({page})"


def source(name: str) -> nbformat.NotebookNode:
    """The notebook of `NAME.py`, with the badge after the title, the set-up cell as the first of code, no outputs."""
    notebook = jupytext.read(HERE / f"{name}.py")
    title, first = notebook.cells[:2]
    heading, *rest = [line for line in title.source.split("\n") if not line.startswith("[![")]
    title.source = "\n".join([heading, "", badge(name), "", *"\n".join(rest).strip().split("\n")])
    first.source, first.metadata = SET_UP, nbformat.from_dict({"tags": ["hide-input"]})  # on the site
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    return notebook


def write_source(name: str) -> None:
    """Writes the badge and the set-up cell into `NAME.py`."""
    text = jupytext.writes(source(name), fmt="py:percent")
    (HERE / f"{name}.py").write_text(re.sub(r"^# ---\n.*?# ---\n\n", "", text, flags=re.DOTALL), "utf-8")


def write_notebook(name: str, notebook: nbformat.NotebookNode) -> None:
    """Writes `NAME.ipynb`, without the times of its cells and the version of its kernel."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    nbformat.validate(notebook)
    nbformat.write(notebook, HERE / f"{name}.ipynb")
    print(f"written: {name}.ipynb, {(HERE / f'{name}.ipynb').stat().st_size / 1000:.0f} kB")


def with_outputs(name: str) -> nbformat.NotebookNode:
    """The notebook with the outputs that `NAME.ipynb` has."""
    notebook, stored = source(name), nbformat.read(HERE / f"{name}.ipynb", as_version=4)
    for cell, old in zip(notebook.cells, stored.cells, strict=True):
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = old.outputs, old.execution_count
    return notebook


def executed(name: str, folder: Path) -> nbformat.NotebookNode:
    """The notebook, executed in a folder, whose name is in no output."""
    notebook = source(name)
    NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(folder)}}).execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "text" in output:
                output.text = output.text.replace(f"{folder}/", "")
    return notebook


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES, metavar="NAME")
    parser.add_argument("--no-run", action="store_true")
    given = parser.parse_args()
    os.environ["PYTHONPATH"] = str(HERE.parent)  # of the kernels
    for name in given.names:
        write_source(name)
        with tempfile.TemporaryDirectory() as folder:
            write_notebook(name, with_outputs(name) if given.no_run else executed(name, Path(folder).resolve()))


if __name__ == "__main__":
    main()
