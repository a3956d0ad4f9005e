"What is before the head: every kind of network loses its head, and what is measured there against brute force."
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distill_nb.cache import CachedTeacher
from distill_nb.contract import Teacher
from distill_nb.embed import Embed
from distill_nb.embeddings import (Embedder, effective_rank, embed, embedding_teacher, head_names, headless,
                                   knn_accuracy, linear_accuracy, nearest, neighbour_agreement, unit_rows)
from distill_nb.exam import check_teacher
from distill_nb.files import save_weights
from distill_nb.inference import open_student
from distill_nb.logits import Distill
from distill_nb.models import digit_student
from distill_nb.students import check_classes
from distill_nb.vit import ViT
from distill_nb.weights import read_checkpoint
from distill_nb.zoo import build_model, model_names, open_model, opened
from networks import bits, same
from small import Texts, images, net


def timm(name, **more):
    import timm
    return timm.create_model(name, **more)


def hf(kind):
    import transformers as tf
    small = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32,
                 patch_size=8)
    if kind == 'vit': return tf.ViTForImageClassification(tf.ViTConfig(**small))
    if kind == 'deit': return tf.DeiTForImageClassificationWithTeacher(tf.DeiTConfig(**small))
    return tf.ResNetForImageClassification(tf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1],
                                                           layer_type='basic'))


def torchvision_vit():
    from torchvision.models import VisionTransformer
    return VisionTransformer(32, 8, 1, 2, 16, 32)


SMALL = dict(img_size=32, depth=1, num_classes=5)
NETS = {'ours': (lambda: digit_student(5, 3), ['fc'], 32),
        'vit': (lambda: ViT(32, 8, 16, 1, 2, 5, 3), ['head'], 16),
        'vit with token': (lambda: ViT(32, 8, 16, 1, 2, 5, 3, token=True), ['head', 'head_dist'], 16),
        'torchvision vit': (torchvision_vit, ['heads.head'], 16),
        'squeezenet': (lambda: build_model('torchvision:squeezenet1_1', 5, 3, 32), ['classifier.1'], 512),
        'timm vit': (lambda: timm('vit_tiny_patch16_224', **SMALL), ['head'], 192),
        'timm deit': (lambda: timm('deit_tiny_distilled_patch16_224', **SMALL), ['head', 'head_dist'], 192),
        'timm mobilenet': (lambda: timm('mobilenetv3_small_050', num_classes=5), ['classifier'], 1024),
        'timm without classes': (lambda: timm('resnet10t', num_classes=0), [], 512),
        'hf vit': (lambda: hf('vit'), ['classifier'], 16), 'hf resnet': (lambda: hf('resnet'), ['classifier.1'], 8),
        'hf deit': (lambda: hf('deit'), ['cls_classifier', 'distillation_classifier'], 16)}


@pytest.mark.parametrize('kind', NETS)
def test_every_network_loses_its_heads_and_is_left_as_it_was(kind):
    make, names, D = NETS[kind]
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(2, 3, 32, 32)
    before = bits(model)
    assert head_names(model) == names
    made = headless(model)
    with torch.no_grad():
        e = made(x)
        assert e.shape == (2, D) and same(bits(model), before) and head_names(made) == []
        assert torch.equal(headless(made)(x), e)
        student = Embed(model, Teacher(made, outputs='embedding'))
        assert torch.equal(student._own(x), e)  # what the heads of the student see, its heads left on
        assert made.train()(x).shape == student.train()._own(x).shape == (2, D)


def test_the_embedding_and_the_head_make_the_logits():
    torch.manual_seed(0)
    model, x = ViT(8, 2, 16, 2, 2, 5, 1, token=True).eval(), torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        one, two = model.tokens(x)[:, 0], model.tokens(x)[:, 1]
        assert torch.allclose(headless(model)(x), (one + two) / 2, atol=1e-6)
        plain = digit_student(5).eval()
        assert torch.allclose(plain.fc(headless(plain)(x)), plain(x), atol=1e-6)


def test_auxiliary_heads_go_too():
    from torchvision.models import googlenet
    model = googlenet(num_classes=5, aux_logits=True, init_weights=False)
    made = headless(model.train())
    assert made.model.aux1 is None and made.model.aux2 is None and model.aux1 is not None
    assert made(torch.randn(2, 3, 64, 64)).shape == (2, 1024)


