"""Refuses what is older than the project declares: frameworks pin versions of their own."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from sts_callback.errors import VersionError


def require_versions() -> None:
    """Refuse a package that is missing or not in the range that ours declares.

    Raises:
        VersionError: with the version that is needed.

    """
    try:
        declared = requires("sts-callback") or []
    except PackageNotFoundError:  # sources that nobody installed, which declare nothing
        return
    for needed in map(Requirement, declared):
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(needed.name)
        except PackageNotFoundError:
            found = "none"
        if found == "none" or not needed.specifier.contains(found, prereleases=True):
            wanted = f"{needed.name}{needed.specifier}"
            raise VersionError(f"{needed.name}: got {found}; sts-callback needs {wanted}. Try: pip install '{wanted}'.")
