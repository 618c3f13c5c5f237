"""What of a bundle can be shown though some of its files are damaged: the model must be whole, derived files may be gone."""

from __future__ import annotations

import dataclasses

import msgspec

from edgekit.bundle import Bundle
from edgekit.errors import BundleError

__all__ = ["Damage", "whole_files"]

#: (file, why it is not shown).
Damage = tuple[tuple[str, str], ...]


def whole_files(bundle: Bundle) -> tuple[Bundle, Damage]:
    """The bundle without its damaged derived files, and these. Every file is hashed.

    Raises `BundleError` where a file that says what the model is is damaged or missing, and for a link that leads out of it.
    """
    bundle.check_model()
    damage = []
    for name in bundle.manifest.files:
        path = bundle.path / name
        try:
            bundle.file(name)
        except BundleError:
            if any(part.is_symlink() for part in (path, path.parent) if part != bundle.path):
                raise
            damage.append((name, "its sha256 is not the manifest's" if path.is_file() else "it is missing"))
    lost = dict(damage)
    kept = {name: digest for name, digest in bundle.manifest.files.items() if name not in lost}
    return dataclasses.replace(bundle, manifest=msgspec.structs.replace(bundle.manifest, files=kept)), tuple(damage)
