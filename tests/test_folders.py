"""Folders: images on disk, files that do not fit in memory."""
import json, os, shutil, subprocess, sys
import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torchvision import datasets, transforms
from distill_nb.views import CropFlip, ResizedCrop, epoch_order
from distill_nb.data import channel_stats, count_values, few_labels, stratified
from distill_nb.folders import LOOSE, FolderReport, ImageFiles, Notice, hold_out, image_folder, read_folder
from distill_nb.images import HIDDEN, SUFFIX, Form, image_files
from distill_nb.rows import UNLABELLED
from distill_nb.sets import load_data
from distill_nb.contract import Teacher
from small import write_folder, write_image


def kinds(report): return {n.kind for n in report.notices}
def notice(report, kind): return ' '.join(n.text for n in report.notices if n.kind == kind)


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


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    root = write_folder(tmp_path/'scans')
    Image.fromarray(np.full((12, 12), 40_000, dtype=np.uint16)).save(root/'test'/'cat'/'00.png')
    assert image_folder(root).test.x[0].unique().tolist() == [156]


@pytest.mark.parametrize('parts', [
    ('train', 'val', 'test'), ('Train', 'Valid', 'Test'), ('TRAINING', 'Validation', 'TESTING'), ('trn', 'dev', 'tst'),
    ('train_set', 'dev-set', 'Test Set'), ('trainset', 'validset', 'testset'),
    ('train_images', 'val_imgs', 'test.data')])
def test_splits_are_found_in_any_spelling(tmp_path, parts):
    splits, report = read_folder(write_folder(tmp_path, parts=parts))
    assert [len(s) for s in splits] == [20, 20, 20] and splits.train.classes == ['cat', 'dog']
    for part, name in zip(splits, parts):
        assert torch.equal(part.x[0], TF.pil_to_tensor(Image.open(tmp_path/name/'cat'/'00.png')))
    assert report.source == dict(zip(('train', 'valid', 'test'), (f'in {name}' for name in parts)))
    assert 'layout' not in kinds(report)


@pytest.mark.parametrize('parts, words', [
    (('train', 'test', 'val', 'valid'), "one folder for each split, but 'val', 'valid' all mean valid"),
    (('train', 'Training', 'test'), "'Training', 'train' all mean train"),
    (('train',), "test is missing; it holds 'train'"), (('test', 'val'), "train is missing; it holds 'test', 'val'")])
def test_splits_that_are_no_set_are_refused(tmp_path, parts, words):
    with pytest.raises(ValueError, match=words): image_folder(write_folder(tmp_path, parts=parts))


def test_without_test_the_validation_split_is_the_test_split(tmp_path):
    splits, report = read_folder(write_folder(tmp_path, parts=('Train', 'VAL')))
    assert [len(s) for s in splits] == [18, 2, 20] and 'VAL is used as one' in notice(report, 'layout')
    assert torch.equal(splits.test.x[0], TF.pil_to_tensor(Image.open(tmp_path/'VAL'/'cat'/'00.png')))
    assert splits.train.fingerprint() == image_folder(write_folder(tmp_path/'same')).train.fingerprint()


def test_what_is_a_class_or_a_split_is_refused(tmp_path):
    for name in ('test', 'Train', 'dev'):
        root = write_folder(tmp_path/name, parts=('.',), classes=('cat', 'dog', name))
        with pytest.raises(ValueError, match=f"next to 'cat', 'dog' it holds '{name}', named like a split"):
            image_folder(root)
    flat = write_folder(tmp_path/'flat', parts=('.',), classes=('train', 'test'))
    with pytest.raises(ValueError, match="images and no class folders lie in 'test', 'train'"): image_folder(flat)
    kaggle = write_folder(tmp_path/'kaggle', parts=('train', 'val'))
    write_image(kaggle/'test'/'1.png')
    with pytest.raises(ValueError, match="no class folders lie in 'test'.*give them as unlabelled"):
        image_folder(kaggle)
    mixed = write_folder(write_folder(tmp_path/'mixed', parts=('.',)), parts=('test',))
    with pytest.raises(ValueError, match='named like a split'): image_folder(mixed)
    deep = write_folder(tmp_path/'deep', parts=('.',), classes=('bus', 'train/steam'))
    with pytest.raises(ValueError, match="next to 'bus' it holds 'train', named like a split"): image_folder(deep)


def test_an_empty_folder_named_like_a_split_is_an_empty_class(tmp_path):
    (write_folder(tmp_path, parts=('.',))/'test').mkdir()
    splits, report = read_folder(tmp_path)
    assert splits.train.classes == ['cat', 'dog'] and "Left out as empty: 'test'" in notice(report, 'left out')


@pytest.mark.parametrize('parts', [
    ('train2017', 'val2017', 'test2017'), ('seg_train', 'seg_val', 'seg_test'),
    ('images_train', 'images_dev', 'images_test'),
    ('train_1', 'val_1', 'test_2'), ('1_train', '2_val', '3_test'), ('trainA', 'validA', 'testA')])
def test_splits_are_found_among_numbers_and_other_words(tmp_path, parts):
    root = write_folder(tmp_path, parts=parts)
    for k in range(4): write_image(root/'seg_pred'/f'{k}.png', seed=500 + k)
    splits, report = read_folder(root)
    assert [len(s) for s in splits] == [20, 20, 20] and splits.train.classes == ['cat', 'dog']
    assert report.source == dict(zip(('train', 'valid', 'test'), (f'in {name}' for name in parts)))
    assert "neither a split nor named unlabelled: 'seg_pred'" in notice(report, 'left out')
    flat = write_folder(tmp_path/'flat', parts=('.',), classes=parts[::2])
    with pytest.raises(ValueError, match=f'images and no class folders lie in .*{parts[0]}'): image_folder(flat)
    (flat/'annotations').mkdir()
    with pytest.raises(ValueError, match="next to 'annotations' it holds .* named like a split"): image_folder(flat)


