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
from .build import BACKENDS, build_teacher
from .cached_teacher import CachedTeacher, StoreStatistics, verify_store
from .chat_api import ChatWriter
from .env import Secret, read_env
from .flow import BadReply, FlowConfig, TeacherUnavailable
from .hf_teacher import HFTeacher
from .identity import identity_of
from .sparse import SparseTeacher, row_seeds, to_sparse
from .store import KDStore, SQLiteStore, StoreError, open_store
from .store_parquet import ParquetStore
from .store_rows import content_key
from .tgi import TGIWriter
from .vllm_http import VLLMServerTeacher
from .vllm_local import VLLMLocalTeacher
from .written import Writer, WrittenTeacher, WrittenText, collect_texts, training_rows


__all__ = [
    "AlignedTeacher",
    "BACKENDS",
    "BadReply",
    "CachedTeacher",
    "ChatWriter",
    "ChunkSignal",
    "DenseSignal",
    "FlowConfig",
    "HFTeacher",
    "KDStore",
    "ParquetStore",
    "SQLiteStore",
    "Secret",
    "SparseSignal",
    "SparseTeacher",
    "StoreError",
    "StoreStatistics",
    "TGIWriter",
    "Teacher",
    "TeacherCapabilities",
    "TeacherIdentity",
    "TeacherSignal",
    "TeacherUnavailable",
    "VLLMLocalTeacher",
    "VLLMServerTeacher",
    "Writer",
    "WrittenTeacher",
    "WrittenText",
    "build_teacher",
    "check_same_tokenizer",
    "check_vocabulary",
    "collect_texts",
    "content_key",
    "identity_of",
    "open_store",
    "read_env",
    "row_seeds",
    "speaking_positions",
    "to_sparse",
    "tokenizer_fingerprint",
    "training_rows",
    "verify_store",
]
