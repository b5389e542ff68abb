"""The model card: the content of a model folder's `model.json` as a page for its readers.

It states nothing that the folder does not hold; its owner adds the rest.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml

from nidl_dcl.data.exposure import trainings
from nidl_dcl.io.formats import escape_control

METHOD = """\
Yeh, C.-H., Hong, C.-Y., Hsu, Y.-C., Liu, T.-L., Chen, Y., LeCun, Y. (2022).
  Decoupled Contrastive Learning. ECCV 2022. doi:10.1007/978-3-031-19809-0_38"""
"""What to cite for the method, as the text of an item of a Markdown list."""

TOLD_BY_OWNER = ("name", "license", "credits", "good_for", "not_for")
"""Keys of ``provenance`` that hold what whoever wrote the model says of it, for everybody to read."""

NO_ENCODER = "none"
"""Stands for the class of an encoder that is not an argument of the estimator."""

_SHOWN_ELSEWHERE = ("encoder", "preparation", "preset", "holdout", "group", "random_seed")


def model_card(description: Mapping[str, Any]) -> str:
    """Return the card of a model, from its ``model.json``, as Markdown.

    It has the front matter that model hubs read. The same description gives the same card.
    """
    provenance = description.get("provenance") or {}
    config = provenance.get("config") or {}
    encoder, estimator = description["encoder"], description["estimator"]
    if encoder["class"] == NO_ENCODER:
        encoder = {"class": estimator, "arguments": {}}
    contract = description.get("input_contract")
    parts = list(filter(None, trainings(description.get("exposure") or {})))
    known = {k: v for k, v in config.items() if k not in _SHOWN_ELSEWHERE}
    told = told_by_owner(provenance)
    head = {
        **({"license": told["license"].lower()} if "license" in told else {}),
        "library_name": "nidl_dcl",
        "tags": [
            *("self-supervised-learning", "decoupled-contrastive-learning"),
            *(["neuroimaging", "MRI"] if contract else []),
        ],
    }
    environment = jinja2.Environment(  # noqa: S701 - it writes Markdown; `code` keeps values inert
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["code"] = _code
    environment.filters["word"] = _word
    environment.filters["prose"] = _prose
    return environment.get_template("model_card.md.jinja").render(
        head=yaml.safe_dump(head, sort_keys=False).strip(),
        encoder=encoder,
        own_class=None if estimator.startswith("nidl_dcl") else estimator.rpartition(":")[2],
        kind=encoder["class"].rpartition(":")[2],
        package=encoder["class"].partition(":")[0].partition(".")[0],
        description=description,
        version=_word((description.get("versions") or {}).get("nidl_dcl")),
        settings={**known, **description["arguments"]},
        weighted=description["arguments"].get("weighting_sigma") is not None,
        contract=contract,
        origin=(contract or {}).get("origin"),
        source=provenance.get("source"),
        config=config,
        trainings=parts,
        complete=bool(parts) and all("n_participants" in part for part in parts),
        names_hashed=any("participants" in part for part in parts),
        method=METHOD,
        told=told,
    )


def told_by_owner(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a provenance its owner wrote to be read: words, and lists of sentences."""
    told: dict[str, Any] = {}
    for name in TOLD_BY_OWNER:
        value = provenance.get(name)
        if name in ("name", "license"):
            value = _word(value) if isinstance(value, str) else ""
        else:
            value = [v for v in value if isinstance(v, str)] if isinstance(value, list) else []
        if value:
            told[name] = value
    return told


def _word(value: Any) -> str:
    """Return a value for use within a sentence, without characters that could be markup."""
    return re.sub(r"[^\w.+-]", "", str(value or ""))


def _prose(value: str) -> str:
    """Return a sentence as Markdown on one line, without characters that could be markup."""
    return re.sub(r"([\\`*_{}\[\]<>#|!~])", r"\\\1", escape_control(value))


def _code(value: Any) -> str:
    """Return a value as Markdown code, without characters that could end it."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"`{escape_control(text).replace('`', chr(39))}`"
