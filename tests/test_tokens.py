"""Text instead of images: a data set of bytes and a tiny language model, without a change to the library."""
import hashlib, math, os, random, signal, subprocess, time
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distill_nb.files import fingerprint
from distill_nb.losses import collapse, top_k
from distill_nb.protocol import Batch, Data, Measure
from distill_nb.history import Checkpoint
from distill_nb.training import Recipe, Setup, Supervised, evaluate, fit, predict
from distill_nb.compare import Contender, choose, compare
from distill_nb.exam import check_teacher
from distill_nb.logits import Distill
from distill_nb.cache import CachedTeacher
from processes import python

RECIPE = Recipe(steps=40, batch_size=16, optimizer='adamw', lr=1e-2, weight_decay=0.01, accumulate=4,
                precision='bfloat16')
SETUP = Setup(device='cpu', progress=False)


class Bytes(Data):
    "Windows of a text: x are bytes, y the next ones; what lies behind the end of the text has weight 0."
    measures, n_views = (Measure('bits_per_byte', higher=False),), 3  # a view is a window that begins a bit later
    classes = [str(b) for b in range(256)]

    def __init__(self, text, length=24, starts=None):
        self.text = text if isinstance(text, torch.Tensor) else torch.tensor(list(text))
        self.length, self.starts = length, torch.arange(0, len(self.text), length) if starts is None else starts

    device = property(lambda self: self.text.device)
    def __len__(self): return len(self.starts)
    def to(self, device): return type(self)(self.text.to(device), self.length, self.starts.to(device))
    def subset(self, indices): return type(self)(self.text, self.length, self.starts[indices])

    def get(self, index, view=None):
        view = torch.zeros_like(index) if view is None else view
        place = (self.starts[index] + 5 * view)[:, None] + torch.arange(self.length + 1, device=self.device)
        there, b = place[:, 1:] < len(self.text), self.text[place.clamp(max=len(self.text) - 1)]
        return Batch(b[:, :-1], b[:, 1:], index, view, there.float())

    def measure(self, answers):
        bits = n = 0
        for logits, b in answers:
            each = F.cross_entropy(logits.flatten(0, 1), b.y.flatten(), reduction='none').view_as(b.weight)
            bits, n = bits + (each * b.weight).sum().item() / math.log(2), n + b.weight.sum().item()
        return {'bits_per_byte': bits / n}

    def fingerprint(self, labels=True):
        return hashlib.sha256(repr((self.text.tolist(), self.starts.tolist(), self.length)).encode()).hexdigest()[:16]


class TinyLM(nn.Module):
    "Bytes (B, L) to logits for the next byte (B, L, 256), from the four bytes before it."
    def __init__(self, width=16, dropout=0.):
        super().__init__()
        self.embed, self.mix = nn.Embedding(256, width), nn.Conv1d(width, 2*width, 4)
        self.drop, self.head = nn.Dropout(dropout), nn.Linear(2*width, 256)

    def forward(self, x):
        h = F.pad(self.embed(x).mT, (3, 0))                          # (B, L) -> (B, width, L + 3)
        return self.head(self.drop(F.relu(self.mix(h)).mT))          # -> (B, L, 256)


def text(n=6000, skip=0):
    "The Python language reference, which comes with Python."
    from pydoc_data.topics import topics
    return ' '.join(topics.values()).encode()[skip:skip + n]


def splits(): return Bytes(text()), Bytes(text(1000, 6000)), Bytes(text(1003, 7000))


@pytest.fixture(scope='module')
def teacher():
    torch.manual_seed(1)
    model = TinyLM(64)
    fit(Supervised(model), splits()[0], replace(RECIPE, steps=200, accumulate=1), setup=SETUP)
    return model


def weights(module): return fingerprint(module.state_dict())


