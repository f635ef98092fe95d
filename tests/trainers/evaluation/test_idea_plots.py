"""Pictures of ideas: what is drawn is what the model says, and where its vectors lie."""

import pytest
import torch

from tests.modeling_latentforge.test_idea import SHORT, idea
from tests.modeling_latentforge.test_wire import CONTEXTS
from trainers.evaluation.idea_plots import draw_map, draw_strip, flat_map, interpolation_strip, shortened


def test_a_strip_goes_from_one_text_to_the_other(tmp_path):
    """A strip that does not end where it says shows another model."""
    model = idea()
    strip = interpolation_strip(model, *CONTEXTS[:2], "slerp", **SHORT)
    assert [round(alpha, 3) for alpha, _ in strip] == [round(0.1 * place, 3) for place in range(11)]
    ends = model.generate_batch(CONTEXTS[:1], **SHORT), model.generate_batch(CONTEXTS[1:2], **SHORT)
    assert ([strip[0][1]], [strip[-1][1]]) == ends
    draw_strip([*strip, (1.0, "$x_{ \t" * 40)], tmp_path / "strip.png")
    assert (tmp_path / "strip.png").stat().st_size > 5_000
    with pytest.raises(ValueError, match="at least 2"):
        interpolation_strip(model, "a", "b", count=1)


def test_a_map_shows_the_plane_in_which_texts_differ(tmp_path):
    """Any two axes of a vector are a map of nothing."""
    generator = torch.Generator().manual_seed(0)
    plane, _ = torch.linalg.qr(torch.randn(24, 2, generator=generator))
    places = torch.randn(9, 2, generator=generator)
    flat, share = flat_map((places @ plane.T + 3.0).view(9, 3, 8))
    assert share > 0.999
    torch.testing.assert_close(torch.cdist(flat, flat).float(), torch.cdist(places, places), atol=1e-3, rtol=1e-3)
    model = idea(steps=2)
    with torch.no_grad():
        draw_map(model.encode(CONTEXTS).thoughts, CONTEXTS, tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 5_000
    with pytest.raises(ValueError, match="give one of each"):
        draw_map([torch.zeros(3, 3, 8)], ["a"], tmp_path / "x.png")
    with pytest.raises(ValueError, match="three ideas"):
        flat_map(torch.zeros(2, 4))
    assert shortened("a\n b\x07 c", 80) == "a b c" and len(shortened("word " * 40)) == 90
