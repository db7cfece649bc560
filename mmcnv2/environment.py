"""One clear message when the installed packages cannot work together.

What is needed stands in setup.cfg alone; this module reads it back from the metadata of
the installed package. It looks without importing, so it is quick and shows its message
where the packages themselves would fail with a less helpful one.
"""

from collections.abc import Iterator
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec

from packaging.requirements import Requirement

# Each extra names a family of packages; both families have the same import names.
_FAMILIES = {'openmmlab': 'mm', 'onedl': 'onedl-mm'}

_PIP = 'pip install --no-build-isolation'
_TOOLCHAIN = 'pip install "setuptools<81" wheel ninja psutil'


def check_environment() -> None:
    """Check the versions and the state of the OpenMMLab packages that are installed.

    A package that is not installed is no problem here, MMEngine excepted: the models
    need no other, and pre-training MMCV alone, without its compiled operators.

    Raises:
        ImportError: Something installed cannot work. The message lists each problem
            with the command that mends it.
    """
    problems = [*_find_problems(_requirements())]
    if problems:
        listed = '\n'.join(f'- {problem}' for problem in problems)
        raise ImportError(f'mmcnv2 cannot work with what is installed:\n{listed}')


def _requirements() -> list[Requirement]:
    try:
        return [Requirement(line) for line in requires('mmcnv2') or []]
    except PackageNotFoundError:
        # A source tree on PYTHONPATH has no metadata, and so no versions to check.
        return []


def _find_problems(requirements: list[Requirement]) -> Iterator[str]:
    families = {
        extra: _family(requirements, extra, prefix)
        for extra, prefix in _FAMILIES.items()
    }
    yield from _mixed_families(families)
    always = [each for each in requirements if each.marker is None]
    yield from _wrong_versions([*always, *families['openmmlab'], *families['onedl']])
    yield from _missing_mmengine(requirements)
    yield from _missing_ops(requirements)
    yield from _missing_pkg_resources()
    yield from _missing_for_mmseg()


def _family(
    requirements: list[Requirement], extra: str, prefix: str
) -> list[Requirement]:
    return [
        each
        for each in requirements
        if each.name.startswith(prefix)
        and each.marker
        and each.marker.evaluate({'extra': extra})
    ]


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _pinned(requirement: Requirement) -> str:
    return f'"{requirement.name}{requirement.specifier}"'


def _wanted(requirements: list[Requirement], name: str) -> str:
    return next((_pinned(each) for each in requirements if each.name == name), name)


def _wrong_versions(requirements: list[Requirement]) -> Iterator[str]:
    for each in requirements:
        found = _installed(each.name)
        if found and not each.specifier.contains(found, prereleases=True):
            yield (
                f'{each.name} {found} is installed, {each.name}{each.specifier} is '
                f'needed. Run: {_PIP} {_pinned(each)}'
            )


def _mixed_families(families: dict[str, list[Requirement]]) -> Iterator[str]:
    found = {
        extra: [each for each in family if _installed(each.name)]
        for extra, family in families.items()
    }
    if not all(found.values()):
        return
    both = [each.name for family in found.values() for each in family]
    # Each family's removal takes the other's files along, so all have to go first.
    yield (
        f'{", ".join(both)} are installed together, but the onedl packages and the '
        'OpenMMLab ones overwrite each other: keep one family. Run: '
        f'pip uninstall -y {" ".join(both)} && '
        f'{_PIP} {" ".join(_pinned(each) for each in families["openmmlab"])}'
    )


def _missing_mmengine(requirements: list[Requirement]) -> Iterator[str]:
    if find_spec('mmengine') is None:
        wanted = _wanted(requirements, 'mmengine')
        yield f'mmengine is not installed. Run: {_PIP} {wanted}'


def _missing_ops(requirements: list[Requirement]) -> Iterator[str]:
    mmcv = find_spec('mmcv')
    needed_by = [name for name in ('mmdet', 'mmseg') if find_spec(name)]
    if mmcv is None or not needed_by:
        return
    folders = mmcv.submodule_search_locations or []
    if PathFinder.find_spec('mmcv._ext', folders):
        return
    name = 'onedl-mmcv' if _installed('onedl-mmcv') else 'mmcv'
    # pip would take a wheel without operators from its cache again.
    build = f'{_PIP} --no-cache-dir --force-reinstall --no-deps'
    yield (
        f'mmcv in {", ".join(folders)} has no compiled operators, which '
        f'{" and ".join(needed_by)} need: pip built it apart from torch, or it is '
        f'mmcv-lite. Run: pip uninstall -y mmcv-lite && {_TOOLCHAIN} && {build} '
        f'{_wanted(requirements, name)}'
    )


def _missing_pkg_resources() -> Iterator[str]:
    # Only OpenMMLab's own mmengine imports it; the onedl fork does not.
    mmengine = _installed('mmengine')
    if mmengine and find_spec('pkg_resources') is None:
        setuptools = _installed('setuptools')
        found = f'setuptools {setuptools}' if setuptools else 'no setuptools'
        yield (
            f'mmengine {mmengine} imports pkg_resources, and {found} is installed, '
            'which lacks it. Run: pip install "setuptools<81"'
        )


def _missing_for_mmseg() -> Iterator[str]:
    # It imports them, and its metadata does not name them.
    missing = [name for name in ('ftfy', 'regex') if find_spec(name) is None]
    if find_spec('mmseg') and missing:
        names = ' '.join(missing)
        yield f'mmsegmentation needs {names}, not installed. Run: pip install {names}'
