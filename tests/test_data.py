"""Data: views, resizing, normalisation, splits, torchvision's formats, folders, fingerprints, errors."""
import gzip, hashlib, io, math, os, pickle, struct, subprocess, sys, tarfile
import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from hypothesis import given, settings, strategies as st
from PIL import Image
from torchvision import datasets, transforms
import distill_nb.data as data
from distill_nb.losses import UNLABELLED
from distill_nb.data import (Batch, CropFlip, ImageData, ResizedCrop, channel_stats, count_values, digits, epoch_order,
                             few_labels, mix, resize, resize_weights, stratified)
from distill_nb.folders import ImageFiles, cifar10, cifar100, fashion_mnist, image_folder, load_data, mnist

quick = settings(deadline=None, max_examples=40)


def images(n=60, channels=3, side=8, seed=0):
    return torch.randint(0, 256, (n, channels, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def dataset(n=60, side=8, augment=CropFlip(2, flip=True), **kwargs):
    return ImageData(images(n, side=side), torch.arange(n) % 3, ['a', 'b', 'c'], augment=augment, **kwargs)


# --- the hash, orders and views ---

def splitmix64(state):
    "Steele et al. 2014 in Python's integers."
    mask = 2**64 - 1
    z = (state + 0x9e3779b97f4a7c15) & mask
    z = ((z ^ (z >> 30)) * 0xbf58476d1ce4e5b9) & mask
    z = ((z ^ (z >> 27)) * 0x94d049bb133111eb) & mask
    return z ^ (z >> 31)


@quick
@given(st.lists(st.integers(-2**63, 2**64 - 1), min_size=1, max_size=4))
def test_mix_is_splitmix64(numbers):
    h = 0
    for n in numbers: h = splitmix64((h + n) % 2**64)
    assert int(mix(*numbers)) % 2**64 == h


@quick
@given(st.integers(0, 2**31), st.integers(0, 1000), st.integers(1, 50), st.integers(0, 10))
def test_a_view_does_not_depend_on_batch_size_or_order(seed, epoch, batch_size, shuffle):
    d = dataset()
    index = epoch_order(len(d), shuffle, 0)
    views = torch.zeros(len(d), dtype=torch.int64)
    for part in index.split(batch_size): views[part] = d.view_of(seed, epoch, part)
    assert torch.equal(views, d.view_of(seed, epoch, torch.arange(len(d))))
    assert 0 <= views.min() and views.max() < d.n_views


def test_seed_and_epoch_change_the_views():
    d, index = dataset(), torch.arange(60)
    views = {(s, e): tuple(d.view_of(s, e, index).tolist()) for s in range(3) for e in range(3)}
    assert len(set(views.values())) == 9


def test_views_are_even_and_independent_of_their_neighbours():
    n = 50
    v = mix(0, torch.arange(200)[:, None], torch.arange(500)) % n  # (epochs, images)
    chi2 = lambda c: float(((c - c.mean())**2 / c.mean()).sum())
    counts = v.flatten().bincount(minlength=n).double()
    assert chi2(counts) < 95  # 49 degrees of freedom: probability 1e-4
    for a, b in ((v[:, 1:], v[:, :-1]), (v[1:], v[:-1])):  # the next image, the next epoch
        pairs = (a*n + b).flatten().bincount(minlength=n*n).double()
        assert chi2(pairs) < 2499 + 4*(2*2499)**0.5


EPOCH = '''
import hashlib, torch
def epoch(batch_size):
    "Hash of order, views and pixels of one epoch."
    x = torch.randint(0, 256, (60, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    h = hashlib.sha256()
    for augment, size in ((CropFlip(2, flip=True), None), (CropFlip(2), 31), (ResizedCrop(10), None)):
        d = ImageData(x, torch.arange(60) % 3, 'abc', augment=augment, size=size)
        rows = [d.get(i, d.view_of(3, 4, i)) for i in epoch_order(60, 3, 4).split(batch_size)]
        for field in zip(*rows): h.update(torch.cat(field).numpy().tobytes())
    return h.hexdigest()
'''


def test_batches_are_the_same_in_every_process_thread_count_and_batch_size():
    here = {}
    exec(EPOCH, here)
    code = EPOCH + 'torch.set_num_threads(3)\nprint(epoch(7))'
    there = subprocess.run([sys.executable, '-c', code], text=True, capture_output=True, env=os.environ | {'PYTHONHASHSEED': '7', 'OMP_NUM_THREADS': '3'})
    assert here['epoch'](60) == here['epoch'](11) == there.stdout.strip(), there.stderr


@quick
@given(st.integers(1, 200), st.integers(0, 2**32), st.integers(0, 300))
def test_epoch_order_is_a_permutation_and_a_function(n, seed, epoch):
    order = epoch_order(n, seed, epoch)
    torch.manual_seed(0)
    assert torch.equal(order, epoch_order(n, seed, epoch))
    assert torch.equal(order.sort().values, torch.arange(n))


def test_nothing_takes_numbers_from_the_global_generator(tmp_path):
    lazy = image_folder(write_folder(tmp_path, n=12), max_bytes=0, workers=0).train
    d = dataset(side=16, augment=ResizedCrop(8))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    d.get(torch.arange(4), d.view_of(0, 0, torch.arange(4))); epoch_order(10, 0, 0); digits(); list(lazy.batches(4))
    assert torch.equal(before, torch.get_rng_state())


# --- CropFlip ---

def slow_view(image, view, pad, flip):
    "One view with torchvision's functions: the offset is decoded here independently."
    k = 2*pad + 1
    mirrored, place = (view % 2, view // 2) if flip else (0, view)
    top, left = divmod((place + (k*k - 1)//2) % (k*k), k)
    out = TF.crop(TF.pad(image, [pad]*4), top, left, *image.shape[-2:])
    return TF.hflip(out) if mirrored else out


@quick
@given(st.integers(0, 4), st.booleans(), st.sampled_from([1, 3]), st.integers(1, 9), st.integers(1, 9), st.integers(0, 1000))
def test_cropflip_equals_torchvision_one_image_at_a_time(pad, flip, channels, h, w, seed):
    augment, g = CropFlip(pad, flip), torch.Generator().manual_seed(seed)
    assert augment.n == (2*pad + 1)**2 * (2 if flip else 1)
    x = torch.randint(0, 256, (12, channels, h, w), dtype=torch.uint8, generator=g)
    view = torch.randint(0, augment.n, (12,), generator=g)
    fast = augment(x, view)
    assert fast.dtype == x.dtype
    assert torch.equal(fast, torch.stack([slow_view(image, int(v), pad, flip) for image, v in zip(x, view)]))
    assert torch.equal(augment(x.float(), view), fast.float())


@pytest.mark.parametrize('pad, flip', [(0, False), (0, True), (1, False), (2, True), (4, True)])
def test_every_view_is_different_and_view_0_changes_nothing(pad, flip):
    augment, x = CropFlip(pad, flip), images(1, side=9) // 2 + 1
    views = augment(x.expand(augment.n, -1, -1, -1), torch.arange(augment.n))
    assert torch.equal(views[0], x[0])
    assert len({v.numpy().tobytes() for v in views}) == augment.n


# --- resizing and ResizedCrop ---

@quick
@given(st.data())
def test_resize_weights_are_shares_of_the_piece(draw):
    side, size = draw.draw(st.integers(1, 70)), draw.draw(st.integers(1, 70))
    length = draw.draw(st.integers(1, side))
    start = draw.draw(st.integers(0, side - length))
    w = resize_weights(torch.tensor([start]), torch.tensor([length]), side, size)[0]
    assert w.shape == (size, side) and w.min() >= 0
    assert torch.equal(w.sum(1), torch.ones(size))
    assert w[:, :start].sum() == 0 and w[:, start + length:].sum() == 0
    assert torch.equal(w*1024, (w*1024).round())
    assert torch.equal(w, w.flip(0, 1)) or (start, length) != (0, side) or (w - w.flip(0, 1)).abs().max() <= 2/1024
    if length == size: assert torch.equal(w[:, start:start + length], torch.eye(size))


@quick
@given(st.integers(2, 60), st.integers(1, 80), st.integers(0, 99))
def test_resize_is_torchvisions_antialiased_resize(side, size, seed):
    x = images(4, side=side, seed=seed)
    theirs = TF.resize(x, [size, size], antialias=True)
    assert (resize(x, size).int() - theirs.int()).abs().max() <= 1


@quick
@given(st.integers(9, 60), st.integers(4, 40), st.integers(0, 2**31 - 2))
def test_resized_crop_is_torchvisions(side, size, first):
    augment, x, view = ResizedCrop(size), images(6, side=side), torch.arange(first, first + 6)
    top, left, h, w, mirrored = augment.boxes(view, side)
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= side).all() and (left + w <= side).all() and (h > 0).all() and (w > 0).all()
    for k, image in enumerate(augment(x, view)):
        theirs = TF.resized_crop(x[k], int(top[k]), int(left[k]), int(h[k]), int(w[k]), [size, size], antialias=True)
        assert (image.int() - (TF.hflip(theirs) if mirrored[k] else theirs).int()).abs().max() <= 1


def test_resized_crop_draws_like_torchvision():
    "Means and deviations of height, width, place and mirroring agree with RandomResizedCrop's."
    side, n = 64, 6000
    ours = torch.stack([b.double() for b in ResizedCrop(32).boxes(torch.arange(1, n + 1), side)])
    torch.manual_seed(0)
    x = torch.zeros(1, side, side)
    theirs = torch.tensor([transforms.RandomResizedCrop.get_params(x, (0.08, 1), (3/4, 4/3)) for _ in range(n)]).double().T
    assert torch.allclose(ours[:4].mean(1), theirs.mean(1), atol=1)
    assert torch.allclose(ours[:4].std(1), theirs.std(1), atol=1)
    assert abs(ours[4].mean() - 0.5) < 0.03


def test_resized_crop_view_0_only_resizes():
    x = images(5, side=20)
    assert torch.equal(ResizedCrop(13)(x, torch.zeros(5, dtype=torch.int64)), resize(x, 13))
    assert torch.equal(ResizedCrop(20)(x, torch.zeros(5, dtype=torch.int64)), x)
    for side in range(10, 30):
        boxes = torch.stack(ResizedCrop(13, scale=(0.1, 0.2)).boxes(torch.arange(50), side))
        assert boxes[:, 0].tolist() == [0, 0, side, side, 0] and boxes[2:4, 1:].max() < side
    assert not ResizedCrop(13, flip=False).boxes(torch.arange(100), 20)[4].any()


def test_resizing_is_exact_in_any_batch_and_under_autocast():
    x, view = images(33, side=41), torch.arange(100, 133)
    augment = ResizedCrop(29)
    whole = augment(x, view)
    assert torch.equal(torch.cat([augment(x[i:i+1], view[i:i+1]) for i in range(33)]), whole)
    with torch.autocast('cpu', dtype=torch.bfloat16): assert torch.equal(augment(x, view), whole)
    top, left, h, w, mirrored = augment.boxes(view, 41)
    rows, cols = resize_weights(top, h, 41, 29).double(), resize_weights(left, w, 41, 29).double()
    cols = torch.where(mirrored[:, None, None], cols.flip(1), cols)
    slow = ((rows[:, None] @ x.double() + 0.5).floor() @ cols[:, None].mT + 0.5).floor()  # float64 gives the same
    assert torch.equal(slow.to(torch.uint8), whole)


def test_float_images_are_resized_without_rounding():
    x = torch.rand(2, 3, 8, 8)
    assert torch.allclose(resize(x, 5), TF.resize(x, [5, 5], antialias=True), atol=2e-3)


# --- ImageData ---

def test_get_gives_a_normalised_batch():
    d = dataset()
    index, view = torch.tensor([7, 7, 59]), torch.tensor([0, 13, 49])
    b = d.get(index, view)
    assert isinstance(b, Batch) and b.x.dtype == torch.float32 and b.y.dtype == b.index.dtype == b.view.dtype == torch.int64
    raw = torch.stack([slow_view(d.x[i], int(v), 2, True) for i, v in zip(index, view)]).double() / 255
    mean, std = (torch.tensor(m).double().view(-1, 1, 1) for m in (d.mean, d.std))
    assert torch.allclose(b.x.double(), (raw - mean) / std, atol=1e-5)
    assert b.y.tolist() == [1, 1, 2] and torch.equal(b.index, index) and torch.equal(b.view, view)
    assert torch.equal(d.get([7], [13]).x, b.x[1:2]) and torch.equal(d.get(index).view, torch.zeros(3, dtype=torch.int64))


def test_statistics_are_exact_over_the_pixels():
    x = images(5000, side=4)
    mean, std = channel_stats(count_values(x))
    assert torch.allclose(torch.tensor(mean), (x.double()/255).mean((0, 2, 3)).float(), atol=1e-7)
    assert torch.allclose(torch.tensor(std), (x.double()/255).std((0, 2, 3), correction=0).float(), atol=1e-7)
    black = ImageData(torch.zeros(4, 1, 3, 3, dtype=torch.uint8), [0, 1, 0, 1], 'ab')
    assert black.std == [1.0] and black.get([0]).x.abs().max() == 0


def test_batches_and_stream():
    d = dataset()
    found = list(d.batches(25))
    assert [len(b.x) for b in found] == [25, 25, 10]
    assert torch.equal(torch.cat([b.index for b in found]), torch.arange(60)) and all((b.view == 0).all() for b in found)
    plan = [(i, d.view_of(1, 2, i)) for i in epoch_order(60, 0, 0).split(16)]
    for b, (index, view) in zip(d.stream(iter(plan)), plan, strict=True):
        assert all(torch.equal(a, c) for a, c in zip(b, d.get(index, view)))


def test_copies_share_pixels_and_leave_the_original_alone():
    d = dataset(name='all')
    before = d.fingerprint()
    other = d.with_normalisation([0.5]*3, torch.tensor([0.25]*3)).replace(size=16, name='other', augment=CropFlip())
    assert other.x is d.x and other.size == 16 and other.n_views == 1 and other.mean == [0.5]*3 and other.name == 'other'
    assert torch.allclose(other.get([0]).x, (resize(d.x[:1], 16)/255 - 0.5)/0.25, atol=1e-5)
    assert (d.size, d.n_views, d.name, d.fingerprint()) == (8, 50, 'all', before)
    assert d.to('cpu') is d and d.device == torch.device('cpu')
    assert 'all' in repr(d) and '60 images' in repr(d)


def test_subset_and_unlabelled():
    d = dataset()
    s = d.subset([5, 3])
    assert torch.equal(s.x, d.x[[5, 3]]) and s.y.tolist() == [2, 0] and s.mean == d.mean and len(s) == 2
    assert torch.equal(d.subset(d.y == 1).x, d.x[1::3])
    u = d.unlabelled([5, 3])
    assert u.y[5] == 2 and u.y[3] == 0 and (u.y == UNLABELLED).sum() == 58 and (d.y != UNLABELLED).all()
    assert (d.unlabelled([]).y == UNLABELLED).all()


def test_moves_between_devices():
    "The meta device stands in for a GPU: everything that `get` needs must move."
    m = dataset().to('meta')
    assert m.x.device == m.y.device == m._scale.device == m._shift.device == m.device == torch.device('meta')
    if torch.cuda.is_available():
        d, index = dataset(side=24, augment=ResizedCrop(10)), torch.arange(60)
        assert torch.allclose(d.to('cuda').get(index, index).x.cpu(), d.get(index, index).x, atol=1e-6)


def test_fingerprint_changes_with_everything_that_matters():
    d = dataset()
    assert len(d.fingerprint()) == 16 and int(d.fingerprint(), 16) >= 0
    x, y = d.x.clone(), d.y.clone()
    x[59, 2, 7, 7] ^= 1
    y[[0, 1]] = y[[1, 0]]
    same = dict(mean=d.mean, std=d.std, augment=d.augment)
    others = [ImageData(x, d.y, d.classes, **same), ImageData(d.x, y, d.classes, **same), ImageData(d.x, d.y, ['a', 'b', 'd'], **same),
              ImageData(d.x.transpose(2, 3), d.y, d.classes, **same), d.subset(range(59)), d.subset([1, 0, *range(2, 60)]), d.unlabelled([0]),
              d.replace(augment=CropFlip(2)), d.replace(augment=ResizedCrop(8)), d.replace(augment=ResizedCrop(8, flip=False)), d.replace(size=9),
              d.with_normalisation([0.5]*3, d.std), d.with_normalisation(d.mean, [0.5]*3)]
    assert len({o.fingerprint() for o in [d, *others]}) == len(others) + 1
    assert dataset(name='another').fingerprint() == d.replace(name='third').fingerprint() == d.subset(range(60)).fingerprint() == d.fingerprint()


X, Y, C = images(6, side=4), torch.arange(6) % 2, ['a', 'b']
@pytest.mark.parametrize('make, words', [
    (lambda: ImageData(X.float(), Y, C), 'x must hold uint8 pixels.*torch.float32'),
    (lambda: ImageData(X[:, :2], Y, C), r'1 or 3 channels.*\(6, 2, 4, 4\)'),
    (lambda: ImageData(X[:, :, :3], Y, C), r'H = W.*\(6, 3, 3, 4\)'),
    (lambda: ImageData(X[0], Y, C), 'must have shape'),
    (lambda: ImageData(X[:0], Y[:0], C), 'empty'),
    (lambda: ImageData(X, Y[:5], C), 'one label for each of the 6 images'),
    (lambda: ImageData(X, Y.float(), C), 'y must hold integers'),
    (lambda: ImageData(X, Y + 1, C), 'labels must be from 0 to 1.*holds 2'),
    (lambda: ImageData(X, Y - 1, C), 'labels must be from 0 to 1.*holds -1'),
    (lambda: ImageData(X, 0*Y, C), "at least 2 classes.*'a'"),
    (lambda: ImageData(X, 0*Y, ['a']), 'at least 2 classes'),
    (lambda: ImageData(X, Y, ['a', 'a']), 'different names'),
    *[(lambda size=size: ImageData(X, Y, C, size=size), f'size must be a whole number of at least 1, but is {size}')
      for size in (0, 8.5, math.nan, True)],
    (lambda: ImageData(X, Y, C, mean=[0.5]), 'mean must hold one number for each of the 3 channels'),
    *[(lambda s=s: ImageData(X, Y, C, std=[1, 1, s]), 'std must be finite numbers greater than 0')
      for s in (0, -1, math.nan, math.inf)],
    *[(lambda m=m: ImageData(X, Y, C, mean=[0, 0, m]), 'mean must be finite numbers')
      for m in (math.nan, math.inf, -math.inf)],
    (lambda: ImageData(X, Y, C).with_normalisation([0.5]*3, [1, math.nan, 1]), 'std must be finite'),
    (lambda: ImageData(X, Y, C).replace(sizes=3), 'replace can change.*sizes'),
    (lambda: ImageData(X, Y, C).subset([]), 'at least 1 image'),
    (lambda: ImageData(X, Y, C).subset([6]), 'indices must be from 0 to 5'),
    (lambda: ImageData(X, Y, C).unlabelled([-1]), 'keep must be from 0 to 5'),
    *[(lambda n=n: ImageData(X, Y, C).batches(n), 'batch_size must be a whole number of at least 1')
      for n in (0, 2.5, math.nan)],
    *[(lambda pad=pad: CropFlip(pad), 'pad must be a whole number of at least 0') for pad in (-1, 0.5, math.nan)],
    *[(lambda size=size: ResizedCrop(size), 'size must be a whole number of at least 1')
      for size in (0, 7.5, math.nan)],
    (lambda: ResizedCrop(8, scale=(0, 1)), 'scale'),
    (lambda: ResizedCrop(8, ratio=(2, 1)), 'ratio'),
    (lambda: load_data('imagenet'), "digits, mnist, fashion_mnist, cifar10, cifar100 or folder:PATH, but is 'imagenet'"),
])
def test_errors_are_sentences(make, words):
    with pytest.raises(ValueError, match=words) as e: make()
    assert str(e.value).endswith('.') and '\n' not in str(e.value)


# --- splits ---

@quick
@given(st.integers(2, 6), st.integers(8, 40), st.integers(0, 9), st.data())
def test_stratified_splits_are_disjoint_complete_and_proportional(classes, each, seed, draw):
    y = torch.arange(classes*each) % classes
    n = draw.draw(st.integers(classes, classes*each - classes))
    rest, taken = stratified(y, n, seed)
    assert len(taken) == n and torch.equal(torch.cat([rest, taken]).sort().values, torch.arange(len(y)))
    counts = y[taken].bincount(minlength=classes)
    assert counts.max() - counts.min() <= 1
    again = stratified(y, n, seed)
    assert torch.equal(rest, again[0]) and torch.equal(taken, again[1])
    assert torch.equal(rest, rest.sort().values) and torch.equal(taken, taken.sort().values)


def test_digits():
    splits = digits()
    raw = {im.numpy().tobytes() for s in splits for im in s.x}
    assert [len(s) for s in splits] == [1079, 359, 359] and sum(len(s) for s in splits) == 1797 and len(raw) > 1780
    assert all(s.y.bincount().min() >= 0.08*len(s) for s in splits)
    train, valid, test = splits
    assert (train.channels, train.size, train.n_views, valid.n_views, test.n_views) == (1, 8, 9, 1, 1)
    assert train.mean == valid.mean == test.mean == channel_stats(count_values(train.x))[0] and train.std == valid.std == test.std
    assert train.x.max() == 255
    assert [s.fingerprint() for s in digits()] == [s.fingerprint() for s in splits]
    assert digits(seed=1).test.fingerprint() != test.fingerprint()
    assert digits(size=16).test.get([0]).x.shape == (1, 1, 16, 16)


def test_few_labels():
    train = digits().train
    labelled, transfer = few_labels(train, 100)
    assert len(labelled) == 100 and labelled.y.bincount().tolist() == [10]*10 and labelled.mean == train.mean
    keep = (transfer.y != UNLABELLED).nonzero()[:, 0]
    assert torch.equal(train.x[keep], labelled.x) and torch.equal(train.y[keep], labelled.y) and transfer.x is train.x
    assert torch.equal(few_labels(train, 100)[0].x, labelled.x) and not torch.equal(few_labels(train, 100, seed=1)[0].x, labelled.x)
    assert len(few_labels(transfer, 50)[0]) == 50  # of the 100 that have labels
    for n in (9, 1070):
        with pytest.raises(ValueError, match='n must be from 10 to 1069'): few_labels(train, n)
    rare = ImageData(images(100), torch.tensor([0]*50 + [1]*48 + [2]*2), 'abc')
    with pytest.raises(ValueError, match="with 3 labels 'c' gets none"): few_labels(rare, 3)


# --- torchvision's sets, in their real formats ---

def tar_of(path, files):
    with tarfile.open(path, 'w:gz') as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write_cifar(root, monkeypatch, coarse=False):
    "An archive in CIFAR's format, and torchvision's checksums changed to fit it."
    kind, key, classes = (datasets.CIFAR100, 'fine_labels', 100) if coarse else (datasets.CIFAR10, 'labels', 10)
    g = np.random.default_rng(0)
    def part(n): return {'data': g.integers(0, 256, (n, 3072), dtype=np.uint8), key: [i % classes for i in range(n)]}
    content = {name: part(2*classes if coarse else 20) for name, _ in kind.train_list} | {kind.test_list[0][0]: part(classes)}
    names = {'fine_label_names' if coarse else 'label_names': [f'class {i}' for i in range(classes)]}
    files = {k: pickle.dumps(v) for k, v in (content | {kind.meta['filename']: names}).items()}
    md5 = {k: hashlib.md5(v).hexdigest() for k, v in files.items()}
    for which in ('train_list', 'test_list'): monkeypatch.setattr(kind, which, [[n, md5[n]] for n, _ in getattr(kind, which)])
    monkeypatch.setattr(kind, 'meta', kind.meta | {'md5': md5[kind.meta['filename']]})
    root.mkdir(exist_ok=True)
    tar_of(root/kind.filename, {f'{kind.base_folder}/{k}': v for k, v in files.items()})
    monkeypatch.setattr(kind, 'tgz_md5', hashlib.md5((root/kind.filename).read_bytes()).hexdigest())
    return content


def write_mnist(root, kind, monkeypatch):
    "Four files in MNIST's format, and torchvision's checksums changed to fit them."
    raw, g, content, resources = root/kind.__name__/'raw', np.random.default_rng(0), {}, []
    raw.mkdir(parents=True)
    for part, n in (('train', 60), ('t10k', 20)):
        x, y = g.integers(0, 256, (n, 28, 28), dtype=np.uint8), np.arange(n, dtype=np.uint8) % 10
        content[part] = x, y
        for name, magic, a in ((f'{part}-images-idx3-ubyte.gz', 2051, x), (f'{part}-labels-idx1-ubyte.gz', 2049, y)):
            (raw/name).write_bytes(gzip.compress(struct.pack(f'>{1 + a.ndim}i', magic, *a.shape) + a.tobytes()))
            resources.append((name, hashlib.md5((raw/name).read_bytes()).hexdigest()))
    monkeypatch.setattr(kind, 'resources', resources)
    return content


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs): raise OSError('[Errno -3] Temporary failure in name resolution')
    monkeypatch.setattr('urllib.request.urlopen', refuse)


@pytest.mark.parametrize('download', [True, False])
def test_cifar10(tmp_path, monkeypatch, no_network, download):
    content = write_cifar(tmp_path/'root', monkeypatch)
    splits = cifar10(tmp_path/'root', download=download, valid=0.2)
    assert [len(s) for s in splits] == [80, 20, 10] and splits.train.n_views == 162 and splits.valid.n_views == splits.test.n_views == 1
    assert torch.equal(splits.test.x, torch.from_numpy(content['test_batch']['data']).view(10, 3, 32, 32)) and splits.test.y.tolist() == list(range(10))
    assert splits.train.mean == splits.valid.mean == splits.test.mean == channel_stats(count_values(splits.train.x))[0]
    everything = {im.numpy().tobytes() for s in splits[:2] for im in s.x}
    assert everything == {row.tobytes() for k, v in content.items() if k != 'test_batch' for row in v['data']}
    assert splits.train.classes[3] == 'class 3' and splits.valid.y.bincount().tolist() == [2]*10
    assert cifar10(tmp_path/'root', valid=0.2, size=64).train.get([0]).x.shape[-1] == 64


def test_cifar100(tmp_path, monkeypatch, no_network):
    content = write_cifar(tmp_path/'root', monkeypatch, coarse=True)
    splits = cifar100(tmp_path/'root', valid=0.5)
    assert [len(s) for s in splits] == [100, 100, 100] and len(splits.train.classes) == 100 and splits.train.n_views == 162
    assert torch.equal(splits.test.x, torch.from_numpy(content['test']['data']).view(100, 3, 32, 32))


@pytest.mark.parametrize('name, kind, views', [('mnist', datasets.MNIST, 25), ('fashion_mnist', datasets.FashionMNIST, 50)])
def test_mnist_and_fashion(tmp_path, monkeypatch, no_network, name, kind, views):
    content = write_mnist(tmp_path, kind, monkeypatch)
    splits = load_data(name, root=tmp_path, valid=0.2)
    assert [len(s) for s in splits] == [48, 12, 20] and (splits.train.channels, splits.train.size, splits.train.n_views) == (1, 28, views)
    assert torch.equal(splits.test.x[:, 0], torch.from_numpy(content['t10k'][0])) and splits.test.y.tolist() == content['t10k'][1].tolist()


@pytest.mark.parametrize('read, url, place', [
    (cifar10, 'https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz', ''), (cifar100, 'cifar-100-python.tar.gz', ''),
    (mnist, 't10k-labels-idx1-ubyte.gz', 'MNIST/raw'), (fashion_mnist, 'train-images-idx3-ubyte.gz', 'FashionMNIST/raw')])
@pytest.mark.parametrize('download', [True, False])
def test_missing_files_and_no_network(tmp_path, no_network, capsys, read, url, place, download):
    with pytest.raises(ValueError) as e: read(tmp_path, download=download)
    message = str(e.value)
    assert url in message and str(tmp_path/place) in message and '\n' not in message
    assert ('download=True' in message) == (not download)  # who asked for it need not be told to ask


def test_damaged_torchvision_files(tmp_path, monkeypatch, no_network):
    write_mnist(tmp_path, datasets.MNIST, monkeypatch)
    mnist(tmp_path, valid=0.2)
    for f in (tmp_path/'MNIST'/'raw').glob('t10k-images-idx3-ubyte*'): f.write_bytes(f.read_bytes()[:100])
    with pytest.raises(ValueError, match='MNIST cannot be read'): mnist(tmp_path, valid=0.2)
    write_cifar(tmp_path/'c', monkeypatch)
    cifar10(tmp_path/'c', valid=0.2)
    (tmp_path/'c'/datasets.CIFAR10.base_folder/'data_batch_3').write_bytes(b'cos\nsystem\n(S"false"\ntR.')  # a pickle that would run code
    (tmp_path/'c'/datasets.CIFAR10.filename).unlink()
    with pytest.raises(ValueError, match='CIFAR10 cannot be read'): cifar10(tmp_path/'c', valid=0.2)


@pytest.mark.parametrize('valid', [0, 1, 1.5])
def test_valid_is_a_share(tmp_path, monkeypatch, valid):
    write_mnist(tmp_path, datasets.MNIST, monkeypatch)
    with pytest.raises(ValueError, match='valid must be a share between 0 and 1'): mnist(tmp_path, valid=valid)
    with pytest.raises(ValueError, match='valid must be a share between 0 and 1'): image_folder(write_folder(tmp_path/'f'), valid=valid)


# --- folders ---

def write_image(path, w=12, h=12, mode='RGB', seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    g = np.random.default_rng(seed)
    Image.fromarray(g.integers(0, 256, (h, w) if mode == 'L' else (h, w, 3), dtype=np.uint8)).save(path)
    return path


def write_folder(root, parts=('train', 'test'), classes=('cat', 'dog'), n=10, **kwargs):
    "A folder of PNG files, so that pixels can be compared exactly."
    for p, part in enumerate(parts):
        for c, name in enumerate(classes):
            for k in range(n): write_image(root/part/name/f'{k:02}.png', seed=100*c + k + 10_000*p, **kwargs)
    return root


def test_links_never_bring_an_image_twice(tmp_path):
    root = write_folder(tmp_path/'pets')
    (root/'train'/'cat'/'me').symlink_to(root/'train'/'cat')
    (root/'train'/'cat'/'up').symlink_to(root)
    elsewhere = write_folder(tmp_path/'more', parts=('',), classes=('cat',), n=4)
    (root/'train'/'cat'/'linked').symlink_to(elsewhere/'cat')
    splits = image_folder(root)
    assert len(splits.train) + len(splits.valid) == 20 + 4 and len(splits.test) == 20


def test_a_link_to_nothing_is_a_damaged_image(tmp_path):
    root = write_folder(tmp_path/'pets')
    (root/'train'/'cat'/'gone.png').symlink_to(tmp_path/'nowhere.png')
    with pytest.raises(ValueError, match='gone.png'): image_folder(root)
    assert len(image_folder(root, skip_damaged=True).test) == 20


def test_sixteen_bits_are_refused_and_not_clipped(tmp_path):
    root = write_folder(tmp_path/'scans')
    Image.fromarray(np.full((12, 12), 40_000, dtype=np.uint16)).save(root/'train'/'cat'/'00.png')
    with pytest.raises(ValueError, match='00.png.*8 bits'): image_folder(root)


def test_a_validation_folder_is_found_under_each_of_its_names_but_not_twice(tmp_path):
    for name in ('val', 'valid', 'validation'): assert len(image_folder(write_folder(tmp_path/name, parts=('train', 'test', name))).valid) == 20
    with pytest.raises(ValueError, match='one validation split.*val and valid'): image_folder(write_folder(tmp_path/'both', parts=('train', 'test', 'val', 'valid')))


def test_folder_with_train_and_test(tmp_path):
    splits = image_folder(write_folder(tmp_path/'pets'))
    assert [len(s) for s in splits] == [18, 2, 20] and splits.train.classes == ['cat', 'dog'] and splits.train.name == 'pets train'
    ours = datasets.ImageFolder(tmp_path/'pets'/'test', transform=transforms.PILToTensor())
    assert torch.equal(splits.test.x, torch.stack([x for x, _ in ours])) and splits.test.y.tolist() == ours.targets
    files = {i.numpy().tobytes() for s in splits[:2] for i in s.x}
    assert files == {x.numpy().tobytes() for x, _ in datasets.ImageFolder(tmp_path/'pets'/'train', transform=transforms.PILToTensor())}
    assert splits.train.augment == CropFlip(1, flip=True) and splits.test.n_views == 1
    assert splits.train.mean == splits.test.mean == channel_stats(count_values(splits.train.x))[0]
    assert [s.fingerprint() for s in load_data(f'folder:{tmp_path}/pets')] == [s.fingerprint() for s in splits]


@pytest.mark.parametrize('name', ['valid', 'val'])
def test_folder_with_three_parts(tmp_path, name):
    splits = image_folder(write_folder(tmp_path, parts=('train', 'test', name)))
    assert [len(s) for s in splits] == [20, 20, 20]
    assert torch.equal(splits.valid.x[0], TF.pil_to_tensor(Image.open(tmp_path/name/'cat'/'00.png')))


def test_folder_of_classes_is_split_in_three(tmp_path):
    splits = image_folder(write_folder(tmp_path, parts=('.',), n=20))
    assert [len(s) for s in splits] == [32, 4, 4] and all(s.y.bincount().tolist() == [len(s)//2]*2 for s in splits)
    assert len({i.numpy().tobytes() for s in splits for i in s.x}) == 40
    assert image_folder(tmp_path, seed=1).test.fingerprint() != splits.test.fingerprint() == image_folder(tmp_path).test.fingerprint()
    trains = image_folder(write_folder(tmp_path/'vehicles', parts=('.',), classes=('bus', 'train')))  # a class may be called train
    assert trains.train.classes == ['bus', 'train']


def test_mixed_sizes_are_resized_when_read(tmp_path):
    write_folder(tmp_path, w=30, h=20)
    write_image(tmp_path/'train'/'cat'/'99.png', w=20, h=50)
    splits = image_folder(tmp_path, size=16)
    assert splits.train.side == splits.test.size == 16
    image = Image.open(tmp_path/'test'/'cat'/'00.png')
    assert torch.equal(splits.test.x[0], TF.pil_to_tensor(TF.center_crop(TF.resize(image, 16), 16)))
    assert image_folder(tmp_path).train.size == 224 and image_folder(tmp_path).train.augment == ResizedCrop(224)


def test_large_images_get_resized_crops(tmp_path):
    splits = image_folder(write_folder(tmp_path, w=100, h=100, n=3), size=64, valid=0.3)
    assert splits.train.side == 100 and splits.train.augment == ResizedCrop(64) and splits.test.side == 100
    index = torch.arange(3)
    assert splits.train.get(index, splits.train.view_of(0, 0, index)).x.shape == splits.test.get(index).x.shape == (3, 3, 64, 64)
    assert image_folder(tmp_path, valid=0.3).train.size == 100


def test_small_images_are_enlarged_on_the_device(tmp_path):
    splits = image_folder(write_folder(tmp_path), size=32)
    assert splits.train.side == 12 and splits.train.augment == CropFlip(1, flip=True) and splits.train.get([0], [3]).x.shape == (1, 3, 32, 32)


def test_grey_folders_stay_grey_and_mixed_ones_become_rgb(tmp_path):
    write_folder(tmp_path, mode='L')
    grey = image_folder(tmp_path)
    assert grey.train.channels == 1 and len(grey.train.mean) == 1
    assert torch.equal(grey.test.x[0], TF.pil_to_tensor(Image.open(tmp_path/'test'/'cat'/'00.png')))
    Image.fromarray(np.full((12, 12, 4), 7, np.uint8)).save(tmp_path/'train'/'cat'/'00.png')  # RGBA
    mixed = image_folder(tmp_path)
    assert mixed.train.channels == mixed.test.channels == 3 and torch.equal(mixed.test.x[0, 0], mixed.test.x[0, 2])


def test_other_files_are_ignored(tmp_path):
    write_folder(tmp_path)
    for name in ('train/cat/notes.txt', 'train/cat/._00.png', 'train/README.md'): (tmp_path/name).write_text('no image')
    (tmp_path/'train'/'.ipynb_checkpoints').mkdir()
    write_image(tmp_path/'train'/'cat'/'deeper'/'A.JPG')
    assert sum(len(s) for s in image_folder(tmp_path)) == 41


def truncate(path):
    Image.open(path).convert('RGB').save(path.with_suffix('.jpg'))
    path.unlink()
    path = path.with_suffix('.jpg')
    path.write_bytes(path.read_bytes()[:-150])


@pytest.mark.parametrize('limit', [None, 0])
def test_damaged_images_are_named_counted_and_refused(tmp_path, capsys, limit):
    write_folder(tmp_path)
    (tmp_path/'train'/'cat'/'03.png').write_bytes(b'not an image')
    (tmp_path/'train'/'dog'/'04.png').write_bytes(b'')
    truncate(tmp_path/'test'/'dog'/'05.png')
    with pytest.raises(ValueError) as e: image_folder(tmp_path, valid=0.3, max_bytes=limit, workers=0)
    message = str(e.value)
    assert '3 of 40 images' in message and 'train/cat/03.png' in message and 'train/dog/04.png' in message and 'test/dog/05.jpg' in message
    assert 'skip_damaged=True' in message and '\n' not in message and capsys.readouterr().err.count('Left out') == 0
    splits = image_folder(tmp_path, valid=0.3, skip_damaged=True, max_bytes=limit, workers=0)
    out, err = capsys.readouterr()
    assert [len(s) for s in splits][2] == 19 and sum(len(s) for s in splits) == 37 and out == ''
    assert 'Left out: 3 of 40 images' in err and len([line for line in err.splitlines() if 'Left out' in line]) == 1
    assert torch.equal(splits.test.get(range(19)).y.bincount(), torch.tensor([10, 9]))
    for k in range(6): (tmp_path/'test'/'cat'/f'0{k}.png').write_bytes(b'x')
    with pytest.raises(ValueError, match='9 of 40 images.*and 6 more'): image_folder(tmp_path)
    for f in (tmp_path/'train'/'cat').iterdir(): f.write_bytes(b'x')
    with pytest.raises(ValueError, match="all of 'cat' are damaged"): image_folder(tmp_path, skip_damaged=True)
    with pytest.raises(ValueError, match='18 of 40'): image_folder(tmp_path)


def rm(path):
    for f in path.iterdir(): f.unlink()
    path.rmdir()


@pytest.mark.parametrize('spoil, words', [
    (lambda p: (rm(p/'test'/'cat'), rm(p/'test'/'dog'), (p/'test').rmdir()), 'folders train and test, but test is missing; it holds train'),
    (lambda p: (p/'train').rename(p/'training'), 'but train is missing'),
    (lambda p: (p/'test'/'cat').rename(p/'test'/'kat'), "test lacks 'cat' and has 'kat' besides"),
    (lambda p: write_image(p/'test'/'emu'/'1.png'), "test has 'emu' besides"),
    (lambda p: write_folder(p, parts=('val',), classes=('cat',)), "val lacks 'dog'"),
    (lambda p: (rm(p/'train'/'dog'), rm(p/'test'/'dog')), r"at least 2 classes, but holds \['cat'\]"),
    (lambda p: [f.unlink() for f in (p/'test'/'dog').iterdir()], 'must hold images'),
    (lambda p: [f.unlink() for f in list((p/'train'/'dog').iterdir())[1:]], "too few are left of 'dog'"),
])
def test_folders_that_do_not_fit(tmp_path, spoil, words):
    spoil(write_folder(tmp_path))
    with pytest.raises(ValueError, match=words) as e: image_folder(tmp_path)
    assert str(e.value).endswith('.')


def test_folders_that_are_none(tmp_path):
    with pytest.raises(ValueError, match='path must be a folder'): image_folder(tmp_path/'nowhere')
    with pytest.raises(ValueError, match='at least 2 classes'): image_folder(tmp_path)
    with pytest.raises(ValueError, match='size must be a whole number of at least 1'): \
        image_folder(write_folder(tmp_path), size=0)


# --- files that do not fit in memory ---

@pytest.mark.parametrize('workers, kwargs', [(0, {}), (2, {}), (0, dict(w=30, h=20)), (0, dict(mode='L'))])
def test_lazy_equals_eager(tmp_path, workers, kwargs):
    write_folder(tmp_path, **kwargs)
    eager, lazy = image_folder(tmp_path, size=16), image_folder(tmp_path, size=16, max_bytes=0, workers=workers)
    for e, l in zip(eager, lazy):
        assert isinstance(l, ImageFiles) and not isinstance(e, ImageFiles)
        for name in ('classes', 'channels', 'side', 'size', 'n_views', 'mean', 'std', 'name', 'augment', 'device'): assert getattr(e, name) == getattr(l, name)
        assert len(e) == len(l) and e.fingerprint() == l.fingerprint()
        plan = [(i, e.view_of(0, 3, i)) for i in epoch_order(len(e), 0, 3).split(7)]
        for a, b in zip(e.stream(plan), l.stream(iter(plan)), strict=True): assert all(torch.equal(s, t) for s, t in zip(a, b))
        for a, b in zip(e.batches(6), l.batches(6), strict=True): assert all(torch.equal(s, t) for s, t in zip(a, b))
    e, l = eager.train, lazy.train
    for change in (lambda d: d.subset([3, 1, 17]), lambda d: d.subset(d.y == 1), lambda d: d.unlabelled([4]), lambda d: few_labels(d, 4)[0],
                   lambda d: few_labels(d, 4)[1], lambda d: d.replace(size=8), lambda d: d.with_normalisation([0.5]*d.channels, [0.5]*d.channels)):
        a, b = change(e), change(l)
        assert a.fingerprint() == b.fingerprint() and isinstance(b, ImageFiles)
        assert all(torch.equal(s, t) for s, t in zip(a.get([1, 0], [5, 0]), b.get([1, 0], [5, 0])))
    assert l.to('cpu').fingerprint() == l.fingerprint() and l.replace(workers=1).workers == 1


def test_a_file_that_vanishes_is_named(tmp_path):
    lazy = image_folder(write_folder(tmp_path), max_bytes=0, workers=0).test
    (tmp_path/'test'/'cat'/'04.png').unlink()
    with pytest.raises(ValueError, match='04.png.* now is not'): list(lazy.batches(20))


def test_the_limit_counts_decoded_bytes(tmp_path):
    write_folder(tmp_path)
    need = 40*3*12*12
    assert not isinstance(image_folder(tmp_path, max_bytes=need).train, ImageFiles)
    assert isinstance(image_folder(tmp_path, max_bytes=need - 1).train, ImageFiles)


def test_importing_data_loads_no_heavy_library():
    code = "import sys, distill_nb.folders; print([m for m in ('sklearn', 'torchvision', 'matplotlib', 'PIL') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout == '[]\n'
