"Text as data: each token once, bits per byte against float64, splits, folders of any kind of file, kept answers."
import copy, functools, math, os, random, subprocess, sys, time
from collections import Counter

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from distill_nb.protocol import Measure
from distill_nb.text import (Document, TextData, TokenRow, _cut, _pieces, by_document, deal, english, nats_of,
                             read_texts, row_of, text_folder, text_splits, without_repeats)
from distill_nb.gpt import GPT
from distill_nb.training import Recipe, Supervised, evaluate, fit
from distill_nb.exam import check_teacher
from distill_nb.logits import Distill
from distill_nb.cache import CachedTeacher
from distill_nb.vocabulary import BPETokenizer, ByteTokenizer, train_bpe

from pretended_gpu import pretended

BYTES = ByteTokenizer()
TALES = [Document('one', 'once upon a time'), Document('two', 'Grüße, 世界!'), Document('three', 'x')]
WORDS = BPETokenizer([(195, 159), (110, 99), (258, 101), (32, 97), (32, 116)])  # ß, nc, nce, and ' a', ' t'
V = len(WORDS)


def data(length=4, views=1, tokenizer=WORDS, documents=TALES):
    return TextData(row_of(documents, tokenizer), tokenizer, length, views)


def texts_of(own):
    "The documents of a data set, back from its tokens."
    ends = own.row.ends.tolist()
    return {n: own.tokenizer.decode(own.tokens[a + 1:b]) for n, a, b in zip(own.row.names, ends, ends[1:])}


class Placed(nn.Module):
    "Logits that depend on every token of the window so far, and on where in the window they are; in float64."
    def __init__(self, V, length=64, seed=0):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.tokens = nn.Parameter(torch.randn(V, V, generator=g, dtype=torch.float64))
        self.places = nn.Parameter(torch.randn(length, V, generator=g, dtype=torch.float64))

    def forward(self, x): return self.tokens[x].cumsum(1) + self.places[:x.shape[1]]


def answers(model, own, batch_size=3):
    for b in own.batches(batch_size): yield model(b.x), b


# Windows

@pytest.mark.parametrize('tokenizer', [BYTES, WORDS], ids=['bytes', 'words'])
@pytest.mark.parametrize('length', [2, 3, 4, 5, 7, 8, 11, 40, 41, 42, 100])
def test_each_token_is_predicted_once_from_those_before_it_in_its_window(length, tokenizer):
    own = data(length, tokenizer=tokenizer)
    t, at = own.tokens.tolist(), 0
    for b in own.batches(2):
        assert b.x.dtype == b.y.dtype == torch.int64 and b.x.shape == b.y.shape == (len(b.index), length)
        assert b.weight is None or b.weight.dtype == torch.float32
        for x, y, w in zip(b.x.tolist(), b.y.tolist(), b.weight.tolist() if b.weight is not None else [[1]*length]*2):
            n = int(sum(w))
            assert w == [1]*n + [0]*(length - n) and x[:n] == t[at:at + n] and y[:n] == t[at + 1:at + n + 1]
            at += n
    assert at == len(t) - 1 and (own.get([0]).weight is None) == ((len(t) - 1) % length == 0)


@pytest.mark.parametrize('length,views', [(2, 2), (3, 2), (4, 4), (5, 3), (8, 8), (7, 5), (8, 3)])
def test_views_begin_later_and_never_cross_the_end(length, views):
    own = data(length, views, BYTES)
    t = own.tokens
    offsets = [own.offset(v) for v in range(views)]
    assert offsets[0] == 0 and sorted({*offsets}) == offsets and max(offsets) < length
    for v in range(views):
        b = own.get(torch.arange(len(own)), torch.full((len(own),), v))
        assert b.weight is None and (b.view == v).all()
        for i in range(len(own)):
            first = i*length + offsets[v]
            assert torch.equal(b.x[i], t[first:first + length].long())
            assert torch.equal(b.y[i], t[first + 1:first + length + 1].long())
    left_out = len(t) - 1 - (len(own)*length + offsets[-1])
    assert 0 <= left_out < length


def test_labels_are_moved_once_on_the_whole_way_to_the_loss():
    "A table that knows the next token of each has no loss with the objective, and all of it with a second shift."
    own = data(8, documents=[Document('a', 'abcdefghijklmnopqrstuvwxyz'*4)], tokenizer=BYTES)
    table = torch.full((257, 257), -30.)
    for a, b in zip(own.tokens[:-1].tolist(), own.tokens[1:].tolist()): table[a, b] = 30.
    table[256] = table[ord('z')] = 0
    model, some = nn.Embedding.from_pretrained(table), own.subset([1, 2, 4])
    batch = next(some.batches(9))
    assert Supervised(model)(batch)['hard'] < 1.5 < Supervised(model)(batch._replace(y=batch.x))['hard']
    assert (model(batch.x).argmax(-1) == batch.y)[batch.x < ord('z')].all()


def test_a_row_is_documents_between_ends():
    row = row_of(TALES, WORDS)
    ends = row.ends.tolist()
    assert (row.tokens == WORDS.end).nonzero()[:, 0].tolist() == ends and row.names == ('one', 'two', 'three')
    for d, a, b, size in zip(TALES, ends, ends[1:], row.sizes.tolist()):
        assert WORDS.decode(row.tokens[a + 1:b]) == d.text and size == len(d.text.encode())


