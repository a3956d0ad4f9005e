"""Cached answers are the teacher's, whatever happens to the file, the process or the order of the questions."""
import copy, json, os, signal, subprocess, time, warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from distill_nb import answers, cache
from distill_nb.files import fingerprint
from distill_nb.losses import collapse, top_k
from distill_nb.successors import dist_loss, dkd_loss
from distill_nb.views import CropFlip, ResizedCrop
from distill_nb.data import ImageData, digits
from distill_nb.folders import image_folder
from distill_nb.models import digit_student
from distill_nb.contract import NotFiniteError, Teacher
from distill_nb.training import Objective, Recipe, Setup, Supervised, fit
from distill_nb.logits import Distill
from distill_nb.answers import _HEAD, _Form, _checksum
from distill_nb.cache import CachedTeacher

from pretended_gpu import pretended
from processes import alone_and_together, python
from tokens import BYTES, LENGTH, Bytes, speaker, text, trained_speaker


@pytest.fixture(scope='module')
def speaker_model(): return trained_speaker()


def make_data(n=60, pad=1, **kw):
    data = digits().train.subset(range(n))
    return data.replace(augment=CropFlip(pad, **kw))


def make_teacher(seed=0):
    torch.manual_seed(seed)
    teacher = digit_student()
    for m in teacher.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
    return teacher


def trained():
    train, valid, _ = digits()
    torch.manual_seed(0)
    teacher = digit_student()
    fit(Supervised(teacher), train, Recipe(epochs=3, batch_size=64, optimizer='adamw', lr=0.03, precision='float32'))
    return teacher, train, valid


def everything(data, size=32):
    "All views of all images, in batches."
    for number in range(data.n_views):
        for index in torch.arange(len(data)).split(size):
            yield data.get(index, data.view_at(index, torch.full_like(index, number)))


def wrong(cached, teacher, data, size=32):
    "The largest error of any answer."
    live = Teacher(teacher)
    return max((cached(b) - live(b)).abs().max().item() for b in everything(data, size))


# --- records

@pytest.mark.parametrize('dtype', ['float16', 'bfloat16', 'float32'])
def test_records_hold_what_the_type_holds(dtype):
    v = 10*torch.randn(50, 7)
    form = _Form(7, dtype)
    records = form.pack(v)
    assert records.dtype == torch.int16 and records.shape == (50, form.words)
    assert torch.equal(form.unpack(records), v.to(getattr(torch, dtype)).float())


@pytest.mark.parametrize('C,k,T', [(4, 1, 1.), (4, 3, 1.), (100, 10, 4.), (40_000, 5, 2.)])
def test_top_logits_keep_their_probabilities_and_the_mass_of_the_rest(C, k, T):
    v = 5*torch.randn(6, C)
    form = _Form(C, 'float32', top=k, temperature=T)
    records = form.pack(form.shorten(v))
    told = form.unpack(records)
    assert records.shape == (6, form.words) and [t.shape for t in told] == [(6, k), (6, k), (6, 1)]
    for row, values, places, tail in zip(v.double().numpy(), *(t.double().numpy() for t in told)):
        p = np.exp(row/T - np.max(row/T)); p /= p.sum()
        merged = np.append(values, tail)/T
        q = np.exp(merged - merged.max()); q /= q.sum()
        best = np.argsort(-row)[:k]
        assert list(places) == list(best)
        np.testing.assert_allclose(q, np.append(p[best], 1 - p[best].sum()), rtol=1e-3, atol=1e-6)


def test_the_words_of_a_record_lie_where_they_always_did():
    v = 5*torch.randn(6, 100)
    values, places = (t.numpy() for t in v.topk(3))
    rest = 4*(v/4).scatter(1, torch.from_numpy(places), -torch.inf).logsumexp(1, keepdim=True).numpy()
    for dtype in ('float16', 'float32'):
        parts = values.astype(dtype), places.astype(np.int16), rest
        form = _Form(100, dtype, top=3)
        expected = np.concatenate([np.ascontiguousarray(t).view(np.int16) for t in parts], 1)
        found = form.pack(form.shorten(v)).numpy()
        assert (found[:, :-2] == expected[:, :-2]).all()
        np.testing.assert_allclose(found[:, -2:].copy().view(np.float32), rest, rtol=1e-6)
        assert (_Form(100, dtype).pack(v).numpy() == v.numpy().astype(dtype).view(np.int16)).all()


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16', 'float32'])
@pytest.mark.parametrize('lead', [(7,), (1,), (3, 2)])
@pytest.mark.parametrize('C,k', [(5, None), (5, 4), (40_000, 3), (70_000, 9), (2**18, 8), (2**18 + 1, 3)])
@pytest.mark.filterwarnings('error')
def test_a_record_holds_all_places_of_an_item(dtype, lead, C, k):
    v, form = 5*torch.randn(4, *lead, C), _Form(C, dtype, top=k, temperature=2., lead=lead)
    answer = form.shorten(v)
    records = form.pack(answer)
    assert records.dtype == torch.int16 and records.shape == (4, form.words)
    told, flat = form.unpack(records), _Form(C, dtype, top=k, temperature=2.)
    if k is None: return torch.testing.assert_close(told, v.to(getattr(torch, dtype)).float(), rtol=0, atol=0)
    assert [t.shape for t in told] == [(4, *lead, k), (4, *lead, k), (4, *lead, 1)]
    assert torch.equal(told.places, answer.places) and torch.equal(told.tail, answer.tail)
    alone = flat.unpack(flat.pack(flat.shorten(v.flatten(0, -2))))  # each place as an item of its own
    for a, b in zip(told, alone): assert torch.equal(a.flatten(0, -2), b)


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16', 'float32'])
@pytest.mark.parametrize('top', [None, 3])
def test_a_single_answer_is_read_back_from_a_table(dtype, top):
    data, teacher = make_data(), make_teacher()
    cached = CachedTeacher(teacher, data, dtype=dtype, top=top)
    first = cached(data.get(torch.arange(1)))
    again = cached(data.get(torch.arange(1)))
    for a, b in zip(answers._tensors(first), answers._tensors(again)): assert torch.equal(a, b)


def test_a_checksum_sees_every_bit_and_the_place():
    records, rows = torch.randint(-2**15, 2**15, (64, 12), dtype=torch.int16), torch.arange(64)
    good = _checksum(records, rows)
    assert good.any(1).all()
    for word in range(12):
        for bit in range(16):
            other = records.clone()
            other[:, word] ^= torch.tensor(1 << bit).short() if bit < 15 else torch.tensor(-2**15).short()
            assert (_checksum(other, rows) != good).any(1).all()
    assert (_checksum(records, rows.flip(0)) != good).any(1).all()
    assert (_checksum(torch.zeros_like(records), rows) != 0).any(1).all()


# --- the same answers as the live teacher

def test_every_view_bit_for_bit_in_the_same_batches():
    data, teacher = make_data(), make_teacher()
    cached = CachedTeacher(teacher, data, dtype='float32')
    assert wrong(cached, teacher, data) == 0 and cached.asked == cached.rows == 540
    assert wrong(cached, teacher, data) == 0 and cached.asked == 540 and cached.answered == 1080


def test_bfloat16_answers_bit_for_bit():
    data, teacher = make_data(), make_teacher()
    cached = CachedTeacher(teacher, data, dtype='bfloat16')
    with torch.autocast('cpu', torch.bfloat16):
        for _ in range(2): assert wrong(cached, teacher, data) == 0
        assert Teacher(teacher)(data.get(torch.arange(3))).dtype == torch.bfloat16
    assert wrong(cached, teacher, data) > 0  # in float32 the teacher says something else, and is asked for it
    assert cached.asked == 2*cached.rows


