"""What of each file of an output may be shared: one rule for each kind; other files stay behind.

Ids become pseudonyms, rows come in the order of the pseudonyms, and nothing shows a single head.
Where the files go is for `sharing`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from numpy.typing import NDArray

from nidl_dcl.errors import NidlDclError, UsageError
from nidl_dcl.evaluation.cohort import cohort_columns
from nidl_dcl.io.formats import escape_control, read_json, to_json, to_npy, to_tsv
from nidl_dcl.models.model_card import model_card, told_by_owner
from nidl_dcl.models.model_source import BUILTIN
from nidl_dcl.output.pseudonyms import Pseudonyms

MARK = "logs/sharing.json"
"""The file that marks a folder as written by `nidl-dcl share`."""

_MIN_PARTICIPANTS, _MIN_IN_VOXEL = 20, 10
"""Participants in an average, at least, and those with signal in a voxel that is shown of it."""

_OPTIONS = (
    *("accelerator", "batch_size", "chunk_size", "confounds", "devices", "encoder", "group"),
    *("harmonize", "holdout", "intensity", "learning_rate", "max_epochs", "max_skipped"),
    *("model_name", "n_participants", "nprocs", "num_nodes", "other_people", "parquet"),
    *(
        "precision",
        "preprocess",
        "preset",
        "random_seed",
        "select",
        "shape",
        "site",
        "spacing",
        "strategy",
    ),
    *("strict", "target", "temperature", "threads", "validate", "views", "views_on_device"),
)
"""Options that hold no path, no id and no name of a computer."""

_DESCRIPTIONS = {
    "participant_id": "Pseudonym of the participant",
    "session_id": "Pseudonym of the session",
    "run": "Run of the image",
    "source": "Pseudonym of the image, one for each; as a URI it leads nowhere",
}

_Json = dict[str, Any]


def is_shared(folder: Path) -> bool:
    """Return whether a folder was written by `nidl-dcl share`."""
    return (folder / MARK).exists()


@dataclass(frozen=True)
class SharingRules:
    """The rules for the files of one output, which has real ids; `names` is what they become."""

    output_dir: Path
    names: Pseudonyms

    def apply(self, name: str) -> bytes | None:
        """Return what of a file may be shared, None for nothing.

        Raises
        ------
        UsageError
            When the file is damaged.
        """
        file = self.output_dir / name
        rule = next((rule for form, rule in _RULES.items() if re.fullmatch(form, name)), None)
        if rule is None:
            return None
        try:
            if "_occlusion." in name and not _is_map_of_many(file):
                return None
            if file.suffix == ".json":
                return self._to_json(rule(self, read_json(file)))
            if name.endswith("_folds.tsv"):
                return to_tsv(self._folds(file)).encode()
            if file.suffix == ".tsv":
                return to_tsv(rule(self, _table(file))).encode()
            return bytes(rule(self, file))
        except NidlDclError:
            raise
        except (ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError) as error:
            raise UsageError(
                f"{file} is damaged ({type(error).__name__}: {error}). Give the command that wrote it "
                "again, then share."
            ) from error

    def average(self, shared: Path) -> dict[str, bytes]:
        """Return the files of the average brain; those in `shared` where they have to stay.

        The difference of two averages shows the participants who came or went in between, so another
        one is shared only when they are 20 or more.
        """
        before = {file.name: file.read_bytes() for file in shared.glob("average.*")}
        about, rows, volumes = (
            self.output_dir / "figures" / f"average.{ending}" for ending in ("json", "tsv", "npy")
        )
        if not (about.is_file() and rows.is_file() and volumes.is_file()):
            return before
        facts, table = read_json(about), _table(rows)
        if facts.get("n_images") != len(table):  # a run was killed between the two
            return before
        renamed, share = self._rename(table), largest_share(table["participant_id"])
        if len(before) == 3:
            old = _table(shared / "average.tsv")
            whole = read_json(shared / "average.json").get("n_images") == len(old)
            if whole and n_changed(old, renamed) < _MIN_PARTICIPANTS:
                return before
        files = {about.name: self._to_json(self._facts(facts)), rows.name: to_tsv(renamed).encode()}
        if share <= 1 / _MIN_PARTICIPANTS:
            mean = hide_few(np.load(volumes, allow_pickle=False), share)
            files[volumes.name] = bytes(to_npy(mean[np.newaxis]))
        return files

    def participants(self) -> pd.DataFrame:
        """Return all participants and their pseudonyms, for the owner of the output."""
        found = set(_table(self.output_dir / "logs" / "inputs.tsv")["participant_id"]) - {"n/a"}
        pairs = [(who, self.names.participant(who)) for who in sorted(found)]
        return pd.DataFrame(pairs, columns=["participant_id", "pseudonym"])

    @cached_property
    def _targets(self) -> dict[str, list[str] | None]:
        """Columns that were predicted, with the classes of each; None for numbers."""
        found = (read_json(file) for file in sorted(self.output_dir.glob("desc-*metrics.json")))
        return {str(metrics["target"]): metrics.get("classes") for metrics in found}

    # -- tables ------------------------------------------------------------------------------

    def _rename(self, table: pd.DataFrame) -> pd.DataFrame:
        """Return a table with pseudonyms, in their order; its index says where each row was."""
        names, made = self.names, table.copy()
        forms = {"participant_id": names.participant, "session_id": names.session, "run": names.run}
        known = [column for column in (*forms, "source", "path") if column in table]
        for column in known:
            rename = forms.get(column)
            made[column] = [
                text if text == "n/a" else rename(text) if rename else names.image(text, who)
                for text, who in zip(table[column], made["participant_id"], strict=True)
            ]
            if made[column].nunique() != table[column].nunique():  # not with keys that are random
                raise UsageError(f"Two pseudonyms of {column} are equal. Use another --key-file.")
        return made.sort_values(known, kind="stable")

    def _images(self, table: pd.DataFrame) -> pd.DataFrame:
        """Share a table of images, without messages, which quote names, and values that were not used."""
        made = self._rename(table)
        if "row" in made:
            made["row"] = [str(i) for i in range(len(made))]
        if "message" in made:
            made["message"] = "n/a"
        if "reason" in made:
            made["reason"] = [
                text if text.startswith("confound") else text.partition(": ")[0]
                for text in made["reason"]
            ]
            made.loc[made["status"] == "dropped", "target"] = "n/a"
        return made

    def _folds(self, file: Path) -> pd.DataFrame:
        """Share predictions by fold, with the rows that shared predictions have."""
        table = _table(file)
        name = file.name.replace("_folds.tsv", "_predictions.tsv")
        order = self._rename(_table(file.with_name(name))).index
        place = {str(before): after for after, before in enumerate(order)}
        table["row"] = [place[row] for row in table["row"]]
        # Units are numbered by the names of participants.
        keys = ["test", "features", "source", "repeat", "fold", "site"]
        table = table.sort_values([*keys, "row"], kind="stable")
        table["unit"] = table.groupby(keys)["unit"].transform(lambda of: pd.factorize(of)[0])
        return table

    def _preprocessed(self, table: pd.DataFrame) -> pd.DataFrame:
        """Share verdicts and measures; other columns, such as names of files, are emptied."""
        from nidl_dcl.preprocessing.measures import MEASURES  # nilearn takes seconds to import

        made = self._images(table)
        shared = {"participant_id", "session_id", "run", "source", "status", "code", *MEASURES}
        return made.assign(**{str(name): "n/a" for name in made if name not in shared})

    def _plane(self, table: pd.DataFrame) -> pd.DataFrame:
        """Share the embeddings in two dimensions, of the phenotypes only what was predicted."""
        made = self._rename(table)
        kept = made[["participant_id", "session_id", "x", "y"]].copy()
        for target, classes in self._targets.items():
            column = escape_control(target)
            if column in made and column not in kept:
                numbers = pd.to_numeric(made[column], errors="coerce").notna()
                shown = numbers if classes is None else made[column].isin(classes)
                kept[column] = made[column].where(shown, "n/a")
        return kept

    def _ledger(self, table: pd.DataFrame) -> pd.DataFrame:
        return table.assign(config=table["config"].map(self.names.checksum))

    def _summary(self, table: pd.DataFrame) -> pd.DataFrame:
        """Share a table of no one in particular, without columns of a few participants' own volumes."""
        own = ["change_participants", "sd_participants"]
        return table.drop(columns=own, errors="ignore").map(self.names.text)

    # -- descriptions ------------------------------------------------------------------------

    def _facts(self, content: _Json) -> _Json:
        """Share facts without the checksums of ids or of images that they were made from."""
        kept = {name: value for name, value in content.items() if name != "provenance"}
        if "of" in kept:
            kept["of"] = self.names.checksum(str(kept["of"]))
        for column, text in _DESCRIPTIONS.items():
            if isinstance(kept.get(column), dict):
                kept[column]["Description"] = text
        return kept

    def _metrics(self, content: _Json) -> _Json:
        provenance = content["provenance"] = content.get("provenance") or {}
        if "data" in provenance:  # ids could be tried until the checksum fits
            provenance["data"] = self.names.checksum(str(provenance["data"]))
        if content.get("cross_validation"):
            content["cross_validation"] = "This cohort could not be cross-validated itself."
        if shift := content.get("shift"):
            hidden = self._not_asked_for((provenance.get("config") or {}).get("confounds", ()))
            shift.update(dict.fromkeys(hidden))
            openings = tuple(f"{what.capitalize()}:" for what in hidden)
            shift["sentences"] = [s for s in shift["sentences"] if not s.startswith(openings)]
        return content

    def _readout(self, content: _Json) -> _Json:
        """Share a readout without hashes of ids, and without age and sex if nobody asked for them."""
        content["members"]["participants"] = []
        confounds = [name.partition("=")[0] for name in content.get("confounds") or ()]
        hidden = self._not_asked_for(confounds)
        content["training"].update(dict.fromkeys(hidden))
        return content

    def _not_asked_for(self, columns: Collection[str]) -> list[str]:
        """Return which of age and sex are neither a target nor one of these columns."""
        named = list(dict.fromkeys([*self._targets, *columns]))
        known = cohort_columns(pd.DataFrame(columns=named), None)
        return [what for what in ("age", "sex") if what not in known]

    def _model(self, content: _Json) -> _Json:
        """Share the description of a model without ids and paths."""
        arguments = {
            name: value
            for name, value in content["arguments"].items()
            if not (isinstance(value, str) and ("/" in value or "\\" in value))
        }
        before = content.get("provenance") or {}
        provenance = {"config": before.get("config", {}), **told_by_owner(before)}
        exposure = _without_ids(content.get("exposure") or {})
        made = {"exposure": exposure, "provenance": provenance, "arguments": arguments}
        return {**content, **made}

    def _card(self, file: Path) -> bytes:
        """Share the card of the model that is shared, whatever its owner wrote into theirs."""
        description = self._replaced(self._model(read_json(file.with_name("model.json"))))
        return model_card(description).encode("utf-8", "backslashreplace")

    def _run(self, content: _Json) -> _Json:
        commands = ("preprocess", "pretrain", "embed", "predict", "report", "study", "demo")
        facts = ("name", "started", "seconds", "resumed_from_step", "skipped")

        def known_of(run: _Json) -> _Json:
            words = [word for word in run["command"][1:2] if word in commands]
            stages = [{name: s[name] for name in facts if name in s} for s in run["stages"]]
            known = {"command": ["nidl-dcl", *words], "started": run["started"], "stages": stages}
            return {**known, "exit_status": run["exit_status"]}

        return {
            **known_of(content),
            "config": {k: v for k, v in content["config"].items() if k in _OPTIONS},
            "versions": content["versions"],
            "earlier": [known_of(run) for run in content["earlier"]],
        }

    def _config(self, file: Path) -> bytes:
        options = yaml.safe_load(file.read_text("utf-8"))
        kept = {"bids_dir": "BIDS_DIR", "output_dir": "OUTPUT_DIR"}
        kept |= {k: v for k, v in options.items() if k in _OPTIONS}
        kept |= {k: v for k, v in options.items() if k in ("model", "init") and v == BUILTIN}
        text: str = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
        return self.names.text(text).encode("utf-8", "backslashreplace")

    def _matrix(self, file: Path) -> bytes:
        """Share embeddings, in the order of their table."""
        matrix = np.load(file, allow_pickle=False)
        order = self._rename(_table(file.with_suffix(".tsv"))).index
        if len(matrix) != len(order):
            raise ValueError(f"it has {len(matrix)} rows, and its table {len(order)}")
        return bytes(to_npy(matrix[order]))

    def _same(self, file: Path) -> bytes:
        return file.read_bytes()

    def _to_json(self, content: Any) -> bytes:
        """Return JSON in whose texts ids are replaced, should one of them quote any."""
        return to_json(self._replaced(content)).encode("utf-8", "backslashreplace")

    def _replaced(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.names.text(value)
        if isinstance(value, dict):
            return {self.names.text(str(k)): self._replaced(v) for k, v in value.items()}
        return [self._replaced(v) for v in value] if isinstance(value, list) else value


_ANY = "desc-[A-Za-z0-9]+"

_TABLES = f"{_ANY}_(embeddings|predictions|externalpredictions)"

_PREPROCESSED = "(derivatives/preproc/)?desc-preproc_measures"

_RULES: dict[str, Callable[[SharingRules, Any], Any]] = {
    rf"({_TABLES}|logs/(inputs|quality)|figures/outliers)\.tsv": SharingRules._images,
    rf"(descriptions|figures/(retrieval|{_ANY}_occlusion))\.tsv": SharingRules._summary,
    rf"{_PREPROCESSED}\.tsv": SharingRules._preprocessed,
    r"figures/embedding_2d\.tsv": SharingRules._plane,
    r"logs/holdout\.tsv": SharingRules._ledger,
    rf"({_TABLES}|{_ANY}_folds|{_PREPROCESSED}|descriptions)\.json": SharingRules._facts,
    rf"{_ANY}_folds\.tsv": SharingRules._folds,
    rf"figures/(embedding_2d|retrieval|{_ANY}_occlusion)\.json": SharingRules._facts,
    rf"{_ANY}_(metrics|externalmetrics)\.json": SharingRules._metrics,
    r"logs/run\.json": SharingRules._run,
    rf"models/{_ANY}/model\.json": SharingRules._model,
    rf"models/{_ANY}/{_ANY}_readout\.json": SharingRules._readout,
    rf"models/{_ANY}/{_ANY}_readout\.safetensors": SharingRules._same,
    rf"models/{_ANY}/README\.md": SharingRules._card,
    rf"models/{_ANY}/weights\.safetensors|logs/metrics\.csv": SharingRules._same,
    rf"figures/{_ANY}_occlusion\.nii\.gz": SharingRules._same,
    r"code/config\.yaml": SharingRules._config,
    rf"{_ANY}_embeddings\.npy": SharingRules._matrix,
}
"""Names of files, as patterns, and the rule for each: of what JSON and TSV hold, else of the file."""


def _table(file: Path) -> pd.DataFrame:
    """Return a table with its cells as they are written."""
    return pd.read_csv(file, sep="\t", dtype=str, keep_default_na=False, quoting=3)


def _without_ids(exposure: Mapping[str, Any]) -> _Json:
    """Return what a training saw without the hashes of ids, whose salt stands beside them.

    Hashes of voxels stay: they say something to those alone who have the image.
    """
    kept = {k: v for k, v in exposure.items() if k in ("salt", "n_participants", "images")}
    if exposure.get("before"):
        kept["before"] = [_without_ids(part) for part in exposure["before"]]
    return kept


def _is_map_of_many(file: Path) -> bool:
    """Return whether the description of a map, beside the file or the file itself, says so."""
    about = file.with_name(f"{file.name.partition('.')[0]}.json")
    return about.is_file() and (read_json(about).get("LargestShare") or 1) <= 1 / _MIN_PARTICIPANTS


def largest_share(participants: pd.Series) -> float:
    """Return the share of the images of the participant who has the most, given each one's."""
    return float(participants.value_counts(normalize=True).max())


def hide_few(average: NDArray[np.float32], share: float) -> NDArray[np.float32]:
    """Return the mean of an average with 0 where fewer than ten participants may have signal.

    A head that lies askew stands alone outside of all others, and would be seen there. `average` is
    mean and standard deviation of each voxel over the images, the background of which is 0; `share`
    is the `largest_share` of them. By the inequality of Cauchy and Schwarz, the share of the images
    that are not 0 in a voxel is at least ``mean**2 / (mean**2 + sd**2)``.
    """
    mean, sd = np.square(average, dtype=np.float64)
    there = np.divide(mean, mean + sd, out=np.zeros_like(mean), where=mean + sd > 0)
    return np.where(there >= _MIN_IN_VOXEL * share, average[0], 0).astype(np.float32)


def n_changed(before: pd.DataFrame, after: pd.DataFrame) -> int:
    """Return how many participants came, went or have other images in the second table of images."""
    images = [
        set(table[["participant_id", "source"]].itertuples(index=False, name=None))
        for table in (before, after)
    ]
    return len({who for who, _ in images[0] ^ images[1]})
