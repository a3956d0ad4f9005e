"Files: arguments refused, weights on disk, and files that survive."
import builtins, errno, json, math, os, signal, subprocess, sys
from functools import partial

import numpy as np
import pytest, torch
from distill_nb.doors import must, number, reason, whole
from distill_nb.files import (fingerprint, from_json, function_name, locked, pack_weights, read_weights, save_weights,
                              stored_classes, write_atomic)
from distill_nb.models import digit_student, resnet8
from distill_nb.zoo import load_weights
from networks import bits, same
from processes import python
from torch import nn


# Arguments

def test_a_number_is_a_real_one_and_everything_else_passes_no_comparison():
    for value in (3, 2.5, -math.inf, torch.tensor(2.).item()): assert number(value) == value
    for value in (True, '3', None, [3], 1j, torch.tensor(3.)): assert math.isnan(number(value))


@pytest.mark.parametrize('value', [0, -1, 4, 2.0, 2.5, True, '2', None, math.nan, [2]])
def test_what_is_no_whole_number_in_the_range_is_refused(value):
    for n in (1, 2, 3): whole('size', n, 1, 3)
    with pytest.raises(ValueError) as e: whole('size', value, 1, 3)
    assert str(e.value) == f'size must be a whole number from 1 to 3, but is {value!r}.'


def test_bounds_of_whole_numbers_are_said_as_people_write_them():
    whole('views', 10**9)
    for most, said in ((None, 'of at least 2'), (20_000, 'from 2 to 20,000')):
        with pytest.raises(ValueError) as e: whole('views', 1, 2, most)
        assert str(e.value) == f'views must be a whole number {said}, but is 1.'


def test_a_long_value_is_cut_in_the_message():
    with pytest.raises(ValueError) as e: must(False, 'classes', ['x' * 1000], 'a list of different names')
    assert str(e.value) == f"classes must be a list of different names, but is ['{'x' * 198}."


def test_the_reason_is_the_first_line():
    for error, said in ((ValueError('a\nb'), 'a'), (KeyError(), 'KeyError'), (OSError(2, 'gone'), '[Errno 2] gone')):
        assert reason(error) == said


# Weights on disk

def test_round_trip(tmp_path):
    torch.manual_seed(0)
    model = resnet8().to(memory_format=torch.channels_last)
    model(torch.randn(4, 3, 16, 16))
    save_weights(model, tmp_path/'new'/'w.safetensors', seed=3, data='cifar10')
    save_weights(model, tmp_path/'new'/'w.safetensors', seed=4, data='cifar10')   # over an old file
    torch.manual_seed(1)
    other = resnet8()
    assert load_weights(other, tmp_path/'new'/'w.safetensors') is other
    assert same(dict(other.state_dict()), dict(model.state_dict()))
    tensors, metadata = read_weights(tmp_path/'new'/'w.safetensors')
    facts = {'seed': '4', 'data': 'cifar10'}
    assert metadata == facts | {'fingerprint': fingerprint(model.state_dict(), facts)}
    assert os.listdir(tmp_path/'new') == ['w.safetensors']


def damaged(kind, path):
    "A file that must not be loaded."
    good = pack_weights(digit_student())
    if kind == 'cut': data = good[:-40]
    if kind == 'cut in the header': data = good[:60]
    if kind == 'empty': data = b''
    if kind == 'flipped bit': data = good[:-100] + bytes([good[-100] ^ 4]) + good[-99:]
    if kind == 'text': data = b'<html>404 Not Found</html>'
    path.write_bytes(data)
    return path


@pytest.mark.parametrize('kind', ['cut', 'cut in the header', 'empty', 'flipped bit', 'text'])
def test_damaged_files_are_refused(kind, tmp_path):
    path, model = damaged(kind, tmp_path/'w.safetensors'), digit_student()
    data, before = path.read_bytes(), bits(model)
    with pytest.raises(ValueError) as e: read_weights(path)
    assert path.name in str(e.value) and 'damaged' in str(e.value) and '\n' not in str(e.value)
    with pytest.raises(ValueError, match=path.name): load_weights(model, path)
    assert os.listdir(tmp_path) == [path.name], 'nothing in the file may run'
    assert same(bits(model), before) and path.read_bytes() == data, 'neither the model nor the file may change'


