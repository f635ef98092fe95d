from pathlib import Path

from trainers.evaluation import defaults


DOCS = Path(defaults.__file__).parents[2] / "docs"


def test_every_default_stands_on_the_page_with_its_value_and_a_heading_that_exists():
    """A default that was changed without its page, or a link that leads nowhere, is a figure nobody can check."""
    assert defaults.faults(DOCS) == []


def test_a_wrong_value_and_a_dead_link_are_found(tmp_path):
    """A check that passes whatever the page says is none."""
    page = (DOCS / "defaults.md").read_text().replace("| `decoder_conv_size` | `4`", "| `decoder_conv_size` | `8`")
    page = page.replace("experiments.md#quality-against-speed", "experiments.md#quality")
    page = page.replace("| `prefix_len` | `10` | the first model", "| `prefix_len` | `10` | a guess")
    (tmp_path / "defaults.md").write_text(page.replace("| `kl_clamp`", "| `kl_clamped`"))
    (tmp_path / "experiments.md").write_text((DOCS / "experiments.md").read_text())
    found = " ".join(defaults.faults(tmp_path))
    assert "decoder_conv_size is 4, and the page says 8" in found
    assert "no heading #quality" in found
    assert "LatentForgeIdeaConfig.prefix_len has no source" in found
    assert "kl_clamp is missing" in found and "no field kl_clamped" in found
