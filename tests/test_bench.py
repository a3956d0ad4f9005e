"""The benchmark measures what it says, of loops that minimise the same function."""
import json, subprocess
from types import SimpleNamespace

import pytest
import torch

from distill_nb import bench
from distill_nb.files import fingerprint, locked, save_weights
from distill_nb.losses import DistillationLoss
from distill_nb.data import digits
from distill_nb.models import count_macs
from distill_nb.training import Recipe, Supervised, fit
from distill_nb.zoo import build_model
from distill_nb.methods import METHODS
from distill_nb.bench import (CONTENDERS, _asked_methods, _available, _can_learn, _make_work, _method_rows, _operations,
                              _race, _ratios, _rows, _taught, bench_text, distill_nb_bench, take_turn, time_steps)
from distill_nb.cli import run_command
from networks import student_of
from processes import python

CPU = torch.device('cpu')


@pytest.fixture(scope='module')
def work(): return _make_work('digits', 16, CPU)[0]


def command(*argv): return run_command(distill_nb_bench, [str(a) for a in argv])


@pytest.mark.parametrize('name,T,alpha,squared', [
    ('naive', 3., 0.5, False), ('pytorch_tutorial', 2., 0.25, True), ('torchdistill', 2., 0.25, True)])
def test_the_other_loops_minimise_the_same_loss(work, name, T, alpha, squared):
    if name == 'torchdistill': pytest.importorskip('torchdistill')
    c, b = CONTENDERS[name](work), work.data.get(torch.arange(16))
    c.student.eval()
    hard, soft = DistillationLoss(T, alpha).parts(c.student(b.x), c.teacher(b.x), b.y).values()
    torch.testing.assert_close(c.loss(b.x, b.y), hard + soft/(1 if squared else T**2))


def test_the_naive_loop_in_bfloat16_rounds_the_same_loss_and_lays_channels_last(work):
    plain, half = (CONTENDERS[name](work) for name in ('naive', 'naive_bf16'))
    b = work.data.get(torch.arange(16))
    expected, found = (c.loss(b.x, b.y) for c in (plain, half))
    assert found.dtype == torch.float32 and found != expected
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0)
    weights = [p for m in (half.teacher, half.student) for p in m.parameters() if p.ndim == 4]
    assert all(p.is_contiguous(memory_format=torch.channels_last) and p.dtype == torch.float32 for p in weights)
    found.backward()
    half.optimizer.step()
    assert not torch.equal(weights[-1], [p for p in plain.student.parameters() if p.ndim == 4][-1])


@pytest.mark.parametrize('name', CONTENDERS)
def test_every_contender_takes_steps_that_change_the_student_alone(work, name):
    if name in ('torchdistill', 'timm'): pytest.importorskip(name)
    if name == 'timm': work = _make_work('vit', 2, CPU)[0]
    c = CONTENDERS[name](work)
    c.start()
    for _ in range(2): c.step()
    c.stop()
    if name in ('naive', 'naive_bf16', 'pytorch_tutorial', 'torchdistill'):
        for model, moved in ((c.student, True), (c.teacher, False)):
            before = (work.student if moved else work.teacher).state_dict()
            assert any(not torch.equal(t, before[k]) for k, t in model.state_dict().items()) == moved


def test_a_vit_is_timed_beside_timms_that_takes_the_same_steps(work, monkeypatch, capsys):
    own = _make_work('vit', 2, CPU)[0]
    assert 'timm' in _available(own) and 'timm' not in _available(work)
    ours, theirs = (CONTENDERS[name](own) for name in ('alone', 'timm'))
    for c in (ours, theirs): c.step()
    moved, other = (c.objective.model.state_dict() for c in (ours, theirs))
    for k, t in moved.items(): torch.testing.assert_close(t, other[k], rtol=1e-3, atol=1e-3)
    assert any(not torch.equal(t, moved[k]) for k, t in own.student.state_dict().items())
    times = dict.fromkeys(('naive', 'cached', 'live', 'teacher_forward', 'timm'), 0.1) | {'alone': 0.2}
    assert _ratios(times)['alone / timm'] == 2
    monkeypatch.setattr(bench.importlib.util, 'find_spec', lambda name: None)
    assert 'timm' not in _available(own) and "comes with the extra 'hub'" in capsys.readouterr().err