class Encoder(nn.Module):
    "No head: its last linear layer is inside."
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(4, 4)

    def forward(self, x): return (x + self.mix(x)).mean((1, 2))


def test_networks_without_an_embedding_are_refused_in_a_sentence():
    data = images(12)
    with pytest.raises(ValueError, match=r'Embedder\(model\) takes a network'): embed(nn.Flatten(), data)
    with pytest.raises(ValueError, match='nothing lies before it'): headless(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"the layer 'mix' .* Embedder\(model\) takes"): embed(Encoder(), data)
    assert embed(Embedder(Encoder()), data).shape == (12, 4)
    with pytest.raises(ValueError, match=r'one vector for each image'): embed(Embedder(nn.Conv2d(1, 2, 1)), data)
    with pytest.raises(ValueError, match='embedding_teacher takes a Teacher'): headless(Teacher(net()))
    with pytest.raises(ValueError, match='embedding_teacher takes a Teacher'): Embedder(Teacher(net()))
    spoilt = Embedder(nn.Flatten())
    spoilt.register_forward_hook(lambda module, args, out: out * math.nan)
    with pytest.raises(ValueError, match='not finite'): embed(spoilt, data)


# The contract

def test_a_teacher_of_embeddings_has_no_classes_and_losses_over_logits_refuse_it():
    data, model = images(24), net()
    teacher = embedding_teacher(Teacher(model, data.classes, [0.4], [0.3], (4, 0.5)))
    assert (teacher.mean, teacher.std, teacher.size, teacher.crop) == ([0.4], [0.3], 4, 0.5)
    assert teacher.classes is None and teacher.outputs == 'embedding' and embedding_teacher(teacher) is teacher
    with pytest.raises(ValueError, match='classes must be left out: an embedding has none'):
        Teacher(model, ['a', 'b'], outputs='embedding')
    plain = embedding_teacher(model)
    assert plain.fingerprint() not in {Teacher(model).fingerprint(), Teacher(plain.model).fingerprint()}
    for kept in (plain, CachedTeacher(plain, data)):
        for call in (lambda: Distill(net(), kept).check(data), lambda: check_teacher(kept, data),
                     lambda: check_classes(kept, data, 'the teacher')):
            with pytest.raises(ValueError, match=r'the teacher gives embeddings.*Embed\(student, teacher\)'): call()
    with pytest.raises(ValueError, match=r'outputs of the teacher must be .*embedding_teacher\(teacher\)'):
        Embed(net(), Teacher(model))


def test_what_a_teacher_reads_is_read_without_its_head_too():
    class Dict(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x): return {'out': self.net(x)}
    torch.manual_seed(0)
    model, data = Dict(), images(12)
    teacher = embedding_teacher(Teacher(model, read=lambda found: found['out']))
    assert torch.equal(embed(teacher, data), embed(model.net, data))


def test_embed_asks_in_the_form_of_the_teacher_and_in_eval_mode():
    data, model = images(30), net().train()
    before = bits(model)
    e = embed(model, data, 7)
    with torch.no_grad(): assert torch.allclose(e, headless(model).eval()(data.get(torch.arange(30)).x), atol=1e-6)
    assert same(bits(model), before) and e.device.type == 'cpu' and e.dtype == torch.float32
    raw = embed(Teacher(model, mean=data.mean, std=data.std), data.replace(mean=[0.], std=[1.]))
    assert torch.allclose(raw, e, atol=1e-5)
    assert torch.equal(embed(model, data.unlabelled([])), embed(model, data))
    assert embed(model, data.subset([3])).shape == (1, 8)


def test_kept_embeddings_are_the_live_ones_and_asked_once(tmp_path):
    data, asked = images(40), []
    live = embedding_teacher(net())
    live.model.register_forward_hook(lambda module, args, out: asked.append(len(out)))
    whole = data.get(torch.arange(40), torch.arange(40) % data.n_views)
    expected = live.answers(whole.x)
    for dtype, near in ('float32', 1e-6), ('float16', 1e-3):
        kept = CachedTeacher(live, data, tmp_path/dtype, dtype)
        kept.fill(precision='float32', device='cpu', progress=False)
        asked.clear()
        assert torch.allclose(kept(whole), expected, near, near) and not asked
        again = CachedTeacher(live, data, tmp_path/dtype, dtype)
        asked.clear()
        assert torch.equal(again(whole), kept(whole)) and not asked
    assert '8 numbers as float16' in repr(kept)
    with pytest.raises(ValueError, match='top must be None: an embedding'): CachedTeacher(live, data, top=2)


