"""An output that can be given away: of a private folder with real ids, what others may have.

A study with ``--share`` is written to a private folder, like any other. From there each file that
stands in `_RULES` goes to OUTPUT_DIR, by its rule; a file without a rule stays behind. Pictures of
single heads have none; `disclosure` tells when an average may go.
"""

from __future__ import annotations

import filecmp
import io
import json
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from numpy.typing import NDArray

from nidl_dcl.errors import NidlDclError, OutputInUseError, UsageError
from nidl_dcl.evaluation.cohort import cohort_columns
from nidl_dcl.io.atomic import keep_bytes, replacing, write_bytes
from nidl_dcl.io.formats import escape_control, read_json, to_json, to_npy, to_tsv, write_json
from nidl_dcl.models.model_card import model_card
from nidl_dcl.output.pseudonyms import Pseudonyms, default_key, read_key
from nidl_dcl.output.sharing_rules import LEAST, hide_few, is_of_many, largest_share, n_changed

__all__ = ["MARK", "Sharing", "is_shared"]

MARK = "logs/sharing.json"
"""What tells that an output folder was made with ``--share``, and with which key."""


ABOUT = """
## Shared

This folder was written with `--share`. Participants, sessions and images have pseudonyms, made with a
key that is not here; rows are in the order of the pseudonyms. Left out are single heads, logs,
paths, names of the dataset, of the computer and of its user, phenotypes that were not predicted, and
the hashes of ids in the model, so that participants of a training are recognized by their images alone.
The documentation of nidl_dcl (sharing) says what is not protected.
"""


Targets = Mapping[str, frozenset[str] | None]
"""Columns that were predicted, with the classes of each; None for numbers."""


_ORDER = ("participant_id", "session_id", "run", "source", "path")


_OPTIONS = frozenset(
    (
        *(
            "preset",
            "select",
            "intensity",
            "max_skipped",
            "strict",
            "holdout",
            "encoder",
            "spacing",
        ),
        *("shape", "views", "views_on_device", "max_epochs", "batch_size", "chunk_size"),
        *("temperature", "learning_rate", "accelerator", "devices", "num_nodes", "strategy"),
        *("precision", "group", "confounds", "site", "harmonize", "other_people", "nprocs"),
        *("threads", "random_seed", "model_name", "parquet", "validate", "share", "target"),
        "n_participants",
    )
)
"""Options that hold no path, no id and no name of a computer."""


_COMMANDS = ("pretrain", "embed", "predict", "report", "study", "demo")


_STAGE = ("name", "started", "seconds", "resumed_from_step", "skipped")


_PLACEHOLDERS = {"bids_dir": "BIDS_DIR", "output_dir": "OUTPUT_DIR"}


_DESCRIPTIONS = {
    "participant_id": "Pseudonym of the participant",
    "session_id": "Pseudonym of the session",
    "run": "Run of the image",
    "source": "Pseudonym of the image, one for each; as a URI it leads nowhere",
}


def is_shared(output_dir: Path) -> bool:
    """Return whether a folder was made with ``--share``."""
    return (output_dir / MARK).exists()


