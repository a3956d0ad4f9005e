"""Layers of transformers: what taps hear of attention; the losses of MiniLM and TinyBERT against loops of float64."""
import copy, math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distill_nb.files import fingerprint
from distill_nb.data import ImageData
from distill_nb.models import digit_student, digit_teacher
from distill_nb.vit import ViT, with_token
from distill_nb.history import Checkpoint
from distill_nb.training import Recipe, Supervised, fit
from distill_nb.exits import EarlyExits
from distill_nb.taps import attention_names, head_input, patch_map, stage_names, tap
from distill_nb.features import (Adapter, FeatureDistill, Hint, attention_loss, attention_map,
                                 hint_loss, stage_pairs)
from distill_nb.tokens import (FEATURE_WEIGHTS, AttentionMaps, Relations, as_places, attention_map_loss,
                               attention_scores, common_places, feature_method, layer_map, log_relations,
                               relation_loss)

CLASSES = 3
RECIPE = Recipe(steps=4, batch_size=8, optimizer='adamw', lr=0.01, precision='float32')


def refused(said): return pytest.raises(ValueError, match=said)
def hooks(model): return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def draw(seed, *shape, scale=1.):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def images(n=60):
    "Bright, middle and dark noise: easy to tell apart."
    y = torch.arange(n) % CLASSES
    x = torch.randint(0, 60, (n, 1, 8, 8), generator=torch.Generator().manual_seed(0)) + 80 * y.view(-1, 1, 1, 1)
    return ImageData(x.to(torch.uint8), y, ['dark', 'middle', 'bright'])


def vit(width=16, depth=2, heads=2, seed=0, patch=4, **kw):
    torch.manual_seed(seed)
    return ViT(8, patch, width, depth, heads, CLASSES, 1, **kw)


@pytest.fixture(scope='module')
def teacher():
    model = vit(24, 3, 3, seed=1, patch=2)
    fit(Supervised(model), images(), Recipe(steps=60, batch_size=30, optimizer='adamw', lr=3e-3, precision='float32'))
    return model


# --- the networks of four libraries

HF = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16,
          patch_size=8, num_labels=CLASSES)


def hf(kind, **kw):
    transformers = pytest.importorskip('transformers')
    return getattr(transformers, f'{kind}ForImageClassification')(getattr(transformers, f'{kind}Config')(**HF, **kw))


def timm_vit(name='vit_tiny_patch16_224', **kw):
    sizes = dict(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=CLASSES)
    return pytest.importorskip('timm').create_model(name, **sizes, **kw)


def torchvision_vit():
    from torchvision.models import VisionTransformer
    model = VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=CLASSES)
    nn.init.normal_(model.heads.head.weight)
    return model


NETWORKS = {'ours': lambda: ViT(16, 8, 16, 2, 2, CLASSES), 'timm': timm_vit, 'torchvision': torchvision_vit,
            'hf vit': lambda: hf('ViT')}
MORE = {'ours with token': lambda: ViT(16, 8, 16, 2, 2, CLASSES, token=True),
        'timm q_norm': lambda: timm_vit(qk_norm=True), 'timm eva': lambda: timm_vit('eva02_tiny_patch14_224'),
        'timm deit': lambda: timm_vit('deit_tiny_distilled_patch16_224'), 'hf deit': lambda: hf('DeiT'),
        'hf dinov2': lambda: hf('Dinov2'), 'hf beit': lambda: hf('Beit')}


def slow(*values): return [pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=pytest.mark.slow) for v in values]


every_network = pytest.mark.parametrize('name', [*NETWORKS, *slow(*MORE)])


def by_the_formula(attention, qkv):
    "Vaswani et al. 2017, eq. 1, and the projection behind it."
    q, k, v = qkv.double().unbind(1)
    mixed = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
    parts = dict(attention.named_modules())
    last = next(parts[n] for n in ('proj', 'out_proj', 'o_proj', 'output.dense') if n in parts)
    mixed = mixed.transpose(1, 2).flatten(2).float()
    return last(parts['norm'](mixed) if isinstance(parts.get('norm'), nn.LayerNorm) else mixed)


