"""Scans: what is found out about the images of a folder, and how it is kept."""
import errno, hashlib, json, os, signal, subprocess, time
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import pytest
import torch
from PIL import Image
from distill_nb import scans
from distill_nb.data import count_values
from distill_nb.images import Form, Seen, read_image
from distill_nb.scans import form_of, looks, noted, scan, scans_folder, shown_size
from small import write_image
from processes import python

OLD = 1_000_000_000  # seconds: long before any test


def write(folder, n=6, **kwargs):
    "Images that were there long before."
    files = [write_image(folder/f'{i:04}.bmp', seed=i, **kwargs) for i in range(n)]
    for f in files: os.utime(f, (OLD, OLD))
    return files


@pytest.fixture
def files(tmp_path): return write(tmp_path/'images')


@pytest.fixture
def look(files, tmp_path):
    "Scans the images that are in the folder now, and checks the result against a scan of which nothing was kept."
    def check(found=None, **kwargs):
        found = sorted((tmp_path/'images').iterdir()) if found is None else found
        got, fresh = (scan(found, keep=tmp_path/k, **kwargs) for k in ('keep', f'{time.time_ns()}'))
        assert got.files == fresh.files == [str(f) for f in found if str(f) not in dict(got.damage)]
        assert (got.form, got.size) == (fresh.form, fresh.size)
        assert [f for f, _ in got.damage] == [f for f, _ in fresh.damage]
        assert (got.seen == fresh.seen).all() and (got.rows == fresh.rows).all() and (got.hashes == fresh.hashes).all()
        assert torch.equal(got.counts(), fresh.counts()) and (got.x is None) == (fresh.x is None)
        assert got.x is None or torch.equal(got.x, fresh.x)
        return got
    return check


def test_a_scan_holds_what_the_files_hold(files):
    found = scan(files)
    pixels = np.stack([read_image(f, Form(12, 'RGB')) for f in files])
    assert found.files == [str(f) for f in files] and found.rows.tolist() == list(range(6)) and not found.damage
    assert (found.x.numpy() == pixels).all() and found.form == Form(12, 'RGB') and found.size == 12
    assert [bytes(h) for h in found.hashes] == [hashlib.sha256(p.tobytes()).digest() for p in pixels]
    lazy = scan(files, max_bytes=found.x.nbytes - 1)
    assert lazy.x is None and found.tallies is None and (lazy.hashes == found.hashes).all()
    for rows in (slice(None), [4, 1], np.array([2])):
        assert torch.equal(lazy.counts(rows), count_values(found.x[rows]))
        assert torch.equal(found.counts(rows), lazy.counts(rows))


@pytest.mark.parametrize('sizes, size, side, shown, whole', [
    ([(32, 32)], None, 32, 32, False), ([(32, 32)], 224, 32, 224, False), ([(32, 32)], 16, 16, 16, False),
    ([(96, 96)], None, 96, 96, False), ([(97, 97)], None, 97, 97, False), ([(256, 256)], None, 256, 256, False),
    ([(300, 300)], None, 300, 224, False), ([(257, 257), (256, 256)], None, 257, 224, False),
    ([(1024, 1024)], None, 336, 224, False), ([(1024, 1023)], None, 336, 224, True),
    ([(1024, 1024)], 512, 768, 512, False),
    ([(30, 20), (20, 50)], 16, 16, 16, False), ([(30, 20), (20, 50)], 96, 96, 96, False),
    ([(30, 20), (20, 50)], None, 50, 224, True), ([(400, 300), (250, 280)], None, 300, 224, True),
    ([(900, 100)], None, 224, 224, True), ([(100, 100)], 64, 96, 64, False), ([(1024, 1023)], 64, 96, 64, True),
    ([(90, 90)], 64, 64, 64, False),
    ([], None, 224, 224, False), ([], 16, 16, 16, False),
])
def test_the_form_follows_from_all_images(sizes, size, side, shown, whole):
    seen = looks([Seen(*s, 'RGB') for s in sizes])
    assert form_of(seen, size) == Form(side, 'RGB', whole) and shown_size(seen, size) == shown


