import torch

from lit_diffusion.data.facts import DataFacts


def test_a_dequantised_value_belongs_to_its_grey_level():
    for dequantised in (False, True):
        grey = DataFacts("x", (1, 1, 1), 17, (-1.0, 1.0), None, dequantised).grey_levels
        centres = torch.linspace(grey.low, grey.high, 17).double()
        for u in (-0.49, 0.0, 0.49):
            torch.testing.assert_close(grey.centre(centres + u * grey.width), centres)


def test_points_have_none():
    assert DataFacts("x", (2,), None, None, None).grey_levels is None


def test_plain_types_and_back():
    facts = DataFacts("x", (1, 8, 8), 17, (-1.0, 1.0), 10, True)
    assert DataFacts.from_plain(facts.plain()) == facts
    older = {key: value for key, value in facts.plain().items() if key != "dequantised"}
    assert not DataFacts.from_plain(older).dequantised
