"Weights from anywhere: files as training scripts write them, what must not be read, and the table of a model."
import argparse, collections, datetime, io, os, pathlib, pickle, re, subprocess, sys, types, warnings, zipfile

import numpy as np
import pytest, torch
from distill_nb.files import save_weights
from distill_nb.models import checked_state, digit_student, resnet18, resnet8, transfer_weights
from distill_nb.weights import Stored, fitting, read_checkpoint
from distill_nb.zoo import load_weights
from networks import bits, same
from processes import python
from torch import nn

NAMES = ['cat', 'dog', 'owl']
OLD = dict(_use_new_zipfile_serialization=False)


def state(seed=0, make=digit_student):
    torch.manual_seed(seed)
    return dict(make().state_dict())


def with_prefix(prefix, table): return {prefix + k: v for k, v in table.items()}


def fit(thing, path, model=None, part=''):
    "What of `thing`, saved at `path`, is for `model`."
    torch.save(thing, path)
    return fitting(read_checkpoint(f'{path}{part}'), model or digit_student())


def refusal(path):
    "The sentence with which a file is refused; nothing in it may run, and it may not change."
    before, beside = path.read_bytes(), sorted(os.listdir(path.parent))
    with pytest.raises(ValueError) as e: read_checkpoint(path)
    said = str(e.value)
    assert path.name in said and '\n' not in said and said.endswith(('.', ')')), said
    assert path.read_bytes() == before and sorted(os.listdir(path.parent)) == beside
    return said


def zipped(path, pickled, storages=(), packed=False, names=()):
    "A zip archive as torch.save writes it, with any pickle and any storages."
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as z:
        for name, data in {'data.pkl': pickled, 'byteorder': b'little', **{f'data/{k}': v for k, v in storages},
                           'version': b'3\n'}.items(): z.writestr(f'a/{name}', data)
        for name in names: z.writestr(f'a/{name}', b'')
    return path


def rewritten(path, old, new):
    "The checkpoint at `path` with other bytes in its pickle."
    with zipfile.ZipFile(path) as z:
        top = z.namelist()[0].partition('/')[0]
        read = {n.removeprefix(f'{top}/'): z.read(n) for n in z.namelist()}
    assert old in read['data.pkl']
    return zipped(path, read['data.pkl'].replace(old, new), [(k[5:], v) for k, v in read.items() if k[:5] == 'data/'])


# Forms

FORMS = {
    'plain': lambda s: s, 'ordered': collections.OrderedDict, 'nested': lambda s: {'state_dict': s, 'epoch': 3},
    'model': lambda s: {'model': s}, 'deep': lambda s: {'a': {'b': {'net': {'weights': s}}}},
    'in a tuple': lambda s: ({'lr': .1}, s), 'parameters': lambda s: {k: nn.Parameter(v) if v.is_floating_point() else v
                                                                     for k, v in s.items()},
    'several gpus': lambda s: with_prefix('module.', s), 'compiled': lambda s: {'net': with_prefix('_orig_mod.', s)},
    'compiled on several gpus': lambda s: {'state_dict': with_prefix('module._orig_mod.', s)},
    'wrapped inside': lambda s: {k.replace('.', '._checkpoint_wrapped_module._orig_mod.', 1): v for k, v in s.items()},
    'sharded': lambda s: with_prefix('_fsdp_wrapped_module.', s), 'lightning': lambda s: {
        'state_dict': with_prefix('model.', s) | {'loss.weight': torch.ones(3)}, 'hyper_parameters': {'lr': .1}},
    'distilled': lambda s: {'net': with_prefix('module.student.', s) |
                                   with_prefix('module.teacher.', state(1, resnet8))},
    'any word': lambda s: with_prefix('my.own.words.', s),
    'in parts': lambda s: {'student': {n: {k[len(n) + 1:]: v for k, v in s.items() if k.startswith(n)}
                                       for n in ('layer1', 'layer2', 'fc')}},
    'with counters': lambda s: s | {'total_ops': torch.ones(1), 'layer1.0.total_params': torch.ones(1)},
    'averaged model': lambda s: with_prefix('module.', s) | {'n_averaged': torch.tensor(3)},
    'without counts': lambda s: {k: v for k, v in s.items() if 'num_batches' not in k},
    'resumable': lambda s: {'model': s, 'optimizer': {'state': {0: {'exp_avg': torch.ones(3)}}, 'param_groups': [{}]},
                            'rng': torch.get_rng_state(), 'scaler': {'scale': 2.}, 'best': 0.5}}


@pytest.mark.parametrize('old', [False, True], ids=['zip', 'old'])
@pytest.mark.parametrize('form', FORMS)
def test_files_of_torch_save(form, old, tmp_path):
    model, other, path = digit_student(), digit_student(), tmp_path/'w'
    torch.save(FORMS[form](dict(model.state_dict())), path, **OLD if old else {})
    assert load_weights(other, path) is other
    assert same([*other.parameters()], [*model.parameters()])


@pytest.mark.parametrize('suffix', ['.pth', '.pt', '.bin', '.tar', '.pth.tar', '.ckpt', '.safetensors', '', '.1'])
def test_the_content_counts_and_not_the_suffix(suffix, tmp_path):
    model, path = digit_student(), tmp_path/f'w{suffix}'
    def ours(path): save_weights(model, tmp_path/'o.safetensors'), (tmp_path/'o.safetensors').rename(path)
    for write in (lambda p: torch.save(model.state_dict(), p), ours,
                  lambda p: torch.save(model.state_dict(), p, **OLD)):
        write(path)
        assert same(read_checkpoint(path).tables, {'': dict(model.state_dict())})


@pytest.mark.parametrize('wrap', [nn.DataParallel, lambda m: torch.compile(m, backend='eager'),
                                  lambda m: nn.Sequential(collections.OrderedDict(backbone=m)),
                                  lambda m: nn.ModuleDict({'a': nn.ModuleDict({'b': m})})])
@pytest.mark.parametrize('form', ['plain', 'lightning', 'compiled'])
def test_a_model_with_the_longer_names_finds_them(wrap, form, tmp_path):
    found = fit(FORMS[form](state()), tmp_path/'w.pt', model := wrap(digit_student(7)))
    assert found.state.keys() == model.state_dict().keys()
    assert same([*found.state.values()], [*state().values()])
    with pytest.raises(ValueError, match='fc.weight is 10x32 but must be 7x32'): checked_state(model, found.state, 'w')


