"""Passwords, tokens and keys are masked in whatever a run writes or shows."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

MASK = "***"
_WORDS = r"secret|passwd|password|passphrase|credentials?|authorization|signature"
_KEYS = r"api|access|secret|private|account|storage|subscription|encryption|shared"
_NAME = re.compile(
    rf"(?:^|[^a-z])(?:{_WORDS})(?:$|[^a-z])"
    rf"|(?:{_WORDS}|apikey|accesskey|secretkey)"
    rf"|(?:^|[^a-z])(?:{_KEYS})[_.-]?key(?:$|[^a-z])"
    r"|(?:^|[^a-z])(?:token|pat|pwd)$|(?:^|[^a-z])token[_.-]",
    re.IGNORECASE,
)
_SHOUTED = re.compile(r"^[A-Z0-9_]*_KEY$")
"""Environment variables such as WANDB_API_KEY or SSH_KEY; `key` alone is a sample's."""
_HARMLESS = re.compile(
    r"(?:^|[^a-z])(?:bos|eos|pad|unk|sep|cls|mask|image|video|audio|new|next|first|last|special|"
    r"stop|end)[_.-]token|^(?:OLD)?PWD$|token[_.-](?:counts?|ids?|budget|embed|type|length|limit)",
    re.IGNORECASE,
)
# Every repetition that may have to be given up again has an end: else a long word in an error
# would take minutes.
_USER_INFO = re.compile(
    r"(\b[A-Za-z][A-Za-z0-9+.-]{0,30}://)"
    r"(?:[^\s/@:'\"]{0,500}:(?!\d+/)[^\s@'\"]{1,2000}|(?P<user>[^\s/@:'\"]{1,2000}))@"
)
_LIKE_TOKEN = re.compile(
    r"(?=.*[a-z])(?=.*[A-Z])(?=.*[A-Za-z][0-9]+[A-Za-z]).{12,}"
    r"|(?=.*[0-9])(?=.*[A-Za-z])[A-Za-z0-9]{24,}"
)
"""A user without a password that is a token: long, with digits among its letters. Others are names
of people and containers, and the address could not be used again without them."""
_PAIR = re.compile(
    r"""(?P<quote>["']?)(?P<name>[A-Za-z][\w.-]{0,99})(?P=quote)(?P<sign>\s{0,9}[=:]\s{0,9}|%3D)"""
    r"""(?P<value>"[^"\n]*"|'[^'\n]*'|[^\s,;&'"(){}\[\]<>]+)""",
)
_QUERY = re.compile(
    r"([?&](?:key|sig|code|X-Goog-Signature|X-Amz-[\w-]+)=)[^&\s'\"]+", re.IGNORECASE
)
_DEEPEST = 20
"""Pairs within pairs (`a=b=c=...`) from which on everything is masked."""
_BEARER = re.compile(r"\b(Bearer|Basic)\s+[A-Za-z0-9._~+/=-]{8,}")
_SHAPES = re.compile(
    r"(?<!/)\b(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
    r"|(?:AKIA|ASIA)[0-9A-Z]{16}"
    r"|sk-(?=[\w-]{0,300}[A-Za-z0-9]{16})(?=[\w-]{0,300}[0-9])[\w-]{20,}"
    r"|xox[abprs]-[\w-]{10,}|AIza[\w-]{30,}"
    r"|eyJ[\w-]{8,2000}\.eyJ[\w-]{8,}\.[\w-]+)"
)
"""Tokens that show what they are: Hugging Face, GitHub, GitLab, AWS, OpenAI, Slack, Google, JWT.

The component of a path is a file's name, whatever it looks like.
"""


def is_secret_name(name: str) -> bool:
    """Whether the value of a variable, key or parameter of this name is a secret."""
    if _HARMLESS.search(name):
        return False
    return bool(_SHOUTED.match(name) or _NAME.search(name))


def mask_text(text: str) -> str:
    """Mask user information in URLs, values of secret names, and tokens by their shape.

    Names and hosts stay, so that the text still says what it is about.
    """
    if "://" in text:
        text = _USER_INFO.sub(_mask_user, text)
        text = _QUERY.sub(rf"\1{MASK}", text)
    text = _BEARER.sub(rf"\1 {MASK}", text)
    text = _PAIR.sub(_mask_pair, text)
    return _SHAPES.sub(MASK, text)


def mask_value(value: Any, name: str = "") -> Any:
    """Mask the texts in a JSON-like value, by their keys and by what they look like."""
    if isinstance(value, str):
        return MASK if value and is_secret_name(name) else mask_text(value)
    if isinstance(value, Mapping):
        return {key: mask_value(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return (
            type(value)(mask_value(item, name) for item in value)
            if not hasattr(value, "_fields")
            else type(value)(*(mask_value(item, name) for item in value))
        )
    return value


def mask_environment(env: Mapping[str, str]) -> dict[str, str]:
    """Environment variables with secrets masked, so that two different ones still differ."""
    return {
        name: f"{MASK}{_digest(value)}" if is_secret_name(name) else mask_text(value)
        for name, value in env.items()
    }


def _mask_user(match: re.Match[str]) -> str:
    user = match["user"]
    if user is None or _LIKE_TOKEN.fullmatch(user) or _SHAPES.fullmatch(user):
        return f"{match[1]}{MASK}@"
    return match[0]


def _mask_pair(match: re.Match[str], depth: int = 0) -> str:
    value = match["value"]
    before = match[0][: match.start("value") - match.start()]
    if not is_secret_name(match["name"]):  # `ValueError: password=...`
        if depth == _DEEPEST:
            return before + MASK
        return before + _PAIR.sub(lambda inner: _mask_pair(inner, depth + 1), value)
    if value.strip("'\"") in ("", MASK) or _is_count(match):
        return match[0]
    quote = value[0] if value[0] in "'\"" else ""
    return f"{before}{quote}{MASK}{quote}"


def _is_count(match: re.Match[str]) -> bool:
    """Whether a number stands behind the word token, as in `no supervised token: 16 samples`."""
    is_word = match["name"].lower() == "token" and match["sign"] == ": " and not match["quote"]
    return is_word and match["value"].isdecimal() and len(match["value"]) < 10


def _digest(value: str) -> str:
    """Four digits tell values apart, and are too few to find one by trying."""
    return hashlib.sha256(value.encode("utf-8", "surrogateescape")).hexdigest()[:4]
