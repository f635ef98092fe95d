from pathlib import Path

import pytest

from tests.conftest import KEYWORDS


def test_the_first_latentforges_selectors_name_modules_that_exist():
    """`pytest -k ae_unit` from the old README that selects nothing would report success."""
    modules = {path.stem for path in Path(__file__).parent.rglob("test_*.py")}
    for keyword, names in KEYWORDS.items():
        assert names and set(names) <= modules, keyword


def test_a_selector_reaches_the_tests_of_its_modules(request: pytest.FixtureRequest):
    """Keywords that are set too late are never matched."""
    assert "env" in request.node.listextrakeywords()
