"The zoo: every name builds, weights find their classes, and one function opens them all."
import json, math, sys

import numpy as np
import pytest, torch
from distill_nb.files import fingerprint, read_weights, save_weights, stored_classes
from distill_nb.data import ImageData
from distill_nb.models import digit_student, digit_teacher, head_name, resnet8, stem_name
from distill_nb.contract import Teacher
from distill_nb.training import predict
from distill_nb.weights import read_checkpoint
from distill_nb.zoo import (brings_weights, build_model, load_weights, model_names, open_model, opened, package_says)
from networks import bits, same
from safetensors.torch import save
from torch import nn

CONVOLUTIONAL = [n for n in model_names() if not n.startswith('vit')]
NAMES = ['cat', 'dog', 'owl', 'eel', 'ant']


# Every model runs

@pytest.mark.parametrize('size,channels,classes', [(8, 1, 10), (28, 1, 7), (32, 3, 100), (64, 2, 3)])
@pytest.mark.parametrize('name', CONVOLUTIONAL + ['wrn_10_3', 'torchvision:mobilenet_v2'])
def test_every_model_runs_forward_and_backward(name, size, channels, classes):
    runs_forward_and_backward(name, size, channels, classes)


@pytest.mark.parametrize('name,size', [('vit_tiny_8', 8), ('vit_tiny_32', 32), ('vit_tiny_224', 64)])
def test_every_kind_of_vit_runs_forward_and_backward(name, size):
    runs_forward_and_backward(name, size, 2, 3)


def runs_forward_and_backward(name, size, channels, classes):
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
    (lambda: build_model('vit_tiny_32', 10, size=28), ['vit_tiny_32', '3 x 28 x 28', 'patch (8) divides']),
    (lambda: build_model('vit_tiny_33_token', 10), ['no model', 'vit_tiny_33_token', 'vit_tiny_32', '_token']),
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
    assert read_checkpoint(tmp_path/'w.pth').classes is None
    with pytest.raises(ValueError, match='fc.weight is 5x32 but must be 4x32'):
        load_weights(digit_student(4), tmp_path/'w.safetensors', NAMES[:4])


def test_where_the_head_is_not_clear_another_order_is_refused(tmp_path):
    two = lambda: nn.ModuleDict({'head': nn.Linear(8, 5), 'other': nn.Linear(8, 5)})
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


# Names of timm, transformers and a user's own

@pytest.fixture
def hub(tmp_path, monkeypatch):
    "An empty folder of torch.hub, and no other hub."
    from huggingface_hub import constants
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    (tmp_path/'checkpoints').mkdir()
    return tmp_path/'checkpoints'


def vit(**more):
    from transformers import ViTConfig, ViTForImageClassification
    config = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32,
                  patch_size=8)
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**config | more))


def resnet(**more):
    from transformers import ResNetConfig, ResNetForImageClassification
    torch.manual_seed(0)
    return ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1],
                                                     layer_type='basic', **more))


def beside(folder, model, processor=None):
    "A folder as transformers saves a model, with what prepares its images."
    from transformers import ViTImageProcessor
    model.save_pretrained(folder)
    (processor or ViTImageProcessor(size=dict(height=32, width=32))).save_pretrained(folder)
    return f'hf:{folder}'


@pytest.mark.parametrize('name,channels,size', [
    ('timm:resnet10t', 1, 32), ('timm:vit_tiny_patch16_224.augreg_in21k', 3, 48),
    ('timm:mobilenetv3_small_100', 3, 64)])
def test_networks_of_timm_take_these_images(name, channels, size):
    torch.manual_seed(0)
    model = build_model(name, 5, channels, size)
    assert model(torch.randn(2, channels, size, size)).shape == (2, 5) and model.training
    assert len(build_model(name, 3, channels, 2*size)(torch.randn(2, channels, 2*size, 2*size))[0]) == 3


@pytest.mark.parametrize('make', [vit, resnet])
def test_networks_of_transformers_take_these_images(make, tmp_path):
    model = build_model(beside(tmp_path, make()), 5, 1, 16)
    assert model(torch.randn(2, 1, 16, 16)).logits.shape == (2, 5) and all(m.training for m in model.modules())


def written(folder, text, name='my.py'):
    (folder/name).write_text('from torch import nn\n' + text)
    return str(folder/name)


LINEAR = 'nn.Sequential(nn.Flatten(), nn.Linear(channels*size*size, classes))'


@pytest.mark.parametrize('text', [
    f'def net(classes, channels, size): return {LINEAR}', f'def net(*, size, channels=3, classes=7): return {LINEAR}',
    f'def net(classes, channels, size, width=4, *rest, **more): return {LINEAR}',
    'from distill_nb.training import Teacher\ndef net(size, channels, classes): return Teacher(' + LINEAR + ')',
    f'channels, size, classes = 1, 8, 5\ndef net(): return {LINEAR}',
    'class net(nn.Sequential):\n'
    '    def __init__(self, classes): super().__init__(nn.Flatten(), nn.Linear(64, classes))'])
def test_functions_of_a_users_file_get_what_they_ask_for(text, tmp_path):
    assert build_model(written(tmp_path, text) + ':net', 5, 1, 8)[1].out_features == 5
    assert str(tmp_path) not in sys.path


