"""Text from data as text: what a browser or a reader could take for something else is made visible.

HTML's own characters are escaped by the template (jinja2, autoescape on). What is left for here:
characters that show nothing or turn the reading direction, and JSON within a `<script>`.
"""

import json
import math
import re
from collections.abc import Mapping

from markupsafe import Markup

_HIDDEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f"  # controls; tab and line feed are text
    "\u061c\u200b\u200e\u200f\u2028\u2029\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff"
    "\ufff9-\ufffb\U000e0000-\U000e007f]"
)
_HALVES = re.compile("[\ud800-\udfff]")
_IN_SCRIPT = str.maketrans({c: f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"})


def visible(text: str) -> str:
    """The text with characters that cannot be seen, or that turn the direction, as `[U+202E]`.

    Lone halves of surrogate pairs, which UTF-8 does not know, become the replacement character;
    carriage returns become line feeds.
    """
    text = _HALVES.sub("\ufffd", text.replace("\r\n", "\n").replace("\r", "\n"))
    return _HIDDEN.sub(lambda found: f"[U+{ord(found.group()):04X}]", text)


def shown(value: object) -> object:
    """What the template puts in place of any expression: numbers and markup as they are."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def script_json(value: object) -> Markup:
    """JSON that stands safely in a `<script>`: no tag, comment or line separator can begin in it.

    Numbers that are not finite, which JSON does not know, are null.
    """
    text = json.dumps(_visible_within(value), ensure_ascii=False, allow_nan=False)
    return Markup(text.translate(_IN_SCRIPT))  # noqa: S704 - the translation leaves no markup


def _visible_within(value: object) -> object:
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, Mapping):
        return {str(key): _visible_within(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_visible_within(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
