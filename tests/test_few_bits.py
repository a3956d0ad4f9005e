"""Few bits: rounding and folding against float64 references; what is copied, trained, resumed and written back."""
import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distill_nb.contract import Teacher
from distill_nb.data import ImageData
from distill_nb.files import fingerprint
from distill_nb.few_bits import (DistillBits, _Folded, RoundedInputs, RoundedWeights, best_share, bits_of,
                                 fake_quantize,
                                 few_bits, fold_batch_norm, written_back)
from distill_nb.logits import Distill
from distill_nb.models import digit_student, resnet8, wrn_16_1
from distill_nb.training import Recipe, Supervised, fit
from small import RECIPE, images, net


def convolutional(seed=0):
    "A student for `images` whose batch norms are no identities."
    torch.manual_seed(seed)
    return lively(digit_student(classes=3))


def lively(model, seed=1):
    g = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if not isinstance(m, nn.BatchNorm2d): continue
        for t, low, high in ((m.weight, -1.5, 1.5), (m.bias, -1, 1), (m.running_mean, -1, 1), (m.running_var, 0.1, 3)):
            t.data.copy_(low + (high - low)*torch.rand(t.shape, generator=g))
    return model.eval()


def reference(x, scale, low, high):
    "The nearest mark by trying all of them, in float64; a tie goes to the even one, as in IEEE 754."
    marks = torch.arange(low, high + 1).double()
    steps = x.double()/scale.double()
    distance = (steps[..., None] - marks).abs() + 1e-9*(marks % 2)
    return marks[distance.argmin(-1)]*scale.double()


@pytest.mark.parametrize('bits', [2, 3, 4, 8])
def test_numbers_go_to_their_nearest_mark(bits):
    x, top = 3*torch.randn(500, generator=torch.Generator().manual_seed(bits)), 2**(bits - 1) - 1
    scale = torch.tensor(1.7/top)
    found = fake_quantize(x, scale, -top, top)
    torch.testing.assert_close(found.double(), reference(x, scale, -top, top), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found, torch.fake_quantize_per_tensor_affine(x, 1.7/top, 0, -top, top))
    assert len(found.unique()) <= 2*top + 1


def test_the_gradient_passes_through_the_rounding_and_stops_at_the_ends():
    x = torch.tensor([-9., -1.49, -0.2, 0.3, 1.49, 1.6], requires_grad=True)
    upstream = torch.tensor([1., 2., 3., 4., 5., 6.])
    (fake_quantize(x, torch.tensor(0.5), -3, 3)*upstream).sum().backward()
    assert x.grad.tolist() == [0, 2, 3, 4, 5, 0]


def test_a_channel_has_few_values_however_large_or_small_its_weights_are():
    w = torch.randn(16, 1000, generator=torch.Generator().manual_seed(0))*torch.logspace(-6, 6, 16)[:, None]
    for bits in (2, 3, 4, 8):
        for row in RoundedWeights(w, bits)(w): assert len(row.unique()) <= 2**bits - 1


@pytest.mark.parametrize('bits', [2, 3, 4, 8])
def test_the_share_has_the_least_squared_error_of_all_lengths_from_a_fifth(bits):
    w = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(bits))**3
    w[4] = 0
    top, found = 2**(bits - 1) - 1, best_share(w, bits)
    assert found.shape == (5, 1, 1, 1)
    for own, share in zip(w[:4], found):
        def error(s):
            scale = torch.tensor(s).double()*own.abs().max().double()/top
            return (reference(own, scale, -top, top) - own.double()).square().sum().item()
        assert error(share.item()) <= min(error(s/50) for s in range(10, 51)) + 1e-6
    assert RoundedWeights(w, bits)(w)[4].abs().max() == 0  # a channel of zeros stays one


def test_the_ruler_follows_the_largest_weight_and_the_gradient_reaches_all_weights_on_it():
    w = torch.tensor([[1., 0.4, 0.4, -0.4]])
    rounded = RoundedWeights(w, 2)
    assert torch.equal(rounded(2*w), 2*rounded(w))
    w.requires_grad_()
    rounded(w).sum().backward()
    assert w.grad.tolist() == [[0, 1, 1, 1]]  # the first lies outside the ruler


