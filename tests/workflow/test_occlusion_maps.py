from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SLOW, give

from nidl_dcl import DCL
from nidl_dcl.evaluation.folds import make_design
from nidl_dcl.evaluation.occlusion import (
    HiddenBlocks,
    find_inside,
    hidden_features,
    lay_blocks,
    spread_changes,
)
from nidl_dcl.evaluation.readout import FittedReadout, fit_readout
from nidl_dcl.evaluation.readout_file import read_readout, write_readout
from nidl_dcl.evaluation.targets import read_target
from nidl_dcl.models.encoders import StridedCNN
from nidl_dcl.report.build import write_report
from nidl_dcl.report.occlusion import _draw
from nidl_dcl.workflow.occlusion_maps import _spread_people

SHAPE, SPACING = (20, 24, 16), (8.0, 8.0, 8.0)


def ellipsoid(shape=SHAPE):
    grids = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij"))
    return (grids**2).sum(axis=0) < 0.9


# Blocks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spacing", "size", "stride"),
    [
        ((8, 8, 8), (3, 3, 3), (1, 1, 1)),
        ((4, 6, 12), (6, 4, 2), (3, 2, 1)),
        ((30,) * 3, *[(1,) * 3] * 2),
    ],
)
@pytest.mark.parametrize("thin", [False, True])
def test_blocks_are_24_mm_and_every_voxel_inside_gets_a_value(spacing, size, stride, thin):
    inside = ellipsoid()
    blocks = lay_blocks(inside, spacing)
    if thin:
        blocks = blocks.chosen(blocks.thinned)

    covered = np.zeros(SHAPE, dtype=int)
    for number in range(len(blocks)):
        covered[blocks.slices(number)] += 1

    assert (blocks.size, blocks.stride) == (size, stride)
    assert (covered[inside] > 0).mean() > 0.9
    found = spread_changes(np.full(len(blocks), 2.5), blocks)
    np.testing.assert_array_equal(found, np.where(inside, 2.5, 0).astype(np.float32))


def test_every_second_step_is_about_an_eighth_of_the_blocks():
    blocks = lay_blocks(ellipsoid((40, 48, 40)), (4, 4, 4))
    assert len(blocks) / 10 < len(blocks.thinned) < len(blocks) / 6


def test_a_head_smaller_than_a_quarter_of_a_block_still_has_one():
    inside = np.zeros(SHAPE, dtype=bool)
    inside[10, 10, 10] = True
    blocks = lay_blocks(inside, (2, 2, 2))
    assert len(blocks) > 0
    assert all(inside[blocks.slices(i)].any() for i in range(len(blocks)))


def test_centres_are_millimeters_from_the_middle_of_the_volume():
    inside = np.zeros((9, 9, 9), dtype=bool)
    inside[0:3, 3:6, 6:9] = True
    blocks = lay_blocks(inside, (8.0, 8.0, 8.0))
    whole = [i for i in range(len(blocks)) if inside[blocks.slices(i)].all()]
    held = [i for i in whole if inside[blocks.slices(i)].sum() == 27]
    np.testing.assert_allclose(blocks.centres_mm[held], [[-24, 0, 24]])


def test_cavities_are_inside_and_air_is_not():
    volume = ellipsoid().astype(np.float32)
    volume[8:12, 10:14, 6:10] = 0
    np.testing.assert_array_equal(find_inside(volume), ellipsoid())


