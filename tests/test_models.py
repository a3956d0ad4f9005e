"Models: their counts, what they cost, that they run, and their weights on disk."
import errno, json, os, pickle, signal, subprocess, sys, time
from urllib.error import URLError

import pytest, torch
from distill_nb.files import fingerprint, pack_weights, read_weights, save_weights, stored_classes
from distill_nb.models import (CifarResNet, ModelCost, adapt_weights, check_weights, cost_table, count_macs,
                               digit_student, digit_teacher, head_name, human, imagenet_weights, measure_latency,
                               profile_model, resnet18, resnet50, resnet8, stem_name, transfer_weights)
from distill_nb.zoo import _torchvision_model, build_model, load_weights, model_names
from torch import nn
from torch.nn import functional as F
from distill_nb import models as M

BENCHMARK = {'resnet20': 278_324, 'resnet32': 472_756, 'resnet44': 667_188, 'resnet56': 861_620, 'resnet110': 1_736_564,
             'resnet8x4': 1_233_540, 'resnet32x4': 7_433_860, 'wrn_16_2': 703_284, 'wrn_40_1': 569_780, 'wrn_40_2': 2_255_156}
LARGE = {'resnet18': 11_689_512, 'resnet34': 21_797_672, 'resnet50': 25_557_032}  # torchvision's, 1000 classes


def count(model): return sum(p.numel() for p in model.parameters())


def bits(model):
    "All that a model is: values, modes, gradients and what wants one."
    return ({k: v.clone() for k, v in model.state_dict().items()}, [m.training for m in model.modules()],
            [None if p.grad is None else p.grad.clone() for p in model.parameters()], [p.requires_grad for p in model.parameters()])


def same(a, b):
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


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


@pytest.mark.parametrize('name', ['digit_student', 'digit_teacher', 'resnet20', 'resnet8x4', 'wrn_16_2', 'resnet18', 'resnet50',
                                  'torchvision:mobilenet_v3_small', 'torchvision:shufflenet_v2_x0_5'])
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
    "PyTorch has a kernel for each of these, in each version others; all make scores and mixtures of 4 heads, 10 queries and 12 keys of 8 numbers."
    key = value = torch.zeros(1, 2 if name == 'grouped queries' else 4, 12, 8)
    attention = lambda query: F.scaled_dot_product_attention(query, key, value, **ATTENTION[name])
    assert count_macs(attention, torch.zeros(1, 4, 10, 8)) == 2 * 4 * 10 * 12 * 8


def test_macs_of_a_vision_transformer_by_hand():
    "ViT-B/32 at 224: 49 patches of 3 x 32 x 32 numbers and a class token, width 768, 12 layers, 1000 classes."
    patches, d = 49, 768
    expected = patches * d * 3*32*32 + 12 * encoder_macs(patches + 1, d, 4*d) + d * 1000
    cost = profile_model(build_model('torchvision:vit_b_32', classes=1000, size=224), (3, 224, 224), repeats=1)
    assert cost.macs == expected


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


@pytest.mark.parametrize('name', ['vit_b_32', 'maxvit_t', 'densenet121', 'vgg11', 'squeezenet1_0', 'efficientnet_b0', 'swin_t'])
def test_kinds_of_torchvision_model(name):
    model = build_model(f'torchvision:{name}', classes=5, channels=1, size=224).eval()
    with torch.no_grad(): assert model(torch.zeros(1, 1, 224, 224)).shape == (1, 5)


def test_the_stem_follows_the_size():
    small, large = build_model('resnet18', 10, size=64), build_model('resnet18', 10, size=65)
    assert (small.conv1.stride, large.conv1.stride) == ((1, 1), (2, 2))
    assert isinstance(small.maxpool, nn.Identity) and isinstance(large.maxpool, nn.MaxPool2d)


@pytest.mark.parametrize('name', model_names())
def test_layers_have_the_names_that_others_tap(name):
    names = [n for n, _ in build_model(name, 10).named_children()]
    assert {'layer1', 'layer2', 'fc'} <= set(names) and (name == 'digit_student' or 'layer3' in names)


