"""The command that needs a trained teacher and no images."""
import json, os, subprocess, sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from distill_nb import data_free, run
from distill_nb.files import read_weights, save_weights
from distill_nb.protocol import Measure
from distill_nb.data import digits
from distill_nb.training import Recipe, Supervised, evaluate, fit
from distill_nb.compare import share_interval
from distill_nb.zoo import build_model, load_weights
from distill_nb.report import draw_images, head_of, result_table
from distill_nb.cli import distill_nb_data_free, run_command

PAIR = ['--teacher', 'digit_teacher', '--student', 'digit_student']
SHAPE = ['--channels', '1', '--size', '8']


def command(*argv): return run_command(distill_nb_data_free, [str(a) for a in argv])


def weights(path): return load_weights(build_model('digit_student', 10, 1, 8), path).state_dict()


def same(a, b): return all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    torch.manual_seed(0)
    model, train = build_model('digit_teacher', 10, 1, 8), digits().train
    recipe = Recipe(epochs=5, batch_size=64, optimizer='adamw', lr=3e-3, precision='float32')
    fit(Supervised(model), train, recipe, progress=False)
    path = tmp_path_factory.mktemp('teacher')/'teacher.safetensors'
    save_weights(model, path, mean=train.mean, std=train.std)
    return path


@pytest.fixture(scope='module')
def blind(teacher, tmp_path_factory):
    "A run that has nothing but the teacher's file."
    folder = tmp_path_factory.mktemp('blind')/'run'
    with pytest.MonkeyPatch.context() as m:
        def read(*_, **__): raise AssertionError('a data set was read')
        m.setattr(run, 'load_data', read)
        assert command(*PAIR, *SHAPE, '--teacher_weights', teacher, '--steps', 30, '--out', folder) == 0
    return folder


def test_a_run_reads_no_data_and_leaves_what_it_promises(blind):
    files = {'recipe.json', 'result.json', 'student.safetensors', 'images.png', 'curves.png', 'work', 'progress.json'}
    assert {p.name for p in blind.iterdir()} == files
    result = json.loads((blind/'result.json').read_text())
    assert set(head_of('', '', '', torch.device('cpu'), 1)) | {'measure', 'seconds', 'resumed', 'rows'} == set(result)
    assert result['data'] == 'none: images of 1x8x8, 10 classes' and result['measure'] is None
    taught, student = result['rows']
    assert taught['agreement_generated'] == 1 and 0 <= student['agreement_generated'] <= 1 and student['steps'] == 30
    assert set(student['runs'][0]) == {'seed', 'seconds', 'agreement_generated'}
    assert 'accuracy' not in taught and 'accuracy' not in student and student['curve'] == []
    about = read_weights(blind/'student.safetensors')[1]
    assert about['architecture'] == 'digit_student' and json.loads(about['mean']) == pytest.approx(digits().train.mean)
    for name in ('images.png', 'curves.png'): assert Image.open(blind/name).size[0] > 300


def test_data_measure_the_student_and_teach_it_nothing(blind, teacher, tmp_path, capsys):
    assert command(*PAIR, '--teacher_weights', teacher, '--steps', 30, '--data', 'digits', '--out', tmp_path/'run') == 0
    said, (_, row) = capsys.readouterr().out, json.loads((tmp_path/'run'/'result.json').read_text())['rows']
    assert same(weights(tmp_path/'run'/'student.safetensors'), weights(blind/'student.safetensors'))
    student = load_weights(build_model('digit_student', 10, 1, 8), tmp_path/'run'/'student.safetensors')
    assert row['accuracy'] == evaluate(student, digits().test).accuracy
    assert f"{100 * row['accuracy']:.2f} % on the test split" in said
    assert [p['step'] for p in row['curve']] == list(range(1, 31)) and 'gain' not in said
    measures = ('seconds', 'accuracy', 'balanced_accuracy', 'loss', 'ece', 'agreement', 'agreement_generated')
    assert row['runs'] == [{'seed': 0} | {k: row[k] for k in measures}]
    assert row['ci95'] == share_interval(round(359 * row['accuracy']), 359)
    assert f"[{100 * row['ci95'][0]:.2f}, {100 * row['ci95'][1]:.2f}]" in said


