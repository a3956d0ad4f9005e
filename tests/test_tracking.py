"""A tracker gets every row of every run, as numbers under their steps, and nothing of it changes the training."""
import json, os, sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from accelerate.state import PartialState
from accelerate.tracking import GeneralTracker

from distill_nb.compare import Contender, compare
from distill_nb.tracking import TRACKERS, Tracker, tracker
from distill_nb.devices import apart
from distill_nb.training import Setup, Supervised, fit
from test_training import RECIPE, images, net


def needs(package):
    "Under CI a test is not skipped."
    if not os.environ.get('CI'): pytest.importorskip(package)


class Remembers(GeneralTracker):
    name, requires_logging_directory, tracker = 'memory', False, None
    def __init__(self, happened, path): self.happened, self.path = happened, path
    def log(self, values, step): self.happened.append((self.path, step, values))
    def finish(self): self.happened.append((self.path, 'finished', {}))


def remembering():
    happened = []
    return Tracker(lambda path, step: Remembers(happened, path)), happened


def trained(log, **setup):
    setup = Setup(log=log, progress=False, **setup)
    return fit(Supervised(net()), images(), RECIPE, images(), setup=setup)


def test_a_run_is_opened_by_its_first_row_and_closed_by_the_next_run():
    log, happened = remembering()
    a, b = log.inside('a'), log.inside('b').inside('c')
    assert not happened and not log.open
    for one, step in ((a, 1), (a, 2), (b, 1), (a, 3)): one({'step': step, 'x': 1})
    log.close()
    log.close()
    a, b = ('a',), ('b', 'c')
    wanted = [(a, 1), (a, 2), (a, 'finished'), (b, 1), (b, 'finished'), (a, 3), (a, 'finished')]
    assert [h[:2] for h in happened] == wanted


def test_only_numbers_are_logged():
    log, happened = remembering()
    log({'step': 4, 'x': 0.5, 'n': 2, 'text': 'no', 'flag': True, 'none': None, 'list': [1.]})
    assert happened == [((), 4, {'x': 0.5, 'n': 2})]


def test_every_student_of_a_comparison_is_a_run_of_its_own(tmp_path):
    log, happened = remembering()
    made = {name: Contender(Supervised, images()) for name in ('a', 'b')}
    def student(): return net(seed=int(torch.randint(99, ())))
    found = compare(student, made, RECIPE, images(), seeds=2, log=log, progress=False, folder=tmp_path)
    for name, h in found.histories.items():
        own = [(step, values) for path, step, values in happened if path == (f'{name}-0',) and values]
        assert own == [(r['step'], {k: v for k, v in r.items() if k != 'step'}) for r in h.rows]
    assert {path for path, *_ in happened} == {('a-0',), ('b-0',), ('a-1',), ('b-1',)}


def test_a_setup_passes_the_log_on_as_it_can():
    log, _ = remembering()
    assert Setup(log=log).inside('a').inside('b').log.path == ('a', 'b')
    assert Setup(log=print).inside('a') == Setup(log=print) and Setup(folder='x').inside('a').folder.name == 'a'


def test_the_state_of_accelerate_is_the_callers():
    log, _ = remembering()
    with apart():
        log({'step': 1, 'x': 1.})
        log.close()
        assert not PartialState._shared_state