@pytest.mark.parametrize('names', [
    ('bullet_train', 'steam_engine'), ('bullet_train', 'test_tube', 'bus'), ('bullet_train/a', 'test_tube/b', 'bus'),
    ('test1', 'test2', 'control'), ('rail/train', 'rail/tram', 'road/bus')])
def test_classes_whose_names_hold_the_word_of_a_split_are_classes(tmp_path, names):
    splits = image_folder(write_folder(tmp_path, parts=('.',), classes=names))
    assert splits.train.classes == sorted({name.split('/')[0] for name in names})


@pytest.mark.parametrize('names, words', [
    (('cat/train', 'cat/test', 'dog/train', 'dog/test'), "class folders hold 'test', 'train', named like splits"),
    (('cat/train2017', 'cat/val2017', 'dog'), "class folders hold 'train2017', 'val2017', named like splits"),
    (('cat/test', 'cat', 'dog/test', 'dog'), "class folders hold 'test', named like splits"),
    (('learn/cat', 'learn/dog', 'exam/cat', 'exam/dog'), "each of 'exam', 'learn' holds 'cat', 'dog'")])
def test_splits_that_would_be_read_as_classes_are_refused(tmp_path, names, words):
    with pytest.raises(ValueError, match=words): image_folder(write_folder(tmp_path, parts=('.',), classes=names))


@pytest.mark.parametrize('names, words', [
    (('seg_train/seg_train', 'seg_test/seg_test', 'seg_pred'), r"but holds \['seg_train'\]"),
    (('train2017', 'val2017', 'pixelmaps'), "next to 'pixelmaps' it holds 'train2017', 'val2017', named like a split"),
    (('train2017/a', 'train2017/b', 'val2017/a', 'samples'), "but val2017 lacks 'b'"),
    (('xray_train/sick', 'xray_train/well', 'xray_test/SICK', 'xray_test/WELL', 'more'), "lacks 'sick', 'well'")])
def test_a_folder_of_images_beside_them_makes_no_classes_of_splits(names, words, tmp_path):
    with pytest.raises(ValueError, match=words): image_folder(write_folder(tmp_path, parts=('.',), classes=names))


def test_folders_within_classes_that_differ_are_read(tmp_path):
    root = write_folder(tmp_path, parts=('.',), classes=('cat/2019', 'cat/2020', 'dog/2020', 'dog/2021'))
    assert image_folder(root).train.classes == ['cat', 'dog']
    for name in ('cat/2021', 'dog/2019'): write_image(root/name/'1.png', seed=len(name) + ord(name[0]))
    with pytest.raises(ValueError, match="each of 'cat', 'dog' holds '2019', '2020', '2021'"): image_folder(root)
    write_image(root/'cat'/'1.png', seed=900)
    write_image(root/'dog'/'1.png', seed=901)
    assert image_folder(root).train.classes == ['cat', 'dog']


def test_names_that_look_the_same_are_one_class(tmp_path):
    one, other = 'caf\u00e9', 'cafe\u0301'
    write_folder(tmp_path, parts=('Train', 'TEST'), classes=(other, 'dog'))
    before = image_folder(tmp_path)
    (tmp_path/'TEST'/other).rename(tmp_path/'TEST'/one)
    splits = image_folder(tmp_path)
    assert splits.train.classes == [other, 'dog']
    assert [s.fingerprint() for s in splits] == [s.fingerprint() for s in before]
    with pytest.raises(ValueError, match='overlaps with .*TEST'): image_folder(tmp_path, tmp_path/'TEST'/one)
    write_image(tmp_path/'Train'/one/'more.png', seed=900)
    assert read_folder(tmp_path).report.counts == {'train': [10, 9], 'valid': [1, 1], 'test': [10, 10]}


@pytest.fixture
def closed(monkeypatch):
    "Folders of these names can't be opened."
    names, scandir = [], os.scandir
    def opened(path):
        if os.path.basename(path) in names: raise PermissionError(13, 'Permission denied', path)
        return scandir(path)
    monkeypatch.setattr(os, 'scandir', opened)
    return names


@pytest.mark.parametrize('name', ['emu', 'older', 'Unlabelled', 'given'])
def test_a_folder_that_cannot_be_opened_is_refused_like_a_damaged_image(tmp_path, closed, name):
    root = write_folder(tmp_path/'pets', parts=('.',), classes=('cat', 'dog', 'dog/older', 'emu', 'Unlabelled'))
    write_image(tmp_path/'given'/'1.png', seed=900)
    closed.append(name)
    with pytest.raises(ValueError, match=f"folder .* can be opened, but '[^']*{name}' cannot.*skip_damaged=True"):
        image_folder(root, tmp_path/'given')
    splits, report = read_folder(root, skip_damaged=True)
    assert splits.train.classes == ['cat', 'dog', 'emu'][:3 - (name == 'emu')]
    assert ('Left out as cannot be opened: 1' in str(report)) == (name != 'given')
    assert 'empty' not in str(report)


