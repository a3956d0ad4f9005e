"""Wrong command lines, all of them: each ends soon, with one line that names what is wrong, and leaves nothing.

`python tests/test_commands.py` prints every line with its outcome, and `python tests/test_commands.py WORD` those
with a word in them."""
import contextlib, io, os, random, shutil, signal, sys, tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image

from distill_nb import bench, cli, embed_run, language_run, plan_run, run
from distill_nb.cli import (command_parser, distill_nb, distill_nb_data_free, distill_nb_embed, distill_nb_export,
                            distill_nb_language, distill_nb_plan, distill_nb_predict, run_command)
from distill_nb.bench import distill_nb_bench
from distill_nb.data import digits
from distill_nb.files import save_weights
from distill_nb.zoo import build_model

SECONDS = 60  # after which a line counts as endless
COMMANDS = {f.__name__: f for f in (distill_nb, distill_nb_predict, distill_nb_data_free, distill_nb_embed,
                                    distill_nb_export, distill_nb_language, distill_nb_plan, distill_nb_bench)}
BASE = {
    'distill_nb': {'--epochs': '1', '--teacher_epochs': '1', '--seeds': '1', '--labels': '0', '--temperature': '4',
                   '--alpha': '0.5', '--out': 'run'},
    'distill_nb_predict': {'': 'photos', '--student': 'student.safetensors'},
    'distill_nb_data_free': {
        '--teacher': 'digit_teacher', '--student': 'digit_student', '--channels': '1', '--size': '8',
        '--teacher_weights': 'teacher.safetensors', '--steps': '2', '--out': 'run'},
    'distill_nb_embed': {'--data': 'digits', '--teacher': 'teacher.safetensors', '--student': 'digit_student',
                         '--epochs': '1', '--seeds': '1', '--out': 'run'},
    'distill_nb_language': {'--data': 'text:texts', '--student': 'gpt_micro', '--teacher': 'gpt_micro',
                            '--length': '16', '--steps': '1', '--teacher_steps': '1', '--vocabulary': '257',
                            '--seeds': '1', '--tries': '1',
                            '--batch_size': '4', '--out': 'run'},
    'distill_nb_plan': {'--family': 'digit_student', '--widths': '1', '--epochs': '1', '--teacher_epochs': '1',
                        '--seeds': '1', '--tries': '1', '--out': 'run'},
    'distill_nb_export': {'--student': 'student.safetensors', '--out': 'student.onnx'},
    'distill_nb_bench': {'--pair': 'digits', '--steps': '1', '--batch_size': '16'}}


class Line(NamedTuple):
    "A command line, and how it must end."
    command: str
    argv: tuple
    said: tuple  # One of these is in its message
    code: int = 2
    runs: bool = False  # Is it wrong in what is seen only once it runs?

    def __str__(self): return ' '.join([self.command, *map(repr, self.argv)])


def line(command, said=None, *, code=2, runs=False, **given):
    "The base of a command with some options given otherwise; `_`: what has no name."
    options = BASE[command] | {f'--{k}' if k != '_' else '': v for k, v in given.items()}
    words = [w for k, v in options.items() for w in ([k] if k else []) + ([v] if isinstance(v, str) else v)]
    name, value = next(iter(given.items()))
    values = [value] if isinstance(value, str) else value[-1:]
    said = said and [said] or [name, *(' '.join(v.split())[:50] or "''" for v in values)]
    return Line(command, tuple(words), tuple(said), code, runs)


# --- every option with every value that cannot be right

NUMBERS = ['', 'many', 'nan', 'inf', '-1', '9' * 30, '9' * 5000, '1,5', 'ten\nlines']
WRONG = {int: [*NUMBERS, '1.5', '1e3'], float: [*NUMBERS, '-inf', '1e300', '1e-400'],
         str: ['', 'wörd \udcff\n\x1b', 'x' * 300, '/', 'empty', 'notes.txt', 'fifo']}
# What is no mistake: a folder of downloads that is not used, a new or an empty place for the results, 0 written
# otherwise, a patience that is never lost, and a rate that only a training can find too high.
RUNS = 'distill_nb', 'distill_nb_data_free', 'distill_nb_embed', 'distill_nb_language', 'distill_nb_plan'
ODD = 'wörd \udcff\n\x1b'
RIGHT = {(command, 'root', value) for command in (*RUNS, 'distill_nb_bench', 'distill_nb_export')
         for value in WRONG[str][1:]}