def test_each_precision_has_its_own_answers(tmp_path):
    data, teacher = make_data(), make_teacher()
    cached = CachedTeacher(teacher, data, tmp_path)
    batch = data.get(torch.arange(60))
    full = cached(batch)
    with torch.autocast('cpu', torch.bfloat16): half = cached(batch)
    assert not torch.equal(full, half) and torch.equal(cached(batch), full) and len(list(tmp_path.iterdir())) == 2


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_order_of_questions(draw):
    data, teacher = make_data(20), make_teacher()
    views = draw.draw(st.integers(1, 9))
    cached, live, first = CachedTeacher(teacher, data.replace(views=views)), Teacher(teacher), {}
    for _ in range(draw.draw(st.integers(1, 5))):
        pairs = draw.draw(st.lists(st.tuples(st.integers(0, 19), st.integers(0, 8)), min_size=1, max_size=30))
        batch = data.get(*(torch.tensor(t) for t in zip(*pairs)))
        told, said = cached(batch), live(batch)
        torch.testing.assert_close(told, said, rtol=2e-3, atol=1e-4)
        inside = data.view_number(batch.index, batch.view) < views
        for pair, answer, kept in zip(pairs, told, inside):  # a kept answer never changes
            if kept: assert torch.equal(first.setdefault(pair, answer), answer)


def test_views_that_are_not_kept_are_answered_live():
    data, teacher = make_data(), make_teacher()
    cached = CachedTeacher(teacher, data.replace(views=2), dtype='float32').fill(precision='float32')
    assert cached.asked == 120
    index = torch.arange(60)
    outside = data.get(index, data.view_at(index, torch.full_like(index, 5)))
    cached._tables[torch.float32].left = 1  # as if one were still missing: then it looks at each
    for _ in range(2): assert torch.equal(cached(outside), Teacher(teacher)(outside))
    assert cached.asked == 240


@pytest.mark.parametrize('top', [None, 8])
def test_masked_classes_are_kept(top, masked):
    data, teacher = make_data(), masked(make_teacher(), 2, 7)
    cached = CachedTeacher(teacher, data, top=top, dtype='float32')
    for _ in range(2):
        for b in everything(data):
            said = Teacher(teacher)(b)
            torch.testing.assert_close(cached(b), said if top is None else top_k(said, top, 4.))
    assert cached.asked == 540


def test_masked_classes_add_nothing_to_the_bucket_of_those_that_are_not_kept(masked):
    data, plain = make_data(), make_teacher()
    cached = CachedTeacher(masked(plain, 2, 7), data, top=3, dtype='float32')
    for b in everything(data):
        logits, said = Teacher(plain)(b), cached(b)
        logits[:, [2, 7]] = -1e9
        rest = (logits / 4).scatter(1, said.places, -torch.inf).logsumexp(1, keepdim=True)
        torch.testing.assert_close(said.tail.view(-1, 1), 4 * rest, rtol=1e-4, atol=1e-4)


def test_logits_beyond_the_type_are_asked_again_and_never_infinite():
    data, teacher = make_data(), make_teacher()
    with torch.no_grad(): teacher.fc.bias[3] = 1e5
    cached = CachedTeacher(teacher, data)
    for asked in (540, 1080):
        assert wrong(cached, teacher, data) < 0.1 and cached.asked == asked


def test_files_on_disk_are_asked_about_too(tmp_path):
    from PIL import Image
    for split in ('train', 'test'):
        for name in ('a', 'b'):
            (tmp_path/split/name).mkdir(parents=True)
            for i in range(12):
                pixels = torch.randint(0, 256, (8, 8), dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(tmp_path/split/name/f'{i}.png')
    data = image_folder(tmp_path, max_bytes=1, workers=0).train.replace(augment=CropFlip(1))
    teacher = digit_student(2)
    for clauses, own in (({}, data), (WIDE, data.replace(**WIDE))):
        cached = CachedTeacher(Teacher(teacher, **clauses), data.replace(views=3), tmp_path/'answers', dtype='float32')
        cached.fill(batch_size=8, precision='float32', setup=Setup(progress=False))
        for batch, theirs in zip(everything(cached.data, 8), everything(own.replace(views=3), 8)):
            torch.testing.assert_close(cached(batch), Teacher(teacher)(theirs), rtol=1e-4, atol=1e-5)
        assert cached.asked == cached.rows


# --- the teacher

def test_the_teacher_stays_hidden_and_nothing_in_it_is_changed():
    teacher, data, valid = trained()
    before = fingerprint(teacher.state_dict())
    cached = CachedTeacher(teacher, data)
    objective = Distill(digit_student(), cached)
    objective.train()
    teacher.train()
    fit(objective, data, Recipe(steps=5, batch_size=20, precision='float32'), valid)
    cached.fill(precision='float32')
    assert fingerprint(teacher.state_dict()) == before and all(m.training for m in teacher.modules())
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())
    assert not list(cached.parameters()) and not cached.state_dict()
    assert not any(k.startswith('teacher') for k in objective.state_dict())


def test_a_teacher_or_a_cached_one_can_be_given_instead_of_the_model():
    data, teacher = make_data(), make_teacher()
    assert CachedTeacher(CachedTeacher(Teacher(teacher), data), data).model is teacher


def test_a_teacher_that_changes_is_asked_again_and_not_mixed_with_what_it_was(tmp_path):
    data, teacher = make_data(), make_teacher()
    cached = CachedTeacher(teacher, data, tmp_path, dtype='float32')
    assert wrong(cached, teacher, data) == 0
    teacher.load_state_dict(make_teacher(1).state_dict())
    assert wrong(cached, teacher, data) == 0 and cached.asked == 1080
    with torch.no_grad(): teacher.fc.bias[0] += 1
    assert wrong(cached, teacher, data) == 0
    old = CachedTeacher(make_teacher(), data, tmp_path, dtype='float32')
    assert wrong(old, make_teacher(), data) == 0 and old.asked == 0


def test_the_same_weights_in_another_structure_are_another_teacher(tmp_path):
    class Scaled(nn.Module):
        def __init__(self, model, k):
            super().__init__()
            self.model, self.k = model, k
        def forward(self, x): return self.model(x)*self.k
    data = make_data()
    def gelu():
        teacher = make_teacher()
        for layer in (teacher.layer1, teacher.layer2): layer[2] = nn.GELU()
        return teacher
    for teacher in (make_teacher(), gelu(), Scaled(make_teacher(), 1.), Scaled(make_teacher(), 2.)):
        assert wrong(CachedTeacher(teacher, data, tmp_path, dtype='float32'), teacher, data) == 0
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize('index', [-1, 60, 1000])
def test_an_index_that_is_none_is_never_kept(index):
    data, teacher = make_data(), make_teacher()
    cached, live = CachedTeacher(teacher, data, dtype='float32'), Teacher(teacher)
    odd = data.get(torch.arange(5))._replace(index=torch.full((5,), index))
    assert torch.equal(cached(odd), live(odd)) and wrong(cached, teacher, data) == 0 and cached.asked == 545
    assert torch.equal(cached(odd), live(odd))
    cached = CachedTeacher(Teacher(teacher, **WIDE), data)
    with torch.no_grad(): said = teacher.eval()(data.recast(odd.x, data.seen(**WIDE)))
    torch.testing.assert_close(cached(odd), said)