def test_a_run_goes_on_where_it_was_killed(blind, teacher, tmp_path, monkeypatch, capsys, interrupt):
    init = data_free.DataFree.__init__
    def begin(self, *args, **kw):
        init(self, *args, **kw)
        interrupt(self, 17)
    argv = [*PAIR, *SHAPE, '--teacher_weights', teacher, '--steps', 30, '--out', tmp_path/'run']
    with monkeypatch.context() as m:
        m.setattr(data_free.DataFree, '__init__', begin)
        m.setattr(data_free, 'fit', partial(fit, save_every=0.))
        assert command(*argv) == 130 and '--resume' in capsys.readouterr().err
    assert command(*argv) == 2 and '--resume' in capsys.readouterr().err
    assert command(*argv, '--resume') == 0
    assert same(weights(tmp_path/'run'/'student.safetensors'), weights(blind/'student.safetensors'))
    assert command(*argv, '--resume') == 0  # finished: read again
    assert command(*argv[:-4], '--steps', 31, *argv[-2:], '--resume') == 2
    assert 'steps was 30 and is 31' in capsys.readouterr().err


def test_inversion(teacher, tmp_path, monkeypatch, capsys):
    usual = data_free._by_inversion.__defaults__
    short = tuple(replace(d, steps=3) if isinstance(d, Recipe) else d for d in usual)
    monkeypatch.setattr(data_free._by_inversion, '__defaults__', short)
    argv = [*PAIR, *SHAPE, '--teacher_weights', teacher, '--way', 'inversion']
    assert command(*argv, '--steps', 6, '--out', tmp_path/'run') == 0
    assert '(8 steps' in capsys.readouterr().out  # four rounds of two
    assert json.loads((tmp_path/'run'/'result.json').read_text())['rows'][1]['steps'] == 8


def test_a_normalisation_that_is_not_known_is_not_learned_from_the_data(teacher, tmp_path, capsys):
    unnamed = tmp_path/'unnamed.safetensors'
    save_weights(load_weights(build_model('digit_teacher', 10, 1, 8), teacher), unnamed)
    for out, shape in (('blind', SHAPE), ('seen', ['--data', 'digits'])):
        assert command(*PAIR, *shape, '--teacher_weights', unnamed, '--steps', 5, '--out', tmp_path/out) == 0
        assert 'names no normalisation' in capsys.readouterr().out
        assert 'mean' not in read_weights(tmp_path/out/'student.safetensors')[1]
    assert same(weights(tmp_path/'blind'/'student.safetensors'), weights(tmp_path/'seen'/'student.safetensors'))


def test_the_names_of_the_classes_go_from_the_teacher_to_the_student(teacher, blind, tmp_path, capsys):
    model, names = load_weights(build_model('digit_teacher', 10, 1, 8), teacher), digits().train.classes
    facts = {k: json.loads(v) for k, v in read_weights(teacher)[1].items() if k in ('mean', 'std')}
    save_weights(model, tmp_path/'named.safetensors', classes=names, **facts)
    with torch.no_grad():
        for p in model.fc.parameters(): p.copy_(p.flip(0))
    save_weights(model, tmp_path/'turned.safetensors', classes=names[::-1], **facts)
    stored = lambda out: json.loads(read_weights(tmp_path/out/'student.safetensors')[1].get('classes', 'null'))
    def run(file, out, *more):
        weights = tmp_path/f'{file}.safetensors'
        return command(*PAIR, *more, '--teacher_weights', weights, '--steps', 5, '--out', tmp_path/out)
    assert run('turned', 'blind', *SHAPE) == 0 and stored('blind') == names[::-1]
    for file in ('named', 'turned'): assert run(file, file, '--data', 'digits') == 0 and stored(file) == names
    assert 'names the classes in another order' in capsys.readouterr().out
    assert same(weights(tmp_path/'named'/'student.safetensors'), weights(tmp_path/'turned'/'student.safetensors'))
    assert 'classes' not in read_weights(blind/'student.safetensors')[1]