RIGHT |= {(command, 'lr', value) for command in RUNS for value in ('1e300', '9' * 30)}
RIGHT |= {(command, 'out', value) for command in RUNS for value in ('empty', ODD)}
RIGHT |= {('distill_nb_predict', 'out', ODD)}
RIGHT |= {(c, *v) for c in ('distill_nb', 'distill_nb_plan') for v in (('alpha', '1e-400'), ('patience', '9' * 30))}
RIGHT |= {('distill_nb_language', name, '1e-400') for name in ('alpha', 'dropout')}
RIGHT |= {('distill_nb_language', 'teacher_lr', value) for value in ('1e300', '9' * 30)}
RIGHT -= {(command, 'root', 'x' * 300) for command in RUNS}


def drawn():
    "A line for each option of each command and each wrong value of its type."
    for name, function in COMMANDS.items():
        for action in command_parser(function)._actions:
            option = action.option_strings[-1].removeprefix('--') if action.option_strings else '_'
            if option == 'help': continue
            if action.nargs == 0: yield line(name, **{option: ['--' + option, 'x']}); continue
            if option != '_': yield line(name, **{option: []})
            for value in WRONG.get(action.type, WRONG[str]):
                if (option, value) in (('_', '/'), ('_', 'notes.txt')): continue  # all images of the machine; a row
                yield line(name, code=0 if (name, option, value) in RIGHT else 2, **{option: [value]})


# --- files

def edited(name, **facts):
    "The student's file, with other facts, as if it had been saved with them."
    from safetensors.torch import load_file, save_file
    from distill_nb.files import fingerprint, read_weights
    tensors, old = read_weights('student.safetensors')
    new = {k: v for k, v in (old | facts).items() if v is not None and k != 'fingerprint'}
    save_file(tensors, name, new | {'fingerprint': fingerprint(tensors, new)})


DEEP = '[' * 10**5
FACTS = dict(
    size=['abc', '0', '-8', '1e9', '8.5', 'NaN', '9' * 400, '[8]', '', DEEP],
    channels=['abc', '0', '-1', '4', 'NaN', '9' * 400, '[1]', '', DEEP],
    mean=['abc', '0.5', '[]', '["a"]', '[NaN]', '[Infinity]', '[0.5, 0.5]', '{}', '[[0.5]]', '[1e999]',
          DEEP, '[' + '9' * 400 + ']'],
    std=['abc', '[0]', '[-1]', '[NaN]', '[]', 'null', '{"0": 1}', DEEP],
    crop=['abc', '0', '-1', 'NaN', 'inf', '2', '[1]', DEEP],
    classes=['abc', '[]', '["a", "a"]', '["only", "two"]', '[1, 2]', '{}', 'null', DEEP],
    architecture=['', 'digit', 'resnet56', '/', 'my.py:student', 'timm:none_such', 'x' * 10**5, DEEP],
    valid_accuracy=['abc', 'NaN', 'inf', '-1', '[0.5]', DEEP],
    valid_items=['abc', '0', '-5', '1.5', DEEP],
    side=['abc', '0', '-3', '8.5', '1e9', '9' * 400, '[8]', '', DEEP],
    whole=['maybe', '1', '', DEEP])


def facts():
    "Students whose facts were edited by hand."
    for key, values in FACTS.items():
        for i, value in enumerate(values):
            name = f'{key}-{i}.safetensors'
            yield lambda: edited(name, **{key: value}), line('distill_nb_predict', name, student=name)


RECIPES = {'no.json': 'no json', 'list.json': '[]', 'number.json': '7', 'empty.json': '', 'deep.json': DEEP,
           'half.json': '{"options": {"epo', 'none.json': '{"options": null}', 'bytes.json': b'\xff\xfe\x00',
           'level.json': '{"options": {"data": ' + '[' * 900 + ']' * 900 + '}}',
           'other.json': '{"options": {"data": "mnist"}}', 'nan.json': '{"options": {"epochs": NaN}}'}


def run_folder(name, **files):
    "A folder with files in it."
    Path(name).mkdir()
    for file, content in files.items():
        (Path(name)/file.replace('_', '.')).write_bytes(content if isinstance(content, bytes) else content.encode())


def folders():
    "Run folders whose recipe was edited by hand, and places that hold no run."
    for name, content in RECIPES.items():
        out = name.removesuffix('.json')
        for command in RUNS:
            place = f'{out}-{command}'
            yield lambda: run_folder(place, recipe_json=content), line(command, place, out=[place, '--resume'])
    for command in RUNS:
        yield None, line(command, "'typo' holds no run to continue", out=['typo', '--resume'])
        yield None, line(command, "'empty' holds no run to continue", out=['empty', '--resume'])
        yield None, line(command, "'photos' exists and holds no run", out='photos')
        yield None, line(command, 'notes.txt', out='notes.txt/run')
        yield None, line(command, 'fifo', out='fifo')
        yield lambda: Path('odd/recipe.json').mkdir(parents=True, exist_ok=True), line(command, 'odd', out='odd')