@pytest.mark.parametrize('name', model_names())
def test_a_tapped_tensor_is_not_changed_afterwards(name):
    model, taps = build_model(name, 10), {}
    for n, m in model.named_modules():
        # torchvision's blocks add the shortcut in place, to what their last normalisation put out.
        if name in LARGE and n.startswith('layer') and n.split('.')[-1].startswith('bn'): continue
        m.register_forward_hook(lambda m, i, o, n=n: taps.__setitem__(n, (o, o.detach().clone())))
    model(torch.randn(2, 3, 32, 32))
    assert not [n for n, (kept, copied) in taps.items() if not torch.equal(kept, copied)]
    assert {'layer1', 'layer2', 'fc'} <= set(taps)


def test_same_seed_same_weights():
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(fingerprint(build_model('resnet8', 10).state_dict()))
    assert states[0] == states[1]
    torch.manual_seed(3)
    direct = resnet8()
    assert fingerprint(direct.state_dict()) == states[0], 'trying the model out must change neither weights nor statistics'


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
    (lambda: CifarResNet(21), ['depth', '21', '20']),
    (lambda: resnet18(stem='mnist'), ['stem', 'mnist', 'cifar']),
    (lambda: resnet18(weights='IMAGENET22K'), ['weights', 'IMAGENET22K', 'IMAGENET1K_V1']),
    (lambda: profile_model(resnet8(), (1, 32, 32)), ['shape', '(1, 32, 32)']),
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


def test_profile_takes_half_precision(): assert profile_model(digit_student().bfloat16(), (1, 8, 8), repeats=1).macs == 21_056


def test_latency_is_a_median_after_warm_up():
    class Slow(nn.Module):
        calls = 0
        def forward(self, x): self.calls += 1; time.sleep(0.2 if self.calls <= 3 or self.calls == 5 else 0.001)
    assert measure_latency(Slow(), torch.zeros(1), repeats=5, warmup=3) < 20


def test_profile_on_another_device_does_not_move_the_model():
    model = digit_student()
    assert profile_model(model, (1, 8, 8), device='meta').macs == 21_056
    assert next(model.parameters()).device.type == 'cpu' and model.training


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


@pytest.mark.parametrize('wrap', [lambda s: s, lambda s: {'state_dict': s, 'epoch': 3}, lambda s: {'model': s},
                                  lambda s: {f'module.{k}': v for k, v in s.items()},
                                  lambda s: {k: v for k, v in s.items() if 'num_batches' not in k}])
@pytest.mark.parametrize('suffix', ['.pth', '.pt', '.bin'])
def test_files_of_torch_save(wrap, suffix, tmp_path):
    model, other = digit_student(), digit_student()
    torch.save(wrap(model.state_dict()), tmp_path/f'w{suffix}')
    load_weights(other, tmp_path/f'w{suffix}')
    assert same([*other.parameters()], [*model.parameters()])


def test_float16_files_load_into_float32(tmp_path):
    save_weights(digit_student().half(), tmp_path/'w.safetensors')
    assert load_weights(digit_student(), tmp_path/'w.safetensors').fc.weight.dtype == torch.float32


class Evil:
    "A pickle that makes the folder `ran` beside itself when it is loaded."
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path.parent/'ran'),)


def damaged(kind, path):
    "A file that must not be loaded, at `path` with a suffix that suits it."
    model = digit_student()
    good = pack_weights(model)
    if kind == 'cut': data = good[:-40]
    if kind == 'cut in the header': data = good[:60]
    if kind == 'empty': data = b''
    if kind == 'flipped bit': data = good[:-100] + bytes([good[-100] ^ 4]) + good[-99:]
    if kind == 'text': data = b'<html>404 Not Found</html>'
    if kind == 'program': data, path = pickle.dumps(Evil(path), protocol=2), path.with_suffix('.pth')
    if kind == 'whole model': torch.save(model, path := path.with_suffix('.pth')); return path
    if kind == 'numbers': torch.save({'epoch': 3}, path := path.with_suffix('.pth')); return path
    if kind == 'cut pth':
        torch.save(model.state_dict(), path := path.with_suffix('.pth'))
        data = path.read_bytes()[:-300]
    path.write_bytes(data)
    return path