class Sharing:
    """The two folders of a study that is shared, and the names that ids have in one of them.

    Parameters
    ----------
    bids_dir, output_dir : Path
        The dataset, and the folder that may be given away.
    work_dir : Path, optional
        Gets the private folder; default: beside `output_dir`, its name with ``-private``.
    key_file : Path, optional
        Default: in the folder of the user's configuration; made if it is missing and nothing was
        shared here yet.

    Attributes
    ----------
    public, private, work : Path
        The folder to give away, the one with real ids, and what is prepared for both.
    names : Pseudonyms

    Raises
    ------
    UsageError
        When the folder was begun without sharing or with another key, or when key, work folder or
        private folder are not where they can be used.
    """

    def __init__(
        self,
        bids_dir: Path,
        output_dir: Path,
        *,
        work_dir: Path | None = None,
        key_file: Path | None = None,
    ) -> None:
        self.public = output_dir.resolve()
        source = bids_dir.resolve()
        self.work = self.public.with_name(f"{self.public.name}-private")
        if work_dir is not None:
            self.work = work_dir.resolve()
        for folder in (self.public, source):
            if self.work.is_relative_to(folder):
                raise UsageError(
                    f"With --share, the work folder {self.work} must not lie in {folder}: it holds "
                    "heads and ids. Give --work-dir FOLDER elsewhere."
                )
        known = _read_mark(self.public)
        if known is None and _holds_files(self.public):
            raise UsageError(
                f"{self.public} has files that were written without --share (share was False, is "
                "True), and they would stay. Choose another OUTPUT_DIR."
            )
        file = default_key() if key_file is None else key_file.expanduser()
        key = read_key(file, make=known is None, outside=(self.public, source))
        self.names = Pseudonyms(key)
        if known is None:
            self.study = secrets.token_hex(8)
        else:
            self.study = known["study"]
            if known["key"] != self.names.fingerprint:
                raise UsageError(
                    f"{self.public} was made with another key than {file} holds: participants would "
                    "get other pseudonyms. Give the key that was used by --share-key FILE, or choose "
                    "another OUTPUT_DIR."
                )
        self.private = self.work / f"study-{self.study}"
        if known is not None and not self.private.is_dir():
            raise UsageError(
                f"The private part of {self.public} is not at {self.private}: without it nothing can "
                "be added. Give the --work-dir that was used, or choose another OUTPUT_DIR."
            )

    def begin(self) -> None:
        """Make both folders, the private one for its owner alone; the public one is held already.

        Raises
        ------
        OutputInUseError
            When another run began in the folder after this one had looked.
        """
        for folder in (self.work, self.private):
            if not folder.exists():
                folder.mkdir(mode=0o700, parents=True)
        known = _read_mark(self.public)
        if known is None:
            write_json(
                self.public / MARK,
                {"format": 1, "key": self.names.fingerprint, "study": self.study},
            )
        elif known["study"] != self.study:
            raise OutputInUseError(f"Another run began in {self.public}. Run this one again.")

    def publish(self) -> None:
        """Bring OUTPUT_DIR up to date; files that would not change are not written."""
        for file in sorted(self.public.rglob("*")):
            name = file.relative_to(self.public).as_posix()
            gone = file.is_file() and not (self.private / name).is_file()
            if gone and (_rule(name) is not None or re.fullmatch(_DRAWN_MAP, name)):
                file.unlink()
        self._publish_average()
        targets = _targets(self.private)
        for file in sorted(self.private.rglob("*")):
            name = file.relative_to(self.private).as_posix()
            rule = _rule(name)
            if rule is None or not file.is_file():
                continue
            target = self.public / name
            if rule is _same:
                if not (target.is_file() and filecmp.cmp(file, target, shallow=False)):
                    with replacing(target) as beside:
                        shutil.copyfile(file, beside)
                continue
            content = rule(file, self.names, targets)
            if content is not None:
                keep_bytes(target, content)
        if who := _people(self.private, self.names):
            keep_bytes(self.private / "logs" / "pseudonyms.tsv", who)

    def _publish_average(self) -> None:
        """Give the average brain away, and again once it is of other people to such a number.

        Before, it stays with its tables as it is: the difference of two averages would show those
        few who came or went.
        """
        own, given = (folder / "figures" for folder in (self.private, self.public))
        if not all((own / f"average.{ending}").is_file() for ending in ("json", "tsv", "npy")):
            return
        about, table = _json(own / "average.json"), _read(own / "average.tsv")
        if about.get("n_images") != len(table):  # a run was killed between the two
            return
        renamed, shown = _renamed(table, self.names), given / "average.npy"
        if shown.is_file():
            if n_changed(_read(given / "average.tsv"), renamed) < LEAST:
                return
            shown.unlink()
        keep_bytes(given / "average.json", _summary(own / "average.json", self.names, {}))
        keep_bytes(given / "average.tsv", to_tsv(renamed).encode())
        share = largest_share(table["participant_id"])
        if is_of_many(share):
            mean, sd = np.load(own / "average.npy", allow_pickle=False)
            write_bytes(shown, bytes(to_npy(hide_few(mean, sd, share)[np.newaxis])))


