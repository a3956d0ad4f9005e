"The vision transformer: timm's for the same weights, at every size, through files, and its sentences."
import copy
from functools import partial

import pytest, timm, torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import Block as TimmBlock, VisionTransformer
from torch import nn

from distill_nb.files import fingerprint, save_weights
from distill_nb.data import ImageData
from distill_nb.models import count_macs, head_name, profile_model, stem_name
from distill_nb.contract import Teacher
from distill_nb.students import Heads, check_student, heads
from distill_nb.training import Recipe, Supervised, evaluate, fit, predict
from distill_nb.embeddings import headless
from distill_nb.vit import Attention, Block, ViT, vit_small_224, vit_tiny_224, vit_tiny_32, vit_tiny_8, with_token
from distill_nb.zoo import build_model, load_weights, model_names, open_model, opened
from networks import bits, count, same

SMALL = 8, 4, 16, 2, 2, 5, 3  # size, patch, width, depth, heads, classes, channels
NAMES = ['cat', 'dog', 'owl', 'eel', 'ant']
QUIET = dict(progress=False, device='cpu')


def small(token=False, seed=0, size=8):
    "A network whose every tensor is far from its initial value."
    torch.manual_seed(seed)
    model = ViT(size, *SMALL[1:], token)
    with torch.no_grad():
        for p in model.parameters(): p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def deit(token, **more):
    name = f"deit_tiny_{'distilled_' if token else ''}patch16_224"
    size, patch, width, depth, heads, classes, channels = SMALL
    return timm.create_model(name, **dict(img_size=size, patch_size=patch, embed_dim=width, depth=depth,
                                          num_heads=heads, num_classes=classes, in_chans=channels) | more)


