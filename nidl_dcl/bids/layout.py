"""Make a real `bids.BIDSLayout` in seconds, through pybids' own ``indexer`` argument.

It holds the files of the folders where images lie. `index` finds images without it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from nidl_dcl.bids.derivatives import (
    as_list,
    dataset_root,
    find_preset,
    named_datasets,
    search_datasets,
)
from nidl_dcl.bids.entities import entities_of
from nidl_dcl.bids.presets import Preset
from nidl_dcl.bids.walk import DatasetWalker


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
    found = find_preset(preset)
    datasets = named_datasets(root, derivatives)
    children = {name: datasets[name] for name in list(datasets)[1 : 1 + len(as_list(derivatives))]}
    if found.derivatives:
        home, _ = search_datasets(datasets, derivatives, found, {}, None, None)
        children |= {} if home == "raw" else {home: datasets[home]}

    fill = partial(_fill_layout, preset=found)
    parent = BIDSLayout(root, validate=False, indexer=fill)
    for name, folder in children.items():
        parent.derivatives[name] = BIDSLayout(
            folder, validate=False, is_derivative=True, indexer=fill, sources=parent
        )
    return parent


def _fill_layout(new: Any, preset: Preset) -> None:
    """Add the files of the folders where images lie, and their entities, to an empty layout."""
    from bids.layout.models import BIDSFile, Tag
    from bids.utils import make_bidsfile

    root = Path(new.root)
    known = {name for config in new.config.values() for name in config.entities}
    folders = tuple(dict.fromkeys((*Preset("").folders, *preset.folders)))
    names = [("", name) for name in _files(os.scandir(root))]
    for folder in DatasetWalker(root, Preset("", folders=folders)):
        names += [(folder.path, name) for name in _files(folder.entries)]
    class_of = cache(lambda ending: make_bidsfile(f"x.{ending}").class_)
    files, tags = [], []
    for folder_path, name in dict.fromkeys(names):
        if name.startswith("."):
            continue
        path = f"{folder_path}/{name}" if folder_path else name
        files.append(
            {
                "path": f"{root}/{path}",
                "filename": name,
                "dirname": f"{root}/{folder_path}".rstrip("/"),
                "is_dir": False,
                "class_": class_of(name.partition(".")[2]),
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


def _files(entries: Iterable[os.DirEntry[str]]) -> list[str]:
    """Return the names of plain files and links, sorted."""
    return sorted(
        entry.name
        for entry in entries
        if entry.is_symlink() or entry.is_file(follow_symlinks=False)
    )
