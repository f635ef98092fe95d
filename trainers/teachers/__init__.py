"""Teachers: what a student learns from. They return data ([`TeacherSignal`]), never losses; see `base.py` for the
protocol."""

from .alignment import AlignedTeacher
from .base import (
    ChunkSignal,
    DenseSignal,
    SparseSignal,
    Teacher,
    TeacherCapabilities,
    TeacherIdentity,
    TeacherSignal,
    check_same_tokenizer,
    check_vocabulary,
    speaking_positions,
    tokenizer_fingerprint,
)
from .hf_teacher import HFTeacher
from .sparse import SparseTeacher, row_seeds, to_sparse


__all__ = [
    "AlignedTeacher",
    "ChunkSignal",
    "DenseSignal",
    "HFTeacher",
    "SparseSignal",
    "SparseTeacher",
    "Teacher",
    "TeacherCapabilities",
    "TeacherIdentity",
    "TeacherSignal",
    "check_same_tokenizer",
    "check_vocabulary",
    "row_seeds",
    "speaking_positions",
    "to_sparse",
    "tokenizer_fingerprint",
]