@pytest.mark.parametrize('name', METHODS)
def test_every_method_takes_a_step_that_changes_the_student_alone(work, name):
    work = work._replace(student=student_of(name)())
    students, teachers = (fingerprint(m.state_dict()) for m in (work.student, work.teacher))
    for (_, kept), c in _taught(work, [name]).items():
        held = [p.detach().clone() for p in c.objective.parameters()]
        assert len(take_turn(c, 1, CPU)) == 1
        assert any(not torch.equal(p, q) for p, q in zip(c.objective.parameters(), held))
        assert kept == (c.answers == 'kept')
    assert (fingerprint(work.student.state_dict()), fingerprint(work.teacher.state_dict())) == (students, teachers)


def test_methods_that_want_answers_only_are_timed_with_kept_ones_too(work, capsys):
    names = [name for name in _asked_methods('all') if _can_learn(work, name)]
    assert METHODS.keys() - names == {'token'}
    assert 'token is left out: student must be a ViT' in capsys.readouterr().err
    made = _taught(work, names)
    assert {name for name, kept in made if kept} == {'kd', 'kd_std', 'dkd', 'dist'}
    assert next(iter(made)) == ('alone', False) and {name for name, kept in made if not kept} == set(names)
    assert [name for (name, _), c in made.items() if c.answers is None] == ['alone', 'byot', 'self', 'dino']
    assert [name for (name, _), c in made.items() if c.own] == ['data_free']
    assert [name for (name, _), c in made.items() if c.before] == ['born_again']


def test_rows_of_methods_are_those_of_the_times(work):
    times = {('alone', False): 0.1, ('kd', False): 0.3, ('kd', True): 0.11, ('data_free', False): 0.5}
    rows = _method_rows(_taught(work, ['kd', 'data_free']), times, dict.fromkeys(times, 5.), 16)
    assert [(r['method'], r['answers']) for r in rows] == [
        ('alone', None), ('kd', 'live'), ('kd', 'kept'), ('data_free', 'live')]
    assert [r['ratio_to_alone'] for r in rows] == pytest.approx([1, 3, 1.1, 5])
    assert [(r['steps'], r['batch_size']) for r in rows[2:]] == [(None, 16), (1500, 64)]


def test_the_command_times_methods(tmp_path, monkeypatch, capsys):
    out = tmp_path/'methods.json'
    monkeypatch.setattr(bench, '_peak_memory', lambda *_: None)
    argv = ['--pair', 'digits', '--steps', 1, '--batch_size', 16, '--device', 'cpu', '--method', 'hint,kd',
            '--out', out]
    assert command(*argv) == 0
    r = json.loads(out.read_text())
    assert [row['method'] for row in r['rows']] == ['alone', 'hint', 'kd', 'kd'] and r['to_accuracy'] == []
    assert all(row['step_ms'] > 0 for row in r['rows']) and '--method hint,kd' in r['command']
    printed = capsys.readouterr().out
    assert bench_text(r) in printed and 'this/alone' in printed and 'naive' not in printed


def test_the_memory_of_a_method_is_measured_in_a_process_of_its_own():
    assert bench._peak_memory(('kd', True), 'digits', 16, 'cpu') > 0


def test_a_turn_times_the_last_steps_only():
    seen = []
    def call(name): return lambda: seen.append(name)
    contender = SimpleNamespace(ahead=4, start=call('start'), step=call('step'), stop=call('stop'))
    assert len(take_turn(contender, 3, CPU)) == 3
    assert seen == ['start'] + ['step']*9 + ['stop']


def test_contenders_take_turns_until_each_has_its_steps():
    order = []
    def make(name):
        return SimpleNamespace(ahead=0, start=lambda: order.append(name), step=lambda: None, stop=lambda: None)
    times = time_steps({n: make(n) for n in 'ab'}, 12, CPU, per_turn=5)
    assert order == list('ababab') and set(times) == {'a', 'b'}