def test_every_flipped_bit_is_found(tmp_path):
    "Whatever a file with one wrong bit is taken for, it is not taken for other weights or other facts."
    torch.manual_seed(0)
    model, path = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), tmp_path/'w.safetensors'
    save_weights(model, path, mean=[0.5, 0.25], std=(0.125,), data='a "b"\n', other='0123456789abcdef')
    good, (tensors, metadata) = path.read_bytes(), read_weights(path)
    for i in range(len(good)):
        for bit in range(8):
            path.write_bytes(good[:i] + bytes([good[i] ^ 1 << bit]) + good[i + 1:])
            try: found = read_weights(path)
            except ValueError as e: assert 'damaged' in str(e); continue
            assert same(found[0], tensors) and found[1] == metadata, (i, bit)


def test_a_file_whose_fingerprint_covers_no_metadata_is_refused_if_it_has_any(tmp_path):
    "Files of the days before; those without metadata, like checkpoints, are the same as today's."
    from safetensors.torch import save_file
    tensors, path = digit_student().state_dict(), tmp_path/'w.safetensors'
    save_file(tensors, path, {'fingerprint': fingerprint(tensors)})
    assert same(read_weights(path)[0], dict(tensors))
    save_file(tensors, path, {'fingerprint': fingerprint(tensors), 'mean': '[0.5]'})
    with pytest.raises(ValueError, match='metadata'): read_weights(path)
    save_file(tensors, path, {'format': 'pt', 'mean': '[0.5]', 'commit': '0123456789abcdef'})  # another program's
    assert read_weights(path)[1]['mean'] == '[0.5]'


def test_facts_that_were_read_can_be_saved_again(tmp_path):
    save_weights(digit_student(), tmp_path/'a.safetensors', mean=[0.5])
    facts = read_weights(tmp_path/'a.safetensors')[1]
    save_weights(digit_student(), tmp_path/'b.safetensors', **facts)
    assert read_weights(tmp_path/'b.safetensors')[1]['mean'] == '[0.5]'


def test_facts_that_are_tuples_are_read_as_lists(tmp_path):
    save_weights(digit_student(), tmp_path/'w.safetensors', mean=(0.5,), std=[0.25])
    facts = read_weights(tmp_path/'w.safetensors')[1]
    assert json.loads(facts['mean']) == [0.5] and json.loads(facts['std']) == [0.25]


@pytest.mark.parametrize('call,parts', [
    (lambda p: load_weights(digit_student(), p/'no.safetensors'), ['no.safetensors', 'there is none']),
    (lambda p: read_weights(p/'no.safetensors'), ['no.safetensors', 'there is none']),
    (lambda p: read_weights(p), ['a file and not a folder']),
    (lambda p: load_weights(digit_student(), p), ['is a folder']),
    (lambda p: save_weights(digit_student(), p/'w.pth'), ['w.pth', '.safetensors'])])
def test_bad_paths_are_named(call, parts, tmp_path):
    with pytest.raises(ValueError) as e: call(tmp_path)
    assert all(p in str(e.value) for p in parts)
    assert not os.listdir(tmp_path)


def test_a_full_disk_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path/'w.safetensors'
    save_weights(digit_student(), path)
    old = path.read_bytes()
    def full(fd): raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match='No space'): save_weights(digit_student(), path)
    assert path.read_bytes() == old and os.listdir(tmp_path) == ['w.safetensors']


@pytest.mark.parametrize('why', [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO])
def test_what_the_system_refuses_is_said_of_the_file_that_was_to_be_written(why, tmp_path, monkeypatch):
    def refuse(*_): raise OSError(why, os.strerror(why))
    for place in (os, 'fsync'), (os, 'replace'), (builtins, 'open'):
        with monkeypatch.context() as m:
            m.setattr(*place, refuse)
            with pytest.raises(OSError) as e: write_atomic(tmp_path/'w.json', b'{}')
        assert str(e.value) == f"[Errno {why}] {os.strerror(why)}: '{tmp_path/'w.json'}'" and not os.listdir(tmp_path)
    with pytest.raises(IsADirectoryError, match=f"directory: '{tmp_path}'$"): write_atomic(tmp_path, b'{}')
    with pytest.raises(OSError, match=f"too long: '{tmp_path/('x' * 300)}'$"): write_atomic(tmp_path/('x' * 300), b'{}')


