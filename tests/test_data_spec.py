import pytest
import torch

from lit_diffusion.data_spec import DataSpec, class_number
from lit_diffusion.errors import UserError


def test_a_dequantised_value_belongs_to_its_grey_level():
    for dequantized in (False, True):
        grey = DataSpec("x", (1, 1, 1), 17, (-1.0, 1.0), None, dequantized).grey_levels
        centres = torch.linspace(grey.low, grey.high, 17).double()
        for u in (-0.49, 0.0, 0.49):
            torch.testing.assert_close(grey.centre(centres + u * grey.width), centres)


def test_points_have_none():
    assert DataSpec("x", (2,), None, None, None).grey_levels is None


def test_plain_types_and_back():
    data_spec = DataSpec("x", (1, 8, 8), 17, (-1.0, 1.0), 10, True)
    assert DataSpec.from_plain(data_spec.plain()) == data_spec
    named = DataSpec("x", (1, 8, 8), 17, (-1.0, 1.0), 2, class_names=("a", "b"), class_counts=(3, 0))
    assert DataSpec.from_plain(named.plain()) == named


# ---- classes by name or number -----------------------------------------------------------------------------------


def test_a_class_is_found_by_its_name_or_its_number():
    names = ["cat", "dog", "10", "1"]  # Folders of numbers are in the order of their names.
    assert [class_number(given, 4, names) for given in ("dog", "3", 3, "10", "1", 1)] == [1, 3, 3, 2, 3, 1]
    assert class_number("7", 10) == 7


@pytest.mark.parametrize("given", ["-1", -1, 4, "4", "1.0", "Dog", "", "dgo"])
def test_what_no_class_is_called_lists_the_classes(given):
    with pytest.raises(UserError, match=r"classes are 0 to 3, by name .*dog") as caught:
        class_number(given, 4, ["cat", "dog", "bird", "frog"])
    assert "\n" not in str(caught.value)


def test_of_many_names_those_most_alike_come_first():
    names = [f"n{k:04d}" for k in range(1000)]
    with pytest.raises(UserError) as caught:
        class_number("N0712x", 1000, names)
    line = str(caught.value)
    assert line.startswith("label N0712x: this model's classes are 0 to 999, by name n0712, ")
    assert line.endswith("... (1000 in all)")
    assert len(line) < 200