FUNCTIONS = {
    'raises': 'def f(**_): raise RuntimeError("no network today")', 'asserts': 'def f(**_): assert False',
    'exits': 'def f(**_): raise SystemExit(3)', 'none': 'def f(**_): return None', 'number': 'def f(**_): return 7',
    'text': 'def f(**_): return "a network"', 'other': 'from torch import nn\ndef f(**_): return nn.Linear(3, 2)',
    'class': 'from torch import nn\nf = nn.Linear', 'value': 'f = 7', 'syntax': 'def f(:', 'indent': ' def f(): pass',
    'import': 'import no_such_package\ndef f(): pass', 'bytes': b'\xff\xfe def f(): pass', 'nul': 'f = "\0"',
    'deep': 'def f(**_): return f()', 'missing': 'def g(): pass', 'wanted': 'def f(nothing_that_is_known): pass',
    'top': 'raise ValueError("at the top")', 'lines': 'def f(**_): raise ValueError("one\\ntwo\\nthree")', 'empty': '',
    'keys': 'def f(**_): return {}["no key"]', 'types': 'def f(**_): return None + 1',
    'stop': 'def f(**_): raise StopIteration',
    'recursive': 'x = []\nx.append(x)\ndef f(**_): return x', 'nested': 'f = ' + '(' * 500 + ')' * 500,
    'quits': 'import sys\nsys.exit(0)', 'memory': 'def f(**_): raise MemoryError'}


def functions():
    "Source code that is no network."
    for name, code in FUNCTIONS.items():
        file = Path(f'{name}.py')
        def make(): file.exists() or file.write_bytes(code if isinstance(code, bytes) else code.encode())
        yield make, line('distill_nb', file.name, student=f'{file}:f')
        yield make, line('distill_nb', file.name, teacher=f'{file}:f')
        yield make, line('distill_nb_predict', file.name, architecture=f'{file}:f')
        yield make, line('distill_nb_data_free', file.name, teacher=f'{file}:f')
        yield make, line('distill_nb_embed', file.name, student=f'{file}:f')
        yield make, line('distill_nb_embed', file.name, teacher=f'{file}:f')
    yield None, line('distill_nb', "'empty.py' has no function ''", student='empty.py:')
    for place in ('no.py:f', ':f', 'photos:f', 'photos.py:f', 'fifo.py:f', 'notes.txt:f'):
        yield None, line('distill_nb', student=place)


def weights():
    "Files that hold no weights, or others."
    from distill_nb.models import digit_teacher
    contents = {'nothing.pth': b'', 'text.pth': b'no weights', 'page.pth': b'<html>404</html>',
                'gzip.pth': b'\x1f\x8b' + bytes(99), 'zip.pth': b'PK\x03\x04' + bytes(99),
                'header.safetensors': b'\xff' * 8 + b'{' + b'x' * 99,
                'huge.safetensors': (2**40).to_bytes(8, 'little') + b'{}', 'pickle.pth': b'\x80\x04K\x07.'}
    for name, content in contents.items():
        make = lambda: Path(name).write_bytes(content)
        yield make, line('distill_nb', name, teacher_weights=name)
        yield make, line('distill_nb_predict', name, student=name)
        yield make, line('distill_nb_data_free', name, teacher_weights=name)
        yield make, line('distill_nb_embed', name, teacher=name)
        yield make, line('distill_nb_embed', name, student_weights=name)
        yield make, line('distill_nb_language', name, teacher=name)
        yield make, line('distill_nb_bench', name, teacher_weights=name)


EDITS = {'step': ['x', -1, 1.5, None, True, 10**9, [3]], 'done': ['yes', None, 1],
         'history': [None, [], 7, {'rows': 7}], 'recipe': [7, None, []], 'scaler': ['x', [1]], 'data': [None, 7],
         'objective': [{}]}


def edit_checkpoint(name, key, value):
    "A run whose teacher's checkpoint was edited by hand, as if it had been saved so."
    from distill_nb.history import Checkpoint
    if not Path('whole').exists():
        argv = line('distill_nb', teacher_epochs='4', out='whole').argv
        with contextlib.redirect_stdout(io.StringIO()), running(): assert run_command(distill_nb, [*argv]) == 0
    shutil.copytree('whole', name)
    checkpoint = Checkpoint(Path(name)/'work'/'teacher')
    tensors, meta = checkpoint.read()
    checkpoint.write(tensors, meta | {key: value})


