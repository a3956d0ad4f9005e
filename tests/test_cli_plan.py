"""The command that chooses a student: a family, its files on one clock, the front and the pick."""
import json, shutil, signal, subprocess, sys, time

import pytest
import torch
from safetensors.torch import load_file

from distill_nb import plan_run
from distill_nb.cli import command_parser, distill_nb_plan, run_command
from distill_nb.data import ImageData, digits
from distill_nb.deploy import OnnxModel
from distill_nb.files import fingerprint, read_weights, save_weights
from distill_nb.contract import teacher_of
from distill_nb.plan_run import LIMITS, PlanOptions
from distill_nb.training import evaluate
from distill_nb.zoo import build_model, open_model

from processes import python

pytest.importorskip('onnxruntime')

SMALL, WIDE = 'digit_student_w0.5', 'digit_student_w2'
QUICK = ['--family', 'digit_student', '--widths', '0.5,2', '--epochs', '2', '--teacher_epochs', '4', '--seeds', '1',
         '--tries', '2', '--calibration', '32', '--device', 'cpu']
FILES = {'recipe.json', 'result.json', 'student.onnx', 'student.safetensors', 'teacher.safetensors', 'front.png',
         'report.html', 'files', 'work', 'progress.json'}
# The files answer in another order than the multiplications and than torch: the wide one first.
CLOCK = {(WIDE, 'float'): 1., (WIDE, 'int8'): 3., (SMALL, 'float'): 4., (SMALL, 'int8'): 2.,
         (WIDE, 'torch'): 9., (SMALL, 'torch'): .5}


def command(*argv): return run_command(distill_nb_plan, [str(a) for a in argv])


def clock(models, item, batch_sizes, threads=1, **_):
    "The rows of the clock, with times that are known."
    for model in models.values(): model(item[None])  # each takes the item
    def row(name, n):
        ms = CLOCK[tuple(name.rsplit(' ', 1))] * n
        return dict(model=name, batch_size=n, threads=threads, latency_ms=ms, low_ms=.9*ms, high_ms=1.1*ms)
    return [row(name, n) for name in models for n in batch_sizes]


@pytest.fixture(autouse=True)
def known_clock(monkeypatch): monkeypatch.setattr(plan_run, 'measure', clock)


@pytest.fixture(scope='module')
def home(tmp_path_factory): return tmp_path_factory.mktemp('plan')


@pytest.fixture(scope='module')
def unpicked(home):
    "A plan in which nothing fits, what it said, and the splits that were measured, in order."
    seen, measure, pick = [], ImageData.measure, plan_run.pick
    parts = {fingerprint({'y': d.y}): k for k, d in digits()._asdict().items()}
    def noted(data, answers):
        seen.append(parts[fingerprint({'y': data.y.cpu()})])
        return measure(data, answers)
    def picking(*args, **kw):
        seen.append('pick')
        return pick(*args, **kw)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(ImageData, 'measure', noted)
        m.setattr(plan_run, 'measure', clock)
        m.setattr(plan_run, 'pick', picking)
        assert command(*QUICK, '--latency_ms', .5, '--out', home/'run') == 2
        result, names = result_of(home/'run'), {p.name for p in (home/'run').iterdir()}
        first, seen[:] = list(seen), []
        shutil.copytree(home/'run', home/'before')
        assert command(*QUICK, '--latency_ms', 1.5, '--out', home/'run', '--resume') == 0
    return result, names, first, list(seen)


@pytest.fixture(scope='module')
def run(home, unpicked): return home/'run'


def result_of(folder): return json.loads((folder/'result.json').read_text())


def without_times(value):
    "A result without what is measured anew."
    times = {'seconds', 'resumed', 'command', 'name'}
    if isinstance(value, list): return [without_times(v) for v in value]
    if not isinstance(value, dict): return value
    return {k: without_times(v) for k, v in value.items() if k not in times}


# --- a plan

def test_where_nothing_fits_the_front_is_left_and_the_test_split_unread(unpicked):
    result, names, seen, _ = unpicked
    assert names == FILES - {'student.onnx', 'student.safetensors'}
    assert result['picked'] is None and result['limits']['latency_ms'] == .5 and len(result['rows']) == 8
    assert set(seen) == {'train', 'valid', 'pick'} - {'train'} and seen[-1] == 'pick'
    assert any('nothing fits latency_ms 0.5; the nearest is' in line for line in result['said'])


