"""Every `##` section of every notebook is a test: `nbs/01_losses.ipynb::Temperature`."""
import json, os
from pathlib import Path

# Before torch is loaded: the workers share the cores, and all interpreters that the tests start share compiled modules.
if 'PYTEST_XDIST_WORKER_COUNT' in os.environ:
    os.environ.setdefault('OMP_NUM_THREADS', str(max(1, (os.cpu_count() or 1) // int(os.environ['PYTEST_XDIST_WORKER_COUNT']))))
os.environ.pop('PYTHONDONTWRITEBYTECODE', None)

import pytest
from tools.notebooks import NBS, runs, shell


def pytest_addoption(parser):
    parser.addoption('--flags', default='', help="also run the notebook cells with these flags, e.g. 'slow gpu'")


def pytest_collect_file(file_path, parent):
    if file_path.suffix == '.ipynb' and file_path.parent == NBS: return NotebookFile.from_parent(parent, path=file_path)


class NotebookFile(pytest.File):
    "A notebook: its sections share one shell and run in order."
    def collect(self):
        title, sections = 'start', {}
        for cell in json.loads(self.path.read_text())['cells']:
            source = ''.join(cell['source'])
            if cell['cell_type'] == 'markdown' and source.startswith('## '): title = source.splitlines()[0][3:].strip()
            if runs(cell, self.config.getoption('--flags').split()): sections.setdefault(title, []).append(source)
        self.shell, self.failed = None, None
        for name, cells in sections.items(): yield Section.from_parent(self, name=name, cells=cells)


class CellFailure(Exception): pass


class Section(pytest.Item):
    "The code cells below one `##` heading."
    def __init__(self, *, cells, **kwargs):
        super().__init__(**kwargs)
        self.cells = cells

    def runtest(self):
        nb = self.parent
        if nb.failed: pytest.skip(f'the section «{nb.failed}» before it failed')
        here = Path.cwd()
        if nb.shell is None:
            nb.shell = shell(self.path)
            nb.shell._cell_idx = None  # `prettytb` names no cell
        os.chdir(self.path.parent)
        try:
            for source in self.cells:
                nb.shell.run(source)
                if nb.shell.exc:
                    nb.failed = self.name
                    raise CellFailure(f'{source}\n\n{nb.shell.prettytb(self.path)}')
        finally: os.chdir(here)

    def repr_failure(self, excinfo):
        return str(excinfo.value) if isinstance(excinfo.value, CellFailure) else super().repr_failure(excinfo)

    def reportinfo(self): return self.path, None, f'{self.path.name}::{self.name}'
