"""Data: views, resizing, normalisation, splits, fingerprints, errors."""
import copy, hashlib, math, os, subprocess, sys
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from hypothesis import given, settings, strategies as st
from torchvision import transforms
from distill_nb.rows import UNLABELLED
from distill_nb.views import CropFlip, ResizedCrop, _resize_weights, _root, epoch_order, mix, resize, show_images
from distill_nb.protocol import Batch, Data, Measure, Measured, calibration_error
from distill_nb.data import ImageData, Sight, channel_stats, count_values, digits, few_labels, stratified

quick = settings(deadline=None, max_examples=40)


def images(n=60, channels=3, side=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, side, side), dtype=torch.uint8, generator=g)


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


EPOCH = '''from distill_nb.views import CropFlip, ResizedCrop, epoch_order
from distill_nb.data import ImageData
import hashlib, torch
def epoch(batch_size):
    "Hash of order, views and pixels of one epoch."
    x = torch.randint(0, 256, (60, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    h = hashlib.sha256()
    for augment, size in ((CropFlip(2, flip=True), None), (CropFlip(2), 31), (ResizedCrop(10), None)):
        d = ImageData(x, torch.arange(60) % 3, list('abc'), augment=augment, size=size)
        rows = [d.get(i, d.view_of(3, 4, i)) for i in epoch_order(60, 3, 4).split(batch_size)]
        for field in zip(*(r[:4] for r in rows)): h.update(torch.cat(field).numpy().tobytes())
    return h.hexdigest()
'''


def test_batches_are_the_same_in_every_process_thread_count_and_batch_size():
    here = {}
    exec(EPOCH, here)
    code = EPOCH + 'torch.set_num_threads(3)\nprint(epoch(7))'
    there = subprocess.run([sys.executable, '-c', code], text=True, capture_output=True,
                           env=os.environ | {'PYTHONHASHSEED': '7', 'OMP_NUM_THREADS': '3'})
    assert here['epoch'](60) == here['epoch'](11) == there.stdout.strip(), there.stderr


@quick
@given(st.integers(1, 200), st.integers(0, 2**32), st.integers(0, 300))
def test_epoch_order_is_a_permutation_and_a_function(n, seed, epoch):
    order = epoch_order(n, seed, epoch)
    torch.manual_seed(0)
    assert torch.equal(order, epoch_order(n, seed, epoch))
    assert torch.equal(order.sort().values, torch.arange(n))


def test_nothing_takes_numbers_from_the_global_generator():
    d = dataset(side=16, augment=ResizedCrop(8))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    d.get(torch.arange(4), d.view_of(0, 0, torch.arange(4))); epoch_order(10, 0, 0); digits()
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
@given(st.integers(0, 4), st.booleans(), st.sampled_from([1, 3]), st.integers(1, 9), st.integers(1, 9),
       st.integers(0, 1000))
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
    w = _resize_weights(torch.tensor([start]), torch.tensor([length]), side, size)[0]
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
    for start, length in ((top, h), (left, w)):
        assert (start >= 0).all() and (length > 0).all() and (start + length <= side).all()
    for k, image in enumerate(augment(x, view)):
        theirs = TF.resized_crop(x[k], int(top[k]), int(left[k]), int(h[k]), int(w[k]), [size, size], antialias=True)
        assert (image.int() - (TF.hflip(theirs) if mirrored[k] else theirs).int()).abs().max() <= 1


def test_resized_crop_draws_like_torchvision():
    "Means and deviations of height, width, place and mirroring agree with RandomResizedCrop's."
    side, n = 64, 6000
    ours = torch.stack([b.double() for b in ResizedCrop(32).boxes(torch.arange(1, n + 1), side)])
    torch.manual_seed(0)
    x = torch.zeros(1, side, side)
    draw = transforms.RandomResizedCrop.get_params
    theirs = torch.tensor([draw(x, (0.08, 1), (3/4, 4/3)) for _ in range(n)]).double().T
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


def test_views_of_square_images_are_those_of_the_first_release():
    "Kept answers and published weights belong to these numbers."
    content, view = hashlib.sha256(), torch.arange(0, 5000, 3)
    for side in (7, 32, 100, 336):
        for c in (ResizedCrop(16), ResizedCrop(16, scale=(0.3, 0.9), ratio=(1, 2), flip=False)):
            for b in c.boxes(view, side): content.update(b.long().numpy().tobytes())
    x = images(20, side=40)
    content.update(ResizedCrop(24)(x, torch.arange(20)).numpy().tobytes())
    d = ImageData(x, torch.arange(20) % 2, ['a', 'b'], augment=ResizedCrop(24))
    content.update((d.fingerprint() + d.fingerprint(labels=False)).encode())
    assert content.hexdigest()[:16] == 'e28701b0a2f0cccf'


