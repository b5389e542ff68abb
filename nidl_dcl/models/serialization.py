"""Model folders: safetensors and JSON, from which no code runs.

`weights.safetensors` holds the state; `model.json` everything else: the arguments, classes by
import path, the input contract, what pretraining saw, versions, and the checksum of the weights.
`README.md` is for people (`model_card`) and is never read.
"""

from __future__ import annotations

import errno
import hashlib
import importlib
import inspect
import pickle
import platform
import warnings
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

import nidl_dcl
from nidl_dcl.data.exposure import is_exposure
from nidl_dcl.errors import UsageError
from nidl_dcl.io.atomic import write_bytes
from nidl_dcl.io.formats import read_json, write_json, write_text
from nidl_dcl.models.model_card import NO_ENCODER, model_card
from nidl_dcl.models.model_source import folder_of
from nidl_dcl.models.trust import TRUSTED, is_of
from nidl_dcl.models.wrapped import inner_module, inner_names, match_names
from nidl_dcl.randomness import keyed
from nidl_dcl.volumes.preparation import Preparation

FORMAT = 1
"""Version of the layout of the folder."""

_MOVED = {"nidl_dcl.dcl": "nidl_dcl.models.dcl", "nidl_dcl.encoder": "nidl_dcl.models.encoders"}
"""Modules that older folders name, and where their classes are now."""

_NOT_ARGUMENTS = (
    *("encoder", "encoder_kwargs"),
    *("accelerator", "devices", "num_nodes", "strategy", "precision", "plugins"),
)
"""What is described apart from the arguments, or says where a model runs."""

_MOST_REGIONS = 10**5
"""Most regions of an encoder that a folder is believed."""

_DISTRIBUTIONS = ("torch", "lightning", "monai", "nibabel", "pybids", "scikit-learn", "numpy")