def test_grey_is_grey_only_if_all_images_are():
    grey, colour = Seen(8, 8, 'L'), Seen(8, 8, 'RGB', ('clear',))
    assert form_of(looks([grey, grey])).mode == 'L' and form_of(looks([grey, colour])).mode == 'RGB'
    assert noted(looks([grey, colour]), 'clear').tolist() == [False, True] and not noted(looks([colour]), 'deep').any()


def test_a_wrong_guess_does_not_show(tmp_path):
    "One image of another form, which is not among the hundred whose headers are read first."
    files = write(tmp_path/'images', n=210, w=8, h=8)
    files[151] = write_image(tmp_path/'images'/'0151.bmp', w=40, h=30)
    found = scan(files, size=24)
    assert found.form == Form(24, 'RGB') and found.decoded == 210
    assert (found.x[[0, 151]].numpy() == [read_image(files[i], Form(24, 'RGB')) for i in (0, 151)]).all()


@pytest.mark.parametrize('place', [150, 151])  # one is among the hundred, the other is not
@pytest.mark.parametrize('limit', [None, 0])
def test_the_header_of_a_damaged_image_does_not_count(tmp_path, place, limit):
    files = write(tmp_path/'images', n=210, w=8, h=8)
    whole = scan(files[:place] + files[place + 1:], size=24)
    for k in (place, 7):
        write_image(files[k], w=40, h=30)
        files[k].write_bytes(files[k].read_bytes()[:2000])
        os.utime(files[k], (OLD, OLD))
    write_image(files[7], w=8, h=8, seed=7)
    os.utime(files[7], (OLD, OLD))
    for decoded in (210, 1):
        found = scan(files, size=24, max_bytes=limit, keep=tmp_path/'keep')
        assert found.form == whole.form == Form(8, 'RGB') and found.size == 24 and found.decoded == decoded
        assert [f for f, _ in found.damage] == [str(files[place])]
        assert (found.hashes == whole.hashes).all() and torch.equal(found.counts(), whole.counts())


def test_damage_that_comes_to_light_in_the_second_pass_does_not_count_either(tmp_path):
    "A large image ends the first pass early; a larger one, which is damaged, comes after it."
    files = write(tmp_path/'images', n=3000, w=8, h=8)
    write_image(files[101], w=12, h=12)
    write_image(files[2901], w=300, h=200)
    assert scan(files, size=64).form == Form(96, 'RGB', whole=True)
    files[2901].write_bytes(files[2901].read_bytes()[:2000])
    found = scan(files, size=64)
    assert found.form == Form(64, 'RGB') and [f for f, _ in found.damage] == [str(files[2901])]


# --- which images are the same ---

def test_images_are_the_same_if_all_of_their_pixels_are(tmp_path, monkeypatch):
    "A strip, its centre with other ends, its recompressed and its byte-wise copy, and its centre alone."
    x = np.random.default_rng(0).integers(0, 256, (16, 64, 3), dtype=np.uint8)
    other = x.copy()
    other[:, :8] = 255 - x[:, :8]
    for name, pixels, level in (('a', x, 1), ('b', other, 1), ('c', x, 9), ('d', x, 1), ('e', x[:, 24:40], 1)):
        Image.fromarray(pixels).save(tmp_path/f'{name}.png', compress_level=level)
    files = [tmp_path/f'{name}.png' for name in 'abcde']
    for limit in (None, 0):
        found = scan(files, size=16, max_bytes=limit)
        assert len({bytes(h) for h in found.hashes}) == 1 and found.same().tolist() == [0, 1, 0, 0, 4]
    copies = scan([files[0], files[3]], size=16)
    monkeypatch.setattr('PIL.Image.open', lambda *args: 1/0)
    assert copies.same().tolist() == [0, 0]  # their bytes are enough
    files[0].unlink()
    assert copies.same().tolist() == [0, 1]  # what is gone is like nothing
    assert scan([]).same().tolist() == []