# Files and names

OURS = [(name, 1, 8) for name in ('digit_student', 'vit_tiny_8', 'vit_tiny_8_token') if name in model_names()]


@pytest.mark.parametrize('name,channels,size', [*OURS, ('timm:resnet10t', 3, 32)])
def test_a_file_without_classes_opens_as_a_teacher_of_embeddings(name, channels, size, tmp_path):
    model = build_model(name, 7, channels, size)
    made, path, x = headless(model).eval(), tmp_path/'e.safetensors', torch.rand(2, channels, size, size)
    with torch.no_grad(): expected = made(x)
    facts = dict(architecture=name, channels=channels, size=size, mean=[0.5]*channels, std=[0.25]*channels,
                 outputs='embedding', width=expected.shape[1], valid_similarity=0.75, valid_items=20)
    save_weights(made.model, path, **facts)
    found = open_model(path)
    assert torch.equal(found.answers(x), expected) and found.outputs == 'embedding' and found.classes is None
    assert (found.mean, found.std, found.size) == ([0.5]*channels, [0.25]*channels, size)
    assert found.reached == {'similarity': 0.75, 'items': 20}
    for call in (lambda: opened(path, classes=['a', 'b']), lambda: opened(path, classes=7), lambda: open_student(path)):
        with pytest.raises(ValueError, match='a network without classes, which gives embeddings'): call()
    state = read_checkpoint(path).tables['']
    assert not any('head' in k or k.startswith('fc.') for k in state)
    wrong = headless(net())
    save_weights(wrong.model, path, **facts)
    with pytest.raises(ValueError, match='e.safetensors'): open_model(path)


def test_a_name_of_timm_whose_weights_have_no_classes_opens_as_a_teacher_of_embeddings(tmp_path, monkeypatch):
    import timm as package
    from huggingface_hub import constants
    from safetensors.torch import save_file
    from dataclasses import replace
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    (tmp_path/'checkpoints').mkdir()
    old, ask = package.create_model('resnet10t', num_classes=0).eval(), package.models.get_pretrained_cfg
    save_file(old.state_dict(), tmp_path/'checkpoints'/'timm--resnet10t.safetensors')
    none = lambda *args, **kwargs: replace(ask(*args, **kwargs), num_classes=0)
    monkeypatch.setattr(package.models, 'get_pretrained_cfg', none)
    found, x = open_model('timm:resnet10t'), torch.randn(2, 3, 64, 64)
    assert found.outputs == 'embedding' and found.classes is None and found.size == 176 and found.mean
    with torch.no_grad(): assert torch.equal(found.answers(x), old(x))
    fresh = opened('timm:resnet10t', classes=['cat', 'dog'])
    assert fresh.new == 'the head (fc)' and fresh.teacher.outputs == 'logits'


# Measures against brute force

def points(n=60, D=5, seed=0, classes=3):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    return torch.randn(n, D, generator=g) + 2*F.one_hot(y, D).float(), y


def cosines(a, b):
    a, b = a.double(), b.double()
    return (a @ b.T) / (a.norm(dim=1)[:, None] * b.norm(dim=1))


def test_neighbours_are_those_of_brute_force():
    (x, _), (z, _) = points(), points(seed=1)
    c = cosines(x, x).fill_diagonal_(-2)
    expected = c.argsort(1, descending=True)[:, :7]
    found = nearest(x, 7)
    assert torch.equal(found, expected) and not (found == torch.arange(60)[:, None]).any()
    assert torch.equal(nearest(x * 1e30, 7), found) and torch.equal(nearest(x * 1e-30, 7), found)
    common = [len({*a} & {*b}) / 7 for a, b in zip(nearest(x, 7).tolist(), nearest(z, 7).tolist())]
    assert neighbour_agreement(x, z, 7) == pytest.approx(sum(common) / 60)
    turn = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(0)))[0]
    assert neighbour_agreement(x, 3 * x @ turn, 7) == 1 and neighbour_agreement(x, z, 59) == 1


