"Models: their counts, what they cost, and weights from elsewhere."
import subprocess, sys, time
from urllib.error import URLError

import pytest, torch
from distill_nb.files import save_weights
from distill_nb.models import (CifarResNet, ModelCost, WideResNet, _adapted, checked_state, cost_rows, count_macs,
                               digit_student, digit_teacher, head_name, human, imagenet_weights, measure_latency,
                               profile_model, resnet18, resnet50, resnet8, stem_name, transfer_weights)
from distill_nb.zoo import _torchvision_model, build_model, model_names
from networks import bits, count, same
from torch import nn
from torch.nn import functional as F
from distill_nb import models as M

BENCHMARK = {'resnet20': 278_324, 'resnet32': 472_756, 'resnet44': 667_188, 'resnet56': 861_620,
             'resnet110': 1_736_564, 'resnet8x4': 1_233_540, 'resnet32x4': 7_433_860, 'wrn_16_2': 703_284,
             'wrn_40_1': 569_780, 'wrn_40_2': 2_255_156}
CONVOLUTIONAL = [n for n in model_names() if not n.startswith('vit')]
LARGE = {'resnet18': 11_689_512, 'resnet34': 21_797_672, 'resnet50': 25_557_032}  # torchvision's, 1000 classes


# Parameters and arithmetic

@pytest.mark.parametrize('name', BENCHMARK)
def test_counts_of_the_benchmark(name):
    assert count(getattr(M, name)(classes=100)) == BENCHMARK[name]
    assert count(build_model(name, classes=100)) == BENCHMARK[name]


def test_counts_of_the_digit_nets(): assert (count(digit_teacher()), count(digit_student())) == (241_898, 678)


@pytest.mark.parametrize('name', LARGE)
def test_counts_of_the_imagenet_nets(name): assert count(getattr(M, name)(classes=1000)) == LARGE[name]


@pytest.mark.parametrize('name,macs', [('resnet18', 1_814_073_344), ('resnet50', 4_089_184_256)])
def test_macs_of_published_nets(name, macs):
    model = build_model(name, classes=1000, size=224).eval()
    with torch.no_grad(): assert count_macs(model, torch.zeros(1, 3, 224, 224)) == pytest.approx(macs, rel=1e-3)


def by_hand(model, x):
    "MACs from the shapes that forward hooks see, a count independent of torch's own."
    total, hooks = 0, []
    def count_conv(m, i, o): nonlocal total; total += o[0].numel() * m.weight[0].numel()   # a dot product per output
    def count_linear(m, i, o): nonlocal total; total += m.weight.numel()
    for m in model.modules():
        if isinstance(m, nn.Conv2d): hooks.append(m.register_forward_hook(count_conv))
        if isinstance(m, nn.Linear): hooks.append(m.register_forward_hook(count_linear))
    model(x)
    for h in hooks: h.remove()
    return total


@pytest.mark.parametrize('name', ['digit_student', 'digit_teacher', 'resnet20', 'resnet8x4', 'wrn_16_2', 'resnet18',
                                  'resnet50', 'torchvision:mobilenet_v3_small', 'torchvision:shufflenet_v2_x0_5'])
def test_macs_against_a_count_by_hand(name):
    model = build_model(name, 10, 3, 32).eval()
    x = torch.zeros(1, 3, 32, 32)
    with torch.no_grad(): assert count_macs(model, x) == by_hand(model, x)


def encoder_macs(n, d, wide):
    "An encoder layer over n tokens: queries, keys and values; scores and mixing; projection; the two linear layers."
    return n * d * 3 * d + 2 * n * n * d + n * d * d + 2 * n * d * wide


@pytest.mark.parametrize('training', [False, True])
def test_macs_of_an_encoder_layer_by_hand(training):
    layer, x = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).train(training), torch.zeros(1, 10, 32)
    fused = torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad(): assert count_macs(layer, x) == encoder_macs(10, 32, 64)
    assert torch.backends.mha.get_fastpath_enabled() == fused


ATTENTION = {'plain': {}, 'causal': {'is_causal': True}, 'grouped queries': {'enable_gqa': True},
             'added mask': {'attn_mask': torch.zeros(10, 12)}, 'boolean mask': {'attn_mask': torch.ones(10, 12).bool()}}


@pytest.mark.parametrize('name', ATTENTION)
def test_macs_of_attention_by_hand(name):
    """PyTorch has a kernel for each of these, in each version others.

    All make scores and mixtures of 4 heads, 10 queries and 12 keys of 8 numbers."""
    key = value = torch.zeros(1, 2 if name == 'grouped queries' else 4, 12, 8)
    attention = nn.Module()
    attention.forward = lambda query: F.scaled_dot_product_attention(query, key, value, **ATTENTION[name])
    assert count_macs(attention, torch.zeros(1, 4, 10, 8)) == 2 * 4 * 10 * 12 * 8