@pytest.mark.parametrize('channels', [1, 2, 3, 4])
def test_pictures_of_any_channels(channels):
    for norm in ((None, None), ([0.5] * channels, [0.2] * channels)):
        assert len(draw_images(torch.randn(7, channels, 8, 8), *norm).axes) == 10


def test_a_table_has_no_empty_column():
    row = {'setting': 'data_free', 'model': 'student', 'parameters': 1, 'macs': 1, 'bytes': 1, 'latency_ms': 1.,
           'accuracy': 0.5, 'ci95': [0.4, 0.6], 'agreement': 0.5, 'ece': 0.1}
    compared = row | {'difference': 0.1, 'difference_ci95': None}
    def head(*rows): return result_table(rows, Measure('accuracy', share=True)).head
    assert 'gain [95 %]' not in head(row) and 'gain [95 %]' in head(row, compared)


@pytest.mark.parametrize('argv,said', [
    ([], 'teacher_weights'), (['W', '--steps', '0'], 'steps'),
    (['--teacher_weights', 'none'], 'teacher_weights must be the file of a trained teacher'),
    (['--teacher_weights', ''], 'teacher_weights must be the file of a trained teacher'),
    (['W', '--steps', '1000000000'], 'steps times batch_size'),
    (['W', '--steps', '9'*20], 'steps times batch_size'),
    (['W', '--mean', 'nan', '--std', '1'], "mean must be a finite number, but is 'nan'."),
    (['W', '--mean', '1,inf', '--std', '1'], 'a finite number, or 2 with commas between them'),
    (['W', '--batch_size', '0'], 'batch_size'), (['W', '--lr', 'nan'], 'lr'),
    (['W', '--seed', '-1'], 'seed'), (['W', '--seed', str(2**64)], 'seed'), (['W', '--size', '9'*20], 'size'),
    (['W', '--way', 'magic'], 'inversion'), (['W', '--classes', '1'], 'classes'),
    (['W', '--channels', '0'], 'channels'), (['W', '--size', '2'], 'size'),
    (['W', '--classes', '7'], 'does not hold weights'),
    (['W', '--precision', 'int1'], 'precision'), (['W', '--device', 'abacus'], 'device'),
    (['W', '--data', 'digits', '--classes', '7'], 'those of the data'), (['W', '--data', 'digit'], 'digits'),
    (['W', '--teacher', 'resnet57'], 'resnet56'), (['W', '--student', 'resnet57'], 'resnet56'),
    (['W', '--resume'], '--out FOLDER'), (['--teacher_weights', '/nowhere.safetensors'], '/nowhere.safetensors'),
    (['--teacher_weights', 'GUESSING', '--data', 'digits'], 'never trained'),
    (['--teacher_weights', 'NAN'], 'not finite'), (['W', '--out', 'OTHER'], 'has no recipe.json')])
def test_bad_input_is_one_line_and_leaves_nothing(argv, said, teacher, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = build_model('digit_teacher', 10, 1, 8)
    save_weights(model, 'guessing.safetensors')
    torch.nn.init.constant_(model.fc.bias, float('nan'))
    save_weights(model, 'nan.safetensors')
    Path('other').mkdir()
    Path('other/notes.txt').write_text('mine')
    before = sorted(p.name for p in tmp_path.rglob('*'))
    words = {'W': ['--teacher_weights', str(teacher)], 'GUESSING': ['guessing.safetensors'], 'NAN': ['nan.safetensors'],
             'OTHER': ['other']}
    argv = [w for a in argv for w in words.get(a, [a])]
    given = [*PAIR, *(o for pair in zip(SHAPE[::2], SHAPE[1::2]) if pair[0] not in argv for o in pair)]
    try: code = command(*given, *argv)
    except SystemExit as e: code = e.code
    err = capsys.readouterr().err
    assert code == 2 and err.count('\n') == 1 and err.startswith('distill_nb_data_free: ') and said in err, err
    assert sorted(p.name for p in tmp_path.rglob('*')) == before


def test_a_teacher_without_batch_norm_is_refused(tmp_path, monkeypatch, capsys):
    def plain(name, classes, channels, size):
        features = 4 * (size - 2)**2
        return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.Flatten(), nn.Linear(features, classes))
    monkeypatch.setattr(run, 'build_model', plain)
    save_weights(plain('', 10, 1, 8), tmp_path/'plain.safetensors')
    assert command(*SHAPE, '--teacher_weights', tmp_path/'plain.safetensors', '--out', tmp_path/'run') == 2
    err = capsys.readouterr().err
    assert 'batch' in err and err.count('\n') == 1 and not (tmp_path/'run').exists()


