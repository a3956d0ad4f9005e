"""Programs of ExecuTorch: as torch answers, with what they say, damaged, foreign, and on how many threads."""
import copy, json, os, pickle, subprocess, sys, time

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

pytest.importorskip('executorch', reason="the extra 'executorch' is not installed")
import warnings

from distill_nb import clock, export_run, pte, run
from distill_nb.clock import measure
from distill_nb.contract import Teacher
from distill_nb.data import digits
from distill_nb.models import count_macs
from distill_nb.pte import PteModel, export_pte
from distill_nb.training import evaluate, predict
from distill_nb.zoo import open_model
from distill_nb.cli import distill_nb, distill_nb_export, distill_nb_predict, run_command
from distill_nb.files import save_weights
from small import by_hand, digits_student, images, net, small_file


@pytest.fixture(scope='module')
def splits(): return digits()


@pytest.fixture(scope='module')
def student(splits): return digits_student(splits).train()


@pytest.fixture(scope='module')
def file(student, splits, tmp_path_factory):
    path = tmp_path_factory.mktemp('file')/'student.pte'
    return export_pte(student, path, splits.train, architecture='digit_student', setting='all labels')


@pytest.fixture
def quick(file, monkeypatch):
    "The program of the student, without the seconds that lowering takes."
    data = file.path.read_bytes()
    monkeypatch.setattr(pte, '_lowered', lambda *_: data[:pte._END.search(data).start()])


# --- the same answers

