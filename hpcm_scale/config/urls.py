"""Secrets inside URLs and shell commands: refused where they would be written down, hidden where they are told."""

from __future__ import annotations

import re

from hpcm_scale.errors import UserError

PIPE = "pipe:"
"""What a source starts with that is a shell command and no URL."""

_SECRETS = (
    re.compile(r"(?P<keep>//)[^/\s:@'\"]*:(?!\$)[^/\s'\"]+(?=@)"),  # ftp://user:password@host
    re.compile(r"(?P<keep>https?://)[^/\s@'\"$]+(?=@)"),  # a token in place of the user, as of git hosts
    re.compile(
        r"(?P<keep>[?&;](?:[\w.-]*(?:token|signature|secret|passw|credential|accesskey|api[-_]?key|auth)[\w.-]*"
        r"|sig|key|pwd)=)[^&#\s'\"$]+",
        re.IGNORECASE,
    ),
    re.compile(
        r"(?P<keep>\bauthorization\s*:\s*)(?:(?:bearer|basic|token)\s+)?(?!(?:bearer|basic|token)\s)[^\s'\"$]+",
        re.IGNORECASE,
    ),
)
"""Each matches a secret after what may be kept. What a shell will fill in (`$TOKEN`) is none."""


def without_secrets(text: str) -> str:
    """`text` with `…` in place of passwords, tokens and signatures of the URLs and headers in it."""
    for pattern in _SECRETS:
        text = pattern.sub(r"\g<keep>…", text)
    return text


def check_no_secret(text: str, named: str) -> None:
    """Raise UserError, which does not repeat it, if a URL or header in `text`, the value of `named`, holds a secret."""
    if without_secrets(text) != text:
        raise UserError(
            f"{named} holds a password, token or signature, which would be written to the run folder; take it out "
            "and give credentials in the environment (AWS_*, FSSPEC_*)"
        )
