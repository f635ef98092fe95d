"""Rows of `make verify TOPIC=teachers`: where distributions come from."""

from ..verification import Row
from .teachers_over_http import HTTP_ROWS


ROWS: list[Row] = [*HTTP_ROWS]