def test_a_users_file_imports_its_neighbours_and_runs_again_when_it_changes(tmp_path):
    written(tmp_path, 'import sys\nsys.count = getattr(sys, "count", 0) + 1\nwidth = 5', 'neighbour_of_my.py')
    text = 'from neighbour_of_my import width\n' \
           'def net(): return nn.Sequential(nn.Flatten(), nn.Linear(64, width, bias={}))'
    for bias in (True, False):
        name = written(tmp_path, text.format(bias)) + ':net'
        for _ in range(2): assert (build_model(name, 5, 1, 8)[1].bias is not None) == bias
    assert sys.count == 1


def test_a_users_file_may_have_data_classes_and_the_name_of_a_package(tmp_path):
    text = 'from __future__ import annotations\nfrom dataclasses import dataclass\nfrom torch import nn\n' \
           '@dataclass\nclass Config:\n    width: int = 4\n' \
           'def net(classes): return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))'
    (tmp_path/'torch.py').write_text(text)
    assert len(build_model(f'{tmp_path}/torch.py:net', 5, 1, 8)) == 2 and sys.modules['torch'] is torch


@pytest.mark.parametrize('text,said', [
    ('', "has no function 'net'; it has none."), ('def nat(): pass', "has no function 'net'; it has nat."),
    ('net = nn.Linear(2, 2)', "has no function 'net'; it has none."),
    ('def net(:', "'my.py' fails in line 2: SyntaxError: "),
    ('import nowhere_to_be_found', "'my.py' fails in line 2: ModuleNotFoundError: "),
    ('raise SystemExit(3)', "'my.py' fails in line 2: SystemExit: 3"),
    ('def net():\n    return 1/0', "my.py:net' fails in line 3: ZeroDivisionError: division by zero"),
    ('def net(): pass', 'must be a network (nn.Module) or a Teacher, but is None'),
    ('def net(): return nn.Linear', "must be a network (nn.Module) or a Teacher, but is <class"),
    ('def net(width, classes): pass', "to a network, but is 'width'"),
    ('def net(classes, /): pass', "to a network, but is 'classes'"),
    ('def net(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 7))',
     'must give 5 logits for an image of 1 x 8 x 8, but gives them in the shape (1, 7)'),
    ('def net(): return nn.Linear(3, 5)', 'cannot take images of 1 x 8 x 8'),
    ('class D(nn.Module):\n    def forward(self, x): return {"out": x}\ndef net(): return D()', 'no logits')])
def test_what_is_wrong_with_a_users_file_is_one_sentence(text, said, tmp_path):
    with pytest.raises(ValueError) as e: build_model(written(tmp_path, text) + ':net', 5, 1, 8)
    assert said in str(e.value) and '\n' not in str(e.value), str(e.value)


@pytest.mark.parametrize('name', ['my.py', 'my.py:', 'nowhere.py:net', '.py:net'])
def test_a_users_file_must_be_there_and_name_its_function(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path, 'def net(): pass')
    with pytest.raises(ValueError, match='FILE.py:FUNCTION|has no function'): build_model(name, 5)