@every_network
def test_what_a_tap_hears_of_attention_is_what_it_uses(name):
    torch.manual_seed(0)
    model, x = (NETWORKS | MORE)[name]().eval(), torch.randn(2, 3, 16, 16)
    asked = attention_names(model)
    assert len(asked) == 2 and asked == [f'{b}.{a.rsplit(".", 1)[-1]}' for b, a in zip(stage_names(model), asked)]
    for grad in (True, False):  # without, torchvision takes a way of its own
        with torch.set_grad_enabled(grad):
            with tap(model, [*asked, *(n.removesuffix(':qkv') for n in asked)]) as seen: tapped = model(x)
            for n in asked:
                given = seen[n.removesuffix(':qkv')]
                given = given[0] if isinstance(given, tuple) else given
                assert seen[n].shape[:3] == (2, 3, 2) and seen[n].shape[4] == 8
                found = by_the_formula(model.get_submodule(n.removesuffix(':qkv')), seen[n])
                torch.testing.assert_close(found, given, rtol=1e-4, atol=1e-5)
    assert hooks(model) == 0 and torch.overrides._len_torch_function_stack() == 0
    plain = model(x)
    for a, b in ((tapped, plain),) if isinstance(plain, torch.Tensor) else ((tapped.logits, plain.logits),):
        torch.testing.assert_close(a, b)


@every_network
@pytest.mark.parametrize('method', FEATURE_WEIGHTS)
def test_every_method_takes_the_blocks_of_every_library(name, method):
    torch.manual_seed(0)
    model = (NETWORKS | MORE)[name]()
    if 'ModelOutput' in {c.__name__ for c in type(model(torch.zeros(1, 3, 16, 16))).__mro__}: model.eval()
    data = ImageData(torch.randint(0, 255, (8, 3, 16, 16)).to(torch.uint8), torch.arange(8) % CLASSES, list('abc'))
    objective = feature_method(method, ViT(16, 4, 12, 3, 3, CLASSES), model, examine=False)
    batch = data.get(torch.arange(4))
    objective.prepare(batch)
    parts = objective(batch)
    parts[method].backward()
    assert parts[method].isfinite() and parts[method] > 0
    assert all(p.grad is None for p in model.parameters()) and hooks(model) == 0
    grads = [p.grad for p in objective.model.parameters() if p.grad is not None]
    assert grads and all(g.isfinite().all() for g in grads)


def test_blocks_that_are_not_understood_are_named():
    timm = pytest.importorskip('timm')
    swin = timm.create_model('swin_tiny_patch4_window7_224', num_classes=2, img_size=32, window_size=1, embed_dim=8,
                             depths=(1, 2), num_heads=(1, 1))
    with refused('the student, a SwinTransformer, has 2 rows of blocks .*such as layers.0.blocks.0, layers.1.blocks.1'):
        feature_method('hint', swin, swin)
    with refused('the teacher, a Sequential, has stages without attention: layer1'):
        layer_map(vit(), digit_teacher(CLASSES))
    with refused('no row of blocks with attention'): attention_names(nn.Sequential(nn.Linear(2, 2)))
    with refused(r"parts that give maps .*'blocks.0' gives \(2, 5, 16\)"): EarlyExits(vit(), shape=(1, 8, 8))


def test_an_attention_that_calls_no_such_function_says_what_to_do():
    for model in (hf('ViT', attn_implementation='eager'), timm_vit()):
        if hasattr(model, 'blocks'): model.blocks[1].attn.fused_attn = False
        with refused("asks a .*Attention what it compares, .*attn_implementation='sdpa'.*fused_attn=True"):
            with tap(model, attention_names(model)[-1]): model(torch.zeros(1, 3, 16, 16))
        assert hooks(model) == 0 and torch.overrides._len_torch_function_stack() == 0


