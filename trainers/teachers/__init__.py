"""Teachers: what a student learns from. They return data ([`TeacherSignal`]), never losses; see `base.py` for the
protocol."""

from .base import (
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


__all__ = [
    "DenseSignal",
    "HFTeacher",
    "SparseSignal",
    "Teacher",
    "TeacherCapabilities",
    "TeacherIdentity",
    "TeacherSignal",
    "check_same_tokenizer",
    "check_vocabulary",
    "speaking_positions",
    "tokenizer_fingerprint",
]
