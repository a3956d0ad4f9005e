"""The command that needs images and a trained teacher, and no label."""
import itertools, json, shutil, signal, subprocess, sys, time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from distill_nb import embed_run
from distill_nb.files import fingerprint, read_weights, save_weights
from distill_nb.rows import UNLABELLED
from distill_nb.data import ImageData, digits
from distill_nb.training import Recipe, Setup, Supervised, fit
from distill_nb.zoo import build_model, open_model
from distill_nb.embeddings import embed, nearest
from distill_nb.embed import Embed
from distill_nb.embed_run import EmbedOptions, common_share, draw_parts, places_of, read_album
from distill_nb.run import Watch
from distill_nb.cli import distill_nb_embed, distill_nb_predict, run_command

from pretended_gpu import pretended

QUICK = ['--student', 'digit_student', '--epochs', '2', '--batch_size', '8', '--device', 'cpu']
FILES = {'recipe.json', 'result.json', 'student.safetensors', 'embeddings.safetensors', 'images.json', 'map.png',
         'neighbours.png', 'curves.png', 'report.html', 'work', 'progress.json'}


def command(*argv): return run_command(distill_nb_embed, [str(a) for a in argv])


def tensors(path): return read_weights(path)[0]


def save(x, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(x[0].numpy()).save(path)


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A trained teacher, 40 images in no order, and 60 in class folders."
    home, train = tmp_path_factory.mktemp('embed'), digits().train
    torch.manual_seed(0)
    model = build_model('digit_teacher', 10, 1, 8)
    fit(Supervised(model), train, Recipe(epochs=6, optimizer='adamw', lr=3e-3, precision='float32'), progress=False)
    facts = dict(architecture='digit_teacher', channels=1, size=8)
    save_weights(model, home/'teacher.safetensors', train.classes, mean=train.mean, std=train.std, **facts)
    save_weights(model, home/'silent.safetensors', train.classes, **facts)
    for i in range(40): save(train.x[i], home/'flat'/('' if i % 2 else f'{i % 3}')/f'{i:02}.png')
    for c in range(3):
        mine = (train.y == c).nonzero()[:, 0].tolist()
        for part, some in (('train', mine[:14]), ('test', mine[14:20])):
            for i in some: save(train.x[i], home/'sorted'/part/f'class {c}'/f'{i}.png')
    return home


@pytest.fixture(scope='module')
def run(home):
    assert command('--data', f"folder:{home/'flat'}", '--teacher', home/'teacher.safetensors', *QUICK,
                   '--out', home/'run') == 0
    return home/'run'


def rows_of(folder):
    "The rows of a result without what is measured anew."
    rows = json.loads((folder/'result.json').read_text())['rows']
    return [{k: v for k, v in row.items() if k != 'latency_ms'} for row in rows]


# --- without labels

def test_a_run_leaves_what_it_promises(run, home):
    assert {p.name for p in run.iterdir()} == FILES
    result = json.loads((run/'result.json').read_text())
    assert [r['model'] for r in result['rows']] == ['teacher', 'before', 'student']
    assert result['neighbours'] == 3 and result['seeds'] == 1 and result['measure'][0] == 'agreement'
    assert {'name', 'command', 'data', 'hardware', 'software', 'date', 'seconds'} <= set(result)
    teacher, before, student = result['rows']
    assert teacher['agreement'] == 1 and 0 < before['agreement'] < 1
    assert all(r['ci95'][0] <= r['agreement'] <= r['ci95'][1] for r in (before, student))
    gain = student['differences']['before']['agreement']['difference']
    assert gain == pytest.approx(student['agreement'] - before['agreement'])
    page = (run/'report.html').read_text()
    assert page.count('data:image/png;base64,') == 3 and f"{100*student['agreement']:.2f}" in page


def test_the_rows_are_what_the_student_says_of_the_images_that_are_named(run, home):
    images = json.loads((run/'images.json').read_text())
    files = sorted(str(p.relative_to(home/'flat')) for p in (home/'flat').rglob('*.png'))
    assert sorted(i['path'] for i in images) == files
    assert [i['split'] for i in images] == ['train']*24 + ['valid']*8 + ['test']*8
    student, rows = open_model(run/'student.safetensors'), load_file(run/'embeddings.safetensors')['embeddings']
    pixels = [np.array(Image.open(home/'flat'/i['path']))[None] for i in images]
    data = ImageData(np.stack(pixels), [UNLABELLED]*40, ['a', 'b'], mean=student.mean, std=student.std)
    assert student.outputs == 'embedding' and rows.dtype == torch.float32
    assert torch.allclose(embed(student, data), rows, atol=1e-5)
    teacher = open_model(home/'teacher.safetensors')
    theirs = embed(teacher, data)
    shares = common_share(rows[-8:], theirs[-8:], 3)
    assert shares.mean() == pytest.approx(rows_of(run)[2]['agreement'])


def test_the_picture_shows_neighbours_from_the_images_that_the_table_counts(monkeypatch):
    rows = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    job, seen = SimpleNamespace(album=SimpleNamespace(data=SimpleNamespace(test=range(9)))), []
    monkeypatch.setattr(embed_run, '_strips', lambda data, *found: seen.extend(found) or np.zeros((8, 8, 3), np.uint8))
    embed_run._draw_neighbours(job, rows, rows.flip(1)**3, rows=4, k=3)
    index, own, its = seen
    assert index[0] == 21 and index[-1] == 29 and len(index) == 4
    assert torch.equal(own, 21 + nearest(rows[21:], 3)[index - 21])
    assert torch.equal(its, 21 + nearest(rows[21:].flip(1)**3, 3)[index - 21])


def test_common_neighbours_are_counted_as_by_hand():
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(9, 4, generator=g) for _ in range(2))
    expected = []
    for i, j in zip(nearest(a, 3).tolist(), nearest(b, 3).tolist()): expected.append(len(set(i) & set(j))/3)
    assert common_share(a, b, 3).tolist() == pytest.approx(expected)


