"""A phenotype column: its task, its values, what is left out and why, its name in files.

Reading tables is for `nidl_dcl.bids.phenotypes`, predicting for `prediction`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from nidl_dcl.bids.quantities import hold_units, read_quantities
from nidl_dcl.errors import InputsUnusableError, UsageError
from nidl_dcl.io.formats import camel_case

TASKS = ("auto", "classification", "regression", "quantity")

MIN_CLASS = 3
"""Participants (groups) a class needs: one to test on, one to tune on, one to learn from."""

HELD_OUT = "held out"
MISSING = "target missing"
NOT_FINITE = "target not finite"
NOT_A_NUMBER = "target not a number"
UNKNOWN_CLASS = "class unknown to the readout"
RARE_CLASS = f"class with fewer than {MIN_CLASS} participants"
NEW_CLASS = "class that no participant in the cross-validation has"


@dataclass(frozen=True)
class Values:
    """A column as it came, and the task that its values make of it.

    Attributes
    ----------
    raw : ndarray of object, shape (n_images,)
        Python scalars; None where missing.
    numbers : ndarray of float64, shape (n_images,)
        The same as numbers; NaN where missing or no number.
    task : {"classification", "regression"}
    rule : str
        Why that task, in words.
    categorical : bool
        Whether it came as a categorical column.
    """

    raw: NDArray[np.object_]
    numbers: NDArray[np.float64]
    task: str
    rule: str
    categorical: bool

    @property
    def present(self) -> NDArray[np.bool_]:
        """Whether there is a value, shape (n_images,)."""
        return np.array([value is not None for value in self.raw], dtype=bool)

    @property
    def texts(self) -> NDArray[np.object_]:
        """The values as text, shape (n_images,); None where missing."""
        return np.array([None if v is None else _text(v) for v in self.raw], dtype=object)


@dataclass(frozen=True)
class Target:
    """One phenotype, row by row.

    Attributes
    ----------
    name : str
        The column.
    task : {"classification", "regression"}
    rule : str
        Why that task, in words.
    numbers : ndarray of float64, shape (n_images,)
        Numbers, or positions in `labels`; NaN where the row is left out.
    labels : tuple of str
        The classes, sorted (by number where they are numbers); empty for regression.
    reasons : ndarray of object, shape (n_images,)
        Why a row is left out; empty text for a row that is used.
    texts : ndarray of object, shape (n_images,)
        The value as it came, as text (None where missing), for tables.
    """

    name: str
    task: str
    rule: str
    numbers: NDArray[np.float64]
    labels: tuple[str, ...]
    reasons: NDArray[np.object_]
    texts: NDArray[np.object_]


def read_target(
    y: Sequence[Any] | NDArray[Any] | pd.Series[Any],
    groups: Sequence[Hashable] | NDArray[Any] | pd.Series[Any],
    *,
    held_out: NDArray[np.bool_] | None = None,
    name: str = "target",
    task: str = "auto",
) -> Target:
    """Decide the task of a column and which of its rows can be used.

    The rules of ``task="auto"``, in this order (distinct values are counted over all rows that
    have one):

    1. bool, categorical, or two distinct numbers: classification;
    2. numbers of one unit of time (``022Y``, ``21 years``) are read as these numbers; where units
       differ, or only some cells have one, the column is refused;
    3. text: classification, unless at least nine in ten values read as numbers; then the rules for
       numbers decide and the other values (``89+``) are left out with a reason;
    4. a number that is not whole, or more than ten distinct numbers: regression;
    5. three to ten whole numbers: classification when there are at least five participants per
       distinct value (codes repeat), else regression (the ages of a small cohort do not).

    ``task="quantity"``, for a column whose unit is declared, is regression for all numbers but codes
    of 0, 1 and 2.

    Parameters
    ----------
    y : array-like, shape (n_images,)
        Numbers, bools or labels. None, NaN, NA, empty text and ``n/a`` are missing.
    groups : array-like, shape (n_images,)
        Participants (or families): a class is counted in them.
    held_out : ndarray of bool, shape (n_images,), optional
        The other rows alone decide what the column is. Of these, those that have a value of the
        target get the reason `HELD_OUT`; their numbers are there, but decide nothing.
    name : str
        The column, for messages.
    task : {"auto", "classification", "quantity", "regression"}

    Raises
    ------
    UsageError
        For an unknown task.
    InputsUnusableError
        When every value is missing, every row is held out, the target is constant, or fewer than
        two classes have ``MIN_CLASS`` participants. A smaller class beside two others is left out
        with a reason.
    """
    if held_out is None or not held_out.any():
        return _read_target(y, groups, name, task)
    if held_out.all():
        raise InputsUnusableError("Every participant is held out. Choose a smaller --holdout.")
    series, labels = pd.Series(y).reset_index(drop=True), np.asarray(groups, dtype=object)
    rest = _read_target(series[~held_out], labels[~held_out], name, task)
    last = read_known_target(series[held_out], name=name, task=rest.task, labels=rest.labels)
    last.reasons[last.reasons == UNKNOWN_CLASS] = NEW_CLASS
    last.reasons[last.reasons == ""] = HELD_OUT
    order = np.argsort(np.concatenate([np.flatnonzero(~held_out), np.flatnonzero(held_out)]))
    return replace(
        rest,
        numbers=np.concatenate([rest.numbers, last.numbers])[order],
        reasons=np.concatenate([rest.reasons, last.reasons])[order],
        texts=np.concatenate([rest.texts, last.texts])[order],
    )


def _read_target(y: Any, groups: Any, name: str, task: str) -> Target:
    """Read a column of which no row is held out."""
    read = read_values(y, groups, name=name, task=task)
    task, rule, raw, numbers, present = read.task, read.rule, read.raw, read.numbers, read.present
    units = pd.factorize(np.asarray(groups, dtype=object))[0]
    reasons = np.where(present, "", MISSING).astype(object)
    labels: tuple[str, ...] = ()
    if task == "regression":
        _mark_no_numbers(numbers, reasons)
        values = np.where(reasons == "", numbers, np.nan)
        if not (reasons == "").any():
            raise InputsUnusableError(
                f"Target {name!r} has no finite number, so there is nothing to regress on. "
                "Use classification, or another target."
            )
    else:
        as_numbers = not read.categorical and not np.isnan(numbers[present]).any()
        if as_numbers:
            reasons[present & np.isinf(numbers)] = NOT_FINITE
        values, labels = _classes(raw, numbers, units, reasons, as_numbers)
    used = values[reasons == ""]
    if len(used) and (used == used[0]).all() and RARE_CLASS not in reasons:
        shown = labels[int(used[0])] if labels else f"{used[0]:g}"
        raise InputsUnusableError(
            f"Target {name!r} is constant: every image that has a value has {shown!r}. "
            "There is nothing to predict; choose another target."
        )
    if task == "classification" and len(labels) < 2:
        raise InputsUnusableError(_no_classes(name, rule, read.texts[present], units[present]))
    return Target(name, task, rule, values, labels, reasons, read.texts)


def read_values(
    y: Sequence[Any] | NDArray[Any] | pd.Series[Any],
    groups: Sequence[Hashable] | NDArray[Any] | pd.Series[Any],
    *,
    name: str,
    task: str = "auto",
    what: str = "target",
) -> Values:
    """Return a column's values, and its task by the rules of `read_target`.

    Parameters
    ----------
    y, groups, name, task
        As for `read_target`.
    what : str
        What the column is, for messages.

    Raises
    ------
    UsageError
        For an unknown task.
    InputsUnusableError
        When every value is missing.
    """
    if task not in TASKS:
        raise UsageError(
            f"Unknown task {task!r} for {what} {name!r}. Use one of: {', '.join(TASKS)}."
        )
    read = _read_column(y, task, "" if task in ("auto", "quantity") else f"{task}, as asked")
    if not read.present.any():
        raise InputsUnusableError(
            f"{what.capitalize()} {name!r} has no value for any of the {len(read.raw)} images with "
            f"features. Choose another {what}, or check that the ids of the phenotype table match "
            "the images."
        )
    if task != "classification":
        texts = [value for value in read.raw if isinstance(value, str)]
        if hold_units(texts) and np.isnan(read.numbers[read.present]).any():
            shown = ", ".join(repr(text[:40]) for text in dict.fromkeys(texts[:50]))
            raise InputsUnusableError(
                f"{what.capitalize()} {name!r} holds numbers with units that differ, or that some "
                f"cells lack ({shown[:120]}). Convert the column to plain numbers of one unit, and "
                f'name that in the sidecar: {{"{name}": {{"Units": "years"}}}}.'
            )
    if task in ("auto", "quantity"):
        units = pd.factorize(np.asarray(groups, dtype=object))[0]
        task, rule = _task_rule(read, units, declared=task == "quantity" or read.rule != "")
        return replace(read, task=task, rule=read.rule + rule)
    return read


def _read_column(y: Any, task: str, rule: str) -> Values:
    series = pd.Series(y)
    raw = np.array([_plain(value) for value in series.astype(object)], dtype=object)
    numbers = np.array([_number(value) for value in raw], dtype=np.float64)
    present = [value for value in raw if value is not None]
    are_texts = bool(present) and all(isinstance(value, str) for value in present)
    if are_texts and task != "classification" and (quantities := read_quantities(present)):
        texts, unit = quantities
        raw = np.array([None if v is None else float(texts[v]) for v in raw], dtype=object)
        numbers = np.array([_number(value) for value in raw], dtype=np.float64)
        rule = f"numbers of {unit}, as all cells say: {rule}"
    return Values(raw, numbers, task, rule, isinstance(series.dtype, pd.CategoricalDtype))


def _mark_no_numbers(numbers: NDArray[np.float64], reasons: NDArray[np.object_]) -> None:
    """Write the reasons of values that are no finite numbers."""
    present = reasons == ""
    reasons[present & np.isnan(numbers)] = NOT_A_NUMBER
    reasons[present & np.isinf(numbers)] = NOT_FINITE


def read_known_target(
    y: Sequence[Any] | NDArray[Any] | pd.Series[Any],
    *,
    name: str,
    task: str,
    labels: tuple[str, ...],
) -> Target:
    """Read a column by the task and the classes that a readout was fitted on.

    Parameters
    ----------
    y : array-like, shape (n_images,)
        As for `read_target`; it may be constant, and classes may be missing or rare.
    name : str
    task : {"classification", "regression"}
    labels : tuple of str
        Rows of other classes are left out with a reason; empty for regression.
    """
    read = _read_column(y, task, "as the readout was fitted")
    values, texts = read.numbers, read.texts
    reasons = np.where(read.present, "", MISSING).astype(object)
    if task == "regression":
        _mark_no_numbers(values, reasons)
    else:
        position = {label: float(k) for k, label in enumerate(labels)}
        values = np.array([position.get(text, np.nan) for text in texts], dtype=np.float64)
        reasons[read.present & np.isnan(values)] = UNKNOWN_CLASS
    values[reasons != ""] = np.nan
    return Target(name, task, read.rule, values, labels, reasons, texts)


def target_labels(columns: Iterable[str]) -> dict[str, str]:
    """Return the CamelCase label of each column, in order; a column given twice counts once.

    Raises
    ------
    UsageError
        When two columns share a label, also in another case (some file systems ignore it).
    """
    labels = {column: camel_case(column) for column in columns}
    owner: dict[str, str] = {}
    for column, label in labels.items():
        other = owner.setdefault(label.casefold(), column)
        if other != column:
            raise UsageError(
                f"Columns {other!r} and {column!r} would both be written as {label!r}. "
                "Rename one of them, or predict them into two output folders."
            )
    return labels


def _plain(value: Any) -> Any:
    """Return a Python scalar, or None for what counts as missing."""
    if value is None or value is pd.NA or value is pd.NaT:
        return None
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and np.isnan(value):
        return None
    if isinstance(value, str) and value.strip().lower() in ("", "n/a", "-"):
        return None
    return value


def _number(value: Any) -> float:
    """Return the number a value stands for, NaN for text that is none."""
    if value is None or (isinstance(value, str) and "_" in value):
        return float("nan")
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return float("nan")


def _text(value: Any) -> str:
    """Return a value as a class label: whole numbers without decimals."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def _task_rule(read: Values, units: NDArray[np.intp], *, declared: bool = False) -> tuple[str, str]:
    if read.categorical:
        return "classification", "a categorical column"
    raw, numbers, units = read.raw[read.present], read.numbers[read.present], units[read.present]
    if all(isinstance(value, bool) for value in raw):
        return "classification", "true or false"
    came = ""
    if any(isinstance(value, str) for value in raw):
        share = float(np.mean(~np.isnan(numbers)))
        if share < 0.9:
            return "classification", "a column of text"
        came = f"text of which {share:.0%} reads as numbers: "
    finite = numbers[np.isfinite(numbers)]
    distinct = np.unique(finite)
    if declared and not set(distinct) <= {0, 1, 2}:
        return "regression", f"{came}{len(distinct)} distinct numbers whose unit is declared"
    if len(distinct) <= 2:
        return "classification", f"{came}{len(distinct)} distinct values"
    if (distinct != np.round(distinct)).any():
        return "regression", f"{came}numbers that are not whole"
    if len(distinct) > 10:
        return "regression", f"{came}{len(distinct)} distinct whole numbers, more than 10"
    per_value = len(np.unique(units[np.isfinite(numbers)])) / len(distinct)
    came += (
        f"{len(distinct)} distinct whole numbers (3 to 10) for {per_value:.3g} participants each"
    )
    if per_value >= 5:
        return "classification", f"{came}, at least 5"
    return "regression", f"{came}, fewer than 5"