def save_model(
    estimator: Any,
    folder: str | Path,
    *,
    preparation: Preparation | None = None,
    exposure: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Write an estimator to a folder.

    Parameters
    ----------
    estimator : DCL
        Fitted or not.
    folder : path
        Made where missing; files of the same names are replaced.
    preparation : Preparation, optional
        The input contract: how images become what the encoder takes.
    exposure : mapping, optional
        What pretraining saw.
    provenance : mapping, optional
        Anything else to be kept, as JSON. The card tells ``name``, ``license`` (an SPDX
        identifier), and ``credits``, ``good_for`` and ``not_for`` (lists of sentences).

    Returns
    -------
    Path
        The folder.
    """
    folder = Path(folder)
    state = {
        name: tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in inner_names(estimator.state_dict().items()).items()
        if not name.startswith("loss.")  # a learned temperature is of the training alone
    }
    weights = folder / "weights.safetensors"
    content = safetensors.torch.save(state)
    write_bytes(weights, content)
    digest = hashlib.sha256(content).hexdigest()
    arguments, left_out = _describe_arguments(estimator._arguments.given)
    description = {
        "format": FORMAT,
        "estimator": _stable_path(type(estimator)),
        "encoder": _describe_encoder(estimator),
        "arguments": arguments,
        "arguments_left_out": left_out,
        "fitted": estimator.fitted,
        "n_features": getattr(estimator, "_n_features_out", None),
        "input_contract": None if preparation is None else preparation.to_dict(),
        "exposure": dict(exposure or {}),
        "provenance": dict(provenance or {}),
        "versions": versions(),
        "sha256": {"weights.safetensors": digest},
    }
    _warn_of_lost_class(description["encoder"]["class"], folder)
    write_text(folder / "README.md", model_card(description))
    write_json(folder / "model.json", description)  # last: with it, the folder is a model
    return folder


def load_model(
    folder: str | Path,
    *,
    encoder: nn.Module | type[nn.Module] | None = None,
    estimator: type | None = None,
    trust: Iterable[str] = (),
    **options: Any,
) -> Any:
    """Read an estimator from a folder written by `save_model`.

    Parameters
    ----------
    folder : path or "builtin"
        The folder. The text ``"builtin"`` is the model that nidl_dcl ships, even where there is a
        folder of that name, which ``"./builtin"`` means.
    encoder : nn.Module or class, optional
        Used in place of the one that the folder names; needed when that one cannot be rebuilt.
    estimator : class, optional
        Class of the model, in place of the one that the folder names; needed for a class of your own
        unless its package is in `trust`.
    trust : iterable of str
        Packages, besides nidl_dcl, monai and torch.nn, whose modules may be imported by name.
    **options : dict
        Options of the estimator that replace the stored ones, such as ``accelerator``.

    Returns
    -------
    estimator
        A `DCL`, or what was saved. Fitted if it was; on the CPU.

    Raises
    ------
    UsageError
        When the folder is not a model, its weights do not match their checksum or the encoder, or
        a class is not trusted or cannot be rebuilt.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from nidl_dcl import DCL, load_model
    >>> x = torch.randn(16, 12)
    >>> model = DCL(nn.Linear, {"in_features": 12, "out_features": 4}, proj_input_dim=4,
    ...             max_epochs=1, lr_scheduler=None, enable_progress_bar=False,
    ...             enable_model_summary=False)
    >>> folder = model.fit(x).save("models/linear")
    >>> again = load_model(folder)
    >>> torch.equal(again.transform(x), model.transform(x))
    True
    """
    folder, trust = folder_of(folder), tuple(trust)
    description = read_description(folder)
    weights = folder / "weights.safetensors"
    try:
        if not weights.is_file():  # a pipe would block
            raise FileNotFoundError(errno.ENOENT, "there is no such file")
        raw = weights.read_bytes()
    except OSError as error:
        raise UsageError(f"{weights} cannot be read ({error.strerror}).") from error
    if hashlib.sha256(raw).hexdigest() != description["sha256"]["weights.safetensors"]:
        raise UsageError(
            f"{weights} does not match its checksum in model.json: the file is damaged or from "
            "another model. Copy the folder again."
        )
    try:
        state = safetensors.torch.load(raw)
    except safetensors.SafetensorError as error:
        raise UsageError(f"{weights} is not a safetensors file ({error}).") from error
    kind: Any = estimator
    if kind is None:
        kind = _estimator_class(description, folder, trust)
    if not hasattr(kind, "_restore"):
        raise UsageError(f"{folder} holds a {description['estimator']}, not a model of nidl_dcl.")
    given = description["arguments"]
    arguments = {k: v for k, v in given.items() if k not in _NOT_ARGUMENTS}  # never written there
    known = description["encoder"]
    built: dict[str, Any] = {}
    if encoder is not None:
        arguments["encoder"] = encoder
    elif known["class"] == NO_ENCODER:
        pass
    elif known["arguments"] is None:
        raise UsageError(
            f"The encoder of {folder} is an instance of {known['class']} whose arguments are not "
            "known. Build it yourself and pass load_model(folder, encoder=…)."
        )
    else:
        built["encoder"] = import_module_class(known["class"], trust)
        # It is loaded on the CPU, wherever it was built.
        built["encoder_kwargs"] = {k: v for k, v in known["arguments"].items() if k != "device"}
    try:
        contract = description["input_contract"]
        preparation = contract and Preparation.from_dict(contract)
    except (TypeError, ValueError) as error:
        raise UsageError(f"The input contract of {folder} cannot be used: {error}") from error

    def build() -> Any:
        if built and "encoder_kwargs" not in kind._argument_names():
            arguments["encoder"] = built["encoder"](**built["encoder_kwargs"])
            return kind(**{**arguments, **options})
        return kind(**{**arguments, **built, **options})

    try:
        with keyed("load"):  # weights that are replaced: the caller's generators stay as they are
            _refuse_larger(build, state)
            model = build()
        if any(getattr(model, part, True) is None for part in ("encoder", "projection_head")):
            raise ValueError("the encoder cannot be built from the stored arguments")
        model.load_state_dict(match_names(state, model.state_dict()))
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        lacking = sorted(set(description.get("arguments_left_out") or ()) - options.keys())
        hint = f" Not in the folder: load_model(folder, {lacking[0]}=…)." if lacking else ""
        raise UsageError(f"The weights of {folder} do not fit the model: {error}{hint}") from error
    fitted = bool(description.get("fitted"))
    model._restore(
        preparation=preparation,
        exposure=(description.get("exposure") or {}) if fitted else None,
        fitted=fitted,
    )
    # An encoder need not state its number of regions. A damaged one must not ask for any memory.
    n_regions = (description.get("n_features") or 0) // getattr(model, "proj_input_dim", 10**9)
    model._seen_regions = n_regions if 1 < n_regions <= _MOST_REGIONS else None
    return model


def _estimator_class(
    description: Mapping[str, Any], folder: str | Path, trust: Iterable[str]
) -> type[nn.Module]:
    """Return the class of a model; a UsageError where it is of a package that is not trusted."""
    path = description["estimator"]
    module, _, name = path.partition(":")
    if is_of(module, ("nidl_dcl", *trust)):
        return import_module_class(path, trust)
    raise UsageError(
        f"{folder} holds a {path}, and a file alone must not make code run. Pass the class, "
        f"load_model(folder, estimator={name.rpartition('.')[2]}); or, if it can be imported and you "
        f"trust it, trust=[{module.partition('.')[0]!r}]."
    )


class _TooLargeError(Exception):
    """A model that is being built exceeds its limit."""


def _refuse_larger(build: Callable[[], Any], state: Mapping[str, Tensor]) -> None:
    """Build a model, if possible without memory; refuse one of more numbers than its weights.

    A description could otherwise ask for any amount of memory, or any number of parts.
    """
    held = sum(tensor.numel() for tensor in state.values())
    most = 10**8 + 10 * held, 1000 + 100 * len(state)  # a part may be built and replaced
    built = [0, 0]

    def count(what: int, more: int) -> None:
        built[what] += more
        if built[what] > most[what]:
            raise _TooLargeError(f"building it took over {most[what]} {('numbers', 'parts')[what]}")

    def take(module: nn.Module, name: str, parameter: Tensor | None) -> None:
        count(0, 0 if parameter is None or is_lazy(parameter) else parameter.numel())

    hooks = [
        register_module_parameter_registration_hook(take),
        register_module_module_registration_hook(lambda module, name, part: count(1, 1)),
    ]
    try:
        try:
            with torch.device("meta"):
                model = build()
        except (RuntimeError, ValueError, TypeError, AssertionError):
            # Some constructors read values, which tensors without memory do not have; what they
            # build is counted too.
            built[:] = 0, 0
            model = build()
    except _TooLargeError as error:
        raise ValueError(f"the model described is too large ({error})") from error
    finally:
        for hook in hooks:
            hook.remove()
    if getattr(model, "encoder", True) is not None:
        needed = sum(t.numel() for t in model.state_dict().values() if not is_lazy(t))
        if needed > held:
            raise ValueError(f"the model described has {needed} numbers, the file holds {held}")


def read_weights(file: str | Path) -> dict[str, Tensor]:
    """Read, to the CPU, the tensors of safetensors or of what ``torch.save`` wrote, by state name.

    The latter is a state, or a checkpoint with a ``state_dict``.

    Raises
    ------
    UsageError
        When the file cannot be read, or holds objects other than tensors and plain values, which
        are never unpickled.
    """
    file = Path(file)
    try:
        if not file.is_file():  # a pipe would block
            raise FileNotFoundError(errno.ENOENT, "there is no such file")
        if file.suffix == ".safetensors":
            found: Any = safetensors.torch.load_file(file)
        else:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Detected pickle protocol")
                found = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UsageError(f"{file} cannot be read ({error.strerror or error}).") from error
    except pickle.UnpicklingError as error:
        raise UsageError(
            f"{file} holds more than tensors, and objects are never unpickled. Where it was "
            "written, save its weights alone: torch.save(model.state_dict(), 'weights.pt')."
        ) from error
    except Exception as error:  # a damaged file fails in many ways
        raise UsageError(f"{file} is not a file of weights ({error}).") from error
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if not isinstance(found, Mapping) or not all(isinstance(v, Tensor) for v in found.values()):
        raise UsageError(f"{file} holds no state: a mapping from names to tensors was expected.")
    return dict(found)


def read_description(folder: str | Path) -> dict[str, Any]:
    """Read `model.json`; a UsageError where it is missing, not JSON or of an unknown format."""
    file = folder_of(folder) / "model.json"
    if not file.is_file():
        raise UsageError(f"{folder} is not a model folder: model.json is missing.")
    try:
        description = read_json(file)
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read: {error}.") from error
    maybe: Any = (dict, type(None))
    shapes: dict[str, Any] = {"estimator": str, "encoder": dict, "arguments": dict, "sha256": dict}
    shapes |= dict.fromkeys(("input_contract", "exposure", "provenance", "versions"), maybe)
    shapes["n_features"] = (int, type(None))
    if (
        not isinstance(description, dict)
        or any(not isinstance(description.get(key), kind) for key, kind in shapes.items())
        or not isinstance(description["sha256"].get("weights.safetensors"), str)
        or not isinstance(description["encoder"].get("class"), str)
        or not isinstance(description["encoder"].get("arguments"), maybe)
        or not isinstance((description.get("provenance") or {}).get("config"), maybe)
        or not is_exposure(description.get("exposure") or {})
    ):
        raise UsageError(f"{file} is not the description of a model of nidl_dcl.")
    if description.get("format") != FORMAT:
        raise UsageError(
            f"{file} has format {description.get('format')!r}; this version reads format {FORMAT}."
        )
    return description


def import_module_class(path: str, trust: Iterable[str] = ()) -> type[nn.Module]:
    """Return the nn.Module subclass at ``package.module:Class``.

    A UsageError refuses other packages than nidl_dcl, monai, torch.nn and those of `trust`, and
    what is no such class.
    """
    module = path.partition(":")[0]
    allowed = (*TRUSTED, *trust)
    if not is_of(module, allowed):
        package = module.partition(".")[0]
        raise UsageError(
            f"The encoder {path} comes from a package that is not trusted. If you trust it, pass "
            f"--trust {package}, in Python load_model(folder, trust=[{package!r}])."
        )
    found = _resolve(path)
    if not (inspect.isclass(found) and issubclass(found, nn.Module)):
        raise UsageError(f"{path} is not a class of nn.Module.")
    if not is_of(found.__module__, allowed):
        # Reached through a trusted package that happens to import it.
        raise UsageError(f"{path} is a class of {found.__module__}, which is not trusted.")
    return found


def versions(*more: str) -> dict[str, str]:
    """Return the versions of Python, nidl_dcl, the packages that results depend on, and `more`."""
    found = {"python": platform.python_version()}
    for name in ("nidl_dcl", *_DISTRIBUTIONS, *more):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _stable_path(kind: type) -> str:
    """Return the import path of a class: its public one, where the package has it."""
    if getattr(nidl_dcl, kind.__qualname__, None) is kind:
        return f"nidl_dcl:{kind.__qualname__}"
    return f"{kind.__module__}:{kind.__qualname__}"


def _resolve(path: str) -> Any:
    module, _, name = path.partition(":")
    module = _MOVED.get(module, module)
    try:
        value: Any = importlib.import_module(module)
        for part in name.split("."):
            value = getattr(value, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"{path} cannot be imported: {error}.") from error
    return value


def _describe_encoder(estimator: Any) -> dict[str, Any]:
    given = estimator._arguments.given
    if "encoder" not in given:  # the estimator's constructor makes it, or has none
        return {"class": NO_ENCODER, "arguments": None}
    kind, arguments = inner_module(given["encoder"]), given.get("encoder_kwargs") or {}
    if not inspect.isclass(kind):
        kind, arguments = type(kind), getattr(kind, "arguments", None)
    return {
        "class": _stable_path(kind),
        "arguments": arguments if is_plain(arguments, list) else None,
    }


def _warn_of_lost_class(path: str, folder: Path) -> None:
    """Warn when another program will not find the class of an encoder by its name."""
    module, _, name = path.partition(":")
    where = "in the script that runs now" if module == "__main__" else "inside a function"
    if module != "__main__" and "<locals>" not in name:
        return
    name = name.rpartition(".")[2]
    warnings.warn(
        f"The encoder's class {name} is defined {where}, so no other program finds it by the name that "
        f"{folder / 'model.json'} holds, {path}. To load the model there, define the class again and "
        f"give an encoder, load_model(folder, encoder={name}(...)). Or put the class into a module that "
        "can be imported before you save; load_model(folder, trust=['that_module']) is then enough.",
        UserWarning,
        stacklevel=4,
    )


def _describe_arguments(params: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the arguments that JSON holds, and the names of those that it does not.

    Where a model runs is not part of it: devices and strategies are left out.
    """
    kept: dict[str, Any] = {}
    left_out = []
    for name, value in params.items():
        if name in _NOT_ARGUMENTS:
            continue
        if name == "optimizer" and inspect.isclass(value) and issubclass(value, Optimizer):
            value = value.__name__.lower()
        if is_plain(value, list):
            kept[name] = value
        else:
            left_out.append(name)
    return kept, left_out


def is_plain(value: Any, sequences: Any = (list, tuple)) -> bool:
    """Return whether a value is numbers, texts or containers of such, `sequences` and dicts."""
    if isinstance(value, dict):
        return all(isinstance(k, str) and is_plain(v, sequences) for k, v in value.items())
    if isinstance(value, sequences):
        return all(is_plain(v, sequences) for v in value)
    return value is None or type(value) in (bool, int, float, str)


def weights_sha256(folder: str | Path) -> str:
    """Return the checksum of a model folder's weights; see `read_description`."""
    return str(read_description(folder)["sha256"]["weights.safetensors"])