def test_splits_depend_on_pixels_alone_and_copies_stay_together(tmp_path):
    train = digits().train
    names = [f'{i}.png' for i in range(60)]
    for folder, order in (('one', names), ('other', names[::-1])):
        for i, name in enumerate(order): save(train.x[i], tmp_path/folder/name)
    for i in range(60): save(train.x[i], tmp_path/'twice'/f'a{i}.png'), save(train.x[i], tmp_path/'twice'/f'b{i}.png')
    found = {}
    for folder in ('one', 'other', 'twice'):
        data = read_album(EmbedOptions(data=f'folder:{tmp_path/folder}', teacher='t')).data
        found[folder] = [{x.numpy().tobytes() for x in d.x} for d in data]
        assert not any(d.labelled.any() for d in data) and all(len(d) > 5 for d in data)
        assert not set.intersection(*found[folder])
    assert found['one'] == found['other'] == found['twice']


def test_parts_are_of_the_seed():
    hashes = np.random.default_rng(0).integers(0, 256, (500, 32), np.uint8)
    assert np.bincount(draw_parts(hashes)).tolist() == [400, 50, 50]
    assert (draw_parts(hashes, 1) != draw_parts(hashes, 2)).any()


@pytest.mark.parametrize('n, d', [(5, 3), (5, 2), (5, 1), (20, 1), (20, 60), (60, 60), (2, 4)])
def test_a_map_has_places_for_any_embeddings(n, d):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    found = places_of(x)
    assert found.shape == (n, 2) and 0 <= found.min() and found.max() <= 1 and (found == places_of(x)).all()
    assert np.isfinite(places_of(torch.ones(n, d))).all()


# --- with labels

@pytest.fixture(scope='module')
def labelled(home):
    "A run on class folders, and what was trained in it."
    seen, fit = [], embed_run.fit
    def noted(objective, data, recipe, valid=None, **kw):
        about = type(objective), bool(data.labelled.any()), fingerprint(objective.model.state_dict())
        history = fit(objective, data, recipe, valid, **kw)
        seen.append((*about, recipe.seed, history.steps))
        return history
    with pytest.MonkeyPatch.context() as m:
        m.setattr(embed_run, 'fit', noted)
        assert command('--data', f"folder:{home/'sorted'}", '--teacher', home/'teacher.safetensors', *QUICK,
                       '--seeds', 2, '--out', home/'labelled') == 0
    return home/'labelled', seen


