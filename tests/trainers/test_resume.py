import os
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parents[2]


def test_training_resumed_after_sigkill_ends_in_the_same_bits(tmp_path):
    """Machines die between two steps. If the resumed run is another run, no long experiment can be repeated or
    compared."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.trainers.resume_run", str(tmp_path), "codec", "student"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "codec: bit-equal" in result.stdout and "student: bit-equal" in result.stdout
