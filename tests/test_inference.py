"""Answers for files: the same as in training, and tables that survive odd names, damage and kills."""
import csv, io, os, signal, subprocess, sys, time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distill_nb import inference

from distill_nb.files import locked, read_weights, save_weights
from distill_nb.rows import UNLABELLED
from distill_nb.data import ImageData
from distill_nb.images import Form
from distill_nb.folders import ImageFiles, image_folder
from distill_nb.contract import Teacher
from distill_nb.training import predict
from distill_nb.zoo import build_model
from distill_nb.inference import image_paths, open_student, predictions, write_predictions
from distill_nb.cli import distill_nb, distill_nb_predict, run_command

from processes import python

CLASSES = ['cat, small', 'dög', 'o"wl']
FACTS = dict(channels=3, side=16, size=16, mean=[0.4]*3, std=[0.2]*3)
CODE = 'import sys; from distill_nb.cli import main_predict; main_predict()'


def command(*argv): return run_command(distill_nb_predict, [str(a) for a in argv])


def table(text): return list(csv.reader(io.StringIO(text, newline='')))


def pixels(i, w, h, channels=3):
    g = np.random.default_rng(i)
    return (g.integers(0, 120, (h, w, channels)) + 40*(i % 3)).astype(np.uint8).squeeze()


def write(folder, n=12, sizes=((16, 16),), mode='RGB'):
    "A folder for each class, with images of these sizes in turn."
    for i in range(3*n):
        place = folder/CLASSES[i % 3]
        place.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(pixels(i, *sizes[i % len(sizes)]))
        image.convert(mode).save(place/f'{i:03}.png')
    return folder


def student(path, data=None, seed=0, **more):
    "The file of a network with random weights that was trained, so to say, on these data."
    torch.manual_seed(seed)
    facts = FACTS | more
    if data: facts = {k: getattr(data, k) for k in FACTS}
    model = build_model('resnet8', 3, facts['channels'], facts['size'])
    torch.nn.init.normal_(model.fc.weight)
    save_weights(model, path, CLASSES, **{'architecture': 'resnet8'} | facts)
    return model


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp('student')/'student.safetensors'
    student(path)
    return path


@pytest.fixture
def odd(tmp_path):
    "Images with names that a table must quote, in their order."
    names = ['a, b.png', 'c "d".png', 'e\nf\n.png', 'g\rh.png', 'ï 猫.png', 'z/"\n",.PNG', 'z/plain.bmp']
    for i, name in enumerate(names):
        (tmp_path/'new'/name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(i, 16, 16)).save(tmp_path/'new'/name)
    return [str(tmp_path/'new'/name) for name in sorted(names)]


# --- the same answers as in training

@pytest.mark.parametrize('sizes,mode,size', [
    (((16, 16),), 'RGB', None), (((16, 16),), 'RGB', 24),  # stored at 16, shown at 24
    (((30, 20), (20, 31), (64, 64)), 'RGB', 24), (((30, 20), (12, 12)), 'L', 16), (((16, 16),), 'L', None)])
def test_the_answers_are_those_of_the_training(sizes, mode, size, tmp_path):
    data = image_folder(write(tmp_path/'photos', sizes=sizes, mode=mode), size=size, max_bytes=0, workers=0)
    model = student(tmp_path/'s.safetensors', data.train)
    expected = predict(model, data.test).double().softmax(1).sort(dim=1, descending=True)
    network, form = open_student(tmp_path/'s.safetensors')
    found = list(predictions(network, data.test.files, form, top=3, batch_size=len(data.test)))
    assert [p.path for p in found] == data.test.files
    assert [p.classes for p in found] == [[CLASSES[c] for c in row] for row in expected.indices.tolist()]
    assert [p.probabilities for p in found] == expected.values.tolist()
    one_by_one = predictions(network, data.test.files, form, top=3, batch_size=1)
    assert [p.probabilities for p in one_by_one] == [pytest.approx(p.probabilities, abs=1e-5) for p in found]