@pytest.mark.parametrize('bits', [2, 4, 8])
@pytest.mark.parametrize('low, high', [(-1., 2.), (0., 3.), (-2., -1.), (1., 2.), (0., 0.)])
def test_inputs_are_rounded_on_a_ruler_of_which_zero_is_a_mark(bits, low, high):
    ruler, n = RoundedInputs(bits, low, high).eval(), 2**bits - 1
    x = torch.linspace(-4, 4, 801)
    found = ruler(x)
    assert len(found.unique()) <= n + 1 and ruler(torch.zeros(3)).tolist() == [0, 0, 0]
    low, high = min(low, 0.), max(high, 0.)
    if low == high: return
    scale, zero = (high - low)/n, round(-low/((high - low)/n))
    wanted = torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, n)
    near = (found - wanted).abs() < 1e-5
    assert near.float().mean() > 0.98 and (found - wanted).abs().max() < 1.01*scale  # ties may differ


def test_the_ends_move_in_training_only_by_a_fiftieth():
    ruler, x = RoundedInputs(8, 0., 1.), torch.tensor([-1., 3.])
    ruler.eval()(x)
    assert ruler.ends.tolist() == [0, 1]
    ruler.train()(x)
    torch.testing.assert_close(ruler.ends, torch.tensor([-0.02, 1.04]))
    assert ruler(x.bfloat16()).dtype == torch.bfloat16


def test_folding_gives_the_equations_of_jacob_in_float64():
    model, x = convolutional(), torch.randn(7, 4, 5, 5).double()
    model.layer2[1].running_var[:2] = 1e-5  # as small as epsilon
    folded = fold_batch_norm(model)
    conv, norm = (copy.deepcopy(m).double() for m in model.layer2[:2])
    y = F.conv2d(x, conv.weight, padding=1)
    y = norm.weight.view(-1, 1, 1)*(y - norm.running_mean.view(-1, 1, 1)) \
        / (norm.running_var.view(-1, 1, 1) + norm.eps).sqrt() + norm.bias.view(-1, 1, 1)
    own = folded.layer2[0].double()
    torch.testing.assert_close(F.conv2d(x, own.weight, own.bias, padding=1), y, rtol=1e-5, atol=1e-5)
    assert isinstance(folded.layer2[1], _Folded)


NETWORKS = {'resnet8': (lambda: resnet8(channels=1), 0), 'wrn_16_1': (lambda: wrn_16_1(channels=1), 7)}


@pytest.mark.parametrize('name', NETWORKS)
def test_whole_networks_answer_the_same_when_they_are_folded(name):
    "Of a WideResNet, whose normalisation comes first, seven batch norms have nowhere to go."
    torch.manual_seed(0)
    model, stay = NETWORKS[name][0](), NETWORKS[name][1]
    model, x = lively(model), torch.randn(2, 1, 8, 8)
    folded = fold_batch_norm(model)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in folded.modules()) == stay
    with torch.no_grad():
        y = model(x)
        torch.testing.assert_close(folded(x), y, rtol=1e-3, atol=1e-4*y.abs().max().item())


class Twice(nn.Module):
    "A convolution with two listeners, one that is used twice, and one with a bias in front of its batch norm."
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(i, 2, 3, padding=1) for i in (1, 2, 2))
        self.norms, self.fc = nn.ModuleList(nn.BatchNorm2d(2) for _ in range(3)), nn.Linear(2, 3)

    def forward(self, x):
        x = self.a(x)
        x = self.norms[0](x) + x
        x = self.norms[1](self.b(x)) + self.b(x)
        return self.fc(self.norms[2](self.c(x)).mean((2, 3)))


def test_only_a_layer_that_one_batch_norm_alone_hears_is_folded():
    torch.manual_seed(0)
    model, x = lively(Twice()), torch.randn(3, 1, 4, 4)
    folded = fold_batch_norm(model)
    assert [type(m) for m in folded.norms] == [nn.BatchNorm2d, nn.BatchNorm2d, _Folded]
    torch.testing.assert_close(folded(x), model(x))
    rounded = few_bits(model, images(), 8)
    back = written_back(rounded)
    assert back.state_dict().keys() == model.state_dict().keys() and back.norms[2].running_mean.abs().max() > 0


