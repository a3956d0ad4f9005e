"Files of eight bits: what is rounded and how, who is asked, what a file says, and that none is half-written."
import copy, warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from distill_nb import quantize
from distill_nb.contract import Teacher
from distill_nb.data import ImageData, Splits
from distill_nb.deploy import OnnxModel, _load, export_onnx, file_cost
from distill_nb.quantize import quantize_onnx
from distill_nb.text import Document, text_splits
from distill_nb.training import evaluate
from distill_nb.vocabulary import train_bpe
from distill_nb.zoo import build_model
from small import images, net, small_file, small_text_file


def three(n=60): return Splits(*(images(n, seed) for seed in range(3)))


@pytest.fixture(scope='module')
def splits(): return three()


@pytest.fixture(scope='module')
def file(tmp_path_factory, splits): return small_file(tmp_path_factory.mktemp('quantize')/'net.onnx', splits.train)


def held(path): return {i.name: numpy_helper.to_array(i) for i in _load(path)[0].graph.initializer}
def kinds(path): return [n.op_type for n in _load(path)[0].graph.node]


def forward(w, pixels):
    "What the float file computes, in float64: the normalised images, after the ReLU, and the logits."
    w = {k: torch.tensor(v).double() for k, v in w.items()}
    x = torch.from_numpy(np.asarray(pixels)).double()*w['scale'] + w['shift']
    r = torch.nn.functional.conv2d(x, w['w1'], w['b1'], padding=1).relu()
    return x, r, r.flatten(1) @ w['w2'].T + w['b2']


def test_weights_and_ranges_are_those_of_the_formula(file, splits, tmp_path):
    "Against float64: signed weights with a scale for each channel, unsigned activations with the range of 20 images."
    new = quantize_onnx(file, tmp_path/'new.onnx', splits, images=20).model
    float_w, w = held(file.path), held(new.path)
    for name in ('w1', 'w2'):
        scale = np.abs(float_w[name]).reshape(len(float_w[name]), -1).max(1).astype(np.float64)/127
        along = scale.reshape(-1, *[1]*(float_w[name].ndim - 1))
        assert np.allclose(w[f'{name}_scale'], scale, rtol=1e-6) and not w[f'{name}_zero_point'].any()
        assert w[f'{name}_quantized'].dtype == np.int8 and name not in w
        assert np.abs(w[f'{name}_quantized'] - float_w[name]/along).max() <= 0.5 + 1e-4
    index = torch.linspace(0, 59, 20).round().long()
    for name, t in zip(('x', 'relu', 'logits'), forward(float_w, splits.train.pixels(index))):
        low, high = min(0., t.min().item()), max(0., t.max().item())
        assert abs(w[f'{name}_scale'] - (high - low)/255) <= 1e-5*high and w[f'{name}_zero_point'].dtype == np.uint8
        assert abs(int(w[f'{name}_zero_point']) + low*255/(high - low)) <= 0.51
    nodes = {n.name: list(n.input) for n in _load(new.path)[0].graph.node}  # the normalisation stays as it was
    assert [nodes[k] for k in ('floats', 'scaled', 'x')] == [['pixels'], ['floats', 'scale'], ['scaled', 'shift']]


def test_the_file_computes_what_its_numbers_say(file, splits, tmp_path):
    "Rounded weights and activations in float64 give the file's answers, within a step of each rounding."
    new = quantize_onnx(file, tmp_path/'new.onnx', splits).model
    w, f = held(new.path), held(file.path)

    def mark(t, name):
        s, z = float(w[f'{name}_scale']), int(w[f'{name}_zero_point'])
        return s*((t/s).round() + z).clamp(0, 255).sub(z)
    rounded = {k: w[f'{k}_quantized']*w[f'{k}_scale'].reshape(-1, *[1]*(f[k].ndim - 1)) for k in ('w1', 'w2')}
    pixels = splits.valid.pixels(range(60))
    t = {k: torch.tensor(v).double() for k, v in {**f, **rounded}.items()}
    x = mark(pixels.double()*t['scale'] + t['shift'], 'x')
    r = mark(torch.nn.functional.conv2d(x, t['w1'], t['b1'], padding=1).relu(), 'relu')
    expected = mark(r.flatten(1) @ t['w2'].T + t['b2'], 'logits')
    gap = (new(pixels).double() - expected).abs()/float(w['logits_scale'])
    assert gap.max() < 3 and (gap < 0.01).double().mean() > 0.7, gap
    assert (file(pixels).double() - forward(f, pixels)[2]).abs().max() < 1e-4