def _rule(name: str) -> Rule | None:
    """Return how a file is given away, None where it stays behind."""
    return next((rule for form, rule in _RULES.items() if re.fullmatch(form, name)), None)


def _read_mark(folder: Path) -> dict[str, str] | None:
    """Return study and key of a folder that was shared before, None of another one."""
    file = folder / MARK
    if not file.exists():
        return None
    try:
        mark = read_json(file)
        study, key = str(mark["study"]), str(mark["key"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{file} is damaged ({error}). Choose another OUTPUT_DIR.") from error
    if not (re.fullmatch("[0-9a-f]{16}", study) and mark.get("format") == 1):
        raise UsageError(f"{file} is of another version, or damaged. Choose another OUTPUT_DIR.")
    return {"study": study, "key": key}


def _holds_files(folder: Path) -> bool:
    """Return whether there is anything but what a run leaves that was killed at its very start."""
    if not folder.is_dir():
        return False
    files = (p for p in folder.rglob("*") if not p.is_dir() or p.is_symlink())
    return any(p.name != ".lock" and not p.name.endswith(".part") for p in files)


def _targets(private: Path) -> Targets:
    """Return the columns that were predicted: of phenotypes they alone are shown by image."""
    found: dict[str, frozenset[str] | None] = {}
    for file in private.glob("desc-*metrics.json"):
        try:
            metrics = json.loads(file.read_text("utf-8"))
            classes = metrics.get("classes")
            found[str(metrics["target"])] = None if classes is None else frozenset(classes)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return found


# -- rules, one for each kind of file ---------------------------------------------------------

Rule = Callable[[Path, Pseudonyms, Targets], bytes | None]


def _same(file: Path, names: Pseudonyms, targets: Targets) -> bytes | None:
    """Give a file away as it is; `Sharing.publish` copies it."""
    raise NotImplementedError


def _read(file: Path) -> pd.DataFrame:
    """Return a table with its cells as they are written."""
    return pd.read_csv(file, sep="\t", dtype=str, keep_default_na=False, quoting=3)


def _renamed(table: pd.DataFrame, names: Pseudonyms) -> pd.DataFrame:
    """Return a table with pseudonyms, in their order; its index tells where each row was.

    Raises
    ------
    NidlDclError
        When two ids have one pseudonym, which does not happen with keys that are random.
    """
    made = table.copy()
    forms: dict[str, Callable[[str], str]] = {
        "participant_id": names.participant,
        "session_id": names.session,
        "run": names.run,
    }
    for column, form in forms.items():
        if column in table:
            made[column] = [text if text == "n/a" else form(text) for text in table[column]]
    for column in ("source", "path"):
        if column in table:
            owners = made["participant_id"] if "participant_id" in made else ["n/a"] * len(made)
            made[column] = [
                text if text == "n/a" else names.image(text, None if who == "n/a" else who)
                for text, who in zip(table[column], owners, strict=True)
            ]
    known = [column for column in _ORDER if column in table]
    for column in known:
        if made[column].nunique() != table[column].nunique():
            raise NidlDclError(f"Two pseudonyms of {column} are equal. Use another --share-key.")
    return made.sort_values(known, kind="stable") if known else made


def _images(file: Path, names: Pseudonyms, targets: Targets) -> bytes:
    """Give away a table of images, without values that were not used: they may be any text."""
    table = _renamed(_read(file), names)
    if "row" in table:
        table["row"] = [str(i) for i in range(len(table))]
    if "reason" in table:
        table["reason"] = [
            text if text.startswith("confound") else text.partition(": ")[0]
            for text in table["reason"]
        ]
        table.loc[table["status"] == "dropped", "target"] = "n/a"
    return to_tsv(table).encode()


def _matrix(file: Path, names: Pseudonyms, targets: Targets) -> bytes | None:
    """Give away embeddings, in the order of their table."""
    order, matrix = _new_order(file, names), np.load(file, allow_pickle=False)
    if len(order) != len(matrix):  # a run was killed between the two
        return None
    return bytes(to_npy(matrix[order]))


def _parquet(file: Path, names: Pseudonyms, targets: Targets) -> bytes | None:
    order, table = _new_order(file, names), pd.read_parquet(file, engine="pyarrow")
    if len(order) != len(table):
        return None
    ids = _renamed(_read(file.with_suffix(".tsv")), names).reset_index(drop=True)
    made = table.iloc[order].reset_index(drop=True)
    for column in ("participant_id", "session_id", "run", "source"):
        made[column] = ids[column].astype(object).where(ids[column] != "n/a", None)
    made["row"] = np.arange(len(made))
    stream = io.BytesIO()
    made.to_parquet(stream, engine="pyarrow", index=False)
    return stream.getvalue()


def _new_order(file: Path, names: Pseudonyms) -> NDArray[np.int64]:
    """Return which row of the embeddings each public row is."""
    return _renamed(_read(file.with_suffix(".tsv")), names).index.to_numpy(dtype=np.int64)


def _inputs(file: Path, names: Pseudonyms, targets: Targets) -> bytes:
    """Give away the list of images without its messages, which quote names and headers."""
    table = _renamed(_read(file), names)
    return to_tsv(table.assign(message="n/a")).encode()


def _plane(file: Path, names: Pseudonyms, targets: Targets) -> bytes:
    """Give away the embeddings in two dimensions, of the phenotypes only what was predicted."""
    table = _renamed(_read(file), names)
    kept = table[["participant_id", "session_id", "x", "y"]].copy()
    for target, classes in targets.items():
        column = escape_control(target)
        if column in table and column not in kept:
            numbers = pd.to_numeric(table[column], errors="coerce").notna()
            shown = numbers if classes is None else table[column].isin(classes)
            kept[column] = table[column].where(shown, "n/a")
    return to_tsv(kept).encode()


def _ledger(file: Path, names: Pseudonyms, targets: Targets) -> bytes:
    table = _read(file)
    return to_tsv(table.assign(config=[names.checksum(text) for text in table["config"]])).encode()


def _sidecar(file: Path, names: Pseudonyms, targets: Targets) -> bytes | None:
    content = _json(file)
    for column, text in _DESCRIPTIONS.items():
        if isinstance(content.get(column), dict):
            content[column] = {**content[column], "Description": text}
    return _written(content, names)


def _metrics(file: Path, names: Pseudonyms, targets: Targets) -> bytes | None:
    content = _json(file)
    made_of = dict(content.get("provenance") or {})
    if "data" in made_of:
        # Else ids could be tried until the checksum fits.
        made_of["data"] = names.checksum(str(made_of["data"]))
    content["provenance"] = made_of
    if content.get("cross_validation"):
        content["cross_validation"] = "This cohort could not be cross-validated itself."
    if content.get("shift"):
        shift = content["shift"] = dict(content["shift"])
        hidden = _not_asked_for([*targets, *(made_of.get("config") or {}).get("confounds", ())])
        shift.update(dict.fromkeys(hidden))
        openings = tuple(f"{what.capitalize()}:" for what in hidden)
        shift["sentences"] = [s for s in shift["sentences"] if not s.startswith(openings)]
    return _written(content, names)


def _readout(file: Path, names: Pseudonyms, targets: Targets) -> bytes | None:
    content = _json(file)
    content["members"] = {**content["members"], "participants": []}
    confounds = (name.partition("=")[0] for name in content.get("confounds") or ())
    hidden = _not_asked_for([*targets, *confounds])
    content["training"] = {**content["training"], **dict.fromkeys(hidden)}
    return _written(content, names)


def _not_asked_for(columns: Collection[str]) -> list[str]:
    """Return which of age and sex no option has named."""
    known = cohort_columns(pd.DataFrame(columns=list(dict.fromkeys(columns))), None)
    return [what for what in ("age", "sex") if what not in known]


def _model(file: Path, names: Pseudonyms, targets: Targets) -> bytes | None:
    return _written(_described(file), names)


def _card(file: Path, names: Pseudonyms, targets: Targets) -> bytes | None:
    """Return the card of the model as it is given away, whatever the private one says."""
    known = file.with_name("model.json")
    if not known.is_file():
        return None  # a run was killed between the two
    description = _replaced(_described(known), names)
    return model_card(description).encode("utf-8", "backslashreplace")


def _described(file: Path) -> dict[str, Any]:
    """Return what a `model.json` says without ids and paths."""
    content = _json(file)
    content["exposure"] = _without_ids(content.get("exposure") or {})
    content["provenance"] = {"config": (content.get("provenance") or {}).get("config", {})}
    content["arguments"] = {
        name: value
        for name, value in content["arguments"].items()
        if not (isinstance(value, str) and ("/" in value or "\\" in value))
    }
    return content


def _without_ids(exposure: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a training saw without the hashes of ids, whose salt stands beside them.

    Hashes of voxels stay: they tell something to those alone who have the image.
    """
    kept = {k: v for k, v in exposure.items() if k in ("salt", "n_participants", "images")}
    if exposure.get("before"):
        kept["before"] = [_without_ids(part) for part in exposure["before"]]
    return kept


def _run(file: Path, names: Pseudonyms, targets: Targets) -> bytes | None:
    run = _json(file)

    def told(record: Mapping[str, Any]) -> dict[str, Any]:
        words = [word for word in record["command"][1:2] if word in _COMMANDS]
        stages = [{k: s[k] for k in _STAGE if k in s} for s in record["stages"]]
        return {
            "command": ["nidl-dcl", *words],
            "started": record["started"],
            "stages": stages,
            "exit_status": record["exit_status"],
        }

    content = {
        **told(run),
        "config": {k: v for k, v in run["config"].items() if k in _OPTIONS},
        "versions": run["versions"],
        "earlier": [told(before) for before in run["earlier"]],
    }
    return _written(content, names)


def _config(file: Path, names: Pseudonyms, targets: Targets) -> bytes:
    options = yaml.safe_load(file.read_text("utf-8"))
    kept = {**_PLACEHOLDERS, **{k: v for k, v in options.items() if k in _OPTIONS}}
    text: str = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
    return names.text(text).encode("utf-8", "backslashreplace")


def _text(file: Path, names: Pseudonyms, targets: Targets) -> bytes:
    return names.text(file.read_text("utf-8")).encode()


def _facts(file: Path, names: Pseudonyms, targets: Targets) -> bytes:
    return _written(_json(file), names)


def _summary(file: Path, names: Pseudonyms, targets: Targets) -> bytes:
    """Give facts away whose ``of`` is a checksum of ids or of images."""
    content = _json(file)
    return _written({**content, "of": names.checksum(str(content.get("of")))}, names)


def _occlusion(file: Path, names: Pseudonyms, targets: Targets) -> bytes | None:
    """Give away what a map says, if it is of the mean of many."""
    if not _is_map_of_many(file):
        return None
    return _written({k: v for k, v in _json(file).items() if k != "provenance"}, names)


def _regions(file: Path, names: Pseudonyms, targets: Targets) -> bytes | None:
    """Give away the blocks of the mean brain, without those of a few participants' own volumes."""
    if not _is_map_of_many(file):
        return None
    own = ["change_participants", "sd_participants"]
    return to_tsv(_read(file).drop(columns=own)).encode()


def _map(file: Path, names: Pseudonyms, targets: Targets) -> bytes | None:
    return file.read_bytes() if _is_map_of_many(file) else None


def _is_map_of_many(file: Path) -> bool:
    """Return whether the description beside a file of a map, or it itself, says so."""
    about = file.with_name(f"{file.name.partition('.')[0]}.json")
    return about.is_file() and is_of_many(_json(about).get("LargestShare"))


def _json(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return content


def _written(content: Any, names: Pseudonyms) -> bytes:
    """Return JSON in whose texts ids are replaced, should one of them quote any."""
    return to_json(_replaced(content, names)).encode("utf-8", "backslashreplace")


def _replaced(value: Any, names: Pseudonyms) -> Any:
    if isinstance(value, str):
        return names.text(value)
    if isinstance(value, dict):
        return {names.text(str(k)): _replaced(v, names) for k, v in value.items()}
    if isinstance(value, list):
        return [_replaced(v, names) for v in value]
    return value


def _people(private: Path, names: Pseudonyms) -> bytes:
    """Return the table of all participants and their pseudonyms, for the owner."""
    file = private / "logs" / "inputs.tsv"
    if not file.is_file():
        return b""
    people = sorted({text for text in _read(file)["participant_id"] if text != "n/a"})
    pseudonyms = [names.participant(text) for text in people]
    return to_tsv(pd.DataFrame({"participant_id": people, "pseudonym": pseudonyms})).encode()


_IN_MODEL = "models/desc-[A-Za-z0-9]+/"


_RULES: dict[str, Rule] = {
    r"desc-[A-Za-z0-9]+_(embeddings|predictions|externalpredictions)\.tsv": _images,
    r"desc-[A-Za-z0-9]+_(embeddings|predictions|externalpredictions)\.json": _sidecar,
    r"desc-[A-Za-z0-9]+_embeddings\.npy": _matrix,
    r"desc-[A-Za-z0-9]+_embeddings\.parquet": _parquet,
    r"desc-[A-Za-z0-9]+_(metrics|externalmetrics)\.json": _metrics,
    r"descriptions\.tsv": _text,
    r"descriptions\.json": _facts,
    rf"{_IN_MODEL}weights\.safetensors": _same,
    rf"{_IN_MODEL}model\.json": _model,
    rf"{_IN_MODEL}README\.md": _card,
    rf"{_IN_MODEL}desc-[A-Za-z0-9]+_readout\.json": _readout,
    rf"{_IN_MODEL}desc-[A-Za-z0-9]+_readout\.safetensors": _same,
    r"logs/inputs\.tsv": _inputs,
    r"logs/quality\.tsv": _images,
    r"logs/metrics\.csv": _same,
    r"logs/holdout\.tsv": _ledger,
    r"logs/run\.json": _run,
    r"code/config\.yaml": _config,
    r"figures/embedding_2d\.tsv": _plane,
    r"figures/embedding_2d\.json": _facts,
    r"figures/outliers\.tsv": _images,
    r"figures/retrieval\.tsv": _text,
    r"figures/retrieval\.json": _summary,
    r"figures/desc-[A-Za-z0-9]+_occlusion\.json": _occlusion,
    r"figures/desc-[A-Za-z0-9]+_occlusion\.tsv": _regions,
    r"figures/desc-[A-Za-z0-9]+_occlusion\.nii\.gz": _map,
}
"""Names of files, as patterns, and how each is given away."""


_DRAWN_MAP = r"figures/desc-[A-Za-z0-9]+_occlusion(class[0-9]+)?\.png"
"""Pictures that the report drew of maps, which go with them."""
