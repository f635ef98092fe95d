"""Rows of `make verify TOPIC=teachers`: what teachers, and the store of their answers, promise."""

from . import verify_sparse_kd, verify_store


ROWS = [*verify_store.ROWS, *verify_sparse_kd.ROWS]
