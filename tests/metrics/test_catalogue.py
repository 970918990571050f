"""One row and one class make a metric."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from lit_diffusion.metrics import SampleMetric
from lit_diffusion.metrics.catalogue import CATALOGUE, dashboard_rows, metrics_table, row_of
from lit_diffusion.metrics.choice import class_of

DOCS = Path(__file__).parent.parent.parent / "docs"


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_row_names_a_class_that_measures_it_and_says_how(name):
    found = class_of(CATALOGUE[name])
    assert issubclass(found, SampleMetric)
    assert not inspect.isabstract(found)
    assert inspect.getdoc(inspect.getmodule(found))


def test_no_two_metrics_share_a_value():
    names = [value for row in CATALOGUE.values() for value in row.value_names]
    assert len(names) == len(set(names))
    for row in CATALOGUE.values():
        for value in row.value_names:
            assert row_of(f"{value}-2k") is row_of(f"{value}/digits-500") is row
    assert row_of("seconds") is row_of("val/loss") is None


def test_the_pages_tables_are_the_catalogues():
    """Brought up to date by ``python -m lit_diffusion.metrics.catalogue``."""
    assert f"<!-- catalogue -->\n{metrics_table()}<!-- end -->" in (DOCS / "metrics.md").read_text()
    assert dashboard_rows() in (DOCS / "dashboard.md").read_text()
