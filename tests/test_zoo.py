"The zoo: every name builds, weights find their classes, and teachers say what they are."
import json, math

import pytest, torch
from distill_nb.files import fingerprint, read_weights, save_weights, stored_classes
from distill_nb.data import digits
from distill_nb.models import digit_student, digit_teacher, head_name, resnet8
from distill_nb.zoo import build_model, load_teacher, load_weights, make_teacher, model_names, normalisation_of
from networks import bits, same
from torch import nn

NAMES = ['cat', 'dog', 'owl', 'eel', 'ant']


# Every model runs

@pytest.mark.parametrize('size,channels,classes', [(8, 1, 10), (28, 1, 7), (32, 3, 100), (64, 2, 3)])
@pytest.mark.parametrize('name', model_names() + ['wrn_10_3', 'torchvision:mobilenet_v2'])
def test_every_model_runs_forward_and_backward(name, size, channels, classes):
    torch.manual_seed(0)
    model = build_model(name, classes, channels, size)
    assert all(m.training for m in model.modules())
    x = torch.randn(2, channels, size, size, requires_grad=True)
    logits = model(x)
    assert logits.shape == (2, classes) and logits.dtype == torch.float32
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize('name', ['vit_b_32', 'maxvit_t', 'densenet121', 'vgg11', 'squeezenet1_0', 'efficientnet_b0',
                                  'swin_t'])
def test_kinds_of_torchvision_model(name):
    model = build_model(f'torchvision:{name}', classes=5, channels=1, size=224).eval()
    with torch.no_grad(): assert model(torch.zeros(1, 1, 224, 224)).shape == (1, 5)


def test_the_stem_follows_the_size():
    small, large = build_model('resnet18', 10, size=64), build_model('resnet18', 10, size=65)
    assert (small.conv1.stride, large.conv1.stride) == ((1, 1), (2, 2))
    assert isinstance(small.maxpool, nn.Identity) and isinstance(large.maxpool, nn.MaxPool2d)


def test_same_seed_same_weights():
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(fingerprint(build_model('resnet8', 10).state_dict()))
    assert states[0] == states[1]
    torch.manual_seed(3)
    direct = resnet8()
    said = 'trying the model out must change neither weights nor statistics'
    assert fingerprint(direct.state_dict()) == states[0], said


# Bad names and numbers

@pytest.mark.parametrize('call,parts', [
    (lambda: build_model('resnet21', 10), ['resnet21', 'resnet20', 'digit_student', 'torchvision:NAME']),
    (lambda: build_model('torchvision:resnet51', 10), ['resnet51', 'resnet50']),
    (lambda: build_model('torchvision:fasterrcnn_resnet50_fpn', 10), ['fasterrcnn_resnet50_fpn', 'nearest']),
    (lambda: build_model('wrn_17_2', 10), ['depth', '17', '16']),
    (lambda: build_model('wrn_16_0', 10), ['width', '0']),
    (lambda: build_model('torchvision:alexnet', 10, size=8), ['alexnet', '3 x 8 x 8']),
    (lambda: build_model('torchvision:vit_b_16', 10, size=30), ['vit_b_16', '30']),
    (lambda: build_model('torchvision:vgg11', 10, 1, size=28), ['vgg11', '1 x 28 x 28']),
    (lambda: build_model('resnet20', 0), ['classes', '0']),
    (lambda: build_model('resnet20', 10, channels=0), ['channels', '0']),
    (lambda: build_model('resnet20', 10, size=-1), ['size', '-1']),
    (lambda: build_model('resnet20', 10.5), ['classes', '10.5']),
])
def test_bad_arguments_are_named(call, parts):
    with pytest.raises(ValueError) as e: call()
    assert all(p in str(e.value) for p in parts), str(e.value)


# The names of the classes

@pytest.mark.parametrize('build', [
    lambda: digit_student(5, 3), lambda: build_model('torchvision:squeezenet1_1', 5, size=32),
    lambda: build_model('torchvision:vit_b_16', 5, size=32),
    lambda: nn.Sequential(nn.Flatten(), nn.Linear(3*32*32, 5, bias=False))])
