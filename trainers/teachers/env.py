"""What a teacher behind a wall needs to be told: `.env` and the environment, with keys that do not show themselves."""

import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit


HIDDEN = "***"
# shorter ones ("x", "EMPTY") protect nothing, and hiding them would black out ordinary words of messages
SHORTEST_KEY = 6


class Secret:
    """A key. Whatever prints, logs or formats it shows `***`; only [`reveal`] gives it, to whoever builds the request.

    Args:
        value: the key; empty: there is none.
        name: of the variable that holds it, for messages.

    Raises:
        ValueError: no server can be sent such a key; the message does not hold it.
    """

    __slots__ = ("_value", "name")

    def __init__(self, value: str | None, name: str):
        self._value = (value or "").strip()
        self.name = name
        # else the client fails at each attempt as if the server were away, and logs the header with the key in it
        if not (self._value.isascii() and self._value.isprintable()):
            raise ValueError(
                f"{name} holds a line break, or a character that no key is made of: copy it again, in one piece."
            )

    def reveal(self) -> str:
        return self._value

    def redact(self, text: str) -> str:
        """`text` without the key: servers repeat it in their complaints about it."""
        return text.replace(self._value, HIDDEN) if len(self._value) >= SHORTEST_KEY else text

    def __bool__(self) -> bool:
        return bool(self._value)

    def __repr__(self) -> str:
        return f"Secret({self.name}={HIDDEN if self else 'unset'})"

    __str__ = __repr__

    def __reduce__(self):
        # what is pickled ends up in checkpoints, on queues, in caches
        raise TypeError(f"{self!r} cannot be pickled: read it from the environment where it is needed.")


def read_env(path: str | Path = ".env", environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """`NAME=value` lines of `path` (none: no file), overridden by the environment.

    Understands `export NAME=value`, quotes around the value, and comments: whole lines, or after a blank behind values
    without quotes. An empty value counts as unset, so that a template may list every name.

    Raises:
        ValueError: a line that is none of these; the message has its number and not its text, which may be a key.
    """
    values: dict[str, str] = {}
    file = Path(path)
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    for number, line in enumerate(lines, 1):
        line = line.strip().removeprefix("export ").strip()
        if not line or line.startswith("#"):
            continue
        name, equals, value = line.partition("=")
        name = name.strip()
        if not equals or not name.replace("_", "a").isalnum():
            raise ValueError(f"{file.name}, line {number}: expected NAME=value.")
        values[name] = _value(value.strip())
    values |= os.environ if environment is None else environment
    return {name: value for name, value in values.items() if value}


def _value(text: str) -> str:
    if text[:1] in ("'", '"') and text.find(text[0], 1) > 0:
        return text[1 : text.find(text[0], 1)]
    if text.startswith("#"):
        return ""
    return text.partition(" #")[0].partition("\t#")[0].strip()


def check_url(url: str, name: str) -> str:
    """`url` without a trailing slash.

    Raises:
        ValueError: no http(s) address, or one with a user or key inside, which would stand in every message.
    """
    parts = urlsplit(url.strip())
    if "@" in parts.netloc or parts.query:
        raise ValueError(
            f"{name} holds a user, a password or a query: an address is printed and logged. Keep it plain, and put "
            "the key into its own variable."
        )
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ValueError(f"{name} must be an address like http://127.0.0.1:8000/v1, got {url!r}.")
    return urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/"), "", ""))