@pytest.mark.parametrize('package,name', [('timm', 'timm:resnet10t'), ('transformers', 'hf:google/vit')])
def test_a_package_that_is_not_installed_is_named_with_its_extra(package, name, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    for call in (lambda: build_model(name, 5), lambda: open_model(name), lambda: open_model(name, 'none', 5)):
        with pytest.raises(ValueError, match=f"{package} could not be .* pip install 'distill_nb.hub.'"): call()


@pytest.mark.parametrize('name,said', [
    ('timm:resnet10', "timm has no model 'resnet10'; the nearest names are resnet10t, "),
    ('timm:resnet10t.mine', "timm has no weights 'resnet10t.mine'"),
    ('torchvision:resnet51', "torchvision has no model 'resnet51'"),
    ('resnet21', 'timm:NAME, hf:NAME and FILE.py:FUNCTION')])
def test_names_that_there_are_not(name, said):
    for call in (lambda: build_model(name, 5), lambda: open_model(name, None, 5)):
        with pytest.raises(ValueError, match=said): call()


# What packages say

def test_timm_is_believed_as_its_own_functions_say(hub):
    import timm
    for name in ('resnet10t', 'vit_tiny_patch16_224', 'inception_v3.tf_in1k', 'vit_tiny_patch16_224.augreg_in21k'):
        model, says = timm.create_model(name), package_says(f'timm:{name}')
        seen = timm.data.resolve_model_data_config(model)
        assert (tuple(says.mean), tuple(says.std), says.crop) == (seen['mean'], seen['std'], seen['crop_pct'])
        assert (says.size, says.outputs) == (seen['input_size'][1], model.num_classes)
        assert len(says.namings[0]) == len(set(says.namings[0])) == model.num_classes
    names = package_says('timm:resnet10t').namings
    assert [n[1] for n in names] == ['goldfish', 'goldfish, Carassius auratus', 'n01443537']
    assert names[0][134] == 'crane (134)' and names[0][517] == 'crane (517)'
    assert package_says('timm:vit_base_patch16_clip_224.openai').namings == []


def test_torchvision_is_believed_for_each_network_alone():
    from torchvision.models import GoogLeNet, VGG11_Weights
    usual = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert package_says('resnet50')[2:6] == (*usual, 224, 224/232)
    assert package_says('torchvision:efficientnet_v2_l')[2:6] == ([0.5]*3, [0.5]*3, 480, 1)
    assert package_says('resnet18', 1)[2:4] == ([pytest.approx(0.449)], [pytest.approx(0.226)])
    assert package_says('torchvision:vgg11').namings == [VGG11_Weights.DEFAULT.meta['categories']]
    channels = lambda values: [torch.tensor(v).view(-1, 1, 1) for v in values]
    (m, s), (mean, std) = channels(usual), channels(package_says('torchvision:googlenet')[2:4])
    x = torch.rand(2, 3, 8, 8)
    inside = GoogLeNet._transform_input(type('Net', (), {'transform_input': True}), (x - m)/s)  # what it does first
    assert torch.allclose((x - mean)/std, inside, atol=1e-6)


PROCESSORS = {
    'plain': lambda t: t.ViTImageProcessor(size=dict(height=32, width=32), image_mean=[0.1, 0.2, 0.3]),
    'centre': lambda t: t.LevitImageProcessor(size=dict(shortest_edge=224), crop_size=dict(height=224, width=224)),
    'shifted': lambda t: t.EfficientNetImageProcessor(size=dict(height=32, width=32), resample=2,
                                                      rescale_factor=1/127.5, rescale_offset=True),
    'not normalised': lambda t: t.ViTImageProcessor(do_normalize=False), 'CLIP': lambda t: t.CLIPImageProcessor(),
    'in 0 to 255': lambda t: t.ViTImageProcessor(do_rescale=False, image_mean=[127.]*3, image_std=[60.]*3),
    'share': lambda t: t.ConvNextImageProcessor(size=dict(shortest_edge=224), crop_pct=0.875)}


@pytest.mark.parametrize('kind', PROCESSORS)
def test_image_processors_of_transformers_are_asked(kind, tmp_path):
    "What the processor gives for an image is what a teacher with these clauses sees."
    import transformers
    from PIL import Image
    processor = PROCESSORS[kind](transformers)
    says = package_says(beside(tmp_path, vit(), processor))
    x = torch.randint(0, 256, (1, 3, 60, 60), dtype=torch.uint8)
    x = torch.nn.functional.interpolate(x, scale_factor=10)  # each colour is wide enough to be seen after a resize
    given = processor(Image.fromarray(x[0].permute(1, 2, 0).numpy()), return_tensors='pt')['pixel_values']
    data = ImageData(x.repeat(2, 1, 1, 1), torch.arange(2), ['a', 'b'])
    net = Teacher(nn.Identity(), mean=says.mean, std=says.std, size=(says.size, says.crop))
    seen = net.own(data).get(torch.tensor([0])).x
    assert seen.shape == given.shape and (seen - given).abs().median() < 0.02*(given.max() - given.min())


def test_a_processor_that_swaps_the_colours_or_keeps_the_size_is_refused(tmp_path):
    import transformers
    for processor, said in ((transformers.MobileViTImageProcessor(), 'takes red, green and blue'),
                            (transformers.ViTImageProcessor(do_resize=False), 'resizes its images to squares')):
        with pytest.raises(ValueError, match=said): package_says(beside(tmp_path, vit(), processor))


def test_a_folder_of_transformers_without_names_or_a_processor(tmp_path):
    vit(num_labels=4).save_pretrained(tmp_path)
    says = package_says(f'hf:{tmp_path}')
    assert (says.outputs, says.namings, says.mean, says.size, says.crop) == (4, [], None, 32, 1)


# The one opener

def test_weights_of_timm_are_looked_for_beside_those_of_torch_hub(hub):
    import timm
    from safetensors.torch import save_file
    with pytest.raises(ValueError) as e: open_model('timm:resnet10t', classes=3)
    place = hub/'timm--resnet10t.safetensors'
    url = 'https://huggingface.co/timm/resnet10t.c3_in1k/resolve/main/model.safetensors'
    assert f'Download {url} and save it as {place}.' in str(e.value)
    old = timm.create_model('resnet10t')
    save_file(old.state_dict(), place)
    found = open_model('timm:resnet10t')
    assert same(dict(found.model.state_dict()), dict(old.state_dict()))
    assert 'state_dict' not in found.model.pretrained_cfg
    assert (found.size, found.crop, found.mean, len(found.classes)) == (176, 0.875, [0.485, 0.456, 0.406], 1000)
    save_file({k: t for k, t in old.state_dict().items() if 'layer4' not in k}, place)
    for classes in (None, 3):
        with pytest.raises(ValueError, match='do not fit it: .*layer4'): open_model('timm:resnet10t', classes=classes)


def without(state, layer): return {k: t for k, t in state.items() if not k.startswith(layer)}


def pretrained(kind, hub):
    "A name, the network whose weights it brings, and two of its classes."
    if kind == 'hf':
        net = vit(id2label={0: 'cat', 1: 'dog', 2: 'owl'}, label2id={'cat': 0, 'dog': 1, 'owl': 2})
        return beside(hub/'vit', net), net, ['owl', 'cat']
    if kind == 'timm':
        import timm
        from safetensors.torch import save_file
        net = timm.create_model('resnet10t')
        save_file(net.state_dict(), hub/'timm--resnet10t.safetensors')
        return 'timm:resnet10t', net, ['n01443537', 'n01440764']
    net = build_model('torchvision:squeezenet1_1', 1000, 3, 224)
    torch.save(net.state_dict(), hub/'squeezenet1_1-b8a52dc0.pth')
    return 'torchvision:squeezenet1_1', net, ['goldfish', 'tench']


@pytest.mark.parametrize('kind', ['timm', 'hf', 'torchvision'])
def test_the_head_stays_where_it_knows_the_classes_and_is_new_and_said_so_elsewhere(kind, hub, capsys):
    name, net, known = pretrained(kind, hub)
    old, head, says = net.state_dict(), head_name(net), package_says(name)
    kept = [opened(name, None, classes) for classes in (known, None, says.outputs)]
    for found in [*kept, opened(name, 'imagenet')]:
        assert same(dict(found.teacher.model.state_dict()), dict(old)) and found.trained and found.new == ''
        assert len(found.teacher.classes) == says.outputs and set(known) <= set(kept[0].teacher.classes)
    assert capsys.readouterr().out == ''
    others = [f'class {i}' for i in range(says.outputs)]
    for classes in (['car', known[0]], 2, others):
        if classes == 2: assert opened(name, classes=2).teacher.classes is None
        fresh = opened(name, classes=classes)
        state = fresh.teacher.model.state_dict()
        assert same(without(state, head), without(old, head))
        assert not torch.equal(state[f'{head}.weight'][:2], old[f'{head}.weight'][:2])
        assert fresh.new == f'the head ({head})' and fresh.trained is False
        assert len(state[f'{head}.weight']) == (2 if classes == 2 else len(classes))
        assert (fresh.teacher.mean, fresh.teacher.size, fresh.teacher.crop) == (says.mean, says.size, says.crop)
    open_model(name, classes=others)
    assert capsys.readouterr().out == f'teacher: pretrained weights of {name}; the head ({head}) is new\n'


@pytest.mark.parametrize('kind', ['timm', 'hf', 'torchvision'])
def test_a_grey_network_sums_the_colours_of_its_stem(kind, hub):
    name, net, known = pretrained(kind, hub)
    grey, mean = opened(name, classes=known, channels=1), sum(package_says(name).mean)/3
    assert 'sums its three colours' in grey.said[0] and grey.teacher.mean == [pytest.approx(mean)]
    stem, said = f'{stem_name(net)}.weight', 'channels must be 3 or 1 for the pretrained weights'
    summed = net.state_dict()[stem].sum(1, keepdim=True)
    assert torch.allclose(grey.teacher.model.state_dict()[stem], summed, atol=1e-6)
    with pytest.raises(ValueError, match=said): open_model(name, channels=2)


def test_random_weights_say_nothing_of_their_images(tmp_path):
    for name in ('timm:resnet10t', beside(tmp_path, vit()), 'torchvision:squeezenet1_1', 'resnet8'):
        found = opened(name, 'none', NAMES, 1, images=32)
        assert (found.new, found.trained, found.said) == ('all', False, [])
        assert {k for k, v in found.teacher.contract.items() if v is not None} == {'classes', 'outputs'}
    assert opened('resnet8', None, 3).new == opened('resnet18', None, 3, images=32).new == 'all'
    for bad in ('resnet8', 'wrn_10_1', f'{written(tmp_path, "")}:net'):
        with pytest.raises(ValueError, match="weights must be a file or 'none' for .*, but is 'imagenet'"):
            open_model(bad, 'imagenet', 3)
    with pytest.raises(ValueError, match='classes must be the names of the classes, or their number'):
        open_model('resnet8')


def test_who_brings_weights(tmp_path):
    always, large, never = [True, True, True], [True, False, True], [False, False, False]
    expected = {'timm:resnet10t': always, 'hf:any/name': always, 'torchvision:vgg11': large, 'resnet34': large,
                'resnet20': never, 'my.py:net': never, 'timm:coatnet_0_224': never}
    for name, said in expected.items(): assert [brings_weights(name, n) for n in (None, 64, 65)] == said
    with pytest.raises(ValueError, match='none.* for timm:coatnet_0_224, of which timm has none'):
        open_model('timm:coatnet_0_224', 'imagenet', 3)


def test_a_folder_of_transformers_that_lacks_weights_is_not_filled_with_random_numbers(tmp_path):
    from safetensors.torch import load_file, save_file
    name, file = beside(tmp_path, vit(num_labels=3)), tmp_path/'model.safetensors'
    tensors = load_file(file)
    save_file({k: t for k, t in tensors.items() if 'classifier' not in k}, file, {'format': 'pt'})
    for classes in (None, 3): assert opened(name, classes=classes).new == 'the head (classifier)'
    save_file({k: t for k, t in tensors.items() if 'layernorm.weight' not in k}, file, {'format': 'pt'})
    with pytest.raises(ValueError, match='vit.layernorm.weight and 0 more are missing'): open_model(name)


def test_a_download_from_the_hub_that_fails_says_what_to_fetch(hub):
    for call in (lambda: open_model('hf:nobody/nothing'), lambda: build_model('hf:nobody/nothing', 3)):
        with pytest.raises(ValueError) as e: call()
        said = str(e.value)
        assert 'https://huggingface.co/nobody/nothing into a folder, and give hf:FOLDER' in said and '\n' not in said


FACTS = dict(architecture='digit_student', channels=1, size=8, mean=[0.3], std=[0.2], valid_accuracy=0.91,
             valid_items=359)


def test_a_students_file_opens_by_itself(tmp_path):
    net, path = digit_student(5), tmp_path/'student.safetensors'
    save_weights(net, path, classes=NAMES, crop=0.5, **FACTS)
    for given in (path, str(path)):
        found = open_model(given)
        assert same(dict(found.model.state_dict()), dict(net.state_dict()))
        clauses = dict(classes=NAMES, mean=[0.3], std=[0.2], size=(8, 0.5), reached={'accuracy': 0.91, 'items': 359})
        assert found.contract == clauses | dict(outputs='logits', read=None)
    assert open_model('digit_student', path).contract == found.contract
    assert open_model(path, size=16).size == 16 and open_model(path, images=16).size == 8
    for classes, said in ((['cat', 'bee'], "only the data have 'bee'"), (4, 'fc.weight is 5x32 but must be 4x32')):
        with pytest.raises(ValueError, match=said): open_model(path, classes=classes)
    assert open_model(path, classes=['owl', 'cat']).classes == open_model(path, classes=5).classes == NAMES
    with pytest.raises(ValueError, match='weights must be left out, since '): open_model(path, weights=path)


@pytest.mark.parametrize('facts,said', [
    (dict(size='x'), "the size that '.*w.safetensors' names must be a number from 1 to 10,000, but is 'x'"),
    (dict(size=10**12), "the size that '.*w.safetensors' names"), (dict(channels='9'*999), 'the channels that '),
    (dict(crop=5), "the crop that '.*w.safetensors' names must be a number from 0.01 to 1, but is '5'"),
    (dict(crop='nan'), 'the crop that '), (dict(crop=0), 'the crop that '), (dict(valid_items='[]'), 'the valid_items'),
    (dict(valid_loss='inf'), 'the valid_loss that '), (dict(valid_accuracy='[0.9]'), 'the valid_accuracy that '),
    (dict(mean='['*100_000), "'.*w.safetensors' names a normalisation"), (dict(std='[NaN]'), 'names a normalisation'),
    (dict(std='[0]'), 'names a normalisation'), (dict(mean='["0.3"]'), 'names a normalisation'),
    (dict(mean='[1e999]'), 'names a normalisation'), (dict(mean='{"0.3": 1}'), 'names a normalisation'),
    (dict(classes='['*100_000), "The metadata 'classes' of '.*w.safetensors'"),
    (dict(architecture=''), "'.*w.safetensors' names its architecture: There is no model ''"),
    (dict(architecture='x'*5000), "'.*w.safetensors' names its architecture"),
    (dict(architecture='wrn_99999999999_2'), 'depth must be'),
    (dict(channels=0), 'the channels that '), (dict(valid_accuracy='nan'), 'the valid_accuracy that '),
    (dict(mean=[0.3, 0.4]), 'names a normalisation that is not one for 1 channels'),
    (dict(architecture='resnet21'), "no model 'resnet21'"),
    (dict(architecture='resnet20'), 'does not hold weights of this model')])
def test_facts_that_make_no_sense_are_refused_with_their_file(facts, said, tmp_path):
    tensors = digit_student(5).state_dict()
    facts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in (FACTS | dict(classes=NAMES) | facts).items()}
    (tmp_path/'w.safetensors').write_bytes(save(tensors, facts))
    with pytest.raises(ValueError, match=said): open_model(tmp_path/'w.safetensors')


