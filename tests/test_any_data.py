"""Folders of all kinds through the command: images without labels, unequal classes, reports, curves on disk."""
import csv, json, os, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from distill_nb import run
from distill_nb.rows import UNLABELLED
from distill_nb.protocol import class_weights
from distill_nb.folders import image_folder
from distill_nb.compare import Comparison
from distill_nb.run import Options, Watch, prepare, run_job
from distill_nb.cli import command_parser, distill_nb, run_command

PAIR = ['--teacher', 'digit_teacher', '--student', 'digit_student']
QUICK = ['--epochs', '2', '--teacher_epochs', '6', '--seeds', '2', '--temperature', '4', '--alpha', '0.9', *PAIR]
FOUND = load_digits()


def command(*argv): return run_command(distill_nb, [str(a) for a in argv])


def write(folder, k, numbers):
    "Some of the digits k as files."
    folder.mkdir(parents=True, exist_ok=True)
    for i in numbers:
        x = (FOUND.images[FOUND.target == k][i]*255/16).round().astype(np.uint8)
        Image.fromarray(x).save(folder/f'{k}-{i:03}.png')


@pytest.fixture(scope='module')
def few(tmp_path_factory):
    "Three digits: 6 labelled, 40 more to validate, 60 to test, and 240 without a label."
    root = tmp_path_factory.mktemp('few')
    for k in range(3):
        for split, numbers in dict(train=range(6), valid=range(10, 50), test=range(50, 90)).items():
            write(root/'photos'/split/f'c{k}', k, numbers)
        write(root/'more'/f'{k}', k, range(100, 170))
        write(root/'flat', k, range(90, 98))
    return root


@pytest.fixture(scope='module')
def finished(few, tmp_path_factory):
    out = tmp_path_factory.mktemp('run')/'run'
    given = ['--data', f"folder:{few/'photos'}", '--unlabelled', few/'more', '--unlabelled', few/'flat', '--labels', 0]
    assert command(*given, *QUICK, '--out', out) == 0
    return out


# --- names of all kinds

def test_names_that_are_no_utf8_or_have_no_glyph_are_in_the_report(tmp_path):
    root, names = tmp_path/os.fsdecode(b'data\xfd'), (os.fsdecode(b'bad\xff\xfe'), '\u732b', '\U0001f431')
    try: root.mkdir()
    except (OSError, UnicodeError): pytest.skip('this file system refuses such names')
    for k, name in enumerate(names): write(root/name, k, range(60))
    given = ['--data', f'folder:{root}', '--labels', '0', *QUICK, '--seeds', '1']
    done = subprocess.run([sys.executable, '-m', 'distill_nb', *given], cwd=tmp_path, capture_output=True,
                          env=os.environ | {'PYTHONUTF8': '1'})
    assert done.returncode == 0 and b'Glyph' not in done.stderr, ascii(done.stderr[-2000:])
    page, result = (tmp_path/'runs'/'data'/name for name in ('report.html', 'result.json'))
    assert all(c in page.read_bytes().decode() for c in ('bad\\udcff\\udcfe', '\u732b'))
    assert ascii(sorted(c['name'] for c in json.loads(result.read_text())['classes'])) == ascii(sorted(names))


def test_a_run_from_python_with_whole_numbers_is_resumed_by_the_command(few, tmp_path, capsys):
    given = dict(data=f"folder:{few/'photos'}", teacher='digit_teacher', student='digit_student', labels=0, seeds=1)
    numbers = dict(epochs=1, teacher_epochs=40, temperature=4, alpha=1, lr=1)
    distill_nb(**given, **numbers, out=str(tmp_path/'run'))
    argv = [a for k, v in (given | numbers).items() for a in (f'--{k}', v)]
    assert command(*argv, '--out', tmp_path/'run', '--resume') == 0, capsys.readouterr().err
    floats = {k: getattr(Options(**numbers), k) for k in numbers}
    assert floats == numbers and {*map(type, floats.values())} == {float}
    with pytest.raises(ValueError, match='temperature must be'): Options(temperature=10**400)


# --- images without labels

