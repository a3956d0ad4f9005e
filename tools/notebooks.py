"""Runs the notebooks, keeps their outputs as new as their code, and fills in what settings.ini and references.bib give.

    python -m tools.notebooks run [NOTEBOOK ...]    run top to bottom, store outputs, slow cells too (--flags slow)
    python -m tools.notebooks check                 fail where stored outputs are older than the code
    python -m tools.notebooks form [NOTEBOOK ...]   fail where lines or cells are too long, or links would be raw
    python -m tools.notebooks heads                 write badge, install cell and metadata into every notebook
    python -m tools.notebooks references            write all lists of references, fail where a citation is wrong
    python -m tools.notebooks readme [--check]      make README.md and its pictures from nbs/index.ipynb,
                                                    or compare them
"""
import argparse, ast, hashlib, io, json, os, re, sys, tempfile, time, tokenize
from configparser import ConfigParser
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / 'nbs'
PICTURES = NBS / 'readme_files'  # of README.md
# Characters of a line in notebooks and in tests and tools; lines of a cell; exported cells in a row.
WIDTH, CODE_WIDTH, CELL, ROW, OPTIONS = 100, 120, 20, 2, 12
KERNEL = ('-m', 'ipykernel_launcher', '-f', '{connection_file}')
EXPORTS = {'export', 'exports', 'exporti'}


def settings():
    "The values of settings.ini, and the addresses made of them."
    ini = ConfigParser()
    ini.read(ROOT / 'settings.ini')
    s = dict(ini['DEFAULT'])
    s['repo_url'] = f"https://github.com/{s['user']}/{s['repo']}"
    s['site_url'] = f"https://{s['user']}.github.io/{s['repo']}"
    return s


def notebooks(): return sorted(p for p in NBS.glob('*.ipynb') if not p.name.startswith('_'))


def directives(source):
    "The nbdev directives of a cell, as `{name: argument}`."
    return dict(re.findall(r'^#\|\s*([\w-]+)\s*:?\s*(.*?)\s*$', source, re.M))


def runs(cell, flags=()):
    "Whether a code cell is run when the test flags `flags` are asked for."
    if cell['cell_type'] != 'code' or not ''.join(cell['source']).strip(): return False
    found = directives(''.join(cell['source']))
    return found.get('eval') != 'false' and all(f in flags for f in settings()['tst_flags'].split() if f in found)


def code_hash(nb):
    "A short hash of all code of a notebook; which extra Colab installs changes no output."
    plain = lambda s: re.sub(r"'\w+\[[\w,]+\] @ (git\S+)'", r'\1', s) if '-e /content' in s else s
    code = [plain(''.join(c['source'])) for c in nb['cells'] if c['cell_type'] == 'code']
    return hashlib.sha256(json.dumps(code).encode()).hexdigest()[:16]


@contextmanager
def kernel(nb, python=(sys.executable,), first=''):
    """A Jupyter kernel of the command `python` in an empty folder, where `first` has run; gives what runs cell i.

    Each notebook is met alone: on Colab nothing of the repository lies beside it."""
    from jupyter_client import KernelManager
    from jupyter_client.kernelspec import KernelSpec
    from nbclient import NotebookClient
    from nbformat.v4 import new_code_cell
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as sockets:
        manager = KernelManager(transport='ipc', connection_file=f'{sockets}/kernel.json')
        manager._kernel_spec = KernelSpec(argv=[*python, *KERNEL], language='python')
        client = NotebookClient(nb, km=manager, timeout=None, resources={'metadata': {'path': folder}})
        env = os.environ | {'DISTILL_NB_CACHE': f'{sockets}/cache'}  # not that of whoever runs it
        with client.setup_kernel(cleanup_kc=True, env=env):
            if first:
                nb.cells.append(new_code_cell(first))
                client.execute_cell(nb.cells[-1], len(nb.cells) - 1)
                nb.cells.pop()
            yield lambda i: client.execute_cell(nb.cells[i], i)


def run(path, flags=('slow',)):
    "Run the notebook at `path` alone, and store its outputs, the hash of their code, and how long it took."
    import nbformat
    from nbclient.exceptions import CellExecutionError
    from nbdev.clean import clean_nb
    from execnb.nbio import read_nb, write_nb
    nb = nbformat.read(path, 4)
    for cell in nb.cells:
        if cell.cell_type == 'code': cell.outputs = []
    took = {'quick': 0, 'slow': 0}
    with kernel(nb) as run_cell:
        for i, cell in enumerate(nb.cells):
            if not runs(cell, flags): continue
            start = time.perf_counter()
            try: run_cell(i)
            except CellExecutionError as e: sys.exit(f'{path.name}, cell {cell.id}:\n{e}')
            shown = lambda o: o.get('name') != 'stderr' and o.get('data') != {}  # {}: a bar that is gone
            cell.outputs = [o for o in cell.outputs if shown(o)]
            took['quick' if runs(cell) else 'slow'] += time.perf_counter() - start
    nb.metadata['outputs_of'] = code_hash(nb)
    nb.metadata['seconds'] = {k: round(v) for k, v in took.items()} | {'cores': os.cpu_count()}
    nbformat.write(nb, path)
    nb = read_nb(path)
    clean_nb(nb, allowed_metadata_keys=settings()['allowed_metadata_keys'].split())
    write_nb(nb, path)
    set_head(path)