@pytest.mark.parametrize('index,view,said', [
    ([-1], None, 'index must be from 0'), ([99], None, 'index'), ([0], [1], 'view must be from 0 to 0'),
    ([0.5], None, 'index'),
    ([0, 1], [0], 'index and view'), ([[0]], None, 'index and view'), ('a', None, 'index')])
def test_windows_that_are_not_there_are_refused(index, view, said):
    with pytest.raises(ValueError, match=said): data().get(index, view)


@pytest.mark.parametrize('change,said', [
    (dict(length=1), 'length'), (dict(views=5), 'views'),
    (dict(length=40, views=40), r'short enough for the \d+ tokens of the row in 40 views'),
    (dict(row=None), 'row'), (dict(tokenizer=None), 'tokenizer'), (dict(chance=torch.ones(V)), 'chance'),
    (dict(chance=torch.zeros(V)), 'chance'), (dict(chance=torch.full((V - 1,), 1/V)), 'chance'),
    (dict(chance=torch.full((V,), math.nan)), 'chance')])
def test_what_makes_no_data_is_refused(change, said):
    good = dict(row=row_of(TALES, WORDS), tokenizer=WORDS, length=4)
    with pytest.raises(ValueError, match=said): TextData(**(good | change))


@pytest.mark.parametrize('change', [
    dict(tokens=torch.zeros(5)), dict(ends=torch.tensor([0])), dict(sizes=torch.tensor([1, 2])), dict(names=()),
    dict(tokens=torch.tensor([256, 97, 300, 256])), dict(tokens=torch.tensor([256, -1, 97, 256])),
    dict(tokens=torch.zeros(0, dtype=torch.int32)), dict(ends=torch.tensor([[0, 3]]))])
def test_rows_that_hold_no_documents_are_refused(change):
    good = dict(tokens=torch.tensor([256, 97, 98, 256]), ends=torch.tensor([0, 3]), sizes=torch.tensor([2]),
                names=('a',))
    assert len(TextData(TokenRow(**good), BYTES, 2)) == 2
    with pytest.raises(ValueError, match='row must be'): TextData(TokenRow(**(good | change)), BYTES, 2)


# Bits per byte

def costs_by_hand(model, own):
    "The cost in nats of each token after the first, in float64, one at a time."
    t, L, found = own.tokens.long(), own.length, []
    for k in range(1, len(t)):
        first = (k - 1)//L*L
        z = model(t[None, first:k])[0, -1].double()
        found.append((z.logsumexp(0) - z[t[k]]).item())
    return found


@pytest.mark.parametrize('tokenizer', [BYTES, WORDS], ids=['bytes', 'words'])
@pytest.mark.parametrize('length,batch_size', [(2, 1), (3, 5), (5, 2), (7, 100), (64, 1)])
def test_bits_per_byte_are_the_costs_of_all_tokens_over_the_bytes_of_the_texts(tokenizer, length, batch_size):
    own, model = data(length, tokenizer=tokenizer), Placed(len(tokenizer))
    costs, size = costs_by_hand(model, own), sum(len(d.text.encode()) for d in TALES)
    found = own.measure(answers(model, own, batch_size))
    assert found['bits_per_byte'] == pytest.approx(sum(costs)/math.log(2)/size, rel=2e-6)
    assert found['perplexity'] == pytest.approx(math.exp(sum(costs)/len(costs)), rel=1e-5)
    assert list(found) == [m.name for m in own.measures] and own.measures[0] == Measure('bits_per_byte', higher=False)
    assert evaluate(model, own, batch_size) == pytest.approx(found)
    rows = by_document(answers(model, own, batch_size), own)
    assert [r['document'] for r in rows] == ['one', 'two', 'three']
    for r, a, b in zip(rows, own.row.ends.tolist(), own.row.ends.tolist()[1:]):
        assert r['tokens'] == b - a and r['bytes'] == len(TALES[rows.index(r)].text.encode())
        assert r['bits_per_byte'] == pytest.approx(sum(costs[a:b])/math.log(2)/r['bytes'], rel=2e-6)
        assert r['perplexity'] == pytest.approx(math.exp(sum(costs[a:b])/(b - a)), rel=1e-5)


def test_accuracy_is_the_share_of_tokens_that_are_held_for_the_likeliest():
    own, model = data(5), Placed(len(WORDS))
    hits = [(model(b.x).argmax(-1) == b.y)[b.weight > 0] for b in own.batches(2)]
    assert own.measure(answers(model, own))['accuracy'] == pytest.approx(torch.cat(hits).double().mean().item())


@pytest.mark.parametrize('length', [3, 5, 64])
def test_parts_of_a_split_add_up_to_the_whole(length):
    own, model = data(length), Placed(len(WORDS))
    whole, bits, total = own.measure(answers(model, own))['bits_per_byte'], 0., 0.
    for k in range(len(own)):
        some = own.subset([k])
        rows, alone = by_document(answers(model, some), some), some.measure(answers(model, some))
        size = sum(r['tokens']*row_share(own, r['document']) for r in rows)
        assert sum(r['bits_per_byte']*r['tokens']*row_share(own, r['document']) for r in rows)/size == pytest.approx(
            alone['bits_per_byte'])
        bits, total = bits + alone['bits_per_byte']*size, total + size
    assert total == pytest.approx(own.row.sizes.sum().item()) and bits/total == pytest.approx(whole)