def test_knn_is_the_vote_of_brute_force():
    (x, y), (z, right) = points(), points(30, seed=1)
    votes = y[cosines(z, x).argsort(1, descending=True)[:, :5]]
    expected = (votes.mode(1).values == right).double().mean().item()  # of equals the smallest, as in sklearn
    assert knn_accuracy(x, y, z, right, 5) == pytest.approx(expected) and 0.5 < expected < 1
    assert knn_accuracy(x, y, x, y, 1) == 1
    assert knn_accuracy(x * torch.rand(60, 1).add(0.1), y, z, right, 5) == pytest.approx(expected)


def test_the_linear_probe_is_a_regression_whose_strength_is_chosen_on_train_alone():
    import numpy as np
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold
    (x, y), (z, right) = points(), points(30, seed=1)
    a, b = x.double().numpy(), z.double().numpy()

    def scaled(fit, *others):
        mean, std = fit.mean(0), fit.std(0)
        return [(t - mean) / std for t in (fit, *others)]

    def reached(C):
        folds = StratifiedKFold(5).split(a, y)
        return np.mean([LogisticRegression(C=C, max_iter=2000).fit(scaled(a[i], a[j])[0], y[i]).score(
            scaled(a[i], a[j])[1], y[j]) for i, j in folds])
    best = max((0.001, 0.01, 0.1, 1., 10.), key=reached)
    p, q = scaled(a, b)
    expected = LogisticRegression(C=best, max_iter=2000).fit(p, y).score(q, right)
    assert linear_accuracy(x, y, z, right) == pytest.approx(expected)
    assert 0 <= linear_accuracy(x[:3], y[:3], z, right) <= 1  # one of each class: nothing to choose from


@pytest.mark.parametrize('k', [1, 3, 5])
def test_the_rank_of_k_orthogonal_directions_is_k(k):
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))[0]
    x = turn[:k].repeat(4, 1)
    for factor in (1., 1e30, 1e-30): assert effective_rank(factor * x) == pytest.approx(k, rel=1e-5)


def test_the_rank_is_the_formula_and_has_ends():
    x, _ = points()
    s = torch.linalg.svdvals(x.double())
    p = s / s.sum()
    assert effective_rank(x) == pytest.approx(math.exp(-(p * p.log()).sum()))
    assert effective_rank(torch.ones(9, 4)) == pytest.approx(1) and effective_rank(torch.ones(1, 4)) == pytest.approx(1)
    assert effective_rank(torch.zeros(9, 4)) == 0


def test_what_can_not_be_measured_is_a_sentence():
    x, y = points(12)
    bad = x.clone()
    bad[3, 1] = math.nan
    for call in (lambda: nearest(bad, 2), lambda: effective_rank(bad), lambda: unit_rows(bad),
                 lambda: knn_accuracy(bad, y, x, y, 2), lambda: linear_accuracy(bad, y, x, y)):
        with pytest.raises(ValueError, match='must be finite numbers'): call()
    for call, said in ((lambda: nearest(x[:1], 1), 'at least 2'), (lambda: nearest(x, 12), 'from 1 to 11'),
                       (lambda: knn_accuracy(x, y, x, y, 13), 'from 1 to 12'),
                       (lambda: knn_accuracy(x, y[:5], x, y, 2), 'train_y'),
                       (lambda: linear_accuracy(x, y, x, y - 100), 'test_y'),
                       (lambda: linear_accuracy(x, 0 * y, x, y), 'two classes'),
                       (lambda: neighbour_agreement(x, x[:5]), 'the same')):
        with pytest.raises(ValueError, match=said): call()
    assert torch.equal(unit_rows(torch.zeros(2, 3)), torch.zeros(2, 3))
    constant = torch.ones(6, 3)
    assert nearest(constant, 5).sort(1).values.shape == (6, 5) and neighbour_agreement(constant, constant, 5) == 1


def test_texts_have_no_embedding_of_one_vector():
    from small import bigram
    with pytest.raises(ValueError): embed(bigram(), Texts())


def test_a_compiled_and_a_bfloat16_classifier_are_embedded_like_any_other():
    model, data = net().eval(), images(20)
    expected = embed(model, data)
    assert torch.equal(embed(torch.compile(model, backend='eager'), data), expected)
    found = embed(nn.Sequential(*(m.bfloat16() for m in net().eval())), data)
    assert found.dtype == torch.float32 and found.shape == expected.shape