def stale():
    "The notebooks whose stored outputs are older than their code."
    nbs = {p: json.loads(p.read_text()) for p in notebooks()}
    return [p.name for p, nb in nbs.items() if nb['metadata'].get('outputs_of') != code_hash(nb)]


def long_lines(text, width):
    "`(number, length)` of the lines of `text` that are longer than `width`."
    return [(i, len(line)) for i, line in enumerate(text.splitlines(), 1) if len(line) > width]


def raw_links(text):
    "The texts of links that hold a backtick: nbdev makes a link of the name in it, inside the link."
    return re.findall(r'\[([^\[\]]*`[^\[\]]*)\]\(', text)


def docment_lines(source):
    "The numbers of the lines whose comments nbdev shows as documentation: of signatures and of the fields of classes."
    tree, found = ast.parse(source), set()
    members = [member for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for member in node.body]
    for n in tree.body + members:
        if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)): parts = [n.returns, *ast.walk(n.args)]
        elif isinstance(n, ast.AnnAssign) and n in members: parts = [n]
        else: continue
        found |= set(range(n.lineno, max(getattr(part, 'end_lineno', n.lineno) for part in parts) + 1))
    return found


def raw_docments(source):
    "The numbers of the lines of an exported cell where a docment holds a backtick."
    lines, tokens = docment_lines(source), tokenize.generate_tokens(io.StringIO(source).readline)
    return [t.start[0] for t in tokens if t.type == tokenize.COMMENT and '`' in t.string and t.start[0] in lines]


def is_exported(cell): return cell['cell_type'] == 'code' and bool(EXPORTS & set(directives(''.join(cell['source']))))


def only_imports(source): return all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(source).body)


def is_a_command(source):
    "Whether a cell is one function with so many options that its signature, one to a line, is a table."
    body = ast.parse(source).body
    return len(body) == 1 and isinstance(body[0], ast.FunctionDef) and len(body[0].args.args) > OPTIONS


def cell_faults(cell):
    "What does not fit its page in one cell, as sentences."
    source, kind = ''.join(cell['source']), cell['cell_type']
    if kind == 'markdown': return [f'a backtick in the text of a link: [{text}]' for text in raw_links(source)]
    if kind != 'code' or '-e /content' in source: return []  # the install cell is hidden
    found = [f'line {i} has {length} characters, more than {WIDTH}' for i, length in long_lines(source, WIDTH)]
    lines = sum(not line.startswith('#|') for line in source.strip().splitlines())
    if lines > CELL and not only_imports(source) and not is_a_command(source):
        found.append(f'{lines} lines of code, more than {CELL}')
    raw = raw_docments(source) if is_exported(cell) else []
    return found + [f'line {i} has a backtick in the comment of a parameter' for i in raw]


def exported_in_a_row(cells):
    "The ids of more than two exported cells with nothing between them that runs or explains; imports don't count."
    rows = [[]]
    for cell in cells:
        if not is_exported(cell): rows.append([])
        elif not only_imports(''.join(cell['source'])): rows[-1].append(cell['id'])
    return [row for row in rows if len(row) > ROW]


def form(path):
    "What does not fit its page in the notebook or module at `path`, one line for each place."
    name, text = os.path.relpath(path, ROOT), path.read_text()
    if path.suffix == '.py':
        found = long_lines(text, CODE_WIDTH)
        return [f'{name}:{i}: {length} characters, more than {CODE_WIDTH}' for i, length in found]
    cells = json.loads(text)['cells']
    faults = [(cell['id'], fault) for cell in cells for fault in cell_faults(cell)]
    for row in exported_in_a_row(cells):
        faults.append((row[ROW], f'{len(row)} exported cells in a row, more than {ROW}, from {row[0]} to {row[-1]}'))
    return [f'{name}, cell {cell_id}: {fault}' for cell_id, fault in faults]


def modules():
    "The Python files whose lines `form` measures: tests and tools."
    return [ROOT / 'conftest.py', *sorted(ROOT.glob('tests/*.py')), *sorted(ROOT.glob('tools/*.py'))]