@pytest.mark.parametrize('high, wide, ratio', [(64, 64, (3/4, 4/3)), (427, 640, (3/4, 4/3)), (640, 427, (3/4, 4/3)),
                                              (300, 900, (3/4, 4/3)), (2000, 500, (3/4, 4/3)), (427, 640, (1, 2))])
def test_pieces_of_a_photograph_are_drawn_like_torchvisions_from_its_true_shape(high, wide, ratio):
    n, side = 6000, 1000
    shapes = torch.tensor([[high, wide]]*n)
    top, left, h, w, mirrored = ResizedCrop(32, ratio=ratio).boxes(torch.arange(1, n + 1), side, shapes)
    assert (torch.stack((top, left)) >= 0).all() and (top + h).max() <= side and (left + w).max() <= side
    h, w = h*high/side, w*wide/side  # back in the photograph
    torch.manual_seed(0)
    large = torch.zeros(1, 1, 1).expand(1, high*100, wide*100)  # so that theirs are not rounded much
    theirs = [transforms.RandomResizedCrop.get_params(large, (0.08, 1), ratio) for _ in range(n)]
    _, _, theirs_h, theirs_w = torch.tensor(theirs).double().T/100
    for ours, other, whole in ((h, theirs_h, high), (w, theirs_w, wide), (h*w, theirs_h*theirs_w, high*wide)):
        far = ours.double().mean() - other.mean(), ours.double().std() - other.std()
        assert max(map(abs, far)) < 0.012*whole
    assert abs(mirrored.double().mean() - 0.5) < 0.03


@quick
@given(st.lists(st.tuples(st.integers(1, 2**27), st.integers(1, 2**27)), min_size=1, max_size=20), st.integers(1, 1100),
       st.integers(0, 2**31 - 50), st.sampled_from([(3/4, 4/3), (1, 1), (0.01, 0.02), (5, 100)]))
def test_boxes_lie_within_pictures_of_any_shape(shapes, side, first, ratio):
    shapes, view = torch.tensor(shapes), torch.arange(first, first + len(shapes))
    for view in (view, 0*view):
        top, left, h, w, _ = ResizedCrop(8, ratio=ratio).boxes(view, side, shapes)
        for start, length in ((top, h), (left, w)):
            assert (start >= 0).all() and (length >= 1).all() and (start + length <= side).all()


def test_only_the_proportion_of_a_shape_counts():
    for high, wide in ((427, 640), (640, 427), (300, 2000)):
        few, many = (torch.tensor([[high, wide]]*500)*k for k in (1, 2**16))
        for a, b in zip(*(ResizedCrop(8).boxes(torch.arange(500), 336, shapes)[2:4] for shapes in (few, many))):
            assert ((a - b).abs() > 1).float().mean() < 0.01  # where a piece just fits