def test_operations_are_counted_by_hand(work):
    def macs(name): return count_macs(build_model(name, 10, 1, 8).eval(), torch.zeros(1, 1, 8, 8))
    teacher, student = macs('digit_teacher'), macs('digit_student')
    assert _operations(work, True) == 2*16*(3*student + teacher) and _operations(work, False) == 6*16*student


def test_rows_and_ratios_are_those_of_the_times(work):
    names = ('naive', 'cached', 'alone', 'live', 'teacher_forward')
    contenders = {n: SimpleNamespace(precision='float32', asks=n == 'naive') for n in names}
    times = {'naive': 0.8, 'cached': 0.11, 'alone': 0.1, 'live': 0.2, 'teacher_forward': 0.05}
    rows = _rows(work, contenders, times, {'float32': 1e9}, dict.fromkeys(times, 5.))
    assert [r['contender'] for r in rows] == ['naive', 'cached', 'alone', 'live']
    cached = rows[1]
    assert cached['step_ms'] == pytest.approx(110) and cached['ratio_to_naive'] == pytest.approx(8/1.1)
    assert cached['gflops']*1e9*0.11 == pytest.approx(_operations(work, False))
    assert cached['share_of_peak'] == pytest.approx(cached['gflops']) and cached['peak_mb'] == 5
    assert list(_ratios(times).values()) == pytest.approx([0.8/0.11, 1.1, 0.2/0.15])


def test_the_command_writes_a_result(tmp_path, monkeypatch, capsys):
    out, peak = tmp_path/'digits.json', bench._peak_memory
    def measured(name, *more): return peak(name, *more) if name == 'naive' else 1 + bench._own_peak(name, *more)
    monkeypatch.setattr(bench, '_peak_memory', measured)  # a process of its own takes long, so one contender has it
    argv = ['--pair', 'digits', '--steps', 2, '--batch_size', 16, '--device', 'cpu', '--out', out]
    assert command(*argv) == 0
    r = json.loads(out.read_text())
    keys = {'name', 'command', 'data', 'hardware', 'software', 'date', 'seeds', 'seconds', 'rows'}
    assert keys <= set(r) and r['name'] == 'digits'
    assert r['command'] == f'distill_nb_bench --pair digits --steps 2 --batch_size 16 --device cpu --out {out}'
    names = {'naive', 'naive_bf16', 'pytorch_tutorial', 'live', 'cached', 'alone'}
    assert names <= {row['contender'] for row in r['rows']}
    for row in r['rows']:
        assert row['step_ms'] > 0 and row['ratio_to_naive'] > 0 and row['peak_mb'] > 0 and 0 < row['share_of_peak']
    assert 0 < sum(p['share'] for p in r['profile']) <= 1.001
    printed = capsys.readouterr().out
    assert bench_text(r) in printed and 'cached / alone' in printed
    monkeypatch.setattr(bench, '_peak_memory', lambda *_: None)  # no process of its own for each contender
    assert command(*argv) == 0 and json.loads(out.read_text())['rows'][0]['peak_mb'] is None  # over its own result


def test_an_absent_library_is_said_in_a_line(work, monkeypatch, capsys):
    import importlib.util
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    assert bench._available(work) == [n for n in CONTENDERS if n not in ('torchdistill', 'timm')]
    assert capsys.readouterr().err.count('\n') == 1


def test_the_race_is_run_on_real_images_until_the_accuracy_is_reached(tmp_path, monkeypatch):
    train, valid, _ = digits()
    torch.manual_seed(0)
    teacher = build_model('digit_teacher', 10, 1, 8)
    recipe = Recipe(epochs=2, batch_size=64, optimizer='adamw', lr=3e-3, precision='float32')
    fit(Supervised(teacher), train, recipe)
    save_weights(teacher, tmp_path/'teacher.safetensors')
    work, splits = _make_work('digits', 64, CPU, 'digits', teacher_weights=str(tmp_path/'teacher.safetensors'))
    rows = _race(work, splits.valid, 1)
    assert rows[0]['contender'] == 'naive' and all(r['contender'] == 'cached' for r in rows[1:])
    assert [r['epochs'] for r in rows[1:]] == list(bench._LENGTHS[:len(rows) - 1])
    assert all(r['accuracy'] < rows[0]['accuracy'] for r in rows[1:-1])
    assert all(0 < r['accuracy'] <= 1 and r['seconds'] > 0 for r in rows)
    assert rows[-1]['accuracy'] >= rows[0]['accuracy'] or len(rows) == 1 + len(bench._LENGTHS)


