"""Where each readout looks, as the report shows it: maps on the mean brain, drawn by nilearn.

Takes the files of `nidl_dcl.workflow.occlusion_maps`; computes nothing.
"""

from __future__ import annotations

import io
import re
import warnings
from typing import Any

import matplotlib as mpl
import nibabel as nib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from nibabel.filebasedimages import ImageFileError

from nidl_dcl.report.html import Gallery, Table
from nidl_dcl.report.reader import Results, TargetResult, as_dict, as_list, as_number
from nidl_dcl.report.svg import STYLE, clean

_COLD_WARM = LinearSegmentedColormap.from_list(
    "cold_warm", ["#c4ecff", "#56b4e9", "#0060a8", "#101418", "#a13a00", "#e69f00", "#fff0b8"]
)
"""Blue below 0, orange above: color-blind readers see both ends apart, also where they are pale."""

_MOST_OUTPUTS = 4

_MOST_REGIONS = 10

_COLUMNS = ("region", "x", "y", "z", "what it adds")


def show_occlusion(results: Results, gallery: Gallery) -> list[dict[str, Any]]:
    """Return what the page says of the maps of each target, and write its pictures.

    A target without maps is left out; a map that cannot be read is a problem on the page.
    """
    stems = [(t, f"figures/desc-{results.model}{t.label}_occlusion") for t in results.targets()]
    there = [(found, stem) for found, stem in stems if results.has(f"{stem}.json")]
    brain = _image(results, f"figures/desc-{results.model}_meanbrain.nii.gz") if there else None
    return [_show(results, gallery, found, stem, brain) for found, stem in there]


def _average(results: Results, image: Any) -> Any:
    """Return the average brain in the space of a map, None where it has another."""
    volumes = results.array("figures/average.npy")
    if volumes is None or image is None or volumes.shape[1:] != image.shape[:3]:
        return None
    return nib.Nifti1Image(np.asarray(volumes[0], dtype=np.float32), image.affine)


def _show(
    results: Results, gallery: Gallery, found: TargetResult, stem: str, brain: Any
) -> dict[str, Any]:
    about, table = results.json(f"{stem}.json"), results.numbers(f"{stem}.tsv")
    of_people = f"the volumes of {about.get('Participants')} participants, on average"
    images = [
        (_image(results, f"{stem}{kind}.nii.gz"), kind, of)
        for kind, of in (("", "the mean brain"), ("participants", of_people))
    ]
    behind = f"the mean of {about.get('MeanOf')} prepared volumes"
    if brain is None:
        brain = _average(results, images[0][0])
        behind = "none" if brain is None else "the average brain (figures/average.npy)"
    outputs = [as_dict(output) for output in as_list(about.get("Outputs"))]
    shown = []
    for k, output in enumerate(outputs[:_MOST_OUTPUTS]):
        name = str(output.get("Name"))
        title = f"{found.name} {name}" if about.get("Task") == "classification" else found.name
        # Classes may be called alike but for signs, and of more than two each has its map.
        suffix = f"class{k + 1}" if len(outputs) > 1 else ""
        peak = [as_number(v) for v in as_list(output.get("Peak"))]
        pictures = []
        for image, kind, of in images:
            if image is None or len(peak) != 3 or None in peak:
                continue
            drawn = _draw(image, k, brain, peak, results.problems)
            if drawn is not None:
                file = f"desc-{gallery.model}{found.label}_occlusion{kind}{suffix}"
                alt = f"Map of {clean(title)} on {of}. {_extremes(output)}"
                caption = f"Hiding blocks of {of}; {clean(output.get('Units'))}."
                pictures.append(gallery.volume(file, drawn, alt, caption, f"{stem}{kind}.nii.gz"))
        rows = table[table["output"].astype(str) == name] if "output" in table else table
        rows = rows.head(_MOST_REGIONS).reindex(columns=["region", "x", "y", "z", "change"])
        cells = rows.to_numpy(dtype=object).tolist()
        shown.append(
            {
                "name": title,
                "sentences": [str(s) for s in as_list(output.get("Sentences"))],
                "pictures": pictures,
                "regions": Table(_COLUMNS, cells, numeric=_COLUMNS[1:]),
            }
        )
    return {
        "label": found.label,
        "name": found.name,
        "stem": stem,
        "outputs": shown,
        "hidden": max(0, len(outputs) - _MOST_OUTPUTS),
        "block": as_list(about.get("BlockSize")),
        "stride": as_list(about.get("Stride")),
        "baseline": str(about.get("Baseline") or ""),
        "positive": str(about.get("Positive") or ""),
        "space": str(about.get("Space") or ""),
        "blocks": as_number(about.get("Blocks")),
        "background": behind,
        "participants": as_number(about.get("Participants")),
    }


def _extremes(output: dict[str, Any]) -> str:
    low, high = as_number(output.get("Minimum")), as_number(output.get("Maximum"))
    if low is None or high is None:
        return "Extremes unknown."
    return (
        f"Blocks add {low:.3g} to {high:.3g} {clean(output.get('Units'))}; the strongest lies at "
        f"{clean(output.get('PeakRegion'))}."
    )


def _image(results: Results, name: str) -> Any:
    """Return an image with its values in memory, None where there is none."""
    if not results.has(name):
        return None
    try:
        image = nib.load(results.folder / name)
        return nib.Nifti1Image(np.asarray(image.dataobj, dtype=np.float32), image.affine)
    except (OSError, EOFError, ValueError, ImageFileError) as error:
        problem = re.sub(r"\S*/", "", str(error))
        results.problems.append(f"{name} is not an image: {problem}")
        return None


def _draw(image: Any, k: int, brain: Any, peak: list[Any], problems: list[str]) -> bytes | None:
    """Draw slices of a map through its peak, as a PNG on black; None where there is nothing."""
    with warnings.catch_warnings():
        # nilearn warns of headless backends, and of images that it resamples.
        warnings.simplefilter("ignore")
        from nilearn import plotting

        data = np.asarray(image.dataobj)
        data = data[..., k] if data.ndim == 4 else data
        highest = float(np.abs(data).max())
        if not np.isfinite(highest) or highest == 0:
            problems.append("A map of occlusion is 0 everywhere or not finite, so it is not drawn.")
            return None
        stat = nib.Nifti1Image(data, image.affine)
        size = nib.Nifti1Image(np.abs(data), image.affine)
        full = 0.6 * highest
        # nilearn refuses a scale of which no voxel is on the lower side.
        even = float(np.abs(data).min()) >= full
        with mpl.rc_context({**STYLE, "axes.grid": False, "font.size": 10}):
            display = plotting.plot_stat_map(
                stat,
                bg_img=brain,
                cut_coords=peak,
                display_mode="ortho",
                black_bg=True,
                colorbar=True,
                vmax=highest,
                cmap=_COLD_WARM,
                transparency=None if even else size,
                transparency_range=None if even else [0.0, full],
                draw_cross=False,
            )
            stream = io.BytesIO()
            display.frame_axes.figure.savefig(
                stream, format="png", dpi=110, metadata={"Software": None}, facecolor="black"
            )
            display.close()
    return stream.getvalue()