def test_what_lies_beside_splits_and_classes_is_left_out_and_said(tmp_path):
    root = write_folder(tmp_path/'pets')
    write_image(root/'drafts'/'1.png')
    write_image(root/'train'/'lonely.png')
    (root/'train'/'cat'/'notes.txt').write_text('')
    (root/'train'/'cat'/'list.TXT').write_text('')
    (root/'README').write_text('')
    for hidden in ('.ipynb_checkpoints', '@eaDir'):
        for place in ('.', 'train', 'test/dog'): write_image(root/place/hidden/'00.png', seed=7)
    write_image(root/'__MACOSX'/'train'/'cat'/'1.png')
    splits, report = read_folder(root)
    assert [len(s) for s in splits] == [18, 2, 20]
    text = notice(report, 'left out')
    assert "neither a split nor named unlabelled: 'drafts'" in text
    assert 'in no class folder: 1 (train/lonely.png)' in text
    assert '3 (.txt 2, none 1)' in text and '7 (.ipynb_checkpoints, @eaDir, __MACOSX)' in text
    assert {why: len(paths) for why, paths in report.left_out.items()} == {HIDDEN: 7, SUFFIX: 3, LOOSE: 1}


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
    files = image_files(tmp_path/'cat') + image_files(tmp_path/'dog')  # the split that it always was
    rest, test = stratified(torch.arange(2).repeat_interleave(20), 4, 0)
    assert torch.equal(splits.test.x, torch.stack([TF.pil_to_tensor(Image.open(files[i])) for i in test]))


def test_mixed_sizes_are_resized_when_read(tmp_path):
    write_folder(tmp_path, w=30, h=20)
    write_image(tmp_path/'train'/'cat'/'99.png', w=20, h=50)
    splits = image_folder(tmp_path, size=16)
    assert splits.train.side == splits.test.size == 16
    image = Image.open(tmp_path/'test'/'cat'/'00.png')
    assert torch.equal(splits.test.x[0], TF.pil_to_tensor(TF.center_crop(TF.resize(image, 16), 16)))
    assert image_folder(tmp_path).train.size == 224 and image_folder(tmp_path).train.augment == ResizedCrop(224)


def test_large_images_get_resized_crops(tmp_path):
    splits = image_folder(write_folder(tmp_path, w=140, h=140, n=3), size=100, valid=0.3)
    assert splits.train.side == 140 and splits.train.augment == ResizedCrop(100) and splits.test.side == 140
    index = torch.arange(3)
    shown = splits.train.get(index, splits.train.view_of(0, 0, index))
    assert shown.x.shape == splits.test.get(index).x.shape == (3, 3, 100, 100)
    assert image_folder(tmp_path, valid=0.3).train.size == 140
    small = image_folder(tmp_path, size=64, valid=0.3).train
    assert small.side == 96 and small.augment == ResizedCrop(64)


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
     "folders train and test with them, but test is missing; it holds 'train'"),
    (lambda p: (p/'train').rename(p/'learn'), "next to 'learn' it holds 'test', named like a split"),
    (lambda p: (p/'test'/'cat').rename(p/'test'/'kat'), "test lacks 'cat' and has 'kat' besides"),
    (lambda p: write_image(p/'test'/'emu'/'1.png'), "test has 'emu' besides"),
    (lambda p: write_folder(p, parts=('val',), classes=('cat',)), "val lacks 'dog'"),
    (lambda p: (rm(p/'train'/'dog'), rm(p/'test'/'dog')), r"at least 2 classes, but holds \['cat'\]\. If the classes"),
    (lambda p: [f.unlink() for f in (p/'test'/'dog').iterdir()], "test lacks 'dog'"),
    (lambda p: [f.unlink() for f in (p/'train'/'dog').iterdir()], r"at least 2 classes, but holds \['cat'\]"),
    (lambda p: [f.unlink() for f in list((p/'train'/'dog').iterdir())[1:]], "too few are left of 'dog'"),
])
def test_folders_that_do_not_fit(tmp_path, spoil, words):
    spoil(write_folder(tmp_path))
    with pytest.raises(ValueError, match=words) as e: image_folder(tmp_path)
    assert str(e.value).endswith('.')


def test_folders_that_are_none(tmp_path):
    with pytest.raises(ValueError, match='path must be a folder'): image_folder(tmp_path/'nowhere')
    with pytest.raises(ValueError, match='at least 2 classes'): image_folder(tmp_path)
    with pytest.raises(ValueError, match='size must be a whole number from 1 to 4,096'): \
        image_folder(write_folder(tmp_path), size=0)


@pytest.mark.parametrize('wrong, words', [
    (dict(sise=8), 'sise'), (dict(valid=1), 'valid must be a share'), (dict(valid='half'), 'valid must be a share'),
    (dict(seed=-1), 'seed must be'), (dict(seed=None), 'seed must be'),
    (dict(duplicates='remove'), 'duplicates must be'), (dict(skip_damaged='yes'), 'skip_damaged must be'),
    (dict(workers=-1), 'workers must be'), (dict(max_bytes=0.5), 'max_bytes must be')])
def test_a_wrong_way_of_reading_is_refused_before_a_file_is_read(tmp_path, wrong, words):
    with pytest.raises(ValueError, match=words): image_folder(tmp_path/'nowhere', **wrong)


# --- images without labels ---