def data(n=40):
    x = torch.randint(0, 256, (n, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    return ImageData(x.to(torch.uint8), torch.arange(n) % 5, NAMES)


# Equal to timm's

@pytest.mark.parametrize('token', [False, True])
@pytest.mark.parametrize('dtype,near', [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_timms_deit_takes_our_weights_and_gives_the_same_logits_and_gradients(token, dtype, near):
    ours, theirs = small(token).to(dtype), deit(token).to(dtype)
    theirs.load_state_dict(ours.state_dict())  # every name and shape
    assert list(ours.state_dict()) != [] and count(ours) == count(theirs)
    x = torch.randn(3, 3, 8, 8, dtype=dtype)
    for model in (ours, theirs): model(x).square().sum().backward()
    assert torch.allclose(ours(x), theirs.eval()(x), near, near)
    grads = [dict(m.named_parameters()) for m in (ours, theirs)]
    for k, p in grads[0].items(): assert torch.allclose(p.grad, grads[1][k].grad, 100 * near, 10 * near), k


def test_in_training_both_heads_are_timms():
    ours, theirs = small(True).train(), deit(True)
    theirs.load_state_dict(ours.state_dict())
    theirs.set_distilled_training(True)
    x = torch.randn(3, 3, 8, 8)
    for a, b in zip(ours(x), theirs.train()(x)): assert torch.allclose(a, b, 1e-5, 1e-5)
    two = ours(x)
    assert torch.allclose(ours.eval()(x), (two[0] + two[1]) / 2)
    assert torch.allclose(ours.tokens(x), theirs.forward_features(x), 1e-5, 1e-5)


@pytest.mark.parametrize('size', [4, 8, 12, 20])
@pytest.mark.parametrize('token', [False, True])
def test_other_sizes_are_timms_with_dynamic_img_size(size, token):
    ours, theirs = small(token), deit(token, dynamic_img_size=True).eval()
    theirs.load_state_dict(ours.state_dict())
    for shape in ((size, size), (size, 8), (8, size)):
        x = torch.randn(2, 3, *shape)
        assert torch.allclose(ours(x), theirs(x), 1e-4, 1e-5), shape


@pytest.mark.parametrize('token', [False, True])
def test_positions_are_interpolated_as_timms_are(token):
    ours = small(token, size=16)  # 4 x 4 patches
    for grid in ((4, 4), (7, 7), (2, 2), (3, 5), (1, 1)):
        theirs = resample_abs_pos_embed(ours.pos_embed, list(grid), num_prefix_tokens=1 + token)
        assert torch.allclose(ours.positions(grid), theirs, 1e-5, 1e-6), grid
    assert ours.positions((4, 4)) is ours.pos_embed
    half = copy.deepcopy(ours).bfloat16()
    assert half.positions((7, 7)).dtype == torch.bfloat16


def test_the_named_sizes_are_deits():
    for make, name in ((vit_tiny_224, 'deit_tiny_patch16_224'), (vit_small_224, 'deit_small_patch16_224')):
        for token in (False, True):
            with torch.device('meta'):
                ours = make(1000, token=token)
                theirs = timm.create_model(name.replace('_patch', '_distilled_patch') if token else name)
            shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (ours, theirs)]
            assert shapes[0] == shapes[1] and ours.blocks[0].attn.num_heads == theirs.blocks[0].attn.num_heads


def test_a_block_and_its_attention_against_a_float64_reference():
    torch.manual_seed(0)
    block, x, D, h = Block(12, 3).double(), torch.randn(2, 5, 12).double(), 12, 3
    def norm(x, layer):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * layer.weight + layer.bias
    q, k, v = (block.attn.qkv.weight.chunk(3)[i] @ norm(x, block.norm1)[..., None]
               + block.attn.qkv.bias.chunk(3)[i][:, None] for i in range(3))
    parts = []
    for i in range(h):
        own = slice(i * D // h, (i + 1) * D // h)
        scores = (q[:, :, own, 0] @ k[:, :, own, 0].mT) / (D / h)**0.5
        parts.append((scores.exp() / scores.exp().sum(-1, keepdim=True)) @ v[:, :, own, 0])
    y = x + torch.cat(parts, -1) @ block.attn.proj.weight.T + block.attn.proj.bias
    z = norm(y, block.norm2) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
    z = z * (1 + torch.erf(z / 2**0.5)) / 2
    y = y + z @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
    assert torch.allclose(block(x), y, 1e-10, 1e-12)
    theirs = TimmBlock(12, 3, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6)).double()
    theirs.load_state_dict(block.state_dict())
    assert torch.allclose(block(x), theirs(x), 1e-10, 1e-12)


# Laws

@pytest.mark.parametrize('token', [False, True])
def test_shuffled_patches_change_nothing_without_positions(token):
    model, x = small(token, size=16), torch.randn(2, 3, 16, 16)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    cut = F.unfold(x, 4, stride=4)                                     # (B, 3 * 4 * 4, 16)
    shuffled = F.fold(cut[..., order], (16, 16), 4, stride=4)
    assert (model(x) - model(shuffled)).abs().max() > 1e-3
    with torch.no_grad(): model.pos_embed.copy_(model.pos_embed[:, :1].expand_as(model.pos_embed))
    assert torch.allclose(model(x), model(shuffled), 1e-5, 1e-5)
    n = 1 + token
    assert torch.allclose(model.tokens(x)[:, n:][:, order], model.tokens(shuffled)[:, n:], 1e-4, 1e-5)


@pytest.mark.parametrize('token', [False, True])
def test_every_parameter_and_pixel_gets_gradient(token):
    model, x = small(token).train(), torch.randn(2, 3, 8, 8, requires_grad=True)
    out = model(x)
    sum(z.square().sum() for z in (out if token else [out])).backward()
    for k, p in model.named_parameters(): assert p.grad is not None and p.grad.abs().sum() > 0, k
    assert (x.grad != 0).all()


def test_no_head_gets_gradient_from_the_others_loss():
    for which, other in ((0, 'head_dist'), (1, 'head')):
        model = small(True).train()
        model(torch.randn(2, 3, 8, 8))[which].square().sum().backward()
        assert getattr(model, other).weight.grad is None and model.cls_token.grad is not None


def test_images_do_not_see_each_other_and_one_is_enough():
    model, x = small(True), torch.randn(4, 3, 8, 8)
    together = model(x)
    for i in range(4): assert torch.allclose(model(x[i:i + 1]), together[i:i + 1], 1e-4, 1e-5)
    assert model(x[:0]).shape == (0, 5)
    model.train()(x[:1])[0].sum().backward()  # no statistics over a batch


def test_the_memory_format_changes_nothing():
    model, x = small(True), torch.randn(2, 3, 8, 8)
    turned = copy.deepcopy(model).to(memory_format=torch.channels_last)
    assert torch.allclose(turned(x.to(memory_format=torch.channels_last)), model(x), 1e-5, 1e-6)


def test_it_compiles_in_one_graph():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = ViT(8, 4, 8, 1, 2, 3, 1, token=True)
    compiled = torch.compile(model, fullgraph=True, backend='eager')
    for mode, size in ((True, 8), (False, 8), (False, 12)):
        model.train(mode)
        x = torch.randn(2, 1, size, size)
        for a, b in zip(compiled(x), model(x)): assert torch.allclose(a, b, 1e-5, 1e-6)


def test_the_same_seed_gives_the_same_weights():
    def made(seed):
        torch.manual_seed(seed)
        return fingerprint(vit_tiny_8(token=True).state_dict())
    assert made(1) == made(1) != made(2)


def test_the_costs_are_those_of_the_formula():
    D, depth, patch, N = 16, 2, 4, 1 + 9
    model = ViT(12, patch, D, depth, 2, 5, 3).eval()
    block = N * 12 * D**2 + 2 * N**2 * D
    expected = (N - 1) * 3 * patch**2 * D + depth * block + 5 * D
    assert count_macs(model, torch.zeros(1, 3, 12, 12)) == expected
    assert profile_model(model, (3, 12, 12), repeats=1).macs == expected


# A second head

def test_a_token_leaves_all_else_as_it_was():
    plain = small()
    before = bits(plain)
    new = with_token(plain)
    assert same(bits(plain), before) and not new.training and hasattr(new, 'dist_token')
    own, state = new.state_dict(), plain.state_dict()
    assert {k for k in own if k not in state} == {'dist_token', 'head_dist.weight', 'head_dist.bias'}
    for k, v in state.items():
        kept = torch.cat([own[k][:, :1], own[k][:, 2:]], 1) if k == 'pos_embed' else own[k]
        assert torch.equal(kept, v) and own[k].data_ptr() != v.data_ptr(), k
    twice = with_token(new)
    assert twice is not new and same(bits(twice), bits(new))
    assert head_name(new) == 'head' and stem_name(new) == 'patch_embed.proj'
    moved = with_token(copy.deepcopy(plain).bfloat16())
    assert {p.dtype for p in moved.parameters()} == {torch.bfloat16}
    with torch.device('meta'): far = ViT(*SMALL)
    assert {p.device.type for p in with_token(far).parameters()} == {'meta'}


def test_the_two_answers_are_heads_and_the_student_is_fine():
    model, x = small(True), data().get(torch.arange(4)).x
    found = heads(model.train()(x), model)
    assert isinstance(found, Heads) and found.soft is not None and not found.aux
    assert torch.allclose(found.answer, model.eval()(x), 1e-5, 1e-6)
    before = bits(model)
    for m in (model, small()): check_student(m, data(), 'the student')
    assert same(bits(model), before)
    with pytest.raises(ValueError, match='the student gives outputs of shape .7,. per item'):
        check_student(ViT(8, 4, 16, 2, 2, 7, 3), data(), 'the student')


def test_evaluation_averages_the_heads():
    model, items = small(True).train(), data()
    x = items.get(torch.arange(len(items))).x
    with torch.no_grad(): one, two = model(x)
    assert model.training and torch.allclose(predict(model, items), (one + two) / 2, 1e-4, 1e-5)
    right = ((one + two).argmax(1) == torch.arange(len(items)) % 5).float().mean().item()
    assert evaluate(model, items).accuracy == pytest.approx(right)
    fit(Supervised(model), items, Recipe(steps=2, batch_size=8, lr=0.01, precision='float32'), items, **QUIET)


# Names and files

@pytest.mark.parametrize('name', ['vit_tiny_8', 'vit_tiny_8_token', 'vit_tiny_32_token'])
@pytest.mark.parametrize('size', [8, 16])
def test_a_file_brings_network_token_and_size_back(name, size, tmp_path):
    model = build_model(name, 5, 1, size)
    assert len(model.pos_embed[0]) == (size // model.patch_embed.proj.kernel_size[0])**2 + 1 + name.endswith('_token')
    save_weights(model, tmp_path/'w.safetensors', classes=NAMES, architecture=name, channels=1, size=size,
                 mean=[0.3], std=[0.2])
    found = open_model(tmp_path/'w.safetensors')
    assert same(dict(found.model.state_dict()), dict(model.state_dict())) and found.size == size
    assert (found.classes, found.mean) == (NAMES, [0.3])


def test_a_bare_checkpoint_tells_classes_and_channels_and_the_name_the_size(tmp_path):
    for name, size in (('vit_tiny_8', None), ('vit_tiny_8_token', None), ('vit_tiny_32', 64)):
        net = build_model(name, 7, 2, size or 8)
        torch.save(net.state_dict(), tmp_path/'w.pth')
        found = opened(name, tmp_path/'w.pth', size=size, images=28)
        assert same(dict(found.teacher.model.state_dict()), dict(net.state_dict())) and found.trained
        assert found.teacher.size == (size or 8)
    with pytest.raises(ValueError, match='made for images of 64 x 64: give size=64'): open_model(name, tmp_path/'w.pth')
    assert open_model('vit_tiny_224', classes=3).model.pos_embed.shape == (1, 197, 192)
    assert open_model('vit_tiny_224', classes=3, images=32).model.pos_embed.shape == (1, 5, 192)


@pytest.mark.parametrize('token', ['', '_token'])
def test_both_heads_follow_the_names_of_the_classes(token, tmp_path):
    name, path, x = f'vit_tiny_8{token}', tmp_path/'w.safetensors', torch.randn(3, 1, 8, 8)
    old, order = build_model(name, 5, 1, 8).eval(), [3, 0, 4, 1, 2]
    save_weights(old, path, classes=NAMES)
    turned = load_weights(build_model(name, 5, 1, 8), path, [NAMES[i] for i in order])
    assert torch.allclose(turned.eval()(x), old(x)[:, order], 1e-4, 1e-5)
    if token:
        for a, b in zip(turned.train()(x), old.train()(x)): assert torch.allclose(a, b[:, order], 1e-4, 1e-5)
    before = bits(turned)
    with pytest.raises(ValueError, match='more than the head .* depends on it'):
        scaled = nn.Sequential(turned, nn.BatchNorm1d(5))
        nn.init.uniform_(scaled[1].weight)
        save_weights(scaled, path, classes=NAMES)
        load_weights(scaled, path, NAMES[::-1])
    assert same(bits(turned), before)


def test_the_names_are_listed_and_every_one_may_have_a_token():
    names = [n for n in model_names() if n.startswith('vit')]
    assert names == ['vit_tiny_8', 'vit_tiny_32', 'vit_small_32', 'vit_tiny_224', 'vit_small_224']
    for name in ('vit_tiny_8', 'vit_tiny_32'):
        assert not hasattr(build_model(name, 3, 1, 8), 'dist_token')
        assert hasattr(build_model(f'{name}_token', 3, 1, 8), 'dist_token')
    for name in ('vit_tiny_8_tokens', 'vit_tiny_8_token_token', 'resnet8_token', '_token', 'vit_tiny_9'):
        with pytest.raises(ValueError, match=f"There is no model '{name}'; .*vit_small_224, a vit_… with _token"):
            build_model(name, 3)


def test_positions_of_another_size_teach_at_the_door_of_a_teacher():
    "A teacher made for 8 x 8 sees images of 16 x 16 at its own size, or at theirs if it says none."
    model, items = small(), ImageData(data().x.repeat(1, 1, 2, 2), data().y, NAMES)
    own = Teacher(model, NAMES, [0.5] * 3, [0.2] * 3, 8)
    assert predict(own, items).shape == predict(model, items).shape == (40, 5)


# Sentences

@pytest.mark.parametrize('call,said', [
    (lambda: ViT(30, 8), 'size must be a number that patch .8. divides, but is 30'),
    (lambda: ViT(4, 8), 'size must be a number that patch .8. divides, but is 4'),
    (lambda: ViT(32, 8, 100, heads=3), 'width must be a number that heads .3. divides, but is 100'),
    (lambda: ViT(0), 'size'), (lambda: ViT(patch=0), 'patch'), (lambda: ViT(depth=0), 'depth'),
    (lambda: ViT(heads=-1), 'heads'), (lambda: ViT(classes=0), 'classes'), (lambda: ViT(channels=2.5), 'channels'),
    (lambda: ViT(size=True), 'size'), (lambda: ViT(width='x'), 'width'), (lambda: ViT(token='no'), 'token'),
    (lambda: Attention(10, 3), 'width must be a number that heads .3. divides, but is 10'),
    (lambda: vit_tiny_32(size=0), 'size'), (lambda: vit_tiny_32(10, 3, 30), 'size'),
    (lambda: build_model('vit_tiny_32', 10, 3, 30),
     "'vit_tiny_32' cannot take images of 3 x 30 x 30: size must be a number that patch .8. divides"),
    (lambda: build_model('vit_tiny_224_token', 10, 3, 8), "'vit_tiny_224_token' cannot take images of 3 x 8 x 8"),
    (lambda: open_model('vit_tiny_32', classes=5, images=28), "'vit_tiny_32' cannot take images of 3 x 28 x 28"),
    (lambda: small()(torch.zeros(2, 3, 8, 10)), r'the shape of x must be .*3 channels.* 4, but is \(2, 3, 8, 10\)'),
    (lambda: small()(torch.zeros(2, 3, 2, 8)), 'the shape of x must be'),
    (lambda: small()(torch.zeros(2, 3, 0, 8)), 'the shape of x must be'),
    (lambda: small()(torch.zeros(2, 1, 8, 8)), 'the shape of x must be'),
    (lambda: small()(torch.zeros(3, 8, 8)), 'the shape of x must be'),
    (lambda: small().tokens(torch.zeros(2, 48)), 'the shape of x must be'),
    (lambda: small().positions((0, 2)), 'grid must be'), (lambda: small().positions((2,)), 'grid must be'),
    (lambda: with_token(nn.Linear(2, 2)), "model must be a ViT of this package, but is 'Linear'"),
    (lambda: with_token(deit(False)), "model must be a ViT of this package, but is 'VisionTransformer'"),
    (lambda: with_token(headless(small()).model), "the head of model must be a linear layer, .* but is 'Identity'"),
    (lambda: profile_model(ViT(*SMALL), (3, 9, 9)), 'the shape of x must be'),
])
def test_wrong_sizes_are_sentences(call, said):
    with pytest.raises(ValueError, match=said): call()


@pytest.mark.slow
def test_a_step_of_timms_of_the_same_shape_gives_the_same_weights():
    shapes = {vit_tiny_32: (32, 8, 128, 6, 4), vit_tiny_224: (224, 16, 192, 12, 3)}
    for make, (size, patch, width, depth, n) in shapes.items():
        torch.manual_seed(0)
        ours = make(10)
        theirs = VisionTransformer(size, patch, num_classes=10, embed_dim=width, depth=depth, num_heads=n)
        theirs.load_state_dict(ours.state_dict())
        x, y = torch.randn(4, 3, size, size), torch.arange(4)
        for model in (ours, theirs):
            F.cross_entropy(model(x), y).backward()
            torch.optim.SGD(model.parameters(), 0.1).step()
        for k, v in ours.state_dict().items(): assert torch.allclose(v, theirs.state_dict()[k], 1e-4, 1e-5), k