def test_a_panorama_has_the_largest_piece_that_the_ratio_allows():
    "Nothing of 9 to 10 tenths of its area fits into a picture of 1:8."
    for shape, expected in (((100, 800), (400, 400*4//3//8 + 1)), ((800, 100), (400*4//3//8 + 1, 400))):
        _, _, h, w, _ = ResizedCrop(8, scale=(0.9, 1)).boxes(torch.arange(1, 50), 400, torch.tensor([shape]*49))
        assert abs(h - expected[0]).max() <= 1 and abs(w - expected[1]).max() <= 1


def test_roots_are_exact():
    n = torch.arange(100_000)
    for x in (n**2, n**2 + 2*n): assert torch.equal(_root(x), n)  # the first and the last with that root


def disc(high, wide, side):
    "A white disc in the middle of a black picture of that shape, squeezed to a square: (1, 1, side, side)."
    y, x = torch.arange(high)[:, None] - (high - 1)/2, torch.arange(wide) - (wide - 1)/2
    return TF.resize((255*(y**2 + x**2 < (min(high, wide)/3)**2)).byte()[None, None], [side, side], antialias=True)


@pytest.mark.parametrize('augment', [CropFlip(), CropFlip(2, flip=True), ResizedCrop(48)])
@pytest.mark.parametrize('crop', [1, 0.75])
def test_a_disc_is_round_again_and_where_the_centre_cut_had_it(augment, crop):
    shapes = [(240, 240), (240, 480), (600, 200), (200, 320)]
    x = torch.cat([disc(*shape, 96) for shape in shapes])
    more = dict(y=[0, 1, 0, 1], classes=['a', 'b'], mean=[0], std=[1/255], size=round(48*crop), crop=crop)
    found = ImageData(x, augment=augment, shapes=shapes, **more).get(torch.arange(4)).x
    centred = torch.cat([resize(disc(240, 240, 240), 48)]*4)
    expected = ImageData(centred, **more).get(torch.arange(4)).x
    assert (found - expected).abs().mean() < 4 and found.shape == (4, 1, round(48*crop), round(48*crop))


def test_every_view_of_a_photograph_keeps_what_is_round_round():
    augment, n = ResizedCrop(64, scale=(0.5, 1), ratio=(1, 1)), 40
    for shape in ((240, 480), (600, 240)):
        x = ImageData(disc(*shape, 256).expand(n, -1, -1, -1), torch.arange(n) % 2, ['a', 'b'], mean=[0], std=[1],
                      shapes=[shape]*n, augment=augment).get(torch.arange(n), torch.arange(n)).x[:, 0] > 0.5
        for picture in x:
            h, w = picture.any(1).sum(), picture.any(0).sum()
            if not (picture[[0, -1]].any() or picture[:, [0, -1]].any()): assert abs(h - w) <= 3


def test_resizing_is_exact_in_any_batch_and_under_autocast():
    x, view = images(33, side=41), torch.arange(100, 133)
    augment = ResizedCrop(29)
    whole = augment(x, view)
    assert torch.equal(torch.cat([augment(x[i:i+1], view[i:i+1]) for i in range(33)]), whole)
    with torch.autocast('cpu', dtype=torch.bfloat16): assert torch.equal(augment(x, view), whole)
    top, left, h, w, mirrored = augment.boxes(view, 41)
    rows, cols = _resize_weights(top, h, 41, 29).double(), _resize_weights(left, w, 41, 29).double()
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
    assert isinstance(b, Batch) and b.x.dtype == torch.float32
    assert b.y.dtype == b.index.dtype == b.view.dtype == torch.int64
    raw = torch.stack([slow_view(d.x[i], int(v), 2, True) for i, v in zip(index, view)]).double() / 255
    mean, std = (torch.tensor(m).double().view(-1, 1, 1) for m in (d.mean, d.std))
    assert torch.allclose(b.x.double(), (raw - mean) / std, atol=1e-5)
    assert b.y.tolist() == [1, 1, 2] and torch.equal(b.index, index) and torch.equal(b.view, view)
    assert torch.equal(d.get([7], [13]).x, b.x[1:2])
    assert torch.equal(d.get(index).view, torch.zeros(3, dtype=torch.int64))


def test_statistics_are_exact_over_the_pixels():
    x = images(5000, side=4)
    mean, std = channel_stats(count_values(x))
    assert torch.allclose(torch.tensor(mean), (x.double()/255).mean((0, 2, 3)).float(), atol=1e-7)
    assert torch.allclose(torch.tensor(std), (x.double()/255).std((0, 2, 3), correction=0).float(), atol=1e-7)
    black = ImageData(torch.zeros(4, 1, 3, 3, dtype=torch.uint8), [0, 1, 0, 1], list('ab'))
    assert black.std == [1.0] and black.get([0]).x.abs().max() == 0


def test_batches_and_stream():
    d = dataset()
    found = list(d.batches(25))
    assert [len(b.x) for b in found] == [25, 25, 10]
    assert torch.equal(torch.cat([b.index for b in found]), torch.arange(60))
    assert all((b.view == 0).all() for b in found)
    plan = [(i, d.view_of(1, 2, i)) for i in epoch_order(60, 0, 0).split(16)]
    for b, (index, view) in zip(d.stream(iter(plan)), plan, strict=True):
        assert all(torch.equal(a, c) for a, c in zip(b[:4], d.get(index, view)))


def test_copies_share_pixels_and_leave_the_original_alone():
    d = dataset(name='all')
    before = d.fingerprint()
    other = d.replace(mean=[0.5]*3, std=torch.tensor([0.25]*3)).replace(size=16, name='other', augment=CropFlip())
    assert other.x is d.x and other.mean == [0.5]*3
    assert (other.size, other.n_views, other.name) == (16, 1, 'other')
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


def photographs(n=12, **kwargs):
    shapes = torch.arange(1, 2*n + 1).view(n, 2)*10
    return dataset(n, side=16, shapes=shapes, **{'augment': ResizedCrop(8)} | kwargs), shapes


@pytest.mark.parametrize('augment', [ResizedCrop(8), CropFlip(2, flip=True), CropFlip()])
def test_shapes_stay_with_their_images(augment):
    d, shapes = photographs(augment=augment)
    index, view, some = torch.arange(12), torch.arange(12) % augment.n, torch.tensor([7, 0, 3])
    x = d.get(index, view).x
    assert torch.equal(d.subset(some).get(torch.arange(3), view[some]).x, x[some])
    assert torch.equal(d.subset(some).shapes, shapes[some]) and torch.equal(d.subset(index < 5).shapes, shapes[:5])
    for same in (d.replace(name='b'), d.unlabelled([0]), d.to('cpu'), copy.copy(d), d.seen(mean=d.mean)):
        assert torch.equal(same.get(index, view).x, x) and torch.equal(same.shapes, shapes)
    assert torch.equal(torch.cat([d.get(index[i:i+1], view[i:i+1]).x for i in range(12)]), x)
    assert torch.equal(d.get(some, view[some]).x, x[some]) and d.y.dtype == d.shapes.dtype == torch.int64
    assert d.to('meta').shapes.device == torch.device('meta')
    assert 'squeezed' in repr(d) and 'squeezed' not in repr(dataset())
    seen = d.seen(size=20)
    assert seen.get(index).x.shape[-1] == 20 and torch.equal(seen.shapes, shapes)


@pytest.mark.parametrize('augment', [CropFlip(2, flip=True), CropFlip()])
def test_squares_need_no_shapes(augment):
    index, view = torch.arange(60), torch.arange(60) % augment.n
    for size in (16, 24, 9):
        plain, known = (dataset(side=16, augment=augment, size=size, shapes=s) for s in (None, [[30, 30]]*60))
        assert torch.equal(plain.get(index, view).x, known.get(index, view).x)


def test_shapes_belong_to_the_pixels_in_the_fingerprint():
    d, shapes = photographs()
    shapes = shapes.clone()
    shapes[3, 0] += 1
    others = [photographs(n=12)[0], dataset(12, side=16, augment=ResizedCrop(8)),
              dataset(12, side=16, augment=ResizedCrop(8), shapes=shapes)]
    for labels in (True, False):
        same, *differ = (o.fingerprint(labels) for o in others)
        assert same == d.fingerprint(labels) and len({same, *differ}) == 3
    assert d.subset([1, 2]).fingerprint(labels=False) == d.subset([1, 2]).unlabelled([]).fingerprint(labels=False)


def test_fingerprint_changes_with_everything_that_matters():
    d = dataset()
    assert len(d.fingerprint()) == 16 and int(d.fingerprint(), 16) >= 0
    x, y = d.x.clone(), d.y.clone()
    x[59, 2, 7, 7] ^= 1
    y[[0, 1]] = y[[1, 0]]
    def made(x, y, classes): return ImageData(x, y, classes, mean=d.mean, std=d.std, augment=d.augment)
    others = [made(x, d.y, d.classes), made(d.x, y, d.classes), made(d.x, d.y, ['a', 'b', 'd']),
              made(d.x.transpose(2, 3), d.y, d.classes),
              d.subset(range(59)), d.subset([1, 0, *range(2, 60)]), d.unlabelled([0]),
              d.replace(augment=CropFlip(2)), d.replace(augment=ResizedCrop(8)),
              d.replace(augment=ResizedCrop(8, flip=False)), d.replace(size=9),
              d.replace(mean=[0.5]*3), d.replace(std=[0.5]*3)]
    assert len({o.fingerprint() for o in [d, *others]}) == len(others) + 1
    for same in (dataset(name='another'), d.replace(name='third'), d.subset(range(60))):
        assert same.fingerprint() == d.fingerprint()


X, Y, C = images(6, side=4), torch.arange(6) % 2, ['a', 'b']
@pytest.mark.parametrize('make, words', [
    (lambda: ImageData(X.float(), Y, C), 'x must hold uint8 pixels.*torch.float32'),
    (lambda: ImageData(X[:, :2], Y, C), r'1 or 3 channels.*\(6, 2, 4, 4\)'),
    (lambda: ImageData(X[:, :, :3], Y, C), r'H = W.*\(6, 3, 3, 4\)'),
    (lambda: ImageData(X[0], Y, C), 'must have shape'),
    (lambda: ImageData(X[:0], Y[:0], C), 'empty'),
    (lambda: ImageData(X, Y[:5], C), 'one label for each of the 6 images'),
    (lambda: ImageData(X, Y.float(), C), 'y must hold integers'),
    *[(lambda s=s: ImageData(X, Y, C, shapes=s), 'shapes must be height and width of each of the 6 images')
      for s in ([[1, 1]]*5, [1]*6, torch.ones(6, 2), [[0, 0]]*6, [[1, -1]]*6)],
    (lambda: ImageData(X, Y + 1, C), 'labels must be from 0 to 1.*holds 2'),
    (lambda: ImageData(X, Y - 1, C), 'labels must be from 0 to 1.*holds -1'),
    (lambda: ImageData(X, 0*Y, C), "at least 2 classes.*'a'"),
    (lambda: ImageData(X, 0*Y, ['a']), 'at least 2 classes'),
    (lambda: ImageData(X, Y, ['a', 'a']), 'different names'),
    *[(lambda size=size: ImageData(X, Y, C, size=size), f'size must be a whole number from 1 to 4,096, but is {size}')
      for size in (0, 8.5, math.nan, True)],
    (lambda: ImageData(X, Y, C, mean=[0.5]), 'mean must hold one number for each of the 3 channels'),
    *[(lambda s=s: ImageData(X, Y, C, std=[1, 1, s]), 'std must be finite numbers greater than 0')
      for s in (0, -1, math.nan, math.inf)],
    *[(lambda m=m: ImageData(X, Y, C, mean=[0, 0, m]), 'mean must be finite numbers')
      for m in (math.nan, math.inf, -math.inf)],
    (lambda: ImageData(X, Y, C).replace(mean=[0.5]*3, std=[1, math.nan, 1]), 'std must be finite'),
    (lambda: ImageData(X, Y, C).replace(sizes=3), 'replace can change.*sizes'),
    (lambda: ImageData(X, Y, C).subset([]), 'at least 1 image'),
    (lambda: ImageData(X, Y, C).subset([6]), 'indices must be from 0 to 5'),
    (lambda: ImageData(X, Y, C).unlabelled([-1]), 'keep must be from 0 to 5'),
    *[(lambda n=n: ImageData(X, Y, C).batches(n), 'batch_size must be a whole number of at least 1')
      for n in (0, 2.5, math.nan)],
    *[(lambda pad=pad: CropFlip(pad), 'pad must be a whole number from 0 to 1,000') for pad in (-1, 0.5, math.nan)],
    *[(lambda size=size: ResizedCrop(size), 'size must be a whole number from 1 to 4,096')
      for size in (0, 7.5, math.nan)],
    (lambda: ResizedCrop(8, scale=(0, 1)), 'scale'),
    (lambda: ResizedCrop(8, ratio=(2, 1)), 'ratio'),
    *[(lambda mask=mask: ImageData(X, Y, C).subset(mask), 'indices must be .*True or False for each of the 6 images')
      for mask in (torch.ones(5, dtype=torch.bool), [True]*7, torch.ones(6, 1, dtype=torch.bool))],
    (lambda: ImageData(X, Y, C).unlabelled([True]), 'keep must be .*for each of the 6 images'),
    *[(lambda i=i: ImageData(X, Y, C).subset(i), 'indices must be') for i in ([0.7, 1.2], ['a'], [[0, 1]], [2**70])],
    *[(lambda i=i: ImageData(X, Y, C).get(i), 'index must be') for i in ([-1], [6], [0.5], Y == 0, 'ab')],
    (lambda: ImageData(X, Y, C, augment=CropFlip(1)).get([0, 1], [0, 9]), 'view must be from 0 to 8'),
    (lambda: ImageData(X, Y, C).get([0, 1], [0]), 'index and view must be of one shape'),
    (lambda: list(ImageData(X, Y, C).stream([Y])), 'each of plan must be a pair'),
    (lambda: ImageData(X, Y, C).to('gpu'), "device must be one that this machine has .*'gpu'"),
    (lambda: ImageData(X, Y, C).replace(size=2, crop=1e-9), 'crop must be'),
    (lambda: ImageData(X, Y, C).recast(torch.rand(2, 1, 4, 4), ImageData(X, Y, C)), 'other must be'),
    (lambda: ImageData(X, Y, C).recalls(torch.tensor([0, 1])), 'chosen must be the class of each of the 6 images'),
    (lambda: ImageData(X, Y, C).measure([]), 'answers must be at least one'),
    (lambda: ImageData(X, Y, C).measure([torch.zeros(6, 2)]), 'each of answers must be a pair'),
    (lambda: ImageData(X, Y, C).measure([(torch.zeros(6, 3), ImageData(X, Y, C).get(range(6)))]),
     r'each of answers must be logits of shape \(B, 2\)'),
    (lambda: calibration_error(torch.zeros(2, 3), torch.tensor([0, 3])), 'labels must be from 0 to 2'),
    (lambda: calibration_error(torch.full((2, 3), math.nan), torch.tensor([0, 1])), 'logits must be finite'),
    (lambda: channel_stats(torch.zeros(1, 256)), 'counts must be'), (lambda: epoch_order(10**12, 0, 0), 'n must be'),
    (lambda: resize(torch.zeros(1, 3, 4, 4), 10**6), 'size must be'), (lambda: mix(0.5), 'numbers must be integers'),
    (lambda: show_images(X, titles=['one']), 'titles must be one for each image'),
    (lambda: stratified(Y, 2, seed=-1), 'seed must be a whole number from 0'),
    (lambda: few_labels(ImageData(X[:3], [0, 0, 1], C), 2), "train must have .*a single image of 'b'"),
])
def test_errors_are_sentences(make, words):
    with pytest.raises(ValueError, match=words) as e: make()
    assert str(e.value).endswith('.') and '\n' not in str(e.value)


def test_whole_numbers_of_every_type_are_positions_labels_and_shapes():
    types = torch.uint8, torch.int8, torch.int16, torch.int32
    whole = ImageData(X, Y, C, shapes=[[4, 4]]*6)
    for kind in types:
        d = ImageData(X, Y.to(kind), C, shapes=torch.full((6, 2), 4, dtype=kind))
        i = torch.tensor([1, 5]).to(kind)
        assert d.fingerprint() == whole.fingerprint() == d.subset(range(6)).fingerprint()
        assert torch.equal(d.get(i).x, whole.get([1, 5]).x) and d.get(i.tolist()).index.dtype == torch.int64
        assert d.subset(i).fingerprint() == whole.subset(np.array([1, 5])).fingerprint()
    mask = torch.tensor([False, True, False, False, False, True])
    names = {whole.subset(some).fingerprint() for some in (mask, mask.tolist(), i)}
    assert len(names) == 1
    assert whole.unlabelled([]).labelled.sum() == 0


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
    assert [len(s) for s in splits] == [1079, 359, 359] and len(raw) > 1780
    assert sum(len(s) for s in splits) == 1797
    assert all(s.y.bincount().min() >= 0.08*len(s) for s in splits)
    train, valid, test = splits
    assert (train.channels, train.size, train.n_views, valid.n_views, test.n_views) == (1, 8, 9, 1, 1)
    assert train.mean == valid.mean == test.mean == channel_stats(count_values(train.x))[0]
    assert train.std == valid.std == test.std
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
    assert torch.equal(few_labels(train, 100)[0].x, labelled.x)
    assert not torch.equal(few_labels(train, 100, seed=1)[0].x, labelled.x)
    assert len(few_labels(transfer, 50)[0]) == 50  # of the 100 that have labels
    for n in (9, 1070):
        with pytest.raises(ValueError, match='n must be from 10 to 1069'): few_labels(train, n)
    rare = ImageData(images(100), torch.tensor([0]*50 + [1]*48 + [2]*2), list('abc'))
    with pytest.raises(ValueError, match="with 3 labels 'c' gets none"): few_labels(rare, 3)


# --- what training asks of a data set ---

class Numbers(Data):
    "As little as a data set can be."
    device, x = torch.device('cpu'), torch.linspace(0, 1, 7)
    def __len__(self): return 7
    def get(self, index, view=None): return Batch(self.x[index], (self.x[index] > 0.5).long(), index, view)


def test_a_data_set_of_ones_own_has_answers_to_all_other_questions():
    d = Numbers()
    assert torch.equal(torch.cat([b.x for b in d.batches(3)]), d.x) and [len(b.x) for b in d.batches(3)] == [3, 3, 1]
    index = torch.tensor([4, 0])
    assert torch.equal(d.view_of(3, 5, index), torch.zeros(2, dtype=torch.long))
    assert torch.equal(d.view_number(index, d.view_at(index, index)), index)
    assert d.labelled.all() and d.labelled.shape == (7,) and d.chance is None and d.measures == ()
    assert d.seen() is d and d.seen(mean=None, std=None, size=None) is d
    with pytest.raises(ValueError, match='a Numbers gives its items in one form, but a network wants its own size'):
        d.seen(size=3, mean=None)
    assert next(d.stream([(index, index)])).weight is None


def test_what_a_data_set_lacks_is_named():
    for name in ('fingerprint', 'to', 'subset', 'measure', 'classes'):
        said = f"a data set needs '{name}', which Numbers lacks"
        with pytest.raises(AttributeError, match=said): getattr(Numbers(), name)
    assert copy.deepcopy(Numbers()).n_views == 1 and not hasattr(Numbers(), 'x_y')


def test_more_views_are_handed_out_by_the_hash():
    class Many(Numbers): n_views = 5
    index = torch.arange(7)
    views = torch.stack([Many().view_of(1, e, index) for e in range(40)])
    assert set(views.flatten().tolist()) == set(range(5))
    assert torch.equal(views, torch.stack([mix(1, e, index) % 5 for e in range(40)]))


def test_a_measure_knows_which_way_is_better():
    assert max([1., 3., 2.], key=Measure('accuracy').key) == 3
    assert max([1., 3., 2.], key=Measure('loss', higher=False).key) == 1
    m = Measured(accuracy=0.5, loss=1/3)
    assert m.loss == m['loss'] and list(m) == ['accuracy', 'loss'] and repr(m) == 'Measured(accuracy=0.5, loss=0.3333)'
    with pytest.raises(AttributeError, match="'ece' was not measured; there is accuracy, loss"): m.ece


@quick
@given(st.integers(2, 80), st.integers(1, 90), st.integers(0, 10**6))
def test_what_is_measured_does_not_depend_on_the_batches(n, size, seed):
    g = torch.Generator().manual_seed(seed)
    d, logits = dataset(max(n, 3)), 3 * torch.randn(max(n, 3), 3, generator=g)
    answers = ((logits[b.index], b) for b in d.batches(size))
    found = d.measure(answers)
    names = {'accuracy', 'balanced_accuracy', 'loss', 'ece'}
    assert list(found) == [m.name for m in d.measures] and set(found) == names
    assert found['accuracy'] == (logits.argmax(1) == d.y).double().mean().item()
    assert found['loss'] == pytest.approx(F.cross_entropy(logits, d.y).item(), rel=1e-5)
    assert found['ece'] == pytest.approx(calibration_error(logits, d.y), abs=1e-12)


def test_labels_and_chance_are_counted():
    d = dataset(9).unlabelled([0, 3, 4])  # classes 0, 0 and 1
    assert d.labelled.nonzero()[:, 0].tolist() == [0, 3, 4]
    assert d.chance.tolist() == pytest.approx([2/3, 1/3, 0])


def test_a_network_that_wants_another_form_gets_it_from_the_stored_pixels():
    d = dataset(side=16)
    assert d.seen(mean=d.mean, std=tuple(d.std), size=16) is d
    for data in (d, d.replace(size=5), d.replace(augment=ResizedCrop(4)), d.replace(views=3)):
        theirs = data.seen(mean=[0.1]*3, std=[2.]*3, size=9)
        augment = ResizedCrop(9) if isinstance(data.augment, ResizedCrop) else data.augment
        same = d.replace(mean=[0.1]*3, std=[2.]*3, size=9, augment=augment)
        index = torch.arange(60)
        view = data.view_of(0, 1, index)
        assert theirs.x is d.x and theirs.get(index, view).x.shape == (60, 3, 9, 9)
        assert torch.equal(theirs.get(index, view).x, same.get(index, view).x)
        assert theirs.n_views == data.n_views and torch.equal(theirs.view_of(0, 1, index), view)
        assert theirs.fingerprint(labels=False) == same.fingerprint(labels=False)


def test_a_picture_of_ones_own_is_recast():
    d = dataset()
    theirs, x = d.seen(mean=[0.1]*3, std=[2.]*3), d.get(torch.arange(60)).x
    torch.testing.assert_close(d.recast(x, theirs), theirs.get(torch.arange(60)).x, rtol=1e-4, atol=1e-5)
    assert d.recast(x, d.seen(size=5)).shape == (60, 3, 5, 5)


@pytest.mark.parametrize('size, crop, big, left', [(12, 0.75, 16, 2), (7, 7/8, 8, 0), (13, 0.875, 15, 1),
                                                   (6, 0.6, 10, 2)])
@pytest.mark.parametrize('augment', [CropFlip(2, flip=True), ResizedCrop(9)])
def test_a_network_that_saw_the_centre_of_its_images_sees_it_of_every_view(size, crop, big, left, augment):
    "As torchvision's Resize and CenterCrop do with the view, on whose side they agree."
    d, index = dataset(side=16, augment=augment), torch.arange(60)
    view, theirs = d.view_of(0, 1, index), d.seen(size=size, crop=crop, mean=[0.1]*3, std=[2.]*3)
    whole = d.seen(size=big, mean=[0.1]*3, std=[2.]*3).get(index, view).x
    assert theirs.size == size and theirs.crop == crop
    expected = TF.center_crop(whole, [size, size])
    assert torch.equal(theirs.get(index, view).x, expected)
    assert torch.equal(expected, whole[..., left:left + size, left:left + size])
    assert theirs.x is d.x and theirs.n_views == d.n_views and f'the centre of {big}²' in repr(theirs)


def test_a_crop_is_part_of_the_form_and_of_no_other_fingerprint():
    d = dataset(side=16)
    names = [x.fingerprint(labels) for labels in (True, False)
             for x in (d, d.replace(size=12), d.seen(size=12, crop=0.75))]
    assert len(set(names)) == 6 and d.replace(crop=1.).fingerprint() == d.fingerprint()
    assert d.seen(size=16, crop=1.) is d and d.seen(size=12, crop=0.75).seen(size=12, crop=0.75).size == 12
    near = d.seen(size=16, crop=0.5)  # of the same size, and yet another picture
    assert not torch.equal(near.get(torch.arange(3)).x, d.get(torch.arange(3)).x)
    cut = d.replace(crop=0.75)  # without a size, so much of what the augmentation gives
    assert cut.size == 12 and torch.equal(cut.get(torch.arange(3)).x, d.get(torch.arange(3)).x[..., 2:-2, 2:-2])
    assert cut.seen(mean=[0.]*3).crop == 0.75 and cut.seen(size=16).crop == 1  # a size alone is that of the whole view
    assert dataset(augment=ResizedCrop(16)).replace(crop=0.75).size == 12
    for wrong in (0, -1, 1.5, math.nan, '1', True):
        with pytest.raises(ValueError, match='crop must be greater than 0 and at most 1'): d.replace(crop=wrong)


def test_a_picture_of_ones_own_is_cut_for_a_network_that_saw_the_centre():
    d, index = dataset(side=16), torch.arange(60)
    theirs, x = d.seen(size=12, crop=0.75, mean=[0.1]*3, std=[2.]*3), d.get(torch.arange(60)).x
    torch.testing.assert_close(d.recast(x, theirs), theirs.get(index).x, rtol=1e-4, atol=1e-5)
    assert torch.allclose(theirs.recast(theirs.get(index).x, theirs), theirs.get(index).x, atol=1e-5)  # cut already
    assert theirs.recast(theirs.get(index).x, d).shape == x.shape  # what was cut off is not known


def test_a_sight_is_a_value():
    assert Sight(augment=ResizedCrop(8)).wanting(size=4) == Sight(augment=ResizedCrop(4), size=4)
    assert Sight(size=8).wanting() == Sight(size=8)
    assert Sight(augment=ResizedCrop(8)).wanting(size=7, crop=0.875) == Sight(augment=ResizedCrop(8), size=7,
                                                                              crop=0.875)
    said = 'replace can change mean, std, augment, size, views, crop, name, by_class, but was given colour'
    with pytest.raises(ValueError, match=said): dataset().replace(colour=3)
    with pytest.raises(TypeError, match='colour'): ImageData(images(), torch.arange(60) % 3, list('abc'), colour=3)


# --- calibration ---

@pytest.mark.parametrize('shapes', [((4, 3), (4, 1)), ((4, 3), (3,)), ((4, 3), ()), ((0, 3), (0,)), ((4, 1), (4,))])
def test_calibration_error_refuses_what_would_be_broadcast(shapes):
    logits, labels = map(torch.zeros, shapes)
    with pytest.raises(ValueError, match='labels must be of the shape|at least 1 row'):
        calibration_error(logits, labels.long())


def slow_calibration_error(logits, labels, bins):
    "Guo et al. 2017, eq. 3, bin by bin in numpy."
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    confidence, right, total = p.max(1), p.argmax(1) == labels, 0.
    for b in range(bins):
        inside = (confidence >= b / bins) & ((confidence < (b + 1) / bins) if b < bins - 1 else True)
        if inside.any(): total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return total


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 60), st.integers(2, 6), st.integers(1, 20), st.integers(0, 10**6))
def test_calibration_error_is_the_papers(n, classes, bins, seed):
    g = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, classes, generator=g, dtype=torch.float64)
    labels = torch.randint(classes, (n,), generator=g)
    expected = slow_calibration_error(logits.numpy(), labels.numpy(), bins)
    assert calibration_error(logits, labels, bins) == pytest.approx(expected, abs=1e-9)