def test_a_full_cache_answers_other_views_live_as_well():
    teacher, train, valid = trained()
    cached = CachedTeacher(teacher, train.replace(views=2)).fill(precision='float32')
    batch = train.get(torch.arange(50))
    torch.testing.assert_close(cached(batch), Teacher(teacher)(batch), rtol=2e-3, atol=1e-4)
    recipe = Recipe(steps=3, batch_size=64, augment=False, precision='float32')
    fit(Distill(digit_student(), cached), cached.data, recipe, valid)


def test_answers_that_were_asked_for_in_inference_mode_serve_training():
    data, teacher = make_data(), make_teacher()
    cached = CachedTeacher(teacher, data)
    with torch.inference_mode(): cached(data.get(torch.arange(10)))
    assert wrong(cached, teacher, data) < 0.01
    (cached(data.get(torch.arange(10))) * torch.ones(10, requires_grad=True)).sum().backward()


def test_copies_share_the_file(tmp_path):
    import pickle
    data, teacher = make_data(), make_teacher()
    cached = CachedTeacher(teacher, data, tmp_path, dtype='float32')
    cached(data.get(torch.arange(10)))
    for copied in (copy.deepcopy(cached), pickle.loads(pickle.dumps(cached))):
        copied.fill(precision='float32')
        again = CachedTeacher(teacher, data, tmp_path, dtype='float32')
        assert wrong(again, teacher, data) < 1e-5 and again.asked == 0


def test_an_objective_without_a_check_of_its_own_is_checked_all_the_same():
    teacher, train, valid = trained()
    class Plain(Objective):
        def __init__(self, model, teacher):
            super().__init__(model)
            self.teacher = teacher
        def forward(self, batch): return {'soft': (self.model(batch.x) - self.teacher(batch)).square().mean()}
    objective = Plain(digit_student(), CachedTeacher(teacher, train))
    with pytest.raises(ValueError, match='other items'): fit(objective, valid, Recipe(steps=1, batch_size=10))


# --- whose answers these are

WIDE = dict(size=12, mean=[0.4], std=[0.3])


def in_two_forms(views=2):
    "The same images and views for two students: of another size, and in another normalisation."
    data = make_data().replace(views=views)
    return data.replace(size=16), data.replace(mean=[0.9], std=[3.])


@pytest.mark.parametrize('top', [None, 3])
def test_students_in_any_form_share_the_answers_of_a_teacher_that_names_its_own(tmp_path, top):
    model, (one, two) = make_teacher(), in_two_forms()
    def answers(data, **clauses):
        cached = CachedTeacher(Teacher(model, **clauses), data, tmp_path, dtype='float32', top=top)
        cached.fill(precision='float32')
        live = Teacher(model, **clauses)
        live.check(data)
        for b in everything(data):
            torch.testing.assert_close(cached(b), cached.form.shorten(live(b)), rtol=1e-4, atol=1e-4)
        return cached.asked
    assert (answers(one, **WIDE), answers(two, **WIDE), len(list(tmp_path.iterdir()))) == (120, 0, 1)
    assert (answers(one), answers(two), len(list(tmp_path.iterdir()))) == (120, 120, 3)  # it sees what they see
    part = dict(size=12)  # the size is its own, the normalisation theirs
    assert (answers(one, **part), answers(two, **part), answers(one.replace(size=9), **part)) == (120, 120, 0)


def test_a_run_of_another_student_is_served_by_what_is_in_memory():
    teacher, train, valid = trained()
    contract = Teacher(teacher, mean=train.mean, std=train.std, size=8)
    one, two = train.replace(views=2), train.replace(views=2, mean=[0.9], std=[3.])
    cached = CachedTeacher(contract, one).fill(precision='float32')
    recipe = Recipe(steps=8, batch_size=64, precision='float32')
    for data in (one, two, one.replace(size=16)):
        fit(Distill(digit_student(), cached), data, recipe, valid.replace(mean=data.mean, std=data.std))
        assert cached.asked == cached.rows and cached._data is one  # the run is over
    for other in (two.replace(augment=CropFlip(2)), two.subset(range(100)), train):
        with pytest.raises(ValueError, match='other items|keeps 2 views'): cached.check(other)
    plain = CachedTeacher(teacher, one)
    with pytest.raises(ValueError, match='other items'): plain.check(two)


@pytest.mark.parametrize('full', [False, True])
def test_what_the_student_sees_is_compared_in_its_own_form_and_the_teacher_never_sees_it(full):
    model, (one, two) = make_teacher(), in_two_forms()
    cached = CachedTeacher(Teacher(model, **WIDE), one, dtype='float32')
    if full: cached.fill(precision='float32')
    cached.check(two)
    batch = two.get(torch.arange(20), two.view_at(torch.arange(20), torch.zeros(20).long()))
    foreign = one.get(batch.index, batch.view)  # another form than that of the run
    for changed in (mixed(batch), smaller(batch), swapped(batch), batch._replace(x=foreign.x)):
        with pytest.raises(ValueError, match='gives index -1'): cached(changed)
    near = batch._replace(x=batch.x*(1 + 1e-5))  # as rounding may leave it: the answer is that for the stored pixels
    told = cached(near)
    assert torch.equal(told, cached(batch))
    with torch.no_grad(): said = model.eval()(two.seen(**WIDE).get(batch.index, batch.view).x)
    torch.testing.assert_close(told, said, rtol=1e-4, atol=1e-4)


def test_what_rounding_left_of_an_input_is_not_what_the_teacher_is_asked_about():
    data, teacher = make_data(), make_teacher()
    cached, batch = CachedTeacher(teacher, data, dtype='float32'), data.get(torch.arange(20))
    told = cached(batch._replace(x=batch.x*(1 + 1e-5)))
    assert torch.equal(told, Teacher(teacher)(batch)) and torch.equal(told, cached(batch))


def test_index_minus_one_is_brought_into_the_teachers_form_and_not_kept():
    model, (one, two) = make_teacher(), in_two_forms()
    teacher = Teacher(model, **WIDE)
    cached, live = CachedTeacher(teacher, one, dtype='float32'), Teacher(model, **WIDE)
    for teacher in (cached, live): teacher.check(two)
    batch = two.get(torch.arange(20), two.view_at(torch.arange(20), torch.zeros(20).long()))
    half = mixed(batch)._replace(index=batch.index.where(batch.index % 2 == 0, -1))
    half.x[::2] = batch.x[::2]
    for _ in range(2): torch.testing.assert_close(cached(half), live(half), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cached(declared(batch)), live(declared(batch)), rtol=1e-4, atol=1e-4)
    assert cached._tables[torch.float32].left == cached.rows - 10


@pytest.mark.parametrize('top', [None, 2])
def test_answers_are_kept_in_the_order_of_the_classes_of_the_data(tmp_path, top):
    data, model = make_data(), make_teacher()
    five = ImageData(data.x, data.y % 5, [f'digit {c}' for c in range(5)], mean=data.mean, std=data.std)
    turned = ImageData(data.x, 4 - data.y % 5, five.classes[::-1], mean=data.mean, std=data.std)
    contract = Teacher(model, classes=['cow', *five.classes, 'dog', 'pig', 'hen', 'cat'])
    def answers(data):
        cached, live = CachedTeacher(contract, data, tmp_path, 'float32', top), Teacher(model, contract.classes)
        live.check(data)
        for _ in range(2):
            for b in everything(data):
                torch.testing.assert_close(cached(b), cached.form.shorten(live(b)), rtol=1e-4, atol=1e-4)
        return cached
    kept, other, again = answers(five), answers(turned), answers(five)
    assert (kept.asked, other.asked, again.asked) == (60, 60, 0) and kept.form.classes == 5
    said = kept(five.get(torch.arange(9)))
    if top is None: assert torch.equal(said, other(turned.get(torch.arange(9))).flip(1))
    with pytest.raises(ValueError, match='classes must be.*in this order'): kept.check(turned)


