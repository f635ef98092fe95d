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
from .build import BACKENDS, build_teacher
from .chat_api import ChatWriter
from .env import Secret, read_env
from .flow import BadReply, FlowConfig, TeacherUnavailable
from .hf_teacher import HFTeacher
from .tgi import TGIWriter
from .vllm_http import VLLMServerTeacher
from .vllm_local import VLLMLocalTeacher
from .written import Writer, WrittenTeacher, WrittenText, collect_texts, training_rows


__all__ = [
    "BACKENDS",
    "BadReply",
    "ChatWriter",
    "DenseSignal",
    "FlowConfig",
    "HFTeacher",
    "Secret",
    "SparseSignal",
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
    "read_env",
    "speaking_positions",
    "tokenizer_fingerprint",
    "training_rows",
]