def test_tensors_of_every_kind_come_back(tmp_path):
    x = torch.arange(24.)
    kinds = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
             torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint16]
    table = {str(k): x.to(k) for k in kinds} | {
        'transposed': x.view(4, 6).T, 'a part': x[3:7], 'one': torch.tensor(3.), 'none': torch.ones(0, 3),
        'no half': torch.ones(0).half(), 'last': torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last),
        'shown twice': x[:3].expand(2, 3), 'tied': x, 'trained': nn.Parameter(x.clone())}
    table['marked'] = nn.Parameter(x.clone()); table['marked'].note = 'kept'
    untyped = {k for k, t in table.items() if t.dtype in (torch.float8_e4m3fn, torch.uint16)}
    for kw in ({}, OLD):  # torch writes these in the old format too, and does not read them there
        if kw: table = {k: t for k, t in table.items() if k not in untyped}
        torch.save(table, tmp_path/'w.pt', **kw)
        found = read_checkpoint(tmp_path/'w.pt').tables['']
        assert found.keys() == table.keys() and not any(t.requires_grad for t in found.values())
        for k, t in table.items():
            assert found[k].dtype == t.dtype and torch.equal(found[k].to(torch.complex128), t.to(torch.complex128)), k


HARMLESS = {
    'options': argparse.Namespace(lr=.1, betas=(.9, .99), inner=argparse.Namespace(a=1)),
    'simple': types.SimpleNamespace(a=[1, {2: 'b'}]),
    'scalars': [np.float64(.5), np.int64(3), np.bool_(True), np.str_('x')],
    'arrays': [np.arange(6).reshape(2, 3), np.ones((0, 2), 'f4'), np.random.get_state()], 'dtype': np.dtype('f4'),
    'kind': np.float32, 'counts': collections.Counter('abca'), 'lists': collections.defaultdict(list, a=[1]),
    'path': pathlib.Path('a/b'), 'pure': pathlib.PureWindowsPath('c:/d'), 'set': {1, 2}, 'frozen': frozenset('ab'),
    'time': datetime.datetime(2024, 2, 29, tzinfo=datetime.timezone.utc), 'delta': datetime.timedelta(3),
    'complex': 1 + 2j,
    'type': torch.float32, 'device': torch.device('cuda:3'), 'size': torch.Size([2, 3]), 'bytes': b'ab', 'long': 2**70,
    'python': int, 'python state': __import__('random').getstate(), 'texts': np.array(['cat', 'dog']), 'none': None}


@pytest.mark.parametrize('name', HARMLESS)
def test_harmless_things_may_lie_beside_the_weights(name, tmp_path):
    for kw in ({}, OLD):
        torch.save({'args': HARMLESS[name], 'state_dict': state()}, tmp_path/'w.ckpt', **kw)
        assert same(read_checkpoint(tmp_path/'w.ckpt').tables, {'state_dict': state()})


@pytest.mark.parametrize('old,new', [(b'numpy._core', b'numpy.core'), (b'numpy.core', b'numpy._core')])
def test_numpy_has_two_spellings(old, new, tmp_path):
    torch.save({'best': np.float64(.5), 'curve': np.ones(3), 'state_dict': state()}, path := tmp_path/'w.pth')
    with zipfile.ZipFile(path) as z: pickled = z.read('w/data.pkl')
    if old in pickled: rewritten(path, old, new)
    assert same(read_checkpoint(path).tables, {'state_dict': state()})


@pytest.mark.parametrize('module', ['pytorch_lightning.utilities.parsing', 'lightning.fabric.utilities.data'])
def test_options_of_lightning_are_a_dictionary(module, tmp_path):
    class AttributeDict(dict): pass
    AttributeDict.__module__, AttributeDict.__qualname__ = module, 'AttributeDict'
    above = [module.rsplit('.', n)[0] for n in range(module.count('.') + 1)]
    for name in above: sys.modules[name] = types.SimpleNamespace(AttributeDict=AttributeDict)
    try: torch.save({'hyper_parameters': AttributeDict(lr=.1, classes=NAMES), 'hparams_type': AttributeDict,
                     'state_dict': with_prefix('model.', state())}, tmp_path/'w.ckpt')
    finally:
        for name in above: del sys.modules[name]
    stored = read_checkpoint(tmp_path/'w.ckpt')
    assert stored.classes == NAMES and same(fitting(stored, digit_student()).state, state())


def test_what_a_user_has_allowed_is_not_changed_and_what_is_allowed_here_does_not_stay(tmp_path):
    torch.save({'args': HARMLESS['options'], 'state_dict': state()}, tmp_path/'w.pth')
    with torch.serialization.safe_globals([argparse.Namespace]):
        before = set(torch.serialization.get_safe_globals())
        read_checkpoint(tmp_path/'w.pth')
        assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(pickle.UnpicklingError): torch.load(tmp_path/'w.pth', weights_only=True)


# Nothing is run

class Evil:
    "A thing that makes a folder when it is unpickled."
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path/'ran'),)


class Stranger:
    def __init__(self): self.a = 3


class Dict(dict): pass


@pytest.mark.parametrize('old', [False, True], ids=['zip', 'old'])
@pytest.mark.parametrize('place', ['alone', 'beside', 'options', 'key', 'optimizer', 'deep'])
def test_no_program_runs(place, old, tmp_path):
    evil = Evil(tmp_path)
    thing = {'alone': evil, 'beside': {'state_dict': state(), 'extra': evil},
             'options': {'state_dict': state(), 'args': argparse.Namespace(x=evil)},
             'key': {(evil,): 1, 'w': torch.ones(3)},
             'optimizer': {'model': state(), 'optimizer': {'param_groups': [evil], 'state': {}}},
             'deep': {'model': state(), 'x': [[[({'a': evil},)]]]}}[place]
    torch.save(thing, path := tmp_path/'w.pth', **OLD if old else {})
    assert 'would run posix.mkdir if it were unpickled. Nothing was run' in refusal(path)
    with torch.serialization.safe_globals([(os.mkdir, 'posix.mkdir')]): refusal(path)


@pytest.mark.parametrize('old', [False, True], ids=['zip', 'old'])
def test_unknown_types_are_named_and_two_lines_leave_the_weights(old, tmp_path, monkeypatch):
    things = {'cfg': Stranger(), 'more': Dict(a=1), 'enum': re.compile('a'), 'f': os.path.join, 'state_dict': state()}
    torch.save(things, path := tmp_path/'w.pth', **OLD if old else {})
    said = refusal(path)
    assert 'asks for test_weights.Stranger, test_weights.Dict, re._compile and 1 more' in said
    assert same(after_two_lines(said, tmp_path, monkeypatch), {'': state()})


