from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ONE_EPOCH
from torch import nn

from nidl_dcl import DCL, BIDSDataModule, __version__, load_model
from nidl_dcl.models.encoders import StridedCNN
from nidl_dcl.models.model_card import model_card

OPTIONS = {"proj_hidden_dim": 8, "proj_output_dim": 4, **ONE_EPOCH}
SECTIONS = [
    "Encoder and settings",
    *("Training data", "Exposure", "Input", "Use", "Intended use", "Limits", "Citation", "License"),
]


@pytest.fixture(scope="module")
def of_images(heads_made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a model that was trained on a dataset of ten participants."""
    data = BIDSDataModule(heads_made, spacing=8, batch_size=8, holdout=0.2, random_state=0)
    model = DCL(StridedCNN(width=4), proj_input_dim=64, temperature=0.25, **OPTIONS)
    return model.fit(data).save(tmp_path_factory.mktemp("model"))


@pytest.fixture
def of_rows(tmp_path: Path) -> Path:
    """Return the folder of a model that was fitted on an array."""
    encoder = {"encoder": nn.Linear, "encoder_kwargs": {"in_features": 6, "out_features": 4}}
    rows = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
    model = DCL(**encoder, proj_input_dim=4, weighting_sigma=0.5, **OPTIONS)
    return model.fit(rows).save(tmp_path / "model")


def read(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the first lines of a card as YAML, and the text of each of its sections."""
    _, head, text = (folder / "README.md").read_text("utf-8").split("---\n", 2)
    parts = re.split(r"^## (.*)\n", text, flags=re.MULTILINE)[1:]
    return yaml.safe_load(head), dict(zip(parts[::2], parts[1::2], strict=True))


def describe(folder: Path, **changed: Any) -> dict[str, Any]:
    """Return what a model folder says of itself, with changes."""
    description: dict[str, Any] = json.loads((folder / "model.json").read_text())
    return {**description, **changed}


def test_a_card_says_what_the_model_is_and_was_trained_on(of_images: Path) -> None:
    head, sections = read(of_images)
    description = describe(of_images)
    assert head["library_name"] == "nidl_dcl"
    assert "license" not in head
    assert list(sections) == SECTIONS
    exposure = description["exposure"]
    assert exposure["n_participants"] < 10
    said = f"trained on {exposure['n_participants']} participants with {len(exposure['images'])} "
    assert said in sections["Training data"]
    assert "contrast `T1w`" in sections["Training data"]
    settings = sections["Encoder and settings"]
    assert "`nidl_dcl.models.encoders:StridedCNN`" in settings
    assert '`{"in_channels": 1, "width": 4}`' in settings
    assert "- `temperature`: `0.25`" in settings
    assert "loss: DCL\n" in settings
    contract = description["input_contract"]
    assert " x ".join(map(str, contract["shape"])) + " voxels" in sections["Input"]
    assert "8.0 x 8.0 x 8.0 mm" in sections["Input"]
    assert "brain mask, so each image needs one" in sections["Input"]
    assert f"nidl_dcl {__version__}" in sections["Citation"]


def test_a_card_tells_what_its_owner_wrote_and_lets_none_of_it_be_markup(of_rows: Path) -> None:
    told = {
        "name": "mine",
        "license": "CC-BY-4.0",
        "credits": ["Of [the](http://x.org) <b>data_set</b>\n## Credits", 3],
        "good_for": ["`looks`"],
        "not_for": "no list",
        "config": {},
    }
    text = model_card(describe(of_rows, provenance=told))
    assert yaml.safe_load(text.split("---\n")[1])["license"] == "cc-by-4.0"
    assert "# `mine`, an encoder" in text
    assert 'load_model("mine"' in text
    assert "- \\`looks\\`\n" in text
    assert "Not for:" not in text
    assert r"- Of \[the\](http://x.org) \<b\>data\_set\</b\>" in text
    assert "\n## Credits" not in text
    assert "## License\n\nCC-BY-4.0.\n" in text
    odd = {"name": 3, "license": ["x"], "credits": {"a": 1}, "good_for": [None], "not_for": None}
    assert model_card(describe(of_rows, provenance=odd)) == model_card(
        describe(of_rows, provenance={})
    )


def test_a_card_holds_no_id_path_or_hash(of_images: Path, heads_made: Path) -> None:
    text = (of_images / "README.md").read_text()
    exposure = describe(of_images)["exposure"]
    for word in ("sub-", str(heads_made), exposure["salt"], *exposure["participants"]):
        assert word not in text


def test_the_example_of_a_card_runs(
    of_images: Path, heads_made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = read(of_images)[1]["Use"].split("```python\n")[1].split("```")[0]
    image = next(heads_made.glob("sub-01/ses-01/anat/*T1w.nii.gz"))
    mask = next(heads_made.glob("derivatives/masks/sub-01/ses-01/anat/*mask.nii.gz"))
    for word, path in (("MODEL_FOLDER", of_images), ("image.nii.gz", image), ("mask.nii.gz", mask)):
        assert word in example
        example = example.replace(f'"{word}"', repr(str(path)))
    names: dict[str, Any] = {}
    exec(example, names)
    assert names["embeddings"].shape == (1, 64)


def test_a_model_fitted_on_an_array_says_what_it_does_not_know(of_rows: Path) -> None:
    head, sections = read(of_rows)
    assert list(sections) == SECTIONS
    assert "MRI" not in head["tags"]
    assert sections["Training data"].startswith("\nNot known.")
    assert "nobody can be called unseen" in sections["Exposure"]
    assert "no input contract" in sections["Input"]
    assert "model.transform(x)" in sections["Use"]
    assert "nidl-dcl embed" not in sections["Use"]
    assert "DCLW" in sections["Encoder and settings"]


def test_a_model_that_was_not_fitted_says_so(tmp_path: Path) -> None:
    folder = DCL(StridedCNN(width=4), proj_input_dim=64, random_state=0).save(tmp_path)
    assert "**This model is not trained.**" in (folder / "README.md").read_text()
    assert read(folder)[1]["Training data"].startswith("\nNone.")


def test_earlier_trainings_are_listed(of_rows: Path) -> None:
    earlier = [{"n_participants": 31, "images": ["a"]}]
    text = model_card(
        describe(of_rows, exposure={"n_participants": 2, "images": ["b", "c"], "before": earlier})
    )
    assert "- trained on 2 participants with 2 different images\n" in text
    assert "- before that on 31 participants with 1 different images\n" in text
    assert "nobody can be called unseen" not in text
    assert "participants' ids" not in text  # their hashes are not there, as in a shared model


def test_a_training_without_record_is_mentioned(of_rows: Path) -> None:
    earlier = [{"n_participants": 31, "images": ["a"]}]
    text = model_card(describe(of_rows, exposure={"before": earlier}))
    assert "- trained on data of which no record was kept\n" in text
    assert "nobody can be called unseen" in text


@pytest.mark.parametrize(
    ("encoder", "said"),
    [
        ({"class": "mine.nets:Net", "arguments": {}}, 'trust=["mine"]'),
        ({"class": "mine.nets:Net", "arguments": None}, "encoder=my_encoder"),
    ],
)
def test_an_encoder_of_ones_own_is_loaded_as_the_card_says(
    encoder: dict[str, Any], said: str, of_rows: Path
) -> None:
    assert said in model_card(describe(of_rows, encoder=encoder))


def test_values_that_look_like_markup_stay_code(of_rows: Path) -> None:
    bad = "a`<script>\n# heading"
    text = model_card(describe(of_rows, provenance={"source": bad}, exposure={"n_participants": 1}))
    assert "- dataset: `a'<script>\\n# heading`\n" in text


def test_a_value_within_a_sentence_starts_no_heading(of_images: Path) -> None:
    bad = "1\n\n## License\n\nMIT <b>[x](y)"
    contract = describe(of_images)["input_contract"]
    contract |= {"spacing": [bad] * 3, "shape": [bad] * 3}
    contract["origin"] |= {"coarsest": bad}
    provenance = {"config": {"holdout": bad}}
    of = describe(
        of_images, versions={"nidl_dcl": bad}, provenance=provenance, input_contract=contract
    )
    text = model_card(of)
    assert re.findall("^#+ (.*)$", text.split("---\n", 2)[2], re.MULTILINE)[1:] == SECTIONS
    assert "<b>" not in text


def test_a_card_is_the_same_each_time_and_is_not_read_with_the_model(of_rows: Path) -> None:
    file = of_rows / "README.md"
    assert file.read_text() == model_card(describe(of_rows))
    file.write_text("license: mine")
    assert load_model(of_rows).fitted
    file.unlink()
    assert load_model(of_rows).fitted
