"""What is said of a candidate by its name, one at a time or among thousands alike."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nidl_dcl.bids.entities import NameRule, entities_of
from nidl_dcl.bids.presets import PRESETS
from nidl_dcl.bids.search import search

RESTS = ("T1w.nii.gz", "run-01_T1w.nii.gz", "acq-ses_T1w.nii", "ses-1_T1w.nii.gz")
RESTS += ("ses-1_run-1_T1w.nii.gz", "ses-2_T1w.nii.gz", "acq-a_acq-b_T1w.nii.gz", "T1w.mgz")
RESTS += ("acq-anat_T1w.nii.gz", "inv-2_part-phase_T1w.nii.gz", "0_T1w.nii.gz", "space-x_T1w.NII")
WHO = ("sub-1", "sub-10", "sub-anat", "sub-1+2", "sub-A_B", "sub-ses", "sub-T1w", "sub-")


@pytest.mark.parametrize(
    "preset", ["raw-t1w", "cat12-vbm", "openbhb-quasiraw", "clinica-t1-linear"]
)
def test_names_that_are_alike_are_judged_as_if_each_were_alone(tmp_path: Path, preset: str) -> None:
    layout = replace(PRESETS[preset], entities={})
    for pattern in layout.folders:
        for who in WHO:
            for session in ("ses-1", "ses-2", "ses-b d"):
                folder = tmp_path / pattern.replace("sub-*", who).replace("ses-*", session)
                folder.mkdir(parents=True, exist_ok=True)
                for rest in RESTS:
                    name = f"{layout.prefixes[-1]}{who}_{rest}".replace(
                        ".nii.gz", layout.extensions[0]
                    )
                    (folder / name).touch()
                    (folder / f"{layout.prefixes[-1]}sub-1_{session}_{rest}").touch()
                    (folder / f"{layout.prefixes[-1]}{who}_{session}_{rest}").touch()
    found = search(tmp_path, layout, {})
    rule = NameRule(layout, [layout.suffix], layout.extensions)
    later = {"duplicate", "ambiguous", "part"}
    assert len(found.candidates) > 100
    for candidate in found.candidates:
        assert candidate.entities == entities_of(candidate.path)
        name = candidate.path.rsplit("/", 1)[-1]
        alone = rule.judge(name, candidate.participant, candidate.session)
        if candidate.code not in later:
            assert (candidate.code, candidate.message) == alone
        elif candidate.code != "duplicate":
            assert alone == ("ok", "")