@pytest.fixture(scope='module')
def photographs(tmp_path_factory):
    "Photographs of several sizes, and a run on them: they are stored squeezed."
    root = tmp_path_factory.mktemp('photographs')
    write(root/'photos', n=20, sizes=((110, 130), (150, 104), (120, 120), (104, 260)))
    argv = ['--data', f"folder:{root/'photos'}", '--size', 100, '--teacher', 'resnet8', '--student', 'resnet8',
            '--epochs', 1, '--teacher_epochs', 6, '--seeds', 1, '--temperature', 4, '--alpha', 0.5, '--labels', 0,
            '--out', root/'run']
    assert run_command(distill_nb, [str(a) for a in argv]) == 0
    return root


@pytest.mark.parametrize('who', ['student', 'teacher'])
@pytest.mark.parametrize('max_bytes', [None, 0])
def test_the_networks_of_a_run_on_photographs_are_asked_as_in_the_run(who, max_bytes, photographs):
    path = photographs/'run'/f'{who}.safetensors'
    splits = [image_folder(photographs/'photos', size=100, max_bytes=m, workers=0) for m in (max_bytes, 0)]
    (test, lazy), n = [s.test for s in splits], len(splits[0].test)
    network, form = open_student(path)
    assert form == lazy.form == Form(120, 'RGB', whole=True) and read_weights(path)[1]['whole'] == 'True'
    assert n > 4 and len(test.shapes.unique(dim=0)) > 2 and isinstance(test, ImageFiles) == (max_bytes == 0)
    other = Teacher(network.model, **network.contract | {'size': (64, 0.8)})
    for asked, model in (network, network.model), (other, other):
        expected = predict(model, test, n).double().softmax(1).sort(dim=1, descending=True)[0].tolist()
        answers = lambda form: [p.probabilities for p in predictions(asked, lazy.files, form, 3, n)]
        assert answers(form) == expected
        assert answers(form._replace(whole=False)) != expected and answers(None) != expected


@pytest.mark.parametrize('mode', ['L', 'LA', 'RGBA', 'P', 'CMYK', '1'])
def test_images_of_every_kind_are_read_as_training_reads_them(mode, tmp_path, trained):
    photos = write(tmp_path/'photos')
    odd = photos/CLASSES[1]/('odd.jpg' if mode == 'CMYK' else 'odd.png')
    Image.fromarray(pixels(7, 40, 25)).convert(mode).save(odd)
    data = image_folder(photos, size=16, max_bytes=0, workers=0)
    split = next(s for s in data if str(odd) in s.files)
    own = split.pixels(torch.tensor([split.files.index(str(odd))]))
    network, form = open_student(trained)
    shown = ImageData(own, torch.tensor([UNLABELLED]), CLASSES, mean=network.mean, std=network.std)
    [p] = predictions(network, odd, form, top=3)
    assert p.probabilities == predict(network, shown).double().softmax(1)[0].sort(descending=True)[0].tolist()


def test_a_student_of_a_grey_folder_reads_colours_as_grey(tmp_path):
    student(tmp_path/'s.safetensors', channels=1, mean=[0.4], std=[0.2])
    image = Image.fromarray(pixels(0, 16, 16))
    image.save(tmp_path/'colour.png')
    image.convert('L').save(tmp_path/'grey.png')
    network, form = open_student(tmp_path/'s.safetensors')
    colour, grey = predictions(network, [tmp_path/'colour.png', tmp_path/'grey.png'], form)
    assert colour.probabilities == grey.probabilities