@pytest.mark.parametrize('outputs, form', [('probabilities', lambda z: z.softmax(1)), ('sigmoid', torch.sigmoid)])
def test_the_contract_is_taken_over(outputs, form):
    class Given(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model
        def forward(self, x): return {'answer': form(self.model(x)/20)}
    data, model = make_data(), Given(make_teacher())
    contract = Teacher(model, outputs=outputs, read=lambda out: out['answer'])
    cached = CachedTeacher(contract, data, dtype='float32')
    assert cached.model is model and cached.fingerprint() == contract.fingerprint()
    batch = data.get(torch.arange(20))
    for _ in range(2): assert torch.equal(cached(batch), contract(batch))
    assert CachedTeacher(cached, data).fingerprint() == contract.fingerprint()


def test_a_network_whose_answers_were_kept_can_be_trained_afterwards():
    teacher, train, valid = trained()
    teacher.train()
    before = [(p, p.requires_grad, p.stride()) for p in teacher.parameters()]
    cached = CachedTeacher(teacher, train.replace(views=1)).fill(precision='bfloat16')
    assert [(p, p.requires_grad, p.stride()) for p in teacher.parameters()] == before and teacher.training
    asked = cached.asked
    fit(Supervised(teacher), train, Recipe(steps=2, batch_size=64, precision='float32'))
    cached.fill(precision='bfloat16')
    assert cached.asked == 2*asked  # it is another teacher now


# --- what an objective changes

class Changing(Distill):
    "Hands on what `change` makes of the batch."
    change = staticmethod(lambda batch: batch)
    def forward(self, batch): return super().forward(self.change(batch))


def mixed(batch): return batch._replace(x=(batch.x + batch.x.roll(1, 0))/2)
def smaller(batch): return batch._replace(x=batch.x[..., 1:-1, 1:-1])
def swapped(batch): return batch._replace(index=batch.index.flip(0))
def declared(batch): return mixed(batch)._replace(index=torch.full_like(batch.index, -1))


def changing(teacher, change):
    torch.manual_seed(0)
    objective = Changing(digit_student(), teacher)
    objective.change = change
    return objective


@pytest.mark.parametrize('full', [False, True])
@pytest.mark.parametrize('change', [mixed, smaller, swapped])
def test_an_objective_that_changes_the_images_is_refused_and_leaves_the_answers_alone(full, change, tmp_path):
    teacher, train, valid = trained()
    cached = CachedTeacher(teacher, train.replace(views=1), tmp_path, dtype='float32')
    if full: cached.fill(precision='float32')
    for _ in range(2):  # every run, not only the first
        with pytest.raises(ValueError, match='gives index -1'):
            fit(changing(cached, change), cached.data, Recipe(steps=3, batch_size=64, precision='float32'), valid)
    again = CachedTeacher(teacher, train.replace(views=1), tmp_path, dtype='float32')
    assert wrong(again, teacher, cached.data, 256) < 1e-4 and (again.asked == 0) == full


def test_one_changed_row_among_many_is_counted():
    data, teacher = make_data(), make_teacher()
    cached = CachedTeacher(teacher, data)
    batch = data.get(torch.arange(20))
    batch.x[7] += 0.1
    with pytest.raises(ValueError, match='in 1 of 20 rows'): cached(batch)
    assert cached.asked == 0


def test_a_change_is_found_later_as_well_wherever_the_teacher_is_asked():
    data, teacher = make_data(), make_teacher()
    cached = CachedTeacher(teacher, data)
    for i in range(cache._LOOK + 2): cached(data.get(torch.arange(3*i, 3*i + 3)))
    with pytest.raises(ValueError, match='gives index -1'): cached(mixed(data.get(torch.arange(40, 50))))


def test_index_minus_one_asks_the_live_teacher_and_keeps_nothing(tmp_path):
    teacher, train, valid = trained()
    cached = CachedTeacher(teacher, train.replace(views=1), tmp_path, dtype='float32')
    recipe = Recipe(steps=12, batch_size=64, precision='float32')
    for asked in (12*64, 24*64):
        objectives = [changing(t, declared) for t in (cached, Teacher(teacher))]
        for objective in objectives: fit(objective, cached.data, recipe, valid, device='cpu')
        one, other = (fingerprint(objective.model.state_dict()) for objective in objectives)
        assert one == other and cached.asked == asked
    assert not next(tmp_path.iterdir()).read_bytes()[_HEAD:].strip(b'\0')


def test_half_of_a_batch_may_be_mixed():
    data, teacher = make_data(), make_teacher()
    cached = CachedTeacher(teacher, data, dtype='float32')
    batch, some = data.get(torch.arange(20)), torch.arange(20) % 2 == 0
    x = torch.where(some[:, None, None, None], mixed(batch).x, batch.x)
    half = batch._replace(x=x, index=batch.index.where(~some, -1))
    for _ in range(2): torch.testing.assert_close(cached(half), Teacher(teacher)(half), rtol=1e-4, atol=1e-5)
    assert cached._tables[torch.float32].left == cached.rows - 10 and wrong(cached, teacher, data) < 1e-4


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize('order', [torch.contiguous_format, torch.channels_last])
def test_the_images_may_come_in_any_precision_and_order(dtype, order):
    data, teacher = make_data(), make_teacher()
    cached, batch = CachedTeacher(teacher, data, dtype='float32'), data.get(torch.arange(20))
    teacher.to(dtype).to(memory_format=order)
    batch = batch._replace(x=batch.x.to(dtype).to(memory_format=order))
    said = Teacher(teacher)(batch).float()
    for _ in range(2): assert torch.equal(cached(batch), said)
    assert cached.asked == 20


# --- training

def test_the_fast_loop_takes_the_steps_of_the_naive_one():
    data, teacher = make_data(200), make_teacher()
    recipe = Recipe(steps=20, batch_size=50, optimizer='adam', lr=1e-3, weight_decay=0, schedule='constant', warmup=0,
                    precision='float32')
    torch.manual_seed(1)
    naive = digit_student()
    fast = copy.deepcopy(naive)
    optimizer = torch.optim.Adam(naive.parameters(), lr=1e-3)
    T, a = 3., 0.7
    naive.train()
    teacher.eval()
    for index, view in data.plan(recipe, 0, 20):
        b = data.get(index, view)
        with torch.no_grad(): p = (teacher(b.x)/T).softmax(1)
        z = naive(b.x)
        soft = (p*(p.log() - (z/T).log_softmax(1))).sum(1).mean()
        optimizer.zero_grad()
        ((1 - a)*nn.functional.cross_entropy(z, b.y) + a*T**2*soft).backward()
        optimizer.step()
    cached = CachedTeacher(teacher, data, dtype='float32')
    for _ in range(2):  # the second time from kept answers alone
        objective = Distill(copy.deepcopy(fast), cached, T, a)
        objective.check = lambda *_: None  # the teacher of this test knows nothing
        fit(objective, data, recipe)
        torch.testing.assert_close(objective.model.state_dict(), naive.state_dict(), rtol=1e-4, atol=2e-5)
    assert cached.asked <= cached.rows < cached.answered


def test_a_run_that_is_killed_resumes_with_its_answers_to_the_same_weights(tmp_path):
    teacher, train, valid = trained()
    def go(folder, stop=False, resume=False):
        torch.manual_seed(5)
        objective = Distill(digit_student(), CachedTeacher(teacher, train, folder/'answers'))
        steps = objective.forward
        calls = []
        def forward(batch):
            calls.append(0)
            if stop and len(calls) > 25: raise KeyboardInterrupt
            return steps(batch)
        objective.forward = forward
        recipe = Recipe(epochs=3, batch_size=64, lr=0.05, precision='float32')
        fit(objective, train, recipe, valid, folder=folder/'run', resume=resume, save_every=0)
        return fingerprint(objective.model.state_dict())
    straight = go(tmp_path/'a')
    with pytest.raises(KeyboardInterrupt): go(tmp_path/'b', stop=True)
    assert go(tmp_path/'b', resume=True) == straight


def test_other_images_more_views_and_other_padding_are_refused_before_the_first_step():
    teacher, train, valid = trained()
    cached = CachedTeacher(teacher, train.replace(views=4))
    others = (train.subset(range(100)), train.replace(augment=CropFlip(2)), train.replace(size=12),
              train.replace(mean=[0.5], std=[0.5]))
    for data, said in ((train, 'keeps 4 views'), *((other, 'other items') for other in others)):
        student = digit_student()
        before, objective = fingerprint(student.state_dict()), Distill(student, cached)
        with pytest.raises(ValueError, match=said): fit(objective, data, Recipe(steps=1, batch_size=10), valid)
        assert fingerprint(student.state_dict()) == before
    for data in (cached.data, train.replace(views=2), cached.data.unlabelled(range(20))):
        Distill(digit_student(), cached).check(data, valid)


def test_compile_is_an_option_that_changes_nothing_but_the_speed(monkeypatch):
    teacher, train, valid = trained()
    used, real = [], torch.compile
    def compiled(module): used.append(module); return real(module, backend='eager')
    monkeypatch.setattr(torch, 'compile', compiled)
    def go(**kw):
        torch.manual_seed(0)
        objective = Distill(digit_student(), CachedTeacher(teacher, train))
        fit(objective, train, Recipe(steps=12, batch_size=64, precision='float32'), valid, **kw)
        assert 'forward' not in vars(objective)
        return objective.model.state_dict()
    plain, fast = go(), go(compile=True)
    assert len(used) == 1
    for p, q in zip(plain.values(), fast.values()): torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_compile_without_a_compiler_is_refused_before_the_first_step(monkeypatch):
    import shutil
    monkeypatch.setattr(shutil, 'which', lambda name: None)
    teacher, train, valid = trained()
    objective, recipe = Distill(digit_student(), teacher), Recipe(steps=1, batch_size=10)
    with pytest.raises(ValueError, match='compile'): fit(objective, train, recipe, valid, compile=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_a_step_from_kept_answers_never_waits_for_the_gpu():
    from distill_nb.training import Run, Setup
    teacher, train, valid = trained()
    cached = CachedTeacher(teacher, train.replace(views=1)).fill()
    objective, recipe = Distill(digit_student(), cached), Recipe(steps=90, batch_size=16)  # a row at step 67
    run = Run(objective, cached.data, recipe, setup=Setup(device='cuda', progress=False, save_every=1e9))
    steps = run.steps()
    for _ in range(cache._LOOK + 3): next(steps)
    torch.cuda.set_sync_debug_mode('error')
    try:
        for _ in range(20): next(steps)
    finally: torch.cuda.set_sync_debug_mode('default')


# --- many places of an item

def live_top(model, batch, k, T):
    "Top-k answers as the loss needs them, in float64: k logits, their classes, and the logit of all others."
    v = model(batch.x).double().detach()
    values, places = v.topk(k)
    rest = T*(v/T).exp().scatter(-1, places, 0.).sum(-1, keepdim=True).log()
    return values, places, rest


@pytest.mark.parametrize('top', [None, 1, 4, BYTES - 1])
def test_answers_for_every_token_are_kept_and_read_back(tmp_path, speaker_model, top):
    data, T, student = text(), 2., speaker()
    for asked in (180, 0):
        cached = CachedTeacher(speaker_model, data, tmp_path, 'float32', top, T)
        for _ in range(2):
            for batch in everything(data, 20):
                told, v = cached(batch), speaker_model(batch.x).detach()
                if top is None:
                    torch.testing.assert_close(told, v)
                    continue
                for a, b in zip(told, live_top(speaker_model, batch, top, T)):
                    torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-4, atol=1e-4)
                live = collapse(student(batch.x), top_k(v, top, T), T)
                for a, b in zip(collapse(student(batch.x), told, T), live): torch.testing.assert_close(a, b)
        assert cached.asked == asked and cached.answered == 360
    assert f'60 items x 3 views x {LENGTH} places' in repr(cached)
    assert next(tmp_path.iterdir()).stat().st_size == _HEAD + cached.nbytes == _HEAD + 180*2*(cached.form.words + 2)


def test_a_fill_that_was_interrupted_goes_on_where_it_stopped(tmp_path, speaker_model):
    data = text()
    class Interrupted(Bytes):
        def get(self, index, view=None):
            if view is not None and view[0] == 1 and index[0] >= 40: raise KeyboardInterrupt
            return super().get(index, view)
    kept = [CachedTeacher(speaker_model, d, tmp_path, top=3) for d in (Interrupted(data.lines), data)]
    with pytest.raises(KeyboardInterrupt): kept[0].fill(batch_size=20, precision='float32')
    kept[1].fill(batch_size=20, precision='float32', progress=False)
    assert (kept[0].asked, kept[1].asked) == (100, 80)
    for batch in everything(data, 20):
        for a, b in zip(kept[1](batch), top_k(speaker_model(batch.x), 3, 4.)):
            torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)
    assert kept[1].asked == 80