def after_two_lines(said, folder, monkeypatch):
    "The tables in the file that the two lines in a refusal write."
    pattern = r'file of weights of it: (.*); (torch.save\(.*?\))\.$'
    first, second = re.search(pattern, said).groups()
    assert 'only if you trust its maker' in said.partition(first)[0]  # the caution comes first
    monkeypatch.chdir(folder)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        exec(f'{first}\n{second}', {'torch': torch})
    return read_checkpoint(folder/'w-weights.pth').tables


@pytest.mark.parametrize('wrap', [lambda m: m, lambda m: {'epoch': 3, 'model': m},
                                  lambda m: {'ema': {'net': m}, 'x': [m]}, lambda m: {'net': nn.DataParallel(m)}])
@pytest.mark.parametrize('old', [False, True], ids=['zip', 'old'])
def test_a_whole_network_is_refused_with_two_lines_that_work(wrap, old, tmp_path, monkeypatch):
    model = digit_student()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # about the source of a class, in the old format
        torch.save(wrap(model), path := tmp_path/'w.pth', **OLD if old else {})
    said = refusal(path)
    assert 'holds a whole pickled network' in said and 'only if you trust' in said
    [(_, table)] = after_two_lines(said, tmp_path, monkeypatch).items()
    assert same([*table.values()], [*model.state_dict().values()])


def test_a_network_beside_its_weights_leaves_the_weights(tmp_path, monkeypatch):
    torch.save({'loss': nn.CrossEntropyLoss(), 'state_dict': state()}, path := tmp_path/'w.pth')
    said = refusal(path)
    assert "under 'loss', a torch.nn.modules.loss.CrossEntropyLoss" in said
    assert same(after_two_lines(said, tmp_path, monkeypatch), {'': state()})


class Learner:
    def __init__(self, model): self.model, self.lr = model, .1


@pytest.mark.parametrize('wrap,way', [(lambda m: m, 'thing.model'), (lambda m: {'x': [m]}, "thing['x'][0].model")])
def test_a_network_in_an_attribute_leaves_its_weights(wrap, way, tmp_path, monkeypatch):
    torch.save(wrap(Learner(model := digit_student())), path := tmp_path/'w.pkl')
    assert f'torch.save({way}.state_dict(), ' in (said := refusal(path)) and 'no weights' not in said
    assert same(after_two_lines(said, tmp_path, monkeypatch), {'': dict(model.state_dict())})


def test_the_larger_of_a_network_and_a_table_is_what_counts(tmp_path, monkeypatch):
    torch.save({'model': state(), 'loss': nn.CrossEntropyLoss(torch.ones(10))}, path := tmp_path/'w.pth')
    assert 'whole pickled network' not in (said := refusal(path))
    assert same(after_two_lines(said, tmp_path, monkeypatch), {'': state()})
    (tmp_path/'w-weights.pth').unlink()
    torch.save({'stats': {'mean': torch.ones(3)}, 'loss': nn.CrossEntropyLoss(), 'net': digit_student()}, path)
    assert "whole pickled network under 'net'" in (said := refusal(path))
    [(_, table)] = after_two_lines(said, tmp_path, monkeypatch).items()
    assert table.keys() == state().keys()


def test_a_table_of_numpy_arrays_is_refused_with_two_lines_that_work(tmp_path, monkeypatch):
    for wrap in (lambda t: t, lambda t: {'epoch': 3, 'net': t}):
        torch.save(wrap({'w': np.ones((2, 3), 'f4'), 'n': np.arange(4)}), path := tmp_path/'w.pth')
        assert 'holds NumPy arrays and no tensors' in (said := refusal(path))
        (tmp_path/'w-weights.pth').unlink(missing_ok=True)
        table = after_two_lines(said, tmp_path, monkeypatch)['']
        assert same(table, {'w': torch.ones(2, 3), 'n': torch.arange(4)})


def test_a_program_of_torch_export_is_refused_with_two_lines_that_work(tmp_path, monkeypatch):
    program = torch.export.export(model := digit_student().eval(), (torch.zeros(2, 1, 8, 8),))
    torch.export.save(program, path := tmp_path/'w.pt2')
    assert 'is a program of torch.export' in (said := refusal(path))
    found = after_two_lines(said, tmp_path, monkeypatch)['']
    assert same({k: found[k] for k in model.state_dict()}, dict(model.state_dict()))


def test_a_distributed_checkpoint_is_named(tmp_path):
    (part := tmp_path/'__0_0.distcp').write_bytes(b'PK\x03\x04')
    for path in (tmp_path, part):
        with pytest.raises(ValueError, match='format_utils dcp_to_torch FOLDER FILE'): read_checkpoint(path)


def test_the_old_format_with_a_newer_protocol_is_refused_with_two_lines_that_work(tmp_path, monkeypatch):
    for protocol in (3, 4, 5):
        torch.save(state(), path := tmp_path/'w.pth', pickle_protocol=protocol, **OLD)
        try: assert same(read_checkpoint(path).tables, {'': state()})
        except ValueError as e:
            assert f'was written with pickle_protocol={protocol}' in (said := str(e)) and 'torch.load(' in said
            (tmp_path/'w-weights.pth').unlink(missing_ok=True)
            assert same(after_two_lines(said, tmp_path, monkeypatch), {'': state()})


def test_a_torchscript_program_is_refused_with_two_lines_that_work(tmp_path, monkeypatch):
    model, path = digit_student().eval(), tmp_path/'w.pt'
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.jit.trace(model, torch.zeros(1, 1, 8, 8)).save(str(path))
    assert 'is a TorchScript program' in (said := refusal(path))
    found = after_two_lines(said, tmp_path, monkeypatch)['']
    assert same({k: found[k] for k in model.state_dict()}, dict(model.state_dict()))


def test_a_plain_pickle_is_refused_with_two_lines(tmp_path, monkeypatch):
    for protocol in (2, 4):
        (path := tmp_path/'w.pkl').write_bytes(pickle.dumps(state(), protocol))
        assert 'is a pickle, but not one of torch.save' in (said := refusal(path))
        (tmp_path/'w-weights.pth').unlink(missing_ok=True)
        assert same(after_two_lines(said, tmp_path, monkeypatch), {'': state()})
        path.write_bytes(pickle.dumps([Evil(tmp_path), state()], protocol))
        assert 'would run posix.mkdir' in (said := refusal(path)) and 'pickle.load' not in said
        path.write_bytes(pickle.dumps({'epoch': 3}, protocol))
        assert 'holds no tensors' in (said := refusal(path)) and 'pickle.load' not in said