def checkpoints():
    "Runs with a checkpoint that was edited by hand, or is damaged."
    for key, values in EDITS.items():
        for i, value in enumerate(values):
            name = f'checkpoint-{key}-{i}'
            yield (lambda: edit_checkpoint(name, key, value),
                   line('distill_nb', name, runs=True, teacher_epochs='4', out=[name, '--resume']))


def other():
    "What is in no table."
    for name in COMMANDS:
        yield None, line(name, 'no_such', no_such=['--no_such'])
        yield None, line(name, '--ou', no_such=['--ou'])
    yield None, line('distill_nb', 'word', _='word')
    yield None, line('distill_nb', 'root', data=['cifar10', '--root', 'run/data'])
    yield None, line('distill_nb', 'size', size='16384')
    yield None, line('distill_nb_data_free', 'size', size='16384')
    yield None, line('distill_nb_embed', 'size', size='16384')
    yield None, line('distill_nb_embed', 'word', _='word')
    yield None, line('distill_nb_embed', 'batch_size', batch_size='1000000000')
    yield None, line('distill_nb_embed', 'teacher_weights', teacher='digit_teacher')
    yield None, line('distill_nb_embed', '3 were found', data='folder:photos')
    yield None, line('distill_nb_language', 'word', _='word')
    yield None, line('distill_nb_plan', 'word', _='word')
    yield None, line('distill_nb_plan', 'alone', method='alone')
    yield None, line('distill_nb_plan', 'resnet9', family='resnet8,resnet9')
    yield None, line('distill_nb_plan', 'widths', widths='1,1')
    yield None, line('distill_nb_plan', 'batch_size', batch_size='1000000000')
    for data in ('digits', 'text:', 'text:empty', 'text:photos', 'text:notes.txt', 'folder:texts', 'text:fifo'):
        yield None, line('distill_nb_language', data=data)
    yield None, line('distill_nb_language', 'batch_size', batch_size='1000000000')
    yield None, line('distill_nb_language', 'length', length='100000')
    yield None, line('distill_nb_language', 'top', top='257')
    yield None, line('distill_nb_data_free', 'classes', classes='2147483647')
    yield None, line('distill_nb_data_free', 'channels', channels='2147483647')
    yield None, line('distill_nb_data_free', 'batch_size', batch_size='2147483647')
    yield None, line('distill_nb_data_free', 'steps', steps='99999999999')
    yield None, line('distill_nb', 'seeds', seeds='2147483647')
    yield None, line('distill_nb', 'labels', labels='2147483647')
    yield None, line('distill_nb', 'batch_size', batch_size='1000000000')
    yield None, line('distill_nb_bench', 'steps', steps='99999999999')
    yield None, line('distill_nb_bench', 'batch_size', batch_size='1000000000')
    yield None, line('distill_nb_bench', 'batch_size', batch_size='60000', pair='large')
    real = ['--data', 'digits', '--teacher_weights', 'teacher.safetensors']
    yield None, line('distill_nb_bench', 'to_accuracy', to_accuracy=['99999', *real])
    yield None, line('distill_nb_predict', 'no.png', _=['photos', 'no.png'])
    yield None, line('distill_nb_predict', 'images', _=[])
    yield None, line('distill_nb_predict', 'photos', out='photos')
    yield None, line('distill_nb_predict', "'t.csv'", out=['t.csv', '--resume'])
    deep = '{"network": ' + '[' * 900 + ']' * 900 + '}'
    for i, text in enumerate(['', 'no json\n', '[]\n', '7\n', DEEP + '\n', deep, '{}\npath,class']):
        out = f't{i}.csv'
        yield (lambda: Path(f'{out}.partial').write_text(text)), line('distill_nb_predict', out, out=[out, '--resume'])
    for i, text in enumerate(['', 'no json', '[]', '7', DEEP, '{"command": 7}', '{"command": "rm"}', '{}']):
        yield (lambda: Path(f'r{i}.json').write_text(text)), line('distill_nb_bench', f'r{i}.json', out=f'r{i}.json')
    yield None, line('distill_nb_bench', 'nowhere', out='nowhere/r.json')


def all_lines():
    "Pairs of what has to be made first, and a line."
    yield from ((None, l) for l in drawn())
    for lines in (facts, folders, functions, weights, checkpoints, other): yield from lines()


# --- how a line ends