def test_it_learns_in_bfloat16_with_accumulation_and_is_measured_in_bits_per_byte():
    train, valid, test = splits()
    torch.manual_seed(0)
    model = TinyLM()
    before = evaluate(model, valid).bits_per_byte
    h = fit(Supervised(model), train, RECIPE, valid, setup=SETUP)
    assert h.measure.name == 'bits_per_byte' and h.last['bits_per_byte'] < before - 3
    assert h.last['bits_per_byte'] == pytest.approx(evaluate(model, valid).bits_per_byte, rel=1e-2)
    assert predict(model, test).shape == (len(test), 24, 256)
    assert 'bits per byte' in h.plot().axes[1].get_ylabel()


def test_pieces_with_unequal_padding_make_the_step_of_the_batch():
    data = Bytes(text(500)[:490], 40)  # the last windows reach beyond the end, in some views wholly
    def once(**changes):
        torch.manual_seed(0)
        model = TinyLM()
        recipe = replace(RECIPE, steps=6, optimizer='sgd', precision='float32', **changes)
        fit(Supervised(model), data, recipe, setup=SETUP)
        return torch.cat([p.detach().flatten() for p in model.parameters()])
    whole = once(accumulate=1)
    for pieces in (2, 8): torch.testing.assert_close(once(accumulate=pieces), whole, rtol=1e-5, atol=1e-6)


def test_padding_changes_nothing(teacher):
    "The same windows, behind each of which stands nothing."
    class Padded(Bytes):
        def get(self, index, view=None):
            b = super().get(index, view)
            more = b.weight.new_zeros(len(index), 7)
            padded = F.pad(b.x, (0, 7)), F.pad(b.y, (0, 7), value=255), torch.cat([b.weight, more], 1)
            return b._replace(**dict(zip(('x', 'y', 'weight'), padded)))
    def once(data):
        torch.manual_seed(0)
        model = TinyLM()
        recipe = replace(RECIPE, steps=6, optimizer='sgd', precision='float32')
        fit(Distill(model, teacher, temperature=2., alpha=0.5), data, recipe, splits()[1], setup=SETUP)
        return torch.cat([p.detach().flatten() for p in model.parameters()])
    train = splits()[0]
    torch.testing.assert_close(once(Padded(train.text)), once(train), rtol=1e-5, atol=1e-6)


