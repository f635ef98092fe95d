"""Where a training logs to: trackio on this machine, what was asked for, or nowhere and said so."""

import logging
import os
import socket
from pathlib import Path

import pytest

from tests.conftest import tiny_autoencoder
from tests.trainers.training_helpers import ragged_rows, tiny_args, train_log
from trainers import AEConfig, AETrainer, PatchCollator, base_trainer
from trainers.arguments import parse_arguments
from trainers.base_trainer import _say_that_no_tracker_is_there, default_report_to


@pytest.fixture
def own_default(monkeypatch: pytest.MonkeyPatch):
    """The default that users have; the other tests have none."""
    _say_that_no_tracker_is_there.cache_clear()
    monkeypatch.setattr(base_trainer, "default_report_to", default_report_to)
    monkeypatch.setattr(base_trainer, "_say_that_no_tracker_is_there", _say_that_no_tracker_is_there)


@pytest.mark.usefixtures("own_default")
def test_a_run_is_kept_by_trackio_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A default that calls elsewhere fails where there is no network, and tells others what is trained."""
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage
    from trackio.utils import TRACKIO_DIR

    def refuse(self, address):
        raise AssertionError(f"a connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    args = tiny_args(AEConfig, tmp_path, report_to=None, run_name="codec")
    assert args.report_to == ["trackio"]
    trainer = AETrainer(tiny_autoencoder(), args, train_dataset=ragged_rows(8), data_collator=PatchCollator(4))
    trainer.train()
    logged = [entry for entry in SQLiteStorage.get_logs("latentforge", "codec") if "train/loss" in entry]
    wanted = train_log(trainer)
    assert len(logged) == len(wanted) == 3
    for entry, own in zip(logged, wanted, strict=True):
        assert {name: entry[f"train/{name}"] for name in own if name != "step"} == {
            name: value for name, value in own.items() if name != "step"
        }
        assert entry["train/global_step"] == own["step"]
    assert str(TRACKIO_DIR) == os.environ["TRACKIO_DIR"] and any(Path(TRACKIO_DIR).iterdir())


@pytest.mark.usefixtures("own_default")
def test_without_trackio_a_run_goes_on_and_says_once_where_its_figures_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """A tracker that nobody asked for must not stop a training, nor be missed only when the curves are wanted."""
    monkeypatch.setattr(base_trainer, "find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING, logger="trainers.base_trainer"):
        assert tiny_args(AEConfig, tmp_path, report_to=None).report_to == []
        tiny_args(AEConfig, tmp_path, report_to=None)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "trackio is not installed" in line and "\n" not in line


@pytest.mark.usefixtures("own_default")
def test_what_is_asked_for_is_what_a_run_logs_to(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """`none` that becomes trackio fills the disk of whoever refused it."""
    assert tiny_args(AEConfig, tmp_path, report_to="none").report_to == []
    assert tiny_args(AEConfig, tmp_path, report_to=["tensorboard", "trackio"]).report_to == ["tensorboard", "trackio"]
    (args,) = parse_arguments(AEConfig, argv=["--output_dir", str(tmp_path), "--report_to", "none"])
    assert args.report_to == [] and not caplog.records


def test_a_push_of_the_model_publishes_no_run(tmp_path: Path):
    """transformers' default makes a public Space of a run beside a model that is pushed."""
    args = tiny_args(AEConfig, tmp_path)
    if not hasattr(args, "trackio_static_space_id"):
        pytest.skip("this transformers makes no such Space")
    assert args.trackio_static_space_id is False
    assert tiny_args(AEConfig, tmp_path, trackio_static_space_id="me/runs").trackio_static_space_id == "me/runs"