@pytest.mark.parametrize('name', [None, 'thesis.tmp', '.thesis.txt', '.result.json.tmp'])
def test_what_a_failing_run_found_it_leaves(name, teacher, tmp_path, capsys):
    out = tmp_path/'mine'
    out.mkdir()
    (tmp_path/'link').symlink_to(out)
    if name: (out/name).write_text('precious')
    for place in (out, tmp_path/'link'):
        assert command(*PAIR, *SHAPE, '--teacher_weights', teacher, '--steps', 5, '--lr', 1e30, '--out', place) == 2
        assert capsys.readouterr().err.count('\n') == 1
    assert out.is_dir() and [p.name for p in out.iterdir()] == ([name] if name else [])
    assert not name or (out/name).read_text() == 'precious'


def test_a_lack_of_memory_is_one_line_and_a_defect_is_not(capsys):
    cpu, cuda = "DefaultCPUAllocator: can't allocate memory", 'CUDA out of memory'
    shortages = [RuntimeError(cpu), torch.OutOfMemoryError(cuda)]
    defects = [RuntimeError('a defect'), NotImplementedError('a defect')]
    for error in shortages + defects:
        def job(): raise error
        if error in shortages: assert run_command(job, []) == 2 and str(error) in capsys.readouterr().err
        else:
            with pytest.raises(RuntimeError, match='a defect'): run_command(job, [])


def test_a_terminal_that_lacks_a_letter_gets_the_table_all_the_same(teacher, tmp_path):
    argv = [*PAIR, '--teacher_weights', str(teacher), '--steps', '3', '--data', 'digits', '--out', str(tmp_path/'für')]
    code = 'import sys; from distill_nb.cli import *; sys.exit(run_command(distill_nb_data_free, sys.argv[1:]))'
    p = subprocess.run([sys.executable, '-c', code, *argv], capture_output=True, text=True,
                       env=os.environ | {'PYTHONIOENCODING': 'ascii'})
    assert p.returncode == 0 and 'f?r' in p.stdout and 'accuracy %' in p.stdout, p.stderr


@pytest.mark.parametrize('data, expected', [('digits', ('8', '16')), (None, ('16', '16'))])
def test_the_students_file_says_how_images_are_stored(data, expected, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(run, 'check_teacher', lambda *_: None)  # it has learned from smaller ones
    distill_nb_data_free('digit_teacher', 'digit_student', teacher, channels=1, size=16, steps=2,
                         data=data, out=tmp_path/'run')
    about = read_weights(tmp_path/'run'/'student.safetensors')[1]
    assert (about['side'], about['size']) == expected and 'whole' not in about


def test_paths_and_numbers_from_python(teacher, tmp_path):
    right = {'teacher': 'digit_teacher', 'student': 'digit_student', 'teacher_weights': teacher, 'channels': 1,
             'size': 8, 'steps': 2, 'out': tmp_path/'other'}
    distill_nb_data_free('digit_teacher', 'digit_student', teacher, channels=1, size=8, steps=2, out=tmp_path/'run')
    for bad in ({'size': '8'}, {'size': 8.}, {'channels': '1'}, {'seed': None}, {'steps': None}, {'classes': 10.}):
        with pytest.raises(ValueError, match=next(iter(bad))): distill_nb_data_free(**right | bad)