def test_newer_protocols_are_refused_or_read(tmp_path):
    for protocol in (3, 4, 5):
        thing = {'state_dict': state(), 'args': HARMLESS['options']}
        torch.save(thing, path := tmp_path/'w.pth', pickle_protocol=protocol)
        try: assert same(read_checkpoint(path).tables, {'state_dict': state()})
        except ValueError as e:
            assert f'pickle_protocol={protocol}' in str(e) and "torch.save(thing['state_dict'], " in str(e)
        torch.save([Evil(tmp_path), state()], path, pickle_protocol=protocol)
        assert 'would run posix.mkdir' in refusal(path)


# What is no file of weights

@pytest.mark.parametrize('data,said', [
    (b'', 'is empty'), (b'version https://git-lfs.github.com/spec/v1\noid sha256:00\n', 'git lfs pull'),
    (b'\n<!DOCTYPE html>\n<html>', 'is a web page'), (b'<html>404 Not Found</html>', 'is a web page'),
    (b'<?xml version="1.0"?><Error>AccessDenied</Error>', 'is a web page'), (b'\x1f\x8b\x08' + b'0' * 99, 'gzip'),
    (b'\x08\x08\x12\x07pytorch\x1a\x05', 'is an ONNX model'), (b'\x89HDF\r\n\x1a\n', 'HDF5'), (b'GGUF\x03', 'GGUF'),
    (b'\x93NUMPY\x01', 'NumPy'), (b'{"weight_map": {}}', "is text that begins with '{\"weight_map\": {}}'"),
    (b'epoch,loss\n1,2\n', "begins with 'epoch,loss'"),
    (bytes(range(100, 250)), 'is damaged or is not a file of weights'),
    (b'\x00' * 500, 'is damaged or is not a file of weights'), (b'PK\x03\x04' + b'\x00' * 90, 'is damaged')])
def test_other_files_are_told_by_their_content(data, said, tmp_path):
    for name in ('w.pth', 'w.safetensors'):
        (tmp_path/name).write_bytes(data)
        assert said in refusal(tmp_path/name)
        (tmp_path/name).unlink()


def test_other_archives_are_told_from_checkpoints(tmp_path):
    np.savez(tmp_path/'w.npz', a=np.ones(3))
    assert 'is a zip archive, but not one of torch.save' in refusal(tmp_path/'w.npz')


def test_there_must_be_a_file(tmp_path):
    with pytest.raises(ValueError, match=r"path must be a file, but there is none at '.*no\.pth'"):
        read_checkpoint(tmp_path/'no.pth')
    with pytest.raises(ValueError, match='no.pth'): read_checkpoint(f'{tmp_path/"no.pth"}::ema')
    with pytest.raises(ValueError, match=r"is a folder: give a file in it\.$"): read_checkpoint(tmp_path)
    for name in ('b.pth', 'a.safetensors', 'config.json'): (tmp_path/name).write_bytes(b'x')
    with pytest.raises(ValueError, match='give a file in it, such as a.safetensors, b.pth'): read_checkpoint(tmp_path)


@pytest.mark.parametrize('thing,said', [({'epoch': 3, 'args': {}}, 'only epoch, args'), (torch.ones(3), 'only Tensor'),
                                        ([torch.ones(3)], 'only list'), ({0: torch.ones(3)}, 'only 0'),
                                        ({}, 'only an empty dictionary.')])
def test_a_file_without_a_table_is_refused(thing, said, tmp_path):
    torch.save(thing, tmp_path/'w.pth')
    assert said in refusal(tmp_path/'w.pth')


def test_a_whole_object_without_weights_is_refused(tmp_path):
    torch.save(Stranger(), tmp_path/'w.bin')
    assert 'asks for test_weights.Stranger' in (said := refusal(tmp_path/'w.bin')) and 'It holds no weights.' in said
    assert 'torch.load' not in said  # nothing to run it for


@pytest.mark.parametrize('old', [False, True], ids=['zip', 'old'])
def test_a_cut_file_is_refused_wherever_it_is_cut(old, tmp_path):
    torch.save({'state_dict': state()}, path := tmp_path/'w.pth', **OLD if old else {})
    whole = path.read_bytes()
    for n in [*range(1, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:n])
        refusal(path)


def test_a_flipped_bit_in_a_zip_archive_is_refused_or_changes_nothing(tmp_path):
    table = {'a': torch.arange(5.), 'b': torch.ones(2, 2)}
    torch.save(table, path := tmp_path/'w.pth')
    whole, refused = path.read_bytes(), 0
    for i in range(0, len(whole)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1:])
        try: assert same(read_checkpoint(path).tables, {'': table}), i
        except ValueError: refused += 1
    assert refused > 200


# Bombs

class Claim:
    "A storage that says that it has `count` numbers of four bytes."
    def __init__(self, count, key='0'): self.pid = 'storage', torch.FloatStorage, key, 'cpu', count


class Claims(pickle.Pickler):
    def persistent_id(self, o): return o.pid if isinstance(o, Claim) else None


class View:
    "A tensor that claims what it likes."
    def __init__(self, count, size=None, stride=(1,), offset=0):
        self.args = Claim(count), offset, (count,) if size is None else size, stride, False, collections.OrderedDict()
    def __reduce__(self): return torch._utils._rebuild_tensor_v2, self.args


def claims(*args, **kw): return pickled({'w': View(*args, **kw)})


def pickled(thing):
    Claims(file := io.BytesIO(), protocol=2).dump(thing)
    return file.getvalue()


GB = 2**28  # float32 numbers in a gibibyte


