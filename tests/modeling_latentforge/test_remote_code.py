import os
import subprocess
import sys

import torch

from modeling_latentforge import LatentForgeIdea, LatentForgeIdeaConfig, LatentForgeWire, LatentForgeWireConfig
from tests.conftest import text_batch, tiny_autoencoder, tiny_student


# `-I` hides the repository and PYTHONPATH; an editable install needs its names blocked
BLOCK = """
import importlib.abc, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_latentforge", "trainers"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
"""
LOAD = """
import sys, torch
assert not [p for p in sys.path if p == {root!r}], sys.path
try:
    import modeling_latentforge
except ImportError:
    pass
else:
    raise SystemExit("modeling_latentforge is importable: the test would prove nothing")
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
ids = torch.load({ids!r}, weights_only=True)
codec = AutoModel.from_pretrained({codec!r}, trust_remote_code=True)
student = AutoModelForCausalLM.from_pretrained({student!r}, trust_remote_code=True)
again = AutoModel.from_pretrained({student!r}, trust_remote_code=True)
assert AutoConfig.from_pretrained({student!r}, trust_remote_code=True).patch_size == 4
wire = AutoModel.from_pretrained({wire!r}, trust_remote_code=True)
packets = [packet.to_bytes() for packet in wire.pack(["a text"])]
idea = AutoModel.from_pretrained({idea!r}, trust_remote_code=True)
packets.append(idea.get_latent_vector("a text", steps=2))
torch.save([codec(ids).logits, student(ids).logits, again(ids).logits, student.generate(ids, max_new_tokens=6,
do_sample=False), packets], {out!r})
"""


def test_checkpoints_load_where_the_package_is_not_installed(tmp_path):
    """Whoever finds a model on the Hub has nothing of ours installed."""
    root = os.getcwd()
    codec, student, ids = tiny_autoencoder(), tiny_student(), text_batch(2, 12)
    codec.save_pretrained(tmp_path / "codec")
    student.save_pretrained(tmp_path / "student")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    wire = LatentForgeWire(LatentForgeWireConfig(encoder_config=sizes, source="bytes", quantizer="fsq")).eval()
    wire.save_pretrained(tmp_path / "wire")
    idea = LatentForgeIdea(LatentForgeIdeaConfig.seed(encoder_config=sizes, source="bytes")).eval()
    idea.save_pretrained(tmp_path / "idea")
    torch.save(ids, tmp_path / "ids.pt")
    code = LOAD.format(
        root=root,
        **{name: str(tmp_path / name) for name in ("codec", "student", "wire", "idea")},
        ids=str(tmp_path / "ids.pt"),
        out=str(tmp_path / "out.pt"),
    )
    env = {
        **os.environ,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-I", "-c", BLOCK + code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    codec_logits, student_logits, again_logits, generated, packets = torch.load(tmp_path / "out.pt", weights_only=True)
    torch.testing.assert_close(packets.pop(), idea.get_latent_vector("a text", steps=2))
    assert packets == [packet.to_bytes() for packet in wire.pack(["a text"])]
    assert torch.equal(codec_logits, codec(ids).logits)
    assert torch.equal(student_logits, student(ids).logits) and torch.equal(again_logits, student_logits)
    assert torch.equal(generated, student.generate(ids, max_new_tokens=6, do_sample=False))
