"""The command that exports a student, the option that exports the best one, and what takes the files."""
import csv, json, shutil, signal, subprocess, time

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from distill_nb import export_run, run
from distill_nb.causal import save_language_model
from distill_nb.clock import measure
from distill_nb.cli import distill_nb, distill_nb_export, distill_nb_predict, run_command
from distill_nb.data import ImageData, digits
from distill_nb.deploy import OnnxModel
from distill_nb.export_run import ExportOptions, paths_for, prepare_export
from distill_nb.files import read_weights, save_weights
from distill_nb.gpt import build_gpt
from distill_nb.models import digit_student
from distill_nb.training import Recipe, Supervised, evaluate, fit
from distill_nb.vocabulary import ByteTokenizer
from distill_nb.zoo import open_model

from processes import python

pytest.importorskip('onnxruntime')


@pytest.fixture(autouse=True, scope='module')
def short():
    "The clock looks for a moment only."
    with pytest.MonkeyPatch.context() as m:
        for place in (export_run, run): m.setattr(place, 'measure', quick)
        yield


def quick(*args, **kwargs): return measure(*args, **kwargs | dict(seconds=0.02, turns=2, memory=False))


def command(*argv): return run_command(distill_nb_export, [str(a) for a in argv])


@pytest.fixture(scope='module')
def student(tmp_path_factory):
    "The file of a student, as a run leaves it."
    train, valid, _ = digits()
    torch.manual_seed(0)
    model = digit_student()
    fit(Supervised(model), train, Recipe(epochs=4, batch_size=64, lr=0.05), device='cpu', progress=False)
    path = tmp_path_factory.mktemp('run')/'student.safetensors'
    save_weights(model, path, train.classes, architecture='digit_student', channels=1, size=8, side=8, mean=train.mean,
                 std=train.std, valid_accuracy=evaluate(model, valid).accuracy, valid_items=len(valid),
                 setting='all labels')
    return path


@pytest.fixture(scope='module')
def exported(student):
    assert command('--student', student, '--int8', '--data', 'digits') == 0
    return {kind: OnnxModel(path) for kind, path in paths_for(student).items() if kind != 'pte'}


def test_both_files_stand_beside_the_student_and_say_what_it_said(student, exported):
    network, valid = open_model(student), digits().valid
    for kind, file in exported.items():
        assert file.path.parent == student.parent and file.own_contract['classes'] == network.classes
        assert file.facts['architecture'] == 'digit_student' and file.facts['setting'] == 'all labels'
        assert file.facts['side'] == '8' and file.facts['student'] == network.fingerprint()
        assert float(file.facts['valid_accuracy']) == pytest.approx(evaluate(file, valid).accuracy)
    assert evaluate(exported['onnx'], valid).accuracy == evaluate(network, valid).accuracy
    assert exported['int8'].facts['quantised'].startswith('int8')


def test_the_table_says_what_each_file_reached_and_takes(student, exported, tmp_path, capsys):
    rows = run_command(distill_nb_export,
                       ['--student', str(student), '--out', str(tmp_path/'s.onnx'), '--data', 'digits'])
    said = capsys.readouterr().out
    assert rows == 0 and 'valid accuracy %' in said and 'One clock, in turns: 1 thread' in said
    reached = f'{100 * evaluate(open_model(student), digits().valid).accuracy:.2f}'
    assert said.count(reached) == 2 and [p.name for p in tmp_path.iterdir()] == ['s.onnx']  # torch and file; no int8


def test_files_that_are_there_stay(student, exported, tmp_path, capsys):
    before = {p: p.stat().st_mtime_ns for p in student.parent.iterdir()}
    assert command('--student', student) == 2
    assert "out must be a new file" in capsys.readouterr().err
    assert command('--student', student, '--resume') == 0 and 'was there' in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in student.parent.iterdir()} == before
    other = tmp_path/'student.safetensors'
    save_weights(digit_student(), other, list('0123456789'), architecture='digit_student', channels=1, size=8,
                 mean=[0.3],
                 std=[0.4])
    shutil.copy(exported['onnx'].path, tmp_path/'student.onnx')
    assert command('--student', other, '--resume') == 2
    assert 'a file of this student' in capsys.readouterr().err


def test_the_test_split_is_not_read(student, tmp_path, monkeypatch):
    splits = digits()
    class Closed(ImageData):
        def get(self, *a): raise AssertionError('the test split was read')
    test = object.__new__(Closed)
    test.__dict__.update(splits.test.__dict__)
    monkeypatch.setattr(export_run, 'load_data', lambda *_: splits._replace(test=test))
    assert command('--student', student, '--out', tmp_path/'s.onnx', '--int8', '--data', 'digits', '--images', 32) == 0


