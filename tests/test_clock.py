"One clock: turns, medians, what each runtime is given, memory, and that all is left as it was."
import gc, os, statistics, time

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from distill_nb import clock
from distill_nb.clock import in_turns, int8_units, measure, peak_growth
from distill_nb.contract import Teacher
from distill_nb.deploy import OnnxModel
from distill_nb.files import save_weights
from small import images, net, small_file

KEYS = ['model', 'runtime', 'batch_size', 'threads', 'latency_ms', 'low_ms', 'high_ms', 'bytes', 'peak_bytes', 'calls']
QUICK = dict(seconds=0.02, turns=2, memory=False)
LINUX = pytest.mark.skipif(peak_growth(int) is None, reason='this system has no mark of the highest memory')


@pytest.fixture(scope='module')
def file(tmp_path_factory): return small_file(tmp_path_factory.mktemp('clock')/'net.onnx', images(24))


def test_rows_of_torch_and_files(file, tmp_path):
    model = net()
    save_weights(model, tmp_path/'net.safetensors')
    rows = measure({'net': model, 'file': file, 'teacher': Teacher(model)}, images(24).pixels([0])[0], (1, 3), **QUICK)
    assert [list(r) for r in rows] == [KEYS]*6
    assert [(r['model'], r['runtime'], r['batch_size']) for r in rows] == [
        (name, kind, n) for name, kind in (('net', 'torch'), ('file', 'onnx'), ('teacher', 'torch')) for n in (1, 3)]
    assert {r['model']: r['bytes'] for r in rows} == {
        'net': (tmp_path/'net.safetensors').stat().st_size, 'file': file.path.stat().st_size,
        'teacher': (tmp_path/'net.safetensors').stat().st_size}
    for r in rows:
        assert 0 <= r['low_ms'] <= r['latency_ms'] <= r['high_ms'] < 1000 and r['calls'] >= 2
        assert r['peak_bytes'] is None and r['threads'] == 1


class Seen(nn.Module):
    "Notes what it is given, and how."
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.weight, self.seen = nn.Parameter(torch.ones(1, dtype=dtype)), []

    def forward(self, x):
        self.seen.append((x.clone(), self.training, torch.is_grad_enabled(), torch.get_num_threads()))
        return x


def test_torch_gets_normalised_floats_in_eval_mode_and_the_file_whole_pixels(file, monkeypatch):
    pixels, given = images(24).pixels([0])[0], []
    monkeypatch.setattr(OnnxModel, '_array', lambda self, x, ask=OnnxModel._array: given.append(ask(self, x))
                        or given[-1])
    for dtype in (torch.float32, torch.bfloat16):
        model, before = Seen(dtype).train(), torch.get_num_threads()
        measure({'a': model, 'b': file}, pixels, (2,), threads=2, **QUICK)
        for x, training, grad, threads in model.seen:
            assert x.dtype == dtype and x.shape[1:] == (1, 4, 4) and not training and not grad and threads == 2
            assert torch.allclose(x[-1].float(), (pixels/255 - 0.5)/0.25, atol=0.02)
        assert model.training and torch.get_num_threads() == before
        assert all(g.dtype == np.uint8 and np.array_equal(g, pixels.numpy()) for g in given)
    normalised = images(24).get([0]).x[0]
    measure({'b': file}, normalised, (1,), **QUICK)
    assert np.array_equal(given[-1], pixels.numpy())  # the same pixels again
    model = Seen()
    measure({'a': model}, torch.tensor([3, 1, 2]), (2,), **QUICK)
    assert model.seen[-1][0].tolist() == [[3, 1, 2]]*2 and model.seen[-1][0].dtype == torch.int64


def test_a_file_has_as_many_threads_as_are_said(file, monkeypatch):
    opened = []
    monkeypatch.setattr(clock, 'OnnxModel', type('Counted', (OnnxModel,), {
        '__init__': lambda self, path, threads=1: opened.append(threads) or OnnxModel.__init__(self, path, threads)}))
    own = clock.OnnxModel(file.path)
    for threads in (1, 2):
        [row] = measure({'file': own}, images(24).pixels([0])[0], (1,), threads=threads, **QUICK)
        assert row['threads'] == threads
    assert opened == [1, 2] and own.threads == 1


def test_more_threads_than_cores_are_a_warning(monkeypatch, recwarn):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: {0, 3}, raising=False)
    ask = lambda n: measure({'net': net()}, images(24).pixels([0])[0], (1,), threads=n, **QUICK)
    ask(2)
    assert not recwarn.list
    with pytest.warns(UserWarning, match='threads is 3, but this process may use 2 cores') as found: ask(3)
    assert found[0].filename == __file__
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: {3})
    with pytest.warns(UserWarning, match='may use 1 core: '): ask(2)
    monkeypatch.delattr(os, 'sched_getaffinity')
    monkeypatch.setattr(os, 'cpu_count', lambda: None)
    with pytest.warns(UserWarning, match='may use 1 core: '): ask(2)


def test_tokens_that_a_file_refuses_are_not_timed(tmp_path):
    from distill_nb.deploy import export_onnx
    text = export_onnx(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9)), tmp_path/'t.onnx', torch.arange(9))
    assert measure({'text': text}, torch.arange(9), (1,), **QUICK)[0]['latency_ms'] > 0
    for wrong in (torch.arange(9) - 1, torch.zeros(10, dtype=torch.int64)):
        with pytest.raises(ValueError, match="'text' does not take: .*tokens must be"):
            measure({'text': text}, wrong, (1,), **QUICK)


