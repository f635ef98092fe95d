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
from .cached_teacher import CachedTeacher, StoreStatistics, verify_store
from .hf_teacher import HFTeacher
from .identity import identity_of
from .sparse import SparseTeacher, row_seeds, to_sparse
from .store import KDStore, SQLiteStore, StoreError, open_store
from .store_parquet import ParquetStore
from .store_rows import content_key


__all__ = [
    "AlignedTeacher",
    "CachedTeacher",
    "ChunkSignal",
    "DenseSignal",
    "HFTeacher",
    "KDStore",
    "ParquetStore",
    "SQLiteStore",
    "SparseSignal",
    "SparseTeacher",
    "StoreError",
    "StoreStatistics",
    "Teacher",
    "TeacherCapabilities",
    "TeacherIdentity",
    "TeacherSignal",
    "check_same_tokenizer",
    "check_vocabulary",
    "content_key",
    "identity_of",
    "open_store",
    "row_seeds",
    "speaking_positions",
    "to_sparse",
    "tokenizer_fingerprint",
    "verify_store",
]