def test_files_are_opened_again_only_where_images_may_be_the_same(files, monkeypatch):
    whole, wide = scan([*files, files[0]]), scan(files, size=6)
    def refuse(*args, **kwargs): raise AssertionError('a file was opened')
    for name in ('PIL.Image.open', 'builtins.open'): monkeypatch.setattr(name, refuse)
    found = whole.same().tolist(), wide.same().tolist()
    monkeypatch.undo()
    assert found == ([0, 1, 2, 3, 4, 5, 0], [0, 1, 2, 3, 4, 5])


def test_images_of_sixteen_bits_are_told_by_all_of_them(tmp_path):
    x = np.random.default_rng(0).integers(0, 100, (8, 8), dtype=np.uint16)
    for name, pixels in (('a', x), ('b', x//2), ('c', x)): Image.fromarray(pixels).save(tmp_path/f'{name}.png')
    found = scan([tmp_path/f'{name}.png' for name in 'abc'])
    assert found.x.max() == 0 and found.same().tolist() == [0, 1, 0]


def test_damaged_images_leave_their_place_and_hold_no_frames(files, look):
    files[2].write_bytes(b'no image')
    files[4].write_bytes(files[4].read_bytes()[:200])  # its header is whole
    found = look()
    assert found.rows.tolist() == [0, 1, 3, 5] and [f for f, _ in found.damage] == [str(files[2]), str(files[4])]
    assert all(isinstance(e, Exception) and e.__traceback__ is e.__context__ is None for _, e in found.damage)
    assert look(max_bytes=0).rows.tolist() == [0, 1, 3, 5] and scan(files[2:3]).files == []


def test_size_must_be_a_whole_number(files):
    with pytest.raises(ValueError, match='size must be a whole number from 1 to 4,096'): scan(files, size=0)


# --- the second start ---

@pytest.mark.parametrize('limit', [None, 0])
def test_a_second_start_opens_no_image(files, look, monkeypatch, tmp_path, limit):
    first = scan(files, max_bytes=limit, keep=tmp_path/'keep')
    before = {f: f.stat().st_mtime_ns for f in (tmp_path/'keep').iterdir()}
    def refuse(*args, **kwargs): raise AssertionError('an image was opened')
    monkeypatch.setattr('PIL.Image.open', refuse)
    second = scan(files, max_bytes=limit, keep=tmp_path/'keep')
    assert first.decoded == 6 and second.decoded == 0 and second.files == first.files and not second.damage
    assert (second.hashes == first.hashes).all() and (second.seen == first.seen).all() and second.form == first.form
    assert torch.equal(second.counts([0, 5]), first.counts([0, 5]))
    assert limit == 0 or torch.equal(first.x, second.x)
    after = {f: f.stat().st_mtime_ns for f in (tmp_path/'keep').iterdir()}
    assert {f.suffix for f in after} == {'.scan', '.lock', '.tallies' if limit == 0 else '.pixels'}
    assert all(after[f] == before[f] for f in after if f.suffix != '.lock')  # nothing is written again


def change(files): write_image(files[1], seed=99)


def rewind(files):
    "Another image of the same size and time."
    write_image(files[1], seed=99)
    os.utime(files[1], (OLD, OLD))


def swap(files):
    "Two images of the same size and time change their names."
    files[0].rename(files[0].with_suffix('.tmp'))
    files[1].rename(files[0])
    files[0].with_suffix('.tmp').rename(files[1])


@pytest.mark.parametrize('spoil, decoded', [
    (change, 1), (rewind, 1), (swap, 2), (lambda files: files[3].rename(files[3].with_name('renamed.bmp')), 1),
    (lambda files: write_image(files[0].with_name('new.bmp'), seed=7), 1), (lambda files: files[3].unlink(), 0),
    (lambda files: (files[3].unlink(), change(files)), 1), (lambda files: files[2].write_bytes(b'no image'), 1),
    (lambda files: write_image(files[0], w=12, h=30), 1),
    (lambda files: [write_image(f, mode='L') for f in files[1:]], 5),
    (lambda files: [write_image(f, mode='L') for f in files], 6),
    (lambda files: (files[0].unlink(), [write_image(f, mode='L') for f in files[1:]]), 5),
])
@pytest.mark.parametrize('limit', [None, 0])
def test_only_what_changed_is_decoded(files, look, spoil, decoded, limit):
    assert look(max_bytes=limit, size=12).decoded == 6 and look(max_bytes=limit, size=12).decoded == 0
    spoil(files)
    for f in files[0].parent.iterdir():
        if f.stat().st_mtime > OLD: os.utime(f, (OLD + 1, OLD + 1))
    assert look(max_bytes=limit, size=12).decoded == decoded
    left = [f for f in files[0].parent.iterdir() if f.read_bytes() == b'no image']
    assert look(max_bytes=limit, size=12).decoded == len(left)  # what is damaged is tried again


@pytest.mark.parametrize('limit', [None, 0])
def test_another_form_decodes_all(files, look, limit):
    look(max_bytes=limit)
    wide = write_image(files[0].with_name('wide.bmp'), w=30)
    os.utime(wide, (OLD, OLD))
    assert look(max_bytes=limit).decoded == 7 and look(max_bytes=limit).decoded == 0
    wide.unlink()
    assert look(max_bytes=limit).decoded == 6


def test_the_order_of_the_files_may_change(files, look):
    look(files)
    assert look(files[::-1]).decoded == look(files[2:] + files[:2]).decoded == 0
    assert look(files[1:4]).decoded == 0 and look(files).decoded == 3  # gone ones were dropped


def test_a_file_changed_just_before_is_not_trusted(files, look):
    now = time.time()
    os.utime(files[0], (now, now))
    os.utime(files[1], (now - 60, now - 60))
    os.utime(files[2], (now + 3600, now + 3600))
    assert look().decoded == 6 and look().decoded == 2
    os.utime(files[0], (now - 60, now - 60))
    assert look().decoded == 2 and look().decoded == 1


def test_pixels_on_disk_serve_whoever_has_no_memory_and_stay_there(files, look):
    look()
    assert look(max_bytes=0).decoded == 0 and look().decoded == 0
    other = look(max_bytes=0, size=8)
    assert other.decoded == 6 and look(size=8).decoded == 6 and look(max_bytes=0, size=8).decoded == 0


def spoilt(place, suffix, how):
    [file] = place.glob(f'*{suffix}')
    data = file.read_bytes()
    file.write_bytes({'cut': data[:len(data)//2], 'empty': b'', 'text': b'no scan', 'longer': data + b'0',
                      'bit': data[:-1] + bytes([data[-1] ^ 1])}[how])


@pytest.mark.parametrize('suffix, how', [
    ('.scan', 'cut'), ('.scan', 'empty'), ('.scan', 'text'), ('.scan', 'longer'), ('.scan', 'bit'),
    ('.pixels', 'cut'), ('.pixels', 'empty'), ('.pixels', 'bit')])
def test_damage_of_what_is_kept_is_noticed(files, look, tmp_path, capsys, suffix, how):
    look()
    spoilt(tmp_path/'keep', suffix, how)
    capsys.readouterr()
    assert look().decoded == 6
    out, err = capsys.readouterr()
    assert out == '' and err.count('\n') == 1
    assert str(tmp_path/'keep') in err and 'all images are looked at again' in err
    assert look().decoded == 0 and len(list((tmp_path/'keep').iterdir())) == 3


def test_pixels_that_are_missing_are_noticed(files, look, tmp_path, capsys):
    look()
    for f in (tmp_path/'keep').glob('*.pixels'): f.unlink()
    assert look().decoded == 6 and 'all images are looked at again' in capsys.readouterr().err and look().decoded == 0


def test_other_decoders_and_other_rules_scan_anew(files, look, monkeypatch, capsys):
    look()
    monkeypatch.setattr('PIL.__version__', '0.0')
    assert look().decoded == 6 and "its makers are" in capsys.readouterr().err
    monkeypatch.setattr(scans, '_READING', 0)
    assert look().decoded == 6 and look().decoded == 0


def test_nothing_kept_is_unpickled(files, look, tmp_path):
    look()
    [file] = (tmp_path/'keep').glob('*.scan')
    data = file.read_bytes()
    header = json.loads(data[40:40 + int.from_bytes(data[32:40], 'little')])
    assert set(header) == {'about', 'paths', 'stamps', 'seen', 'hashes'}


# --- where nothing can be kept ---

def test_work_goes_on_where_nothing_can_be_written(files, tmp_path, capsys):
    (tmp_path/'file').write_text('')
    for k in range(2):
        assert scan(files, keep=tmp_path/'file').decoded == 6
        err = capsys.readouterr().err
        assert err.count('\n') == 1 and 'cannot be kept' in err and str(tmp_path/'file') in err


@pytest.mark.parametrize('name', ['os.replace', 'shutil.disk_usage'])
def test_a_full_disk_leaves_the_old_scan_whole(files, look, tmp_path, monkeypatch, capsys, name):
    look()
    change(files)
    def full(*args): raise OSError(errno.ENOSPC, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(name, full)
        assert scan(files, keep=tmp_path/'keep').decoded == 1
    assert 'cannot be kept' in capsys.readouterr().err and not list((tmp_path/'keep').glob('*.tmp'))
    os.utime(files[1], (OLD, OLD))
    assert look().decoded == 1 and look().decoded == 0


def test_a_disk_is_not_filled(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr('shutil.disk_usage', lambda place: SimpleNamespace(free=5000))
    assert scan(files, keep=tmp_path/'keep').decoded == 6 and 'nearly full' in capsys.readouterr().err
    assert not list((tmp_path/'keep').glob('*.scan')) + list((tmp_path/'keep').glob('*.pixels'))


def test_where_scans_are_kept(monkeypatch, tmp_path):
    for name in ('DISTILL_NB_CACHE', 'XDG_CACHE_HOME'): monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('HOME', str(tmp_path))
    assert scans_folder() == tmp_path/'.cache'/'distill_nb'/'scans'
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'x'))
    assert scans_folder() == tmp_path/'x'/'distill_nb'/'scans'
    monkeypatch.setenv('DISTILL_NB_CACHE', str(tmp_path/'d'))
    assert scans_folder() == tmp_path/'d'/'scans' and scans_folder('~/k') == tmp_path/'k'


def test_who_has_no_home_scans_all_the_same(files, monkeypatch, capsys):
    for name in ('DISTILL_NB_CACHE', 'XDG_CACHE_HOME'): monkeypatch.delenv(name, raising=False)
    def none(): raise RuntimeError('Could not determine home directory.')
    monkeypatch.setattr(Path, 'home', none)
    assert scan(files).decoded == 6 and 'cannot be kept' in capsys.readouterr().err


# --- several processes ---

CODE = """
import os, sys, time
from pathlib import Path
from distill_nb import scans
place, ready = Path({place!r}), Path({ready!r})
files = sorted(Path({files!r}).iterdir())
{body}
print(scans.scan(files, keep=place).decoded)
"""


def start(tmp_path, body):
    code = CODE.format(place=str(tmp_path/'keep'), ready=str(tmp_path/'ready'), files=str(tmp_path/'images'), body=body)
    return subprocess.Popen([*python(), '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


STOPPED = """
read = scans.seen_and_pixels
def stopped(*args):
    ready.touch()
    while not (ready.parent/'go').exists(): time.sleep(0.05)
    return read(*args)
scans.seen_and_pixels = stopped
"""


def wait_for(path):
    for _ in range(600):
        if path.exists(): return
        time.sleep(0.05)
    raise AssertionError(f'{path} never came')


def test_one_process_scans_and_another_waits(files, tmp_path):
    one = start(tmp_path, STOPPED)
    wait_for(tmp_path/'ready')
    other = start(tmp_path, '')
    line = other.stderr.readline()
    (tmp_path/'go').touch()
    (first, err), (second, _) = (p.communicate(timeout=60) for p in (one, other))
    assert line.startswith('Waiting') and not err and (first.strip(), second.strip()) == ('6', '0')


@pytest.mark.parametrize('body', [
    STOPPED,  # among the images
    'scans._Kept.content_file = lambda self: ready.touch() or time.sleep(60)',  # pixels without a name
    'scans.write_atomic = lambda *args: ready.touch() or time.sleep(60)',  # pixels without a scan
])
def test_who_is_killed_leaves_nothing_half(files, look, tmp_path, body):
    before = look(files[:4])
    victim = start(tmp_path, body)
    wait_for(tmp_path/'ready')
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    assert look(files[:4]).decoded == 0 and torch.equal(look(files[:4]).x, before.x)
    change(files)
    os.utime(files[1], (OLD, OLD))
    assert look().decoded == 3 and look().decoded == 0
    assert sorted(f.suffix for f in (tmp_path/'keep').iterdir()) == ['.lock', '.pixels', '.scan']


def test_worker_processes_find_what_threads_find(tmp_path, monkeypatch):
    files = write(tmp_path/'images', n=30, w=4, h=4)*140  # 4,200 of them
    files[4100] = tmp_path/'images'/'text.png'
    files[4100].write_text('no image')
    torch.manual_seed(0)
    before = torch.get_rng_state()
    monkeypatch.setattr('os.cpu_count', lambda: 2)
    many, few = scan(files, keep=tmp_path/'many'), scan(files, keep=tmp_path/'few', max_bytes=0)
    assert torch.equal(before, torch.get_rng_state())
    monkeypatch.setattr('os.cpu_count', lambda: 1)
    alone = scan(files, keep=tmp_path/'alone')
    assert torch.equal(many.x, alone.x) and (many.hashes == alone.hashes).all() and (few.hashes == alone.hashes).all()
    assert torch.equal(few.counts(), alone.counts()) and (many.seen == alone.seen).all()
    said = [[(f, str(e)) for f, e in s.damage] for s in (many, few, alone)]
    assert said[0] == said[1] == said[2] == [(str(files[4100]), said[0][0][1])] and 'cannot identify' in said[0][0][1]


@pytest.mark.parametrize('given, said', [
    (dict(size=10**6), 'size must be a whole number from 1 to 4,096'), (dict(max_bytes=-1), 'max_bytes must be'),
    (dict(max_bytes=float('nan')), 'max_bytes must be'), (dict(keep='\0'), 'keep must be the path of a folder')])
def test_a_scan_that_makes_no_sense_is_refused_before_a_file_is_read(given, said):
    with pytest.raises(ValueError, match=said): scan(['nowhere.png'], **given)


def test_rows_of_a_scan_and_notes_are_those_that_there_are(tmp_path):
    found = scan([str(write_image(tmp_path/f'{k}.png', seed=k)) for k in range(3)], keep=tmp_path/'scans')
    for rows in ([3], [0.5], None, ['a']):
        with pytest.raises(ValueError, match='rows must be positions of the 3 files'): found.counts(rows)
    assert torch.equal(found.counts([-1]), found.counts(slice(2, None)))
    with pytest.raises(ValueError, match='note must be one of turned'): noted(found.seen, 'torn')
    with pytest.raises(ValueError, match='seen must be an array as looks gives it'): noted(np.zeros(3), 'deep')
