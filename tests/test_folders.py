"""Folders: torchvision's formats, images on disk, files that do not fit in memory, data by name."""
import gzip, hashlib, io, pickle, struct, subprocess, sys, tarfile, time
import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torchvision import datasets, transforms
from distill_nb import folders
from distill_nb.data import CropFlip, ResizedCrop, channel_stats, count_values, epoch_order, few_labels
from distill_nb.folders import (ImageFiles, cifar10, cifar100, fashion_mnist, image_folder, load_data, mnist,
                                read_images)


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
    content = {name: part(2*classes if coarse else 20) for name, _ in kind.train_list}
    content[kind.test_list[0][0]] = part(classes)
    names = {'fine_label_names' if coarse else 'label_names': [f'class {i}' for i in range(classes)]}
    files = {k: pickle.dumps(v) for k, v in (content | {kind.meta['filename']: names}).items()}
    md5 = {k: hashlib.md5(v).hexdigest() for k, v in files.items()}
    for which in ('train_list', 'test_list'):
        monkeypatch.setattr(kind, which, [[n, md5[n]] for n, _ in getattr(kind, which)])
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
    assert [len(s) for s in splits] == [80, 20, 10] and [s.n_views for s in splits] == [162, 1, 1]
    assert torch.equal(splits.test.x, torch.from_numpy(content['test_batch']['data']).view(10, 3, 32, 32))
    assert splits.test.y.tolist() == list(range(10))
    assert splits.train.mean == splits.valid.mean == splits.test.mean == channel_stats(count_values(splits.train.x))[0]
    everything = {im.numpy().tobytes() for s in splits[:2] for im in s.x}
    assert everything == {row.tobytes() for k, v in content.items() if k != 'test_batch' for row in v['data']}
    assert splits.train.classes[3] == 'class 3' and splits.valid.y.bincount().tolist() == [2]*10
    assert cifar10(tmp_path/'root', valid=0.2, size=64).train.get([0]).x.shape[-1] == 64


def test_cifar100(tmp_path, monkeypatch, no_network):
    content = write_cifar(tmp_path/'root', monkeypatch, coarse=True)
    splits = cifar100(tmp_path/'root', valid=0.5)
    assert [len(s) for s in splits] == [100, 100, 100]
    assert len(splits.train.classes) == 100 and splits.train.n_views == 162
    assert torch.equal(splits.test.x, torch.from_numpy(content['test']['data']).view(100, 3, 32, 32))


@pytest.mark.parametrize('name, kind, views', [
    ('mnist', datasets.MNIST, 25), ('fashion_mnist', datasets.FashionMNIST, 50)])
def test_mnist_and_fashion(tmp_path, monkeypatch, no_network, name, kind, views):
    content = write_mnist(tmp_path, kind, monkeypatch)
    splits = load_data(name, root=tmp_path, valid=0.2)
    train, _, test = splits
    assert [len(s) for s in splits] == [48, 12, 20]
    assert (train.channels, train.size, train.n_views) == (1, 28, views)
    assert torch.equal(test.x[:, 0], torch.from_numpy(content['t10k'][0]))
    assert test.y.tolist() == content['t10k'][1].tolist()


@pytest.mark.parametrize('read, url, place', [
    (cifar10, 'https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz', ''), (cifar100, 'cifar-100-python.tar.gz', ''),
    (mnist, 't10k-labels-idx1-ubyte.gz', 'MNIST/raw'),
    (fashion_mnist, 'train-images-idx3-ubyte.gz', 'FashionMNIST/raw')])
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
    runs_code = b'cos\nsystem\n(S"false"\ntR.'  # a pickle
    (tmp_path/'c'/datasets.CIFAR10.base_folder/'data_batch_3').write_bytes(runs_code)
    (tmp_path/'c'/datasets.CIFAR10.filename).unlink()
    with pytest.raises(ValueError, match='CIFAR10 cannot be read'): cifar10(tmp_path/'c', valid=0.2)


@pytest.mark.parametrize('valid', [0, 1, 1.5])
def test_valid_is_a_share(tmp_path, monkeypatch, valid):
    write_mnist(tmp_path, datasets.MNIST, monkeypatch)
    for read, path in ((mnist, tmp_path), (image_folder, write_folder(tmp_path/'f'))):
        with pytest.raises(ValueError, match='valid must be a share between 0 and 1'): read(path, valid=valid)


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
    for name in ('val', 'valid', 'validation'):
        assert len(image_folder(write_folder(tmp_path/name, parts=('train', 'test', name))).valid) == 20
    both = write_folder(tmp_path/'both', parts=('train', 'test', 'val', 'valid'))
    with pytest.raises(ValueError, match='one validation split.*val and valid'): image_folder(both)


