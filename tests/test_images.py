"""Images in files: which they are, and what becomes of their pixels."""
import os, pickle, socket, time, warnings
import numpy as np
import pytest
from PIL import Image, ImageFile
from torchvision.transforms import functional as TF
from distill_nb import images
from distill_nb.images import (CLOSED, HIDDEN, IMAGE_SUFFIXES, LINK, NO_FILE, SUFFIX, Form, damage, header, image_files,
                               list_images, picture_hash, pixels_of, read_image, read_images, seen_of)

LEFT_OUT = {'.eps', '.ps', '.wmf', '.emf', '.grib', '.bufr', '.h5', '.hdf', '.mpg', '.mpeg',  # not decoded by Pillow
            '.iim', '.fit', '.fits', '.pfm',  # no scale of brightness
            '.pcd', '.gbr'}  # point clouds and circuit boards


def picture(width=12, height=12, channels=3, seed=0):
    "Noise over a slope, so that no turn or shift leaves it as it was."
    x = np.linspace(0, 120, width*height*channels).reshape(height, width, channels)
    x = (x + np.random.default_rng(seed).integers(0, 120, x.shape)).astype(np.uint8)
    return Image.fromarray(x if channels > 1 else x[..., 0])


def as_before(image, side, mode):
    "What a plain image always became: torchvision's resize and centre crop."
    image = image.convert(mode)
    if image.size != (side, side): image = TF.center_crop(TF.resize(image, side), side)
    return np.array(image).reshape(side, side, -1).transpose(2, 0, 1)


def test_the_suffixes_are_those_that_pillow_decodes_itself():
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN or kind == 'MPO'}
    assert known - set(IMAGE_SUFFIXES) == LEFT_OUT & known and not LEFT_OUT & set(IMAGE_SUFFIXES)
    assert set(IMAGE_SUFFIXES) - known <= {'.avif', '.avifs'}  # of Pillow before 11.3
    assert len(set(IMAGE_SUFFIXES)) == len(IMAGE_SUFFIXES)


@pytest.mark.parametrize('suffix', IMAGE_SUFFIXES)
def test_what_pillow_writes_is_read(suffix, tmp_path):
    kind, written = Image.registered_extensions().get(suffix), 0
    if kind not in Image.SAVE: return  # Pillow reads more than it writes
    for mode in ('RGB', 'L', 'P', '1'):
        file = tmp_path/f'{mode}{suffix.upper()}'
        try: picture(16, 16).convert(mode).save(file, kind)
        except (OSError, ValueError, KeyError): continue  # this mode it does not write
        written += 1
        with Image.open(file) as image: seen, expected = image.size, image.convert('RGB')
        side = min(seen)
        assert header(file)[:2] == seen and (read_image(file, Form(side)) == as_before(expected, side, 'RGB')).all()
    assert written and len(image_files(tmp_path)) == len(os.listdir(tmp_path))


@pytest.mark.parametrize('size', [(12, 12), (13, 12), (37, 64), (64, 37), (200, 101), (101, 13)])
@pytest.mark.parametrize('kind', ['png', 'jpg', 'bmp', 'gif'])
def test_plain_images_keep_the_bytes_that_they_always_had(kind, size, tmp_path):
    for mode in ('L', 'RGB', 'P', '1'):
        if (kind, mode) == ('jpg', 'P'): continue
        picture(*size).convert(mode).save(file := tmp_path/f'{mode}.{kind}')
        for side, target in ((12, 'RGB'), (12, 'L'), (64, 'RGB'), (9, 'L')):
            if kind == 'jpg' and min(size) >= 4*side: continue  # decoded smaller
            with Image.open(file) as image: expected = as_before(image, side, target)
            assert (read_image(file, Form(side, target)) == expected).all()