def test_macs_of_a_vision_transformer_by_hand():
    "ViT-B/32 at 224: 49 patches of 3 x 32 x 32 numbers and a class token, width 768, 12 layers, 1000 classes."
    patches, d = 49, 768
    expected = patches * d * 3*32*32 + 12 * encoder_macs(patches + 1, d, 4*d) + d * 1000
    cost = profile_model(build_model('torchvision:vit_b_32', classes=1000, size=224), (3, 224, 224), repeats=1)
    assert cost.macs == expected


# Layers

@pytest.mark.parametrize('name', CONVOLUTIONAL)
def test_layers_have_the_names_that_others_tap(name):
    names = [n for n, _ in build_model(name, 10).named_children()]
    assert {'layer1', 'layer2', 'fc'} <= set(names) and (name == 'digit_student' or 'layer3' in names)


@pytest.mark.parametrize('name', CONVOLUTIONAL)
def test_a_tapped_tensor_is_not_changed_afterwards(name):
    model, taps = build_model(name, 10), {}
    for n, m in model.named_modules():
        # torchvision's blocks add the shortcut in place, to what their last normalisation put out.
        if name in LARGE and n.startswith('layer') and n.split('.')[-1].startswith('bn'): continue
        m.register_forward_hook(lambda m, i, o, n=n: taps.__setitem__(n, (o, o.detach().clone())))
    model(torch.randn(2, 3, 32, 32))
    assert not [n for n, (kept, copied) in taps.items() if not torch.equal(kept, copied)]
    assert {'layer1', 'layer2', 'fc'} <= set(taps)


# Bad names and numbers

@pytest.mark.parametrize('call,parts', [
    (lambda: CifarResNet(21), ['depth', '21', '20']),
    (lambda: resnet18(stem='mnist'), ['stem', 'mnist', 'cifar']),
    (lambda: resnet18(weights='IMAGENET22K'), ['weights', 'IMAGENET22K', 'IMAGENET1K_V1']),
    (lambda: profile_model(resnet8(), (1, 32, 32)), ['shape', '(1, 32, 32)']),
    (lambda: WideResNet(17, 2), ['depth', '17', '16']),
    (lambda: WideResNet(16, 0), ['width', '0']),
    (lambda: WideResNet(16, 1.5), ['width', '1.5']),
])
def test_bad_arguments_are_named(call, parts):
    with pytest.raises(ValueError) as e: call()
    assert all(p in str(e.value) for p in parts), str(e.value)


# Profiling

def test_profile_leaves_the_model_as_found():
    torch.manual_seed(0)
    model = resnet8()
    model.layer2.eval()                       # a part in another mode than the whole
    model.conv1.weight.requires_grad_(False)
    model(torch.randn(4, 3, 16, 16)).sum().backward()
    before, rng = bits(model), torch.get_rng_state()
    cost = profile_model(model, (3, 16, 16), repeats=2)
    assert same(bits(model), before) and torch.equal(torch.get_rng_state(), rng) and torch.is_grad_enabled()
    assert cost.parameters == count(model) and cost.latency_ms > 0


def test_profile_leaves_the_model_as_found_after_an_error():
    model = resnet8()
    before = bits(model)
    with pytest.raises(ValueError): profile_model(model, (5, 16, 16))
    assert same(bits(model), before)


@pytest.mark.parametrize('name', ['digit_student', 'resnet20', 'wrn_16_1'])
def test_profiled_bytes_are_those_of_the_file(name, tmp_path):
    model = build_model(name, 10)
    save_weights(model, tmp_path/'w.safetensors')
    assert profile_model(model, repeats=1).bytes == (tmp_path/'w.safetensors').stat().st_size


def test_profile_takes_half_precision():
    assert profile_model(digit_student().bfloat16(), (1, 8, 8), repeats=1).macs == 21_056


def test_latency_is_a_median_after_warm_up():
    class Slow(nn.Module):
        calls = 0
        def forward(self, x): self.calls += 1; time.sleep(0.2 if self.calls <= 3 or self.calls == 5 else 0.001)
    assert measure_latency(Slow(), torch.zeros(1), repeats=5, warmup=3) < 20


def test_profile_on_another_device_does_not_move_the_model():
    model = digit_student()
    assert profile_model(model, (1, 8, 8), device='meta').macs == 21_056
    assert next(model.parameters()).device.type == 'cpu' and model.training


