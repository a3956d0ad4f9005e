"""Exported files against independent references: what is computed, said, refused, and left alone."""
import copy, json, pickle, subprocess, sys

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from small import by_hand, digits_student, images, net
from distill_nb import deploy
from distill_nb.cache import CachedTeacher
from distill_nb.clock import measure
from distill_nb.contract import Teacher
from distill_nb.data import digits
from distill_nb.deploy import OnnxModel, export_onnx, file_cost
from distill_nb.embeddings import headless
from distill_nb.exam import check_teacher
from distill_nb.gpt import build_gpt
from distill_nb.logits import Distill
from distill_nb.models import digit_student, profile_model
from distill_nb.training import Recipe, evaluate, fit
from distill_nb.zoo import build_model, open_model


def shaken(model):
    "A network whose batch norms have seen something, so that every part of it shows in its answers."
    generator = torch.Generator().manual_seed(0)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.copy_(torch.randn(m.running_mean.shape, generator=generator) / 4)
            m.running_var.copy_(torch.rand(m.running_var.shape, generator=generator) + 0.5)
    return model


@pytest.fixture(scope='module')
def splits(): return digits()


@pytest.fixture(scope='module')
def student(splits): return digits_student(splits)


@pytest.fixture(scope='module')
def file(student, splits, tmp_path_factory):
    path = tmp_path_factory.mktemp('file')/'student.onnx'
    return export_onnx(student, path, splits.train, architecture='digit_student', setting='all labels')


# --- what is computed

@pytest.mark.parametrize('n', [1, 2, 33])
def test_the_file_answers_as_the_network_does(file, student, splits, n):
    pixels = splits.test.x[:n]
    expected = by_hand(student, pixels, splits.train.mean, splits.train.std)
    found = torch.from_numpy(file.run(pixels.numpy())).double()
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize('name, size', [('resnet8', 32), ('wrn_16_1', 32), ('vit_tiny_8_token', 8)])
def test_networks_of_every_kind(name, size, tmp_path):
    torch.manual_seed(0)
    model, (mean, std) = shaken(build_model(name, 7, 3, size)), ([0.4, 0.5, 0.6], [0.2, 0.3, 0.25])
    found = export_onnx(Teacher(model, mean=mean, std=std, size=size), tmp_path/'m.onnx')
    pixels = torch.randint(0, 256, (5, 3, size, size), dtype=torch.uint8)
    expected = by_hand(model, pixels, mean, std)
    assert expected.std(0).min() > 1e-4  # or the comparison would say nothing
    assert (found(pixels).double() - expected).abs().max() < 1e-4 * expected.abs().max()
    assert found.facts['size'] == str(size)
    cost = file_cost(found, pixels[0])
    assert cost.macs == profile_model(model, (3, size, size), repeats=1).macs  # as torch counts them
    assert cost.bytes == found.path.stat().st_size and cost.latency_ms > 0


@pytest.mark.slow
@pytest.mark.parametrize('name', ['resnet20', 'torchvision:resnet18', 'torchvision:mobilenet_v3_small',
                                  'torchvision:efficientnet_b0', 'timm:resnet18', 'timm:mobilenetv3_small_100',
                                  'timm:efficientnet_b0', 'timm:vit_tiny_patch16_224',
                                  'timm:deit_tiny_distilled_patch16_224'])