def test_unlabelled_images_have_a_setting_of_their_own(finished, few):
    result = json.loads((finished/'result.json').read_text())
    assert [(r['setting'], r['model']) for r in result['rows']] == [
        ('unlabelled', m) for m in ('teacher', 'alone', 'distilled')]
    assert result['labelled_images'] == {'unlabelled': 18}
    assert '258 images' not in result['data'] and '252 train' in result['data']
    page = (finished/'report.html').read_text()
    assert '18 training images have a label' in page and 'unlabelled' in page
    assert f"--unlabelled {few/'more'} {few/'flat'}" in result['command']


def test_the_teacher_and_the_student_alone_learn_from_the_labelled_images_only(few, tmp_path, monkeypatch):
    seen = []
    real = run.fit
    def fit(objective, data, recipe, *args, **kwargs):
        seen.append((len(data), int(data.labelled.sum()), recipe.total_steps(len(data)),
                     recipe.total_rows(len(data))))
        return real(objective, data, recipe, *args, **kwargs)
    monkeypatch.setattr(run, 'fit', fit)
    options = Options(data=f"folder:{few/'photos'}", unlabelled=few/'more', teacher='digit_teacher', alpha=.9,
                      student='digit_student', teacher_epochs=4, epochs=2, seeds=1, temperature=4., labels=0)
    job = prepare(options, tmp_path/'run')
    task = job.tasks['unlabelled']
    assert (len(task.labelled), len(task.transfer)) == (18, 228) and task.labelled.labelled.all()
    assert (task.transfer.y == UNLABELLED).sum() == 210
    assert (task.recipe.total_steps(18), task.recipe.total_rows(18)) == (-(-2*228//128), 2)
    run._train_teacher(job)
    assert seen == [(18, 18, -(-4*228//128), 4)]


def test_few_labels_count_among_those_that_are_there(few, tmp_path):
    options = Options(data=f"folder:{few/'photos'}", unlabelled=few/'more', teacher='digit_teacher',
                      student='digit_student', labels=6)
    tasks = prepare(options, tmp_path/'run').tasks
    assert {k: (len(t.labelled), len(t.transfer)) for k, t in tasks.items()} == {
        'unlabelled': (18, 228), 'few_labels': (6, 228)}
    assert tasks['few_labels'].transfer.labelled.sum() == 6
    classes = run._classes(prepare(options, tmp_path/'run'))
    assert [(c['train'], c['labelled']) for c in classes] == [(6, {'unlabelled': 6, 'few_labels': 2})] * 3
    with pytest.raises(ValueError, match='for 18 labelled training images'):
        prepare(Options(data=options.data, unlabelled=few/'more', teacher='digit_teacher', student='digit_student',
                        labels=17), tmp_path/'run')


@pytest.mark.parametrize('given, said', [
    (['--data', 'digits', '--unlabelled', 'more'], 'unlabelled must be left out for data that are no folder'),
    (['--data', 'folder:FEW', '--unlabelled', 'nowhere'], 'nowhere'),
    (['--data', 'digits', '--duplicates', 'drop'], 'duplicates must be left out for data that are no folder'),
    (['--data', 'folder:FEW', '--duplicates', 'maybe'], 'duplicates must be'),
    (['--class_weights', 'equal'], "class_weights must be balanced, or left out, but is 'equal'"),
    (['--keep', 'first'], 'keep must be'),
    (['--patience', '0'], 'patience must be'),
    (['--log', 'paper'], 'tensorboard'),
    (['--data', 'folder:FEW', '--unlabelled', 'MORE', '--out', 'MORE/run'], 'a folder that is not within that of the'),
])
def test_what_makes_no_sense_is_refused_in_a_line(given, said, few, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = [g.replace('FEW', str(few/'photos')).replace('MORE', str(few/'more')) for g in given]
    assert command(*given, *PAIR) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and said in error
    assert list(tmp_path.iterdir()) == []


def test_an_option_may_be_given_several_values_and_more_than_once():
    parse = command_parser(distill_nb).parse_args
    assert parse(['--unlabelled', 'a', 'b', '--labels', '0', '--unlabelled', 'c d']).unlabelled == ['a', 'b', 'c d']
    assert parse([]).unlabelled is None


# --- what is printed and written

def test_the_folder_is_reported_before_any_work_and_in_the_page(few, tmp_path, capsys):
    options = Options(data=f"folder:{few/'photos'}", teacher='digit_teacher', student='digit_student')
    job = prepare(options, tmp_path/'r')
    said = capsys.readouterr().out
    assert all(line in said for line in str(job.report).splitlines())
    assert 'c0' in said and '18' in said and not (tmp_path/'r').exists()


def test_the_report_of_a_run_holds_that_of_its_folder(finished):
    result, page = json.loads((finished/'result.json').read_text()), (finished/'report.html').read_text()
    assert result['folder'] and 'The folder' in page and 'c2' in page


def test_curves_and_progress_are_on_disk_while_a_run_works(finished, few):
    progress = json.loads((finished/'progress.json').read_text())
    assert progress['training'] == 'unlabelled/distilled-1' and progress['row']['accuracy'] >= 0
    assert progress['begun'] == 5  # the teacher, and two students for each of two seeds
    rows = list(csv.DictReader((finished/'work'/'unlabelled'/'distilled-1'/'curve.csv').open()))
    assert [float(r['step']) for r in rows][-1] == progress['row']['step']


def test_every_row_goes_to_the_tracker_too(tmp_path):
    told = []
    class Tracker:
        def __init__(self, name=''): self.name = name
        def inside(self, name): return Tracker(f'{self.name}/{name}')
        def __call__(self, row): told.append((self.name, row['step']))
        def close(self): told.append('closed')
    watch = Watch(tmp_path, Tracker())
    watch.inside('few_labels').inside('alone-0')({'step': 3})
    watch.close()
    assert told == [('/few_labels/alone-0', 3), 'closed']
    assert json.loads((tmp_path/'progress.json').read_text()) == {
        'training': 'few_labels/alone-0', 'begun': 0, 'row': {'step': 3}}


# --- unequal classes, and the state that is kept

def test_class_weights_reach_the_teacher_and_every_student(few, tmp_path, monkeypatch):
    seen = []
    real = run.Supervised
    monkeypatch.setattr(run, 'Supervised', lambda *a, **k: seen.append(k['class_weights']) or real(*a, **k))
    for k, n in ((0, 30), (1, 12), (2, 6)): write(tmp_path/'photos'/f'c{k}', k, range(n))
    options = Options(data=f"folder:{tmp_path/'photos'}", teacher='digit_teacher', student='digit_student', labels=0,
                      class_weights='balanced', teacher_epochs=30, epochs=1, seeds=1, temperature=4., alpha=.5)
    job = prepare(options, tmp_path/'run')
    wanted = class_weights(job.data.train)
    assert torch.equal(job.tasks['all_labels'].class_weights, wanted) and wanted[2] > wanted[0]
    run._train_teacher(job)
    assert torch.equal(seen[0].cpu(), wanted)


def test_the_recipes_keep_the_best_and_stop_early_for_all_alike(few, tmp_path):
    options = Options(data=f"folder:{few/'photos'}", teacher='digit_teacher', student='digit_student', keep='best',
                      patience=3)
    job = prepare(options, tmp_path/'run')
    for recipe in (*job.recipes.values(), *(t.recipe for t in job.tasks.values())):
        assert (recipe.keep, recipe.patience) == ('best', 3)


def test_an_epoch_of_a_training_that_stopped_early_takes_no_less_time(few, tmp_path):
    job = prepare(Options(data=f"folder:{few/'photos'}", teacher='digit_teacher', student='digit_student', epochs=8),
                  tmp_path/'run')
    def seconds(*steps):
        runs = [{'model': 'alone', 'seed': i, 'steps': n, 'planned': 80} for i, n in enumerate(steps)]
        row = {'model': 'alone', 'seconds': 4., 'ci95': [0, 1]}
        return run._student_row(row, job, Comparison(runs, 'alone', job.measure), {})['seconds_per_epoch']
    assert seconds(40, 80) == pytest.approx(seconds(80, 80) * 4 / 3) and seconds(20, 20) == 4 * seconds(80, 80)