def test_folder_with_train_and_test(tmp_path):
    splits = image_folder(write_folder(tmp_path/'pets'))
    assert [len(s) for s in splits] == [18, 2, 20] and splits.train.classes == ['cat', 'dog']
    assert splits.train.name == 'pets train'
    def theirs(part): return datasets.ImageFolder(tmp_path/'pets'/part, transform=transforms.PILToTensor())
    assert torch.equal(splits.test.x, torch.stack([x for x, _ in theirs('test')]))
    assert splits.test.y.tolist() == theirs('test').targets
    files = {i.numpy().tobytes() for s in splits[:2] for i in s.x}
    assert files == {x.numpy().tobytes() for x, _ in theirs('train')}
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
    same, other = image_folder(tmp_path).test.fingerprint(), image_folder(tmp_path, seed=1).test.fingerprint()
    assert same == splits.test.fingerprint() != other
    vehicles = write_folder(tmp_path/'vehicles', parts=('.',), classes=('bus', 'train'))  # a class may be called train
    assert image_folder(vehicles).train.classes == ['bus', 'train']


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
    shown = splits.train.get(index, splits.train.view_of(0, 0, index))
    assert shown.x.shape == splits.test.get(index).x.shape == (3, 3, 64, 64)
    assert image_folder(tmp_path, valid=0.3).train.size == 100


def test_small_images_are_enlarged_on_the_device(tmp_path):
    splits = image_folder(write_folder(tmp_path), size=32)
    assert splits.train.side == 12 and splits.train.augment == CropFlip(1, flip=True)
    assert splits.train.get([0], [3]).x.shape == (1, 3, 32, 32)


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
    for hidden in ('.ipynb_checkpoints', 'cat/.ipynb_checkpoints', 'cat/deeper/.thumbs'):
        write_image(tmp_path/'train'/hidden/'A.png')
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
    words = '3 of 40 images', 'train/cat/03.png', 'train/dog/04.png', 'test/dog/05.jpg', 'skip_damaged=True'
    assert all(w in message for w in words) and '\n' not in message
    assert capsys.readouterr().err.count('Left out') == 0
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
    (lambda p: (rm(p/'test'/'cat'), rm(p/'test'/'dog'), (p/'test').rmdir()),
     'folders train and test, but test is missing; it holds train'),
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
        for name in ('classes', 'channels', 'side', 'size', 'n_views', 'mean', 'std', 'name', 'augment', 'device'):
            assert getattr(e, name) == getattr(l, name)
        assert len(e) == len(l) and e.fingerprint() == l.fingerprint()
        plan = [(i, e.view_of(0, 3, i)) for i in epoch_order(len(e), 0, 3).split(7)]
        for ours, theirs in ((e.stream(plan), l.stream(iter(plan))), (e.batches(6), l.batches(6))):
            for a, b in zip(ours, theirs, strict=True): assert all(torch.equal(s, t) for s, t in zip(a[:4], b[:4]))
    e, l = eager.train, lazy.train
    for change in (lambda d: d.subset([3, 1, 17]), lambda d: d.subset(d.y == 1), lambda d: d.unlabelled([4]),
                   lambda d: few_labels(d, 4)[0], lambda d: few_labels(d, 4)[1], lambda d: d.replace(size=8),
                   lambda d: d.replace(mean=[0.5]*d.channels, std=[0.5]*d.channels)):
        a, b = change(e), change(l)
        assert a.fingerprint() == b.fingerprint() and isinstance(b, ImageFiles)
        pairs = zip(a.get([1, 0], [5, 0])[:4], b.get([1, 0], [5, 0])[:4])
        assert all(torch.equal(s, t) for s, t in pairs)
    assert l.to('cpu').fingerprint() == l.fingerprint() and l.replace(workers=1).workers == 1


def test_loading_takes_no_numbers_from_the_global_generator(tmp_path):
    lazy = image_folder(write_folder(tmp_path, n=12), max_bytes=0, workers=0).train
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(lazy.batches(4))
    assert torch.equal(before, torch.get_rng_state())


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
    heavy = ('sklearn', 'torchvision', 'matplotlib', 'PIL')
    code = f'import sys, distill_nb.folders; print([m for m in {heavy} if m in sys.modules])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout == '[]\n'


# --- data by name ---

@pytest.mark.parametrize('size', [100, 1000000])
def test_only_a_few_images_are_read_ahead_of_their_use(size, tmp_path, monkeypatch):
    "A table of a million images must not wait in memory for a slow network."
    files, done = [tmp_path/f'{i}.png' for i in range(600)], []
    for f in files: f.touch()
    monkeypatch.setattr('os.path.getsize', lambda f: size)  # small files have one thread, large ones several
    monkeypatch.setattr('os.cpu_count', lambda: 4)
    monkeypatch.setattr(folders, '_read_image', lambda file, **kwargs: done.append(file) or file)
    for i, file in enumerate(read_images(files, 8)):
        if i % 50 == 0: time.sleep(0.01)
        assert file == files[i] and len(done) - i <= 16*(4 + 2)
    assert sorted(done) == sorted(files)


def test_an_unknown_name_is_refused_together_with_those_that_are_known():
    known = 'digits, mnist, fashion_mnist, cifar10, cifar100 or folder:PATH'
    with pytest.raises(ValueError) as e: load_data('imagenet')
    assert str(e.value) == f"data must be {known}, but is 'imagenet'."