def test_few_bits_copies_and_says_what_it_did():
    model = convolutional().train()
    before, modes = fingerprint(model.state_dict()), [m.training for m in model.modules()]
    rounded = few_bits(model, images(), weights=3, activations=4)
    fit(Supervised(rounded), images(), RECIPE, progress=False)
    assert fingerprint(model.state_dict()) == before and [m.training for m in model.modules()] == modes
    assert {n: (b.weights, b.activations, b.numbers) for n, b in bits_of(rounded).items()} == \
        {'layer1.0': (3, 4, 36), 'layer2.0': (3, 4, 288), 'fc': (3, 4, 96)}
    for name in bits_of(rounded):
        for row in rounded.get_submodule(name).weight.flatten(1): assert len(row.unique()) <= 7
    assert bits_of(model) == {} and bits_of(few_bits(model, images(), 8, None))['fc'].activations is None


def test_what_comes_into_a_layer_is_rounded_before_the_layer_sees_it():
    rounded, seen = few_bits(convolutional(), images(), weights=8, activations=2), []
    rounded.layer2[0].register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    rounded(images().get(torch.arange(40)).x)
    (x, y), layer = seen[0], rounded.layer2[0]
    assert len(x.unique()) <= 4
    torch.testing.assert_close(y, F.conv2d(x, layer.weight, layer.bias, padding=1))


def test_the_ranges_are_those_of_view_0_of_the_training_images_and_no_label_is_read():
    data, model = images(), convolutional()
    x = data.get(torch.arange(len(data))).x
    rounded, without = (few_bits(model, d, images=len(data)) for d in (data, data.unlabelled([])))
    ends = rounded.layer1[0].rounded_inputs.ends
    torch.testing.assert_close(ends, torch.stack(x.aminmax()))
    assert fingerprint(rounded.state_dict()) == fingerprint(without.state_dict())


def test_a_few_images_are_spread_over_the_whole_set_and_seen_in_view_0(monkeypatch):
    asked, get = [], ImageData.get
    monkeypatch.setattr(ImageData, 'get', lambda self, i, v=None: asked.append((i, v)) or get(self, i, v))
    few_bits(net(), images(120), images=100)
    index, view = (torch.cat(part) for part in zip(*asked))
    assert (view == 0).all() and (index[0], index[-1], len(index)) == (0, 119, 100) and len(asked) == 2


def test_eight_bits_change_little_and_two_change_more():
    model, x = convolutional(), images().get(torch.arange(100)).x
    y = model(x)
    off = [(few_bits(model, images(), b)(x) - y).norm()/y.norm() for b in (8, 4, 2)]
    assert off[0] < 0.03 < off[1] < off[2]


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_a_network_of_another_precision_is_rounded_in_float32(dtype):
    model, x = convolutional().to(dtype), images().get(torch.arange(9)).x
    found = few_bits(model, images())
    assert {t.dtype for t in (*found.parameters(), *found.buffers()) if t.is_floating_point()} == {torch.float32}
    assert torch.equal(found(x), few_bits(copy.deepcopy(model).float(), images())(x))
    assert {p.dtype for p in model.parameters()} == {dtype}
    own = DistillBits(model, images(), weights=2, examine=False)
    assert own(images().get(torch.arange(9)))['soft'] > 0


def test_the_student_teaches_its_rounded_copy_unless_there_is_another_teacher():
    student, data = convolutional(), images()
    fit(Supervised(student), data, replace(RECIPE, steps=60), progress=False)
    before = fingerprint(student.state_dict())
    own = DistillBits(student, data.unlabelled([]), weights=2)
    batch = data.get(torch.arange(24))
    losses = own(batch)
    z, v = own.model.eval()(batch.x), student.eval()(batch.x)
    wanted = 4*F.kl_div((z/2).log_softmax(1), (v/2).softmax(1), reduction='batchmean')
    own.model.eval()
    torch.testing.assert_close(own(batch)['soft'], wanted)
    assert losses['hard'] == 0
    history = fit(own, data.unlabelled([]), replace(RECIPE, steps=40, lr=0.02), data, progress=False)
    assert fingerprint(student.state_dict()) == before and history.losses['soft'][-1] < history.losses['soft'][0]
    other = DistillBits(student, data, net(), weights=2, alpha=0.5)
    assert isinstance(other, Distill) and other.teacher.model is not student


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(tmp_path):
    "Weights, rulers of the inputs and all: as if nobody had stopped it. Other bits are another run."
    recipe, data = Recipe(steps=24, batch_size=16, lr=0.02, precision='float32', rows=6), images()
    student = convolutional()

    def made(bits=3): return DistillBits(student, data, weights=bits, examine=False)
    fit(whole := made(), data, recipe, data, progress=False)

    def stop(row):
        if row['step'] >= 12: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        fit(made(), data, recipe, data, progress=False, folder=tmp_path, save_every=0, log=stop)
    h = fit(again := made(), data, recipe, data, progress=False, folder=tmp_path, resume=True)
    assert h.steps == 24
    assert fingerprint(again.state_dict()) == fingerprint(whole.state_dict())
    with pytest.raises(ValueError, match='objective'):
        fit(made(4), data, recipe, data, progress=False, folder=tmp_path, resume=True)