def test_another_limit_picks_without_training_and_reads_the_test_split_once(unpicked, run):
    seen = unpicked[3]
    assert seen.count('test') == 1 and seen.index('test') == seen.index('pick') + 1 == len(seen) - 1
    assert {p.name for p in run.iterdir()} == FILES
    before, after = unpicked[0], result_of(run)
    assert without_times(before['rows']) == without_times(after['rows'])
    assert after['picked']['latency_ms'] <= 1.5 and after['front'] == before['front']


def test_the_pick_is_by_the_clock_of_the_files(run):
    "The small student has fewer multiplications and answers first in torch; its files are too slow."
    result = result_of(run)
    rows = {(r['model'], r['numbers']): r for r in result['rows']}
    for (model, numbers), r in rows.items():
        assert (r['latency_ms'], r['torch_ms']) == (CLOCK[model, numbers], CLOCK[model, 'torch'])
    small, wide = rows[SMALL, 'float'], rows[WIDE, 'float']
    assert small['macs'] < wide['macs'] and small['torch_ms'] < wide['torch_ms']
    assert (result['picked']['model'], result['picked']['numbers']) == (WIDE, 'float')
    said = ' '.join(result['said'])
    assert f'faster for {SMALL} (2x)' in said and f'slower for {WIDE} (0.33x)' in said
    assert 'by MACs 1 of 1' in said and "by torch's latency 1 of 1" in said


def test_the_rows_are_what_the_files_reach(run):
    result, (_, valid, test) = result_of(run), digits()
    for r in result['rows']:
        model = OnnxModel(run/r['file'])
        assert evaluate(teacher_of(model), valid).accuracy == r['valid_accuracy'] == float(
            model.facts['valid_accuracy'])
        assert r['bytes'] == model.bytes and r['interval_over'] == 'valid images'
        assert r['ci95'][0] < r['valid_accuracy'] < r['ci95'][1]
        assert (model.facts['architecture'], model.facts['trained']) == (r['model'], r['training'])
        assert ('quantised' in model.facts) == (r['numbers'] == 'int8')
    best = max((r for r in result['rows'] if r['latency_ms'] <= 1.5), key=lambda r: r['valid_accuracy'])
    picked = result['picked']
    assert best == {k: v for k, v in picked.items() if k in best}
    student = OnnxModel(run/'student.onnx')
    assert (run/'student.onnx').read_bytes() == (run/picked['file']).read_bytes()
    assert evaluate(teacher_of(student), test).accuracy == picked['test']['accuracy']
    page = (run/'report.html').read_text()
    assert f"{100*picked['test']['accuracy']:.2f}" in page and page.count('data:image/png;base64,') == 1


def test_the_weights_beside_the_file_are_its_own(run):
    tensors, facts = read_weights(run/'student.safetensors')
    student, picked = open_model(run/'student.safetensors'), result_of(run)['picked']
    assert facts['architecture'] == picked['model'] and facts['trained'] == picked['training']
    assert fingerprint(student.model.state_dict()) == OnnxModel(run/'student.onnx').facts['weights']
    x = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8)
    seen = (x.float()/255 - torch.tensor(student.mean).view(-1, 1, 1))/torch.tensor(student.std).view(-1, 1, 1)
    assert torch.allclose(student.answers(seen), OnnxModel(run/'student.onnx')(x), atol=1e-4)


def test_both_ways_of_training_have_as_many_tries_and_steps(run):
    result = result_of(run)
    for member in (SMALL, WIDE):
        tries = result['tries'][member]
        assert [t['method'] for t in tries] == ['alone']*2 + ['kd']*2
        runs = result['trainings'][member]
        assert [r['model'] for r in runs] == ['alone', 'kd'] and runs[0]['steps'] == runs[1]['steps']
    by = {(r['model'], r['training'], r['numbers']): r for r in result['rows']}
    for (model, training, numbers), r in by.items():
        if training == 'alone': continue
        assert r['difference'] == r['valid_accuracy'] - by[model, 'alone', numbers]['valid_accuracy']