class Stop(BaseException): "As Ctrl-C."


@pytest.mark.parametrize('error', [RuntimeError, Stop])
def test_an_attention_that_is_stopped_leaves_nothing_behind(error):
    model = vit()
    def stop(*_): raise error
    handle = model.blocks[1].attn.proj.register_forward_hook(stop)
    with pytest.raises(error):
        with tap(model, attention_names(model)): model(torch.zeros(1, 1, 8, 8))
    handle.remove()
    assert hooks(model) == 0 and torch.overrides._len_torch_function_stack() == 0


def test_a_failure_that_is_caught_inside_the_block_ends_the_listening_too():
    model = vit()
    with tap(model, attention_names(model)) as seen:
        with pytest.raises(RuntimeError): model.blocks[0].attn(torch.zeros(1, 5, 7))
        assert torch.overrides._len_torch_function_stack() == 0
        model(torch.zeros(1, 1, 8, 8))
    assert len(seen) == 2


def test_attention_over_other_tokens_or_of_fewer_keys_is_refused():
    class Cross(nn.Module):
        def __init__(self, keys):
            super().__init__()
            self.keys, self.w = keys, nn.Linear(1, 1)
        def forward(self, x): return F.scaled_dot_product_attention(x, self.keys, value=self.keys)
    model = nn.Sequential(Cross(torch.zeros(2, 2, 7, 4)))
    with refused(r"what '0:qkv' compares must be .*of one shape"):
        with tap(model, '0:qkv'): model(torch.zeros(2, 2, 5, 4))
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(4, 2)
        def forward(self, x): return self.attn(x, x + 1, x, need_weights=False)[0]
    with refused("the input of 'attn:qkv'"):
        with tap(Two(), 'attn:qkv') as _: pass
        model = Two()
        with tap(model, 'attn:qkv'): model(torch.zeros(5, 2, 4))