def test_labels_measure_and_never_train_the_student(labelled):
    folder, seen = labelled
    assert [s[:2] for s in seen] == [(Embed, False), (Supervised, True)]*2
    for seed in (0, 1):
        student, other = (s for s in seen if s[3] == seed)
        assert student[2] == other[2] and student[4] == other[4]  # the same weights to begin with, as many steps
    assert seen[0][2] != seen[2][2]
    result = json.loads((folder/'result.json').read_text())
    assert [r['model'] for r in result['rows']] == ['teacher', 'before', 'student', 'supervised']
    for row in result['rows']:
        for name in ('knn', 'linear', 'agreement'): assert 0 <= row[name] <= 1 and len(row[f'{name}_ci95']) == 2
    teacher, *others = result['rows']
    assert teacher['interval_over'] == 'test images' and {r['interval_over'] for r in others} == {'seeds'}
    found = others[1]['differences']['supervised']['knn']
    assert found['difference'] == pytest.approx(others[1]['knn'] - others[2]['knn'])
    images = json.loads((folder/'images.json').read_text())
    assert all(i['path'].split('/')[1] == i['class'] for i in images) and len(images) == 60


def test_labels_can_be_left_aside(home):
    asked = dict(data=f"folder:{home/'sorted'}", teacher='t')
    assert read_album(EmbedOptions(**asked)).labelled
    album = read_album(EmbedOptions(**asked, ignore_labels=True))
    assert not album.labelled and len(album.files) == 60 and not any(d.labelled.any() for d in album.data)
    album = read_album(EmbedOptions(data='digits', teacher='t', ignore_labels=True))
    assert not any(d.labelled.any() for d in album.data)


def test_the_command_on_a_card(home, capsys):
    with pretended():
        assert command('--data', f"folder:{home/'sorted'}", '--teacher', home/'teacher.safetensors', *QUICK,
                       '--seeds', 1, '--device', 'cuda', '--out', home/'card') == 0
    assert '1 seed, on cuda' in capsys.readouterr().out
    assert [r['interval_over'] for r in rows_of(home/'card')] == ['test images']*4


# --- where it goes on