def test_a_weights_file_runs_no_code_unasked(tmp_path):
    name = written(tmp_path, f'open({str(tmp_path/"ran")!r}, "w")\n'
                   'def net(classes): return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))')
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    path = tmp_path/'w.safetensors'
    save_weights(net, path, classes=NAMES, **FACTS | dict(architecture=f'{name}:net'))
    with pytest.raises(ValueError) as e: open_model(path)
    assert f"open_model('{name}:net', weights='{path}')" in str(e.value) and not (tmp_path/'ran').exists()
    found = open_model(f'{name}:net', path)
    assert same(dict(found.model.state_dict()), dict(net.state_dict()))
    assert (found.classes, found.mean, found.size) == (NAMES, [0.3], 8) and (tmp_path/'ran').exists()
    with pytest.raises(ValueError, match='does not say what network'):
        save_weights(net, path)
        open_model(path)


def test_a_file_tells_its_outputs_channels_and_stem(tmp_path):
    for name, classes, channels, size in (('digit_teacher', 7, 2, 8), ('resnet18', 3, 1, 96), ('resnet18', 3, 3, 32),
                                          ('timm:vit_tiny_patch16_224', 2, 3, 224), ('timm:resnet10t', 4, 1, 64)):
        net = build_model(name, classes, channels, size)
        torch.save(net.state_dict(), tmp_path/'w.pth')
        for more in ({}, dict(images=40)):
            found = opened(name, tmp_path/'w.pth', **more)
            assert same(dict(found.teacher.model.state_dict()), dict(net.state_dict())) and found.trained
            assert found.teacher.size == (224 if 'vit' in name else None) and found.teacher.mean is None
    with pytest.raises(ValueError, match='torchvision:resnet18 is the network with the stem for large images'):
        torch.save(build_model('torchvision:resnet18', 3).state_dict(), tmp_path/'w.pth')
        open_model('resnet18', tmp_path/'w.pth', size=32)