def test_a_student_of_kept_tokens_takes_the_steps_of_one_with_a_live_teacher(speaker_model):
    data, recipe = text(), Recipe(steps=12, batch_size=20, optimizer='adam', lr=0.03, precision='float32')
    def student(teacher):
        torch.manual_seed(0)
        objective = Distill(speaker(), teacher)
        fit(objective, data, recipe, text(seed=1), device='cpu')
        return torch.cat([p.flatten() for p in objective.model.parameters()]).detach()
    live = student(speaker_model)
    for top in (None, BYTES - 1): torch.testing.assert_close(
        student(CachedTeacher(speaker_model, data, dtype='float32', top=top)), live, rtol=1e-4, atol=1e-5)
    assert (student(CachedTeacher(speaker_model, data, top=1)) - live).abs().max() > 1e-4


def test_one_token_that_does_not_fit_leaves_out_its_item_and_no_other(speaker_model):
    data = text()
    class Loud(nn.Module):
        "Masks a byte after byte 2, and shouts after byte 5."
        def forward(self, x):
            v, after, first = speaker_model(x), x[..., None], torch.arange(BYTES) == 0
            return v.masked_fill((after == 2) & first, -torch.inf).masked_fill((after == 5) & first, 1e5)
    loud = Loud()
    loud.speaker = speaker_model
    cached = CachedTeacher(loud, data)
    shouted = sum((b.x == 5).any(1).sum().item() for b in everything(data))
    assert 0 < shouted < 180
    for asked in (180, 180 + shouted):
        for batch in everything(data, 20):
            torch.testing.assert_close(cached(batch), loud(batch.x), rtol=2e-3, atol=2e-3)
        assert cached.asked == asked