def test_a_folder_of_images_without_labels_is_found_beside_splits_and_classes(tmp_path):
    both = 'train', 'test'
    for place, parts in (('unlabelled', both), ('Unlabeled', ('.',)), ('train/no_labels', both)):
        root = write_folder(tmp_path/place, parts=parts)
        usual = image_folder(root)
        for k in range(6): write_image(root/place/('a/b' if k % 2 else 'c')/f'{k}.png', seed=500 + k)
        splits, report = read_folder(root)
        n = len(usual.train)
        assert [len(s) for s in splits] == [n + 6, len(usual.valid), len(usual.test)] and report.unlabelled == 6
        assert splits.train.y[n:].tolist() == [UNLABELLED]*6 and torch.equal(splits.train.y[:n], usual.train.y)
        assert torch.equal(splits.train.x[:n], usual.train.x) and torch.equal(splits.test.x, usual.test.x)
        mean = channel_stats(count_values(splits.train.x))[0]
        assert splits.train.mean == splits.test.mean == mean != usual.train.mean
        assert '6 images without labels' in notice(report, 'unlabelled') and splits.train.classes == ['cat', 'dog']
        assert report.counts['train'] == [n//2, n//2]


def test_folders_of_images_without_labels_are_given(tmp_path):
    root = write_folder(tmp_path/'pets')
    for k in range(5): write_image(tmp_path/'flat'/f'{k}.png', seed=500 + k)
    for k in range(4): write_image(tmp_path/'deep'/'x'/str(k)/'y.png', seed=600 + k)
    for given, n in ((tmp_path/'flat', 5), (str(tmp_path/'flat'), 5), ([tmp_path/'flat', tmp_path/'deep'], 9),
                     ((tmp_path/'deep', tmp_path/'deep'/'x'), 4), (None, 0), ((), 0)):
        for more in ({}, dict(max_bytes=0, workers=0)):
            splits, report = read_folder(root, given, **more)
            assert len(splits.train) == 18 + n == 18 + report.unlabelled and 'unlabelled' not in kinds(report)
    assert splits.train.fingerprint() == image_folder(root).train.fingerprint()
    (tmp_path/'flat'/'x.png').write_bytes(b'')
    with pytest.raises(ValueError, match=r'1 of 46 images.*flat/x.png'): image_folder(root, tmp_path/'flat')
    with pytest.raises(ValueError, match='unlabelled must be paths of folders'): image_folder(root, [5])


@pytest.mark.parametrize('given, words', [
    ('nowhere', 'folders, but .*nowhere.* is none'), ('empty', 'folders with images, but .*empty'),
    ('pets/train/cat', 'overlaps with .*pets/train/cat'), ('pets/train', 'overlaps'), ('pets', 'overlaps'),
    ('pets/test/dog/more', 'overlaps with .*pets/test/dog'), ('link', 'overlaps')])
def test_a_folder_without_labels_must_hold_images_of_its_own(tmp_path, given, words):
    root = write_folder(tmp_path/'pets')
    (tmp_path/'empty').mkdir()
    (tmp_path/'link').symlink_to(root/'train'/'cat')
    write_image(root/'test'/'dog'/'more'/'1.png')
    with pytest.raises(ValueError, match=f'unlabelled must name .*{words}'): image_folder(root, [tmp_path/given])


def test_a_folder_in_the_root_that_is_given_is_no_class(tmp_path):
    for parts, name in ((('.',), 'unsorted'), (('train', 'test'), 'unsorted'), (('train', 'val'), 'test')):
        root = write_folder(tmp_path/f'{len(parts)}{name}', parts=parts)
        usual = image_folder(root)
        for k in range(5): write_image(root/name/f'{k}.png', seed=500 + k)
        splits, report = read_folder(root, root/name)
        assert splits.train.classes == ['cat', 'dog'] and report.unlabelled == 5
        assert all(torch.equal(ours.x[:len(theirs)], theirs.x) for ours, theirs in zip(splits, usual))
        assert len(splits.train) == len(usual.train) + 5 and not {'unlabelled', 'left out'} & kinds(report)


def test_a_folder_without_labels_is_said_once(tmp_path):
    root = write_folder(tmp_path)
    (root/'Unlabelled').mkdir()
    report = read_folder(root).report
    assert "Left out as empty: 'Unlabelled'" in notice(report, 'left out') and 'unlabelled' not in kinds(report)
    for k in range(5): write_image(root/'Unlabelled'/'deep'/f'{k}.png', seed=500 + k)
    (root/'Unlabelled'/'deep'/'notes.txt').write_text('')
    assert len([n for n in read_folder(root).report.notices if n.kind == 'unlabelled']) == 1
    report = read_folder(root, [root/'Unlabelled', root/'Unlabelled'/'deep']).report
    assert report.unlabelled == 5 and 'unlabelled' not in kinds(report) and len(report.left_out[SUFFIX]) == 1


@pytest.mark.parametrize('wrong', ['', [''], ('x', ''), 5, [None]])
def test_paths_that_are_none_are_refused(tmp_path, monkeypatch, wrong):
    monkeypatch.chdir(write_folder(tmp_path))
    with pytest.raises(ValueError, match='unlabelled must be paths of folders, but is'): image_folder('.', wrong)
    if isinstance(wrong, (list, tuple)): return
    with pytest.raises(ValueError, match='path must be a folder with images'): image_folder(wrong)
    with pytest.raises(ValueError, match='keep must be the path of a folder'): image_folder('.', keep=wrong)
    with pytest.raises(ValueError, match="path must be a folder .*'None' is none"): image_folder(None)


# --- the same image twice ---

def copy(source, place):
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, place)


@pytest.mark.parametrize('source, place', [
    ('test/cat/03.png', 'train/dog/a.png'), ('val/cat/03.png', 'train/cat/a.png'),
    ('test/cat/03.png', 'val/cat/a.png')])
