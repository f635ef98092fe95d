"""Checkpoints in shares of somebody else: what torch reads with pickle is looked at before."""

import os
import pickle
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.conftest import tiny_autoencoder
from tests.trainers.training_helpers import ragged_rows, tiny_args
from trainers import AEConfig, AETrainer, PatchCollator
from trainers.checkpoints import check_shares, numbers_only


class Runs:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def state(**more):
    optimizer = {"lr": 1e-3, "betas": (0.9, 0.95), "amsgrad": False, "foreach": None, "params": ["a", "b"]}
    return {"model": {"a": torch.arange(6.0), "b": torch.ones(2, 3).bfloat16()}, "group": optimizer, **more}


@pytest.fixture
def shares(tmp_path):
    """A checkpoint as FSDP2 writes it, by one process."""
    dcp.save(state(), checkpoint_id=tmp_path / "run" / "optimizer_0", no_dist=True)
    return tmp_path / "run"


def test_what_torch_writes_is_read(shares):
    """A guard that refuses a real checkpoint loses days of training."""
    found = {
        "model": {"a": torch.zeros(6), "b": torch.zeros(2, 3).bfloat16()},
        "group": dict.fromkeys(state()["group"]),
    }
    with numbers_only(shares):
        dcp.load(found, checkpoint_id=shares / "optimizer_0", no_dist=True)
    assert torch.equal(found["model"]["a"], torch.arange(6.0)) and found["group"] == state()["group"]
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


@pytest.mark.parametrize(("protocol", "name"), [(0, ".metadata"), (2, "__0.metadata"), (4, ".metadata")])
def test_metadata_that_would_run_code_is_refused(shares, tmp_path, protocol, name):
    """Resuming from a downloaded checkpoint would be running a downloaded program."""
    path = shares / "optimizer_0" / name
    metadata = pickle.loads((shares / "optimizer_0" / ".metadata").read_bytes())
    metadata.planner_data = Runs(tmp_path / "ran")
    path.write_bytes(pickle.dumps(metadata, protocol))
    with pytest.raises(ValueError, match=rf"optimizer_0/{name} names .*\.mkdir"):
        check_shares(shares)
    assert not (tmp_path / "ran").exists()
    pickle.loads(path.read_bytes())
    assert (tmp_path / "ran").exists()  # it would have


@pytest.mark.parametrize(
    "body",
    [
        b"\x8c\x02os\x940\x8c\x05torch\x94h\x00\x8c\x05mkdir\x93",  # the module by way of the memo
        b"\x8c\x02os\x8c\x05torch0\x8c\x05mkdir\x93",  # what is last pushed is not last on the stack
        b"U\x02osU\x05mkdir\x93",  # strings of Python 2
        b"\x8c\x02os2\x93",  # a string twice
        b"\x8c\x05torch\x8c\x0ehub.load_stuff\x93",  # an attribute of what is allowed
        b"(ios\nmkdir\n",
        b"\x82\x01",
        b"cposix\nmkdir\n",
        b"Pname\n",
    ],
)
def test_a_name_cannot_be_hidden(shares, body):
    """What is not written as Python's pickler writes it may be anything."""
    (shares / "optimizer_0" / ".metadata").write_bytes(b"\x80\x04" + body + b".")
    with pytest.raises(ValueError, match="is refused"):
        check_shares(shares)


def test_a_cut_pickle_is_no_checkpoint(shares):
    path = shares / "optimizer_0" / ".metadata"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="cannot be read"):
        check_shares(shares)


def test_a_share_that_would_run_code_is_refused(tmp_path):
    """Entries that are no tensors are pickles of their own, inside the shares, where the metadata names nothing."""
    dcp.save(state(extra=Runs(tmp_path / "ran")), checkpoint_id=tmp_path / "run" / "optimizer_0", no_dist=True)
    check_shares(tmp_path / "run")
    with pytest.raises(ValueError, match="a share holds more than numbers"), numbers_only(tmp_path / "run"):
        dcp.load(state(extra=None), checkpoint_id=tmp_path / "run" / "optimizer_0", no_dist=True)
    assert not (tmp_path / "ran").exists()
    dcp.load(state(extra=None), checkpoint_id=tmp_path / "run" / "optimizer_0", no_dist=True)
    assert (tmp_path / "ran").exists()


def test_a_trainer_that_shares_asks_before_it_reads(shares, tmp_path):
    """A guard that nobody calls."""
    trainer = AETrainer(
        tiny_autoencoder(),
        tiny_args(AEConfig, tmp_path / "out"),
        train_dataset=ragged_rows(4),
        data_collator=PatchCollator(4),
    )
    shutil.copytree(shares / "optimizer_0", shares / "pytorch_model_fsdp_0")
    (shares / "pytorch_model_fsdp_0" / ".metadata").write_bytes(pickle.dumps(Runs(tmp_path / "ran")))
    trainer.is_fsdp_enabled = True
    trainer.state.best_model_checkpoint = str(shares)
    for read in (
        lambda: trainer._load_from_checkpoint(str(shares), trainer.model),
        lambda: trainer._load_optimizer_and_scheduler(str(shares)),
        trainer._load_best_model,
    ):
        with pytest.raises(ValueError, match="is refused"):
            read()
    assert not (tmp_path / "ran").exists()