def test_a_file_that_cannot_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    save_weights(digit_student(), tmp_path/'w.safetensors')
    def refuse(*_): raise PermissionError(errno.EACCES, 'Permission denied')
    monkeypatch.setattr(builtins, 'open', refuse)
    with pytest.raises(ValueError) as e: read_weights(tmp_path/'w.safetensors')
    assert str(e.value) == f"'{tmp_path/'w.safetensors'}' cannot be read: Permission denied."


def test_a_killed_writer_leaves_the_old_file_whole(tmp_path):
    path, code = tmp_path/'w.safetensors', """
import os, signal, sys
from distill_nb import files, models
files.save_weights(models.digit_student(), sys.argv[1], run='first')
os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL)
files.save_weights(models.digit_student(), sys.argv[1], run='second')"""
    assert subprocess.run([*python(), '-c', code, str(path)]).returncode == -signal.SIGKILL
    assert read_weights(path)[1]['run'] == 'first'


def test_fingerprint_sees_every_part():
    t = {'a': torch.arange(6.), 'b': torch.tensor(3)}
    others = [t | {'a': t['a'].reshape(2, 3)}, t | {'a': t['a'].double()}, {'c': t['a'], 'b': t['b']},
              t | {'b': torch.tensor(4)}, t | {'a': t['a'] + 1e-7}, t | {'a': t['a'].view(torch.int32)}]
    prints = [fingerprint(x) for x in (t, *others)]
    assert len(set(prints)) == len(prints) == 7
    assert fingerprint(dict(reversed(t.items()))) == prints[0], 'the order of a dict is no part of its content'
    w = torch.ones(2, 3, 4, 4)
    assert fingerprint({'w': w.to(memory_format=torch.channels_last)}) == fingerprint({'w': w})
    assert fingerprint({'h': torch.ones(3, dtype=torch.bfloat16), 'e': torch.ones(0)})
    assert fingerprint(t | {'x': {'scale': 3}, 'y': None}) == prints[0], 'what is no tensor is left out'


class Holds:
    def __init__(self, value): self.value = value
    def __call__(self, x): return self.value * x


def lines(k, scale=1): return lambda x: k * x + scale


def test_functions_are_told_apart_by_what_they_do_and_named_alike_in_every_process():
    calls = ['lines(1)', 'lines(2)', 'lines(1, 3)', 'lines([1])', 'lines([2])', 'lambda x: x', 'lambda x: -x',
             'Holds(1)', 'Holds(2)', 'partial(pow, 2)', 'partial(pow, 3)', 'partial(max, key=abs)', 'max',
             "itemgetter('a')", "itemgetter('b')",
             'lambda x: (lambda y: y + x)', 'lambda x: (lambda y: y - x)']
    code = ('import sys; sys.path.insert(0, {!r}); from test_files import *; from operator import itemgetter\n'
            'print([function_name(f) for f in ({})])').format(os.path.dirname(__file__), ', '.join(calls))
    said = [subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout for _ in range(2)]
    assert said[0] == said[1] and len(set(eval(said[0]))) == len(calls)


def test_a_setting_that_numpy_made_is_named_as_any_other():
    assert function_name(partial(pow, np.float64(2))) == function_name(partial(pow, 2.))


def test_nothing_is_not_saved(tmp_path):
    "Such as a Teacher, whose network is hidden from whoever trains what holds it."
    with pytest.raises(ValueError, match='tensors to save; of a Teacher give .model'):
        save_weights(nn.Identity(), tmp_path/'w.safetensors')
    assert not (tmp_path/'w.safetensors').exists()


# JSON

@pytest.mark.parametrize('text', ['', 'no json', '{"a": 1', b'\xff\xfe', '[' * 51 + ']' * 51, '[' * 10**6,
                                  '{"a":' * 990, '[' * 900 + ']' * 900, '1' * 5000])