def test_the_outputs_follow_the_names(build, tmp_path):
    torch.manual_seed(0)
    old, path, x = build().eval(), tmp_path/'w.safetensors', torch.rand(4, 3, 32, 32)
    nn.init.normal_(old.get_submodule(head_name(old)).weight)
    save_weights(old, path, classes=tuple(NAMES), mean=[0.5])
    assert stored_classes(read_weights(path)[1], path) == NAMES
    order = [3, 0, 4, 1, 2]
    turned = {'classes': [NAMES[i] for i in order]}
    with torch.no_grad():
        for kw, expected in ((turned, old(x)[:, order]), ({'classes': NAMES}, old(x)), ({}, old(x))):
            assert torch.allclose(load_weights(build(), path, **kw).eval()(x), expected, rtol=1e-3, atol=1e-4)


def test_other_classes_are_refused_and_the_difference_is_listed(tmp_path):
    path, model = tmp_path/'w.safetensors', digit_student(5)
    save_weights(digit_student(5), path, classes=NAMES)
    before = bits(model)
    cases = ((['cat', 'dog', 'owl', 'eel', 'bee'], "only the file has 'ant'; only the data have 'bee'"),
             (NAMES[:4], "for other classes than the data: only the file has 'ant'."),
             (NAMES + list('abcdefg'), "only the data have 'a', 'b', 'c', 'd', 'e', 2 more"),
             (['Cat'] + NAMES[1:], "'cat'; only the data have 'Cat'"))
    for wanted, said in cases:
        with pytest.raises(ValueError) as e: load_weights(model, path, classes=wanted)
        assert said in str(e.value) and 'w.safetensors' in str(e.value) and same(bits(model), before)


def test_files_without_names_load_in_their_own_order(tmp_path):
    old = digit_student(5)
    save_weights(old, tmp_path/'w.safetensors')
    torch.save(old.state_dict(), tmp_path/'w.pth')
    for name in ('w.safetensors', 'w.pth'):
        new = load_weights(digit_student(5), tmp_path/name, NAMES)
        assert same(dict(new.state_dict()), dict(old.state_dict()))
    assert stored_classes(read_weights(tmp_path/'w.pth')[1], 'w.pth') is None
    with pytest.raises(ValueError, match='fc.weight is 5x32 but must be 4x32'):
        load_weights(digit_student(4), tmp_path/'w.safetensors', NAMES[:4])


def test_where_the_head_is_not_clear_another_order_is_refused(tmp_path):
    two = lambda: nn.ModuleDict({'head': nn.Linear(8, 5), 'head_dist': nn.Linear(8, 5)})
    path, model = tmp_path/'w.safetensors', two()
    save_weights(two(), path, classes=NAMES)
    before = bits(model)
    said = 'another order than the data. model, a ModuleDict, must have one linear layer with 5 outputs'
    with pytest.raises(ValueError, match=said): load_weights(model, path, NAMES[::-1])
    assert same(bits(model), before)
    load_weights(model, path, NAMES)


@pytest.mark.parametrize('bad', [5, 'cat', ['cat', 'cat'], [1, 2], {'cat': 0}])
def test_names_must_be_a_list_of_different_words(bad, tmp_path):
    from safetensors.torch import save_file
    model, path = digit_student(2), tmp_path/'w.safetensors'
    with pytest.raises(ValueError, match='classes must be a list of different names, but is '):
        save_weights(model, path, classes=bad)
    assert not path.exists()
    save_file(model.state_dict(), path, {'classes': json.dumps(bad)})
    with pytest.raises(ValueError, match="classes' of '.*w.safetensors' must be a list of different names"):
        load_weights(model, path, ['cat', 'dog'])
    load_weights(model, path)


# Weights that fit

