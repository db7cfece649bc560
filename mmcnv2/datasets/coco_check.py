"""Whether an annotation file is what MMDetection's ``CocoDataset`` takes it for.

That one ends in errors that name no file, or goes on with less or other than the file
says: labels that are off by one, pictures left out, masks of random memory.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

_NAMED = 5
_LISTS = ('images', 'annotations', 'categories')


def check_coco(
    ann_file: str | Path,
    classes: Sequence[str] | None = None,
    masks: bool = True,
    test_mode: bool = False,
) -> None:
    """Check an annotation file before anything is trained on it.

    What MMDetection leaves out on its own, such as boxes without an area or outside of
    their picture, is no error here.

    Args:
        ann_file: The file, in COCO's format.
        classes: The names of the classes. Not looked at by default.
        masks: Whether masks are needed.
        test_mode: Whether it is for testing, which needs no annotations.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Something in it is wrong. The message names the file, and the first
            few places.
    """
    content = _read(Path(ann_file))
    problems = list(_problems(content, classes, masks, test_mode))
    if problems:
        more = f', and {len(problems) - _NAMED} more' if len(problems) > _NAMED else ''
        raise ValueError(
            f'{ann_file} has {len(problems)} errors, for which training would stop, or '
            f'learn what is wrong: {"; ".join(problems[:_NAMED])}{more}. Mend them '
            'first.'
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    # JSON's own errors and those of the encoding are ValueErrors.
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path} is not JSON, or a part of it: {error}') from None


def _problems(
    content: Any, classes: Sequence[str] | None, masks: bool, test_mode: bool
) -> Iterator[str]:
    if not isinstance(content, dict):
        yield f'it holds a {type(content).__name__}, not a dict of {", ".join(_LISTS)}'
        return
    if test_mode:
        content = {'annotations': [], **content}
    for name in _LISTS:
        if not _is_list_of_dicts(content.get(name)):
            yield f'{name} is missing, or not a list of dicts'
            return
        if not (content[name] or (test_mode and name == 'annotations')):
            yield f'{name} is empty'
    problems = [
        *_checked(content['categories'], 'category', _wrong_in_category),
        *_checked(content['images'], 'image', _wrong_in_image),
    ]
    # What refers to them is looked at once they are right.
    yield from problems or _wrong_references(content, classes, masks)


def _wrong_references(
    content: dict[str, list[dict]], classes: Sequence[str] | None, masks: bool
) -> Iterator[str]:
    if classes is not None:
        yield from _wrong_classes(
            [each['name'] for each in content['categories']], classes
        )
    images = {_key(image): image for image in content['images']}
    categories = {_key(category) for category in content['categories']}

    def wrong(annotation: dict) -> str | None:
        image = images.get(_key(annotation, 'image_id'))
        if image is None:
            return f'no image has its image_id, {annotation.get("image_id")!r}'
        if _key(annotation, 'category_id') not in categories:
            return f'no category has its category_id, {annotation.get("category_id")!r}'
        return _wrong_in_box(annotation) or (
            _wrong_in_mask(annotation, image) if masks else None
        )

    yield from _checked(content['annotations'], 'annotation', wrong)


def _checked(
    items: list[dict], kind: str, wrong: Callable[[dict], str | None]
) -> Iterator[str]:
    """Check each item and that no two have one id."""
    for item in items:
        if reason := (_wrong_id(item) or wrong(item)):
            yield f'{kind} {item.get("id")!r}: {reason}'
    for key, count in Counter(map(_key, items)).items():
        if key is not None and count > 1:
            yield f'{kind} {key[1]!r}: {count} have this id'


def _wrong_id(item: dict) -> str | None:
    return None if _key(item) else 'its id is missing, or neither a number nor a text'


def _key(item: dict, name: str = 'id') -> tuple[type, Any] | None:
    """Return what compares ids: 1 is not '1', nor True."""
    value = item.get(name)
    return (type(value), value) if isinstance(value, int | str) else None


def _wrong_in_category(category: dict) -> str | None:
    return None if isinstance(category.get('name'), str) else 'its name is no text'


def _wrong_in_image(image: dict) -> str | None:
    name = image.get('file_name')
    if not (isinstance(name, str) and name):
        return f'its file_name is {name!r}'
    for side in ('height', 'width'):
        if not _is_number(image.get(side)) or image[side] < 1:
            return f'its {side} is {image.get(side)!r}, and no number of pixels'
    return None


def _wrong_classes(names: list[str], classes: Sequence[str]) -> Iterator[str]:
    found = [name for name in names if name in classes]
    if found != list(classes):
        yield (
            f'of the classes {_some(classes)} it has {_some(found)}, in this order, '
            'and MMDetection numbers labels by what it finds: give metainfo.classes '
            'as the file has them'
        )


def _some(names: Sequence[str]) -> str:
    text = ', '.join(map(repr, names[:_NAMED])) or 'none'
    return f'{text} ... ({len(names)})' if len(names) > _NAMED else text


def _wrong_in_box(annotation: dict[str, Any]) -> str | None:
    box: Any = annotation.get('bbox')
    if not (_are_numbers(box) and len(box) == 4):
        return f'its bbox is {box!r}, and no x, y, width and height'
    if not _is_number(annotation.get('area')):
        return f'its area is {annotation.get("area")!r}'
    return None


def _wrong_in_mask(annotation: dict, image: dict) -> str | None:
    mask = annotation.get('segmentation')
    if isinstance(mask, list) and mask:
        if all(_are_numbers(polygon) for polygon in mask):
            return None
        return 'its segmentation has a polygon that is no list of numbers'
    if not isinstance(mask, dict):
        return 'its segmentation is missing or empty, but masks are trained'
    size = [image['height'], image['width']]
    if mask.get('size') != size:
        return f'its mask has the size {mask.get("size")}, but its image {size}'
    counts: Any = mask.get('counts')
    # Compressed counts are a text, which only the decoder understands.
    if isinstance(counts, str) and counts:
        return None
    if not _are_numbers(counts) or min(counts, default=-1) < 0:
        return 'the counts of its mask are no numbers of pixels'
    if sum(counts) != math.prod(size):
        return f'its mask counts {sum(counts)} pixels, and its image {math.prod(size)}'
    return None


def _is_list_of_dicts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, dict) for each in value)


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_number, value))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