def test_what_is_not_there_is_refused_with_its_install_line(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match='log must be one of tensorboard, wandb, mlflow, but is'):
        tracker('x', tmp_path)
    for kind in TRACKERS:
        monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard' if kind == 'tensorboard' else kind, None)
        with pytest.raises(ValueError, match=f'{kind}.*: pip install {kind}$'): tracker(kind, tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_missing_key_is_said_before_any_work(tmp_path, monkeypatch):
    def login(): raise RuntimeError('No API key configured.')
    monkeypatch.setitem(sys.modules, 'wandb', SimpleNamespace(login=login))
    monkeypatch.delenv('WANDB_MODE', raising=False)
    with pytest.raises(ValueError, match='No API key.*run wandb login, or set WANDB_MODE=offline'):
        tracker('wandb', tmp_path)
    monkeypatch.setenv('WANDB_MODE', 'offline')
    assert isinstance(tracker('wandb', tmp_path), Tracker)


# --- TensorBoard

def read_back(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    found = EventAccumulator(str(folder)).Reload()
    scalars = {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()['scalars']}
    texts = {tag: found.Tensors(tag) for tag in found.Tags()['tensors']}
    return scalars, texts


def test_tensorboard_holds_every_row(tmp_path):
    needs('tensorboard')
    log = tracker('tensorboard', tmp_path, config={'lr': 0.1, 'classes': ('a', 'b'), 'none': None})
    h = trained(log.inside('few').inside('kd'))
    log.close()
    scalars, texts = read_back(tmp_path/'tensorboard'/'few'/'kd')
    assert set(scalars) == set(h.last) - {'step'}
    for name, points in scalars.items():
        assert points == [(r['step'], pytest.approx(r[name], rel=1e-6)) for r in h.rows]
    (tag, (event,)), = texts.items()
    assert 'settings' in tag and '"lr": 0.1' in event.tensor_proto.string_val[0].decode()


def test_tensorboard_shows_a_resumed_run_once(tmp_path):
    needs('tensorboard')
    for first, value in ((1, 1.), (3, 2.)):
        log = tracker('tensorboard', tmp_path, config={'lr': 0.1})
        for step in range(first, first + 3): log({'step': step, 'x': value})
        log.close()
    scalars, texts = read_back(tmp_path/'tensorboard')
    assert scalars == {'x': [(1, 1.), (2, 1.), (3, 2.), (4, 2.), (5, 2.)]}
    assert [len(events) for events in texts.values()] == [1]


# --- Weights & Biases

def test_wandb_keeps_every_row_offline(tmp_path, monkeypatch):
    needs('wandb')
    for name in ('HOME', 'WANDB_CACHE_DIR', 'WANDB_CONFIG_DIR', 'WANDB_DATA_DIR'):
        monkeypatch.setenv(name, str(tmp_path/'home'))
    monkeypatch.setenv('WANDB_MODE', 'offline')
    import wandb
    try:
        log = tracker('wandb', tmp_path/'run', 'project', {'lr': 0.1, 'path': tmp_path})
        h = trained(own := log.inside('few').inside('kd'))
        run = log.open[own.path].tracker
        assert (run.project, run.group, run.name, run.config['lr']) == ('project', 'few', 'few/kd', 0.1)
        log.close()
        again = tracker('wandb', tmp_path/'run', 'project').inside('few').inside('kd')
        again({'step': 21, 'x': 1.})
        assert again.open[own.path].tracker.id == run.id
        again.close()
    finally: wandb.teardown()
    files = sorted((tmp_path/'run'/'wandb').glob(f'offline-run-*{run.id}/run-{run.id}.wandb'))
    written = b''.join(f.read_bytes() for f in files)
    assert all(repr(r[name]).encode() in written for r in h.rows for name in ('hard', 'valid_loss'))


# --- MLflow

@pytest.fixture
def mlflow(monkeypatch):
    "What accelerate asks of mlflow, written down as it happens."
    module, runs = ModuleType('mlflow'), []
    def start_run(run_id, experiment_id, run_name, nested, tags, description):
        assert not any(r['open'] for r in runs)
        if run_id is None: runs.append(dict(id=f'number-{len(runs)}', name=run_name, tags=tags, rows=[], config={}))
        run, = [r for r in runs if run_id in (None, r['id'])][-1:]
        run['open'] = True
        return SimpleNamespace(info=SimpleNamespace(run_id=run['id']))
    def now(): return next(r for r in runs if r['open'])
    module.search_experiments = lambda filter_string: []
    module.create_experiment = lambda name, **_: name
    module.start_run, module.end_run = start_run, lambda: now().update(open=False)
    module.log_params = lambda values: now()['config'].update(values)
    module.log_metrics = lambda values, step: now()['rows'].append((step, values))
    limits = SimpleNamespace(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=100)
    module.utils = SimpleNamespace(validation=limits)
    monkeypatch.setitem(sys.modules, 'mlflow', module)
    for name in ('EXPERIMENT_NAME', 'RUN_ID', 'TAGS', 'NESTED_RUN'): monkeypatch.delenv(f'MLFLOW_{name}', raising=False)
    return runs


def test_mlflow_gets_every_row_and_a_resumed_run_goes_on(tmp_path, mlflow):
    log = tracker('mlflow', tmp_path, 'project', {'lr': 0.1})
    h = trained(log.inside('few').inside('kd'))
    trained(log.inside('few').inside('alone'))
    log.close()
    kd, alone = mlflow
    assert (kd['name'], kd['tags'], kd['config']) == ('few/kd', {'group': 'few'}, {'lr': 0.1})
    assert kd['rows'] == [(r['step'], {k: v for k, v in r.items() if k != 'step'}) for r in h.rows]
    assert alone['name'] == 'few/alone' and not (kd['open'] or alone['open'])
    log = tracker('mlflow', tmp_path, 'project', {'lr': 0.1})
    log.inside('few').inside('kd')({'step': 21, 'x': 1})
    log.close()
    assert len(mlflow) == 2 and kd['rows'][-1] == (21, {'x': 1})
    numbers = json.loads((tmp_path/'tracked.json').read_text())
    assert numbers == {'mlflow': {'few/kd': 'number-0', 'few/alone': 'number-1'}}
