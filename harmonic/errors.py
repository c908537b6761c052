"""The one exception that a user is meant to read, one for a single recording, and the text of their one line."""


class UserError(Exception):
    """Something outside the program is wrong: a flag, a file, a value.

    The message is one line that names the thing and the way out. Mains print it without a stack trace and leave with
    exit status 2; any other exception is a fault of the program.
    """


class Unreadable(Exception):
    """One recording cannot be read; the message is the reason, in one line. The others may be fine."""


def one_line(value: object) -> str:
    """The text of an error or a name, on one line that a terminal can take, and not too long."""
    text = " ".join(str(value).split())
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= 200 else text[:197] + "..."


def check(ok: bool, field: str, value: object, allowed: str) -> None:
    """Refuses a config's value that is impossible.

    Raises:
      UserError: names the field, the value and what is allowed.
    """
    if not ok:
        raise UserError(f"{field}={value!r:.80} is impossible: it must be {allowed}")
