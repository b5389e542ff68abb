"""Match the ids of a table to participants or sessions whose names are written differently.

Ids are only text here. Reading tables is left to `tables`, joining them to `phenotypes`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection


def match_ids(
    ids: Collection[str], names: Collection[str], prefix: str = "sub-"
) -> dict[str, tuple[str, str]]:
    """Return the name and the matching rule of each id that matches one.

    The rules, in this order: ``exact``; ``prefix``, with or without `prefix`; ``case``, in another
    case as well; ``zeros``, with other zero padding of its numbers as well. A rule pairs an id and
    a name only if no other id and no other name are equal by it: the pairs are one to one and do
    not depend on the order.

    Parameters
    ----------
    ids : collection of str
        Ids in a table.
    names : collection of str
        Participants or sessions, with prefix.
    prefix : str, default="sub-"
        ``"ses-"`` for sessions.
    """

    def bare(text: str) -> str:
        return text[len(prefix) :] if text.lower().startswith(prefix) else text

    rules: tuple[tuple[str, Callable[[str], str]], ...] = (
        ("prefix", bare),
        ("case", lambda text: bare(text).lower()),
        ("zeros", lambda text: re.sub("(?<![0-9])0+(?=[0-9])", "", bare(text).lower())),
    )
    ids, names = dict.fromkeys(ids), dict.fromkeys(names)
    matched = {text: (text, "exact") for text in ids if text in names}
    for rule, key in rules:
        if len(matched) == len(ids):
            break
        alike: defaultdict[str, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
        for text in ids:
            alike[key(text)][0].append(text)
        for name in names:
            alike[key(name)][1].append(name)
        for same_ids, same_names in alike.values():
            if len(same_ids) == len(same_names) == 1:
                matched.setdefault(same_ids[0], (same_names[0], rule))
    return matched