def test_a_teacher_of_ones_own_and_the_side_that_it_sees(tmp_path):
    model = build_model('resnet8', 3, 3, 16)
    Image.fromarray(pixels(0, 30, 20)).save(tmp_path/'a.png')
    network = Teacher(model, CLASSES, [0.4]*3, [0.2]*3, 16)
    assert list(predictions(network, tmp_path)) == list(predictions(network, tmp_path, Form(16)))
    for lacking in ('classes', 'size'):
        with pytest.raises(ValueError, match=f'must know its {lacking} .*--architecture FILE.py:FUNCTION'):
            predictions(Teacher(model, **network.contract | {lacking: None}), tmp_path)
    for other, said in {
            Teacher(model, CLASSES, size=16): 'must know its mean, std', model: 'teacher must be a Teacher',
            Teacher(model, ['a', 'b'], [0.]*3, [1.]*3, 16): 'there are 2 classes',
            Teacher(model, CLASSES, [0.], [1.], 16): 'the network',
            Teacher(model, CLASSES, [0.]*2, [1.]*2, 16): 'mean'}.items():
        with pytest.raises(ValueError, match=said): predictions(other, tmp_path)
    for form, said in (16, 'form must be a Form'), (Form(16, 'L'), 'mode must be RGB'):
        with pytest.raises(ValueError, match=said): predictions(network, tmp_path, form)


def test_a_network_that_saw_the_centre_of_its_images_sees_it_here(tmp_path):
    model = build_model('resnet8', 3, 3, 16)
    Image.fromarray(pixels(0, 20, 20)).save(tmp_path/'a.png')
    network = Teacher(model, CLASSES, [0.4]*3, [0.2]*3, (16, 0.8))
    x = torch.from_numpy(pixels(0, 20, 20).transpose(2, 0, 1))[None] / 255
    with torch.no_grad(): expected = model.eval()((x[..., 2:-2, 2:-2] - 0.4) / 0.2).double().softmax(1)
    [p] = predictions(network, tmp_path, top=3)
    assert p.probabilities == pytest.approx(expected[0].sort(descending=True)[0].tolist(), abs=1e-5)


# --- which files

def test_folders_are_searched_as_training_does_and_files_are_taken_as_they_are(tmp_path, trained, capsys):
    for name in ('b.png', 'sub/deep/c.JPG', '.hidden.png', '.thumbs/d.png', 'notes.txt', 'e.data'):
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(0, 16, 16)).save(tmp_path/name, format='png')
    below = [str(tmp_path/'b.png'), str(tmp_path/'sub/deep/c.JPG')]
    assert image_paths(tmp_path) == image_paths([tmp_path, tmp_path/'sub']) == below
    named = [tmp_path/'e.data', tmp_path/'.hidden.png']
    assert command(*named, tmp_path, '--student', trained) == 0
    head, *rows = table(capsys.readouterr().out)
    assert head == ['path', 'class', 'probability', 'error']
    assert [r[0] for r in rows] == [*map(str, named), *below]


def test_odd_names_come_back_whole(odd, tmp_path, trained, capsys):
    assert command(tmp_path/'new', '--student', trained, '--top', 3) == 0
    head, *rows = table(capsys.readouterr().out)
    assert head == ['path', 'class', 'probability', 'class_2', 'probability_2', 'class_3', 'probability_3', 'error']
    assert [r[0] for r in rows] == odd and all({r[1], r[3], r[5]} == set(CLASSES) for r in rows)
    assert all(float(r[2]) >= float(r[4]) >= float(r[6]) and r[-1] == '' for r in rows)
    assert all(sum(map(float, r[2:7:2])) == pytest.approx(1, abs=1e-5) for r in rows)


@pytest.mark.parametrize('out', [[], ['--out', 'table.csv']])
def test_names_that_are_no_utf8_come_out_as_they_are(out, tmp_path, trained):
    name = os.fsencode(tmp_path) + b'/new/\xff\xe4.png'
    (tmp_path/'new').mkdir()
    with open(name, 'wb') as f: Image.fromarray(pixels(0, 16, 16)).save(f, format='png')
    p = subprocess.run([sys.executable, '-c', CODE, str(tmp_path/'new'), '--student', str(trained), *out],
                       cwd=tmp_path, capture_output=True, env=os.environ | {'PYTHONIOENCODING': 'ascii'})
    found = (tmp_path/'table.csv').read_bytes() if out else p.stdout
    assert p.returncode == 0 and found.splitlines()[1].startswith(name + b','), p.stderr


# --- damage