@LINUX
def test_the_peak_of_a_file_with_its_tensors_beside_it_is_known(file, tmp_path):
    proto = onnx.load(file.path)
    del proto.metadata_props[:]
    onnx.save_model(proto, tmp_path/'f.onnx', save_as_external_data=True, location='w.bin', size_threshold=0)
    item = torch.zeros(OnnxModel(file.path)._in.shape[1:])
    [row] = measure({'f': OnnxModel(tmp_path/'f.onnx')}, item.to(torch.uint8), (1,), **QUICK | {'memory': True})
    assert row['peak_bytes'] is not None


def test_medians_of_a_clock_that_is_known():
    "The machine slows down in the middle: in turns both functions have the same calls, else they do not."
    now, calls = [0.], []

    def call(name, cost):
        def work():
            calls.append(name)
            now[0] += cost*(1 if len(calls) < 300 else 3)
        return work
    found = in_turns({'a': call('a', 1.), 'b': call('b', 2.)}, 40., 20, lambda: now[0])
    assert len(found['a']) > len(found['b']) >= 20
    assert abs(statistics.median(found['b'])/statistics.median(found['a']) - 2) < 1e-9
    changes = sum(a != b for a, b in zip(calls, calls[1:]))
    assert changes == 1 + 2*20  # a, b to warm up, and in each turn
    low, middle, high = np.quantile(found['a'], (.25, .5, .75))*1000
    spread = clock._spread(found['a'])
    assert np.allclose([spread['low_ms'], spread['latency_ms'], spread['high_ms']], [low, middle, high])
    assert clock._spread([0.5]) == {'latency_ms': 500., 'low_ms': 500., 'high_ms': 500.}


def test_the_first_call_of_a_turn_does_not_count_nor_what_an_empty_call_takes():
    now, last = [0.], [None]

    def call(name):
        def work():
            now[0] += 1. if last[0] == name else 50.  # it finds the cache of another
            last[0] = name
        return work

    def clock():
        now[0] += 0.25
        return now[0]
    found = in_turns({'a': call('a'), 'b': call('b')}, 20., 4, clock)
    assert set(found['a'] + found['b']) == {1.}


def test_one_thread_is_timed_by_its_own_account():
    assert clock._clock(2) is time.perf_counter
    if time.get_clock_info('thread_time').resolution > 1e-6: return
    assert clock._clock(1) is time.thread_time
    class Waits(Seen):
        def forward(self, x):
            time.sleep(0.003)
            return x
    [row] = measure({'waits': Waits()}, torch.zeros(2), (1,), seconds=0.02, turns=1, memory=False)
    assert row['latency_ms'] < 2


def test_the_collector_waits_and_is_on_again():
    seen = []
    in_turns({'a': lambda: seen.append(gc.isenabled())}, 0.001, 1)
    assert seen[:3] == [True]*3 and not any(seen[3:]) and gc.isenabled()
    with pytest.raises(ZeroDivisionError): in_turns({'a': lambda: 1/(len(seen) < 5 and seen.append(0) is None)}, 0.01,
                                                    3)
    assert gc.isenabled()


@LINUX
def test_memory_of_known_work(file):
    assert 0.95 < peak_growth(lambda: bytearray(30_000_000)[::4096])/30e6 < 1.1
    held = []
    peak_growth(lambda: held.append(bytearray(10_000_000)))
    assert held == []  # only the copy of the process has it
    assert peak_growth(lambda: os._exit(3)) is None and peak_growth(lambda: time.sleep(9), 0.2) is None
    wide = nn.Sequential(nn.Linear(100, 30_000), nn.Linear(30_000, 1, bias=False))  # 12 MB of weights, 120 kB an item
    wide[1].weight.requires_grad_(False)
    [one, many] = measure({'wide': wide}, torch.zeros(100), (1, 64), seconds=0.02, turns=1)
    weights = 4*sum(p.numel() for p in wide.parameters())
    assert weights <= one['peak_bytes'] < 1.1*weights
    assert abs(many['peak_bytes'] - one['peak_bytes'] - 63*120_000) < 1e6
    [row] = measure({'file': file}, images(24).pixels([0])[0], (1,), seconds=0.02, turns=1)
    assert 0 < row['peak_bytes'] < 3e6  # a file of some kilobytes, not the libraries


def test_no_mark_no_number(monkeypatch):
    monkeypatch.delattr(os, 'fork', raising=False)
    [row] = measure({'net': net()}, images(24).get([0]).x[0], (1,), seconds=0.01, turns=1)
    assert row['peak_bytes'] is None


def test_refusals_come_before_any_work(file):
    model, item = Seen(), images(24).pixels([0])[0]
    for wrong, said in (
            (dict(models={}), 'models must be networks'), (dict(models={'a': model, 1: model}), 'models must be'),
            (dict(models={'a': model, 'b': 'net.onnx'}), "models['b'] must be a network or an OnnxModel"),
            (dict(batch_sizes=()), 'batch_sizes must be'), (dict(batch_sizes=(1, 0)), 'each of batch_sizes'),
            (dict(threads=0), 'threads'), (dict(seconds=0), 'seconds'), (dict(turns=0), 'turns'),
            (dict(item=torch.zeros(0)), 'item must be')):
        with pytest.raises(ValueError) as e: measure(**dict(models={'a': model}, item=item) | wrong)
        assert said in str(e.value), e.value
    assert model.seen == []
    with pytest.raises(ValueError, match="item is torch.uint8 of shape .* which the model 'file' does not take"):
        measure({'a': model, 'file': file}, torch.zeros(3, 5, 5, dtype=torch.uint8), **QUICK)
    assert len(model.seen) == 1


def test_units_are_words(): assert all(isinstance(u, str) for u in int8_units())