class Guarded(ImageData):
    "Raises where it is shut; notes which images and views it is asked for."
    shut, asked = {}, []

    def get(self, index, view=None):
        if Guarded.shut.get(self.name): raise AssertionError(f'{self.name} was asked')
        Guarded.asked.append((self.name, [int(i) for i in index], None if view is None else [int(v) for v in view]))
        return super().get(index, view)


def test_calibration_asks_training_images_in_view_0_and_nothing_else(file, splits, tmp_path, monkeypatch):
    guarded = Splits(*(Guarded(d.x, d.y, d.classes, name=n, augment=d.augment, mean=splits.train.mean,
                               std=splits.train.std)
                       for n, d in splits._asdict().items()))
    monkeypatch.setattr(Guarded, 'shut', {'valid': True, 'test': True})
    monkeypatch.setattr(Guarded, 'asked', [])
    compared = quantize._compared

    def judging(*args):
        assert {name for name, *_ in Guarded.asked} == {'train'}
        Guarded.shut |= {'train': True, 'valid': False}
        return compared(*args)
    monkeypatch.setattr(quantize, '_compared', judging)
    quantize_onnx(file, tmp_path/'new.onnx', guarded, images=40)
    train = [(i, v) for name, i, v in Guarded.asked[1:] if name == 'train']  # the first was the try at the door
    assert sum((i for i, _ in train), []) == torch.linspace(0, 59, 40).round().long().tolist()
    assert not any(sum((v for _, v in train), []))
    assert {name for name, *_ in Guarded.asked} == {'train', 'valid'}


def graph(path):
    proto = _load(path)[0]
    proto.ClearField('metadata_props')
    return proto.SerializeToString(deterministic=True)


def test_the_graph_depends_on_train_only(file, splits, tmp_path):
    first = quantize_onnx(file, tmp_path/'a.onnx', splits)
    again = quantize_onnx(str(file.path), tmp_path/'b.onnx', splits)
    assert again.model.fingerprint() == first.model.fingerprint() and again[1:4] == first[1:4]
    other = quantize_onnx(file, tmp_path/'c.onnx', Splits(splits.train, images(60, 7), images(60, 8)))
    assert graph(other.model.path) == graph(first.model.path)
    other = quantize_onnx(file, tmp_path/'d.onnx', Splits(images(60, 9), *splits[1:]))
    assert graph(other.model.path) != graph(first.model.path)


def test_the_file_says_what_it_reached(file, splits, tmp_path):
    before = file.path.read_bytes()
    found = quantize_onnx(file, tmp_path/'new.onnx', splits)
    assert file.path.read_bytes() == before and found.model.bytes == (tmp_path/'new.onnx').stat().st_size
    opened = OnnxModel(tmp_path/'new.onnx')
    facts = opened.facts
    assert float(facts['valid_accuracy']) == found.value == evaluate(Teacher(opened), splits.valid).accuracy
    assert float(facts['float_valid_accuracy']) == found.float_value == evaluate(Teacher(file), splits.valid).accuracy
    pixels = splits.valid.pixels(range(60)).numpy()
    own, other = (m.run(pixels).argmax(1) for m in (opened, file))
    assert float(facts['agreement']) == found.agreement == np.mean(own == other)
    assert facts['quantised'] == 'int8 static' and 'parity' not in facts
    assert {k: facts[k] for k in ('classes', 'mean', 'std', 'size')} == {k: file.facts[k]
                                                                         for k in ('classes', 'mean', 'std', 'size')}
    assert Teacher(opened).reached == {'accuracy': found.value, 'items': 60}
    assert f'{file.bytes:,} bytes became {opened.bytes:,}' in found.said[0] and found.said[0].startswith('int8 static')