def test_an_interval_is_over_the_seeds_and_the_best_seed_hands_over_its_file(run, home):
    from types import SimpleNamespace as Of
    from distill_nb.compare import interval
    from distill_nb.protocol import Measure
    path = run/'student.onnx'
    pairs = {('m', t, s): plan_run._Pair({'float': path}, {'float': v}, 1.) for t, values in (
        ('alone', (.5, .7, .6)), ('kd', (.6, .7, .8))) for s, v in enumerate(values)}
    job = Of(on_valid=Measure('valid_accuracy', share=True), measure=Measure('accuracy', share=True), folder=run,
             options=Of(seeds=3), data=digits())
    member = Of(name='m', chosen={'alone': {}, 'kd': {}})
    alone, kd = (plan_run._row(job, member, t, 'float', pairs) for t in ('alone', 'kd'))
    mean, ends = interval([.5, .7, .6])
    assert (alone['valid_accuracy'], alone['ci95'], alone['seed'], alone['interval_over']) == (mean, ends, 1, 'seeds')
    assert kd['seed'] == 2 and plan_run._difference(kd, alone, 'valid_accuracy') == dict(
        zip(('difference', 'difference_ci95'), interval([.6 - .5, .7 - .7, .8 - .6])))


# --- where it goes on

def test_a_second_pick_is_refused(run, capsys):
    assert command(*QUICK, '--latency_ms', 2.5, '--out', run, '--resume') == 2
    assert 'the test split was read for the pick' in capsys.readouterr().err
    assert command(*QUICK, '--latency_ms', 1.5, '--out', run) == 2
    assert command(*QUICK, '--latency_ms', 1.5, '--epochs', 3, '--out', run, '--resume') == 2
    assert 'another run' in capsys.readouterr().err


def test_a_plan_that_picked_keeps_its_pick_on_a_slower_machine(run, home, monkeypatch):
    out = home/'again'
    shutil.copytree(run, out)
    monkeypatch.setattr(plan_run, 'measure', lambda *a, **kw: [
        r | {k: 9*r[k] for k in ('latency_ms', 'low_ms', 'high_ms')} for r in clock(*a, **kw)])
    assert command(*QUICK, '--latency_ms', 1.5, '--out', out, '--resume') == 0
    assert without_times(result_of(out)) == without_times(result_of(run))


def test_an_interrupted_plan_goes_on_from_its_files(run, home, monkeypatch, capsys):
    out, exports = home/'before', []
    (out/'result.json').unlink()
    def stop(*_, **__): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(plan_run, 'measure', stop)
        m.setattr(plan_run, 'export_onnx', lambda *a, **kw: exports.append(a))
        assert command(*QUICK, '--latency_ms', 1.5, '--out', out, '--resume') == 130
    assert f'--out {out} --resume' in capsys.readouterr().err and exports == []
    assert command(*QUICK, '--latency_ms', 1.5, '--out', out, '--resume') == 0
    assert without_times(result_of(out)) == without_times(result_of(run))
    assert (out/'student.onnx').read_bytes() == (run/'student.onnx').read_bytes()


def test_a_file_of_other_weights_is_written_again(run, home):
    pair = {k: run/'files'/WIDE/f'kd-0{end}' for k, end in plan_run._ENDS.items()}
    mark = OnnxModel(pair['float']).facts['weights']
    found = plan_run._read_pair(pair, mark, 'valid_accuracy')
    assert found.values == {k: float(OnnxModel(p).facts['valid_accuracy']) for k, p in pair.items()}
    assert plan_run._read_pair(pair, 'another', 'valid_accuracy') is None
    assert plan_run._read_pair(pair | {'int8': home/'none.onnx'}, mark, 'valid_accuracy') is None