def row_share(own, name):
    k = own.row.names.index(name)
    return own.row.sizes[k].item()/(own.row.ends[k + 1] - own.row.ends[k]).item()


@pytest.mark.parametrize('words', [7, 8, 40])
@pytest.mark.parametrize('length', [2, 5, 16])
def test_a_model_that_knows_the_text_costs_the_same_bits_per_byte_in_every_vocabulary(words, length):
    "Words ab and cd by the toss of a coin: one bit in two bytes, whether tokens are bytes, words or two words."
    coin = random.Random(words)
    document = Document('coin', ''.join(coin.choice(['ab', 'cd']) for _ in range(words)))
    pairs = [(97, 98), (99, 100)]                                       # 257, 258
    fours = pairs + [(a, b) for a in (257, 258) for b in (257, 258)]    # 259 to 262
    kinds = ((BYTES, [(97, 99)]), (BPETokenizer(pairs), [(257, 258)]),
             (BPETokenizer(fours), [(257, 258), (259, 260, 261, 262)]))
    perplexities = set()
    for tokenizer, alike in kinds:
        own = data(length, tokenizer=tokenizer, documents=[document])
        may_be = torch.eye(len(tokenizer), dtype=torch.bool)
        for group in alike: may_be[torch.tensor(group)[:, None], torch.tensor(group)] = True
        found = own.measure((torch.where(may_be[b.y], 0., -math.inf), b) for b in own.batches(4))
        assert found['bits_per_byte'] == pytest.approx(0.5)
        perplexities.add(round(found['perplexity'], 6))
    assert len(perplexities) == 3


def test_nats_are_those_of_float32_whatever_comes_in():
    z, y = torch.randn(2, 3, 50) * 20, torch.randint(50, (2, 3))
    for dtype, near in ((torch.float64, 1e-6), (torch.float32, 1e-6), (torch.bfloat16, 1e-6), (torch.float16, 1e-6)):
        given = z.to(dtype)
        exact = given.double().logsumexp(-1) - given.double().gather(-1, y[..., None])[..., 0]
        found = nats_of(given, y)
        assert found.dtype == torch.float32 and (found >= 0).all()
        assert torch.allclose(found.double(), exact, near, 1e-5)
    for logits, labels, said in ((z[0], y, 'logits'), (z, y[:1], 'labels'), (z, y + 50, 'labels'),
                                 (z.long(), y, 'logits')):
        with pytest.raises(ValueError, match=said): nats_of(logits, labels)


def test_a_measure_of_no_answers_is_refused_and_of_infinite_costs_is_infinite():
    own = data()
    with pytest.raises(ValueError, match='answers'): own.measure([])
    wrong = torch.full((V, V), -math.inf).fill_diagonal_(0.).roll(1, 1)
    sure = own.measure((wrong[b.y], b) for b in own.batches(2))
    assert sure['bits_per_byte'] == math.inf and sure['accuracy'] == 0 and sure['perplexity'] == math.exp(700)


# The unigram model, and the exam

def test_the_unigram_model_is_add_one_counts_of_the_training_text():
    train, own = data(5, documents=TALES[:2]), data(5, documents=TALES[1:])
    counts = Counter(train.tokens.tolist())
    total = sum(counts.values()) + len(WORDS)
    assert train.chance.dtype == torch.float64
    assert train.chance.tolist() == pytest.approx([(counts[k] + 1)/total for k in range(len(WORDS))])
    valid = TextData(own.row, WORDS, 5, chance=train.chance)
    bits = sum(-math.log2((counts[t] + 1)/total) for t in valid.tokens.tolist()[1:])
    expected = bits/sum(len(d.text.encode()) for d in TALES[1:])
    assert valid.guess() == {'bits_per_byte': pytest.approx(expected)}
    z = train.chance.log()
    by_logits = valid.measure((z.expand(*b.y.shape, -1), b) for b in valid.batches(2))
    assert by_logits['bits_per_byte'] == pytest.approx(expected, rel=1e-6)
    for some in (valid.subset([1, 2]), valid.part(0.5), TextData(own.row, WORDS, 5, chance=train.chance.float())):
        by_logits = some.measure((z.expand(*b.y.shape, -1), b) for b in some.batches(2))
        assert some.guess()['bits_per_byte'] == pytest.approx(by_logits['bits_per_byte'], rel=1e-5)


@functools.cache
def reference(): return english(tokenizer=400, length=32)


def bigrams(own, weight=20):
    "The next token from the present one, by counting."
    V, t = len(own.tokenizer), own.tokens.long()
    counts = torch.zeros(V, V).index_put_((t[:-1], t[1:]), torch.tensor(1.), accumulate=True)
    return nn.Embedding.from_pretrained((counts + weight*own.chance.float()).log())