def test_a_loss_is_not_silent(file, splits, tmp_path, monkeypatch):
    for value, before, most, loud in ((0.5, 0.6, 0.01, True), (0.5, 0.6, 0.2, False), (0.7, 0.6, 0., False),
                                      (float('nan'), 0.6, 0.5, True)):
        monkeypatch.setattr(quantize, '_compared', lambda *_: (value, before, 0.9))
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter('always')
            found = quantize_onnx(file, tmp_path/'new.onnx', splits, most_lost=most)
        told = [str(w.message) for w in heard if 'most_lost' in str(w.message)]
        assert len(told) == loud == len(found.said) - 2, (value, before, most)
        if loud: assert str(tmp_path/'new.onnx') in told[0] and found.said[-1] in told[0]


def test_no_half_file(file, splits, tmp_path, monkeypatch):
    out, saved = tmp_path/'here'/'new.onnx', []

    def full(proto, path, facts):
        saved.append(Path(path))
        if Path(path) == out: raise OSError(28, 'No space left on device', str(out))
        save(proto, path, facts)
    save = quantize._save
    monkeypatch.setattr(quantize, '_save', full)
    with pytest.raises(OSError, match='No space'): quantize_onnx(file, out, splits)
    assert not out.exists() and len(saved) == 2 and not saved[0].parent.exists()
    monkeypatch.setattr(quantize, '_save', save)

    def stopped(*_): raise KeyboardInterrupt
    monkeypatch.setattr(quantize, '_compared', stopped)
    with pytest.raises(KeyboardInterrupt): quantize_onnx(file, out, splits)
    assert not out.parent.exists()


@pytest.fixture(scope='module')
def texts():
    documents = [Document(f'{i}', f'Text {i} of two dozen, and some words more. '*4) for i in range(24)]
    return text_splits(documents, train_bpe([d.text for d in documents], 280), length=16)


def test_files_of_tokens_are_rounded_as_they_are_asked(texts, tmp_path, monkeypatch):
    file = small_text_file(tmp_path/'text.onnx', texts.valid)
    asked = []
    monkeypatch.setattr(type(texts.train), 'get', lambda self, index, view=None, get=type(texts.train).get:
                        asked.append((self, len(index))) or get(self, index, view))
    found = quantize_onnx(file, tmp_path/'new.onnx', texts, most_lost=1.)
    assert [n for data, n in asked if data is texts.train] == [1]  # the try at the door, and no calibration
    assert not any(data is texts.test for data, _ in asked)
    assert found.model.facts['quantised'] == 'int8 dynamic' and 'Transpose' not in kinds(tmp_path/'new.onnx')
    assert kinds(tmp_path/'new.onnx').count('MatMulInteger') == 2
    big = {k: v for k, v in held(tmp_path/'new.onnx').items() if v.ndim > 1}
    assert len(big) == 3 and all(v.dtype in (np.int8, np.uint8) for v in big.values())  # table, w, and the table turned
    assert found.value == evaluate(found.model, texts.valid).bits_per_byte
    assert abs(found.value - found.float_value) < 0.05*found.float_value and found.agreement > 0.8
    there = torch.cat([b.weight.flatten() > 0 if b.weight is not None else torch.ones(b.y.numel(), dtype=torch.bool)
                       for b in texts.valid.batches(64)])
    own, other = (torch.cat([m(b.x).argmax(-1).flatten() for b in texts.valid.batches(64)])[there]
                  for m in (found.model, file))
    assert found.agreement == pytest.approx((own == other).double().mean().item(), abs=1e-12)
    monkeypatch.setattr(quantize, '_compared', lambda *_: (2., 3., 0.9))  # fewer bits are better
    assert len(quantize_onnx(file, tmp_path/'new.onnx', texts, most_lost=0.).said) == 2


