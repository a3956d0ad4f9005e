"""The data sets of others: any of images and labels, torchvision's formats, Hugging Face's, data by name."""
import gzip, hashlib, io, multiprocessing, pickle, random, re, struct, tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset
from torchvision import datasets, transforms
from torchvision.datasets import ImageFolder

from distill_nb.rows import UNLABELLED
from distill_nb.views import CropFlip
from distill_nb.protocol import class_weights
from distill_nb.data import ImageData, Splits, channel_stats, count_values, few_labels
from distill_nb.images import Form
from distill_nb.folders import image_folder
from distill_nb.sets import (ImageItems, Items, _pass, cifar10, cifar100, dataset_splits, fashion_mnist, image_data,
                             load_data, mnist)
from distill_nb.contract import Teacher
from distill_nb.students import check_student
from distill_nb.training import Recipe, Supervised, evaluate, fit, predict
from distill_nb.compare import Contender, compare
from distill_nb.exam import check_teacher
from distill_nb.cache import CachedTeacher
from distill_nb.self_distillation import SelfTeacher, repeat_labelled
from distill_nb.exits import EarlyExits, exit_logits, measure_exits
from distill_nb.teachers import make_teacher, try_normalisations
from distill_nb.methods import Task, choose_setting, rehearse
from small import write_folder


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


def test_an_unknown_name_is_refused_together_with_those_that_are_known():
    known = 'digits, mnist, fashion_mnist, cifar10, cifar100 or folder:PATH'
    with pytest.raises(ValueError) as e: load_data('imagenet')
    assert str(e.value) == f"data must be {known}, but is 'imagenet'."

# --- data sets of others ---