def test_what_is_no_json_is_one_sentence_that_names_the_file(text):
    with pytest.raises(ValueError) as e: from_json(text, 'run/recipe.json')
    assert str(e.value).startswith("'run/recipe.json' is damaged or is not JSON: ") and len(str(e.value)) < 200


def test_json_of_few_levels_is_read():
    value = {'rows': [{'step': 1, 'loss': [0.5, None]}] * 3, 'a': {'b': {}}}
    assert from_json(json.dumps(value), 'f') == from_json(json.dumps(value).encode(), 'f') == value
    assert from_json('[' * 50 + ']' * 50, 'f')


@pytest.mark.parametrize('classes', ['[' * 10**5, '7', '[]', '["a", "a"]', '[["a"]]', 'abc', '{"a": 1}', 'NaN'])
def test_stored_classes_that_are_no_list_of_names_are_refused(classes):
    with pytest.raises(ValueError, match="The metadata 'classes' of 'w.safetensors' must be a list of different names"):
        stored_classes({'classes': classes}, 'w.safetensors')


# Locks

HOLD = """
import os, sys, time
from distill_nb.files import locked
with locked(sys.argv[1], 'out'):
    print('held', flush=True)
    time.sleep(60)"""


def test_a_second_process_is_refused_until_the_first_has_ended_however_it_ends(tmp_path):
    first = subprocess.Popen([*python(), '-c', HOLD, str(tmp_path/'a'/'run')], stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == 'held\n'
    said = f"^out must be a folder that no other process uses, but '{tmp_path/'a'/'run'}' is in use"
    for _ in range(2):
        with pytest.raises(ValueError, match=said), locked(tmp_path/'a'/'run', 'out'): pass
    first.kill()
    first.communicate()
    with locked(tmp_path/'a'/'run', 'out'): (tmp_path/'a'/'run'/'mine').touch()
    assert os.listdir(tmp_path/'a'/'run') == ['mine']


def test_the_process_that_holds_a_folder_is_named(tmp_path):
    said = f'is in use by process {os.getpid()}.$'
    with locked(tmp_path), pytest.raises(ValueError, match=said), locked(tmp_path): pass


def test_an_error_leaves_no_lock_and_no_folder_that_was_made_for_it(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path/'a'/'b'): raise KeyError
    assert not os.listdir(tmp_path)
    (tmp_path/'empty').mkdir()
    with locked(tmp_path/'empty'): pass
    assert os.listdir(tmp_path) == ['empty'] and not os.listdir(tmp_path/'empty'), 'what was there stays'


def test_a_folder_without_locks_is_used_with_a_warning(tmp_path, monkeypatch):
    import filelock
    def refuse(*_, **__): raise OSError(errno.ENOLCK, 'No locks available')
    monkeypatch.setattr(filelock.FileLock, 'acquire', refuse)
    with pytest.warns(UserWarning, match=f"'{tmp_path}' cannot be locked against other processes .*No locks"):
        with locked(tmp_path): pass


@pytest.mark.skipif(not os.path.isdir('/proc/self'), reason='a folder where nobody can make a file')
def test_a_lock_that_cannot_be_made_is_not_in_use():
    with pytest.raises(OSError, match=": '/proc/x'$"), locked('/proc/x', 'out', is_file=True): pass


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path):
    ended = subprocess.Popen([sys.executable, '-c', ''])
    ended.wait()
    kept = ['mine.1.tmp', '.mine.tmp', '.mine.txt', f'.state.{os.getpid()}.tmp', f'.b.{ended.pid}-1f.tmp']
    for name in [*kept, f'.state.safetensors.{ended.pid}.tmp']: (tmp_path/name).touch()
    with locked(tmp_path): assert sorted(os.listdir(tmp_path)) == sorted(['.lock', *kept])
    (tmp_path/f'.state.{ended.pid}.tmp').touch()
    with locked(tmp_path/'table.csv', is_file=True): pass
    assert (tmp_path/f'.state.{ended.pid}.tmp').exists(), 'the folder is not locked'