def how_long(took):
    "A sentence from the seconds of a run, those of its slow cells apart."
    about = lambda s: f'{max(10, 10 * round(s / 10))} seconds' if s < 90 else f'{round(s / 60)} minutes'
    slow = f", and {about(took['slow'])} more for the cells marked `#| slow`" if took['slow'] else ''
    return f"Runs in about {about(took['quick'])} on {took['cores']} CPU cores{slow}."


_EDGE = re.compile(r'^from distill_nb\.(deploy|clock|quantize|pruning|export_run) import', re.M)
_PTE = re.compile(r'^from distill_nb\.pte import', re.M)


def extra_of(path):
    "The extra whose packages the cells of the notebook at `path` use, in brackets; nothing for most."
    cells = [''.join(c['source']) for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'code']
    lessons = [s for s in cells if not s.startswith('#| export')]
    if any(map(_PTE.search, lessons)): return '[deploy,executorch]'
    return '[deploy]' if path.stem == 'plan_run' or any(map(_EDGE.search, lessons)) else ''


def head(path):
    "The sources of the badge cell and of the install cell of the notebook at `path`."
    s = settings()
    place = s['repo_url'].removeprefix('https://github.com/')
    page = f"https://colab.research.google.com/github/{place}/blob/{s['branch']}/nbs/{path.name}"
    # As HTML, which is Colab's own form: of an image alone in its paragraph Quarto makes a figure with a caption.
    badge = (f'<a href="{page}"><img src="https://colab.research.google.com/assets/colab-badge.svg" '
             'alt="Open In Colab"></a>')
    took = json.loads(path.read_text())['metadata'].get('seconds')
    if took and path.stem != 'index': badge += ' ' + how_long(took)
    extra, what = extra_of(path), f"git+{s['repo_url']}"
    if extra: what = f"'{s['lib_name']}{extra} @ {what}'"
    return badge, f"#| hide\n![ -e /content ] && pip install -q {what}  # on Colab only"


def set_head(path):
    "Put badge and install cell behind the title of the notebook at `path`, and ask Colab for a GPU."
    nb = json.loads(path.read_text())
    source = lambda c: ''.join(c['source']).strip()
    badge, install = head(path)
    is_badge, is_install = lambda c: 'colab-badge' in source(c), lambda c: '-e /content' in source(c)
    cells = []
    for kind, text, found in (('markdown', badge, is_badge), ('code', install, is_install)):
        new = {'cell_type': kind, 'id': hashlib.sha256(f'{path.stem} {kind}'.encode()).hexdigest()[:8], 'metadata': {}}
        if kind == 'code': new |= {'execution_count': None, 'outputs': []}
        cells.append(next((c for c in nb['cells'] if found(c)), new) | {'source': text.splitlines(True)})
    rest = [c for c in nb['cells'] if not is_badge(c) and not is_install(c)]
    nb['cells'] = rest[:1] + cells + rest[1:]
    nb['metadata'] |= {'accelerator': 'GPU', 'colab': {'gpuType': 'T4'}}
    path.write_text(json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + '\n')


def links(text): return re.findall(r'(?<!!)\[([^\]]*)\]\(([^)\s]+)\)', text)


def bibliography():
    "The works of nbs/references.bib in the order of their keys, as `{url: {field: text}}`."
    entries = re.findall(r'^@\w+\{(\w+),\n(.*?)^\}', (NBS / 'references.bib').read_text(), re.M | re.S)
    works = [dict(re.findall(r'^\s*(\w+)\s*=\s*\{(.*)\}', fields, re.M)) for _, fields in sorted(entries)]
    return {work['url']: {field: re.sub('[{}]', '', text) for field, text in work.items()} for work in works}


def citations(work):
    "The two texts that a link to `work` may have, such as `Hinton et al. 2015` and `Hinton et al. (2015)`."
    names = [author.removesuffix(' Jr.').split()[-1] for author in work['author'].split(' and ')]
    who = ' and '.join(names) if len(names) < 3 else f'{names[0]} et al.'
    return f"{who} {work['year']}", f"{who} ({work['year']})"


def reference(work):
    "The line of `work` in a list of references."
    venue = next(work[field] for field in ('booktitle', 'journal', 'institution', 'howpublished') if field in work)
    return f"- {work['author'].replace(' and ', ', ')} ({work['year']}). [{work['title']}]({work['url']}). {venue}."


def is_references(cell):
    "Whether a cell is a list of references."
    return cell['cell_type'] == 'markdown' and re.match(r'- .+ \(\d{4}\)\. \[', ''.join(cell['source']))