@pytest.mark.parametrize('bits', [8, 4, 2])
def test_weights_written_back_are_those_that_were_rounded_in_the_architecture_of_before(bits):
    model, data = convolutional(), images()
    rounded = few_bits(model, data, bits, None)
    fit(Supervised(rounded), data, RECIPE, progress=False)
    back, x = written_back(rounded), data.get(torch.arange(50)).x
    digit_student(classes=3).load_state_dict(back.state_dict())
    torch.testing.assert_close(back(x), rounded(x), rtol=1e-4, atol=1e-4)
    for m in back.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            for row in m.weight.flatten(1): assert len(row.unique()) <= 2**bits - 1
    assert bits_of(back) == {} and bits_of(rounded) and not any(m._forward_pre_hooks for m in back.modules())
    again = fold_batch_norm(back)  # as a runtime does: the marks stay marks
    for row in again.layer2[0].weight.flatten(1): assert len(row.unique()) <= 2**bits - 1


def test_writing_back_a_copy_leaves_the_rounded_network_and_its_copies_as_they_were():
    rounded = few_bits(convolutional(), images(), 3)
    other, x = copy.deepcopy(rounded), images().get(torch.arange(9)).x
    y = rounded(x)
    written_back(rounded)
    assert torch.equal(rounded(x), y) and torch.equal(other(x), y) and bits_of(other) == bits_of(rounded)


def test_of_eight_bits_a_runtime_finds_the_same_integers():
    "Symmetric, per channel, 255 marks up to the largest weight: what onnxruntime does with weights."
    rounded = few_bits(convolutional(), images(), 8)
    fit(Supervised(rounded), images(), RECIPE, progress=False)
    for name in bits_of(rounded):
        w = rounded.get_submodule(name).weight.detach().flatten(1).double()
        step = w.abs().amax(1, keepdim=True)/127
        assert ((w/step).round()*step - w).abs().max() < 1e-6*w.abs().max()


@pytest.mark.parametrize('change, said', [
    (dict(weights=1), 'weights must be a whole number from 2 to 8'),
    (dict(weights=9), 'weights must be'), (dict(activations=1), 'activations must be'),
    (dict(images=0), 'images must be'), (dict(model=nn.ReLU()), 'model must be a network with a convolution'),
    (dict(model=Teacher(net())), 'model must be a network'), (dict(model=Supervised(net())), 'objective'),
    (dict(data=[1]), 'data must be a data set')])
def test_doors(change, said):
    with pytest.raises(ValueError, match=said): few_bits(**dict(model=net(), data=images()) | change)


def test_what_cannot_be_rounded_twice_followed_or_written_back_is_a_sentence():
    class Turning(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.fc = nn.BatchNorm2d(1), nn.Linear(16, 3)

        def forward(self, x): return self.fc(self.norm(x).flatten(1)) if x.sum() > 0 else self.fc(x.flatten(1))
    rounded = few_bits(net(), images())
    with pytest.raises(ValueError, match='of few bits already, but|floating point'): few_bits(rounded, images())
    with pytest.raises(ValueError, match='could not be followed'): few_bits(Turning(), images())
    with pytest.raises(ValueError, match='as few_bits makes it'): written_back(net())
    with_norm = nn.utils.parametrizations.weight_norm(nn.Linear(16, 3))
    with pytest.raises(ValueError, match='plain layer'): few_bits(nn.Sequential(nn.Flatten(), with_norm), images())
    damaged = net()
    for p in damaged.parameters(): p.data.fill_(float('nan'))
    body = nn.Sequential(damaged, nn.Linear(3, 3))
    with pytest.raises(ValueError, match='finite'): few_bits(body, images())