@pytest.mark.parametrize('other,parts', [
    (lambda: digit_student(classes=7), ['fc.weight is 7x32 but must be 10x32', 'fc.bias']),
    (lambda: digit_teacher(), ['layer3.0.weight is not in the model', 'more']),
    (lambda: digit_student()[:2], ['fc.weight is missing', 'fc.bias is missing'])])
def test_foreign_files_are_refused(other, parts, tmp_path):
    save_weights(other(), tmp_path/'other.safetensors')
    model = digit_student()
    before = bits(model)
    with pytest.raises(ValueError) as e: load_weights(model, tmp_path/'other.safetensors')
    assert all(p in str(e.value) for p in [*parts, 'other.safetensors']), str(e.value)
    assert same(bits(model), before)


def test_float16_files_load_into_float32(tmp_path):
    save_weights(digit_student().half(), tmp_path/'w.safetensors')
    assert load_weights(digit_student(), tmp_path/'w.safetensors').fc.weight.dtype == torch.float32


def test_networks_with_versions_of_their_own_load(tmp_path):
    "MNASNet refuses weights that come without the version of their names."
    torch.manual_seed(0)
    old, new = (build_model('torchvision:mnasnet0_5', 3, size=32) for _ in range(2))
    save_weights(old, tmp_path/'w.safetensors')
    assert same(dict(load_weights(new, tmp_path/'w.safetensors').state_dict()), dict(old.state_dict()))


# Teachers

@pytest.mark.parametrize('mean,std', [
    ([0.5] * 3, [0.2] * 3), ([0.5], []), ([], []), ([0.5], [0.]), ([0.5], [-1.]), (['x'], [0.2]), (0.5, 0.2),
    ('grey', 'grey'), ([math.nan], [0.2]), ([0.5], [math.inf])])
def test_a_normalisation_that_is_none_is_refused_with_the_file(mean, std, tmp_path):
    save_weights(digit_student(), tmp_path/'w.safetensors', mean=mean, std=std)
    with pytest.raises(ValueError, match='w.safetensors.* names a normalisation that is not one for 1 channels'):
        normalisation_of(str(tmp_path/'w.safetensors'), 1)


def test_a_normalisation_is_read_or_none(tmp_path):
    for facts, expected in (({}, None), ({'mean': [0.5]}, None), ({'mean': (0.5,), 'std': (0.2,)}, ([0.5], [0.2]))):
        save_weights(digit_student(), tmp_path/'w.safetensors', **facts)
        assert normalisation_of(tmp_path/'w.safetensors', 1) == expected


def test_a_loaded_teacher_answers_in_the_order_of_the_data_and_says_so(tmp_path, capsys):
    old, path = digit_student(5), str(tmp_path/'w.safetensors')
    save_weights(old, path, classes=NAMES)
    for classes, expected, rows in ((None, NAMES, old.fc.bias), (NAMES, NAMES, old.fc.bias),
                                    (NAMES[::-1], NAMES[::-1], old.fc.bias.flip(0))):
        model = digit_student(5)
        assert load_teacher(model, path, classes) == expected and torch.equal(model.fc.bias, rows)
        assert capsys.readouterr().out.startswith('teacher: ') == (classes == NAMES[::-1])
    save_weights(old, path)
    for classes in (None, NAMES): assert load_teacher(digit_student(5), path, classes) == classes


def test_a_teacher_is_new_or_comes_from_a_file(tmp_path):
    train, path = digits().train, str(tmp_path/'w.safetensors')
    for weights in (None, 'none'):
        torch.manual_seed(0)
        model, trained, normalisation = make_teacher('digit_student', weights, train)
        torch.manual_seed(0)
        assert same(bits(model), bits(build_model('digit_student', 10, 1, 8)))
        assert not trained and normalisation is None
    save_weights(model, path, mean=[0.5], std=[0.2])
    found, trained, normalisation = make_teacher('digit_student', path, train)
    assert same(bits(found), bits(model)) and trained and normalisation == ([0.5], [0.2])