def test_networks_of_others(name, tmp_path):
    size = 32 if name == 'resnet20' else 224
    torch.manual_seed(0)
    model = build_model(name, 7, 3, size).train()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for m in norms: m.momentum = None
    with torch.no_grad(): model(torch.randn(8, 3, size, size))  # or nothing of the image would reach the answers
    model.eval()
    for m in model.modules():
        if isinstance(m, nn.Linear) and not m.weight.any(): nn.init.normal_(m.weight, std=0.02)
    found = export_onnx(Teacher(model, mean=[0.5]*3, std=[0.25]*3, size=size), tmp_path/'m.onnx')
    pixels = torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8)
    with torch.no_grad(): expected = model((pixels / 255 - 0.5) / 0.25)
    assert expected.std(0).max() > 1e-6 and float(found.facts['parity']) < 1e-4
    assert (found(pixels) - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize('batch, length', [(1, 1), (3, 17), (2, 24)])
def test_a_language_model_takes_any_number_of_tokens(gpt_file, batch, length):
    gpt, found = gpt_file
    tokens = torch.randint(0, 65, (batch, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(): expected = copy.deepcopy(gpt).double().eval()(tokens)
    assert found.input == 'tokens' and found(tokens).shape == (batch, length, 65)
    assert (found(tokens).double() - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize('tokens, said', [
    (torch.full((2, 5), -1), "one of the 65 of '.*gpt.onnx', from 0 to 64, but is 'from -1 to -1'"),
    (torch.tensor([[3, 64], [65, 0]]), "from 0 to 64, but is 'from 0 to 65'"),
    (torch.zeros(1, 25, dtype=torch.int64), 'L from 1 to 24'),
    (torch.zeros(1, 0, dtype=torch.int64), 'L from 1 to 24'),
    (torch.zeros(5, dtype=torch.int64), r'shape of the tokens .* is .5,')])
def test_tokens_that_torch_would_refuse_are_a_sentence(gpt_file, tokens, said):
    file = gpt_file[1]
    for ask in (file, lambda x: file.run(x.numpy())):
        with pytest.raises(ValueError, match=said): ask(tokens)
    assert (file.facts['length'], file.facts['vocabulary']) == ('24', '65')
    assert file(torch.zeros(0, 5, dtype=torch.int64)).shape == (0, 5, 65)


class TwoTables(nn.Module):
    "Asks one table about tokens, and others about places, kinds, and what follows from tokens."
    def __init__(self, classes=9):
        super().__init__()
        self.tokens, self.kinds, self.sides = nn.Embedding(classes, 4), nn.Embedding(2, 4), nn.Embedding(3, 4)
    def forward(self, x): return self.tokens(x) + self.kinds(x * 0) + self.sides(x % 3)

class OneHot(nn.Module):
    def forward(self, x): return nn.functional.one_hot(x, 9).float()


@pytest.mark.parametrize('model, found', [(TwoTables(), 9), (OneHot(), None)])
@pytest.mark.parametrize('item', [torch.zeros(4, dtype=torch.int64), torch.arange(4)])
def test_the_vocabulary_is_the_length_of_the_table_of_tokens(model, found, item):
    assert deploy._vocabulary(model, item) == found
    facts = deploy._own_facts(Teacher(model), item)
    assert facts == {'length': 4} | ({'vocabulary': 9} if found else {})
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.fixture(scope='module')
def gpt_file(tmp_path_factory):
    torch.manual_seed(0)
    gpt = build_gpt('gpt_micro', 65, 24)
    return gpt, export_onnx(gpt, tmp_path_factory.mktemp('gpt')/'gpt.onnx', torch.arange(24))


@pytest.mark.slow
def test_a_bert_gives_what_it_gives(tmp_path):
    transformers = pytest.importorskip('transformers')
    config = transformers.BertConfig(vocab_size=80, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                     intermediate_size=64, max_position_embeddings=32, num_labels=3)
    torch.manual_seed(0)
    bert = transformers.BertForSequenceClassification(config).eval()
    found = export_onnx(bert, tmp_path/'bert.onnx', torch.arange(32))
    assert found.facts['vocabulary'] == '80'
    tokens = torch.randint(0, 80, (3, 11))
    with torch.no_grad(): expected = bert(tokens).logits
    assert (found(tokens) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_embeddings_and_probabilities_are_what_the_teacher_says(student, splits, tmp_path):
    vectors = Teacher(headless(student), outputs='embedding')
    found = export_onnx(vectors, tmp_path/'e.onnx', splits.train)
    x = splits.test.get(range(4)).x
    with torch.no_grad(): torch.testing.assert_close(found(x), headless(student).eval()(x), rtol=1e-4, atol=1e-4)
    assert Teacher(found).outputs == 'embedding' and found.own_contract.get('classes') is None
    softened = Teacher(nn.Sequential(student, nn.Softmax(1)), outputs='probabilities')
    found = export_onnx(softened, tmp_path/'p.onnx', splits.train)
    assert abs(found(x).exp().sum(1) - 1).max() < 1e-5  # logits again, whose softmax they are


def test_a_bound_that_is_met_by_no_file_is_refused_and_leaves_nothing(student, splits, tmp_path):
    with pytest.raises(ValueError, match='differs from the network.*not written'):
        export_onnx(student, tmp_path/'s.onnx', splits.train, within=1e-12)
    assert not list(tmp_path.iterdir())


def test_one_changed_weight_is_found(file, student, splits):
    other = copy.deepcopy(student).eval()
    with torch.no_grad(): other.fc.weight[3, 5] += 0.05
    network = deploy._OfPixels(Teacher(other, mean=splits.train.mean, std=splits.train.std))
    data, item = file.path.read_bytes(), splits.test.x[0]
    with pytest.raises(ValueError, match='differs from the network'): deploy._check_parity(network, data, item, 1e-4)
    same = deploy._OfPixels(Teacher(copy.deepcopy(student).eval(), mean=splits.train.mean, std=splits.train.std))
    assert deploy._check_parity(same, data, item, 1e-4) < 1e-5


# --- what is left alone, and what is left out

def test_the_network_stays_as_it_was(splits, tmp_path):
    torch.manual_seed(0)
    model = digit_student()
    model.layer1.eval()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    order = [p.stride() for p in model.to(memory_format=torch.channels_last).parameters()]
    grads = [p.requires_grad for p in model.parameters()]
    random = torch.random.get_rng_state()
    export_onnx(model, tmp_path/'s.onnx', splits.train)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes and grads == [p.requires_grad for p in model.parameters()]
    assert order == [p.stride() for p in model.parameters()] and not model.layer1[0]._forward_hooks
    assert isinstance(model.pool, nn.AdaptiveMaxPool2d) and torch.equal(torch.random.get_rng_state(), random)


def test_a_file_names_no_place_of_this_machine(file):
    data = file.path.read_bytes()
    assert b'.py' not in data and str(file.path.parent).encode() not in data
    assert file.bytes == len(data) < 10_000
    assert not [p for n in onnx.load(file.path).graph.node for p in n.metadata_props]


def test_exporting_twice_gives_the_same_bytes(file, student, splits, tmp_path):
    again = export_onnx(student, tmp_path/'s.onnx', splits.train, architecture='digit_student', setting='all labels')
    assert again.path.read_bytes() == file.path.read_bytes() and again.fingerprint() == file.fingerprint()


# --- what a file says

def test_facts_come_back(file, student, splits):
    own = file.own_contract
    assert own['classes'] == splits.train.classes and own['size'] == (8, 1.)
    assert own['mean'] == splits.train.mean and own['std'] == splits.train.std
    assert file.facts['architecture'] == 'digit_student' and file.facts['setting'] == 'all labels'
    theirs = {p.key: p.value for p in onnx.load(file.path).metadata_props}
    assert theirs == file.facts and json.loads(theirs['classes']) == splits.train.classes


def test_facts_may_not_contradict_the_network(splits, tmp_path):
    with pytest.raises(ValueError, match="size must be left out, or 8, but is '99'"):
        export_onnx(digit_student(), tmp_path/'m.onnx', splits.train, size='99')
    found = export_onnx(digit_student(), tmp_path/'m.onnx', splits.train, size='8', note=None)
    assert found.facts['size'] == '8' and 'note' not in found.facts


def test_names_of_any_letters_come_back(tmp_path):
    names = ['Käse', 'naïve, "quoted"', '猫', ' a\tb', '']
    model = Teacher(digit_student(5), classes=names, mean=[0.5], std=[0.25], size=8)
    assert export_onnx(model, tmp_path/'n.onnx').own_contract['classes'] == names


@pytest.mark.parametrize('what', ['weight', 'fact', 'cut', 'empty', 'text'])
def test_a_changed_file_is_refused(file, tmp_path, what):
    proto, path = onnx.load(file.path), tmp_path/'c.onnx'
    if what == 'weight':
        w = next(w for w in proto.graph.initializer if len(w.dims) == 4)
        raw = bytearray(w.raw_data)
        raw[5] ^= 1
        w.raw_data = bytes(raw)
    if what == 'fact': next(p for p in proto.metadata_props if p.key == 'mean').value = '[0.9]'
    data = {'cut': file.path.read_bytes()[:-40], 'empty': b'', 'text': b'no model'}.get(what, proto.SerializeToString())
    path.write_bytes(data)
    with pytest.raises(ValueError, match='c.onnx.*(damaged|empty)'): OnnxModel(path)


def test_killed_or_a_full_disk_leaves_no_file_or_the_old_one(student, splits, tmp_path, monkeypatch):
    def full(path, data): raise OSError(28, 'No space left on device', str(path))
    (tmp_path/'old.onnx').write_bytes(b'old')
    with monkeypatch.context() as m:
        m.setattr(deploy, 'write_atomic', full)
        with pytest.raises(OSError, match='No space'): export_onnx(student, tmp_path/'new.onnx', splits.train)
    def interrupt(*args): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(deploy, '_check_parity', interrupt)
        with pytest.raises(KeyboardInterrupt): export_onnx(student, tmp_path/'old.onnx', splits.train)
    assert [p.name for p in tmp_path.iterdir()] == ['old.onnx'] and (tmp_path/'old.onnx').read_bytes() == b'old'


# --- a file as a module

def test_evaluate_teacher_and_objective_take_the_file(file, student, splits):
    expected = evaluate(student, splits.test)
    other = splits.test.replace(mean=[0.1], std=[0.7])  # the file is shown what it wants
    for found in (evaluate(file, splits.test), evaluate(Teacher(file), splits.test), evaluate(file, other)):
        assert found.accuracy == expected.accuracy and abs(found.loss - expected.loss) < 1e-5
    check_teacher(Teacher(file), splits.valid)
    opened = open_model(file.path)
    weights = []
    for teacher in (student, opened, CachedTeacher(opened, splits.train, dtype='float32')):
        torch.manual_seed(0)
        pupil = digit_student()
        fit(Distill(pupil, teacher), splits.train, Recipe(steps=12, batch_size=64, precision='float32'), device='cpu',
            progress=False)
        weights.append(torch.cat([p.detach().flatten() for p in pupil.parameters()]))
    for w in weights[1:]: torch.testing.assert_close(w, weights[0], rtol=1e-3, atol=1e-4)


def test_classes_in_another_order_are_matched_by_name(file, splits):
    order = torch.tensor([3, 1, 0, 2, 4, 5, 6, 9, 8, 7])
    names = [splits.test.classes[i] for i in order]
    turned = type(splits.test)(splits.test.x, order.argsort()[splits.test.y], names)
    assert evaluate(file, turned).accuracy == evaluate(file, splits.test).accuracy


def test_copies_and_pickles_answer_alike(file, splits):
    x = splits.test.x[:3]
    for other in (copy.deepcopy(file), pickle.loads(pickle.dumps(file)), OnnxModel(file.path, threads=2)):
        assert torch.equal(other(x), file(x)) and other.fingerprint() == file.fingerprint()
    assert OnnxModel(file.path, threads=2).threads == 2 and file.threads == 1
    assert Teacher(OnnxModel(file.path, threads=2)).fingerprint() == Teacher(file).fingerprint()


def test_pixels_come_back_exactly_from_normalised_images(file, splits):
    every = torch.arange(256).repeat(2).view(-1, 1, 1, 1).expand(-1, 1, 8, 8).to(torch.uint8)
    x = type(splits.test)(every, torch.arange(512) % 2, ['a', 'b'], mean=splits.train.mean,
                          std=splits.train.std).get(range(512)).x
    assert torch.equal(deploy._whole_pixels(x, splits.train.mean, splits.train.std), every)
    with pytest.raises(ValueError, match='normalised with the mean and std of the file'): file(x - 3)
    with pytest.raises(ValueError, match='channels of x'): file(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match='mean must be left out'): Teacher(file, mean=[0.5], std=[0.25])


@pytest.mark.parametrize('value', [-1, 256])
def test_pixels_of_other_integers_are_not_wrapped(file, value):
    x = torch.zeros(2, 1, 8, 8, dtype=torch.int64)
    assert torch.equal(file(x), file(x.to(torch.uint8))) and file(x[:0]).shape == (0, 10)
    x[1, 0, 3, 3] = value
    with pytest.raises(ValueError, match='what tensor.uint8. holds'): file(x)


def test_an_image_of_another_size_is_a_sentence(file):
    with pytest.raises(ValueError, match='student.onnx.*does not take uint8 of shape'):
        file(torch.zeros(2, 1, 9, 9, dtype=torch.uint8))


# --- what cannot be exported

class ByLength(nn.Module):
    def forward(self, x): return x.flatten(1)[:, :4] + torch.zeros(len(x), 4)

class ByValue(nn.Module):
    def forward(self, x): return x.flatten(1)[:, :4] if x.sum() > 0 else x.flatten(1)[:, 4:8]

class Unknown(nn.Module):
    def forward(self, x): return torch.linalg.eigvalsh(x[:, 0])


@pytest.mark.parametrize('model, said', [
    (ByLength(), 'does not take a batch|cannot be exported'),
    (ByValue(), 'cannot be exported|differs from the network'),  # some versions of torch export one branch
    (Unknown(), 'cannot be exported')])
def test_what_cannot_be_exported_is_a_sentence(model, said, tmp_path, capfd):
    with pytest.raises(ValueError, match=said) as e:
        export_onnx(Teacher(model, mean=[0.5], std=[0.25], size=8), tmp_path/'m.onnx')
    assert len(str(e.value)) < 600 and '\n' not in str(e.value)
    out = capfd.readouterr()
    assert 'Traceback' not in out.out + out.err and not list(tmp_path.iterdir())


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_a_network_that_answers_no_numbers_is_not_written(value, splits, tmp_path, recwarn):
    model = digit_student()
    list(model.parameters())[-1].data[0] = value
    with pytest.raises(ValueError, match='what model answers must be finite numbers'):
        export_onnx(model, tmp_path/'m.onnx', splits.train)
    assert not list(tmp_path.iterdir()) and not [w for w in recwarn if w.category is RuntimeWarning]


KNOWN = Teacher(digit_student(), mean=[0.5], std=[0.25], size=8)

@pytest.mark.parametrize('call, said', [
    (lambda p: export_onnx(net(), p/'m.pth', images(4)), "path must be a file that ends in .onnx"),
    (lambda p: export_onnx(net(), p/'m.onnx'), 'must know its mean, std, size'),
    (lambda p: export_onnx(net(), p/'m.onnx', images(4), within=0), 'within must be greater than 0'),
    (lambda p: export_onnx(net(), p/'m.onnx', torch.zeros(1, 8, 8, dtype=torch.uint8)),
     'must know its mean, std, size'),
    (lambda p: export_onnx(KNOWN, p/'m.onnx', torch.zeros(1, 8, 8)), 'data must be a data set, tokens'),
    (lambda p: export_onnx(KNOWN, p/'m.onnx', torch.zeros(1, 9, 9, dtype=torch.uint8)), 'pixels .1, 8, 8., uint8'),
    (lambda p: export_onnx(KNOWN, p/'m.onnx', torch.zeros(0, dtype=torch.int64)), 'data must be a data set, tokens'),
    (lambda p: export_onnx(KNOWN, p/'m.onnx', 'digits'), 'data must be a data set, tokens'),
    (lambda p: OnnxModel(p), 'a file and not a folder'),
    (lambda p: OnnxModel(p/'none.onnx'), 'there is none at'),
    (lambda p: open_model(p/'none.onnx'), 'there is none at')])
def test_wrong_calls(call, said, tmp_path):
    with pytest.raises(ValueError, match=said): call(tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_exported_file_is_not_exported_again(file, splits, tmp_path):
    for model in (file, Teacher(file)):
        with pytest.raises(ValueError, match='model must be a network of torch'):
            export_onnx(model, tmp_path/'m.onnx', splits.train)
    assert not list(tmp_path.iterdir())


def test_without_the_extra_there_is_one_sentence(student, splits, tmp_path, monkeypatch, file):
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    for call in (lambda: export_onnx(student, tmp_path/'m.onnx', splits.train), lambda: OnnxModel(file.path)):
        with pytest.raises(ValueError, match=r"pip install 'distill_nb\[deploy\]'"): call()


def test_nothing_of_the_extra_is_loaded_before_it_is_used():
    extra = {'onnx', 'onnxruntime', 'onnxscript', 'torch_pruning'}
    code = f'import sys, distill_nb.cli; assert not {extra} & set(sys.modules)'
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0


# --- files of others

def foreign(path, batch='n', inputs=('x',), weight=None):
    "A linear map of 12 numbers to 3, as another program would write it."
    made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, 12]) for name in inputs]
    out = helper.make_tensor_value_info('y', TensorProto.FLOAT, [batch, 3])
    w = np.linspace(-1, 1, 36, dtype=np.float32).reshape(12, 3)
    weight = weight or helper.make_tensor('w', TensorProto.FLOAT, [12, 3], w.tobytes(), raw=True)
    nodes = [helper.make_node('MatMul', [inputs[0], 'w'], ['y'])]
    graph = helper.make_graph(nodes, 'g', made, [out], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8), path)
    return w


def outside(place, length=144):
    weight = TensorProto(name='w', data_type=TensorProto.FLOAT, dims=[12, 3], data_location=TensorProto.EXTERNAL)
    for k, v in (('location', place), ('offset', '0'), ('length', str(length))): weight.external_data.add(key=k,
                                                                                                          value=v)
    return weight


@pytest.mark.parametrize('batch', ['n', 1, 4])
def test_a_file_of_others_is_asked_whatever_its_batch(tmp_path, batch):
    w, x = foreign(tmp_path/'f.onnx', batch), torch.randn(7, 12)
    model = OnnxModel(tmp_path/'f.onnx')
    np.testing.assert_allclose(model(x).numpy(), x.numpy() @ w, rtol=1e-5, atol=1e-5)
    assert model.own_contract == {} and Teacher(model).classes is None


def test_a_file_with_two_inputs_is_refused(tmp_path):
    foreign(tmp_path/'f.onnx', inputs=('x', 'mask'))
    with pytest.raises(ValueError, match='x, mask'): OnnxModel(tmp_path/'f.onnx')


def test_each_place_of_a_tensor_counts(tmp_path):
    (tmp_path/'m').mkdir()
    for place in ('secret.bin', 'm/w.bin'): (tmp_path/place).write_bytes(np.ones(36, np.float32).tobytes())
    weight = outside('w.bin')
    weight.external_data.add(key='location', value='../secret.bin')
    foreign(tmp_path/'m'/'f.onnx', weight=weight)
    with pytest.raises(ValueError, match="place of the tensor 'w'"): OnnxModel(tmp_path/'m'/'f.onnx')


@pytest.mark.parametrize('place', ['../secret.bin', '{root}/secret.bin', 'link.bin', '', 'none.bin'])
def test_weights_outside_the_folder_are_never_read(tmp_path, place):
    (tmp_path/'secret.bin').write_bytes(np.ones(36, np.float32).tobytes())
    folder = tmp_path/'model'
    folder.mkdir()
    (folder/'link.bin').symlink_to(tmp_path/'secret.bin')
    foreign(folder/'f.onnx', weight=outside(place.format(root=tmp_path)))
    with pytest.raises(ValueError, match="place of the tensor 'w'"): OnnxModel(folder/'f.onnx')


def test_weights_beside_the_file_are_read(tmp_path):
    (tmp_path/'w.bin').write_bytes(np.ones(36, np.float32).tobytes())
    foreign(tmp_path/'f.onnx', weight=outside('w.bin'))
    model = OnnxModel(tmp_path/'f.onnx')
    assert torch.equal(model(torch.ones(2, 12)), torch.full((2, 3), 12.))
    assert model.bytes == (tmp_path/'f.onnx').stat().st_size + 144 == file_cost(model, torch.ones(12)).bytes
    [row] = measure({'foreign': model}, torch.ones(12), (1,), seconds=0.01, turns=1, memory=False)
    assert row['bytes'] == model.bytes
    first = model.fingerprint()
    (tmp_path/'w.bin').write_bytes(np.zeros(36, np.float32).tobytes())
    assert OnnxModel(tmp_path/'f.onnx').fingerprint() != first


def spread(file, path):
    "The same graph with every tensor in another file, those too from which shapes follow."
    proto = onnx.load(file.path)
    del proto.metadata_props[:]
    onnx.save_model(proto, path, save_as_external_data=True, location='w.bin', size_threshold=0)
    return OnnxModel(path)


def test_tensors_beside_the_file_may_say_shapes(file, gpt_file, splits, tmp_path):
    for i, (model, x) in enumerate([(file, splits.test.x[:5]), (gpt_file[1], torch.randint(0, 65, (3, 17)))]):
        (tmp_path/str(i)).mkdir()
        found = spread(model, tmp_path/str(i)/'f.onnx')
        assert torch.equal(found(x), model(x)) and found.bytes > model.path.stat().st_size - 2000
        assert [t for t in deploy._all_tensors(onnx.load(found.path, load_external_data=False)) if t.external_data]
        assert file_cost(found, x[0])[:2] == file_cost(model, x[0])[:2]
        assert torch.equal(pickle.loads(pickle.dumps(found))(x), found(x))


@pytest.mark.parametrize('what', ['cut', 'offset', 'word', 'length'])
def test_damaged_tensors_beside_the_file_are_a_sentence(gpt_file, tmp_path, what):
    path = spread(gpt_file[1], tmp_path/'f.onnx').path
    proto = onnx.load(path, load_external_data=False)
    if what == 'cut': (tmp_path/'w.bin').write_bytes((tmp_path/'w.bin').read_bytes()[:200])
    key, value = {'offset': ('offset', '-8'), 'word': ('offset', 'x'), 'length': ('length', '1'*30)}.get(what, ('', ''))
    for t in deploy._all_tensors(proto):
        for e in t.external_data:
            if e.key == key: e.value = value
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ValueError, match="f.onnx' cannot be run"): OnnxModel(path)


def test_operators_that_no_runtime_has_are_a_sentence(tmp_path):
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ['n', 4]) for n in 'xy')
    graph = helper.make_graph([helper.make_node('Magic', ['x'], ['y'], domain='evil.so')], 'g', [x], [y])
    ids = [helper.make_opsetid('', 17), helper.make_opsetid('evil.so', 1)]
    onnx.save(helper.make_model(graph, opset_imports=ids, ir_version=8), tmp_path/'f.onnx')
    with pytest.raises(ValueError, match='cannot be run'): OnnxModel(tmp_path/'f.onnx')