def damaged(folder):
    "Three images that cannot be read, and one that can."
    folder.mkdir()
    Image.fromarray(pixels(0, 16, 16)).save(folder/'good.png')
    (folder/'cut.png').write_bytes((folder/'good.png').read_bytes()[:300])
    (folder/'empty.jpg').touch()
    Image.fromarray(np.full((16, 16), 0.5, np.float32)).save(folder/'floating.tif')
    return folder


@pytest.mark.parametrize('batch_size', [1, 64])
def test_a_damaged_image_is_a_row_with_its_reason_and_exit_code_1(batch_size, tmp_path, trained, capsys):
    folder, argv = damaged(tmp_path/'new'), ('--student', trained, '--top', 2, '--batch_size', batch_size)
    assert command(folder, *argv) == 1
    said = capsys.readouterr()
    head, *rows = table(said.out)
    assert [len(r) for r in rows] == [len(head)]*4 and head[-1] == 'error'
    why = {Path(r[0]).name: r[-1] for r in rows}
    assert why['good.png'] == '' and '8 bits' in why['floating.tif']
    assert 'cannot identify image file' in why['empty.jpg']
    assert why['cut.png'] and not any(str(folder) in reason for reason in why.values())
    assert all(r[1:-1] == ['']*4 for r in rows if r[-1])
    assert said.err == 'distill_nb_predict: 3 of 4 images cannot be read; their rows say why\n'
    assert command(folder/'good.png', *argv) == 0 and capsys.readouterr().err == ''


def test_a_file_that_vanishes_meanwhile_is_a_row_too(tmp_path, trained):
    files = [tmp_path/f'{i}.png' for i in range(3)]
    for i, f in enumerate(files): Image.fromarray(pixels(i, 16, 16)).save(f)
    network, form = open_student(trained)
    found = predictions(network, files, form)
    files[1].unlink()
    assert [bool(p.error) for p in found] == [False, True, False]


# --- a table in a file

def test_out_is_the_table_of_stdout(odd, tmp_path, trained, capsys):
    assert command(tmp_path/'new', '--student', trained) == 0
    text = capsys.readouterr().out
    assert command(tmp_path/'new', '--student', trained, '--out', tmp_path/'deep'/'t.csv') == 0
    assert (tmp_path/'deep'/'t.csv').read_bytes() == text.encode() and capsys.readouterr().out == ''
    assert [p.name for p in (tmp_path/'deep').iterdir()] == ['t.csv']


def begun(folder, trained, out, batches, monkeypatch, **more):
    "A table that was interrupted after some batches."
    ask, network = inference._batches, open_student(trained)
    def interrupted(*args):
        for i, batch in enumerate(ask(*args)):
            if i == batches: raise KeyboardInterrupt
            yield batch
    with monkeypatch.context() as m:
        m.setattr(inference, '_batches', interrupted)
        with pytest.raises(KeyboardInterrupt): write_predictions(network[0], folder, network[1], out=out, **more)
    return Path(f'{out}.partial')


def test_wherever_a_table_was_cut_off_it_goes_on_to_the_same_bytes(odd, tmp_path, trained, monkeypatch):
    (tmp_path/'new'/'b\n"damaged".png').touch()
    network, form = open_student(trained)
    asked, ask = [], inference.read_images
    def counted(files, *args):
        asked.append(len(files))
        return ask(files, *args)
    monkeypatch.setattr(inference, 'read_images', counted)
    whole, again = tmp_path/'whole.csv', tmp_path/'again.csv'
    assert write_predictions(network, tmp_path/'new', form, 2, 2, whole) == (1, 8)
    partial = begun(tmp_path/'new', trained, again, 2, monkeypatch, top=2, batch_size=2)
    first = partial.read_bytes().partition(b'\n')[0] + b'\n'
    text, head = first + whole.read_bytes(), len(first) + whole.read_bytes().index(b'\n') + 1
    assert text.startswith(partial.read_bytes()) and len(table(partial.read_text().partition('\n')[2])) == 5
    for end in [*range(head, len(text), 5), len(text) - 1, len(text)]:
        partial.write_bytes(text[:end])
        assert write_predictions(network, tmp_path/'new', form, 2, 2, again, resume=True) == (1, 8)
        assert again.read_bytes() == whole.read_bytes() and not partial.exists()
        again.unlink()
    assert set(asked) == {8, 6, 4, 2, 0}  # what is there is not asked again, and batches stay what they were


