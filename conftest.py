"""Every `##` section of every notebook is a test: `nbs/01_losses.ipynb::cpu::Temperature`.

Each notebook is run alone in an empty folder: as it is, and most also on a pretended GPU, which finds what was left on
the wrong device. `NOTEBOOK_PYTHON` names the interpreter of another environment to run them in, such as one that holds
the wheel alone. All kernels are forked from an interpreter that holds the libraries of others (`tools/warm.py`), which
take longer to load than most notebooks to run; `tools.notebooks run`, of which all outputs come, starts each from
nothing. What is slow, cell or test, is left out unless `--flags slow` asks for it."""
import gc, os, sys
from collections import Counter
from contextlib import ExitStack
from importlib.util import find_spec

# What the tests load and keep are a million objects: Python is to look less often for what could be freed among them.
gc.set_threshold(50_000, 20, 20)

# Before torch is loaded: the workers share the cores, and all interpreters that the tests start share compiled modules.
def share_cores(workers): os.environ.setdefault('OMP_NUM_THREADS', str(max(1, (os.cpu_count() or 1) // workers)))


if 'PYTEST_XDIST_WORKER_COUNT' in os.environ: share_cores(int(os.environ['PYTEST_XDIST_WORKER_COUNT']))
os.environ.pop('PYTHONDONTWRITEBYTECODE', None)

import pytest
from tools import warm
from tools.notebooks import NBS, ROOT, kernel, runs

CARD = f'''import sys, torch
sys.path.append({str(ROOT/"tests")!r})
import pretended_gpu
pretended_gpu.begin()
assert torch.zeros(1, device='cuda').is_cuda'''
DEVICES = {'cpu': '', 'gpu': CARD}
# Pages of which the pretended GPU tells nothing new: their subject is a file or a clock on the processor, or tests try
# the same there: tests/test_devices.py, and those of the commands.
ON_THE_PROCESSOR = {'clock', 'quantize', 'pte', 'export_run', 'plan_run', '03_models', 'methods', 'dino', 'your_own',
                    'cli', 'embed_run', 'language_run'}
# Long pages whose methods or commands those tests try as well: they run on the pretended GPU every week.
SLOW_ON_THE_GPU = {'00_theory', '07_features', '08_self', '09_data_free', '11_language', 'distillation_token', 'embed',
                   'exam', 'exits', 'index', 'inversion', 'ranks', 'similarity', 'tokens'}
NEEDS = {'pte': 'executorch'}  # what a page needs, and `dev` does not bring


def pytest_addoption(parser):
    parser.addoption('--flags', default='', help="also run cells and tests with these flags, e.g. 'slow gpu'")


def pytest_configure(config):
    "Workers that run notebooks share the interpreters that are forked: this process starts them, and then the workers."
    workers = getattr(config.option, 'numprocesses', None)
    if workers and any('nbs' in a for a in config.args):
        share_cores(workers)
        warm.begin(sys.executable, os.environ.get('NOTEBOOK_PYTHON', sys.executable))


def flags(config): return config.getoption('--flags').split()


def pytest_collection_modifyitems(config, items):
    if 'slow' in flags(config): return
    slow = [item for item in items if item.get_closest_marker('slow')]
    items[:] = [item for item in items if item not in slow]
    config.hook.pytest_deselected(items=slow)


def pytest_terminal_summary(terminalreporter, config):
    "Beside what `--durations` prints: the seconds of the slowest files, and of a notebook for each device."
    if config.getoption('durations') is None: return
    took = Counter()
    for report in sum(terminalreporter.stats.values(), []):
        if not hasattr(report, 'duration'): continue
        parts = report.nodeid.split('::')
        took['::'.join(parts[:2] if parts[0].endswith('.ipynb') else parts[:1])] += report.duration
    terminalreporter.section('slowest 10 files')
    for name, seconds in took.most_common(10): terminalreporter.line(f'{seconds:7.1f} s  {name}')
    terminalreporter.line(f'{took.total():7.1f} s  all {len(took)} files')


def pytest_collect_file(file_path, parent):
    if file_path.suffix != '.ipynb' or file_path.parent != NBS: return
    return NotebookFile.from_parent(parent, path=file_path)


class NotebookFile(pytest.File):
    "A notebook, once for each device."
    def collect(self):
        package = NEEDS.get(self.path.stem, 'pytest')
        if 'NOTEBOOK_PYTHON' not in os.environ and not find_spec(package):
            pytest.skip(f'{package} is not installed', allow_module_level=True)
        for name, first in DEVICES.items():
            if name == 'gpu' and self.path.stem in self.left_out(): continue
            yield Notebook.from_parent(self, name=name, first=first)

    def left_out(self):
        return ON_THE_PROCESSOR | (set() if 'slow' in flags(self.config) else SLOW_ON_THE_GPU)


class Notebook(pytest.Collector):
    "A notebook on a device: its sections share one kernel and run in order."
    def __init__(self, *, first, **kwargs):
        super().__init__(**kwargs)
        self.first, self.failed, self.stack = first, None, ExitStack()

    def collect(self):
        import nbformat
        self.nb, title, sections = nbformat.read(self.path, 4), 'start', {}
        for i, cell in enumerate(self.nb.cells):
            if cell.cell_type == 'markdown' and cell.source.startswith('## '):
                title = cell.source.splitlines()[0][3:].strip()
            if runs(cell, flags(self.config)): sections.setdefault(title, []).append(i)
        for name, cells in sections.items(): yield Section.from_parent(self, name=name, cells=cells)

    def setup(self):
        python = os.environ.get('NOTEBOOK_PYTHON', sys.executable)
        self.run = self.stack.enter_context(kernel(self.nb, warm.command(python), self.first))

    def teardown(self): self.stack.close()


class Section(pytest.Item):
    "The code cells below one `##` heading, by their numbers."
    def __init__(self, *, cells, **kwargs):
        super().__init__(**kwargs)
        self.cells = cells

    def runtest(self):
        from nbclient.exceptions import CellExecutionError
        if self.parent.failed: pytest.skip(f'the section «{self.parent.failed}» before it failed')
        try:
            for i in self.cells: self.parent.run(i)
        except CellExecutionError as error:
            self.parent.failed = self.name
            pytest.fail(str(error), pytrace=False)

    def reportinfo(self): return self.path, None, self.nodeid
