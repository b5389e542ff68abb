"""Copy a finished output so that it can be given away: what its rules let out, and a report of that.

The copy is made aside, then moved into place file by file. The file `MARK` lists the files, so that a
later copy removes what is not made any more and nothing else. What may go is for `sharing_rules`.
"""

from __future__ import annotations

import filecmp
import logging
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from nidl_dcl.errors import UsageError
from nidl_dcl.io.atomic import remove_stale, replacing, write_bytes
from nidl_dcl.io.formats import read_json, to_tsv, write_json
from nidl_dcl.output.description import describe_copy
from nidl_dcl.output.embeddings import read_embeddings, write_parquet
from nidl_dcl.output.lock import held
from nidl_dcl.output.pseudonyms import Pseudonyms, default_key, read_key
from nidl_dcl.output.sharing_rules import MARK, SharingRules, is_shared
from nidl_dcl.report.build import write_report

_LOGGER = logging.getLogger(__name__)

_ASIDE = ".sharing"

_LEFT_OUT = {
    r"logs/[^/]*\.log": "logs of runs, which quote ids, paths and names",
    r"logs/phenotypes\.tsv": "true ids beside those of the phenotype tables",
    r"figures/(average\.npy|.*_(mean|meanbrain|spread|occlusion\w*)\..*)": (
        "averages of too few participants, their spread, and maps of a few heads"
    ),
    r"figures/.*_embedding\.svg": "phenotypes that were not predicted",
    (
        r"figures/(.*\.npy|(views|volumes|\w*pictures|preprocessing)\..*)"
        r"|(derivatives/preproc/)?(sub-[^/]+/.*|figures/.*\.png)"
    ): "single heads: they can be recognized",
    ".*": "files that no rule allows",
}
"""Names of files, as patterns, and what is said of them when they stay behind."""


def share(
    output_dir: Path,
    shared_dir: Path,
    *,
    key_file: Path | None = None,
    pseudonyms: Path | None = None,
) -> Path:
    """Write what of a finished output can be given away, or bring it up to date; log what was left out.

    Parameters
    ----------
    output_dir : Path
        OUTPUT_DIR of a study or of a stage; it stays as it is.
    shared_dir : Path
        A new or empty folder, or one that was written by this function.
    key_file : Path, optional
        The secret key that makes the pseudonyms, made if it is missing and `shared_dir` is new;
        default: in the user's configuration.
    pseudonyms : Path, optional
        Gets the table of participants and their pseudonyms, for the owner of the output.

    Returns
    -------
    Path
        The report in `shared_dir`.

    Raises
    ------
    UsageError
        When one of the folders cannot be used as such, a file is damaged, or the key is not the one
        that was used before.
    OutputInUseError
        When a run writes to `output_dir`.
    """
    output, shared = output_dir.resolve(), shared_dir.resolve()
    key = (key_file or default_key()).expanduser().resolve()
    run, dataset = _read_output(output)
    _check_places(output, dataset, shared, key, pseudonyms and pseudonyms.resolve())
    # Who may not write to an output has no lock to take in it.
    with held(output / ".lock") if os.access(output, os.W_OK) else nullcontext():
        before = _read_mark(shared)
        names = Pseudonyms(read_key(key, make=before is None))
        if before is None:
            before = {"format": 2, "key": names.fingerprint, "finished": False, "files": []}
            write_json(shared / MARK, before)
        elif before["key"] != names.fingerprint:
            raise UsageError(
                f"{shared} was made with another key than {key} holds: participants would get other "
                "pseudonyms. Give that key by --key-file FILE, or choose another SHARED_DIR."
            )
        if run.get("exit_status") != 0:
            _LOGGER.info(f"The last run in {output} did not end well: what it left is shared.")
        rules, aside = SharingRules(output, names), shared / _ASIDE
        shutil.rmtree(aside, ignore_errors=True)
        try:
            _copy(rules, shared, aside)
            write_report(aside, model=str((run.get("config") or {}).get("model_name", "dcl")))
            _update(shared, aside, before)
            remove_stale([shared])
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        _log_left_out(_files(output) - _files(shared))
        if pseudonyms is not None:
            with replacing(pseudonyms) as beside:
                beside.chmod(0o600)
                beside.write_text(to_tsv(rules.participants()), "utf-8")
    return shared / "report.html"


def _read_output(output: Path) -> tuple[dict[str, Any], Path]:
    """Return the record of the last run in an output, and its dataset if that is still there."""
    if is_shared(output):
        raise UsageError(f"{output} is a shared copy. Give the OUTPUT_DIR that it was made from.")
    with suppress(FileNotFoundError, NotADirectoryError, ValueError, LookupError, TypeError):
        described = read_json(output / "dataset_description.json")
        run: dict[str, Any] = read_json(output / "logs" / "run.json")
        if isinstance(run["command"], list) and any(
            one["Name"] == "nidl_dcl" for one in described["GeneratedBy"]
        ):
            root = (output / str(described["DatasetLinks"]["raw"])).resolve()
            return run, root if (root / "dataset_description.json").is_file() else output
    raise UsageError(f"{output} is no output of nidl_dcl. Give the OUTPUT_DIR of a study.")