def test_layers_that_learn_their_shape_from_an_image_are_shown_one_or_refused(tmp_path):
    name = written(tmp_path, 'def net(classes): return nn.Sequential(nn.Flatten(), nn.LazyLinear(classes))') + ':net'
    path, net = tmp_path/'w.safetensors', build_model(name, 5, 1, 8)
    save_weights(net, path, classes=NAMES, **FACTS | dict(architecture=name))
    assert torch.equal(open_model(name, path).model[1].weight, net[1].weight)
    torch.save(net.state_dict(), tmp_path/'w.pth')
    with pytest.raises(ValueError, match='size must be given, .*learn their shape from an image'):
        open_model(name, tmp_path/'w.pth')
    assert torch.equal(open_model(name, tmp_path/'w.pth', 5, 1, 8).model[1].weight, net[1].weight)


def test_auxiliary_heads_in_a_file_are_left_out_and_said(tmp_path, capsys):
    from torchvision.models import googlenet
    net = googlenet(num_classes=3, init_weights=False)
    torch.save(net.state_dict(), tmp_path/'w.pth')
    found = open_model('torchvision:googlenet', tmp_path/'w.pth')
    assert 'the auxiliary heads in the file are for its training, and left out' in capsys.readouterr().out
    assert torch.equal(found.model.fc.weight, net.fc.weight) and found.model.aux1 is None