@pytest.mark.parametrize('n', [1, 2, 32, 33, 70])
def test_answers_are_those_of_torch(file, student, splits, n):
    x = torch.randint(0, 256, (n, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
    expected = by_hand(student, x, splits.train.mean, splits.train.std)
    assert (file(x) - expected).abs().max() < 2e-6*expected.abs().max() and file(x).dtype == torch.float32


def test_no_image_has_no_answer(file, splits): assert file(splits.test.x[:0]).shape == (0, 10)


def test_it_is_judged_like_its_network(file, student, splits):
    assert evaluate(file, splits.test).accuracy == evaluate(student, splits.test).accuracy
    opened = open_model(file.path)
    assert opened.classes == splits.train.classes and opened.size == 8 and isinstance(opened.model, PteModel)
    same = predict(opened, splits.test).argmax(1) == predict(student, splits.test).argmax(1)
    assert same.all()


def test_tokens_of_any_length_up_to_the_window(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 50))
    found = export_pte(model, tmp_path/'t.pte', torch.arange(12), batch=4)
    for shape in ((1, 12), (4, 7), (9, 1)):
        x = torch.randint(0, 50, shape)
        with torch.no_grad(): torch.testing.assert_close(found(x), model(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match='L from 1 to 12'): found(torch.zeros(1, 13).long())
    with pytest.raises(ValueError, match='from 0 to 49'): found(torch.full((1, 3), 50))


def test_embeddings_for_one_image_at_a_time_from_half_precision(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 5)).half()
    before, random = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    known = Teacher(model, outputs='embedding', mean=[0.5], std=[0.25], size=4)
    found = export_pte(known, tmp_path/'e.pte', batch=1)
    assert model.training and torch.equal(torch.random.get_rng_state(), random)
    assert Teacher(found).outputs == 'embedding' and found._most == 1 and found.facts['batch'] == '1'
    x = torch.randint(0, 256, (3, 1, 4, 4), dtype=torch.uint8)
    with torch.no_grad(): expected = copy.deepcopy(model).float()((x/255 - 0.5)/0.25)
    torch.testing.assert_close(found(x), expected, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(v, before[k]) and v.dtype == torch.half for k, v in model.state_dict().items())


# --- what it says

def test_facts_come_back(file, student, splits):
    assert file.own_contract == dict(classes=splits.train.classes, mean=splits.train.mean, std=splits.train.std,
                                     size=(8, 1.))
    assert file.facts['architecture'] == 'digit_student' and file.facts['setting'] == 'all labels'
    assert float(file.facts['parity']) < 1e-5 and file.input == 'pixels' and file.runtime == 'executorch'
    cost = file.cost(splits.test.x[0])
    assert cost.parameters == sum(p.numel() for p in student.parameters())
    assert cost.macs == count_macs(copy.deepcopy(student).eval(), torch.zeros(1, 1, 8, 8)) and cost.bytes == file.bytes


def test_the_runtime_of_an_app_reads_the_facts(file):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        from executorch.runtime import Runtime
    program = Runtime.get().load_program(file.path)
    said = json.loads(program.load_method('facts').execute([])[0])
    assert said['mean'] == file.facts['mean'] and said['classes'] == file.facts['classes']


def test_it_names_no_place_of_this_machine(file):
    data = file.path.read_bytes()
    assert b'.py' not in data and str(file.path.parent).encode() not in data and file.bytes == len(data) < 12_000


def test_copies_and_pickles_answer_alike(file, splits):
    x = splits.test.x[:3]
    for other in (copy.deepcopy(file), pickle.loads(pickle.dumps(file)), PteModel(str(file.path))):
        assert torch.equal(other(x), file(x)) and other.fingerprint() == file.fingerprint()


# --- compared before it gets its name

def test_one_changed_weight_is_found(file, student, splits, quick, tmp_path):
    other = copy.deepcopy(student)
    with torch.no_grad(): other.fc.weight[3, 5] += 0.05
    with pytest.raises(ValueError, match='differs from the network.*not written'):
        export_pte(other, tmp_path/'s.pte', splits.train)
    assert not list(tmp_path.iterdir())
    assert export_pte(student, tmp_path/'s.pte', splits.train, architecture='digit_student', setting='all labels')
    assert (tmp_path/'s.pte').read_bytes() == file.path.read_bytes()


def test_a_full_disk_and_a_kill_leave_the_old_file(student, splits, quick, tmp_path, monkeypatch):
    (tmp_path/'old.pte').write_bytes(b'old')
    def full(*_): raise OSError(28, 'No space left on device')
    def kill(*_): raise KeyboardInterrupt
    for where, what, error in (('distill_nb.files.os.replace', full, OSError), ('distill_nb.pte._compared', kill,
                                                                                 KeyboardInterrupt)):
        with monkeypatch.context() as m:
            m.setattr(where, what)
            with pytest.raises(error): export_pte(student, tmp_path/'old.pte', splits.train)
        assert [p.name for p in tmp_path.iterdir()] == ['old.pte'] and (tmp_path/'old.pte').read_bytes() == b'old'


class ByLength(nn.Module):
    def forward(self, x): return x.flatten(1)[:, :4] + torch.zeros(len(x), 4)

class ByValue(nn.Module):
    def forward(self, x): return x.flatten(1)[:, :4] if x.sum() > 0 else x.flatten(1)[:, 4:8]

class Unknown(nn.Module):
    def forward(self, x): return torch.linalg.eigvalsh(x[:, 0])


@pytest.mark.parametrize('model', [ByValue(), Unknown()])
def test_what_cannot_be_exported_is_a_sentence(model, tmp_path, capfd):
    with pytest.raises(ValueError, match='model cannot be exported: [A-Z]') as e:
        export_pte(Teacher(model, mean=[0.5], std=[0.25], size=8), tmp_path/'m.pte')
    assert len(str(e.value)) < 600 and '\n' not in str(e.value)
    out = capfd.readouterr()
    assert not out.out + out.err and not list(tmp_path.iterdir())


@pytest.mark.parametrize('call, said', [
    (lambda p: export_pte(net(), p/'m.onnx', images(4)), 'path must be a file that ends in .pte'),
    (lambda p: export_pte(net(), p/'m.pte'), 'must know its mean, std, size'),
    (lambda p: export_pte(net(), p/'m.pte', images(4), within=2), 'within must be greater than 0'),
    (lambda p: export_pte(net(), p/'m.pte', images(4), batch=0), 'batch must be a whole number from 1'),
    (lambda p: export_pte(net(), p/'m.pte', images(4), size=9), 'size must be left out'),
    (lambda p: PteModel(p), 'a file and not a folder'), (lambda p: PteModel(p/'none.pte'), 'there is none at'),
    (lambda p: open_model(p/'none.pte'), 'there is none at')])
def test_wrong_arguments_are_sentences(call, said, tmp_path, monkeypatch):
    monkeypatch.setattr(pte, '_lowered', lambda *_: pytest.fail('the work had begun'))
    with pytest.raises(ValueError, match=said): call(tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_image_of_another_size_is_a_sentence(file, student, splits):
    with pytest.raises(ValueError, match='student.pte.*does not take uint8 of shape'):
        file(torch.zeros(2, 1, 9, 9, dtype=torch.uint8))
    assert file(splits.test.x[:2]).isfinite().all()
    with pytest.raises(ValueError, match='an exported file'): export_pte(file, 'x.pte')


def test_a_missing_extra_is_named(file, student, splits, tmp_path, monkeypatch):
    for name in list(sys.modules):
        if name.split('.')[0] == 'executorch': monkeypatch.setitem(sys.modules, name, None)
    for call in (lambda: export_pte(student, tmp_path/'m.pte', splits.train), lambda: PteModel(file.path)):
        with pytest.raises(ValueError, match=r"pip install 'distill_nb\[executorch\]'"): call()


# --- damaged and foreign files

def test_every_kind_of_damage_is_found_before_the_runtime_sees_it(file, tmp_path, monkeypatch):
    monkeypatch.setattr(pte, '_program', lambda data: pytest.fail('the runtime has seen it'))
    data, path, g = file.path.read_bytes(), tmp_path/'d.pte', np.random.default_rng(0)
    for at in g.integers(0, len(data) - 100, 200):
        cut = bytearray(data)
        cut[at] ^= 1 << g.integers(8)
        path.write_bytes(cut)
        with pytest.raises(ValueError, match='d.pte. is damaged'): PteModel(path)


def test_files_of_others_are_opened_apart_first(file, student, splits, tmp_path):
    "Without its line the file is foreign; what then ends a process ends another one than this."
    data, path = file.path.read_bytes(), tmp_path/'f.pte'
    path.write_bytes(data[:pte._END.search(data).start()])
    with pytest.raises(ValueError, match='its end is missing'): PteModel(path)
    killed = subprocess.CompletedProcess([], -11, b'', b'')
    with pytest.MonkeyPatch.context() as m:
        m.setattr(pte.subprocess, 'run', lambda *a, **kw: killed)
        with pytest.raises(ValueError, match='ends the process that opens it'): PteModel(path)
    path.write_bytes(np.random.default_rng(0).bytes(5000))
    with pytest.raises(ValueError, match='f.pte. is damaged or is no .pte file'): PteModel(path)


# --- threads

def test_one_thread_is_one_thread(file, splits):
    "The pool has one thread, and a file that wants two gets them, without harm to the other."
    x, answers = splits.test.x[:32], file(splits.test.x[:32])
    assert pte._runtime()._threadpool_get_thread_count() == 1
    mine, all_of = time.thread_time(), time.process_time()
    for _ in range(200): file(x)
    mine, all_of = time.thread_time() - mine, time.process_time() - all_of
    assert all_of < 1.1*mine + 0.005
    two = PteModel(file.path, threads=2)
    assert two.threads == 2 and torch.allclose(two(x), answers, atol=1e-6)
    assert pte._runtime()._threadpool_get_thread_count() == 2
    for _ in range(5): assert torch.equal(file(x), answers) and torch.allclose(two(x), answers, atol=1e-6)


def test_the_clock_takes_it(file, student, splits):
    rows = measure({'torch': student, 'pte': file}, splits.test.x[0], (1, 40), seconds=0.02, turns=2, memory=False)
    ours = [r for r in rows if r['model'] == 'pte']
    assert [r['runtime'] for r in ours] == ['executorch']*2 and [r['batch_size'] for r in ours] == [1, 40]
    assert all(r['threads'] == 1 and r['bytes'] == file.bytes and r['latency_ms'] > 0 for r in ours)
    if os.path.exists('/proc/self/clear_refs'): assert 0 < clock._peak(file, splits.test.x[0], 40) < 2**26
    assert pte._runtime()._threadpool_get_thread_count() == 1


# --- the commands

@pytest.fixture
def short(monkeypatch):
    "The clock looks for a moment only."
    for place in (export_run, run):
        moment = lambda *a, **kw: measure(*a, **kw | dict(seconds=0.01, turns=1, memory=False))
        monkeypatch.setattr(place, 'measure', moment)


def test_the_command_writes_a_program_beside_the_file(student, splits, short, tmp_path, monkeypatch, capsys):
    def other(_, path, *args, **kwargs):
        found = small_file(path, splits.train)
        found.facts['parity'] = '0'
        return found
    monkeypatch.setattr(export_run, 'export_onnx', other)
    path = tmp_path/'student.safetensors'
    save_weights(student, path, splits.train.classes, architecture='digit_student', channels=1, size=8,
                 mean=splits.train.mean, std=splits.train.std)
    given = ['--student', str(path), '--pte', '--data', 'digits']
    assert run_command(distill_nb_export, given) == 0
    said, found = capsys.readouterr().out, PteModel(tmp_path/'student.pte')
    reached = f'{100*evaluate(student, splits.valid).accuracy:.2f}'
    assert [line.split()[:2] for line in said.splitlines()[-6:] if '.pte' in line] == [['pte', 'student.pte']]
    assert said.count(reached) == 2 and found.facts['student'] == open_model(path).fingerprint()
    assert run_command(distill_nb_export, given) == 2 and 'a new file' in capsys.readouterr().err
    Image.fromarray(splits.test.x[0, 0].numpy()).save(tmp_path/'a.png')
    tables = []
    for file in (path, found.path):
        assert run_command(distill_nb_predict, [str(tmp_path/'a.png'), '--student', str(file), '--top', '3']) == 0
        tables.append([row.split(',') for row in capsys.readouterr().out.split()])
    assert [row[1] for row in tables[0]] == [row[1] for row in tables[1]]
    for a, b in zip(tables[0][1:], tables[1][1:]): assert float(a[2]) == pytest.approx(float(b[2]), abs=1e-4)


def test_a_run_exports_a_program_and_is_taught_by_one(file, splits, short, tmp_path, monkeypatch):
    rehearsed = []
    monkeypatch.setattr(run, '_rehearse_export', lambda student, train, kinds: rehearsed.append(kinds))
    given = ['--export', 'pte', '--teacher', str(file.path), '--seeds', '1', '--epochs', '2', '--temperature', '4',
             '--alpha', '0.9', '--labels', '0', '--device', 'cpu', '--out', str(tmp_path/'run')]
    assert run_command(distill_nb, given) == 0
    rows = {r['model']: r for r in json.loads((tmp_path/'run'/'result.json').read_text())['rows']}
    found = PteModel(tmp_path/'run'/'student.pte')
    assert rehearsed == [('pte',)]
    assert rows['distilled, pte']['accuracy'] == evaluate(found, splits.test).accuracy
    assert rows['distilled, pte']['bytes'] == found.bytes and rows['teacher']['macs'] == int(file.facts['macs'])
    assert (tmp_path/'run'/'teacher.pte').read_bytes() == file.path.read_bytes()


# --- what strangers did

def test_a_network_of_convolutions_for_16_images_at_once(tmp_path):
    "With 16 rows as the example, torch took a range that ends at 16 for one number."
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    found = export_pte(Teacher(model, mean=[0.5], std=[0.25], size=6), tmp_path/'s.pte', batch=16)
    for n in (1, 5, 16, 17):
        x = torch.randint(0, 256, (n, 1, 6, 6), dtype=torch.uint8)
        with torch.no_grad(): torch.testing.assert_close(found(x), model((x/255 - 0.5)/0.25), rtol=1e-4, atol=1e-5)


THREADS = '''
import os, sys, threading, torch
from distill_nb.pte import PteModel
x = torch.randint(0, 256, (8, 1, 8, 8), dtype=torch.uint8)
models = [PteModel(sys.argv[1], 1 + i % 2) for i in range(6)]
expected, wrong = models[0](x), []
def ask(model):
    for i in range(60):
        if i % 6 == 0: model = PteModel(sys.argv[1], model.threads)
        if not torch.allclose(model(x), expected, atol=1e-5): wrong.append(model)
threads = [threading.Thread(target=ask, args=(m,)) for m in models]
for t in threads: t.start()
for t in threads: t.join()
assert not wrong
os.write(2, b'stderr is there')
'''


def test_threads_of_python_may_ask_files_with_pools_of_other_sizes(file):
    "The pool was exchanged under a running program, which ended the process, and stderr was lost."
    done = subprocess.run([sys.executable, '-c', THREADS, str(file.path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr.endswith('stderr is there'), (done.returncode, done.stderr[-500:])


@pytest.mark.parametrize('name', ['format', 'input', 'output', 'parameters', 'macs'])
def test_facts_that_the_file_needs_are_not_replaced(student, splits, quick, tmp_path, name):
    with pytest.raises(ValueError, match=f'{name} must be left out, or'):
        export_pte(student, tmp_path/'s.pte', splits.train, **{name: 'pt'})
    assert not list(tmp_path.iterdir())
