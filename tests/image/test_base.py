"""The Debian fallback finds the machine's own mirror, and says what is missing."""

import base
import pytest

DEB822 = """Types: deb
# a comment
URIs: http://mirror.example/debian-security
Suites: bookworm-security

Types: deb
URIs: https://mirror.example/debian
Suites: bookworm
"""


@pytest.mark.parametrize(
    ("sources", "mirror"),
    [
        (DEB822, "https://mirror.example/debian"),
        ("deb http://m.example/debian/ bookworm main", "http://m.example/debian/"),
        ("deb [arch=amd64 signed-by=/k] http://m.example/debian sid main", "http://m.example/debian"),
        ("# deb http://m.example/debian sid main", None),
        ("deb http://m.example/debian-security bookworm main", None),
        ("deb https://m.example/other apt main", None),
        ("", None),
    ],
)  # fmt: skip
def test_the_mirror_is_the_first_debian_archive(sources: str, mirror: str | None) -> None:
    assert base.mirror(sources) == mirror