def test_a_changed_text_is_refused(speaker_model):
    data = text()
    cached = CachedTeacher(speaker_model, data, top=2)
    batch = data.get(torch.arange(20), torch.arange(20) % 3)
    other = batch._replace(x=batch.x.clone())
    other.x[4, 2] = (other.x[4, 2] + 1) % BYTES
    for changed, rows in ((other, 1), (batch._replace(x=batch.x[:, 1:]), 20)):
        with pytest.raises(ValueError, match=f'in {rows} of 20 rows'): cached(changed)
    sampled = other._replace(index=torch.full_like(other.index, -1))
    for a, b in zip(cached(sampled), top_k(speaker_model(other.x), 2, 4.)): torch.testing.assert_close(a, b)
    assert cached._tables[torch.float32].left == cached.rows


# --- the file

FILLER = '''
import sys, torch
sys.path.insert(0, {tests!r})
from test_cache import make_data, make_teacher, everything
from distill_nb.cache import CachedTeacher
data, teacher = make_data(), make_teacher()
cached = CachedTeacher(teacher, data, sys.argv[1], dtype='float32')
print('open', flush=True)
for batch in everything(data, int(sys.argv[2])):
    cached(batch)
    if len(sys.argv) > 3: import time; time.sleep(float(sys.argv[3]))
print(cached.asked, flush=True)
'''


def filler(folder, size, *more):
    code = FILLER.format(tests=str(Path(__file__).parent))
    command = [*python(), '-c', code, str(folder), str(size), *map(str, more)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {'OMP_NUM_THREADS': '1'})


def test_another_process_finds_the_answers(tmp_path):
    assert filler(tmp_path, 60).communicate()[0].split() == ['open', '540']
    cached = CachedTeacher(make_teacher(), make_data(), tmp_path, dtype='float32')
    assert wrong(cached, make_teacher(), make_data()) < 1e-5 and cached.asked == 0


def test_what_was_answered_before_a_kill_is_kept_and_right(tmp_path):
    p = filler(tmp_path, 5, 0.003)
    assert p.stdout.readline() == 'open\n'
    time.sleep(0.1)
    p.send_signal(signal.SIGKILL)
    p.communicate()
    cached = CachedTeacher(make_teacher(), make_data(), tmp_path, dtype='float32')
    assert wrong(cached, make_teacher(), make_data(), 5) < 1e-5 and 0 < cached.asked < 540
    again = CachedTeacher(make_teacher(), make_data(), tmp_path, dtype='float32')
    assert wrong(again, make_teacher(), make_data()) < 1e-5 and again.asked == 0


def test_two_processes_that_fill_at_once_lose_nothing(tmp_path):
    fillers = [filler(tmp_path, size, 0.001) for size in (7, 11)]
    asked = [int(p.communicate()[0].split()[1]) for p in fillers]
    assert 540 <= sum(asked) <= 1080
    cached = CachedTeacher(make_teacher(), make_data(), tmp_path, dtype='float32')
    assert wrong(cached, make_teacher(), make_data()) < 1e-5 and cached.asked == 0
    assert len(list(tmp_path.iterdir())) == 1


def test_whoever_makes_the_file_second_uses_that_of_the_first(tmp_path):
    answers._make_file(tmp_path/'x', b'first')
    first = (tmp_path/'x').stat().st_ino
    answers._make_file(tmp_path/'x', b'second')
    assert (tmp_path/'x').stat().st_ino == first and (tmp_path/'x').read_bytes() == b'first'
    assert [p.name for p in tmp_path.iterdir()] == ['x']


def test_one_process_uses_what_another_wrote_meanwhile(tmp_path):
    data, teacher = make_data(), make_teacher()
    early = CachedTeacher(teacher, data, tmp_path)
    early(data.get(torch.arange(10)))
    CachedTeacher(teacher, data, tmp_path).fill(precision='float32')
    assert wrong(early, teacher, data) < 0.01 and early.asked == 10


# --- several processes of one run

TOGETHER = """
from test_cache import *
from distill_nb.ranks import from_each, meet, world
def filled(path, begin, batch_size=7):
    data, teacher, rank = make_data(), make_teacher(), world()[0]
    cached = CachedTeacher(teacher, data, path)
    for first, last in begin[rank:rank + 1]:  # what each process knows already, of the first view
        index = torch.arange(first, last)
        cached(data.get(index, data.view_at(index, 0*index)))
    before = cached.asked
    cached.fill(batch_size, 'float32', progress=False)
    table = cached._tables[torch.float32]
    asked = sum(from_each(cached.asked - before))
    marks = from_each(fingerprint({'known': table.known, 'store': table.store}))
    return [asked, sum(from_each(table.left)), max(from_each(wrong(cached, teacher, data))), sorted(set(marks))]

def run():
    rank, size = meet()
    home = PLACE + str(size)
    wholes = [filled(place, []) for place in (f'{home}/shared', f'{home}/own{rank}', None)]
    parts = [filled(place, [(0, 20), (10, 40)]) for place in (f'{home}/part{rank}', None)]
    try: filled(None, [], 7 + rank)
    except ValueError as error: said = str(error)
    else: said = 'nothing was refused'
    return *wholes, *parts, filled(f'{home}/shared', []), from_each(said)
"""


def test_processes_of_one_run_ask_each_question_once_and_then_all_know_all_answers(tmp_path):
    body = f'PLACE = {str(tmp_path/"answers")!r}\n{TOGETHER}'
    (one, *alone, fine), (two, *together, refused) = alone_and_together(body, tmp_path)
    assert (one, two, fine) == (1, 2, ['nothing was refused'])
    assert all('batch_size must be the same in every rank, but is 7 in rank 0' in said for said in refused)
    assert [r[0] for r in together] == [540, 540, 540, 500, 500, 0]
    for _, left, error, marks in together: assert left == 0 and error < 0.01 and len(marks) == 1
    assert len({str(r[3]) for r in (*alone[:3], *together[:3])}) == 1  # bit for bit what one process keeps


def test_one_process_neither_asks_nor_waits_for_others(monkeypatch):
    def never(*_): raise AssertionError('a collective')
    monkeypatch.setattr(answers, 'gathered', never)
    assert CachedTeacher(make_teacher(), make_data()).fill(precision='float32').asked == 540


# --- where the table is

