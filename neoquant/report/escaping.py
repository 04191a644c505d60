"""Text that does nothing to a terminal but appear: names come from files, and those from anywhere.

Text is escaped before it is measured and cut: an escape takes more columns than what it stands for.
"""

from __future__ import annotations

import re

# C0 and C1 controls but for line ends and tabs, what changes the direction of text, and lone surrogates.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_LINES = re.compile("[\t\n\u2028\u2029]")


def escape_controls(text: str, *, one_line: bool = False) -> str:
    """Controls as `\\x1b`, those of direction as `\\u202e`; with `one_line`, line ends and tabs as well."""
    for pattern in (_CONTROLS, _LINES) if one_line else (_CONTROLS,):
        text = pattern.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
    return text