@pytest.mark.parametrize('given', [(nn.Linear(2, 2),), (5,), ('resnet8', 5), ('resnet8', nn.Linear(2, 2))])
def test_what_is_no_name_is_refused_with_the_way_for_a_network(given):
    with pytest.raises(ValueError, match='must be text or a path; .*Teacher.network'): open_model(*given)


def test_what_a_function_gives_is_kept(tmp_path):
    text = """from distill_nb.training import Teacher
def plain(classes=5): return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
def sure(): return Teacher(plain(), classes=list('abcde'), mean=[0.1], std=[0.2], size=8, outputs='sigmoid')
def sized(size): return nn.Sequential(nn.Flatten(), nn.Linear(size*size, 5))
"""
    file, path = written(tmp_path, text), tmp_path/'w.safetensors'
    assert [opened(f'{file}:{f}', None, 5, 1, images=8).trained for f in ('plain', 'sure')] == [None, True]
    assert open_model(f'{file}:plain', None, NAMES, 1).classes == NAMES
    save_weights(nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), path, classes=NAMES, mean=[0.6], std=[0.7])
    found = open_model(f'{file}:sure', path)
    assert (found.classes, found.mean, found.size, found.outputs) == (NAMES, [0.6], 8, 'sigmoid')
    with pytest.raises(ValueError, match='size must be given, since .*:sized. wants it'):
        open_model(f'{file}:sized', path)
    assert open_model(f'{file}:sized', path, images=8).size is None


def test_predictions_do_not_change_on_the_way_through_a_file(tmp_path):
    x = torch.randint(0, 256, (30, 1, 12, 12), dtype=torch.uint8)
    data = ImageData(x, torch.arange(30) % 5, NAMES)
    net = digit_student(5)
    save_weights(net, tmp_path/'w.safetensors', classes=NAMES, **FACTS)
    before = predict(Teacher(net, NAMES, [0.3], [0.2], 8), data)
    assert torch.equal(predict(open_model(tmp_path/'w.safetensors'), data), before)
    turned = ImageData(x, torch.arange(30) % 5, NAMES[::-1])
    assert torch.equal(predict(open_model(tmp_path/'w.safetensors'), turned), before.flip(1))


@pytest.mark.parametrize('mean,std', [
    ([0.5] * 3, [0.2] * 3), ([0.5], []), ([], []), ([0.5], [0.]), ([0.5], [-1.]), (['x'], [0.2]), (0.5, 0.2),
    ('grey', 'grey'), ([math.nan], [0.2]), ([0.5], [math.inf])])
def test_a_normalisation_that_is_none_is_refused_with_the_file(mean, std, tmp_path):
    save_weights(digit_student(), tmp_path/'w.safetensors', **FACTS | dict(mean=mean, std=std))
    with pytest.raises(ValueError, match='w.safetensors.* names a normalisation that is not one for 1 channels'):
        open_model(tmp_path/'w.safetensors')


def test_a_normalisation_is_read_or_none(tmp_path):
    for facts, expected in (({}, None), ({'mean': [0.5]}, None), ({'mean': (0.5,), 'std': (0.2,)}, [0.5])):
        save_weights(digit_student(), tmp_path/'w.safetensors', **facts)
        assert open_model('digit_student', tmp_path/'w.safetensors').mean == expected


