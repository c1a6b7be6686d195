"""What looks like a secret, and texts without it: nothing that is written or shown may repeat one."""

import json
import os
import re
from functools import cache

# Tokens by the beginnings that their makers gave them, private keys, and passwords inside a URL.
SECRET_VALUE = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}"
    r"|\bsk-[A-Za-z0-9_-]{20,}"
    r"|\bA(?:KIA|SIA)[A-Z0-9]{16}"
    r"|\bgh[pousr]_[A-Za-z0-9]{30,}"
    r"|\bgithub_pat_[A-Za-z0-9_]{30,}"
    r"|\bglpat-[A-Za-z0-9_-]{20,}"
    r"|\bxox[abeoprs]-[A-Za-z0-9-]{10,}"
    r"|\bAIza[A-Za-z0-9_-]{35}"
    r"|-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----(?:[A-Za-z0-9+/=\s]|\\n)*(?:-----END (?:[A-Z]+ )*PRIVATE KEY-----)?"
    # An address with a password; braces, dollars and angle brackets mark a place to fill in.
    r"|(?<=://)[^\s/:@\"'{}<>$]{0,100}:[^\s/@\"'{}<>$]{1,200}(?=@)"
)
# Environment variables whose values are secrets by their very name.
SECRET_VARIABLE = re.compile(r"(?:^|_)(?:TOKEN|KEY|SECRET|PASSWORD|PASSWD)$", re.IGNORECASE)
SHORTEST = 8  # characters; a shorter value is found in any text
GONE = "…"


def redacted(text: str) -> str:
    """The text without anything that looks like a secret, or is the value of a secret environment variable."""
    text = SECRET_VALUE.sub(GONE, text)
    values = _of_environment(tuple(value for name, value in os.environ.items() if SECRET_VARIABLE.search(name)))
    return values.sub(GONE, text) if values else text


@cache
def _of_environment(values: tuple[str, ...]) -> re.Pattern[str] | None:
    """One pattern for all of them, as they are and as JSON writes them. A path or a number is no secret."""
    kept = {value for value in values if len(value) >= SHORTEST and value[0] not in "/~." and not value.isdecimal()}
    kept |= {json.dumps(value, ensure_ascii=ascii_only)[1:-1] for value in kept for ascii_only in (False, True)}
    return re.compile("|".join(re.escape(value) for value in sorted(kept, key=len, reverse=True))) if kept else None