@pytest.mark.slow
def test_a_plan_that_is_killed_while_it_writes_files_resumes_to_the_same_result(run, home):
    out, lost = home/'killed', f'files/{WIDE}/kd-0'
    shutil.copytree(run, out)
    for name in ('result.json', 'student.onnx', 'student.safetensors', f'{lost}.onnx', f'{lost}-int8.onnx'):
        (out/name).unlink()
    shutil.rmtree(out/'work'/WIDE/'kd-0')
    argv = [*QUICK, '--latency_ms', '1.5', '--out', str(out), '--resume']
    p = subprocess.Popen([*python(), '-c', 'from distill_nb.cli import *; main_plan()', *argv],
                         stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    while p.poll() is None and not (out/f'{lost}.onnx').exists(): time.sleep(0.005)
    assert p.poll() is None
    p.send_signal(signal.SIGKILL)
    p.communicate()
    assert not (out/'result.json').exists() and not (out/f'{lost}-int8.onnx').exists()
    assert command(*argv) == 0
    assert without_times(result_of(out)) == without_times(result_of(run))
    own, other = (load_file(f/'student.safetensors') for f in (out, run))
    assert all(torch.equal(own[k], other[k]) for k in other)
    for path in run.glob('files/*/*.onnx'): assert path.read_bytes() == (out/path.relative_to(run)).read_bytes()


# --- wrong input

@pytest.mark.parametrize('argv, said', [
    (['--family', 'resnet9'], 'resnet9'), (['--family', ','], 'family'), (['--family', 'resnet8,resnet8'], 'family'),
    (['--widths', '0'], 'widths'), (['--widths', 'wide'], 'widths'), (['--widths', '1,1'], 'widths'),
    (['--latency_ms', '0'], 'latency_ms'), (['--latency_ms', 'nan'], 'latency_ms'), (['--bytes', '-1'], 'bytes'),
    (['--accuracy', '95'], 'at most 1'), (['--tries', '5'], 'tries'), (['--seeds', '0'], 'seeds'),
    (['--method', 'kd,dkd'], 'method'), (['--method', 'alone'], 'method'), (['--method', 'data_free'], 'method'),
    (['--threads', '0'], 'threads'), (['--calibration', '0'], 'calibration'), (['--resume'], 'holds no run'),
    (['--teacher', 'none.safetensors'], 'none.safetensors'), (['--teacher', 'blind.safetensors'], 'chance'),
    (['--family', 'my.py:odd', '--widths', '1'], 'family: my.py:odd')])
def test_bad_input_is_one_line_and_leaves_nothing(argv, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    train = digits().train
    blind = build_model('digit_teacher', 10, 1, 8)
    blind.fc.weight.data.zero_()
    save_weights(blind, 'blind.safetensors', train.classes, mean=train.mean,
                 std=train.std, architecture='digit_teacher', channels=1, size=8)
    (tmp_path/'my.py').write_text(ODD)
    before = sorted(p for p in tmp_path.rglob('*') if '__pycache__' not in str(p))
    options = dict(zip(QUICK[::2], QUICK[1::2])) | {'--out': 'run'}
    if '--teacher' in argv: del options['--teacher_epochs']  # with which it would be trained
    given = [w for k, v in options.items() if k not in argv for w in (k, v)]
    assert command(*given, *argv) == 2
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and err.startswith('distill_nb_plan: ') and said in err, err
    assert sorted(p for p in tmp_path.rglob('*') if '__pycache__' not in str(p)) == before


ODD = '''
import torch
from torch import nn
class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 10)
    def forward(self, x):
        if x.sum() > 0: x = x*2  # which way it goes depends on the pixels
        return self.fc(x.flatten(1))
def odd(): return Odd()
'''


def test_the_extra_is_named_before_anything_is_trained(home, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    assert command(*QUICK, '--out', home/'lacks') == 2
    assert "pip install 'distill_nb[deploy]" in capsys.readouterr().err and not (home/'lacks').exists()


def test_options_are_those_of_the_command():
    given = vars(command_parser(distill_nb_plan).parse_args([]))
    options = PlanOptions(**given)
    assert {k: v for k, v in given.items()} == {k: getattr(options, k) for k in given}
    assert not set(LIMITS) & set(options.about()) and set(options.limits()) == set(LIMITS)
    with pytest.raises(ValueError, match='left out'): PlanOptions(student='resnet8')
    with pytest.raises(ValueError, match='left out'): PlanOptions(labels=100)