def test_another_order_of_the_classes_is_said(tmp_path, capsys):
    old, path = digit_student(5), tmp_path/'w.safetensors'
    save_weights(old, path, classes=NAMES, **FACTS)
    for classes in (None, NAMES, NAMES[::-1], NAMES[1:3], NAMES[2:0:-1], 5):
        found = open_model(path, classes=classes)
        assert found.classes == NAMES and torch.equal(found.model.fc.bias, old.fc.bias)
        said = capsys.readouterr().out
        assert ('another order than the data' in said) == (classes in (NAMES[::-1], NAMES[2:0:-1]))


# What would be silently wrong, or raw

class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.scale = digit_student(5), nn.Parameter(torch.arange(1., 6))

    def forward(self, x): return self.net(x)*self.scale


def normed():
    net = nn.Sequential(digit_student(5), nn.BatchNorm1d(5))
    net[1].running_var.copy_(torch.arange(1., 6))
    return net


def sets_of_words():
    return nn.Sequential(nn.EmbeddingBag(7, 4), nn.Linear(4, 5), nn.BatchNorm1d(5))


@pytest.mark.parametrize('make', [Scaled, normed, sets_of_words])
def test_what_stands_behind_the_head_class_by_class_is_not_left_in_the_old_order(make, tmp_path):
    torch.manual_seed(0)
    path, model = tmp_path/'w.safetensors', make()
    save_weights(make(), path, classes=NAMES)
    before = bits(model)
    with pytest.raises(ValueError, match=r'more than the head \(.*\) .* Teacher\(network, .* and open_model'):
        load_weights(model, path, NAMES[::-1])
    assert same(bits(model), before)
    load_weights(model, path, NAMES)


def test_weights_are_loaded_into_a_network_or_a_teachers(tmp_path):
    net, path, teacher = digit_student(5), tmp_path/'w.safetensors', Teacher(digit_student(5))
    save_weights(net, path)
    assert load_weights(teacher, path) is teacher and same(bits(teacher.model), bits(net))
    with pytest.raises(ValueError, match=r"model must be a network .*, but is 'resnet18'[.] Open a name"):
        load_weights('resnet18', path)


def test_a_file_that_transformers_wrote_is_opened_by_its_folder(tmp_path):
    name = beside(tmp_path/'vit', vit())
    for file in ('model.safetensors', 'model.safetensors.index.json'):
        (tmp_path/'vit'/'model.safetensors.index.json').write_text('{}')
        with pytest.raises(ValueError, match='give hf:FOLDER without weights, the folder with this file'):
            open_model(name, tmp_path/'vit'/file)


def cut(folder):
    file = folder/'model.safetensors'
    file.write_bytes(file.read_bytes()[:500])


def evil(folder):
    (folder/'model.safetensors').unlink()
    torch.save({'x': Run()}, folder/'pytorch_model.bin')


class Run:
    def __reduce__(self): return print, ('ran',)


def changed(file, **more):
    def change(folder): (folder/file).write_text(json.dumps(json.loads((folder/file).read_text()) | more))
    return change


@pytest.mark.parametrize('damage,said', [
    (cut, "model.safetensors of 'hf:FOLDER' cannot be read: SafetensorError"),
    (evil, "pytorch_model.bin of 'hf:FOLDER' is damaged or holds more than tensors; nothing in it was run."),
    (lambda f: (f/'model.safetensors').unlink(), "the folder 'hf:FOLDER' has no model.safetensors."),
    (lambda f: (f/'config.json').unlink(), "the folder 'hf:FOLDER' has no config.json."),
    (lambda f: (f/'config.json').write_text('{'), "config.json of 'hf:FOLDER' cannot be read"),
    (lambda f: (f/'preprocessor_config.json').write_text('{'), "processor_config.json of 'hf:FOLDER' cannot be read"),
    (changed('preprocessor_config.json', image_std=[0, .5, .5]), "config.json of 'hf:FOLDER' must be finite"),
    (changed('preprocessor_config.json', image_std=[.5, .5]), "preprocessor_config.json of 'hf:FOLDER', or its sizes"),
    (changed('preprocessor_config.json', image_std='x'), "preprocessor_config.json of 'hf:FOLDER', or its sizes"),
    (changed('config.json', num_labels=10**12), "num_labels in 'FOLDER/config.json' must be numbers from 1 to"),
    (changed('config.json', image_size=10**9), "image_size in 'FOLDER/config.json' must be numbers"),
    (changed('config.json', image_size=[32, float('nan')]), "image_size in 'FOLDER/config.json' must be numbers"),
    (changed('config.json', num_channels='x'), "num_channels in 'FOLDER/config.json' must be numbers"),
    (changed('config.json', num_hidden_layers=10**9), "num_hidden_layers in 'FOLDER/config.json' must be numbers"),
    (changed('config.json', hidden_size='x'), "config.json of 'hf:FOLDER'"),
    (changed('config.json', id2label={'0': 'a', '5': 'b'}), "id2label in config.json of 'hf:FOLDER' must be a name"),
    (changed('config.json', id2label=[1, 2]), "config.json of 'hf:FOLDER' cannot be read"),
    (changed('preprocessor_config.json', size=dict(height=10**9, width=10**9)), "size in 'FOLDER/preprocessor_config"),
    (lambda f: (f/'config.json').write_text('[' * 100_000), "config.json of 'hf:FOLDER' cannot be read"),
    (changed('config.json', model_type='bert'), "'hf:FOLDER' is a Bert, which sorts no images into classes."),
    (changed('config.json', model_type='mine', auto_map={'AutoConfig': 'x.C'}), 'wants code of its own, which is')])