@pytest.mark.parametrize('top', [None, 3])
def test_a_table_that_would_fill_the_card_stays_with_the_host_and_says_the_same(tmp_path, monkeypatch, top):
    (train, valid, _), teacher = digits(), make_teacher()
    train = train.subset(range(200))
    def student(free):
        torch.manual_seed(0)
        with pretended():
            cached = CachedTeacher(teacher, train.replace(views=2), tmp_path, 'float32', top).fill(precision='float32')
            monkeypatch.setattr(answers, '_free_on', lambda device: free*cached.nbytes)
            cached = CachedTeacher(teacher, cached.data, tmp_path, 'float32', top)
            objective = Distill(digit_student(), cached)
            objective.check = lambda *_: None  # the teacher of this test knows nothing
            fit(objective, cached.data, Recipe(steps=9, batch_size=64, precision='float32'), device='cuda')
            data, index = cached.data.to('cuda'), torch.arange(64, device='cuda')
            cached.check(data)
            batch = data.get(index, data.view_at(index, 0*index))
            for _ in range(cache._LOOK): said = cached(batch)
            other = cached(batch._replace(index=index.where(index > 0, -1)))
            tensors = *answers._tensors(said), *answers._tensors(other)
            assert {t.device.type for t in tensors} == {'cuda'} and cached.asked <= 1
            table = cached._tables[torch.float32]
            where = table.table.device.type, table.known.device.type, table.table is table.store
            return where, [t.cpu() for t in tensors], objective.model.state_dict()
    (near, said, weights), (far, same, others) = student(4), student(3.99)
    assert (near, far) == (('cuda', 'cuda', False), ('cpu', 'cpu', True))
    half = len(said)//2
    for a, b in zip(said[:half], same[:half]): assert torch.equal(a, b)
    assert said[half][0].isnan().all() and same[half].isfinite().all()  # beside the card it sees what is no item
    for a, b in zip(weights.values(), others.values()): assert torch.equal(a, b)


# --- files that are there already

@pytest.fixture
def filled(tmp_path):
    CachedTeacher(make_teacher(), make_data(), tmp_path).fill(precision='float32')
    return next(tmp_path.iterdir())


@pytest.mark.parametrize('left', [_HEAD, _HEAD + 1, _HEAD + 24*100 + 7, _HEAD + 24*540 - 1])
def test_a_file_that_was_cut_short_is_completed(filled, left):
    with open(filled, 'r+b') as f: f.truncate(left)
    cached = CachedTeacher(make_teacher(), make_data(), filled.parent)
    with warnings.catch_warnings(record=True): assert wrong(cached, make_teacher(), make_data()) < 0.01
    assert cached.asked == 540 - (left - _HEAD)//24


@pytest.mark.parametrize('content', [b'', b'{}', b'no json'.ljust(_HEAD), b'[1]'.ljust(_HEAD), b'{"format": 1}',
                                     b'['*_HEAD, b'\xff'*_HEAD, b'{"format": 3}'.ljust(_HEAD)])
def test_a_file_without_its_first_page_is_refused(filled, content):
    filled.write_bytes(content)
    cached = CachedTeacher(make_teacher(), make_data(), filled.parent)
    with pytest.raises(ValueError, match=f'{filled.name}.*(damaged or is no file of answers|made from)'):
        cached(make_data().get(torch.arange(3)))
    assert filled.read_bytes() == content


@pytest.mark.parametrize('key', ['format', 'teacher', 'data', 'items', 'choice of classes', 'precision', 'form'])
@pytest.mark.parametrize('value', [None, 'x'*999, 1e999, [[]], {}, True])
def test_a_first_page_that_was_edited_is_refused_by_name(filled, key, value):
    raw = filled.read_bytes()
    about = json.loads(raw[:_HEAD])
    if about[key] == value: return
    filled.write_bytes(json.dumps(about | {key: value}).encode().ljust(_HEAD) + raw[_HEAD:])
    cached = CachedTeacher(make_teacher(), make_data(), filled.parent)
    with pytest.raises(ValueError, match=f'{filled.name}.*was made from another {key}') as refusal:
        cached(make_data().get(torch.arange(3)))
    assert len(str(refusal.value)) < 900


def test_a_file_that_cannot_be_read_is_not_called_damaged(filled):
    filled.unlink()
    filled.mkdir()
    cached = CachedTeacher(make_teacher(), make_data(), filled.parent)
    with pytest.warns(UserWarning, match=f'cannot be kept in .*{filled.name}.*Is a directory') as said:
        assert wrong(cached, make_teacher(), make_data()) < 0.01
    assert len(said) == 1 and 'damaged' not in str(said[0].message)


