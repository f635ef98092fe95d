import pytest
import torch

from modeling_latentforge.modeling_patch_decoder import LatentForgeShortConvolution
from tests.conftest import text_batch, tiny_student
from trainers.evaluation.exactness import exactness


def test_an_exact_model_differs_by_rounding_only(tmp_path):
    """A measure that finds differences where there are none sends people after ghosts."""
    for decoder in ("autoregressive", "parallel"):
        found, same = exactness(tiny_student(decoder=decoder).double(), text_batch(3, 11), (9, 5, 2), 9, tmp_path)
        assert same
        assert set(found) == {"cached", "left-padded", "save and load", "log-probabilities"}
        assert found.pop("log-probabilities") < 1e-5  # generate keeps fp32 scores
        assert max(found.values()) < 1e-10


@pytest.mark.parametrize("fault", ["forgets", "leaks"])
def test_a_fault_in_the_cache_or_the_padding_is_found(fault, monkeypatch):
    """A row that cannot fall short certifies anything."""
    student = tiny_student().double()
    if fault == "forgets":
        step = LatentForgeShortConvolution.step
        monkeypatch.setattr(LatentForgeShortConvolution, "step", lambda self, x, recent: step(self, x, 0 * recent))
    else:
        lay_out = student._lay_out
        monkeypatch.setattr(student, "_lay_out", lambda ids, mask, offset: lay_out(ids, torch.ones_like(ids), offset))
    found, _ = exactness(student, text_batch(3, 11), (9, 5, 2), 9)
    assert found["cached" if fault == "forgets" else "left-padded"] > 1e-3