class Outcome(NamedTuple):
    "How a command line ended."
    code: int|str  # Its exit code, or what kind of exception came out
    said: str  # On stderr
    left: list  # Files that were not there before

    def why_not(self, line):
        "What is wrong about it; nothing if all is well."
        if self.code != line.code: return f'must end with {line.code}'
        if line.code == 0: return ''
        if self.said.count('\n') != 1 or not self.said.startswith(line.command + ': '): return 'must say one line'
        if not any(word in self.said for word in line.said): return f'must name {line.said}'
        return f'left {self.left}' if self.left and not line.runs else ''


class Endless(BaseException): pass


@contextlib.contextmanager
def alarm(seconds):
    "Stop what takes longer."
    def stop(*_): raise Endless
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try: yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def running():
    "The commands run what they were given."
    with pytest.MonkeyPatch.context() as m:
        for name in ('run_job', 'run_free'): m.setattr(cli, name, getattr(run, name))
        m.setattr(cli, 'run_embed', embed_run.run_embed)
        m.setattr(cli, 'run_language', language_run.run_language)
        m.setattr(cli, 'run_plan', plan_run.run_plan)
        yield


def here():
    "What there is in the present folder, and since when."
    places = (p for p in Path().rglob('*') if '__pycache__' not in str(p))
    return {p: p.stat().st_mtime_ns if p.is_file() else 0 for p in places}


def outcome(line):
    "Run a line in the present folder."
    before, err = here(), io.StringIO()
    try:
        with (alarm(SECONDS), contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()),
              running() if line.runs else contextlib.nullcontext()):
            code = run_command(COMMANDS[line.command], list(line.argv))
    except SystemExit as e: code = e.code
    except BaseException as e: code = f'{type(e).__name__}: {e}'
    return Outcome(code, err.getvalue(), [str(p) for p, at in here().items() if before.get(p) != at])


@contextlib.contextmanager
def only_checked():
    "The commands check what they are given, and train nothing."
    with pytest.MonkeyPatch.context() as m:
        for name in ('run_job', 'run_free', 'run_embed', 'run_language', 'run_plan'):
            m.setattr(cli, name, lambda *_: {})
        for what in ('steps', 'methods'): m.setattr(bench, f'_measure_{what}', lambda *_: {})
        m.setattr(bench, 'bench_text', lambda _: '')
        m.setenv('DISTILL_NB_CACHE', str(Path('cache').resolve()))
        yield


def make_files():
    "Files and folders of all kinds in the present folder."
    torch.manual_seed(0)
    train = digits().train
    facts = dict(channels=1, size=8, side=8, mean=train.mean, std=train.std)
    for name in ('student', 'teacher'):
        model = build_model(f'digit_{name}', 10, 1, 8)
        save_weights(model, f'{name}.safetensors', train.classes, architecture=f'digit_{name}', **facts)
    Path('photos').mkdir()
    for i in range(3): Image.fromarray(train.x[i, 0].numpy()).save(f'photos/{i}.png')
    Path('notes.txt').write_text('no weights, no image, no JSON')
    Path('texts').mkdir()
    for i in range(12): Path(f'texts/{i}.txt').write_text(f'{i} green bottles are hanging on the wall. ' * 20)
    Path('empty').mkdir()
    os.mkfifo('fifo')


def tried(make, line):
    "A line with its outcome; what it left is removed."
    if make: make()
    found = outcome(line)
    for place in map(Path, found.left):
        if place.is_dir(): shutil.rmtree(place, ignore_errors=True)
        else: place.unlink(missing_ok=True)
    return found


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp('commands')
    with pytest.MonkeyPatch.context() as m, only_checked():
        m.chdir(folder)
        make_files()
        yield folder


@pytest.mark.parametrize('share', [0.1, pytest.param(1., marks=pytest.mark.slow)])
def test_wrong_lines_end_soon_with_one_line_that_names_what_is_wrong_and_leave_nothing(share, place):
    chosen, wrong, n = random.Random(0), {}, 0
    for make, line in all_lines():
        if chosen.random() > share: continue
        found, n = tried(make, line), n + 1
        if why := found.why_not(line): wrong[str(line)[:200]] = why, found
    assert wrong == {} and n > 180


def main(word=''):
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (24 * 2**30,) * 2)
    os.chdir(tempfile.mkdtemp())
    make_files()
    bad = n = 0
    with only_checked():
        for make, l in all_lines():
            if word not in str(l): continue
            found = tried(make, l)
            why = found.why_not(l)
            bad, n = bad + bool(why), n + 1
            print('BAD ' if why else 'ok  ', f'{found.code!r:.60} {str(l):.200}', flush=True)
            print(f'       {found.said!r:.300} {why}', flush=True)
    print(f'{n} lines, {bad} bad')


if __name__ == '__main__': main(*sys.argv[1:])