def references(nb):
    "The list of the works that the text of `nb` cites, and those of its citations that are wrong."
    works = bibliography()
    text = '\n'.join(''.join(c['source']) for c in nb['cells'] if c['cell_type'] == 'markdown' and not is_references(c))
    cited = [(label, url) for label, url in links(text) if url in works or re.search(r' \(?\d{4}\)?$', label)]
    wrong = [f'[{label}]({url})' for label, url in cited if url not in works or label not in citations(works[url])]
    urls = {url for _, url in cited}
    return '\n'.join(reference(work) for url, work in works.items() if url in urls), wrong


def set_references(path):
    "Put the list of references at the end of the notebook at `path`; returns the citations that are wrong."
    nb = json.loads(path.read_text())
    text, wrong = references(nb)
    cell_id = hashlib.sha256(f'{path.stem} references'.encode()).hexdigest()[:8]
    new = {'cell_type': 'markdown', 'id': cell_id, 'metadata': {}}
    cell = next(filter(is_references, nb['cells']), new) | {'source': text.splitlines(True)}
    nb['cells'] = [c for c in nb['cells'] if not is_references(c)] + [cell] * bool(text)
    path.write_text(json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + '\n')
    return wrong


def readme():
    """README.md as nbs/index.ipynb gives it, and its pictures: the visible cells as Markdown, and `{path: bytes}`.

    A picture is named by its cell, and described by the cell's `#| fig-alt`."""
    import nbformat
    from nbconvert import MarkdownExporter
    nb = nbformat.read(NBS / 'index.ipynb', 4)
    nb.cells = [c for c in nb.cells if 'hide' not in directives(c.source)]
    page = rf"({settings()['site_url']}/\1.html\2)"
    said = {c.id: directives(c.source).get('fig-alt', c.id).strip('"') for c in nb.cells}
    for c in nb.cells:
        if 'echo' in directives(c.source): c.source = ''
        if c.cell_type == 'markdown': c.source = re.sub(r'\((?:\d+_)?(\w+)\.ipynb(#[\w-]*)?\)', page, c.source)
        if c.cell_type != 'code': continue
        c.source = re.sub(r'^#\|.*\n?', '', c.source, flags=re.M)
        for o in c.outputs:
            if 'image/png' in o.get('data', {}): o.metadata['filename'] = c.id
    nb.metadata['language_info'] = {'name': 'python'}
    where = os.path.relpath(PICTURES, ROOT)
    text, found = MarkdownExporter().from_notebook_node(nb, resources={'output_files_dir': where})
    text = re.sub(rf'!\[png\]\(({where}/(\w+)\.png)\)', lambda m: f'![{said[m[2]]}]({m[1]})', text)
    text = re.sub(r'```python\n+```\n*|^ +$', '', text, flags=re.M)
    return re.sub(r'\n{3,}', '\n\n', text).strip() + '\n', found['outputs']


def readme_is_new():
    "Whether README.md and its pictures are what nbs/index.ipynb gives."
    text, pictures = readme()
    stored = {os.path.relpath(p, ROOT): p.read_bytes() for p in PICTURES.glob('*')}
    return (ROOT / 'README.md').read_text() == text and stored == pictures


def write_readme():
    "Write README.md and its pictures, and remove those of cells that are gone."
    text, pictures = readme()
    (ROOT / 'README.md').write_text(text)
    PICTURES.mkdir(exist_ok=True)
    for p in PICTURES.glob('*'): p.unlink()
    for name, content in pictures.items(): (ROOT / name).write_bytes(content)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('job', choices=['run', 'check', 'form', 'heads', 'references', 'readme'])
    ap.add_argument('paths', nargs='*', type=Path)
    ap.add_argument('--flags', default='slow')
    ap.add_argument('--check', action='store_true')
    a = ap.parse_args()
    paths = [p.resolve() for p in a.paths]
    if a.job == 'run':
        for p in paths or notebooks():
            start = time.perf_counter()
            run(p, a.flags.split())
            print(f'{p.name}: {time.perf_counter() - start:.0f} s', flush=True)
    if a.job == 'form' and (faults := [fault for p in paths or notebooks() + modules() for fault in form(p)]):
        sys.exit('\n'.join([*faults, f'{len(faults)} places do not fit their page; CONTRIBUTING.md has the rules']))
    if a.job == 'heads':
        for p in notebooks(): set_head(p)
    if a.job == 'references' and (wrong := [f'{p.name}: {c}' for p in notebooks() for c in set_references(p)]):
        sys.exit('not as nbs/references.bib has author, year and address:\n' + '\n'.join(wrong))
    if a.job == 'check' and (old := stale()):
        sys.exit(f"stored outputs are older than their code: {', '.join(old)}; run: python -m tools.notebooks run")
    if a.job == 'readme' and not a.check: write_readme()
    if a.job == 'readme' and a.check and not readme_is_new():
        sys.exit('README.md is not what nbs/index.ipynb gives; run: python -m tools.notebooks readme')


if __name__ == '__main__': main()