def test_a_teacher_that_knows_no_more_than_the_bytes_shares_is_refused(teacher):
    train, valid, _ = splits()
    assert check_teacher(teacher, valid) == pytest.approx(evaluate(teacher, valid).bits_per_byte, rel=0.3)
    class Unigram(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer('log_share', (train.text.bincount(minlength=256) + 0.1).log())
        def forward(self, x): return self.log_share.expand(*x.shape, 256)
    for guesser in (Unigram(), TinyLM()):
        with pytest.raises(ValueError, match='no better than chance'): check_teacher(guesser, valid)


def test_the_teachers_largest_answers_are_kept_by_window(teacher, tmp_path):
    train, valid, _ = splits()
    cached = CachedTeacher(teacher, train, tmp_path, top=8, temperature=1., dtype='float32')
    torch.manual_seed(0)
    objective = Distill(TinyLM(), cached, temperature=1., alpha=0.9)
    fit(objective, train, replace(RECIPE, precision='float32'), valid, setup=SETUP)
    assert 0 < cached.asked < len(train) * train.n_views and cached.answered > cached.asked
    batch = train.get(torch.arange(20), torch.arange(20) % 3)
    kept, z = cached(batch), objective.model(batch.x)
    assert kept.values.shape == kept.places.shape == (20, 24, 8) and kept.tail.shape == (20, 24, 1)
    with torch.no_grad(): live = top_k(teacher(batch.x), 8, 1.)
    pairs = zip(collapse(z, kept, 1.), collapse(z, live, 1.))
    for a, b in pairs: torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    again = CachedTeacher(teacher, train, tmp_path, top=8, temperature=1., dtype='float32')
    again.fill(precision='float32', setup=SETUP)
    assert cached.asked + again.asked == len(train) * train.n_views


def test_what_is_not_there_is_kept_once_whatever_the_teacher_says_of_it(teacher):
    class Spoilt(nn.Module):
        def forward(self, x):
            z = teacher(x).clone()
            return z.index_fill(1, torch.tensor(23), math.nan)
    class Short(Bytes):
        def get(self, index, view=None):
            b = super().get(index, view)
            return b._replace(weight=b.weight.index_fill(1, torch.tensor(23), 0.))
    train = Short(text(600))
    cached = CachedTeacher(Spoilt(), train)
    assert [cached.fill(precision='float32', setup=SETUP).asked for _ in range(2)] == [len(train) * 3] * 2
    batch = train.get(torch.arange(9))
    assert all(torch.isfinite(l) for l in Distill(TinyLM(), cached)(batch).values())


def test_answers_of_unequal_length_cannot_be_kept(teacher):
    class Ragged(Bytes):
        def get(self, index, view=None):
            b, n = super().get(index, view), 12 + int(index.max()) % 5
            return b._replace(x=b.x[:, :n], y=b.y[:, :n], weight=b.weight[:, :n])
    with pytest.raises(ValueError, match='the shape of an answer must be .*pad all items to one length'):
        CachedTeacher(teacher, Ragged(text(600))).fill(batch_size=4, setup=SETUP)


def test_ways_to_train_are_compared_by_bits_per_byte_of_which_fewer_are_better(teacher, tmp_path):
    train, valid, test = splits()
    few = train.subset(torch.arange(40))
    cached = CachedTeacher(teacher, train, top=8, temperature=1.)
    ways = {'alone': Contender(Supervised, few),
            'distilled': Contender(partial(Distill, teacher=cached, temperature=1., alpha=0.9), train)}
    random_before = torch.random.get_rng_state()
    found = compare(TinyLM, ways, RECIPE, valid, test, teacher, seeds=2, setup=SETUP)
    assert torch.equal(torch.random.get_rng_state(), random_before)
    alone, distilled = found.rows()
    assert found.measure == 'bits_per_byte' and distilled['difference'] < -0.05
    assert all(0 < run['agreement'] < 1 for run in found.runs)
    assert 'bits per byte' in found.plot().axes[0].get_ylabel()
    best, student = found.students['distilled']
    assert best == min(found.values('distilled', 'valid_bits_per_byte'))
    assert evaluate(student, valid).bits_per_byte == pytest.approx(best, rel=1e-3)
    chosen, rows = choose(TinyLM, ways, RECIPE, valid, setup=SETUP)
    assert chosen == 'distilled' and rows['distilled']['valid_bits_per_byte'] < rows['alone']['valid_bits_per_byte']


SCRIPT = '''
import sys, torch
sys.path.insert(0, {tests!r})
from test_tokens import *
torch.set_num_threads(1)
train, valid, _ = splits()
torch.manual_seed(1)
taught = TinyLM(32)
fit(Supervised(taught), train, replace(RECIPE, accumulate=1), setup=SETUP)
torch.manual_seed(0)
cached = CachedTeacher(taught, train, {answers!r}, top=8, temperature=1.)
objective = Distill(TinyLM(dropout=0.2), cached, temperature=1.)
here = replace(SETUP, folder={folder!r}, resume=True, save_every=0)
h = fit(objective, train, replace(RECIPE, steps=150), valid, setup=here)
print(weights(objective), h.losses['soft'][-1], h.last['bits_per_byte'])
'''


def test_a_killed_run_resumes_to_the_weights_of_the_uninterrupted_one(tmp_path):
    def start(name):
        places = dict(folder=str(tmp_path/name), answers=str(tmp_path/f'{name}-answers'))
        script = SCRIPT.format(tests=os.path.dirname(__file__), **places)
        return subprocess.Popen([*python(), '-c', script], stdout=subprocess.PIPE, text=True)
    whole, killed, checkpoint = start('whole'), start('killed'), Checkpoint(tmp_path/'killed')
    while killed.poll() is None and not checkpoint.path.exists(): time.sleep(0.005)
    time.sleep(random.uniform(0, 0.3))
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    step = checkpoint.read()[1]['step']
    resumed = start('killed')
    assert resumed.communicate()[0] == whole.communicate()[0] != ''
    assert whole.returncode == resumed.returncode == 0 and step < 150