def test_a_teacher_must_beat_the_unigram_model():
    train, valid = reference()[:2]
    torch.manual_seed(0)
    untrained, V = GPT(400, 32, 32, 1, 2), len(train.classes)
    unigrams = nn.Embedding.from_pretrained(train.chance.log().float().expand(V, -1).clone())
    moved = nn.Embedding.from_pretrained(bigrams(train).weight.roll(1, 1))  # the right answers, one place further
    for bad in (untrained, unigrams, moved):
        with pytest.raises(ValueError, match='no better than what a guesser reaches'): check_teacher(bad, valid)
    good = bigrams(train)
    assert check_teacher(good, valid) < valid.guess()['bits_per_byte'] - 0.5


def test_a_small_gpt_passes_the_exam_once_it_has_learned_something():
    train, valid = reference()[:2]
    torch.manual_seed(0)
    model = GPT(400, 32, 32, 1, 2)
    recipe = Recipe(steps=200, batch_size=16, optimizer='adamw', lr=2e-2, warmup=0.1, precision='float32')
    fit(Supervised(model), train, recipe, progress=False, device='cpu')
    assert check_teacher(model, valid) < valid.guess()['bits_per_byte']
    objective = Distill(GPT(400, 32, 32, 1, 2), model, temperature=1.)
    objective.check(train, valid)


@pytest.mark.parametrize('broken', [math.nan, math.inf])
def test_a_teacher_whose_answers_are_not_finite_is_refused(broken):
    train, valid = reference()[:2]
    teacher = bigrams(train)
    with torch.no_grad(): teacher.weight[:, 5] = broken
    with pytest.raises(ValueError): check_teacher(teacher, valid)


# Views, kept answers, fingerprints

def test_views_of_a_run_are_a_function_of_seed_epoch_and_window():
    own = data(4, 4, BYTES)
    index = torch.arange(len(own))
    for epoch in range(3):
        view = own.view_of(0, epoch, index)
        assert view.min() >= 0 and view.max() < 4 and torch.equal(view[2:5], own.view_of(0, epoch, index[2:5]))
    assert not torch.equal(own.view_of(0, 0, index), own.view_of(0, 1, index))
    views = torch.stack([own.view_of(0, e, index) for e in range(40)])
    assert all(len({*column}) == 4 for column in views.T.tolist())
    assert torch.equal(own.view_number(index, own.view_at(index, views[0])), views[0])


@pytest.mark.parametrize('top', [None, 8])
def test_kept_answers_are_live_ones_by_window_and_offset(top):
    own = data(8, 4, WORDS, TALES * 1)
    torch.manual_seed(0)
    teacher = GPT(len(WORDS), 8, 16, 1, 2).eval()
    kept = CachedTeacher(teacher, own, dtype='float32', top=top, temperature=1.)
    everything = [(torch.arange(len(own)), torch.full((len(own),), v)) for v in range(4)]
    for _ in range(2):
        for index, view in everything:
            batch = own.get(index, view)
            live, found = kept.live()(batch), kept(batch)
            if top is None: assert torch.equal(found, live)
            else:
                values, places = live.topk(8)
                assert torch.equal(found.values.sort(descending=True).values, values)
                assert torch.equal(found.places.sort().values, places.sort().values)
                rest = live.scatter(-1, places, -math.inf).logsumexp(-1)
                assert torch.allclose(found.tail.reshape(rest.shape), rest, atol=1e-3)
    assert kept._count == {'asked': 4*len(own), 'answered': 8*len(own)}


def test_a_run_with_kept_answers_gives_the_weights_of_a_run_that_asks():
    own, found = data(8, 4, WORDS, TALES * 1), []
    torch.manual_seed(0)
    teacher = GPT(len(WORDS), 8, 16, 1, 2).eval()
    for make in (lambda: teacher, lambda: CachedTeacher(teacher, own, dtype='float32')):
        torch.manual_seed(1)
        student = GPT(len(WORDS), 8, 8, 1, 2)
        recipe = Recipe(steps=6, batch_size=2, lr=0.1, precision='float32')
        fit(Distill(student, make(), 1., examine=False), own, recipe, progress=False, device='cpu')
        found.append(student.state_dict())
    for k, v in found[0].items(): assert torch.allclose(v, found[1][k], atol=1e-6), k


def test_fingerprints_differ_by_all_that_decides_a_batch():
    row = row_of(TALES, WORDS)
    base, made = TextData(row, WORDS, 4), []
    changed = row.tokens.clone()
    changed[3] += 1
    made += [TextData(row._replace(tokens=changed), WORDS, 4), TextData(row, WORDS, 5), TextData(row, WORDS, 4, 2),
             TextData(row, WORDS, 4, 3),
             base.part(0.5), base.subset([1, 0]), base.subset([0, 1]),
             base.subset([0]), TextData(row_of(TALES[::-1], WORDS), WORDS, 4),
             TextData(row, BPETokenizer([*WORDS.state()['merges'], [97, 97]]), 4)]
    for labels in (True, False):
        prints = [d.fingerprint(labels) for d in (base, *made)]
        assert len({*prints}) == len(prints) and all(len(p) == 16 for p in prints)
    other = TextData(row._replace(sizes=row.sizes + 1), WORDS, 4)
    assert other.fingerprint() != base.fingerprint() and other.fingerprint(False) == base.fingerprint(False)
    same = [TextData(row, WORDS, 4, name='x', chance=torch.full((V,), 1/V)), base.to('cpu'), copy.deepcopy(base),
            base.subset(range(len(base))), base.subset(torch.ones(len(base), dtype=torch.bool)), base.part(1),
            TextData(row._replace(tokens=row.tokens.long()), WORDS, 4)]
    assert {d.fingerprint() for d in same} == {base.fingerprint()}


