"""Execute notebooks in place, each in a temporary folder: `make notebooks`, or `python notebooks/execute.py NOTEBOOK`.

What would differ from one execution to the next and says nothing (times, versions of kernel and machine) is left out.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

HERE = Path(__file__).parent
TIMEOUT = 900  # seconds a cell
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def executed(path: Path, folder: Path) -> Any:
    """The notebook with the outputs of a fresh kernel of this interpreter, whose working directory is `folder`.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell ended with an error.
    """
    notebook = nbformat.read(path, as_version=4)
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # no widgets: bars are off anyway
    NotebookClient(
        notebook, timeout=TIMEOUT, kernel_name=KERNEL["name"], resources={"metadata": {"path": str(folder)}},
        record_timing=False, coalesce_streams=True, config=Config({"KernelManager": {"transport_encryption": "auto"}}),
    ).execute()  # fmt: skip
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:02d}"
        cell.metadata = {name: value for name, value in cell.metadata.items() if name == "tags"}
    return notebook


def main(names: list[str]) -> None:
    """Execute the notebooks, by default all of this folder, and write them back."""
    for path in map(Path, names) if names else sorted(HERE.glob("*.ipynb")):
        with tempfile.TemporaryDirectory() as folder:
            notebook = executed(path.resolve(), Path(folder))
        nbformat.write(notebook, path)
        print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