def test_what_is_wrong_with_a_folder_is_said_with_its_file(damage, said, tmp_path, capsys):
    name = beside(tmp_path, vit())
    damage(tmp_path)
    with pytest.raises(ValueError) as e: open_model(name)
    assert said.replace('FOLDER', str(tmp_path)) in str(e.value) and 'https' not in str(e.value), str(e.value)
    assert '\n' not in str(e.value) and 'ran' not in capsys.readouterr().out.split()


FAILS = 'class Net(nn.Module):\n    def forward(self, x):\n        {}\ndef net(): return Net()'


@pytest.mark.parametrize('line,said', [
    ('return {}["key"]', "in line 4: KeyError: 'key'"), ('return self.missing(x)', 'in line 4: AttributeError: '),
    ('raise ValueError("odd")', 'in line 4: ValueError: odd'), ('return 1/0', 'in line 4: ZeroDivisionError: ')])
def test_an_error_in_the_forward_of_a_users_network_has_its_line(line, said, tmp_path):
    name = written(tmp_path, FAILS.format(line)) + ':net'
    for call in (lambda: build_model(name, 5, 1, 8), lambda: open_model(name, None, 5, 1, 8)):
        with pytest.raises(ValueError) as e: call()
        assert f"my.py:net' cannot take images of 1 x 8 x 8: my.py fails {said}" in str(e.value), str(e.value)


def test_a_relative_import_is_told_what_to_do(tmp_path):
    with pytest.raises(ValueError, match='line 2: ImportError: .* import them by their names without a dot'):
        build_model(written(tmp_path, 'from .other import width') + ':net', 5)


@pytest.mark.parametrize('text', [
    'net = partial(plain, bias=False)', '@lru_cache\ndef net(classes): return plain(classes)',
    'class Make:\n    def __call__(self, classes): return plain(classes)\nnet = Make()'])
def test_anything_that_can_be_called_makes_a_network(text, tmp_path):
    text = 'from functools import lru_cache, partial\n' \
           'def plain(classes, bias=True): return nn.Sequential(nn.Flatten(), nn.Linear(64, classes, bias))\n' + text
    assert build_model(written(tmp_path, text) + ':net', 5, 1, 8)[1].out_features == 5


def test_what_lazy_layers_lack_is_named_and_the_images_at_hand_are_enough(tmp_path):
    name = written(tmp_path, 'def net(classes): return nn.Sequential(nn.Flatten(), nn.LazyLinear(classes))') + ':net'
    path, net = tmp_path/'w.pth', build_model(name, 5, 1, 8)
    torch.save(net.state_dict(), path)
    with pytest.raises(ValueError, match='^channels must be given'): open_model(name, path, 5, size=8)
    assert torch.equal(opened(name, path, 5, 1, images=8).teacher.model[1].weight, net[1].weight)


def test_weights_for_other_images_say_for_which(tmp_path):
    path = tmp_path/'w.pth'
    torch.save(build_model('resnet8', 5).state_dict(), path)
    with pytest.raises(ValueError, match='made for images of 3 channels'): open_model('resnet8', path, 5, 1)
    for name in ('timm:vit_tiny_patch16_224', 'timm:deit_tiny_distilled_patch16_224'):
        torch.save(build_model(name, 5, 3, 48).state_dict(), path)
        with pytest.raises(ValueError, match='images of 48 x 48: give size=48'): open_model(name, path, 5, 3, 64)
        assert open_model(name, path, 5, 3, 48).size == 48


def test_a_teacher_takes_weights_in_the_order_of_its_own_classes(tmp_path):
    torch.manual_seed(0)
    old, path = digit_student(5), tmp_path/'best.pth'
    torch.save({'state_dict': old.state_dict(), 'classes': NAMES}, path)
    teacher = Teacher(digit_student(5), classes=NAMES[::-1])
    assert load_weights(teacher, path) is teacher
    assert torch.equal(teacher.model.fc.bias, old.fc.bias.flip(0))


def test_a_name_that_is_none_is_named_before_its_classes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'checkpoint-90').mkdir()
    with pytest.raises(ValueError, match="There is no model 'resnet18x'"): open_model('resnet18x')
    with pytest.raises(ValueError, match='say hf:checkpoint-90'): open_model('checkpoint-90')


def test_numbers_and_names_from_numpy():
    made = open_model('digit_student', classes=np.int64(7), channels=np.int64(1), size=np.int64(8))
    assert made.model(torch.zeros(2, 1, 8, 8)).shape == (2, 7) and type(made.size) is int
    assert build_model('resnet8', np.int64(7), np.int64(3), np.int64(32))(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    assert open_model('digit_student', classes=np.array(['cat', 'dog']), channels=1).classes == ['cat', 'dog']