def test_the_reference_is_the_same_in_every_process():
    code = ('from distill_nb.text import english; s = english(tokenizer=400, length=32); '
            'print(*(d.fingerprint() for d in s))')
    env = os.environ | {'PYTHONHASHSEED': '5'}
    ran = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env)
    assert ran.stdout.split() == [d.fingerprint() for d in reference()], ran.stderr


@pytest.mark.parametrize('index', [[2, 0], torch.tensor([2, 0]), [i in (0, 2) for i in range(8)]])
def test_a_subset_is_windows_in_the_order_that_is_given(index):
    own = data()
    some, wanted = own.subset(index), [2, 0] if len(index) == 2 else [0, 2]
    for k, i in enumerate(wanted):
        a, b = some.get([k]), own.get([i])
        assert torch.equal(a.x, b.x) and torch.equal(a.y, b.y) and a.index.item() == k
    assert len(some) == 2 and some.tokenizer is own.tokenizer and some.chance is own.chance and len(own) == 8
    again = some.subset([1])
    assert torch.equal(again.get([0]).x, own.get([wanted[1]]).x)


@pytest.mark.parametrize('index', [[], [8], [-1], [0.5], [True, False], 'ab', [[0, 1]],
                                   torch.tensor([], dtype=torch.long)])
def test_subsets_of_windows_that_are_not_there_are_refused(index):
    with pytest.raises(ValueError, match='index'): data().subset(index)


def test_a_part_is_the_first_windows_and_at_least_one():
    own = data()
    assert [len(own.part(s)) for s in (1, 0.5, 1e-9)] == [8, 4, 1]
    for share in (0, 1.1, math.nan, -1):
        with pytest.raises(ValueError, match='share'): own.part(share)


def test_a_batch_that_is_measured_holds_a_bounded_number_of_logits():
    own = data(4, tokenizer=BYTES, documents=[Document('long', 'x'*5000)])
    assert max(len(b.index) for b in own.batches(512)) == 512
    own.classes = range(2**20)
    assert {len(b.index) for b in own.batches(512)} <= {4, len(own) % 4}


# Devices

def test_everything_happens_where_the_data_are():
    own, several, placed = data(5), data(4, 2), Placed(len(WORDS)).float()
    expected, guess, rows = evaluate(placed, own), own.guess(), by_document(answers(placed, own), own)
    with pretended():
        there, model = own.to('cuda'), copy.deepcopy(placed).to('cuda')
        assert there.device.type == 'cuda' and all(t.is_cuda for t in (*there.row[:3], there.tokens, there.starts))
        assert all(t.is_cuda for t in there.get([0, 1]) if t is not None)
        assert all(t.is_cuda for t in several.to('cuda').get([0], [1]) if t is not None)
        assert there.measure(answers(model, there)) == pytest.approx(expected)
        assert evaluate(model, there) == pytest.approx(expected) == evaluate(model, own)
        assert there.guess() == pytest.approx(guess) and by_document(answers(model, there), there) == rows
        assert there.fingerprint() == own.fingerprint()
        assert not there.subset([1, 2]).part(0.5).to('cpu').get([0]).x.is_cuda
        assert own.device.type == 'cpu' and TextData(there.row, WORDS, 5).get([0]).x.is_cuda
        student = GPT(len(WORDS), 8, 8, 1, 2)
        recipe = Recipe(steps=2, batch_size=2, lr=0.1, precision='float32')
        fit(Supervised(student), several, recipe, own, progress=False)
    with pytest.raises(ValueError, match='device must be one'): own.to('nowhere')


# Documents

PARAGRAPH = 'This is a paragraph that is longer than forty letters.'


@pytest.mark.parametrize('texts,expected,repeated', [
    (['a\n\nb', 'a\n\nc'], ['a\n\nb', 'a\n\nc'], 0),                                # short ones may return
    ([PARAGRAPH, f'b\n\n{PARAGRAPH}\n\nc'], [PARAGRAPH, 'b\n\nc'], 1),
    ([f'{PARAGRAPH}\n\n{PARAGRAPH}'], [PARAGRAPH], 1),
    ([f'a\n\n{PARAGRAPH}', f'b\n  \n\t\n{PARAGRAPH.replace(" ", "  ")}'], [f'a\n\n{PARAGRAPH}', 'b\n\n'], 1),
    (['a\n\nb', 'a \n\n\n b\n', 'a'], ['a\n\nb'], 0),                              # a text of which all stood before
    ([PARAGRAPH, PARAGRAPH], [PARAGRAPH], 0),
    ([PARAGRAPH, f'{PARAGRAPH}\n\n{PARAGRAPH}'], [PARAGRAPH], 2)])
def test_what_stood_before_is_taken_out(texts, expected, repeated):
    kept, n = without_repeats([Document(str(i), t) for i, t in enumerate(texts)])
    assert [d.text.rstrip('\n \t') for d in kept] == [e.rstrip('\n') for e in expected] and n == repeated