def test_constants_are_turned_and_nothing_else(texts, tmp_path):
    file = small_text_file(tmp_path/'text.onnx', texts.valid)
    proto = quantize._turned(_load(file.path)[0])
    x = texts.valid.get([0, 1]).x.numpy()
    proto.ClearField('metadata_props')
    onnx.save(proto, tmp_path/'turned.onnx')
    assert np.array_equal(OnnxModel(tmp_path/'turned.onnx').run(x), file.run(x))
    assert [n.op_type for n in proto.graph.node] == ['Gather', 'MatMul', 'Relu', 'MatMul']


def test_embeddings_are_judged_by_directions_and_neighbours(splits, tmp_path):
    found = quantize_onnx(small_file(tmp_path/'net.onnx', splits.train, 'embedding'), tmp_path/'new.onnx', splits)
    assert 0.99 < found.value <= 1.000001 and found.float_value == 1. and 0.5 < found.agreement <= 1
    assert {'valid_cosine', 'float_valid_cosine', 'agreement'} <= set(found.model.facts)
    assert Teacher(found.model).outputs == 'embedding'


def test_products_decide_the_form(file, splits, tmp_path):
    proto = _load(file.path)[0]
    assert quantize._form(file, proto.graph) == 'static'
    attention = copy.deepcopy(proto.graph)
    attention.initializer.append(numpy_helper.from_array(np.zeros((99, 99), np.float32), 'qkv'))
    attention.node.append(onnx.helper.make_node('MatMul', ['flat', 'qkv'], ['mixed']))
    assert quantize._form(file, attention) == 'dynamic'


def test_refusals_come_before_any_work(file, splits, tmp_path, monkeypatch):
    small = quantize_onnx(file, tmp_path/'small.onnx', splits).model
    def never(*_, **__): raise AssertionError('work')
    monkeypatch.setattr(quantize, '_rounded', never)
    proto = _load(file.path)[0]
    del proto.graph.node[3:]
    proto.graph.output[0].name = 'x'
    proto.ClearField('metadata_props')
    onnx.save(proto, tmp_path/'only.onnx')
    unlabelled = splits.valid.unlabelled(range(5))
    coloured = ImageData(torch.zeros(6, 3, 4, 4, dtype=torch.uint8), [0, 1, 2]*2, splits.train.classes)
    for wrong, said in (
            (dict(out=tmp_path/'new.pt'), 'out must be a file that ends in .onnx'),
            (dict(out=file.path), 'out must be another file than model'),
            (dict(model=small), 'quantised before'), (dict(model=tmp_path/'only.onnx'), 'convolutions or products'),
            (dict(splits=splits.train), 'splits must be Splits'), (dict(images=0), 'images'),
            (dict(most_lost=-1), 'most_lost'), (dict(most_lost=float('nan')), 'most_lost'),
            (dict(model=net()), 'model must be'),
            (dict(splits=Splits(splits.train, unlabelled, splits.test)), 'all of valid has labels'),
            (dict(splits=Splits(coloured, *splits[1:])), 'splits must hold data that the file takes')):
        with pytest.raises(ValueError) as e: quantize_onnx(**dict(model=file, out=tmp_path/'new.onnx',
                                                                  splits=splits) | wrong)
        assert said in str(e.value), e.value
    assert not (tmp_path/'new.onnx').exists()


def test_products_of_bytes_count_as_those_of_floats(splits, tmp_path):
    train = splits.train
    exact = export_onnx(build_model('vit_tiny_8', len(train.classes), train.channels, train.size), tmp_path/'a.onnx',
                        train)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        new = quantize_onnx(exact, tmp_path/'b.onnx', splits, images=8).model
    assert 'MatMulInteger' in kinds(new.path)
    assert file_cost(new, train.x[0]).macs == file_cost(exact, train.x[0]).macs > 0