def test_copies_across_given_splits_are_refused_kept_or_dropped(tmp_path, source, place):
    write_folder(tmp_path, parts=('train', 'val', 'test'))
    copy(tmp_path/source, tmp_path/place)
    with pytest.raises(ValueError) as e: image_folder(tmp_path)
    assert all(w in str(e.value) for w in (f'1 ({place} is {source})', "duplicates='drop'", "duplicates='keep'"))
    for lazy in ({}, dict(max_bytes=0, workers=0)):
        splits, report = read_folder(tmp_path, duplicates='drop', **lazy)
        assert [len(s) for s in splits] == [20]*3 and 'Left out: copies of images in a later split: 1' in str(report)
        splits, report = read_folder(tmp_path, duplicates='keep', **lazy)
        assert sum(len(s) for s in splits) == 61 and place in notice(report, 'copies')
    assert ('labels' in kinds(report)) == ('dog' in place)


def test_many_copies_are_counted_and_three_are_named(tmp_path):
    write_folder(tmp_path)
    for k in range(5): copy(tmp_path/'test'/'cat'/f'0{k}.png', tmp_path/'train'/'cat'/f'copy{k}.png')
    with pytest.raises(ValueError, match=r'5 \(.*copy2.png is test/cat/02.png; and 2 more\)'): image_folder(tmp_path)


def test_a_split_that_is_made_holds_no_copy_of_another(tmp_path):
    root = write_folder(tmp_path, parts=('.',), n=20)
    for k in range(6):
        for j in range(3): copy(root/'cat'/f'{k:02}.png', root/'cat'/f'copy{k}{j}.png')
    for seed in range(4):
        splits, report = read_folder(root, seed=seed, duplicates='refuse')
        pixels = [{i.numpy().tobytes() for i in s.x} for s in splits]
        assert not pixels[0] & pixels[1] | pixels[0] & pixels[2] | pixels[1] & pixels[2]
        assert sum(len(s) for s in splits) == 58 and sum(map(len, pixels)) == 40
        assert 'Copies of images within their split: 18' in notice(report, 'copies')
    copy(root/'dog'/'00.png', root/'cat'/'dog.png')
    assert 'Images in two classes, one of which is wrong: 1' in notice(read_folder(root).report, 'labels')


def test_a_class_of_copies_alone_is_too_few_to_split(tmp_path):
    root = write_folder(tmp_path, parts=('.',), classes=('cat',), n=20)
    for j in range(9): copy(root/'cat'/'00.png', root/'dog'/f'{j}.png')
    with pytest.raises(ValueError, match="too few are left of 'dog'"): image_folder(root)


def test_classes_of_the_same_images_are_named(tmp_path):
    root = write_folder(tmp_path, parts=('.',), n=20)
    for k in range(20): copy(root/'cat'/f'{k:02}.png', root/'emu'/f'{k}.png')
    with pytest.raises(ValueError, match="too few are left of 'emu': 20 of its images are in 'cat' too"):
        image_folder(root)


@pytest.mark.parametrize('sizes, valid', [
    ((100, 4), 0.1), ((20, 4), 0.1), ((40, 40, 40, 3, 4), 0.1), ((60, 60, 3, 3, 3), 0.1),
    ((40, 3), 0.5), ((9, 4), 0.9)])
def test_every_class_is_in_every_split_that_is_made(tmp_path, sizes, valid):
    for j, n in enumerate(sizes):
        for k in range(n): write_image(tmp_path/f'c{j}'/f'{k}.png', w=8, h=8, seed=1000*j + k)
    for seed in range(3):
        report = read_folder(tmp_path, seed=seed, valid=valid).report
        assert min(min(n) for n in report.counts.values()) >= 1 and 'missing' not in kinds(report)
        assert [sum(n) for n in zip(*report.counts.values())] == [*sizes]


def test_a_class_that_is_small_beside_given_test_images_is_in_both_splits(tmp_path):
    write_folder(tmp_path)
    for k in range(30): write_image(tmp_path/'train'/'cat'/f'more{k}.png', seed=500 + k)
    for k in range(2, 10): (tmp_path/'train'/'dog'/f'0{k}.png').unlink()
    assert read_folder(tmp_path).report.counts == {'train': [36, 1], 'valid': [4, 1], 'test': [10, 10]}


def test_copies_of_images_with_labels_need_none(tmp_path):
    root = write_folder(tmp_path/'pets', parts=('train', 'val', 'test'))
    for k in range(4): write_image(tmp_path/'more'/f'{k}.png', seed=700 + k)
    for part in ('train', 'val', 'test'): copy(root/part/'cat'/'05.png', tmp_path/'more'/f'{part}.png')
    splits, report = read_folder(root, tmp_path/'more')
    assert len(splits.train) == 24 and 'copies of training images: 1' in notice(report, 'copies')
    assert 'Left out: images without labels, copies of later splits: 2' in notice(report, 'copies')
    splits, report = read_folder(root, tmp_path/'more', duplicates='keep')
    assert len(splits.train) == 26
    assert 'Kept: images without labels, copies of later splits: 2' in notice(report, 'copies')
    made = write_folder(tmp_path/'made', parts=('.',))
    for k in range(10): copy(made/'dog'/f'{k:02}.png', tmp_path/'others'/f'{k}.png')
    write_image(tmp_path/'others'/'new.png', seed=900)
    assert read_folder(made, tmp_path/'others').report.unlabelled == 1