@pytest.mark.parametrize('moment', ['training', 'judging', 'writing'])
def test_an_interrupted_run_ends_as_one_that_was_not(moment, run, home, monkeypatch, capsys):
    out, argv = home/moment, ['--data', f"folder:{home/'flat'}", '--teacher', home/'teacher.safetensors', *QUICK]
    def stop(*_, **__): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(EmbedOptions, 'setup', lambda o, folder: Setup(
            folder/'work', True, torch.device('cpu'), save_every=0, log=Watch(folder)))
        step, count = Embed.forward, itertools.count()
        # the rehearsal asks once; there are six steps, and a checkpoint behind the third
        if moment == 'training': m.setattr(Embed, 'forward', lambda *a: step(*a) if next(count) < 6 else stop())
        if moment == 'judging':
            judge = embed_run._judged
            m.setattr(embed_run, '_judged', lambda *a: judge(*a) if next(count) < 1 else stop())
        if moment == 'writing': m.setattr(embed_run, '_save_student', stop)
        assert command(*argv, '--out', out) == 130
    assert f'--out {out} --resume' in capsys.readouterr().err and not (out/'result.json').exists()
    assert command(*argv, '--out', out, '--resume') == 0
    for file in ('student', 'embeddings'):
        own, other = (load_file(f/f'{file}.safetensors') for f in (out, run))
        assert own.keys() == other.keys() and all(torch.equal(own[k], other[k]) for k in own)
    assert rows_of(out) == rows_of(run)
    assert (out/'images.json').read_bytes() == (run/'images.json').read_bytes()
    assert (out/'map.png').read_bytes() == (run/'map.png').read_bytes()


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_result(run, home):
    out = home/'killed'
    argv = ['--data', f"folder:{home/'flat'}", '--teacher', home/'teacher.safetensors', *QUICK, '--out', out]
    p = subprocess.Popen([sys.executable, '-c', 'from distill_nb.cli import *; main_embed()', *map(str, argv)],
                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while p.poll() is None and not list(out.glob('work/*/checkpoint.safetensors')): time.sleep(0.01)
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert not (out/'result.json').exists()
    assert command(*argv, '--resume') == 0 and rows_of(out) == rows_of(run)


def test_a_finished_run_is_only_read_again_when_asked(run, home, capsys):
    argv = ['--data', f"folder:{home/'flat'}", '--teacher', home/'teacher.safetensors', *QUICK, '--out', run]
    before = rows_of(run)
    assert command(*argv) == 2 and '--resume' in capsys.readouterr().err
    assert command(*argv, '--lr', 0.1, '--resume') == 2 and 'another run (lr was' in capsys.readouterr().err
    assert command(*argv, '--resume') == 0 and rows_of(run) == before


# --- teacher and student

@pytest.mark.parametrize('of, name', [('teacher', 'digit_teacher'), ('run/student', 'digit_student')])
def test_a_student_can_begin_with_trained_weights(of, name, home, run):
    "Those of a classifier, or those that an earlier run left, which have no head."
    weights = home/f'{of}.safetensors'
    found = embed_run.prepare_embed(EmbedOptions(
        data=f"folder:{home/'flat'}", teacher=str(home/'teacher.safetensors'), student=name,
        student_weights=str(weights), mean=0.25, std=0.5, device='cpu'), home/'begun')
    made, known = found.make().state_dict(), {k.removeprefix('model.'): v for k, v in tensors(weights).items()}
    same = {k for k in known if made[k].shape == known[k].shape and torch.equal(made[k], known[k])}
    assert len(same) > 5 and {k for k in known if k not in same} <= {'fc.weight', 'fc.bias'}
    assert not (home/'begun').exists() and found.teacher.mean == [0.25]
    assert found.album.data.train.mean == pytest.approx(open_model(weights).mean)


def test_a_normalisation_that_nobody_wrote_down_is_found_or_asked_for(home, tmp_path, capsys):
    asked = dict(data='digits', student='digit_student', device='cpu')
    found = embed_run.prepare_embed(EmbedOptions(teacher=str(home/'silent.safetensors'), **asked), tmp_path/'run')
    assert found.teacher.mean == pytest.approx(digits().train.mean) and 'first batch norm' in capsys.readouterr().out
    (tmp_path/'own.py').write_text(
        'from torch import nn\ndef plain(channels, size):\n'
        '    return nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 3))\n')
    mine = dict(teacher=f"{tmp_path/'own.py'}:plain", **asked)
    with pytest.raises(ValueError, match='mean and std must be given'):
        embed_run.prepare_embed(EmbedOptions(**mine), tmp_path/'run')
    found = embed_run.prepare_embed(EmbedOptions(**mine, mean=0.5, std=0.5), tmp_path/'run')
    assert found.teacher.mean == [0.5] and found.teacher.outputs == 'embedding'


@pytest.mark.parametrize('word', ['live', 'all', '2', 'auto'])
def test_how_the_teacher_answers(word, home, tmp_path):
    job = embed_run.prepare_embed(EmbedOptions(
        data='digits', teacher=str(home/'teacher.safetensors'), student='digit_student', cache=word, device='cpu'),
        tmp_path/'run')
    views = digits().train.n_views
    assert job.mode == {'live': 'live', '2': 2}.get(word, views)
    assert job.transfer().n_views == (2 if word == '2' else views) and not (tmp_path/'run').exists()


def test_a_student_of_embeddings_names_no_classes(run, home, capsys):
    assert run_command(distill_nb_predict, [str(home/'flat'), '--student', str(run/'student.safetensors')]) == 2
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and ('embedding' in err or 'classes' in err), err


# --- wrong input

def folders(home, place):
    "Folders that can't be right."
    images = sorted((home/'flat').rglob('*.png'))
    for name, n in (('none', 0), ('single', 1), ('few', 9), ('damaged', 12), ('copies', 1)):
        (place/name).mkdir()
        for i in images[:n]: shutil.copy(i, place/name)
    (place/'damaged'/'broken.png').write_bytes(b'no image')
    for i in range(20): shutil.copy(images[0], place/'copies'/f'{i}.png')
    for c, name in (('a', 'single'), ('b', 'few')): shutil.copytree(place/name, place/'tiny'/c)
    shutil.copytree(home/'flat', place/'photos')
    (place/'own.py').write_text('from torch import nn\ndef f(classes, channels, size):\n'
                                '    return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.Flatten())\n'
                                'def g(): return nn.Sequential(nn.Flatten(), nn.ReLU())')


@pytest.mark.parametrize('argv, said', [
    (['--data', ''], 'data must be folder:PATH'), (['--teacher', ''], 'teacher must be'),
    (['--teacher', 'digit_teacher'], 'without labels no teacher can be trained'),
    (['--teacher', 'digit_teacher', '--teacher_weights', 'none'], 'without labels no teacher can be trained'),
    (['--teacher', 'nowhere.safetensors'], 'nowhere.safetensors'),
    (['--teacher', 'own.py:g', '--mean', '0', '--std', '1'], 'head'),
    (['--data', 'folder:nowhere'], 'nowhere'), (['--data', 'folder:none'], '0 were found'),
    (['--data', 'folder:single'], '1 were found'), (['--data', 'folder:few'], '9 were found'),
    (['--data', 'folder:copies'], 'too few images'), (['--data', 'folder:damaged'], 'broken.png'),
    (['--data', 'folder:tiny'], 'ignore_labels'), (['--data', 'digit'], 'digits'),
    (['--out', 'photos/run'], 'not within that of the images'), (['--size', '2'], 'size'),
    (['--student', 'vit_tiny_8', '--size', '9'], 'vit_tiny_8'), (['--student', 'resnet9'], 'resnet8'),
    (['--student_weights', 'nowhere.pth'], 'nowhere.pth'), (['--student_weights', 'none'], 'student_weights'),
    (['--cache', 'sometimes'], 'cache must be auto, live'), (['--cache', '0'], 'cache'), (['--seeds', '0'], 'seeds'),
    (['--epochs', '0'], 'epochs'), (['--batch_size', '33'], 'at most the number of training images'),
    (['--mean', '0.5'], 'mean and std'), (['--duplicates', 'maybe'], 'duplicates'),
    (['--data', 'digits', '--skip_damaged'], 'skip_damaged'), (['--resume'], 'holds no run'),
    (['--device', 'abacus'], 'device'), (['--precision', 'int1'], 'precision'), (['--log', 'diary'], 'log')])
def test_bad_input_is_one_line_and_leaves_nothing(argv, said, home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folders(home, tmp_path)
    before = sorted(map(str, tmp_path.rglob('*')))
    base = {'--data': 'folder:photos', '--teacher': str(home/'teacher.safetensors'), '--student': 'digit_student',
            '--out': 'run'}
    given = [w for k, v in base.items() if k not in argv for w in (k, v)]
    assert command(*given, *argv) == 2
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and err.startswith('distill_nb_embed: ') and said in err, err
    assert sorted(map(str, tmp_path.rglob('*'))) == before


def test_damaged_images_can_be_left_out(home, tmp_path):
    folders(home, tmp_path)
    album = read_album(EmbedOptions(data=f"folder:{tmp_path/'damaged'}", teacher='t', skip_damaged=True))
    assert len(album.files) == 12 and any('broken.png' in line for line in album.said)


def test_a_word_in_the_name_of_a_folder_gives_no_advice(tmp_path):
    folder = tmp_path/'classes'
    for i in range(12): save(digits().train.x[i], folder/'ab'[i % 2]/f'{i}.png')
    for where, skip in ((tmp_path/'no classes', None), (folder, b'no image')):
        if skip: (folder/'a'/'x.png').write_bytes(skip)
        with pytest.raises(ValueError) as e:
            read_album(EmbedOptions(data=f'folder:{where}', teacher='digit_teacher'))
        assert 'ignore_labels' not in str(e.value)
