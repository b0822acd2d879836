"""Image folders: what is accepted, and the sentence for each thing that can be wrong with one."""

import shutil

import pytest
from PIL import Image

from imagenet_overlock.folder import check_folder, check_validation_folder
from overlock.utils.errors import UserError


@pytest.fixture
def folder(tmp_path):
    for split in ('train', 'val'):
        for name in ('n2', 'n10'):
            path = tmp_path / 'data' / split / name
            path.mkdir(parents=True)
            for index in range(2):
                Image.new('RGB', (8, 8)).save(path / f'{index}.JPEG')
    return tmp_path / 'data'


def test_classes_are_in_the_order_of_timm(folder):
    train, val = check_folder(folder)
    assert train.classes == val.classes == ('n2', 'n10')
    assert train.images == val.images == 4


def test_hidden_folders_are_no_classes(folder):
    (folder / 'train' / '.thumbnails').mkdir()
    assert check_folder(folder)[0].classes == ('n2', 'n10')


def test_validation_takes_the_root_either_split_name_or_the_split(folder):
    assert check_validation_folder(folder).root == folder / 'val'
    assert check_validation_folder(folder / 'train').root == folder / 'train'
    (folder / 'val').rename(folder / 'validation')
    assert check_validation_folder(folder).root == folder / 'validation'
    assert check_folder(folder)[1].root == folder / 'validation'


def break_root(root):
    shutil.rmtree(root)
    return f'The image folder {root} does not exist; expected train/CLASS/*.jpg and val/CLASS/*.jpg below it.'


def make_a_file(root):
    shutil.rmtree(root)
    root.write_text('')
    return f'The image folder {root} is not a folder; '


def drop_train(root):
    shutil.rmtree(root / 'train')
    return f'The image folder {root} has no train/; '


def drop_val(root):
    shutil.rmtree(root / 'val')
    return f'The image folder {root} has no val/ or validation/; '


def drop_classes(root):
    shutil.rmtree(root / 'train')
    (root / 'train').mkdir()
    return f'{root}/train has no folders of classes; expected {root}/train/CLASS/*.jpg.'


def drop_one_class(root):
    shutil.rmtree(root / 'val' / 'n2')
    return f'{root}/train and {root}/val must have the same classes, but only {root}/train has n2; '


def rename_class(root):
    (root / 'val' / 'n2').rename(root / 'val' / 'n3')
    return f'but only {root}/train has n2; add or remove what differs.'


def empty_class(root):
    for path in (root / 'train' / 'n2').iterdir():
        path.unlink()
    return f'The class folder {root}/train/n2 has no images (.jpg, .jpeg, .png); fill it or remove it from both splits.'


def nest_class(root):
    inner = root / 'train' / 'n2' / 'images'
    inner.mkdir()
    for path in (root / 'train' / 'n2').glob('*.JPEG'):
        path.rename(inner / path.name)
    return 'has no images (.jpg, .jpeg, .png); move those of its folders into it.'


def cut_off_image(root):
    path = root / 'val' / 'n10' / '0.JPEG'
    path.write_bytes(path.read_bytes()[:200])
    return f'The image {path} cannot be decoded ('


def write_text(root):
    path = root / 'val' / 'n10' / '0.JPEG'
    path.write_text('not an image')
    return f'The image {path} cannot be decoded ('


@pytest.mark.parametrize(
    'damage',
    [
        break_root,
        make_a_file,
        drop_train,
        drop_val,
        drop_classes,
        drop_one_class,
        rename_class,
        empty_class,
        nest_class,
        cut_off_image,
        write_text,
    ],
)
def test_a_malformed_folder_is_one_sentence(folder, damage):
    sentence = damage(folder)
    with pytest.raises(UserError) as error:
        check_folder(folder)
    assert sentence in str(error.value)
    assert '\n' not in str(error.value)


def test_fewer_images_than_a_batch_are_told(folder):
    check_folder(folder, batch=4)
    with pytest.raises(UserError, match='train has 4 images, fewer than the 6 of one update; lower --batch-size'):
        check_folder(folder, batch=6)


def test_validation_of_a_folder_with_training_images_alone_is_one_sentence(folder):
    shutil.rmtree(folder / 'val')
    with pytest.raises(UserError, match='has no val/ or validation/'):
        check_validation_folder(folder)