def test_an_interrupt_leaves_whole_files_and_says_so(student, tmp_path, monkeypatch, capsys):
    def interrupt(*_): raise KeyboardInterrupt
    monkeypatch.setattr(export_run, 'quantize_onnx', interrupt)
    given = '--student', student, '--out', tmp_path/'s.onnx', '--int8', '--data', 'digits'
    assert command(*given) == 130
    assert [p.name for p in tmp_path.iterdir()] == ['s.onnx'] and OnnxModel(tmp_path/'s.onnx')
    monkeypatch.undo()
    assert command(*given, '--resume') == 0 and len(list(tmp_path.iterdir())) == 2


def test_a_missing_extra_is_a_sentence_before_anything_is_read(student, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(__import__('sys').modules, 'onnxruntime', None)
    assert command('--student', student, '--out', tmp_path/'s.onnx') == 2
    err = capsys.readouterr().err
    assert "pip install 'distill_nb[deploy]'" in err and err.count('\n') == 1
    assert run_command(distill_nb, ['--export', 'onnx', '--out', str(tmp_path/'run')]) == 2
    assert "pip install 'distill_nb[deploy]'" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize('given, said', [
    (['--int8'], 'data must be given with int8'), (['--out', 'x.pth'], 'out must be a file that ends in .onnx'),
    (['--data', 'english'], 'data must be images'), (['--threads', '0'], 'threads must be'),
    (['--architecture', 'resnet8'], 'student.safetensors')])
def test_wrong_lines_leave_nothing(student, given, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copy(student, 'student.safetensors')
    assert command('--student', 'student.safetensors', *given) == 2
    err = capsys.readouterr().err
    assert said in err and err.count('\n') == 1 and [p.name for p in tmp_path.iterdir()] == ['student.safetensors']


def test_a_student_that_does_not_say_its_normalisation_is_refused(tmp_path, capsys):
    save_weights(digit_student(), tmp_path/'bare.safetensors', list('0123456789'), architecture='digit_student',
                 channels=1)
    assert command('--student', tmp_path/'bare.safetensors', '--data', 'digits') == 2
    assert 'does not say its mean, std' in capsys.readouterr().err and len(list(tmp_path.iterdir())) == 1


@pytest.mark.slow
def test_a_language_model_is_exported_with_its_vocabulary(tmp_path, capsys):
    texts = tmp_path/'texts'
    texts.mkdir()
    for i in range(12): (texts/f'{i}.txt').write_text(f'Text {i} tells of a {"long " * (i + 5)} way.\n' * 8)
    torch.manual_seed(0)
    save_language_model(build_gpt('gpt_micro', 257, 16), ByteTokenizer(), tmp_path/'lm.safetensors')
    assert command('--student', tmp_path/'lm.safetensors', '--int8', '--data', f'text:{texts}') == 0
    assert 'valid bits per byte' in capsys.readouterr().out
    for path in paths_for(tmp_path/'lm.safetensors').values():
        file = OnnxModel(path)
        assert file.input == 'tokens' and json.loads(file.facts['tokenizer'])['kind'] == 'bytes'
        assert file(torch.randint(0, 257, (2, 9))).shape == (2, 9, 257)


# --- the run

def test_a_run_exports_its_best_student_and_measures_the_files(tmp_path, capsys):
    given = ['--export', 'int8, onnx', '--seeds', '1', '--epochs', '3', '--teacher_epochs', '4', '--temperature', '4',
             '--alpha', '0.9', '--labels', '0', '--device', 'cpu', '--out', str(tmp_path/'run')]
    assert run_command(distill_nb, given) == 0
    said, result = capsys.readouterr().out, json.loads((tmp_path/'run'/'result.json').read_text())
    rows = {r['model']: r for r in result['rows']}
    assert list(rows) == ['teacher', 'alone', 'distilled', 'distilled, onnx', 'distilled, int8']
    test, network = digits().test, open_model(tmp_path/'run'/'student.safetensors')
    for kind, path in paths_for(tmp_path/'run'/'student.safetensors').items():
        if kind == 'pte': continue
        row, file = rows[f'distilled, {kind}'], OnnxModel(path)
        assert row['accuracy'] == evaluate(file, test).accuracy and row['bytes'] == path.stat().st_size
        assert row['interval_over'] == 'test images' and 0 < row['latency_ms'] < 50 and 'difference' not in row
    assert rows['distilled, onnx']['accuracy'] == evaluate(network, test).accuracy
    assert 'by one clock' in said and 'distilled, int8' in (tmp_path/'run'/'report.html').read_text()
    assert 'export int8,onnx' in result['command'] or '--export' in result['command']


def test_predictions_of_a_file_are_those_of_its_student(student, exported, tmp_path, capsys):
    photos = tmp_path/'photos'
    photos.mkdir()
    for i in range(4): Image.fromarray(digits().test.x[i, 0].numpy()).save(photos/f'{i}.png')
    tables = []
    for path in (student, exported['onnx'].path):
        assert run_command(distill_nb_predict, [str(photos), '--student', str(path), '--top', '3']) == 0
        tables.append(list(csv.reader(capsys.readouterr().out.splitlines())))
    for a, b in zip(*tables):
        assert a[:2] == b[:2] and a[3] == b[3]  # path and classes
        if a[0] != 'path': assert float(a[2]) == pytest.approx(float(b[2]), abs=1e-4)
    said = run_command(distill_nb_predict,
                       [str(photos), '--student', str(exported['onnx'].path), '--architecture', 'resnet8'])
    assert said == 2 and 'architecture must be left out' in capsys.readouterr().err
    given = [str(photos), '--student', str(exported['onnx'].path), '--device', 'cuda']
    assert run_command(distill_nb_predict, given) == 2 and 'device must be left out' in capsys.readouterr().err


def test_a_teacher_may_be_an_exported_file(exported, tmp_path, capsys):
    given = ['--teacher', str(exported['onnx'].path), '--student', 'digit_student', '--seeds', '1', '--epochs', '2',
             '--temperature', '4', '--alpha', '0.9', '--labels', '0', '--device', 'cpu', '--out', str(tmp_path/'run')]
    assert run_command(distill_nb, given) == 0
    teacher = next(r for r in json.loads((tmp_path/'run'/'result.json').read_text())['rows'] if r['model'] == 'teacher')
    assert teacher['bytes'] == exported['onnx'].bytes and teacher['macs'] == 21_056
    assert (tmp_path/'run'/'teacher.onnx').read_bytes() == exported['onnx'].path.read_bytes()


ODD = """
import torch
from torch import nn

class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 10)

    def forward(self, x): return self.fc(x.flatten(1)) + torch.linalg.eigvalsh(x[:, 0] + x[:, 0].mT)[:, :1]

def student(): return Odd()
"""


def test_a_student_that_cannot_be_exported_is_refused_before_the_teacher_is_trained(tmp_path, monkeypatch, capsys):
    (tmp_path/'my.py').write_text(ODD)
    monkeypatch.setattr(run, '_train_teacher', lambda job: pytest.fail('the teacher was trained'))
    given = ['--export', 'onnx', '--student', f'{tmp_path}/my.py:student', '--out', str(tmp_path/'run')]
    assert run_command(distill_nb, given) == 2
    assert 'cannot be exported' in capsys.readouterr().err and not (tmp_path/'run').exists()


@pytest.mark.parametrize('word', ['tflite', 'onnx,onnx', ''])
def test_only_known_kinds_of_files_can_be_asked_for(word, tmp_path, capsys):
    assert run_command(distill_nb, ['--export', word, '--out', str(tmp_path/'run')]) == 2
    assert 'export must be' in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_kill_leaves_no_half_file(student, tmp_path):
    given = ['--student', str(student), '--out', str(tmp_path/'s.onnx')]
    code = f'from distill_nb.cli import main_export; import sys; sys.argv[1:] = {given!r}; main_export()'
    p = subprocess.Popen([*python(), '-c', code], stdout=subprocess.DEVNULL)
    time.sleep(4)
    p.send_signal(signal.SIGKILL)
    p.wait()
    for path in tmp_path.glob('s*.onnx'): OnnxModel(path)


def test_what_a_student_says_is_no_argument_of_the_exporter(student, tmp_path):
    "A file that names its data ended the command with a traceback."
    tensors, facts = read_weights(student)
    said = facts | dict(data='digits', within='0.5', format='pt', note='kept')
    save_file(tensors, tmp_path/'s.safetensors', {k: v for k, v in said.items() if k != 'fingerprint'})
    assert command('--student', tmp_path/'s.safetensors') == 0
    found = OnnxModel(tmp_path/'s.onnx').facts
    assert found['note'] == 'kept' and found['setting'] == 'all labels'
    assert not {'data', 'within', 'format'} & set(found)