@pytest.mark.parametrize('batch_first', [True, False])
def test_the_attention_of_torch_by_keywords_and_with_tokens_first(batch_first):
    torch.manual_seed(0)
    class Self(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(4, 2, batch_first=batch_first)
        def forward(self, x): return self.attn(key=x, query=x, value=x, need_weights=False)[0]
    model, x = Self(), torch.randn(5, 3, 4)
    with tap(model, 'attn:qkv') as seen: output = model(x)
    found = by_the_formula(model.attn, seen['attn:qkv'])
    torch.testing.assert_close(found if batch_first else found.transpose(0, 1), output)


@pytest.mark.slow
def test_gradients_go_through_what_is_heard_and_a_compiled_objective_hears_the_same():
    student, guide = vit(), vit(24, 3, 3, seed=1)
    objective = feature_method('relations', student, guide, examine=False)
    batch = images().get(torch.arange(6))
    objective.prepare(batch)
    parts = objective(batch)
    parts['relations'].backward()
    assert student.blocks[1].attn.qkv.weight.grad.norm() > 0 and student.blocks[1].attn.proj.weight.grad is None
    torch._dynamo.reset()
    fast = torch.compile(objective, backend='eager')(batch)
    for name in parts: torch.testing.assert_close(fast[name], parts[name])


# --- tokens as a map

def test_patches_are_laid_where_they_were_and_others_left_out():
    x = draw(0, 2, 6, 3)
    expected = x[:, 2:].transpose(1, 2).reshape(2, 3, 2, 2)
    assert torch.equal(patch_map(x), expected) and torch.equal(patch_map(x[:, 2:]), expected)
    for n in (4, 5, 6, 9, 10, 11, 13, 14, 196, 197, 198, 201): patch_map(torch.zeros(1, n, 1))
    for n in (7, 12, 15, 199):
        with refused(f'the number of tokens in features must be a square of patches, .*but is {n}'):
            patch_map(torch.zeros(1, n, 1))
    for shape in ((2, 3), (2, 0, 3), (2, 3, 4, 4)):
        with refused(r'\(B, N, D\)'): patch_map(torch.zeros(shape))


def test_a_hint_goes_from_maps_to_tokens_and_back():
    tokens, maps = draw(0, 3, 5, 4).float(), draw(1, 3, 6, 4, 4).float()
    hint = Hint('a', 'b')
    hint.prepare([maps], [tokens])  # a map of 4x4 is averaged to the 2x2 patches
    conv = hint.adapter.conv
    expected = hint_loss(conv(F.avg_pool2d(maps, 2)), tokens[:, 1:].mT.reshape(3, 4, 2, 2), 'mean')
    torch.testing.assert_close(hint([maps], [tokens]), expected)
    back = Hint('a', 'b')
    back.prepare([tokens], [maps])
    up = F.interpolate(tokens[:, 1:].mT.reshape(3, 4, 2, 2), (4, 4), mode='bilinear', align_corners=False)
    torch.testing.assert_close(back([tokens], [maps]), hint_loss(back.adapter.conv(up), maps, 'mean'))
    with refused('made for other features'): back.prepare([tokens[:, :, None].transpose(1, 3)], [maps])


def test_of_equal_numbers_of_tokens_all_count():
    s, t = draw(0, 3, 5, 4).float(), draw(1, 3, 5, 6).float()
    adapter = Adapter(s, t)
    assert adapter.size == (5, 1) and adapter(s).shape == (3, 6, 5, 1)
    changed = s.index_fill(1, torch.tensor(0), 7.)  # the class token
    assert not torch.equal(adapter(changed), adapter(s))
    finer = Adapter(s, draw(1, 3, 17, 6).float())  # patches alone, where there are not as many
    assert finer.size == (4, 4) and torch.equal(finer(changed), finer(s))


def test_attention_transfer_sees_tokens_as_a_map_of_patches():
    tokens, maps = draw(0, 3, 17, 5), draw(1, 3, 6, 2, 2)
    as_map = tokens[:, 1:].transpose(1, 2).reshape(3, 5, 4, 4)
    assert torch.equal(attention_map(tokens), attention_map(as_map))
    for pair, same in (((tokens, maps), (as_map, maps)), ((maps, tokens), (maps, as_map))):
        assert torch.equal(attention_loss(*pair), attention_loss(*same))
    with refused('a square of patches'): attention_map(torch.zeros(2, 7, 3))


def test_places_are_those_of_the_coarser_grid():
    maps, tokens = draw(0, 2, 3, 4, 4), draw(1, 2, 5, 6)
    assert torch.equal(as_places(maps)[1, 5], maps[1, :, 1, 1]) and torch.equal(as_places(tokens), tokens)
    assert as_places(maps[:, :, 0, 0]).shape == (2, 1, 3)
    s, t = common_places(maps, tokens)
    assert torch.equal(t, tokens[:, 1:])
    torch.testing.assert_close(s[0, 1], maps[0, :, :2, 2:].mean((1, 2)))
    assert common_places(tokens, tokens[..., :2])[0].shape == (2, 5, 6)


# --- the equations, one number at a time

def ref_relations(a, b, heads):
    "Wang et al. 2021, section 3.1, for one image: a list of heads, rows, columns."
    N = a.shape[1]
    rows = [torch.cat([x[h, i] for h in range(x.shape[0])]) for x in (a, b) for i in range(N)]
    d = len(rows[0]) // heads
    def row(which, i, h): return rows[which * N + i][h * d:(h + 1) * d]
    found = []
    for h in range(heads):
        scores = [[sum(x * y for x, y in zip(row(0, i, h), row(1, j, h))) / math.sqrt(d) for j in range(N)]
                  for i in range(N)]
        found.append([[torch.exp(z) / sum(torch.exp(w) for w in r) for z in r] for r in scores])
    return found


def ref_relation_loss(student, teacher, heads, student_keys=None, teacher_keys=None):
    "The mean over images, relation heads and tokens of KL(teacher, student)."
    total, n = 0., 0
    for b in range(len(student)):
        q = ref_relations(student[b], (student if student_keys is None else student_keys)[b], heads)
        p = ref_relations(teacher[b], (teacher if teacher_keys is None else teacher_keys)[b], heads)
        for ph, qh in zip(p, q):
            for pr, qr in zip(ph, qh): total, n = total + sum(x * torch.log(x / y) for x, y in zip(pr, qr)), n + 1
    return total / n


def ref_maps(qkv):
    "Vaswani et al. 2017, eq. 1, before the softmax."
    q, k, _ = qkv.unbind(1)
    B, h, N, d = q.shape
    return torch.stack([torch.stack([torch.stack([torch.stack([sum(q[b, i, m] * k[b, i, n]) / math.sqrt(d)
        for n in range(N)]) for m in range(N)]) for i in range(h)]) for b in range(B)])


def same(loss, reference, x):
    "Same value and gradient in float64; float32 within its own error."
    found = []
    for f in (loss, reference):
        y = x.clone().requires_grad_()
        found.append((f(y), torch.autograd.grad(f(y), y)[0]))
    (a, ga), (b, gb) = found
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(ga, gb, rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(loss(x.float()).double(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('s,t,heads', [((2, 4), (2, 3), None), ((2, 3), (3, 4), None), ((4, 3), (2, 6), None),
                                       ((2, 3), (2, 6), 3), ((1, 4), (2, 4), 4)])
def test_the_relation_loss_is_the_papers(s, t, heads):
    a, b, c, d = (draw(i, 2, h, 3, n) for i, (h, n) in enumerate((s, t, s, t)))
    known = heads or math.gcd(s[0], t[0])
    same(lambda x: relation_loss(x, b, heads), lambda x: ref_relation_loss(x, b, known), a)
    same(lambda x: relation_loss(x, b, heads, c.to(x.dtype), d), lambda x: ref_relation_loss(x, b, known, c, d), a)
    torch.testing.assert_close(log_relations(a, heads=known).exp().sum(-1), torch.ones(2, known, 3, dtype=a.dtype))


@pytest.mark.parametrize('heads', [(2, 2), (2, 3)])
def test_the_attention_map_loss_is_the_papers(heads):
    s, t = draw(0, 2, 3, heads[0], 3, 4), draw(1, 2, 3, heads[1], 3, 5)
    torch.testing.assert_close(attention_scores(s), ref_maps(s))
    def reference(x):
        a, b = ref_maps(x), ref_maps(t)
        if heads[0] != heads[1]: a, b = (sum(m.unbind(1)).unsqueeze(1) / m.shape[1] for m in (a, b))
        return ((a - b)**2).sum() / a.numel()
    same(lambda x: attention_map_loss(attention_scores(x), attention_scores(t)), reference, s)


def test_the_terms_add_up_layers_and_what_is_compared():
    s, t = [draw(i, 2, 3, 2, 5, 4) for i in (0, 1)], [draw(i, 2, 3, 4, 5, 3) for i in (2, 3)]
    expected = sum(relation_loss(a[:, i], b[:, i]) for a, b in zip(s, t) for i in range(3))
    torch.testing.assert_close(Relations(['a', 'b'], ['a', 'b'])(s, t), expected)
    first = relation_loss(s[0][:, 0], t[0][:, 0], 2, s[0][:, 1], t[0][:, 1]) + relation_loss(s[0][:, 2], t[0][:, 2])
    torch.testing.assert_close(Relations('a', 'a', ('qk', 'vv'))(s[:1], t[:1]), first)
    maps = [[attention_scores(x) for x in side] for side in (s, t)]
    torch.testing.assert_close(AttentionMaps(['a', 'b'], ['a', 'b'])(s, t), sum(map(attention_map_loss, *maps)))
    weights = [[m.softmax(-1) for m in side] for side in maps]
    of_weights = AttentionMaps(['a', 'b'], ['a', 'b'], softmax=True)
    torch.testing.assert_close(of_weights(s, t), sum(map(attention_map_loss, *weights)))


def test_attentions_over_other_grids_meet_on_the_coarser_one():
    s, t = draw(0, 2, 3, 2, 5, 4), draw(1, 2, 3, 3, 17, 6)
    grid = t[:, :, :, 1:].unflatten(3, (2, 2, 2, 2)).mean((4, 6)).flatten(3, 4)  # 4x4 patches to 2x2
    for make in (Relations, AttentionMaps):
        term = make('a', 'a')
        torch.testing.assert_close(term([s], [t]), term([s[:, :, :, 1:]], [grid]))
        torch.testing.assert_close(term([t], [s]), term([grid], [s[:, :, :, 1:]]))


# --- laws

def rotation(seed, n): return torch.linalg.qr(draw(seed, n, n))[0]


def test_relations_do_not_change_with_a_rotation_of_a_head():
    s, t = draw(0, 2, 4, 5, 6), draw(1, 2, 2, 5, 3)
    turned = torch.stack([s[:, h] @ rotation(h, 6) for h in range(4)], 1)
    torch.testing.assert_close(log_relations(turned), log_relations(s))
    torch.testing.assert_close(relation_loss(turned, t), relation_loss(s, t))
    torch.testing.assert_close(relation_loss(t, turned), relation_loss(t, s))
    assert (log_relations(1.5 * s) - log_relations(s)).abs().max() > 0.01
    place = draw(2, 2, 5, 6)
    term = Relations('a', 'b')
    for other in (place @ rotation(9, 6), 7 * place, torch.cat([place, 0 * place], 2)[..., [*range(12)]]):
        assert term([place @ rotation(9, 6)], [place]) < 1e-9 and term([7 * place], [place]) < 1e-9
    padded = s.new_zeros(2, 4, 5, 8)  # a wider student with the same products, as √d sees them
    padded[..., :6] = s * (8 / 6)**0.25
    assert relation_loss(padded, s) < 1e-9


@pytest.mark.parametrize('kind', ['relations', 'relations v1', 'maps', 'weights', 'hidden'])
def test_a_copy_has_no_loss(kind, teacher):
    student, layers = copy.deepcopy(teacher), attention_names(teacher)
    term = {'relations': lambda: Relations(layers, layers),
            'relations v1': lambda: Relations(layers, layers, ('qk', 'vv')),
            'maps': lambda: AttentionMaps(layers, layers), 'weights': lambda: AttentionMaps(layers, layers, True),
            'hidden': lambda: Hint('blocks.1', 'blocks.1')}[kind]()
    objective, batch = FeatureDistill(student, teacher, {'term': (term, 1.)}), images().get(torch.arange(6))
    objective.prepare(batch)
    if kind == 'hidden':
        conv = objective.terms['term'].adapter.conv
        nn.init.dirac_(conv.weight), nn.init.zeros_(conv.bias)
    loss = objective.eval()(batch)['term']
    assert abs(loss.item()) < 1e-6
    with torch.no_grad(): student.blocks[0].attn.qkv.weight.mul_(1.5)
    assert objective(batch)['term'] > 1e-6


@pytest.mark.parametrize('loss', ['relations', 'scores', 'weights', 'places'])
@pytest.mark.parametrize('case', ['huge', 'tiny', 'zeros', 'alike', 'bfloat16', 'half'])
def test_losses_and_gradients_are_finite(loss, case):
    shape = (3, 5, 6) if loss == 'places' else (3, 3, 2, 5, 4)
    s, t = draw(0, *shape).float(), draw(1, *shape).float()
    if case == 'huge': s, t = 1e30 * s, 1e30 * t
    if case == 'tiny': s, t = 1e-30 * s, 1e-38 * t
    if case == 'zeros': s = 0 * s
    if case == 'alike': s = s[..., :1, :].expand(shape).clone()
    if case == 'bfloat16': s, t = s.bfloat16(), t.bfloat16()
    if case == 'half': s, t = (((30 if loss == 'scores' else 6e4) * torch.tanh(x)).half() for x in (s, t))
    term = AttentionMaps('a', 'a', loss == 'weights') if loss in ('scores', 'weights') else Relations('a', 'a')
    x = s.requires_grad_()
    value = term([x], [t])
    assert value.dtype == torch.float32 and value.isfinite() and value > -1e-6
    grad, = torch.autograd.grad(value, x)
    assert grad.isfinite().all()
    with torch.autocast('cpu', torch.bfloat16): torch.testing.assert_close(term([x], [t]), value)


def test_the_teacher_gets_no_gradient():
    s, t = draw(0, 2, 2, 4, 3).requires_grad_(), draw(1, 2, 2, 4, 3).requires_grad_()
    for loss in (relation_loss(s, t), relation_loss(s, t, 2, s, t), attention_map_loss(s @ s.mT, t @ t.mT)):
        assert torch.autograd.grad(loss, t, allow_unused=True, retain_graph=True)[0] is None
        assert torch.autograd.grad(loss, s)[0].norm() > 0


# --- every pair of networks

CNN = {'cnn': lambda: digit_student(CLASSES), 'big cnn': lambda: digit_teacher(CLASSES)}
PAIRS = [('vit', 'wide vit'), ('vit', 'big cnn'), ('cnn', 'fine vit'),
         *slow(('vit', 'token'), ('token', 'fine vit'), ('fine vit', 'vit'), ('cnn', 'big cnn'))]
KINDS = CNN | {'vit': vit, 'wide vit': lambda: vit(24, 4, 3), 'token': lambda: with_token(vit(seed=2)),
               'fine vit': lambda: vit(20, 3, 4, patch=2)}


@pytest.mark.parametrize('s,t', PAIRS)
@pytest.mark.parametrize('method', FEATURE_WEIGHTS)
def test_every_pair_of_networks_trains(method, s, t):
    torch.manual_seed(0)
    student, teacher = KINDS[s](), KINDS[t]()
    objective = feature_method(method, student, teacher, examine=False)
    data, before = images(), fingerprint(teacher.state_dict())
    fit(objective, data, RECIPE, device='cpu', progress=False)
    batch = data.get(torch.arange(6))
    objective.zero_grad()
    part = objective(batch)[method]
    part.backward()
    assert part.isfinite() and any(p.grad is not None and p.grad.norm() > 0 for p in student.parameters())
    assert fingerprint(teacher.state_dict()) == before and hooks(student) == hooks(teacher) == 0


def test_the_customary_layers():
    student, teacher = vit(depth=2), vit(24, 6, 3)
    assert stage_pairs(student, teacher) == [('blocks.0', 'blocks.2'), ('blocks.1', 'blocks.5')]  # g(m) = 3m
    assert layer_map(student, teacher) == [(f'blocks.{m}.attn:qkv', f'blocks.{3 * m + 2}.attn:qkv') for m in (0, 1)]
    assert stage_pairs(vit(depth=3), digit_teacher()) == [(f'blocks.{m}', f'layer{m + 2}') for m in range(3)]
    term = feature_method('relations', student, teacher).terms['relations']
    assert (term.student_layers, term.teacher_layers) == (('blocks.1.attn:qkv',), ('blocks.5.attn:qkv',))
    term = feature_method('relations', student, digit_teacher()).terms['relations']
    assert (term.student_layers, term.teacher_layers) == (('blocks.0', 'blocks.1'), ('layer2', 'layer4'))
    maps, tokens = draw(0, 2, 3, 4, 4), draw(1, 2, 5, 6)
    expected = Relations('a', 'a')([maps], [tokens])
    assert torch.equal(term([maps, maps[:, :, :1, :1]], [tokens, tokens]), expected)  # one place is no grid
    assert torch.equal(term([-maps.flip(2), maps], [tokens, tokens]), expected)
    assert head_input(student) == 'head:input'
    assert feature_method('relations', student, teacher, weight=0.5).weights == (0.5,)


# --- kill and resume

@pytest.mark.parametrize('kind', ['relations', 'maps', 'hidden'])
def test_a_stopped_run_ends_with_the_weights_of_one_that_was_not(kind, teacher, tmp_path):
    class Halt(Exception): pass
    def make(stop=10**6):
        student = vit()
        pairs = layer_map(student, teacher)
        terms = {'relations': lambda: {'relations': (Relations(*pairs[-1]), 10.)},
                 'maps': lambda: {'maps': (AttentionMaps(*zip(*pairs)), 1.)},
                 'hidden': lambda: {f'hidden{i}': (Hint(*p), 1.) for i, p in enumerate(stage_pairs(student, teacher))}}
        objective = FeatureDistill(student, teacher, terms[kind]())
        class Stops(FeatureDistill):
            def forward(self, batch):
                self.__dict__['calls'] = self.__dict__.get('calls', 0) + 1
                if self.calls > stop: raise Halt
                return super().forward(batch)
        Stops.__name__ = Stops.__qualname__ = 'FeatureDistill'
        objective.__class__ = Stops
        return objective
    whole, data = make(), images()
    recipe = replace(RECIPE, steps=12, batch_size=15)  # 4 in an epoch
    history = fit(whole, data, recipe)
    with pytest.raises(Halt): fit(make(6), data, recipe, folder=tmp_path, save_every=0)
    assert Checkpoint(tmp_path).read()[1]['step'] == 4
    resumed = make()
    again = fit(resumed, data, recipe, folder=tmp_path, resume=True)
    assert resumed.calls < 12 and again.losses == history.losses
    assert fingerprint(resumed.state_dict()) == fingerprint(whole.state_dict())


# --- sentences

def test_everything_that_can_not_be_is_refused_before_the_first_step(teacher):
    def attempt(term, model=None, guide=teacher):
        fit(FeatureDistill(model or vit(), guide, {'term': (term, 1.)}), images(), RECIPE, images())
    attention = 'blocks.1.attn:qkv'
    with refused("the teacher: ViT has no layer 'blocks.9.attn'; the nearest names are blocks"):
        attempt(Relations(attention, 'blocks.9.attn:qkv'))
    for term in (Relations(attention, 'blocks.1'), AttentionMaps('blocks.1', attention)):
        with refused(r"does not fit its layers: what the layer of the .*ends in ':qkv'"): attempt(term)
    with refused("asks a Mlp what it compares"): attempt(Relations('blocks.1.mlp:qkv', attention))
    with refused('number of tokens must be at least 2'): attempt(Relations('head:input', 'head:input'))
    with refused('as many layers'): Relations(['a', 'b'], ['a'])
    with refused('compared must be pairs'): Relations('a', 'a', ('qx',))
    with refused('heads must be'): Relations('a', 'a', heads=0)
    five = Relations(attention, attention, heads=5)
    with refused('heads must be a number that divides the 16 numbers'): attempt(five)
    with refused('with the same images and tokens'): relation_loss(torch.zeros(2, 1, 4, 3), torch.zeros(2, 1, 5, 3))
    with refused('same images and tokens'): attention_map_loss(torch.zeros(2, 1, 4, 4), torch.zeros(3, 1, 4, 4))
    for x in (torch.zeros(2, 3, 4), torch.zeros(2, 2, 1, 4, 3), torch.zeros(0, 3, 1, 4, 3)):
        with refused("'?:qkv'? gives it"): attention_scores(x)
    with refused(r'\(B, heads, N, d\) of real numbers'): log_relations(torch.zeros(2, 4, 3))
    queries, keys = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 5, 4)
    with refused('the shape of keys must be that of queries'): log_relations(queries, keys)


def test_one_image_is_enough():
    objective = feature_method('relations', vit(), vit(24, 3, 3, seed=1), examine=False)
    batch = images().get(torch.arange(1))
    objective.prepare(batch)
    assert objective(batch)['relations'] > 0
