"""Versions of installed packages."""

import importlib.metadata


def installed(package: str) -> str:
    """The version of a package; "not installed" if pip knows nothing of it, though its modules may be there.

    A run must not end with an error because a copied package lacks its metadata.
    """
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