def test_the_reference_repeats_nothing_long_and_its_vocabulary_is_of_the_training_text():
    train, valid, test = reference()
    texts = [[*texts_of(d).values()] for d in (train, valid, test)]
    def paragraphs(texts): return {' '.join(p.split()) for t in texts for p in t.split('\n\n')}
    known, new = paragraphs(texts[0]), paragraphs(texts[1] + texts[2])
    assert max(map(len, known & new)) < 40
    assert train_bpe(texts[0], 400).fingerprint() == train.tokenizer.fingerprint()
    assert valid.chance is train.chance is test.chance and (train.n_views, valid.n_views, test.n_views) == (4, 1, 1)
    names = [{*d.row.names} for d in (train, valid, test)]
    assert not (names[0] & names[1] or names[0] & names[2] or names[1] & names[2])
    sizes = [d.row.sizes.sum().item() for d in (train, valid, test)]
    assert all(0.08 < s/sum(sizes) < 0.12 for s in sizes[1:])


def test_other_seeds_deal_otherwise_and_an_added_document_moves_no_other():
    documents = [Document(f'{i}', f'text {i} ' * 10) for i in range(40)]
    parts = deal(documents)
    assert sorted(d.name for p in parts for d in p) == sorted(d.name for d in documents)
    assert [d.name for d in deal(documents, 1)[1]] != [d.name for d in parts[1]] and deal(documents[::-1]) == parts
    more = deal(documents + [Document('new', 'text ' * 10)])
    moved = {d.name for d in parts[2]} ^ {d.name for d in more[2]}
    assert len(moved) <= 2


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=40), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_texts_of_any_lengths_give_three_splits(lengths, seed):
    documents = [Document(f'{i}', ('word ' * (n//5 + 1))[:n]) for i, n in enumerate(lengths)]
    total = sum(lengths)
    if total < 100: return
    parts = deal(_cut(documents), seed)
    sizes = [sum(len(d.text) for d in p) for p in parts]
    assert sum(sizes) == total and min(sizes) > 0 and max(sizes[1:]) <= 0.11*total + 1e-6 and sizes[0] >= 0.7*total
    joined = Counter()
    for p in parts:
        for d in p: joined[d.name.split(',')[0]] += len(d.text)
    assert joined == Counter({f'{i}': n for i, n in enumerate(lengths)})


@given(st.text('ab \n', max_size=200), st.integers(1, 30))
@settings(max_examples=100, deadline=None)
def test_pieces_are_the_text(text, least):
    pieces = [*_pieces(text, least)]
    assert ''.join(pieces) == text and all(pieces) and all(len(p) <= 2.5*least + 2 for p in pieces)
    assert all(len(p) >= least for p in pieces[:-1])


@pytest.mark.parametrize('documents,said', [
    ([], 'documents'), (['a'], 'documents'), ([Document('a', 'x'), Document('a', 'y')], 'different names'),
    ([Document('a', 'xy')], 'too few'), (Document('a', 'x'), 'documents')])
def test_documents_that_make_no_splits_are_refused(documents, said):
    with pytest.raises(ValueError, match=said): text_splits(documents)


@pytest.mark.parametrize('tokenizer', [256, 2**16 + 1, 'bytes', None, 300.5])
def test_a_vocabulary_is_one_or_a_size(tokenizer):
    with pytest.raises(ValueError, match='tokenizer must be'): text_splits([Document('a', 'word ' * 100)], tokenizer)


def test_a_vocabulary_that_is_given_is_taken():
    documents = [Document(f'{i}', f'text {i} ' * 20) for i in range(12)]
    splits = text_splits(documents, BYTES, length=8)
    assert [list(d.row.names) for d in splits] == [[d.name for d in part] for part in deal(documents)]
    assert splits.train.tokenizer is BYTES and len(splits.valid.classes) == 257
    assert repr(splits.valid).startswith("TextData('text, valid', ")


# Folders

def write(root, **files):
    for name, content in files.items():
        path = root/name.replace('__', '/').replace('_', '.')
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def dozen(root): return write(root, **{f'{i}_txt': f'Text {i} of a dozen. ' * 20 for i in range(12)})


def names(found): return [d.name for d in found.documents]


def test_a_folder_of_texts_is_read_with_what_lies_below_it(tmp_path):
    write(tmp_path, a_txt='one', b__c_MD='two', b__d__e_rst='three', _hidden_txt='no', picture_png=b'\x89PNG')
    found = read_texts(tmp_path)
    assert sorted(names(found)) == ['a.txt', 'b/c.MD', 'b/d/e.rst']
    assert found.said == ['Texts: 3, with 11 bytes.', 'Left out: 1 with other endings.',
                          'Cut into 7 pieces, to be dealt out.']
    one = read_texts(tmp_path/'a.txt')
    assert one.documents == [Document('a.txt', 'one')] == read_texts(str(tmp_path/'a.txt')).documents


@pytest.mark.parametrize('content,text', [
    ('one\r\ntwo\rthree\n', 'one\ntwo\nthree\n'), ('\ufeffone', 'one'), ('one'.encode('utf-16'), 'one'),
    ('Ünï'.encode('utf-16-le'), None),
    (b'\xfe\xff' + '世界'.encode('utf-16-be'), '世界'), (b'\xff\xfe\0\0' + 'one'.encode('utf-32-le'), 'one'),
    ('世界 الكتاب 🌍 e\u0301', '世界 الكتاب 🌍 e\u0301'), ('Grüße'.encode('latin1'), None), (b'MZ\0\0\x01', None),
    (b'a' * 5000 + b'\0', None), (b'\xff\xfea', None), (b'\xed\xa0\x80', None)])
def test_encodings(tmp_path, content, text):
    write(tmp_path, a_txt=content, b_txt='more')
    if text is not None:
        assert read_texts(tmp_path).documents[0] == Document('a.txt', text)
        return
    with pytest.raises(ValueError, match="the file 'a.txt' must be text in UTF-8"): read_texts(tmp_path)
    found = read_texts(tmp_path, skip_damaged=True)
    assert names(found) == ['b.txt'] and found.said[1] == 'Left out: 1 no text in UTF-8.'


@pytest.mark.parametrize('files,said', [
    ({}, 'with texts .* of which there are none among its 0 files'), ({'a_png': b''}, 'with .* none among its 1 files'),
    ({'a_txt': ''}, 'in which some text'), ({'a_txt': ' \n\t\n', 'b_txt': ''}, 'in which some text is not empty')])
def test_folders_without_text_are_refused(tmp_path, files, said):
    write(tmp_path, **files)
    for read in (read_texts, text_folder):
        with pytest.raises(ValueError, match=f'path must be a folder {said}'): read(tmp_path)


@pytest.mark.parametrize('path', ['nowhere', '', '\0', 'a' * 5000, '~nobody/texts', 'ünïcode \ud800'])
def test_paths_that_lead_nowhere_are_refused(path):
    with pytest.raises(ValueError, match='path must be a folder with texts'): read_texts(path)


def test_what_is_empty_or_repeated_is_left_out_and_said(tmp_path):
    write(tmp_path, a_txt=PARAGRAPH, b_txt=PARAGRAPH, c_txt=f'new\n\n{PARAGRAPH}', d_txt='', e_txt='short\n\nlines',
          f_txt='short\n\nlines\n')
    found = read_texts(tmp_path)
    assert names(found) == ['a.txt', 'c.txt', 'e.txt']
    assert found.said[1:3] == ['Left out: 1 empty, 2 with nothing new.',
                               'Paragraphs left out because they stood before: 1.']


def test_one_line_of_a_gigabyte_is_refused_by_its_size_at_once(tmp_path):
    dozen(tmp_path)
    with open(tmp_path/'huge.txt', 'wb') as f: f.truncate(2**30)
    start = time.process_time()
    with pytest.raises(ValueError, match=r"at most max_bytes=67,108,864.*the largest: 'huge.txt', 1,073,741,824"):
        text_folder(tmp_path)
    assert time.process_time() - start < 0.1
    with pytest.raises(ValueError, match='max_bytes=100'): read_texts(tmp_path, max_bytes=100)
    for most in (0, -1, 0.5):
        with pytest.raises(ValueError, match='max_bytes'): read_texts(tmp_path, max_bytes=most)


def test_links_are_followed_once_and_circles_end(tmp_path):
    write(tmp_path, texts__a_txt='one', far__b_txt='two')
    (tmp_path/'texts/up').symlink_to(tmp_path/'texts')
    (tmp_path/'texts/far').symlink_to(tmp_path/'far')
    (tmp_path/'texts/again').symlink_to(tmp_path/'far')
    (tmp_path/'texts/self').symlink_to('self')
    found = read_texts(tmp_path/'texts')
    assert sorted(names(found)) == ['a.txt', 'again/b.txt'] and '2 links to the same' in found.said[1]
    (tmp_path/'texts/gone.txt').symlink_to('nowhere')
    with pytest.raises(ValueError, match="the file 'gone.txt' cannot be read"): read_texts(tmp_path/'texts')
    (tmp_path/'texts/gone.txt').unlink()
    (tmp_path/'texts/loop.txt').symlink_to('loop.txt')
    with pytest.raises(ValueError, match="the file 'loop.txt' cannot be read"): read_texts(tmp_path/'texts')
    assert len(read_texts(tmp_path/'texts', skip_damaged=True).documents) == 2


def test_a_pipe_is_no_text(tmp_path):
    dozen(tmp_path)
    os.mkfifo(tmp_path/'pipe.txt')
    found = read_texts(tmp_path)
    assert len(found.documents) == 12 and found.said[1] == 'Left out: 1 no file.'


def test_what_cannot_be_opened_is_named(tmp_path, monkeypatch):
    dozen(tmp_path)
    def closed(self): raise PermissionError(13, 'Permission denied', str(self))
    with monkeypatch.context() as m:
        m.setattr('pathlib.Path.read_bytes', closed)
        with pytest.raises(ValueError, match="the file '0.txt' cannot be read: Permission denied"): read_texts(tmp_path)
    (tmp_path/'shut').mkdir()
    look = os.scandir
    def scandir(path):
        if str(path).endswith('shut'): closed(path)
        return look(path)
    monkeypatch.setattr('os.scandir', scandir)
    with pytest.raises(ValueError, match="'.*shut' cannot"): read_texts(tmp_path)
    assert '1 closed' in read_texts(tmp_path, skip_damaged=True).said[1]


@pytest.mark.skipif(sys.platform == 'darwin', reason='names of files are always UTF-8 there')
def test_names_that_are_no_utf8_can_be_read_and_dealt_out(tmp_path):
    dozen(tmp_path)
    with open(os.fsencode(tmp_path) + b'/gr\xfc\xdfe.txt', 'w') as f: f.write('Text of another kind. ' * 20)
    assert r'gr\xfc\xdfe.txt' in names(read_texts(tmp_path))
    splits = text_folder(tmp_path, tokenizer=300, length=8)
    assert r'gr\xfc\xdfe.txt' in sum((d.row.names for d in splits), ())
    with open(os.fsencode(tmp_path) + b'/\xff.txt', 'wb') as f: f.write(b'\xff')
    with pytest.raises(ValueError, match=r'\\\\xff.txt'): read_texts(tmp_path)


def test_names_are_the_same_on_every_system(tmp_path):
    write(tmp_path, b__a_txt='x')
    (tmp_path/'u\u0308.txt').write_text('y')
    assert sorted(names(read_texts(tmp_path))) == ['b/a.txt', 'ü.txt']


# What a folder may look like

def book(paragraphs=60, seed=0):
    draw = random.Random(seed)
    words = ['the', 'of', 'ship', 'whale', 'sea', 'captain', 'and', 'sail', 'wind', 'white']
    return '\n\n'.join(' '.join(draw.choices(words, k=40)) + f' {i}.' for i in range(paragraphs))


KINDS = 'one book', 'three texts', 'one dominates', 'no spaces', 'chinese', 'crlf', 'two alike'


@pytest.mark.parametrize('kind', KINDS)
def test_folders_of_every_kind_become_three_splits(tmp_path, kind):
    files = {'one book': {'book_txt': book()}, 'three texts': {f'{i}_txt': book(20, i) for i in range(3)},
             'one dominates': {'book_txt': book(90)} | {f'{i}_txt': book(1, i + 1) for i in range(10)},
             'no spaces': {'a_txt': ''.join(random.Random(0).choices('abcd', k=20_000))},
             'chinese': {'a_txt': ''.join(chr(0x4e00 + i*i % 97) for i in range(3000))},
             'crlf': {'a_txt': book().replace('\n', '\r\n')}, 'two alike': {'a_txt': book(), 'b_txt': book()}}[kind]
    write(tmp_path, **files)
    found, splits = read_texts(tmp_path), text_folder(tmp_path, tokenizer=300, length=16)
    assert any('pieces' in line for line in found.said)
    size = sum(len(d.text.encode()) for d in found.documents)
    assert sum(d.row.sizes.sum().item() for d in splits) == size
    assert all(0.03 < d.row.sizes.sum().item()/size <= 0.12 for d in splits[1:])
    assert len({n for d in splits for n in d.row.names}) == sum(len(d.row.names) for d in splits)
    for d in splits: assert d.guess()['bits_per_byte'] < 8 and len(d) > 0
    if kind in ('one book', 'crlf', 'two alike'):
        whole = sum((d.row.names for d in splits), ())
        assert len(whole) > 20 and not any('\r' in d.tokenizer.decode(d.tokens) for d in splits)
        assert all(t.endswith(('.\n\n', '.')) for d in splits for t in texts_of(d).values())


def test_a_text_shorter_than_a_window_says_so(tmp_path):
    write(tmp_path, a_txt='word ' * 40)
    said = r'length must be short enough for the \d+ tokens of .*, train in 4 views, but is 512'
    with pytest.raises(ValueError, match=said):
        text_folder(tmp_path, tokenizer=257, length=512)
    (short := text_folder(tmp_path, tokenizer=257, length=64)).valid.guess()
    assert len(short.valid) == 1 and short.valid.get([0]).weight.sum() == len(short.valid.tokens) - 1


def test_many_small_files_are_dealt_out_in_a_moment():
    documents = [Document(f'{i}', f'text {i}') for i in range(20_000)]
    start = time.process_time()
    parts = deal(_cut(documents + [Document('book', 'x' * 2_000_000)]))
    assert time.process_time() - start < 2 and min(map(len, parts)) > 0


def test_what_reading_takes_is_passed_on(tmp_path):
    dozen(tmp_path)
    write(tmp_path, bad_txt=b'\xff')
    assert len(text_folder(tmp_path, 300, 16, skip_damaged=True).train.row.names) == 10
    with pytest.raises(TypeError, match='skip'): text_folder(tmp_path, 300, 16, skip=True)
    with pytest.raises(ValueError, match="'bad.txt'"): text_folder(tmp_path, 300, 16)


def test_a_python_without_the_reference_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, 'pydoc_data.topics', None)
    with pytest.raises(ValueError, match='text_folder'): english()


def test_windows_are_made_quickly():
    own = TextData(row_of([Document('a', 'some text ' * 100_000)], BYTES), BYTES, 128, 4)
    index = torch.arange(64)
    start = time.process_time()
    for k in range(100): own.get(index + k, index % 4)
    assert time.process_time() - start < 1  # 100 batches of 8,192 tokens
