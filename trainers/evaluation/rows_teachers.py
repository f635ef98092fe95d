"""Rows of `make verify TOPIC=teachers`: what teachers, and the store of their answers, promise."""

from ..verification import Row
from . import verify_sparse_kd, verify_store
from .teachers_over_http import HTTP_ROWS


ROWS: list[Row] = [*HTTP_ROWS, *verify_store.ROWS, *verify_sparse_kd.ROWS]
