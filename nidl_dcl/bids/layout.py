"""A real `bids.BIDSLayout`, filled in seconds through pybids' own ``indexer`` argument.

Holds the files of the folders where images lie; `bids_index` finds images without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nidl_dcl.bids.derivatives import (
    dataset_root,
    listed,
    named_places,
    preset_called,
    search_places,
)
from nidl_dcl.bids.directory_cache import Listings
from nidl_dcl.bids.entities import entities_of
from nidl_dcl.bids.presets import Preset
from nidl_dcl.bids.walk import DatasetWalker

__all__ = ["layout"]


def layout(
    bids_dir: str | Path, *, preset: str = "raw-t1w", derivatives: Sequence[str | Path] = ()
) -> Any:
    """Return a real ``bids.BIDSLayout`` of the folders that `find_images` looks at.

    It is filled through pybids' own ``indexer`` argument, so it takes seconds and needs no valid
    ``dataset_description.json``. It holds the files of those folders and of the root, parsed
    relative to the root; sidecar metadata are not indexed, because one broken sidecar anywhere
    would make the whole layout fail.

    Parameters
    ----------
    bids_dir, preset, derivatives
        As in `find_images`. Derivatives that are given, or that hold the preset's images, become
        derivatives of the layout.

    Returns
    -------
    bids.BIDSLayout
    """
    from bids import BIDSLayout

    root = dataset_root(bids_dir)
    form = preset_called(preset)
    places = named_places(root, derivatives)
    children = {name: places[name] for name in list(places)[1 : 1 + len(listed(derivatives))]}
    if form.derivatives:
        home, _ = search_places(places, derivatives, form, {}, None, None)
        children |= {} if home == "raw" else {home: places[home]}

    def fill(new: Any) -> None:
        _fill_layout(new, form)

    parent = BIDSLayout(root, validate=False, indexer=fill)
    for name, place in children.items():
        parent.derivatives[name] = BIDSLayout(
            place, validate=False, is_derivative=True, indexer=fill, sources=parent
        )
    return parent


def _fill_layout(new: Any, form: Preset) -> None:
    """Add the files of the folders where images lie, and their entities, to an empty layout."""
    from bids.layout.models import BIDSFile, Tag
    from bids.utils import make_bidsfile

    root = Path(new.root)
    known = {name for config in new.config.values() for name in config.entities}
    folders = tuple(dict.fromkeys((*Preset("").folders, *form.folders)))
    listings = Listings(root)
    names = [("", name) for name in listings.read("").files()]
    for folder in DatasetWalker(listings, Preset("", folders=folders)):
        names += [(folder.path, name) for name in folder.listing.files()]
    classes: dict[str, str] = {}
    files, tags = [], []
    for folder_path, name in dict.fromkeys(names):
        if name.startswith("."):
            continue
        ending = name.partition(".")[2]
        if ending not in classes:
            classes[ending] = make_bidsfile(f"x.{ending}").class_
        path = f"{folder_path}/{name}" if folder_path else name
        files.append(
            {
                "path": f"{root}/{path}",
                "filename": name,
                "dirname": f"{root}/{folder_path}".rstrip("/"),
                "is_dir": False,
                "class_": classes[ending],
            }
        )
        tags += [
            {
                "file_path": files[-1]["path"],
                "entity_name": entity,
                "_value": str(value),
                "_dtype": "int" if isinstance(value, int) else "str",
                "is_metadata": False,
            }
            for entity, value in entities_of(path).items()
            if entity in known
        ]
    # Rows, not objects: pybids makes an object per file, which takes most of its time.
    for model, rows in ((BIDSFile, files), (Tag, tags)):
        if rows:
            new.session.execute(model.__table__.insert(), rows)
    new.session.commit()
