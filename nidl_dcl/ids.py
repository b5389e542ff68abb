"""Tell which participant or session a table means by an id that is written otherwise.

Ids are only text here; tables are read by `tables` and joined by `phenotypes`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection

__all__ = ["match_ids"]


def match_ids(
    ids: Collection[str], names: Collection[str], prefix: str = "sub-"
) -> dict[str, tuple[str, str]]:
    """Return, for each id that can be told, the name it stands for and the rule that told it.

    The rules, in this order: ``exact``; ``prefix``, with or without `prefix`; ``case``, another
    case as well; ``zeros``, other zero padding of its numbers as well. Each rule only pairs what is
    left, and only where one id and one name agree.

    Parameters
    ----------
    ids : collection of str
        As a table has them.
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
    exact = set(names)
    matched = {text: (text, "exact") for text in ids if text in exact}
    left_ids = [text for text in dict.fromkeys(ids) if text not in matched]
    left_names = [name for name in dict.fromkeys(names) if name not in matched]
    for rule, key in rules:
        by_id, by_name = defaultdict(list), defaultdict(list)
        for text in left_ids:
            by_id[key(text)].append(text)
        for text in left_names:
            by_name[key(text)].append(text)
        for common, same in by_id.items():
            if len(same) == 1 and len(by_name.get(common, ())) == 1:
                matched[same[0]] = by_name[common][0], rule
        left_ids = [text for text in left_ids if text not in matched]
        taken = {name for name, _ in matched.values()}
        left_names = [text for text in left_names if text not in taken]
    return matched
