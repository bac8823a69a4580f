"""What is exported is what is documented."""

import re
from pathlib import Path

import curvature_client

DOCUMENTATION = Path(__file__).parents[2] / "docs" / "client.md"


def test_every_exported_name_is_documented() -> None:
    text = DOCUMENTATION.read_text(encoding="utf-8")
    documented = set(re.findall(r"\b[A-Z][A-Za-z0-9]+\b", text))
    assert set(curvature_client.__all__) - documented == set()


def test_every_exported_name_is_there_and_nothing_else() -> None:
    public = {name for name in dir(curvature_client) if not name.startswith("_")}
    assert public - {"command"} == set(curvature_client.__all__)