def test_a_teacher_of_other_classes_is_refused_where_there_are_real_images(tmp_path):
    path = tmp_path/'teacher.safetensors'
    save_weights(build_model('digit_teacher', 10, 1, 8), path, classes=list('abcdefghij'))
    _make_work('digits', 64, CPU, teacher_weights=str(path))  # noise has no classes
    with pytest.raises(ValueError, match="other classes than the data: only the file has 'a'"):
        _make_work('digits', 64, CPU, 'digits', teacher_weights=str(path))


@pytest.mark.parametrize('argv,said', [
    (['--pair', 'cats'], 'pair'), (['--steps', 0], 'steps'), (['--batch_size', 1], 'batch_size'),
    (['--device', 'abacus'], 'device'), (['--to_accuracy', -1], 'to_accuracy'),
    (['--to_accuracy', 2], 'teacher_weights'), (['--data', 'folder:/nowhere'], '/nowhere'),
    (['--pair', 'cifar', '--data', 'digits'], 'channels'),
    (['--pair', 'digits', '--teacher_weights', '/nowhere.safetensors'], '/nowhere.safetensors'),
    (['--method', 'magic'], 'born_again'), (['--method', 'kd,kd'], 'different'), (['--method', ''], 'method'),
    (['--method', 'kd', '--to_accuracy', 2], 'methods are timed'), (['--out', 'result.txt'], '.json'),
    (['--out', 'MINE'], 'something else'),
    (['--pair', 'digits', '--data', 'digits', '--batch_size', 5000], 'batch_size')])
def test_bad_input_is_one_line(argv, said, tmp_path, capsys):
    mine = tmp_path/'mine.json'
    mine.write_text('{"command": "another"}')
    try: code = command(*(mine if a == 'MINE' else a for a in argv))
    except SystemExit as e: code = e.code
    err = capsys.readouterr().err
    assert code == 2 and err.count('\n') == 1 and err.startswith('distill_nb_bench: ') and said in err, err
    assert mine.read_text() == '{"command": "another"}'


def test_two_processes_do_not_write_one_result(tmp_path, capsys):
    with locked(tmp_path/'r.json', 'out', is_file=True):
        assert command('--pair', 'digits', '--out', tmp_path/'r.json') == 2
    assert 'out must be a file that no other process uses' in capsys.readouterr().err


def test_it_is_a_command():
    code = 'from distill_nb.cli import main_bench; main_bench()'
    p = subprocess.run([*python(), '-c', code, '--help'], capture_output=True, text=True)
    assert p.returncode == 0 and '--to_accuracy' in p.stdout and '--method' in p.stdout


def test_a_pair_of_language_models(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, '_peak_memory', lambda *_: None)
    out = tmp_path/'gpt.json'
    assert command('--pair', 'gpt', '--steps', 1, '--batch_size', 2, '--device', 'cpu', '--out', out) == 0
    r, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert r['pair'] == 'gpt_mini -> gpt_micro' and 'vocabulary of 1,024' in r['data'] and bench_text(r) in printed
    answers = {row['method']: row['answers'] for row in r['rows']}
    assert answers == {'alone': None, 'alone, all logits': None, 'live': 'live', 'live, all logits': 'live',
                       'kept, all': 'kept', 'kept, top 32': 'kept'}
    assert {row['precision'] for row in r['rows']} == {'float32'} and all(row['step_ms'] > 0 for row in r['rows'])
    for more in (('--method', 'kd'), ('--data', 'digits')):
        assert command('--pair', 'gpt', *more) == 2 and 'left out for the pair gpt' in capsys.readouterr().err