# Weights from elsewhere

@pytest.fixture
def hub(tmp_path, monkeypatch):
    "An empty torch.hub folder, and no network."
    def no_network(*args, **kwargs): raise URLError('Temporary failure in name resolution')
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, 'download_url_to_file', no_network)
    (tmp_path/'checkpoints').mkdir()
    return tmp_path/'checkpoints'


def test_without_a_network_the_message_says_what_to_do(hub):
    with pytest.raises(ValueError) as e: resnet50(weights='IMAGENET1K_V2')
    url = 'https://download.pytorch.org/models/resnet50-11ad3fa6.pth'
    assert all(p in str(e.value) for p in ['IMAGENET1K_V2', url, str(hub/'resnet50-11ad3fa6.pth')])


def test_weights_put_into_the_folder_are_used(hub):
    old = resnet18(classes=1000)
    torch.save(old.state_dict(), hub/'resnet18-f37072fd.pth')
    new = resnet18(classes=10, weights='IMAGENET1K_V1')
    old, kept = old.state_dict(), new.state_dict()
    assert all(torch.equal(kept[k], v) for k, v in old.items() if not k.startswith('fc.'))
    assert kept['fc.weight'].shape == (10, 512) and kept['fc.weight'].std() > 0
    whole = resnet18(classes=1000, weights='IMAGENET1K_V1')
    assert torch.equal(whole.fc.weight, old['fc.weight']), 'a head for as many classes is kept'
    grey = resnet18(weights='IMAGENET1K_V1', channels=1).conv1.weight
    assert torch.equal(grey, old['conv1.weight'].sum(1, keepdim=True))
    for bad in (dict(stem='cifar'), dict(channels=2)):
        with pytest.raises(ValueError, match='conv1.weight is 64x3x7x7 but must be'):
            resnet18(weights='IMAGENET1K_V1', **bad)


FAMILIES = ('alexnet', 'convnext_tiny', 'densenet121', 'efficientnet_b0', 'googlenet', 'inception_v3', 'maxvit_t',
            'mnasnet0_5', 'mobilenet_v2', 'mobilenet_v3_small', 'resnet18', 'resnext50_32x4d', 'shufflenet_v2_x0_5',
            'squeezenet1_1', 'swin_t', 'swin_v2_t', 'vgg11_bn', 'vit_b_16')


@pytest.mark.parametrize('name', FAMILIES)
def test_of_every_family_all_but_the_head_is_kept_and_grey_images_sum_the_colours(name):
    "On the meta device: names and shapes alone decide."
    size = 299 if name == 'inception_v3' else 224
    with torch.device('meta'):
        old, new, grey = (_torchvision_model(name, *shape, size) for shape in ((1000, 3), (7, 3), (7, 1)))
    for model, stem in ((new, 0), (grey, 1)):
        tensors, changed = _adapted(model, was := old.state_dict())
        checked_state(model, tensors, name)
        head, first = head_name(model), stem_name(model)
        own = {k.rpartition('.')[0] for k, t in tensors.items() if t is not was[k]}
        assert own == ({head, first} if stem else {head})
        assert changed == [f'the head ({head}) is new', f'the stem ({first}) sums its three colours'][:1 + stem]
        assert head_name(model, 7) == head


def older(name, tensors):
    "The names that torchvision's files of ImageNet weights still have."
    if name == 'vit': pairs = (('.mlp.0.', '.mlp.linear_1.'), ('.mlp.3.', '.mlp.linear_2.'))
    else: pairs = tuple((f'{k}{i}.', f'{k}.{i}.') for k in ('norm', 'conv') for i in (1, 2))
    def rename(k):
        for a, b in pairs: k = k.replace(a, b) if name == 'vit' or 'denselayer' in k else k
        return k
    return {rename(k): t for k, t in tensors.items()}


@pytest.mark.parametrize('name,more', [('densenet', ()), ('vit', ()), ('inception', ('AuxLogits.fc.bias',)),
                                       ('googlenet', ('aux1.fc2.weight', 'aux2.conv.bn.bias'))])
def test_files_of_older_networks_fill_every_layer(name, more, hub, monkeypatch):
    from torchvision import models
    full, file = {'densenet': ('densenet121', 'densenet121-a639ec97.pth'), 'vit': ('vit_b_32', 'vit_b_32-d86f8d99.pth'),
                  'googlenet': ('googlenet', 'googlenet-1378be20.pth'),
                  'inception': ('inception_v3', 'inception_v3_google-0cc3c7bd.pth')}[name]
    small = {'densenet': lambda: models.DenseNet(4, (1, 1), 4, num_classes=5),
             'vit': lambda: models.VisionTransformer(32, 16, 2, 2, 8, 16, num_classes=5)}.get(name, nn.Sequential)
    old = small().state_dict() | {k: torch.ones(2) for k in more}
    torch.save(older(name, old) if not more else old, hub/file)
    if not more: assert set(older(name, old)) != set(old)
    found = imagenet_weights(full, 'DEFAULT')
    assert same(found, {k: t for k, t in old.items() if k not in more})