CLASSES = ['dark', 'middle', 'bright']
PIXELS = torch.randint(0, 256, (30, 3, 9, 9), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
LABELS = torch.arange(30) % 3


class Made(Dataset):
    "Items of colours: `image` makes them of a tensor (3, 9, 9), `label` of a number."
    classes = CLASSES

    def __init__(self, image=lambda x: Image.fromarray(x.permute(1, 2, 0).numpy()), label=int, n=30):
        self.image, self.label, self.n = image, label, n

    def __len__(self): return self.n
    def __getitem__(self, i): return self.image(PIXELS[i]), self.label(LABELS[i])


def hwc(x): return x.permute(1, 2, 0)
def floats(x): return x.float()/255


IMAGES = {'an image': Made().image, 'an array': lambda x: hwc(x).numpy(), 'channels first': lambda x: x.numpy(),
          'a tensor': lambda x: x, 'a tensor like an array': hwc, 'ToTensor': floats,
          'half': lambda x: floats(x).half(), 'float64': lambda x: hwc(floats(x)).double().numpy(),
          'int64': lambda x: x.long(), 'lists': lambda x: x.tolist(),
          'uint16': lambda x: np.maximum(hwc(x).numpy().astype(int)*257 - 100, 0).astype(np.uint16),
          'opaque': lambda x: Image.fromarray(hwc(x).numpy()).convert('RGBA')}


@pytest.mark.parametrize('kind', IMAGES)
def test_the_same_pixels_in_every_dress(kind):
    made = image_data(Made(IMAGES[kind]), name='made')
    assert torch.equal(made.x, PIXELS) and made.y.tolist() == LABELS.tolist() and made.classes == CLASSES
    assert made.fingerprint() == ImageData(PIXELS, LABELS, CLASSES).fingerprint() and made.name == 'made'


@pytest.mark.parametrize('grey', [lambda x: x[0].numpy(), lambda x: x[:1], lambda x: x[:1].permute(1, 2, 0).numpy(),
                                  lambda x: floats(x[0]), lambda x: Image.fromarray(x[0].numpy()),
                                  lambda x: Image.fromarray(x[0].numpy().astype(np.uint16)*257)])
def test_grey_images(grey): assert torch.equal(image_data(Made(grey)).x, PIXELS[:, :1])


def test_where_channels_stand_in_doubt():
    small = PIXELS[..., :3, :3]
    assert torch.equal(image_data([(x, i % 2) for i, x in enumerate(small)], list('ab')).x, small)
    arrays = [(x.numpy(), i % 2) for i, x in enumerate(small)]
    assert torch.equal(image_data(arrays, list('ab')).x, small.permute(0, 3, 1, 2))


@pytest.mark.parametrize('colours', [lambda x: x[0], hwc])
def test_sixteen_bits_have_one_scale_however_dark_an_image_is(colours, capsys):
    "Else the dark frame of a series would be as bright as the others."
    made = image_data(Made(lambda x: colours(x).numpy().astype(np.uint16) + 257*100*(int(x[0, 0, 0]) % 2)))
    bright = PIXELS[:, 0, 0, 0] % 2 == 1
    assert 0 < bright.sum() < len(bright) and made.x[bright].min() >= 100 and made.x[~bright].max() <= 1
    assert 'look' not in capsys.readouterr().err
    image_data(Made(lambda x: colours(x).numpy().astype(np.uint16)))
    said = f'greatest value of 16 bits is {PIXELS.max() if colours is hwc else PIXELS[:, 0].max()} of 65,535'
    assert f'{said}, so these images look black' in capsys.readouterr().err


def test_deep_transparent_and_turned_images_are_read_as_files_are_and_said(capsys):
    image_data(Made(lambda x: x[0].numpy().astype(np.uint16)*16))
    assert capsys.readouterr().err == ('30 of 30 images are of 16 bits, of which 8 are kept.\nThe greatest value '
                                       'of 16 bits is 4,080 of 65,535, so these images look dark: scale them in the '
                                       'data set, all alike.\n')
    clear = image_data(Made(lambda x: np.concatenate([hwc(x), np.zeros((9, 9, 1), np.uint8)], 2)))
    assert clear.x.min() == 255 and 'transparent, and laid on white' in capsys.readouterr().err
    exif = Image.Exif()
    exif[274] = 6  # to be turned clockwise

    def held(x):
        file = io.BytesIO()
        Image.fromarray(hwc(x).numpy()).save(file, 'png', exif=exif)
        return {'bytes': file.getvalue(), 'path': None}  # as Hugging Face gives what it does not decode
    assert torch.equal(image_data(Made(held)).x, PIXELS.rot90(-1, (2, 3)))
    assert '30 of 30 images are turned upright' in capsys.readouterr().err


def test_an_image_that_is_not_decoded_may_be_in_a_file(tmp_path):
    def held(x):
        file = tmp_path/f'{hashlib.sha256(x.numpy().tobytes()).hexdigest()}.png'
        Image.fromarray(hwc(x).numpy()).save(file)
        return {'bytes': None, 'path': str(file)}  # as Hugging Face gives files with decode=False
    assert torch.equal(image_data(Made(held)).x, PIXELS)


def broken(x):
    "The beginning of a file."
    file = io.BytesIO()
    Image.fromarray(hwc(x).numpy()).save(file, 'png')
    return {'bytes': file.getvalue()[:150]}


NORMAL = transforms.Normalize([0.5]*3, [0.5]*3)


@pytest.mark.parametrize('image, said', [
    (lambda x: NORMAL(floats(x)), 'reach from -1 to .*: leave Normalize out: images are normalised on the device'),
    (lambda x: x.float(), 'floats, which must lie between 0 and 1, .*give such an image as uint8'),
    (lambda x: floats(x)*torch.nan, 'reach from nan to nan'),
    (lambda x: x.int() - 1000, 'must hold uint8 or uint16, or floats between 0 and 1, but holds int32 from -1000 to'),
    (lambda x: x.long()*1000, 'holds int64 from'), (lambda x: np.array([['a']*9]*9), 'but holds <U1'),
    (lambda x: x[:2], r'1, 3 or 4 channels, but has the shape \(2, 9, 9\)'), (lambda x: x[None], r'\(1, 3, 9, 9\)'),
    (lambda x: x[:, :0, :0], r'its image has no pixels, but the shape \(3, 0, 0\)'),
    (lambda x: Image.new('RGB', (9, 0)), r'its image has no pixels, but the size \(9, 0\)'),
    (lambda x: {'bytes': b'no image'}, 'its bytes are no image that Pillow can read'),
    (lambda x: {'bytes': None, 'path': 'gone.png'}, 'it cannot be read, .*gone.png'),
    (lambda x: {'bytes': None, 'path': None}, 'but is a dict'), (broken, 'it cannot be read, '),
    (lambda x: x.to_sparse(), 'it cannot be read, .*parse'),
    (lambda x: 'cat.jpg', 'must be one of Pillow, an array or a tensor, but is a str'),
    (lambda x: 1/0, 'it cannot be read, division by zero')])
def test_images_that_are_refused(image, said):
    with pytest.raises(ValueError, match=f'^item 0 of dataset: .*{said}.*[.]$') as e: image_data(Made(image))
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('label', [int, np.int64, np.uint8, lambda y: y, lambda y: y[None], lambda y: np.array([y]),
                                   lambda y: np.array(int(y))])
def test_labels_of_every_kind(label): assert image_data(Made(label=label)).y.tolist() == LABELS.tolist()


@pytest.mark.parametrize('label, said', [
    (lambda y: CLASSES[y], "is 'dark': number the names, with names.index.* class_encode_column"),
    (float, r'is a float, 0: give int\(label\)'), (lambda y: torch.eye(3)[y], r'shape \(3,\): of one-hot .* argmax'),
    (lambda y: [0, 1], r'shape \(2,\)'), (lambda y: {'boxes': 1}, 'is a dict'),
    (lambda y: 10**30, 'the number of a class, counted from 0, but has 100 bits'),
    (lambda y: np.uint64(2**63), 'but has 64 bits'), (lambda y: -10**5000, 'but has 16610 bits')])
def test_labels_that_are_refused(label, said):
    made = Made(label=label)
    with pytest.raises(ValueError, match=f'^item 0 of dataset: its label must be .*{said}'): image_data(made)


@pytest.mark.parametrize('none', [None, -1, -100])
def test_a_label_may_be_missing(none, capsys):
    some = image_data(Made(label=lambda y: none if y == 2 else int(y)))
    assert some.labelled.tolist() == (LABELS != 2).tolist() and some.y[2] == UNLABELLED
    assert capsys.readouterr().err == '10 of 30 items of dataset have no label: None, -100 or -1.\n'


def test_labels_that_do_not_count_from_0(capsys):
    with pytest.raises(ValueError, match='are -1 and 1: give 0'): image_data(Made(label=lambda y: 1 if y else -1))
    made = Made(label=lambda y: int(y) + 1)
    with pytest.raises(ValueError, match='labels must be from 0 to 2'): image_data(made)
    made.classes = None
    assert image_data(made).classes == ['0', '1', '2', '3']
    assert 'called 0 to 3, though no label is below 1' in capsys.readouterr().err
    far = TensorDataset(PIXELS, LABELS*10**9)
    with pytest.raises(ValueError, match='labels must be numbers of classes'): image_data(far)
    assert image_data(Made(label=lambda y: bool(y))).y.tolist() == (LABELS > 0).tolist()


class Once(Made):
    "Gives nothing but its first item."
    def __getitem__(self, i):
        assert i == 0
        return super().__getitem__(i)


WORDS = [(dict(augment=transforms.RandomHorizontalFlip()), 'augment must make views that have numbers, as CropFlip('
          'pad=4, flip=True) and ResizedCrop(size) do, but is a RandomHorizontalFlip.'),
         (dict(augment='flip'), 'do, but is a str.'), (dict(augment=CropFlip), 'do, but is a type.'),
         (dict(classes=4), 'classes must be the name of each class, in order, but is 4.'),
         (dict(classes='a'), 'classes must be at least 2 different names'),
         (dict(classes=['a', 'b', 'a']), 'classes must be at least 2 different names'),
         (dict(sise=3, size=3), "a keyword must be one of "), (dict(size=1.5), 'size must be a whole number'),
         (dict(workers=-1), 'workers must be a whole number'),
         (dict(max_bytes='2 GB'), "max_bytes must be a number of bytes, but is '2 GB'.")]
SEEN = [(dict(augment=None), 'do, but is a NoneType.'), (dict(mean=0.5), 'mean must be finite numbers, but is 0.5.'),
        (dict(mean=[0.5, float('nan'), 0]), 'mean must be finite numbers'), (dict(mean='grey'), 'mean must be finite'),
        (dict(std=[0.2, 0, 0.2]), 'std must be finite numbers greater than 0'), (dict(crop=2), 'crop must be greater'),
        (dict(views=2), 'views must be a whole number from 1 to the 1 that CropFlip')]
SPLIT = [(dict(seed=1.5), 'seed must be a whole number'), (dict(seed=-1), 'seed must be a whole number')]


@pytest.mark.parametrize('read, given, said', [(image_data, *w) for w in WORDS + SEEN] +
                         [(dataset_splits, *w) for w in WORDS + SPLIT])
def test_wrong_words_are_refused_before_anything_is_read(read, given, said):
    with pytest.raises(ValueError, match=re.escape(said)): read(Once(), **given)


DRAWS = {'torch': lambda x: x.flip(2) if torch.rand(()) < 0.5 else x,
         'numpy': lambda x: x.roll(np.random.randint(9), 2), 'random': lambda x: x.roll(random.randrange(9), 2),
         'seldom': lambda x: x.flip(2) if torch.rand(()) < 0.02 else x,
         'own generator': lambda x, own=np.random.default_rng(): x.flip(2) if own.random() < 0.5 else x}


@pytest.mark.parametrize('kind', DRAWS)
def test_random_transforms_are_refused(kind):
    for seed in range(5):
        torch.manual_seed(seed)
        with pytest.raises(ValueError, match=r'another each time it is asked for: leave random .*CropFlip\(pad=4'):
            image_data(Made(DRAWS[kind]))


def test_a_random_label_is_refused_and_a_number_that_changes_nothing_is_not():
    with pytest.raises(ValueError, match='leave random'): image_data(Made(label=lambda y: random.randrange(3)))
    assert len(image_data(Made(lambda x: (torch.rand(3), x)[1]))) == 30


@pytest.mark.parametrize('items, columns', [
    ([dict(image=x, label=y) for x, y in zip(PIXELS, LABELS)], None),
    ([dict(pixel_values=x, labels=y, name='a') for x, y in zip(PIXELS, LABELS)], None),
    ([dict(photo=x, kind=y) for x, y in zip(PIXELS, LABELS)], ('photo', 'kind')),
    ([('a', y, x) for x, y in zip(PIXELS, LABELS)], (2, 1)), (list(zip(PIXELS, LABELS)), None)])
def test_columns(items, columns):
    made = image_data(items, CLASSES, columns=columns)
    assert torch.equal(made.x, PIXELS) and torch.equal(made.y, LABELS)


@pytest.mark.parametrize('items, columns, said', [
    ([dict(photo=1, kind=2)], None, "but holds photo, kind: say which they are, such as columns="),
    ([(PIXELS[0], 1, 'path')], None, 'but holds 3 values: say which they are'),
    ([PIXELS[0]], None, 'but holds a Tensor: images alone can be given to dataset_splits, as unlabelled'),
    ([(PIXELS[0],)], None, 'but holds one value: images alone'),
    ([(PIXELS[0], 1)], (0, 5), 'it has no column 5, but holds 2 values'),
    ([dict(image=1, label=2)], ('img', 'label'), "it has no column 'img', but holds image, label"),
    ([(PIXELS[0], 1)], 'image', 'columns must be a pair of an image and a label')])
def test_columns_that_are_not_there(items, columns, said):
    with pytest.raises(ValueError, match=re.escape(said)): image_data(items, CLASSES, columns=columns)


class Stream(IterableDataset):
    def __iter__(self): return iter(Made())


@pytest.mark.parametrize('dataset, said', [
    (DataLoader(Made()), 'is a DataLoader: pass its data set, dataset=loader.dataset'),
    (Stream(), 'is a Stream, whose items have no numbers that stay: list(dataset)'),
    (iter([]), 'whose items have no numbers that stay'),
    ({'train': 1}, "pass one of its splits, such as dataset=data['train']"),
    (ImageData(PIXELS, LABELS, CLASSES), 'is a ImageData, which needs nothing more'), ('photos', 'image_folder(path)'),
    (PIXELS, 'ImageData(x, y, classes) takes pixels and labels'), ([], 'but is empty'), (3, 'but is a int.'),
    (None, 'but is a NoneType.')])
def test_what_is_no_data_set_of_numbered_items(dataset, said):
    with pytest.raises(ValueError, match=re.escape(said)): image_data(dataset)
    with pytest.raises(ValueError, match=re.escape(said.replace('dataset=', 'train='))): dataset_splits(dataset)


def test_items_are_those_of_a_subset_in_its_order():
    made = image_data(Subset(Subset(Made(), range(29, -1, -1)), [3, 1, 4, 15]))
    assert torch.equal(made.x, PIXELS[[26, 28, 25, 14]]) and made.classes == CLASSES
    assert made.y.tolist() == LABELS[[26, 28, 25, 14]].tolist()


def test_names_of_classes(capsys):
    other = Made()
    other.classes = CLASSES[::-1]
    with pytest.raises(ValueError, match='parts of a ConcatDataset must name the same classes'):
        image_data(ConcatDataset([Made(), other]))
    with pytest.raises(ValueError, match='classes of test must be those of train'): dataset_splits(Made(), other)
    assert image_data(ConcatDataset([Made(), other]), classes=list('abc')).classes == ['a', 'b', 'c']
    assert len(image_data(ConcatDataset([Made(), Made(n=6)]))) == 36
    other.classes = [('tench', 'Tinca tinca'), ('goldfish',), ('shark',)]  # as ImageNet's
    assert image_data(other).classes == ['tench, Tinca tinca', 'goldfish', 'shark']
    assert capsys.readouterr().err == ''
    assert image_data(TensorDataset(PIXELS, LABELS)).classes == ['0', '1', '2']
    assert capsys.readouterr().err == 'dataset does not name its classes; they are called 0 to 2.\n'


def mixed(x):
    "Photographs of different sizes."
    h, w = 40 + int(x[0, 0, 0]) % 30, 40 + int(x[0, 0, 1]) % 30
    return Image.fromarray(hwc(x).numpy()).resize((w, h))


@pytest.mark.parametrize('size', [None, 16, 32])
def test_a_data_set_becomes_what_the_folder_of_its_files_becomes(tmp_path, size):
    for i in range(30):
        (tmp_path/CLASSES[LABELS[i]]).mkdir(exist_ok=True)
        mixed(PIXELS[i]).save(tmp_path/CLASSES[LABELS[i]]/f'{i:02}.png')
    plain = ImageFolder(tmp_path)
    made, folder = (f(g, size=size, valid=0.2) for f, g in ((dataset_splits, plain), (image_folder, tmp_path)))
    for a, b in zip(made, folder): assert a.fingerprint() == b.fingerprint() and a.n_views == b.n_views
    scanned = dataset_splits(plain, size=size, valid=0.2, max_bytes=0, workers=0)
    for a, b in zip(scanned, folder): assert a.fingerprint() == b.fingerprint()


def test_a_second_pass_follows_where_the_first_items_mislead():
    wide = lambda x: Image.fromarray(hwc(x).numpy()).resize((18, 9) if torch.equal(x, PIXELS[7]) else (9, 9))
    assert image_data(Made(wide), size=12).side == 12  # every second item was looked at before, all of side 9


@pytest.mark.parametrize('workers', [0, 2])
def test_what_does_not_fit_is_asked_for_when_needed(workers, tmp_path):
    made, lazy = image_data(Plain()), image_data(Plain(), max_bytes=0, workers=workers)
    assert isinstance(lazy, ImageItems) and lazy.fingerprint() == made.fingerprint()
    for a, b in zip(made.batches(8), lazy.batches(8)): assert torch.equal(a.x, b.x) and torch.equal(a.y, b.y)
    some = torch.tensor([4, 2, 29])
    assert torch.equal(lazy.subset(some).pixels(torch.arange(3)), PIXELS[some])
    assert lazy.subset(some).fingerprint() == made.subset(some).fingerprint()
    splits = dataset_splits(Plain(), unlabelled=Plain(), max_bytes=0, workers=workers)
    assert torch.equal(splits.train.pixels(torch.arange(24, 54)), PIXELS)


class Plain(Made):
    "One that can be pickled."
    def __init__(self): pass
    def __len__(self): return 30
    def __getitem__(self, i): return PIXELS[i], int(LABELS[i])


def test_what_cannot_be_copied_is_read_by_one_process_and_that_is_said(capsys):
    lazy = image_data(Made(lambda x: x), max_bytes=0)
    assert 'dataset is read by this process alone, for it cannot be copied' in capsys.readouterr().err
    assert lazy.workers == 0 and torch.equal(lazy.pixels(torch.arange(30)), PIXELS)


def test_an_item_that_is_gone_later_is_named():
    made = Made(lambda x: x)
    lazy = image_data(made, max_bytes=0, workers=0)
    made.image = lambda x: 1/0
    with pytest.raises(ValueError, match='item 3 of dataset: it cannot be read, division by zero'): lazy.get([3])


def test_worker_processes_report_an_item_in_one_line():
    with pytest.raises(ValueError, match='^item 13 of dataset: it cannot be read, no such file[.]$'):
        _pass([Items(Gone())], Form(9), True, 2)


def test_slow_items_are_read_by_several_processes(monkeypatch):
    used = []
    monkeypatch.setattr('distill_nb.sets._pass', lambda *args, _pass=_pass: used.append(args[-1]) or _pass(*args))
    monkeypatch.setattr('distill_nb.sets.time.perf_counter', iter([0, 1000]*2).__next__)
    assert torch.equal(image_data(Plain(), workers=2).x, PIXELS)
    monkeypatch.setattr('distill_nb.sets._forks', lambda: False)  # where a script would have to guard its main part
    assert torch.equal(image_data(Plain(), workers=2).x, PIXELS) and used[1:] == [0]
    assert used[0] == 2*(multiprocessing.get_all_start_methods()[0] == 'fork')


class Gone(Plain):
    def __getitem__(self, i):
        if i == 13: raise OSError('no such file')
        return super().__getitem__(i)


# --- splits of them ---

def test_what_is_not_given_is_a_share_of_the_training_items():
    splits = dataset_splits(Made(), valid=0.2, name='three')
    assert [len(s) for s in splits] == [18, 6, 6]
    assert [s.name for s in splits] == ['three train', 'three valid', 'three test']
    assert all(s.y.bincount().unique().numel() == 1 for s in splits)
    everything = torch.cat([s.x for s in splits])
    assert {x.numpy().tobytes() for x in everything} == {x.numpy().tobytes() for x in PIXELS}
    assert [s.fingerprint() for s in splits] == [s.fingerprint() for s in dataset_splits(Made(), valid=0.2)]
    assert splits.test.fingerprint() != dataset_splits(Made(), valid=0.2, seed=1).test.fingerprint()
    assert splits.train.mean == splits.test.mean == channel_stats(count_values(splits.train.x))[0]
    assert splits.train.augment == CropFlip(pad=1, flip=True) and splits.test.augment == CropFlip()


def test_given_splits_stay_as_they_are():
    a, b, c = (Subset(Made(), range(*ends)) for ends in ((0, 20), (20, 26), (26, 30)))
    splits = dataset_splits(a, test=b, valid=c, augment=CropFlip(pad=2))
    assert [s.x.tolist() for s in splits] == [PIXELS[s.indices].tolist() for s in (a, c, b)]
    assert splits.train.augment == CropFlip(pad=2)
    assert [len(s) for s in dataset_splits(Made(), test=b, valid=None)] == [27, 3, 6]
    assert [len(s) for s in dataset_splits(Made(), valid=c)] == [27, 4, 3]


def test_unlabelled_items_join_the_training_items_whatever_their_labels(capsys):
    more = [TensorDataset(PIXELS.flip(3)), Made(lambda x: x.flip(1), lambda y: 'not looked at')]
    train = dataset_splits(Made(), unlabelled=more).train
    assert torch.equal(train.x[-60:], torch.cat([PIXELS.flip(3), PIXELS.flip(2)])) and train.labelled.sum() == 24
    assert not train.labelled[-60:].any() and capsys.readouterr().err == ''
    assert torch.equal(dataset_splits(Made(), unlabelled=more, columns=(0, 1)).train.x, train.x)
    one = dataset_splits(Made(), unlabelled=[x for x in PIXELS.flip(3)]).train
    assert torch.equal(one.x, train.x[:-30])
    with pytest.raises(ValueError, match=re.escape('item 0 of unlabelled[1]: its image')):
        dataset_splits(Made(), unlabelled=[more[0], Made(lambda x: x[None])])


def test_every_class_is_in_every_split_that_is_made():
    rows = torch.randint(0, 256, (104, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    items = [(x, int(k >= 100)) for k, x in enumerate(rows)]
    for share in (0.1, 0.5):
        for seed in range(3):
            splits = dataset_splits(items, valid=share, seed=seed)
            assert all(s.y.bincount(minlength=2).min() >= 1 for s in splits) and sum(map(len, splits)) == 104


def test_copies_across_splits_are_said(capsys):
    dataset_splits(Made(), test=Subset(Made(), range(6)), valid=Made(lambda x: x.flip(1)))
    assert capsys.readouterr().err == '6 images of test are in train as well, as they are stored.\n'


@pytest.mark.parametrize('given, said', [
    (dict(valid=0), 'valid must be a data set, or a share between 0 and 1, but is 0'), (dict(valid=1.5), 'but is 1.5'),
    (dict(test=Made(label=lambda y: -1)), 'test must have a label for every item, but 30 of 30 have none'),
    (dict(train=Made(n=5)), "too few are left of 'bright': give test and valid"),
    (dict(batch_size=3), 'a keyword must be one of'),
    (dict(train=Made(label=lambda y: None)), 'too few are left with a label'),
    (dict(size=0), 'size must be a whole number'),
    (dict(train=None), 'train must be a data set that gives item i')])
def test_splits_that_cannot_be(given, said):
    with pytest.raises(ValueError, match=re.escape(said)): dataset_splits(**{'train': Made()} | given)


def of(*kept): return Subset(Made(), [i for i in range(30) if LABELS[i] in kept])


def test_a_class_that_was_not_learned_is_asked_for():
    said = "every class that the other splits have, but has none of 'bright', which {} has"
    for given in (dict(test=of(0, 1, 2)), dict(test=of(0, 1), valid=of(1, 2)), dict(test=of(0, 1), valid=of(0, 2))):
        with pytest.raises(ValueError, match=said.format('valid' if 'valid' in given else 'test')):
            dataset_splits(of(0, 1), **given)
    wrong = Made(label=lambda y: int(y) + 1)
    with pytest.raises(ValueError, match='labels must be from 0 to 2'): dataset_splits(Made(), test=wrong)


def test_classes_that_a_split_lacks_are_said(capsys):
    def lacks(*args, **given):
        dataset_splits(*args, **given)
        return [line for line in capsys.readouterr().err.splitlines() if 'as they are stored' not in line]
    assert lacks(Made(), test=of(0, 1, 2)) == []
    middle = "No item of 'middle' is in the test split: its measures say nothing of them."
    assert lacks(Made(), test=of(0, 2)) == [middle]
    assert lacks(Made(), test=of(0, 1, 2), valid=of(1, 2))[0].startswith("No item of 'dark' is in the valid split")
    train, valid, test = lacks(of(0, 1))
    assert train == "No item of 'bright' is in the train split: they are not learned." and 'valid' in valid
    assert "'d', 'e', 'f', 'g', 'h' and 2 more is" in lacks(Made(), classes=list('abcdefghij'))[0]


# --- Hugging Face's ---

class ClassLabel:
    def __init__(self, names): self.names = names
class Picture: pass


Picture.__name__ = 'Image'  # it is known by this name


class Table:
    "As much of a data set of Hugging Face as is asked for."
    def __init__(self, **columns):
        self.columns = columns
        self.features = {k: Picture() if k == 'img' else ClassLabel(CLASSES if k != 'coarse_label' else ['a', 'b'])
                         for k in columns}
        self.transform = lambda item: item

    def __len__(self): return 30
    def __getitem__(self, i): return self.transform({k: v[i] for k, v in self.columns.items()})


def test_columns_of_hugging_face(capsys):
    images = [Made().image(x) for x in PIXELS]
    plain = Table(img=images, fine_label=LABELS.tolist(), coarse_label=(LABELS % 2).tolist())
    made = image_data(plain)
    assert torch.equal(made.x, PIXELS) and made.classes == CLASSES and torch.equal(made.y, LABELS)
    assert image_data(Subset(plain, range(9))).classes == CLASSES
    assert image_data(plain, columns=('img', 'coarse_label')).classes == ['a', 'b']
    assert image_data(Table(img=images, kind=LABELS.tolist())).classes == CLASSES  # by its type
    assert capsys.readouterr().err == ''
    plain = Table(img=images, fine_label=LABELS.tolist())
    plain.transform = lambda item: {'pixel_values': transforms.ToTensor()(item['img']), 'labels': item['fine_label']}
    assert image_data(plain).fingerprint() == made.fingerprint()
    assert 'labels is taken to hold the classes of fine_label' in capsys.readouterr().err
    two = Table(img=images, kind=LABELS.tolist(), sort=LABELS.tolist())
    with pytest.raises(ValueError, match='but holds img, kind, sort: say which they are'): image_data(two)


def test_real_data_sets_of_hugging_face():
    hf = pytest.importorskip('datasets')
    features = hf.Features(img=hf.Image(), fine_label=hf.ClassLabel(names=CLASSES))
    columns = dict(img=[Made().image(x) for x in PIXELS], fine_label=LABELS.tolist())
    data = hf.Dataset.from_dict(columns, features)
    to_tensor = transforms.ToTensor()
    changed = data.with_transform(lambda b: {'pixel_values': list(map(to_tensor, b['img'])), 'label': b['fine_label']})
    for d in (data, data.with_format('torch'), data.with_format('numpy'), changed,
              data.cast_column('img', hf.Image(decode=False))):
        made = image_data(d)
        assert torch.equal(made.x, PIXELS) and torch.equal(made.y, LABELS) and made.classes == CLASSES
    lazy = image_data(data, max_bytes=0, workers=2)
    assert lazy.workers == 2 and lazy.fingerprint() == made.fingerprint()
    assert torch.equal(torch.cat([b.x for b in lazy.batches(8)]), torch.cat([b.x for b in made.batches(8)]))
    both = hf.DatasetDict(train=data, test=data.select(range(6)))
    with pytest.raises(ValueError, match=r"is a DatasetDict: pass one of its splits, .*train=data\['train'\]"):
        dataset_splits(both)
    assert len(dataset_splits(both['train'], both['test']).test) == 6
    streamed = data.to_iterable_dataset()
    with pytest.raises(ValueError, match='Hugging Face does without streaming=True'): image_data(streamed)


@pytest.mark.parametrize('columns', [(0, 5), ('img', 'label'), (0,), 'ab', (0.5, 1)])
def test_columns_are_looked_for_before_all_items_are_read(columns):
    with pytest.raises(ValueError, match='columns must be'): Items([(PIXELS[0], 1)], columns)
    with pytest.raises(ValueError, match='columns must be'): image_data([(PIXELS[0], 1)]*4, columns=columns)


def test_places_are_those_of_the_parts():
    items, sight = Items([(x, i % 2) for i, x in enumerate(PIXELS[:4])]), dict(mean=[0.5]*3, std=[0.5]*3)
    def made(places, parts=(items,)):
        hashes = np.zeros((len(places), 32), np.uint8)
        return ImageItems(list(parts), places, Form(9), [0, 1]*(len(places)//2), ['a', 'b'], hashes=hashes, **sight)
    assert len(made([(0, 3), (0, 0)])) == 2
    for places in ([(0, 4), (0, 0)], [(1, 0), (0, 0)], [(0, -1), (0, 0)], [0, 1]):
        with pytest.raises(ValueError, match='each of places must be'): made(places)
    with pytest.raises(ValueError, match='parts must be a list of Items'): made([(0, 0)]*2, [PIXELS])


# --- every door ---

class Vgg(nn.Linear):
    features = ()  # a network may have them, too


def doors(data):
    "Calls of all that takes data."
    net, good = nn.Sequential(nn.Flatten(), nn.Linear(243, 3)), ImageData(PIXELS, LABELS, CLASSES)
    exits = EarlyExits(nn.Sequential(nn.Flatten(), nn.Linear(243, 8), nn.ReLU(), nn.Linear(8, 3)), ['1'], (3, 9, 9))
    recipe, one = Recipe(steps=1), {'a': Contender(Supervised, good)}
    task, setting = Task(lambda: net, net, good, good, recipe), [dict(label_smoothing=0.)]
    return {'fit': lambda: fit(Supervised(net), data, recipe),
            'valid': lambda: fit(Supervised(net), good, recipe, data),
            'evaluate': lambda: evaluate(net, data), 'predict': lambda: predict(net, data),
            'exam': lambda: check_teacher(net, data),
            'contender': lambda: compare(lambda: net, {'a': Contender(Supervised, data)}, recipe, good),
            'compare': lambda: compare(lambda: net, one, recipe, data),
            'test': lambda: compare(lambda: net, one, recipe, good, data),
            'splits': lambda: Splits(good, good, data), 'class weights': lambda: class_weights(data),
            'few labels': lambda: few_labels(data, 8), 'repeat': lambda: repeat_labelled(data),
            'own': lambda: Teacher(net).own(data), 'check': lambda: Teacher(net).check(data),
            'cached': lambda: CachedTeacher(net, data), 'self': lambda: SelfTeacher(net, data),
            'student': lambda: check_student(net, data, 'the model'),
            'normalisations': lambda: try_normalisations(Teacher(net), data),
            'exits': lambda: exit_logits(exits, data), 'measured exits': lambda: measure_exits(exits, data),
            'labelled': lambda: rehearse('alone', task._replace(labelled=data)),
            'transfer': lambda: choose_setting('kd', task._replace(transfer=data), good),
            'chosen on': lambda: choose_setting('alone', task, data, setting)}


@pytest.mark.parametrize('door', doors(None))
@pytest.mark.parametrize('data, said', [
    (DataLoader(Made(), 8), r'is a DataLoader: pass its data set, image_data\(loader.dataset\)[.]$'),
    (Made(), r'is a Made: image_data\(dataset\) makes data of it, and dataset_splits all three splits[.]$'),
    (Vgg(1, 1), 'is a Vgg[.]$'),
    (Table(img=[], label=[]), r'is a Table: image_data\(dataset\) makes data of it'),
    (dict(train=1), r"is a dict: dataset_splits\(data\['train'\]"), (Stream(), r'is a Stream: image_data\(dataset\)')])
def test_every_door_says_how_a_data_set_becomes_data(door, data, said):
    with pytest.raises(ValueError, match=f'must be a data set, such as an ImageData.*, but {said}'): doors(data)[door]()


@pytest.mark.parametrize('data, said', [
    (DataLoader(Made(), 8), 'DataLoader: pass its data set, dataset_splits(loader.dataset).'),
    (Made(), 'Made: image_data(dataset) makes data of it, and dataset_splits all three splits.'),
    (ImageData(PIXELS, LABELS, CLASSES), 'ImageData.'), ((1, 2, 3), 'tuple.')])
def test_a_teacher_is_made_for_splits(data, said):
    said = 'data must be Splits, which hold three data sets, but is a ' + said
    with pytest.raises(ValueError, match=re.escape(said)): make_teacher('digit_student', 'none', data)


def test_a_teacher_that_has_data_refuses_a_loader_too():
    net, good = nn.Sequential(nn.Flatten(), nn.Linear(243, 3)), ImageData(PIXELS, LABELS, CLASSES)
    exits = EarlyExits(nn.Sequential(nn.Flatten(), nn.Linear(243, 8), nn.ReLU(), nn.Linear(8, 3)), ['1'], (3, 9, 9))
    teacher = Teacher(net, mean=[0.5]*3, std=[0.5]*3)
    teacher.check(good)
    with pytest.raises(ValueError, match='but is a DataLoader'): teacher.check(DataLoader(Made(), 8))


def test_splits_are_a_tuple_that_can_be_copied():
    good = ImageData(PIXELS, LABELS, CLASSES, name='good')
    splits = Splits(good, good, good)
    again = pickle.loads(pickle.dumps(splits))
    assert isinstance(again, Splits) and repr(again) == repr(splits) and again.test.name == 'good'
    assert splits._replace(test=splits.valid) == splits and splits._fields == ('train', 'valid', 'test')


def test_a_data_set_of_others_is_trained_on():
    splits = dataset_splits(Made(), valid=0.2)
    net = nn.Sequential(nn.Flatten(), nn.Linear(243, 3))
    history = fit(Supervised(net), splits.train, Recipe(steps=2, precision='float32'), splits.valid, progress=False)
    assert history.last['step'] == 2 and 0 <= evaluate(net, splits.test).accuracy <= 1


def test_numbers_of_numpy_read_the_same_sets(tmp_path):
    g = np.random.default_rng(0)
    pairs = [(g.integers(0, 256, (8, 8, 3), dtype=np.uint8), i % 2) for i in range(60)]
    write_folder(tmp_path/'own')
    def read(whole, real, flag):
        folder = image_folder(tmp_path/'own', size=whole(8), valid=real(0.25), skip_damaged=flag(True), keep=tmp_path)
        splits = dataset_splits(pairs, valid=real(0.25), size=whole(8), seed=whole(1))
        return [d.fingerprint() for d in (*splits, *folder, image_data(pairs, size=whole(6), crop=real(0.75)))]
    assert read(np.int64, np.float32, np.bool_) == read(int, float, bool)
