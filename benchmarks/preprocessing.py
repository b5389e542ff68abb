"""From raw heads to aligned brains: time, agreement with reference masks, and how brains lie.

    python benchmarks/preprocessing.py [BIDS_DIR] [--first 10] [--table FILE]

Takes a BIDS dataset of T1w heads with a derivative of brain masks, for instance the 80 of IXI with masks of
DLMUSE that `NIDL_DCL_IXI` names; the masks are looked at afterwards only. Seconds are of one processor
at 2 mm, with reading, writing of what a derivative holds, and the picture. Dice is that of the mask
found and the reference; overlap that of the aligned mask and the template's; flipped the correlation
with the template less that with the template back to front or upside down, whichever is more; lead
and the others as `nidl_dcl.preprocessing.measures` has them. Images that stand in the table already are not
done again.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import measure
import nibabel as nib
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import ndimage

from nidl_dcl.preprocessing.head import read_head, read_mask
from nidl_dcl.preprocessing.itk import transform_text
from nidl_dcl.preprocessing.measures import overlap
from nidl_dcl.preprocessing.mosaic import draw_mosaic
from nidl_dcl.preprocessing.pipeline import AlignedBrain, Outcome, preprocess_t1w
from nidl_dcl.preprocessing.template import Template, load_template

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "ixi"
DATASET = Path(os.environ.get("NIDL_DCL_IXI", SHARED))

# Column, how it is summed up, the limit, whether it is one from above.
WANTED = (
    ("cpu_s", "median", 8.0, True),
    ("cpu_s", "max", 8.0, True),
    ("dice", "median", 0.97, False),
    ("dice", "min", 0.95, False),
    ("overlap", "mean", 0.93, False),
    ("overlap", "min", 0.88, False),
    ("flipped", "min", 0.0, False),
    ("lead", "min", 0.0, False),
)


def write(brain: AlignedBrain, folder: Path) -> None:
    """Write what a derivative holds of one image."""
    head, template = brain.head, brain.template
    images = {
        "desc-brain_mask": (head.as_stored(brain.mask).astype(np.uint8), head.stored_affine),
        "space_desc-preproc_T1w": (brain.aligned, template.affine),
        "space_desc-brain_mask": (brain.aligned_mask.astype(np.uint8), template.affine),
    }
    for name, (data, affine) in images.items():
        content = nib.Nifti1Image(data, affine).to_bytes()
        (folder / f"{name}.nii.gz").write_bytes(gzip.compress(content, compresslevel=3, mtime=0))
    (folder / "xfm.txt").write_text(transform_text(brain.matrix), "utf-8")
    (folder / "mosaic.png").write_bytes(draw_mosaic(brain))


def flipped(aligned: NDArray[np.float32], template: Template) -> float:
    """Return how much more like the template a brain is than like it flipped in place."""
    center = np.array(ndimage.center_of_mass(template.mask))
    likeness = [np.corrcoef(aligned.ravel(), template.data.ravel())[0, 1]]
    for axis in (1, 2):
        there = np.array(ndimage.center_of_mass(np.flip(template.mask, axis)))
        shift = np.rint(center - there).astype(int)
        mirrored = np.roll(np.flip(template.data, axis), shift, (0, 1, 2))
        likeness.append(np.corrcoef(aligned.ravel(), mirrored.ravel())[0, 1])
    return float(likeness[0] - max(likeness[1:]))


def one_image(path: Path, reference: Path, folder: Path) -> dict[str, Any]:
    """Return the line of the table on one image."""
    start = time.process_time()
    outcome: Outcome = preprocess_t1w(path)
    brain = outcome.brain
    if isinstance(brain, AlignedBrain):
        write(brain, folder)
    line: dict[str, Any] = {
        "image": path.name,
        "status": outcome.verdict.status,
        "code": outcome.verdict.code,
        "cpu_s": time.process_time() - start,
    }
    if isinstance(brain, AlignedBrain) and outcome.measures is not None:
        true = read_mask(reference, read_head(path))
        line["dice"] = overlap(brain.mask, true)
        line["volume_ratio"] = float(brain.mask.sum() / true.sum())
        line["flipped"] = flipped(brain.aligned, brain.template)
        line |= dataclasses.asdict(outcome.measures)
    return line


def main(
    dataset: Path = DATASET, first: int | None = None, table: Path | None = None
) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    masks = {p.name: p for p in dataset.glob("derivatives/*/sub-*/**/*_desc-brain_mask.nii.gz")}
    images = sorted(dataset.glob("sub-*/**/anat/*_T1w.nii.gz"))[:first]
    if not images or not masks:
        return [measure.skipped("raw heads", f"a dataset with reference masks, {dataset},")]
    done = pd.read_csv(table, sep="\t") if table and table.is_file() else pd.DataFrame()
    lines = done.to_dict("records")
    for resolution in (2, 8):  # read once a run, not once an image
        load_template(resolution)
    with tempfile.TemporaryDirectory() as folder:
        for path in images:
            if any(line["image"] == path.name for line in lines):
                continue
            reference = masks[path.name.replace("T1w", "desc-brain_mask")]
            if not lines:
                preprocess_t1w(path)  # networks are loaded once a run, too
            lines.append(one_image(path, reference, Path(folder)))
            told = (
                f"{k} {v:.3f}" if isinstance(v, float) else str(v) for k, v in lines[-1].items()
            )
            print(*told, sep="  ", flush=True)
            if table:
                pd.DataFrame(lines).round(5).to_csv(table, sep="\t", index=False, na_rep="n/a")
    found = pd.DataFrame(lines)
    print(found["code"].value_counts().to_string())
    print(
        found.describe(percentiles=[0.05, 0.5, 0.95]).T.drop(columns="count").round(3).to_string()
    )
    rows = []
    for name, how, limit, at_most in WANTED:
        value = float(found[name].agg(how))
        rows.append(
            {
                "name": f"{name} ({how})",
                "ours": value,
                "target": f"{'<=' if at_most else '>='} {limit:g}",
                "met": value <= limit if at_most else value >= limit,
                "note": f"{len(found)} images, {(found['status'] == 'ok').sum()} ok",
            }
        )
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", type=Path, nargs="?", default=DATASET)
    parser.add_argument("--first", type=int, help="only so many images")
    parser.add_argument("--table", type=Path, help="keep a line an image; resume from it")
    given = parser.parse_args()
    measure.print_table(main(given.dataset, given.first, given.table))