def bomb(name, path):
    "A small file that would take gigabytes."
    small = [('0', b'\x00' * 16)]
    if name == 'claimed': return zipped(path, claims(3 * GB), small)
    if name == 'claimed bytes': return zipped(path, claims(3 * GB, (4,)), small)
    if name == 'enlarged': return zipped(path, claims(4, (3 * GB,)), small)
    if name == 'offset': return zipped(path, claims(4, (1,), (1,), offset=3 * GB), small)
    if name == 'strided': return zipped(path, claims(4, (2,), (3 * GB,)), small)
    if name == 'negative': return zipped(path, claims(4, (-1,), (1,)), small)
    if name == 'repeated': return zipped(path, claims(4, (3 * GB,), (0,)), small)
    if name == 'repeated twice': return zipped(path, claims(4, (4, GB), (1, 0)), small)
    if name == 'two sizes': return zipped(path, pickled([View(4), View(3 * GB)]), small)
    if name == 'forged': return forged(zipped(path, claims(3 * GB), small))
    if name == 'two pickles':
        with zipfile.ZipFile(path, 'w') as z:
            for top, count in (('b', 3 * GB), ('a', 0)): z.writestr(f'{top}/data.pkl', claims(count))
        return path
    if name == 'packed': return zipped(path, claims(GB // 16), [('0', bytes(GB // 4))], packed=True)
    if name == 'packed a little': return zipped(path, claims(4), [('0', os.urandom(16))], packed=True)
    if name == 'missing': return zipped(path, claims(4))
    if name == 'sparse':
        torch.save({'a': {'w': torch.sparse_coo_tensor([[0], [0]], [1.], (10**6, 10**6))}}, path); return path
    if name == 'compressed': torch.save({'a': {'w': torch.eye(3).to_sparse_csr()}}, path); return path
    if name == 'old': torch.save(torch.ones(4), path, **OLD); return old_claim(path)
    if name == 'bytearray': return zipped(path, b'\x80\x02c__builtin__\nbytearray\nJ\x00\x00\x00\x7f\x85R.')
    if name == 'tensor': return zipped(path, b'\x80\x02ctorch\nFloatTensor\nJ\x00\x00\x00\x7f\x85R.')
    if name == 'storage': return zipped(path, b'\x80\x02ctorch.storage\nUntypedStorage\nJ\x00\x00\x00\x7f\x85R.')
    if name == 'typed':
        return zipped(path, b'\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(ctorch\nTensor\nctorch\nTensor\n'
                            b'J\x00\x00\x00\x7f\x85}tR.')
    if name == 'filled': return zipped(path, claims(4)[:-2] + b'K\x00K\x01ss.', small)
    if name == 'set': return zipped(path, claims(4)[:-2] + b'(K\x00J\x00\x00\x00\x7f\x85K\x01\x85tbs.', small)
    if name == 'memo': return zipped(path, b'\x80\x02]r\xff\xff\xff\x0f.')
    if name == 'lists': return zipped(path, b'\x80\x02' + b']' * 2**25 + b'.')
    if name == 'text': return zipped(path, b'\x80\x02X\xff\xff\xff\x7fabc.')


def forged(path):
    "The archive at `path`, whose list of entries says that its storage has three gigabytes."
    data = bytearray(path.read_bytes())
    at = data.index(b'a/data/0', data.index(b'PK\x01\x02')) - 46
    data[at + 20:at + 28] = (3 * 2**30).to_bytes(4, 'little') * 2
    path.write_bytes(data)
    return path


def old_claim(path):
    data = path.read_bytes()
    i = data.index(b'K\x04Nt')  # the count 4 of the storage
    path.write_bytes(data[:i] + b'J' + (GB - 1).to_bytes(4, 'little') + data[i + 2:])
    return path


BOMBS = {'claimed': 'storage 0 claims 3,221,225,472 bytes, but the file holds 16', 'claimed bytes': 'storage 0 claims',
         'enlarged': "'w' claims 3,221,225,472 bytes, but its storage has 16", 'offset': "'w' claims",
         'strided': "'w' claims",
         'negative': 'no view is like this', 'repeated': "'w' repeats its numbers until they are 3,221,225,472 bytes",
         'repeated twice': 'repeats its numbers', 'two sizes': "storage '0' has two sizes", 'forged': 'is packed',
         'two pickles': 'two entries have one name', 'storage': 'in a way in which', 'typed': 'in a way in which',
         'filled': 'in a way in which', 'packed': 'is packed', 'packed a little': 'is packed',
         'missing': 'the file holds 0 of them',
         'sparse': "holds a sparse tensor, 'a.w': save its to_dense()", 'compressed': 'a sparse tensor',
         'old': 'claims',
         'bytearray': 'asks for builtins.bytearray', 'tensor': 'torch.FloatTensor', 'set': 'in a way in which',
         'memo': '',
         'lists': 'holds more than 4,194,304 bytes beside its tensors', 'text': 'damaged'}


@pytest.mark.parametrize('name', BOMBS)
def test_bombs_are_named(name, tmp_path):
    assert BOMBS[name] in refusal(bomb(name, tmp_path/'w.pth'))


def key_bytes(kind):
    pairs = b')' + b''.join(b'q%c0h%ch%c\x86' % (i, i, i) for i in range(40))
    if kind == 'key': return b'\x80\x02}(X\x01\0\0\0a}' + pairs + b'K\x01su.'
    if kind == 'keys': return b'\x80\x02}(' + pairs + b'K\x01u.'
    if kind == 'dict': return b'(' + pairs + b'K\x01d.'
    if kind == 'frozen': return b'\x80\x04(' + pairs + b'\x91.'
    if kind == 'added': return b'\x80\x04\x8f(' + pairs + b'\x90.'
    if kind == 'ordered': return b'\x80\x02ccollections\nOrderedDict\n](](' + pairs + b'K\x01ee\x85R.'
    call = {'set': b'builtins\nset', 'counter': b'collections\nCounter'}[kind]
    return b'\x80\x02c' + call + b'\n]' + pairs + b'a\x85R.'


@pytest.mark.parametrize('kind', ['key', 'keys', 'dict', 'frozen', 'added', 'ordered', 'set', 'counter'])
def test_a_key_that_takes_ages_to_hash_is_refused(kind, tmp_path):
    zipped(path := tmp_path/'w.pth', key_bytes(kind))
    code = '''
import sys
from distill_nb.weights import read_checkpoint
try: read_checkpoint(sys.argv[1])
except ValueError as e: print(e)'''
    done = subprocess.run([*python(), '-c', code, str(path)], capture_output=True, text=True, timeout=120)
    assert 'a key in it is a tower of tuples' in done.stdout, done.stdout + done.stderr


def test_ordinary_keys_may_be_tuples(tmp_path):
    table = {('a', (0, 1)): 1, (): 2, 3: {frozenset('ab'), (1, 2)}}
    torch.save({'state_dict': state(), 'x': table, 'y': {(i, i + 1): i for i in range(999)}}, tmp_path/'w.pth')
    assert same(read_checkpoint(tmp_path/'w.pth').tables, {'state_dict': state()})


def test_the_words_of_pytorch_do_not_come_through(tmp_path):
    for pickled in (b'\x80\x02]]0.', b'\x80\x02' + b']' * 1000 + b'.', b'\x80\x02}(K\x01K\x02d.'):
        said = refusal(zipped(tmp_path/'w.pth', pickled))
        assert 'weights_only' not in said.replace('weights_only=False)', ''), said


def test_bombs_take_no_memory(tmp_path):
    "All of them in a child that may have 300 MB more than what its imports took; and the most that it had."
    paths = [str(bomb(name, tmp_path/f'{name}.pth')) for name in BOMBS]
    code = '''
import resource, sys
from distill_nb.weights import read_checkpoint
most = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
had = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize() + 300 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (had, had))
before = most()
for path in sys.argv[1:]:
    try: read_checkpoint(path)
    except ValueError as e: assert 'allocate' not in str(e) and 'Memory' not in str(e), e
    else: raise SystemExit(path)
print(most() - before)'''
    done = subprocess.run([sys.executable, '-c', code, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout) < 60, 'megabytes'


@pytest.mark.parametrize('kind', ['quantised', 'meta'])
def test_tensors_that_are_no_weights_are_named(kind, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        w = torch.ones(3, device='meta')
        if kind == 'quantised': w = torch.quantize_per_tensor(torch.ones(3), .1, 0, torch.qint8)
        torch.save({'model': {'fc.weight': w}}, path := tmp_path/'w.pth')
    assert "'model.fc.weight'" in (said := refusal(path)) and kind in said


def test_a_table_that_holds_itself_and_a_tower_of_lists_are_read(tmp_path):
    inner = {'model': state()}
    inner['self'] = inner
    tower = []
    for _ in range(50): tower = [tower]
    doubled = {'w': torch.ones(1)}
    for _ in range(18): doubled = {'a': doubled, 'b': doubled}
    torch.save(inner | {'tower': tower, 'doubled': doubled}, path := tmp_path/'w.pth')
    assert same(read_checkpoint(path).tables, {'model': state(), 'doubled' + '.a' * 18: {'w': torch.ones(1)}})


def test_a_name_in_a_file_can_not_write_on_the_screen_or_fill_it(tmp_path):
    zipped(path := tmp_path/'w.pth', b'\x80\x02c\x1b[31mred\x07\n' + b'x' * 10**5 + b'\n.')
    said = refusal(path)
    assert 'asks for ?[31mred?.xxx' in said and len(said) < 500


# Which table

def test_the_average_is_taken_before_the_raw_weights_and_both_can_be_had(tmp_path):
    for raw, average in (('state_dict', 'state_dict_ema'), ('model', 'model_ema'), ('model', 'ema'), ('net', 'swa'),
                         ('student', 'student_ema')):
        path = tmp_path/'w.pth'
        found = fit({raw: state(0), average: with_prefix('module.', state(1))}, path)
        assert same(found.state, state(1))
        assert f"under '{average}.module' are taken, an average; the raw ones are {path}::{raw}" in found.said[0]
        assert same(fit({raw: state(0), average: state(1)}, path, part=f'::{raw}').state, state(0))
        assert same(fit({raw: state(0), average: state(1)}, path, part=f'::{average}').state, state(1))


@pytest.mark.parametrize('thing,places', [
    ({'student': state(0), 'teacher': state(1)}, ['student', 'teacher']),
    (with_prefix('student.', state(0)) | with_prefix('teacher.', state(1)), ['student', 'teacher']),
    ({'model': state(0), 'best': state(1)}, ['model', 'best']), ({'ema': state(0), 'swa': state(1)}, ['ema', 'swa']),
    ({'model': state(0), 'teacher_ema': state(1)}, ['model', 'teacher_ema']),
    ({'state_dict': with_prefix('module.a.', state(0)) | with_prefix('module.b.', state(1))},
     ['state_dict.module.a', 'state_dict.module.b'])])
def test_two_networks_that_fit_are_a_question_and_each_answer_is_taken(thing, places, tmp_path):
    path = tmp_path/'w.pth'
    with pytest.raises(ValueError) as e: fit(thing, path)
    assert f'holds 2 networks that fit, under {places[0]!r}, {places[1]!r}' in str(e.value)
    for i, place in enumerate(places):
        assert f'{path}::{place}' in str(e.value)
        assert same(fit(thing, path, part=f'::{place}').state, state(i))


def test_counts_of_batches_decide_nothing(tmp_path):
    for raw, average in ((state(0), FORMS['without counts'](state(1))), (FORMS['without counts'](state(0)), state(1))):
        found = fit({'state_dict': raw, 'state_dict_ema': average}, path := tmp_path/'w.pth')
        assert same(found.state, average) and f'the raw ones are {path}::state_dict' in found.said[0]


def test_an_optimizer_holds_no_network(tmp_path):
    torch.save(FORMS['resumable'](state()), tmp_path/'w.pth')
    assert read_checkpoint(tmp_path/'w.pth').tables.keys() == {'', 'model'}


def test_what_stands_in_other_tables_is_not_left_over(tmp_path):
    found = fit(state() | {'other': {'x': torch.ones(1)}}, path := tmp_path/'w.pth')
    assert same(found.state, state()) and found.said == [f'{path}: 1 other tensors are left alone, such as other.x']
    table = with_prefix('net.', state()) | {'net.extra': torch.ones(1), 'rng': torch.ones(1)}
    assert fit(table, path).state.keys() == {*state(), 'extra'}


def test_two_incomplete_networks_are_no_question_but_incomplete(tmp_path):
    table = lambda seed: {k: v for k, v in state(seed).items() if 'fc' not in k}
    with pytest.raises(ValueError, match='fc.weight is missing; fc.bias is missing'):
        checked_state(digit_student(), fit({'student': table(0), 'teacher': table(1)}, tmp_path/'w.pth').state, 'w')


def test_the_same_weights_twice_are_no_question(tmp_path):
    assert same(fit({'model': state(), 'best': state()}, tmp_path/'w.pth').state, state())


def test_shapes_and_what_is_left_over_decide_between_networks_of_one_naming(tmp_path):
    narrow, wide = state(0, resnet8), state(0, lambda: resnet8(widths=(8, 8, 16, 32)))
    for thing in ({'student': wide, 'teacher': narrow}, {'teacher': narrow, 'student': wide}):
        assert same(fit(thing, tmp_path/'w.pth', resnet8()).state, narrow)
        assert same(fit(thing, tmp_path/'w.pth', resnet8(widths=(8, 8, 16, 32))).state, wide)
    longer = state(1) | {'layer9.weight': torch.ones(3)}
    found = fit({'teacher': longer, 'student': state(0)}, path := tmp_path/'w.pth')
    assert same(found.state, state(0)) and f'{path}::teacher would fit too' in found.said[0]


def test_the_error_is_about_shapes_where_the_classes_are_others(tmp_path):
    other = with_prefix('module.', state(0, lambda: digit_student(7)))
    found = fit({'state_dict': other, 'x': {'fc.weight': torch.ones(3)}}, tmp_path/'w.pth')
    with pytest.raises(ValueError, match=r'model: fc.weight is 7x32 but must be 10x32; fc.bias is 7 but must be 10\.$'):
        checked_state(digit_student(), found.state, 'w')


def test_what_is_missing_and_what_is_left_over_is_listed(tmp_path):
    table = {k: v for k, v in state().items() if 'layer2' not in k} | {'extra.weight': torch.ones(3)}
    found = fit({'model': table}, tmp_path/'w.pth').state
    with pytest.raises(ValueError) as e: checked_state(digit_student(), found, 'w')
    assert str(e.value) == ('w does not hold weights of this model: layer2.0.weight is missing; '
                            'layer2.1.weight is missing; layer2.1.bias is missing; and 3 more.')
    assert 'extra.weight' in fit({'model': table}, tmp_path/'w.pth').state
    with pytest.raises(ValueError, match='layer1.0.weight is missing; .* and '):
        checked_state(digit_student(), fit({'model': {'a': torch.ones(3)}}, tmp_path/'w.pth').state, 'w')


def test_what_was_taken_and_what_was_left_is_said(tmp_path, capsys):
    path = tmp_path/'w.pth'
    assert fit(state(), path).said == []
    assert fit({'model': state()}, path).said == [f"{path}: the weights under 'model' are taken"]
    table = with_prefix('student.', state()) | {'teacher.fc.weight': torch.ones(2), 'n': torch.ones(1)}
    assert fit(table, path).said == [
        f"{path}: the weights under 'student' are taken",
        f'{path}: 2 other tensors are left alone, such as teacher.fc.weight']
    load_weights(digit_student(), path)
    assert capsys.readouterr().out.count(f'{path}: ') == 2


def test_a_part_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    torch.save({'model': state(), 'ema': with_prefix('module.', state())}, tmp_path/'w.pth')
    with pytest.raises(ValueError, match="has no part 'student'; it has ema, ema.module, model"):
        read_checkpoint(f'{tmp_path/"w.pth"}::student')
    torch.save(state() | {'ema': state(1)}, tmp_path/'w.pth')
    assert same(fitting(read_checkpoint(f'{tmp_path/"w.pth"}::'), digit_student()).state, state())
    save_weights(digit_student(), tmp_path/'a::b.safetensors')
    assert read_checkpoint(tmp_path/'a::b.safetensors').tables.keys() == {''}


def test_two_tensors_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="two tensors named 'fc.bias'"):
        fit(state() | {'_orig_mod.fc.bias': torch.ones(10)}, tmp_path/'w.pth')


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(3, 3), nn.Linear(3, 3)
        self.fc2.weight = self.fc1.weight


def test_tied_weights_that_a_file_has_once_are_both_filled(tmp_path):
    from safetensors.torch import save_model
    model, other, path = Tied(), Tied(), tmp_path/'w.safetensors'
    save_model(model, str(path))
    assert len(read_checkpoint(path).tables['']) == 3
    load_weights(other, path)
    assert same(dict(other.state_dict()), dict(model.state_dict())) and other.fc2.weight is other.fc1.weight
    for gone in ('fc1.weight', 'fc2.weight'):
        table = {k: v for k, v in model.state_dict().items() if k != gone}
        assert same(checked_state(other, table, 'w'), dict(model.state_dict()))
    both = {place: {k: v + i for k, v in table.items()} for i, place in enumerate(('student', 'teacher'))}
    with pytest.raises(ValueError, match='holds 2 networks that fit'): fit(both, path, model)


@pytest.mark.parametrize('extra', [{'scale': 3}, 3, None])
def test_a_state_that_is_no_tensor_is_left_out_and_left_alone(extra, tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self): return extra
        def set_extra_state(self, state): assert state is extra
    model, other, path = Extra(3, 2), Extra(3, 2), tmp_path/'w.safetensors'
    save_weights(model, path)
    assert read_checkpoint(path).tables[''].keys() == {'weight', 'bias'}
    load_weights(other, path)
    assert same(dict(other.state_dict()), dict(model.state_dict()))
    both = {'student': {k: v + 1 for k, v in model.named_parameters()}, 'teacher': dict(model.named_parameters())}
    with pytest.raises(ValueError, match='holds 2 networks that fit'): fit(both, path, model)


def test_fitting_changes_nothing(tmp_path):
    model = digit_student()
    before = bits(model)
    fit({'model': state()}, tmp_path/'w.pth', model)
    assert same(bits(model), before)


# Names of the classes

@pytest.mark.parametrize('beside', [
    {'classes': NAMES}, {'class_names': tuple(NAMES)}, {'class_to_idx': {'owl': 2, 'cat': 0, 'dog': 1}},
    {'idx_to_class': {1: 'dog', 0: 'cat', 2: 'owl'}}, {'id2label': {'0': 'cat', '2': 'owl', '1': 'dog'}},
    {'label2id': {'owl': 2, 'cat': 0, 'dog': 1}}, {'names': NAMES}, {'meta': {'CLASSES': tuple(NAMES)}},
    {'args': argparse.Namespace(classes=NAMES, names=['other'])}, {'hyper_parameters': {'class_names': NAMES}},
    {'classes': NAMES, 'class_to_idx': {c: i for i, c in enumerate(NAMES)}}, {'classes': 3, 'class_names': NAMES},
    {'classes': NAMES, 'args': {'classes': ['a', 'b']}}])
def test_classes_are_found_beside_the_weights(beside, tmp_path):
    torch.save({'state_dict': state()} | beside, tmp_path/'w.pth')
    assert read_checkpoint(tmp_path/'w.pth').classes == NAMES


@pytest.mark.parametrize('beside', [{}, {'classes': 10}, {'classes': 'cat,dog'}, {'classes': ['cat', 'cat']},
                                    {'names': {}}, {'class_to_idx': {'cat': 0, 'dog': 2}},
                                    {'class_to_idx': {'cat': 0, 'dog': 0}},
                                    {'classes': [1, 1]},
                                    {'vocab': {0: 1, 1: 2, 2: 0}}, {'args': {'names': NAMES}},
                                    {'id2label': {0: 'a', '0': 'b'}}])
def test_what_names_no_classes_is_not_taken_for_names(beside, tmp_path):
    torch.save({'state_dict': state()} | beside, tmp_path/'w.pth')
    assert read_checkpoint(tmp_path/'w.pth').classes is None


ARRAY = np.array(NAMES)
ZERO, ONE, TWO = (torch.tensor(i) for i in range(3))


@pytest.mark.parametrize('beside', [
    {'classes': [*ARRAY]}, {'classes': ARRAY}, {'classes': ARRAY.astype('S')}, {'classes': ARRAY.astype(object)},
    {'class_to_idx': {'owl': np.int64(2), 'cat': np.int64(0), 'dog': np.int64(1)}},
    {'class_to_idx': {'owl': TWO, 'cat': ZERO, 'dog': ONE}}, {'idx_to_class': {np.int64(1): 'dog', 2: 'owl', 0: 'cat'}},
    {'classes': [c.encode() for c in NAMES]}, {'vocab': NAMES}, {'idx_to_label': dict(enumerate(NAMES))},
    {'label_map': {'dog': 1, 'cat': 0, 'owl': 2}}, {'meta': {'dataset_meta': {'classes': tuple(NAMES)}}},
    {'args': argparse.Namespace(data=argparse.Namespace(class_names=NAMES))},
    {'label_map': {1: 'a', 2: 'b'}, 'classes': NAMES}])
@pytest.mark.parametrize('old', [False, True], ids=['zip', 'old'])
def test_names_of_classes_in_other_forms(beside, old, tmp_path):
    torch.save({'state_dict': state()} | beside, tmp_path/'w.pth', **OLD if old else {})
    assert (stored := read_checkpoint(tmp_path/'w.pth')).classes == NAMES
    assert not [line for line in fitting(stored, digit_student()).said if 'could not be read' in line]


@pytest.mark.parametrize('classes,said', [([3, 8], ['3', '8']), (np.array([3, 8]), ['3', '8']),
                                          ({3: 0, 8: 1}, ['3', '8']), ({0: 3, 1: 8}, ['3', '8'])])
def test_whole_numbers_are_names_as_text(classes, said, tmp_path):
    torch.save({'state_dict': state(), 'classes': classes}, tmp_path/'w.pth')
    assert read_checkpoint(tmp_path/'w.pth').classes == said


@pytest.mark.parametrize('value', [{'cat': 1, 'dog': 2}, ['cat', 'cat'], 'cat,dog', {0: 1, 1: 2, 2: 0}, np.ones(3),
                                   {'cat': torch.ones(2)}])
def test_an_entry_that_cannot_be_read_as_names_is_said(value, tmp_path):
    found = fit({'state_dict': state(), 'class_to_idx': value}, path := tmp_path/'w.pth')
    assert found.said[-1] == (f"'{path}' has an entry 'class_to_idx' that could not be read as names of classes, "
                              'so it is passed over')
    assert same(found.state, state())


@pytest.mark.parametrize('value', [10, None, [], {}, torch.arange(3)])
def test_what_says_nothing_of_names_is_not_said(value, tmp_path):
    assert fit({'state_dict': state(), 'classes': value}, tmp_path/'w.pth').said[1:] in (
        [], [f"{tmp_path/'w.pth'}: 1 other tensors are left alone, such as classes"])


def test_names_that_differ_are_an_error_for_those_who_ask(tmp_path):
    other = {'dog': 0, 'cat': 1, 'owl': 2}
    torch.save({'state_dict': state(), 'classes': NAMES, 'class_to_idx': other}, tmp_path/'w.pth')
    stored = read_checkpoint(tmp_path/'w.pth')
    with pytest.raises(ValueError, match='names its classes in different ways, under classes and class_to_idx'):
        stored.classes
    load_weights(digit_student(), tmp_path/'w.pth')


def test_facts_of_our_files_come_with_them(tmp_path):
    save_weights(digit_student(3), tmp_path/'w.safetensors', NAMES, mean=[.5])
    stored = read_checkpoint(tmp_path/'w.safetensors')
    assert stored.classes == NAMES and stored.facts['mean'] == '[0.5]'
    assert stored.source == str(tmp_path/'w.safetensors')


def test_the_outputs_follow_the_names_in_a_checkpoint(tmp_path):
    old = digit_student(3)
    torch.save({'state_dict': old.state_dict(), 'class_to_idx': {'owl': 0, 'cat': 1, 'dog': 2}}, tmp_path/'w.pth')
    assert torch.equal(load_weights(digit_student(3), tmp_path/'w.pth', NAMES).fc.bias, old.fc.bias[[1, 2, 0]])
    with pytest.raises(ValueError, match="only the file has 'owl'; only the data have 'eel'"):
        load_weights(digit_student(3), tmp_path/'w.pth', ['cat', 'dog', 'eel'])


# Models that take them

@pytest.mark.parametrize('name', ['w.pth', 'w'])
def test_a_resnet_takes_a_checkpoint_and_keeps_a_head_of_its_own(name, tmp_path, capsys):
    old = resnet18(classes=4, stem='cifar')
    torch.save({'state_dict': with_prefix('module.', old.state_dict()), 'args': HARMLESS['options']}, tmp_path/name)
    new = resnet18(classes=3, stem='cifar', weights=str(tmp_path/name))
    assert torch.equal(new.conv1.weight, old.conv1.weight) and new.fc.weight.shape == (3, 512)
    assert "'state_dict.module' are taken" in capsys.readouterr().out
    state = fitting(read_checkpoint(tmp_path/name), old).state
    assert transfer_weights(resnet18(classes=4, stem='cifar'), state, '') == []


def test_a_damaged_checkpoint_changes_no_model(tmp_path):
    model = digit_student()
    torch.save(state(), path := tmp_path/'w.pth')
    path.write_bytes(path.read_bytes()[:-300])
    before = bits(model)
    with pytest.raises(ValueError, match='damaged'): load_weights(model, path)
    assert same(bits(model), before)


@pytest.mark.parametrize('file', ['net.pth', 'net.safetensors'])
def test_a_file_that_may_not_be_opened_is_not_called_damaged(file, tmp_path, monkeypatch):
    path, net = tmp_path/file, digit_student()
    torch.save(net.state_dict(), path) if path.suffix == '.pth' else save_weights(net, path)
    def refused(*args, **kwargs): raise PermissionError(13, 'Permission denied', str(path))
    monkeypatch.setattr('builtins.open', refused)
    with pytest.raises(ValueError, match=f"'.*{file}' cannot be read: Permission denied[.]$"): read_checkpoint(path)


def test_a_stored_file_without_tables_fits_no_network():
    with pytest.raises(ValueError, match='stored must be what read_checkpoint gives'):
        fitting(Stored('nothing', {}, {}, {}), digit_student())