def test_numbers_of_numpy_make_the_same_data():
    x, y = torch.arange(256).reshape(4, 1, 8, 8).to(torch.uint8), torch.arange(4) % 2
    def data(whole, real, flag):
        augment = ResizedCrop(whole(8), (real(0.25), real(1)), (real(0.5), real(2)), flag(True))
        views = ImageData(x, y, ['a', 'b'], augment=augment, size=whole(6), crop=real(0.75), views=whole(5))
        return [views, ImageData(x, y, ['a', 'b'], augment=CropFlip(whole(1), flag(True)))]
    ours, theirs = data(int, float, bool), data(np.int64, np.float32, np.bool_)
    assert [d.fingerprint() for d in ours] == [d.fingerprint() for d in theirs]
    assert type(theirs[0].size) is int and type(theirs[0].crop) is float and type(theirs[0].n_views) is int


@pytest.mark.parametrize('turned', [lambda a: a[::-1], lambda a: a[..., ::-1],
                                    lambda a: a.astype(a.dtype.newbyteorder()),
                                    lambda a: a[::-1].astype(a.dtype.newbyteorder())])
def test_arrays_that_run_backwards_or_are_of_another_byte_order_are_read(turned):
    x, y = np.arange(256, dtype=np.uint8).reshape(4, 1, 8, 8), np.array([0, 1, 1, 0, 1], 'i4')[:4]
    data = ImageData(turned(x), turned(y), ['a', 'b'])
    assert data.x.tolist() == turned(x).tolist() and data.y.tolist() == turned(y).tolist()
    assert data.get(turned(np.arange(4))).index.tolist() == turned(np.arange(4)).tolist()
