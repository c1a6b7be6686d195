"""What looks like a secret, and texts without it: nothing that is written or shown may repeat one."""

import json
import os
import re
from functools import cache

# Tokens by the beginnings that their makers gave them, private keys, and passwords inside a URL: what is in every text that
# holds one → the pattern. A search for a plain string is a hundred times as fast as one for a pattern.
SECRETS = {
    "hf_": r"\bhf_[A-Za-z0-9]{20,}",
    "sk-": r"\bsk-[A-Za-z0-9_-]{20,}",
    "AKIA": r"\bAKIA[A-Z0-9]{16}",
    "ASIA": r"\bASIA[A-Z0-9]{16}",
    "ghp_": r"\bghp_[A-Za-z0-9]{30,}",
    "gho_": r"\bgho_[A-Za-z0-9]{30,}",
    "ghu_": r"\bghu_[A-Za-z0-9]{30,}",
    "ghs_": r"\bghs_[A-Za-z0-9]{30,}",
    "ghr_": r"\bghr_[A-Za-z0-9]{30,}",
    "github_pat_": r"\bgithub_pat_[A-Za-z0-9_]{30,}",
    "glpat-": r"\bglpat-[A-Za-z0-9_-]{20,}",
    "xox": r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}",
    "AIza": r"\bAIza[A-Za-z0-9_-]{35}",
    "PRIVATE KEY-----": r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----(?:[A-Za-z0-9+/=\s]|\\n)*"
    r"(?:-----END (?:[A-Z]+ )*PRIVATE KEY-----)?",
    # An address with a password; braces, dollars and angle brackets mark a place to fill in.
    "://": r"(?<=://)[^\s/:@\"'{}<>$]{0,100}:[^\s/@\"'{}<>$]{1,200}(?=@)",
}
ANY_SECRET = re.compile("|".join(SECRETS.values()))
# Environment variables whose values are secrets by their very name.
SECRET_VARIABLE = re.compile(r"(?:TOKEN|KEY|SECRET|PASSWORD|PASSWD)$", re.IGNORECASE)
SHORTEST = 8  # characters; a shorter value is found in any text
GONE = "…"


def find_secret(text: str) -> re.Match[str] | None:
    """The first that looks like a secret, if any."""
    return ANY_SECRET.search(text) if any(mark in text and re.search(SECRETS[mark], text) for mark in SECRETS) else None


def redacted(text: str) -> str:
    """The text without anything that looks like a secret, or is the value of a secret environment variable."""
    text = ANY_SECRET.sub(GONE, text) if find_secret(text) else text
    values = _of_environment(tuple(value for name, value in os.environ.items() if SECRET_VARIABLE.search(name)))
    return values.sub(GONE, text) if values else text


@cache
def _of_environment(values: tuple[str, ...]) -> re.Pattern[str] | None:
    """One pattern for all of them, as they are and as JSON writes them. A path or a number is no secret."""
    kept = {value for value in values if len(value) >= SHORTEST and value[0] not in "/~." and not value.isdecimal()}
    kept |= {json.dumps(value, ensure_ascii=ascii_only)[1:-1] for value in kept for ascii_only in (False, True)}
    return re.compile("|".join(re.escape(value) for value in sorted(kept, key=len, reverse=True))) if kept else None