def _check_places(output: Path, dataset: Path, shared: Path, *secrets: Path | None) -> None:
    """Refuse a SHARED_DIR, and files for the owner alone, where they could do harm."""
    in_dataset = shared.is_relative_to(dataset) and dataset / "derivatives" not in shared.parents
    if output.is_relative_to(shared) or shared.is_relative_to(output) or in_dataset:
        raise UsageError(
            f"SHARED_DIR {shared} must lie neither in nor around OUTPUT_DIR {output}, nor in BIDS_DIR "
            f"{dataset}. Choose another folder."
        )
    for file in filter(None, secrets):
        if any(file.is_relative_to(folder) for folder in (output, dataset, shared)):
            raise UsageError(
                f"{file}, which is for you alone, lies in SHARED_DIR, OUTPUT_DIR or BIDS_DIR, where "
                "others may find it. Choose another place."
            )


def _read_mark(shared: Path) -> dict[str, Any] | None:
    """Return what is known of an earlier copy, None for a new folder; refuse one of others."""
    file = shared / MARK
    if not file.exists():
        if shared.exists() and (not shared.is_dir() or _files(shared)):
            raise UsageError(
                f"SHARED_DIR {shared} was not written by `nidl-dcl share`: choose a new or an empty folder."
            )
        return None
    with suppress(ValueError, KeyError, TypeError):
        mark: dict[str, Any] = read_json(file)
        if mark["format"] == 2 and {type(name) for name in [mark["key"], *mark["files"]]} == {str}:
            return mark
    raise UsageError(f"{file} is of another version, or damaged: choose another SHARED_DIR.")


def _files(folder: Path) -> set[str]:
    """Return the files below a folder by their paths in it, without hidden ones but .bidsignore."""
    found: set[str] = set()
    for where, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name[0] != "."]
        shown = (name for name in files if name[0] != "." or name == ".bidsignore")
        found.update(Path(where, name).relative_to(folder).as_posix() for name in shown)
    return found


def _copy(rules: SharingRules, shared: Path, aside: Path) -> None:
    """Write the copy, but for its report."""
    describe_copy(aside, rules.names.dataset)
    for name in _files(aside):
        if (shared / name).is_file():  # its owner may have added to it, a license for instance
            write_bytes(aside / name, (shared / name).read_bytes())
    for name in sorted(_files(rules.output_dir)):
        content = rules.apply(name)
        if content is not None:
            write_bytes(aside / name, content)
    for file in rules.output_dir.glob("desc-*_embeddings.parquet"):
        label = file.name.removeprefix("desc-").removesuffix("_embeddings.parquet")
        if (embeddings := read_embeddings(aside, label)) is not None:
            write_parquet(aside, label, embeddings)
    for name, content in rules.average(shared / "figures").items():
        write_bytes(aside / "figures" / name, content)
    write_json(aside / MARK, {})  # the report looks for it


def _update(shared: Path, aside: Path, before: dict[str, Any]) -> None:
    """Move what has changed into its place, and remove what is not made any more."""
    made, there, own = _files(aside) - {MARK}, _files(shared) - {MARK}, set(before["files"])
    _, changed, missing = filecmp.cmpfiles(aside, shared, made, shallow=False)
    if blocked := [name for name in changed if name not in own]:
        raise UsageError(
            f"{shared / blocked[0]} was not written by `nidl-dcl share`, and is in the way of a file "
            "that would be: move it, and share again."
        )
    if others := sorted(there - own - made):
        _LOGGER.info(f"Left in {shared}, as share did not write them: {_some(others)}.")
    after = {**before, "finished": True, "files": sorted(made)}
    if not (changed or missing) and after == before:
        return
    write_json(shared / MARK, {**after, "finished": False, "files": sorted(made | own)})
    for name in own & there - made:
        (shared / name).unlink()
        with suppress(OSError):
            os.removedirs((shared / name).parent)
    for name in sorted([*changed, *missing]):
        with replacing(shared / name) as beside:
            (aside / name).replace(beside)
    write_json(shared / MARK, after)


def _log_left_out(names: set[str]) -> None:
    for form, why in _LEFT_OUT.items():
        found = sorted(name for name in names if re.fullmatch(form, name, re.DOTALL))
        names = names - set(found)
        if found:
            _LOGGER.info(f"Left out: {why} ({_some(found)}).")


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