@pytest.mark.parametrize('kind', ['cut', 'cut in the header', 'empty', 'flipped bit', 'text', 'program', 'whole model', 'numbers', 'cut pth'])
def test_damaged_files_are_refused(kind, tmp_path):
    path, model = damaged(kind, tmp_path/'w.safetensors'), digit_student()
    data, before = path.read_bytes(), bits(model)
    with pytest.raises(ValueError) as e: load_weights(model, path)
    assert path.name in str(e.value) and 'damaged' in str(e.value) and '\n' not in str(e.value)
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


@pytest.mark.parametrize('call,parts', [(lambda p: load_weights(digit_student(), p/'no.safetensors'), ['no.safetensors', 'there is none']),
                                        (lambda p: load_weights(digit_student(), p/'w.h5'), ['w.h5', '.safetensors']),
                                        (lambda p: load_weights(digit_student(), p), ['.safetensors']),
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


def test_a_killed_writer_leaves_the_old_file_whole(tmp_path):
    path, code = tmp_path/'w.safetensors', """
import os, signal, sys
save_weights(digit_student(), sys.argv[1], run='first')
os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL)
save_weights(digit_student(), sys.argv[1], run='second')"""
    assert subprocess.run([sys.executable, '-c', code, str(path)]).returncode == -signal.SIGKILL
    assert read_weights(path)[1]['run'] == 'first'


def test_fingerprint_sees_every_part():
    t = {'a': torch.arange(6.), 'b': torch.tensor(3)}
    prints = [fingerprint(x) for x in (t, {**t, 'a': t['a'].reshape(2, 3)}, {**t, 'a': t['a'].double()}, {'c': t['a'], 'b': t['b']},
                                         {**t, 'b': torch.tensor(4)}, {**t, 'a': t['a'] + 1e-7}, {**t, 'a': t['a'].view(torch.int32)})]
    assert len(set(prints)) == len(prints)
    assert fingerprint(dict(reversed(t.items()))) == prints[0], 'the order of a dict is no part of its content'
    assert fingerprint({'w': torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last)}) == fingerprint({'w': torch.ones(2, 3, 4, 4)})
    assert fingerprint({'h': torch.ones(3, dtype=torch.bfloat16), 'e': torch.ones(0)})


# The names of the classes

NAMES = ['cat', 'dog', 'owl', 'eel', 'ant']


@pytest.mark.parametrize('build', [lambda: digit_student(5, 3), lambda: build_model('torchvision:squeezenet1_1', 5, size=32), lambda: build_model('torchvision:vit_b_16', 5, size=32),
                                   lambda: nn.Sequential(nn.Flatten(), nn.Linear(3*32*32, 5, bias=False))])
def test_the_outputs_follow_the_names(build, tmp_path):
    torch.manual_seed(0)
    old, path, x = build().eval(), tmp_path/'w.safetensors', torch.rand(4, 3, 32, 32)
    nn.init.normal_(old.get_submodule(head_name(old)).weight)
    save_weights(old, path, classes=tuple(NAMES), mean=[0.5])
    assert stored_classes(read_weights(path)[1], path) == NAMES
    order = [3, 0, 4, 1, 2]
    with torch.no_grad():
        for kw, expected in (({'classes': [NAMES[i] for i in order]}, old(x)[:, order]), ({'classes': NAMES}, old(x)), ({}, old(x))):
            assert torch.allclose(load_weights(build(), path, **kw).eval()(x), expected, rtol=1e-3, atol=1e-4)


def test_other_classes_are_refused_and_the_difference_is_listed(tmp_path):
    path, model = tmp_path/'w.safetensors', digit_student(5)
    save_weights(digit_student(5), path, classes=NAMES)
    before = bits(model)
    for wanted, said in ((['cat', 'dog', 'owl', 'eel', 'bee'], "only the file has 'ant'; only the data have 'bee'"), (NAMES[:4], "for other classes than the data: only the file has 'ant'."),
                         (NAMES + list('abcdefg'), "only the data have 'a', 'b', 'c', 'd', 'e', 2 more"), (['Cat'] + NAMES[1:], "'cat'; only the data have 'Cat'")):
        with pytest.raises(ValueError) as e: load_weights(model, path, classes=wanted)
        assert said in str(e.value) and 'w.safetensors' in str(e.value) and same(bits(model), before)


def test_files_without_names_load_in_their_own_order(tmp_path):
    old = digit_student(5)
    save_weights(old, tmp_path/'w.safetensors')
    torch.save(old.state_dict(), tmp_path/'w.pth')
    for name in ('w.safetensors', 'w.pth'): assert same(dict(load_weights(digit_student(5), tmp_path/name, NAMES).state_dict()), dict(old.state_dict()))
    assert stored_classes(read_weights(tmp_path/'w.pth')[1], 'w.pth') is None
    with pytest.raises(ValueError, match='fc.weight is 5x32 but must be 4x32'): load_weights(digit_student(4), tmp_path/'w.safetensors', NAMES[:4])


def test_where_the_head_is_not_clear_another_order_is_refused(tmp_path):
    two = lambda: nn.ModuleDict({'head': nn.Linear(8, 5), 'head_dist': nn.Linear(8, 5)})
    path, model = tmp_path/'w.safetensors', two()
    save_weights(two(), path, classes=NAMES)
    before = bits(model)
    with pytest.raises(ValueError, match='another order than the data. model, a ModuleDict, must have one linear layer with 5 outputs'): load_weights(model, path, NAMES[::-1])
    assert same(bits(model), before)
    load_weights(model, path, NAMES)


@pytest.mark.parametrize('bad', [5, 'cat', ['cat', 'cat'], [1, 2], {'cat': 0}])
def test_names_must_be_a_list_of_different_words(bad, tmp_path):
    from safetensors.torch import save_file
    model, path = digit_student(2), tmp_path/'w.safetensors'
    with pytest.raises(ValueError, match='classes must be a list of different names, but is '): save_weights(model, path, classes=bad)
    assert not path.exists()
    save_file(model.state_dict(), path, {'classes': json.dumps(bad)})
    with pytest.raises(ValueError, match="classes' of '.*w.safetensors' must be a list of different names"): load_weights(model, path, ['cat', 'dog'])
    load_weights(model, path)


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
    assert torch.equal(resnet18(classes=1000, weights='IMAGENET1K_V1').fc.weight, old['fc.weight']), 'a head for as many classes is kept'
    grey = resnet18(weights='IMAGENET1K_V1', channels=1).conv1.weight
    assert torch.equal(grey, old['conv1.weight'].sum(1, keepdim=True))
    for bad in (dict(stem='cifar'), dict(channels=2)):
        with pytest.raises(ValueError, match='conv1.weight is 64x3x7x7 but must be'): resnet18(weights='IMAGENET1K_V1', **bad)


FAMILIES = ('alexnet', 'convnext_tiny', 'densenet121', 'efficientnet_b0', 'googlenet', 'inception_v3', 'maxvit_t', 'mnasnet0_5', 'mobilenet_v2', 'mobilenet_v3_small',
            'resnet18', 'resnext50_32x4d', 'shufflenet_v2_x0_5', 'squeezenet1_1', 'swin_t', 'swin_v2_t', 'vgg11_bn', 'vit_b_16')


@pytest.mark.parametrize('name', FAMILIES)
def test_of_every_family_all_but_the_head_is_kept_and_grey_images_sum_the_colours(name):
    "On the meta device: names and shapes alone decide."
    size = 299 if name == 'inception_v3' else 224
    with torch.device('meta'):
        old, new, grey = (_torchvision_model(name, *shape, size) for shape in ((1000, 3), (7, 3), (7, 1)))
    for model, stem in ((new, 0), (grey, 1)):
        tensors, changed = adapt_weights(model, was := old.state_dict())
        check_weights(model, tensors, name)
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


@pytest.mark.parametrize('name,more', [('densenet', ()), ('vit', ()), ('googlenet', ('aux1.fc2.weight', 'aux2.conv.bn.bias')), ('inception', ('AuxLogits.fc.bias',))])
def test_files_of_older_networks_fill_every_layer(name, more, hub, monkeypatch):
    from torchvision import models
    full, file = {'densenet': ('densenet121', 'densenet121-a639ec97.pth'), 'vit': ('vit_b_32', 'vit_b_32-d86f8d99.pth'),
                  'googlenet': ('googlenet', 'googlenet-1378be20.pth'), 'inception': ('inception_v3', 'inception_v3_google-0cc3c7bd.pth')}[name]
    small = {'densenet': lambda: models.DenseNet(4, (1, 1), 4, num_classes=5),
             'vit': lambda: models.VisionTransformer(32, 16, 2, 2, 8, 16, num_classes=5)}.get(name, nn.Sequential)
    old = small().state_dict() | {k: torch.ones(2) for k in more}
    torch.save(older(name, old) if not more else old, hub/file)
    if not more: assert set(older(name, old)) != set(old)
    found = imagenet_weights(full, 'DEFAULT')
    assert same(found, {k: t for k, t in old.items() if k not in more})


def test_a_layer_that_does_not_fit_is_refused_and_the_model_stays(hub):
    old = resnet18(classes=1000).state_dict()
    for wrong in ({k: t for k, t in old.items() if k != 'layer3.0.conv1.weight'}, old | {'layer3.0.conv1.weight': torch.ones(2, 2)}, old | {'layer3.0.conv9.weight': torch.ones(2, 2)}):
        model = resnet18(classes=10)
        before = bits(model)
        with pytest.raises(ValueError, match='layer3.0.conv'): transfer_weights(model, wrong, 'a file')
        assert same(bits(model), before)
    assert transfer_weights(model, old, 'a file') == ['the head (fc) is new']


def test_networks_with_versions_of_their_own_load(tmp_path):
    "MNASNet refuses weights that come without the version of their names."
    torch.manual_seed(0)
    old, new = (build_model('torchvision:mnasnet0_5', 3, size=32) for _ in range(2))
    save_weights(old, tmp_path/'w.safetensors')
    assert same(dict(load_weights(new, tmp_path/'w.safetensors').state_dict()), dict(old.state_dict()))


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


def test_the_checks_are_lazy():
    "Importing the module loads neither torchvision nor matplotlib nor safetensors."
    code = "import sys, distill_nb.models; print([m for m in ('torchvision', 'matplotlib', 'safetensors') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip() == '[]'


# Tables

def test_counts_for_people(): assert [human(n) for n in (0, 678, 999.6, 12_345, 999_600, 4.56e6, 7e12)] == ['0', '678', '1 k', '12.3 k', '1 M', '4.56 M', '7e+03 G']


def test_cost_table():
    table = cost_table({'a': ModelCost(678, 21_056, 3936, 0.0712)})
    assert table.splitlines()[-1] == '| a | 678 | 21.1 k | 3.94 kB | 0.07 ms |'


def test_facts_that_are_tuples_are_read_as_lists(tmp_path):
    save_weights(digit_student(), tmp_path/'w.safetensors', mean=(0.5,), std=[0.25])
    facts = read_weights(tmp_path/'w.safetensors')[1]
    assert json.loads(facts['mean']) == [0.5] and json.loads(facts['std']) == [0.25]