def _no_classes(name: str, rule: str, texts: NDArray[np.object_], units: NDArray[np.intp]) -> str:
    """Return why a column has fewer than two classes."""
    pairs = pd.DataFrame({"value": texts, "unit": units}).drop_duplicates()
    sizes, people = pairs["value"].value_counts(), pairs["unit"].nunique()
    if np.isinf([_number(text) for text in texts]).all():
        return f"Target {name!r} has no finite number. Choose another target, or repair the table."
    if people < 2 * MIN_CLASS:
        return (
            f"Target {name!r} is known for {people} participants; cross-validation needs "
            f"{2 * MIN_CLASS}. Choose another target, or add participants."
        )
    words = [str(text) for text in sizes.index if np.isnan(_number(text))]
    if 0 < len(words) <= len(sizes) / 2:
        named = ", ".join(repr(word[:40]) for word in words[:5])
        return (
            f"Target {name!r} holds numbers, and texts that are none: {named}"
            f"{', …' * (len(words) > 5)}. Write n/a where a value is missing, and numbers as 1.5."
        )
    if len(sizes) > people / 2:
        return (
            f"Target {name!r} holds {len(sizes)} different texts for {people} participants: an "
            "identifier, a date or a note, not a class that several share. Choose another target; if it is a number, write it as 1.5, and n/a where it is missing."
        )
    listed = ", ".join(f"{str(label)[:40]!r} {count}" for label, count in sizes.head(5).items())
    return (
        f"Target {name!r} has fewer than two classes with at least {MIN_CLASS} participants each "
        f"(classification: {rule}; participants: {listed}{', …' * (len(sizes) > 5)}). Merge classes, "
        "or use task='regression' if it is a quantity."
    )


def _classes(
    raw: NDArray[np.object_],
    numbers: NDArray[np.float64],
    units: NDArray[np.intp],
    reasons: NDArray[np.object_],
    as_numbers: bool,
) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    """Return class positions (NaN where left out) and labels; writes the rare classes' reasons."""
    texts = {int(i): _text(raw[i]) for i in np.flatnonzero(reasons == "")}
    order = {label: (numbers[i] if as_numbers else 0.0, label) for i, label in texts.items()}
    members: dict[str, set[int]] = {label: set() for label in order}
    for i, label in texts.items():
        members[label].add(int(units[i]))
    kept = [x for x in order if len(members[x]) >= MIN_CLASS or len(members) == 1]
    labels = tuple(sorted(kept, key=lambda x: order[x]))
    values = np.full(len(raw), np.nan)
    for i, label in texts.items():
        if label in labels:
            values[i] = labels.index(label)
        else:
            reasons[i] = RARE_CLASS
    return values, labels