def test_a_hidden_block_has_the_mean_inside_and_nothing_else_changes():
    inside = ellipsoid()
    volume = np.where(inside, np.random.default_rng(0).uniform(0.5, 1, SHAPE), 0).astype(np.float32)
    blocks = lay_blocks(inside, SPACING)
    samples = HiddenBlocks(volume, blocks)

    np.testing.assert_array_equal(samples[0][0], volume)
    for number in (0, len(blocks) // 2, len(blocks) - 1):
        hidden = samples[number + 1][0].numpy()
        at = np.zeros(SHAPE, dtype=bool)
        at[blocks.slices(number)] = True
        np.testing.assert_allclose(hidden[at & inside], volume[inside].mean(), rtol=1e-5)
        np.testing.assert_array_equal(hidden[~(at & inside)], volume[~(at & inside)])


# Where it looks ---------------------------------------------------------------------------------


def block_means(loader: Any) -> np.ndarray:
    """Embed volumes as the means of blocks of 4 voxels: an encoder that knows places."""
    x = torch.cat(list(loader))[:, 0]
    return (
        x.unfold(1, 4, 4).unfold(2, 4, 4).unfold(3, 4, 4).mean(dim=(-1, -2, -3)).flatten(1).numpy()
    )


def driven(n: int, at: tuple[slice, ...], seed: int = 0):
    """Return volumes whose target is the brightness of one block, and the target."""
    rng = np.random.default_rng(seed)
    y = rng.uniform(20, 80, n)
    inside = ellipsoid()
    volumes = np.where(inside, 0.6 + rng.normal(0, 0.05, (n, *SHAPE)), 0).astype(np.float32)
    volumes[(slice(None), *at)] += ((y - 20) / 100)[:, None, None, None].astype(np.float32)
    return volumes * inside, y


def readout_of(features: np.ndarray, y: Any) -> FittedReadout:
    people = np.array([f"sub-{i}" for i in range(len(y))], dtype=object)
    read = read_target(pd.Series(y), people, name="y")
    design = make_design(read, people, people, n_splits=5, n_repeats=1, seed=0)
    return fit_readout(design, features[design.rows].astype(np.float64))


AT = (slice(12, 15), slice(4, 7), slice(8, 11))
MIDDLE = [((12 + 15 - 1) / 2 - 9.5) * 8, ((4 + 7 - 1) / 2 - 11.5) * 8, ((8 + 11 - 1) / 2 - 7.5) * 8]


def test_the_map_is_strongest_where_the_target_was_put():
    volumes, y = driven(60, AT)
    readout = readout_of(block_means([torch.from_numpy(volumes[:, None])]), y)
    mean = volumes.mean(axis=0)
    blocks = lay_blocks(find_inside(mean), SPACING)

    features = hidden_features(mean, blocks, block_means)
    changes = readout.changes(features[:1] - features[1:])[:, 0]

    strongest = int(np.abs(changes).argmax())
    assert np.abs(blocks.centres_mm[strongest] - MIDDLE).max() <= 12
    assert changes[strongest] > 0  # brighter is older
    assert np.abs(changes).max() > 5 * np.median(np.abs(changes))
    peak = np.unravel_index(np.abs(spread_changes(changes, blocks)).argmax(), SHAPE)
    assert all(s.start - 2 <= p < s.stop + 2 for s, p in zip(AT, peak, strict=True))


def test_changes_are_those_of_the_predictions_themselves():
    volumes, y = driven(40, AT)
    features = block_means([torch.from_numpy(volumes[:, None])])
    number = readout_of(features, y)
    one, other = features[:20], features[20:]
    expected = number.predict(one) - number.predict(other)
    np.testing.assert_allclose(number.changes(one - other)[:, 0], expected, atol=1e-8)

    two = readout_of(features, np.where(y > 50, "old", "young"))
    logits = [np.log(p[:, 1] / p[:, 0]) for p in (two.predict(one), two.predict(other))]
    assert two.labels == ("old", "young")
    np.testing.assert_allclose(two.changes(one - other)[:, 0], logits[0] - logits[1], atol=1e-6)

    three = readout_of(features, np.select([y < 40, y < 60], ["a", "b"], "c"))
    p, q = (np.log(three.predict(x)) for x in (one, other))
    p, q = (x - x.mean(axis=1, keepdims=True) for x in (p, q))
    np.testing.assert_allclose(three.changes(one - other), p - q, atol=1e-6)


def test_an_untrained_network_with_a_readout_finds_the_place_too():
    volumes, y = driven(80, AT)
    model = DCL(StridedCNN(width=8), proj_input_dim=128, random_state=0, enable_progress_bar=False)
    model.fitted = True

    def embed(loader: Any) -> np.ndarray:
        return model.transform(loader).numpy()

    every = torch.utils.data.DataLoader(torch.from_numpy(volumes[:, None]), batch_size=16)
    readout = readout_of(embed(every), y)
    mean = volumes.mean(axis=0)
    blocks = lay_blocks(find_inside(mean), SPACING)

    features = hidden_features(mean, blocks, embed)
    changes = readout.changes(features[:1] - features[1:])[:, 0]

    peak = np.unravel_index(np.abs(spread_changes(changes, blocks)).argmax(), SHAPE)
    assert np.abs((np.array(peak) - (np.array(SHAPE) - 1) / 2) * 8 - MIDDLE).max() <= 24


@pytest.mark.parametrize("labels", [None, ["a", "b"], list("abcdefgh")])
def test_people_are_spread_over_the_target_and_counted_once(labels):
    people = np.array([f"sub-{i // 2}" for i in range(120)], dtype=object)
    of = (
        np.arange(60.0)
        if labels is None
        else np.array([labels[i % len(labels)] for i in range(60)])
    )
    y = np.repeat(of, 2)
    read = read_target(pd.Series(y), people, name="y")
    design = make_design(read, people, people, n_splits=5, n_repeats=1, seed=0)

    chosen = _spread_people(design, people, 0)

    assert len({people[row] for row in chosen}) == len(chosen)
    assert chosen == _spread_people(design, people, 0)
    if labels is None:
        np.testing.assert_array_equal(sorted(y[chosen]), [5, 15, 25, 35, 45, 55])
    else:
        counts = pd.Series(y[chosen]).value_counts()
        assert len(chosen) == max(6, len(labels))
        assert counts.max() - counts.min() <= 0
        assert set(counts.index) == set(labels)


# Files ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=SLOW)
def looked(
    heads_writer: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """Return a dataset and the output of a study with maps, that no test may change."""
    base = tmp_path_factory.mktemp("occlusion")
    bids, out = heads_writer(base / "bids", 16), base / "out"
    words = ["study", bids, out, "--target", "age", "sex", "--spacing", "8", "--max-epochs", "2"]
    assert give(*words, "--occlusion") == 0
    return bids, out


@pytest.fixture
def copied(looked: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """Return the same dataset, and a copy of the output."""
    return looked[0], Path(shutil.copytree(looked[1], tmp_path / "out"))


def maps_of(folder: Path) -> dict[str, bytes]:
    names = [*folder.glob("figures/*occlusion*"), *folder.glob("figures/*meanbrain*")]
    return {p.name: p.read_bytes() for p in names if p.suffix != ".png"}


def page_of_maps(out: Path) -> str:
    """Return the report of a folder, with no other pictures, which take time."""
    for file in (out / "figures").iterdir():
        if "occlusion" not in file.name and "meanbrain" not in file.name:
            file.unlink()
    return write_report(out).read_text("utf-8")


def test_a_study_writes_a_map_a_table_and_what_they_mean(looked):
    figures = looked[1] / "figures"
    contract = json.loads((looked[1] / "models/desc-dcl/model.json").read_text())["input_contract"]
    for target, name in (("Age", "age"), ("Sex", "M")):
        about = json.loads((figures / f"desc-dcl{target}_occlusion.json").read_text())
        table = pd.read_csv(figures / f"desc-dcl{target}_occlusion.tsv", sep="\t")
        assert len(table) == about["Blocks"]
        assert list(table["output"].unique()) == [name]
        assert about["Outputs"][0]["PeakChange"] == pytest.approx(table["change"].iloc[0])
        assert table["change"].abs().is_monotonic_decreasing
        assert about["BlockSize"] == [24, 24, 24]
        assert about["Participants"] == 6
        assert table["change_participants"].notna().sum() == table["change_untrained"].notna().sum()
        for kind in ("occlusion", "occlusionparticipants"):
            image = nib.load(figures / f"desc-dcl{target}_{kind}.nii.gz")
            assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
            assert list(image.shape) == contract["shape"]
            assert list(image.header.get_zooms()) == contract["spacing"]
            middle = image.affine @ [*((n - 1) / 2 for n in image.shape), 1]
            np.testing.assert_allclose(middle, [0, 0, 0, 1], atol=1e-4)
            assert np.abs(image.get_fdata()).max() > 0
        # The map is the mean over blocks, so it cannot leave their range.
        values = nib.load(figures / f"desc-dcl{target}_occlusion.nii.gz").get_fdata()
        assert table["change"].min() - 1e-6 <= values.min() <= values.max()
        assert values.max() <= table["change"].max() + 1e-6


def test_the_brain_behind_the_maps_is_the_mean_of_all(looked):
    from nidl_dcl.models.serialization import load_model
    from nidl_dcl.workflow.factory import data_module, image_table
    from nidl_dcl.workflow.options import DataOptions, RunOptions

    contract = load_model(looked[1] / "models/desc-dcl").preparation
    module = data_module(image_table(looked[0], DataOptions()), RunOptions(), preparation=contract)
    module.setup()
    mean = np.mean([module.volumes[i][0].numpy() for i in range(len(module.images))], axis=0)
    found = nib.load(looked[1] / "figures/desc-dcl_meanbrain.nii.gz").get_fdata()
    np.testing.assert_allclose(found, mean, atol=1e-5)


def test_the_page_shows_the_maps_with_their_words(looked):
    page = (looked[1] / "report.html").read_text("utf-8")
    section = page.split('<section id="occlusion"')[1].split("</section>")[0]
    for target in ("Age", "Sex"):
        about = json.loads((looked[1] / f"figures/desc-dcl{target}_occlusion.json").read_text())
        for sentence in about["Outputs"][0]["Sentences"]:
            assert sentence.replace("'", "&#39;") in section
        for kind in ("occlusion", "occlusionparticipants"):
            png = (looked[1] / f"figures/desc-dcl{target}_{kind}.png").read_bytes()
            assert png.startswith(b"\x89PNG")
    assert section.count("<img") == 4
    assert section.count('alt="Map of') == 4
    assert "does not show what causes" in section


def test_the_same_command_again_makes_nothing(copied, run):
    bids, out = copied
    before = {p: p.stat().st_mtime_ns for p in out.glob("figures/*occlusion.*")}
    assert run("predict", bids, out, "--target", "age", "sex", "--occlusion").status == 0
    stages = json.loads((out / "logs/run.json").read_text())["stages"]
    assert stages[0]["skipped"]
    assert {p: p.stat().st_mtime_ns for p in out.glob("figures/*occlusion.*")} == before


def test_maps_come_out_the_same_from_the_beginning_and_half_way(copied, run, monkeypatch):
    bids, out = copied
    before = maps_of(out)
    command = ("predict", bids, out, "--target", "age", "sex", "--occlusion")
    for name in before:
        (out / "figures" / name).unlink()
    kept = list((out / ".work/features").glob("*/occlusion/*.npy"))
    assert len(kept) > 1
    kept[0].write_bytes(b"damaged")
    kept[1].unlink()
    assert run(*command).status == 0
    assert maps_of(out) == before

    (out / "figures/desc-dclAge_occlusion.nii.gz").unlink()
    shutil.rmtree(out / ".work/features")
    assert run(*command).status == 0
    assert maps_of(out) == before


def test_a_study_without_the_option_has_no_map_and_says_how_to_get_one(copied, run):
    bids, out = copied
    for name in maps_of(out):
        (out / "figures" / name).unlink()
    assert run("predict", bids, out, "--target", "age", "sex").status == 0
    assert run("report", bids, out).status == 0
    assert maps_of(out) == {}
    page = (out / "report.html").read_text("utf-8")
    section = page.split('<section id="occlusion"')[1].split("</section>")[0]
    assert "--occlusion" in section
    assert "<img" not in section


def test_a_map_does_not_outlive_its_readout(copied, run):
    bids, out = copied
    file = out / "models/desc-dcl/desc-dclAge_readout.json"
    kept = read_readout(file)
    assert run("predict", bids, out, "--target", "age", "sex").status == 0
    assert len(maps_of(out)) == 9  # of the same readout they stay
    changed = replace(kept.linear, intercept=kept.linear.intercept + 1)
    write_readout(file, replace(kept, linear=changed))
    assert run("predict", bids, out, "--target", "age", "sex").status == 0
    left = [path.name for path in (out / "figures").glob("*occlusion*")]
    assert left
    assert all("Sex" in name for name in left)


def test_a_readout_with_confounds_has_a_map_of_its_own(run, copied):
    bids, out = copied
    words = ("predict", bids, out, "--target", "age", "--confounds", "sex", "--occlusion")
    assert run(*words).status == 2  # another configuration
    before = maps_of(out)["desc-dclAge_occlusion.tsv"]
    (out / "desc-dclAge_metrics.json").unlink()
    assert run(*words).status == 0
    assert maps_of(out)["desc-dclAge_occlusion.tsv"] != before


@pytest.mark.slow
def test_nobody_held_out_is_looked_at(make_heads, run, tmp_path):
    bids, out = make_heads("bids", 16), tmp_path / "out"
    words = ("--spacing", "8", "--max-epochs", "1", "--holdout", "0.3", "--occlusion")
    assert run("study", bids, out, "--target", "sex", *words, page="none").status == 0
    split = pd.read_csv(out / "desc-dcl_embeddings.tsv", sep="\t")["split"]
    about = json.loads((out / "figures/desc-dclSex_occlusion.json").read_text())
    assert (split == "holdout").any()
    assert about["MeanOf"] == (split != "holdout").sum()


def test_harmonization_keeps_no_readout_hence_no_map(make_heads, run, tmp_path):
    done = run(
        *("predict", make_heads(), tmp_path / "out", "--target", "age"),
        *("--occlusion", "--harmonize"),
    )
    assert done.status == 2
    assert "--occlusion" in done.err


# The page is careful ----------------------------------------------------------------------------


def test_a_map_without_an_outside_is_drawn():
    image = nib.Nifti1Image(np.full((8, 8, 8), -0.2, np.float32), np.diag([8.0, 8.0, 8.0, 1.0]))
    problems: list[str] = []
    assert _draw(image, 0, None, [0, 0, 0], problems)[:4] == b"\x89PNG"
    assert problems == []


def test_what_maps_say_is_hostile_until_escaped(copied):
    out = copied[1]
    file = out / "figures/desc-dclSex_occlusion.json"
    about = json.loads(file.read_text())
    evil = '"><script>alert(1)</script>'
    about["Outputs"][0] |= {"Name": evil, "Units": evil, "PeakRegion": evil, "Sentences": [evil]}
    about |= {"Space": evil, "Baseline": evil, "Positive": evil}
    file.write_text(json.dumps(about))
    page = page_of_maps(out)
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page


@pytest.mark.parametrize("what", ["no brain", "no map", "damaged", "nan", "no table", "{}"])
def test_maps_that_are_missing_or_broken_are_no_fault(copied, what):
    out = copied[1]
    brain, stem = out / "figures/desc-dcl_meanbrain.nii.gz", out / "figures/desc-dclAge_occlusion"
    image = stem.with_name(stem.name + ".nii.gz")
    if what == "no brain":
        brain.unlink()
    elif what == "no map":
        image.unlink()
    elif what == "damaged":
        image.write_bytes(image.read_bytes()[:500])
    elif what == "nan":
        known = nib.load(image)
        nib.save(nib.Nifti1Image(np.full(known.shape, np.nan, "f4"), known.affine), image)
    elif what == "no table":
        stem.with_suffix(".tsv").unlink()
    else:
        stem.with_suffix(".json").write_text("{}")
    page = page_of_maps(out)
    section = page.split('<section id="occlusion"')[1].split("</section>")[0]
    expected = {"no brain": 4, "no table": 4, "{}": 2}
    assert section.count("<img") == expected.get(what, 3)
    assert (what in ("damaged", "nan")) == ("What could not be read" in page)


def test_three_classes_have_a_map_each(copied, run, tmp_path):
    bids, out = copied
    rows = [f"sub-{i:02d}\t{'abc'[i % 3]}" for i in range(1, 17)]
    (tmp_path / "more.tsv").write_text("\n".join(["participant_id\tgroup", *rows]) + "\n")
    words = ("--target", "group", "--phenotypes", tmp_path / "more.tsv", "--occlusion")
    assert run("predict", bids, out, *words).status == 0
    image = nib.load(out / "figures/desc-dclGroup_occlusion.nii.gz")
    assert image.shape[3] == 3
    # Logits less their mean: what one class gains, the others lose.
    np.testing.assert_allclose(image.get_fdata().sum(axis=3), 0, atol=1e-5)
    about = json.loads((out / "figures/desc-dclGroup_occlusion.json").read_text())
    assert [output["Name"] for output in about["Outputs"]] == ["a", "b", "c"]
    assert run("report", bids, out).status == 0
    assert len(list((out / "figures").glob("desc-dclGroup_occlusion*class?.png"))) == 6