def test_damaged_answers_are_never_quoted(filled):
    raw = bytearray(filled.read_bytes())
    rng = np.random.default_rng(0)
    hit = {int(i) for i in rng.integers(0, 540*24, 60)}
    for i in hit: raw[_HEAD + i] ^= 1 << int(rng.integers(8))
    filled.write_bytes(raw)
    with pytest.warns(UserWarning, match='damaged'):
        cached = CachedTeacher(make_teacher(), make_data(), filled.parent)
        assert wrong(cached, make_teacher(), make_data()) < 0.01
    assert cached.asked == len({i//24 for i in hit})
    again = CachedTeacher(make_teacher(), make_data(), filled.parent)
    assert wrong(again, make_teacher(), make_data()) < 0.01 and again.asked == 0


@pytest.mark.parametrize('change,said', [(dict(teacher=1), 'teacher'), (dict(n=50), 'data'), (dict(pad=2), 'data'),
                                         (dict(flip=True), 'data'), (dict(dtype='bfloat16'), 'form'),
                                         (dict(top=3), 'form')])
def test_answers_of_something_else_are_not_found_and_under_another_name_refused(filled, change, said):
    teacher = make_teacher(change.pop('teacher', 0))
    kw = {k: change.pop(k) for k in ('dtype', 'top') if k in change}
    data = make_data(**change)
    cached = CachedTeacher(teacher, data, filled.parent, **kw)
    cached(data.get(torch.arange(5)))
    assert cached.asked == 5
    other = next(f for f in filled.parent.iterdir() if f != filled)
    os.replace(filled, other)
    again = CachedTeacher(teacher, data, other.parent, **kw)
    with pytest.raises(ValueError, match=f'another {said}'): again(data.get(torch.arange(5)))


def test_a_file_grows_with_the_views_and_serves_fewer(tmp_path):
    data, teacher = make_data(), make_teacher()
    two = CachedTeacher(teacher, data.replace(views=2), tmp_path).fill(precision='float32')
    five = CachedTeacher(teacher, data.replace(views=5), tmp_path).fill(precision='float32')
    assert (two.asked, five.asked) == (120, 180) and wrong(two, teacher, two.data) < 0.01
    every = CachedTeacher(teacher, data, tmp_path)
    assert wrong(every, teacher, data) < 0.01 and every.asked == 240


def test_labels_do_not_matter(tmp_path):
    data, teacher = make_data(), make_teacher()
    CachedTeacher(teacher, data, tmp_path).fill(precision='float32')
    cached = CachedTeacher(teacher, data.unlabelled([1, 2, 30]), tmp_path).fill(precision='float32')
    assert cached.asked == 0


@pytest.mark.parametrize('where', ['_reserve', '_make_file'])
def test_a_full_or_read_only_disk_is_said_and_worked_around(tmp_path, monkeypatch, where):
    def full(*_): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(answers, where, full)
    data, teacher = make_data(), make_teacher()
    cached = CachedTeacher(teacher, data, tmp_path/'new')
    with pytest.warns(UserWarning, match='No space left on device.*in memory only'):
        assert wrong(cached, teacher, data) < 0.01
    assert wrong(cached, teacher, data) < 0.01 and cached.asked == 540


def test_a_read_only_file_is_used_and_left_alone(filled, monkeypatch):
    with open(filled, 'r+b') as f: f.truncate(_HEAD + 24*100)
    before = filled.read_bytes()
    def denied(*_): raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr(answers, '_reserve', denied)
    cached = CachedTeacher(make_teacher(), make_data(), filled.parent)
    with pytest.warns(UserWarning, match='Permission denied'): assert wrong(cached, make_teacher(), make_data()) < 0.01
    assert cached.asked == 440 and filled.read_bytes() == before


def test_a_real_disk_without_room_is_found_before_anything_is_mapped(tmp_path, monkeypatch):
    import shutil
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: shutil._ntuple_diskusage(1, 1, 0))
    (tmp_path/'file').write_bytes(b'')
    with pytest.raises(OSError, match='No space'): answers._reserve(tmp_path/'file', 100)


# --- what cannot be

def test_too_many_views_are_refused_with_advice():
    data = make_data().replace(augment=ResizedCrop(8))
    with pytest.raises(ValueError, match=r'limit them with data\.replace\(views=V\)'):
        CachedTeacher(make_teacher(), data)
    cached = CachedTeacher(make_teacher(), data.replace(views=3))
    assert wrong(cached, make_teacher(), cached.data) < 0.01 and cached.asked == 180


def test_top_logits_at_another_temperature_are_refused():
    teacher, train, valid = trained()
    kept = CachedTeacher(teacher, train, top=3, temperature=2.)
    Distill(digit_student(), kept, temperature=2.).check(train, valid)
    with pytest.raises(ValueError, match='temperature must be 2.*temperature=4'):
        Distill(digit_student(), kept, temperature=4.).check(train, valid)
    Distill(digit_student(), kept, temperature=4., alpha=0.).check(train, valid)  # the teacher is not used
    every = CachedTeacher(teacher, train, temperature=2.)
    Distill(digit_student(), every, temperature=4.).check(train, valid)  # all logits serve at any


@pytest.mark.parametrize('kw,said', [(dict(divergence=dkd_loss), 'dkd_loss'),
                                     (dict(divergence=partial(dkd_loss, beta=2.)), 'dkd_loss'),
                                     (dict(divergence=dist_loss), 'dist_loss'),
                                     (dict(standardize=True), 'standardize')])
def test_losses_that_need_every_class_refuse_the_largest_before_the_first_step(kw, said):
    teacher, train, valid = trained()
    kept = CachedTeacher(teacher, train, top=3)
    objective, said = Distill(digit_student(), kept, **kw), f'all classes for {said}'
    with pytest.raises(ValueError, match=said): fit(objective, train, Recipe(steps=1, batch_size=10), valid)
    with pytest.raises(ValueError, match=said): objective(train.get(torch.arange(5)))


def test_a_student_of_the_largest_logits_takes_the_steps_of_one_that_is_told_all_where_that_is_the_same(tmp_path):
    teacher, train, valid = trained()
    def student(teacher):
        torch.manual_seed(0)
        objective = Distill(digit_student(), teacher)
        fit(objective, train, Recipe(steps=12, batch_size=64, lr=0.02, precision='float32'), valid)
        return torch.cat([p.flatten() for p in objective.model.parameters()]).detach()
    nine = CachedTeacher(teacher, train, tmp_path, dtype='float32', top=9)  # one class in the bucket
    live = student(teacher)
    for _ in range(2): torch.testing.assert_close(student(nine), live, rtol=1e-4, atol=1e-5)
    assert nine.asked < 12*64 + 1 and (student(CachedTeacher(teacher, train, top=2)) - live).abs().max() > 1e-4


def test_largest_logits_are_the_same_from_the_table_live_and_from_another_process(tmp_path):
    data, teacher = make_data(), make_teacher()
    cached = CachedTeacher(teacher, data, tmp_path, dtype='float32', top=3, temperature=2.)
    batch = data.get(torch.arange(20))
    batch = batch._replace(index=batch.index.where(batch.index < 15, -1))  # five are asked live
    exact = cached.form.shorten(Teacher(teacher)(batch))
    again = CachedTeacher(teacher, data, tmp_path, dtype='float32', top=3, temperature=2.)
    for answers in (cached(batch), cached(batch), again(batch)):
        for a, b in zip(answers, exact): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert (cached.asked, again.asked) == (25, 5)


@pytest.mark.parametrize('kw,said', [(dict(dtype='int8'), 'dtype'), (dict(top=2.5), 'top'), (dict(top='3'), 'top'),
                                     (dict(top=True), 'top'), (dict(top=10), 'top'), (dict(top=0), 'top'),
                                     (dict(temperature='4'), 'temperature'), (dict(temperature=0.), 'temperature')])
def test_bad_arguments_are_named(kw, said):
    with pytest.raises(ValueError, match=f'{said} must be'): CachedTeacher(make_teacher(), make_data(), **kw)


@pytest.mark.parametrize('path,said', [(3, 'a folder, or None'), ('', 'a folder, or None'), (b'x', 'a folder, or None'),
                                       ('a\0b', 'a folder, or None'), ('x'*300, 'File name too long'),
                                       ('a\ud800b', 'surrogates not allowed')])
def test_a_path_that_can_be_none_is_named(path, said):
    with pytest.raises(ValueError, match='path must be') as refusal: CachedTeacher(make_teacher(), make_data(), path)
    assert said in str(refusal.value)


def test_numbers_of_numpy_are_numbers(tmp_path):
    given = dict(dtype=np.str_('float16'), top=np.int64(3), temperature=np.float32(2))
    for asked in (540, 0):
        cached = CachedTeacher(make_teacher(), make_data(), tmp_path, **given).fill(precision='float32')
        assert cached.asked == asked and cached.exact_at == 2
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize('top', [None, 3])
def test_a_teacher_that_gives_no_numbers_is_named_before_it_is_asked_again(tmp_path, top):
    teacher = make_teacher()
    with torch.no_grad(): teacher.fc.bias[3] = torch.nan
    cached = CachedTeacher(teacher, make_data(), tmp_path, top=top)
    with pytest.raises(NotFiniteError, match='the teacher gives logits that are not finite'):
        cached.fill(batch_size=20, precision='float32')
    assert cached.asked == 20 and not next(tmp_path.iterdir()).read_bytes()[_HEAD:].strip(b'\0')


def test_what_the_type_cannot_hold_is_counted_when_all_is_filled():
    data, teacher = make_data(), make_teacher()
    with torch.no_grad(): teacher.fc.bias[3] = 1e5
    with pytest.warns(UserWarning, match="540 of 540 answers are not kept, since float16.*dtype='float32'"):
        CachedTeacher(teacher, data).fill(precision='float32')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        CachedTeacher(teacher, data, dtype='float32').fill(precision='float32')


@pytest.mark.parametrize('views', [0, 10])
def test_views_that_the_data_do_not_have_are_named(views):
    with pytest.raises(ValueError, match='views'): CachedTeacher(make_teacher(), make_data().replace(views=views))


@pytest.mark.parametrize('kw,said', [(dict(precision='int8'), 'precision'), (dict(batch_size=0), 'batch_size'),
                                     (dict(batch_size=2.5), 'batch_size'), (dict(setup=3), 'setup must be a Setup'),
                                     (dict(devise='cpu'), 'but was given devise'), (dict(device='abacus'), 'device')])
def test_fill_names_bad_arguments(kw, said):
    with pytest.raises(ValueError, match=said): CachedTeacher(make_teacher(), make_data()).fill(**kw)


def test_a_path_that_is_a_file_and_a_teacher_of_other_classes(tmp_path):
    (tmp_path/'file').write_text('mine')
    with pytest.raises(ValueError, match='must be a folder'):
        CachedTeacher(make_teacher(), make_data(), tmp_path/'file')
    with pytest.raises(ValueError, match='class'): CachedTeacher(digit_student(7), make_data())
    assert (tmp_path/'file').read_text() == 'mine'