def write_strips(folder, n, seed, width=128, height=32):
    "Images that differ on both sides of a blank centre."
    folder.mkdir(parents=True)
    for k, x in enumerate(np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), dtype=np.uint8)):
        x[:, width//2 - height//2:width//2 + height//2] = 255
        Image.fromarray(x).save(folder/f'{k}.png')


def test_images_with_the_same_centre_are_no_copies(tmp_path):
    for k, (part, name) in enumerate((p, c) for p in ('train', 'test') for c in ('cat', 'dog')):
        write_strips(tmp_path/'pets'/part/name, 12, k)
    write_strips(tmp_path/'more', 12, 9)
    for lazy in ({}, dict(max_bytes=0, workers=0)):
        splits, report = read_folder(tmp_path/'pets', tmp_path/'more', size=32, **lazy)
        assert sum(map(len, splits)) == 60 and report.unlabelled == 12 and 'copies' not in kinds(report)
    assert len({bytes(h) for h in splits.train._hashes}) == 1  # all that is stored of them is white
    image = Image.open(tmp_path/'pets'/'test'/'cat'/'3.png')
    image.save(tmp_path/'pets'/'train'/'cat'/'again.png', compress_level=9)
    with pytest.raises(ValueError, match=r'1 \(train/cat/again.png is test/cat/3.png\)'):
        image_folder(tmp_path/'pets', size=32)


def test_dropping_all_images_of_a_class_is_refused(tmp_path):
    root = write_folder(tmp_path, parts=('train', 'val', 'test'), n=3)
    for k in range(3): shutil.copy(root/'test'/'dog'/f'0{k}.png', root/'train'/'dog'/f'0{k}.png')
    with pytest.raises(ValueError, match="all of 'dog' are damaged or copies"): image_folder(root, duplicates='drop')
    root = write_folder(tmp_path/'2', parts=('train', 'val', 'test'), n=3)
    for k in range(3): shutil.copy(root/'test'/'dog'/f'0{k}.png', root/'val'/'dog'/f'0{k}.png')
    with pytest.raises(ValueError, match='valid split must hold images of at least 2'):
        image_folder(root, duplicates='drop')


def test_a_damaged_image_that_is_left_out_is_as_if_it_were_not_there(tmp_path):
    root = write_folder(tmp_path, parts=('.',), n=20)
    for k in range(16): (root/'dog'/f'{k:02}.png').write_bytes(b'')
    (root/'cat'/'07.png').write_bytes(b'')
    splits, report = read_folder(root, skip_damaged=True)
    assert [sum(n) for n in report.counts.values()] == [17, 3, 3] and report.counts['test'] == [2, 1]
    for k in range(16): (root/'dog'/f'{k:02}.png').unlink()
    (root/'cat'/'07.png').unlink()
    assert [s.fingerprint() for s in image_folder(root)] == [s.fingerprint() for s in splits]


# --- the report ---

def test_classes_that_a_split_lacks_are_said_and_those_that_are_empty_left_out(tmp_path):
    root = write_folder(tmp_path, parts=('train', 'val', 'test'), classes=('cat', 'dog', 'emu'))
    rm(root/'test'/'emu')
    for f in (root/'val'/'cat').iterdir(): f.unlink()
    for part in ('train', 'test'): (root/part/'fox').mkdir()
    splits, report = read_folder(root)
    assert splits.test.classes == ['cat', 'dog', 'emu'] and report.counts['test'] == [10, 10, 0]
    assert "No image of 'emu' is in the test split" in notice(report, 'missing')
    assert "No image of 'cat' is in the valid split" in notice(report, 'missing')
    assert "Left out as empty: 'fox'" in notice(report, 'left out')
    write_image(root/'test'/'fox'/'1.png')
    with pytest.raises(ValueError, match="test lacks 'emu' and has 'fox' besides"): image_folder(root)


def test_few_images_and_unequal_classes_are_said(tmp_path):
    def on(**n):
        root = tmp_path/'-'.join(f'{k}{v}' for k, v in n.items())
        for j, (name, k) in enumerate(n.items()):
            for i in range(k): write_image(root/'train'/name/f'{i}.png', seed=90_000 + 1000*j + i)
        write_folder(root, parts=('val', 'test'), classes=tuple(n), n=2)
        return read_folder(root).report
    assert kinds(on(a=10, b=20)) == set()
    report = on(a=9, b=19)
    assert kinds(report) == {'few', 'unequal'} and notice(report, 'few').endswith('a (9).')
    assert "9 images of 'a', 19 of 'b'" in notice(report, 'unequal')


def test_images_that_are_not_taken_as_they_are_are_counted(tmp_path):
    root = write_folder(tmp_path, n=12)
    exif = Image.Exif()
    exif[274] = 6
    image = Image.open(root/'train'/'cat'/'00.png')
    for k in range(2): image.point(lambda v: v//(k + 2)).save(root/'train'/'cat'/f'turned{k}.jpg', exif=exif)
    Image.fromarray(np.full((12, 12), 40_000, np.uint16)).save(root/'train'/'dog'/'deep.png')
    Image.fromarray(np.full((12, 12, 4), 7, np.uint8)).save(root/'train'/'dog'/'clear.png')
    text = notice(read_folder(root).report, 'read')
    assert '(EXIF): 2' in text and 'scaled to 8: 1' in text and 'laid on white: 1' in text and 'frames' not in text


def write_deep(folder, n, seed, most, side=12):
    "Noise of 16 bits."
    folder.mkdir(parents=True, exist_ok=True)
    for k, x in enumerate(np.random.default_rng(seed).integers(0, most + 1, (n, side, side)).astype(np.uint16)):
        x[0, 0] = most
        Image.fromarray(x).save(folder/f'{seed}{k:02}.png')


@pytest.mark.parametrize('lazy', [{}, dict(max_bytes=0, workers=0)])
def test_images_of_sixteen_bits_have_one_scale_and_dark_ones_are_said(tmp_path, lazy):
    for k, (part, name) in enumerate((p, c) for p in ('train', 'test') for c in ('cat', 'dog')):
        write_deep(tmp_path/part/name, 12, k, most=255)
    splits, report = read_folder(tmp_path, **lazy)
    assert 'look black: scaled to 8, no value is above 1 of 255' in notice(report, 'read')
    assert sum(map(len, splits)) == 48 and 'copies' not in kinds(report)  # what they show is not lost to copies
    for name in ('cat', 'dog'): write_deep(tmp_path/'train'/name, 8, 5 + (name == 'dog'), most=4095)
    report = read_folder(tmp_path, **lazy).report
    assert 'look dark: scaled to 8, no value is above 16 of 255' in notice(report, 'read')
    write_deep(tmp_path/'train'/'cat', 1, 8, most=16_500)
    splits, report = read_folder(tmp_path, **lazy)
    assert 'look' not in notice(report, 'read') and 'of 16 bits, scaled to 8: 65' in notice(report, 'read')
    assert splits.test.pixels(torch.arange(24)).max() == 1  # a dark frame stays dark


def test_notices_go_to_stderr_and_the_report_to_nobody(tmp_path, capsys):
    root = write_folder(tmp_path, n=20)
    image_folder(root)
    assert capsys.readouterr() == ('', '')
    (root/'train'/'cat'/'notes.txt').write_text('')
    report = read_folder(root).report
    assert capsys.readouterr() == ('', '')
    image_folder(root)
    assert capsys.readouterr() == ('', f'{report.notices[0].text}\n') and len(report.notices) == 1


def test_a_report_is_text_html_and_json(tmp_path):
    root = write_folder(tmp_path/'a&b', classes=('<b>cat', 'dog\nfish', '50$\\no$60'), n=12)
    (root/'train'/'dog\nfish'/'x.<i>').write_text('')
    copy(root/'train'/'dog\nfish'/'00.png', root/'train'/'dog\nfish'/'new\n\x1b[1m.png')
    more = tmp_path/'more'
    write_image(more/'1.png', seed=800)
    splits, report = read_folder(root, more)
    assert splits.train.classes == ['50$\\no$60', '<b>cat', 'dog\nfish']
    lines = str(report).splitlines()
    assert all(line.isprintable() for line in lines) and len(lines) == 6 + len(report.notices)
    head = "a&b: 3 classes, 50$\\no$60 (24), <b>cat (24), dog\\nfish (25)"
    words = head, 'test            36 images  in test', 'label         1 images', '12×12'
    assert all(any(w in line for line in lines) for w in words)
    html = report.html()
    assert '<b>' not in html and '<i>' not in html
    assert all(w in html for w in ('<td>&lt;b&gt;cat</td><td>', 'a&amp;b', '.&lt;i&gt;'))
    assert html.count('<tr>') == 5 + 4 and html.count('<li>') == len(report.notices) and report._repr_html_() == html
    told = json.loads(json.dumps(report.as_dict()))
    assert told['counts']['test'] == [12, 12, 12] and told['left_out'][SUFFIX]['n'] == 1
    assert [n['kind'] for n in told['notices']] == [n.kind for n in report.notices]
    report.plot().canvas.draw()


@pytest.mark.parametrize('n', [2, 30, 200])
def test_the_picture_is_readable_for_few_classes_and_for_many(n):
    counts = {part: [k % 7 + 1 for k in range(n)] for part in ('train', 'valid', 'test')}
    notices = [Notice('left out', 'Left out: ' + 'word '*60)]*9
    report = FolderReport('f', [f'a rather long name {k}' for k in range(n)], counts, {}, 0, '', {}, notices)
    fig = report.plot()
    fig.canvas.draw()
    ax, side = fig.axes
    names = [t for t in ax.get_xticklabels() if t.get_text().startswith('a rather')]
    assert len(names) == (n if n <= 30 else 0) and len(ax.patches) == 3*n
    boxes = [t.get_window_extent() for t in names]
    assert not any(a.overlaps(b) for a, b in zip(boxes, boxes[1:]))
    heights = [sum(p.get_height() for p in ax.patches[k::n]) for k in range(n)]
    assert sorted(heights) == sorted(3*(k % 7 + 1) for k in range(n))
    assert n <= 30 or heights == sorted(heights, reverse=True)
    text = side.texts[0].get_window_extent()
    assert text.y0 >= 0 and text.x1 <= fig.bbox.x1


def test_names_that_the_font_lacks_are_drawn_without_a_warning(tmp_path, recwarn):
    root = write_folder(tmp_path, classes=('猫', '犬🐕', 'émeu'))
    copy(root/'train'/'猫'/'00.png', root/'train'/'猫'/'写真.png')
    report = read_folder(root).report
    fig = report.plot()
    fig.savefig(tmp_path/'a.png')
    assert not [w for w in recwarn if 'Glyph' in str(w.message)]
    assert [t.get_text() for t in fig.axes[0].get_xticklabels()] == ['émeu', '□□', '□'] and '猫' in str(report)


def test_files_known_from_before_are_counted_without_the_damaged(tmp_path):
    root = write_folder(tmp_path, n=12)
    old = 1_600_000_000
    for f in root.rglob('*.png'): os.utime(f, (old, old))
    for k in range(3): (root/'train'/'cat'/f'{k:02}.png').write_bytes(b'')
    first, second = (read_folder(root, skip_damaged=True).report.form for _ in range(2))
    assert '48 files decoded, 0 known' in first and '3 files decoded, 45 known' in second


def test_names_of_bytes_that_are_no_text_are_escaped(tmp_path):
    root = write_folder(tmp_path)
    os.rename(os.fsencode(root/'train'/'cat'/'00.png'), os.fsencode(root/'train'/'cat') + b'/\xff.png')
    copy(root/'train'/'cat'/'01.png', root/'train'/'cat'/'copy.png')
    copy(root/'train'/'cat'/'\udcff.png', root/'train'/'cat'/'zopy.png')
    report = read_folder(root).report
    assert r'\udcff.png' in str(report)
    for text in (str(report), report.html()): text.encode()


def test_pipes_and_endless_links_do_not_hang(tmp_path):
    root = write_folder(tmp_path)
    os.mkfifo(root/'train'/'cat'/'pipe.png')
    (root/'train'/'cat'/'folder.jpg').mkdir()
    for place in ('train/cat/a', 'train/loop', 'loop'): (root/place).symlink_to(root/place)
    splits, report = read_folder(root)
    assert [len(s) for s in splits] == [18, 2, 20] and 'train/cat/pipe.png' in notice(report, 'left out')


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


def test_photographs_are_the_same_from_memory_and_from_files_and_keep_their_shapes(tmp_path):
    write_folder(tmp_path, n=4, w=150, h=100)
    write_image(tmp_path/'train'/'cat'/'00.png', w=120, h=110)
    eager, lazy = (image_folder(tmp_path, size=100, valid=0.3, workers=0, **more) for more in ({}, dict(max_bytes=0)))
    assert eager.train.augment == ResizedCrop(100) and eager.test.size == 100 and isinstance(lazy.train, ImageFiles)
    assert eager.test.shapes.tolist() == [[100, 150]]*8
    assert [110, 120] in torch.cat([s.shapes for s in eager[:2]]).tolist()
    for e, l in zip(eager, lazy):
        assert torch.equal(e.shapes, l.shapes) and e.fingerprint() == l.fingerprint() and e.side == l.side > 100
        view = [0, 5 % e.n_views]
        for a, b in ((e, l), (e.subset([1, 0]), l.subset([1, 0]))):
            assert torch.equal(a.get([0, 1], view).x, b.get([0, 1], view).x)


def smooth(root, n=12):
    "Photographs of several sizes without sharp edges."
    sizes, g = [(150, 110), (110, 160), (120, 120)], np.random.default_rng(0)
    for i in range(2*n):
        image = Image.fromarray(g.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize(sizes[i % 3], Image.BICUBIC)
        (root/'ab'[i % 2]).mkdir(parents=True, exist_ok=True)
        image.save(root/'ab'[i % 2]/f'{i:02}.png')
    return root


@pytest.mark.parametrize('size, crop', [(24, 1), (64, 0.8), (200, 1)])
@pytest.mark.parametrize('max_bytes', [None, 0])
def test_a_teacher_of_another_size_sees_the_same_photographs_at_its_own(size, crop, max_bytes, tmp_path):
    files = image_folder(smooth(tmp_path), size=100, max_bytes=0, workers=0)
    data = image_folder(tmp_path, size=100, max_bytes=max_bytes, workers=0)
    teacher = Teacher(torch.nn.Identity(), mean=[0.]*3, std=[1/255]*3, size=(size, crop))
    for split, named in zip(data, files):
        own, index = teacher.own(split), torch.arange(len(split))
        assert own.side == split.side and own.size == size and torch.equal(own.shapes, split.shapes)
        for x, file in zip(own.get(index).x, named.files):
            image = Image.open(file)
            centre = TF.resize(TF.center_crop(image, min(image.size)), [round(size/crop)]*2)
            assert (x - 255*TF.to_tensor(TF.center_crop(centre, size))).abs().mean() < 2, file


def test_a_teacher_of_another_size_sees_the_same_pieces_of_photographs(tmp_path):
    train, index = image_folder(smooth(tmp_path), size=100).train.seen(mean=[0.]*3, std=[1/255]*3), torch.arange(12)
    own = Teacher(torch.nn.Identity(), size=200).own(train)
    pooled = torch.nn.functional.avg_pool2d(own.get(index, index + 1).x, 2)
    assert (pooled - train.get(index, index + 1).x).abs().mean() < 2


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


# --- what no files can be read with ---

def test_held_out_labels_are_whole_numbers_of_any_type():
    y = torch.arange(40) % 2
    assert (hold_out(y.to(torch.uint8), 8) == hold_out(y.tolist(), 8)).all() and hold_out(y, 8).sum() == 8
    for wrong in (y.float(), y - 1, y[None], [], 'ab', y + 10**12, torch.tensor([0, 0, 1])):
        with pytest.raises(ValueError, match='y must be labels'): hold_out(wrong, 8)


def test_files_need_paths_hashes_and_a_normalisation(tmp_path):
    files = [str(write_image(tmp_path/f'{k}.png', seed=k)) for k in range(4)]
    good = dict(files=files, y=[0, 1, 0, 1], classes=['a', 'b'], form=Form(8), hashes=np.zeros((4, 32), np.uint8),
                mean=[0.5]*3, std=[0.5]*3)
    data = ImageFiles(**good)
    for wrong, said in ((dict(files=[None]*4), 'files must be a list of paths'), (dict(mean=None), 'mean and std must'),
                        (dict(hashes=np.zeros((3, 32), int)), 'hashes must be'), (dict(workers=10**9), 'workers must'),
                        (dict(files=files[:3]), 'hashes must be uint8 of shape')):
        with pytest.raises(ValueError, match=said): ImageFiles(**good | wrong)
    for index in ([4], [-1], [0.5]):
        with pytest.raises(ValueError, match='index must be'): data.pixels(index)
        with pytest.raises(ValueError, match='index must be'): next(data.replace(workers=0).stream([(index, [0])]))
    assert data.pixels([]).shape == (0, 3, 8, 8) and data.pixels([3]).shape == (1, 3, 8, 8)