@pytest.mark.parametrize('kind', ['jpg', 'png', 'webp', 'tif', 'lzw.tif', 'mpo'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_a_turned_image_is_the_upright_one(orientation, kind, tmp_path):
    upright = picture(40, 24).resize((160, 96))
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}.get(orientation)  # each transposition's inverse
    stored, exif = upright if back is None else upright.transpose(Image.Transpose(back)), Image.Exif()
    exif[274] = orientation
    more = {'lzw.tif': {'compression': 'tiff_lzw'}, 'tif': {}, 'png': {}}.get(kind, {'quality': 95})
    stored.save(file := tmp_path/f'turned.{kind}', exif=exif, **more)
    seen = header(file)
    assert seen == (160, 96, 'RGB', ('turned',) if orientation > 1 else ())
    for form in (Form(24), Form(48, 'L'), Form(48, whole=True)):
        far = abs(read_image(file, form).astype(int) - pixels_of(upright, form))
        assert far.max() == 0 if kind.endswith(('tif', 'png')) else far.mean() < 4


def test_what_is_turned_already_is_not_turned_again(tmp_path):
    from PIL import ImageOps
    exif = Image.Exif()
    exif[274] = 6
    picture(40, 24).save(tmp_path/'a.png', exif=exif)
    with Image.open(tmp_path/'a.png') as image: turned, converted = ImageOps.exif_transpose(image), image.convert('L')
    assert seen_of(turned) == (24, 40, 'RGB', ()) and seen_of(converted) == (24, 40, 'L', ('turned',))
    assert (pixels_of(turned, Form(24)) == read_image(tmp_path/'a.png', Form(24))).all()


@pytest.mark.parametrize('exif', [b'nonsense', b'II*\0\xff\xff\xff\xff', b'MM\0*\0\0\0\x08\0\x01\x01'])
def test_damaged_exif_does_no_harm(exif, tmp_path):
    picture().save(tmp_path/'a.jpg', exif=b'Exif\0\0' + exif)
    picture().save(tmp_path/'b.jpg')
    assert header(tmp_path/'a.jpg') == (12, 12, 'RGB', ())
    assert (read_image(tmp_path/'a.jpg', Form(12)) == read_image(tmp_path/'b.jpg', Form(12))).all()


@pytest.mark.parametrize('value', [0, 9, 77, 65535])
def test_an_orientation_that_does_not_exist_is_none(value, tmp_path):
    exif = Image.Exif()
    exif[274] = value
    picture(20, 10).save(tmp_path/'a.jpg', exif=exif)
    assert header(tmp_path/'a.jpg') == (20, 10, 'RGB', ())


def deep(kind, values, path):
    "Grey of 16 bits in one of the ways that Pillow knows."
    if kind == 'big.tif': Image.frombytes('I;16B', values.shape[::-1], values.astype('>u2').tobytes()).save(path)
    elif kind == 'I.tif': Image.fromarray(values.astype(np.int32)).save(path)
    elif kind == 'pgm':
        path.write_bytes(f'P5 {values.shape[1]} {values.shape[0]} 65535\n'.encode() + values.astype('>u2').tobytes())
    else: Image.fromarray(values.astype(np.uint16)).save(path)
    return path


@pytest.mark.parametrize('kind', ['png', 'tif', 'big.tif', 'I.tif', 'pgm'])
def test_sixteen_bits_are_scaled_however_dark_they_are(kind, tmp_path):
    values = np.arange(144).reshape(12, 12)*65535//143
    file = deep(kind, values, tmp_path/f'deep.{kind}')
    assert header(file) == (12, 12, 'L', ('deep',))
    for mode in ('L', 'RGB'):
        found = read_image(file, Form(12, mode))
        assert found.dtype == np.uint8 and (found == np.round(values/257)).all()
    for most in (255, 256):
        shallow = np.arange(144).reshape(12, 12)*most//143
        file = deep(kind, shallow, tmp_path/f'{most}.{kind}')
        assert (read_image(file, Form(12, 'L'))[0] == np.round(shallow/257)).all()
    large = deep(kind, np.full((30, 40), 40_000), tmp_path/f'large.{kind}')
    assert (read_image(large, Form(12)) == 156).all()  # 155.6


def test_a_picture_is_told_by_all_of_its_pixels(tmp_path):
    "Not by the bytes of its file, nor by what is left of it when it is reduced."
    image, exif = picture(40, 20), Image.Exif()
    exif[274] = 6
    image.save(tmp_path/'a.png', compress_level=1)
    image.save(tmp_path/'again.png', compress_level=9)
    image.rotate(90, expand=True).save(tmp_path/'turned.webp', exif=exif, lossless=True)
    same = {picture_hash(tmp_path/name, 'RGB') for name in ('a.png', 'again.png', 'turned.webp')}
    image.putpixel((0, 19), (1, 2, 3))
    image.save(tmp_path/'other.png')
    assert len(same) == 1 and picture_hash(tmp_path/'other.png', 'RGB') not in same
    values = np.arange(144).reshape(12, 12)
    kinds = 'png', 'tif', 'big.tif'
    sixteen = {kind: picture_hash(deep(kind, values, tmp_path/f'deep.{kind}'), 'L') for kind in kinds}
    assert len({*sixteen.values()}) == 1
    assert picture_hash(deep('png', values//2*2, tmp_path/'even.png'), 'L') != sixteen['png']


@pytest.mark.parametrize('values, kind, said', [([0, 65536], np.int32, 'from 0 to 65536'),
                                                ([-1, 7], np.int32, 'from -1 to 7'),
                                                ([0, 0.5], np.float32, 'from 0 to 0.5 in mode F')])
def test_values_without_a_scale_are_refused_with_a_sentence(values, kind, said, tmp_path):
    Image.fromarray(np.array([values]*2, kind)).save(tmp_path/'a.tif')
    with pytest.raises(ValueError, match=said): read_image(tmp_path/'a.tif', Form(2))
    assert header(tmp_path/'a.tif').mode == 'L'


@pytest.mark.parametrize('kind', ['png', 'webp', 'tif', 'gif'])
def test_what_is_transparent_is_white(kind, tmp_path):
    image = picture().convert('RGBA')
    x = np.array(image)
    x[:6, :, 3], x[6:, :, 3] = 0, 255  # the upper half is glass
    image = Image.fromarray(x)
    image.save(file := tmp_path/f'a.{kind}', **({'lossless': True} if kind == 'webp' else {}))
    assert header(file).notes == ('clear',) and header(file).mode == 'RGB'
    found = read_image(file, Form(12)).transpose(1, 2, 0)
    assert (found[:6] == 255).all()
    if kind != 'gif': assert (found[6:] == x[6:, :, :3]).all()
    assert (read_image(file, Form(12, 'L'))[0, :6] == 255).all()


def test_half_transparent_is_half_white_and_opaque_keeps_its_bytes(tmp_path):
    plain = picture()
    for mode, grey in (('RGBA', False), ('LA', True)):
        base = plain.convert('L') if grey else plain
        glass = base.convert(mode)
        glass.save(tmp_path/'opaque.png')
        assert header(tmp_path/'opaque.png') == (12, 12, 'L' if grey else 'RGB', ('clear',))
        assert (read_image(tmp_path/'opaque.png', Form(12)) == as_before(base, 12, 'RGB')).all()
        assert (read_image(tmp_path/'opaque.png', Form(12, 'L')) == as_before(base, 12, 'L')).all()
        glass.putalpha(51)
        glass.save(tmp_path/'glass.png')
        far = read_image(tmp_path/'glass.png', Form(12)) - (as_before(base, 12, 'RGB')*0.2 + 255*0.8)
        assert abs(far).max() <= 1


@pytest.mark.parametrize('mode, key', [('L', 5), ('P', 5), ('RGB', (10, 20, 30)), ('1', 0)])
def test_a_colour_that_stands_for_nothing_is_white(mode, key, tmp_path):
    image = Image.new('RGB', (4, 4), key if mode == 'RGB' else (0, 0, 0)).convert(mode)
    if mode == 'L': image = Image.new('L', (4, 4), key)
    if mode == 'P': key = image.getpixel((0, 0))
    image.save(tmp_path/'a.png', transparency=key)
    assert header(tmp_path/'a.png').notes == ('clear',)
    assert (read_image(tmp_path/'a.png', Form(4)) == 255).all()


@pytest.mark.parametrize('mode', ['CMYK', 'YCbCr', 'LAB', 'HSV', '1', 'PA'])
def test_every_colour_space_becomes_rgb_or_grey(mode, tmp_path):
    plain = Image.new('RGB', (8, 8), (200, 100, 50))
    if mode == 'LAB':
        from PIL import ImageCms
        image = ImageCms.profileToProfile(plain, *map(ImageCms.createProfile, ('sRGB', 'LAB')), outputMode='LAB')
    else: image = plain.convert('P').convert('PA') if mode == 'PA' else plain.convert(mode)
    found, expected = pixels_of(image, Form(8)).astype(int), np.reshape((200, 100, 50), (3, 1, 1))
    if mode == 'PA': expected = pixels_of(plain.convert('P'), Form(8))
    if mode != '1': assert abs(found - expected).max() <= 3
    assert pixels_of(image, Form(8, 'L')).shape == (1, 8, 8)
    assert seen_of(image).mode == ('L' if mode == '1' else 'RGB')
    if mode in ('CMYK', 'LAB', '1'):
        image.save(tmp_path/'a.tif')
        assert (read_image(tmp_path/'a.tif', Form(8)) == found).all()


@pytest.mark.parametrize('kind', ['gif', 'png', 'webp', 'tif'])
def test_the_first_frame_is_taken_and_noted(kind, tmp_path):
    first, second = picture(), picture(seed=1)
    more = {'lossless': True} if kind == 'webp' else {}
    first.save(tmp_path/f'a.{kind}', save_all=True, append_images=[second], **more)
    first.save(tmp_path/f'b.{kind}', **more)
    a, b = (header(tmp_path/f'{name}.{kind}') for name in 'ab')
    assert 'frames' in a.notes and 'frames' not in b.notes and a[:3] == b[:3]
    assert (read_image(tmp_path/f'a.{kind}', Form(12)) == read_image(tmp_path/f'b.{kind}', Form(12))).all()


def test_the_preview_of_a_photograph_is_no_frame(tmp_path):
    picture(32, 32).save(tmp_path/'a.jpg', 'MPO', save_all=True, append_images=[picture(8, 8)])
    with Image.open(tmp_path/'a.jpg') as image: assert image.is_animated
    assert header(tmp_path/'a.jpg') == (32, 32, 'RGB', ())


@pytest.mark.parametrize('kind', ['gif', 'png', 'webp', 'tif', 'jpg', 'mpo', 'bmp', 'tga', 'jp2', 'pgm', 'qoi'])
def test_the_header_decodes_nothing(kind, tmp_path, monkeypatch):
    image, more = picture(), {}
    if kind in ('jpg', 'webp', 'png', 'mpo'):
        more['exif'] = Image.Exif()
        more['exif'][274] = 6
    try: image.save(tmp_path/f'a.{kind}', **more)
    except (KeyError, ValueError): pytest.skip('an older Pillow does not write it')
    def load(self): raise AssertionError('decoded')
    with monkeypatch.context() as m:
        m.setattr(ImageFile.ImageFile, 'load', load)
        assert header(tmp_path/f'a.{kind}')[:2] == (12, 12)


@pytest.mark.parametrize('limit', ['as it is', None])
@pytest.mark.parametrize('size', [(40_000, 40_000), (178_956_971, 1)])
def test_a_bomb_is_refused_by_its_header(size, limit, tmp_path, monkeypatch):
    if limit is None: monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', None)
    Image.new('1', (8, 8)).save(tmp_path/'a.bmp')
    content = bytearray((tmp_path/'a.bmp').read_bytes())
    content[18:26] = np.array(size, '<i4').tobytes()
    (tmp_path/'a.bmp').write_bytes(content)
    for read in (header, lambda f: read_image(f, Form(8))):
        with pytest.raises(Exception, match='pixels') as e: read(tmp_path/'a.bmp')
        assert '178' in damage(str(tmp_path/'a.bmp'), e.value)


def test_a_large_image_is_no_news(tmp_path, monkeypatch):
    picture(30, 30).save(tmp_path/'a.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 500)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert header(tmp_path/'a.png')[:2] == (30, 30) and read_image(tmp_path/'a.png', Form(30)).shape == (3, 30, 30)


@pytest.mark.parametrize('size', [(1, 60_000), (60_000, 1), (2, 45_001)])
def test_a_line_does_not_become_a_sheet(size, tmp_path, monkeypatch):
    x = np.full(size[::-1], 100, np.uint8)
    x[size[1]//2 - 1:size[1]//2 + 2, size[0]//2 - 1:size[0]//2 + 2] = 200  # the middle
    Image.fromarray(x).save(tmp_path/'a.png')
    def resize(self, size, *args, resize=Image.Image.resize):
        assert np.prod(size) < 10**6
        return resize(self, size, *args)
    monkeypatch.setattr(Image.Image, 'resize', resize)
    found = read_image(tmp_path/'a.png', Form(64, 'L'))
    assert found.shape == (1, 64, 64) and found[0, 32, 32] == 200
    assert read_image(tmp_path/'a.png', Form(64, whole=True)).shape == (3, 64, 64)


def test_a_large_photograph_is_decoded_smaller_and_looks_the_same(tmp_path):
    image = Image.fromarray(np.kron(np.array(picture(16, 12)), np.ones((40, 40, 1), np.uint8)))  # 640×480
    image.save(tmp_path/'a.jpg', quality=95)
    for form in (Form(32), Form(32, 'L'), Form(120), Form(32, whole=True)):
        with Image.open(tmp_path/'a.jpg') as whole: expected = pixels_of(whole, form)
        found = read_image(tmp_path/'a.jpg', form).astype(int)
        assert abs(found - expected).mean() < 1.5 and (found != expected).any()
    with Image.open(tmp_path/'a.jpg') as whole: expected = pixels_of(whole, Form(121))
    assert (read_image(tmp_path/'a.jpg', Form(121)) == expected).all()  # 480 < 4·121: nothing is left out
    with Image.open(tmp_path/'a.jpg') as other:
        pixels_of(other, Form(32))
        assert other.size == (640, 480)  # another library's image stays as it was


@pytest.mark.parametrize('kind', ['jpg', 'png', 'gif', 'bmp', 'webp', 'tif', 'tga', 'ppm'])
def test_a_file_that_ends_too_early_is_an_error(kind, tmp_path):
    picture(40, 40).save(file := tmp_path/f'a.{kind}')
    content = file.read_bytes()
    for share in (0, 0.02, 0.5, 0.8):
        file.write_bytes(content[:int(share*len(content))])
        [result] = read_images([file], Form(40))
        assert isinstance(result, Exception) and len(damage(str(file), result)) > 8


@pytest.mark.parametrize('kind', ['jpg', 'png', 'gif', 'webp', 'tif', 'bmp'])
def test_damage_anywhere_is_an_error_or_pixels_and_nothing_else(kind, tmp_path):
    rng, exif = np.random.default_rng(0), Image.Exif()
    exif[274] = 6
    picture(20, 16).save(file := tmp_path/f'a.{kind}', **({} if kind in ('gif', 'bmp') else {'exif': exif}))
    content = np.frombuffer(file.read_bytes(), np.uint8)
    for i in range(60):
        broken = content.copy()
        broken[rng.integers(0, min(len(broken), 300 if i % 2 else 10**6), 3)] = rng.integers(0, 256, 3)
        file.write_bytes(broken.tobytes())
        for read in (header, lambda f: read_image(f, Form(16))):
            try: read(file)
            except Exception: pass


@pytest.fixture
def strange(tmp_path):
    "A folder with everything that is no image but is called one."
    root = tmp_path/'strange'
    root.mkdir()
    os.mkfifo(root/'pipe.jpg')
    with socket.socket(socket.AF_UNIX) as s: s.bind(os.path.relpath(root/'socket.png'))
    (root/'device.gif').symlink_to('/dev/zero')
    (root/'circle.png').symlink_to(root/'circle.png')
    (root/'folder.jpg').mkdir()
    (root/'gone.jpg').symlink_to(root/'nowhere.jpg')
    return root


def test_nothing_waits_for_ever(strange):
    found = [*read_images(sorted(strange.iterdir()), Form(8))]
    assert len(found) == 6 and all(isinstance(e, (ValueError, OSError)) for e in found)
    said = {f.name: damage(str(f), e) for f, e in zip(sorted(strange.iterdir()), found)}
    for name in ('pipe.jpg', 'socket.png', 'device.gif', 'folder.jpg'): assert said[name] == 'it is no regular file'
    assert 'No such file' in said['gone.jpg'] and 'symbolic links' in said['circle.png']
    picture().save(strange/'folder.jpg'/'in it.png')
    listing = list_images(strange)
    assert [os.path.basename(f) for f in listing.images] == ['circle.png', 'in it.png', 'gone.jpg']
    assert {why: [os.path.basename(f) for f in paths] for why, paths in listing.left_out.items()} == {
        NO_FILE: ['device.gif', 'pipe.jpg', 'socket.png']}


def test_a_program_for_a_printer_is_not_run(tmp_path, monkeypatch):
    picture().save(tmp_path/'a.eps')
    (tmp_path/'a.eps').rename(tmp_path/'a.jpg')
    monkeypatch.setattr('subprocess.check_call', lambda *args, **kwargs: pytest.fail('it ran'))
    with pytest.raises(ValueError, match='PostScript'): read_image(tmp_path/'a.jpg', Form(8))


def test_what_an_older_pillow_cannot_read_is_said(tmp_path, monkeypatch):
    (tmp_path/'a.avif').write_bytes(b'\0\0\0\x20ftypavif' + bytes(40))
    for name in ('b.png', 'c.csv'): (tmp_path/name).write_bytes(b'no image at all')
    monkeypatch.setattr(Image, 'registered_extensions', lambda: {'.png': 'PNG'})
    monkeypatch.setattr(Image, 'ID', ['PNG'])
    with pytest.raises(ValueError, match=r'Pillow [\d.]+ does not read \.avif files'): header(tmp_path/'a.avif')
    for name in ('b.png', 'c.csv'):
        with pytest.raises(ValueError, match='^cannot identify image file$'): header(tmp_path/name)


def test_the_walk_tells_what_it_leaves_out(tmp_path):
    names = ['a.jpg', 'B.JPG', 'sub/deep/c.png', '.d.png', '.git/e.png', '@eaDir/f.png', '__MACOSX/g.png', 'Thumbs.db',
             'desktop.ini', 'notes.txt', 'sub/table.csv', 'jpg', '#recycle/h.png', '$RECYCLE.BIN/i.png', '.DS_Store']
    for name in names:
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/name).touch()
    listing, at = list_images(tmp_path), lambda *names: sorted(str(tmp_path/n) for n in names)
    assert listing.images == image_files(str(tmp_path)) == at('a.jpg', 'B.JPG', 'sub/deep/c.png')
    assert listing.left_out == {SUFFIX: at('notes.txt', 'sub/table.csv', 'jpg'), HIDDEN: at(
        '.d.png', '.git', '@eaDir', '__MACOSX', 'Thumbs.db', 'desktop.ini', '#recycle', '$RECYCLE.BIN', '.DS_Store')}


def test_links_bring_no_image_twice_and_end(tmp_path):
    root, other = tmp_path/'root', tmp_path/'other'
    for f in (root/'a'/'1.png', root/'b'/'2.png', other/'within'/'3.png', other/'4.png'):
        f.parent.mkdir(parents=True, exist_ok=True)
        picture(4, 4).save(f)
    (root/'0 first').symlink_to(root/'b')  # before what it means, in the order of names
    (root/'up').symlink_to(tmp_path)
    (root/'a'/'round').symlink_to(root)
    (root/'x').symlink_to(other/'within')
    (root/'y').symlink_to(other)
    (root/'a'/'y again').symlink_to(other)
    listing = list_images(root)
    assert [os.path.basename(f) for f in listing.images] == ['1.png', '4.png', '3.png', '2.png']
    assert sorted(os.path.relpath(f, root) for f in listing.left_out[LINK]) == ['0 first', 'a/round', 'up', 'x', 'y']
    assert list_images(root/'up'/'root').images == [f.replace(str(root), str(root/'up'/'root')) for f in listing.images]


def test_a_folder_that_may_not_be_opened_is_named(tmp_path, monkeypatch):
    (tmp_path/'closed').mkdir()
    def scandir(path, scandir=os.scandir):
        if str(path).endswith('closed'): raise PermissionError(13, 'Permission denied')
        return scandir(path)
    monkeypatch.setattr(os, 'scandir', scandir)
    assert list_images(tmp_path) == ([], {CLOSED: [str(tmp_path/'closed')]})


@pytest.mark.parametrize('size', [100, 1000000])
def test_only_a_few_images_are_read_ahead_of_their_use(size, tmp_path, monkeypatch):
    "A table of a million images must not wait in memory for a slow network."
    files, done = [tmp_path/f'{i}.png' for i in range(600)], []
    for f in files: f.touch()
    monkeypatch.setattr('os.path.getsize', lambda f: size)  # small files have one thread, large ones several
    monkeypatch.setattr('os.cpu_count', lambda: 4)
    monkeypatch.setattr(images, 'seen_and_pixels', lambda file, **kwargs: done.append(file) or file)
    for i, file in enumerate(read_images(files, Form(8))):
        if i % 50 == 0: time.sleep(0.01)
        assert file == files[i] and len(done) - i <= 16*(4 + 2)
    assert sorted(done) == sorted(files)


# --- what is no path, and no form ---

@pytest.mark.parametrize('path', ['', '\0', '\ud800', 'nowhere', 3, None, b''])
def test_a_folder_that_is_none_is_not_taken_for_an_empty_one(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for look in (image_files, list_images):
        with pytest.raises(ValueError, match='folder must be'): look(path)


@pytest.mark.parametrize('call, said', [
    (lambda: Form(0), 'side must be'), (lambda: Form(8, 'CMYK'), 'mode must be RGB or L'),
    (lambda: read_images(['a.png', None], Form(8)), 'files must be a list of paths, but .*None'),
    (lambda: read_images('a.png', Form(8)), 'files must be a list'), (lambda: header('\0'), 'file must be a path'),
    (lambda: pixels_of(np.zeros((8, 8)), Form(8)), 'image must be one of Pillow'),
    (lambda: picture_hash('a.png', 'CMYK'), 'mode must be RGB or L')])
def test_what_no_image_can_be_read_with_is_refused(call, said):
    with pytest.raises(ValueError, match=said): call()


def test_a_form_is_a_tuple_that_can_be_sent_and_kept():
    form = Form(8, 'L', whole=True)
    assert list(form) == [8, 'L', True] and pickle.loads(pickle.dumps(form)) == form == form._replace(side=8)
