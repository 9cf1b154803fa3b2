"""Stands other installations of OpenMMLab in for the real one, as files in a folder.

What pip would do: each distribution brings its metadata and writes its module over what is there.
"""

from importlib.machinery import PathFinder
from importlib.metadata import Distribution, PackageNotFoundError

from mmvmamba import compat


def stand_in(monkeypatch, folder, *installed: tuple[str, str]) -> None:
    """Makes `compat` see these distributions of `compat.MODULES`, in this order, and no others.

    Args:
        installed: Their names and versions.
    """
    folder.mkdir(exist_ok=True)
    for name, version in installed:
        metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info/METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        write_module(folder, name, version)
    real_spec, real_version = compat.find_spec, compat.version

    def find_spec(name):
        return PathFinder.find_spec(name, [str(folder)]) if of_stack(name) else real_spec(name)

    def version(name):
        if not of_stack(name):
            return real_version(name)
        for found in Distribution.discover(name=name, path=[str(folder)]):
            return found.version
        raise PackageNotFoundError(name)

    monkeypatch.setattr(compat, "find_spec", find_spec)
    monkeypatch.setattr(compat, "version", version)


def of_stack(name: str) -> bool:
    return compat.module_of(name) in compat.MODULES


def write_module(folder, name: str, version: str) -> None:
    """A distribution's module, whose version is told in the way of its stack."""
    module = folder / compat.module_of(name)
    module.mkdir(exist_ok=True)
    (module / "__init__.py").write_text("from .version import __version__\n")
    (module / "version.py").write_text(
        f"from importlib.metadata import version\n\n__version__ = version('{name}')\n"
        if name.startswith("onedl-")
        else f"# Copyright.\n__version__ = '{version}'\nshort_version = __version__\n"
    )