def test_a_killed_table_goes_on_to_the_same_bytes(tmp_path, trained):
    (tmp_path/'new').mkdir()
    for i in range(400): Image.fromarray(pixels(i, 16, 16)).save(tmp_path/'new'/f'{i}.png')
    argv = [tmp_path/'new', '--student', trained, '--batch_size', 2, '--device', 'cpu', '--out']
    p = subprocess.Popen([*python(), '-c', CODE, *map(str, argv), 'killed.csv'], cwd=tmp_path,
                         stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    partial = tmp_path/'killed.csv.partial'
    while p.poll() is None and not partial.exists(): time.sleep(0.001)
    p.send_signal(signal.SIGKILL)
    p.communicate()
    assert partial.exists() and not (tmp_path/'killed.csv').exists()
    assert command(*argv, tmp_path/'killed.csv', '--resume') == 0
    assert command(*argv, tmp_path/'once.csv') == 0
    assert (tmp_path/'killed.csv').read_bytes() == (tmp_path/'once.csv').read_bytes()
    assert len(table((tmp_path/'once.csv').read_text())) == 401


def test_damaged_images_of_before_the_kill_count(tmp_path, trained, monkeypatch, capsys):
    folder = damaged(tmp_path/'new')
    begun(folder, trained, tmp_path/'t.csv', 3, monkeypatch, batch_size=1)
    assert command(folder, '--student', trained, '--batch_size', 1, '--out', tmp_path/'t.csv', '--resume') == 1
    assert '3 of 4 images' in capsys.readouterr().err


def test_a_table_is_continued_only_as_it_was_begun(odd, tmp_path, trained, monkeypatch, capsys):
    new, out = tmp_path/'new', tmp_path/'t.csv'
    partial = begun(new, trained, out, 1, monkeypatch, batch_size=2)
    before = partial.read_bytes()
    student(tmp_path/'other.safetensors', seed=1)
    student(tmp_path/'renamed.safetensors', mean=[0.5]*3)
    argv = ['--out', out, '--resume', '--batch_size', 2]
    for said, more in {'network was': [new, '--student', tmp_path/'other.safetensors', *argv],
                       "network was '": [new, '--student', tmp_path/'renamed.safetensors', *argv],
                       'top was 1 and is 2': [new, '--student', trained, *argv, '--top', 2],
                       'batch_size was 2 and is 64': [new, '--student', trained, *argv[:-2]],
                       'images was': [odd[0], '--student', trained, *argv],
                       'continue it with --resume': [new, '--student', trained, '--out', out]}.items():
        assert command(*more) == 2
        err = capsys.readouterr().err
        assert said in err and err.count('\n') == 1 and 't.csv' in err, err
        assert partial.read_bytes() == before and not out.exists()
    assert command(new, '--student', trained, *argv) == 0
    whole = out.read_bytes()
    for more, said in ([], 'a new file'), (['--resume'], 'a table that was begun, not a complete one'):
        assert command(new, '--student', trained, '--out', out, *more) == 2
        assert f'out must be {said}' in capsys.readouterr().err and out.read_bytes() == whole


@pytest.mark.parametrize('form, said', [(Form(16, whole=True), 'whole was False and is True'), (Form(8), 'side was')])
def test_a_table_is_continued_only_with_images_of_the_same_form(form, said, odd, tmp_path, trained, monkeypatch):
    begun(tmp_path/'new', trained, tmp_path/'t.csv', 1, monkeypatch, batch_size=2)
    network, _ = open_student(trained)
    with pytest.raises(ValueError, match=said):
        write_predictions(network, tmp_path/'new', form, batch_size=2, out=tmp_path/'t.csv', resume=True)


@pytest.mark.parametrize('content', [b'', b'no json\n', b'[]\n', b'7\n'])
def test_a_damaged_partial_table_is_refused_and_kept(content, odd, tmp_path, trained, capsys):
    (tmp_path/'t.csv.partial').write_bytes(content)
    assert command(tmp_path/'new', '--student', trained, '--out', tmp_path/'t.csv', '--resume') == 2
    assert 't.csv' in capsys.readouterr().err and (tmp_path/'t.csv.partial').read_bytes() == content


def test_a_partial_table_without_its_head_is_refused(odd, tmp_path, trained, monkeypatch, capsys):
    partial = begun(tmp_path/'new', trained, tmp_path/'t.csv', 1, monkeypatch, batch_size=2)
    partial.write_bytes(partial.read_bytes().partition(b'\n')[0] + b'\npath,cl')
    argv = ['--batch_size', 2, '--out', tmp_path/'t.csv', '--resume']
    assert command(tmp_path/'new', '--student', trained, *argv) == 2
    assert 'damaged' in capsys.readouterr().err


# --- behaving like a command

@pytest.fixture(scope='module')
def bad(tmp_path_factory):
    folder = tmp_path_factory.mktemp('bad')
    (folder/'empty').mkdir()
    (folder/'new').mkdir()
    Image.fromarray(pixels(0, 16, 16)).save(folder/'new'/'0.png')
    (folder/'damaged.safetensors').write_bytes(b'no weights')
    model = student(folder/'s.safetensors')
    student(folder/'source.safetensors', architecture='my.py:student')
    save_weights(model, folder/'nameless.safetensors', CLASSES, **FACTS)
    plain = {k: v for k, v in FACTS.items() if k not in ('mean', 'std')}
    save_weights(model, folder/'plain.safetensors', CLASSES, architecture='resnet8', **plain)
    torch.nn.init.constant_(model.fc.bias, float('nan'))
    save_weights(model, folder/'nan.safetensors', CLASSES, architecture='resnet8', **FACTS)
    return folder


@pytest.mark.parametrize('argv,said', [
    (['new'], 'student must be a file of weights'), (['new', '--student', 'resnet8'], "but is 'resnet8'"),
    (['new', '--student', 'nowhere.safetensors'], 'nowhere.safetensors'),
    (['new', '--student', 'damaged.safetensors'], 'damaged'),
    (['--student', 's.safetensors'], 'images'), (['nowhere', '--student', 's.safetensors'], "'nowhere'"),
    (['empty', '--student', 's.safetensors'], '.jpg'),
    (['new', '--student', 's.safetensors', '--top', '4'], 'from 1 to 3'),
    (['new', '--student', 's.safetensors', '--top', '0'], 'top'),
    (['new', '--student', 's.safetensors', '--batch_size', '0'], 'batch_size'),
    (['new', '--student', 's.safetensors', '--device', 'abacus'], 'device'),
    (['new', '--student', 's.safetensors', '--resume'], 'without --out'),
    (['new', '--student', 's.safetensors', '--out', 'empty'], 'out must be a new file'),
    (['new', '--student', 's.safetensors', '--architecture', 'resnet57'], 'resnet56'),
    (['new', '--student', 's.safetensors', '--architecture', 'resnet14'], 's.safetensors'),
    (['new', '--student', 'nameless.safetensors'], '--architecture'),
    (['new', '--student', 'source.safetensors'], '--architecture my.py:student'),
    (['new', '--student', 'plain.safetensors'], 'must know its mean, std'),
    (['new', '--student', 'nan.safetensors', '--out', 't.csv'], 'not finite'), (['new', '--nonsense'], 'nonsense')])
def test_bad_input_is_one_line_and_leaves_nothing(argv, said, bad, monkeypatch, capsys):
    monkeypatch.chdir(bad)
    before = sorted(bad.rglob('*'))
    try: code = command(*argv)
    except SystemExit as e: code = e.code
    shown = capsys.readouterr()
    assert code == 2 and shown.err.count('\n') == 1 and said in shown.err, shown.err
    assert shown.err.startswith('distill_nb_predict: ') and shown.out == '' and sorted(bad.rglob('*')) == before


def test_ctrl_c_says_how_to_continue_where_a_table_was_begun(odd, tmp_path, trained, monkeypatch, capsys):
    ask, out = inference._batches, tmp_path/'my table.csv'
    def stop_after(batches):
        def some(*args):
            yield from islice(ask(*args), batches)
            raise KeyboardInterrupt
        monkeypatch.setattr(inference, '_batches', some)
    def said(*argv):
        assert command(tmp_path/'new', '--student', trained, '--batch_size', 2, *argv) == 130
        return capsys.readouterr().err
    stop_after(0)
    assert said() == said('--out', out) == 'distill_nb_predict: interrupted\n' and not list(tmp_path.glob('*table*'))
    stop_after(1)
    assert said() == 'distill_nb_predict: interrupted\n'
    more = f"with --out '{out}' --resume it continues behind the rows that are there"
    assert said('--out', out) == f'distill_nb_predict: interrupted; {more}\n'
    monkeypatch.setattr(inference, '_batches', ask)
    assert command(tmp_path/'new', '--student', trained, '--batch_size', 2, '--out', out, '--resume') == 0


def test_there_is_nothing_to_continue_before_a_table_was_begun(odd, tmp_path, trained, capsys):
    assert command(tmp_path/'new', '--student', trained, '--out', tmp_path/'tabel.csv', '--resume') == 2
    assert capsys.readouterr().err.endswith(f"out must be a table that was begun, but is '{tmp_path/'tabel.csv'}'.\n")
    assert not list(tmp_path.glob('*tabel*'))


def test_two_processes_do_not_write_one_table(odd, tmp_path, trained, capsys):
    with locked(tmp_path/'t.csv', 'out', is_file=True):
        assert command(tmp_path/'new', '--student', trained, '--out', tmp_path/'t.csv') == 2
        said = f"distill_nb_predict: out must be a file that no other process uses, but '{tmp_path/'t.csv'}' is in use"
        assert capsys.readouterr().err == f'{said} by process {os.getpid()}.\n'
        assert command(tmp_path/'new', '--student', trained, '--out', tmp_path/'u.csv') == 0, 'another table beside it'
    assert command(tmp_path/'new', '--student', trained, '--out', tmp_path/'t.csv') == 0
    assert sorted(p.name for p in tmp_path.iterdir() if 'csv' in p.name) == ['t.csv', 'u.csv']


@pytest.mark.parametrize('edit', [
    lambda rows: rows[:2] + [''] + rows[2:], lambda rows: [*rows[:2], rows[2] + ',more', *rows[3:]],
    lambda rows: [*rows[:2], rows[3], rows[2], *rows[4:]], lambda rows: [rows[0], 'path,what', *rows[2:]],
    lambda rows: [*rows[:2], '"' + 'x' * 200_000 + '",a,1,', *rows[3:]]])
def test_rows_that_were_edited_by_hand_are_refused(edit, tmp_path, trained, monkeypatch, capsys):
    (tmp_path/'new').mkdir()
    for i in range(8): Image.fromarray(pixels(i, 16, 16)).save(tmp_path/'new'/f'{i}.png')
    partial = begun(tmp_path/'new', trained, tmp_path/'t.csv', 2, monkeypatch, batch_size=3)
    edited = '\n'.join(edit(partial.read_text().split('\n'))).encode()
    partial.write_bytes(edited)
    argv = ['--student', trained, '--batch_size', 3, '--out', tmp_path/'t.csv', '--resume']
    assert command(tmp_path/'new', *argv) == 2
    assert 'out must be a table that was begun, not a damaged one' in capsys.readouterr().err
    assert partial.read_bytes() == edited


@pytest.mark.parametrize('key,value', [('side', v) for v in ('abc', '0', '-3', '1e9', '9' * 400, '[8]', '')] +
                         [('whole', v) for v in ('maybe', '1', '')])
def test_facts_of_a_student_that_make_no_sense_are_named(key, value, tmp_path):
    student(tmp_path/'s.safetensors', **{key: value})
    with pytest.raises(ValueError, match=f"^the (fact )?{key} that '{tmp_path/'s.safetensors'}' names must be "):
        open_student(tmp_path/'s.safetensors')


SOURCE = """
from pathlib import Path
Path({ran!r}).touch()
from distill_nb.models import resnet8
def student(classes, channels): return resnet8(classes, channels)
"""


def test_source_code_runs_only_when_it_is_named(tmp_path, odd, trained, capsys):
    ran, source = tmp_path/'ran', tmp_path/'my.py'
    source.write_text(SOURCE.format(ran=str(ran)))
    model = student(tmp_path/'known.safetensors')
    save_weights(model, tmp_path/'own.safetensors', CLASSES, architecture=f'{source}:student', **FACTS)
    argv = [tmp_path/'new', '--student', tmp_path/'own.safetensors']
    assert command(*argv) == 2 and not ran.exists()
    assert f'--architecture {source}:student' in capsys.readouterr().err
    assert command(*argv, '--architecture', f'{source}:student') == 0 and ran.exists()
    own = capsys.readouterr().out
    assert command(tmp_path/'new', '--student', tmp_path/'known.safetensors') == 0 and capsys.readouterr().out == own


def test_a_checkpoint_without_facts_gets_them_from_ones_own_function(tmp_path, odd, capsys):
    model = student(tmp_path/'s.safetensors')
    torch.save(model.state_dict(), tmp_path/'best.pth')
    (tmp_path/'my.py').write_text(f"""
from distill_nb.models import resnet8
from distill_nb.contract import Teacher
def student(): return Teacher(resnet8(3, 3), {CLASSES}, [0.4]*3, [0.2]*3, 16)""")
    assert command(tmp_path/'new', '--student', tmp_path/'s.safetensors') == 0
    expected = capsys.readouterr().out
    assert command(tmp_path/'new', '--student', tmp_path/'best.pth', '--architecture', tmp_path/'my.py:student') == 0
    assert capsys.readouterr().out == expected


def test_a_bar_appears_after_a_second_and_only_then(odd, tmp_path, trained, monkeypatch, capsys):
    assert command(tmp_path/'new', '--student', trained) == 0 and capsys.readouterr().err == ''
    ask = inference._likeliest
    def slow(*args):
        time.sleep(0.6)
        return ask(*args)
    monkeypatch.setattr(inference, '_likeliest', slow)
    assert command(tmp_path/'new', '--student', trained, '--batch_size', 2) == 0
    assert 'predicting' in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_ends_the_command_quietly(tmp_path, trained):
    "As `distill_nb_predict ... | head -1`: no message, and the code of a closed pipe."
    argv = [*python(), '-c', CODE, write(tmp_path/'photos'), '--student', trained, '--batch_size', '1']
    p = subprocess.Popen([str(a) for a in argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert p.stdout.readline().startswith('path,')
    p.stdout.close()
    assert 'rror' not in p.stderr.read() and p.wait() == 141


def test_what_is_no_image_is_counted_and_a_pipe_is_not_waited_for(tmp_path, trained, capsys):
    place = write(tmp_path/'photos', n=1)
    (place/'notes.txt').write_text('no image')
    os.mkfifo(place/CLASSES[0]/'pipe.png')
    assert command(place, '--student', trained) == 0
    said = 'distill_nb_predict: 1 left out: no image by its suffix\ndistill_nb_predict: 1 left out: no regular file\n'
    assert capsys.readouterr().err == said
    assert command(place/CLASSES[0]/'pipe.png', '--student', trained) == 2  # it is no file and no folder


@pytest.mark.parametrize('images', [[Image.new('L', (8, 8))], Image.new('L', (8, 8)), [None], [b'x.png', 5], 5, None])
def test_what_is_no_path_of_an_image_is_named(images):
    with pytest.raises(ValueError, match='images must be a list of paths'): image_paths(images)