def test_a_layer_that_does_not_fit_is_refused_and_the_model_stays(hub):
    old = resnet18(classes=1000).state_dict()
    missing = {k: t for k, t in old.items() if k != 'layer3.0.conv1.weight'}
    misshapen, unknown = ({f'layer3.0.conv{i}.weight': torch.ones(2, 2)} for i in (1, 9))
    for wrong in (missing, old | misshapen, old | unknown):
        model = resnet18(classes=10)
        before = bits(model)
        with pytest.raises(ValueError, match='layer3.0.conv'): transfer_weights(model, wrong, 'a file')
        assert same(bits(model), before)
    assert transfer_weights(model, old, 'a file') == ['the head (fc) is new']


def test_the_head_is_the_one_layer_with_as_many_outputs_as_classes():
    two = nn.ModuleDict({'head': nn.Linear(8, 5), 'head_dist': nn.Linear(8, 5), 'last': nn.Linear(8, 3)})
    assert head_name(two) == head_name(two, 3) == 'last' and head_name(nn.Linear(2, 3)) == ''
    for n, said in ((5, 'but has 2'), (4, 'but has 0')):
        with pytest.raises(ValueError, match=f'one linear layer with {n} outputs .*{said}'): head_name(two, n)
    with pytest.raises(ValueError, match='no linear layer'): head_name(nn.Conv2d(3, 8, 3))
    assert head_name(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 1), nn.AdaptiveAvgPool2d(1))) == '1'


def test_damaged_weights_in_the_folder_are_refused(hub):
    (hub/'resnet18-f37072fd.pth').write_bytes(b'<html>')
    with pytest.raises(ValueError, match='damaged') as e: resnet18(weights='IMAGENET1K_V1')
    assert str(hub/'resnet18-f37072fd.pth') in str(e.value) and (hub/'resnet18-f37072fd.pth').exists()


def test_own_file_as_weights(tmp_path):
    old = resnet18(classes=10, stem='cifar', channels=1)
    save_weights(old, tmp_path/'w.safetensors')
    new = resnet18(classes=10, stem='cifar', channels=1, weights=tmp_path/'w.safetensors')
    assert same(dict(new.state_dict()), dict(old.state_dict()))
    with pytest.raises(ValueError, match='w.safetensors'): resnet50(weights=str(tmp_path/'w.safetensors'))


def test_what_is_heavy_is_loaded_where_it_is_used():
    "Importing one of these modules loads neither torchvision nor matplotlib nor safetensors; each in its own fork."
    code = '''
import importlib, os, sys, torch
for module in ('files', 'models', 'zoo'):
    if not os.fork():
        importlib.import_module('distill_nb.' + module)
        print(module, [m for m in ('torchvision', 'matplotlib', 'safetensors') if m in sys.modules], flush=True)
        os._exit(0)
    os.wait()'''
    said = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout
    assert said == 'files []\nmodels []\nzoo []\n'


# Tables

def test_counts_for_people():
    said = {0: '0', 678: '678', 999.6: '1 k', 12_345: '12.3 k', 999_600: '1 M', 4.56e6: '4.56 M', 7e12: '7e+03 G'}
    assert {n: human(n) for n in said} == said


def test_cost_rows():
    [row] = cost_rows({'a': ModelCost(678, 21_056, 3936, 0.0712)})
    assert row == {'model': 'a', 'parameters': '678', 'MACs': '21.1 k', 'file': '3.94 kB', 'latency': '0.07 ms'}


@pytest.mark.parametrize('dtype', [torch.int8, torch.int32, torch.bool, torch.complex64])
def test_weights_of_another_kind_of_numbers_are_refused(dtype):
    model = digit_student()
    tensors = model.state_dict() | {'fc.weight': torch.ones(10, 32).to(dtype)}
    with pytest.raises(ValueError, match=f'fc.weight is of {dtype} but must be of a kind with torch.float32'):
        checked_state(model, tensors, 'w')
    for fine in (torch.float16, torch.float64):
        checked_state(model, model.state_dict() | {'fc.weight': torch.ones(10, 32).to(fine)}, 'w')
